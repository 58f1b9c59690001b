"""Errors of one sink: they are reported once, retried, and neither end the run nor affect the other sinks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from moe_train.telemetry.registry import Place
from moe_train.telemetry.sinks import composite
from moe_train.telemetry.sinks.base import RunEnd, RunFacts, Sink
from moe_train.telemetry.sinks.composite import CompositeSink
from moe_train.telemetry.sinks.table import SINKS
from moe_train.telemetry.sinks.tensorboard import TensorBoard
from tests.loop.fake_run import end, fake_run, start, take_step, with_sinks

FACTS, END = RunFacts("tiny", 2, "cpu", 0, 10), RunEnd(3, completed=True)
METRICS = {"lm_loss": 5.0}


class Recorder(Sink):
    """Keeps its calls, and raises `error` as long as it is set."""

    name = "recorder"
    place = Place.TENSORBOARD

    def __init__(self, run_dir: Path = Path()) -> None:
        super().__init__(run_dir)
        self.calls: list[tuple[Any, ...]] = []
        self.error: Exception | None = None
        self.closed = False

    def _take(self, *call: Any) -> None:
        if self.error is not None:
            raise self.error
        self.calls.append(call)

    def open(self, facts: RunFacts) -> None:
        self._take("open", facts.first_step)

    def scalars(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._take("scalars", step)

    def event(self, event: Mapping[str, Any]) -> None:
        self._take("event", event)

    def rewind(self, step: int) -> None:
        self._take("rewind", step)

    def close(self, end: RunEnd) -> None:
        self.closed = True
        self._take("close", end.step)


class Other(Recorder):
    name = "other"


@pytest.fixture
def pair() -> tuple[Recorder, Recorder, CompositeSink]:
    failing, other = Recorder(), Other()
    both = CompositeSink([failing, other])
    return failing, other, both


@pytest.mark.parametrize("error", [RuntimeError("first line\nand second"), ConnectionError("no server")])
def test_calls_that_failed_follow_later_and_in_order(
    error: Exception, pair: tuple[Recorder, Recorder, CompositeSink], capsys: pytest.CaptureFixture[str]
) -> None:
    failing, other, both = pair
    both.open(FACTS)
    failing.error = error
    both.scalars(1, METRICS)
    both.rewind(0)
    both.scalars(1, METRICS)
    failing.error = None
    both.scalars(2, METRICS)
    expected = [("open", 0), ("scalars", 1), ("rewind", 0), ("scalars", 1), ("scalars", 2)]
    assert failing.calls == expected
    assert [call for call in other.calls if call[0] != "event"] == expected
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    assert [call[1] for call in other.calls if call[0] == "event"] == [
        {"step": 1, "event": "sink_failed", "reason": reason, "sink": "recorder"},
        {"step": 2, "event": "sink_recovered", "sink": "recorder"},
    ]
    assert capsys.readouterr().err.splitlines() == [
        f"warning: recorder failed: {reason}; the run continues, and its records follow later",
        "warning: recorder works again: 3 records came late, 0 were lost",
    ]
    both.close(END)
    assert failing.calls[-1] == other.calls[-1] == ("close", 3)
    assert capsys.readouterr().err == ""


def test_each_kind_of_error_is_reported_once(
    pair: tuple[Recorder, Recorder, CompositeSink], capsys: pytest.CaptureFixture[str]
) -> None:
    failing, other, both = pair
    both.open(FACTS)
    for step in range(1, 31):
        failing.error = {0: ConnectionError(f"at step {step}"), 1: TimeoutError("slow")}.get(step % 3)
        both.scalars(step, METRICS)
    reports = [call[1] for call in other.calls if call[0] == "event"]
    assert [(event["event"], event.get("reason")) for event in reports] == [
        ("sink_failed", "TimeoutError: slow"),
        ("sink_recovered", None),
        ("sink_failed", "ConnectionError: at step 3"),
        ("sink_recovered", None),
    ]
    assert capsys.readouterr().err.count("recorder failed") == 2
    both.flush()
    failing.error = None
    both.flush()
    assert [call[1] for call in failing.calls if call[0] == "scalars"] == list(range(1, 31))


def test_a_call_that_always_fails_does_not_hold_up_the_others_for_ever(
    pair: tuple[Recorder, Recorder, CompositeSink], capsys: pytest.CaptureFixture[str]
) -> None:
    failing, _, both = pair
    both.open(FACTS)
    take = failing._take
    failing._take = lambda *call: take(*call) if call != ("scalars", 1) else 1 / 0  # type: ignore[method-assign]
    for step in range(1, 15):
        both.scalars(step, METRICS)
    assert [call[1] for call in failing.calls if call[0] == "scalars"] == list(range(2, 15))
    errors = capsys.readouterr().err
    assert "recorder failed: ZeroDivisionError: division by zero" in errors
    assert "1 were lost" in errors


def fail_for_steps(count: int, failing: Recorder, both: CompositeSink, monkeypatch: pytest.MonkeyPatch) -> None:
    """An outage of one sink from the start, with room for 20 calls that wait."""
    monkeypatch.setattr(composite, "MOST_WAITING", 20)
    failing.error = OSError(28, "No space left on device")
    both.open(FACTS)
    for step in range(1, count + 1):
        both.scalars(step, METRICS)


def test_an_outage_that_lasts_has_bounds_and_its_loss_is_reported(
    pair: tuple[Recorder, Recorder, CompositeSink],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    failing, other, both = pair
    fail_for_steps(50, failing, both, monkeypatch)
    both.close(END)
    assert len([call for call in other.calls if call[0] == "scalars"]) == 50
    assert failing.closed
    told = capsys.readouterr().err
    assert "warning: 52 records of recorder are lost: OSError: No space left on device" in told
    assert "recorder cannot be closed" in told


def test_an_outage_loses_no_rewind(
    pair: tuple[Recorder, Recorder, CompositeSink], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file would have the steps after it twice."""
    failing, _, both = pair
    fail_for_steps(30, failing, both, monkeypatch)
    both.rewind(10)
    failing.error = None
    both.scalars(11, METRICS)
    assert failing.calls[-2:] == [("scalars", 19), ("rewind", 10)]
    both.scalars(12, METRICS)
    assert failing.calls[-1] == ("scalars", 12)


