"""What fits of the KV cache next to a model, against the tensors that the engine allocates."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moe_train.config.composition.compose import compose
from moe_train.config.composition.validate import validate
from moe_train.inference.cache import PagedKVCache
from moe_train.model.memory import weights_of, workload_of
from parallel.architecture.kv_cache import CACHE_FORMATS, cache_parts
from parallel.planner.kv_cache import Serving, fits, forward_bytes, limiting, rooms
from parallel.planner.memory import StageMemory, Weights, parameter_bytes, stage_memory
from parallel.planner.workload import Workload

SERVING = Serving(context_length=100, batch_tokens=64, sequences=8, block_size=16, draft_depths=1)
GQA = ["model.attention=gqa", "model.num_query_groups=2", "model.qk_norm=none"]
LAYOUTS = {
    "one rank": [],
    "one key/value head on each rank": [*GQA, "parallel.tp=2"],
    "stages of 1 and 3 layers": ["model.num_layers=4", "parallel.pp=2", "parallel.pipeline_layout=Et|tttmL"],
    "chunks": ["model.num_layers=4", "parallel.pp=2", "parallel.vpp=2"],
}


def planned(*words: str) -> tuple[Workload, list[Weights]]:
    cfg = compose(["model=tiny", "runtime=cpu", *words])
    workload = workload_of(cfg, validate(cfg, trains=False))
    return workload, weights_of(cfg.model, workload)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("cache_format", CACHE_FORMATS)
def test_the_engine_can_allocate_what_fits_and_not_a_block_more(name: str, cache_format: str) -> None:
    workload, weights = planned(*LAYOUTS[name])
    spent = [parameter_bytes(workload, one) + forward_bytes(workload, i, SERVING) for i, one in enumerate(weights)]
    usable = max(spent) + 300_000
    found = rooms(workload, weights, usable, SERVING)
    tp, model = workload.layout.tp, workload.model
    (row,) = fits(model, tp, found, SERVING, [cache_format])
    blocks = row.tokens // SERVING.block_size
    assert blocks > 0
    assert row.tokens == blocks * SERVING.block_size
    assert row.sequences == blocks // 7  # 100 tokens are 7 blocks of 16

    def allocated(blocks: int) -> list[int]:
        parts = cache_parts(model, cache_format, tp=tp)
        return [
            PagedKVCache(
                parts, range(1, room.layers + 1), blocks, SERVING.block_size, torch.float32, torch.device("cpu")
            ).num_bytes
            for room in found
        ]  # fmt: skip

    assert sum(room.layers for room in found) == model.num_layers + 1  # that of multi-token prediction
    without = rooms(workload, weights, usable, replace(SERVING, draft_depths=0))
    assert sum(room.layers for room in without) == model.num_layers
    assert all(size <= room.free for size, room in zip(allocated(blocks), found, strict=True))
    assert any(size > room.free for size, room in zip(allocated(blocks + 1), found, strict=True))
    one_block = allocated(1)[limiting(found).stage]
    assert row.rank_bytes_per_token * SERVING.block_size == one_block


def test_a_model_that_does_not_fit_leaves_no_room() -> None:
    workload, weights = planned("model.num_layers=4", "parallel.pp=2", "parallel.pipeline_layout=Et|tttmL")
    sizes = [parameter_bytes(workload, one) + forward_bytes(workload, i, SERVING) for i, one in enumerate(weights)]
    found = rooms(workload, weights, max(sizes) - 1, SERVING)
    assert limiting(found).free == -1
    (row,) = fits(workload.model, 1, found, SERVING, ["int4"])
    assert (row.tokens, row.sequences) == (0, 0)


def test_a_forward_pass_needs_less_than_a_training_step_and_grows_with_context_and_batch() -> None:
    """One layer at a time, and neither gradients nor a second FP8 copy of the weights."""
    cfg = compose(["model=deepseek_v3", "parallel=deepseek_v3_h800", "runtime=cuda", "precision=fp8_block",
                   "batch=large", "train.seq_length=4096"])  # fmt: skip
    workload = workload_of(cfg, validate(cfg, trains=False))
    weights = weights_of(cfg.model, workload)
    trained: StageMemory = stage_memory(workload, 1, weights[1])
    serving = Serving(4096, 4096, 64, 64)
    assert forward_bytes(workload, 1, serving) < trained.activations_per_micro_batch
    inference = parameter_bytes(workload, weights[1], trains=False)
    assert trained.parameters - inference == pytest.approx(weights[1].in_fp8 * (1 + 4 / 128))
    longer = forward_bytes(workload, 1, Serving(8192, 4096, 64, 64)) - forward_bytes(workload, 1, serving)
    assert longer == 2 * 4096 * 128 * (192 + 128)  # keys and values of all heads, bf16
    assert forward_bytes(workload, 1, Serving(8192, 8192, 64, 64)) > forward_bytes(workload, 1, serving) * 1.5
    scores = forward_bytes(workload, 15, replace(serving, draft_depths=1)) - forward_bytes(
        workload, 15, Serving(4096, 4096, 0, 64)
    )
    assert scores == 2 * 64 * cfg.model.padded_vocab_size * (2 + 2 + 4 + 4)
