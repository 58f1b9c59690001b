"""Which implementation of the model a config asks for, checked against what is installed. Nothing is guessed."""

from __future__ import annotations

import importlib
import os
from importlib.metadata import PackageNotFoundError, distribution

from moe_train.config.resolve import backend_of
from moe_train.config.rules.precision import power_of_two_scales, properties
from moe_train.config.schema import Config, PrecisionConfig
from parallel.errors import ConfigError, HardwareError
from parallel.fp8_recipes import RECIPES
from parallel.suggest import override_value

INSTALL_TE = "pip install 'moe-train[gpu]', or set backend.name=local"
INSTALL_APEX = "build NVIDIA's from source with --cpp_ext --cuda_ext (docs/precision.md), or set backend.apex=false"

_SUGGESTED = ("block", "tensor")
_USABLE = {RECIPES[name].option: RECIPES[name].capability for name in _SUGGESTED} | {"bf16": (8, 0), "fp16": (0, 0)}


def choose(cfg: Config, runtime: str) -> str:
    """`te` or `local` for the runtime this process uses (cuda, cpu or simulated).

    Raises:
        HardwareError: the config asks for Transformer Engine or apex, which is missing or unusable, or for a
            recipe of FP8 or FP4 that this GPU does not have.
        ConfigError: FP8 scales are asked for that the environment does not set.
    """
    name = backend_of(cfg, runtime)
    if name == "te":
        _require("transformer_engine.pytorch", "Transformer Engine (backend.name=te)", INSTALL_TE)
    if cfg.backend.apex:
        _require_nvidia_apex()
    recipe = cfg.precision.fp8 or cfg.precision.fp4
    if name == "te" and runtime == "cuda" and recipe is not None:
        _require_hardware(recipe)
        _require_scales(cfg.precision)
    return name


def _require_hardware(recipe: str) -> None:
    """Each recipe's kernels begin with a generation of GPUs."""
    import torch

    known = RECIPES[recipe]
    needed = known.capability
    capability = torch.cuda.get_device_capability()
    if capability < needed:
        raise HardwareError(
            f"precision.{known.field}={recipe} needs {known.generation} (compute capability {needed[0]}.{needed[1]}), "
            f"but this GPU has {capability[0]}.{capability[1]}",
            "use " + " or ".join(f"precision={name}" for name, least in _USABLE.items() if capability >= least),
        )


def _require_scales(precision: PrecisionConfig) -> None:
    """Transformer Engine reads from the environment, while it is imported, whether scales are powers of two."""
    known = properties(precision)
    if known is None or not known.scales_variable:
        return
    variable = known.scales_variable
    value = "1" if power_of_two_scales(precision) == known.variable_means_power_of_two else "0"
    if os.environ.get(variable, "0") != value:
        raise ConfigError(
            f"precision.power_of_two_scales={override_value(precision.power_of_two_scales)} with "
            f"precision.fp8={precision.fp8} needs the environment variable {variable}={value}",
            f"export {variable}={value} on every rank",
        )


def _require(module: str, component: str, remedy: str) -> None:
    try:
        importlib.import_module(module)
    except Exception as error:  # a half-installed extension raises RuntimeError or OSError, not ImportError
        raise HardwareError(f"{component} cannot be imported: {type(error).__name__}: {error}", remedy) from error


def _require_nvidia_apex() -> None:
    """PyPI's `apex` is a web toolkit of 2013 with the same name; Megatron-Core would take it for NVIDIA's."""
    _require("apex", "NVIDIA apex (backend.apex=true)", INSTALL_APEX)
    try:
        _require("apex.normalization", "NVIDIA apex (backend.apex=true)", INSTALL_APEX)
    except HardwareError as error:
        try:
            version = f" {distribution('apex').version}"
        except PackageNotFoundError:
            version = ""
        raise HardwareError(
            f"backend.apex=true, but the installed package apex{version} is not NVIDIA's",
            "pip uninstall apex, then " + INSTALL_APEX,
        ) from error
