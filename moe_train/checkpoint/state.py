"""The tensors of a run as Megatron-Core's sharded tensors: model, optimizer, random streams.

Every optimizer tensor has the shape and the name of its parameter, whether the distributed optimizer is on or off, so
a checkpoint loads in any layout. Names: `K` for a parameter or buffer of the model, and for its optimizer state
`optimizer.state.exp_avg.K`, `optimizer.state.exp_avg_sq.K`, and where K is 16-bit `optimizer.state.fp32_param.K`. A
matrix that Muon updates has `optimizer.state.momentum_buffer.K`.
Delayed scaling of the layer with weight K is `fp8_scales.K`, and the EMA of a parameter `ema.K`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state as ps
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
from megatron.core.utils import unwrap_model
from torch import Tensor

from moe_train.checkpoint.storage import Request, StateDict
from moe_train.formats import dcp_metadata
from moe_train.model.fp8 import delayed_scaling
from moe_train.run import Run

# torch's optimizers count steps for each parameter, the fused ones of Transformer Engine and apex for each group.
_COUNTS_EACH_PARAMETER = (torch.optim.Adam, torch.optim.AdamW)
_OPTIMIZER = "optimizer.state"
_FP32_GROUPS = "fp32_from_fp16_params"  # of Float16OptimizerWithFloat16Params, in optimizer/optimizer.py upstream
FP8_SCALES = "fp8_scales."
_MASTER, _MASTER_OF_DISTRIBUTED = _OPTIMIZER + ".fp32_param.", _OPTIMIZER + ".param."


def _options() -> dict[str, Any]:
    """How Megatron-Core is to describe its state (upstream's training/checkpointing.py builds the same)."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "dp_cp_group": ps.get_data_parallel_group(with_context_parallel=True),
    }


def model_state(chunks: Sequence[Any]) -> StateDict:
    """Parameters and buffers of this rank: `model`, or `model0`, `model1`, ... where it has several chunks."""
    names = ["model"] if len(chunks) == 1 else [f"model{i}" for i in range(len(chunks))]
    state: StateDict = {}
    for name, model in zip(names, unwrap_model(list(chunks)), strict=True):
        state[name] = model.sharded_state_dict(metadata=_options())
    return state


def optimizer_state(run: Run, model: StateDict, *, loading: bool) -> StateDict:
    """Optimizer tensors of this rank under the number of the optimizer (dense and expert parameters have one each).

    `model` is this rank's `model_state`. With the distributed optimizer, data-parallel ranks gather their shards.
    """
    state: StateDict = {}
    for i, optimizer in enumerate(optimizers(run)):
        _allocate(optimizer)
        if isinstance(optimizer, DistributedOptimizer):
            state[str(i)] = _distributed_state(optimizer, model, loading)
        else:
            state[str(i)] = _with_numbered_groups(optimizer.sharded_state_dict(model, loading, metadata=_options()))
    if isinstance(run.optimizer, LayerWiseDistributedOptimizer):
        state = _as_only_copies(state)
    return _rename_masters(state)


def _with_numbered_groups(state: StateDict) -> StateDict:
    """The fp32 weights by the number of their group, of which a rank may have none: reading drops empty lists."""
    if _FP32_GROUPS in state:
        state[_FP32_GROUPS] = dict(enumerate(state[_FP32_GROUPS]))
    return state


def optimizers(run: Run) -> list[Any]:
    """Megatron-Core's optimizers of this rank that have parameters."""
    chained = getattr(run.optimizer, "chained_optimizers", [run.optimizer])
    return [optimizer for optimizer in chained if not getattr(optimizer, "is_stub_optimizer", False)]


def _allocate(optimizer: Any) -> None:
    """Give torch's optimizer its state, which it otherwise makes in the first step."""
    optimizer.init_state_fn(optimizer.optimizer, optimizer.config)
    if isinstance(optimizer.optimizer, _COUNTS_EACH_PARAMETER):
        for state in optimizer.optimizer.state.values():
            state.setdefault("step", torch.tensor(0.0))


