"""Heartbeats of nvidia-resiliency-ext, with a stand-in for the package, which needs its own launcher and GPUs."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from moe_train.config.composition.compose import compose
from moe_train.config.composition.validate import validate
from moe_train.loop.callbacks.nvrx import NvrxHeartbeat
from parallel.errors import ConfigError, HardwareError
from tests.loop.fake_run import evaluate, fake_run, take_step

SOCKET = "FT_RANK_MONITOR_IPC_SOCKET"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the client was asked to do; these are its methods in the package's documentation."""
    asked: list[str] = []

    class RankMonitorClient:
        def init_workload_monitoring(self) -> None:
            asked.append("init")

        def send_heartbeat(self) -> None:
            asked.append("heartbeat")

        def shutdown_workload_monitoring(self) -> None:
            asked.append("shutdown")

    package, module = ModuleType("nvidia_resiliency_ext"), ModuleType("nvidia_resiliency_ext.fault_tolerance")
    module.RankMonitorClient = RankMonitorClient  # type: ignore[attr-defined]
    package.fault_tolerance = module  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return asked


def test_a_heartbeat_follows_each_step_and_evaluation(
    tmp_path: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SOCKET, "/tmp/socket")
    run, callback = fake_run(tmp_path), NvrxHeartbeat()
    callback.on_start(run)
    take_step(run, [callback])
    evaluate(run, [callback], 5.0)
    callback.on_end(run)
    callback.on_end(run)
    assert calls == ["init", "heartbeat", "heartbeat", "heartbeat", "shutdown"]


def test_without_its_launcher(tmp_path: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SOCKET, raising=False)
    with pytest.raises(ConfigError, match="start the ranks with ft_launcher"):
        NvrxHeartbeat().on_start(fake_run(tmp_path))
    assert calls == []


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia_resiliency_ext", None)
    with pytest.raises(HardwareError, match=r"pip install 'moe-train\[resilience\]'"):
        NvrxHeartbeat().on_start(fake_run(tmp_path))


def test_it_is_for_gpus() -> None:
    with pytest.raises(ConfigError, match=r"resilience.nvrx=true needs runtime=cuda, not runtime=cpu"):
        validate(compose(["resilience.nvrx=true", "runtime=cpu"]))
