"""Settings of resilience that make no sense together."""

from __future__ import annotations

import pytest

from moe_train.config.composition.compose import compose
from moe_train.config.composition.validate import validate
from parallel.errors import ConfigError


@pytest.mark.parametrize(
    ("overrides", "what", "fix"),
    [
        (["resilience.spike_factor=0.9"], "resilience.spike_factor=0.9 is not above 1", "resilience.spike_factor=1.5"),
        (["resilience.straggler_ratio=1"], "is not above 1", "resilience.straggler_ratio=2.0"),
        (["resilience.on_bad_step=rollback"], "checkpoint.interval_steps=0", "checkpoint.interval_steps=50"),
        (["resilience.straggler_action=stop", "resilience.straggler_interval_steps=0"], "does nothing with",
         "resilience.straggler_interval_steps=50"),
        (["parallel.dp=2", "resilience.hang_timeout_s=601"], "exceeds launcher.timeout_s=600",
         "launcher.timeout_s=752"),
    ],
)  # fmt: skip
def test_refused_with_a_value_that_works(overrides: list[str], what: str, fix: str) -> None:
    with pytest.raises(ConfigError) as refused:
        validate(compose(["runtime=cpu", *overrides]))
    assert what in str(refused.value)
    assert fix in str(refused.value)
    validate(compose(["runtime=cpu", *overrides, fix]))


def test_the_group_for_long_runs() -> None:
    cfg = compose(["resilience=pretrain"])
    validate(cfg)
    assert cfg.resilience.spike_factor == 1.5
