"""What moe-schedule shows."""

from __future__ import annotations

from dataclasses import dataclass

from moe_train.config.fields import doc


@dataclass
class ScheduleViewConfig:
    """Table and picture of moe-schedule."""

    plot: str | None = doc(None, "PNG file to draw the schedules in; null draws none.")
    rows: int = doc(12, "Rows of the table between the first and the last step.", minimum=0, maximum=10_000)
