"""Runs the cases of `make gpu-check`, each in a process of its own, within a time budget, and judges their numbers."""

from __future__ import annotations

import itertools
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from bench.gpu_cases import GpuCase, Plan, Refused
from bench.gpu_task import Task, kill, run

PASSED, FAILED, MEASURED, NOT_SUPPORTED, NOT_RUN = "passed", "failed", "measured", "not supported", "not run"
LEAST_S = 5.0
"""With less time left no process is started: it would not finish importing."""


@dataclass
class CheckRow:
    """The result of a part of a case.

    Args:
        values: numbers that the part reported.
        limits: largest magnitudes that they may have.
        why: why it failed, or why it did not run.
        seconds: that its process took, counted for the first part that it reported.
    """

    case: str
    part: str
    status: str
    why: str = ""
    seconds: float = 0.0
    values: Mapping[str, Any] = field(default_factory=dict)
    limits: Mapping[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The row in the results."""
        return {**{key: value for key, value in asdict(self).items() if key != "values"}, **self.values}


@dataclass(frozen=True)
class Ended:
    """How a process ended: the parts it reported on, and why it failed (empty: it did not)."""

    reports: list[dict[str, Any]]
    failure: str
    seconds: float
    out_of_budget: bool = False


class Runner:
    """Runs cases, and keeps what the preparations left in `directory`.

    Args:
        forked: processes are forked from a server that has imported torch, which is quick; not for CUDA.
        jobs: cases that run at the same time.
    """

    def __init__(self, plan: Plan, directory: Path, budget_s: float, *, forked: bool, jobs: int = 1) -> None:
        self._plan = plan
        self._directory = directory
        self._deadline = time.monotonic() + budget_s
        self._budget_s = budget_s
        self._forked = forked
        self._jobs = jobs
        self._locks = {name: threading.Lock() for name in plan.preparations}
        self._prepared: dict[str, CheckRow] = {}
        self._numbers = itertools.count(1)
        self._live: set[BaseProcess] = set()
        self._stopped = False

    def run(self, show: Callable[[CheckRow], None]) -> list[CheckRow]:
        """One row for each part of each case; `show` is called with a row when its case ends.

        Cases that need the machine for themselves come first.
        """
        rows_of_case: dict[str, list[CheckRow]] = {}

        def run_case(case: GpuCase) -> None:
            rows_of_case[case.name] = self._case(case)
            for row in rows_of_case[case.name]:
                show(row)

        try:
            for case in self._plan.cases:
                if case.alone:
                    run_case(case)
            with ThreadPoolExecutor(self._jobs) as pool:
                list(pool.map(run_case, [case for case in self._plan.cases if not case.alone]))
        finally:
            self._stopped = True  # at the first error or Ctrl-C the other threads start nothing more
            for process in list(self._live):
                kill(process)
        rows = [row for case in self._plan.cases for row in rows_of_case[case.name]]
        return rows + [_refused(case) for case in self._plan.refused]

    def _case(self, case: GpuCase) -> list[CheckRow]:
        for name in case.needs:
            prepared = self._prepare(name)
            if prepared.status != PASSED:
                status = NOT_RUN if prepared.status == NOT_RUN else FAILED
                why = f"what it needs, {name!r}, {prepared.status}: {prepared.why}"
                return [CheckRow(case.name, part, status, why) for part in case.parts]
        return self._parts(case)

    def _prepare(self, name: str) -> CheckRow:
        """Run a preparation, and what it needs, the first time that it is asked for."""
        with self._locks[name]:
            if name in self._prepared:
                return self._prepared[name]
            case = self._plan.preparations[name]
            failed = [row for row in map(self._prepare, case.needs) if row.status != PASSED]
            if failed:
                self._prepared[name] = CheckRow(name, "", failed[0].status, failed[0].why)
            elif self._out_of_time():
                self._prepared[name] = self._not_run(name, "")
            else:
                ended = self._process(case, case.parts)
                status = FAILED if ended.failure else PASSED
                status = NOT_RUN if ended.out_of_budget else status
                self._prepared[name] = CheckRow(name, "", status, ended.failure, ended.seconds)
        return self._prepared[name]

    def _parts(self, case: GpuCase) -> list[CheckRow]:
        """Run a case; after a failure another process runs the parts that are left."""
        rows: list[CheckRow] = []
        left = list(case.parts)
        while left:
            if self._out_of_time():
                return rows + [self._not_run(case.name, part) for part in left]
            ended = self._process(case, left)
            reported = {report.pop("part"): report for report in ended.reports}
            done = [judge(case, part, reported[part]) for part in left if part in reported]
            left = [part for part in left if part not in reported]
            failure = ended.failure or ("its process ended without a result" if left else "")
            if done:
                done[0].seconds = ended.seconds
            rows += done
            if failure and left:
                status = NOT_RUN if ended.out_of_budget else FAILED
                rows.append(CheckRow(case.name, left.pop(0), status, failure, 0.0 if done else ended.seconds))
            elif failure:
                rows[-1].status, rows[-1].why = FAILED, failure
        return rows

    def _out_of_time(self) -> bool:
        return self._stopped or self._deadline - time.monotonic() < LEAST_S

    def _not_run(self, case: str, part: str) -> CheckRow:
        return CheckRow(case, part, NOT_RUN, f"the time budget of {self._budget_s:g} s was used up")

    def _process(self, case: GpuCase, parts: Sequence[str]) -> Ended:
        """Run `parts` of a case in a new process, and end it when its time is up."""
        stem = self._directory / f"process-{next(self._numbers)}"
        task = Task(
            case.name, case.entry, list(case.overrides), list(parts), dict(case.options), str(self._directory),
            f"{stem}.jsonl", f"{stem}.log", max(1, (os.cpu_count() or 1) // self._jobs), dict(case.environment),
        )  # fmt: skip
        began = time.monotonic()
        left_s = self._deadline - began
        code = run(
            task, lambda: min(case.timeout_s, self._deadline - time.monotonic()), self._live, forked=self._forked
        )
        seconds = time.monotonic() - began
        if code is None and left_s < case.timeout_s:
            why = f"the time budget of {self._budget_s:g} s ended while it ran"
            return Ended(task.reports(), why, seconds, out_of_budget=True)
        return Ended(task.reports(), "" if code == 0 else _cause(code, case.timeout_s, Path(task.log)), seconds)


def judge(case: GpuCase, part: str, values: Mapping[str, Any]) -> CheckRow:
    """Whether a part's numbers are within the limits. A number that is missing or NaN is not."""
    limits = case.limits_of(part)
    if reason := values.get("not_supported"):
        return CheckRow(case.name, part, NOT_SUPPORTED, reason)
    wrong = []
    for name, limit in limits.items():
        value = values.get(name)
        if not isinstance(value, (int, float)) or math.isnan(value) or abs(value) > limit:
            shown = f"{value:.3g}" if isinstance(value, (int, float)) else "missing"
            wrong.append(f"{name} is {shown}, and its limit {limit:g}")
    status = FAILED if wrong else PASSED
    if part in case.measured_only:
        status = MEASURED
    return CheckRow(case.name, part, status, "; ".join(wrong), values=values, limits=limits)


def _refused(refused: Refused) -> CheckRow:
    case, _, part = refused.name.partition(": ")
    return CheckRow(case, part, NOT_SUPPORTED, refused.why)


def _cause(code: int | None, timeout_s: float, log: Path) -> str:
    """Why a process failed: its time, its signal, or the last line of its traceback."""
    if code is None:
        return f"killed after {timeout_s:g} s without an end"
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line[:1].isalpha() and ("Error" in line or "error" in line)]
    last = (errors or lines or ["no output"])[-1].strip()
    if code < 0:
        return f"ended by {signal.Signals(-code).name}: {last}"
    return f"exit code {code}: {last}"
