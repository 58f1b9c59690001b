"""Recomputation changes no bit: gradients, losses and counts of tokens are those of a run that keeps everything."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from moe_train.config.schema import RecomputeStage
from moe_train.model.memory import workload_of
from moe_train.telemetry.saved_tensors import SavedTensors
from parallel.planner.memory import saved_per_micro_batch
from tests.checkpoint.small_run import BATCH, SEQUENCE, batches, config, prepare, two_micro_batches
from tests.distributed.helper import run_distributed
from tests.quick import slow_but

LAYOUTS = {"single": (1, {}), "tp2": (2, {"tp": 2}), "pp2": (2, {"pp": 2}), "ep2": (2, {"ep": 2})}
SETS: dict[str, dict[str, Any]] = {
    "full": {"mode": "full"},
    "full, block": {"mode": "full", "method": "block"},
    **{
        name: {"mode": "selective", "modules": [name]}
        for name in ("core_attn", "mla_up_proj", "layernorm", "moe_act", "mlp", "moe", "shared_experts")
    },
    "all but whole layers": {
        "mode": "selective",
        "modules": ["core_attn", "mla_up_proj", "layernorm", "moe_act", "mlp", "shared_experts"],
    },
    **{
        name: {"stages": stages}
        for name, stages in (
            ("full on the first stage", [RecomputeStage("full"), RecomputeStage("none")]),
            (
                "other modules on each stage",
                [
                    RecomputeStage(modules=["layernorm", "mla_up_proj", "moe_act"]),
                    RecomputeStage(modules=["mlp", "core_attn"]),
                ],
            ),
        )
    },
    "nested": {"mode": "selective", "modules": ["moe", "moe_act", "shared_experts", "layernorm"]},
}


def step_of(
    directory: Path, degrees: dict[str, int], recompute: dict[str, Any], changes: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Everything that two steps of two micro-batches compute, gradients and router state bit by bit."""
    from moe_train.loop.step import train_step

    recomputed = {f"recompute__{name}": value for name, value in recompute.items()}
    cfg = config(directory, degrees, **two_micro_batches(degrees), **recomputed, **(changes or {}))
    run = prepare(cfg)
    data = batches(run)
    metrics = [train_step(run, data) for _ in range(2)]
    digest = hashlib.sha256()
    for chunk in run.chunks:
        for parameter in chunk.parameters():
            digest.update(parameter.main_grad.numpy().tobytes())
        for name, buffer in sorted(chunk.module.named_buffers()):
            if name.endswith(("expert_bias", "local_tokens_per_expert")):
                digest.update(buffer.float().numpy().tobytes())
    return {"bits": digest.hexdigest(), "metrics": metrics}


def steps_of(
    directory: Path, degrees: dict[str, int], sets: Sequence[str], changes: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """`step_of` without recomputation and with each set."""
    chosen = {"none": {}, **{name: SETS[name] for name in sets}}
    return {name: step_of(directory, degrees, recompute, changes) for name, recompute in chosen.items()}


@pytest.mark.parametrize("layout", slow_but(["single", "pp2", "ep2"], LAYOUTS))
def test_recomputation_changes_no_bit(layout: str, tmp_path: Path) -> None:
    """On every rank. Balance losses are logged once, and each token counts once for each expert that it visits."""
    world, degrees = LAYOUTS[layout]
    for found in run_distributed(steps_of, world, tmp_path, degrees, list(SETS), {}, timeout_s=300):
        kept = found["none"]
        assert kept["metrics"][0]["seq_load_balancing_loss"] > 0
        for row in kept["metrics"][0]["expert_load"][1:]:  # the first layer is dense; topk is 2
            assert sum(row) == BATCH * SEQUENCE * 2
        for name in SETS:
            assert found[name]["metrics"] == kept["metrics"], name
            assert found[name]["bits"] == kept["bits"], name


@pytest.mark.parametrize("recipe", ["block", "delayed"])
def test_recomputation_changes_no_bit_in_fp8(recipe: str, tmp_path: Path) -> None:
    """On pipeline stages, where other micro-batches come between a forward pass and its repetition."""
    fp8 = {"precision__dtype": "bf16", "precision__fp8": recipe, "precision__fp8_format": "hybrid"}
    sets = ["full", "all but whole layers", "nested"]
    for found in run_distributed(steps_of, 2, tmp_path, {"pp": 2}, sets, fp8, timeout_s=300):
        assert all(found[name] == found["none"] for name in sets), {name: found[name]["metrics"] for name in found}
    (bf16,) = run_distributed(step_of, 1, tmp_path, {}, {}, {"precision__dtype": "bf16"})
    assert bf16["metrics"][1]["lm_loss"] != found["none"]["metrics"][1]["lm_loss"], "nothing was rounded to FP8"


def test_what_is_compared_sees_another_seed(tmp_path: Path) -> None:
    """So the test above can fail."""
    (first,) = run_distributed(step_of, 1, tmp_path, {}, {})
    (second,) = run_distributed(step_of_seed, 1, tmp_path, 7)
    assert first["bits"] != second


def step_of_seed(directory: Path, seed: int) -> str:
    """`step_of` from other weights."""
    from moe_train.loop.step import train_step

    run = prepare(config(directory, {}, seed=seed))
    train_step(run, batches(run))
    digest = hashlib.sha256()
    for parameter in run.chunks[0].parameters():
        digest.update(parameter.main_grad.numpy().tobytes())
    return digest.hexdigest()


STAGES = [
    RecomputeStage("full"), RecomputeStage(modules=["layernorm", "moe_act"]), RecomputeStage("none"),
    RecomputeStage(modules=["moe"]),
]  # fmt: skip  # chunks 0 and 2 on rank 0, 1 and 3 on rank 1


def kept_by_stages(directory: Path) -> dict[str, Any]:
    """What each chunk of this rank is told to recompute, and the bytes that a micro-batch keeps, against the model."""
    from moe_train.loop.step import train_step

    degrees = {"pp": 2, "vpp": 2}
    cfg = config(directory, degrees, recompute__stages=STAGES, model__num_layers=4, model__mtp_num_layers=0)
    run = prepare(cfg)
    saved = SavedTensors(chunk.module for chunk in run.chunks)
    saved.start()
    train_step(run, batches(run))
    configs = [chunk.module.config for chunk in run.chunks]
    stage = run.layout.coordinates(run.rank.rank).pp
    return {
        "told": [(one.recompute_granularity, one.recompute_modules) for one in configs],
        "first_is_shared": configs[0] is run.config,
        "predicted_over_measured": saved_per_micro_batch(workload_of(cfg, run.layout), stage) / saved.stop(),
    }


def test_each_chunk_recomputes_what_its_entry_says(tmp_path: Path) -> None:
    first, last = run_distributed(kept_by_stages, 2, tmp_path)
    assert first["told"] == [("full", ["core_attn"]), (None, ["core_attn"])]  # core_attn is upstream's default
    assert last["told"] == [("selective", ["layernorm", "moe_act"]), ("selective", ["moe"])]
    for rank in (first, last):
        assert rank["first_is_shared"]
        assert rank["predicted_over_measured"] == pytest.approx(1, abs=0.03)
