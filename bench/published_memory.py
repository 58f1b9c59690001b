"""Published peaks of GPU memory against the prediction, row by row.

A row is modelled where Megatron-Core trained a model of a family that there is here, and says how it was laid out.
What a row leaves out is as in NVIDIA's performance recipes, from which these rows come (NVIDIA-NeMo/Megatron-Bridge,
scripts/performance and training/mixed_precision.py): gradients in bf16 (grad_reduce_in_fp32=False), weights of linear
layers only in FP8 where they compute in it (fp8_param_gather=True), fp32 moments. Further: sequences of 4,096 tokens,
micro-batches of one, the smallest data-parallel degree that fits, layers spread evenly over stages.

torchtitan's rows (FSDP2) are predicted by the rules of `moe-plan validate` (tools/published). Their source states GiB
that torch has reserved, which is a little more than what is in use.

Every other row is listed with the reason why it is not modelled.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from moe_train.config.composition.compose import compose
from moe_train.config.composition.validate import validate
from moe_train.config.schema import Config
from moe_train.model.memory import weights_of, workload_of
from parallel.planner.estimate import stage_memories
from parallel.planner.memory import StageMemory
from tools.published.free_text import normalised
from tools.published.predict import predict
from tools.published.rows import understand
from tools.published.table import parse
from tools.published.table import read as read_table

DATA = Path(__file__).parent / "data" / "published_memory.csv"
GB, GIB = 1e9, 2**30
# Beginning of the model's name in the table -> overrides.
LLAMA_70B = [
    "model=llama3_8b", "model.name=llama3_70b", "model.num_layers=80", "model.hidden_size=8192",
    "model.ffn_hidden_size=28672", "model.num_attention_heads=64",
]  # fmt: skip
MODELS = {
    "DeepSeek-V3": ["model=deepseek_v3"],
    "Qwen3-235B-A22B": ["model=qwen3_235b_a22b"],
    "Llama3-70B": LLAMA_70B,
}
PRECISIONS = {
    "BF16": ["precision=bf16"],
    "MXFP8": ["precision=bf16", "precision.fp8=mxfp8"],
    "FP8 current scaling": ["precision=bf16", "precision.fp8=tensor"],
}


def overrides(row: dict[str, str]) -> list[str] | str:
    """The row as overrides of the configuration, or why it is not modelled."""
    if "offload" in row["other_flags"] and "baseline" not in row["other_flags"]:
        return "activations are moved to the host"
    names = [name for name in MODELS if row["model"].startswith(name)]
    if not names:
        return "a hybrid of Mamba layers"
    if not row["pp"] or not row["precision"]:
        return "the source states no pipeline or precision"
    values = {name: row[name] or "1" for name in ("tp", "pp", "vpp", "cp", "ep", "etp")}
    words = [*MODELS[names[0]], *PRECISIONS[row["precision"]], "precision.grad_reduce_fp32=false", "runtime=cuda"]
    words += ["data=indexed", *(f"parallel.{name}={value}" for name, value in values.items())]
    words += [f"train.seq_length={row['seq_len'] or 4096}", f"batch.micro_batch_size={row['mbs'] or 1}"]
    modules = [name for name in row["recompute"].split(",") if name]
    if names[0] == "Llama3-70B" and "layernorm" in modules:
        modules.remove("layernorm")  # norms that Transformer Engine has fused stay: the published peak does not fall
    if modules:
        words += ["recompute=selective", f"recompute.modules=[{','.join(modules)}]"]
    return words


def peak_stage(cfg: Config) -> StageMemory:
    """The stage with the highest memory, with weights of linear layers in FP8 alone where they compute in it."""
    layout = validate(cfg)
    workload = replace(workload_of(cfg, layout), fp8_weights_only=True)
    stages = stage_memories(workload, weights_of(cfg.model, workload))
    return max(stages, key=lambda stage: stage.total)


def compare(row: dict[str, str]) -> dict[str, Any]:
    """Published and predicted peak in GB, or why there is no prediction."""
    result: dict[str, Any] = {name: row[name] for name in ("source", "model", "recompute")}
    result |= {"layout": " ".join(f"{n}{row[n]}" for n in ("tp", "pp", "vpp", "ep") if row[n])}
    result["published_gb"] = float(row["peak_mem_gb"]) * (GIB / GB if "memory GiB" in row["other_flags"] else 1)
    if "torchtitan" in row["source"]:
        return {**result, **_against(result, fully_sharded(row) / GB)}
    words = overrides(row)
    if isinstance(words, str):
        return {**result, "not_modelled": words}
    ranks = int(row["n_gpus"] or 0) or None
    cfg = compose([*words, "batch.global_batch_size=1"])
    each = cfg.parallel.tp * cfg.parallel.pp * cfg.parallel.cp
    dp = ranks // each if ranks else max(1, cfg.parallel.ep * cfg.parallel.etp // (cfg.parallel.tp * cfg.parallel.cp))
    batch = int(row["gbs"] or 0) or 16 * dp * cfg.parallel.pp * cfg.batch.micro_batch_size
    cfg = compose([*words, f"batch.global_batch_size={batch}", f"parallel.dp={dp}"])
    peak = peak_stage(cfg)
    result |= _against(result, peak.total / GB)
    parts = ("parameters", "gradients", "optimizer", "activations", "recompute", "communication", "logits")
    return {**result, "stage": peak.stage, **{f"{name}_gb": round(getattr(peak, name) / GB, 2) for name in parts}}


def _against(result: dict[str, Any], predicted_gb: float) -> dict[str, Any]:
    return {"predicted_gb": predicted_gb, "relative_error": predicted_gb / result["published_gb"] - 1}


def fully_sharded(row: dict[str, str]) -> float:
    """Bytes of the rank with the highest memory in a run with FSDP2.

    Raises:
        ValueError: the row does not say how it was laid out.
    """
    understood = understand(0, parse(normalised(row)))
    if isinstance(understood, str):
        raise ValueError(f"{row['source']}, {row['model']}: {understood}")
    return predict(understood).memory_bytes


def read(path: Path) -> list[dict[str, Any]]:
    """`compare` for each row of the table that has a peak."""
    return [compare(row) for row in read_table(path)[1] if row["peak_mem_gb"]]


def summary(path: Path) -> dict[str, Any]:
    """Median of the absolute errors, how many rows it is over, and the rows."""
    rows = read(path)
    errors = [abs(row["relative_error"]) for row in rows if "relative_error" in row]
    return {
        "published_median_absolute_error": median(errors),
        "published_rows_modelled": len(errors),
        "published_rows_not_modelled": len(rows) - len(errors),
        "published": rows,
    }


def show(path: Path) -> None:
    """Print the error of each row, and the median."""
    comparison, table = summary(path), Table(title="Peak memory of the peak rank, GB")
    for column in ("model", "layout", "recompute", "published", "predicted", "error"):
        table.add_column(column)
    for row in comparison["published"]:
        shown = (
            [row["not_modelled"], ""]
            if "not_modelled" in row
            else [f"{row['predicted_gb']:.1f}", f"{row['relative_error']:+.1%}"]
        )
        table.add_row(row["model"], row["layout"], row["recompute"], f"{row['published_gb']:.1f}", *shown)
    Console().print(table)
    print(
        f"median absolute error {comparison['published_median_absolute_error']:.1%} over "
        f"{comparison['published_rows_modelled']} rows; {comparison['published_rows_not_modelled']} not modelled"
    )