def test_a_sink_that_cannot_be_opened_gets_nothing_before_it_is(
    pair: tuple[Recorder, Recorder, CompositeSink],
) -> None:
    failing, _, both = pair
    failing.error = ImportError("no module")
    both.open(FACTS)
    for step in range(1, 20):
        both.scalars(step, METRICS)
    failing.error = None
    both.scalars(20, METRICS)
    assert failing.calls == [("open", 0), *(("scalars", step) for step in range(1, 21))]


def test_sinks_that_all_fail_end_nothing(pair: tuple[Recorder, Recorder, CompositeSink]) -> None:
    failing, other, both = pair
    both.open(FACTS)
    failing.error = other.error = RuntimeError("both")
    for step in range(1, 4):
        both.scalars(step, METRICS)
    failing.error = other.error = None
    both.flush()
    for sink, name in ((failing, "other"), (other, "recorder")):
        assert [call[1] for call in sink.calls if call[0] == "scalars"] == [1, 2, 3]
        assert ("sink_failed", name) in [
            (call[1]["event"], call[1]["sink"]) for call in sink.calls if call[0] == "event"
        ]


def test_a_sink_gets_the_metrics_of_its_place_and_those_without_a_row() -> None:
    received: list[Mapping[str, Any]] = []
    sink = Recorder()
    sink.scalars = lambda step, metrics: received.append(metrics)  # type: ignore[method-assign, assignment]
    both = CompositeSink([sink])
    both.scalars(
        1, {"tokens": 8, "lm_loss": 5.0, "expert_load": [[1]], "expert_load_imbalance/layer_2": 1.5, "mine": 1}
    )
    both.scalars(1, {"tokens": 8})
    assert received == [{"lm_loss": 5.0, "expert_load_imbalance/layer_2": 1.5, "mine": 1}]


def test_a_tensorboard_writer_that_raises_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put = TensorBoard._put
    broken = True

    def raises(self: TensorBoard, **fields: Any) -> None:
        if broken and "summary" in fields:
            raise RuntimeError("the writer's thread has ended")
        put(self, **fields)

    monkeypatch.setattr(TensorBoard, "_put", raises)
    run = fake_run(tmp_path)
    callbacks = with_sinks(run)
    start(run, callbacks)
    for _ in range(4):
        take_step(run, callbacks)
    broken = False
    take_step(run, callbacks)
    end(run, callbacks)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("lm_loss")] == [1, 2, 3, 4, 5]
    assert (tmp_path / "metrics.jsonl").read_text().count("lm_loss") == 5
    assert (
        "sink_failed reason=RuntimeError: the writer's thread has ended sink=TensorBoard"
        in (tmp_path / "run.log").read_text()
    )
    assert capsys.readouterr().err.count("TensorBoard failed") == 1


def test_config_decides_which_sinks_are_on(tmp_path: Path) -> None:
    telemetry = fake_run(tmp_path).cfg.telemetry
    for on, expected in ((True, ["metrics.jsonl", "TensorBoard", "run.log"]), (False, ["metrics.jsonl", "run.log"])):
        telemetry.tensorboard = on
        assert [row.make.name for row in SINKS if row.is_on(telemetry)] == expected  # type: ignore[attr-defined]
