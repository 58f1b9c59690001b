"""A row of a table that says most in sentences, as the columns of `tools.published.table`. No torch import.

Such tables have the columns source, model, hardware, n_gpus, precision, seq_len, gbs, mbs, tp, pp, vpp, cp, ep, etp,
recompute, other_flags, tflops_per_gpu, mfu_pct, tokens_per_s_per_gpu, step_time_s, peak_mem_gb and
flops_convention_note. The words that are searched for are those of the sources that were collected so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from moe_train.config.model import ModelConfig
from parallel.dispatchers import ALLTOALL, FLEX
from parallel.planner import software
from parallel.planner.hardware import Hardware
from tools.published import models
from tools.published.clusters import hardware_of
from tools.published.table import BLANK, number

WORDS = ("source", "model", "other_flags", "flops_convention_note")
SIZES = ("n_gpus", "seq_len", "gbs", "mbs", "tp", "pp", "vpp", "cp", "ep", "etp")
FIGURES = ("tflops_per_gpu", "mfu_pct", "tokens_per_s_per_gpu", "step_time_s", "peak_mem_gb")
DEFAULT_DATE = 202509  # of sources without a date
HYBRID_EP = 202511  # Megatron-Bridge 0.2 was the first to have it
HARDWARE = (
    ("500w", "h100_500w"), ("gb300", "gb300"), ("gb200", "gb200"), ("b300", "b300"), ("b200", "b200"),
    ("h800", "h800"), ("h200", "h200"), ("h100", "h100"), ("a100", "a100"), ("ampere", "a100"),
)  # fmt: skip
MODULES = {
    "mla up-proj": "mla_up_proj", "up_proj": "mla_up_proj", "mla_up_proj": "mla_up_proj", "rmsnorm": "layernorm",
    "layernorm": "layernorm", "norm": "layernorm", "swiglu": "moe_act", "moe_act": "moe_act", "act": "moe_act",
    "mlp": "mlp", "moe": "moe", "core_attn": "core_attn", "core-attn": "core_attn", "shared_expert": "shared_experts",
}  # fmt: skip


def normalised(values: Mapping[str, str], directory: str | None = None) -> dict[str, str]:
    """The columns of `PublishedRun`, as text.

    Raises:
        Impossible: a number is not one, or not above 0.
    """
    row = dict(values)
    for name in (*SIZES, *FIGURES):
        text = row.get(name, "")
        row[name] = "" if text.lower() in BLANK else text
        if row[name]:
            number(name, row[name], whole=name in SIZES)
    text = " ".join(row.get(name) or "" for name in WORDS)
    words = text.lower()
    columns = {name: row[name] for name in SIZES}
    columns |= {
        "source": row.get("source", ""), "model": row["model"], "hardware": _hardware(row["hardware"]),
        "precision": _precision(row.get("precision", "")), "month": str(date_of(words)), "release": _release(text),
        "recompute": _recompute(row.get("recompute", ""), words),
        "note": "; ".join(row.get(name) or "" for name in WORDS[2:] if row.get(name)),
    }  # fmt: skip
    columns |= _model(row, words)
    model = models.find(row["model"], directory)
    columns |= _batch(row, words, model)
    columns |= _software(row, columns, words, model)
    columns |= _figures(row, words)
    columns["left_out"] = _left_out(columns["precision"], words)
    columns["not_modelled"] = "not a timed run" if "memory breakdown only" in words else ""
    return columns


def _hardware(text: str) -> str:
    """The cluster of `conf/cluster/` that a description names, or ""."""
    lower = text.lower()
    return next((name for word, name in HARDWARE if word in lower), "")


def date_of(words: str) -> int:
    """Year x 100 + month of a source: its container release, else its arXiv number, else any date in it."""
    for pattern, century in (
        (r"release (\d\d)\.(\d\d)", "20"), (r"nemo (\d\d)\.(\d\d)", "20"), (r"arxiv (\d\d)(\d\d)\.\d", "20"),
        (r"_h100_(20\d\d)-?(\d\d)", ""),
    ):  # fmt: skip
        if match := re.search(pattern, words):
            return int(f"{century}{match[1]}{match[2]}")
    if "r0.8" in words:  # Megatron-Core 0.8 came in July 2024
        return 202407
    return HYBRID_EP if "hybridep" in words else DEFAULT_DATE


def _release(text: str) -> str:
    match = re.search(r"release (\d\d\.\d\d(?:\.\d\d)?)", text)
    return match[1] if match else ""


def _precision(text: str) -> str:
    lower = text.lower()
    if "nvfp4" in lower:
        return "nvfp4"
    if "mx" in lower:
        return "mxfp8"
    if "blockwise" in lower or "128x128" in lower:
        return "block"
    if "rowwise" in lower:  # torch's row-wise kernels ran no faster than BF16
        return "bf16"
    return "tensor" if "fp8" in lower or "float8" in lower else "bf16"


def _recompute(text: str, words: str) -> str:
    lower = text.strip().lower()
    if lower == "portion of operators" or not (lower or "fsdp" in words):
        return ""
    if lower in ("none", ""):  # FSDP moves activations to the host where they do not fit
        return "none"
    if lower.startswith("full"):
        return "full"
    if "sac" in lower or "selective ac" in lower:  # torchtitan: every second GEMM is kept
        return "half"
    lower = lower.partition("(table")[0].replace("output in moe", "")
    modules = set()
    for word in sorted(MODULES, key=len, reverse=True):
        if word in lower:
            modules.add(MODULES[word])
            lower = lower.replace(word, " ")
    return "+".join(sorted(modules)) or "selective"


def _drops_tokens(words: str) -> bool:
    return "token-drop" in words or "drop cf=1" in words


def _model(row: Mapping[str, str], words: str) -> dict[str, str]:
    """What was left out of the model, or added to it."""
    without = "no mtp" in words or re.search(r"\(w/o MTP", row["model"])
    return {"mtp": "false" if without else "", "capacity_factor": "1" if _drops_tokens(words) else ""}


def _batch(row: Mapping[str, str], words: str, model: ModelConfig | None) -> dict[str, str]:
    """Batch, sequence and what else of the layout is in words."""
    torchtitan = "torchtitan" in words
    unpublished = re.search(
        r"([a-z/]*vpp[a-z/ ]*|[a-z/]*mbs[a-z/ ]*) (?:per model )?(?:not published|unpublished|not in table)", words
    )
    open_vpp = unpublished is not None and "vpp" in unpublished[0]
    changed = {
        "seq_len": row["seq_len"] or ("8192" if torchtitan else ""),
        "sequence_parallel": "false" if "no sequence parallel" in words else "",
        "vpp_published": "false" if open_vpp and not row["vpp"] else "",
        "schedule": "dualpipe" if "dualpipe" in words else "zb1p" if "zero-bubble" in words else "",
    }
    if "method=mcore;" in words and not row["etp"] and model is not None and model.is_moe:
        changed["etp"] = row["tp"]  # experts were split as the rest, before parallel folding
    local = re.search(r"local batch size (\d+)", words)
    if local and row["n_gpus"]:
        sequences, pp = int(local[1]), int(float(row["pp"] or 1))
        parts = 1 if pp == 1 else pp * (2 if "interleaved" in words else 1)  # torchtitan: as many as there are stages
        size = max(1, sequences // parts)
        each = pp * int(float(row["tp"] or 1)) * int(float(row["cp"] or 1))
        changed |= {"mbs": str(size), "gbs": str(size * parts * (int(float(row["n_gpus"])) // each))}
    return changed


def _software(
    row: Mapping[str, str], columns: Mapping[str, str], words: str, model: ModelConfig | None
) -> dict[str, str]:
    """Software as the row states it; blank where it says nothing."""
    torchtitan, deepseek = "torchtitan" in words, "dualpipe" in words
    fsdp = "fsdp" in words or torchtitan
    overlaps = ""
    if re.search(r"a2a overlap(?! off)|overlap on\b|pp1 \+ overlap", words):
        overlaps = "true"
    if "overlap off" in words:
        overlaps = "false"
    dispatcher = ""
    if "hybridep" in words or "deepep" in words:
        dispatcher = FLEX.name
    elif ALLTOALL.name in words or "dispatcher=a2a" in words:
        dispatcher = ALLTOALL.name
    vanilla = "vanilla tp" in words or (torchtitan and "asynctp" not in words and "async tp" not in words)
    loss = ""
    if fsdp and "torchtitan" in row.get("source", ""):
        stated = " ".join(row.get(name) or "" for name in WORDS)
        loss = "torch_compiled" if "compile" in stated else "torch"
    return {
        "software": "deepseek" if deepseek else "",
        "moments_dtype": "bf16" if "bf16 moments" in words else "",
        "cuda_graphs": _graphs(columns, words, model) if "cuda graphs" in words else "",
        "overlap_all_to_all": "" if fsdp else overlaps,
        "dispatcher": dispatcher,
        "overlap_tp": "false" if vanilla else "",
        "attention_kernel": "flash2" if torchtitan else "",  # PyTorch's own
        "fsdp": "true" if fsdp else "",
        "frozen_weights": "true" if "lora" in words else "",
        "routing": "learned" if "real routing" in words else "",
        "loss": loss,
    }


def _graphs(columns: Mapping[str, str], words: str, model: ModelConfig | None) -> str:
    """Which CUDA graphs a source means that gives no scope: the whole step where that was usual, else scoped ones."""
    cluster = hardware_of(columns["hardware"]) if columns["hardware"] else None
    if cluster is None or model is None or "dualpipe" in words:
        return "scoped"
    experts = int(float(columns["ep"] or 1)) * int(float(columns.get("etp") or 1))
    base = software.usual(
        int(columns["month"]), cluster.domain_gpus, experts, int(float(columns["vpp"] or 1)), columns["precision"]
    )
    return "full" if base.graphs == "full" or _fixed_shapes(cluster, words) else "scoped"


def _fixed_shapes(cluster: Hardware, words: str) -> bool:
    return _drops_tokens(words) and cluster.blackwell


def _figures(row: Mapping[str, str], words: str) -> dict[str, str]:
    """What was measured, and how the source counts FLOPs."""
    figures = {name: row[name] for name in FIGURES}
    if "use tflops" in words and row["tflops_per_gpu"]:
        figures["tokens_per_s_per_gpu"] = ""
    if row["peak_mem_gb"] and "memory GiB" in row.get("other_flags", ""):
        figures["peak_mem_gb"] = repr(float(row["peak_mem_gb"]) * (2**30 / 1e9))
    causal = ""
    if "non-causal" in words:
        causal = "false"
    elif "causal" in words.replace("causal/non-causal not stated", ""):
        causal = "true"
    return figures | {
        "flops_causal": causal,
        "flops_mtp": "true" if "mtp counted" in words and "not counted" not in words else "",
        "flops_hardware": "true" if "hardware flops" in words else "",
    }


def _left_out(precision: str, words: str) -> str:
    if "software-ablation" in words:
        return "software ablation"
    if "altered" in words:
        return "the model was altered"
    if precision == "nvfp4":
        return "NVFP4"
    if "whole pre-training average" in words or "ramps" in words:
        return "a mean over a run with a growing batch"
    if "approximate" in words:
        return "an approximate figure ('should be around')"
    return ""