def _distributed_state(optimizer: DistributedOptimizer, model: StateDict, loading: bool) -> dict[int, StateDict]:
    """Optimizer state with the shapes of parameters, as `sharded_param_state_fully_reshardable` should give it.

    Upstream (optimizer/distrib_optimizer.py; 0.16 to 0.19, right in 0.20) joins the buckets of a buffer without the
    padding at their ends and then looks parameters up at their places with padding: moments behind a padded bucket are
    those of other parameters. Its `sharded_state_dict` also wants a step count, which AdamW has after the first step.
    """
    gathered = None
    if not loading:
        gathered = optimizer.get_parameter_state_dp_zero(use_gloo_comm=False, return_on_all_ranks=True)
    shards, _ = extract_sharded_tensors_and_factories(model)
    of_parameter = {id(shard.data): shard for shard in nested_values(shards)}
    state: dict[int, StateDict] = {}
    for i, buffer in enumerate(optimizer.buffers):
        places = _places_without_padding(buffer)
        names = next(iter(gathered[i].values())) if gathered else dict.fromkeys(("param", "exp_avg", "exp_avg_sq"))
        for parameter in buffer.param_index_map:  # upstream reads the state back in this order
            tensors: StateDict = {}
            for name, values in names.items():
                if name in ("step", "numel_unpadded"):
                    continue
                if values is None:
                    data = torch.empty(parameter.shape, dtype=torch.float32)
                else:
                    data = values[places[parameter]].view(parameter.shape)
                tensors[name] = make_sharded_optimizer_tensor(of_parameter[id(parameter)], data, f"{_OPTIMIZER}.{name}")
            state[len(state)] = tensors
    return state


def _as_only_copies(state: StateDict) -> StateDict:
    """Of parameters that one data-parallel rank has the state of: without this rank's number among these ranks, of
    which the first writes."""

    def only(value: Any) -> Any:
        if isinstance(value, ShardedTensor | ShardedTensorFactory):
            return replace(value, replica_id=(*value.replica_id[:-1], 0))
        return value

    only_copies: StateDict = dict_list_map_inplace(only, state)
    return only_copies


def average_state(run: Run, model: StateDict) -> StateDict:
    """The EMA of the weights of this rank; nothing where the run has none. `model` is this rank's `model_state`."""
    if run.weight_average is None:
        return {}
    shards, _ = extract_sharded_tensors_and_factories(model)
    of_parameter = {id(shard.data): shard for shard in nested_values(shards)}
    averages = run.weight_average.averages
    return {
        str(i): make_sharded_optimizer_tensor(of_parameter[id(parameter)], average, dcp_metadata.EMA)
        for i, (parameter, average) in enumerate(averages.items())
    }


def load_average(run: Run, loaded: StateDict) -> None:
    """Continue with the read EMA of the weights; where nothing was read, with the weights."""
    if not loaded:
        run.weight_average.reset()
        return
    for i, average in enumerate(run.weight_average.averages.values()):
        average.copy_(loaded[str(i)])


def unshared_memory(run: Run, state: StateDict) -> set[int]:
    """Addresses of the memory that `optimizer_state` has made for `state`: distributed optimizers gather copies."""
    gathered = [state[str(i)] for i, opt in enumerate(optimizers(run)) if isinstance(opt, DistributedOptimizer)]
    return {shard.data.untyped_storage().data_ptr() for part in gathered for shard in nested_values(part)}


def _places_without_padding(buffer: Any) -> dict[Tensor, slice]:
    """Position of each parameter in the buckets of a buffer, laid end to end without their padding."""
    starts, total = [], 0
    for bucket in buffer.buckets:
        starts.append(total - bucket.offset)
        total += bucket.numel_unpadded
    return {
        parameter: slice(start + starts[bucket], end + starts[bucket])
        for parameter, (start, end, bucket) in buffer.param_index_map.items()
    }


