"""All experts in one grouped GEMM are upstream's experts one by one: same numbers, same checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint import small_run
from tests.distributed.helper import run_distributed

COUNTS: dict[str, list[int]] = {
    "even": [16] * 16,
    "uneven": [0, 37, 1, 0, 129, 5, 64, 17, 3, 0, 300, 2, 40, 9, 1, 70],
    "only the last": [0] * 15 + [23],
    "only the first": [23] + [0] * 15,
    "none at all": [0] * 16,
}


def expert_modules(grouped: str) -> Any:
    """The experts of the last layer of the tiny model, with weights that do not depend on how they are stored."""
    from moe_train.model.init import initialise
    from parallel.runtime import cpu
    from tests.model.tiny import build_tiny, tiny_config

    cpu.prepare()
    chunks = build_tiny(f"backend.grouped_gemm={grouped}")
    initialise(chunks, tiny_config().model, seed=7)
    return chunks[0].decoder.layers[-1].mlp.experts


def weights_and_gradients(experts: Any, linear: str) -> tuple[torch.Tensor, torch.Tensor]:
    """[experts, out, in] of weights and of their gradients, however they are stored."""
    if hasattr(experts, "local_experts"):
        weights = [getattr(expert, linear).weight for expert in experts.local_experts]
        gradients = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
        return torch.stack(list(weights)), torch.stack(gradients)
    weight = getattr(experts, linear).weight
    return weight, weight.grad


def forward_and_backward(counts: list[int], dtype: torch.dtype) -> dict[str, list[torch.Tensor]]:
    """Each tensor of a step through grouped experts and through experts one by one, by its name."""
    from parallel import groups

    found: dict[str, list[torch.Tensor]] = {}
    for grouped in ("null", "false"):
        experts = expert_modules(grouped).to(dtype)
        groups.destroy()
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randn(sum(counts), 64, generator=generator).to(dtype).requires_grad_()
        probs = torch.rand(sum(counts), generator=generator).requires_grad_()
        output, bias = experts(tokens, torch.tensor(counts), probs)
        assert bias is None
        output.backward(torch.randn(output.shape, generator=generator).to(dtype))
        result = {"output": output, "tokens": tokens.grad, "probabilities": probs.grad}
        for linear in ("linear_fc1", "linear_fc2"):
            result[linear], result[f"gradient of {linear}"] = weights_and_gradients(experts, linear)
        for name, tensor in result.items():
            found.setdefault(name, []).append(tensor.detach())
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", COUNTS)
def test_grouped_experts_compute_what_experts_one_by_one_do(counts: str, dtype: torch.dtype) -> None:
    """Outputs and every gradient, with experts that get nothing; the initial weights are the same bit by bit."""
    (found,) = run_distributed(forward_and_backward, 1, COUNTS[counts], dtype)
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    assert len(found) == 7
    for name, (grouped, one_by_one) in found.items():
        assert grouped.shape == one_by_one.shape
        if name in ("linear_fc1", "linear_fc2"):
            assert torch.equal(grouped, one_by_one), name
            assert grouped.std() > 0.01
        else:
            scale = one_by_one.abs().max() if one_by_one.numel() else 0
            assert torch.allclose(grouped, one_by_one, rtol=0, atol=float(tolerance * scale)), name


def sharded_names(grouped: str, *overrides: str) -> list[Any]:
    """Name, shapes, offsets and replica of every piece of an expert in a checkpoint."""
    from megatron.core import parallel_state as ps
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    from parallel import groups
    from parallel.runtime import cpu
    from tests.model.tiny import build_tiny

    cpu.prepare()
    (chunk,) = build_tiny(f"backend.grouped_gemm={grouped}", *overrides)
    group = ps.get_data_parallel_group(with_context_parallel=True)
    state = chunk.sharded_state_dict(metadata={"singleton_local_shards": False, "dp_cp_group": group})
    apply_factories(state)
    shards = [x for x in nested_values(state) if isinstance(x, ShardedTensor) and ".experts." in x.key]
    groups.destroy()
    return sorted((x.key, x.global_shape, x.global_offset, x.local_shape, x.replica_id) for x in shards)


@pytest.mark.parametrize("layout", [(), ("parallel.tp=2", "parallel.etp=2"), ("parallel.ep=2",)], ids=str)
def test_checkpoints_have_the_same_pieces(layout: tuple[str, ...]) -> None:
    """On every rank of a layout."""
    world = 2 if layout else 1
    grouped = run_distributed(sharded_names, world, "true", *layout)
    assert grouped == run_distributed(sharded_names, world, "false", *layout)
    names = {name.partition(".mlp.")[2] for name, *_ in grouped[0]}
    assert names == {"experts.experts.linear_fc1.weight", "experts.experts.linear_fc2.weight"}


@pytest.mark.parametrize(
    ("saved", "continued", "optimizer"),
    [(True, False, True), (False, True, True), (True, False, False), (False, True, False)],
)
def test_checkpoints_go_both_ways(tmp_path: Path, saved: bool, continued: bool, optimizer: bool) -> None:
    """Written in one layout with one kind of experts, read in another with the other: weights, moments and the rest of
    the run are those of the run that was not interrupted, with the distributed optimizer and without."""
    plain = {"parallel__distributed_optimizer": optimizer}
    before = run_distributed(small_run.save_halfway, 2, tmp_path, {"ep": 2}, {"backend__grouped_gemm": saved, **plain})
    after = run_distributed(small_run.continue_halfway, 1, tmp_path, {}, {"backend__grouped_gemm": continued, **plain})
    moments = {name: sums for name, sums in before[0]["halfway"].items() if ".exp_avg_sq." in name}
    assert any("mlp.experts.experts.linear_fc1" in name and sums[1] > 0 for name, sums in moments.items())
    assert after[0]["halfway"].keys() == before[0]["halfway"].keys()
    for name, sums in before[0]["halfway"].items():
        assert after[0]["halfway"][name] == pytest.approx(sums, rel=1e-12, abs=1e-9), name
    assert after[0]["losses"] == pytest.approx(before[0]["losses"], rel=1e-5)
