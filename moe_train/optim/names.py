"""Names of a rank's parameters in a checkpoint, which are the same in every layout of ranks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from megatron.core import parallel_state as ps
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.utils import unwrap_model
from torch import nn


def global_names(chunks: Sequence[nn.Module]) -> dict[nn.Parameter, str]:
    """Parameter -> name, in which each layer has its number, as in `config.parameter_groups.named_parameters`."""
    metadata = {"dp_cp_group": ps.get_data_parallel_group(with_context_parallel=True)}
    names: dict[nn.Parameter, str] = {}
    for chunk in unwrap_model(list(chunks)):
        shards, _ = extract_sharded_tensors_and_factories(chunk.sharded_state_dict(metadata=metadata))
        of_data = {id(shard.data): shard for shard in nested_values(shards)}
        for parameter in chunk.parameters():
            names[parameter] = _numbered(of_data[id(parameter)])
    return names


def _numbered(shard: Any) -> str:
    """The name of a shard, with the number of its layer where a checkpoint stacks the layers of a dense model."""
    name: str = shard.key
    if not re.match(r"decoder\.layers\.\D", name):
        return name
    first: Any = next(nested_values(shard.build())) if isinstance(shard, ShardedTensorFactory) else shard
    return name.replace("decoder.layers.", f"decoder.layers.{first.global_offset[0]}.", 1)
