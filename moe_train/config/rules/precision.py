"""Rules of FP8 and FP4: what each recipe can do, where it runs, and which shapes its products take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from moe_train.config.resolve import ResolvedConfig, Rule
from moe_train.config.schema import PrecisionConfig
from parallel.architecture.layers import describe_layer, describe_mtp
from parallel.architecture.parts import Shard
from parallel.dispatchers import DISPATCHERS
from parallel.fp8_recipes import RECIPES, FP8Recipe
from parallel.suggest import Fix, Impossible, fixes_of, multiples, nearest

_OPTIONS = ("first_last_layers_bf16", "fp8_param_gather", "fp8_dispatch")
_TILE = 128  # of fp8_dispatch, elements


def recipe(precision: PrecisionConfig) -> str | None:
    """How linear layers are quantised: a name of `parallel.fp8_recipes.RECIPES`, or not at all."""
    return precision.fp8 or precision.fp4


def properties(precision: PrecisionConfig) -> FP8Recipe | None:
    """What is known of the recipe of linear layers; None without one."""
    name = recipe(precision)
    return RECIPES[name] if name else None


def power_of_two_scales(precision: PrecisionConfig) -> bool:
    """Whether FP8 scales are powers of two: as asked, else the default of Transformer Engine's recipe."""
    requested = precision.power_of_two_scales
    if requested is None:
        return precision.fp8 is not None and RECIPES[precision.fp8].power_of_two_scales
    return requested


def high_precision_layers(precision: PrecisionConfig, num_layers: int) -> frozenset[int]:
    """Decoder layers (from 0) that stay in bf16 under FP8 (upstream's rule: fp8_utils.py)."""
    if not precision.first_last_layers_bf16:
        return frozenset()
    start, end = precision.num_layers_at_start_in_bf16, num_layers - precision.num_layers_at_end_in_bf16
    return frozenset(i for i in range(num_layers) if i < start or i >= end)


def _named(precision: PrecisionConfig) -> str:
    return f"precision.fp8={precision.fp8}" if precision.fp8 else f"precision.fp4={precision.fp4}"


def _off(precision: PrecisionConfig) -> Fix:
    fix: Fix = {f"precision.{name}": None for name in ("fp8", "fp4") if getattr(precision, name)}
    return fix | {f"precision.{name}": False for name in _OPTIONS if getattr(precision, name)}


def low_precision(facts: ResolvedConfig) -> None:
    """Only linear layers are in FP8 or FP4; all else needs bf16, and their options need a recipe."""
    precision = facts.cfg.precision
    if precision.fp8 and precision.fp4:
        raise Impossible(
            f"precision.fp4={precision.fp4} and precision.fp8={precision.fp8} exclude each other",
            [{"precision.fp8": None}, {"precision.fp4": None}],
        )
    if recipe(precision) is None:
        for name in _OPTIONS:
            if getattr(precision, name):
                raise Impossible(f"precision.{name}=true needs FP8, but precision.fp8=null",
                                 [{f"precision.{name}": False}])  # fmt: skip
        return
    off, named = _off(precision), _named(precision)
    if precision.dtype != "bf16":
        raise Impossible(
            f"{named} is for linear layers and needs precision.dtype=bf16 for the rest, not {precision.dtype}",
            [{"precision.dtype": "bf16"}, off],
        )
    if precision.fp4 and facts.backend != "te":
        raise Impossible(
            f"{named} needs backend.name=te, not {facts.backend}, which emulates FP8 but not FP4",
            [{"precision.fp4": None, "precision.fp8": "block"}, off],
        )
    if facts.backend == "local" and facts.runtime == "cuda":
        raise Impossible(
            f"{named} on cuda needs backend.name=te: backend.name=local emulates FP8 on the CPU",
            [{"backend.name": "te"}, off],
        )


def scales(facts: ResolvedConfig) -> None:
    """Which recipes let the user say whether scales are powers of two."""
    precision = facts.cfg.precision
    requested, known = precision.power_of_two_scales, properties(precision)
    if known is None or known.settable_scales or requested is None:
        return
    if known.power_of_two_scales and not requested:
        raise Impossible(
            f"precision.power_of_two_scales=false does not go with {_named(precision)}: E8M0 scales are powers of two "
            "by definition",
            fixes_of("precision.power_of_two_scales", (None, True)),
        )
    if requested and not known.power_of_two_scales:
        raise Impossible(
            f"precision.power_of_two_scales=true does not go with {_named(precision)}: Transformer Engine has no "
            "such option",
            fixes_of("precision.power_of_two_scales", (None, False)),
        )


