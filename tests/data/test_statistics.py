from __future__ import annotations

import math

import numpy as np
import pytest

from moe_train.data.statistics import unigram_entropy


def test_entropy_of_frequencies_worked_out_by_hand() -> None:
    assert unigram_entropy(np.array([7, 7, 3, 9])) == pytest.approx(1.5 * math.log(2))
    assert unigram_entropy(np.array([[0, 1], [2, 3]], dtype=np.uint16)) == pytest.approx(math.log(4))
    assert unigram_entropy(np.array([5, 5, 5])) == 0.0


def test_it_is_the_loss_of_the_best_model_without_context() -> None:
    tokens = np.random.default_rng(0).choice(5, size=1000, p=[0.4, 0.3, 0.15, 0.1, 0.05])
    shares = np.bincount(tokens) / tokens.size
    assert unigram_entropy(tokens) == pytest.approx(-np.log(shares)[tokens].mean())
    uniform = np.full(5, 0.2)
    assert unigram_entropy(tokens) < -np.log(uniform)[tokens].mean()


def test_no_tokens_have_no_entropy() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        unigram_entropy(np.array([]))
