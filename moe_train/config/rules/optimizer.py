"""Rules of the optimizer: its numbers, parameter groups, QK-Clip, EMA and Muon. No torch import."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import sys
from dataclasses import replace

from moe_train.config import parameter_groups
from moe_train.config.optimizer import ADAMW, MUON
from moe_train.config.resolve import ResolvedConfig, Rule
from parallel.suggest import Fix, Impossible, fixes_of

_MUON_SINCE = (0, 19)
"""First version of megatron-core whose Muon is used."""


def adamw_numbers(facts: ResolvedConfig) -> None:
    """Ranges of AdamW's numbers."""
    optimizer = facts.cfg.optimizer
    for name, usual in {"beta1": 0.9, "beta2": 0.95}.items():
        if not 0 <= getattr(optimizer, name) < 1:
            raise Impossible(
                f"optimizer.{name}={getattr(optimizer, name)} is not in [0, 1)", [{f"optimizer.{name}": usual}]
            )
    if not optimizer.eps > 0:
        raise Impossible(f"optimizer.eps={optimizer.eps} is not above 0", [{"optimizer.eps": 1e-8}])


def groups(facts: ResolvedConfig) -> None:
    """Every entry of optimizer.groups has parameters, and its weight decay is a multiple of the usual one."""
    optimizer, model = facts.cfg.optimizer, facts.cfg.model
    entries = optimizer.groups
    if not entries:
        return
    names = [name for name, _ in parameter_groups.named_parameters(model)]
    used = {parameter_groups.group_of(name, entries) for name in names}
    for index, entry in enumerate(entries):
        field = f"optimizer.groups[{index}]"
        others = [*entries[:index], *entries[index + 1 :]]
        if index not in used:
            earlier = any(parameter_groups.group_of(name, [entry]) is not None for name in names)
            if earlier:
                raise Impossible(
                    f"{field}.match={entry.match} matches only parameters that earlier entries match, which count",
                    fixes_of("optimizer.groups", [[entry, *others], others]),
                )
            close = parameter_groups.close_patterns(entry.match, model)
            raise Impossible(
                f"{field}.match={entry.match} matches no parameter of the model"
                + (f"; close names: {', '.join(close)}" if close else ""),
                fixes_of(
                    "optimizer.groups",
                    [
                        *([*entries[:index], replace(entry, match=name), *entries[index + 1 :]] for name in close),
                        others,
                    ],
                ),
            )
        if entry.weight_decay and not optimizer.weight_decay:
            raise Impossible(
                f"{field}.weight_decay={entry.weight_decay} needs optimizer.weight_decay above 0, of which it is a "
                "multiple",
                [
                    {"optimizer.weight_decay": entry.weight_decay},
                    {"optimizer.groups": [*entries[:index], replace(entry, weight_decay=0.0), *entries[index + 1 :]]},
                ],
            )


def qk_clip(facts: ResolvedConfig) -> None:
    """QK-Clip rescales projections whose size decides about the logits, and which are not in FP8."""
    cfg = facts.cfg
    threshold, off = cfg.optimizer.qk_clip_threshold, {"optimizer.qk_clip_threshold": None}
    if threshold is None:
        return
    name = f"optimizer.qk_clip_threshold={threshold:g}"
    if not threshold > 0:
        raise Impossible(f"{name} is not above 0", [{"optimizer.qk_clip_threshold": 100.0}, off])
    if cfg.optimizer.qk_clip_alpha > 1:
        raise Impossible(
            f"optimizer.qk_clip_alpha={cfg.optimizer.qk_clip_alpha:g} is above 1", [{"optimizer.qk_clip_alpha": 0.5}]
        )
    if cfg.model.qk_norm != "none":
        raise Impossible(
            f"{name} has no effect with model.qk_norm={cfg.model.qk_norm}, which normalises what QK-Clip rescales",
            [off],
        )
    if cfg.precision.fp8_param_gather:
        raise Impossible(
            f"{name} rescales weights, but precision.fp8_param_gather=true stores them in FP8",
            [{"precision.fp8_param_gather": False}, off],
        )
    if cfg.precision.moments_dtype == "bf16" and facts.runtime == "cuda":
        raise Impossible(
            f"{name} rescales fp32 weights, but with precision.moments_dtype=bf16 they are Transformer Engine's",
            [{"precision.moments_dtype": "fp32"}, off],
        )


