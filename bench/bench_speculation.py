"""Generation with and without speculation by multi-token prediction, on this machine's CPU.

`make bench-speculation` trains a model of 12 narrow layers and one of multi-token prediction on predictable text, for
about ten minutes. It then continues texts that the model has not seen, in bf16 and fp32, at batch 1 and 8, and again
with random weights in the layers of multi-token prediction, whose drafts are always wrong. The two ways take turns in
one process. Writes bench/results/speculation.json.

In fp32 the texts must be the same. In bf16 a GEMM rounds differently with another number of rows, so that a token whose
logit nearly equals another's may differ, and all that follow it.

Each ratio is the lowest of both batch sizes. In fp32 a small GEMM of two rows takes MKL about twice as long as one of a
single row, and in bf16 about as long.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import loaded_run
from bench.results import write
from bench.speculation_text import sentences

MODEL = (
    "model=tiny", "model.num_layers=12", "model.num_dense_layers=4", "model.hidden_size=128",
    "model.ffn_hidden_size=256", "model.num_experts=8", "model.moe_ffn_hidden_size=64", "model.router_num_groups=1",
    "model.router_topk_groups=1", "model.vocab_size=512", "data.tokenizer_vocab_size=512",
)  # fmt: skip
TRAINING = (
    "train.seq_length=128", "batch.global_batch_size=16", "batch.micro_batch_size=16", "train.steps=400",
    "optimizer.lr=2e-3", "schedule.warmup_steps=20",
)  # fmt: skip
TEXTS, SENTENCES, NEW_TOKENS = 300, 50, 160


def train(directory: Path) -> Path:
    """The run directory of a trained model."""
    text = directory / "text"
    text.mkdir()
    documents = ("".join(sentences(SENTENCES, seed)) for seed in range(TEXTS))
    (text / "text.txt").write_text("\n".join(documents), encoding="utf-8")
    data = ["data=text", f"data.path={text}", f"data.dir={directory / 'data'}"]
    command = Path(sys.executable).with_name("moe-train")
    subprocess.run([command, *MODEL, *TRAINING, *data, f"run_dir={directory / 'run'}"], check=True)
    return directory / "run"


def measure(run: Path, dtype: str, rounds: int, threads: int) -> list[dict[str, Any]]:
    """A row for each batch size and kind of drafts, with the weights in `dtype`."""
    import torch
    from megatron.core.utils import unwrap_model

    model = loaded_run.load(run, dtype, threads)
    texts = ["".join(sentences(2, TEXTS + seed)) for seed in range(8)]  # not those of training
    prompts = [model.tokenizer.encode(text) for text in texts]
    rows = [{"dtype": dtype} | _row(model, prompts[:batch], "trained", rounds) for batch in (1, 8)]
    (gpt,) = unwrap_model(list(model.chunks))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in gpt.mtp.parameters():
            parameter.normal_(std=0.02)
    return rows + [{"dtype": dtype} | _row(model, prompts[:batch], "random", rounds) for batch in (1, 8)]


def _row(model: Any, prompts: list[list[int]], layers: str, rounds: int) -> dict[str, Any]:
    from moe_train.inference.engine import Engine, EngineOptions
    from moe_train.inference.sampling_params import SamplingParams

    longest = max(map(len, prompts)) + NEW_TOKENS
    params = SamplingParams(max_new_tokens=NEW_TOKENS)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    found: dict[bool, Any] = {}
    rates: list[float] = []
    for turn in range(rounds + 1):  # the first warms up
        for speculate in seconds:
            options = EngineOptions(len(prompts) * -(-longest // 16), speculate=speculate)
            with Engine(model.ranks, model.chunks, options) as engine:
                began = time.perf_counter()
                outputs = engine.generate(prompts, params)
                taken = time.perf_counter() - began
            found[speculate] = [output.completions[0].tokens for output in outputs]
            if turn:
                seconds[speculate].append(taken)
            rates = engine.speculation.rates() or rates
    speeds = {way: len(prompts) * NEW_TOKENS / statistics.median(taken) for way, taken in seconds.items()}
    return {
        "batch": len(prompts), "layers": layers, "acceptance": rates[0] if rates else 0.0,
        "tokens_per_s": speeds[False], "speculative_tokens_per_s": speeds[True], "ratio": speeds[True] / speeds[False],
        "same_text": found[True] == found[False],
    }  # fmt: skip


def main() -> None:
    """Command line of `make bench-speculation`. Exits with 1 if a text differs in fp32."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="run directory of a trained model, in place of training one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-speculation-") as directory:
        run = options.run or train(Path(directory))
        rows = []
        for dtype in ("bf16", "fp32"):
            # A process holds one model in its process groups.
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                rows += process.submit(measure, run, dtype, options.rounds, options.threads).result()
    table = Table(title=f"Speculation by multi-token prediction, {options.threads} threads")
    for column in ("dtype", "batch", "layers", "acceptance", "tokens/s", "with speculation", "ratio", "same text"):
        table.add_column(column, justify="left" if column in ("dtype", "layers") else "right")
    for r in rows:
        table.add_row(
            r["dtype"], str(r["batch"]), r["layers"], f"{r['acceptance']:.0%}", f"{r['tokens_per_s']:,.0f}",
            f"{r['speculative_tokens_per_s']:,.0f}", f"{r['ratio']:.2f}", str(r["same_text"]),
        )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 140).print(table)

    def lowest(value: str, dtype: str, layers: str) -> float:
        return min(float(r[value]) for r in rows if (r["dtype"], r["layers"]) == (dtype, layers))

    summary: dict[str, Any] = {
        "ratio_bf16": lowest("ratio", "bf16", "trained"),
        "acceptance": lowest("acceptance", "bf16", "trained"),
        "ratio_random_bf16": lowest("ratio", "bf16", "random"),
        "ratio_fp32": lowest("ratio", "fp32", "trained"),
        "ratio_random_fp32": lowest("ratio", "fp32", "random"),
        "same_text": all(r["same_text"] for r in rows if r["dtype"] == "fp32"),
        "same_text_bf16": all(r["same_text"] for r in rows if r["dtype"] == "bf16"),
    }
    for name, value in summary.items():
        print(f"{name}: {value:.3f}" if isinstance(value, float) else f"{name}: {value}")
    print(f"wrote {write('speculation', {**summary, 'trained_before': options.run is not None}, rows)}")
    sys.exit(0 if summary["same_text"] else 1)


if __name__ == "__main__":
    main()
