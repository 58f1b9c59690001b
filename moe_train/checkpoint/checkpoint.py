"""Saves a run and continues it, in the same or another layout of ranks. Every rank calls these together."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import megatron.core
import torch
import torch.distributed as dist

from moe_train.checkpoint import node_local, state, storage, weights
from moe_train.checkpoint.collective import free_bytes, on_all_ranks, on_main, say, warn
from moe_train.checkpoint.saving import SaveJob, Saving
from moe_train.conversion import small_files
from moe_train.formats import dcp_metadata, run_config, run_directory, state_file
from moe_train.resilience import reactions
from moe_train.resilience.bad_steps import BadSteps
from moe_train.run import Run, TrainState
from parallel.errors import CheckpointError


def root_of(run: Run) -> Path:
    """Directory of the run's checkpoints."""
    return run.cfg.checkpoint_root


def path_of(run: Run) -> Path:
    """Directory of the checkpoint of the current step, whether it exists or not."""
    return root_of(run) / run_directory.name_of(run.state.step)


def save(run: Run) -> Path:
    """Write the state after the current step and return the checkpoint's directory.

    It appears under its name only when complete: a run that dies while writing leaves the earlier checkpoints and
    `latest` unchanged.

    Raises:
        CheckpointError: it cannot be written (disk full, no permission). The earlier ones are unchanged.
    """
    return begin(run, copy=False).wait()


def begin(run: Run, *, copy: bool = True) -> Saving:
    """Begin to write the state after the current step. With `copy` training may continue: a copy of it is written.

    Only one can be in flight at a time.

    Raises:
        CheckpointError: there is not enough space, or no permission. The earlier checkpoints are unchanged.
    """
    root, path = root_of(run), path_of(run)
    hidden = on_main(run, lambda: run_directory.prepare(root, path.name), f"write to {root}")
    try:
        share, unshared = _share(run)
        _check_space(run, path, share.bytes)
        near = node_local.prepare(run, root, run.state.step, share.bytes)
        small = {
            run_directory.CONFIG: run_config.dump(run.cfg),
            run_directory.STATE: json.dumps(_facts(run), indent=1) + "\n",
        }
    except CheckpointError:
        if run.is_main:
            shutil.rmtree(hidden, ignore_errors=True)
        raise
    return Saving(SaveJob(run, root, run.state.step, share.copied(unshared) if copy else share, small, near))


def _share(run: Run) -> tuple[storage.Share, set[int]]:
    """What this rank writes, and the memory that only this checkpoint uses."""
    if run.cfg.parallel.overlap_param_gather:
        for chunk in run.chunks:  # weights are otherwise gathered only when the next forward pass needs them
            chunk.start_param_sync(force_sync=True)
    model = state.model_state(run.chunks)
    optimizer = state.optimizer_state(run, model, loading=False)
    unshared = state.unshared_memory(run, optimizer)
    if run.cfg.precision.dtype == "fp32":
        optimizer = state.without_masters(optimizer)
    tensors = {**model, "optimizer": optimizer, "rng": state.random_state(run)}
    if scales := state.delayed_scales(run.chunks, model):
        tensors["fp8_scales"] = scales
    if average := state.average_state(run, model):
        tensors[dcp_metadata.EMA] = average
    return on_all_ranks(run, lambda: storage.share_of(tensors), "plan a checkpoint"), unshared


def _check_space(run: Run, path: Path, own_bytes: int) -> None:
    """Raise CheckpointError where the shares of all ranks do not fit on the disk."""
    total = torch.tensor(float(own_bytes), dtype=torch.float64, device=run.device)
    dist.all_reduce(total)

    def look() -> None:
        free = free_bytes(path.parent)
        if total.item() > free:
            raise CheckpointError(
                f"{path} needs {total.item() / 1e9:,.3f} GB, and {path.parent} has {free / 1e9:,.3f} GB free",
                "free space, keep fewer with checkpoint.keep_last, or set checkpoint.dir",
            )

    on_main(run, look, f"write to {path.parent}")


def check_places(run: Run) -> None:
    """See before the first step that checkpoints can be written where they are to go.

    Raises:
        CheckpointError: the directory cannot be made or written.
    """
    settings, root = run.cfg.checkpoint, root_of(run)
    if not (settings.interval_steps or settings.save_at_end):
        return
    on_main(run, lambda: run_directory.try_writing(root, "checkpoint.dir"), f"write to {root}")
    if near := node_local.root_of(run, root):
        on_all_ranks(run, lambda: run_directory.try_writing(near, "checkpoint.local_dir"), f"write to {near}")


