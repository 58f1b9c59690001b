"""A row of a table of published runs as a job that the planner can time.

What a row leaves out is filled by rules that hold for every row: see `FILLED`. A row that cannot be modelled says why.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache

import yaml

from moe_train.config.cluster import ClusterConfig
from moe_train.config.composition.explain import CONF_DIR
from moe_train.config.model import ModelConfig
from parallel.errors import ConfigError
from parallel.layout import ParallelLayout
from parallel.planner import software as software_of
from parallel.planner.calibration import Calibration
from parallel.planner.hardware import Hardware
from parallel.planner.software import Software
from tools.published import models

FILLED = """\
tp, pp, vpp, cp, ep, micro-batch: 1; vpp, where the source says that it is unpublished: the fastest that fits memory.
etp: 1, but tp where experts were split as the rest ("method=MCore", before parallel folding). dp: fills the GPUs.
seq_len: 8,192 for torchtitan, else 4,096. Recomputation: the least that fits memory; none with FSDP. Software: what was
usual at the date of the source (`parallel.planner.software`; September 2025 where it has none, November where it says
HybridEP), where the row does not say otherwise; expert dispatch by
NCCL within a node of 8, overlapped where it leaves the NVLink domain and vpp > 1. TFLOPS and MFU become tokens/s by the
source's own convention: causal where it says so, and from 2025.04 on."""

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


@dataclass(frozen=True)
class Row:
    """A published run, understood.

    Args:
        index: number of the row, from 0.
        values: the row as it stands in the table.
        model, hardware, software, layout: what ran, on what, how.
        schedule: one of `parallel.planner.schedules.SCHEDULES`, or "" for 1F1B or interleaved by vpp.
        precision: bf16, fp8 recipe (block, tensor, mxfp8) or nvfp4.
        recompute: (mode, method, layers, modules), or None where it is not published.
        open_vpp: vpp is not published: the planner chooses.
        left_out: why the row does not count towards the accuracy, though it has a prediction; or "".
    """

    index: int
    values: Mapping[str, str]
    model: ModelConfig
    hardware: Hardware
    software: Software
    layout: ParallelLayout
    schedule: str
    precision: str
    micro_batch_size: int
    micro_batches: int
    seq_length: int
    sequence_parallel: bool
    recompute: tuple[str, str, int, frozenset[str]] | None
    open_vpp: bool
    left_out: str

    @property
    def month(self) -> int:
        """Year x 100 + month of its source, and so of its software."""
        return date_of(text_of(self.values).lower())

    @property
    def release(self) -> str:
        """The release of its software, with the patch: 26.04.01; empty where it is not stated."""
        found = re.search(r"release (\d\d\.\d\d(?:\.\d\d)?)", text_of(self.values))
        return found[1] if found else ""

    @property
    def configuration(self) -> str:
        """What makes two rows the same configuration: model, hardware, GPUs, layout, batch, precision; not the
        release."""
        degrees = "|".join(f"{field.name}={getattr(self.layout, field.name)}" for field in fields(self.layout))
        batch = f"{self.micro_batch_size}x{self.micro_batches}x{self.seq_length}"
        again = "" if self.recompute is None else f"{self.recompute[0]}{self.recompute[2]}{sorted(self.recompute[3])}"
        parts = (
            f"{self.software.fsdp}|{self.software.overlap_tp}|{self.model.mtp_num_layers}|{self.model.capacity_factor}"
        )
        return "|".join([self.model.name, self.hardware.name, self.precision, degrees, batch, again, parts])


def text_of(values: Mapping[str, str]) -> str:
    """Everything a row says in words."""
    return " ".join(values.get(name) or "" for name in ("source", "model", "other_flags", "flops_convention_note"))


