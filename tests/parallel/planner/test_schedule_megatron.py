"""The simulated pipeline against Megatron-Core's own schedules, timed on CPU ranks whose passes only sleep."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.layout import ParallelLayout
from parallel.planner.schedule import StageTime, simulate
from tests.distributed.helper import run_distributed

# Seconds of each stage: long beside a message over loopback, uneven on purpose. Sleeping takes no core from the others.
FORWARD, BACKWARD = (0.06, 0.04, 0.05, 0.08), (0.12, 0.08, 0.10, 0.15)
SHAPE = (4, 1, 8)  # [s, b, h]


class Sleep(torch.autograd.Function):
    """Passes a tensor on, after the time of a forward or of a backward pass."""

    @staticmethod
    def forward(ctx: object, hidden: Tensor, forward: float, backward: float) -> Tensor:  # type: ignore[override]
        ctx.backward_s = backward  # type: ignore[attr-defined]
        time.sleep(forward)
        return hidden + 1

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        time.sleep(ctx.backward_s)  # type: ignore[attr-defined]
        return grad, None, None


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
        out: Tensor = Sleep.apply(hidden, FORWARD[self.stage % 4], BACKWARD[self.stage % 4])
        return out


def timed(pp: int, vpp: int, micro_batches: int) -> float:
    """Seconds of one step, the best of three, on the slowest rank."""
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

    best = torch.tensor(float("inf"))
    for _ in range(3):
        dist.barrier()
        start = time.monotonic()
        get_forward_backward_func()(
            forward_step_func=step, data_iterator=[None] * vpp if vpp > 1 else None,
            model=chunks if vpp > 1 else chunks[0], num_microbatches=micro_batches, seq_length=SHAPE[0],
            micro_batch_size=SHAPE[1], forward_only=False,
        )  # fmt: skip
        taken = torch.tensor(time.monotonic() - start)
        dist.all_reduce(taken, op=dist.ReduceOp.MAX)
        best = torch.minimum(best, taken)
    groups.destroy()
    return float(best)


@pytest.mark.slow
@pytest.mark.parametrize(("pp", "vpp", "micro_batches"), [(2, 1, 4), (4, 1, 6), (4, 1, 12), (2, 2, 4), (4, 2, 8)])
def test_the_simulation_agrees_with_a_timed_run(pp: int, vpp: int, micro_batches: int) -> None:
    schedule = "interleaved" if vpp > 1 else "1f1b"
    times = [StageTime(FORWARD[s % 4], BACKWARD[s % 4], 0.0) for s in range(pp * vpp)]
    expected = simulate(schedule, pp, vpp, micro_batches, times).seconds
    measured = run_distributed(timed, pp, pp, vpp, micro_batches)[0]
    assert measured == pytest.approx(expected, rel=0.10)
