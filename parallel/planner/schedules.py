"""The order in which each rank of a pipeline runs its passes, under five schedules. No torch import.

A model is cut into stages. `holders` says which ranks hold a stage: DualPipe keeps two copies of the model, and runs
half of the micro-batches through each, in opposite directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from parallel.planner.memory import interleaved

SCHEDULES = ("1f1b", "interleaved", "zb1p", "dualpipe", "dualpipev")


class Pass(NamedTuple):
    """One unit of work of a rank.

    Args:
        kind: F (forward), B (whole backward), I (backward of inputs only), W (of weights only), or FB (a forward and a
            whole backward pass of two micro-batches at once).
        stage: of the forward pass of FB, else of the pass.
        micro_batch: number of the micro-batch, over both directions.
        back_stage, back_micro_batch: of the backward pass of FB.
    """

    kind: str
    stage: int
    micro_batch: int
    back_stage: int = -1
    back_micro_batch: int = -1


def stages_of(schedule: str, pp: int, vpp: int) -> int:
    """Stages that the model is cut into."""
    return {"interleaved": pp * vpp, "dualpipev": 2 * pp}.get(schedule, pp)


def holders(schedule: str, pp: int, stage: int) -> tuple[int, ...]:
    """Ranks that hold `stage`: one, or with DualPipe one for each direction."""
    if schedule == "dualpipe":
        return stage, pp - 1 - stage
    if schedule == "dualpipev":
        return (stage if stage < pp else 2 * pp - 1 - stage,)
    return (stage % pp,)


def smallest_micro_batches(schedule: str, pp: int) -> int:
    """Fewest micro-batches that the order is defined for."""
    return {"dualpipe": 2 * pp, "dualpipev": 2 * pp, "interleaved": pp}.get(schedule, 1)


def order(schedule: str, pp: int, vpp: int, rank: int, micro_batches: int) -> list[Pass]:
    """The passes of one rank, first to last.

    Raises:
        ValueError: the schedule is unknown or not defined for so many stages and micro-batches.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule}; there are {', '.join(SCHEDULES)}")
    if reason := impossible(schedule, pp, vpp, micro_batches):
        raise ValueError(reason)
    if schedule == "dualpipe":
        return list(_dualpipe(pp, rank, micro_batches))
    if schedule == "dualpipev":
        return list(_dualpipev(pp, rank, micro_batches))
    if schedule == "zb1p":
        return list(_zb1p(pp, rank, micro_batches))
    if schedule == "interleaved" and vpp > 1:
        return list(_interleaved(pp, vpp, rank, micro_batches))
    return list(_one_f_one_b(pp, rank, micro_batches))


def impossible(schedule: str, pp: int, vpp: int, micro_batches: int) -> str:
    """Why a schedule cannot run so, or an empty string."""
    least = smallest_micro_batches(schedule, pp)
    if micro_batches < least:
        return f"{schedule} over {pp} ranks needs at least {least} micro-batches, not {micro_batches}"
    if schedule == "dualpipe" and (pp % 2 or micro_batches % 2):
        return f"dualpipe needs even numbers of ranks and micro-batches, not {pp} and {micro_batches}"
    if schedule == "interleaved" and vpp > 1 and micro_batches % pp:
        return f"interleaved over {pp} ranks needs a multiple of {pp} micro-batches, not {micro_batches}"
    return ""


def _one_f_one_b(pp: int, rank: int, micro_batches: int) -> Iterator[Pass]:
    """Warm up with a forward pass for each later stage, then alternate (arXiv 2104.04473, section 2.2)."""
    warm_up = min(micro_batches, pp - 1 - rank)
    for number in range(warm_up):
        yield Pass("F", rank, number)
    for number in range(micro_batches):
        if warm_up + number < micro_batches:
            yield Pass("F", rank, warm_up + number)
        yield Pass("B", rank, number)


def _interleaved(pp: int, vpp: int, rank: int, micro_batches: int) -> Iterator[Pass]:
    """As Megatron-Core runs it: `parallel.planner.memory.interleaved`, with the numbers of micro-batches."""
    counts = {(chunk, forward): 0 for chunk in range(vpp) for forward in (True, False)}
    for chunk, forward in interleaved(pp, vpp, rank, micro_batches):
        yield Pass("F" if forward else "B", chunk * pp + rank, counts[chunk, forward])
        counts[chunk, forward] += 1


