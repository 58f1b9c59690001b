"""A small DeepSeek-V3-shaped model on one rank, for tests."""

from __future__ import annotations

from typing import Any

from moe_train.config.composition.compose import compose
from moe_train.config.composition.validate import validate
from moe_train.config.resolve import resolve
from moe_train.config.schema import Config


def tiny_config(*overrides: str) -> Config:
    """model=tiny with 2 layers and small sizes."""
    small = [
        "model=tiny",
        "model.num_layers=2",
        "model.hidden_size=64",
        "model.vocab_size=512",
        "data.tokenizer_vocab_size=512",
        "runtime=cpu",
    ]
    return compose([*small, *overrides])


def build_tiny(*overrides: str) -> list[Any]:
    """The chunks of this rank; makes the process groups of the layout."""
    from moe_train.model.build import build, transformer_config
    from parallel import groups

    cfg = tiny_config(*overrides)
    layout = validate(cfg)
    groups.create(layout, cfg.seed)
    return build(cfg, transformer_config(resolve(cfg, layout, runtime="cpu")), "local", layout.vpp, weights=False)
