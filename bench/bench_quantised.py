"""Bits, bytes and perplexity of each format of quantised weights, for a tiny trained model; and the memory that an
export of DeepSeek-V3's shape takes.

The model is that of bench/trained_tiny.py. transformers computes the losses from each export, in fp32, on the same
tokens. The shape of DeepSeek-V3 is a directory of sparse files, whose numbers are zeros: every tensor is planned, and
some of the files are written. What is written is removed file by file, so that all of them (`--files 0`, hours) need no
space.

`make bench-quantised` prints both tables and writes bench/results/quantised_exports.json.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from bench import large_export
from bench.results import write
from bench.trained_tiny import BIN, SEQUENCE, SEQUENCES, STEPS, held_out, run, train

Row = dict[str, Any]
# transformers cannot dequantise FP8 with a last block that is smaller: 144 and 192 rows.
RAGGED = "convert.keep=[lm_head,*.kv_a_proj_with_mqa,*.q_b_proj]"
# Name of the row -> words of moe-convert.
FORMATS: dict[str, list[str]] = {
    "bf16": ["convert.dtype=bf16"],
    "fp8": ["convert.dtype=fp8", RAGGED],
    "int8": ["convert.dtype=int8"],
    "int8, groups of 128": ["convert.dtype=int8", "convert.group_size=128"],
    "mxfp4": ["convert.dtype=mxfp4"],
    "int4": ["convert.dtype=int4"],
    "int4, groups of 32": ["convert.dtype=int4", "convert.group_size=32"],
}
LARGE = ("int4", "int8", "mxfp4", "fp8")
MAX_PEAK_BYTES = 1e9
"""Of a process that exports DeepSeek-V3's shape."""


def losses(directory: Path, tokens: np.ndarray) -> np.ndarray:
    """Mean loss of each sequence with the exported model, nats a token, from transformers in fp32."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.quantizers import quantizer_finegrained_fp8

    # transformers asks for accelerate before it loads FP8; on a CPU it dequantises FP8, which does not use it.
    quantizer_finegrained_fp8.is_accelerate_available = lambda: True
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    found = []
    with torch.no_grad():
        model(torch.from_numpy(tokens[:1, :1]))  # decompresses
        model = torch.nn.Module.float(model)
        for batch in torch.from_numpy(tokens).split(8):
            logits = model(batch[:, :-1]).logits.transpose(1, 2)
            found.append(torch.nn.functional.cross_entropy(logits, batch[:, 1:], reduction="none").mean(dim=1))
    return torch.cat(found).numpy()


@dataclass(frozen=True)
class _Bf16:
    """A reader of tensors that are all bf16."""

    def dtype(self, _: Any) -> Any:
        from moe_train.formats.dtypes import DTYPES

        return DTYPES["bfloat16"]

    def part_rows(self, *_: Any) -> Any:
        raise NotImplementedError

    def quantised(self, _: Any) -> None:
        """No weight is."""

    def has(self, _: str) -> bool:
        return True

    def settle(self) -> None:
        """Nothing to check."""


def export_bytes(words: Sequence[str], model: Any) -> tuple[int, float]:
    """Bytes of the tensors of an export of `model`, and bits for each quantised number."""
    from moe_train.conversion.hf_outputs import KEPT, ConvertOptions, Export
    from moe_train.conversion.mapping import pieces

    given = dict(word.removeprefix("convert.").split("=") for word in words)
    group = int(given["group_size"]) if "group_size" in given else None
    keep = tuple(given["keep"].strip("[]").split(",")) if "keep" in given else KEPT
    all_pieces = pieces(model)
    export = Export(_Bf16(), all_pieces, ConvertOptions(given["dtype"], group_size=group, keep=keep))
    outputs = [output for tensors in export.groups for output in tensors]
    quantised = {output.weight for output in outputs if output.weight is not None}
    stored = sum(output.bytes for output in outputs if output.weight is not None)
    numbers = sum(
        math.prod(piece.part_shape(part)) for piece in all_pieces for part in piece.parts if part.name in quantised
    )
    return sum(output.bytes for output in outputs), 8 * stored / numbers if numbers else 16.0


def quality(run_dir: Path, directory: Path) -> list[Row]:
    """A row for each format."""
    from moe_train.conversion import hf_config
    from moe_train.formats import run_config
    from moe_train.formats.run_directory import candidates

    tokens = held_out(run_dir)
    tiny = run_config.model_of(candidates(run_dir / "checkpoints")[0])
    rows: list[Row] = []
    baseline = np.zeros(0)
    for name, words in FORMATS.items():
        target = directory / f"export-{len(rows)}"
        run([BIN / "moe-convert", run_dir, target, *words])
        run([BIN / "moe-convert", "verify", run_dir, target])
        found = losses(target, tokens)
        baseline = baseline if rows else found
        difference = found - baseline
        size, bits = export_bytes(words, tiny)
        large, large_bits = export_bytes([word for word in words if word != RAGGED], deepseek_v3(hf_config))
        rows.append({
            "format": name, "bits": round(bits, 3), "bytes": size, "loss": float(found.mean()),
            "perplexity": math.exp(found.mean()), "perplexity_cost": math.expm1(difference.mean()),
            "standard_error": float(difference.std() / math.sqrt(len(difference))),
            "deepseek_v3_bits": round(large_bits, 3), "deepseek_v3_bytes": large,
        })  # fmt: skip
        shutil.rmtree(target)
    return rows


def deepseek_v3(hf_config: Any, layers: int | None = None) -> Any:
    """The model of the release."""
    from moe_train.config.composition.compose import compose

    changes = [] if layers is None else [f"model.num_layers={layers}"]
    return compose(["model=deepseek_v3", *changes]).model


def memory(directory: Path, files: int, threads: int) -> list[Row]:
    """A row for each format of LARGE: the largest resident set of an export of DeepSeek-V3's shape."""
    from moe_train.conversion import hf_config

    source = directory / "deepseek_v3"
    size = large_export.sparse_source(source, deepseek_v3(hf_config))
    rows = []
    for dtype in LARGE:
        target = directory / "large"
        start = time.perf_counter()
        output = run([sys.executable, "-m", "bench.large_export", source, target, dtype, files, threads])
        rows.append({
            "shape": "deepseek_v3", "source_bytes": size, "format": dtype, **memory_figures(json.loads(output)),
            "all_s": round(time.perf_counter() - start, 1),
        })  # fmt: skip
        shutil.rmtree(target)
    return rows


