"""Faults, each injected into a small training run on this machine: found after how long, recovered, steps lost.

`make bench-faults` writes bench/results/faults.json. To add a row add a `Case`. The layout is tp=2 pp=2 ep=2 on four
ranks: 0 and 1 hold the first pipeline stage, 2 and 3 the last.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import results
from bench.fault_runs import Seen, data_overrides, events, injected_at, losses, train

STEPS, INTERVAL = 16, 4
LAYOUT = ("parallel.tp=2", "parallel.pp=2", "parallel.ep=2", "launcher.threads_per_rank=1")
_GUARDED = ("launcher.restarts=2", f"checkpoint.interval_steps={INTERVAL}", f"train.steps={STEPS}")
_FILES = (".metadata", "__0_*.distcp", "__3_*.distcp", "state.json", "config.yaml", "manifest.json")
_HANG = ("resilience.hang_timeout_s=5",)


@dataclass(frozen=True)
class Case:
    """One row.

    Args:
        inject: entries of resilience.inject.
        settings: further overrides.
        meanwhile: acts on the running command.
        between: changes the run directory after a first command of `first_steps` steps; a second one continues.
        code: exit code of the command that meets the fault; where it is not 0 the same command is run again, if
            `again`.
        changes_losses: whether the fault is meant to change later losses, as a step that is left out does.
    """

    name: str
    inject: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    meanwhile: Callable[[subprocess.Popen[str], Seen], None] | None = None
    between: Callable[[Path], None] | None = None
    environment: dict[str, str] | None = None
    code: int = 0
    again: bool = True
    changes_losses: bool = False


def _newest(run_dir: Path) -> Path:
    return max((run_dir / "checkpoints").glob("step_*"))


def _truncate(name: str) -> Callable[[Path], None]:
    def act(run_dir: Path) -> None:
        for file in _newest(run_dir).glob(name):
            os.truncate(file, file.stat().st_size // 2)

    return act


def _flip(name: str) -> Callable[[Path], None]:
    def act(run_dir: Path) -> None:
        for file in _newest(run_dir).glob(name):
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 0x10
            file.write_bytes(content)

    return act


def _remove_latest(run_dir: Path) -> None:
    (run_dir / "checkpoints" / "latest").unlink()


def _at_step(step: int, act: Callable[[subprocess.Popen[str]], None]) -> Callable[[subprocess.Popen[str], Seen], None]:
    """Act when the checkpoint of `step` is reported."""

    def wait(process: subprocess.Popen[str], seen: Seen) -> None:
        while process.poll() is None and not seen.first(rf"checkpoint of step {step} "):
            time.sleep(0.01)
        act(process)

    return wait


def _storm(number: int) -> Callable[[subprocess.Popen[str]], None]:
    def send(process: subprocess.Popen[str]) -> None:
        for _ in range(50):
            if process.poll() is None:
                os.killpg(process.pid, number)

    return send


def cases(draw: random.Random, directory: Path) -> list[Case]:
    """The rows, with random steps."""

    def step() -> int:
        return draw.randint(2, STEPS - 2)

    jumping = directory / "jumping"
    jumping.mkdir(exist_ok=True)
    (jumping / "sitecustomize.py").write_text(_JUMPING_CLOCK)
    rows = [Case(f"kill -9 of rank {rank}", (f"kill:rank={rank}:step={step()}",)) for rank in range(4)]
    rows += [
        Case(
            f"kill -9 of rank {rank} while saving",
            (f"kill:rank={rank}:step={2 * INTERVAL}:at=end:after={draw.uniform(0.005, 0.05):.3f}",),
        )
        for rank in range(4)
    ]
    rows += [Case(f"hang of rank {rank}", (f"hang:rank={rank}:step={step()}",), _HANG) for rank in (0, 3)]
    rows += [Case(f"rank {rank} stopped", (f"stop:rank={rank}:step={step()}",), _HANG) for rank in (0, 2)]
    rows += [
        Case("error in the code of a rank", (f"raise:rank=2:step={step()}",)),
        Case("NaN batch", (f"nan:step={step()}",), changes_losses=True),
        Case("NaN in the data of three steps", ("nan:sample=48:samples=24",), changes_losses=True),
        Case(
            "loss spike", (f"spike:step={INTERVAL + 6}:factor=50",),
            ("resilience.spike_factor=3", "resilience.spike_window=4"), changes_losses=True,
        ),
        Case(
            "slow rank", ("slow:rank=1:step=3:steps=100:seconds=0.3",),
            ("resilience.straggler_interval_steps=2", "resilience.straggler_intervals=2"),
        ),
        Case("storm of SIGTERM and Ctrl-C", meanwhile=_at_step(INTERVAL, _storm(signal.SIGTERM)), code=143),
        Case("Ctrl-C", meanwhile=_at_step(INTERVAL, lambda p: os.killpg(p.pid, signal.SIGINT)), code=130),
        Case("storm of SIGUSR1", (f"term:rank=1:step={step()}:factor=50",), code=75),
        Case("clock that jumps by days", environment={"PYTHONPATH": f"{jumping}:{Path(__file__).parents[1]}"}),
        Case("latest deleted", between=_remove_latest),
        *(
            Case(f"{name} of the newest checkpoint truncated", between=_truncate(name))
            for name in _FILES
        ),
        *(Case(f"{name} of the newest checkpoint with a flipped bit", between=_flip(name)) for name in _FILES),
    ]  # fmt: skip
    return rows


_JUMPING_CLOCK = """
import time
_wall, _calls = time.time, [0]
def _jumping():
    _calls[0] += 1
    return _wall() + (1e6 if _calls[0] // 50 % 2 else 0)
time.time = _jumping
"""


def run_case(case: Case, directory: Path, data: tuple[str, ...], reference: dict[int, float | None]) -> dict[str, Any]:
    """One row of the table."""
    run_dir = directory / case.name.replace(" ", "_").replace("*", "")
    overrides = [*data, *LAYOUT, *_GUARDED, *case.settings]
    if case.inject:
        overrides.append(f"resilience.inject={list(case.inject)}".replace('"', "'"))
    if case.between:
        # The run is as long as the others, or its data would be in another order, and stops by itself on the way.
        train(run_dir, [*overrides, f"resilience.inject=['term:rank=0:step={2 * INTERVAL}:factor=1']"])
        case.between(run_dir)
    seen = train(run_dir, overrides, case.meanwhile, case.environment)
    first_code, continued = seen.code, seen
    if seen.code and case.again and seen.code == case.code:
        continued = train(run_dir, overrides)
    began = injected_at(run_dir) if case.inject else None
    found = seen.first(r"starting again|warning: (step \d+: |checkpoint)|interrupted by|stopped at step")
    resumed = continued.first(r"resumed at step (\d+)", after=found[0] if found and continued is seen else 0.0)
    ours = losses(run_dir)
    same = [step for step, loss in reference.items() if ours.get(step) == loss]
    return {
        "injected": case.name,
        "detected_in_s": round(found[0] - began, 2) if found and began else None,
        "detected_by": found[1].string[:160] if found else "",
        "recovered_in_s": round(resumed[0] - found[0], 2) if found and resumed else None,
        "steps_lost": _lost(case, resumed),
        "exit_code": first_code,
        "as_expected": first_code == case.code and continued.code == 0,
        "events": [event["event"] for event in events(run_dir)],
        "final_loss_equal": ours.get(STEPS) == reference[STEPS],
        "equal_steps": len(same),
        "changes_losses_by_design": case.changes_losses,
    }


def _lost(case: Case, resumed: Any) -> int | None:
    """Steps that were done and had to be done again."""
    at = [int(part.removeprefix("step=")) for text in case.inject for part in text.split(":") if part[:5] == "step="]
    if not resumed or not at:
        return 0 if not case.inject or not at or case.changes_losses else None
    done = at[0] - ("at=end" not in case.inject[0])
    return max(0, done - int(resumed[1].group(1)))


def random_kills(directory: Path, data: tuple[str, ...], steps: int, kills: int, draw: random.Random) -> dict[str, Any]:
    """One long run with kills at random steps and ranks, against one without."""
    long = [*data, *LAYOUT, f"train.steps={steps}", "checkpoint.interval_steps=10"]
    undisturbed = train(directory / "undisturbed", long)
    at = sorted(draw.sample(range(5, steps - 5), kills))
    faults = [f"kill:rank={draw.randrange(4)}:step={step}" for step in at]
    inject = f"resilience.inject={faults}".replace('"', "'")
    seen = train(directory / "killed", [*long, inject, f"launcher.restarts={kills}"], timeout_s=3600)
    ours, theirs = losses(directory / "killed"), losses(directory / "undisturbed")
    return {
        "kills": len(list((directory / "killed" / "injected").glob("*"))),
        "steps": steps,
        "finished_unattended": seen.code == 0,
        "steps_with_equal_loss": sum(ours.get(step) == loss for step, loss in theirs.items()),
        "seconds_undisturbed": round(undisturbed.seconds, 1),
        "seconds": round(seen.seconds, 1),
        "goodput": round(undisturbed.seconds / seen.seconds, 3),
    }


def main() -> None:
    """Run all cases, or those whose name contains a word, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="cases whose name contains this; nothing is written then")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kills", type=int, default=10, help="0 leaves out the long run")
    parser.add_argument("--steps", type=int, default=300, help="of the long run")
    arguments = parser.parse_args()
    draw, rows = random.Random(arguments.seed), []
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        directory = Path(name)
        data = data_overrides(directory / "data")
        train(directory / "reference", [*data, *LAYOUT, *_GUARDED])
        reference = losses(directory / "reference")
        for case in cases(draw, directory):
            if arguments.only in case.name:
                rows.append(run_case(case, directory, data, reference))
                print(_line(rows[-1]), flush=True)
        if arguments.only:
            return
        kills = random_kills(directory, data, arguments.steps, arguments.kills, draw) if arguments.kills else {}
    print(f"{arguments.kills} random kills: {kills}")
    right = sum(row["as_expected"] and (row["final_loss_equal"] or row["changes_losses_by_design"]) for row in rows)
    path = results.write("faults", {"faults": len(rows), "recovered": right, "random_kills": kills}, rows)
    print(f"{right} of {len(rows)} faults recovered; {path}")


def _line(row: dict[str, Any]) -> str:
    columns = ("detected_in_s", "recovered_in_s", "steps_lost", "final_loss_equal", "as_expected")
    return f"{row['injected']:<48}" + "  ".join(f"{name}={row[name]}" for name in columns)


if __name__ == "__main__":
    main()
