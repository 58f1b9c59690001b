"""A discrete-event simulation of one training step of a pipeline. No torch import.

Each rank runs its passes in the order of its schedule (`parallel.planner.schedules`), each pass as soon as its inputs
have arrived. Stages may take different times. Activations in flight come out of the same simulation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from parallel.planner.schedules import Pass, holders, impossible, order, stages_of

ROUNDS = 3  # rounds of pp micro-batches after which every schedule here repeats itself


@dataclass(frozen=True)
class StageTime:
    """Seconds of one micro-batch on one stage.

    Args:
        forward: its forward pass alone.
        backward: its whole backward pass alone, weight gradients and recomputation included.
        weights: the part of `backward` that weight gradients take.
        overlapped: factor on a forward and a backward pass that run at once (1: no gain over one after the other).
    """

    forward: float
    backward: float
    weights: float
    overlapped: float = 1.0


@dataclass(frozen=True)
class PassEvent:
    """One pass of one rank and when it ran, seconds from the start of the step."""

    rank: int
    item: Pass
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """What a simulation found.

    Args:
        seconds: from the first pass to the end of the last.
        busy: seconds that each rank computed.
        by_kind: of each rank, seconds in each kind of pass.
        in_flight: of each rank, the most stage-activations alive at once; empty in an estimate.
        events: every pass, for pictures; empty where a simulation was extended.
    """

    seconds: float
    busy: tuple[float, ...]
    by_kind: tuple[dict[str, float], ...]
    in_flight: tuple[int, ...]
    events: tuple[PassEvent, ...]

    @property
    def bubble(self) -> float:
        """Seconds that ranks waited, a mean."""
        return max(0.0, self.seconds - sum(self.busy) / len(self.busy))

    @property
    def bubble_fraction(self) -> float:
        """Part of the step that ranks waited."""
        return self.bubble / self.seconds if self.seconds else 0.0


def duration(item: Pass, times: Sequence[StageTime]) -> float:
    """Seconds of one pass."""
    stage = times[item.stage]
    if item.kind == "F":
        return stage.forward
    if item.kind == "FB":
        back = times[item.back_stage]
        return (stage.forward + back.backward) * (stage.overlapped + back.overlapped) / 2
    return {"B": stage.backward, "I": stage.backward - stage.weights, "W": stage.weights}[item.kind]


def simulate(
    schedule: str, pp: int, vpp: int, micro_batches: int, times: Sequence[StageTime], send: float = 0.0
) -> Timeline:
    """Run every pass of a step. `send` is the time of one message between ranks, seconds.

    Raises:
        ValueError: the schedule is not defined for so many stages and micro-batches, or `times` has another length.
    """
    stages = stages_of(schedule, pp, vpp)
    if len(times) != stages:
        raise ValueError(f"{schedule} over {pp} ranks has {stages} stages, but there are times of {len(times)}")
    orders = [order(schedule, pp, vpp, rank, micro_batches) for rank in range(pp)]
    places = [holders(schedule, pp, stage) for stage in range(stages)]
    done: dict[tuple[str, int, int], tuple[float, int]] = {}  # (F or B, stage, micro-batch) -> when, on which rank
    events: list[list[PassEvent]] = [[] for _ in range(pp)]
    clock, position = [0.0] * pp, [0] * pp
    waiting = dict.fromkeys(range(pp))  # ranks that may proceed, in the order in which they were woken
    while waiting:
        rank = next(iter(waiting))
        del waiting[rank]
        while position[rank] < len(orders[rank]):
            item = orders[rank][position[rank]]
            ready = _ready(item, stages, rank, done, send)
            if ready is None:
                break
            start = max(clock[rank], ready)
            clock[rank] = end = start + duration(item, times)
            events[rank].append(PassEvent(rank, item, start, end))
            position[rank] += 1
            for key, neighbour in _made(item):
                done[key] = (end, rank)
                if 0 <= neighbour < stages:
                    waiting.update(dict.fromkeys(other for other in places[neighbour] if other != rank))
    if any(position[rank] < len(orders[rank]) for rank in range(pp)):
        raise ValueError(f"{schedule} over {pp} ranks with {micro_batches} micro-batches waits for itself")
    return _timeline(events)


def _ready(
    item: Pass, stages: int, rank: int, done: dict[tuple[str, int, int], tuple[float, int]], send: float
) -> float | None:
    """When everything that a pass needs has arrived, or None where that is not known yet."""
    latest = 0.0
    for key in _needs(item, stages):
        finished = done.get(key)
        if finished is None:
            return None
        latest = max(latest, finished[0] + (send if finished[1] != rank else 0.0))
    return latest


def _needs(item: Pass, stages: int) -> list[tuple[str, int, int]]:
    needs = []
    if item.kind in ("F", "FB") and item.stage > 0:
        needs.append(("F", item.stage - 1, item.micro_batch))
    if item.kind == "W":
        return [("B", item.stage, item.micro_batch)]
    if item.kind != "F":
        stage, number = (item.back_stage, item.back_micro_batch) if item.kind == "FB" else item[1:3]
        needs.append(("F", stage, number) if stage == stages - 1 else ("B", stage + 1, number))
    return needs


def _made(item: Pass) -> list[tuple[tuple[str, int, int], int]]:
    """What a pass makes, and the stage that waits for it."""
    if item.kind == "W":
        return []
    if item.kind == "FB":
        forward = (("F", item.stage, item.micro_batch), item.stage + 1)
        return [forward, (("B", item.back_stage, item.back_micro_batch), item.back_stage - 1)]
    kind, step = ("F", 1) if item.kind == "F" else ("B", -1)
    return [((kind, item.stage, item.micro_batch), item.stage + step)]


def _timeline(events: Sequence[Sequence[PassEvent]]) -> Timeline:
    by_kind = []
    for events_of_rank in events:
        kinds: dict[str, float] = {}
        for event in events_of_rank:
            kinds[event.item.kind] = kinds.get(event.item.kind, 0.0) + event.end - event.start
        by_kind.append(kinds)
    return Timeline(
        seconds=max(events_of_rank[-1].end for events_of_rank in events if events_of_rank),
        busy=tuple(sum(kinds.values()) for kinds in by_kind),
        by_kind=tuple(by_kind),
        in_flight=tuple(_in_flight(events_of_rank) for events_of_rank in events),
        events=tuple(event for events_of_rank in events for event in events_of_rank),
    )


def _in_flight(events: Sequence[PassEvent]) -> int:
    """The most forward passes of a rank whose activations were alive at once: until B, W, or the end of FB."""
    alive = most = 0
    for event in events:
        alive += event.item.kind in ("F", "FB")
        most = max(most, alive)
        alive -= event.item.kind in ("B", "W", "FB")
    return most


def step_time(
    schedule: str, pp: int, vpp: int, micro_batches: int, times: Sequence[StageTime], send: float = 0.0
) -> Timeline:
    """As `simulate`, for many micro-batches: once the schedule repeats itself, the rest is multiplied, not
    simulated."""
    group = 2 * pp if schedule in ("dualpipe", "dualpipev") else pp
    short = ROUNDS * group + micro_batches % group
    rest = (micro_batches - short) // group
    if rest <= 1:
        return simulate(schedule, pp, vpp, micro_batches, times, send)
    first = simulate(schedule, pp, vpp, short, times, send)
    second = simulate(schedule, pp, vpp, short + group, times, send)

    def extended(a: float, b: float) -> float:
        return a + (b - a) * rest

    kinds = [
        {kind: extended(shorter.get(kind, 0.0), value) for kind, value in longer.items()}
        for shorter, longer in zip(first.by_kind, second.by_kind, strict=True)
    ]
    busy = [extended(shorter, longer) for shorter, longer in zip(first.busy, second.busy, strict=True)]
    return Timeline(extended(first.seconds, second.seconds), tuple(busy), tuple(kinds), second.in_flight, ())


def estimated(
    schedule: str, pp: int, vpp: int, micro_batches: int, times: Sequence[StageTime], send: float = 0.0
) -> Timeline:
    """The step in closed form: the slowest rank works all the time, and waits for the bubble of even stages.

    Raises:
        ValueError: the schedule is not defined for so many stages and micro-batches.
    """
    if reason := impossible(schedule, pp, vpp, micro_batches):
        raise ValueError(reason)
    loads = [0.0] * pp
    shares = 1.0 / len(holders(schedule, pp, 0))
    for stage, time in enumerate(times):
        both = (time.forward + time.backward) * (time.overlapped if schedule.startswith("dual") else 1.0)
        for rank in holders(schedule, pp, stage):
            loads[rank] += both * shares * micro_batches
    forward = sum(time.forward for time in times) / len(times)
    backward = sum(time.backward for time in times) / len(times)
    weights = sum(time.weights for time in times) / len(times)
    both = sum((time.forward + time.backward) * time.overlapped for time in times) / len(times)
    bubble = {
        "zb1p": (pp - 1) * max(0.0, forward + backward - 2 * weights),
        "dualpipe": (pp / 2 - 1) * (both + backward - 3 * weights),
        "dualpipev": (pp - 1) * (both + backward - 3 * weights),
    }.get(schedule, (pp - 1) * (forward + backward))
    seconds = max(loads) + max(0.0, bubble) + 2 * (pp - 1) * send
    return Timeline(seconds, tuple(loads), tuple({} for _ in range(pp)), (), ())
