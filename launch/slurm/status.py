"""What became of a submission: `moe-submit status|cancel|logs RUN_DIR`. No torch import."""

from __future__ import annotations

from pathlib import Path

from launch.slurm import commands, submission
from moe_train.config.composition import compose
from moe_train.config.resolve import total_steps
from moe_train.files import untrusted
from parallel.errors import ConfigError, LaunchError, one_line

_ACTIVE = ("PENDING", "RUNNING", "REQUEUED", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUE_HOLD")
_LINES, _LONGEST_LINE = 15, 1000
"""Of each log."""


def status(run_dir: str) -> None:
    """Print each job of the newest submission with its state, and how far the run is."""
    for job in submission.newest(run_dir).jobs:
        for facts in _facts(job) or [{"JobState": "no longer known to Slurm"}]:
            number = facts.get("ArrayTaskId", "")
            name = f"{facts.get('ArrayJobId', job)}_{number}" if number else job
            details = {"on": "NodeList", "for": "RunTime", "restarted": "Restarts", "because": "Reason"}
            shown = [
                f"{word} {facts[key]}"
                for word, key in details.items()
                if facts.get(key, "(null)") not in ("(null)", "0", "None", "00:00:00")
            ]
            print(f"job {name}: {', '.join([facts['JobState'].lower().replace('_', ' '), *shown])}")
    for directory in sorted({path.parent for path in Path(run_dir).glob("**/metrics.jsonl")}):
        if line := _last_step(directory):
            print(f"{directory}: {line}")


def cancel(run_dir: str) -> None:
    """End every job of the newest submission."""
    jobs = submission.newest(run_dir).jobs
    active = [job for job in jobs if _active(job)]
    if not active:
        raise ConfigError(
            f"no job of {run_dir} is waiting or running", f"moe-submit status {run_dir} shows how they ended"
        )
    first, *later = active
    if later:  # of a chain: they would start when the first has ended
        commands.run("scancel", *later)
    commands.run("scancel", first)
    print(f"cancelled {', '.join(active)}")


def logs(run_dir: str) -> None:
    """Print the end of what the jobs and their ranks wrote, oldest file first.

    Programs and text data decide what is in a log: control characters are shown as escapes, and lines have a bounded
    length.
    """
    submission.newest(run_dir)
    files = [*Path(run_dir).glob("slurm-*.out"), *Path(run_dir).glob("**/logs/*.log")]
    if not files:
        raise ConfigError(f"{run_dir} has no logs yet", f"moe-submit status {run_dir} shows if it has started")
    for path in sorted(files, key=_written):
        print(f"--- {one_line(str(path))}")
        try:
            lines = untrusted.last_lines(path, _LINES)
        except OSError as error:
            lines = [f"cannot be read: {error.strerror or error}"]
        for line in lines:
            print(one_line(_on_terminal(line), _LONGEST_LINE))


def _written(path: Path) -> float:
    """When a log was last written; 0 for a link that leads nowhere."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _on_terminal(line: str) -> str:
    """A line without tabs, and with the last state of a progress bar alone."""
    return line.rstrip("\r").rpartition("\r")[2].expandtabs()


def refuse_active(run_dir: str) -> None:
    """Raise ConfigError where a job of this directory still waits or runs: two would write the same files."""
    try:
        jobs = submission.newest(run_dir).jobs
    except ConfigError:
        return
    if active := [job for job in jobs if commands.installed() and _active(job)]:
        raise ConfigError(
            f"run_dir={run_dir} belongs to job {active[0]}, which has not ended",
            f"use another run_dir, or moe-submit cancel {run_dir}",
        )


def _active(job: str) -> bool:
    return any(facts["JobState"] in _ACTIVE for facts in _facts(job))


def _facts(job: str) -> list[dict[str, str]]:
    """What Slurm knows of a job, one entry for each task of an array; nothing once it has forgotten the job."""
    try:
        text = commands.run("scontrol", "show", "job", "--oneliner", job)
    except LaunchError as error:
        if "Invalid job id" in error.cause:
            return []
        raise
    return [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in text.splitlines() if line]


def _last_step(directory: Path) -> str:
    last = None
    for line in untrusted.read_json_lines(directory / "metrics.jsonl"):
        if "lm_loss" in line and isinstance(line.get("step"), int):
            last = line
    if last is None:
        return ""
    total = total_steps(compose.from_yaml(directory / "config.yaml"), last["step"], last.get("tokens", 0))
    loss = "not finite" if last["lm_loss"] is None else f"{last['lm_loss']:.4f}"
    return f"step {last['step']:,} of {total:,}, loss {loss}, {last.get('tokens_per_s') or 0:,.0f} tokens/s"
