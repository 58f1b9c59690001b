"""Each patch of `parallel/runtime` is needed: without it its scenario, a piece of Megatron-Core's own code, fails."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.distributed.helper import run_distributed

OLD = tuple(map(int, version("megatron-core").split(".")[:2])) < (0, 19)


def _rotary_frequencies() -> None:
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    assert RotaryEmbedding(8, rotary_percent=1.0, cp_group=torch.distributed.group.WORLD).inv_freq.shape == (4,)


def _gradient_scaler() -> None:
    from megatron.core.optimizer.grad_scaler import ConstantGradScaler

    assert ConstantGradScaler(4.0).scale.item() == 4.0


def _gradient_scaler_restored() -> None:
    from megatron.core.optimizer.grad_scaler import DynamicGradScaler

    scaler = DynamicGradScaler(
        initial_scale=4.0, min_scale=1.0, growth_factor=2.0, backoff_factor=0.5, growth_interval=10, hysteresis=2
    )
    scaler.load_state_dict({"scale": torch.tensor([8.0]), "growth_tracker": 0, "hysteresis_tracker": 2})
    assert scaler.scale.item() == 8.0


def _rotary_embedding_under_context_parallelism() -> None:
    from megatron.core.models.common.embeddings.rope_utils import get_pos_emb_on_this_cp_rank

    class Group:
        def size(self) -> int:
            return 2

        def rank(self) -> int:
            return 1

    positions = get_pos_emb_on_this_cp_rank(torch.arange(8.0).view(8, 1), 0, Group())
    assert positions.flatten().tolist() == [2, 3, 4, 5]


def _streams() -> None:
    from megatron.core.transformer.moe import token_dispatcher  # noqa: F401  # what uses them

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        event = stream.record_event()
    event.synchronize()
    torch.cuda.synchronize()


def _random_streams() -> None:
    from megatron.core import tensor_parallel
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    torch.distributed.barrier()
    tracker = get_cuda_rng_tracker()
    tracker.add("a", 1)
    with tracker.fork("a"):
        first = torch.rand(2)
    with tracker.fork("a"):
        second = torch.rand(2)
    assert not torch.equal(first, second)
    assert tensor_parallel.get_cuda_rng_tracker() is tracker


def _parameter_types_of_the_optimizer() -> None:
    assert torch.zeros(1).type() == "torch.cuda.FloatTensor"  # as optimizer/optimizer.py asks
    assert torch.zeros(1, dtype=torch.bfloat16).type() in ["torch.cuda.HalfTensor", "torch.cuda.BFloat16Tensor"]
    assert torch.zeros(1).type() != "torch.cuda.HalfTensor"


def _multi_latent_attention() -> None:
    from tests.model.tiny import build_tiny

    build_tiny()


def _router_scores() -> None:
    from megatron.core.transformer.moe.moe_utils import router_gating_linear

    scores = router_gating_linear(torch.ones(3, 2), torch.ones(4, 2), None, torch.float32)
    assert torch.equal(scores, torch.full((3, 4), 2.0))


def _all_to_all_split_sizes() -> None:
    from megatron.core.transformer.moe import token_dispatcher

    splits = token_dispatcher.maybe_move_tensor_to_cpu(torch.tensor([2]), as_numpy=True)
    torch.distributed.all_to_all_single(torch.empty(2), torch.ones(2), splits.tolist(), splits.tolist())
    assert not torch.is_tensor(splits)


def _recomputed_norm() -> None:
    _recompute(torch.nn.functional.silu)


def _recomputed_without_compiling() -> None:
    from unittest import mock

    from megatron.core.tensor_parallel import random as mcore_random

    refused = mock.Mock(side_effect=RuntimeError("no compiler"))
    with mock.patch.object(mcore_random, "load_inline", refused, create=True):
        _recompute(torch.nn.functional.silu)


def _recompute(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Throw the output of `function` away and compute it again in the backward pass, as upstream does with norms."""
    from megatron.core.tensor_parallel import CheckpointWithoutOutput

    x = torch.rand(4, requires_grad=True)
    checkpoint = CheckpointWithoutOutput()
    kept = checkpoint.checkpoint(function, x)
    result = kept.square()
    checkpoint.discard_output_and_register_recompute(result)
    assert kept.untyped_storage().nbytes() == 0
    result.sum().backward()
    again = x.detach().requires_grad_()
    function(again).square().sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, again.grad)


