"""Rules between the architecture and the layout of ranks."""

from __future__ import annotations

from collections.abc import Callable
from math import lcm

from moe_train.config.quantities import batch_schedule, with_whole_sizes
from moe_train.config.resolve import ResolvedConfig, Rule
from moe_train.config.schema import Config
from parallel import pipeline
from parallel.architecture.layers import describe_layer
from parallel.architecture.parts import Shard
from parallel.dispatchers import DISPATCHERS, DispatcherKind
from parallel.suggest import Fix, Impossible, divisors, fixes_of, multiples, nearest


def _divides(
    facts: ResolvedConfig, degree: str, field: str, value: int, meaning: str = "", fixed: bool = False
) -> None:
    """`parallel.<degree>` must divide `value` of `field`; suggests degrees, then values unless they are `fixed`."""
    by: int = getattr(facts.layout, degree)
    if value % by == 0:
        return
    name = f"parallel.{degree}"
    fixes = fixes_of(name, nearest(divisors(value), by))
    if not fixed:
        fixes += fixes_of(field, nearest(multiples(by, value), value))
    what = meaning or f"{field}={value}"
    raise Impossible(f"{name}={by} does not divide {what} ({value} = {value // by} x {by} + {value % by})", fixes)


def tensor_parallel_widths(facts: ResolvedConfig) -> None:
    """Every matrix that tensor-parallel ranks split must split evenly."""
    model = facts.cfg.model
    _divides(facts, "tp", "model.num_attention_heads", model.num_attention_heads)
    linears = [one for moe in sorted(set(model.moe_layer_pattern)) for one in describe_layer(model, bool(moe)).linears]
    for linear in linears:
        # Transformer Engine keeps the down-projections of latents whole on every rank.
        column = linear.shard is Shard.COLUMN or (linear.shard is Shard.LATENT and facts.backend == "local")
        for width, split in ((linear.outputs, column), (linear.inputs, linear.shard is Shard.ROW)):
            if split and width.kv_heads:
                _query_groups(facts)
            elif split and not width.heads:
                _divides(
                    facts, linear.degree, f"model.{width.field}", sum(width.terms), width.meaning, bool(width.meaning)
                )
    meaning = f"model.vocab_size={model.vocab_size} padded to {model.padded_vocab_size} rows"
    _divides(facts, "tp", "model.vocab_size", model.padded_vocab_size, meaning, fixed=True)


def _query_groups(facts: ResolvedConfig) -> None:
    """Key/value heads split over tp, or each serves a whole number of tensor-parallel ranks."""
    model, tp = facts.cfg.model, facts.layout.tp
    groups = model.kv_heads
    # Where one head serves several ranks: a norm over all heads knows only split heads, and the weights still split.
    shared_ok = tp % groups == 0 and model.qk_norm != "full" and 2 * groups * model.attention_head_dim % tp == 0
    if groups % tp and not shared_ok:
        raise Impossible(
            f"parallel.tp={tp} does not divide model.num_query_groups={groups} ({groups} = {groups // tp} x {tp} + "
            f"{groups % tp})" + ("" if model.qk_norm == "full" else f", nor {groups} tp"),
            [
                *fixes_of("parallel.tp", nearest(divisors(groups), tp)),
                *fixes_of("model.num_query_groups", nearest(divisors(model.num_attention_heads), groups)),
            ],
        )


def sequence_parallel(facts: ResolvedConfig) -> None:
    """Sequence parallelism needs tensor parallelism, and upstream's MoE layer needs it with tensor parallelism."""
    requested, tp = facts.cfg.parallel.sequence_parallel, facts.layout.tp
    if requested and tp == 1:
        raise Impossible(
            "parallel.sequence_parallel=true splits the sequence over tensor-parallel ranks, but parallel.tp=1",
            [{"parallel.sequence_parallel": None}, {"parallel.tp": 2}],
        )
    if requested is False and tp > 1 and facts.cfg.model.is_moe:
        raise Impossible(
            f"parallel.sequence_parallel=false does not go with experts and parallel.tp={tp}: Megatron-Core refuses to "
            "train experts on sequences that every tensor-parallel rank holds whole",
            [{"parallel.sequence_parallel": True}, {"parallel.tp": 1}],
        )


