"""Sets of recomputation on one rank: overrides by name. Nothing here imports torch."""

from __future__ import annotations

SETS: dict[str, list[str]] = {
    "none": [],
    "full": ["recompute=full"],
    "full, block": ["recompute=full", "recompute.method=block"],
    **{
        name: ["recompute=selective", f"recompute.modules=[{name}]"]
        for name in (
            "core_attn", "mla_up_proj", "layernorm", "moe_act", "mlp", "moe", "shared_experts",
            "layernorm,mla_up_proj", "layernorm,mla_up_proj,moe_act", "layernorm,core_attn,mlp,moe",
        )
    },
}  # fmt: skip
