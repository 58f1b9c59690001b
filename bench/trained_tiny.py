"""The trained model of the benchmarks of quantisation: `model=tiny` with latents and inner widths that are multiples of
128, without multi-token prediction, trained on the standard library of Python. And held-out text for it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

BIN = Path(sys.executable).parent
SEQUENCE, SEQUENCES = 256, 160
"""Held-out tokens: their length and number."""
MODEL = (
    "model=tiny", "model.q_lora_rank=128", "model.kv_lora_rank=128", "model.moe_ffn_hidden_size=128",
    "model.mtp_num_layers=0",
)  # fmt: skip
GROUPED_QUERY = ("model.attention=gqa", "model.num_query_groups=2", "model.head_dim=64")
"""Makes grouped-query attention of the latent attention of `MODEL`."""
STEPS = 1_000
TRAINING = (
    "data=stdlib", "parallel=single", "runtime=cpu", f"train.seq_length={SEQUENCE}", "train.eval_batches=0",
    "batch.global_batch_size=4", "batch.micro_batch_size=4", "train.sample_continuations=0", "telemetry.progress=false",
    "telemetry.tensorboard=false",
)  # fmt: skip


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


def train(run_dir: Path, steps: int, seed: int = 1234, changes: Sequence[str] = ()) -> None:
    """Train the model, or continue to `steps`.

    Args:
        changes: of its config, such as `GROUPED_QUERY`.
    """
    length = [f"train.steps={steps}", "schedule.on_resume=override", f"seed={seed}"]
    run([BIN / "moe-train", *MODEL, *changes, *TRAINING, *length, f"run_dir={run_dir}", data_dir(run_dir)])


def data_dir(run_dir: Path) -> str:
    """Where the dataset of a run is, next to it."""
    return f"data.dir={run_dir.parent / 'data'}"


def held_out(run_dir: Path, sequences: int = SEQUENCES) -> np.ndarray:
    """Tokens [sequences, SEQUENCE + 1] of the documents after those that were trained on."""
    from moe_train.config.composition.compose import compose
    from moe_train.data import manifest
    from moe_train.data.index_file import read_index

    data = compose([*MODEL, *TRAINING, data_dir(run_dir)]).data
    (prefix,) = manifest.prefixes(data)
    lengths = read_index(prefix).lengths
    trained = float(data.split.split(",")[0]) / sum(map(float, data.split.split(",")))
    begin = int(lengths[: round(trained * len(lengths))].sum())
    tokens = np.fromfile(f"{prefix}.bin", np.uint16, sequences * (SEQUENCE + 1), offset=begin * 2)
    return tokens.astype(np.int64).reshape(sequences, SEQUENCE + 1)