def _rename_masters(state: StateDict) -> StateDict:
    """One name for the fp32 weights, which the two kinds of optimizer name differently."""

    def rename(value: Any) -> Any:
        if isinstance(value, ShardedTensor | ShardedTensorFactory) and value.key.startswith(_MASTER_OF_DISTRIBUTED):
            return replace(value, key=_MASTER + value.key.removeprefix(_MASTER_OF_DISTRIBUTED))
        return value

    renamed: StateDict = dict_list_map_inplace(rename, state)
    return renamed


def without_masters(state: StateDict) -> StateDict:
    """`optimizer_state` without the fp32 weights: an fp32 model's own weights are these already."""
    remaining: StateDict = {}
    for key, value in state.items():
        if isinstance(value, dict):
            remaining[key] = without_masters(value)
        elif not (isinstance(value, ShardedTensor | ShardedTensorFactory) and value.key.startswith(_MASTER)):
            remaining[key] = value
    return remaining


def find_masters(request: Request, contents: dcp_metadata.Metadata, fp32: bool) -> None:
    """Point the request to the most precise weights in the checkpoint, which may be of a run in another precision."""
    saved = contents.state_dict_metadata
    for tensor in request.tensors:
        if tensor.key.startswith(_MASTER) and tensor.key not in saved:
            tensor.key = tensor.key.removeprefix(_MASTER)
        elif fp32 and _MASTER + tensor.key in saved:
            tensor.key = _MASTER + tensor.key


@torch.no_grad()
def load_model(chunks: Sequence[Any], loaded: StateDict) -> None:
    """Put read weights and buffers into the model.

    Raises:
        RuntimeError: the model has a parameter that was not in the request, which is a bug.
    """
    for model, state in zip(unwrap_model(list(chunks)), loaded.values(), strict=True):
        missing, unexpected = model.load_state_dict(state, strict=False)
        missing = [name for name in missing if not name.endswith("_extra_state")]  # FP8 scales, which are pickled
        if missing or unexpected:
            raise RuntimeError(f"not in the sharded state: {missing}; not in the model: {unexpected}")


@torch.no_grad()
def load_optimizer(run: Run, loaded: StateDict, updates: int) -> None:
    """Put read moments and fp32 weights into the optimizers, which have done `updates` steps."""
    for i, optimizer in enumerate(optimizers(run)):
        state = loaded.get(str(i))
        if state is None:  # a pipeline stage without experts has an optimizer for them, and no tensor in it
            continue
        if isinstance(optimizer, DistributedOptimizer):
            _drop_steps(optimizer.optimizer)  # upstream looks for each state of torch's AdamW among the read tensors
            optimizer.load_parameter_state_from_fully_reshardable(state)
        else:
            _load_plain(optimizer, state)
        _set_steps(optimizer.optimizer, updates)


def _load_plain(optimizer: Any, state: StateDict) -> None:
    moments = state.get("optimizer", state)
    parameters = [p for group in optimizer.optimizer.param_groups for p in group["params"]]
    for number, tensors in moments.get("state", {}).items():
        for name, tensor in tensors.items():
            optimizer.optimizer.state[parameters[number]][name].copy_(tensor)
    masters = state.get(_FP32_GROUPS, {})
    for number, group in enumerate(getattr(optimizer, "fp32_from_float16_groups", [])):
        for parameter, tensor in zip(group, masters.get(number, []), strict=True):
            parameter.copy_(tensor)


def _drop_steps(optimizer: torch.optim.Optimizer) -> None:
    for state in optimizer.state.values():
        state.pop("step", None)


def _set_steps(optimizer: torch.optim.Optimizer, updates: int) -> None:
    if isinstance(optimizer, _COUNTS_EACH_PARAMETER):
        for state in optimizer.state.values():
            state["step"] = torch.tensor(float(updates))
    else:
        for group in optimizer.param_groups:
            group["step"] = updates


def scalers(run: Run) -> dict[str, dict[str, float]]:
    """Dynamic loss scale of fp16 and its counters, of the `dense` and the `expert` optimizer."""
    states: dict[str, dict[str, float]] = {}
    for optimizer in optimizers(run):
        scaler = getattr(optimizer, "grad_scaler", None)
        if scaler is not None:
            states[_kind(optimizer)] = {name: float(value) for name, value in scaler.state_dict().items()}
    return states