def resume(run: Run) -> None:
    """Continue from the checkpoint that `resume` names, or start with the weights of `init_from`, or from scratch.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or of another model. No checkpoint was changed.
    """
    if run.cfg.resume not in ("auto", "never"):
        directory = on_main(run, lambda: run_directory.resolve(Path(run.cfg.resume), "resume")[0], "read checkpoints")
        _load(run, directory)
        if directory.parent.resolve() != root_of(run).resolve():
            _keep_small_files(run, directory)
        return
    if run.cfg.resume == "never":
        node_local.set_aside(run, root_of(run))
    if run.cfg.resume == "never" or not _continue_newest(run):
        source = Path(run.cfg.init_from) if run.cfg.init_from else None
        if source is not None:
            try:
                _start_with(run, source)
            except run_directory.DamagedCheckpoint as error:
                raise error.copied("restore it from a copy, or set init_from to other weights") from None
        _keep_small_files(run, source)


def _keep_small_files(run: Run, source: Path | None) -> None:
    """What an export of the run is to have of the weights that it begins with."""
    if not run.is_main:
        return
    try:
        small_files.keep(source, run.run_dir)
    except OSError as error:
        warn(f"run_dir={run.run_dir}: {error}; an export will lack the files that came with {source}")


def _continue_newest(run: Run) -> bool:
    """Load the newest checkpoint of the run that is whole; False if it has none. Damaged ones are skipped.

    Raises:
        CheckpointError: all are damaged, or the newest is of another model.
    """
    root = root_of(run)

    def names() -> list[str]:
        run_directory.recover(root)
        return [path.name for path in run_directory.candidates(root)]

    shared = on_main(run, names, "read checkpoints")
    near = {copy.name: copy for copy in node_local.find(run, root)}
    newer = [name for name in near if not shared or run_directory.step_of(name) > run_directory.step_of(shared[0])]
    first_error: CheckpointError | None = None
    for name in [*newer, *(name for name in shared if name not in newer)]:
        for source in ("shared", "near"):  # what is damaged in one place may be whole in the other
            if name not in (shared if source == "shared" else near):
                continue
            try:
                if source == "near":
                    _restore(run, near[name])
                _load(run, root / name)
                return True
            except run_directory.DamagedCheckpoint as error:
                first_error = first_error or error
                if run.is_main:
                    warn(f"{error.cause}; looking for another")
    if first_error is not None:
        raise CheckpointError(
            f"no checkpoint in {root} can be read ({first_error.cause})",
            "restore one from a copy, or start a new run with resume=never",
        )
    return False


def _restore(run: Run, local_copy: node_local.LocalCheckpoint) -> None:
    root = root_of(run)
    try:
        node_local.restore(run, root, local_copy)
    except CheckpointError as error:
        raise run_directory.DamagedCheckpoint(f"cannot copy {local_copy.name} from the nodes: {error.cause}") from error
    if run.is_main:
        say(f"copied {local_copy.name} from the nodes' disks to {root}")


def _load(run: Run, path: Path) -> None:
    contents = weights.open_checkpoint(run, path)
    progress, warnings = on_main(run, lambda: _check(run, path), f"read {path}")
    model = state.model_state(run.chunks)
    optimizer = state.optimizer_state(run, model, loading=True)
    scales = _saved_scales(state.delayed_scales(run.chunks, model), contents, warnings)
    average = _saved_average(state.average_state(run, model), contents, warnings)
    # Two reads, not one: master weights may come from the same tensors as the model.
    state.load_model(run.chunks, weights.read(run, model, contents, path))
    state.load_optimizer(run, weights.read(run, optimizer, contents, path), progress.optimizer_updates)
    if scales:
        state.load_delayed_scales(run.chunks, weights.read(run, scales, contents, path))
    if run.weight_average is not None:
        state.load_average(run, weights.read(run, average, contents, path) if average else {})
    on_all_ranks(run, lambda: weights.refuse_nonfinite(run.chunks, path, "resume"), f"read {path}")
    same_layout = progress.layout == asdict(run.layout)
    if (
        same_layout and progress.device == run.device.type
    ):  # another layout has other streams, which keep their seeds: no weight is drawn and no dropout used
        streams = weights.read(run, state.random_state(run), contents, path)
        on_all_ranks(run, lambda: _load_random(run, streams, path), f"read {path}")
    state.load_scalers(run, progress.loss_scale)
    # A run that goes back has advanced its schedule before.
    run.schedule.step(increment=progress.schedule_steps - run.schedule.num_steps)
    run.reactions.state = reactions.from_json(progress.reactions)
    run.bad_steps.load_state_dict(progress.spike_window)
    run.state = TrainState(
        step=progress.step,
        consumed_samples=progress.consumed_samples,
        consumed_tokens=progress.consumed_tokens,
        trained_samples=progress.trained_samples or 0,
        optimizer_updates=progress.optimizer_updates,
    )
    if run.is_main:
        for warning in warnings:
            warn(warning)
        how = "" if same_layout else f" ({_resharding(run, progress.layout)})"
        say(f"resumed at step {run.state.step} from {path}{how}")


