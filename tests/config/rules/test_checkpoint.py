import pytest

from moe_train.config.composition.compose import compose
from moe_train.config.composition.validate import validate
from parallel.errors import ConfigError


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            "checkpoint.keep_every=100",
            (
                "checkpoint.keep_every=100 says which stay, but checkpoint.keep_last=null keeps all; use "
                "checkpoint.keep_last=3 or checkpoint.keep_every=null"
            ),
        ),
        (
            "checkpoint.keep_last=2 checkpoint.keep_every=100 checkpoint.interval_steps=30",
            (
                "checkpoint.keep_every=100 is not a multiple of checkpoint.interval_steps=30, the steps that are "
                "saved; use "
                "checkpoint.keep_every=60 or checkpoint.keep_every=90"
            ),
        ),
        (
            "run_dir=runs/x checkpoint.local_dir=runs/x/checkpoints",
            (
                "checkpoint.local_dir=runs/x/checkpoints is where all checkpoints go, no node's own disk; use "
                "checkpoint.local_dir=null"
            ),
        ),
        ("checkpoint.keep_last=0", "checkpoint.keep_last=0 is below the smallest value 1; use checkpoint.keep_last=1"),
        (
            "checkpoint.max_consecutive_failures=0",
            (
                "checkpoint.max_consecutive_failures=0 is below the smallest value 1; use "
                "checkpoint.max_consecutive_failures=1"
            ),
        ),
    ],
)
def test_what_cannot_be_kept_or_placed_is_refused(overrides: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        validate(compose(overrides.split()))
    assert message in str(error.value)


def test_retention_of_a_long_run_passes() -> None:
    validate(compose(["checkpoint=cluster"]))
    validate(compose(["checkpoint.keep_last=2", "checkpoint.keep_every=100", "checkpoint.interval_steps=20"]))
