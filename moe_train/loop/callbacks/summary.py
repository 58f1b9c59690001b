"""The end of a run in a few lines: what was learned, how fast, and where things are. Also as run_dir/summary.json."""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import sys
import time
from collections import deque
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from moe_train.checkpoint.checkpoint import root_of
from moe_train.checkpoint.collective import warn
from moe_train.checkpoint.continuing import SUMMARY as NAME
from moe_train.config.resolve import follows_length
from moe_train.data.statistics import unigram_entropy
from moe_train.data.tokenizer import load_tokenizer
from moe_train.files import atomic
from moe_train.formats import run_directory
from moe_train.inference import held_out
from moe_train.loop.callbacks import loss_curve
from moe_train.loop.callbacks.loss_curve import LossCurve
from moe_train.run import Callback, Metrics, Run
from moe_train.telemetry import expert_load
from moe_train.telemetry.registry import metric
from moe_train.telemetry.sinks import jsonl
from moe_train.telemetry.throughput import speed

log = logging.getLogger(__name__)

_LOAD_STEPS = 20
"""Newest steps over which the load of experts is added up."""


class Summary(Callback):
    """Prints the summary on rank 0 and writes it as JSON, once all steps are done. Nothing after an error."""

    def __init__(self) -> None:
        self._began, self._first_step = 0.0, 0
        self._loads: deque[list[list[int]]] = deque(maxlen=_LOAD_STEPS)

    def on_start(self, run: Run) -> None:
        self._began, self._first_step = time.monotonic(), run.state.step

    def on_step_end(self, run: Run, metrics: Metrics) -> None:
        if run.is_main and "expert_load" in metrics:
            self._loads.append(metrics["expert_load"])

    def on_end(self, run: Run) -> None:
        if not run.completed:
            return
        continuations = _continuations(run)  # by all ranks together
        if not run.is_main:
            return
        curve = LossCurve()
        summary = {**self._numbers(run, curve), "continuations": continuations}
        path = run.run_dir / NAME
        try:
            atomic.write_text(path, json.dumps(summary, indent=1, ensure_ascii=False) + "\n", durable=True)
        except OSError as error:
            warn(f"{path} cannot be written: {error.strerror or error}; the same command writes it")
        console = Console(highlight=False, soft_wrap=True)
        more = [("summary", str(path)), ("loss curve", _picture(run, curve, summary)), *_next(run, summary)]
        rows = [f"  {name:<18}{text}" for name, text in more if text]
        for line in (*lines(summary), *rows, *_texts(continuations)):
            console.print(line, markup=False)

    def _numbers(self, run: Run, curve: LossCurve) -> dict[str, Any]:
        path = run.run_dir / jsonl.NAME
        losses: dict[str, list[float | None]] = {"lm_loss": [], "valid_loss": []}
        memory_peak = 0
        for line in jsonl.read(path):
            curve.add(line)
            for name, ends in losses.items():
                if name in line and not line.get("no_tokens"):
                    ends[1:] = [line[name]]  # the first stays
            memory_peak = max(memory_peak, line.get("memory_peak_bytes", 0))
        step_time_s = run.clock.mean_s
        now = speed(run.cfg, run.layout.world_size, step_time_s, run.peak_tflops) if step_time_s else None
        saved = run_directory.candidates(root_of(run))
        valid_loss, entropy = _ends(losses["valid_loss"]), held_out_entropy(run)
        last = valid_loss["last"] if valid_loss else None
        return {
            "model": run.cfg.model.name,
            "ranks": run.layout.world_size,
            "layout": asdict(run.layout),
            "steps": run.state.step,
            "tokens": run.state.consumed_tokens,
            "started_at_step": self._first_step,
            "time_s": round(time.monotonic() - self._began, 3),
            "train_loss": _ends(losses["lm_loss"]),
            "valid_loss": valid_loss,
            "valid_tokens_unigram_entropy": entropy,
            "below_unigram_entropy": None if last is None or entropy is None else last < entropy,
            "tokens_per_s": now and now.tokens_per_s,
            "tflops_per_rank": now and now.tflops_per_rank,
            "peak_tflops": run.peak_tflops,
            "mfu": now and now.mfu,
            "memory_peak_bytes": memory_peak or None,
            "expert_load": self._load(run),
            "checkpoint": str(saved[0]) if saved else None,
            "metrics": str(path),
        }

    def _load(self, run: Run) -> dict[str, float] | None:
        """Tokens of the most and the least loaded expert of any layer, relative to the mean, in the newest steps."""
        if not self._loads:
            return None
        load = expert_load.by_moe_layer(run.cfg.model, np.sum(self._loads, axis=0).tolist())
        shares = [tokens * len(row) / max(1, sum(row)) for row in load.values() for tokens in row]
        return {"most": max(shares), "least": min(shares), "steps": len(self._loads)}


