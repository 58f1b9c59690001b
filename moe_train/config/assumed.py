"""What moe-submit, moe-plan and moe-memory take where the command line does not say it. No torch import."""

from __future__ import annotations

from collections.abc import Sequence


def names_of(overrides: Sequence[str]) -> set[str]:
    """Fields and groups that the overrides name."""
    return {override.partition("=")[0].lstrip("+~") for override in overrides}


def on_gpus(overrides: Sequence[str]) -> list[str]:
    """The overrides to add: the ranks have GPUs, and train in BF16 there.

    An experiment has a precision of its own. On the CPU the default is that of moe-train, fp32.
    """
    given = names_of(overrides)
    added = [] if "runtime" in given else ["runtime=cuda"]
    on_cpu = any(word.lstrip("+") == "runtime=cpu" for word in overrides)
    if not on_cpu and not given & {"experiment", "precision", "precision.dtype"}:
        added.append("precision=bf16")
    return added
