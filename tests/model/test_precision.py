"""Buffers of a model in 16-bit precision: they count and accumulate, so they stay fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_train.checkpoint import checkpoint
from moe_train.loop import step
from tests.checkpoint import small_run
from tests.distributed.helper import run_distributed

MICRO_BATCHES, TOKENS = 300, 27  # 300 x 27 tokens x top 2 of 8 experts: about 2,025 for each expert
PRECISIONS: dict[str, dict[str, Any]] = {
    "bf16": {"precision__dtype": "bf16"},
    "fp16": {"precision__dtype": "fp16"},
    "fp8": {"precision__dtype": "bf16", "precision__fp8": "block"},
}
GLOBAL_LOSS: dict[str, Any] = {"model__balance_losses": ["global_aux_loss"], "model__balance_loss_coeffs": [1e-3]}


def routers(run: Any) -> list[Any]:
    """The routers of this rank, first to last."""
    from megatron.core.transformer.moe.router import TopKRouter

    return [module for chunk in run.chunks for module in chunk.modules() if isinstance(module, TopKRouter)]


def counted(run_dir: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """Have every router count 300 micro-batches of random routes, and update its bias."""
    from megatron.core.distributed import finalize_model_grads

    run = small_run.prepare(small_run.config(run_dir, {}, **changes, **GLOBAL_LOSS))
    generator = torch.Generator().manual_seed(3)
    found: dict[str, Any] = {"right": [], "updates": [], "counts": [], "exact": [], "micro_batches": []}
    for router in routers(run):
        exact = torch.zeros(8, dtype=torch.int64)
        for _ in range(MICRO_BATCHES):
            logits = torch.randn(TOKENS, 1, 8, generator=generator).requires_grad_()
            router.routing(logits)
            exact += torch.zeros(TOKENS, 8, dtype=torch.int64).scatter(1, logits[:, 0].topk(2).indices, 1).sum(0)
        found["exact"].append(exact.tolist())
        found["counts"].append([router.local_tokens_per_expert.tolist(), router.global_tokens_per_expert.tolist()])
        found["micro_batches"].append(float(router.ga_steps))
        found["right"].append(torch.sign(exact.double().mean() - exact).tolist())
    finalize_model_grads.__globals__["_update_router_expert_bias"](run.chunks, run.config)
    rate = run.cfg.model.router_bias_update_rate
    found["updates"] = [(router.expert_bias / rate).tolist() for router in routers(run)]
    found["dtypes"] = {str(buffer.dtype) for chunk in run.chunks for buffer in chunk.module.buffers()}
    return found


@pytest.mark.parametrize("precision", PRECISIONS)
def test_routers_count_exactly(precision: str, tmp_path: Path) -> None:
    """In bf16 a count stops at 256 micro-batches, and loads near 2,000 tokens are rounded to multiples of 8 or 16."""
    (found,) = run_distributed(counted, 1, tmp_path, PRECISIONS[precision])
    assert len(found["exact"]) == 4  # three layers of the decoder, and the predicting one
    assert found["dtypes"] == {"torch.float32"}
    assert found["micro_batches"] == [MICRO_BATCHES] * 4
    for exact, counts in zip(found["exact"], found["counts"], strict=True):
        assert all(1_800 < tokens < 2_250 for tokens in exact)
        assert counts == [exact, exact]
    for update, right in zip(found["updates"], found["right"], strict=True):
        assert update == pytest.approx(right)


def trained(run_dir: Path, changes: dict[str, Any], resume: bool) -> dict[str, Any]:
    """Train half of the steps and save, or resume, and tell dtypes and values of every buffer."""
    run = small_run.prepare(small_run.config(run_dir, {}, **changes, **GLOBAL_LOSS))
    if resume:
        checkpoint.resume(run)
    else:
        small_run.train(run, small_run.HALF)
        checkpoint.save(run)
    biases = [router.expert_bias.tolist() for router in routers(run)]
    dtypes = {str(buffer.dtype) for chunk in run.chunks for buffer in chunk.module.buffers()}
    return {"biases": biases, "dtypes": dtypes, "losses": small_run.train(run, 1)}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_buffers_stay_fp32_through_a_checkpoint(precision: str, tmp_path: Path) -> None:
    changes = PRECISIONS[precision]
    (before,) = run_distributed(trained, 1, tmp_path, changes, False)
    (after,) = run_distributed(trained, 1, tmp_path, changes, True)
    assert before == after
    assert after["dtypes"] == {"torch.float32"}
    assert any(bias != 0 for layer in after["biases"] for bias in layer)


def yarn_tables(run_dir: Path) -> set[str]:
    """Dtypes of the buffers of a model with tables of cosines."""
    changes = {"model__attention": "gqa", "model__rope_type": "yarn", **PRECISIONS["bf16"]}
    run = small_run.prepare(small_run.config(run_dir, {}, **changes))
    buffers = dict(run.chunks[0].module.named_buffers())
    assert any("cos_cached" in name for name in buffers)
    return {str(buffer.dtype) for buffer in buffers.values()}


def test_tables_of_rotary_embedding_are_not_rounded(tmp_path: Path) -> None:
    assert run_distributed(yarn_tables, 1, tmp_path) == [{"torch.float32"}]


def mask_of_prediction(run_dir: Path, dtype: str) -> list[tuple[str, float]]:
    """Dtype and sum of the loss mask that the model gets, from a sequence of 301 tokens."""
    from megatron.core.models.gpt import GPTModel

    changes = {"train__seq_length": 301, "precision__dtype": dtype, "batch__global_batch_size": 1}
    run = small_run.prepare(small_run.config(run_dir, {}, **changes))
    seen: list[tuple[str, float]] = []
    for module in run.chunks[0].modules():
        if isinstance(module, GPTModel):
            module.register_forward_pre_hook(
                lambda m, _, given: seen.append((str(given["loss_mask"].dtype), float(given["loss_mask"].sum()))),
                with_kwargs=True,
            )
    step.train_step(run, small_run.batches(run))
    return seen


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_tokens_are_counted_exactly_for_multi_token_prediction(dtype: str, tmp_path: Path) -> None:
    """bf16 would make 300 or 302 of 301 tokens."""
    (seen,) = run_distributed(mask_of_prediction, 1, tmp_path, dtype)
    assert seen == [("torch.float64", 301.0)]
