"""Options of moe-convert and moe-inspect. YAML files under `conf/convert/` and `conf/inspect/` fill them. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from moe_train.config.fields import doc


@dataclass
class ConvertConfig:
    """Options of moe-convert."""

    source: str | None = doc(None, "Checkpoint to read: a Hugging Face directory, or one of a run (its newest).")
    target: str | None = doc(None, "Directory to write; it must not exist.")
    to: str | None = doc(None, "Format to write; null means the other format.", choices=("hf", "megatron"))
    dtype: str | None = doc(
        None, "Format of the weights; null keeps that of each tensor (bf16 for quantised ones).",
        choices=("fp32", "bf16", "fp16", "fp8", "int8", "int4", "mxfp4"),
    )  # fmt: skip
    group_size: int | None = doc(
        None, "Inputs that share a scale in int8 and int4; null means a whole row in int8, and 128 in int4.",
        minimum=8, maximum=65_536,
    )  # fmt: skip
    keep: list[str] = doc(
        ["lm_head"], "Linear layers that stay in bf16: patterns of their Hugging Face names, such as *.kv_b_proj."
    )
    file_gb: float | None = doc(
        None, "Approximate file size, GB; null makes about thirty files of at most 4 GiB.", minimum=1e-6
    )
    optimizer: bool = doc(True, "Keep the optimizer state in a copy of the same format.")
    ema: bool = doc(
        False, "Convert the EMA of the weights of a run instead of its weights; without convert.dtype in fp32."
    )
    data_dir: str | None = doc(
        None, "Dataset whose tokenizer an export takes, where the run's data.dir has moved; null means data.dir."
    )
    power_of_two_scales: bool = doc(True, "FP8 scales are powers of two, so that a second conversion is lossless.")
    allow_nonfinite: bool = doc(
        False, "Convert NaN and infinite numbers unchanged, with a warning; otherwise they are an error."
    )
    threads: int | None = doc(
        None, "Files that one process writes concurrently; null means two per core, plus two.", minimum=1, maximum=1_000
    )


@dataclass
class InspectConfig:
    """Options of moe-inspect."""

    path: str | None = doc(None, "Checkpoint: a Hugging Face directory, one of a run, or a run (its newest).")
    other: str | None = doc(None, "Second checkpoint, to compare the first with; null describes the first.")
    rows: int = doc(20, "Number of differing tensors to show; all are counted.", minimum=0)
    atol: float = doc(
        0.0, "Absolute part of the tolerance for each number: |a - b| <= atol + rtol max(|a|, |b|).", minimum=0
    )
    rtol: float = doc(0.0, "Relative part of the tolerance for each number; 0 in both allows no difference.", minimum=0)
    norm_rtol: float | None = doc(
        None, "Largest norm-relative difference of a tensor, |A - B| / |A|; null means no limit.", minimum=0
    )
    weights_only: bool = doc(False, "Exclude optimizer state, random states and FP8 scales of training from --diff.")
    threads: int | None = doc(
        None, "Files or tensors to read concurrently; null means one per core.", minimum=1, maximum=1_000
    )
