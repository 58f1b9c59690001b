"""Rules of the resilience group."""

from __future__ import annotations

import math

from moe_train.config.resilience import Fault
from moe_train.config.resolve import ResolvedConfig, Rule
from parallel.suggest import Impossible, override_value


def factors(facts: ResolvedConfig) -> None:
    """A spike and a straggler lie above the median."""
    resilience = facts.cfg.resilience
    for name, usual in {"spike_factor": 1.5, "grad_spike_factor": 20.0, "straggler_ratio": 2.0}.items():
        value = getattr(resilience, name)
        if value is not None and not value > 1:
            raise Impossible(f"resilience.{name}={value} is not above 1", [{f"resilience.{name}": usual}])


def way_back(facts: ResolvedConfig) -> None:
    """Going back needs checkpoints between."""
    cfg = facts.cfg
    if facts.trains and cfg.resilience.on_bad_step == "rollback" and not cfg.checkpoint.interval_steps:
        raise Impossible(
            "resilience.on_bad_step=rollback needs checkpoints to go back to, but checkpoint.interval_steps=0",
            [{"checkpoint.interval_steps": 50}, {"resilience.on_bad_step": "skip"}],
        )


def nvrx(facts: ResolvedConfig) -> None:
    """NVIDIA's resiliency extension watches GPU ranks, which its launcher starts."""
    if facts.cfg.resilience.nvrx and facts.trains and facts.runtime != "cuda":
        raise Impossible(
            f"resilience.nvrx=true needs runtime=cuda, not runtime={facts.runtime}", [{"resilience.nvrx": False}]
        )


def timeouts(facts: ResolvedConfig) -> None:
    """A hang is seen before the collective that waits for it gives up, or no stacks are written."""
    longest, gives_up = facts.cfg.resilience.hang_timeout_s, facts.cfg.launcher.timeout_s
    if longest is not None and longest > gives_up and facts.layout.world_size > 1:
        raise Impossible(
            f"resilience.hang_timeout_s={longest:g} exceeds launcher.timeout_s={gives_up}, when collectives give up",
            [{"resilience.hang_timeout_s": None}, {"launcher.timeout_s": math.ceil(longest * 1.25)}],
        )


def stragglers(facts: ResolvedConfig) -> None:
    """What acts on slow ranks looks for them."""
    resilience = facts.cfg.resilience
    if resilience.straggler_action == "stop" and not resilience.straggler_interval_steps:
        raise Impossible(
            "resilience.straggler_action=stop does nothing with resilience.straggler_interval_steps=0",
            [{"resilience.straggler_interval_steps": 50}, {"resilience.straggler_action": "warn"}],
        )


def faults(facts: ResolvedConfig) -> None:
    """What a drill injects can happen, and is on a rank that there is."""
    entries, ranks = facts.cfg.resilience.inject, facts.layout.world_size
    for fault in entries:
        reason = _never_happens(fault)
        if not reason and fault.rank >= ranks:
            reason = f"and there are {ranks} ranks"
        if not reason and facts.trains and fault.step > facts.total_steps:
            reason = f"and the run ends after step {facts.total_steps}"
        if reason:
            others = [entry for entry in entries if entry != fault]
            raise Impossible(
                f"resilience.inject has {override_value(fault)}, {reason}", [{"resilience.inject": others}]
            )


def _never_happens(fault: Fault) -> str:
    """Why a fault has no place in a run; "" where it has one."""
    if fault.sample >= 0 and fault.kind not in ("nan", "spike"):
        return f"but sample is for nan and spike, not for {fault.kind}"
    if (fault.step < 1) == (fault.sample < 0):
        return "which needs step, from 1, or with nan and spike sample"
    return ""


RULES: tuple[Rule, ...] = (factors, way_back, nvrx, timeouts, stragglers, faults)
