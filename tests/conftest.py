"""Fixtures that more than one package of tests uses."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Overrides of a dataset made once from this project's own sources, with a vocabulary of 512."""
    from moe_train.config.compose import compose
    from moe_train.data.prepare import prepare

    directory = tmp_path_factory.mktemp("data")
    root = Path(__file__).parents[1]
    packages = ("moe_train", "parallel", "launch", "tools", "bench", "tests")
    for number, file in enumerate(sorted(file for name in packages for file in (root / name).rglob("*.py"))):
        (directory / f"{number}.txt").write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
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
