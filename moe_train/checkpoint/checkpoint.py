"""Saves a run and continues it, in the same or another layout of ranks. Every rank calls these together."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import megatron.core
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from moe_train.checkpoint import compat, directory, exchange, metadata, state, storage
from moe_train.checkpoint.hf import config as hf_config
from moe_train.loop.run import Run, TrainState
from parallel.errors import CheckpointError

T = TypeVar("T")


def root_of(run: Run) -> Path:
    """Directory of the run's checkpoints."""
    return Path(run.cfg.checkpoint.dir or run.run_dir / "checkpoints")


def save(run: Run) -> Path:
    """Write the state after the current step and return the checkpoint's directory.

    It appears under its name only when complete: a run that dies while writing leaves the earlier checkpoints and
    `latest` as they were.

    Raises:
        CheckpointError: it cannot be written (disk full, no permission).
    """
    root, name = root_of(run), directory.name_of(run.state.step)
    partial = _on_main(run, lambda: directory.prepare(root, name), f"write to {root}")
    if run.cfg.parallel.overlap_param_gather:
        for chunk in run.chunks:  # weights are otherwise gathered only when the next forward pass needs them
            chunk.start_param_sync(force_sync=True)
    model = state.model_state(run)
    optimizer = state.optimizer_state(run, model, loading=False)
    if run.cfg.precision.dtype == "fp32":
        optimizer = state.without_masters(optimizer)
    tensors = {**model, "optimizer": optimizer, "rng": state.random_state(run)}
    if scales := state.delayed_scales(run, model):
        tensors["fp8_scales"] = scales
    _together(run, lambda: storage.write(tensors, partial), f"write {root / name}")
    facts = _facts(run)

    def finish() -> Path:
        metadata.read(partial)  # nothing is published that could not be read
        (partial / directory.CONFIG).write_text(compat.dump(run.cfg))
        (partial / directory.STATE).write_text(json.dumps(facts, indent=1) + "\n")
        return directory.publish(root, name)

    return _on_main(run, finish, f"write {root / name}")


def resume(run: Run) -> None:
    """Continue from the checkpoint that `resume` names, or start with the weights of `init_from`, or start afresh.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or of another model. The run was not changed on disk.
    """
    chosen = _on_main(run, lambda: _choose(run), "read checkpoints")
    if chosen is not None:
        _load(run, chosen)
    elif run.cfg.init_from:
        _load_weights(run, Path(run.cfg.init_from))


def _choose(run: Run) -> Path | None:
    """The checkpoint to continue from, looked at by the main rank only. Damaged ones are passed over only by `auto`."""
    if run.cfg.resume == "never":
        return None
    if run.cfg.resume != "auto":
        return directory.resolve(Path(run.cfg.resume), "resume")[0]
    directory.recover(root_of(run))
    found = directory.candidates(root_of(run))
    first_error: CheckpointError | None = None
    for path in found:
        try:
            directory.check_files(path)
            metadata.read(path)
            return path
        except CheckpointError as error:
            first_error = first_error or error
            _warn(f"{error.cause}; looking for an earlier one")
    if first_error is not None:
        raise CheckpointError(
            f"no checkpoint in {root_of(run)} can be read ({first_error.cause})",
            "restore one from a copy, or start afresh with resume=never",
        )
    return None


def _load(run: Run, path: Path) -> None:
    contents = _together(run, lambda: metadata.read(path), f"read {path}")
    facts, warnings = _on_main(run, lambda: _check(run, path), f"read {path}")
    model = state.model_state(run)
    optimizer = state.optimizer_state(run, model, loading=True)
    scales = _saved_scales(state.delayed_scales(run, model), contents, warnings)
    updates = facts["schedule"]["num_steps"]  # fewer than steps where fp16 skipped some
    # Read one by one: master weights may come from the same tensors as the model.
    state.load_model(run, _read(run, model, contents, path))
    state.load_optimizer(run, _read(run, optimizer, contents, path), updates)
    if scales:
        state.load_delayed_scales(run, _read(run, scales, contents, path))
    same_layout = facts["layout"] == asdict(run.layout)
    if (
        same_layout and facts["device"] == run.device.type
    ):  # another layout has other streams, which keep their seeds: no weight is drawn and no dropout used
        state.load_random(run, _read(run, state.random_state(run), contents, path))
    state.load_scalers(run, facts["loss_scale"])
    run.schedule.step(increment=updates)
    run.state = TrainState(**facts["progress"])
    if run.is_main:
        for warning in warnings:
            _warn(warning)
        _say(f"resumed at step {run.state.step} from {path}" + ("" if same_layout else f" ({_resharding(run, facts)})"))


def _saved_scales(wanted: storage.StateDict, contents: metadata.Metadata, warnings: list[str]) -> storage.StateDict:
    """`wanted`, or nothing where the checkpoint is of a run without delayed scaling."""
    if wanted and not any(key.startswith(state.FP8_SCALES) for key in contents.state_dict_metadata):
        warnings.append("the checkpoint has no scales of precision.fp8=delayed, which begin at 1 again")
        return {}
    return wanted


