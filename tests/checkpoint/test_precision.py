"""Master weights and loss scales of 16-bit runs, and checkpoints that continue in another precision."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_train.checkpoint import checkpoint, state
from moe_train.run import Run
from moe_train.train import set_length
from tests.checkpoint import small_run
from tests.distributed.helper import run_distributed

BF16 = {"precision__dtype": "bf16"}
PLAIN = {"parallel__distributed_optimizer": False}
FP16 = {"precision__dtype": "fp16", "precision__initial_loss_scale": 2.0**30}


def weights(run_dir: Path, degrees: dict[str, int], changes: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Sums of the fp32 weights by name, after resuming."""
    run = small_run.prepare(small_run.config(run_dir, degrees, **changes))
    checkpoint.resume(run)
    model = state.model_state(run.chunks)
    tensors: dict[str, tuple[float, float]] = {}
    for shard in state.Request(state.optimizer_state(run, model, loading=False)).tensors:
        name = shard.key.removeprefix("optimizer.state.fp32_param.")
        if name != shard.key:
            total, squares = tensors.get(name, (0.0, 0.0))
            data = shard.data.double()
            tensors[name] = (total + float(data.sum()), squares + float(data.square().sum()))
    return tensors


def bf16_story(run_dir: Path, saved_by: dict[str, Any], read_by: dict[str, Any]) -> None:
    """Save with one kind of optimizer; continue with it, with the other kind, and in fp32."""
    before = small_run.save_halfway(run_dir, {}, BF16 | saved_by)
    assert small_run.continue_halfway(run_dir, {}, BF16 | saved_by)["bits"] == before["bits"]

    saved, with_the_other = weights(run_dir, {}, BF16 | saved_by), weights(run_dir, {}, BF16 | read_by)
    # The plain optimizer has no second copy of what is fp32 in the model already.
    names = saved.keys() & with_the_other.keys()
    assert len(names) > 50
    for name in names:
        assert with_the_other[name] == pytest.approx(saved[name], rel=1e-12, abs=1e-9), name

    fp32 = small_run.prepare(small_run.config(run_dir, {}))
    checkpoint.resume(fp32)
    now = small_run.tensors(fp32)
    for name, sums in saved.items():
        assert now[name] == pytest.approx(sums, rel=1e-12, abs=1e-9), name


@pytest.mark.parametrize(("saved_by", "read_by"), [({}, PLAIN), (PLAIN, {})], ids=["distributed", "plain"])
def test_bf16_keeps_fp32_weights(tmp_path: Path, saved_by: dict[str, Any], read_by: dict[str, Any]) -> None:
    run_distributed(bf16_story, 1, tmp_path, saved_by, read_by)


def adam_steps(run: Run) -> set[int]:
    """Updates that Adam has counted, of any parameter."""
    return {int(s["step"]) for o in state.optimizers(run) for s in o.optimizer.state.values()}


def scale_and_skips(run_dir: Path, resume: bool) -> list[Any]:
    """Loss scale of fp16 and the number of updates, after a few steps of which the first overflow."""
    run = small_run.prepare(small_run.config(run_dir, {}, **FP16))
    if resume:
        checkpoint.resume(run)
    else:
        small_run.train(run, small_run.HALF)
        checkpoint.save(run)
    scale = torch.cat([o.get_loss_scale().reshape(1) for o in state.optimizers(run)]).tolist()
    return [scale, state.scalers(run), run.schedule.num_steps, adam_steps(run), run.state]


def test_fp16_continues_with_its_loss_scale_and_skipped_steps(tmp_path: Path) -> None:
    before = run_distributed(scale_and_skips, 1, tmp_path, False)[0]
    assert run_distributed(scale_and_skips, 1, tmp_path, True)[0] == before
    scale, _, schedule_steps, steps, progress = before
    assert max(scale) < 2.0**30  # it did overflow
    assert progress.step == small_run.HALF
    assert progress.optimizer_updates == schedule_steps < progress.step
    assert steps == {progress.optimizer_updates}


