"""Where the config says null or auto: one value, found in one place."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from moe_train.config import resolve
from moe_train.config.composition.compose import compose
from moe_train.config.composition.validate import validate

ROOT = Path(__file__).parents[2]
# Fields that may be null or auto and mean a value then. What may read them: the place that resolves them, and rules,
# which refuse what was asked for by name.
DERIVED = {
    "parallel": {"sequence_parallel", "overlap_p2p"},
    "backend": {"fusions", "grouped_gemm", "name"},
    "resilience": {"hang_timeout_s"},
    "launcher": {"restarts", "gpus_per_node"},
    "schedule": {"decay_steps"},
}
READERS = (ROOT / "moe_train/config/resolve.py", *(ROOT / "moe_train/config/rules").glob("*.py"))
EXCEPTIONS = {"moe_train/formats/run_config.py: schedule.decay_steps"}  # whether it was asked for


def resolved(*words: str, runtime: str | None = None) -> resolve.ResolvedConfig:
    cfg = compose(words)
    return resolve.resolve(cfg, validate(cfg, trains=False), runtime=runtime)


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (["runtime=cpu"], ("cpu", "local", False, False, False, True)),
        (["runtime=cuda"], ("cuda", "te", False, False, True, True)),
        (["runtime=simulated"], ("simulated", "local", False, False, False, True)),
        (["runtime=cpu", "parallel.tp=2"], ("cpu", "local", True, False, False, True)),
        (
            ["runtime=cpu", "parallel.pp=2", "parallel.vpp=2", "model.mtp_num_layers=0"],
            ("cpu", "local", False, True, False, True),
        ),
        (["runtime=cuda", "backend.name=local", "backend.fusions=false"], ("cuda", "local", False, False, False, True)),
        (["runtime=cpu", "backend.fusions=true", "backend.grouped_gemm=false"],
         ("cpu", "local", False, False, True, False)),
    ],
)  # fmt: skip
def test_what_follows_from_the_rest(words: list[str], values: tuple[object, ...]) -> None:
    one = resolved(*words)
    found = (one.runtime, one.backend, one.sequence_parallel, one.overlap_p2p, one.fused, one.grouped)
    assert found == values


def test_the_device_that_a_rank_has_found_decides() -> None:
    one = resolved("runtime=auto", runtime="cuda")
    assert (one.runtime, one.backend, one.fused) == ("cuda", "te", True)


def test_limits_on_hangs_and_restarts() -> None:
    cfg = compose(["launcher.timeout_s=100"])
    assert resolve.hang_timeout_s(cfg) == 80
    assert resolve.hang_timeout_s(compose(["resilience.hang_timeout_s=0"])) == 0
    assert [resolve.restarts(cfg.launcher, job) for job in (True, False)] == [3, 0]
    asked = compose(["launcher.restarts=7"]).launcher
    assert [resolve.restarts(asked, job) for job in (True, False)] == [7, 7]


@pytest.mark.parametrize(
    ("words", "gpus"),
    [(["runtime=cuda"], 8), (["runtime=cpu"], 0), (["runtime=cpu", "launcher.gpus_per_node=2"], 2),
     (["runtime=cuda", "launcher.ranks_per_node=4"], 4), (["runtime=cuda", "launcher.gpus_per_node=0"], 0)],
)  # fmt: skip
def test_the_gpus_of_a_node(words: list[str], gpus: int) -> None:
    assert resolve.job_gpus_per_node(compose(words)) == gpus


def test_the_decay_ends_with_the_run_unless_it_is_told() -> None:
    assert resolve.decay_end(compose([]).schedule, 200) == 200
    assert resolve.decay_end(compose(["schedule.decay_steps=50"]).schedule, 200) == 50


def _last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def test_nothing_else_derives_these_values() -> None:
    """A second copy of a default goes its own way one day."""
    found = set()
    for package in ("moe_train", "launch", "parallel", "tools"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and path not in READERS:
                    group = _last_name(node.value)
                    if node.attr in DERIVED.get(group, ()):
                        found.add(f"{path.relative_to(ROOT)}: {group}.{node.attr}")
    assert found == EXCEPTIONS
