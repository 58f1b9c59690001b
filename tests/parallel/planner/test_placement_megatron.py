"""The planner's groups, parameters and layers against Megatron-Core itself, for a sample of ranks of large jobs."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from moe_train.config.compose import compose
from moe_train.config.validate import validate
from moe_train.model.memory import job_of, weights_on
from parallel.planner.placement import members
from tests.distributed.helper import run_distributed

KINDS = {
    "tp": "get_tensor_model_parallel_group", "cp": "get_context_parallel_group", "dp": "get_data_parallel_group",
    "pp": "get_pipeline_model_parallel_group", "ep": "get_expert_model_parallel_group",
    "etp": "get_expert_tensor_parallel_group", "edp": "get_expert_data_parallel_group",
}  # fmt: skip
JOBS = {
    2048: ["parallel.tp=2", "parallel.pp=8", "parallel.vpp=2", "parallel.ep=32", "parallel.dp=128"],
    4096: ["parallel.tp=4", "parallel.pp=16", "parallel.cp=2", "parallel.ep=16", "parallel.etp=2", "parallel.dp=32"],
}


def built(overrides: list[str], ranks: list[int]) -> list[tuple[dict[str, list[int]], int, int]]:
    """Groups, parameters outside and inside of experts of each rank, as Megatron-Core makes them."""
    from megatron.core import parallel_state

    from moe_train import simulate
    from parallel import groups, runtime
    from parallel.rank_info import RankInfo

    dist.destroy_process_group()
    cfg = compose(overrides)
    layout = validate(cfg)
    found = []
    for rank in ranks:
        runtime.start("simulated", RankInfo(rank, layout.world_size, 0, 1, "", 0, "simulated"), 60)
        groups.create(layout, cfg.seed)
        own = {
            kind: sorted(dist.get_process_group_ranks(getattr(parallel_state, name)())) for kind, name in KINDS.items()
        }
        groups.destroy()
        dist.destroy_process_group()
        held = simulate.build_rank(cfg, layout, rank)
        found.append((own, held.shared, held.experts))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("gpus", JOBS)
def test_groups_and_parameters_are_megatrons(gpus: int) -> None:
    overrides = [
        "model=deepseek_v3", "runtime=simulated", "batch=large", "train.seq_length=4096", "precision=bf16", *JOBS[gpus],
        "batch.global_batch_size=16384",
    ]  # fmt: skip
    cfg = compose(overrides)
    layout = validate(cfg)
    assert layout.world_size == gpus
    job = job_of(cfg, layout)
    ranks = [0, 1, gpus // 3, gpus - 1]
    (found,) = run_distributed(built, 1, overrides, ranks)
    for rank, (groups, shared, experts) in zip(ranks, found, strict=True):
        for kind, own in groups.items():
            assert own == sorted(members(layout, kind, rank)), (rank, kind)
        planned = weights_on(cfg, job, layout.coordinates(rank).pp)
        assert (planned.shared, planned.experts) == (shared, experts), rank
