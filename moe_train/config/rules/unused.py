"""Fields that have no effect with the values of others: a user who sets one to another value expects an effect."""

from __future__ import annotations

from dataclasses import fields

from moe_train.config.optimizer import MUON, OptimizerConfig
from moe_train.config.recompute import settings
from moe_train.config.resolve import ResolvedConfig, Rule
from moe_train.config.schema import Config
from moe_train.config.walk import get
from parallel.fp8_recipes import RECIPES
from parallel.suggest import Impossible

_DEFAULTS = Config()
_OF_MUON = [field for field in fields(OptimizerConfig) if field.name.startswith("muon_")]


def _cases(cfg: Config) -> list[tuple[str, bool, str]]:
    """(field, whether it has an effect, what it would need)."""
    precision, recompute, schedule = cfg.precision, cfg.recompute, cfg.schedule
    delayed = precision.fp8 is not None and RECIPES[precision.fp8].delayed
    full = any(one.mode == "full" for one in settings(recompute))
    return [
        ("precision.fp8_format", precision.fp8 is not None, "precision.fp8"),
        ("precision.power_of_two_scales", bool(precision.fp8 or precision.fp4), "precision.fp8"),
        ("precision.amax_history_len", delayed, "precision.fp8=delayed"),
        *(
            (f"precision.num_layers_at_{end}_in_bf16", precision.first_last_layers_bf16,
             "precision.first_last_layers_bf16=true")
            for end in ("start", "end")
        ),
        *((f"optimizer.{f.name}", cfg.optimizer.name == MUON, "optimizer.name=muon") for f in _OF_MUON),
        ("optimizer.qk_clip_alpha", cfg.optimizer.qk_clip_threshold is not None, "optimizer.qk_clip_threshold"),
        ("precision.initial_loss_scale", precision.dtype == "fp16", "precision.dtype=fp16"),
        *(
            (f"schedule.plateau_{name}", schedule.plateau_patience is not None, "schedule.plateau_patience")
            for name in ("factor", "threshold", "cooldown", "max_reductions")
        ),
        *(
            (f"schedule.rewarm_{name}", schedule.rewarm_steps is not None, "schedule.rewarm_steps")
            for name in ("factor", "cooldown_steps", "max")
        ),
        ("schedule.batch_size_multiple", bool(schedule.batch_size), "schedule.batch_size"),
        ("train.eval_source_tokens", bool(cfg.train.eval_sources), "train.eval_sources"),
        ("recompute.method", full, "recompute.mode=full"),
        ("recompute.num_layers", full, "recompute.mode=full"),
        ("recompute.offload_min_bytes", recompute.offload != "none", "recompute.offload"),
    ]  # fmt: skip


def unused(facts: ResolvedConfig) -> None:
    """Nothing is set that changes nothing."""
    for name, used, needed in _cases(facts.cfg):
        default, value = get(_DEFAULTS, name), get(facts.cfg, name)
        if not used and value != default:
            raise Impossible(f"{name}={value} has no effect without {needed}", [{name: default}])


RULES: tuple[Rule, ...] = (unused,)
