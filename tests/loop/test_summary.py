"""The summary at the end of a run."""

from __future__ import annotations

import errno
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_train.clock import StepClock
from moe_train.loop.callbacks import summary as module
from moe_train.loop.callbacks.summary import NAME, Summary, lines
from moe_train.run import Run
from moe_train.telemetry.sinks.jsonl import MetricsFile
from tests.loop.fake_run import BATCH, evaluate, fake_run, take_step, with_sinks


class _Words:
    """A tokenizer whose tokens are their own numbers."""

    def decode(self, tokens: list[int]) -> str:
        return " ".join(map(str, tokens))


def _train(run: Run, losses: list[float], completed: bool = True) -> None:
    """Steps with these losses between evaluations of the same loss, and the end of the run."""
    seconds = iter(range(0, 1000, 2))
    run.clock = StepClock(now=lambda: next(seconds))
    sinks, close = with_sinks(run, MetricsFile)
    callbacks = [sinks, Summary(), close]
    for callback in callbacks:
        callback.on_start(run)
    run.clock.start()
    evaluate(run, callbacks, losses[0])
    for loss in losses:
        take_step(run, callbacks, loss)
        run.clock.lap()
    evaluate(run, callbacks, losses[-1])
    run.completed = completed
    for callback in callbacks:
        callback.on_end(run)


def _with_data(run: Run, labels: list[int]) -> Run:
    """Held-out data for one evaluation batch; the last token of each sample is masked."""
    run.cfg.train.eval_batches = 1
    mask = torch.tensor([1.0] * len(labels) + [0.0])
    sample = {"tokens": torch.arange(len(labels) + 1), "labels": torch.tensor([*labels, 77]), "loss_mask": mask}
    run.valid_data = [sample] * BATCH
    return run


def test_the_numbers_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = _with_data(fake_run(tmp_path), [1, 2, 3, 4])
    run.peak_tflops = 0.001
    _train(run, [4.0, 3.0, 1.0])
    found = json.loads((tmp_path / NAME).read_text())
    assert found["steps"] == 3
    assert found["tokens"] == 3 * 128
    assert found["train_loss"] == {"first": 4.0, "last": 1.0, "change_percent": -75.0}
    assert found["valid_loss"] == {"first": 4.0, "last": 1.0, "change_percent": -75.0}
    assert found["valid_tokens_unigram_entropy"] == pytest.approx(math.log(4))  # four equally frequent tokens
    assert found["below_unigram_entropy"] is True
    assert found["tokens_per_s"] == pytest.approx(128 / 2.0)
    assert found["mfu"] == pytest.approx(found["tflops_per_rank"] / 0.001)
    # Layers 2 to 4: the fullest expert has 100 of 128 tokens, the emptiest 28, where 64 are its share.
    assert found["expert_load"] == {"most": 100 / 64, "least": 28 / 64, "steps": 3}
    assert found["memory_peak_bytes"] == 2**28
    assert found["metrics"] == str(tmp_path / "metrics.jsonl")
    assert found["checkpoint"] is None
    output = capsys.readouterr().out
    assert "\x1b" not in output
    assert "validation loss   first 4.0000, last 1.0000 (-75.0 %)" in output
    assert "unigram entropy   1.3863 nats of the validation tokens; the last validation loss is below it" in output
    assert "64 tokens/s" in output
    assert "256 MiB" in output


def test_a_summary_that_cannot_be_written_is_shown_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.atomic, "write_text", full)
    run, callbacks = fake_run(tmp_path), [Summary()]
    for callback in callbacks:
        callback.on_start(run)
    take_step(run, callbacks)
    run.completed = True
    callbacks[0].on_end(run)
    told = capsys.readouterr()
    assert told.out.startswith("Done: ")
    assert "summary.json cannot be written: No space left on device; the same command writes it" in told.err


def test_a_resumed_run_tells_the_losses_from_its_first_start(tmp_path: Path) -> None:
    _train(_with_data(fake_run(tmp_path), [1, 2]), [8.0, 6.0])
    _train(_with_data(fake_run(tmp_path, step=2), [1, 2]), [5.0, 4.0])
    found = json.loads((tmp_path / NAME).read_text())
    assert found["train_loss"]["first"] == 8.0
    assert found["valid_loss"] == {"first": 8.0, "last": 4.0, "change_percent": -50.0}
    assert found["steps"] == 4
    assert found["below_unigram_entropy"] is False  # ln 2 for two equally frequent tokens