def _tokens_in_order() -> None:
    from megatron.core.transformer.moe import token_dispatcher

    tokens, probs = torch.ones(3, 2), torch.ones(3)
    sort = token_dispatcher.sort_chunks_by_idxs
    same, same_probs = sort(tokens, torch.tensor([1, 0, 2]), torch.arange(3), probs=probs, fused=False)
    assert (same.data_ptr(), same_probs.data_ptr()) == (tokens.data_ptr(), probs.data_ptr())
    other, _ = sort(torch.arange(3.0), torch.tensor([1, 2]), torch.tensor([1, 0]), fused=False)
    assert other.tolist() == [1, 2, 0]


def _unequal_parts() -> None:
    from megatron.core.tensor_parallel import mappings

    group = torch.distributed.group.WORLD
    rank = torch.distributed.get_rank()
    mine = torch.full((1 + 2 * rank, 2), float(rank), requires_grad=True)
    whole = mappings.gather_from_sequence_parallel_region(mine, group=group, output_split_sizes=[1, 3])
    assert whole[:, 0].tolist() == [0, 1, 1, 1]
    back = mappings.reduce_scatter_to_sequence_parallel_region(whole, group=group, input_split_sizes=[1, 3])
    assert back.tolist() == (2 * mine).tolist()
    back.sum().backward()
    assert mine.grad is not None
    assert mine.grad.tolist() == torch.full_like(mine, 2.0).tolist()


def _tokens_of_a_split_sequence() -> None:
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer import multi_token_prediction

    group = torch.distributed.group.WORLD
    mask, found = torch.ones(1, 4), []
    for _ in range(2):
        mask, count = multi_token_prediction.roll_tensor(mask, shifts=-1, dims=-1, cp_group=group)
        found.append(count.item())
    assert found == [3.5, 3.0]  # of 8 tokens on two ranks 7 have a next one, and 6 one after that
    _, count = multi_token_prediction.roll_tensor(torch.tensor([[1.0, 1, 0, 0]]), cp_group=group)
    assert count.item() == 1.75  # the same share of the tokens that count, wherever those are
    _, count = multi_token_prediction.roll_tensor(torch.tensor([[0.0, 1, 1, 1]]))
    assert count.item() == 3 * 3 / 4
    documents = PackedSeqParams(qkv_format="thd", cu_seqlens_q=torch.tensor([0, 1, 4]))
    rolled, count = multi_token_prediction.roll_tensor(torch.ones(1, 4), packed_seq_params=documents)
    assert (rolled.tolist(), count.item()) == ([[0.0, 1, 1, 0]], 4)


def _recomputed_prediction() -> None:
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer

    class Layer:
        config = SimpleNamespace(
            fp8=None, fp4=None, distribute_saved_activations=False, recompute_method="uniform", recompute_num_layers=1
        )

        def _proj_and_transformer_layer(
            self, hidden_states: torch.Tensor, decoder_input: Any = None, packed_seq_params: Any = None, **_: Any
        ) -> torch.Tensor:
            assert packed_seq_params is documents
            return hidden_states * decoder_input

    documents, layer = PackedSeqParams(qkv_format="thd"), Layer()
    x, scale = torch.rand(4, requires_grad=True), torch.tensor(3.0)
    checkpointed = partial(MultiTokenPredictionLayer._checkpointed_forward, layer)
    if OLD:
        checkpointed = partial(checkpointed, layer._proj_and_transformer_layer)
    checkpointed(hidden_states=x, decoder_input=scale, packed_seq_params=documents).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [3.0] * 4


def _clipped_gradients() -> None:
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
    from torch.utils._python_dispatch import TorchDispatchMode

    operations: list[str] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            operations.append(function.name())
            return function(*args, **(kwargs or {}))

    weight = torch.nn.Parameter(torch.zeros(3))
    weight.grad = torch.full((3,), 4.0)
    with Record():
        clip_grad_by_total_norm_fp32([weight], 1.0, 2.0)
    torch.testing.assert_close(weight.grad, torch.full((3,), 2.0))
    assert "aten::copy_" not in operations


