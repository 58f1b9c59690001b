"""`launch/train.sbatch` between a Slurm and an srun that are a few lines of shell."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.slurm import commands
from moe_train.config.launcher import LauncherConfig
from moe_train.config.schema import Config
from tests.launch.programs import environment

# The command line of each srun goes to a log. The first one started by the script itself knows its process.
_SRUN = """trap "" USR1
[ -f "$LOG.batch" ] || echo $PPID >"$LOG.batch"
batch=$(cat "$LOG.batch")
echo "$*" >>"$LOG"
case "$*" in
  *' true') what=look ;;
  *launch.preflight*) what=preflight ;;
  *) what=train ;;
esac
"""
_SCONTROL = """case "$1" in
  show) echo node1 ;;
  requeue) echo "requeue $2" >>"$LOG"; kill -KILL $PPID ;;
esac
"""


class Batch:
    """Runs the script in `directory`, as Slurm does on the first node of a job."""

    def __init__(self, directory: Path) -> None:
        self.dir, self.log = directory, directory / "log"
        (directory / "bin").mkdir()

    def run(self, srun: str, *overrides: str, **variables: str) -> tuple[int, str]:
        """Exit code and output. `srun` is what that command does, in shell; $what is train, preflight or look."""
        for name, text in {"srun": _SRUN + srun, "scontrol": _SCONTROL}.items():
            program = self.dir / "bin" / name
            program.write_text(f"#!/bin/sh\n{text}\n")
            program.chmod(0o755)
        job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "job", "SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": "2",
               "SLURM_JOB_NODELIST": "node1", "SLURM_SUBMIT_DIR": str(self.dir), "LOG": str(self.log),
               "PATH": f"{self.dir / 'bin'}:{os.environ['PATH']}"}  # fmt: skip
        command, env = ["bash", str(commands.SCRIPT), *overrides], environment(**(job | variables))
        with (self.dir / "out").open("w") as out:  # not a pipe, which what outlives the script would hold open
            done = subprocess.run(
                command, env=env, cwd=self.dir, stdout=out, stderr=out, text=True, timeout=120, start_new_session=True
            )
        return done.returncode, (self.dir / "out").read_text()

    def lines(self) -> list[str]:
        """Everything that the script had srun do, and its requests to requeue."""
        return self.log.read_text().splitlines()


@pytest.fixture
def batch(tmp_path: Path) -> Batch:
    return Batch(tmp_path)


def test_the_launcher_that_watches_heartbeats_starts_training_alone(batch: Batch) -> None:
    """Preflight sends none."""
    code, text = batch.run("", "run_dir=run", MOE_START="ft_launcher", MOE_PREFLIGHT="check")
    assert code == 0, text
    preflight, training = (line.split() for line in batch.lines())
    assert "torch.distributed.run" in preflight
    assert "launch.preflight" in preflight
    assert "nvidia_resiliency_ext.fault_tolerance.launcher" in training
    assert "launch.main" in training


@pytest.mark.parametrize("when", ["preflight", "look"])
def test_a_warning_between_two_starts_is_not_forgotten(when: str, batch: Batch) -> None:
    """No rank of the next start would be told, and the time limit would take what it does."""
    # bash can lose the exit code of what ends in the instant of a signal, hence the pause
    srun = f'[ $what != {when} ] || {{ kill -USR1 "$batch"; sleep 0.3; }}; [ $what != train ] || exit 1'
    _, text = batch.run(srun, "run_dir=run", MOE_PREFLIGHT="check" if when == "preflight" else "none")
    *steps, last = batch.lines()
    assert last == "requeue 7", text
    assert sum("launch.main" in step for step in steps) == (when == "look")


def test_a_warning_is_heard_while_the_nodes_are_looked_at(batch: Batch) -> None:
    """A node that does not answer is waited for longer than the warning comes before the limit."""
    srun = '[ $what != look ] || { kill -USR1 "$batch"; sleep 3; echo looked >>"$LOG"; }; [ $what != train ] || exit 1'
    _, text = batch.run(srun, "run_dir=run")
    assert batch.lines()[-1] == "requeue 7", text
    assert "looked" not in batch.lines()


@pytest.mark.parametrize(("count", "last"), [("0", "requeue 7"), ("100", "ended")])
def test_ranks_that_do_not_save_in_time_are_requeued_while_there_is_some(count: str, last: str, batch: Batch) -> None:
    """Slurm does not requeue what reaches its limit. A job that must not go back gets all the time there is."""
    srun = '[ $what != train ] || { kill -USR1 "$batch"; sleep 7; echo ended >>"$LOG"; }'
    _, text = batch.run(srun, "run_dir=run", MOE_GRACE_S="5", SLURM_RESTART_COUNT=count)
    assert batch.lines()[-1] == last, text


@pytest.mark.parametrize(
    ("most", "count", "says"),
    [
        ("0", "0", "the next job of the chain, if any, continues"),
        ("2", "2", "error: saved before the time limit; it was"),
    ],
)
def test_a_run_that_saved_and_is_not_requeued_says_why(most: str, count: str, says: str, batch: Batch) -> None:
    """The end of a link of a chain is none of its errors."""
    srun = '[ $what != train ] || { kill -USR1 "$batch"; sleep 0.3; exit 75; }'
    code, text = batch.run(srun, "run_dir=run", MOE_REQUEUES=most, SLURM_RESTART_COUNT=count)
    assert (code, "requeue 7" in batch.lines()) == (75, False)
    assert says in text
    assert ("error:" in text) == says.startswith("error:")


@pytest.mark.parametrize("target", ['"$batch"', '"-$batch"'])
def test_sigterm_to_the_script_lets_the_ranks_save(target: str, batch: Batch) -> None:
    """To the script or to its process group, as `scancel --batch` and `--full` send it. srun would kill the ranks."""
    srun = f"""[ $what = train ] || exit 0
    trap 'echo USR1 >>"$LOG"; exit 75' USR1; trap 'echo TERM >>"$LOG"; exit 143' TERM
    kill -TERM {target}; for i in $(seq 100); do sleep 0.1; done"""
    code, text = batch.run(srun, "run_dir=run")
    assert (code, batch.lines()[-1]) == (75, "USR1"), text
    assert "requeue 7" not in batch.lines()
    assert "saved on request" in text
    assert "error:" not in text


@pytest.mark.parametrize("phase", ["preflight", "look"])
def test_sigterm_ends_what_has_nothing_to_save_at_once(phase: str, batch: Batch) -> None:
    srun = f"""[ $what != train ] || exit 1; [ $what = {phase} ] || exit 0
    trap 'exit 143' TERM; kill -TERM "$batch"; for i in $(seq 100); do sleep 0.1; done; echo late >>"$LOG" """
    code, text = batch.run(srun, "run_dir=run", MOE_PREFLIGHT="check")
    assert "late" not in batch.lines(), text
    assert code in (75, 143)


def test_the_next_job_of_a_chain_does_not_start_ranks_for_a_run_that_is_done(batch: Batch) -> None:
    """In a chain of arrays Slurm starts all tasks again where one has failed."""
    chain = {"MOE_SUBMITTED": "monday", "MOE_REQUEUES": "0"}
    assert batch.run("", "run_dir=run", **chain)[0] == 0
    batch.log.unlink()
    code, text = batch.run("", "run_dir=run", SLURM_JOB_ID="8", **chain)
    assert (code, batch.log.exists()) == (0, False), text
    assert "job 7 of this chain has completed the run" in text
    assert batch.run("", "run_dir=run", **chain)[0] == 0  # the same job again, as someone asked for
    assert batch.log.exists()


def test_a_run_dir_that_cannot_be_written_is_told_before_a_rank_starts(batch: Batch) -> None:
    (batch.dir / "run").write_text("a file")
    code, text = batch.run("", "run_dir=run")
    assert (code, batch.log.exists()) == (1, False)
    assert "error: run_dir=run cannot be written; see its permissions and df -h run" in text


def test_a_job_that_is_ended_between_two_starts_starts_nothing_more(batch: Batch) -> None:
    code, _ = batch.run('[ $what != look ] || kill -TERM "$batch"; [ $what != train ] || exit 1', "run_dir=run")
    assert code == 75
    assert sum("launch.main" in step for step in batch.lines()) == 1


def test_the_script_alone_asks_for_nodes_as_moe_submit_does() -> None:
    lines = commands.SCRIPT.read_text().splitlines()
    header = {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")}
    by_name = {"--job-name", "--nodes", "--time", "--output"}
    flags = {flag for flag in commands.flags(Config(), 1, 8, Path("run")) if flag.partition("=")[0] not in by_name}
    assert flags == {flag for flag in header if flag.partition("=")[0] not in by_name} - {"--open-mode=append"}
    assert "--mem=0" in flags


def test_what_the_script_takes_by_itself_is_what_the_fields_say() -> None:
    """Defaults of MOE_* without moe-submit."""
    script, launcher = commands.SCRIPT.read_text(), LauncherConfig()
    for name in ("GRACE_S", "REQUEUES"):
        assert f"{{MOE_{name}:-{getattr(launcher, name.lower())}}}" in script, name
    former = f"${{MOE_MEET_S:-{launcher.rendezvous_timeout_s}}}"
    assert f"{{MOE_RENDEZVOUS_TIMEOUT_S:-{former}}}" in script


def test_every_start_of_a_job_or_chain_knows_where_the_first_is_remembered(batch: Batch) -> None:
    for more in ({}, {"SLURM_RESTART_COUNT": "1"}, {"MOE_SUBMITTED": "monday"}):
        code, text = batch.run('echo "$MOE_FIRST_START" >>"$LOG"', "run_dir=run", **more)
        assert code == 0, text
    files = [line for line in batch.lines() if line.startswith("run/")]
    assert files == ["run/.first_start_7.json", "run/.first_start_7.json", "run/.first_start_monday.json"]


def test_a_preflight_without_a_report_ends_with_its_own_code(batch: Batch) -> None:
    code, _ = batch.run("exit 7", "run_dir=run", MOE_PREFLIGHT="check")
    assert code == 7
    assert len(batch.lines()) == 1


def test_the_code_that_a_rank_left_counts_more_than_that_of_the_ranks_killed_with_it(batch: Batch) -> None:
    """Under NCCL the others wait for it until srun kills them, and then tells the highest code."""
    code, text = batch.run('echo 2 >"$MOE_EXIT_CODE"; exit 137', "run_dir=run")
    assert code == 2, text
    assert len(batch.lines()) == 1
    assert "ended with exit code 2" in text


def test_a_stop_counts_as_such_where_the_launcher_hides_it(batch: Batch) -> None:
    _, text = batch.run('echo 75 >"$MOE_EXIT_CODE"; exit 1', "run_dir=run", MOE_START="torchrun")
    assert "saved before the time limit: back to the queue" in text


def test_the_code_of_an_earlier_start_is_none_of_a_later_one(batch: Batch) -> None:
    (batch.dir / "run").mkdir()
    (batch.dir / "run/.exit_code_7").write_text("2\n")
    code, text = batch.run("[ $what != train ] || exit 1", "run_dir=run", MOE_RESTARTS="1")
    assert code == 1, text
    assert sum("launch.main" in line for line in batch.lines()) == 2


@pytest.mark.parametrize("fails", ["train", "preflight"])
@pytest.mark.parametrize(("ended", "goes_on"), [("2", False), ("5", False), ("3", True), ("75", True)])
def test_a_chain_ends_where_the_next_job_could_do_no_better(
    ended: str, goes_on: bool, fails: str, batch: Batch
) -> None:
    chain = {"MOE_SUBMITTED": "monday", "MOE_REQUEUES": "0", "MOE_PREFLIGHT": "check"}
    assert batch.run(f"[ $what != {fails} ] || exit {ended}", "run_dir=run", **chain)[0] == int(ended)
    batch.log.unlink()
    code, text = batch.run("", "run_dir=run", SLURM_JOB_ID="8", **chain)
    assert (code, batch.log.exists()) == ((0, True) if goes_on else (int(ended), False)), text
    assert goes_on or f"error: job 7 of this chain ended with exit code {ended}, and this one would too" in text
    # Another submission, or the same job when someone has it run again, is a new try.
    assert batch.run("case $PYTHONPATH in [0-9]*) exit 9 ;; esac", "run_dir=run", **chain)[0] == 0
    assert batch.run("", "run_dir=run", SLURM_JOB_ID="8", **chain)[0] == 0


def test_a_chain_goes_on_where_a_run_that_had_begun_could_not_read(batch: Batch) -> None:
    """Storage that was away for a while; a run that diverged would do so again."""
    chain = {"MOE_SUBMITTED": "monday", "MOE_REQUEUES": "0"}
    began = "echo {} >run/metrics.jsonl"
    assert batch.run(f"{began}; exit 2", "run_dir=run", **chain)[0] == 2
    assert batch.run("exit 5", "run_dir=run", SLURM_JOB_ID="8", **chain)[0] == 5
    code, text = batch.run("", "run_dir=run", SLURM_JOB_ID="9", **chain)
    assert code == 5
    assert "job 8 of this chain" in text


@pytest.mark.parametrize(
    ("word", "directory"),
    [("run_dir=epoch=9", "epoch=9"), ("run_dir=a b [1]", "a b [1]"), ("run_dir='a b'", "a b"),
     ("run_dir=${oc.env:PLACE}/x=1", "here/x=1"), ("++run_dir=plain", "plain"), ("+run_dir=plain", "plain"),
     ("++run_dir='a b'", "a b"), ('++run_dir="a b"', "a b"), ("++run_dir=${oc.env:PLACE}/x", "here/x")],
)  # fmt: skip
def test_the_directory_is_that_of_the_ranks(word: str, directory: str, batch: Batch) -> None:
    place = {"PLACE": "here", "MOE_PYTHON": sys.executable, "MOE_CODE": str(commands.SCRIPT.parents[1])}
    code, text = batch.run("", word, **place)
    assert code == 0, text
    assert (batch.dir / directory / "logs").is_dir()
    made = {path.relative_to(batch.dir).parts[0] for path in batch.dir.glob("**/logs")}
    assert made == {Path(directory).parts[0]}, "no stray directory"


def test_the_job_has_the_directory_that_was_named_and_no_second_one(batch: Batch) -> None:
    batch.run("", "++run_dir=mine")
    assert [word for word in batch.lines()[0].split() if "run_dir=" in word] == ["++run_dir=mine"]


@pytest.mark.parametrize("word", ["hydra.run.dir=there", "++hydra.run.dir=there"])
def test_another_name_of_the_directory_is_refused(word: str, batch: Batch) -> None:
    code, text = batch.run("", word)
    assert (code, text) == (2, f"error: {word}: name the directory of the run by run_dir=DIRECTORY\n")
    assert [path.name for path in batch.dir.iterdir() if path.is_dir()] == ["bin"]


@pytest.mark.parametrize("word", ["launcher.start=torchrun", "++launcher.start=torchrun", "+launcher.preflight=check"])
def test_a_field_that_the_script_does_not_read_is_refused(word: str, batch: Batch) -> None:
    code, text = batch.run("", word)
    assert (code, "has an effect through moe-submit only" in text) == (2, True)


def test_a_directory_with_the_time_in_its_name_is_refused(batch: Batch) -> None:
    code, text = batch.run("", "++run_dir=runs/${now:%H-%M}")
    assert code == 2
    assert "would be another directory after a requeue" in text
