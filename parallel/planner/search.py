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
from parallel.architecture.attention import attention_kind
from parallel.dispatchers import PLANNED
from parallel.layout import ParallelLayout
from parallel.planner.activations import layer, shared_embedding_bytes
from parallel.planner.calibration import FITTED, Calibration
from parallel.planner.estimate import Estimate, estimate
from parallel.planner.hardware import Hardware
from parallel.planner.layer_time import Machine, Times
from parallel.planner.memory import (
    Weights,
    communication_bytes,
    gradient_bytes,
    logits_bytes,
    optimizer_bytes,
    parameter_bytes,
)
from parallel.planner.schedules import impossible
from parallel.planner.software import Software
from parallel.planner.step_time import StepTime, plan_step
from parallel.planner.workload import Recompute, Workload
from parallel.suggest import Impossible

WeightsOf = Callable[[Workload], Sequence[Weights]]
SoftwareOf = Callable[[Workload], Software]
DUAL = "dualpipe"
SIMULATED = 20  # candidates, at least
# A candidate whose quick estimate exceeds the memory by up to this factor may fit: its stages are then counted exactly.
ESTIMATED = 1.03
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
    dispatchers: Sequence[str] = PLANNED
    fp8: Sequence[str | None] = (None,)


@dataclass
class SearchResult:
    """Plans that fit, fastest first; why layouts do not; how many were looked at."""

    plans: list[Estimate] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    tried: int = 0

    def refuse(self, reason: str, example: str) -> None:
        """Count a layout that does not fit."""
        self.reasons[reason] += 1
        self.examples.setdefault(reason, example)


@dataclass(frozen=True)
class Candidate:
    """A plan before it is simulated."""

    seconds_per_token: float
    workload: Workload
    schedule: str
    software: Software


def search(
    base: Workload, timer: Timer, gpus: int, global_batch_size: int, space: Space, top: int = 10
) -> SearchResult:
    """The fastest plans for `gpus` accelerators. The same arguments give the same plans in the same order.

    Args:
        base: everything that is not searched: model, sequence, formats. Its layout and stages are replaced.
        timer: what the plans are timed on.
        top: how many plans are wanted.
    """
    result = SearchResult()
    candidates: list[Candidate] = []
    for layout in layouts(base, gpus, space, result):
        candidates += _candidates(base, layout, global_batch_size, space, timer, result)
    candidates.sort(key=lambda candidate: (candidate.seconds_per_token, _key(candidate)))
    simulated = max(SIMULATED, 2 * top)  # however few are wanted: the closed form may have the order wrong
    for number, candidate in enumerate(candidates):
        if (number >= simulated and len(result.plans) >= top) or (number >= 3 * simulated and result.plans):
            break
        plan = _simulated(candidate, space, timer)
        if plan.memory_bytes <= timer.hardware.offered_bytes:
            result.plans.append(plan)
        else:
            result.refuse("its stages, each counted exactly, need more memory than there is", plan.label)
    result.plans.sort(key=lambda plan: (plan.step.seconds / plan.step.tokens, plan.label))
    del result.plans[top:]
    return result


def _simulated(candidate: Candidate, space: Space, timer: Timer) -> Estimate:
    """A candidate simulated, with as much more recomputation as its memory, counted stage by stage, asks for."""
    workload = candidate.workload
    plan = timer.simulate(candidate)
    tried = list(space.recompute)
    for mode, modules in tried[tried.index((workload.recompute, workload.recompute_modules)) + 1 :]:
        if plan.memory_bytes <= timer.hardware.offered_bytes:
            break
        recomputed = replace(workload, recompute=mode, recompute_modules=modules)
        plan = timer.simulate(replace(candidate, workload=recomputed))
    return plan


def _key(candidate: Candidate) -> str:
    workload = candidate.workload
    recomputed = f"{workload.recompute} {sorted(workload.recompute_modules)}"
    choices = f"{candidate.schedule} {candidate.software.dispatcher} {workload.fp8}"
    return f"{workload.layout} {workload.micro_batch_size} {recomputed} {choices}"


def layouts(base: Workload, gpus: int, space: Space, result: SearchResult) -> Iterator[ParallelLayout]:
    """Every layout whose degrees fit the model and fill the accelerators."""
    for tp, pp, cp in product(space.tp, space.pp, space.cp):
        if gpus % (tp * pp * cp):
            continue
        dp = gpus // (tp * pp * cp)
        for ep, etp in product(space.ep if base.model.num_experts else (1,), [e for e in space.etp if e in (1, tp)]):
            if (tp * cp * dp) % (ep * etp):
                continue
            result.tried += 1
            layout = ParallelLayout(tp, pp, 1, cp, ep, etp, dp)
            if reason := infeasible_reason(base, layout):
                result.refuse(reason, layout.label)
            else:
                yield layout