def layers_in_bf16(facts: ResolvedConfig) -> None:
    """Upstream's limits (transformer/transformer_config.py), and at least one layer that is in FP8."""
    precision, layers, pp = facts.cfg.precision, facts.cfg.model.num_layers, facts.layout.pp
    if recipe(precision) is None or not precision.first_last_layers_bf16:
        return
    off: Fix = {"precision.first_last_layers_bf16": False}
    if RECIPES[recipe(precision) or ""].delayed:
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


def param_gather(facts: ResolvedConfig) -> None:
    """Weights in FP8 are Transformer Engine's, and the distributed optimizer writes them."""
    cfg = facts.cfg
    if not cfg.precision.fp8_param_gather:
        return
    off: Fix = {"precision.fp8_param_gather": False}
    if cfg.precision.fp4:
        raise Impossible("precision.fp8_param_gather=true keeps weights in FP8, not in that of "
                         f"precision.fp4={cfg.precision.fp4}", [off])  # fmt: skip
    if facts.backend != "te":
        raise Impossible(
            f"precision.fp8_param_gather=true needs backend.name=te, not {facts.backend}, which emulates FP8", [off]
        )
    if not cfg.parallel.distributed_optimizer:
        raise Impossible("precision.fp8_param_gather=true needs parallel.distributed_optimizer=true",
                         [{"parallel.distributed_optimizer": True}, off])  # fmt: skip


def dispatch(facts: ResolvedConfig) -> None:
    """Tokens are dispatched in FP8 to emulated experts only, through all-to-all, in tiles of 1 x 128."""
    cfg, model = facts.cfg, facts.cfg.model
    if not cfg.precision.fp8_dispatch:
        return
    off: Fix = {"precision.fp8_dispatch": False}
    if not model.is_moe:
        raise Impossible("precision.fp8_dispatch=true needs experts, but model.num_experts=0", [off])
    known = properties(cfg.precision)
    if known is None or not known.sent_by_dispatch:
        raise Impossible(
            f"precision.fp8_dispatch=true sends the tiles of precision.fp8=block, not of {_named(cfg.precision)}",
            [{"precision.fp8": "block", "precision.fp4": None}, off],
        )
    if cfg.precision.power_of_two_scales is False:
        raise Impossible(
            "precision.fp8_dispatch=true needs scales that are powers of two: what arrives is rounded once more",
            [{"precision.power_of_two_scales": True}, off],
        )
    if facts.backend != "local":
        raise Impossible(
            f"precision.fp8_dispatch=true needs backend.name=local, not {facts.backend}: the dispatchers of "
            "Megatron-Core send 16 bits",
            [off],
        )
    if not DISPATCHERS[cfg.parallel.dispatcher].own_on_local:
        able = [row.name for row in DISPATCHERS.values() if row.own_on_local]
        raise Impossible(
            f"precision.fp8_dispatch=true needs parallel.dispatcher={' or '.join(able)}, not {cfg.parallel.dispatcher}",
            [*fixes_of("parallel.dispatcher", able), off],
        )
    if model.hidden_size % _TILE:
        raise Impossible(
            f"precision.fp8_dispatch=true sends tiles of {_TILE}, which do not divide model.hidden_size="
            f"{model.hidden_size}",
            [*fixes_of("model.hidden_size", nearest(multiples(_TILE, model.hidden_size), model.hidden_size)), off],
        )


def dimensions(facts: ResolvedConfig) -> None:
    """Transformer Engine multiplies aligned matrices only: widths of linear layers on a rank, and its tokens."""
    cfg, layout = facts.cfg, facts.layout
    name = recipe(cfg.precision)
    if name is None or facts.backend != "te":
        return
    unit, named = RECIPES[name].alignment, _named(cfg.precision)
    for field, text, width, step in _widths(facts):
        if width % unit:
            value: int = getattr(cfg.model, field)
            raise Impossible(
                f"model.{field}={value} gives linear layers a width of {text} = {width} on a rank, and {named} needs "
                f"multiples of {unit} (backend.name=te)",
                [*fixes_of(f"model.{field}", nearest(multiples(step * unit, value), value)), _off(cfg.precision)],
            )
    split = layout.cp * (layout.tp if facts.sequence_parallel else 1)
    size, length = cfg.batch.micro_batch_size, cfg.train.seq_length
    if size * length // split % unit:
        raise Impossible(
            f"train.seq_length={length} gives a rank micro-batches of {size} x {length} / {split} = "
            f"{size * length // split} tokens, and {named} needs multiples of {unit} (backend.name=te)",
            [
                *fixes_of("train.seq_length", nearest(multiples(unit * split, length), length)),
                {"batch.micro_batch_size": unit},
                _off(cfg.precision),
            ],
        )


