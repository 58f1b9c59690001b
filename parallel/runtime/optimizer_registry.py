"""Further rows of Megatron-Core's registry of optimizers. megatron-core 0.19 or later."""

from __future__ import annotations

from megatron.core.optimizer import emerging_optimizers


def register(name: str, entry: emerging_optimizers.EmergingOptimizerEntry) -> None:
    """Have `OptimizerConfig.optimizer=name` make the optimizer of `entry`.

    Upstream: optimizer/emerging_optimizers.py says to add rows to `_EMERGING_OPTIMIZERS`, in that file. Goes when there
    is a function for it.
    """
    emerging_optimizers._EMERGING_OPTIMIZERS[name] = entry