def test_a_diverged_run_and_unknown_peak_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _train(fake_run(tmp_path), [4.0, float("nan")])
    found = json.loads((tmp_path / NAME).read_text())
    assert found["valid_loss"] == {"first": 4.0, "last": None, "change_percent": None}
    assert found["below_unigram_entropy"] is None
    output = capsys.readouterr().out
    assert "first 4.0000, last not finite" in output
    assert "MFU unknown (set telemetry.peak_tflops)" in output


def test_more_than_the_peak_is_not_passed_off_as_utilisation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fake_run(tmp_path)
    run.peak_tflops = 1e-9
    _train(run, [4.0, 3.0])
    assert "no MFU: other processes disturbed" in capsys.readouterr().out


def test_the_newest_checkpoint_is_named(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    for step in (1, 2):
        (tmp_path / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    _train(run, [4.0, 3.0])
    assert json.loads((tmp_path / NAME).read_text())["checkpoint"].endswith("step_00000002")


def test_nothing_is_told_after_an_error_or_by_other_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _train(_with_data(fake_run(tmp_path / "failed"), [1, 2]), [4.0], completed=False)
    _train(_with_data(fake_run(tmp_path / "other", rank=1), [1, 2]), [4.0])
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "failed" / NAME).exists()
    assert not (tmp_path / "other").exists()


def test_continuations_are_decoded_and_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _with_data(fake_run(tmp_path), list(range(SAMPLE)))
    run.cfg.train.sample_continuations = 2
    monkeypatch.setattr(module, "load_tokenizer", lambda data: _Words())
    asked: list[tuple[list[list[int]], int]] = []

    def continue_prompts(run: Any, chunks: Any, prompts: list[list[int]], count: int) -> list[list[int]]:
        asked.append((prompts, count))
        return [[9] * count for _ in prompts]

    monkeypatch.setattr(module.held_out, "continue_prompts", continue_prompts)
    _train(run, [4.0])
    expected = {"prompt": "0 1 2 3 4 5 6 7", "model": "9 9 9 9 9 9 9 9", "text": "8 9 10 11 12 13 14 15"}
    assert json.loads((tmp_path / NAME).read_text())["continuations"] == [expected] * 2
    output = capsys.readouterr().out
    assert "prompt  '0 1 2 3 4 5 6 7'" in output
    assert "text    '8 9 10" in output
    assert asked[0][1] == 8


SAMPLE = 15  # with the masked token, train.seq_length


def test_what_is_not_known_has_no_line() -> None:
    unknown = (
        "train_loss", "valid_loss", "valid_tokens_unigram_entropy", "below_unigram_entropy", "tokens_per_s",
        "expert_load", "memory_peak_bytes", "checkpoint",
    )  # fmt: skip
    numbers: dict[str, Any] = dict.fromkeys(unknown)
    numbers |= {
        "model": "tiny",
        "layout": {"tp": 1, "dp": 1},
        "steps": 3,
        "tokens": 384,
        "time_s": 61.2,
        "started_at_step": 2,
    }
    assert lines(numbers | {"metrics": "a[b]/metrics.jsonl"}) == [
        "Done: tiny, one rank",
        "  steps             3 (384 tokens), 0:01:01 since it was resumed at step 2",
        "  metrics           a[b]/metrics.jsonl",
    ]


@pytest.mark.parametrize(
    ("decay", "tokens", "length"),
    [("constant", None, "train.steps=6"), ("cosine", None, "train.steps=6 schedule.on_resume=override"),
     ("constant", 384, "train.tokens=768")],
)  # fmt: skip
def test_the_end_names_the_picture_and_what_to_do_next(
    decay: str, tokens: int | None, length: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Three steps of 128 tokens; to go on means twice as far."""
    monkeypatch.setattr(module, "_program", lambda name: name)
    place = tmp_path / "a b"
    (place / "checkpoints/step_00000003").mkdir(parents=True)
    run = fake_run(place)
    run.cfg.schedule.decay, run.cfg.train.tokens, run.cfg.telemetry.tensorboard = decay, tokens, True
    _train(run, [4.0, 3.0, 1.0])
    output = capsys.readouterr().out.splitlines()
    named = ("watch", "chat", "serve", "evaluate", "continue", "convert")
    assert [line.split(maxsplit=1) for line in output if line.split()[0] in named] == [
        ["watch", f"tensorboard --logdir '{place}'"],
        ["chat", f"moe-chat '{place}'"],
        ["serve", f"moe-serve '{place}'"],
        ["evaluate", f"moe-evaluate '{place}'"],
        ["continue", f"moe-train run_dir='{place}' {length}"],
        ["convert", f"moe-convert '{place}' '{place}-hf'"],
    ]
    assert f"  loss curve        {place}/loss.svg" in output
    assert (place / "loss.svg").read_text().count("<path") > 2