def _widths(facts: ResolvedConfig) -> Iterator[tuple[str, str, int, int]]:
    """(field, arithmetic, width on a rank, what of the field is one of the width) of each side of a linear layer.

    Experts get as many rows as Megatron-Core pads them to (transformer/moe/experts.py `TEGroupedMLP`).
    """
    model = facts.cfg.model
    linears = [describe_mtp(model)[0]] if model.mtp_num_layers else []
    for moe in sorted(set(model.moe_layer_pattern)):
        linears += describe_layer(model, bool(moe)).linears
    linears = [linear for linear in linears if linear.quantised]
    inputs = [(linear.inputs, linear, linear.shard is Shard.ROW) for linear in linears]
    outputs = [(linear.outputs, linear, linear.shard is Shard.COLUMN) for linear in linears]
    # Widths that ranks do not split come first: others are made of them.
    for width, linear, split in sorted([*inputs, *outputs], key=lambda side: side[2]):
        ranks: int = getattr(facts.layout, linear.degree) if split else 1
        # One of the concatenated parts, such as gate and up: what divides it divides all of them together.
        on_rank = int(replace(width, copies=1).on_rank(ranks))
        yield width.field, width.arithmetic(ranks if split else None), on_rank, 1 if width.heads else ranks


def kept_scales(facts: ResolvedConfig) -> None:
    """Transformer Engine's delayed scaling pickles its scales with its layers, and checkpoints keep nothing pickled."""
    checkpoint = facts.cfg.checkpoint
    known = properties(facts.cfg.precision)
    if not facts.trains or known is None or not known.delayed or facts.backend != "te":
        return
    if checkpoint.save_at_end or checkpoint.interval_steps:
        raise Impossible(
            "precision.fp8=delayed on backend.name=te has scales that no checkpoint keeps (Transformer Engine pickles "
            "them), so that a resumed run would differ",
            [
                {"precision.fp8": "tensor"},
                {"checkpoint.save_at_end": False, "checkpoint.interval_steps": 0},
            ],
        )


def moments(facts: ResolvedConfig) -> None:
    """Adam moments in bf16: on te by Megatron-Core's precision-aware optimizer, on local by our own, on the CPU."""
    cfg = facts.cfg
    if cfg.precision.moments_dtype == "fp32" or not facts.trains:
        return
    off: Fix = {"precision.moments_dtype": "fp32"}
    if facts.backend == "te" and not cfg.parallel.distributed_optimizer:
        raise Impossible("precision.moments_dtype=bf16 needs parallel.distributed_optimizer=true",
                         [{"parallel.distributed_optimizer": True}, off])  # fmt: skip
    if facts.backend == "local" and facts.runtime == "cuda":
        raise Impossible(
            "precision.moments_dtype=bf16 on cuda needs the optimizer of Transformer Engine (backend.name=te): that of "
            "backend.name=local works on the CPU",
            [{"backend.name": "te"}, off],
        )


def stochastic_rounding(facts: ResolvedConfig) -> None:
    """Only what is stored in bf16 by our own optimizer is rounded at random."""
    precision, off = facts.cfg.precision, [{"precision.stochastic_rounding": False}]
    if not precision.stochastic_rounding:
        return
    if precision.moments_dtype == "fp32":
        raise Impossible(
            "precision.stochastic_rounding=true rounds moments in bf16, but precision.moments_dtype=fp32",
            [{"precision.moments_dtype": "bf16"}, *off],
        )
    if facts.backend != "local":
        raise Impossible(
            f"precision.stochastic_rounding=true needs backend.name=local, not {facts.backend}: the optimizer of "
            "Transformer Engine rounds moments to the nearest",
            off,
        )


RULES: tuple[Rule, ...] = (
    low_precision, scales, layers_in_bf16, param_gather, dispatch, dimensions, kept_scales, moments,
    stochastic_rounding,
)  # fmt: skip
