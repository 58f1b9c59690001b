"""Statistics of token sequences."""

from __future__ import annotations

import numpy as np


def unigram_entropy(tokens: np.ndarray) -> float:
    """Entropy of the token frequencies, nats a token: the loss of the best model that ignores context.

    Raises:
        ValueError: `tokens` is empty.
    """
    if tokens.size == 0:
        raise ValueError("no tokens have no entropy")
    _, counts = np.unique(tokens, return_counts=True)
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum()) + 0.0  # no -0.0
