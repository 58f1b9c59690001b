"""Exports of DeepSeek-V3's shape in bounded memory and without its bytes on disk.

The source is a directory of sparse files, whose numbers are zeros. Every tensor is planned. Files that were written are
emptied at once, so that an export needs the space of the files that are being written only.

`python -m bench.large_export SOURCE TARGET FORMAT FILES THREADS` is the process that is measured. It prints JSON.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

FILE_GB = 0.5
"""Size of the files to write."""


def sparse_source(directory: Path, model: Any) -> int:
    """Write the tensors of `model` as files without stored bytes; returns how many bytes they have."""
    from moe_train.conversion import hf_config
    from moe_train.conversion.hf_source import names_of
    from moe_train.conversion.mapping import pieces
    from moe_train.formats import safetensors
    from moe_train.formats.dtypes import DTYPES

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


def export(source: Path, target: Path, dtype: str, files: int, threads: int) -> dict[str, Any]:
    """Plan all files of an export and write `files` of them, evenly spaced; 0 writes all.

    Returns:
        Bytes, files, seconds, and the largest resident set so far of this process after each file.
    """
    from moe_train.config.roots import ConvertRoot
    from moe_train.formats import directory_writer
    from moe_train.formats.communicator import SingleProcess
    from tools.convert import make_plan

    cfg = ConvertRoot()
    cfg.convert.to, cfg.convert.dtype, cfg.convert.file_gb = "hf", dtype, FILE_GB
    plan = make_plan(cfg, source, target)
    planned_files, planned_bytes = len(plan.jobs), sum(job.bytes for job in plan.jobs)
    jobs = spaced(plan.jobs, files)
    plan.jobs = [replace(job, bytes=0) for job in jobs]  # no space is needed for files that are emptied
    peaks: list[int] = []

    def written(_: int) -> None:
        for path in directory_writer.partial_of(target).glob("*.safetensors"):
            os.truncate(path, 0)
        peaks.append(peak_bytes())

    start = time.perf_counter()
    done = directory_writer.run(plan, SingleProcess(), threads, written)
    return {
        "planned_files": planned_files, "planned_bytes": planned_bytes, "written_files": len(jobs),
        "written_bytes": done.bytes, "threads": threads, "write_s": round(time.perf_counter() - start, 1),
        "peaks": peaks[1:],  # the first is from before the first file
    }  # fmt: skip


def spaced(items: list[Any], count: int) -> list[Any]:
    """`count` of the items, the first among them, evenly spaced; all of them for 0."""
    if not count or count >= len(items):
        return items
    return [items[number * len(items) // count] for number in range(count)]


def peak_bytes() -> int:
    """The largest resident set that this process has had."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    print(json.dumps(export(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))))
