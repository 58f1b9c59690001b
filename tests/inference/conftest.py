"""A trained model that the tests of this package share."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_train.checkpoint import checkpoint, hf_exchange
from moe_train.data.tokenizer import train_tokenizer
from tests.checkpoint import small_run
from tests.conftest import fixed_text
from tests.distributed.helper import run_distributed

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


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a small run, `run`, and of its dataset's tokenizer, `data`."""
    directory = tmp_path_factory.mktemp("trained")
    (directory / "data").mkdir()
    train_tokenizer([next(fixed_text())], VOCABULARY, directory / "data" / "tokenizer.json")
    run_distributed(make_run, 1, directory / "run", directory / "data")
    return directory
