"""Which steps are bad: a loss or gradient norm that is NaN, infinite or far above the steps before it."""

from __future__ import annotations

import math
from collections import deque
from statistics import median

from moe_train.config.resilience import ResilienceConfig
from parallel.errors import MoeTrainError
from parallel.exit_codes import ExitCode


class DivergedError(MoeTrainError):
    """Steps stay bad after every attempt: the user who chose data and learning rate acts. A restart would not help."""

    exit_code = ExitCode.DIVERGED


class BadSteps:
    """Judges each step by its loss and gradient norm. All ranks see the same steps and come to the same judgement.

    What it remembers is not saved: after a resume there are no spikes until `spike_window` steps are done.
    """

    def __init__(self, cfg: ResilienceConfig) -> None:
        self._cfg = cfg
        self._losses: deque[float] = deque(maxlen=cfg.spike_window)
        self._norms: deque[float] = deque(maxlen=cfg.spike_window)

    def doubt(self, norm: float | None) -> str:
        """What is wrong with a gradient norm; "" where nothing is, or where fp16 overflowed, which is no fault."""
        return "" if norm is None else _wrong("grad_norm", norm, self._norms, self._cfg.grad_spike_factor)

    def judge(self, loss: float, norm: float | None, doubted: bool) -> str:
        """Why the step is bad, "" where it is good.

        Args:
            doubted: whether any rank has a `doubt` about its gradient norm.
        """
        reason = _wrong("lm_loss", loss, self._losses, self._cfg.spike_factor) or self.doubt(norm)
        if not reason and doubted:
            reason = "grad_norm is bad on another rank"
        if not reason:
            self._losses.append(loss)
            if norm is not None:
                self._norms.append(norm)
        return reason


def _wrong(name: str, value: float, before: deque[float], factor: float | None) -> str:
    if not math.isfinite(value):
        return f"{name} is {value}"
    if factor is None or len(before) < (before.maxlen or 0) or value <= factor * median(before):
        return ""
    return f"{name} is {value:.4g}, {value / max(median(before), 1e-30):.3g} times the median of {len(before)} steps"
