"""The model that the servers of this package have."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_train.config.composition.compose import compose
from moe_train.config.roots import ServeRoot
from tests.tools.serving.server import Loaded, Server, running
from tools import trained_model


@pytest.fixture(scope="package")
def loaded(trained: Path) -> Iterator[Loaded]:
    cfg = compose([f"source={trained / 'run'}", "runtime=cpu"], ServeRoot)
    cfg.engine.num_blocks, cfg.engine.max_sequences = 64, 16
    model = trained_model.find(cfg, ["runtime=cpu"], "moe-serve")
    with model.ranks(cfg.engine) as ranks:
        yield Loaded(model, cfg.engine, ranks, ranks.wait())


@pytest.fixture(scope="package")
def server(loaded: Loaded) -> Iterator[Server]:
    with running(loaded, max_body_bytes=20_000, max_new_tokens=200) as one:
        yield one
