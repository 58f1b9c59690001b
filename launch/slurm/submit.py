"""`moe-submit`: check a run on a login node, say what it will need, and give it to Slurm.

    moe-submit experiment=deepseek_v3/pretrain data=indexed \\
        data.dir=/shared/corpus run_dir=/shared/runs/v3
    moe-submit --dry-run ...         print the command without submitting it
    moe-submit -m seed=1,2,3 ...     one array of jobs, one for each value
    moe-submit status RUN_DIR        also cancel, logs
    moe-submit data data=text ...    a job that makes a dataset, as moe-data

It takes the overrides of moe-train; where they do not say runtime=cpu, the nodes have GPUs. Time and cost are estimated
under the assumptions of plan.* (plan.software_date, plan.imbalance, ...), which the job does not get.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from launch import chosen, lock
from launch.slurm import checks, commands, container, corpus, elastic, node_count, status, submission, submit_data
from launch.slurm.estimate import RunEstimate, check_memory, run_estimate
from moe_train.checkpoint import continuing, origin
from moe_train.config.assumed import on_gpus
from moe_train.config.composition.command_line import sorted_words, text_override
from moe_train.config.composition.compose import compose, hydra_entry, job_words
from moe_train.config.composition.fallback import fitting
from moe_train.config.composition.validate import validate
from moe_train.config.plan import EstimateConfig
from moe_train.config.resolve import job_gpus_per_node
from moe_train.config.roots import EstimateRoot
from moe_train.config.rules.precision import recipe
from moe_train.config.rules.values import check_values
from moe_train.config.schema import Config
from moe_train.config.walk import group_names
from moe_train.model.estimate import USUAL
from parallel.errors import ConfigError, LaunchError, MoeTrainError
from parallel.layout import ParallelLayout
from parallel.planner.hardware import Hardware
from parallel.planner.placement import NodeSpan, node_spans

_DRY = "--dry-run"
_COMMON = (
    "experiment", "model", "parallel", "precision", "data", "data.dir", "run_dir", "train.tokens", "launcher.nodes",
    "launcher.ranks_per_node", "launcher.partition", "launcher.account", "launcher.time_limit_min", "launcher.chain",
    "launcher.requeues", "launcher.container", "launcher.preflight", "checkpoint.interval_steps",
)  # fmt: skip
_VERBS = {"status": status.status, "cancel": status.cancel, "logs": status.logs}


@dataclass(frozen=True)
class Checked:
    """A validated submission."""

    cfg: Config
    overrides: list[str]
    layout: ParallelLayout
    nodes: int
    gpus: int
    estimate: RunEstimate
    data: str
    """What the run reads, in a line; "" where the data are not there yet."""
    choices: list[elastic.Choice]
    """Of the layout on each number of nodes with which it may start."""
    unchecked: str
    """Why the limits of the cluster could not be looked at; "" where they were."""
    notes: list[str]
    """On the nodes, for the user."""
    options: submission.ConfigSources
    """Options of the command line that the job needs too."""


def main() -> None:
    """Console script. Exits with 0 when submitted, 2 where the submission is wrong, else 1."""
    sys.exit(run(sys.argv[1:]))


def run(words: Sequence[str]) -> int:
    """What `main` does with these words, returning the exit code."""
    if words and words[0] in _VERBS:
        return _show_run(words)
    if words and words[0] == "data":
        return submit_data.run(words[1:])
    dry = _DRY in words
    try:
        rest, plan = _without_plan([word for word in words if word != _DRY])
    except MoeTrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    rest += _assumed([word for word in rest if not word.startswith("-")])
    sweep: list[Checked] = []

    def job(cfg: Config) -> None:
        checked = check(cfg, dry, plan)
        _report(checked)
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            sweep.append(checked)
        else:
            submit([checked], Path(cfg.run_dir).resolve(), dry)
            _tidy(cfg, dry)

    code = hydra_entry(
        job, argv=rest, about=__doc__, common=_COMMON, flags=[_DRY], revise=continuing.continued, answers=dry
    )
    if code or not sweep:
        return code
    directory = Path(sweep[0].cfg.run_dir).resolve().parent
    try:
        status.refuse_active(str(directory))
        submit(sweep, directory, dry)
    except MoeTrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _without_plan(words: Sequence[str]) -> tuple[list[str], EstimateConfig]:
    """The words without those of `plan`, which is not part of a run, and what they say.

    Raises:
        ConfigError: they say something that an estimate cannot assume.
    """
    words_of_run: list[str] = []
    words_of_plan: list[str] = []
    for word, is_override in sorted_words(words):
        group = word.partition("=")[0].lstrip("+~").partition(".")[0]
        (words_of_plan if is_override and group in group_names(EstimateRoot) else words_of_run).append(word)
    if not words_of_plan:
        return words_of_run, USUAL
    root = compose(words_of_plan, EstimateRoot)
    check_values(root)
    return words_of_run, root.plan


def _assumed(overrides: Sequence[str]) -> list[str]:
    """What the words leave open: GPUs, and BF16. A run that is continued keeps its own precision."""
    words = on_gpus(overrides)
    given = {word.partition("=")[0].lstrip("+"): word.partition("=")[2].strip("'\"") for word in overrides}
    if "resume" in given or Path(given.get("run_dir", ""), "config.yaml").is_file():
        words = [word for word in words if not word.startswith("precision=")]
    return words


def check(cfg: Config, dry: bool = False, plan: EstimateConfig = USUAL) -> Checked:
    """Everything that must hold before nodes are asked for; with `dry` the data need not be there.

    Args:
        plan: what the estimate of time and cost assumes.

    Raises:
        ConfigError: with a cause and values that would work.
        LaunchError: Slurm does not answer.
    """
    launcher = cfg.launcher
    world_size = None if launcher.nodes is None else launcher.nodes * launcher.ranks_per_node
    if cfg.runtime not in ("cuda", "cpu"):
        raise ConfigError(f"runtime={cfg.runtime} runs on one machine alone", "use runtime=cuda or runtime=cpu")
    try:
        fitted = cfg if world_size is None else fitting(cfg, world_size)
        layout = validate(fitted, world_size)
    except ConfigError as error:
        raise (error if world_size is None else node_count.refused(cfg, error)) from error
    _parseable(cfg.run_dir)
    if why := continuing.nothing_to_do(cfg):
        raise ConfigError(why)
    if cfg.runtime == "cuda" and (refusal := Hardware.of(cfg.cluster).refusal(recipe(cfg.precision))):
        raise refusal
    words = job_words(HydraConfig.get())
    notes = checks.cores(launcher)
    if continuing.find(cfg) is None:  # what a run began with is its user's choice
        chosen.check(cfg, layout, words)
        if cfg.init_from is not None:
            notes += origin.check(cfg.model, Path(cfg.init_from))
    checks.job(cfg)
    nodes = launcher.nodes or checks.nodes_of(cfg, layout)
    choices = elastic.choices(cfg, nodes, plan)
    chosen_layout = next(choice for choice in choices if nodes in choice.counts)
    is_for_fewest = chosen_layout.counts[0] == nodes
    estimate = chosen_layout.estimate if is_for_fewest else run_estimate(fitted, layout, plan)
    check_memory(estimate, layout)
    data = ""
    try:
        data, more = corpus.check(cfg, estimate.tokens)
        notes += more
    except corpus.NotThere as error:
        if not dry:
            raise
        notes.append(f"the data are not checked: {error.cause}")
    checks.directories(cfg)
    checks.in_container(cfg)
    gpus = job_gpus_per_node(cfg)
    if cfg.runtime == "cuda" and gpus < launcher.ranks_per_node:
        raise ConfigError(
            f"launcher.ranks_per_node={launcher.ranks_per_node} exceeds launcher.gpus_per_node={gpus}",
            f"use launcher.ranks_per_node={gpus or 1}",
        )
    unchecked = "" if commands.installed() else "Slurm is not on this machine"
    try:
        if not unchecked:
            notes += commands.check(cfg, nodes, gpus)
            status.refuse_active(cfg.run_dir)
    except LaunchError as error:
        unchecked = error.cause
    lock.refuse_live(cfg)
    return Checked(cfg, words, layout, nodes, gpus, estimate, data, choices, unchecked, notes, submission.options())


def submit(runs: list[Checked], directory: Path, dry: bool) -> None:
    """Give one run, or the array of a sweep, to Slurm. With `dry` print the command instead.

    Raises:
        ConfigError: Slurm refuses the job.
        LaunchError: sbatch is not here.
    """
    first = runs[0]
    launcher = first.cfg.launcher
    if any((run.nodes, run.cfg.launcher) != (first.nodes, launcher) for run in runs):
        raise ConfigError(
            "the jobs of this sweep need other nodes or other fields of launcher, and an array has one request for all",
            "sweep over fields that change neither nodes nor launcher, or submit these jobs separately",
        )
    place = directory / submission.FOLDER / time.strftime("%Y-%m-%d_%H-%M-%S")
    container.sees(launcher, {"the copy of the code": str(place)}, {})
    counts = sorted(count for choice in first.choices for count in choice.counts)
    variables = commands.environment(first.cfg, place, counts)
    flags = commands.flags(first.cfg, first.nodes, first.gpus, directory)
    words = [*first.options.words(place), *_overrides(first)]
    if len(runs) > 1:
        limit = f"%{launcher.array_limit}" if launcher.array_limit else ""
        flags += [f"--array=0-{len(runs) - 1}{limit}", f"--output={commands.no_pattern(directory)}/slurm-%A_%a.out"]
        variables["MOE_SWEEP"], words = str(place / "sweep"), []
    script = str((place / "code/launch/train.sbatch") if not dry else commands.SCRIPT)
    command = ["sbatch", "--parsable", *flags, script, *words]
    first_after = [f"--dependency={launcher.dependency}"] if launcher.dependency else []
    if dry:
        if not any(run.unchecked for run in runs):  # the controller says what it would, and keeps nothing
            try:
                inherited = submission.clean(os.environ) | variables  # as of a submission
                commands.run("sbatch", "--test-only", *first_after, *command[2:], environment=inherited)
            except LaunchError as error:
                raise ConfigError(f"Slurm refuses the job: {error.cause}", "see the fields of launcher") from error
        shown = [*(f"{name}={value}" for name, value in variables.items()), *command[:2], *first_after, *command[2:]]
        print(shlex.join(["env", *shown]))
        if launcher.chain > 1:
            print(f"then {launcher.chain - 1} more, each with --dependency=afternotok: of all before it")
        return
    if not commands.installed():
        raise LaunchError("sbatch is not on this machine", f"run on a login node of the cluster, or with {_DRY}")
    submission.take(first.cfg, place, first.options)
    if len(runs) > 1:
        (place / "sweep").mkdir()
        for number, run in enumerate(runs):
            words_of_job = [*run.options.words(place), *_overrides(run)]
            (place / "sweep" / str(number)).write_text("".join(f"{word}\0" for word in words_of_job))
    record = submission.Submission(command, variables)
    _sbatch(record, first_after, launcher.chain, place)
    print(f"submitted {', '.join(record.jobs)}; follow with: moe-submit status {directory}")


def _sbatch(record: submission.Submission, first_after: list[str], count: int, place: Path) -> None:
    """Submit `count` jobs, each after all before it have failed, and write down their numbers."""
    for _ in range(count):
        after = first_after
        if record.jobs:
            # Where one completes, Slurm cancels those that wait for it to fail. It must be all later ones: to Slurm a
            # cancelled job has failed, so a job that only waits for the one before would start after a cancelled one.
            after = [f"--dependency=afternotok:{':'.join(record.jobs)}", "--kill-on-invalid-dep=yes"]
        try:
            record.submit(*after)
        except LaunchError as error:
            if not record.jobs:
                shutil.rmtree(place)
            raise ConfigError(f"Slurm refuses the job: {error.cause}", "see the fields of launcher") from error
        submission.write(record, place)


def _overrides(run: Checked) -> list[str]:
    """The words of the command line for `train.sbatch`: paths absolute, references replaced by what they refer to."""
    overrides = [submission.for_job(word, run.cfg) for word in run.overrides if not word.startswith("run_dir=")]
    return [*overrides, text_override("run_dir", str(Path(run.cfg.run_dir).resolve()))]


def _parseable(run_dir: str) -> None:
    """The code of the job is found through PYTHONPATH, whose entries a colon separates; sbatch takes no line break."""
    path = str(Path(run_dir).resolve())
    if wrong := [name for char, name in {":": "a colon", "\n": "a line break"}.items() if char in path]:
        raise ConfigError(f"run_dir={run_dir!r} has {wrong[0]} in its path, with which a batch job cannot start",
                          "choose another run_dir")  # fmt: skip


def _report(run: Checked) -> None:
    cfg, layout, estimate = run.cfg, run.layout, run.estimate
    launcher = cfg.launcher
    memory = f"{estimate.memory_gib:,.1f} GiB on the peak rank (stage {estimate.stage} of {layout.pp})"
    if estimate.usable_gib is not None:
        memory += f", of {estimate.usable_gib:,.1f} that a GPU has"
    rows = [
        ("run", f"{cfg.model.name} in {cfg.precision.name}, {estimate.tokens:,} tokens, {cfg.run_dir}"),
        *([("data", run.data)] if run.data else []),
        (
            "nodes",
            f"{run.nodes:,} x {launcher.ranks_per_node} = {layout.world_size:,} ranks, started by {launcher.start}",
        ),
        ("layout", elastic.degrees(layout)),
        *(("groups" if not i else "", str(span)) for i, span in enumerate(_node_spans(run))),
        ("memory", memory),
        *(("or" if not i else "", text) for i, text in enumerate(elastic.fewer(run.choices, run.nodes))),
    ]
    if estimate.pace:
        pace, cluster, limit_h = estimate.pace, cfg.cluster, launcher.time_limit_min / 60
        rate = pace.tokens_per_s_per_gpu
        rows += [
            ("time", f"{pace.hours:,.1f} hours: a step {pace.step_s:,.3f} s, {rate:,.0f} tokens/s a GPU"),
            ("", f"predicted for cluster={cluster.name} at an MFU of {pace.mfu:.0%}; moe-plan shows how"),
            ("", f"{max(1, -(-pace.hours // limit_h)):,.0f} x the time limit of {limit_h:g} hours"),
            ("cost", _cost(run, pace.hours)),
        ]
    notes = [] if cfg.runtime == "cpu" else checks.notes(cfg, layout, estimate)
    rows += [("note", note) for note in [*notes, *run.notes]]
    if run.unchecked:
        rows.append(("note", f"partition, account, limits and what else Slurm knows are not checked: {run.unchecked}"))
    for name, text in rows:
        print(f"{name:<8}{text}")


def _cost(run: Checked, hours: float) -> str:
    """Of all GPUs that the job holds, which may be more than its ranks."""
    price, gpus = run.cfg.cluster.dollars_per_gpu_hour, run.nodes * run.gpus
    more = gpus - run.layout.world_size
    idle = f", with the {more:,} of {gpus:,} GPUs that have no rank" if more else ""
    return f"${hours * gpus * price:,.0f} at ${price:g} for a GPU and hour{idle}"


def _node_spans(run: Checked) -> list[NodeSpan]:
    return node_spans(run.layout, run.cfg.launcher.ranks_per_node)


def _tidy(cfg: Config, dry: bool) -> None:
    if dry:
        with contextlib.suppress(OSError):  # Hydra has made it
            Path(cfg.run_dir).rmdir()


def _show_run(words: Sequence[str]) -> int:
    try:
        if len(words) != 2:
            raise ConfigError(f"moe-submit {words[0]} takes one directory", f"moe-submit {words[0]} RUN_DIR")
        _VERBS[words[0]](words[1])
    except MoeTrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    main()
