"""`make bench-convert`: how fast checkpoints convert, against `cp` of the same bytes and transformers' load and save.

A synthetic checkpoint in the shape of DeepSeek-V3 (random bf16 weights, narrower, 64 experts a layer) converts both
ways, with one process and with two MPI ranks. Every command runs as a user would start it; its memory is the largest
resident set of any one of its processes, read from /proc while it runs. The variants take turns, on files that are in
the page cache, and medians are shown.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from bench.results import write
from moe_train.formats.dtypes import DTYPES, Dtype

BIN = Path(sys.executable).parent
_POLL_S = 0.02

Row = dict[str, Any]

# config.json of DeepSeek-V3, narrower and shorter; `layers` makes the size.
SHAPE = {
    "vocab_size": 32_000, "hidden_size": 1024, "intermediate_size": 2816, "moe_intermediate_size": 512,
    "num_attention_heads": 16, "num_key_value_heads": 16, "n_shared_experts": 1, "n_routed_experts": 64,
    "routed_scaling_factor": 2.5, "kv_lora_rank": 512, "q_lora_rank": 768, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "qk_nope_head_dim": 128, "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8, "first_k_dense_replace": 1,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "hidden_act": "silu", "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"],
    "torch_dtype": "bfloat16", "num_nextn_predict_layers": 0,
}  # fmt: skip

TRANSFORMERS = """
import sys
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
model.save_pretrained(sys.argv[2])
"""


def synthesise(directory: Path, size_gb: float) -> int:
    """Write a checkpoint of about `size_gb` GB; returns its bytes."""
    import json

    import torch

    from moe_train.conversion import hf_config as config
    from moe_train.conversion.hf_source import names_of
    from moe_train.conversion.mapping import pieces
    from moe_train.formats import safetensors
    from moe_train.formats.hashing_file import HashingFile
    from moe_train.formats.tensor_slices import TensorSlice
    from moe_train.model.arithmetic import count_parameters

    def parameters(layers: int) -> int:
        return count_parameters(config.to_model({**SHAPE, "num_hidden_layers": layers})).total

    layers = max(2, round((size_gb * 1e9 / 2 - parameters(1)) / (parameters(3) - parameters(2))) + 1)
    described = {**SHAPE, "num_hidden_layers": layers}
    shapes = names_of(pieces(config.to_model(described)))
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(described))
    generator = torch.Generator().manual_seed(0)
    names, weight_map, total = list(shapes), {}, 0
    per_file = -(-len(names) // 8)
    for number, start in enumerate(range(0, len(names), per_file), 1):
        names_of_file = names[start : start + per_file]
        file = f"model-{number:05d}.safetensors"
        out = HashingFile(directory / file)
        out.write(safetensors.header([(name, _dtype(name), shapes[name]) for name in names_of_file]))
        for name in names_of_file:
            # Random bytes would be as good as any to copy, but not to load: NaN takes other paths.
            values = torch.empty(shapes[name]).normal_(0, 0.02, generator=generator)
            out.write(TensorSlice.of(values.to(_dtype(name).torch)).data)
            weight_map[name] = file
        out.close()
        total += out.position
    (directory / safetensors.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return total


def _dtype(name: str) -> Dtype:
    return DTYPES["float32" if name.endswith("e_score_correction_bias") else "bfloat16"]


def timed(command: Sequence[str | Path], target: Path) -> tuple[float, int]:
    """Seconds that a command takes to write `target`, and the highest peak of resident bytes among its processes.

    Raises:
        RuntimeError: it failed.
    """
    shutil.rmtree(target, ignore_errors=True)
    start = time.perf_counter()
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    root, peak = psutil.Process(process.pid), 0
    while process.poll() is None:
        with suppress(psutil.Error, OSError):
            peak = max(peak, *(_high_water(p.pid) for p in (root, *root.children(recursive=True))))
        time.sleep(_POLL_S)
    seconds = time.perf_counter() - start
    if process.returncode:
        output = process.stdout.read().decode() if process.stdout else ""
        raise RuntimeError(f"{' '.join(map(str, command))} failed: {output[-2000:]}")
    return seconds, peak


def in_memory(*directories: Path) -> None:
    """Read all files, so that every variant finds what it reads in the page cache."""
    block = bytearray(1 << 22)
    for path in (path for directory in directories for path in directory.rglob("*") if path.is_file()):
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass


def _high_water(pid: int) -> int:
    """Largest resident set that the process has had so far, bytes."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return 0