def load_scalers(run: Run, saved: dict[str, dict[str, float]]) -> None:
    """Continue with the saved loss scales. A checkpoint without them (another precision) leaves the configured ones."""
    for optimizer in optimizers(run):
        scaler, state = getattr(optimizer, "grad_scaler", None), saved.get(_kind(optimizer))
        if scaler is not None and state:
            counters = {name: int(value) for name, value in state.items() if name != "scale"}
            scaler.load_state_dict({"scale": torch.tensor([state["scale"]], dtype=torch.float), **counters})


def _kind(optimizer: Any) -> str:
    return "expert" if any(group.get("is_expert_parallel") for group in optimizer.param_groups) else "dense"


def random_state(run: Run) -> StateDict:
    """Random streams of this rank, each one row of a tensor with a row for every rank."""
    streams: dict[str, Tensor] = {"cpu": torch.get_rng_state()}
    if run.device.type == "cuda":
        streams["cuda"] = torch.cuda.get_rng_state()
    for name, stream in tensor_parallel.get_cuda_rng_tracker().get_states().items():
        streams[f"tracker.{name}"] = stream
    rows = (0, run.rank.rank, run.layout.world_size)
    return {
        name: ShardedTensor.from_rank_offsets(f"rng.{name}", stream.clone(), rows, prepend_axis_num=1)
        for name, stream in streams.items()
    }


def load_random(run: Run, loaded: StateDict) -> None:
    """Continue the random streams where this rank's were."""
    tracker = tensor_parallel.get_cuda_rng_tracker()
    tracker.set_states({name: loaded.get(f"tracker.{name}", state) for name, state in tracker.get_states().items()})
    torch.set_rng_state(loaded["cpu"])
    if "cuda" in loaded:
        torch.cuda.set_rng_state(loaded["cuda"])


def delayed_scales(chunks: Sequence[Any], model: StateDict) -> StateDict:
    """Scales and histories of delayed scaling, under the numbers of the layer and, for experts, of the matrix in it.

    `model` is this rank's `model_state`. Each has the layer and expert index of the layer's weight, but is not split.
    """
    shards, _ = extract_sharded_tensors_and_factories(model)
    of_parameter = {id(shard.data): shard for shard in nested_values(shards)}
    state: StateDict = {}
    for number, (module, scales) in enumerate(delayed_scaling.layers_of(unwrap_model(list(chunks)))):
        matrices = _matrices(of_parameter[id(module.weight)])
        state[str(number)] = {
            str(i): _beside(matrix, delayed_scaling.packed(scales, i)) for i, matrix in enumerate(matrices)
        }
    return state


def _matrices(weight: ShardedTensor | ShardedTensorFactory) -> list[ShardedTensor]:
    """One shard for each matrix (expert) in a weight, which may be stored in several parts (gate and up)."""
    parts = weight.build() if isinstance(weight, ShardedTensorFactory) else [weight]
    places = {part.global_offset[: part.prepend_axis_num]: part for part in reversed(list(nested_values(parts)))}
    return list(reversed(places.values()))


def _beside(weight: ShardedTensor, data: Tensor) -> ShardedTensor:
    """`data` with the layer and expert of `weight`. Ranks with other parts of the matrix hold copies of it."""
    lead = weight.prepend_axis_num
    places = [(axis, weight.global_offset[axis], weight.global_shape[axis]) for axis in range(lead)]
    replica = weight.replica_id if isinstance(weight.replica_id, tuple) else (weight.replica_id,)
    return ShardedTensor.from_rank_offsets(
        f"{FP8_SCALES}{weight.key}", data, *places, prepend_axis_num=lead,
        replica_id=(*replica, int(any(weight.global_offset[lead:]))),
    )  # fmt: skip


def load_delayed_scales(chunks: Sequence[Any], loaded: StateDict) -> None:
    """Put read scales and histories back."""
    for number, (_, scales) in enumerate(delayed_scaling.layers_of(unwrap_model(list(chunks)))):
        for i, values in loaded[str(number)].items():
            delayed_scaling.unpack(scales, int(i), values)
