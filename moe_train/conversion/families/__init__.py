"""Families of Hugging Face checkpoints: one file each, named as the value of `model.family`. No torch import."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

from moe_train.config.families import family_names
from moe_train.conversion.hf.family import Family

FAMILIES: Mapping[str, Family] = {name: import_module(f"{__name__}.{name}").FAMILY for name in family_names()}
