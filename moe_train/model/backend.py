"""Which implementation of the model a config asks for, checked against what is installed. Nothing is guessed."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, distribution

from moe_train.config.schema import Config
from parallel.errors import HardwareError

INSTALL_TE = "pip install 'moe-train[gpu]', or set backend.name=local"
INSTALL_APEX = "build NVIDIA's from source with --cpp_ext --cuda_ext (docs/precision.md), or set backend.apex=false"


def choose(cfg: Config, runtime: str) -> str:
    """`te` or `local` for the runtime this process uses (cuda, cpu or simulated).

    Raises:
        HardwareError: the config asks for Transformer Engine or apex, which is missing or unusable.
    """
    name = cfg.backend.name
    if name == "auto":
        name = "te" if runtime == "cuda" else "local"
    if name == "te":
        _require("transformer_engine.pytorch", "Transformer Engine (backend.name=te)", INSTALL_TE)
    if cfg.backend.apex:
        _require_nvidia_apex()
    return name


def _require(module: str, what: str, remedy: str) -> None:
    try:
        importlib.import_module(module)
    except Exception as error:  # a half-installed extension raises RuntimeError or OSError, not ImportError
        raise HardwareError(f"{what} cannot be imported: {type(error).__name__}: {error}", remedy) from error


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
