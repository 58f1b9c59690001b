"""Rules of activation recomputation: what Megatron-Core can recompute of which model."""

from __future__ import annotations

from typing import Any

from moe_train.config.recompute import of_chunk, settings
from moe_train.config.resolve import ResolvedConfig, Rule
from moe_train.config.schema import RecomputeStage
from parallel import pipeline
from parallel.architecture.attention import ATTENTIONS, attention_kind, modules_of_other_attentions
from parallel.fp8_recipes import RECIPES
from parallel.suggest import Fix, Impossible, divisors, fixes_of, nearest, override_value

_OFF: Fix = {"recompute.mode": "none", "recompute.modules": []}


def stages(facts: ResolvedConfig) -> None:
    """An entry for each pipeline stage or chunk, each with names of modules that this model has."""
    recompute, layout = facts.cfg.recompute, facts.layout
    named = list(recompute.stages)
    if not named:
        return
    if recompute.mode != "none":
        raise Impossible(
            f"recompute.stages replaces recompute.mode={recompute.mode}",
            [_OFF, {"recompute.stages": []}],
        )
    chunks = layout.pp * layout.vpp
    if len(named) not in (layout.pp, chunks):
        either = f"the {layout.pp} stages" + (f" or {chunks} chunks" if layout.vpp > 1 else "")
        wanted = [named[i] if i < len(named) else named[-1] for i in range(layout.pp)]
        raise Impossible(
            f"recompute.stages has {len(named)} entries, but not one for each of {either} of parallel.pp={layout.pp}",
            [{"recompute.stages": wanted}, {"recompute.stages": []}],
        )
    for place, entry in enumerate(named):
        shown = f"recompute.stages[{place}]={override_value(entry)}"
        off = _instead(named, place, RecomputeStage(mode="none"))
        if (entry.resolved_mode == "selective") != bool(entry.modules):
            more = "no modules" if entry.mode == "selective" else f"modules, which mode={entry.mode} does not use"
            fixes = [_instead(named, place, RecomputeStage(modules=entry.modules)), off] if entry.modules else [off]
            raise Impossible(f"{shown} has {more}", fixes)
        if len(set(entry.modules)) != len(entry.modules):
            once = RecomputeStage(modules=list(dict.fromkeys(entry.modules)))
            raise Impossible(f"{shown} names a module twice", [_instead(named, place, once), off])
        for module in entry.modules:
            if reason := _missing(facts, module):
                raise Impossible(f"recompute.stages[{place}] has {module}, but {reason[0]}", [*reason[1], off])


def _instead(named: list[RecomputeStage], place: int, stage: RecomputeStage) -> Fix:
    """`recompute.stages` with another entry at one place."""
    return {"recompute.stages": [*named[:place], stage, *named[place + 1 :]]}


def modules(facts: ResolvedConfig) -> None:
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


def _missing(facts: ResolvedConfig, module: str) -> tuple[str, list[Fix]] | None:
    """Why this model has no such module to recompute, and what would give it one."""
    cfg, kind = facts.cfg, attention_kind(facts.cfg.model)
    if module in modules_of_other_attentions(cfg.model):
        owners = " or ".join(name for name, other in ATTENTIONS.items() if module in other.recompute_modules)
        return f"model.attention={cfg.model.attention} has no such module; only model.attention={owners} has it", []
    if module in ("moe", "moe_act") and not cfg.model.is_moe:
        return "model.num_experts=0 is a dense model", []
    if module == "shared_experts" and not (cfg.model.is_moe and cfg.model.num_shared_experts):
        return "model.num_shared_experts=0: there are none", []
    if module == "mlp" and 0 not in cfg.model.moe_layer_pattern:
        return "model.num_dense_layers=0: no layer has a dense feed-forward", []
    if module == "layernorm" and facts.backend == "te" and kind.norm_in_linear and not cfg.model.is_moe:
        return "on backend.name=te the norms of this model are part of the linear layers behind them", []
    if module == "moe_act" and not facts.grouped:
        fix: dict[str, Any] = {"backend.grouped_gemm": True}
        return "only grouped experts (backend.grouped_gemm=true) can recompute their activation", [fix]
    delayed = cfg.precision.fp8 is not None and RECIPES[cfg.precision.fp8].delayed
    if module in ("layernorm", "moe_act") and delayed and facts.backend == "te":
        reason = f"precision.fp8={cfg.precision.fp8} would take statistics of the recomputed tensor a second time"
        return reason, [{"precision.fp8": "tensor"}]
    if module == "shared_experts" and cfg.parallel.shared_expert_overlap:
        return "parallel.shared_expert_overlap=true runs them in pieces", [{"parallel.shared_expert_overlap": False}]
    return None


