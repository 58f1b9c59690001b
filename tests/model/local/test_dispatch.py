"""Tokens that travel to their experts in FP8: half of the bytes, and the same numbers in every product."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from tests.checkpoint import small_run
from tests.distributed.helper import run_distributed

HIDDEN = 256
BLOCK = {"precision__dtype": "bf16", "precision__fp8": "block", "model__hidden_size": HIDDEN}


def two_steps(directory: Path, changes: dict[str, Any], degrees: dict[str, int]) -> dict[str, Any]:
    """Metrics, and the bytes that all-to-all messages took from this rank to others, by the type of the numbers."""
    from moe_train.loop.step import evaluate, train_step
    from moe_train.telemetry.model_metrics import DispatchTraffic

    run = small_run.prepare(small_run.config(directory, degrees, **BLOCK, **changes))
    run.traffic = DispatchTraffic(run.chunks, run.device)
    real, sent = dist.all_to_all_single, {}

    def counted(output: torch.Tensor, x: torch.Tensor, *, group: Any, **sizes: Any) -> Any:
        splits = [int(size) for size in sizes["input_split_sizes"]]
        leaving = sum(splits) - splits[group.rank()]
        if x.dim() == 2 and x.size(1):
            key = str(x.dtype).removeprefix("torch.")
            sent[key] = sent.get(key, 0) + leaving * x.size(1) * x.element_size()
        return real(output, x, group=group, **sizes)

    data = small_run.batches(run)
    with mock.patch.object(dist, "all_to_all_single", counted):
        first = train_step(run, data)
    evaluate(run, data, 1)
    return {"metrics": [first, train_step(run, data)], "sent": sent}


def total(ranks: list[dict[str, Any]], dtype: str) -> int:
    return sum(rank["sent"].get(dtype, 0) for rank in ranks)


def test_half_of_the_bytes_with_the_same_losses(tmp_path: Path) -> None:
    """What enters an FP8 product is rounded by the same rule again, which changes nothing. In gradients of weights,
    whose tiles lie across tokens, only numbers that are tiny within their row differ: others keep 4 bits at any scale.
    """
    plain = run_distributed(two_steps, 2, tmp_path, {}, {"ep": 2})
    fp8 = run_distributed(two_steps, 2, tmp_path, {"precision__fp8_dispatch": True}, {"ep": 2})
    bf16 = plain[0]["metrics"][0]["dispatch_bytes"]
    # There and back, in the forward and in the backward pass.
    assert total(plain, "bfloat16") == 4 * bf16 > 0
    assert bf16 % (2 * HIDDEN) == 0
    rows = bf16 // (2 * HIDDEN)
    assert fp8[0]["metrics"][0]["dispatch_bytes"] == rows * (HIDDEN + 4 * HIDDEN // 128)
    assert total(fp8, "uint8") == 2 * rows * HIDDEN
    assert total(fp8, "float32") == 2 * rows * 4 * HIDDEN // 128
    assert total(fp8, "bfloat16") == total(plain, "bfloat16") // 2

    first, second = ([m["metrics"][i] for m in (plain[0], fp8[0])] for i in range(2))
    assert first[0]["lm_loss"] == first[1]["lm_loss"]
    assert abs(first[0]["grad_norm"] / first[1]["grad_norm"] - 1) < 1e-5
    assert abs(second[0]["lm_loss"] / second[1]["lm_loss"] - 1) < 1e-5
    per_step = [step["dispatch_bytes"] for step in fp8[0]["metrics"]]
    assert abs(per_step[0] / per_step[1] - 1) < 0.5, "evaluation was counted"


def test_one_rank_rounds_what_it_does_not_send(tmp_path: Path) -> None:
    """So that a run is the same whether tokens leave their rank or not."""
    changes = {"precision__fp8_dispatch": True, "precision__fp8_format": "hybrid"}
    (alone,) = run_distributed(two_steps, 1, tmp_path, changes, {})
    two = run_distributed(two_steps, 2, tmp_path, changes, {"ep": 2})
    assert alone["metrics"][0]["dispatch_bytes"] == 0
    for here, there in zip(alone["metrics"], two[0]["metrics"], strict=True):
        assert abs(here["lm_loss"] / there["lm_loss"] - 1) < 1e-4


def arrived(x: torch.Tensor, gradient: bool, hybrid: bool = False) -> torch.Tensor:
    """`x` as it comes out of a message to this rank itself."""
    from moe_train.model.fp8.linear import Recipe
    from moe_train.model.local.dispatch import Dispatcher

    class Alone:
        recipe, ep_group, ep_size = Recipe("block", hybrid=hybrid), mock.Mock(size=lambda: 1), 1
        send, _count, input_splits = Dispatcher.send, Dispatcher._count, None

    return Alone().send(x, None, None, gradient)  # type: ignore[arg-type]


def test_an_infinity_is_not_hidden_on_its_way() -> None:
    tokens = torch.ones(2, 128)
    tokens[1, 5] = torch.inf
    found = arrived(tokens, gradient=False)
    assert torch.equal(found[0], tokens[0])
    assert not found[1, 5].isfinite()


def test_gradients_travel_in_the_format_of_the_recipe() -> None:
    """E4M3 has three bits behind the point, E5M2 two."""
    x = torch.full((1, 128), 1.125)
    for gradient, hybrid in ((False, False), (False, True), (True, False)):
        assert torch.equal(arrived(x, gradient, hybrid), x)
    assert torch.equal(arrived(x, gradient=True, hybrid=True), torch.ones_like(x))
