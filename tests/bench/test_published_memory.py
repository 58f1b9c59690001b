"""Published peaks of memory are predicted: the rows that a user would judge the model by."""

from __future__ import annotations

from bench import published_memory


def test_most_rows_are_modelled_and_half_of_them_within_ten_percent() -> None:
    found = published_memory.summary(published_memory.DATA)
    assert found["published_rows_modelled"] >= 23
    assert found["published_median_absolute_error"] <= 0.10
    for row in found["published"]:
        assert ("relative_error" in row) != bool(row.get("not_modelled")), row
