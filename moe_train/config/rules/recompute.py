"""Rules of activation recomputation: what Megatron-Core can recompute of which model."""

from __future__ import annotations

from typing import Any

from moe_train.config.rules.facts import Facts, Rule
from parallel import pipeline
from parallel.suggest import Fix, Impossible, divisors, fixes_of, nearest

_OFF: Fix = {"recompute.mode": "none", "recompute.modules": []}


def modules(facts: Facts) -> None:
    """Only `selective` has modules, each once, and each is a part of this model."""
    recompute = facts.cfg.recompute
    named = list(recompute.modules)
    if recompute.mode != "selective":
        if named:
            raise Impossible(
                f"recompute.modules=[{','.join(named)}] is not used with recompute.mode={recompute.mode}",
                [{"recompute.mode": "selective"}, {"recompute.modules": []}],
            )
        return
    if not named:
        raise Impossible(
            "recompute.mode=selective names nothing to recompute, but recompute.modules=[]",
            [{"recompute.modules": ["layernorm"]}, {"recompute.mode": "none"}],
        )
    if len(set(named)) != len(named):
        raise Impossible(
            f"recompute.modules names a module twice: {', '.join(named)}",
            [{"recompute.modules": list(dict.fromkeys(named))}],
        )
    for module in named:
        if reason := _missing(facts, module):
            raise Impossible(f"recompute.modules has {module}, but {reason[0]}", [*reason[1], *_without(named, module)])


def _missing(facts: Facts, module: str) -> tuple[str, list[Fix]] | None:
    """Why this model has no such module to recompute, and what would give it one."""
    cfg = facts.cfg
    if module == "mla_up_proj" and cfg.model.attention != "mla":
        return f"model.attention={cfg.model.attention} has no up-projection of a latent", []
    if module in ("moe", "moe_act") and not cfg.model.is_moe:
        return "model.num_experts=0 is a dense model", []
    if module == "shared_experts" and not (cfg.model.is_moe and cfg.model.num_shared_experts):
        return "model.num_shared_experts=0: there are none", []
    if module == "mlp" and 0 not in cfg.model.moe_layer_pattern:
        return "model.num_dense_layers=0: no layer has a dense feed-forward", []
    if module == "moe_act" and not grouped_experts(facts):
        fix: dict[str, Any] = {"backend.grouped_gemm": True}
        return "only grouped experts (backend.grouped_gemm=true) can recompute their activation", [fix]
    if module in ("layernorm", "moe_act") and cfg.precision.fp8 == "delayed" and facts.backend == "te":
        reason = "precision.fp8=delayed would take statistics of the recomputed tensor a second time"
        return reason, [{"precision.fp8": "tensor"}]
    if module == "shared_experts" and cfg.parallel.shared_expert_overlap:
        return "parallel.shared_expert_overlap=true runs them in pieces", [{"parallel.shared_expert_overlap": False}]
    return None


def grouped_experts(facts: Facts) -> bool:
    """Whether the experts of a rank are one grouped GEMM: yes, if the config says nothing."""
    return facts.cfg.backend.grouped_gemm is not False


def _without(named: list[str], module: str) -> list[Fix]:
    rest = [name for name in named if name != module]
    return [{"recompute.modules": rest}] if rest else [_OFF]


def full_layers(facts: Facts) -> None:
    """`full` recomputes whole groups of layers. Upstream runs past the end of a chunk that groups do not fill."""
    cfg, recompute = facts.cfg, facts.cfg.recompute
    if recompute.mode != "full":
        return
    size = recompute.num_layers
    text, model = cfg.parallel.pipeline_layout, cfg.model
    stages = pipeline.stage_items(text, facts.layout.pp, facts.layout.vpp, model.num_layers, model.mtp_num_layers)
    counts = [items.count("t") for items in stages]
    if recompute.method == "block":
        if size > max(counts):
            raise Impossible(
                f"recompute.num_layers={size} exceeds the {max(counts)} layers of the longest pipeline chunk",
                fixes_of("recompute.num_layers", (max(counts),)),
            )
        return
    if cfg.model.mtp_num_layers and size > 1:
        raise Impossible(
            f"recompute.num_layers={size} groups layers, but each multi-token-prediction layer "
            f"(model.mtp_num_layers={cfg.model.mtp_num_layers}) is a group of its own",
            [{"recompute.num_layers": 1}, {"model.mtp_num_layers": 0}],
        )
    for count in counts:
        if count % size:
            fitting = [d for d in divisors(count) if all(other % d == 0 for other in counts)]
            raise Impossible(
                f"recompute.num_layers={size} does not divide the {count} layers of a pipeline chunk "
                f"({count} = {count // size} x {size} + {count % size})",
                fixes_of("recompute.num_layers", nearest(fitting, size)),
            )


RULES: tuple[Rule, ...] = (modules, full_layers)
