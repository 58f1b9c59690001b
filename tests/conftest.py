"""Fixtures that more than one package of tests uses."""

from __future__ import annotations

import gc
import os
import random
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.local import forkserver
from tests import composition_cache, forked

gc.disable()  # until all tests are imported: see below
# Threads that wait for others spin, on cores that other tests need. OpenMP reads this when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Tests measure no kernels for the user's own runs: the machine is busy while they run.
_cache = tempfile.TemporaryDirectory(prefix="cache-")
os.environ["XDG_CACHE_HOME"] = _cache.name
# Training refuses metrics and events that are not in the registry (moe_train/telemetry/registry.py).
os.environ["MOE_TRAIN_STRICT_METRICS"] = "1"

# Ranks of tests are forked with what most of them use imported already.
forkserver.PRELOAD = (*forkserver.PRELOAD, "tests.preload")
forked.fork_the_fork_server()

# A background job of a script ignores SIGINT, and runs honour what they inherit: the tests send such signals.
_HANDLERS = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
    signal.SIGUSR1: signal.SIG_DFL,
}
for _signal, _handler in _HANDLERS.items():
    if signal.getsignal(_signal) is signal.SIG_IGN:
        signal.signal(_signal, _handler)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Modules of tests import Megatron-Core as ranks on a CPU do. A process that runs a few tests may need no torch."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return (yield)
    from parallel.runtime.imports import without_compilation

    with without_compilation():
        return (yield)


def pytest_collection_finish() -> None:
    """Objects of imported modules stay. Looking for garbage among them is in vain, and takes a fifth of the time of
    code that makes many objects, such as the composition of a config."""
    gc.freeze()
    gc.set_threshold(5000, 10, 10)
    gc.enable()
    # Tensors are small, and several tests run at a time. Two threads each took a third more processor time.
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def handlers_of_signals() -> Iterator[None]:
    """Commands that a test runs in this process end by ignoring signals, which later tests send."""
    before = {number: signal.getsignal(number) for number in _HANDLERS}
    yield
    for number, handler in before.items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)


@pytest.fixture(scope="session", autouse=True)
def files_read_once() -> Iterator[None]:
    """Hydra reads and merges the same groups of config files once."""
    with pytest.MonkeyPatch.context() as patch:
        composition_cache.install(patch)
        yield


DOCUMENTS = 64
WORDS_PER_DOCUMENT = 2400


def fixed_text() -> Iterator[str]:
    """Documents that are the same on every machine and for every state of the sources, about 1 MB in all.

    A chain of made-up words, each with eight words that often follow it, so that context helps as in real text. Parity
    is compared in tight bounds, and a route between two experts that are nearly equal may fall either way: text that
    changes with the sources would let any edit of them decide whether such a route is met.
    """
    draw = random.Random(20240101)
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    words = ["".join(draw.choice(syllables) for _ in range(draw.randint(1, 4))) for _ in range(600)]
    followers = {word: [draw.choice(words) for _ in range(8)] for word in words}
    for _ in range(DOCUMENTS):
        word, text = draw.choice(words), []
        for position in range(WORDS_PER_DOCUMENT):
            text.append(f"{word}.\n" if position % 12 == 11 else f"{word} ")
            word = draw.choice(words if draw.random() < 0.1 else followers[word])
        yield "".join(text)


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Overrides of a dataset made once from the fixed text, with a vocabulary of 512."""
    from moe_train.config.composition.compose import compose
    from moe_train.data.prepare import prepare

    directory = tmp_path_factory.mktemp("data")
    for number, text in enumerate(fixed_text()):
        (directory / f"{number}.txt").write_text(text, encoding="utf-8")
    overrides = (
        "data=text",
        f"data.path={directory}",
        f"data.dir={directory}/dataset",
        "data.tokenizer_vocab_size=512",
        "data.prepare_workers=1",
    )
    cfg = compose([*overrides, "model.vocab_size=512"])
    prepare(cfg.data, 512, progress=False)
    return overrides


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a small run, `run`, with an export, and of its dataset's tokenizer, `data`."""
    from moe_train.data.tokenizer import train_tokenizer
    from tests.distributed.helper import run_distributed
    from tests.inference.trained_run import VOCABULARY, make_run

    directory = tmp_path_factory.mktemp("trained")
    (directory / "data").mkdir()
    train_tokenizer([next(fixed_text())], VOCABULARY, directory / "data" / "tokenizer.json")
    run_distributed(make_run, 1, directory / "run", directory / "data")
    return directory
