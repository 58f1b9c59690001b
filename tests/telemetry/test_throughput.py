"""Speed from a step time, by hand; peaks; memory."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe_train.clock import StepClock
from moe_train.config.model import ModelConfig
from moe_train.config.schema import Config
from moe_train.telemetry import peak, throughput
from moe_train.telemetry.throughput import Throughput, speed
from tests.distributed.helper import run_distributed
from tests.loop.fake_run import fake_run, set_step


def _dense() -> Config:
    cfg = Config()
    cfg.model = ModelConfig(
        num_layers=2, hidden_size=8, ffn_hidden_size=16, vocab_size=128, attention="gqa", num_attention_heads=2
    )
    cfg.batch.global_batch_size, cfg.train.seq_length = 4, 10
    return cfg


def test_speed_by_hand() -> None:
    # A layer: q, k, v and output 4 x 8 x 8, three feed-forward matrices 8 x 16; the head 8 x 128. 2 FLOPs a weight.
    linear = 2 * (2 * (4 * 8 * 8 + 3 * 8 * 16) + 8 * 128)
    # Scores and values: 2 layers x 2 heads x (4 + 4) x 2 FLOPs, over 5 tokens on average of 10.
    attention = 2 * 2 * 8 * 2 * 5
    flops = 3 * (linear + attention) * 4 * 10  # backward costs twice the forward pass
    now = speed(_dense(), world_size=2, step_time_s=0.5, peak_tflops=1e-6)
    assert now.tokens_per_s == 80
    assert now.tflops_per_rank == pytest.approx(flops / 0.5 / 2 / 1e12)
    assert now.mfu == pytest.approx(flops / 0.5 / 2 / 1e6)


def test_multi_token_prediction_counts() -> None:
    cfg = _dense()
    without = speed(cfg, 1, 1.0, None)
    cfg.model.mtp_num_layers = 1
    assert speed(cfg, 1, 1.0, None).tflops_per_rank > 1.3 * without.tflops_per_rank
    assert without.mfu is None


def test_the_clock_leaves_pauses_and_the_first_lap_out() -> None:
    times = iter([0.0, 7.0, 8.0, 11.0, 12.0, 13.0])
    clock = StepClock(now=lambda: next(times))
    clock.start()
    assert clock.mean_s is None
    assert clock.lap() == 7.0
    assert clock.mean_s == 7.0
    with clock.paused():  # from 8 to 11
        pass
    assert clock.lap() == 2.0
    assert clock.lap() == 1.0
    assert clock.mean_s == 1.5


def test_a_clock_that_does_not_run_has_no_lap() -> None:
    with pytest.raises(RuntimeError, match=r"before StepClock\.start"):
        StepClock().lap()


def _measure(interval: int) -> list[dict[str, Any]]:
    run = fake_run(Path("unused"), total_steps=5, rank=dist.get_rank(), log_interval=interval)
    seconds = iter([step * (1.0 + dist.get_rank()) for step in range(6)])
    run.clock = StepClock(now=lambda: next(seconds))
    run.cfg.telemetry.peak_tflops = 0.5
    callback = Throughput()
    rows: list[dict[str, Any]] = []
    callback.on_start(run)
    run.clock.start()
    for step in range(1, 6):
        set_step(run, step)
        rows.append({})
        callback.on_step_end(run, rows[-1])
    return rows


def test_ranks_agree_on_the_slowest_one_at_logged_steps() -> None:
    first, second = run_distributed(_measure, 2, 2)
    assert first == second
    assert [bool(row) for row in first] == [True, True, False, True, True]  # 1, 2, 4 and the last
    for row in filter(None, first):
        assert row["step_time_s"] == 2.0  # rank 1 takes two seconds for a step, rank 0 one
        assert row["tokens_per_s"] == 8 * 16 / 2.0
        assert row["mfu"] == row["tflops_per_rank"] / 0.5
        assert row["memory_peak_bytes"] > 50e6  # a process that has imported torch


def test_memory_of_a_cpu_rank_is_what_it_held_at_most() -> None:
    before = throughput.memory_peak_bytes(torch.device("cpu"))
    held = bytearray(b"x" * (before + 64 * 2**20))
    assert throughput.memory_peak_bytes(torch.device("cpu")) > before
    assert 0.9 < throughput.memory_peak_bytes(torch.device("cpu")) / len(held) < 4
    del held
    assert throughput.memory_peak_bytes(torch.device("cpu")) > before


def _cpu_peaks() -> tuple[float | None, float | None]:
    run = fake_run(Path("unused"), rank=dist.get_rank())
    measured = peak.tflops_of_rank(run)
    run.cfg.telemetry.peak_tflops = 123.0
    return measured, peak.tflops_of_rank(run)


def test_the_peak_of_a_cpu_is_measured_and_all_ranks_agree() -> None:
    first, second = run_distributed(_cpu_peaks, 2)
    assert first == second
    measured, given = first
    assert measured is not None
    assert 1e-4 < measured < 100  # TFLOPS of one core: more than a toy, less than a GPU
    assert given == 123.0


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA H100 MIG 1g", None),
    ],
)
def test_a_gpu_is_looked_up_by_its_whole_name(
    name: str, tflops: float | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = fake_run(Path("unused"))
    run.device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    with caplog.at_level(logging.WARNING):
        assert peak.tflops_of_rank(run) == tflops
    assert ("telemetry.peak_tflops" in caplog.text) == (tflops is None)
