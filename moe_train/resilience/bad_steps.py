"""Anomaly detection: a loss or gradient norm that is NaN, infinite or a spike makes a step bad."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

from moe_train.config.resilience import ResilienceConfig
from parallel.errors import MoeTrainError
from parallel.exit_codes import ExitCode


class DivergedError(MoeTrainError):
    """Steps stay bad after every attempt: the user who chose data and learning rate acts. A restart would not help."""

    exit_code = ExitCode.DIVERGED


class BadSteps:
    """Classifies each step by its loss and gradient norm. All ranks see the same values and reach the same result.

    Checkpoints have the values of the window, so that a resumed run finds the same spikes.
    """

    def __init__(self, cfg: ResilienceConfig) -> None:
        self._cfg = cfg
        self._losses: deque[float] = deque(maxlen=cfg.spike_window)
        self._norms: deque[float] = deque(maxlen=cfg.spike_window)

    def state_dict(self) -> dict[str, list[float]]:
        """The values of the good steps in the window."""
        return {"losses": list(self._losses), "grad_norms": list(self._norms)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the values that a checkpoint has; none where an earlier version wrote it.

        Raises:
            ValueError: a value is not one that a run writes.
        """
        window = {name: state.get(name, []) for name in ("losses", "grad_norms")}
        for name, values in window.items():
            if not isinstance(values, list) or not all(type(v) in (int, float) and math.isfinite(v) for v in values):
                raise ValueError(f"{name} of the spike window are not numbers")
        self._losses = deque(window["losses"], maxlen=self._cfg.spike_window)
        self._norms = deque(window["grad_norms"], maxlen=self._cfg.spike_window)

    def grad_norm_anomaly(self, norm: float | None) -> str:
        """The anomaly of a gradient norm; "" if there is none, or if fp16 overflowed, which the loss scale handles."""
        return "" if norm is None else _wrong("grad_norm", norm, self._norms, self._cfg.grad_spike_factor)

    def classify(self, loss: float, norm: float | None, anomaly_on_any_rank: bool) -> str:
        """Why the step is bad; "" if it is good.

        Args:
            anomaly_on_any_rank: whether any rank has a `grad_norm_anomaly`.
        """
        reason = _wrong("lm_loss", loss, self._losses, self._cfg.spike_factor) or self.grad_norm_anomaly(norm)
        if not reason and anomaly_on_any_rank:
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
