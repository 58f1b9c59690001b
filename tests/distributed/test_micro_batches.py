"""How the global batch is divided into micro-batches and over data-parallel ranks changes no gradient.

The balance losses `aux_loss` and `global_aux_loss` are defined over micro-batches: they see how balanced each one is.
Where all sequences are the same, so are all micro-batches, and what is left is their weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_train.loop import step
from tests.checkpoint import small_run
from tests.distributed.helper import run_distributed
from tests.quick import slow_but

Batch = dict[str, torch.Tensor]
SEQUENCES = 8
FIRST_MOMENT = "optimizer.state.exp_avg."

# Coefficients that make these losses as large as that of the next token.
LOSSES: dict[str, dict[str, Any]] = {
    **{
        name: {"model__balance_losses": [name], "model__balance_loss_coeffs": [10.0], "model__mtp_num_layers": 0}
        for name in ("aux_loss", "seq_aux_loss", "global_aux_loss")
    },
    "z_loss": {
        "model__balance_losses": [], "model__balance_loss_coeffs": [], "model__z_loss_coeff": 1.0,
        "model__mtp_num_layers": 0,
    },
    "expert bias": {"model__balance_losses": [], "model__balance_loss_coeffs": [], "model__mtp_num_layers": 0},
    "multi-token prediction": {
        "model__balance_losses": [], "model__balance_loss_coeffs": [], "model__mtp_num_layers": 1,
    },
}  # fmt: skip
MASKED = {"one": (3,), "those of a rank": (1, 3, 5, 7), "the first half": (0, 1, 2, 3)}
"""Sequences of which no token counts."""
OVER_MICRO_BATCHES = ("aux_loss", "global_aux_loss")
# Name -> ranks, degrees of parallelism, and sequences of a micro-batch.
DIVISIONS: dict[str, tuple[int, small_run.Degrees, int]] = {
    "2 sequences": (1, {}, 2),
    "4 sequences": (1, {}, 4),
    "dp2": (2, {}, 1),
    "dp2, 2 sequences": (2, {}, 2),
    "ep2, 4 sequences": (2, {"ep": 2}, 4),
    "tp2, 2 sequences": (2, {"tp": 2}, 2),
    "cp2, 2 sequences": (2, {"cp": 2}, 2),
    "pp2, 4 sequences": (2, {"pp": 2}, 4),
}


def micro_batches(run: Any, same: bool, masked: tuple[int, ...] = ()) -> Iterator[Batch]:
    """Micro-batches of random sequences. Those numbered `masked` have no token that counts, and of all others the
    first tokens do not count, more of them in later sequences."""
    size, length = run.cfg.batch.micro_batch_size, run.cfg.train.seq_length
    dp, first = run.layout.dp, run.layout.coordinates(run.rank.rank).dp * size
    while True:
        numbers = [number % SEQUENCES for number in range(first, first + size)]
        generators = [torch.Generator().manual_seed(0 if same else number) for number in numbers]
        texts = torch.stack([torch.randint(0, 128, (length + 1,), generator=generator) for generator in generators])
        mask = torch.ones(size, length)
        for row, number in zip(mask, numbers, strict=True):
            row[: number if masked else 0] = 0
            row *= number not in masked
        yield {
            "tokens": texts[:, :-1].contiguous(), "labels": texts[:, 1:].contiguous(), "loss_mask": mask,
            "position_ids": torch.arange(length).expand(size, length).contiguous(),
        }  # fmt: skip
        first += dp * size


def first_step(
    run_dir: Path, degrees: small_run.Degrees, changes: dict[str, Any], same: bool, masked: tuple[int, ...] = ()
) -> dict[str, Any]:
    """Metrics, sums of squares of each gradient (up to a factor) and router biases after one step, evaluated before."""
    changes = {"batch__global_batch_size": SEQUENCES, **changes}
    run = small_run.prepare(small_run.config(run_dir, degrees, **changes))
    valid = step.evaluate(run, [micro_batches(run, same, masked) for _ in run.chunks], 1).loss
    metrics = step.train_step(run, [micro_batches(run, same, masked) for _ in run.chunks])
    tensors = small_run.tensors(run)
    return {
        "valid": valid,
        "metrics": metrics,
        "gradients": {k.removeprefix(FIRST_MOMENT): v[1] for k, v in tensors.items() if k.startswith(FIRST_MOMENT)},
        "biases": {name: value[0] for name, value in tensors.items() if "expert_bias" in name},
    }


def same_step(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Assert that two results of `first_step` are the same within rounding."""
    names = ("lm_loss", "grad_norm", "mtp_loss", "load_balancing_loss", "seq_load_balancing_loss",
             "global_load_balancing_loss", "z_loss")  # fmt: skip
    measured, right = ({name: result["metrics"].get(name, 0.0) for name in names} for result in (found, expected))
    assert measured == pytest.approx(right, rel=1e-5)
    assert found["metrics"]["expert_load"] == expected["metrics"]["expert_load"]
    assert found["valid"] == pytest.approx(expected["valid"], rel=1e-6)
    assert found["biases"] == pytest.approx(expected["biases"], abs=1e-8)
    assert found["gradients"].keys() == expected["gradients"].keys()
    largest = max(expected["gradients"].values())
    for name, square in expected["gradients"].items():
        assert found["gradients"][name] == pytest.approx(square, rel=1e-3, abs=1e-9 * largest), name