def ema(facts: ResolvedConfig) -> None:
    """The EMA of the weights has one decay, and weights that can be read."""
    cfg = facts.cfg
    optimizer = cfg.optimizer
    if optimizer.ema_decay is not None and not optimizer.ema_decay < 1:
        raise Impossible(
            f"optimizer.ema_decay={optimizer.ema_decay:g} is not below 1",
            fixes_of("optimizer.ema_decay", (0.999, None)),
        )
    if optimizer.ema_decay is not None and optimizer.ema_half_life_tokens is not None:
        raise Impossible(
            f"optimizer.ema_decay={optimizer.ema_decay:g} and "
            f"optimizer.ema_half_life_tokens={optimizer.ema_half_life_tokens} both say how fast the EMA forgets",
            [{"optimizer.ema_half_life_tokens": None}, {"optimizer.ema_decay": None}],
        )
    off: Fix = {"optimizer.ema_decay": None, "optimizer.ema_half_life_tokens": None, "train.eval_ema": False}
    if optimizer.averages_weights and cfg.precision.fp8_param_gather:
        name = "ema_decay" if optimizer.ema_decay is not None else "ema_half_life_tokens"
        raise Impossible(
            f"optimizer.{name}={getattr(optimizer, name):g} averages weights, but precision.fp8_param_gather=true "
            "stores them in FP8",
            [{"precision.fp8_param_gather": False}, off],
        )
    if cfg.train.eval_ema and not optimizer.averages_weights:
        raise Impossible(
            "train.eval_ema=true needs an EMA of the weights, but optimizer.ema_decay=null",
            [{"optimizer.ema_decay": 0.999}, {"train.eval_ema": False}],
        )
    if cfg.train.eval_ema and not cfg.train.eval_batches:
        raise Impossible(
            "train.eval_ema=true, but train.eval_batches=0 means no evaluation",
            [{"train.eval_batches": 1}, {"train.eval_ema": False}],
        )


def muon(facts: ResolvedConfig) -> None:
    """Muon has whole matrices and fp32 states, and its package is there."""
    cfg = facts.cfg
    if cfg.optimizer.name != MUON:
        return
    off: Fix = {"optimizer.name": ADAMW}
    if not cfg.optimizer.muon_momentum < 1:
        raise Impossible(
            f"optimizer.muon_momentum={cfg.optimizer.muon_momentum:g} is not below 1",
            fixes_of("optimizer.muon_momentum", (0.95,)),
        )
    refused: list[tuple[bool, str, Fix]] = [
        (cfg.precision.dtype == "fp16", "precision.dtype=fp16", {"precision.dtype": "bf16"}),
        (cfg.precision.moments_dtype == "bf16", "precision.moments_dtype=bf16", {"precision.moments_dtype": "fp32"}),
        (cfg.precision.fp8_param_gather, "precision.fp8_param_gather=true", {"precision.fp8_param_gather": False}),
        (
            cfg.parallel.overlap_param_gather,
            "parallel.overlap_param_gather=true",
            {"parallel.overlap_param_gather": False},
        ),
    ]
    for wrong, what, fix in refused:
        if wrong:
            raise Impossible(f"optimizer.name=muon does not work with {what}", [fix, off])
    if facts.trains and (missing := _missing_for_muon()):
        raise Impossible(
            f"optimizer.name=muon needs Python 3.12 or later and the extra muon (pip install 'moe-train[muon]'), but "
            f"{missing}",
            [off],
        )


def _missing_for_muon() -> str:
    """What Megatron-Core's Muon needs and is not there; "" where all is."""
    python = platform.python_version()
    if sys.version_info < (3, 12):
        return f"this is Python {python}"
    if importlib.util.find_spec("emerging_optimizers") is None:
        return "emerging-optimizers is not installed"
    megatron = importlib.metadata.version("megatron-core")
    if tuple(map(int, megatron.split(".")[:2])) < _MUON_SINCE:
        return f"megatron-core is {megatron}, and 0.19 is the first whose Muon is used"
    return ""


RULES: tuple[Rule, ...] = (adamw_numbers, groups, qk_clip, ema, muon)