def understand(
    index: int, values: Mapping[str, str], constants: Calibration, directory: str | None = None
) -> Row | str:
    """The row, or why there is no prediction for it."""
    found = models.find(values["model"], directory)
    if found is None:
        return "no model of that name: its shape is not stated, or outside the schema (Mamba, sparse attention)"
    hardware = hardware_of(values["hardware"])
    if hardware is None:
        return "the hardware is not stated"
    words = text_of(values).lower()
    if "memory breakdown only" in words:
        return "not a timed run"
    gpus = integer(values["n_gpus"])
    if gpus is None or not any(values[name].strip() for name in ("tp", "pp", "ep")):
        return "the layout is not stated"
    model = _as_trained(replace(found), words)
    degrees = _degrees(values, model, words)
    try:
        layout = ParallelLayout.resolve(**degrees, world_size=gpus)
    except ConfigError as error:
        return f"the layout does not fit: {error.cause}"
    batch = _batch(values, layout, words)
    if isinstance(batch, str):
        return batch
    micro_batch, micro_batches = batch
    return Row(
        index=index, values=values, model=model, hardware=hardware,
        software=_software(words, constants, hardware, layout, _precision(values["precision"])), layout=layout,
        schedule=_schedule(words), precision=_precision(values["precision"]), micro_batch_size=micro_batch,
        micro_batches=micro_batches, seq_length=_sequence(values, words),
        sequence_parallel=layout.tp > 1 and "no sequence parallel" not in words,
        recompute=_recompute(values["recompute"], model, words),
        open_vpp=_is_open("vpp", words) and not values["vpp"].strip(), left_out=_left_out(values, words),
    )  # fmt: skip


def integer(text: str) -> int | None:
    """A whole number, or None for a blank."""
    return int(float(text)) if text.strip() else None


def number(text: str) -> float | None:
    """A number, or None for a blank."""
    return float(text) if text.strip() else None


def hardware_of(text: str) -> Hardware | None:
    """The cluster of `conf/cluster/` that a description names."""
    lower = text.lower()
    names = [name for word, name in HARDWARE if word in lower]
    return cluster(names[0]) if names else None


@cache
def cluster(name: str) -> Hardware:
    """The hardware in `conf/cluster/NAME.yaml`."""
    return Hardware.of(
        ClusterConfig(**yaml.safe_load((CONF_DIR / "cluster" / f"{name}.yaml").read_text(encoding="utf-8")))
    )


def date_of(text: str) -> int:
    """Year x 100 + month of a source: its container release, else its arXiv number, else any date in it."""
    for pattern, century in (
        (r"release (\d\d)\.(\d\d)", "20"), (r"nemo (\d\d)\.(\d\d)", "20"), (r"arxiv (\d\d)(\d\d)\.\d", "20"),
        (r"_h100_(20\d\d)-?(\d\d)", ""),
    ):  # fmt: skip
        if found := re.search(pattern, text):
            return int(f"{century}{found[1]}{found[2]}")
    if "r0.8" in text:  # Megatron-Core 0.8 came in July 2024
        return 202407
    return HYBRID_EP if "hybridep" in text else DEFAULT_DATE


def _as_trained(model: ModelConfig, words: str) -> ModelConfig:
    if "no mtp" in words:
        model.mtp_num_layers = 0
    if _drops_tokens(words):  # padded to one shape
        model.capacity_factor, model.pad_to_capacity = 1.0, True
    return model


def _drops_tokens(words: str) -> bool:
    return "token-drop" in words or "drop cf=1" in words


def _degrees(values: Mapping[str, str], model: ModelConfig, words: str) -> dict[str, int]:
    degrees = {name: integer(values[name]) or 1 for name in ("tp", "pp", "vpp", "cp", "ep")}
    with_rest = re.search(r"method=mcore;", words) is not None and model.is_moe
    degrees["etp"] = integer(values["etp"]) or (degrees["tp"] if with_rest else 1)
    return degrees


