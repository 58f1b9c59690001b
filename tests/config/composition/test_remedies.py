"""Random wrong configurations run after the remedy of their error has been followed at most three times."""

from __future__ import annotations

import random
import re
import shlex
from typing import Any

import pytest

from moe_train.config.composition.command_line import for_hydra, plain
from moe_train.config.composition.compose import compose
from moe_train.config.composition.validate import validate
from moe_train.config.schema import Config
from moe_train.config.walk import FieldInfo, all_fields, with_values
from parallel.errors import ConfigError
from tests.config.composition.test_wrong_configs import _suggested, _with_overrides
from tests.quick import slow_but

CONTEXTS = (
    "", "experiment=tiny_tp2_pp2_ep2", "model.attention=gqa parallel.tp=2",
    "parallel.pp=2 parallel.cp=2 precision=bf16",
    "model=deepseek_v2_lite runtime=cuda precision=fp8_block parallel.ep=8 recompute=full",
    "experiment=deepseek_v3/pretrain runtime=cuda", "model=qwen3_30b_a3b runtime=cuda precision=bf16 parallel.ep=4",
)  # fmt: skip
GROUPS = (
    "model.",
    "parallel.",
    "batch.",
    "train.",
    "schedule.",
    "optimizer.",
    "precision.",
    "recompute.",
    "checkpoint.",
)
# Their remedy is a choice that only the user can make.
LEFT_OUT = {"parallel.pipeline_layout", "train.deterministic", "schedule.on_resume"}
INTEGERS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 31, 48, 64, 100, 129, 1000, 4097, -1, 10**7)
FLOATS = (0.0, 1.0, 0.5, 2.0, -1.0, 1e-6, 100.0, float("nan"), float("inf"))


def _value(rng: random.Random, info: FieldInfo) -> Any:
    kind = plain(info.type)
    if kind is bool:
        return rng.choice([True, False])
    if info.choices and kind is str:
        return rng.choice(info.choices)
    return rng.choice(INTEGERS) if kind is int else rng.choice(FLOATS)


def _random(seed: int) -> tuple[Config, dict[str, Any]]:
    rng = random.Random(seed)
    names = [
        name for name, info in all_fields().items()
        if name.startswith(GROUPS) and name not in LEFT_OUT
        and (plain(info.type) in (int, float, bool) or (info.choices and plain(info.type) is str))
    ]  # fmt: skip
    changed = {name: _value(rng, all_fields()[name]) for name in rng.sample(names, rng.randint(1, 4))}
    return with_values(compose(shlex.split(rng.choice(CONTEXTS))), changed), changed


@pytest.mark.parametrize("first", slow_but([0, 50, 100], range(0, 400, 50)))
def test_three_remedies_are_enough(first: int) -> None:
    wrong = 0
    for seed in range(first, first + 50):
        cfg, changed = _random(seed)
        said: list[str] = []
        for _ in range(4):
            try:
                validate(cfg)
            except ConfigError as error:
                said.append(str(error))
                suggestions = _suggested(said[-1])
                assert suggestions, (seed, changed, said)
                assert re.search(r"; use ", said[-1]), (seed, changed, said)
                cfg = _with_overrides(cfg, for_hydra(suggestions[0]))
            else:
                break
        wrong += bool(said)
        assert len(said) <= 3, (seed, changed, said)
    assert wrong > 10, "most are wrong"