def _load_weights(run: Run, path: Path) -> None:
    """Only the model of a checkpoint; the run starts at step 0."""
    if (path / hf_config.FILE).is_file():
        state.load_model(run, _together(run, lambda: exchange.read_weights(run, path), f"read {path}"))
        run.optimizer.reload_model_params()
        if run.is_main:
            _say(f"weights from {path}")
        return
    path = _on_main(run, lambda: directory.resolve(path, "init_from")[0], f"read {path}")
    contents = _together(run, lambda: metadata.read(path), f"read {path}")
    state.load_model(run, _read(run, state.model_state(run), contents, path))
    run.optimizer.reload_model_params()
    if run.is_main:
        _say(f"weights from {path}")


def _read(run: Run, wanted: storage.StateDict, contents: metadata.Metadata, path: Path) -> storage.StateDict:
    request = storage.Request(wanted)
    state.find_masters(request, contents, fp32=run.cfg.precision.dtype == "fp32")
    _together(run, lambda: metadata.check_tensors(contents, request.tensors, path), f"read {path}")
    try:
        return _together(run, lambda: request.read(path), f"read {path}")
    except CheckpointError as error:
        raise directory.damaged(path, error.cause) from error


def _facts(run: Run) -> dict[str, Any]:
    """Everything that is not a tensor. All ranks agree on it."""
    gathered: list[Any] = [None] * run.layout.world_size
    dist.all_gather_object(gathered, state.scalers(run))
    loss_scale: dict[str, Any] = {}
    for scalers in gathered:  # a pipeline stage without experts has no expert optimizer
        loss_scale = {**scalers, **loss_scale}
    return {
        "format": directory.FORMAT,
        "progress": asdict(run.state),
        "schedule": run.schedule.state_dict(),
        "loss_scale": loss_scale,
        "layout": asdict(run.layout),
        "device": run.device.type,
        "seed": run.cfg.seed,
        "versions": {"torch": torch.__version__, "megatron-core": megatron.core.__version__},
    }


def _check(run: Run, path: Path) -> tuple[dict[str, Any], list[str]]:
    """Facts of the checkpoint, and warnings about settings that differ from it."""
    directory.check_files(path)
    try:
        facts = json.loads((path / directory.STATE).read_text())
        version = facts["format"]
        if facts.get("weights_only"):
            raise CheckpointError(f"checkpoint {path} holds weights only", f"set init_from={path}")
        TrainState(**facts["progress"])
        if missing := {"schedule", "loss_scale", "layout", "device"} - facts.keys():
            raise KeyError(f"no {', '.join(sorted(missing))}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise directory.damaged(path, f"{directory.STATE} cannot be read: {error}") from error
    if version > directory.FORMAT:
        raise CheckpointError(
            f"checkpoint {path} has format {version}, and this version of moe-train reads up to {directory.FORMAT}",
            "update moe-train",
        )
    if version < directory.FORMAT:
        raise CheckpointError(
            f"checkpoint {path} has format {version}, and this version of moe-train reads format {directory.FORMAT}",
            "continue it with the version that wrote it, or start another run with resume=never and another run_dir",
        )
    return facts, compat.check(compat.read(path), run.cfg, path)


def _resharding(run: Run, facts: dict[str, Any]) -> str:
    def text(layout: dict[str, int]) -> str:
        return " ".join(f"{name}{degree}" for name, degree in layout.items() if degree > 1) or "one rank"

    return f"saved by {text(facts['layout'])}, continued by {text(asdict(run.layout))}"


def _on_main(run: Run, action: Callable[[], T], what: str) -> T:
    """Result of `action` on the first rank, or its error, on every rank."""
    outcome: list[Any] = [None, None]
    if run.is_main:
        outcome = _attempt(action, what)
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result


def _together(run: Run, action: Callable[[], T], what: str) -> T:
    """Result of `action`, which every rank does. If it fails on any rank, every rank raises the first one's error."""
    result, error = _attempt(action, what)
    errors: list[Any] = [None] * run.layout.world_size
    dist.all_gather_object(errors, error)
    for first in errors:
        if first is not None:
            raise first
    return result


def _attempt(action: Callable[[], Any], what: str) -> list[Any]:
    """[result, None] or [None, CheckpointError]. Other errors than those of storage are bugs and pass through."""
    try:
        return [action(), None]
    except CheckpointError as error:
        return [None, CheckpointError(error.cause, error.remedy)]
    except OSError as error:
        return [None, CheckpointError(f"cannot {what}: {error.strerror or error}", _REMEDY)]
    except CheckpointException as error:  # torch gathers the errors of all ranks in one, with their tracebacks
        rank, (cause, _) = next(iter(sorted(error.failures.items())))
        first_line = str(cause).strip().partition("\n")[0]
        return [None, CheckpointError(f"cannot {what}: rank {rank}: {type(cause).__name__}: {first_line}", _REMEDY)]


_REMEDY = "check free space and permissions, or set checkpoint.dir"


def _say(line: str) -> None:
    print(line, flush=True)


def _warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr, flush=True)


def size_bytes(path: Path) -> int:
    """Size of a checkpoint on disk."""
    return sum(entry.stat().st_size for entry in os.scandir(path) if entry.is_file())