def _batch(values: Mapping[str, str], layout: ParallelLayout, words: str) -> tuple[int, int] | str:
    """(micro-batch, micro-batches of a rank)."""
    local = re.search(r"local batch size (\d+)", words)
    if local:
        sequences = int(local[1])
        if layout.pp == 1:
            return sequences, 1
        parts = layout.pp * (2 if "interleaved" in words else 1)  # torchtitan: as many as there are stages
        return max(1, sequences // parts), parts
    micro_batch, batch = integer(values["mbs"]) or 1, integer(values["gbs"])
    if batch is None:
        return "the batch is not stated"
    return micro_batch, max(1, round(batch / (micro_batch * layout.dp)))


def _sequence(values: Mapping[str, str], words: str) -> int:
    return integer(values["seq_len"]) or (8192 if "torchtitan" in words else 4096)


def _schedule(words: str) -> str:
    return "dualpipe" if "dualpipe" in words else "zb1p" if "zero-bubble" in words else ""


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


def _is_open(name: str, words: str) -> bool:
    """Whether the source says that a setting was not published."""
    found = re.search(
        r"([a-z/]*vpp[a-z/ ]*|[a-z/]*mbs[a-z/ ]*) (?:per model )?(?:not published|unpublished|not in table)", words
    )
    return found is not None and name in found[0]


def _recompute(text: str, model: ModelConfig, words: str) -> tuple[str, str, int, frozenset[str]] | None:
    lower = text.strip().lower()
    if lower == "portion of operators" or not (lower or "fsdp" in words):
        return None
    if lower in ("none", ""):  # FSDP moves activations to the host where they do not fit
        return "none", "uniform", 1, frozenset()
    if lower.startswith("full"):
        return "full", "uniform", 1, frozenset()
    if "sac" in lower or "selective ac" in lower:  # torchtitan: every second product is kept
        return "full", "block", max(1, model.num_layers // 2), frozenset()
    lower = lower.partition("(table")[0].replace("output in moe", "")
    known = sorted(MODULES, key=len, reverse=True)
    modules = set()
    for word in known:
        if word in lower:
            modules.add(MODULES[word])
            lower = lower.replace(word, " ")
    return "selective", "uniform", 1, frozenset(modules)


def _software(
    words: str, constants: Calibration, hardware: Hardware, layout: ParallelLayout, precision: str
) -> Software:
    """What was usual at the date of the source, changed by what the row says."""
    month = date_of(words)
    experts = layout.ep * layout.etp
    found = software_of.usual(month, hardware.domain_gpus, experts, layout.vpp, precision)
    # Within a node NCCL's all-to-all was usual at first, and for tokens padded to capacity there was nothing else.
    if month < software_of.GRAPHS_FROM and (experts <= hardware.domain_gpus <= 8 or _drops_tokens(words)):
        found = replace(found, dispatcher="alltoall")
    if _drops_tokens(words) and hardware.blackwell:  # one shape: layers run from CUDA graphs
        found = replace(found, graphs="full")
    if "dualpipe" in words:
        found = software_of.deepseek_v3()
    if re.search(r"a2a overlap(?! off)|overlap on\b|pp1 \+ overlap", words):
        found = replace(found, overlap_all_to_all=True)
    if "overlap off" in words:
        found = replace(found, overlap_all_to_all=False)
    if "hybridep" in words or "deepep" in words:
        found = replace(found, dispatcher="flex")
    elif "alltoall" in words or "dispatcher=a2a" in words:
        found = replace(found, dispatcher="alltoall")
    if "cuda graphs" in words:
        found = replace(found, graphs="full" if found.graphs == "full" else "scoped")
    if "fsdp" in words or "torchtitan" in words:
        found = replace(found, fsdp=True, overlap_all_to_all=False)
    if "torchtitan" in words:  # PyTorch's own attention: FlashAttention-2
        found = replace(found, flash2=True)
    if "vanilla tp" in words or ("torchtitan" in words and "asynctp" not in words and "async tp" not in words):
        found = replace(found, overlap_tp=False)
    if "lora" in words:
        found = replace(found, frozen=True)
    if "real routing" in words:
        found = replace(found, imbalance=constants.real_imbalance)
    return found


def _left_out(values: Mapping[str, str], words: str) -> str:
    if "software-ablation" in words:
        return "software ablation"
    if "altered" in words:
        return "the model was altered"
    if _precision(values["precision"]) == "nvfp4":
        return "NVFP4"
    if "whole pre-training average" in words or "ramps" in words:
        return "a mean over a run with a growing batch"
    if "approximate" in words:
        return "an approximate figure ('should be around')"
    return ""
