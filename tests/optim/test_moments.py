"""Adam moments in bf16: unbiased when rounded at random, close to fp32 in training, and kept by checkpoints."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from moe_train.config.resolve import resolve
from moe_train.optim.moments import AdamWithBf16Moments, round_stochastically
from tests.checkpoint import small_run
from tests.distributed.helper import run_distributed

BF16: dict[str, Any] = {"precision__moments_dtype": "bf16"}
RANDOM = BF16 | {"precision__stochastic_rounding": True}


def rounded(values: torch.Tensor, seed: int, draw: int) -> torch.Tensor:
    values = values.clone()
    round_stochastically(values, seed, draw)
    return values


def test_stochastic_rounding_is_unbiased() -> None:
    """The mean of 1,000 draws is the value itself, to five standard errors, and every draw is a neighbour in bf16."""
    torch.manual_seed(0)
    values = torch.randn(2000) * torch.logspace(-12, 3, 2000)
    draws = torch.stack([rounded(values, 1234, draw) for draw in range(1000)])
    assert torch.equal(draws, draws.bfloat16().float())
    lower = (values.view(torch.int32) & -0x10000).view(torch.float32)
    unit = ((values.view(torch.int32) & -0x10000) + 0x10000).view(torch.float32) - lower
    up = (draws - lower) / unit
    assert set(up.unique().tolist()) == {0.0, 1.0}
    share = (values - lower) / unit  # how far a value is on the way to its upper neighbour
    error = (up.mean(dim=0) - share) / (share * (1 - share) / len(draws)).sqrt().clamp(min=1e-2)
    assert error.abs().max() < 5
    assert abs(float((up - share).mean())) < 5 * 0.5 / (up.numel() ** 0.5)


def test_stochastic_rounding_leaves_what_bf16_can_hold() -> None:
    exact = torch.tensor([0.0, -0.0, 1.5, -3.0, float("inf"), -float("inf"), 2.0**-130])
    assert all(torch.equal(rounded(exact, 1, draw), exact) for draw in range(50))
    nan = torch.tensor([0x7FFFFFFF, 0x7FC00000], dtype=torch.int32).view(torch.float32)
    assert rounded(nan, 1, 1).isnan().all()
    other = torch.full((64,), 1.001)
    assert len({float(rounded(other, seed, 1)[0]) for seed in range(50)}) == 2, "the seed does not matter"


def second_moment(seed: int | None) -> float:
    """Mean over a parameter whose squared gradients are 1 on average after they were 0.5 for long."""
    weight = torch.nn.Parameter(torch.zeros(1000))
    optimizer = AdamWithBf16Moments([{"params": [weight], **torch.optim.AdamW([weight]).defaults}], seed)
    optimizer.state[weight]["exp_avg_sq"].fill_(0.5)
    for _ in range(200):
        # They differ, as they do in training: equal values are rounded alike.
        weight.grad = torch.linspace(0.5, 1.5, 1000).sqrt()
        optimizer.step()
    return float(optimizer.state[weight]["exp_avg_sq"].float().mean())


def test_small_steps_add_up_when_rounded_at_random() -> None:
    """1 - 0.5 * 0.999^200 = 0.591; to the nearest the second moment stands still."""
    assert second_moment(None) == 0.5
    assert second_moment(7) == pytest.approx(1 - 0.5 * 0.999**200, rel=2e-3)


def losses(run_dir: Path, degrees: dict[str, int], changes: dict[str, Any]) -> list[float]:
    """Of 30 steps."""
    steps = {"schedule__decay_steps": 30, "optimizer__lr": 3e-3, "train__steps": 30}
    run = small_run.prepare(small_run.config(run_dir, degrees, **steps, **changes))
    found = small_run.train(run, 30)
    dtypes = {state[name].dtype for state in states(run) for name in ("exp_avg", "exp_avg_sq")}
    assert dtypes == {torch.bfloat16 if changes else torch.float32}
    return found


def states(run: Any) -> list[dict[str, torch.Tensor]]:
    """Optimizer state of every parameter of this rank."""
    from moe_train.checkpoint.state import optimizers

    return [state for optimizer in optimizers(run) for state in optimizer.optimizer.state.values()]


@pytest.mark.slow
def test_losses_are_close_to_those_of_fp32_moments(tmp_path: Path) -> None:
    """Within 0.5 % at each of 30 steps (0.08 % to the nearest, 0.20 % at random), and yet not the same."""
    (exact,) = run_distributed(losses, 1, tmp_path, {}, {})
    found = {name: run_distributed(losses, 1, tmp_path, {}, changes)[0] for name, changes in
             (("nearest", BF16), ("random", RANDOM))}  # fmt: skip
    assert found["nearest"] != found["random"]
    for name, curve in found.items():
        worst = max(abs(a / b - 1) for a, b in zip(curve, exact, strict=True))
        assert 0 < worst < 5e-3, f"{name}: {worst}"


def test_a_resume_is_bit_identical_and_other_layouts_continue(tmp_path: Path) -> None:
    """Saved by the distributed optimizer of two ranks; read by it, and by the plain one on one rank."""
    before = run_distributed(small_run.save_halfway, 2, tmp_path, {"ep": 2}, RANDOM)
    again = run_distributed(small_run.continue_halfway, 2, tmp_path, {"ep": 2}, RANDOM)
    for rank in range(2):
        assert again[rank]["losses"] == before[rank]["losses"]
        assert again[rank]["bits"] == before[rank]["bits"]
    (single,) = run_distributed(small_run.continue_halfway, 1, tmp_path, {}, RANDOM)
    for name, sums in before[0]["halfway"].items():
        assert single["halfway"][name] == pytest.approx(sums, rel=1e-12, abs=1e-9), name
    assert single["losses"] == pytest.approx(before[0]["losses"], rel=1e-4)


def test_the_plain_optimizer_saves_for_fp32_moments_too(tmp_path: Path) -> None:
    """Its checkpoint has moments in bf16; a run with fp32 moments continues from their values."""
    (before,) = run_distributed(small_run.save_halfway, 1, tmp_path, {}, RANDOM)
    (again,) = run_distributed(small_run.continue_halfway, 1, tmp_path, {}, RANDOM)
    assert again["bits"] == before["bits"]
    for after in run_distributed(small_run.continue_halfway, 2, tmp_path, {}, {}):
        for name, sums in before["halfway"].items():
            assert after["halfway"][name] == pytest.approx(sums, rel=1e-12, abs=1e-9), name


def bits_of_copies(run_dir: Path) -> list[bytes]:
    """Weights that all tensor-parallel ranks hold, after three steps."""
    run = small_run.prepare(small_run.config(run_dir, {"tp": 2}, **RANDOM))
    small_run.train(run, 3)
    names = [n for n, _ in run.chunks[0].named_parameters() if "layernorm" in n or "router" in n]
    assert len(names) > 10
    weights = dict(run.chunks[0].named_parameters())
    return [weights[name].detach().numpy().tobytes() for name in names]


def test_ranks_with_copies_of_a_weight_round_alike(tmp_path: Path) -> None:
    first, second = run_distributed(bits_of_copies, 2, tmp_path)
    assert first == second


def asked_of_megatron(run_dir: Path) -> Any:
    """What a run on cuda asks of Megatron-Core, past its own checks, as if Transformer Engine were installed."""
    from megatron.core.optimizer import optimizer_config

    from moe_train.optim import optimizer

    class FusedAdam:
        def __init__(
            self, params: Any, *, master_weight_dtype: Any, exp_avg_dtype: Any, exp_avg_sq_dtype: Any,
            use_decoupled_grad: bool,
        ) -> None: ...  # fmt: skip

    class Asked(Exception):
        pass

    cfg = small_run.config(run_dir, {}, precision__dtype="bf16", **BF16)
    run = small_run.prepare(small_run.config(run_dir, {}, precision__dtype="bf16"))
    names = ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.optimizers")
    modules = {name: types.ModuleType(name) for name in names}
    modules[names[-1]].FusedAdam = FusedAdam  # type: ignore[attr-defined]
    with (
        mock.patch.dict(sys.modules, modules),
        mock.patch.object(optimizer_config, "is_te_min_version", return_value=True),
        mock.patch.object(optimizer, "get_megatron_optimizer", side_effect=Asked) as built,
        pytest.raises(Asked),
    ):
        optimizer.build_optimizer(resolve(cfg, run.layout, runtime="cuda"), run.config, run.chunks)
    asked = built.call_args.args[0]
    return {
        name: getattr(asked, name)
        for name in ("use_precision_aware_optimizer", "use_distributed_optimizer", "exp_avg_dtype", "exp_avg_sq_dtype")
    }


def test_transformer_engines_optimizer_is_asked_for_bf16_moments(tmp_path: Path) -> None:
    """On one rank, too, where state is otherwise not sharded: upstream wants the distributed optimizer for it."""
    assert run_distributed(asked_of_megatron, 1, tmp_path) == [
        {
            "use_precision_aware_optimizer": True,
            "use_distributed_optimizer": True,
            "exp_avg_dtype": torch.bfloat16,
            "exp_avg_sq_dtype": torch.bfloat16,
        }
    ]
