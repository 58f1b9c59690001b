"""Fault tolerance: limits on hangs, bad steps and slow ranks."""

from __future__ import annotations

from dataclasses import dataclass

from moe_train.config.fields import REQUIRED, doc


@dataclass
class Fault:
    """A fault that a drill injects: an entry of `resilience.inject`."""

    kind: str = doc(
        REQUIRED, "kill: SIGKILL. stop: SIGSTOP. hang: endless sleep. raise: an error of the code. nan, spike: the "
        "loss times NaN or `factor`. slow: `seconds` of sleep in each forward pass. term: `factor` SIGTERMs and "
        "SIGUSR1s.", choices=("kill", "stop", "hang", "raise", "nan", "spike", "slow", "term"),
    )  # fmt: skip
    rank: int = doc(-1, "Rank; -1 means all.", minimum=-1)
    step: int = doc(-1, "Step, from 1.")
    sample: int = doc(
        -1,
        "nan and spike: instead of step, the sample that has them, from 0, whichever step uses it and however often.",
    )
    samples: int = doc(1, "nan and spike: number of such samples.", minimum=1)
    steps: int = doc(1, "nan, spike and slow: number of steps.", minimum=1)
    at: str = doc(
        "begin", "Begin or end of the step; a checkpoint of the step is written after its end.",
        choices=("begin", "end"),
    )  # fmt: skip
    after: float = doc(0.0, "kill and stop: delay, seconds, during which the run continues.", minimum=0)
    seconds: float = doc(1.0, "slow: length of the sleep, seconds.", minimum=0)
    factor: float = doc(100.0, "spike: factor of the loss; term: number of signals.")


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
    inject: list[Fault] = doc(
        [], "Faults to inject, each once per run directory (docs/resilience.md).",
        example="[{kind:kill,rank:1,step:7}]",
    )  # fmt: skip