def memory_figures(measured: Row) -> Row:
    """What `large_export.export` found, with the peak of the whole export and of its first half."""
    peaks = measured.pop("peaks")
    return {**measured, "peak_bytes": peaks[-1], "peak_bytes_first_half": peaks[(len(peaks) - 1) // 2]}


def quality_table(rows: Sequence[Row]) -> Table:
    """The formats for a terminal."""
    table = Table(title="quantised exports of a tiny trained model", title_justify="left")
    for column in ("format", "bits per weight", "of bf16", "loss", "perplexity", "cost", "error", "DeepSeek-V3, GB"):
        table.add_column(column, justify="left" if column == "format" else "right")
    for row in rows:
        table.add_row(
            row["format"], f"{row['bits']:.2f}", f"{row['bytes'] / rows[0]['bytes']:.3f}", f"{row['loss']:.4f}",
            f"{row['perplexity']:.2f}", f"{row['perplexity_cost']:+.2%}",
            f"{row['standard_error']:.2%}", f"{row['deepseek_v3_bytes'] / 1e9:,.0f}",
        )  # fmt: skip
    return table


def memory_table(rows: Sequence[Row]) -> Table:
    """The exports of DeepSeek-V3's shape for a terminal."""
    table = Table(title="export of DeepSeek-V3's shape", title_justify="left")
    for column in ("format", "files planned", "files written", "written, GB", "seconds", "peak after half, MB",
                   "peak of the process, MB"):  # fmt: skip
        table.add_column(column, justify="left" if column == "format" else "right")
    for row in rows:
        table.add_row(
            row["format"], f"{row['planned_files']:,}", str(row["written_files"]), f"{row['written_bytes'] / 1e9:.2f}",
            f"{row['write_s']:.0f}", f"{row['peak_bytes_first_half'] / 1e6:,.0f}", f"{row['peak_bytes'] / 1e6:,.0f}",
        )  # fmt: skip
    return table


def main() -> None:
    """Command line of `make bench-quantised`. Exits with 1 if a process takes 1 GB or more."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--run", type=Path, help="a trained run of this script, which is not trained again")
    parser.add_argument(
        "--files", type=int, default=24, help="files of DeepSeek-V3's shape to write in each format; 0: all"
    )
    parser.add_argument("--threads", type=int, default=6)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-quantised-") as name:
        directory = Path(name)
        run_dir = arguments.run or directory / "run"
        if arguments.run is None:
            train(run_dir, arguments.steps)
        rows = quality(run_dir, directory)
        large = memory(directory, arguments.files, arguments.threads)
    console = Console()
    console.print(quality_table(rows))
    console.print(memory_table(large))
    summary = {
        "steps": arguments.steps,
        "held_out_tokens": SEQUENCE * SEQUENCES,
        "perplexity_cost": {row["format"]: row["perplexity_cost"] for row in rows[1:]},
        "peak_bytes": max(row["peak_bytes"] for row in large),
    }
    print(f"wrote {write('quantised_exports', summary, [*rows, *large])}")
    sys.exit(0 if summary["peak_bytes"] < MAX_PEAK_BYTES else 1)


if __name__ == "__main__":
    main()
