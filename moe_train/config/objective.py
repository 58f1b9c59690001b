"""The table of training objectives. No torch import: the config reads the names, ranks load the classes."""

from __future__ import annotations

OBJECTIVES = {
    "language_model": "moe_train.objectives.language_model:LanguageModel",
}
"""Value of `objective` -> module and class. A row and its file add an objective (moe_train/objectives/base.py)."""