def _zb1p(pp: int, rank: int, micro_batches: int) -> Iterator[Pass]:
    """ZB-H1 (arXiv 2401.10241, section 2): weight gradients wait for the bubbles, at 1F1B's activations."""
    warm_up = min(micro_batches, pp - 1 - rank)
    for number in range(warm_up):
        yield Pass("F", rank, number)
    done = 0
    for number in range(micro_batches):
        if warm_up + number < micro_batches:
            yield Pass("F", rank, warm_up + number)
        yield Pass("I", rank, number)
        # A rank holds pp micro-batches at most: `rank` of them may wait for their weight gradients.
        cooling = number >= micro_batches - warm_up
        if number - done >= rank or cooling:
            yield Pass("W", rank, done)
            done += 1
    for number in range(done, micro_batches):
        yield Pass("W", rank, number)


class _Duplex:
    """Emits the passes of one rank of DualPipe or DualPipeV, which hold two stages ("sides") each."""

    def __init__(self, stage: Callable[[int], int], number: Callable[[int, int], int]) -> None:
        self.stage, self.number = stage, number
        self.forwards, self.backwards = [0, 0], [0, 0]
        self.waiting: list[Pass] = []

    def forward(self, side: int) -> Pass:
        self.forwards[side] += 1
        return Pass("F", self.stage(side), self.number(side, self.forwards[side] - 1))

    def backward(self, side: int, split: bool) -> Pass:
        self.backwards[side] += 1
        stage, number = self.stage(side), self.number(side, self.backwards[side] - 1)
        if split:
            self.waiting.append(Pass("W", stage, number))
        return Pass("I" if split else "B", stage, number)

    def both(self, forward: int, backward: int) -> Pass:
        first, second = self.forward(forward), self.backward(backward, split=False)
        return Pass("FB", first.stage, first.micro_batch, second.stage, second.micro_batch)

    def weights(self) -> Iterator[Pass]:
        if self.waiting:
            yield self.waiting.pop(0)


def _dualpipe(pp: int, rank: int, micro_batches: int) -> Iterator[Pass]:
    """DualPipe (arXiv 2412.19437, section 3.2.1; the eight steps of deepseek-ai/DualPipe)."""
    place = min(rank, pp - 1 - rank)
    flipped = int(rank >= pp // 2)
    work = _Duplex(lambda side: rank if side == flipped else pp - 1 - rank, lambda side, n: 2 * n + (side ^ flipped))
    steady = micro_batches // 2 - pp + place + 1
    yield from _duplex(work, pp // 2, place, steady, middle=place == pp // 2 - 1)


def _dualpipev(pp: int, rank: int, micro_batches: int) -> Iterator[Pass]:
    """DualPipeV: the two halves of DualPipe folded into one V, without the second copy of the model."""
    work = _Duplex(lambda side: 2 * pp - 1 - rank if side else rank, lambda side, n: n)
    yield from _duplex(work, pp, rank, micro_batches - 2 * pp + rank + 1, middle=rank == pp - 1)


def _duplex(work: _Duplex, half: int, place: int, steady: int, middle: bool) -> Iterator[Pass]:
    ahead = half - place - 1
    for _ in range(2 * ahead):
        yield work.forward(0)
    for _ in range(place + 1):
        yield work.forward(0)
        yield work.forward(1)
    for _ in range(ahead):
        yield work.backward(1, split=True)
        yield from work.weights()
        yield work.forward(1)
    for number in range(steady):
        if number == 0 and middle:  # nothing has come back yet that could run at the same time
            yield work.forward(0)
            yield work.backward(1, split=False)
        else:
            yield work.both(0, 1)
        yield work.both(1, 0)
    for _ in range(ahead):
        yield work.backward(1, split=False)
        yield work.both(1, 0)
    for number in range(2 * (place + 1)):  # the second half of these leaves its weight gradients for later
        yield work.backward(1 - number % 2, split=number >= place + 1)
    for _ in range(ahead):
        yield from work.weights()
        yield work.backward(0, split=True)
    for _ in range(len(work.waiting)):
        yield from work.weights()
