"""Faults, each injected into a small training run on this machine: found after how long, recovered, steps lost.

`make bench-faults` writes bench/results/faults.json. The rows are in fault_cases.py. What was damaged before a command
began is found so long after its start.
"""

from __future__ import annotations

import argparse
import random
import re
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench import fault_commands, results
from bench.fault_cases import GUARDED, INTERVAL, LAYOUT, STEPS, Case, cases
from bench.fault_runs import Seen, data_overrides, events, injected_at, losses, train
from moe_train.config.resilience import Fault
from parallel.suggest import override_value


def run_case(case: Case, directory: Path, data: tuple[str, ...], reference: dict[int, float | None]) -> dict[str, Any]:
    """One row of the table."""
    run_dir = directory / case.name.replace(" ", "_").replace("*", "")
    overrides = [*data, *LAYOUT, *GUARDED, *(setting.format(run_dir=run_dir) for setting in case.settings)]
    if case.inject:
        overrides.append(f"resilience.inject={override_value(case.inject)}")
    done = 0
    with case.around(run_dir):
        if case.between:
            # The run is as long as the others, or its data would be in another order, and stops by itself before that.
            stopped = override_value([Fault("term", rank=0, step=2 * INTERVAL, factor=1)])
            train(run_dir, [*overrides, f"resilience.inject={stopped}"])
            case.between(run_dir)
            done = max(losses(run_dir))
        starter = case.starter(run_dir) if case.starter else None
        seen = continued = train(run_dir, overrides, case.meanwhile, case.environment, starter)
        if seen.code and seen.code == case.code:
            done = max(losses(run_dir), default=0)
            if case.repair:
                case.repair(run_dir)
            continued = train(run_dir, overrides)
        began = injected_at(run_dir) or seen.injected or seen.began
        ours, told, as_it_should_be = losses(run_dir), events(run_dir), case.check(run_dir)
    detection = seen.first(case.found)
    restarted = bool(continued is not seen or case.between or seen.first("starting again"))
    since = detection[0] if detection and continued is seen else 0.0
    goes_on = continued.first(r"resumed at step (\d+)|^step \d+/", after=since)
    resumed = int(goes_on[1].group(1) or 0) if goes_on and restarted else None
    back = sum(event["from_step"] - event["step"] for event in told if event["event"] == "rolled_back")
    row = {
        "injected": case.name,
        "detected_in_s": round(detection[0] - began, 2) if detection else None,
        "detected_by": detection[1].string[:160] if detection else "",
        "recovered_in_s": round(goes_on[0] - detection[0], 2) if detection and goes_on else None,
        "steps_lost": back if resumed is None else _lost(case, done, resumed),
        "reported_saved": _saved(seen, goes_on[0] if goes_on and continued is seen else float("inf")),
        "went_on_from": resumed,
        "exit_codes": [seen.code, continued.code],
        "events": [event["event"] for event in told],
        "final_loss_equal": ours.get(STEPS) == reference[STEPS],
        "equal_steps": sum(ours.get(step) == loss for step, loss in reference.items()),
        "changes_losses_by_design": case.changes_losses,
        "directory_as_it_should_be": as_it_should_be,
    }
    return {**row, "holds": _holds(case, row)}


def _lost(case: Case, done: int, resumed: int) -> int:
    """Steps that were done and had to be done again, where a run continues from step `resumed`."""
    at = [fault.step for fault in case.inject if fault.step > 0]
    if not done and at:  # the same command continued, so its metrics do not show it
        done = at[0] - (case.inject[0].at != "end")
    return max(0, done - resumed)


def _saved(seen: Seen, until: float) -> int:
    """The last step that was reported saved before a time."""
    matches = (re.match(r"checkpoint of step (\d+) in", line) for at, line in seen.lines if at < until)
    return max((int(match[1]) for match in matches if match), default=0)


def _holds(case: Case, row: dict[str, Any]) -> bool:
    """Noticed, ended and continued as it should, with the losses of an undisturbed run and all that was reported
    saved."""
    continues_from_saved = row["went_on_from"] is None or row["went_on_from"] >= row["reported_saved"]
    return (
        (bool(row["detected_by"]) or case.harmless)
        and row["exit_codes"] == [case.code, 0]
        and (row["final_loss_equal"] or case.changes_losses)
        and row["steps_lost"] <= case.most_lost
        and continues_from_saved
        and row["directory_as_it_should_be"]
    )


def random_kills(directory: Path, data: tuple[str, ...], steps: int, kills: int, draw: random.Random) -> dict[str, Any]:
    """One long run with kills at random steps and ranks, against one without."""
    long = [*data, *LAYOUT, f"train.steps={steps}", "checkpoint.interval_steps=10"]
    undisturbed = train(directory / "undisturbed", long)
    at = sorted(draw.sample(range(5, steps - 5), kills))
    faults = [Fault("kill", rank=draw.randrange(4), step=step) for step in at]
    inject = f"resilience.inject={override_value(faults)}"
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
    """Run all cases, or those whose name contains a word, and write the table. Exits with 1 if one did not recover."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a script; runs would ignore Ctrl-C
        signal.signal(signal.SIGINT, signal.default_int_handler)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", default="", help="cases whose name contains this: their rows of the table are replaced"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kills", type=int, default=10, help="0 leaves out the long run")
    parser.add_argument("--steps", type=int, default=300, help="of the long run")
    arguments = parser.parse_args()
    draw, rows = random.Random(arguments.seed), []
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        directory = Path(name)
        data = data_overrides(directory / "data")
        train(directory / "reference", [*data, *LAYOUT, *GUARDED])
        reference = losses(directory / "reference")
        for case in cases(draw, directory):
            if arguments.only in case.name:
                rows.append(run_case(case, directory, data, reference))
                print(_line(rows[-1]), flush=True)
        for check in fault_commands.checks():
            if arguments.only in check.name:
                rows.append(fault_commands.run_check(check, directory))
                print(_line(rows[-1]), flush=True)
        if arguments.only in "chain" and (row := fault_commands.chain(directory, data)):
            rows.append(row)
            print(_line(row), flush=True)
        if not rows:
            sys.exit(f"error: no case has a name with {arguments.only!r}")
        if arguments.only:
            measured = results.read("faults")
            kills, rows = measured["random_kills"], replaced(measured["rows"], rows)
        else:
            kills = random_kills(directory, data, arguments.steps, arguments.kills, draw) if arguments.kills else {}
    print(f"random kills: {kills}")
    right = sum(row["holds"] for row in rows)
    path = results.write("faults", {"faults": len(rows), "recovered": right, "random_kills": kills}, rows)
    print(f"{right} of {len(rows)} faults recovered; {path}")
    wanted = {"kills": arguments.kills, "finished_unattended": True, "steps_with_equal_loss": arguments.steps}
    sys.exit(0 if right == len(rows) and (not kills or kills.items() >= wanted.items()) else 1)


def replaced(rows: list[dict[str, Any]], measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`rows` with those of `measured` instead of rows of the same name, and new ones at the end."""
    by_name = {row["injected"]: row for row in rows} | {row["injected"]: row for row in measured}
    return list(by_name.values())


def _line(row: dict[str, Any]) -> str:
    columns = ("detected_in_s", "recovered_in_s", "steps_lost", "final_loss_equal", "holds")
    return f"{row['injected']:<48}" + "  ".join(f"{name}={row[name]}" for name in columns)


if __name__ == "__main__":
    main()
