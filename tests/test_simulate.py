"""runtime=simulated builds ranks of DeepSeek-V3 on 2,048 GPUs, and they add up to the published model."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from moe_train.config.composition.compose import compose
from moe_train.config.composition.validate import validate
from moe_train.model.arithmetic import count_parameters, parameters_of_ranks
from tests.distributed.helper import run_distributed

OVERRIDES = ("model=deepseek_v3", "parallel=deepseek_v3_h800", "runtime=simulated")


def held(ranks: list[int], *overrides: str) -> list[tuple[int, int, int, int]]:
    """(outside experts, inside experts, embedding copies, bias entries) of each rank, built by Megatron-Core."""
    from moe_train import simulate

    dist.destroy_process_group()
    cfg = compose([*OVERRIDES, *overrides])
    found = [simulate.build_rank(cfg, validate(cfg), rank) for rank in ranks]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return [(h.shared, h.experts, h.embedding_copy, h.expert_bias) for h in found]


@pytest.mark.parametrize(
    ("mtp", "parameters", "bias"), [(0, 671_026_404_352, 14_848), (1, 671_026_404_352 + 11_610_067_968, 15_104)]
)
def test_a_sample_of_ranks_adds_up_to_the_published_model(mtp: int, parameters: int, bias: int) -> None:
    """One rank of each of 16 stages, its experts times the 64 expert ranks, which another expert rank confirms."""
    layout = validate(compose(OVERRIDES))
    firsts = [layout.rank_of(pp=pp) for pp in range(16)]
    other = layout.rank_of(pp=7, dp=63)
    assert layout.coordinates(other).ep == 63
    (found,) = run_distributed(held, 1, [*firsts, other], f"model.mtp_num_layers={mtp}")
    assert sum(shared - copy + 64 * experts for shared, experts, copy, _ in found[:16]) == parameters
    assert sum(entries for *_, entries in found[:16]) == bias
    assert found[16] == found[7]


def test_built_ranks_hold_what_the_arithmetic_says() -> None:
    """Stage by stage, with multi-token prediction on."""
    from moe_train.model.build import pipeline_layout
    from parallel.pipeline import parse_layout

    cfg = compose(OVERRIDES)
    layout = validate(cfg)
    text = pipeline_layout(cfg, layout)
    assert text is not None
    stages = parse_layout(text, 16, 1, cfg.model.num_layers, cfg.model.mtp_num_layers)
    pps = [0, 1, 15]
    (found,) = run_distributed(held, 1, [layout.rank_of(pp=pp) for pp in pps])
    for pp, (shared, experts, _, entries) in zip(pps, found, strict=True):
        expected = parameters_of_ranks(cfg.model, stages, pp=16, ep=64)[pp]
        assert (shared, experts, entries) == (expected.shared, expected.experts, expected.expert_bias)
    assert count_parameters(cfg.model).total == 671_026_404_352


# Runs a command and says what it took, in a small process: this one has had many children, and a fork of it is large.
MEASURED = """
import json, resource, subprocess, sys
code = subprocess.run(sys.argv[1:], timeout=120).returncode
print(json.dumps(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss), file=sys.stderr)
sys.exit(code)
"""


def test_the_command_takes_less_than_30_s_and_2_gb(tmp_path: Path) -> None:
    """As a user types it; it prints the parameters of the rank."""
    program = str(Path(sys.executable).with_name("moe-train"))
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, program, *OVERRIDES, "rank=77"],
        cwd=tmp_path,
        env=dict(os.environ),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "rank 77 of 2,048" in done.stdout
    assert "3,086,286,848" in done.stdout
    assert time.monotonic() - start < 30
    kibibytes = int(done.stderr.splitlines()[-1])
    assert 100_000 < kibibytes < 2 * 1024**2