def _picture(run: Run, curve: LossCurve, summary: dict[str, Any]) -> str:
    """Path of the picture of the losses; "" where there is none to draw, or it cannot be written."""
    path = run.run_dir / loss_curve.NAME
    try:
        drawn = curve.draw(path, run.cfg.model.name, summary["valid_tokens_unigram_entropy"])
    except OSError as error:
        warn(f"{path} cannot be written: {error.strerror or error}")
        return ""
    return str(path) if drawn else ""


def _next(run: Run, summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Commands that look at the run, use its model, continue it, and export its weights."""
    cfg, run_dir = run.cfg, shlex.quote(str(run.run_dir))
    commands = [("watch", f"{_program('tensorboard')} --logdir {run_dir}")] if cfg.telemetry.tensorboard else []
    if summary["checkpoint"] is None or cfg.checkpoint.dir is not None:
        return commands
    length = f"train.steps={2 * summary['steps']}"
    if cfg.train.tokens is not None:
        length = f"train.tokens={2 * summary['tokens']}"
    rest = " schedule.on_resume=override" if follows_length(cfg) else ""
    if cfg.model.capacity_factor is None:  # else an answer would depend on other requests
        commands += [(what, f"{_program(f'moe-{what}')} {run_dir}") for what in ("chat", "serve")]
    if cfg.train.eval_batches:
        commands.append(("evaluate", f"{_program('moe-evaluate')} {run_dir}"))
    return [
        *commands,
        ("continue", f"{_program('moe-train')} run_dir={run_dir} {length}{rest}"),
        ("convert", f"{_program('moe-convert')} {run_dir} {shlex.quote(f'{run.run_dir}-hf')}"),
    ]


def _program(name: str) -> str:
    """A command of this environment, with its directory where the shell would not find it."""
    own = Path(sys.executable).with_name(name)
    on_path = shutil.which(name)
    if not own.exists() or (on_path and Path(on_path).resolve() == own.resolve()):
        return name
    return shlex.quote(os.path.relpath(own) if own.is_relative_to(Path.cwd()) else str(own))


def held_out_entropy(run: Run) -> float | None:
    """Unigram entropy, nats, of the tokens that an evaluation predicts; None where there are none.

    It is the loss of the best model that knows how frequent each of these tokens is, and nothing else.
    """
    if run.valid_data is None or not run.cfg.train.eval_batches:
        return None
    parts = []
    for i in range(run.cfg.train.eval_batches * run.evaluation_batch_size):
        sample = run.valid_data[i]
        parts.append(np.asarray(sample["labels"])[np.asarray(sample["loss_mask"]) > 0])
    tokens = np.concatenate(parts)
    return unigram_entropy(tokens) if tokens.size else None


def _ends(losses: list[float | None]) -> dict[str, float | None] | None:
    """First and last value and the change in percent; null where the loss was not finite. None without any."""
    if not losses:
        return None
    first, last = losses[0], losses[-1]
    change = None if first is None or last is None else 100 * (last - first) / first
    return {"first": first, "last": last, "change_percent": change}


def _continuations(run: Run) -> list[dict[str, str]]:
    count = run.cfg.train.sample_continuations
    if not count:
        return []
    if run.valid_data is None:
        if run.is_main:
            log.warning("no text is held out, so none is continued; see data.split and train.eval_batches")
        return []
    continuations = held_out.continue_held_out(run, count)
    if not run.is_main:
        return []
    tokenizer = load_tokenizer(run.cfg.data)
    return [
        {name: tokenizer.decode(tokens) for name, tokens in asdict(continuation).items()}
        for continuation in continuations
    ]


def lines(summary: dict[str, Any]) -> list[str]:
    """The numbers of a summary as text. What is not known has no line."""
    degrees = " ".join(f"{name}{value}" for name, value in summary["layout"].items() if value > 1) or "one rank"
    rows: list[tuple[str, str | None]] = [
        ("steps", _steps(summary)),
        (metric("lm_loss").label, _change("lm_loss", summary["train_loss"])),
        (metric("valid_loss").label, _change("valid_loss", summary["valid_loss"])),
        ("unigram entropy", _entropy(summary)),
        (metric("tokens_per_s").label, _throughput(summary)),
        (metric("expert_load").label, _load_text(summary["expert_load"])),
        (metric("memory_peak_bytes").label, _memory(summary["memory_peak_bytes"])),
        ("checkpoint", summary["checkpoint"]),
        ("metrics", summary["metrics"]),
    ]
    return [f"Done: {summary['model']}, {degrees}", *(f"  {name:<18}{text}" for name, text in rows if text)]


def _steps(summary: dict[str, Any]) -> str:
    duration, start = timedelta(seconds=round(summary["time_s"])), summary["started_at_step"]
    since = f" since it was resumed at step {start:,}" if start else ""
    return f"{summary['steps']:,} ({summary['tokens']:,} tokens), {duration}{since}"


def _change(name: str, loss: dict[str, float | None] | None) -> str | None:
    if loss is None:
        return None
    values = (loss["first"], loss["last"])
    first, last = ("not finite" if value is None else metric(name).text(value) for value in values)
    change = loss["change_percent"]
    return f"first {first}, last {last}" + ("" if change is None else f" ({change:+.1f} %)")


def _entropy(summary: dict[str, Any]) -> str | None:
    entropy, below = summary["valid_tokens_unigram_entropy"], summary["below_unigram_entropy"]
    if entropy is None:
        return None
    verdict = {
        None: "",
        True: "; the last validation loss is below it: context was learned, not only frequencies",
        False: "; the last validation loss is not below it: no use of context shows yet",
    }
    return f"{metric('valid_loss').text(entropy)} nats of the validation tokens{verdict[below]}"


def _throughput(summary: dict[str, Any]) -> str | None:
    if summary["tokens_per_s"] is None:
        return None
    text = ", ".join(_with_unit(name, summary[name]) for name in ("tokens_per_s", "tflops_per_rank"))
    if summary["mfu"] is None:
        return f"{text}, MFU unknown (set telemetry.peak_tflops)"
    if summary["mfu"] > 1:
        return f"{text}; no MFU: other processes disturbed the measurement of the peak (set telemetry.peak_tflops)"
    mfu, peak_tflops = metric("mfu"), metric("tflops_per_rank").text(summary["peak_tflops"])
    return f"{text}, {mfu.label} {mfu.text(summary['mfu'])} of {peak_tflops} TFLOPS"


def _with_unit(name: str, value: float) -> str:
    return f"{metric(name).text(value)} {metric(name).unit}"


def _load_text(load: dict[str, float] | None) -> str | None:
    if load is None:
        return None
    most, least = (metric("expert_load").text(load[name]) for name in ("most", "least"))
    return f"most loaded {most}, least loaded {least} of the mean load (last {load['steps']} steps)"


def _memory(size: int | None) -> str | None:
    return None if size is None else f"{size / 2**20:,.0f} MiB, maximum over ranks"


def _texts(continuations: list[dict[str, str]]) -> list[str]:
    if not continuations:
        return []
    text = ["Continuations of held-out text"]
    for i, continuation in enumerate(continuations, 1):
        text += [
            f"  {i}. prompt  {continuation['prompt']!r}",
            f"     model   {continuation['model']!r}",
            f"     text    {continuation['text']!r}",
        ]
    return text
