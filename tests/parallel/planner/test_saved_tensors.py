"""Saved tensors of norms."""

from __future__ import annotations

from dataclasses import replace

from parallel.planner.saved_tensors import norm
from tests.parallel.planner import small


def test_bytes_of_a_norm_in_fp32() -> None:
    """Its input, of which a part is normalised; on a CPU no more than that and the root of each token."""
    one = small.workload(small.MLA, backend="local", dtype="fp32")
    kept = norm(one, "norm", 8, 4, "latent", 6)
    assert kept == {"latent": 4 * 8 * 6, "norm: normalised": 4 * 8 * 4, "norm: 1 / root": 4 * 8}
    assert norm(replace(one, on_cpu=True), "norm", 8, 4, "latent", 6) == {"latent": 4 * 8 * 6, "norm: 1 / root": 4 * 8}
    assert norm(one, "norm", 8, 4, "latent")["latent"] == 4 * 8 * 4
