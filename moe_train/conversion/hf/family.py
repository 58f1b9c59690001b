"""A family of Hugging Face checkpoints. No torch import."""

from __future__ import annotations

from dataclasses import dataclass, field

from moe_train.conversion.hf.names import MODEL, Table
from moe_train.conversion.hf.settings import Schema


@dataclass(frozen=True)
class Family:
    """How one family names its tensors and writes its config.json.

    Args:
        schema: its config.json.
        layer, model, mtp: names of the tensors of a layer, outside layers, and of what multi-token prediction adds.
        mtp_copies: Megatron name of a tensor -> its second name, in every multi-token-prediction layer.
        ignored: patterns of names without weights, which older versions of transformers wrote.
    """

    schema: Schema
    layer: Table
    model: Table = field(default_factory=lambda: MODEL)
    mtp: Table = field(default_factory=dict)
    mtp_copies: dict[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)