def variants(source: Path, work: Path) -> dict[str, tuple[list[str | Path], Path]]:
    """Commands by name, each with the directory that it writes."""
    convert, megatron = BIN / "moe-convert", work / "megatron"
    two: list[str | Path] = [BIN / "mpirun", "-n", "2"]
    return {
        "cp": (["cp", "-r", source, work / "cp"], work / "cp"),
        # A conversion ends when its files are on disk, and cp when they are in memory.
        "cp, on disk": (["sh", "-c", f"cp -r '{source}' '{work}/s' && sync"], work / "s"),
        "HF to Megatron": ([convert, source, work / "a"], work / "a"),
        "HF to Megatron, 1 thread": ([convert, source, work / "b", "convert.threads=1"], work / "b"),
        "HF to Megatron, 2 MPI ranks": ([*two, convert, source, work / "c", "convert.threads=1"], work / "c"),
        "Megatron to HF": ([convert, megatron, work / "d"], work / "d"),
        "Megatron to HF, 1 thread": ([convert, megatron, work / "e", "convert.threads=1"], work / "e"),
        "Megatron to HF, 2 MPI ranks": ([*two, convert, megatron, work / "f", "convert.threads=1"], work / "f"),
        "transformers load and save": ([sys.executable, "-c", TRANSFORMERS, source, work / "t"], work / "t"),
    }


def measure(size_gb: float, repeats: int, directory: Path) -> tuple[dict[str, Any], list[Row]]:
    """Summary and one row for each variant."""
    console = Console(stderr=True)
    source = directory / "source"
    size = synthesise(source, size_gb)
    commands = variants(source, directory)
    timed([BIN / "moe-convert", source, directory / "megatron"], directory / "megatron")
    runs_of_command: dict[str, list[tuple[float, int]]] = {name: [] for name in commands}
    for number in range(repeats):
        for name, (command, target) in commands.items():
            in_memory(source, directory / "megatron")
            os.sync()  # nobody waits for what an earlier one has left to write
            runs_of_command[name].append(timed(command, target))
            console.print(f"{number + 1}/{repeats} {name}: {runs_of_command[name][-1][0]:.1f} s", highlight=False)
            shutil.rmtree(target)
    cp_s = statistics.median(seconds for seconds, _ in runs_of_command["cp"])
    rows: list[Row] = []
    for name, runs in runs_of_command.items():
        seconds = statistics.median(s for s, _ in runs)
        peak = max(peak for _, peak in runs)
        rows.append(
            {
                "what": name,
                "seconds": round(seconds, 2),
                "all_seconds": [round(s, 2) for s, _ in runs],
                "gb_per_s": round(size / seconds / 1e9, 3),
                "of_cp": round(cp_s / seconds, 3),
                "peak_bytes_of_a_process": peak,
            }
        )
    by_name = {row["what"]: row for row in rows}
    summary = {
        "bytes": size,
        "fraction_of_cp_to_megatron": by_name["HF to Megatron"]["of_cp"],
        "fraction_of_cp_to_hf": by_name["Megatron to HF"]["of_cp"],
        "cp_on_disk_of_cp": by_name["cp, on disk"]["of_cp"],
        "peak_bytes": max(row["peak_bytes_of_a_process"] for row in rows if "HF" in row["what"]),
        **{
            f"two_ranks_over_one_{end}": round(
                by_name[f"{way}, 1 thread"]["seconds"] / by_name[f"{way}, 2 MPI ranks"]["seconds"], 2
            )
            for way, end in (("HF to Megatron", "to_megatron"), ("Megatron to HF", "to_hf"))
        },
    }
    return summary, rows


def table(summary: dict[str, Any], rows: list[Row]) -> Table:
    """The rows for a terminal."""
    shown = Table(title=f"conversion of {summary['bytes'] / 1e9:.2f} GB", title_justify="left")
    for column in ("what", "seconds", "GB/s", "of cp", "peak of a process, MB"):
        shown.add_column(column, justify="left" if column == "what" else "right")
    for row in rows:
        cells = (f"{row['seconds']:.2f}", f"{row['gb_per_s']:.2f}", f"{row['of_cp']:.2f}")
        shown.add_row(row["what"], *cells, f"{row['peak_bytes_of_a_process'] / 1e6:,.0f}")
    return shown


def main() -> None:
    """Command line of `make bench-convert`. Only a run of the default size is written to bench/results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gb", type=float, default=4.0)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    if not (BIN / "mpirun").is_file():
        sys.exit("error: mpirun is missing; pip install mpi4py mpich")
    with tempfile.TemporaryDirectory(prefix="bench-convert-") as directory:
        summary, rows = measure(arguments.gb, arguments.repeats, Path(directory))
    Console().print(table(summary, rows))
    if arguments.gb == parser.get_default("gb"):
        print(f"wrote {write('convert', summary, rows)}")


if __name__ == "__main__":
    main()
