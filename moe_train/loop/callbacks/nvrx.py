"""Heartbeats to the rank monitors of NVIDIA's resiliency extension. Never run here: it needs its `ft_launcher`."""

from __future__ import annotations

import os
from typing import Any

from moe_train.run import Callback, Metrics, Run
from parallel.errors import ConfigError, HardwareError

_SOCKET = "FT_RANK_MONITOR_IPC_SOCKET"


class NvrxHeartbeat(Callback):
    """A heartbeat after each step, each evaluation and at the start, as nvidia_resiliency_ext.fault_tolerance asks:
    its launcher ends and restarts ranks whose heartbeat stays out.

    Raises:
        HardwareError: the package is not installed.
        ConfigError: ft_launcher did not start this rank.
    """

    def __init__(self) -> None:
        self._client: Any = None

    def on_start(self, run: Run) -> None:
        try:
            from nvidia_resiliency_ext import fault_tolerance
        except ImportError as error:
            raise HardwareError(
                "resilience.nvrx=true, and nvidia-resiliency-ext is not installed",
                "pip install 'moe-train[resilience]', or set resilience.nvrx=false",
            ) from error
        if _SOCKET not in os.environ:
            raise ConfigError(
                f"resilience.nvrx=true, and no rank monitor is there ({_SOCKET} is not set)",
                "start the ranks with ft_launcher, or set resilience.nvrx=false",
            )
        self._client = fault_tolerance.RankMonitorClient()
        self._client.init_workload_monitoring()
        self._client.send_heartbeat()

    def on_step_end(self, run: Run, metrics: Metrics) -> None:
        self._client.send_heartbeat()

    def on_evaluation_end(self, run: Run, metrics: Metrics) -> None:
        if self._client is not None:  # the first evaluation may come before
            self._client.send_heartbeat()

    def on_end(self, run: Run) -> None:
        if self._client is not None:
            self._client.shutdown_workload_monitoring()
            self._client = None
