"""What the fork server of tests imports and sets, once for the ranks of many tests. Only the fork server imports it."""

from __future__ import annotations

import gc

import matplotlib.backends.backend_svg
import matplotlib.figure  # noqa: F401 - every run draws its losses at its end
import pytest  # noqa: F401 - functions that ranks run are in modules that import it
import transformers  # noqa: F401 - many of them compare with its models

from moe_train.telemetry import peak
from tests import huge_pages

# Each run measures the peak of its ranks for a quarter of a second. No test compares it with anything.
peak._WINDOWS, peak._WINDOW_S = 1, 1e-9
gc.freeze()
huge_pages.collapse()
