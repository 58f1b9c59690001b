"""The exponential moving average of the weights: its numbers, checkpoints and evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_train.checkpoint import checkpoint, state
from moe_train.config.optimizer import OptimizerConfig
from moe_train.loop import step
from moe_train.optim.ema import decay_of
from tests.checkpoint import small_run
from tests.distributed.helper import run_distributed

DECAY = {"optimizer__ema_decay": 0.75}
BY_TOKENS = {"optimizer__ema_half_life_tokens": 3 * small_run.BATCH * small_run.SEQUENCE}
Sums = dict[str, tuple[float, float]]


def test_the_half_life_is_in_tokens() -> None:
    options = OptimizerConfig(ema_half_life_tokens=1000)
    assert decay_of(options, 1000) == pytest.approx(0.5)
    assert decay_of(options, 250) ** 4 == pytest.approx(0.5)
    assert decay_of(OptimizerConfig(ema_decay=0.9), 250) == 0.9


def weights(run: Any) -> list[torch.Tensor]:
    return [p.detach().float().clone() for chunk in run.chunks for p in chunk.parameters()]


def averaged(run_dir: Path, changes: dict[str, Any], decay: float) -> float:
    """Largest difference between the average after 4 steps and what follows from the weights after each."""
    run = small_run.prepare(small_run.config(run_dir, {}, **changes))
    expected, data = weights(run), small_run.batches(run)
    for _ in range(4):
        step.train_step(run, data)
        expected = [decay * e + (1 - decay) * w for e, w in zip(expected, weights(run), strict=True)]
    pairs = zip(run.weight_average.averages.values(), expected, strict=True)
    return max(float((average - other).abs().max()) for average, other in pairs)


@pytest.mark.parametrize(
    ("changes", "decay"),
    [(DECAY, 0.75), (BY_TOKENS, 0.5 ** (1 / 3)), ({**DECAY, "precision__dtype": "bf16"}, 0.75)],
    ids=["decay", "half-life", "bf16"],
)
def test_the_average_is_that_of_the_weights_after_each_step(
    tmp_path: Path, changes: dict[str, Any], decay: float
) -> None:
    changes = {**changes, "optimizer__lr": 0.01, "schedule__warmup_steps": 0}
    assert run_distributed(averaged, 1, tmp_path, changes, decay)[0] < 1e-6


def averages(run: Any) -> list[bytes]:
    return [average.numpy().tobytes() for average in run.weight_average.averages.values()]


def sums(run: Any) -> Sums:
    """(sum, sum of squares) of the average of every parameter of this rank, by its name in a checkpoint."""
    found: Sums = {}
    for shard in small_run.shards(state.average_state(run, state.model_state(run.chunks))):
        if not any(shard.replica_id if isinstance(shard.replica_id, tuple) else (shard.replica_id,)):
            total, squares = found.get(shard.key, (0.0, 0.0))
            data = shard.data.double()
            found[shard.key] = (total + float(data.sum()), squares + float(data.square().sum()))
    return found


def together(parts: list[Sums]) -> Sums:
    whole: Sums = {}
    for part in parts:
        for name, (total, squares) in part.items():
            before = whole.get(name, (0.0, 0.0))
            whole[name] = (before[0] + total, before[1] + squares)
    return whole


def save_halfway(run_dir: Path, degrees: small_run.Degrees) -> dict[str, Any]:
    run = small_run.prepare(small_run.config(run_dir, degrees, **DECAY, **small_run.two_micro_batches(degrees)))
    small_run.train(run, small_run.HALF)
    checkpoint.save(run)
    halfway = sums(run)
    small_run.train(run, small_run.HALF)
    return {"halfway": halfway, "end": sums(run), "bits": averages(run)}


def continue_halfway(run_dir: Path, degrees: small_run.Degrees) -> dict[str, Any]:
    run = small_run.prepare(small_run.config(run_dir, degrees, **DECAY, **small_run.two_micro_batches(degrees)))
    checkpoint.resume(run)
    halfway = sums(run)
    small_run.train(run, small_run.HALF)
    return {"halfway": halfway, "end": sums(run), "bits": averages(run)}


def test_a_run_continues_its_average_in_any_layout(tmp_path: Path) -> None:
    degrees = {"tp": 2, "ep": 2}
    saved = run_distributed(save_halfway, 2, tmp_path, degrees)
    same = run_distributed(continue_halfway, 2, tmp_path, degrees)
    assert [part["bits"] for part in same] == [part["bits"] for part in saved]
    other = run_distributed(continue_halfway, 2, tmp_path, {"pp": 2})
    halfway = together([part["halfway"] for part in saved])
    assert together([part["halfway"] for part in other]) == {
        name: pytest.approx(values, rel=1e-12, abs=1e-9) for name, values in halfway.items()
    }
    end = together([part["end"] for part in saved])
    for name, values in together([part["end"] for part in other]).items():
        assert values == pytest.approx(end[name], rel=1e-4, abs=1e-4), name


def evaluated(run_dir: Path) -> dict[str, Any]:
    """Losses of the weights and of the average, that of a model with the average as weights, and what is left."""
    changes = {**DECAY, "optimizer__lr": 0.01, "schedule__warmup_steps": 0}
    run = small_run.prepare(small_run.config(run_dir, {}, **changes))
    small_run.train(run, 4)

    def loss() -> float | None:
        return step.evaluate(run, [small_run.samples_from(run, 1000) for _ in run.chunks], 2).loss

    before, own = weights(run), loss()
    with run.weight_average.applied():
        average = loss()
    left = all(torch.equal(a, b) for a, b in zip(before, weights(run), strict=True))
    for parameter, value in run.weight_average.averages.items():
        parameter.data.copy_(value)
    return {"own": own, "average": average, "expected": loss(), "left": left}


def test_the_average_is_evaluated_and_the_weights_come_back(tmp_path: Path) -> None:
    (found,) = run_distributed(evaluated, 1, tmp_path)
    assert found["average"] == found["expected"] != found["own"]
    assert found["left"]


def resumed_without(run_dir: Path) -> bool:
    """Whether the average of a run that had none begins with the weights of its checkpoint."""
    run = small_run.prepare(small_run.config(run_dir, {}))
    small_run.train(run, 2)
    checkpoint.save(run)
    run = small_run.prepare(small_run.config(run_dir, {}, **DECAY))
    checkpoint.resume(run)
    pairs = zip(run.weight_average.averages.values(), weights(run), strict=True)
    return run.state.step == 2 and all(torch.equal(a, b) for a, b in pairs)


def test_an_average_can_begin_in_the_middle_of_a_run(tmp_path: Path) -> None:
    assert run_distributed(resumed_without, 1, tmp_path) == [True]
