"""Every option of data is trained with: readers, layouts, blends, masks, and the place where a run goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from bench.parity import COMMON, compare, holds, measure
from launch import job
from launch.failures import RankError
from launch.local import launcher
from moe_train.config.composition.compose import compose
from moe_train.config.composition.validate import validate
from moe_train.config.schema import BlendEntry
from parallel.errors import DataError
from parallel.suggest import override_value
from tests.distributed.test_parity import SMALL

MIDDLE = 2


@pytest.fixture(scope="module")
def blend(small_data: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Overrides of a blend: the fixed text, and every fourth of its documents as int32 tokens of another program."""
    made = Path(next(item.removeprefix("data.dir=") for item in small_data if item.startswith("data.dir=")))
    other = tmp_path_factory.mktemp("other") / "tokens"
    documents = IndexedDataset(str(made / "text_document"))
    builder = IndexedDatasetBuilder(f"{other}.bin", dtype=np.int32)
    for i in range(0, len(documents), 4):
        builder.add_document(documents[i].astype(np.int32), [len(documents[i])])
    builder.finalize(f"{other}.idx")
    entries = override_value([BlendEntry(f"{made}/text_document", 0.7), BlendEntry(str(other), 0.3)])
    return ("data=indexed", f"data.dir={made}", f"data.blend={entries}", "data.split='50,50,0'")


@pytest.fixture(scope="module")
def alone(blend: tuple[str, ...]) -> list[dict[str, Any]]:
    """What one rank computes that reads in its own process."""
    return measure([*SMALL, *blend, "train.eval_batches=1"])


@pytest.mark.parametrize(
    "options",
    [
        ["parallel.tp=2", "parallel.pp=2", "parallel.ep=2", "data.loader_workers=2", "batch.micro_batch_size=2"],
        ["parallel.cp=2", "data.loader_workers=1"],
        ["parallel.dp=2"],
    ],
    ids=["tp2 pp2 ep2 two workers", "cp2 one worker", "dp2"],
)
def test_a_blend_trains_alike_in_every_layout_and_with_every_reader(
    options: list[str], blend: tuple[str, ...], alone: list[dict[str, Any]]
) -> None:
    row = compare(alone, measure([*SMALL, *blend, "train.eval_batches=1", *options]))
    assert row["steps"] == 3
    assert holds(row), row


def test_documents_are_kept_apart_alike_on_one_rank_and_with_workers_and_tensor_parallelism(
    small_data: tuple[str, ...],
) -> None:
    # Balance losses of one sequence each do not see where a sequence ends in a packed micro-batch of two.
    options = [*SMALL, "batch.micro_batch_size=1", *small_data, "data.reset_at_eod=true"]
    row = compare(measure(options), measure([*options, "parallel.tp=2", "data.loader_workers=1"]))
    assert holds(row), row


def train(run_dir: Path, *overrides: str) -> list[dict[str, Any]]:
    cfg = compose([*COMMON, *SMALL, *overrides, f"run_dir={run_dir}"])
    layout = validate(cfg)
    job.prepare_data(cfg)
    launcher.start(cfg, layout)
    return [line for line in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines()) if "lm_loss" in line]


def test_a_blend_goes_on_where_it_was_with_the_same_losses(
    blend: tuple[str, ...], alone: list[dict[str, Any]], tmp_path: Path
) -> None:
    """With another number of workers, from a checkpoint inside the first epoch."""
    saving = (*blend, "train.eval_batches=1", f"checkpoint.interval_steps={MIDDLE}")
    assert [line["lm_loss"] for line in train(tmp_path / "whole", *saving)] == [line["lm_loss"] for line in alone]
    saved = tmp_path / "whole" / "checkpoints" / f"step_{MIDDLE:08d}"
    rest = train(tmp_path / "rest", *saving, f"resume={saved}", "data.loader_workers=2")
    assert [(line["step"], line["lm_loss"]) for line in rest] == [
        (line["step"], line["lm_loss"]) for line in alone if line["step"] > MIDDLE
    ]


@pytest.mark.parametrize("options", [["parallel.tp=2"], ["data.loader_workers=1"]], ids=["tp2", "one worker"])
def test_a_token_that_the_model_has_not_is_named_and_never_trained_on(
    options: list[str], blend: tuple[str, ...], tmp_path: Path
) -> None:
    """Id 600 of a vocabulary of 512, in padding of 640 rows, which would be embedded."""
    prefix = tmp_path / "tokens"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for _ in range(40):
        builder.add_document(np.array([5, 6, 7, 600, *range(100)]), [104])
    builder.finalize(f"{prefix}.idx")
    overrides = ["data=indexed", blend[1], f"data.blend=[{{path:{prefix},weight:1}}]", "data.split='100,0,0'", *options]
    with pytest.raises(RankError) as caught:
        train(tmp_path / "run", *overrides, "model.vocab_size=513")
    assert caught.value.exit_code == DataError.exit_code
    text = str(caught.value)
    assert f"{prefix}.bin has token id 600 at position 3 of document " in text
    assert "but model.vocab_size=513" in text
