"""QK-Clip: largest logits of heads, rescaled projections, and runs that would exceed the threshold."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe_train.config.schema import Config
from moe_train.model.local import attention
from tests.checkpoint import small_run
from tests.distributed.helper import run_distributed

GQA = {
    "model__attention": "gqa", "model__num_query_groups": 2, "model__qkv_bias": True, "model__mtp_num_layers": 0,
}  # fmt: skip
MHA = {**GQA, "model__num_query_groups": 4}
LARGE = {"model__init_std": 0.3, "schedule__warmup_steps": 0, "schedule__decay": "constant"}
Logits = dict[tuple[int, int], float]


@pytest.mark.parametrize(("queries", "keys"), [(40, 40), (7, 40), (1, 3)])
def test_largest_logits_are_those_of_the_causal_scores(
    queries: int, keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "query_block", lambda _: 16)
    generator = torch.Generator().manual_seed(5)
    query, key = (torch.randn(n, 2, 3, 8, generator=generator) for n in (queries, keys))
    scores = torch.einsum("sbnd,kbnd->bnsk", query, key) * 0.4
    for s in range(queries):
        scores[:, :, s, keys - queries + s + 1 :] = -math.inf
    expected = scores.amax(dim=(0, 2, 3))
    torch.testing.assert_close(attention.largest_logits(query, key, 0.4), expected)


def settings(run_dir: Path, degrees: dict[str, int], changes: dict[str, Any]) -> Config:
    return small_run.config(run_dir, degrees, **{**LARGE, **changes})


def record_scores(run: Any) -> dict[int, list[torch.Tensor]]:
    """From now on, the largest causal score of each local head in each call, by layer."""
    found: dict[int, list[torch.Tensor]] = {}
    for chunk in run.chunks:
        for name, module in chunk.named_modules():
            if hasattr(module, "core_attention"):
                number = module.layer_number - 1 + run.cfg.model.num_layers * (".mtp." in name)

                def look(core: Any, args: Any, kwargs: Any, number: int = number) -> None:
                    query, key = args[0].detach().double(), args[1].detach().double()
                    key = key.repeat_interleave(query.size(2) // key.size(2), dim=2)
                    scores = torch.einsum("sbnd,kbnd->bnsk", query, key) * core.scale
                    future = torch.ones(scores.shape[2:]).triu(1).bool()
                    found.setdefault(number, []).append(scores.masked_fill(future, -math.inf).amax(dim=(0, 2, 3)))

                module.core_attention.register_forward_pre_hook(look, with_kwargs=True)
    return found


def one_step(run_dir: Path, degrees: dict[str, int], changes: dict[str, Any]) -> dict[str, Any]:
    """Logits of the first step as the run measures them and as hooks do, and after its update with a rate of 0."""
    from moe_train.loop import step

    run = small_run.prepare(settings(run_dir, degrees, {"optimizer__lr": 0.0, **changes}))
    seen = record_scores(run)
    metrics = step.train_step(run, small_run.batches(run))
    before = {layer: torch.stack(values).amax(dim=0).tolist() for layer, values in seen.items()}
    seen.clear()
    step.train_step(run, small_run.batches_again(run))
    after = {layer: torch.stack(values).amax(dim=0).tolist() for layer, values in seen.items()}
    rank = run.layout.coordinates(run.rank.rank)
    return {"metrics": metrics, "before": before, "after": after, "tp": rank.tp}


def whole(parts: list[dict[str, Any]], when: str) -> Logits:
    """(layer, head) -> largest logit over all ranks."""
    logits: Logits = {}
    for part in parts:
        for layer, heads in part[when].items():
            for i, value in enumerate(heads):
                key = (layer, part["tp"] * len(heads) + i)
                logits[key] = max(value, logits.get(key, -math.inf))
    return logits


@pytest.mark.parametrize(
    ("world", "degrees", "changes"),
    [
        (2, {"tp": 2}, {}),
        (2, {}, {"precision__dtype": "bf16"}),
        (2, {"tp": 2}, GQA),
        (1, {}, MHA),
        (1, {}, {"model__q_lora_rank": 0}),
        (2, {"pp": 2}, {"parallel__distributed_optimizer": False, "precision__dtype": "bf16"}),
    ],
    ids=["mla tp2", "mla dp2 bf16", "gqa tp2", "mha", "uncompressed query", "pp2 bf16, not distributed"],
)
def test_heads_above_the_threshold_are_brought_to_it(
    tmp_path: Path, world: int, degrees: dict[str, int], changes: dict[str, Any]
) -> None:
    """The learning rate is 0, so that the same batch shows what QK-Clip alone has done: exactly the threshold."""
    off = run_distributed(one_step, world, tmp_path, degrees, {**changes, "optimizer__qk_clip_threshold": 1e9})
    largest = whole(off, "before")
    middle = len(largest) // 2
    threshold = sum(sorted(largest.values())[middle - 1 : middle + 1]) / 2  # half of the heads exceed it
    parts = run_distributed(one_step, world, tmp_path, degrees, {**changes, "optimizer__qk_clip_threshold": threshold})
    before, after = whole(parts, "before"), whole(parts, "after")
    tolerance = 3e-2 if changes.get("precision__dtype") == "bf16" else 1e-5
    clipped = sum(value > threshold for value in before.values())
    for part in parts:
        assert part["metrics"]["max_attention_logit"] == pytest.approx(max(before.values()), rel=tolerance)
        assert part["metrics"]["qk_clipped_heads"] == pytest.approx(clipped, abs=1 if tolerance > 1e-3 else 0)
    # Only the first layer gets the same inputs again; those of later layers have changed with it.
    first = {key: value for key, value in before.items() if key[0] == 0}
    assert any(value > threshold for value in first.values())
    for key, value in first.items():
        assert after[key] == pytest.approx(min(value, threshold), rel=tolerance)
    assert before == whole(off, "before")


def clipped_weights(run_dir: Path, degrees: dict[str, int]) -> bool:
    """Whether 16-bit weights are the rounded fp32 weights after a step that rescales them, on every rank."""
    from moe_train.checkpoint import state
    from moe_train.loop import step

    changes = {"precision__dtype": "bf16", "optimizer__qk_clip_threshold": 0.5, "optimizer__lr": 0.0}
    run = small_run.prepare(settings(run_dir, degrees, changes))
    metrics = step.train_step(run, small_run.batches(run))
    assert metrics["qk_clipped_heads"] > 0
    model = state.model_state(run.chunks)
    masters = {
        shard.key.removeprefix("optimizer.state.fp32_param."): shard.data
        for shard in small_run.shards(state.optimizer_state(run, model, loading=False))
        if shard.key.startswith("optimizer.state.fp32_param.") and shard.data is not None
    }
    compared = 0
    for shard in small_run.shards(model):
        if shard.key in masters and ("linear_q_up" in shard.key or "linear_kv_up" in shard.key):
            torch.testing.assert_close(shard.data.float(), masters[shard.key], rtol=2**-7, atol=0)
            compared += 1
    return compared > 0


@pytest.mark.parametrize("degrees", [{}, {"tp": 2}])
def test_fp32_weights_are_rescaled_too(tmp_path: Path, degrees: dict[str, int]) -> None:
    """Otherwise the next update would undo it. With two data-parallel ranks each has a part of them."""
    assert all(run_distributed(clipped_weights, 2, tmp_path, degrees))


def largest_of_each_step(run_dir: Path, threshold: float | None) -> list[float]:
    """Of a run whose attention grows: a large learning rate for queries and keys only."""
    from moe_train.loop import step

    changes = {
        "optimizer__qk_clip_threshold": threshold, "optimizer__lr": 3e-3, "model__init_std": 0.1,
        "optimizer__weight_decay": 0.0,
    }  # fmt: skip
    run = small_run.prepare(settings(run_dir, {"tp": 2}, changes))
    data = small_run.batches(run)
    return [step.train_step(run, data)["max_attention_logit"] for _ in range(12)]


def test_logits_that_would_grow_stay_at_the_threshold(tmp_path: Path) -> None:
    free = run_distributed(largest_of_each_step, 2, tmp_path, 1e9)[0]
    threshold = 0.5 * max(free)
    clipped = run_distributed(largest_of_each_step, 2, tmp_path, threshold)[0]
    assert max(free[-3:]) > 1.8 * threshold
    # A step measures before it rescales, and its update comes in between: what one step adds can exceed the threshold.
    assert max(clipped[-3:]) < 1.25 * threshold


def ranks_agree(run_dir: Path) -> list[float]:
    """The metric on every rank, where each has other heads and other samples."""
    from moe_train.loop import step

    run = small_run.prepare(settings(run_dir, {"tp": 2}, {"optimizer__qk_clip_threshold": 1.0}))
    metrics = step.train_step(run, small_run.batches(run))
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, (metrics["max_attention_logit"], metrics["qk_clipped_heads"]))
    return values


def test_all_ranks_agree_on_logits(tmp_path: Path) -> None:
    values = run_distributed(ranks_agree, 4, tmp_path)
    assert all(len(set(of_rank)) == 1 for of_rank in values)
