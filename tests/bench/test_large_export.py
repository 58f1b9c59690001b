"""What `make bench-quantised` measures of exports that are larger than the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench import bench_quantised, large_export
from bench.trained_tiny import MODEL
from moe_train.config.composition.compose import compose
from moe_train.formats.run_directory import MANIFEST


def test_an_export_is_measured_without_keeping_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    size = large_export.sparse_source(source, compose(list(MODEL)).model)
    files = list(source.glob("*.safetensors"))
    assert size < sum(file.stat().st_size for file in files) < 1.1 * size
    assert sum(file.stat().st_blocks for file in files) * 512 < size / 4  # only the headers are on the disk
    monkeypatch.setattr(large_export, "FILE_GB", 1e-3)
    found = large_export.export(source, target, "int4", 3, 2)
    assert found["planned_files"] > found["written_files"] == 3
    assert 1e5 < found["written_bytes"] < found["planned_bytes"] < size
    written = list(target.glob("*.safetensors"))
    assert len(written) == 3
    assert not any(file.stat().st_size for file in written)
    assert (target / MANIFEST).exists()
    assert len(found["peaks"]) == 3
    assert found["peaks"] == sorted(found["peaks"])
    assert 1e7 < found["peaks"][-1] == pytest.approx(large_export.peak_bytes(), rel=0.2)


@pytest.mark.parametrize(("count", "chosen"), [(1, [0]), (3, [0, 3, 6]), (10, list(range(10))), (0, list(range(10)))])
def test_chosen_files_are_spread_over_all(count: int, chosen: list[int]) -> None:
    assert large_export.spaced(list(range(10)), count) == chosen


def test_growth_of_memory_from_file_to_file_is_shown() -> None:
    row: dict[str, Any] = bench_quantised.memory_figures({"threads": 2, "peaks": [1, 2, 3, 9]})
    assert row == {"threads": 2, "peak_bytes": 9, "peak_bytes_first_half": 2}
