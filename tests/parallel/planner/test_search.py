"""The search: deterministic, quick, within memory, with reasons."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import cache
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest

from moe_train.config.composition.compose import compose
from moe_train.config.composition.validate import validate
from moe_train.config.roots import PlanRoot
from moe_train.model.estimate import software_of
from moe_train.model.memory import weights_of, workload_of
from parallel.layout import ParallelLayout
from parallel.planner import search
from parallel.planner.activations import shared_embedding_bytes
from parallel.planner.memory import StageMemory, memory_of_ranks
from parallel.planner.workload import Workload
from tests.parallel.planner.small import GQA, SOFTWARE, workload
from tools.planning.answer import Answer, answer, sizes
from tools.planning.experiment import as_yaml

V3 = (
    "model=deepseek_v3", "cluster=h800", "runtime=cuda", "batch=large", "train.seq_length=4096", "precision=bf16",
    "plan.precisions=[none,block]", "plan.gpus=2048", "train.tokens=14800000000000",
)  # fmt: skip


def plan(*overrides: str) -> Answer:
    cfg = compose([*V3, *overrides], PlanRoot)
    return answer(cfg, validate(cfg))


@cache
def base_of(*overrides: str) -> Workload:
    """The job of DeepSeek-V3, or of what `overrides` make of it, for a test to change."""
    cfg = compose([*V3, "parallel=deepseek_v3_h800", *overrides], PlanRoot)
    return workload_of(cfg, validate(cfg))


def degrees(tp: int = 1, pp: int = 1, cp: int = 1, ep: int = 1, etp: int = 1, dp: int = 1) -> ParallelLayout:
    return ParallelLayout(tp, pp, 1, cp, ep, etp, dp)


HEADS = "tp does not divide the heads or the vocabulary"
KEYS = "tp and the key/value heads do not divide each other"
EXPERTS = "ep does not divide the experts, or etp their width"
SEQUENCE = "2 x cp does not divide the sequence"
LAYERS = "more pipeline stages than layers"
OF_MODEL: list[tuple[dict[str, object], ParallelLayout, str]] = [  # 128 heads, 129,280 tokens, 256 experts, 61 layers
    ({}, degrees(tp=128, ep=256, etp=2048), ""),
    ({}, degrees(tp=5), HEADS),  # which divides the vocabulary
    ({"num_attention_heads": 96}, degrees(tp=3), HEADS),  # which divides the heads
    ({"attention": "gqa", "num_query_groups": 4}, degrees(tp=2), ""),
    ({"attention": "gqa", "num_query_groups": 4}, degrees(tp=8), ""),
    ({"attention": "gqa", "num_query_groups": 12, "num_attention_heads": 96}, degrees(tp=8), KEYS),
    ({"num_query_groups": 12, "num_attention_heads": 96}, degrees(tp=8), ""),  # latent attention has none
    ({}, degrees(ep=3), EXPERTS),
    ({}, degrees(etp=3), EXPERTS),
    ({}, degrees(pp=63), ""),  # the first and the last stage may be without layers
    ({}, degrees(pp=64), LAYERS),
]


@pytest.mark.parametrize(("changes", "layout", "reason"), OF_MODEL)
def test_degrees_that_do_not_divide_the_model_are_refused(
    changes: dict[str, object], layout: ParallelLayout, reason: str
) -> None:
    base = base_of()
    model = replace(base.model, **changes)  # type: ignore[type-var]
    assert search.infeasible_reason(replace(base, model=model), layout) == reason


@pytest.mark.parametrize(
    ("tokens", "cp", "reason"), [(4096, 2048, ""), (4096, 4096, SEQUENCE), (6, 2, SEQUENCE), (8, 2, ""), (7, 1, "")]
)
def test_context_parallelism_halves_the_share_of_each_rank(tokens: int, cp: int, reason: str) -> None:
    assert search.infeasible_reason(replace(base_of(), seq_length=tokens), degrees(cp=cp)) == reason


def test_every_layout_that_fills_the_gpus_is_tried_or_refused() -> None:
    base, result = base_of(), search.SearchResult()
    space = search.Space(tp=(1, 2, 3), pp=(1, 2, 128), cp=(1, 2), ep=(1, 3, 16, 64), etp=(1, 2, 3))
    offered = list(search.layouts(base, 384, space, result))
    expected, tried = [], 0
    for tp, pp, cp, ep, etp in product((1, 2, 3), (1, 2, 128), (1, 2), (1, 3, 16, 64), (1, 2, 3)):
        dp = 384 // (tp * pp * cp)
        if tp * pp * cp * dp == 384 and (tp * cp * dp) % (ep * etp) == 0 and etp in {1, tp}:
            tried += 1
            if pp < 128 and tp != 3 and ep != 3 and etp != 3:
                expected.append(degrees(tp, pp, cp, ep, etp, dp))
    assert offered == expected
    assert result.tried == tried == len(offered) + sum(result.reasons.values())
    assert set(result.reasons) == {HEADS, EXPERTS, LAYERS}
    dense = replace(base, model=replace(base.model, num_experts=0))  # type: ignore[type-var]
    assert {layout.ep for layout in search.layouts(dense, 384, space, search.SearchResult())} == {1}


def test_what_a_rank_of_a_bidirectional_pipeline_holds() -> None:
    """By hand, a digit for each part: two stages, half of the optimizer state of each, the larger of what passes."""
    base = replace(base_of(), compact=True, layout=degrees(pp=4), micro_batches=16)
    shared = shared_embedding_bytes(base)
    assert shared > 0
    logits = [0, 0, 0, 5_000_000]
    memory = [
        StageMemory(
            stage=i, items=(), parameters=i + 1, gradients=10 * (i + 1), optimizer=100 * (i + 1),
            micro_batches_in_flight=1, activations_per_micro_batch=1000 * (i + 1), expert_share=0,
            activations=70_000_000, recompute=10_000 * (i + 1), communication=100_000 * (4 - i), logits=logits[i],
        )
        for i in range(4)
    ]  # fmt: skip
    ends, middle = 5_448_305 - shared, 342_305
    assert memory_of_ranks(base, "dualpipe", memory) == [ends, middle, middle, ends]
    assert memory_of_ranks(base, "dualpipev", memory)[0] == 414_611  # 4.5 activations of half stages
    assert memory_of_ranks(replace(base, micro_batches=2), "dualpipev", memory)[0] == 412_111
    assert memory_of_ranks(base, "1f1b", memory) == [one.total for one in memory]


@cache
def found() -> tuple[Answer, float]:
    before = time.process_time()
    result = plan()
    return result, time.process_time() - before


def test_all_layouts_of_deepseek_v3_take_seconds() -> None:
    result, seconds = found()
    assert seconds < 10
    assert result.found.tried > 300
    assert len(result.found.plans) == 10


def test_what_is_offered_fits_memory_and_the_gpus() -> None:
    result, _ = found()
    for one in result.found.plans:
        assert one.memory_bytes <= 80e9 < result.hardware.usable_bytes
        assert one.workload.layout.world_size == 2048
        assert one.workload.micro_batches * one.workload.micro_batch_size * one.workload.layout.dp == 15360
    speeds = [one.step.tokens_per_s_per_gpu for one in result.found.plans]
    assert speeds == sorted(speeds, reverse=True)


def test_the_same_question_has_the_same_answer() -> None:
    first, second = found()[0], plan()
    assert [one.label for one in first.found.plans] == [one.label for one in second.found.plans]
    assert as_yaml(first.cfg, first.best) == as_yaml(second.cfg, second.best)


def test_reasons_are_given_for_what_does_not_fit() -> None:
    reasons = found()[0].found.reasons
    assert any("memory" in reason for reason in reasons)
    assert all(times > 0 for times in reasons.values())
    assert set(found()[0].found.examples) == set(reasons)


def test_degrees_are_tried_in_powers_of_two() -> None:
    space = search.Space()
    for name in ("tp", "pp", "ep", "etp", "micro_batch_size"):
        values = getattr(space, name)
        assert list(values) == [2**number for number in range(len(values))], name


@pytest.mark.parametrize(("first", "room", "tried"), [("none", 70, "none act"), ("none", 20, "none act full"),
                                                      ("act", 70, "act"), ("full", 20, "full")])  # fmt: skip
def test_recomputation_grows_step_by_step_until_a_plan_fits(first: str, room: int, tried: str) -> None:
    """Stages need 100 bytes, 60 where the activation function is recomputed, 30 where everything is."""
    modes = {"none": ("none", frozenset[str]()), "act": ("selective", frozenset({"moe_act"})),
             "full": ("full", frozenset[str]())}  # fmt: skip
    needed = {"none": 100, "selective": 60, "full": 30}
    seen: list[str] = []

    def simulate(candidate: search.Candidate) -> SimpleNamespace:
        seen.append(next(name for name, (mode, _) in modes.items() if mode == candidate.workload.recompute))
        return SimpleNamespace(memory_bytes=needed[candidate.workload.recompute])

    mode, modules = modes[first]
    one = workload(GQA, recompute=mode, recompute_modules=modules)
    timer: Any = SimpleNamespace(simulate=simulate, hardware=SimpleNamespace(offered_bytes=room))
    search._simulated(
        search.Candidate(1.0, one, "1f1b", SOFTWARE), search.Space(recompute=tuple(modes.values())), timer
    )
    assert " ".join(seen) == tried


def test_a_layout_that_needs_more_recomputation_than_was_estimated_is_kept() -> None:
    """No layout that fits is faster than the best one found."""
    same = ("model=qwen3_30b_a3b", "cluster=h200", "plan.gpus=64", "batch.global_batch_size=1024",
            "plan.precisions=[]")  # fmt: skip
    given = plan(
        *same, "plan.search=false", "parallel.ep=8", "parallel.dispatcher=flex", "batch.micro_batch_size=4",
        "recompute.mode=selective", "recompute.modules=[layernorm,moe_act]",
    ).best  # fmt: skip
    best = plan(*same, "plan.top=5").best
    assert given.memory_bytes <= 140e9
    assert best.step.tokens_per_s_per_gpu >= given.step.tokens_per_s_per_gpu


def test_drafts_that_do_not_fit_after_all_do_not_end_the_search() -> None:
    """Scores of long sequences fill so little memory that the quickest drafts all lack room."""
    few = ("model=qwen3_30b_a3b", "cluster.memory_gib=48", "plan.gpus=16", "train.seq_length=32768",
           "plan.precisions=[]")  # fmt: skip
    best = [plan(*few, f"plan.top={top}").best for top in (1, 200)]
    assert best[0].label == best[1].label
    assert best[0].memory_bytes <= 48e9


@pytest.mark.parametrize(
    ("words", "schedule"),
    [([], ""), (["plan.schedules=[dualpipe]"], "dualpipe"),
     (["model=qwen3_30b_a3b", "cluster=h200", "plan.gpus=64", "train.seq_length=32768"], "")],
)  # fmt: skip
def test_the_quick_estimate_of_memory_is_close(words: list[str], schedule: str) -> None:
    result = plan(*words) if words else found()[0]
    cfg = result.cfg
    timer = search.Timer(
        result.hardware,
        software_of=lambda workload: software_of(cfg, cfg.plan, workload),
        weights_of=lambda workload: weights_of(cfg.model, workload),
    )
    for one in result.found.plans:
        assert schedule in one.schedule
        assert timer.memory(one.workload, one.schedule) == pytest.approx(one.memory_bytes, rel=0.08), one.label


@pytest.mark.parametrize("schedule", ["interleaved", "dualpipe"])
def test_the_quick_estimate_knows_the_micro_batches_in_flight(schedule: str) -> None:
    """Activations dominate here, and differ between ranks: a wrong count of chunks or of the mirrored stage shows."""
    vpp = 2 if schedule == "interleaved" else 1
    words = ("plan.search=false", "parallel.pp=8", f"parallel.vpp={vpp}", "parallel.ep=64", "parallel.dp=256",
             f"plan.schedules=[{schedule}]", "batch.micro_batch_size=2", "batch.global_batch_size=16384")  # fmt: skip
    cfg = compose([*V3, *words], PlanRoot)
    result = answer(cfg, validate(cfg, trains=False))
    timer = search.Timer(
        result.hardware,
        software_of=lambda workload: software_of(cfg, cfg.plan, workload),
        weights_of=lambda workload: weights_of(cfg.model, workload),
    )
    best = result.best
    assert (best.schedule, best.workload.layout.vpp) == (schedule, vpp)
    assert timer.memory(best.workload, best.schedule) == pytest.approx(best.memory_bytes, rel=0.08)


def test_nothing_fits_too_few_gpus() -> None:
    with pytest.raises(Exception, match=r"no layout of deepseek_v3 fits 8 GPUs of h800: .*memory"):
        plan("plan.gpus=8", "batch.global_batch_size=64")


@pytest.mark.parametrize(("gpus", "batch", "most"), [(2048, 15360, 2048), (2000, 15360, 1920), (100_000, 15360, 98304)])
def test_most_gpus_are_used_that_the_batch_divides_over(gpus: int, batch: int, most: int) -> None:
    """Over dp x a power of 2, where dp divides the batch."""
    fit = [size for size in sizes(gpus, batch) if (size // (size & -size)) in (1, 3, 5, 15)]
    assert max(fit) == most
    assert max(sizes(gpus, batch)) == gpus


def test_failures_and_intervals_change_the_bill() -> None:
    rows = {name: fraction for name, fraction, _, _ in found()[0].sensitivity}
    assert len(rows) >= 10
    assert rows["as planned, with failures and checkpoints"] == max(
        fraction for name, fraction in rows.items() if "checkpoint every" in name or "as planned" in name
    )


def test_a_schedule_that_folds_the_model_is_searched() -> None:
    """DualPipeV: the first rank holds the embedding and the loss."""
    result = plan("plan.schedules=[dualpipev]", "plan.micro_batch_sizes=[1]", "plan.precisions=[block]", "plan.top=2")
    best = result.best
    assert best.schedule == "dualpipev"
    assert best.memory_bytes <= result.hardware.usable_bytes
    assert "E" in best.memory[0].items[0]
    assert "L" in best.memory[0].items[1]
    assert len(best.step.stages) == 2 * best.workload.layout.pp


def test_the_published_layout_is_close_to_the_best_under_the_same_software() -> None:
    """Experts over half as many nodes have shorter dispatch, and more memory (docs/planning.md).

    It fits the memory it ran in, with what DeepSeek's software keeps (arXiv 2412.19437, section 3.3.3).
    """
    same = ("precision=fp8_block", "plan.precisions=[]", "plan=deepseek_v3", "plan.recipe=[]")
    published = plan(*same, "parallel=deepseek_v3_h800", "recompute=deepseek_v3")
    found = plan(*same, "plan.search=true", "plan.schedules=[1f1b,interleaved,zb1p,dualpipe]", "plan.top=3")
    assert published.best.memory_bytes <= published.hardware.usable_bytes
    assert found.best.step.seconds <= published.best.step.seconds <= 1.05 * found.best.step.seconds
    assert published.best.workload.layout in [one.workload.layout for one in found.found.plans]


def test_how_many_plans_are_wanted_does_not_change_the_best() -> None:
    same = ("precision=fp8_block", "plan.precisions=[]", "plan=deepseek_v3", "plan.recipe=[]", "plan.search=true")
    assert plan(*same, "plan.top=1").best.label == plan(*same, "plan.top=10").best.label
