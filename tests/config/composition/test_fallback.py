"""The layout with which a job comes back on another number of ranks."""

from __future__ import annotations

import pytest

from moe_train.config.composition.compose import compose
from moe_train.config.composition.fallback import fitting
from moe_train.config.schema import Config, RecomputeStage
from parallel.errors import ConfigError

FOUR = ["runtime=cpu", "parallel.tp=2", "parallel.pp=2", "parallel.ep=2"]


def config(*fallbacks: str) -> Config:
    return compose([*FOUR, f"launcher.fallbacks=[{','.join(fallbacks)}]"])


def test_a_layout_that_fits_stays() -> None:
    cfg = config("{parallel:{tp:1}}")
    assert fitting(cfg, 4) is cfg


def test_the_first_fallback_that_fits_is_taken_with_the_same_batch() -> None:
    cfg = config("{parallel:{tp:1,pp:3}}", "{parallel:{tp:1},batch:{micro_batch_size:2}}", "{parallel:{pp:1}}")
    found = fitting(cfg, 2)
    assert (found.parallel.tp, found.parallel.pp, found.parallel.ep) == (2, 1, 2)
    assert found.batch == cfg.batch


def test_where_none_fits_both_are_told() -> None:
    with pytest.raises(ConfigError, match=r"does not divide the 3 ranks.*nor does any of the 1 launcher\.fallbacks"):
        fitting(config("{parallel:{tp:1}}"), 3)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{batch:{global_batch_size:2}}", "changes batch.global_batch_size, which is not a field of the layout"),
        ("{parallel:{tq:2}}", "not a field of the layout"),
        ("{parallel:{tp:many}}", "tp=many, which is not a whole number"),
        ("{parallel:{tp:0}}", "below 1"),
        ("{parallel:{tp:1:30}}", "not a whole number"),
        ("{recompute:{stages:[{modes:full}]}}", "an entry that has 'modes'"),
        ("{recompute:{stages:[{mode:most}]}}", "mode='most', which is not one of none, full, selective"),
    ],
)
def test_a_fallback_that_is_none_is_refused(text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        fitting(config(text), 4)


def test_a_fallback_may_change_every_field_of_the_layout() -> None:
    """Null included, a text with commas, and lists."""
    fields = "{parallel:{tp:1,pp:2,ep:1,dp:null,pipeline_layout:'Et*2|t*2mL'},recompute:{stages:[{modules:[mlp]},{}]}}"
    found = fitting(config(fields), 2)
    assert (found.parallel.tp, found.parallel.dp, found.parallel.pipeline_layout) == (1, None, "Et*2|t*2mL")
    assert found.recompute.stages == [RecomputeStage(modules=["mlp"]), RecomputeStage()]
