"""Micro-batches whose documents are kept apart: what the model computes is what each document alone gives."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from moe_train import train
from moe_train.data.packing import pack, packed_seq_params
from moe_train.loop import step
from moe_train.objectives.base import Batch
from tests.checkpoint import small_run
from tests.distributed.helper import run_distributed

LENGTHS = ((5, 11), (1, 9, 6))  # documents in each of two sequences
GQA = {"model__attention": "gqa", "model__num_query_groups": 2, "model__kv_channels": 16, "model__q_lora_rank": None}
UNWEIGHTED = {"model__balance_losses": ["seq_aux_loss"], "model__balance_loss_coeffs": [0.0]}
PLAIN = {"model__balance_losses": [], "model__balance_loss_coeffs": []}


def sequences() -> Batch:
    """Two sequences [2, 16] of several documents each."""
    text = torch.randint(0, small_run.VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(3))
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in LENGTHS])
    return {"tokens": text[:, :-1], "labels": text[:, 1:], "loss_mask": torch.ones(2, 16), "position_ids": positions}


def test_a_packed_batch_is_one_row_with_the_boundaries_of_its_documents() -> None:
    batch = sequences()
    packed = pack(batch)
    for name in ("tokens", "labels", "loss_mask", "position_ids"):
        assert torch.equal(packed[name], batch[name].reshape(1, 32))
    assert packed["cu_seqlens"].tolist() == [0, 5, 16, 17, 26, 32]
    assert packed["cu_seqlens"].dtype == torch.int32
    parameters = packed_seq_params(packed)
    assert parameters is not None
    assert (parameters.qkv_format, parameters.max_seqlen_q, parameters.max_seqlen_kv) == ("thd", 11, 11)
    assert parameters.cu_seqlens_q is parameters.cu_seqlens_kv is packed["cu_seqlens"]
    assert packed_seq_params(batch) is None


def losses(changes: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-token losses [1, 32] of packed sequences, and of each document in a batch of its own."""
    run = small_run.prepare(small_run.config(Path("unused"), {}, **PLAIN, **changes))
    packed = pack(sequences())

    def of(batch: Batch) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = run.chunks[0](**run.objective.forward_inputs(batch))
        return found

    for chunk in run.chunks:
        chunk.eval()
    together = of(packed)
    bounds = packed["cu_seqlens"].tolist()
    alone = []
    for first, end in pairwise(bounds):
        document = {name: packed[name][:, first:end].contiguous() for name in ("tokens", "labels", "loss_mask")}
        alone.append(of({**document, "position_ids": torch.arange(end - first)[None]}))
    return together, torch.cat(alone, dim=1)


@pytest.mark.parametrize("changes", [{}, GQA], ids=["mla", "gqa"])
def test_documents_do_not_see_each_other(changes: dict[str, Any]) -> None:
    ((together, alone),) = run_distributed(losses, 1, changes)
    assert together.shape == alone.shape == (1, 32)
    torch.testing.assert_close(together, alone, rtol=2e-5, atol=2e-5)


class Documents(Dataset[Batch]):
    """Its samples are the two sequences, over and over."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Batch:
        return {name: value[index % 2] for name, value in sequences().items()}


def two_steps(degrees: small_run.Degrees, rows: int, changes: dict[str, Any]) -> list[dict[str, Any]]:
    options = {"data__reset_at_eod": True, "batch__micro_batch_size": rows, "batch__global_batch_size": 4}
    run = small_run.prepare(small_run.config(Path("unused"), degrees, **{**options, **PLAIN, **changes}))
    reader = train.train_reader(run, Documents(), 0)
    assert "cu_seqlens" in next(train.train_reader(run, Documents(), 0))
    batches = reader.for_chunks(run.layout.vpp)
    return [step.train_step(run, batches) for _ in range(2)]


@pytest.mark.parametrize(
    ("degrees", "rows", "changes"),
    [
        ({}, 2, {}),
        ({}, 2, UNWEIGHTED),
        ({"tp": 2}, 2, {}),
        ({"pp": 2}, 1, {"recompute__mode": "full"}),
        ({"pp": 2, "vpp": 2}, 2, {}),
        ({}, 1, {"recompute__mode": "selective", "recompute__modules": ["core_attn", "mla_up_proj"]}),
    ],
    ids=[
        "two sequences",
        "balance loss with a coefficient of 0",
        "tp2",
        "pp2 recomputed",
        "pp2 vpp2",
        "core attention recomputed",
    ],
)
def test_packed_documents_train_alike_in_every_layout(
    degrees: small_run.Degrees, rows: int, changes: dict[str, Any]
) -> None:
    """The loss of the prediction layers is compared between equal micro-batches: upstream averages their means."""
    (expected,) = run_distributed(two_steps, 1, {}, 1, {})
    names = ("lm_loss", "grad_norm", *(["mtp_loss"] if rows == 1 else []))
    world = max(1, degrees.get("tp", 1) * degrees.get("pp", 1))
    for found in run_distributed(two_steps, world, degrees, rows, changes):
        for now, before in zip(found, expected, strict=True):
            for name in names:
                assert now[name] == pytest.approx(before[name], rel=2e-4), name
            assert now.keys() == before.keys()
