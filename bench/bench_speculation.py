"""Generation with and without speculation by multi-token prediction, on this machine's CPU.

`make bench-speculation` trains a model of 12 narrow layers and one of multi-token prediction on predictable text, for
about ten minutes. It then continues texts that the model has not seen, at batch 1 and 8, and again with random weights
in the layers of multi-token prediction, whose drafts are always wrong. The two ways take turns in one process. The
texts must be the same. Writes bench/results/speculation.json.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import step_data
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


def measure(run: Path, rounds: int, threads: int) -> list[dict[str, Any]]:
    """A row for each batch size and kind of drafts."""
    import torch
    from megatron.core.utils import unwrap_model

    from moe_train.config.roots import GenerateRoot
    from moe_train.inference import loading, source
    from parallel.rank_info import RankInfo

    torch.set_num_threads(threads)
    cfg = source.config_of(source.find(run), GenerateRoot(), [])
    model = loading.load(cfg, RankInfo(0, 1, 0, 1, "127.0.0.1", step_data.free_port(), "local"))
    texts = ["".join(sentences(2, TEXTS + seed)) for seed in range(8)]  # not those of training
    prompts = [model.tokenizer.encode(text) for text in texts]
    rows = [_row(model, prompts[:batch], "trained", rounds) for batch in (1, 8)]
    (gpt,) = unwrap_model(list(model.chunks))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in gpt.mtp.parameters():
            parameter.normal_(std=0.02)
    return rows + [_row(model, prompts[:batch], "random", rounds) for batch in (1, 8)]


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
    """Command line of `make bench-speculation`. Exits with 1 if a text differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="run directory of a trained model, in place of training one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-speculation-") as directory:
        rows = measure(options.run or train(Path(directory)), options.rounds, options.threads)
    table = Table(title=f"Speculation by multi-token prediction, {options.threads} threads")
    for column in ("batch", "layers", "acceptance", "tokens/s", "with speculation", "ratio", "same text"):
        table.add_column(column, justify="left" if column == "layers" else "right")
    for r in rows:
        table.add_row(
            str(r["batch"]), r["layers"], f"{r['acceptance']:.0%}", f"{r['tokens_per_s']:,.0f}",
            f"{r['speculative_tokens_per_s']:,.0f}", f"{r['ratio']:.2f}", str(r["same_text"]),
        )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    summary: dict[str, Any] = {
        "ratio": min(r["ratio"] for r in rows if r["layers"] == "trained"),
        "acceptance": min(r["acceptance"] for r in rows if r["layers"] == "trained"),
        "ratio_random": min(r["ratio"] for r in rows if r["layers"] == "random"),
        "same_text": all(r["same_text"] for r in rows),
    }
    for name, value in summary.items():
        print(f"{name}: {value:.3f}" if isinstance(value, float) else f"{name}: {value}")
    if options.run is None:
        print(f"wrote {write('speculation', summary, rows)}")
    sys.exit(0 if summary["same_text"] else 1)


if __name__ == "__main__":
    main()
