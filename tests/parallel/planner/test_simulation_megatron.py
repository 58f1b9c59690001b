"""The simulated pipeline against Megatron-Core's own schedules, timed on CPU ranks whose passes only sleep."""

from __future__ import annotations

import time
from statistics import mean, median

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.layout import ParallelLayout
from parallel.planner.simulation import StageTime, simulate
from tests.distributed.helper import run_distributed

# Seconds of each stage: long beside a message over loopback, uneven on purpose. Sleeping takes no core from the others.
FORWARD, BACKWARD = (0.12, 0.08, 0.10, 0.16), (0.24, 0.16, 0.20, 0.30)
SHAPE = (4, 1, 8)  # [s, b, h]


STEPS = 4
passes: dict[tuple[str, int], list[float]] = {}


def slept(kind: str, stage: int, seconds: float) -> None:
    """Sleep, and note how long it really was: a busy machine wakes late."""
    start = time.monotonic()
    time.sleep(seconds)
    passes.setdefault((kind, stage), []).append(time.monotonic() - start)


class Sleep(torch.autograd.Function):
    """Passes a tensor on, after the time of a forward or of a backward pass."""

    @staticmethod
    def forward(ctx: object, hidden: Tensor, stage: int) -> Tensor:  # type: ignore[override]
        ctx.stage = stage  # type: ignore[attr-defined]
        slept("F", stage, FORWARD[stage % 4])
        return hidden + 1

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        stage: int = ctx.stage  # type: ignore[attr-defined]
        slept("B", stage, BACKWARD[stage % 4])
        return grad, None


class Stage(nn.Module):
    """A model chunk as the schedules want it."""

    def __init__(self, config: object, stage: int) -> None:
        super().__init__()
        from megatron.core.enums import ModelType

        self.config, self.stage, self.model_type = config, stage, ModelType.encoder_or_decoder
        self.weight = nn.Parameter(torch.zeros(SHAPE))
        self.received: Tensor | None = None

    def set_input_tensor(self, received: list[Tensor | None] | Tensor | None) -> None:
        self.received = received[0] if isinstance(received, list) else received

    def forward(self) -> Tensor:
        hidden = self.weight if self.received is None else self.received + self.weight
        out: Tensor = Sleep.apply(hidden, self.stage)
        return out


def hop(rank: int, pp: int) -> float:
    """Seconds of a message to the next rank and back, halved; the median of a few, of the slowest pair."""
    message, taken = torch.zeros(SHAPE), []
    for _ in range(5):
        dist.barrier()
        start = time.monotonic()
        if rank % 2 == 0 and rank + 1 < pp:
            dist.send(message, rank + 1)
            dist.recv(message, rank + 1)
        elif rank % 2:
            dist.recv(message, rank - 1)
            dist.send(message, rank - 1)
        taken.append((time.monotonic() - start) / 2)
    found = torch.tensor(median(taken))
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return float(found)


def timed(pp: int, vpp: int, micro_batches: int) -> tuple[float, float, dict[tuple[str, int], float]]:
    """Of the quickest step: its seconds on the slowest rank, those of a message between ranks around it, and of this
    rank's passes in it, means."""
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer import TransformerConfig

    from parallel import groups
    from parallel.runtime import cpu

    cpu.prepare()
    groups.create(ParallelLayout(1, pp, vpp, 1, 1, 1, 1), seed=1)
    config = TransformerConfig(
        num_layers=pp * vpp, hidden_size=SHAPE[2], num_attention_heads=1, pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None, pipeline_dtype=torch.float32,
        deallocate_pipeline_outputs=False, overlap_p2p_comm=False, batch_p2p_comm=False,
    )  # fmt: skip
    rank = dist.get_rank()
    chunks = [Stage(config, chunk * pp + rank) for chunk in range(vpp)]

    def step(_: object, chunk: Stage) -> tuple[Tensor, object]:
        return chunk(), lambda out: (out.sum(), torch.tensor(1, dtype=torch.int), {"loss": torch.zeros(2)})

    best, found = float("inf"), (0.0, passes)
    for _ in range(STEPS):
        message = hop(rank, pp)
        passes.clear()
        dist.barrier()
        start = time.monotonic()
        get_forward_backward_func()(
            forward_step_func=step, data_iterator=[None] * vpp if vpp > 1 else None,
            model=chunks if vpp > 1 else chunks[0], num_microbatches=micro_batches, seq_length=SHAPE[0],
            micro_batch_size=SHAPE[1], forward_only=False,
        )  # fmt: skip
        taken = torch.tensor(time.monotonic() - start)
        dist.all_reduce(taken, op=dist.ReduceOp.MAX)
        if float(taken) < best:
            best, found = float(taken), (message, {key: list(values) for key, values in passes.items()})
    groups.destroy()
    return best, found[0], {key: mean(values) for key, values in found[1].items()}


@pytest.mark.slow
@pytest.mark.parametrize(("pp", "vpp", "micro_batches"), [(2, 1, 4), (4, 1, 6), (4, 1, 12), (2, 2, 4), (4, 2, 8)])
def test_the_simulation_agrees_with_a_timed_run(pp: int, vpp: int, micro_batches: int) -> None:
    schedule = "interleaved" if vpp > 1 else "1f1b"
    found = run_distributed(timed, pp, pp, vpp, micro_batches)
    taken = {key: value for _, _, own in found for key, value in own.items()}
    times = [StageTime(taken["F", stage], taken["B", stage], 0.0) for stage in range(pp * vpp)]
    expected = simulate(schedule, pp, vpp, micro_batches, times, send=found[0][1]).seconds
    assert found[0][0] == pytest.approx(expected, rel=0.10)
