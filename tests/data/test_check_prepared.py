"""Datasets that are not ours to make are looked at before any rank starts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from moe_train.config.composition.compose import compose
from moe_train.data.prepare import check_prepared
from parallel.errors import DataError


def test_what_is_missing_is_named(small_data: tuple[str, ...], tmp_path: Path) -> None:
    """No directory, no vocabulary for it, then a prefix of a blend without its files."""
    made = next(item.removeprefix("data.dir=") for item in small_data if item.startswith("data.dir="))
    copied = tmp_path / "copied"
    shutil.copytree(made, copied)
    data = compose(["data=indexed", f"data.dir={copied}"]).data
    check_prepared(data, 512)
    with pytest.raises(DataError, match=r"512 tokens.*model\.vocab_size"):
        check_prepared(data, 256)
    data.blend = [f"1.0 {copied}/text_document", f"1.0 {copied}/absent"]
    with pytest.raises(DataError, match=r"absent\.bin"):
        check_prepared(data, 512)
    with pytest.raises(DataError, match=r"data\.dir"):
        check_prepared(compose(["data=indexed", f"data.dir={tmp_path}/none"]).data, 512)
