"""A small trained run, of which every test that uses a model has the same."""

from __future__ import annotations

from pathlib import Path

from moe_train.checkpoint import checkpoint, hf_exchange
from tests.checkpoint import small_run

VOCABULARY = 320


def make_run(run_dir: Path, data_dir: Path) -> None:
    """A checkpoint after two steps, and its export."""
    # Larger weights than those of training, so that the most probable token is far from a tie.
    changes = {"model__init_std": 0.2, "model__vocab_size": VOCABULARY, "data__dir": str(data_dir)}
    run = small_run.prepare(small_run.config(run_dir, {}, **changes, data__tokenizer_vocab_size=VOCABULARY))
    small_run.train(run, 2)
    saved = checkpoint.save(run)
    assert saved is not None
    hf_exchange.export(run, saved)
