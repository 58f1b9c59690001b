"""Muon: its update against singular values, its layouts, checkpoints, and what it says where it is not available."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_train.checkpoint import checkpoint
from moe_train.config.rules import optimizer as rules
from moe_train.config.schema import Config
from tests.checkpoint import small_run
from tests.distributed.helper import run_distributed
from tests.quick import slow_but

available = pytest.mark.skipif(bool(rules._missing_for_muon()), reason=rules._missing_for_muon())
MUON = {"optimizer__name": "muon", "optimizer__lr": 2e-3, "schedule__warmup_steps": 0, "schedule__decay": "constant"}
STEPS = 6


def settings(run_dir: Path, degrees: dict[str, int], changes: dict[str, Any]) -> Config:
    return small_run.config(run_dir, degrees, **{**MUON, **changes})


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 11, 9))
    assert rules._missing_for_muon().startswith("this is Python")
    monkeypatch.setattr(sys, "version_info", (3, 12, 1))
    monkeypatch.setattr(rules.importlib.util, "find_spec", lambda name: None)
    assert rules._missing_for_muon() == "emerging-optimizers is not installed"
    monkeypatch.setattr(rules.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(rules.importlib.metadata, "version", lambda name: "0.18.0")
    assert rules._missing_for_muon() == "megatron-core is 0.18.0, and 0.19 is the first whose Muon is used"
    monkeypatch.setattr(rules.importlib.metadata, "version", lambda name: "0.19.2")
    assert not rules._missing_for_muon()


def orthogonalised(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """What Newton-Schulz iterations with Keller Jordan's coefficients make of a matrix [out, in]: a polynomial of each
    singular value, relative to the norm of the matrix."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ v


def against_singular_values(run_dir: Path) -> list[tuple[str, float]]:
    """Matrices whose first two updates differ from what their gradients say, and by how much."""
    from moe_train.loop import step
    from moe_train.optim.names import global_names

    changes = {"optimizer__clip_grad": 0.0, "optimizer__muon_coefficients": "simple"}
    run = small_run.prepare(settings(run_dir, {}, changes))
    vocabulary = ("embedding.word_embeddings.weight", "output_layer.weight")
    own = {p: name for p, name in global_names(run.chunks).items() if p.dim() > 1 and name not in vocabulary}
    layers = {name.rpartition(".")[0].rpartition(".")[2] for name in own.values()}
    assert layers >= {"linear_fc1", "router", "linear_proj", "eh_proj"}
    momentum = {p: torch.zeros_like(p) for p in own}
    data, wrong = small_run.batches(run), []
    for _ in range(2):
        before = {p: p.detach().clone() for p in own}
        step.train_step(run, data)
        for p, name in own.items():
            momentum[p] = 0.95 * momentum[p] + 0.05 * p.main_grad
            nesterov = 0.95 * momentum[p] + 0.05 * p.main_grad
            experts = torch.stack([orthogonalised(matrix) for matrix in nesterov.view(-1, *p.shape[-2:])]).view(p.shape)
            expected = -2e-3 * (0.2 * max(p.shape[-2:]) ** 0.5 * experts + 0.1 * before[p])
            difference = float((p.detach() - before[p] - expected).norm() / expected.norm())
            if not difference < 1e-3:
                wrong.append((name, difference))
    return wrong


@available
def test_an_update_orthogonalises_each_matrix(tmp_path: Path) -> None:
    """Each expert by itself too: they are in one parameter."""
    assert run_distributed(against_singular_values, 1, tmp_path) == [[]]


def losses(run_dir: Path, degrees: dict[str, int], changes: dict[str, Any]) -> list[float]:
    return small_run.train(small_run.prepare(settings(run_dir, degrees, changes)), STEPS)


LAYOUTS: dict[str, tuple[int, dict[str, int], dict[str, Any]]] = {
    "dp2": (2, {}, {}),
    "dp2, not distributed": (2, {}, {"parallel__distributed_optimizer": False}),
    "tp2": (2, {"tp": 2}, {}),
    "tp2, together": (2, {"tp": 2}, {"optimizer__muon_tp_mode": "distributed"}),
    "tp2 etp2 ep1": (2, {"tp": 2, "etp": 2}, {}),
    "ep2 pp2": (4, {"ep": 2, "pp": 2}, {}),
}


@available
@pytest.mark.parametrize("layout", slow_but(["dp2", "tp2"], list(LAYOUTS)))
def test_layouts_agree(layout: str, tmp_path: Path) -> None:
    world, degrees, changes = LAYOUTS[layout]
    one = run_distributed(losses, 1, tmp_path, {}, {})[0]
    for found in run_distributed(losses, world, tmp_path, degrees, changes):
        assert found == pytest.approx(one, rel=1e-4)


@available
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_run_continues_in_any_layout(dtype: str, tmp_path: Path) -> None:
    changes = {**MUON, "precision__dtype": dtype}
    saved = run_distributed(small_run.save_halfway, 2, tmp_path, {}, changes)
    same = run_distributed(small_run.continue_halfway, 2, tmp_path, {}, changes)
    assert [part["losses"] for part in same] == [part["losses"] for part in saved]
    assert [part["bits"] for part in same] == [part["bits"] for part in saved]
    other = run_distributed(small_run.continue_halfway, 2, tmp_path, {"tp": 2, "ep": 2}, changes)
    halfway = saved[0]["halfway"]
    assert any("momentum_buffer" in name for name in halfway)
    assert other[0]["halfway"] == {name: pytest.approx(value, rel=1e-9, abs=1e-6) for name, value in halfway.items()}
    tolerance = 1e-4 if dtype == "fp32" else 2e-2
    assert other[0]["losses"] == pytest.approx(saved[0]["losses"], rel=tolerance)


def resume_with_other(run_dir: Path) -> None:
    run = small_run.prepare(small_run.config(run_dir, {}))
    checkpoint.save(run)
    checkpoint.resume(small_run.prepare(settings(run_dir, {}, {})))


@available
def test_the_state_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"optimizer.name=adamw, and the run has optimizer.name=muon"):
        run_distributed(resume_with_other, 1, tmp_path)
