"""Which of the two ways of multi-head latent attention takes fewer multiplications."""

from __future__ import annotations

import pytest

from moe_train.model.local.cached_attention import absorption_is_cheaper

DEEPSEEK_V3 = (512, 128, 64, 128)  # latent, nope, rope, value


@pytest.mark.parametrize(
    ("queries", "keys", "absorbed"),
    [(1, 4096, True), (64, 4096, True), (4096, 4096, False), (2, 2, False), (1, 1, False), (16, 100_000, True)],
)
def test_few_queries_of_a_long_sequence_attend_to_latents(queries: int, keys: int, absorbed: bool) -> None:
    assert absorption_is_cheaper(queries, keys, *DEEPSEEK_V3) == absorbed
