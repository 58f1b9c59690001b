"""Every precision x runtime x layout x recomputation is refused with the reason below, or Megatron-Core takes it."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from bench.parity import LAYOUTS
from moe_train.config.composition.compose import compose
from moe_train.config.composition.validate import validate
from moe_train.config.resolve import resolve
from moe_train.config.schema import Config
from moe_train.config.walk import with_values
from parallel.suggest import Impossible
from tests.model.test_cuda_config import as_if_on_cuda

PRECISIONS = sorted(path.stem for path in Path("conf/precision").glob("*.yaml"))
RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "full": {"recompute.mode": "full"},
    "full, block": {"recompute.mode": "full", "recompute.method": "block"},
    **{
        name: {"recompute.mode": "selective", "recompute.modules": [name]}
        for name in ("core_attn", "mla_up_proj", "layernorm", "moe_act", "mlp", "moe", "shared_experts")
    },
}
# Tiny, with widths that blocks of 32 divide on each of up to four tensor-parallel ranks.
WIDE = ["model.qk_rope_head_dim=32", "model.moe_ffn_hidden_size=256", "model.mtp_num_layers=1"]


def refusal(precision: str, runtime: str, recompute: str, grouped: bool) -> str | None:
    """Why a combination cannot work, whatever the degrees; None where it can."""
    if precision == "nvfp4" and runtime == "cpu":
        return r"precision\.fp4=nvfp4 needs backend\.name=te, not local, which emulates FP8 but not FP4"
    if recompute == "moe_act" and not grouped:
        return r"only grouped experts \(backend\.grouped_gemm=true\) can recompute their activation"
    if precision == "fp8_delayed" and runtime == "cuda" and recompute in ("layernorm", "moe_act"):
        return r"precision\.fp8=delayed would take statistics of the recomputed tensor a second time"
    return None


def problem_of(cfg: Config) -> Impossible | None:
    try:
        validate(cfg)
    except Impossible as error:
        return error
    return None


def combinations(runtime: str) -> list[tuple[str, str, str, Config]]:
    found = []
    for precision in PRECISIONS:
        base = compose([f"runtime={runtime}", f"precision={precision}", "checkpoint.save_at_end=false", *WIDE])
        for (layout, words), (name, values) in itertools.product(LAYOUTS.items(), RECOMPUTE.items()):
            degrees = {key: _value(text) for key, _, text in (word.partition("=") for word in words)}
            found.append((precision, layout, name, with_values(base, degrees | values)))
    return found


def _value(text: str) -> Any:
    return {"true": True, "false": False}.get(text, int(text) if text.isdigit() else text)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("runtime", ["cpu", "cuda"])
def test_each_combination_is_refused_for_its_reason_or_taken(runtime: str) -> None:
    """Megatron-Core's own config classes check what passes, on cuda as if Transformer Engine were there."""
    from moe_train.model.build import transformer_config

    seen = Counter[bool]()
    with as_if_on_cuda():
        for precision, layout, recompute, cfg in combinations(runtime):
            what = (precision, layout, recompute)
            reason = refusal(precision, runtime, recompute, cfg.backend.grouped_gemm is not False)
            problem = problem_of(cfg)
            seen[problem is None] += 1
            if problem is None:
                assert reason is None, what
                transformer_config(resolve(cfg, validate(cfg), runtime=runtime))
            else:
                assert re.search(reason or "passes", str(problem)), (what, str(problem))
                assert problem.fixes, what
    assert sum(seen.values()) == len(PRECISIONS) * len(LAYOUTS) * len(RECOMPUTE)
    assert seen[False] > 30
    assert seen[True] > 1000


def test_the_table_has_every_precision() -> None:
    assert PRECISIONS == ["bf16", "fp16", "fp32", "fp8_block", "fp8_delayed", "fp8_tensor", "mxfp8", "nvfp4"]