def _load_random(run: Run, streams: storage.StateDict, path: Path) -> None:
    try:
        state.load_random(run, streams)
    except RuntimeError as error:  # torch checks the state of a generator
        raise run_directory.damaged(path, f"its random streams cannot be continued: {error}") from error


def _saved_scales(wanted: storage.StateDict, contents: dcp_metadata.Metadata, warnings: list[str]) -> storage.StateDict:
    """`wanted`, or nothing where the checkpoint is of a run without delayed scaling."""
    if wanted and not any(key.startswith(state.FP8_SCALES) for key in contents.state_dict_metadata):
        warnings.append("the checkpoint has no scales of precision.fp8=delayed, which begin at 1 again")
        return {}
    return wanted


def _saved_average(
    wanted: storage.StateDict, contents: dcp_metadata.Metadata, warnings: list[str]
) -> storage.StateDict:
    """`wanted`, or nothing where the checkpoint is of a run without an EMA of the weights."""
    if wanted and not any(key.startswith(dcp_metadata.EMA_PREFIX) for key in contents.state_dict_metadata):
        warnings.append("the checkpoint has no EMA of the weights, which begins with its weights")
        return {}
    return wanted


def _start_with(run: Run, path: Path) -> None:
    """Only the model of a checkpoint; the run starts at step 0."""
    path = weights.load(run, run.chunks, path)
    run.optimizer.reload_model_params()
    if run.weight_average is not None:
        run.weight_average.reset()
    if run.is_main:
        say(f"weights from {path}")


def _facts(run: Run) -> dict[str, Any]:
    """Everything that is not a tensor. All ranks agree on it."""
    gathered: list[Any] = [None] * run.layout.world_size
    dist.all_gather_object(gathered, state.scalers(run))
    loss_scale: dict[str, Any] = {}
    for scalers in gathered:  # a pipeline stage without experts has no expert optimizer
        loss_scale = {**scalers, **loss_scale}
    return {
        "format": run_directory.FORMAT,
        "manifest": True,
        **state_file.counts_of_run(asdict(run.state)),
        "schedule": run.schedule.state_dict(),
        state_file.REACTIONS: asdict(run.reactions.state),
        state_file.SPIKE_WINDOW: run.bad_steps.state_dict(),
        "loss_scale": loss_scale,
        "layout": asdict(run.layout),
        "device": run.device.type,
        "seed": run.cfg.seed,
        "versions": {"torch": torch.__version__, "megatron-core": megatron.core.__version__},
    }


def _check(run: Run, path: Path) -> tuple[state_file.SavedProgress, list[str]]:
    """Facts of the checkpoint, and warnings about settings that differ from it."""
    run_directory.check_files(path)
    stored, saved = run_directory.read_state(path), run_config.read(path)
    if stored.get("weights_only"):
        raise CheckpointError(f"checkpoint {path} holds weights only", f"set init_from={path}")
    try:
        progress = state_file.parse(stored)
        reactions.from_json(progress.reactions)
        BadSteps(run.cfg.resilience).load_state_dict(progress.spike_window)
    except ValueError as error:
        raise run_directory.damaged(path, f"{run_directory.STATE} cannot be read: {error}") from error
    if progress.trained_samples is None:
        progress = replace(progress, trained_samples=progress.consumed_tokens // _sequence_length(saved, run))
    return progress, run_config.check(saved, run.cfg, path)


def _sequence_length(saved: dict[str, Any], run: Run) -> int:
    """Of a run by a version with one length: that of its config."""
    train = saved.get("train")
    length = train.get("seq_length") if isinstance(train, dict) else None
    return length if type(length) is int and length > 0 else run.cfg.train.seq_length


def _resharding(run: Run, before: dict[str, int]) -> str:
    def text(layout: dict[str, int]) -> str:
        return " ".join(f"{name}{degree}" for name, degree in layout.items() if degree > 1) or "one rank"

    return f"saved by {text(before)}, continued by {text(asdict(run.layout))}"