@pytest.mark.parametrize("loss", slow_but(["seq_aux_loss", "global_aux_loss", "multi-token prediction"], LOSSES))
def test_a_loss_weighs_the_same_in_any_division_of_the_batch(loss: str, tmp_path: Path) -> None:
    changes, same = LOSSES[loss], loss in OVER_MICRO_BATCHES
    (expected,) = run_distributed(first_step, 1, tmp_path, {}, changes, same)
    for ranks, degrees, size in DIVISIONS.values():
        arguments = (tmp_path, degrees, {**changes, "batch__micro_batch_size": size}, same)
        found = run_distributed(first_step, ranks, *arguments, timeout_s=300)[0]
        same_step(found, expected)


def test_losses_over_micro_batches_see_all_sequences_that_are_computed_at_once(tmp_path: Path) -> None:
    """By definition: two sequences on one rank are a micro-batch of `global_aux_loss` as one on each of two ranks is;
    `aux_loss` leaves out other ranks."""
    found: dict[str, list[float]] = {}
    for loss in OVER_MICRO_BATCHES:
        cases = [(1, 1), (1, 2), (2, 1)]  # ranks, sequences
        changes = [{**LOSSES[loss], "batch__micro_batch_size": size} for _, size in cases]
        results = [
            run_distributed(first_step, ranks, tmp_path, {}, change, False)[0]
            for (ranks, _), change in zip(cases, changes, strict=True)
        ]
        found[loss] = [result["metrics"]["grad_norm"] for result in results]
    one, two, split = found["global_aux_loss"]
    assert split == pytest.approx(two, rel=1e-5)
    assert abs(one - two) > 1e-3 * two
    one, two, split = found["aux_loss"]
    assert split == pytest.approx(one, rel=1e-5)
    assert abs(one - two) > 1e-3 * two


UNEVEN = LOSSES["multi-token prediction"]


@pytest.mark.parametrize("where", slow_but(["those of a rank"], MASKED))
def test_micro_batches_without_tokens_that_count_add_nothing(where: str, tmp_path: Path) -> None:
    """Losses are means over all tokens of the global batch that count, wherever those are."""
    masked = MASKED[where]
    (expected,) = run_distributed(first_step, 1, tmp_path, {}, UNEVEN, False, masked)
    for division in ("2 sequences", "dp2", "cp2, 2 sequences", "pp2, 4 sequences"):
        ranks, degrees, size = DIVISIONS[division]
        arguments = (tmp_path, degrees, {**UNEVEN, "batch__micro_batch_size": size}, False, masked)
        found = run_distributed(first_step, ranks, *arguments, timeout_s=300)[0]
        same_step(found, expected)
    assert 0 < expected["metrics"]["mtp_loss"] < 10
