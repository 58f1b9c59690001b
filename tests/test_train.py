"""What a run is given to train on, also where it resumes with other sequences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from moe_train import train
from moe_train.checkpoint import checkpoint
from moe_train.data.iterator import BatchIterator
from moe_train.run import Callback, Metrics, Run
from moe_train.schedules import BatchSchedule
from moe_train.train import samples_of
from tests.checkpoint import small_run
from tests.distributed.helper import run_distributed
from tests.loop.fake_run import BATCH, SEQUENCE, fake_run, set_step

READER: dict[str, Any] = {
    "dp_rank": 0, "dp_size": 1, "micro_batch_size": 1, "schedule": BatchSchedule.constant(1)
}  # fmt: skip


@pytest.mark.parametrize("seq_length", [SEQUENCE // 2, SEQUENCE, 2 * SEQUENCE])
def test_the_samples_of_a_run_do_not_depend_on_their_length(seq_length: int, tmp_path: Path) -> None:
    """With half of them the run would begin with its first samples again."""
    run = fake_run(tmp_path, step=10, total_steps=20)
    run.cfg.train.seq_length = seq_length
    assert samples_of(run) == 20 * BATCH


def test_a_run_that_left_data_out_keeps_the_order_of_its_samples(tmp_path: Path) -> None:
    run = fake_run(tmp_path, step=10, total_steps=20)
    run.state.consumed_samples += 3 * BATCH
    assert samples_of(run) == 20 * BATCH
    set_step(run, 15)
    run.cfg.batch.global_batch_size = 2 * BATCH
    assert samples_of(run) == 15 * BATCH + 5 * 2 * BATCH


def resume_with_longer_sequences(run_dir: Path) -> dict[str, Any]:
    """After 3 of 6 steps, then after 5, from a checkpoint of this version and of one that did not count samples."""
    first = small_run.prepare(small_run.config(run_dir, {}))
    small_run.train(first, 3)
    state = checkpoint.save(first) / "state.json"
    found: dict[str, Any] = {"progress": json.loads(state.read_text())["progress"]}
    longer = {"train__seq_length": 2 * small_run.SEQUENCE}
    for version in ("this", "earlier"):
        run = small_run.prepare(small_run.config(run_dir, {}, **longer, checkpoint__verify=False))
        checkpoint.resume(run)
        found[version] = (run.state.step, run.state.consumed_samples, samples_of(run))
        values = json.loads(state.read_text())
        values.pop("trained_samples", None)
        state.write_text(json.dumps(values))
    small_run.train(run, 2)
    checkpoint.save(run)
    again = small_run.prepare(small_run.config(run_dir, {}, **longer))
    checkpoint.resume(again)
    found["again"] = (again.state.step, again.state.consumed_tokens, samples_of(again))
    return found


def test_longer_sequences_go_on_with_samples_that_were_not_used(tmp_path: Path) -> None:
    (found,) = run_distributed(resume_with_longer_sequences, 1, tmp_path)
    used, total = 3 * small_run.BATCH, small_run.STEPS * small_run.BATCH
    assert found["this"] == found["earlier"] == (3, used, total)
    assert found["again"] == (5, used * small_run.SEQUENCE + 2 * small_run.BATCH * 2 * small_run.SEQUENCE, total)
    # Earlier versions read these fields and no others.
    assert set(found["progress"]) == {"step", "consumed_samples", "consumed_tokens"}


class Fails(Callback):
    """Cannot end."""

    def on_end(self, run: Run) -> None:
        raise OSError(28, "No space left on device")


class Ends(Callback):
    """Notes that it ended."""

    has_ended = False

    def on_end(self, run: Run) -> None:
        self.has_ended = True


def test_a_callback_that_cannot_end_keeps_none_of_the_others_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last one closes the files of metrics."""
    run = fake_run(tmp_path, step=20, total_steps=20)
    run.cfg.train.eval_batches = 0
    first, last = Ends(), Ends()
    run.callbacks = [first, Fails(), last]
    monkeypatch.setattr(train, "build_datasets", lambda *_: (None, None, None))
    monkeypatch.setattr(train, "train_reader", lambda *_, **__: BatchIterator([0], **READER))
    with pytest.raises(OSError, match="No space left on device"):
        train.train(run)
    assert (first.has_ended, last.has_ended) == (True, True)


@pytest.mark.parametrize(
    ("steps", "tokens", "expected"),
    [(0, None, []), (3, None, [3, 6]), (3, 2 * BATCH * SEQUENCE, [2, 4, 6]), (0, 250, [2, 4, 6]), (3, 10**9, [])],
)
def test_evaluations_follow_steps_or_tokens(
    steps: int, tokens: int | None, expected: list[int], tmp_path: Path
) -> None:
    """A step has 128 tokens. Where tokens are given, an evaluation follows the step that reaches a multiple of them."""
    run = fake_run(tmp_path)
    run.cfg.train.eval_interval_steps, run.cfg.train.eval_interval_tokens = steps, tokens
    found = []
    for step in range(1, 8):
        before = run.state.consumed_tokens
        set_step(run, step)
        if train.is_evaluated(run, before):
            found.append(step)
    assert found == expected


class Skips(Callback):
    """Leaves two global batches out after the second step, as after a bad one."""

    def on_step_end(self, run: Run, metrics: Metrics) -> None:
        if run.state.step == 2:
            run.state.consumed_samples += 2 * small_run.BATCH


class Counted(Dataset[Any]):
    """Sequences of random tokens; notes which were read."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        self.read.append(index)
        length = small_run.SEQUENCE
        text = torch.randint(0, small_run.VOCABULARY, (length + 1,), generator=torch.Generator().manual_seed(index))
        positions = torch.arange(length)
        return {"tokens": text[:-1], "labels": text[1:], "loss_mask": torch.ones(length), "position_ids": positions}


def samples_read_around_a_skip(degrees: small_run.Degrees) -> tuple[list[int], int, int]:
    run, data = small_run.prepare(small_run.config(Path("unused"), degrees)), Counted()
    run.cfg.train.eval_batches, run.total_steps = 0, 4
    run.callbacks = [Skips()]
    train.build_datasets = lambda *_: (data, None, None)
    train.train(run)
    return data.read, run.state.consumed_samples, run.state.trained_samples


@pytest.mark.parametrize("degrees", [{}, {"pp": 2, "vpp": 2}], ids=["single", "pp2 vpp2"])
def test_data_that_a_run_skips_is_not_read(degrees: small_run.Degrees) -> None:
    batch = small_run.BATCH
    for read, consumed, trained in run_distributed(samples_read_around_a_skip, degrees.get("pp", 1), degrees):
        assert read == [*range(2 * batch), *range(4 * batch, 6 * batch)]
        assert (consumed, trained) == (6 * batch, 4 * batch)