def counters(run_dir: Path) -> dict[str, Any]:
    """Adam's steps, optimizer updates and the schedule's position of runs that continue changed copies of state.json.

    As many after one more step.
    """
    first = small_run.prepare(small_run.config(run_dir, {}))
    small_run.train(first, small_run.HALF)
    path = checkpoint.save(first) / "state.json"
    written = json.loads(path.read_text())
    schedule = {**written["schedule"], "num_steps": 5}
    states = {
        "this version": {**written, "optimizer_updates": 2, "schedule": schedule},
        "earlier version": {name: value for name, value in written.items() if name != "optimizer_updates"},
    }
    found = {}
    for name, values in states.items():
        path.write_text(json.dumps(values))
        run = small_run.prepare(small_run.config(run_dir, {}, checkpoint__verify=False))
        checkpoint.resume(run)
        set_length(run)
        before = adam_steps(run), run.state.optimizer_updates, run.schedule.num_steps
        small_run.train(run, 1)
        found[name] = before, (adam_steps(run), run.state.optimizer_updates, run.schedule.num_steps)
    return found


def test_adam_counts_updates_and_not_the_steps_of_the_schedule(tmp_path: Path) -> None:
    (found,) = run_distributed(counters, 1, tmp_path)
    assert found["this version"] == (({2}, 2, 5), ({3}, 3, 6))
    half = small_run.HALF
    assert found["earlier version"] == (({half}, half, half), ({half + 1}, half + 1, half + 1))


DELAYED = {"precision__dtype": "bf16", "precision__fp8": "delayed", "precision__fp8_format": "hybrid"}


def scales(run_dir: Path, degrees: dict[str, int], changes: dict[str, Any]) -> dict[str, Any]:
    """`continue_halfway`, and scales and histories by name as they were after resuming."""
    run = small_run.prepare(small_run.config(run_dir, degrees, **small_run.two_micro_batches(degrees) | changes))
    checkpoint.resume(run)
    found = state.delayed_scales(run.chunks, state.model_state(run.chunks))
    kept = {shard.key: shard.data.tolist() for shard in state.Request(found).tensors if not any(shard.global_offset)}
    return {"scales": kept, "losses": small_run.train(run, small_run.STEPS - small_run.HALF)}


@pytest.mark.parametrize("degrees", [{}, {"tp": 2, "ep": 2, "pp": 2}], ids=["single", "tp2-ep2-pp2"])
def test_delayed_scales_continue(tmp_path: Path, degrees: dict[str, int]) -> None:
    """In the same layout bit by bit, in another as if it had not been interrupted."""
    saved_in = {"ep": 2}
    before = run_distributed(small_run.save_halfway, 2, tmp_path, saved_in, DELAYED)
    same = run_distributed(scales, 2, tmp_path, saved_in, DELAYED)
    assert [rank["losses"] for rank in same] == [rank["losses"] for rank in before]
    world = 4 if degrees else 1
    after = run_distributed(scales, world, tmp_path, degrees, DELAYED)
    # Tensor parallelism adds up in bf16 by parts, and FP8 rounds what comes out: 1e-3 is the noise of that.
    first, later = (5e-3, 5e-3) if "tp" in degrees else (1e-6, 5e-3)
    assert after[0]["losses"][0] == pytest.approx(before[0]["losses"][0], rel=first)
    assert after[0]["losses"] == pytest.approx(before[0]["losses"], rel=later)
    together: dict[str, Any] = {}
    for rank in after:
        together |= rank["scales"]
    saved = same[0]["scales"]
    assert len(saved) > 10
    assert together == saved
    assert all(any(scale[0] != 1 for scale in kinds) for kinds in saved.values())


def test_delayed_scaling_begins_anew_after_bf16(tmp_path: Path) -> None:
    """It says so, and weights and moments are those of the checkpoint."""
    run_distributed(small_run.save_halfway, 1, tmp_path, {}, BF16)
    (after,) = run_distributed(scales, 1, tmp_path, {}, DELAYED)
    assert all(scale[0] == 1 for kinds in after["scales"].values() for scale in kinds)
    assert all(loss < 5.2 for loss in after["losses"])
