"""Bytes kept for the backward pass: each storage once, no parameters, what is left of what was discarded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_train.telemetry.saved_tensors import SavedTensors, static_bytes
from tests.checkpoint.small_run import batches, config, prepare
from tests.distributed.helper import run_distributed


class Twice(nn.Module):
    """x W^T + x V^T: both linear layers keep x."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 4, bias=False), nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(x)


class Discards(nn.Module):
    """Keeps exp(x) and then throws its storage away, as recomputation does."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.exp()
        result = y * 2.0
        y.untyped_storage().resize_(0)
        return result


def measured(module: nn.Module, x: Tensor) -> int:
    saved = SavedTensors([module])
    saved.start()
    module(x)
    return saved.stop()


def test_a_shared_storage_counts_once_and_parameters_do_not() -> None:
    assert measured(Twice(), torch.rand(3, 8, requires_grad=True)) == 3 * 8 * 4


def test_what_was_discarded_counts_as_nothing() -> None:
    assert measured(Discards(), torch.rand(5, requires_grad=True)) == 0


def test_only_the_first_pass_with_gradients_counts() -> None:
    """An evaluation before the first step, and later micro-batches, are not measured; no hook stays."""
    module, x = Twice(), torch.rand(3, 8, requires_grad=True)
    saved = SavedTensors([module])
    saved.start()
    with torch.no_grad():
        module(torch.rand(100, 8))
    module(x)
    module(torch.rand(50, 8, requires_grad=True))
    assert saved.stop() == 3 * 8 * 4
    module(x).sum().backward()
    assert x.grad is not None
    assert not module._forward_hooks
    assert not module._forward_pre_hooks


def test_gradients_are_those_without_measuring() -> None:
    module = Twice()
    x = torch.rand(3, 8, requires_grad=True)
    module(x).sum().backward()
    expected = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    module.zero_grad()
    saved = SavedTensors([module])
    saved.start()
    module(x).sum().backward()
    saved.stop()
    assert all(torch.equal(p.grad, g) for p, g in zip(module.parameters(), expected, strict=True) if p.grad is not None)


def measured_run(directory: Path, degrees: dict[str, int], changes: dict[str, Any]) -> dict[str, Any]:
    """What a small run of one step keeps and what is predicted, on this rank."""
    from moe_train.loop.step import train_step
    from moe_train.model.memory import predict, workload_of
    from parallel.planner.memory import saved_per_micro_batch

    # One pass is measured, but a pipeline of two ranks runs no fewer than two.
    cfg = config(directory, degrees, batch__global_batch_size=2, **changes)
    run = prepare(cfg)
    stage = run.layout.coordinates(run.rank.rank).pp
    saved = SavedTensors(chunk.module for chunk in run.chunks)
    saved.start()
    train_step(run, batches(run))
    kept, static = saved.stop(), static_bytes(run.chunks, run.optimizer)
    memory = predict(cfg, run.layout)[stage]
    return {
        "kept": kept,
        "predicted": saved_per_micro_batch(workload_of(cfg, run.layout), stage),
        "static": static,
        "predicted_static": (memory.parameters, memory.gradients, memory.optimizer),
    }


LAYOUTS: dict[str, dict[str, int]] = {
    "single": {}, "tp2": {"tp": 2}, "pp2": {"pp": 2}, "pp2 vpp2": {"pp": 2, "vpp": 2}, "ep2": {"ep": 2},
    "cp2": {"cp": 2},
}  # fmt: skip
GQA: dict[str, Any] = {"model__attention": "gqa", "model__head_dim": 16, "model__num_query_groups": 2}
CHANGES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"precision__dtype": "bf16"},
    "bf16 gradients": {"precision__dtype": "bf16", "precision__grad_reduce_fp32": False},
    "bf16 moments": {"precision__dtype": "bf16", "precision__moments_dtype": "bf16"},
    "gqa": GQA,
    "long": {"train__seq_length": 544},  # attention keeps no probabilities
    "long gqa": {**GQA, "train__seq_length": 544},
    "half rotary": {**GQA, "model__rotary_percent": 0.5, "model__qkv_bias": True},
    "gated, best expert of a group": {
        "model__shared_expert_gate": True,
        "model__shared_expert_ffn_hidden_size": 48,
        "model__router_num_groups": 4,
        "model__router_topk_groups": 2,
        "model__router_group_score": "max",
    },
    "experts one by one": {"backend__grouped_gemm": False},
    "full": {"recompute__mode": "full"},
    "deepseek": {
        "recompute__mode": "selective",
        "recompute__modules": ["layernorm", "mla_up_proj", "moe_act", "shared_experts"],
    },
    "moe": {"recompute__mode": "selective", "recompute__modules": ["moe", "mlp", "core_attn"]},
}


def all_measured(directory: Path, degrees: dict[str, int]) -> dict[str, dict[str, Any]]:
    """`measured_run` for every change."""
    return {name: measured_run(directory, degrees, changes) for name, changes in CHANGES.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_prediction_is_what_is_measured(layout: str, tmp_path: Path) -> None:
    """Activations to 1 %, parameters and gradients to the byte, optimizer state to the byte over all ranks.

    Routing decides which of the ep ranks gets more tokens, so activations are compared as a total over ranks.
    """
    degrees = LAYOUTS[layout]
    world = max(degrees.values(), default=1)
    ranks = run_distributed(all_measured, world, tmp_path, degrees, timeout_s=300)
    for name in CHANGES:
        found = [rank[name] for rank in ranks]
        kept, predicted = (sum(one[key] for one in found) for key in ("kept", "predicted"))
        assert predicted == pytest.approx(kept, rel=0.01), name
        for part in range(2):
            assert [one["static"][part] for one in found] == [one["predicted_static"][part] for one in found], name
        optimizer = sum(one["static"][2] for one in found)
        assert sum(one["predicted_static"][2] for one in found) == optimizer, name
