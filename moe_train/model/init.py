"""Initial weights that do not depend on the layout of ranks.

Each parameter is drawn from a generator seeded by its global name, as the whole tensor, and a rank keeps its shard. The
global names and shards are those of Megatron-Core's distributed checkpoints, so every layout of ranks agrees on them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from megatron.core import parallel_state as ps
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from torch import Tensor, nn

from moe_train.config.model import ModelConfig

_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


def initialise(chunks: Iterable[nn.Module], model: ModelConfig, seed: int) -> None:
    """Draw every matrix of this rank's `chunks` in place: N(0, init_std). Norms stay at one and biases at zero.

    Rows that pad the vocabulary are zero. They get no gradient (loss.py), and weight decay keeps zeros at zero.

    Raises:
        RuntimeError: a parameter has no entry in the sharded state dict, so it would keep a layout-dependent value.
    """
    for chunk in chunks:
        parameters = {p.data_ptr(): name for name, p in chunk.named_parameters() if p.dim() >= 2}
        # Upstream leaves these groups out of its default in places (models/gpt/gpt_model.py).
        metadata = {"dp_cp_group": ps.get_data_parallel_group(with_context_parallel=True)}
        state = chunk.sharded_state_dict(metadata=metadata)  # type: ignore[operator]
        apply_factories(state)  # splits gate and up of SwiGLU, each of which has a name of its own
        for shard in nested_values(state):
            if isinstance(shard, ShardedTensor) and shard.data is not None and len(_own_shape(shard)) >= 2:
                rows = model.vocab_size if shard.key.endswith(_VOCABULARY) else None
                _draw(shard, model.init_std, seed, rows)
                parameters.pop(shard.data.data_ptr(), None)
        if parameters and not next(iter(chunk.parameters())).is_meta:
            raise RuntimeError(f"parameters without a global name: {sorted(parameters.values())}")


def _own_shape(shard: ShardedTensor) -> tuple[int, ...]:
    """Global shape of the tensor itself, without the axes that number layers and experts."""
    return tuple(shard.global_shape[shard.prepend_axis_num :])


@torch.no_grad()
def _draw(shard: ShardedTensor, std: float, seed: int, rows: int | None) -> None:
    """Fill `shard` with its part of the whole tensor, which has zeros from row `rows` on."""
    lead = shard.prepend_axis_num
    name = f"{seed}/{shard.key}/{tuple(shard.global_offset[:lead])}"
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
    data: Tensor = shard.data
    generator = torch.Generator(device=data.device).manual_seed(number)
    whole = torch.empty(_own_shape(shard), dtype=torch.float32, device=data.device).normal_(
        0.0, std, generator=generator
    )
    if rows is not None:
        whole[rows:] = 0
    for dim, (offset, size) in enumerate(zip(shard.global_offset[lead:], data.shape, strict=True)):
        whole = whole.narrow(dim, offset, size)
    data.copy_(whole)
