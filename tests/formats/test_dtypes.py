"""Formats of numbers are those of torch, by name."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from moe_train.formats import block_fp8, dtypes
from moe_train.formats.dtypes import DTYPES
from moe_train.model.fp8 import quantisation


@pytest.mark.parametrize("name", DTYPES)
def test_a_format_is_that_of_torch(name: str) -> None:
    ours, theirs = DTYPES[name], getattr(torch, name)
    assert ours.torch is theirs
    assert dtypes.of_torch(theirs) is ours
    assert (ours.itemsize, ours.is_floating_point) == (theirs.itemsize, theirs.is_floating_point)
    assert copy.deepcopy(ours) is pickle.loads(pickle.dumps(ours)) is ours


def test_files_and_training_agree_on_fp8() -> None:
    assert (block_fp8.DTYPE.torch, block_fp8.BLOCK) == (quantisation.E4M3, quantisation.BLOCK)
