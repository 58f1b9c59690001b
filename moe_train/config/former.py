"""What a field means in a file of an earlier version that lacks it, where that is not today's default. No torch."""

from __future__ import annotations

from typing import Any

DEFAULTS: dict[str, Any] = {"data.deduplicate": "normalized", "data.follow_links": False, "data.shuffle": "run"}
"""Full name -> value. A run of that version goes on with it, and its datasets were made with it."""
