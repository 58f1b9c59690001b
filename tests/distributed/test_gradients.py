"""The gradient of each parameter alone is the same on split ranks: a gradient norm hides the small ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint import small_run
from tests.distributed.helper import run_distributed

MLA: dict[str, Any] = {
    "model__shared_expert_gate": True, "model__shared_expert_ffn_hidden_size": 48, "model__num_dense_layers": 1,
}  # fmt: skip
GQA: dict[str, Any] = {
    **MLA, "model__attention": "gqa", "model__num_query_groups": 2, "model__qkv_bias": True, "model__qk_norm": "head",
    "model__rotary_percent": 0.5,
}  # fmt: skip
FIRST_MOMENT = "optimizer.state.exp_avg."


def gradients(directory: Path, degrees: small_run.Degrees, changes: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """(sum, sum of squares) of each parameter's gradient in the first step, up to one factor: its first moment."""
    run = small_run.prepare(small_run.config(directory, degrees, **changes))
    small_run.train(run, 1)
    tensors = small_run.tensors(run)
    return {name.removeprefix(FIRST_MOMENT): value for name, value in tensors.items() if name.startswith(FIRST_MOMENT)}


@pytest.mark.parametrize("degrees", [{"tp": 2}, {"tp": 2, "pp": 2, "ep": 2}], ids=["tp2", "tp2 pp2 ep2"])
@pytest.mark.parametrize("changes", [MLA, GQA], ids=["mla", "gqa"])
def test_each_gradient_is_that_of_one_rank(changes: dict[str, Any], degrees: small_run.Degrees, tmp_path: Path) -> None:
    """Gates of shared experts, biases and norms see only their rank's tokens or heads: someone must add them up."""
    (alone,) = run_distributed(gradients, 1, tmp_path, {}, changes)
    split = run_distributed(gradients, 2 * degrees.get("pp", 1), tmp_path, degrees, changes)[0]
    assert split.keys() == alone.keys()
    small = ("gate_weight", "linear_qkv.bias", "q_layernorm.weight") if changes is GQA else ("gate_weight",)
    for kind in small:
        assert any(name.endswith(kind) for name in alone)
    for name, (total, squares) in alone.items():
        assert split[name][1] == pytest.approx(squares, rel=1e-3), name
        assert split[name][0] == pytest.approx(total, abs=1e-3 * squares**0.5), name
        assert squares > 0, name
