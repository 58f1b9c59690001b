"""Rules of FP8: what each recipe can do, and where it runs."""

from __future__ import annotations

from moe_train.config.rules.facts import Facts, Rule
from parallel.suggest import Fix, Impossible, fixes_of

_OPTIONS = ("first_last_layers_bf16", "fp8_param_gather")


def fp8(facts: Facts) -> None:
    """Only linear layers are in FP8; all else needs bf16, and FP8 options need a recipe."""
    precision = facts.cfg.precision
    if precision.fp8 is None:
        for name in _OPTIONS:
            if getattr(precision, name):
                raise Impossible(f"precision.{name}=true needs FP8, but precision.fp8=null",
                                 [{f"precision.{name}": False}])  # fmt: skip
        return
    off: Fix = {"precision.fp8": None}
    off |= {f"precision.{name}": False for name in _OPTIONS if getattr(precision, name)}
    if precision.dtype != "bf16":
        raise Impossible(
            f"precision.fp8={precision.fp8} is for linear layers and needs precision.dtype=bf16 for the rest, "
            f"not {precision.dtype}",
            [{"precision.dtype": "bf16"}, off],
        )
    if facts.backend == "local" and facts.runtime == "cuda":
        raise Impossible(
            f"precision.fp8={precision.fp8} on cuda needs backend.name=te: backend.name=local emulates FP8 on the CPU",
            [{"backend.name": "te"}, off],
        )


def scales(facts: Facts) -> None:
    """Which recipes let the user say whether scales are powers of two."""
    precision = facts.cfg.precision
    asked = precision.power_of_two_scales
    if precision.fp8 == "mxfp8" and asked is False:
        raise Impossible("precision.power_of_two_scales=false does not go with precision.fp8=mxfp8: E8M0 has no others",
                         fixes_of("precision.power_of_two_scales", (None, True)))  # fmt: skip
    if precision.fp8 == "delayed" and asked:
        raise Impossible(
            "precision.power_of_two_scales=true does not go with precision.fp8=delayed: Transformer Engine has no "
            "such option",
            fixes_of("precision.power_of_two_scales", (None, False)),
        )


def layers_in_bf16(facts: Facts) -> None:
    """Upstream's limits (transformer/transformer_config.py), and at least one layer that is in FP8."""
    precision, layers, pp = facts.cfg.precision, facts.cfg.model.num_layers, facts.layout.pp
    if precision.fp8 is None or not precision.first_last_layers_bf16:
        return
    off: Fix = {"precision.first_last_layers_bf16": False}
    if precision.fp8 == "delayed":
        raise Impossible(
            "precision.first_last_layers_bf16=true does not go with precision.fp8=delayed: Megatron-Core enters its "
            "FP8 region once for all layers",
            [off, {"precision.fp8": "tensor"}],
        )
    start, end = precision.num_layers_at_start_in_bf16, precision.num_layers_at_end_in_bf16
    for name, value in (("num_layers_at_start_in_bf16", start), ("num_layers_at_end_in_bf16", end)):
        if value > layers // pp:
            raise Impossible(
                f"precision.{name}={value} exceeds the model.num_layers / parallel.pp = {layers} / {pp} = "
                f"{layers // pp} layers of a pipeline stage",
                [*fixes_of(f"precision.{name}", (layers // pp, 1, 0)), off],
            )
    if start + end >= layers:
        raise Impossible(
            f"precision.num_layers_at_start_in_bf16={start} and precision.num_layers_at_end_in_bf16={end} leave none "
            f"of model.num_layers={layers} layers in FP8",
            [{"precision.num_layers_at_start_in_bf16": 1, "precision.num_layers_at_end_in_bf16": 1}, off],
        )


def param_gather(facts: Facts) -> None:
    """Weights in FP8 are Transformer Engine's, and the distributed optimizer writes them."""
    cfg = facts.cfg
    if not cfg.precision.fp8_param_gather:
        return
    off: Fix = {"precision.fp8_param_gather": False}
    if facts.backend != "te":
        raise Impossible(
            f"precision.fp8_param_gather=true needs backend.name=te, not {facts.backend}, which emulates FP8", [off]
        )
    if not cfg.parallel.distributed_optimizer:
        raise Impossible("precision.fp8_param_gather=true needs parallel.distributed_optimizer=true",
                         [{"parallel.distributed_optimizer": True}, off])  # fmt: skip


def moments(facts: Facts) -> None:
    """Adam moments in bf16 are those of Megatron-Core's precision-aware optimizer, which is Transformer Engine's."""
    cfg = facts.cfg
    if cfg.precision.moments_dtype == "fp32":
        return
    off: Fix = {"precision.moments_dtype": "fp32"}
    if facts.backend != "te":
        raise Impossible(
            f"precision.moments_dtype=bf16 needs the optimizer of Transformer Engine, not backend.name={facts.backend}",
            [off],
        )
    if not cfg.parallel.distributed_optimizer:
        raise Impossible("precision.moments_dtype=bf16 needs parallel.distributed_optimizer=true",
                         [{"parallel.distributed_optimizer": True}, off])  # fmt: skip


RULES: tuple[Rule, ...] = (fp8, scales, layers_in_bf16, param_gather, moments)
