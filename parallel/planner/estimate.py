"""Step time and memory of one run on one cluster: the estimate that every command shows. No torch import.

`estimate` is the one way to a step time: moe-plan, its search, moe-submit and the comparison with published runs call
it. What a run is comes in as a `Workload`, what runs it as `Hardware` and `Software`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from parallel.planner.calibration import FITTED, Calibration
from parallel.planner.hardware import Hardware
from parallel.planner.layer_time import Machine
from parallel.planner.memory import StageMemory, Weights, memory_of_ranks, stage_memory
from parallel.planner.software import Software
from parallel.planner.step_time import StepTime, plan_step
from parallel.planner.workload import Workload


@dataclass(frozen=True)
class Estimate:
    """What one step of a workload takes.

    Args:
        workload: layout, micro-batch, recomputation and precision.
        schedule: of the pipeline.
        hardware, software: what it was timed on.
        weights: parameters on one rank of each pipeline rank.
        step: where the time of a step goes.
    """

    workload: Workload
    schedule: str
    hardware: Hardware
    software: Software
    weights: Sequence[Weights]
    step: StepTime

    @cached_property
    def memory(self) -> tuple[StageMemory, ...]:
        """Memory of one rank of each pipeline stage, first to last."""
        return stage_memories(self.workload, self.weights)

    @cached_property
    def memory_of_ranks(self) -> list[float]:
        """Bytes on each pipeline rank: of its stage, or of all that its schedule keeps there."""
        return memory_of_ranks(self.workload, self.schedule, self.memory)

    @property
    def memory_bytes(self) -> float:
        """Memory of the peak rank, bytes."""
        return max(self.memory_of_ranks)

    @property
    def fits(self) -> bool:
        """Whether the peak rank fits what torch can allocate of its accelerator."""
        return self.memory_bytes <= self.hardware.usable_bytes

    @property
    def label(self) -> str:
        """Degrees and choices in one line."""
        size, recomputed = self.workload.micro_batch_size, self.workload.recomputes
        layout = self.workload.layout.label
        return f"{layout} mbs{size} recompute:{recomputed} {self.schedule} {self.software.dispatcher}"


def estimate(
    workload: Workload,
    hardware: Hardware,
    software: Software,
    weights: Sequence[Weights],
    schedule: str | None = None,
    constants: Calibration = FITTED,
    simulated: bool = True,
) -> Estimate:
    """Time and memory of one step.

    Args:
        weights: parameters on one rank of each pipeline rank.
        schedule: one of `parallel.planner.schedules.SCHEDULES`; None is that of Megatron-Core, 1f1b or interleaved.
        constants: of the time model.
        simulated: simulate the pipeline; else estimate it in closed form, some hundred times faster, to within a few %.

    Raises:
        ValueError: the schedule is not defined for the layout.
    """
    chosen = schedule or megatron_schedule(workload)
    step = plan_step(workload, Machine(hardware, software, constants), chosen, weights, simulated)
    return Estimate(workload, chosen, hardware, software, weights, step)


def megatron_schedule(workload: Workload) -> str:
    """The schedule that Megatron-Core runs."""
    return "interleaved" if workload.layout.vpp > 1 else "1f1b"


def stage_memories(workload: Workload, weights: Sequence[Weights]) -> tuple[StageMemory, ...]:
    """Memory of one rank of each pipeline stage, first to last."""
    return tuple(stage_memory(workload, stage, of_rank) for stage, of_rank in enumerate(weights))


def fullest_bytes(workload: Workload, weights: Sequence[Weights], schedule: str | None = None) -> float:
    """Memory of the peak rank alone, bytes, without the time of a step."""
    return max(memory_of_ranks(workload, schedule or megatron_schedule(workload), stage_memories(workload, weights)))
