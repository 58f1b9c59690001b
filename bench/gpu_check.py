"""`make gpu-check`: whether training on this machine's GPU does what it does on a CPU, and how fast it is.

In under eight minutes on one GPU, with what is installed: losses and gradients against the CPU, every precision that
the GPU has against bf16, recomputation and offload, checkpoints between CPU and GPU, and a 1B-parameter MoE's step time
and memory next to their predictions. It prints a table and writes bench/results/gpu_check.json.

Exit codes: 0 every case passed (or the GPU lacks what it is about), 1 a case failed, 2 there is no GPU, 3 none failed,
but the time budget left some out.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import gpu_cases
from bench.gpu_cases import GpuCase, Plan
from bench.gpu_runner import FAILED, MEASURED, NOT_RUN, NOT_SUPPORTED, PASSED, CheckRow, Runner
from bench.results import DIRECTORY, write
from launch import job
from launch.local import forkserver

BUDGET_S = 480.0
EXIT_FAILED, EXIT_NO_GPU, EXIT_INCOMPLETE = 1, 2, 3
COLOURS = {PASSED: "green", FAILED: "bold red", MEASURED: "cyan", NOT_SUPPORTED: "dim", NOT_RUN: "yellow"}


@dataclass
class Device:
    """The device under test: a GPU, or in the tests of this module a CPU."""

    name: str
    runtime: str
    facts: dict[str, Any] = field(default_factory=dict)
    """Compute capability, memory, CUDA, and the libraries that are installed."""

    @property
    def libraries(self) -> dict[str, dict[str, Any]]:
        """version, and error where a library cannot be imported, by name."""
        libraries: dict[str, dict[str, Any]] = self.facts.get("libraries", {})
        return libraries

    def usable(self, library: str) -> bool:
        """Whether a library is installed and can be imported."""
        entry = self.libraries.get(library, {})
        return entry.get("version") is not None and "error" not in entry

    def plan(self, more: Sequence[str]) -> Plan:
        """The cases for this device."""
        backends = ["local", "te"] if self.usable("Transformer Engine") else ["local"]
        return gpu_cases.plan(self.runtime, backends, apex=self.usable("apex"), more=more)


def main() -> None:
    """Command line of `make gpu-check`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", metavar="TEXT", help="only cases whose name has it (repeatable)")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="seconds for all (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=jobs(), help="cases at the same time (default here: %(default)s)")
    parser.add_argument("--stand-in", choices=["cpu"], help="take the CPU for the GPU, to try this program itself")
    parser.add_argument("--output", type=Path, help="directory of gpu_check.json (default: bench/results)")
    parser.add_argument("overrides", nargs="*", help="further overrides of every run")
    options = parser.parse_args()
    began = time.monotonic()
    if options.stand_in is None and not visible_gpus():
        needs = "gpu-check needs one, and a torch with CUDA"
        print(f"error: no GPU is visible; {needs} ({torch_version()})", file=sys.stderr)
        sys.exit(EXIT_NO_GPU)
    with tempfile.TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True) as directory:
        device = stand_in() if options.stand_in else probe(Path(directory))
        rows = check(
            device,
            Path(directory),
            options.budget_s - (time.monotonic() - began),
            options.jobs,
            options.case,
            options.overrides,
        )
    summary = summarise(device, rows, time.monotonic() - began)
    console = Console()
    console.print(table(device, rows))
    console.print(verdict(summary), soft_wrap=True)
    whole = options.case is None and not options.overrides and options.stand_in is None
    if whole or options.output:
        path = write("gpu_check", summary, [row.as_json() for row in rows], options.output or DIRECTORY)
        print(f"wrote {path}")
    sys.exit(exit_code(rows))


