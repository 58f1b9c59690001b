"""Entries of processes that fail as those on a GPU may, and real ones with a wrong number."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from typing import Any

from bench.gpu_task import Task

CHILD = "child.pid"


def right(task: Task) -> None:
    for part in task.parts:
        task.report(part, error=0.5)


def wrong(task: Task) -> None:
    task.report(task.parts[0], error=-1.5)


def silent(task: Task) -> None:
    """Ends well, and has measured nothing."""


def nan(task: Task) -> None:
    task.report(task.parts[0], error=float("nan"))


def other_number(task: Task) -> None:
    task.report(task.parts[0], mistake=0.5)


def unsupported(task: Task) -> None:
    task.report(task.parts[0], not_supported="needs Blackwell")


def raises(task: Task) -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def crashes(task: Task) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def crashes_after_reporting(task: Task) -> None:
    right(task)
    crashes(task)


def crashes_in_part_b(task: Task) -> None:
    for part in task.parts:
        if part == "b":
            crashes(task)
        task.report(part, error=0.5, process=os.getpid())


def hangs(task: Task) -> None:
    """With a child, which must not stay either."""
    child = os.fork()
    if child:
        task.kept(CHILD).write_text(str(child))
    time.sleep(600)


def counts(task: Task) -> None:
    """Leaves a byte each time that it runs."""
    with task.kept("count").open("a") as file:
        file.write("x")


def perturbed_gradients(task: Task) -> None:
    """The real comparison, after 5 % were added to the gradient of one parameter."""
    from bench import gpu_worker

    real = gpu_worker.gradients_of

    def gradients_of(run: Any) -> Any:
        found = real(run)
        found["decoder.final_layernorm.weight"] *= 1.05
        return found

    gpu_worker.gradients_of = gradients_of
    gpu_worker.gradients(task)


def wrong_memory(task: Task) -> None:
    """The real measurement, with a prediction that forgets the optimizer."""
    from bench import gpu_worker

    real = gpu_worker.predict
    gpu_worker.predict = lambda cfg, layout: [replace(one, optimizer=0) for one in real(cfg, layout)]
    gpu_worker.large(task)


def wrong_checkpoint(task: Task) -> None:
    """The real comparison, in a run with another learning rate than the one that wrote the checkpoint."""
    from bench import gpu_worker

    gpu_worker.resume(replace(task, overrides=[*task.overrides, "optimizer.lr=3e-3", "schedule.on_resume=override"]))


def wrong_recomputation(task: Task) -> None:
    """The real comparison, where runs with recomputation see another batch."""
    from bench import gpu_worker

    sets = {part: [*words, "seed=7"] for part, words in task.options["sets"].items()}
    gpu_worker.recompute(replace(task, options={"sets": sets}))


def wrong_recipe(task: Task) -> None:
    """The real comparison, of a run with ten times the learning rate."""
    from bench import gpu_worker

    gpu_worker.recipe(replace(task, overrides=[*task.overrides, "optimizer.lr=1e-2"]))
