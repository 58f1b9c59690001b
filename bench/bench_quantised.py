"""Bits, bytes and perplexity of each format of quantised weights, for a tiny trained model; and the memory that an
export of DeepSeek-V3's shape takes.

The model is `model=tiny` with widths that are multiples of 128, without multi-token prediction, trained on the standard
library of Python. transformers computes the losses from each export, in fp32, on the same tokens. The shape of
DeepSeek-V3 is a directory of sparse files, whose numbers are zeros: every tensor is planned, and some of the files are
written.

`make bench-quantised` prints both tables and writes bench/results/quantised_exports.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
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

from bench.results import write

Row = dict[str, Any]
BIN = Path(sys.executable).parent
SEQUENCE, SEQUENCES = 128, 320
"""Held-out tokens: their length and number."""
MODEL = [
    "model=tiny", "model.q_lora_rank=128", "model.kv_lora_rank=128", "model.moe_ffn_hidden_size=128",
    "model.mtp_num_layers=0",
]  # fmt: skip
TRAINING = [
    "data=stdlib", "parallel=single", "runtime=cpu", f"train.seq_length={SEQUENCE}", "train.eval_batches=0",
    "batch.global_batch_size=8", "batch.micro_batch_size=4", "train.sample_continuations=0", "telemetry.progress=false",
]  # fmt: skip
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
LARGE_FILE_GB = 0.5

# Plans all files of an export and writes some: prints seconds, bytes, tensors and the largest resident set.
EXPORT = """
import re, sys, time
from pathlib import Path
from moe_train.config.roots import ConvertRoot
from moe_train.formats import directory_writer
from moe_train.formats.communicator import SingleProcess
from tools.convert import make_plan
source, target, dtype, file_gb, files, threads = sys.argv[1:]
cfg = ConvertRoot()
cfg.convert.to, cfg.convert.dtype, cfg.convert.file_gb = "hf", dtype, float(file_gb)
plan = make_plan(cfg, Path(source), Path(target))
planned, whole = len(plan.jobs), sum(job.bytes for job in plan.jobs)
plan.jobs = plan.jobs[:: max(1, planned // int(files))][: int(files)]
start = time.perf_counter()
done = directory_writer.run(plan, SingleProcess(), int(threads))
seconds = time.perf_counter() - start
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
print(seconds, done.bytes, planned, whole, peak)
"""


def run(words: Sequence[object]) -> str:
    """Output of a command.

    Raises:
        RuntimeError: it failed.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, words))[:200]} failed: {(done.stdout + done.stderr)[-2000:]}")
    return done.stdout


def train(run_dir: Path, steps: int) -> None:
    """Train the model, or continue to `steps`."""
    schedule = [f"train.steps={steps}", "schedule.on_resume=override"]
    run([BIN / "moe-train", *MODEL, *TRAINING, *schedule, f"run_dir={run_dir}", data_dir(run_dir)])


def data_dir(run_dir: Path) -> str:
    """Where the dataset of a run is, next to it."""
    return f"data.dir={run_dir.parent / 'data'}"


def held_out(run_dir: Path) -> np.ndarray:
    """Tokens [SEQUENCES, SEQUENCE + 1] of the documents after those that were trained on."""
    from moe_train.config.composition.compose import compose
    from moe_train.data import manifest
    from moe_train.data.index_file import read_index

    data = compose([*MODEL, *TRAINING, data_dir(run_dir)]).data
    (prefix,) = manifest.prefixes(data)
    lengths = read_index(prefix).lengths
    trained = float(data.split.split(",")[0]) / sum(map(float, data.split.split(",")))
    begin = int(lengths[: round(trained * len(lengths))].sum())
    tokens = np.fromfile(f"{prefix}.bin", np.uint16, SEQUENCES * (SEQUENCE + 1), offset=begin * 2)
    return tokens.astype(np.int64).reshape(SEQUENCES, SEQUENCE + 1)


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


def sparse_source(directory: Path) -> int:
    """Write DeepSeek-V3's tensors as files without stored bytes; returns how many bytes they have."""
    from moe_train.conversion import hf_config
    from moe_train.conversion.hf_source import names_of
    from moe_train.conversion.mapping import pieces
    from moe_train.formats import safetensors
    from moe_train.formats.dtypes import DTYPES

    model = deepseek_v3(hf_config)
    shapes = names_of(pieces(model))
    directory.mkdir()
    (directory / hf_config.FILE).write_text(json.dumps(hf_config.to_hf(model, "bfloat16")))
    names, total = list(shapes), 0
    weight_map: dict[str, str] = {}
    per_file = -(-len(names) // 163)  # files of the release
    for number, start in enumerate(range(0, len(names), per_file), 1):
        file = f"model-{number:05d}.safetensors"
        tensors = [
            (n, DTYPES["float32" if n.endswith("e_score_correction_bias") else "bfloat16"], shapes[n])
            for n in names[start : start + per_file]
        ]
        header = safetensors.header(tensors)
        size = sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in tensors)
        (directory / file).write_bytes(header)
        os.truncate(directory / file, len(header) + size)
        weight_map |= dict.fromkeys((name for name, _, _ in tensors), file)
        total += size
    (directory / safetensors.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return total


def memory(directory: Path, files: int, threads: int) -> list[Row]:
    """A row for each format of LARGE: the largest resident set of an export of DeepSeek-V3's shape."""
    source = directory / "deepseek_v3"
    size = sparse_source(source)
    rows = []
    for dtype in LARGE:
        target = directory / "large"
        start = time.perf_counter()
        output = run([sys.executable, "-c", EXPORT, source, target, dtype, LARGE_FILE_GB, files, threads])
        seconds, written, planned, whole, peak = map(float, output.split())
        rows.append({
            "shape": "deepseek_v3", "source_bytes": size, "format": dtype, "planned_files": int(planned),
            "planned_bytes": int(whole), "written_files": files, "written_bytes": int(written), "threads": threads,
            "write_s": round(seconds, 1), "all_s": round(time.perf_counter() - start, 1), "peak_bytes": int(peak),
        })  # fmt: skip
        shutil.rmtree(target)
    return rows


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
    for column in ("format", "files planned", "files written", "written, GB", "seconds", "peak of the process, MB"):
        table.add_column(column, justify="left" if column == "format" else "right")
    for row in rows:
        table.add_row(
            row["format"], f"{row['planned_files']:,}", str(row["written_files"]), f"{row['written_bytes'] / 1e9:.2f}",
            f"{row['write_s']:.0f}", f"{row['peak_bytes'] / 1e6:,.0f}",
        )  # fmt: skip
    return table


def main() -> None:
    """Command line of `make bench-quantised`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=1_000)
    parser.add_argument("--run", type=Path, help="a trained run of this script, which is not trained again")
    parser.add_argument("--files", type=int, default=8, help="files of DeepSeek-V3's shape to write in each format")
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


if __name__ == "__main__":
    main()
