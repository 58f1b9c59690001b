"""Whether a run may start from the weights at `init_from`: compares the two models. No torch import."""

from __future__ import annotations

from pathlib import Path

from moe_train.config.model import ModelConfig
from moe_train.conversion import hf_config as config
from moe_train.formats import run_config, run_directory
from parallel.errors import CheckpointError
from parallel.suggest import override_value

_ONLY_NAMES = {"name", "family"}


def check(model: ModelConfig, path: Path, field: str = "init_from") -> list[str]:
    """Warnings, one line each, about settings that change what the weights at `path` compute in this run.

    A checkpoint of a run may continue with other positions, as for a longer context. Weights in Hugging Face format
    carry no such history: there every difference is refused.

    Args:
        field: of the config, which names `path`, for errors.

    Raises:
        CheckpointError: nothing can be read there, or it holds another model.
    """
    theirs, is_run = _model_at(path, field)
    differing = config.differences(model, theirs)
    if model.mtp_num_layers > theirs.mtp_num_layers:  # fewer are fine: the others are left out
        differing["mtp_num_layers"] = (model.mtp_num_layers, theirs.mtp_num_layers)
    allowed = run_config.TUNABLE | _ONLY_NAMES if is_run else set()
    if wrong := {name: pair for name, pair in differing.items() if name not in allowed}:
        there = _overrides({name: pair[1] for name, pair in wrong.items()})
        here = _overrides({name: pair[0] for name, pair in wrong.items()})
        raise CheckpointError(f"{field}={path} is of another model: {there} there, {here} in the run", f"set {there}")
    return [
        f"model.{name} is {override_value(theirs)} in {path} and {override_value(ours)} now"
        for name, (ours, theirs) in differing.items()
        if name not in _ONLY_NAMES
    ]


def _model_at(path: Path, field: str) -> tuple[ModelConfig, bool]:
    """The model, and whether a run's checkpoint describes it."""
    if (path / config.FILE).is_file():
        return config.to_model(config.read(path), path / config.FILE), False
    directory = run_directory.resolve(path, field)[0]
    run_directory.check_files(directory)
    return run_config.model_of(directory, any_version=True), True


def _overrides(values: dict[str, object]) -> str:
    return " ".join(f"model.{field}={override_value(value)}" for field, value in values.items())
