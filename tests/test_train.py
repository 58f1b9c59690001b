"""What a run is given to train on, also where it resumes with other sequences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_train.checkpoint import checkpoint
from moe_train.train import samples_of
from tests.checkpoint import small_run
from tests.distributed.helper import run_distributed
from tests.loop.fake_run import BATCH, SEQUENCE, fake_run, set_step


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
