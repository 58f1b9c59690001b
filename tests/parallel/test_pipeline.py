"""Balanced layouts are the best there are and Megatron-Core takes them; hand-written ones are checked as it does."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

import pytest

from parallel import pipeline
from parallel.errors import ConfigError

SHAPES = [
    (layers, pp, vpp, mtp)
    for layers, pp, vpp, mtp in itertools.product((1, 2, 4, 7, 27, 61), (1, 2, 4, 16), (1, 2, 3), (0, 1, 2))
    if layers >= pipeline.smallest_num_layers(pp * vpp) and (pp > 1 or vpp == 1)
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_megatron_core_accepts_the_balanced_layout(shape: tuple[int, int, int, int]) -> None:
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    layers, pp, vpp, mtp = shape
    text = pipeline.balanced_layout(layers, pp, vpp, mtp)
    upstream = PipelineParallelLayerLayout(text, pp)
    mtp_elsewhere = upstream.validate_layer_layout(layers, mtp or None)
    assert not mtp_elsewhere
    assert upstream.virtual_pipeline_model_parallel_size == vpp
    names = {LayerType.embedding: "E", LayerType.decoder: "t", LayerType.mtp: "m", LayerType.loss: "L"}
    ours = pipeline.parse_layout(text, pp, vpp, layers, mtp)
    assert len(ours) == pp * vpp
    for number, stage in enumerate(ours):
        assert stage == [names[item] for item in upstream.layout[number % pp][number // pp]]
        assert stage


def _all_counts(layers: int, stages: int) -> Iterator[tuple[int, ...]]:
    if stages == 1:
        yield (layers,)
        return
    for first in range(layers + 1):
        for rest in _all_counts(layers - first, stages - 1):
            yield (first, *rest)


@pytest.mark.parametrize("costs", [(0.0, 1.5, 0.5), (0.0, 0.0, 0.0), (2.0, 1.0, 3.0), (0.3, 2.0, 1.6)])
@pytest.mark.parametrize("layers", [2, 5, 9])
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_no_other_layout_has_a_cheaper_costliest_stage(
    layers: int, stages: int, costs: tuple[float, float, float]
) -> None:
    embedding, mtp, loss = costs

    def costliest(counts: tuple[int, ...]) -> float:
        total = [float(count) for count in counts]
        total[0] += embedding
        total[-1] += mtp + loss
        return max(total)

    text = pipeline.balanced_layout(
        layers, stages, 1, 1, embedding_cost=embedding, mtp_cost=mtp, loss_cost=loss
    )  # fmt: skip
    counts = tuple(stage.count("t") for stage in pipeline.parse_layout(text, stages, 1, layers, 1))
    best = min(costliest(other) for other in _all_counts(layers, stages) if all(other[1:-1]))
    assert costliest(counts) == pytest.approx(best)


def test_layouts_that_people_rely_on() -> None:
    assert pipeline.balanced_layout(4, 1, 1, 0) == "Et*4L"
    assert pipeline.balanced_layout(4, 2, 1, 0) == "Et*2|t*2L"
    assert pipeline.balanced_layout(4, 2, 1, 1) == "Et*3|tmL"
    assert pipeline.balanced_layout(4, 2, 2, 0) == "Et|t|t|tL"
    assert pipeline.balanced_layout(4, 4, 1, 1) == "Et*2|t|t|mL"
    assert pipeline.balanced_layout(61, 16, 1, 0) == "Et*4|" + "t*4|" * 12 + "t*3|" * 2 + "t*3L"


WRONG = [
    ("Et*2|t*2", "must end with the loss"),
    ("t*2|t*2L", "must begin with the embedding"),
    ("Et*2|Et*2L", "must begin with the embedding (E), exactly once"),
    ("Et*4L", "has 1 stages, but parallel.pp x vpp = 2 x 1 = 2"),
    ("Et*2|t|tL", "has 3 stages"),
    ("Et*4||L", "has 3 stages"),
    ("E|t*4|", "has 3 stages"),
    ("Et*4L|", "leaves stage 2 of 2 empty"),
    ("Et*2|t*3L", "has 5 transformer layers (t), but model.num_layers=4"),
    ("Et*2|tx*2L", "has 'x'"),
    ("Et*2 | t*2L", "has ' '"),
    ("Et*2m|t*2L", "must have every multi-token-prediction layer (m) after"),
    ("Et*4m|L", "must have multi-token prediction (m) on the last stage"),
    ("Et*2|t*2mmL", "has 2 multi-token-prediction layers"),
    ("Et*1000000000000|L", "has 10000 transformer layers"),
    ("", "has 1 stages"),
]


@pytest.mark.parametrize(("text", "problem"), WRONG, ids=[text for text, _ in WRONG])
def test_a_wrong_layout_is_refused_with_one_that_works(text: str, problem: str) -> None:
    mtp = 1 if "m" in text and "mm" not in text else 0
    with pytest.raises(ConfigError) as caught:
        pipeline.parse_layout(text, 2, 1, 4, mtp)
    assert problem in str(caught.value)
    match = re.search(r"use parallel\.pipeline_layout=(\S+)", caught.value.remedy)
    assert match
    assert pipeline.parse_layout(match.group(1), 2, 1, 4, mtp)


@pytest.mark.parametrize("text", ["Et*2|t*2L", "E,t,t|t,t,L", "E(t)*2|(t)*2L", "Et(t|t)*1tL", "Et|t*3,L"])
def test_upstream_notation_is_read_as_upstream_reads_it(text: str) -> None:
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout as Upstream

    parsed = [len(stage) for stage in Upstream.parse_str_to_list(text)]
    if sum(parsed) == 6 and len(parsed) == 2:
        assert [len(stage) for stage in pipeline.parse_layout(text, 2, 1, 4, 0)] == parsed
    else:
        with pytest.raises(ConfigError):
            pipeline.parse_layout(text, 2, 1, 4, 0)


def test_too_few_layers_are_refused_with_the_stages_that_they_fill() -> None:
    with pytest.raises(ConfigError) as caught:
        pipeline.balanced_layout(4, 4, 2, 0)
    assert "4 x 2 = 8 stages" in str(caught.value)
    assert "use parallel.vpp=1" in caught.value.remedy
    pipeline.balanced_layout(4, 4, 1, 0)