def _without(named: list[str], module: str) -> list[Fix]:
    rest = [name for name in named if name != module]
    return [{"recompute.modules": rest}] if rest else [_OFF]


def full_layers(facts: ResolvedConfig) -> None:
    """`full` recomputes whole groups of layers. Upstream runs past the end of a chunk that groups do not fill."""
    cfg, recompute = facts.cfg, facts.cfg.recompute
    size = recompute.num_layers
    text, model = cfg.parallel.pipeline_layout, cfg.model
    chunks = pipeline.stage_items(text, facts.layout.pp, facts.layout.vpp, model.num_layers, model.mtp_num_layers)
    whole = [items for number, items in enumerate(chunks) if of_chunk(recompute, number).mode == "full"]
    if not whole:
        return
    counts = [items.count("t") for items in whole]
    if not max(counts):
        raise Impossible(
            f"recompute.stages={override_value(recompute.stages)}: full recomputes layers, and its stages hold none",
            [{"recompute.stages": []}],
        )
    if recompute.method == "block":
        if size > max(counts):
            raise Impossible(
                f"recompute.num_layers={size} exceeds the {max(counts)} layers of the longest pipeline chunk",
                fixes_of("recompute.num_layers", (max(counts),)),
            )
        return
    if any("m" in items for items in whole) and size > 1:
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


def offload(facts: ResolvedConfig) -> None:
    """On te Megatron-Core moves inputs of named modules to the host; on local everything that is kept moves."""
    recompute = facts.cfg.recompute
    named, where = list(recompute.offload_modules), recompute.offload
    off: Fix = {"recompute.offload": "none", "recompute.offload_modules": []}
    if where == "none" or facts.backend == "local":
        if named:
            used = f"recompute.offload={where} on backend.name={facts.backend}"
            raise Impossible(f"recompute.offload_modules=[{','.join(named)}] is not used with {used}",
                             [{"recompute.offload_modules": []}])  # fmt: skip
        if where != "none" and facts.runtime != "cpu":
            raise Impossible(
                f"recompute.offload={where} on runtime={facts.runtime} needs backend.name=te: backend.name=local moves "
                "activations on runtime=cpu only",
                [{"runtime": "cpu"}, off],
            )
        return
    if where == "file":
        raise Impossible(
            "recompute.offload=file needs backend.name=local: Megatron-Core moves activations to the host's memory",
            [{"recompute.offload": "memory"}, off],
        )
    if any(one.mode == "full" for one in settings(recompute)):
        raise Impossible(
            f"recompute.offload={where} moves inputs of modules, which full recomputation does not keep",
            [off, {"recompute.mode": "none"}],
        )
    _check_modules(facts, named, off)


def _check_modules(facts: ResolvedConfig, named: list[str], off: Fix) -> None:
    """Upstream's conditions (transformer/transformer_config.py), and that the model has such modules."""
    cfg = facts.cfg
    if not named:
        raise Impossible(
            f"recompute.offload={cfg.recompute.offload} on backend.name=te needs recompute.offload_modules",
            [{"recompute.offload_modules": ["core_attn", "attn_proj"]}, off],
        )
    if "attn_proj" in named and "core_attn" not in named:
        raise Impossible(
            "recompute.offload_modules has attn_proj without core_attn, whose backward pass needs the same tensor",
            [{"recompute.offload_modules": ["core_attn", *named]}, off],
        )
    of_linear = {"attn_norm": attention_kind(cfg.model).norm_in_linear, "mlp_norm": not cfg.model.is_moe}
    if fused := [name for name in named if of_linear.get(name)]:
        rest = [name for name in named if name not in fused]
        raise Impossible(
            f"recompute.offload_modules has {fused[0]}, but on backend.name=te that norm is part of the linear layer "
            "behind it in this model, and upstream moves nothing",
            [{"recompute.offload_modules": rest} if rest else off],
        )
    experts = [name for name in named if name in ("expert_fc1", "moe_act")]
    if not experts:
        return
    others = [name for name in named if name not in experts]
    without: Fix = {"recompute.offload_modules": others} if others else off
    if not (cfg.model.is_moe and facts.grouped):
        why = "model.num_experts=0 is a dense model" if not cfg.model.is_moe else "only grouped experts can move theirs"
        raise Impossible(f"recompute.offload_modules has {experts[0]}, but {why}", [without])
    if any("moe" in one.modules for one in settings(cfg.recompute)):
        raise Impossible(
            f"recompute.offload_modules has {experts[0]}, but recomputing moe does not keep its input",
            [without],
        )


RULES: tuple[Rule, ...] = (stages, modules, full_layers, offload)