def jobs() -> int:
    """Cases at the same time: most of each is importing and the host's work, and the models are small."""
    return max(1, min(4, (os.cpu_count() or 1) // 4))


def visible_gpus() -> int:
    """GPUs that this process could use. Does not initialise CUDA."""
    return job.visible_gpus()


def torch_version() -> str:
    """The installed torch and its CUDA."""
    import torch

    return f"torch {torch.__version__}, " + (f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA")


def stand_in() -> Device:
    """The CPU instead of a GPU."""
    return Device("CPU as a stand-in", "cpu")


def probe(directory: Path) -> Device:
    """Ask a process of its own, because this one must not initialise CUDA. Ends the program where that fails."""
    case = GpuCase("probe", "bench.gpu_worker:probe", timeout_s=90)
    (row,) = Runner(Plan([case], {}, []), directory, 100, forked=False).run(lambda row: None)
    if row.status != PASSED:
        print(f"error: the GPU cannot be used: {row.why}", file=sys.stderr)
        sys.exit(EXIT_FAILED)
    return Device(row.values["device"], "cuda", dict(row.values))


def check(
    device: Device,
    directory: Path,
    budget_s: float,
    jobs: int = 1,
    names: Sequence[str] | None = None,
    more: Sequence[str] = (),
) -> list[CheckRow]:
    """A row for each part of each case, those that only look at what is installed first.

    Args:
        jobs: cases that run at the same time.
        names: only cases that have one of these in their names; None takes all.
        more: overrides of every run.
    """
    plan = device.plan(more)
    if names is not None:
        chosen = [case for case in plan.cases if any(name in case.name for name in names)]
        plan = Plan(
            chosen, plan.preparations, [case for case in plan.refused if any(name in case.name for name in names)]
        )
    console = Console(stderr=True)

    def show(row: CheckRow) -> None:
        console.print(
            f"{row.case}{': ' if row.part else ''}{row.part}: {row.status} {row.why}", soft_wrap=True, markup=False
        )

    forked = device.runtime == "cpu"
    if forked:
        forkserver.begin()
    try:
        return [*installed(device), *Runner(plan, directory, budget_s, forked=forked, jobs=jobs).run(show)]
    finally:
        if forked:
            forkserver.kill()


def installed(device: Device) -> list[CheckRow]:
    """A row for each library: one that is installed and cannot be imported has failed."""
    rows = []
    for name, entry in device.libraries.items():
        status, why = MEASURED, f"version {entry['version']}"
        if entry["version"] is None:
            status, why = NOT_SUPPORTED, "not installed"
        elif "error" in entry:
            status, why = FAILED, f"version {entry['version']} cannot be imported: {entry['error']}"
        elif name == "DeepEP":
            why += "; not used, because it sends tokens between GPUs"
        rows.append(CheckRow("installed", name, status, why))
    return rows


def summarise(device: Device, rows: Sequence[CheckRow], seconds: float) -> dict[str, Any]:
    """How many rows there are of each status, and on what."""
    counts = {status.replace(" ", "_"): sum(row.status == status for row in rows) for status in COLOURS}
    return {
        "all_hold": exit_code(rows) == 0,
        **counts,
        "device": device.name,
        "runtime": device.runtime,
        **{key: value for key, value in device.facts.items() if key != "device"},
        "seconds": round(seconds, 1),
    }


def exit_code(rows: Sequence[CheckRow]) -> int:
    """0, or the reason for a failure. A check in which nothing ran has failed."""
    statuses = {row.status for row in rows}
    if FAILED in statuses:
        return EXIT_FAILED
    return EXIT_INCOMPLETE if NOT_RUN in statuses or not statuses & {PASSED, MEASURED} else 0


def verdict(summary: dict[str, Any]) -> str:
    """The summary in one line."""
    counts = ", ".join(f"{summary[status.replace(' ', '_')]} {status}" for status in COLOURS)
    return f"{summary['device']}: {counts}; {summary['seconds']:g} s"


def table(device: Device, rows: Sequence[CheckRow]) -> Table:
    """The rows for a person."""
    shown = Table(title=f"gpu-check on {device.name}")
    for column in ("case", "part", "result", "numbers", "why"):
        shown.add_column(column, overflow="fold")
    for row in rows:
        colour = COLOURS[row.status]
        shown.add_row(row.case, row.part, f"[{colour}]{row.status}[/]", numbers(row), row.why.replace("[", r"\["))
    return shown


def numbers(row: CheckRow) -> str:
    """The judged numbers with their limits, and what the large model showed."""
    values = row.values
    if row.part == gpu_cases.STEP_TIME and "step_time_s" in values:
        return _step_time(values)
    if row.part == gpu_cases.PEAK_MEMORY and "measured_bytes" in values:
        measured, predicted = values["measured_bytes"] / 2**30, values["predicted_bytes"] / 2**30
        return f"{measured:.2f} GiB, predicted {predicted:.2f} ({values['prediction_error']:+.1%})"
    judged = {name: values[name] for name in row.limits if isinstance(values.get(name), (int, float))}
    return "\n".join(f"{name} {value:.1e} (limit {row.limits[name]:g})" for name, value in judged.items())


def _step_time(values: Any) -> str:
    predicted = values["prediction"] if values["predicted_s"] is None else (
        f"predicted {values['predicted_s'] * 1e3:.0f} ms ({values['prediction_error']:+.0%})"
    )  # fmt: skip
    mfu = "MFU unknown" if values["mfu"] is None else f"MFU {values['mfu']:.1%}"
    peak = f"{values['of_gemm_peak']:.1%} of the GEMM peak of {values['gemm_tflops']:,.1f} TFLOPS"
    return f"{values['step_time_s'] * 1e3:.0f} ms, {predicted}\n{values['tokens_per_s']:,.0f} tokens/s, {mfu}, {peak}"


if __name__ == "__main__":
    main()
