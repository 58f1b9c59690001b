"""Layouts with which a job may come back on another number of nodes. What is refused: `test_submit.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.slurm import commands, elastic, submit
from moe_train.config.composition.compose import compose
from moe_train.config.schema import Config
from parallel.errors import ConfigError

# Eight nodes of two ranks.
EIGHT = ("model=tiny", "runtime=cpu", "parallel.pp=2", "parallel.dp=8", "parallel.ep=2", "launcher.ranks_per_node=2")


def config(*more: str) -> Config:
    return compose([*EIGHT, *more])


def test_a_job_that_keeps_its_nodes_has_one_layout() -> None:
    (only,) = elastic.choices(config(), 8)
    assert (only.text, only.counts, only.layout.dp) == ("", (8,), 8)


OTHERS = "with another number of nodes it takes the largest of these that fits; others stay idle, and cost: at most"


def test_each_number_of_nodes_takes_the_first_layout_that_fits() -> None:
    cfg = config("launcher.min_nodes=2", "launcher.fallbacks=[{parallel:{dp:4}},{parallel:{pp:1,dp:null}}]")
    found = elastic.choices(cfg, 8)
    assert [(one.text, one.counts, one.layout.dp) for one in found] == [
        ("", (8,), 8), ("{parallel:{dp:4}}", (4,), 4), ("{parallel:{pp:1,dp:null}}", (2,), 4),
    ]  # fmt: skip
    assert elastic.fewer(found, 8) == [
        f"4 nodes: tp1 pp2 vpp1 cp1 ep2 etp1 dp4 edp2, {found[1].estimate.memory_gib:,.1f} GiB ({{parallel:{{dp:4}}}})",
        f"2 nodes: tp1 pp1 vpp1 cp1 ep2 etp1 dp4 edp2, {found[2].estimate.memory_gib:,.1f} GiB ({found[2].text})",
        f"{OTHERS} 3 of 7 nodes",
    ]


def test_where_all_numbers_have_a_layout_none_stays_idle() -> None:
    cfg = config("launcher.min_nodes=1", "parallel.dp=2", "launcher.fallbacks=[{parallel:{dp:1,ep:1}}]")
    found = elastic.choices(cfg, 2)
    assert len(elastic.fewer(found, 2)) == 1
    assert commands.environment(cfg, Path("code"), [1, 2])["MOE_NODE_COUNTS"] == "1 2"


def test_a_tensor_group_of_a_fallback_that_spans_nodes_is_told() -> None:
    wide = "launcher.fallbacks=[{parallel:{tp:4,pp:1,dp:2}}]"
    cfg = config("runtime=cuda", "launcher.min_nodes=4", wide)
    told = "parallel.tp=4 spans 2 nodes, and talks in every layer"
    assert told in elastic.fewer(elastic.choices(cfg, 8), 8)
    cfg = config("launcher.min_nodes=4", wide)  # CPUs of one node have no faster network between them
    assert told not in elastic.fewer(elastic.choices(cfg, 8), 8)


def test_a_fallback_for_the_nodes_that_are_asked_for_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "installed", lambda: False)
    words = ["launcher.nodes=4", "launcher.min_nodes=2", "launcher.fallbacks=[{parallel:{dp:4}},{parallel:{dp:2}}]"]
    lengths = ["train.steps=10", "schedule.warmup_steps=2", f"run_dir={tmp_path}/run"]
    assert submit.run(["--dry-run", *EIGHT, *lengths, *words]) == 0
    text = capsys.readouterr().out
    assert "layout  tp1 pp2 vpp1 cp1 ep2 etp1 dp4 edp2" in text
    assert "or      2 nodes: tp1 pp2 vpp1 cp1 ep2 etp1 dp2 edp1" in text
    assert "'MOE_NODE_COUNTS=2 4' sbatch --parsable --job-name=moe-tiny --nodes=2-4 " in text


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["launcher.min_nodes=4", "launcher.fallbacks=[{parallel:{dp:4}},{parallel:{dp:2}}]"],
         "{parallel:{dp:2}}, which fits 2 nodes, and the job never has fewer than launcher.min_nodes=4"),
        (["launcher.fallbacks=[{parallel:{dp:1,ep:1}}]"],
         "{parallel:{dp:1,ep:1}}, which fits 1 nodes, and the job never has fewer than 8 without launcher.min_nodes"),
        (["launcher.fallbacks=[{parallel:{dp:8}}]"],
         "{parallel:{dp:8}}, which is never taken: on 8 nodes the layout before it fits"),
        (["launcher.fallbacks=[{parallel:{pp:1,dp:3,ep:1}}]"],
         "{parallel:{pp:1,dp:3,ep:1}}, which needs 3 ranks, and nodes have 2"),
        (["launcher.fallbacks=[{parallel:{cp:2,dp:8}}]"],
         "{parallel:{cp:2,dp:8}}, which needs 16 nodes, and the job never has more than 8"),
    ],
)  # fmt: skip
def test_a_fallback_that_is_never_taken_is_told_with_its_nodes(words: list[str], cause: str) -> None:
    """pp=2 of two ranks a node: as many nodes as dp x cp."""
    with pytest.raises(ConfigError) as error:
        elastic.choices(config(*words), 8)
    assert error.value.cause == f"launcher.fallbacks has {cause}"