def infeasible_reason(base: Workload, layout: ParallelLayout) -> str:
    """Why the model cannot be split so, or an empty string."""
    model = base.model
    if model.num_attention_heads % layout.tp or model.padded_vocab_size % layout.tp:
        return "tp does not divide the heads or the vocabulary"
    kv_heads = attention_kind(model).describe(model).core.kv_heads
    if kv_heads % layout.tp and layout.tp % kv_heads:
        return "tp and the key/value heads do not divide each other"
    if model.num_experts and (model.num_experts % layout.ep or model.moe_ffn_hidden_size % layout.etp):
        return "ep does not divide the experts, or etp their width"
    if layout.cp > 1 and base.seq_length % (2 * layout.cp):
        return "2 x cp does not divide the sequence"
    if len(model.moe_layer_pattern) < pipeline.smallest_num_layers(layout.pp):
        return "more pipeline stages than layers"
    return ""


class Timer:
    """Times candidates on an accelerator, with what does not depend on the pipeline computed once.

    Args:
        software_of: software that a workload runs on.
        weights_of: parameters on one rank of each pipeline rank.
    """

    def __init__(
        self, hardware: Hardware, software_of: SoftwareOf, weights_of: WeightsOf, constants: Calibration = FITTED
    ) -> None:
        self.hardware, self.software_of, self.constants = hardware, software_of, constants
        self.weights_of = weights_of
        self._layer_times: dict[object, dict[object, Times]] = {}
        self._layer_bytes: dict[object, tuple[dict[bool, float], float]] = {}
        self._whole_layer_bytes: dict[object, dict[bool, float]] = {}
        self._stages: dict[object, list[tuple[tuple[str, ...], Counter[bool]]]] = {}
        self._weights: dict[object, Sequence[Weights]] = {}

    def weights(self, workload: Workload) -> Sequence[Weights]:
        """Parameters of each pipeline rank."""
        layout = workload.layout
        key = (layout.tp, layout.pp, tuple(map("".join, workload.stages)), layout.ep, layout.etp)
        if key not in self._weights:
            self._weights[key] = self.weights_of(workload)
        return self._weights[key]

    def layer_bytes(self, workload: Workload) -> tuple[dict[bool, float], float]:
        """Activations of a dense layer and of one with experts, and the largest recomputed activations of one layer."""
        layout = workload.layout
        whole_key = (layout.tp, layout.cp, layout.ep, layout.etp, workload.micro_batch_size, workload.fp8)
        key = (*whole_key, workload.recompute, workload.recompute_modules)
        if key not in self._layer_bytes:
            kinds = [bool(moe) for moe in set(workload.model.moe_layer_pattern)]
            if whole_key not in self._whole_layer_bytes:
                whole = {moe: sum(layer(workload, moe, recompute=False).values()) for moe in kinds}
                self._whole_layer_bytes[whole_key] = whole
            without_recomputation = self._whole_layer_bytes[whole_key]
            saved = dict.fromkeys(
                kinds, float(workload.element * workload.split_tokens * workload.model.hidden_size)
            )  # their input
            if workload.recompute != "full":
                saved = {moe: sum(layer(workload, moe).values()) for moe in kinds}
            self._layer_bytes[key] = saved, max(without_recomputation[moe] - saved[moe] for moe in kinds)
        return self._layer_bytes[key]

    def stages(self, workload: Workload) -> list[tuple[tuple[str, ...], Counter[bool]]]:
        """Items of the chunks of each pipeline rank, and how many layers with experts and without they have."""
        pattern, pp = workload.model.moe_layer_pattern, workload.layout.pp
        key = (tuple("".join(items) for items in workload.stages), pp)
        if key not in self._stages:
            stages_of_ranks: list[tuple[tuple[str, ...], Counter[bool]]] = [
                (key[0][rank::pp], Counter()) for rank in range(pp)
            ]
            first = 0
            for index, items in enumerate(key[0]):
                counts = stages_of_ranks[index % pp][1]
                counts.update(bool(moe) for moe in pattern[first : first + items.count("t")])
                counts[bool(pattern[-1])] += items.count("m")
                first += items.count("t")
            self._stages[key] = stages_of_ranks
        return self._stages[key]

    def step(self, workload: Workload, schedule: str, software: Software) -> StepTime:
        """The step in closed form."""
        layout = workload.layout
        # Layers do not depend on whether their dispatch overlaps with another micro-batch, which vpp decides.
        key = (layout.tp, layout.cp, layout.ep, layout.etp, workload.micro_batch_size, workload.recompute,
               workload.recompute_modules, workload.fp8, replace(software, overlap_all_to_all=False))  # fmt: skip
        kinds = self._layer_times.setdefault(key, {})
        machine = Machine(self.hardware, software, self.constants)
        return plan_step(workload, machine, schedule, self.weights(workload), simulated=False, kinds=kinds)

    def simulate(self, candidate: Candidate) -> Estimate:
        """The estimate of a candidate, with its pipeline simulated."""
        workload, schedule = candidate.workload, candidate.schedule
        weights = self.weights(workload)
        return estimate(workload, self.hardware, candidate.software, weights, schedule, self.constants)

    def memory(self, workload: Workload, schedule: str) -> float:
        """Memory of the first, second, middle or last pipeline rank, bytes: close to `stage_memory`, and quick."""
        layout, weights, ranks = workload.layout, self.weights(workload), self.stages(workload)
        saved, recomputed = self.layer_bytes(workload)

        def activations_of(rank: int, alive: float) -> tuple[float, float, float]:
            items, counts = ranks[rank]
            activations = alive * sum(count * saved[moe] for moe, count in counts.items())
            buffers = communication_bytes(workload, rank, items, round(alive * layout.vpp))
            return activations, buffers, logits_bytes(workload, "".join(items))

        most = 0.0
        for rank in sorted({0, min(1, layout.pp - 1), layout.pp // 2, layout.pp - 1}):
            optimizer, static = optimizer_bytes(workload, weights[rank]), _static_bytes(workload, weights[rank])
            alive = float(min(workload.micro_batches, layout.pp - rank))
            if layout.vpp > 1:
                alive = (
                    min(
                        workload.micro_batches * layout.vpp,
                        2 * (layout.pp - rank - 1) + (layout.vpp - 1) * layout.pp + 1,
                    )
                    / layout.vpp
                )
            if schedule == "dualpipev":
                alive = layout.pp + 0.5
            activations, buffers, logits = activations_of(rank, float(layout.pp - rank) if schedule == DUAL else alive)
            if schedule == DUAL:  # two stages, as in `memory_of_ranks`
                other = layout.pp - 1 - rank
                optimizer = (optimizer + optimizer_bytes(workload, weights[other])) / 2
                static += _static_bytes(workload, weights[other]) - (
                    shared_embedding_bytes(workload) if rank in (0, layout.pp - 1) else 0.0
                )
                more_activations, other_buffers, more_logits = activations_of(other, float(rank + 1))
                activations, buffers, logits = (
                    activations + more_activations,
                    max(buffers, other_buffers),
                    logits + more_logits,
                )
            most = max(most, static + optimizer + activations + recomputed + buffers + logits)
        return most


def _candidates(
    base: Workload, layout: ParallelLayout, batch: int, space: Space, timer: Timer, result: SearchResult
) -> Iterator[Candidate]:
    """For each schedule and micro-batch of a layout the candidate that recomputes least and fits."""
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
        workload = replace(
            base, layout=replace(layout, vpp=vpp), stages=stages, micro_batch_size=size, micro_batches=micro_batches,
            sequence_parallel=layout.tp > 1, fp8=fp8, fp8_weights_only=base.fp8_weights_only and fp8 is not None,
        )  # fmt: skip
        fitting = _least_recomputed(workload, schedule, space, timer)
        if isinstance(fitting, str):
            room = fitting
            continue
        any_fits = True
        for dispatcher in space.dispatchers if base.model.num_experts else space.dispatchers[:1]:
            software = replace(timer.software_of(fitting), dispatcher=dispatcher)
            step = timer.step(fitting, schedule, software)
            yield Candidate(step.seconds / step.tokens, fitting, schedule, software)
    if not any_fits:
        result.refuse(room or last, layout.label)


def _depths(base: Workload) -> int:
    return sum(stage.count("m") for stage in base.stages)


@cache
def stages_under(schedule: str, pp: int, vpp: int, layers: int, depths: int) -> list[list[str]]:
    """Items of each chunk, where chunk i is on rank i % pp. DualPipeV folds the second half of the model back."""
    if schedule != "dualpipev":
        return pipeline.stage_items(None, pp, vpp, layers, depths)
    chunks = pipeline.stage_items(None, pp, 2, layers, depths)
    return [*chunks[:pp], *reversed(chunks[pp:])]


def _static_bytes(workload: Workload, weights: Weights) -> float:
    """Weights and gradients of a rank."""
    return parameter_bytes(workload, weights) + gradient_bytes(workload, weights)


def _least_recomputed(workload: Workload, schedule: str, space: Space, timer: Timer) -> Workload | str:
    """The workload with the first set of `space.recompute` that fits, or what it lacks memory for."""
    usable = timer.hardware.offered_bytes
    weights_of_ranks = timer.weights(workload)
    static = min(_static_bytes(workload, w) + optimizer_bytes(workload, w) for w in set(weights_of_ranks))
    if static > usable:
        return STATIC
    for mode, modules in space.recompute:
        tried = replace(workload, recompute=mode, recompute_modules=modules, recompute_of_chunks=())
        if timer.memory(tried, schedule) <= ESTIMATED * usable:
            return tried
    return "activations need more memory than there is, even with full recomputation"
