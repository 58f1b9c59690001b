"""Routed experts of the `local` backend in one grouped GEMM. Checkpoints are those of upstream's SequentialMLP and
TEGroupedMLP, which use a GEMM per expert or need Transformer Engine (transformer/moe/experts.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel import CheckpointWithoutOutput
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint
from torch import Tensor, nn

from moe_train.model.kernels import gemm
from moe_train.model.local.swiglu import WeightedSwiGLU

StateDict = dict[str, Any]


class ExpertLinear(nn.Module):
    """One linear layer of all local experts: weight [experts, out, in], sharded by rows or columns over etp ranks.

    Other number formats set `kernel`.
    """

    kernel = gemm.HIGH_PRECISION
    is_expert = True

    def __init__(self, experts: int, outputs: int, inputs: int, split: int, config: Any, init_method: Any) -> None:
        """`outputs` and `inputs` are those of this rank; `split` is the dimension (1 or 2) that etp ranks split."""
        super().__init__()
        weight = torch.empty(experts, outputs, inputs, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight = nn.Parameter(weight)
        if config.perform_initialization:
            init_method(self.weight)
        set_tensor_model_parallel_attributes(self.weight, True, split, 1)
        # As upstream marks expert parameters: their gradients are reduced over the ranks with the same experts only.
        self.weight.allreduce = config.expert_model_parallel_size == 1  # type: ignore[attr-defined]

    def gemm(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """[t, in] -> [t, out]; the first counts[0] rows go through the first expert, and so on."""
        result: Tensor = gemm.GroupedLinear.apply(x, self.weight, counts, self.kernel, torch.is_grad_enabled())
        return result

    def forward(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        return self.gemm(x, counts)


class GroupedExperts(MegatronModule):
    """SwiGLU experts without biases: `linear_fc2(silu(gate) * up * probability)`, fc1 makes gate and up at once."""

    linear = ExpertLinear

    def __init__(self, num_local_experts: int, config: Any, pg_collection: Any = None, name: str | None = None) -> None:
        super().__init__(config=config)
        self.num_local_experts = num_local_experts
        selective = config.recompute_granularity == "selective"
        self.recompute_activation = selective and "moe_act" in config.recompute_modules
        self.ep_group, self.tp_group, self.dp_group = pg_collection.ep, pg_collection.expt_tp, pg_collection.expt_dp
        inner, hidden = config.moe_ffn_hidden_size // self.tp_group.size(), config.hidden_size
        self.linear_fc1 = self.linear(num_local_experts, 2 * inner, hidden, 1, config, config.init_method)
        self.linear_fc2 = self.linear(num_local_experts, hidden, inner, 2, config, config.output_layer_init_method)

    def forward(self, tokens: Tensor, tokens_per_expert: Tensor, probs: Tensor, **_: Any) -> tuple[Tensor, None]:
        """`tokens` [t, hidden_size] sorted by local expert, their number for each of these, and the router's weight of
        each token [t] -> outputs [t, hidden_size], already weighted, and no bias."""
        counts = tokens_per_expert.tolist()
        gate_and_up = self.linear_fc1(tokens, counts)
        if not self.recompute_activation:
            return self.linear_fc2(self.activation(gate_and_up, probs), counts), None
        checkpoint = CheckpointWithoutOutput()
        output = self.linear_fc2(checkpoint.checkpoint(self.activation, gate_and_up, probs), counts)
        checkpoint.discard_output_and_register_recompute(output)
        return output, None

    def activation(self, gate_and_up: Tensor, probs: Tensor) -> Tensor:
        """[t, 2 * inner], [t] -> [t, inner]. The one part that `moe_act` recomputes."""
        result: Tensor = WeightedSwiGLU.apply(gate_and_up, probs)
        return result

    def backward_dw(self) -> None:
        """Upstream's hook for weight gradients that come later; here they come with the others."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: StateDict | None = None
    ) -> StateDict:
        """Each expert's weights by themselves, under the names and offsets of SequentialMLP with homogeneous layers."""
        return {
            f"{prefix}{name}.weight": self._sharded(name, prefix, sharded_offsets)
            for name in ("linear_fc1", "linear_fc2")
        }

    def _sharded(self, name: str, prefix: str, offsets: tuple[Any, ...]) -> ShardedTensorFactory:
        weight, local = getattr(self, name).weight, self.num_local_experts
        first, total = self.ep_group.rank() * local, self.ep_group.size() * local

        def build(key: str, tensor: Tensor, replica_id: Any, *_: Any) -> list[ShardedTensor]:
            shards: list[ShardedTensor] = []
            for i, matrix in enumerate(tensor):
                at = (*offsets, (len(offsets), first + i, total))
                shard = make_tp_sharded_tensor_for_checkpoint(
                    matrix, key, 0 if name == "linear_fc1" else 1, replica_id=replica_id, prepend_offsets=at,
                    tp_group=self.tp_group, dp_cp_group=self.dp_group,
                )  # fmt: skip
                shards += apply_swiglu_sharded_factory(shard, at).build() if name == "linear_fc1" else [shard]
            return shards

        def merge(parts: list[Tensor]) -> Tensor:
            return torch.cat(parts).view(weight.shape)

        key, replica = f"{prefix}experts.{name}.weight", (0, 0, self.dp_group.rank())
        return ShardedTensorFactory(key, weight, build, merge, replica)