def _updated_parameters() -> None:
    from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer

    world, rank = torch.distributed.group.WORLD, torch.distributed.get_rank()
    parameters = [torch.full((1 + 2 * i,), float(rank)) for i in range(2)]
    groups: Any = SimpleNamespace(dp_cp=world, expt_dp=world)
    each = [[parameter] for parameter in parameters]
    ranks: Any = SimpleNamespace(
        pg_collection=groups, dp_cp=world, expt_dp=world, dp_cp_params_list=each, expt_dp_params_list=None
    )
    LayerWiseDistributedOptimizer.allgather_params(ranks)
    assert [parameter.tolist() for parameter in parameters] == [[0.0], [1.0] * 3]


SCENARIOS: dict[str, Callable[[], None]] = {
    "device_of_this_rank": _rotary_frequencies,
    "constructors_with_literal_cuda": _gradient_scaler,
    "tensors_that_stay": _gradient_scaler_restored,
    "pinned_memory_is_plain_memory": _rotary_embedding_under_context_parallelism,
    "streams_that_do_nothing": _streams,
    "random_state_of_the_cpu": _random_streams,
    "tensor_types_without_cuda": _parameter_types_of_the_optimizer,
    "attention_without_transformer_engine": _multi_latent_attention,
    "router_without_transformer_engine": _router_scores,
    "split_sizes_as_lists": _all_to_all_split_sizes,
    "recompute_without_transformer_engine": _recomputed_norm,
    "recomputed_outputs_without_a_compiler": _recomputed_without_compiling,
    "chunks_in_order_stay": _tokens_in_order,
    "gradients_scaled_in_place": _clipped_gradients,
    "parameters_broadcast_by_their_ranks": _updated_parameters,
    "parts_of_unequal_length": _unequal_parts,
    "predicted_tokens_of_whole_sequences": _tokens_of_a_split_sequence,
    "prediction_recomputed_with_packed_documents": _recomputed_prediction,
}
RANKS = dict.fromkeys(
    ("parameters_broadcast_by_their_ranks", "parts_of_unequal_length", "predicted_tokens_of_whole_sequences"), 2
)
ONLY_OLD = {
    "attention_without_transformer_engine", "router_without_transformer_engine",
    "prediction_recomputed_with_packed_documents",
}  # fmt: skip
ONLY_NEW = {"recomputed_outputs_without_a_compiler"}


def run_scenario(name: str, skip: tuple[str, ...]) -> str:
    """Outcome of a scenario with all patches but `skip`: "" or the error."""
    from parallel.runtime import cpu

    cpu.prepare(skip=skip)
    try:
        SCENARIOS[name]()
    except Exception as error:
        return repr(error)
    return ""


def test_every_patch_has_a_scenario() -> None:
    """A new patch comes with its scenario."""
    from parallel.runtime import megatron_fixes, torch_cuda

    assert {patch.__name__ for patch in (*torch_cuda.PATCHES, *megatron_fixes.PATCHES)} == set(SCENARIOS)


@pytest.mark.parametrize("name", SCENARIOS)
def test_patch_is_needed_and_enough(name: str) -> None:
    """The scenario works with the patch, and fails without it where the installed version needs it."""
    ranks = RANKS.get(name, 1)
    assert set(run_distributed(run_scenario, ranks, name, ())) == {""}
    if name not in (ONLY_NEW if OLD else ONLY_OLD):
        assert "" not in run_distributed(run_scenario, ranks, name, (name,))


def test_groups_are_scored_by_their_best_expert_only_within_its_patch() -> None:
    """The one patch that a model asks for and leaves again: upstream adds up the experts of a group."""
    from megatron.core.transformer.moe import moe_utils

    from parallel.runtime.expert_groups import groups_scored_by_their_best_expert

    def chosen() -> list[int]:
        scores = torch.tensor([[0.9, 0.0, 0.5, 0.5]])
        _, experts = moe_utils.group_limited_topk(
            scores, topk=2, num_tokens=1, num_experts=4, num_groups=2, group_topk=1
        )
        return sorted(experts[0].tolist())

    with groups_scored_by_their_best_expert():
        assert chosen() == [0, 1]
    assert chosen() == [2, 3]
