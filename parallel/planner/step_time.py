"""Time of one training step, from the configuration alone. Pure functions; no torch import.

Layers make stages (`parallel.planner.layer_time`), stages make a pipeline (`parallel.planner.simulation`). After the
pipeline come the exposed parts of gradient reduction and parameter gathering, and the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import log2

from parallel.fp8_recipes import RECIPES
from parallel.planner import kernels, network
from parallel.planner.hardware import MICRO
from parallel.planner.layer_time import Machine, Times, embedding_times, layer_times, loss_times, mtp_times, total
from parallel.planner.memory import Weights
from parallel.planner.network import Group
from parallel.planner.simulation import StageTime, Timeline, estimated, step_time
from parallel.planner.workload import Recompute, Workload


@dataclass(frozen=True)
class StepTime:
    """Where one step's time goes, seconds.

    Args:
        seconds: the whole step.
        pipeline: the simulated pipeline.
        stages: time of each stage for one micro-batch.
        optimizer: the update itself.
        data_parallel: gradient reduction and parameter gathering that nothing hides.
        step_end: gradient norm, logging and synchronisation at the end of a step.
        parts: seconds of a mean rank over the step by part (gemm, attention, ...), exposed messages included.
        tokens: tokens of the step.
        gpus: ranks of the run.
    """

    seconds: float
    pipeline: Timeline
    stages: tuple[StageTime, ...]
    optimizer: float
    data_parallel: float
    step_end: float
    parts: dict[str, float]
    tokens: int
    gpus: int

    @property
    def components(self) -> dict[str, float]:
        """Seconds of a mean rank, as arXiv 2505.09343, table 4 divides a step: passes that run alone, pairs, bubble."""
        seconds = dict.fromkeys(("1F", "bubble", "1B", "1W", "1F1B", "optimizer"), 0.0)
        names = {"F": "1F", "B": "1B", "I": "1B", "W": "1W", "FB": "1F1B"}
        for kinds in self.pipeline.by_kind:
            for kind, value in kinds.items():
                seconds[names[kind]] += value / len(self.pipeline.by_kind)
        seconds["bubble"] = self.pipeline.bubble
        seconds["optimizer"] = self.optimizer + self.data_parallel + self.step_end
        return seconds

    @property
    def tokens_per_s_per_gpu(self) -> float:
        """Throughput of one GPU."""
        return self.tokens / self.seconds / self.gpus


def plan_step(
    workload: Workload,
    machine: Machine,
    schedule: str,
    weights: Sequence[Weights],
    simulated: bool = True,
    kinds: dict[object, Times] | None = None,
) -> StepTime:
    """Time of one step.

    Args:
        schedule: one of `parallel.planner.schedules.SCHEDULES`.
        weights: parameters on one rank of each pipeline rank (of one of DualPipe's two copies).
        kinds: times of layers that are already known, for workloads that differ in the pipeline alone; it is added to.
        simulated: simulate the pipeline; else estimate it in closed form, some hundred times faster, to within a few %.

    Raises:
        ValueError: the schedule is not defined for the layout.
    """
    layout = workload.layout
    counted = stage_parts(workload, machine, weights, {} if kinds is None else kinds)
    different = {id(times): times for times in counted}
    seconds_of = {key: stage_time(workload, machine, schedule, times) for key, times in different.items()}
    stages = tuple(seconds_of[id(times)] for times in counted)
    if schedule == "dualpipev":  # chunks in the order of ranks -> stages in the order of the model
        stages = (*stages[: layout.pp], *reversed(stages[layout.pp :]))
    message = workload.element * workload.split_tokens * workload.model.hidden_size
    hop = network.send(machine.hardware, Group(layout.pp, layout.world_size // layout.pp), message)
    exposed_fraction = machine.constants.pp_exposed if schedule != "1f1b" else 1.0
    run = step_time if simulated else estimated
    timeline = run(schedule, layout.pp, layout.vpp, workload.micro_batches, stages, hop * exposed_fraction)
    copies = 2 if schedule == "dualpipe" else 1
    optimizer = max(optimizer_seconds(workload, machine, of_rank) for of_rank in set(weights)) * copies
    data_parallel = max(
        data_parallel_seconds(workload, machine, of_rank, backward * layout.vpp)
        for of_rank, backward in {(of_rank, stages[rank].backward) for rank, of_rank in enumerate(weights)}
    )
    seconds = timeline.seconds + optimizer + data_parallel * copies + machine.constants.step_s
    tokens = workload.micro_batches * workload.micro_batch_size * workload.seq_length * layout.dp
    parts = step_parts(workload, counted) if simulated else {}
    return StepTime(
        seconds, timeline, stages, optimizer, data_parallel * copies, machine.constants.step_s, parts,
        tokens, layout.world_size,
    )  # fmt: skip


def stage_parts(
    workload: Workload, machine: Machine, weights: Sequence[Weights], kinds: dict[object, Times]
) -> list[Times]:
    """The parts of each of the pp x vpp stages for one micro-batch. Stages of the same layers share one object."""
    parts: list[Times] = []
    by_content: dict[object, Times] = {}
    passed = 0
    pattern = workload.model.moe_layer_pattern
    for index, items in enumerate(workload.stages):
        layers = range(passed, passed + items.count("t"))
        passed += len(layers)
        held = weights[index % workload.layout.pp] if workload.fsdp else None
        # The content of a stage: recomputation, layers, those of them in bf16, other items, gathered weights.
        key = (
            index % len(workload.recompute_of_chunks) if workload.recompute_of_chunks else 0,
            tuple(pattern[layers.start : layers.stop]),
            tuple(place for place, number in enumerate(layers) if number in workload.bf16_layers),
            tuple(items.count(item) for item in "EmL"),
            held,
        )
        if key not in by_content:
            times = parts_of_stage(workload.of_chunk(index), machine, items, layers, kinds)
            if held is not None:
                gather_weights(workload, machine, times, held)
            by_content[key] = times
        parts.append(by_content[key])
    return parts


def parts_of_stage(
    chunk: Workload, machine: Machine, items: Sequence[str], layers: range, kinds: dict[object, Times]
) -> Times:
    """The parts of a stage with these layers of the model (from 0)."""
    times, pattern = Times(), chunk.model.moe_layer_pattern
    recomputation = (chunk.recompute, chunk.recompute_modules)
    kinds_of_layers = [
        (
            bool(pattern[number]),
            chunk.recompute != "full" or chunk.recompute_method == "uniform" or place < chunk.recompute_num_layers,
            chunk.of_layer(number).fp8,
            recomputation,
        )
        for place, number in enumerate(layers)
    ]

    def cached(kind: object, calculate: Callable[[], Times]) -> Times:
        if kind not in kinds:
            kinds[kind] = calculate()
        return kinds[kind]

    def layer(kind: tuple[bool, bool, str | None, Recompute]) -> Times:
        moe, recomputes, fp8, _ = kind

        def times_of_layer() -> Times:
            of_layer = replace(chunk, fp8=fp8) if recomputes else replace(chunk, recompute="none")
            return layer_times(of_layer, machine, moe)

        return cached(kind, times_of_layer)

    def loss() -> Times:
        return cached(("L", recomputation), lambda: loss_times(chunk, machine))

    def mtp() -> Times:
        last_layer = layer((bool(pattern[-1]), True, chunk.fp8, recomputation))
        return mtp_times(chunk, machine, last_layer, loss())

    for kind in dict.fromkeys(kinds_of_layers):
        times.plus(layer(kind), kinds_of_layers.count(kind))
    if "E" in items:
        times.plus(cached(("E", recomputation), lambda: embedding_times(chunk, machine)), items.count("E"))
    if "m" in items:
        times.plus(cached(("m", recomputation), mtp), items.count("m"))
    if "L" in items:
        times.plus(loss(), items.count("L"))
    return times


def gather_weights(workload: Workload, machine: Machine, times: Times, weights: Weights) -> None:
    """FSDP: weights of the stage gathered in the forward and the backward pass, gradients scattered in the latter."""
    layout, hardware = workload.layout, machine.hardware
    element = 1 if workload.fp8_weights_only else workload.element
    shared, experts = weights.shared * element / layout.vpp, weights.experts * element / layout.vpp
    gathering = network.ring(hardware, Group(layout.dp * layout.cp, layout.tp), shared)
    gathering += network.ring(hardware, Group(layout.edp, layout.ep * layout.etp), experts)
    floor = machine.constants.fsdp_exposed
    compute_forward = total(times.forward)
    compute_backward = total(times.inputs) + total(times.weights) + total(times.recompute)
    exposed_forward = max(gathering - compute_forward, floor * gathering)
    exposed_backward = max(2 * gathering - compute_backward, floor * 2 * gathering)
    times.add("fsdp", exposed_forward, exposed_backward, 0.0)


def stage_time(workload: Workload, machine: Machine, schedule: str, times: Times) -> StageTime:
    """Forward and backward pass of one micro-batch on one stage."""
    software, constants = machine.software, machine.constants
    forward = total(times.forward, without=["all_to_all"])
    inputs = total(times.inputs, without=["all_to_all"]) + total(times.recompute, without=["all_to_all"])
    weights = total(times.weights)
    sent, returned = times.forward.get("all_to_all", 0.0), times.inputs.get("all_to_all", 0.0)
    returned += times.recompute.get("all_to_all", 0.0)
    # Every collective waits for the slowest of its ranks, of which there are more in a larger run.
    slower = 1 + constants.straggler * log2(max(1, workload.layout.world_size))
    forward, inputs, weights, sent, returned = (slower * t for t in (forward, inputs, weights, sent, returned))
    # Where a layer waits for token counts, its host cannot run ahead, and the two add up in part.
    blend = constants.sync_blend if "sync" in times.forward else constants.host_blend
    forward = _blend(forward, _host(machine, times.kernels_forward, times.graphed_forward), blend)
    backward = _blend(inputs + weights, _host(machine, times.kernels_backward, times.graphed_backward), blend)
    weights *= backward / (inputs + weights) if inputs + weights else 1.0
    if software.graphs != "full":
        forward, backward = (seconds + constants.pass_us * MICRO for seconds in (forward, backward))
    if schedule in ("dualpipe", "dualpipev") and software.overlap_all_to_all:
        slowed = (forward + backward) / (1 - software.communication_sms)
        overlapped = max(slowed, sent + returned)  # dispatch has multiprocessors of its own
        sequential = forward + sent + backward + returned
        return StageTime(forward + sent, backward + returned, weights, overlapped / sequential if sequential else 1.0)
    # Dispatch hides only where passes of two micro-batches run concurrently (Megatron-Core requires vpp > 1).
    if software.overlap_all_to_all and (schedule == "interleaved" or workload.layout.pp == 1):
        exposed, rest = constants.all_to_all_exposed, 1 - software.communication_sms
        return StageTime(forward / rest + exposed * sent, backward / rest + exposed * returned, weights / rest)
    return StageTime(forward + sent, backward + returned, weights)


def _host(machine: Machine, kernels: float, graphed: float) -> float:
    """Seconds in which the host starts so many kernels, some of them within the scope of partial CUDA graphs."""
    software, constants = machine.software, machine.constants
    if software.graphs == "full":
        return 0.0
    if software.graphs == "scoped":
        kernels -= (1 - constants.graph_kernels) * graphed
    splits = software.overlap_all_to_all and software.graphs == "none"
    slower = constants.overlap_host if splits else 1.0
    return constants.host_us * MICRO * slower * kernels


def _blend(device: float, host: float, power: float) -> float:
    """The longer of the two, smoothly: what the host starts late is late on the accelerator only in part."""
    return (device**power + host**power) ** (1 / power)


def optimizer_seconds(workload: Workload, machine: Machine, weights: Weights) -> float:
    """Adam over this rank's part, and casts of the new weights."""
    layout = workload.layout
    if workload.distributed_optimizer or workload.fsdp:
        updated = weights.shared / (layout.dp * layout.cp) + weights.experts / layout.edp
    else:
        updated = weights.shared + weights.experts
    if workload.frozen:
        return 0.0
    # read gradient, read and write two moments and the main weight, write the weight
    bytes_of_parameter = workload.grad_bytes + 4 * workload.moment_bytes + 8 + workload.element
    cast = 2 * workload.element * (weights.shared + weights.experts)
    # Twice: the norm of the gradient reads all of it first.
    return kernels.memory(machine.hardware, 2 * bytes_of_parameter * updated + cast)


def data_parallel_seconds(workload: Workload, machine: Machine, weights: Weights, backward: float) -> float:
    """Reduction of gradients and gathering of parameters beyond what the passes around them hide."""
    layout, software, constants = workload.layout, machine.software, machine.constants
    if workload.fsdp or workload.frozen:
        return 0.0
    dense, expert = Group(layout.dp * layout.cp, layout.tp), Group(layout.edp, layout.ep * layout.etp)

    def ring_seconds(element: float) -> float:
        seconds = network.ring(machine.hardware, dense, element * weights.shared)
        return seconds + network.ring(machine.hardware, expert, element * weights.experts)

    gathers_fp8 = (
        workload.fp8_weights_only and workload.fp8 is not None and not RECIPES[workload.fp8].gathers_high_precision
    )
    reduce, gather = ring_seconds(workload.grad_bytes), ring_seconds(1.0 if gathers_fp8 else workload.element)
    if not workload.distributed_optimizer:
        reduce, gather = 2 * reduce, 0.0
    if not software.overlap_dp:
        return reduce + gather
    rest = max(0.0, reduce - backward) + max(0.0, gather - backward / 2)
    return max(constants.dp_exposed * (reduce + gather), rest)


def step_parts(workload: Workload, counted: Sequence[Times]) -> dict[str, float]:
    """Seconds of a mean pipeline rank in each part over a whole step, before any overlap."""
    parts: dict[str, float] = {}
    scale = workload.micro_batches / workload.layout.pp
    for times in counted:
        for table in (times.forward, times.inputs, times.weights, times.recompute):
            for name, value in table.items():
                key = "recompute" if table is times.recompute else name
                parts[key] = parts.get(key, 0.0) + scale * value
    return parts
