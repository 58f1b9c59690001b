"""Every layout of a model over a number of accelerators: which fit, how fast they are, and why the rest do not. No
torch.

Two passes keep it short: all layouts are timed in closed form with the memory of their fullest stages estimated from
one layer; the best are then simulated, and their memory counted stage by stage.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product

from parallel import pipeline
from parallel.layout import ParallelLayout
from parallel.planner.activations import layer, shared_embedding_bytes
from parallel.planner.layer_time import Machine, Times
from parallel.planner.memory import (
    StageMemory,
    Weights,
    communication_bytes,
    logits_bytes,
    optimizer_bytes,
    parameter_bytes,
    stage_memory,
)
from parallel.planner.schedules import impossible
from parallel.planner.software import Software
from parallel.planner.step_time import StepTime, plan_step
from parallel.planner.workload import Job, Recompute
from parallel.suggest import Impossible

WeightsOf = Callable[[Job, int], Weights]
DUAL = "dualpipe"
SIMULATED = 20  # drafts, at least
ESTIMATED = 1.03  # what is estimated to need so much more than there is may fit: it is counted stage by stage
STATIC = "weights, gradients and optimizer alone need more memory than there is"


@dataclass(frozen=True)
class Space:
    """What is tried of each dimension; pp, ep and cp are further limited to what divides."""

    tp: Sequence[int] = (1, 2, 4, 8)
    pp: Sequence[int] = (1, 2, 4, 8, 16, 32, 64)
    cp: Sequence[int] = (1,)
    ep: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    etp: Sequence[int] = (1, 2, 4, 8)
    vpp: Sequence[int] = (1, 2, 3, 4)
    micro_batch_size: Sequence[int] = (1, 2, 4)
    recompute: Sequence[Recompute] = (("none", frozenset()), ("full", frozenset()))
    schedules: Sequence[str] = ("1f1b", "interleaved")
    dispatchers: Sequence[str] = ("flex", "alltoall")
    fp8: Sequence[str | None] = (None,)


@dataclass(frozen=True)
class Plan:
    """One way to run the job.

    Args:
        job: layout, micro-batch, recomputation and precision.
        schedule: of the pipeline.
        software: dispatcher and overlap that it was timed with.
        step: where the time of a step goes.
        memory: of each pipeline rank; empty where it was only estimated.
        memory_bytes: of the fullest rank.
    """

    job: Job
    schedule: str
    software: Software
    step: StepTime
    memory: tuple[StageMemory, ...]
    memory_bytes: float

    @property
    def memory_of_ranks(self) -> list[float]:
        """Bytes on a rank of each pipeline rank: of its stage, or of all that its schedule keeps there."""
        return held_bytes(self.job, self.schedule, self.memory)

    @property
    def label(self) -> str:
        """Degrees and choices in one line."""
        size, again = self.job.micro_batch_size, self.job.recomputes
        return f"{self.job.layout.label} mbs{size} recompute:{again} {self.schedule} {self.software.dispatcher}"


@dataclass
class Found:
    """Plans that fit, fastest first; why layouts do not; how many were looked at."""

    plans: list[Plan] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    tried: int = 0

    def refuse(self, reason: str, example: str) -> None:
        """Count a layout that does not fit."""
        self.reasons[reason] += 1
        self.examples.setdefault(reason, example)


@dataclass(frozen=True)
class _Draft:
    """A candidate before it is simulated."""

    seconds_per_token: float
    job: Job
    schedule: str
    software: Software


def search(
    base: Job, machine: Machine, gpus: int, global_batch_size: int, space: Space, weights_of: WeightsOf, top: int = 10
) -> Found:
    """The fastest plans for `gpus` accelerators. The same arguments give the same plans in the same order.

    Args:
        base: everything that is not searched: model, sequence, formats. Its layout and stages are replaced.
        weights_of: parameters on one rank of a pipeline rank.
        top: how many plans are wanted.
    """
    found = Found()
    drafts: list[_Draft] = []
    timed = _Timer(machine, weights_of)
    for layout in layouts(base, gpus, space, found):
        drafts += _drafts(base, layout, global_batch_size, space, timed, found)
    drafts.sort(key=lambda draft: (draft.seconds_per_token, _key(draft)))
    simulated = max(SIMULATED, 2 * top)  # however few are wanted: the closed form may have the order wrong
    for number, draft in enumerate(drafts):
        if (number >= simulated and len(found.plans) >= top) or (number >= 3 * simulated and found.plans):
            break
        plan = _counted(draft, machine, space, weights_of)
        if plan.memory_bytes <= machine.hardware.offered_bytes:
            found.plans.append(plan)
        else:
            found.refuse("its stages, counted one by one, need more memory than there is", plan.label)
    found.plans.sort(key=lambda plan: (plan.step.seconds / plan.step.tokens, plan.label))
    del found.plans[top:]
    return found


def _counted(draft: _Draft, machine: Machine, space: Space, weights_of: WeightsOf) -> Plan:
    """A draft simulated, with as much more recomputation as its memory, counted stage by stage, asks for."""
    job, machine = draft.job, replace(machine, software=draft.software)
    plan = evaluate(job, draft.schedule, machine, weights_of)
    more = list(space.recompute)[list(space.recompute).index((job.recompute, job.recompute_modules)) + 1 :]
    for mode, modules in more:
        if plan.memory_bytes <= machine.hardware.offered_bytes:
            break
        tried = replace(job, recompute=mode, recompute_modules=modules)
        plan = evaluate(tried, draft.schedule, machine, weights_of)
    return plan


def _key(draft: _Draft) -> str:
    one = draft.job
    again = f"{one.recompute} {sorted(one.recompute_modules)}"
    return f"{one.layout} {one.micro_batch_size} {again} {draft.schedule} {draft.software.dispatcher} {one.fp8}"


def evaluate(job: Job, schedule: str, machine: Machine, weights_of: WeightsOf) -> Plan:
    """Simulate one job, and count its memory stage by stage."""
    weights = [weights_of(job, rank) for rank in range(job.layout.pp)]
    step = plan_step(job, machine, schedule, weights)
    memory = tuple(stage_memory(job, rank, one) for rank, one in enumerate(weights))
    fullest = max(held_bytes(job, schedule, memory))
    return Plan(job, schedule, machine.software, step, memory, fullest)


def held_bytes(job: Job, schedule: str, memory: Sequence[StageMemory]) -> list[float]:
    """Memory of each pipeline rank, bytes.

    A rank of DualPipe holds two stages, `rank` and its mirror image, the optimizer state of each shared with the rank
    that holds the same two, and PP + 1 activations in all.
    """
    if schedule == "dualpipev":  # 2 PP + 1 activations of its half stages
        alive = job.layout.pp + 0.5
        return [
            one.total - one.activations + min(alive, job.micro_batches) * one.activations_per_micro_batch
            for one in memory
        ]
    if schedule != DUAL:
        return [float(one.total) for one in memory]
    found: list[float] = []
    for rank, one in enumerate(memory):
        other, pp = memory[job.layout.pp - 1 - rank], job.layout.pp
        static = float(one.parameters + one.gradients + other.parameters + other.gradients)
        static += (one.optimizer + other.optimizer) / 2
        if rank in (0, pp - 1):
            static -= shared_embedding_bytes(job)
        alive = (pp - rank) * one.activations_per_micro_batch + (rank + 1) * other.activations_per_micro_batch
        passing = max(one.recompute, other.recompute) + max(one.communication, other.communication)
        found.append(static + alive + passing + one.logits + other.logits)
    return found


def layouts(base: Job, gpus: int, space: Space, found: Found) -> Iterator[ParallelLayout]:
    """Every layout whose degrees fit the model and fill the accelerators."""
    for tp, pp, cp in product(space.tp, space.pp, space.cp):
        if gpus % (tp * pp * cp):
            continue
        dp = gpus // (tp * pp * cp)
        for ep, etp in product(space.ep if base.model.num_experts else (1,), [e for e in space.etp if e in (1, tp)]):
            if (tp * cp * dp) % (ep * etp):
                continue
            found.tried += 1
            layout = ParallelLayout(tp, pp, 1, cp, ep, etp, dp)
            if reason := infeasible(base, layout):
                found.refuse(reason, layout.label)
            else:
                yield layout


def infeasible(base: Job, layout: ParallelLayout) -> str:
    """Why the model cannot be split so, or an empty string."""
    model = base.model
    if model.num_attention_heads % layout.tp or model.padded_vocab_size % layout.tp:
        return "tp does not divide the heads or the vocabulary"
    if model.attention == "gqa" and model.kv_heads % layout.tp and layout.tp % model.kv_heads:
        return "tp and the key/value heads do not divide each other"
    if model.num_experts and (model.num_experts % layout.ep or model.moe_ffn_hidden_size % layout.etp):
        return "ep does not divide the experts, or etp their width"
    if layout.cp > 1 and base.seq_length % (2 * layout.cp):
        return "2 x cp does not divide the sequence"
    if len(model.moe_layer_pattern) < pipeline.smallest_num_layers(layout.pp):
        return "more pipeline stages than layers"
    return ""


class _Timer:
    """Times drafts, with what does not depend on the pipeline computed once."""

    def __init__(self, machine: Machine, weights_of: WeightsOf) -> None:
        self.machine, self.weights_of = machine, weights_of
        self.layers: dict[object, dict[object, Times]] = {}
        self.kept: dict[object, tuple[dict[bool, float], float]] = {}
        self.ranks: dict[object, list[tuple[tuple[str, ...], Counter[bool]]]] = {}
        self.held: dict[object, list[Weights]] = {}

    def weights(self, job: Job) -> list[Weights]:
        """Parameters of each pipeline rank."""
        one = job.layout
        key = (one.tp, one.pp, len(job.stages), one.ep, one.etp)
        if key not in self.held:
            self.held[key] = [self.weights_of(job, rank) for rank in range(one.pp)]
        return self.held[key]

    def layer_bytes(self, job: Job) -> tuple[dict[bool, float], float]:
        """Activations of a dense layer and of one with experts, and the most that recomputing one brings back."""
        one = job.layout
        key = (one.tp, one.cp, one.ep, one.etp, job.micro_batch_size, job.recompute, job.recompute_modules, job.fp8)
        if key not in self.kept:
            kinds = [bool(moe) for moe in set(job.model.moe_layer_pattern)]
            whole = {moe: sum(layer(job, moe, recompute=False).values()) for moe in kinds}
            kept = dict.fromkeys(kinds, float(job.element * job.split_tokens * job.model.hidden_size))  # their input
            if job.recompute != "full":
                kept = {moe: sum(layer(job, moe).values()) for moe in kinds}
            self.kept[key] = kept, max(whole[moe] - kept[moe] for moe in kinds)
        return self.kept[key]

    def stages(self, job: Job) -> list[tuple[tuple[str, ...], Counter[bool]]]:
        """Items of the chunks of each pipeline rank, and how many layers with experts and without they have."""
        pattern, pp = job.model.moe_layer_pattern, job.layout.pp
        key = (tuple("".join(items) for items in job.stages), pp)
        if key not in self.ranks:
            found: list[tuple[tuple[str, ...], Counter[bool]]] = [(key[0][rank::pp], Counter()) for rank in range(pp)]
            first = 0
            for index, items in enumerate(key[0]):
                counts = found[index % pp][1]
                counts.update(bool(moe) for moe in pattern[first : first + items.count("t")])
                counts[bool(pattern[-1])] += items.count("m")
                first += items.count("t")
            self.ranks[key] = found
        return self.ranks[key]

    def step(self, job: Job, schedule: str, software: Software) -> StepTime:
        """The step in closed form."""
        one = job.layout
        key = (one.tp, one.cp, one.ep, one.etp, job.micro_batch_size, job.recompute, job.recompute_modules, job.fp8,
               software.dispatcher)  # fmt: skip
        kinds = self.layers.setdefault(key, {})
        machine = replace(self.machine, software=software)
        return plan_step(job, machine, schedule, self.weights(job), simulated=False, kinds=kinds)

    def memory(self, job: Job, schedule: str) -> float:
        """Memory of the first, second, middle or last pipeline rank, bytes: close to `stage_memory`, and quick."""
        one, weights, ranks = job.layout, self.weights(job), self.stages(job)
        kept, brought = self.layer_bytes(job)

        def of(rank: int, alive: float) -> tuple[float, float, float]:
            items, counts = ranks[rank]
            activations = alive * sum(count * kept[moe] for moe, count in counts.items())
            messages = communication_bytes(job, rank, items, round(alive * one.vpp))
            return activations, messages, logits_bytes(job, "".join(items))

        most = 0.0
        for rank in sorted({0, min(1, one.pp - 1), one.pp // 2, one.pp - 1}):
            optimizer, held = optimizer_bytes(job, weights[rank]), _static_bytes(job, weights[rank])
            alive = float(min(job.micro_batches, one.pp - rank))
            if one.vpp > 1:
                alive = min(job.micro_batches * one.vpp, 2 * (one.pp - rank - 1) + (one.vpp - 1) * one.pp + 1) / one.vpp
            if schedule == "dualpipev":
                alive = one.pp + 0.5
            activations, messages, scores = of(rank, float(one.pp - rank) if schedule == DUAL else alive)
            if schedule == DUAL:  # two stages, as in `held_bytes`
                other = one.pp - 1 - rank
                optimizer = (optimizer + optimizer_bytes(job, weights[other])) / 2
                held += _static_bytes(job, weights[other]) - (
                    shared_embedding_bytes(job) if rank in (0, one.pp - 1) else 0.0
                )
                more, others, further = of(other, float(rank + 1))
                activations, messages, scores = activations + more, max(messages, others), scores + further
            most = max(most, held + optimizer + activations + brought + messages + scores)
        return most


def _drafts(
    base: Job, layout: ParallelLayout, batch: int, space: Space, timer: _Timer, found: Found
) -> Iterator[_Draft]:
    """For each schedule and micro-batch of a layout the draft that recomputes least and fits."""
    any_fits, last, room = False, "no micro-batch divides the batch", ""
    for vpp, schedule, size, fp8 in product(space.vpp, space.schedules, space.micro_batch_size, space.fp8):
        if (schedule == "interleaved") != (vpp > 1) or batch % (size * layout.dp):
            continue
        if layout.pp == 1 and schedule != "1f1b":
            continue
        micro_batches = batch // (size * layout.dp)
        if reason := impossible(schedule, layout.pp, vpp, micro_batches):
            last = (
                "too few micro-batches for the schedule"
                if "least" in reason
                else "micro-batches do not fill the schedule"
            )
            continue
        try:
            stages = stages_under(schedule, layout.pp, vpp, len(base.model.moe_layer_pattern), _depths(base))
        except Impossible:
            last = "more pipeline stages than layers"
            continue
        job = replace(
            base, layout=replace(layout, vpp=vpp), stages=stages, micro_batch_size=size, micro_batches=micro_batches,
            sequence_parallel=layout.tp > 1, fp8=fp8, fp8_weights_only=base.fp8_weights_only and fp8 is not None,
        )  # fmt: skip
        fitting = _least_recomputed(job, schedule, space, timer)
        if isinstance(fitting, str):
            room = fitting
            continue
        any_fits = True
        for dispatcher in space.dispatchers if base.model.num_experts else space.dispatchers[:1]:
            software = replace(timer.machine.software, dispatcher=dispatcher)
            step = timer.step(fitting, schedule, software)
            yield _Draft(step.seconds / step.tokens, fitting, schedule, software)
    if not any_fits:
        found.refuse(room or last, layout.label)


def _depths(base: Job) -> int:
    return sum(stage.count("m") for stage in base.stages)


@cache
def stages_under(schedule: str, pp: int, vpp: int, layers: int, depths: int) -> list[list[str]]:
    """Items of each chunk, where chunk i stands on rank i % pp. DualPipeV folds the second half of the model back."""
    if schedule != "dualpipev":
        return pipeline.stage_items(None, pp, vpp, layers, depths)
    chunks = pipeline.stage_items(None, pp, 2, layers, depths)
    return [*chunks[:pp], *reversed(chunks[pp:])]


def _static_bytes(job: Job, weights: Weights) -> float:
    """Weights and gradients of a rank."""
    return parameter_bytes(job, weights) + job.grad_bytes * (weights.shared + weights.experts)


def _least_recomputed(job: Job, schedule: str, space: Space, timer: _Timer) -> Job | str:
    """The job with the first set of `space.recompute` that fits, or what it lacks memory for."""
    usable = timer.machine.hardware.offered_bytes
    one = timer.weights(job)
    static = min(_static_bytes(job, w) + optimizer_bytes(job, w) for w in one)
    if static > usable:
        return STATIC
    for mode, modules in space.recompute:
        tried = replace(job, recompute=mode, recompute_modules=modules, recompute_of_chunks=())
        if timer.memory(tried, schedule) <= ESTIMATED * usable:
            return tried
    return "activations need more memory than there is, even with full recomputation"
