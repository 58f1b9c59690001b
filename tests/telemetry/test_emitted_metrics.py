"""What a run emits is in the registry, and what is in the registry is emitted."""

from __future__ import annotations

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bench.fault_runs import SMALL
from launch.local import launcher
from moe_train.config.composition.compose import compose
from moe_train.config.composition.validate import validate
from moe_train.telemetry import registry
from moe_train.telemetry.registry import METRICS, Line, Place
from moe_train.telemetry.sinks.jsonl import read
from tests.conftest import fixed_text

ABSENT = {"no_tokens", "balance_loss_scale", "mtp_loss_coeff", "router_bias_update_rate", "weight_decay"}


def test_every_metric_has_a_row_and_every_row_a_metric(small_data: tuple[str, ...], tmp_path: Path) -> None:
    """Two ranks with experts, multi-token prediction, evaluations, measured memory and a bad step."""
    book = tmp_path / "book.txt"
    book.write_text("".join(fixed_text())[:2000])
    entries = f"[{{path:{book}}},{{name:again,path:{book}}}]"
    cfg = compose([
        *SMALL, *small_data, "parallel.ep=2", "parallel.dp=2", "model.mtp_num_layers=1", "model.z_loss_coeff=1e-3",
        "model.balance_losses=[aux_loss,seq_aux_loss,global_aux_loss]", "model.balance_loss_coeffs=[1e-3,1e-3,1e-3]",
        "train.eval_batches=1", "train.steps=3", "checkpoint.save_at_end=false", "telemetry.tensorboard=true",
        "telemetry.profile_memory_steps=1", "resilience.inject=[{kind:nan,step:2}]", f"run_dir={tmp_path}",
        f"train.eval_sources={entries}", "train.eval_source_tokens=100", "train.eval_interval_tokens=200",
        "optimizer.qk_clip_threshold=100", "optimizer.ema_decay=0.9", "train.eval_ema=true",
    ])  # fmt: skip
    launcher.start(cfg, validate(cfg))
    lines = list(read(tmp_path / "metrics.jsonl"))
    assert [registry.unregistered(line) for line in lines] == [[]] * len(lines)
    assert [line["event"] for line in lines if "event" in line] == ["skipped"]
    seen: dict[Line, set[str]] = {
        Line.TRAINING: {name for line in lines if "lm_loss" in line for name in line},
        Line.EVALUATION: {name for line in lines if "valid_loss" in line for name in line},
    }
    for row in METRICS:
        kinds = [Line.TRAINING, Line.EVALUATION] if row.line is Line.BOTH else [row.line]
        for kind in kinds:
            if Place.METRICS_FILE in row.places and not any(map(row.matches, seen[kind])):
                assert row.when, f"{row.name} is in no line: it needs a condition, or is not a metric any more"
            for other in set(Line) - {row.line, Line.BOTH}:
                assert row.line is Line.BOTH or not any(map(row.matches, seen[other]))
    # With these settings only those are absent that need a step without tokens, or a schedule
    # (tests/loop/test_scheduled_runs.py).
    every = seen[Line.TRAINING] | seen[Line.EVALUATION]
    absent = {row.name for row in METRICS if Place.METRICS_FILE in row.places and not any(map(row.matches, every))}
    assert absent == ABSENT
    for line in (line for line in lines if "valid_loss" in line):
        assert line["valid_loss/book"] == line["valid_loss/again"]
        assert 0 < line["valid_loss/book"] < 8
    tags = set(EventAccumulator(str(tmp_path)).Reload().Tags()["scalars"])
    for tag in tags:
        assert Place.TENSORBOARD in registry.metric(tag).places, tag
    for row in METRICS:
        if Place.TENSORBOARD in row.places and row.name not in ABSENT:
            assert any(row.matches(tag) for tag in tags), row.name
