"""Tables of published runs: one fact a column, or most of it in sentences."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from moe_train.config.composition.compose import compose
from moe_train.config.composition.validate import validate
from moe_train.config.plan import PlanConfig
from moe_train.config.roots import PlanRoot
from moe_train.config.walk import all_fields, get, with_values
from parallel.errors import ConfigError
from parallel.suggest import Impossible
from tools.planning.answer import answer
from tools.published.free_text import normalised
from tools.published.predict import predict
from tools.published.rows import Row, understand
from tools.published.table import COLUMNS, TABLE, parse
from tools.published.table import read as read_table
from tools.published.validation import read

SENTENCES = {
    "source": "performance summary, release 26.02 NeMo container", "model": "DeepSeek-V3 (w/o MTP)",
    "hardware": "DGX-GB200", "n_gpus": "256", "precision": "FP8-MX", "seq_len": "4096", "gbs": "2048", "mbs": "1",
    "tp": "1", "pp": "4", "vpp": "4", "cp": "1", "ep": "64", "etp": "1", "recompute": "mla_up_proj, moe_act",
    "other_flags": "HybridEP; CUDA graphs; a2a overlap off; memory GiB", "tokens_per_s_per_gpu": "4,000",
    "peak_mem_gb": "100", "flops_convention_note": "non-causal; MTP counted",
}  # fmt: skip
FACTS = {
    "month": "202602", "release": "26.02", "model": "DeepSeek-V3 (w/o MTP)", "hardware": "gb200", "precision": "mxfp8",
    "recompute": "mla_up_proj+moe_act", "mtp": "false", "dispatcher": "flex", "cuda_graphs": "scoped",
    "overlap_all_to_all": "false", "peak_mem_gb": "107.37418240000001", "flops_causal": "false", "flops_mtp": "true",
    "note": "HybridEP; CUDA graphs; a2a overlap off; memory GiB; non-causal; MTP counted",
}  # fmt: skip


def test_sentences_become_columns() -> None:
    row = normalised(SENTENCES | {"tokens_per_s_per_gpu": "4000"})
    assert {name: row[name] for name in FACTS} == FACTS
    assert set(row) <= set(COLUMNS)


def test_a_number_with_a_comma_is_named() -> None:
    with pytest.raises(Impossible, match="tokens_per_s_per_gpu=4,000 is not a number"):
        normalised(SENTENCES)


def test_both_forms_of_a_row_are_one_run(tmp_path: Path) -> None:
    row = SENTENCES | {"tokens_per_s_per_gpu": "4000"}
    runs = []
    for name, values in (("sentences", row), ("facts", normalised(row))):
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(values))
            writer.writeheader()
            writer.writerow(values)
        runs += [one for _, one in read(tmp_path / f"{name}.csv")]
    first, second = runs
    assert isinstance(first, Row)
    assert first == second
    assert first.model.mtp_num_layers == 0


@pytest.mark.parametrize(
    ("cell", "cause"),
    [
        ({"dispatcher": "deepep"}, "dispatcher=deepep is not one of flex, alltoall"),
        ({"fsdp": "yes"}, "fsdp=yes is neither true nor false"),
        ({"gbs": "1.5"}, "gbs=1.5 is not a whole number above 0"),
        ({"mfu_pct": "-3"}, "mfu_pct=-3 is not a number above 0"),
    ],
)
def test_a_cell_that_its_column_does_not_allow_is_named(cell: dict[str, str], cause: str) -> None:
    with pytest.raises(Impossible) as error:
        parse({"model": "deepseek_v3", "hardware": "h800"} | cell)
    assert error.value.cause == cause


def test_a_row_names_what_it_lacks() -> None:
    whole = {"model": "deepseek_v3", "hardware": "h800", "n_gpus": "64", "ep": "8", "gbs": "64", "month": "202604"}
    assert isinstance(understand(0, parse(whole)), Row)
    for name, cause in {"n_gpus": "layout", "gbs": "batch", "month": "month", "hardware": "hardware"}.items():
        assert understand(0, parse(whole | {name: ""})) == f"the {cause} is not stated"
    assert understand(0, parse(whole | {"hardware": "h801"})) == "hardware=h801 is not a file of conf/cluster"


def test_the_table_of_the_repository_has_only_what_its_columns_allow() -> None:
    columns, rows = read_table(TABLE)
    assert tuple(columns) == COLUMNS
    assert len(rows) == 360
    for values in rows:
        parse(values)


def test_the_fullest_stage_counts_whichever_it_is() -> None:
    """Neither the first two stages of this run nor its last hold most."""
    _, row = read(TABLE)[20]
    assert isinstance(row, Row)
    fields = {name: get(row.cfg, name) for name in all_fields()}
    cfg = with_values(PlanRoot(plan=PlanConfig(**vars(row.plan), search=False)), fields)
    sizes = answer(cfg, row.layout).best.memory_of_ranks
    assert max(sizes) == pytest.approx(predict(row).memory_bytes)
    assert sizes.index(max(sizes)) not in (0, 1, row.layout.pp - 1)


def test_a_stage_whose_batch_does_not_divide_is_refused() -> None:
    """It is not rounded down."""
    cfg = compose([
        "model=deepseek_v3", "runtime=cuda", "precision=bf16", "batch=large", "train.seq_length=4096", "cluster=gb300",
        "recompute=full", "plan.search=false", "parallel.pp=8", "parallel.ep=64", "parallel.dp=128",
        "plan.recipe=[{name:long,steps:10,seq_length:32768,global_batch_size:1000,cp:8}]",
    ], PlanRoot)  # fmt: skip
    told = r"global_batch_size=1000 of 'long' is not a multiple of .* = 1 x 16 at cp=8"
    with pytest.raises(ConfigError, match=told) as error:
        answer(cfg, validate(cfg, trains=False))
    assert "use global_batch_size=1008" in str(error.value)
