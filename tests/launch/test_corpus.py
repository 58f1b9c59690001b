"""The text of a submission is counted as moe-data would read it."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch import corpus
from moe_train.config.schema import DataConfig
from parallel.errors import DataError


def test_links_count_as_moe_data_reads_them(tmp_path: Path) -> None:
    root, other = tmp_path / "text", tmp_path / "other"
    root.mkdir()
    other.mkdir()
    (root / "a.txt").write_text("12345")
    (other / "b.txt").write_text("1234567890")
    (root / "gone.txt").symlink_to("nowhere")
    (root / "linked").symlink_to(other)
    data = DataConfig(source="files", path=str(root), dir=str(tmp_path / "made"))
    assert corpus._text_bytes(data) == 15
    data.follow_links = False
    assert corpus._text_bytes(data) == 5


def test_a_directory_without_text_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").touch()
    with pytest.raises(DataError, match=r"has no \.txt, .* file; 1 files of other kinds"):
        corpus._text_bytes(DataConfig(source="files", path=str(tmp_path), dir=str(tmp_path / "made")))
