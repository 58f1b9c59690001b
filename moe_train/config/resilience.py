"""Fault tolerance: limits on hangs, bad steps and slow ranks."""

from __future__ import annotations

from dataclasses import dataclass

from moe_train.config.fields import doc


@dataclass
class ResilienceConfig:
    """Watchdog, bad steps, slow ranks, and faults that a drill injects."""

    hang_timeout_s: float | None = doc(
        None, "Time without progress in a step after which a rank ends itself, seconds; 0: no limit; null: 0.8 of "
        "launcher.timeout_s, so that stacks are written before a collective times out.", minimum=0,
    )  # fmt: skip
    first_step_timeout_s: float = doc(
        3600, "The same for the first step, which compiles, for evaluations and for saving, seconds.", minimum=1
    )
    on_bad_step: str = doc(
        "skip", "On a loss or gradient that is NaN, infinite or a spike: skip the update, roll back to the last "
        "checkpoint and skip the data since, or end the run.", choices=("skip", "rollback", "stop"),
    )  # fmt: skip
    max_bad_steps: int = doc(3, "skip: consecutive bad steps before the run rolls back to a checkpoint.", minimum=1)
    max_rollbacks: int = doc(2, "Maximum number of rollbacks per start of a run; one more ends it.", minimum=0)
    spike_factor: float | None = doc(
        None, "A loss above this multiple of the median of the last spike_window steps is a spike; null: off."
    )
    grad_spike_factor: float | None = doc(
        None, "A gradient norm above this multiple of that median is a spike; null: off."
    )
    spike_window: int = doc(
        50,
        "Good steps in that median; no step is a spike before there are as many.",
        minimum=2,
        maximum=100_000,
    )
    straggler_interval_steps: int = doc(50, "Steps between comparisons of the ranks' speed; 0 means never.", minimum=0)
    straggler_ratio: float = doc(
        2.0,
        "A rank is slow above this multiple of the median busy time in a step, or time for a fixed GEMM.",
    )
    straggler_intervals: int = doc(3, "Consecutive slow intervals before a rank is reported.", minimum=1)
    straggler_action: str = doc(
        "warn", "Report a slow rank, or also save and exit with code 3, which asks for other nodes.",
        choices=("warn", "stop"),
    )  # fmt: skip
    nvrx: bool = doc(False, "Send a heartbeat each step to the ft_launcher of nvidia-resiliency-ext (cuda only).")
    inject: list[str] = doc(
        [], "Faults to inject, such as 'kill:rank=1:step=7'; each once per run directory (docs/resilience.md)."
    )
