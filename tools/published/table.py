"""A table of published runs: one run a row, one fact a column. No torch import.

`published_runs.csv` next to this file has these columns. A table with the columns of earlier ones, which say most in
sentences (`other_flags`, `flops_convention_note`), is turned into the same columns by `tools.published.free_text`.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import inf
from pathlib import Path

from parallel.dispatchers import PLANNED
from parallel.errors import ConfigError
from parallel.planner.schedules import SCHEDULES
from parallel.planner.workload import LOSSES
from parallel.suggest import Impossible

TABLE = Path(__file__).parent / "published_runs.csv"
MARK = "month"  # a column that only tables of this form have
BLANK = {"-", "?", "n/a", "na", "nan", "none", "null"}  # how tables write that a number is not known


@dataclass(frozen=True)
class PublishedRun:
    """One published run. None and "" mean that the source does not say.

    Args:
        source, note: where it was published, and what has no column.
        month: year x 100 + month of the software. `release`: its container, such as 26.04.01.
        model: a file of conf/model or validation_models, or a name with a shape: "GPT 175B (96L h12288 a96 V51200)".
        hardware: a file of conf/cluster.
        precision: bf16, an FP8 recipe or nvfp4.
        seq_len, gbs, mbs: tokens of a sequence; sequences of a global batch and of a micro-batch.
        vpp_published: whether vpp is known; else it is chosen.
        recompute: none, full, half (every second layer), or modules joined by +.
        capacity_factor: of experts whose tokens are dropped or padded to it.
        mtp: whether multi-token prediction was trained, where the model has it.
        routing: even, where every expert got equally many tokens, or learned.
        flops_causal, flops_mtp, flops_hardware: whether the FLOPs of `tflops_per_gpu` and `mfu_pct` count causal
            attention as such, multi-token prediction, and recomputation.
        left_out: why the row does not count towards the accuracy, though it has a prediction.
        not_modelled: why it has none.

    The other columns are those of the fields of `model`, `parallel`, `precision` and `plan` (docs/configuration.md).
    """

    source: str = ""
    month: int | None = None
    release: str = ""
    model: str = ""
    hardware: str = ""
    n_gpus: int | None = None
    precision: str = "bf16"
    seq_len: int | None = None
    gbs: int | None = None
    mbs: int | None = None
    tp: int | None = None
    pp: int | None = None
    vpp: int | None = None
    cp: int | None = None
    ep: int | None = None
    etp: int | None = None
    recompute: str = ""
    vpp_published: bool | None = None
    sequence_parallel: bool | None = None
    capacity_factor: float | None = None
    mtp: bool | None = None
    moments_dtype: str = ""
    schedule: str = ""
    software: str = "megatron"
    dispatcher: str = ""
    cuda_graphs: str = ""
    overlap_all_to_all: bool | None = None
    overlap_tp: bool | None = None
    attention_kernel: str = ""
    routing: str = ""
    fsdp: bool | None = None
    frozen_weights: bool | None = None
    loss: str = "megatron"
    tokens_per_s_per_gpu: float | None = None
    tflops_per_gpu: float | None = None
    mfu_pct: float | None = None
    step_time_s: float | None = None
    peak_mem_gb: float | None = None
    flops_causal: bool | None = None
    flops_mtp: bool | None = None
    flops_hardware: bool | None = None
    left_out: str = ""
    not_modelled: str = ""
    note: str = ""


KINDS = {field.name: str(field.type).removesuffix(" | None") for field in fields(PublishedRun)}
COLUMNS = tuple(KINDS)
CHOICES = {
    "precision": ("bf16", "block", "tensor", "mxfp8", "nvfp4"),
    "moments_dtype": ("fp32", "bf16"),
    "schedule": SCHEDULES,
    "software": ("megatron", "deepseek"),
    "dispatcher": PLANNED,
    "cuda_graphs": ("none", "scoped", "full"),
    "attention_kernel": ("fastest", "flash2", "unfused"),
    "routing": ("even", "learned"),
    "loss": LOSSES,
}


def read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The columns of a table, and its rows; cells that are missing are blank.

    Raises:
        ConfigError: it is not a table with at least a model and its hardware.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            columns = [name.strip() for name in reader.fieldnames or ()]
            reader.fieldnames = columns
            rows = [{name: (row.get(name) or "").strip() for name in columns} for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"runs={path} cannot be read: {error}", "name a CSV file") from error
    if missing := {"model", "hardware"} - set(columns):
        raise ConfigError(
            f"{path} has no column {', '.join(sorted(missing))}",
            "give it the columns of tools/published/published_runs.csv",
        )
    return columns, rows


def parse(values: Mapping[str, str]) -> PublishedRun:
    """A row of a table with the columns of `PublishedRun`.

    Raises:
        Impossible: a cell has a value that its column does not allow.
    """
    fields: dict[str, str | float | bool] = {}
    for name, kind in KINDS.items():
        text = values.get(name, "")
        if text == "" or (kind in ("int", "float") and text.lower() in BLANK):
            continue
        if kind in ("int", "float"):
            fields[name] = number(name, text, whole=kind == "int")
        elif kind == "bool":
            if text.lower() not in ("true", "false"):
                raise Impossible(f"{name}={text} is neither true nor false")
            fields[name] = text.lower() == "true"
        elif name in CHOICES and text not in CHOICES[name]:
            raise Impossible(f"{name}={text} is not one of {', '.join(CHOICES[name])}")
        else:
            fields[name] = text
    return PublishedRun(**fields)  # type: ignore[arg-type]


def number(name: str, text: str, whole: bool) -> float:
    """A number above 0 in the column `name`.

    Raises:
        Impossible: it is not one.
    """
    try:
        value = float(text)
    except ValueError:
        raise Impossible(f"{name}={text} is not a number") from None
    if not 0 < value < inf or (whole and value % 1):
        raise Impossible(f"{name}={text} is not a {'whole ' if whole else ''}number above 0")
    return int(value) if whole else value
