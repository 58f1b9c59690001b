"""What keeps a run alive: limits on silence, on bad steps and on slow ranks."""

from __future__ import annotations

from dataclasses import dataclass

from moe_train.config.fields import doc


@dataclass
class ResilienceConfig:
    """Watchdog, bad steps, slow ranks, and faults that a drill injects."""

    hang_timeout_s: float | None = doc(
        None, "Longest time of a rank without progress in a step, after which it ends itself, seconds; 0: no limit; "
        "null: 0.8 of launcher.timeout_s, so that stacks are written before a collective gives up.", minimum=0,
    )  # fmt: skip
    first_step_timeout_s: float = doc(
        3600, "The same in the first step, which compiles, in an evaluation and while saving, seconds.", minimum=1
    )
    on_bad_step: str = doc(
        "skip", "After a loss or gradient that is NaN, infinite or a spike: leave the update out, go back to the last "
        "checkpoint and pass over the data since, or end the run.", choices=("skip", "rollback", "stop"),
    )  # fmt: skip
    max_bad_steps: int = doc(3, "skip: bad steps in a row after which the run goes back to a checkpoint.", minimum=1)
    max_rollbacks: int = doc(2, "Most times that one start of a run goes back before it ends.", minimum=0)
    spike_factor: float | None = doc(
        None, "A loss this many times the median of the spike_window steps before it is bad; null means none is."
    )
    grad_spike_factor: float | None = doc(
        None, "A gradient norm this many times the median of those steps is bad; null means none is."
    )
    spike_window: int = doc(
        50,
        "Good steps that a spike is compared with; there is none before there are as many.",
        minimum=2,
        maximum=100_000,
    )
    straggler_interval_steps: int = doc(50, "Steps after which ranks compare their speed; 0 means never.", minimum=0)
    straggler_ratio: float = doc(
        2.0, "A rank is slow when its own time in a step, or in a fixed matrix product, is this many times the median."
    )
    straggler_intervals: int = doc(3, "Intervals in a row in which a rank must be slow to be named.", minimum=1)
    straggler_action: str = doc(
        "warn", "Name a slow rank, or also save and end with exit code 3, which asks for other nodes.",
        choices=("warn", "stop"),
    )  # fmt: skip
    nvrx: bool = doc(False, "Send a heartbeat each step to the ft_launcher of nvidia-resiliency-ext (cuda only).")
    inject: list[str] = doc(
        [], "Faults of a drill, such as 'kill:rank=1:step=7'; each once in a run directory (docs/resilience.md)."
    )
