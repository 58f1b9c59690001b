"""The planner's groups, parameters and layers against Megatron-Core itself, for a sample of ranks of large jobs."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from moe_train.config.composition.compose import compose
from moe_train.config.composition.validate import validate
from moe_train.model.memory import weights_of, workload_of
from parallel.planner.placement import members
from parallel.planner.workload import Workload
from tests.distributed.helper import run_distributed

KINDS = {
    "tp": "get_tensor_model_parallel_group", "cp": "get_context_parallel_group", "dp": "get_data_parallel_group",
    "pp": "get_pipeline_model_parallel_group", "ep": "get_expert_model_parallel_group",
    "etp": "get_expert_tensor_parallel_group", "edp": "get_expert_data_parallel_group",
}  # fmt: skip
JOBS = {
    2048: ["parallel.tp=2", "parallel.pp=8", "parallel.vpp=2", "parallel.ep=32", "parallel.dp=128"],
    131072: ["parallel.tp=8", "parallel.pp=16", "parallel.ep=64", "parallel.dp=1024"],
    4096: ["parallel.tp=4", "parallel.pp=16", "parallel.cp=2", "parallel.ep=16", "parallel.etp=2", "parallel.dp=32"],
}


Chunk = tuple[bool, list[int], int, bool]  # embedding, layers from 0, prediction depths, loss


def built(overrides: list[str], ranks: list[int]) -> list[tuple[dict[str, list[int]], int, int, list[Chunk]]]:
    """Groups, parameters outside and inside of experts, and layers of each rank, as Megatron-Core makes them."""
    from megatron.core import parallel_state

    from moe_train import simulate
    from parallel import groups, runtime
    from parallel.rank_info import RankInfo

    dist.destroy_process_group()
    cfg = compose(overrides)
    layout = validate(cfg)
    chunks: list[Chunk] = []

    def kept(*arguments: Any, **options: Any) -> Any:
        made = build(*arguments, **options)
        for chunk in made:
            numbers = [layer.layer_number - 1 for layer in chunk.decoder.layers]
            depths = len(chunk.mtp.layers) if getattr(chunk, "mtp", None) else 0
            chunks.append((bool(chunk.pre_process), numbers, depths, bool(chunk.post_process)))
        return made

    build, simulate.build = simulate.build, kept
    found = []
    for rank in ranks:
        runtime.start("simulated", RankInfo(rank, layout.world_size, 0, 1, "", 0, "simulated"), 60)
        groups.create(layout, cfg.seed)
        own = {
            kind: sorted(dist.get_process_group_ranks(getattr(parallel_state, name)())) for kind, name in KINDS.items()
        }
        groups.destroy()
        dist.destroy_process_group()
        chunks.clear()
        held = simulate.build_rank(cfg, layout, rank)
        found.append((own, held.shared, held.experts, list(chunks)))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("gpus", JOBS)
def test_groups_parameters_and_layers_are_megatrons(gpus: int) -> None:
    overrides = [
        "model=deepseek_v3", "runtime=simulated", "batch=large", "train.seq_length=4096", "precision=bf16", *JOBS[gpus],
        "batch.global_batch_size=16384",
    ]  # fmt: skip
    cfg = compose(overrides)
    layout = validate(cfg)
    assert layout.world_size == gpus
    workload = workload_of(cfg, layout)
    ranks = [0, 1, gpus // 3, gpus - 1]
    (found,) = run_distributed(built, 1, overrides, ranks)
    for rank, (groups, shared, experts, chunks) in zip(ranks, found, strict=True):
        for kind, own in groups.items():
            assert own == sorted(members(layout, kind, rank)), (rank, kind)
        planned = weights_of(cfg.model, workload)[layout.coordinates(rank).pp]
        assert (planned.shared, planned.experts) == (shared, experts), rank
        assert planned_chunks(workload, layout.coordinates(rank).pp) == chunks, rank


def planned_chunks(workload: Workload, stage: int) -> list[Chunk]:
    """What the planner puts on a pipeline rank."""
    found: list[Chunk] = []
    passed = 0
    for index, items in enumerate(workload.stages):
        numbers = list(range(passed, passed + items.count("t")))
        passed += len(numbers)
        if index % workload.layout.pp == stage:
            found.append(("E" in items, numbers, items.count("m"), "L" in items))
    return found