def sequence_length(facts: ResolvedConfig) -> None:
    """Sequences split over cp (in 2 x cp zig-zag slices) and then over tp, and fit the model."""
    train, model, layout = facts.cfg.train, facts.cfg.model, facts.layout
    length = train.seq_length
    over_tp = layout.tp if facts.sequence_parallel else 1
    slices = 2 * layout.cp if layout.cp > 1 else 1
    step = lcm(slices, over_tp * layout.cp)
    if length % step:
        parts = [f"2 x parallel.cp = {slices} zig-zag slices"] if slices > 1 else []
        if over_tp > 1:
            product = f"parallel.tp x cp = {over_tp} x {layout.cp} = {over_tp * layout.cp}"
            parts += [f"{product if layout.cp > 1 else f'parallel.tp={over_tp}'} ranks (sequence parallel)"]
        raise Impossible(
            f"train.seq_length={length} does not split into {' and '.join(parts)}: "
            f"{length} = {length // step} x {step} + {length % step}",
            fixes_of("train.seq_length", nearest(multiples(step, length), length, minimum=2)),
        )
    if length > model.max_position_embeddings:
        limit = model.max_position_embeddings
        raise Impossible(
            f"train.seq_length={length} exceeds model.max_position_embeddings={limit}",
            [{"train.seq_length": max(limit // step * step, step)}, {"model.max_position_embeddings": length}],
        )
    if length <= model.mtp_num_layers:
        raise Impossible(
            f"train.seq_length={length} leaves nothing to predict with model.mtp_num_layers={model.mtp_num_layers}",
            fixes_of("train.seq_length", range(step * (model.mtp_num_layers // step + 1), 4 * step + 64, step)),
        )


def experts(facts: ResolvedConfig) -> None:
    """Experts split evenly over ep ranks; dense models have none to split."""
    model, layout = facts.cfg.model, facts.layout
    if not model.is_moe:
        for name in ("ep", "etp"):
            if (degree := getattr(layout, name)) > 1:
                raise Impossible(
                    f"parallel.{name}={degree} splits experts, but model.num_experts=0 is a dense model",
                    [{f"parallel.{name}": 1}, {"model.num_experts": degree}],
                )
        return
    _divides(facts, "ep", "model.num_experts", model.num_experts)


def _instead(suits: Callable[[DispatcherKind], bool]) -> list[Fix]:
    """Dispatchers that suit."""
    return fixes_of("parallel.dispatcher", [row.name for row in DISPATCHERS.values() if suits(row)])


def dispatcher(facts: ResolvedConfig) -> None:
    """What each way of sending tokens to experts needs."""
    cfg, layout, parallel = facts.cfg, facts.layout, facts.cfg.parallel
    row = DISPATCHERS[parallel.dispatcher]
    named = f"parallel.dispatcher={row.name}" + (f" ({row.library})" if row.library else "")
    if row.needs_gpu and facts.runtime != "cuda":
        raise Impossible(f"{named} needs GPUs, but runtime={facts.runtime}", _instead(lambda one: not one.needs_gpu))
    if row.needs_peers and layout.ep * layout.etp == 1:
        raise Impossible(
            f"parallel.dispatcher={row.name} needs experts on several ranks, but parallel.ep x etp = 1 x 1",
            [{"parallel.ep": 2}, *_instead(lambda one: not one.needs_peers)],
        )
    if cfg.model.pad_to_capacity and not row.pads_to_capacity:
        raise Impossible(
            f"{named} does not go with model.pad_to_capacity=true", _instead(lambda one: one.pads_to_capacity)
        )
    if parallel.shared_expert_overlap:
        off: Fix = {"parallel.shared_expert_overlap": False}
        if not cfg.model.num_shared_experts:
            raise Impossible("parallel.shared_expert_overlap=true needs shared experts, but model.num_shared_experts=0",
                             [off, {"model.num_shared_experts": 1}])  # fmt: skip
        if not row.overlaps_shared_experts:
            able = [one.name for one in DISPATCHERS.values() if one.overlaps_shared_experts]
            raise Impossible(
                f"parallel.shared_expert_overlap=true needs parallel.dispatcher={' or '.join(able)}, not {row.name}",
                [*fixes_of("parallel.dispatcher", able), off],
            )
        if facts.runtime != "cuda":
            raise Impossible(
                f"parallel.shared_expert_overlap=true needs GPU streams, but runtime={facts.runtime}", [off]
            )


def stages(facts: ResolvedConfig) -> None:
    """Every virtual pipeline stage holds something, and chunks interleave only over several ranks."""
    cfg, layout = facts.cfg, facts.layout
    if layout.vpp > 1 and layout.pp == 1:
        raise Impossible(
            f"parallel.vpp={layout.vpp} interleaves model chunks over pipeline ranks, but parallel.pp=1",
            [{"parallel.vpp": 1}, {"parallel.pp": 2}],
        )
    if facts.overlap_p2p and layout.vpp == 1:
        raise Impossible(
            "parallel.overlap_p2p=true needs the interleaved schedule, but parallel.vpp=1",
            [{"parallel.overlap_p2p": None}, {"parallel.vpp": 2}],
        )
    if layout.pp == 2 and layout.vpp > 1 and not facts.overlap_p2p:
        raise Impossible(
            f"parallel.overlap_p2p=false with parallel.pp=2 and parallel.vpp={layout.vpp} mismatches sends and "
            "receives: both neighbours of a rank are the same rank, and gradients come out wrong",
            [{"parallel.overlap_p2p": True}, {"parallel.vpp": 1}],
        )
    text, model = cfg.parallel.pipeline_layout, cfg.model
    if layout.pp > 1 and model.tie_embeddings and model.mtp_num_layers:
        raise Impossible(
            f"model.tie_embeddings=true with model.mtp_num_layers={model.mtp_num_layers} puts a third copy of the "
            f"embedding on the last of parallel.pp={layout.pp} stages, which Megatron-Core's checkpoints do not know",
            [{"model.tie_embeddings": False}, {"model.mtp_num_layers": 0}, {"parallel.pp": 1}],
        )
    if text is None:
        pipeline.balanced_layout(model.num_layers, layout.pp, layout.vpp, model.mtp_num_layers)
    else:
        pipeline.parse_layout(text, layout.pp, layout.vpp, model.num_layers, model.mtp_num_layers)


def global_batch(facts: ResolvedConfig) -> None:
    """Each global batch is whole micro-batches on every data-parallel rank, in rounds of pp when interleaved."""
    cfg, layout = facts.cfg, facts.layout
    if facts.runtime == "simulated":
        return  # it builds one rank's model and trains on no batch
    micro, each = cfg.batch.micro_batch_size, facts.data_ranks_batch
    product = f"batch.micro_batch_size x parallel.dp = {micro} x {layout.dp} = {each}"
    rounds = layout.pp if layout.vpp > 1 else 1
    for size in batch_schedule(cfg).sizes:
        what = f"schedule.batch_size passes {size} sequences, which" if cfg.schedule.batch_size else ""
        if size % each:
            smaller = [
                d for d in divisors(size)
                if all(one % (d * layout.dp * rounds) == 0 for one in batch_schedule(cfg).sizes)
            ]  # fmt: skip
            raise Impossible(
                f"{what or f'batch.global_batch_size={size}'} is not a multiple of {product} "
                f"({size} = {size // each} x {each} + {size % each})",
                [*_fitting_sizes(cfg, size, each), *fixes_of("batch.micro_batch_size", nearest(smaller, micro))],
            )
        if (size // each) % rounds:
            raise Impossible(
                f"{what or f'batch.global_batch_size={size}'} makes {size} / ({product}) = {size // each} "
                f"micro-batches, not a multiple of parallel.pp={layout.pp} as the interleaved schedule "
                f"(parallel.vpp={layout.vpp}) needs",
                _fitting_sizes(cfg, size, each * rounds),
            )


def _fitting_sizes(cfg: Config, size: int, multiple: int) -> list[Fix]:
    """Batch sizes around `size`, or ramps, that are multiples of `multiple`."""
    entries = cfg.schedule.batch_size
    if not entries:
        return fixes_of("batch.global_batch_size", nearest(multiples(multiple, size), size))
    usual = cfg.schedule.batch_size_multiple or multiple
    whole = [with_whole_sizes(entry, multiple) for entry in entries]
    total = max(1, round(cfg.batch.global_batch_size / multiple)) * multiple
    return [
        {"schedule.batch_size_multiple": lcm(usual, multiple)},
        {"schedule.batch_size": whole, "schedule.batch_size_multiple": lcm(usual, multiple)},
        {"schedule.batch_size": whole, "schedule.batch_size_multiple": multiple, "batch.global_batch_size": total},
    ]


def overlap(facts: ResolvedConfig) -> None:
    """Gathering parameters late needs shards to gather, and gradients reduced the same way (upstream's rule)."""
    parallel = facts.cfg.parallel
    if not parallel.overlap_param_gather:
        return
    off: Fix = {"parallel.overlap_param_gather": False}
    if not parallel.distributed_optimizer:
        raise Impossible("parallel.overlap_param_gather=true needs parallel.distributed_optimizer=true",
                         [{"parallel.distributed_optimizer": True}, off])  # fmt: skip
    if not parallel.overlap_grad_reduce:
        raise Impossible("parallel.overlap_param_gather=true needs parallel.overlap_grad_reduce=true",
                         [{"parallel.overlap_grad_reduce": True}, off])  # fmt: skip


RULES: tuple[Rule, ...] = (
    experts, tensor_parallel_widths, sequence_parallel, sequence_length, dispatcher, stages, global_batch, overlap,
)  # fmt: skip
