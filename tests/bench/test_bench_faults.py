"""Rows that are measured again take the places of the earlier ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import bench_faults, results


def test_rows_measured_again_keep_their_places() -> None:
    rows = [{"injected": "a", "holds": True}, {"injected": "b", "holds": False}]
    again = [{"injected": "b", "holds": True}, {"injected": "c", "holds": True}]
    assert [*rows[:1], *again] == bench_faults.replaced(rows, again)


def test_rows_of_another_machine_are_not_mixed_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results.write("faults", {"faults": 1}, [{"injected": "a"}], tmp_path)
    assert results.read("faults", tmp_path)["rows"] == [{"injected": "a"}]
    monkeypatch.setattr(results.os, "cpu_count", lambda: 999)
    with pytest.raises(SystemExit, match="was not measured on a machine like this one"):
        results.read("faults", tmp_path)
    with pytest.raises(SystemExit, match="was not measured on a machine like this one"):
        results.read("absent", tmp_path)
