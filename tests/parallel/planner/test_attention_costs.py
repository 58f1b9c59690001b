"""Every kind of attention has memory and time of its own in the planner."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moe_train.config.model import ModelConfig
from moe_train.config.schema import RECOMPUTABLE
from parallel.architecture.attention import ATTENTIONS, Attention
from parallel.planner.activations import OFFLOADED, layer
from parallel.planner.attention_costs import ATTENTION_COSTS, AttentionCosts, Elementwise
from parallel.planner.layer_time import layer_times
from parallel.planner.saved_tensors import Saved
from parallel.planner.workload import Workload
from tests.parallel.planner import small

MODELS = {"mla": small.MLA, "gqa": small.GQA}
ERROR = "model.attention=window has no row in ATTENTION_COSTS of parallel/planner/attention_costs.py"


@pytest.fixture
def window(monkeypatch: pytest.MonkeyPatch) -> ModelConfig:
    """A model with a kind of attention that has the linear layers of grouped-query attention and no costs yet."""
    monkeypatch.setitem(ATTENTIONS, "window", replace(ATTENTIONS["gqa"], name="window"))
    return replace(small.GQA, attention="window")


def test_every_kind_has_a_row_of_costs() -> None:
    assert set(ATTENTION_COSTS) == set(ATTENTIONS) == set(MODELS)


def test_a_kind_without_costs_does_not_get_those_of_another(window: ModelConfig) -> None:
    with pytest.raises(NotImplementedError, match=ERROR):
        layer(small.workload(window), moe=True)
    with pytest.raises(NotImplementedError, match=ERROR):
        layer_times(small.workload(window), small.machine(), moe=True)


def test_a_row_of_costs_is_all_that_memory_and_time_need(window: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer with grouped queries, but 1,000 bytes saved, and one kernel more of 100 and 200 bytes."""
    gqa = ATTENTION_COSTS["gqa"]

    def saved(workload: Workload, attention: Attention, modules: frozenset[str]) -> Saved:
        return {"scores": 1000.0 if "core_attn" not in modules else 0.0}

    def elementwise(workload: Workload, attention: Attention) -> tuple[Elementwise, ...]:
        return (*gqa.elementwise(workload, attention), Elementwise(100, 200, kernels=1, recomputed_by=("core_attn",)))

    monkeypatch.setitem(ATTENTION_COSTS, "window", AttentionCosts(saved, elementwise))
    recomputing = {"recompute": "selective", "recompute_modules": frozenset({"core_attn"})}
    own = layer(small.workload(window), moe=False)
    others = layer(small.workload(small.GQA), moe=False)
    assert own["scores"] == 1000
    feed_forward = {name: size for name, size in own.items() if name != "scores"}
    assert feed_forward.items() < others.items()
    assert layer(small.workload(window, **recomputing), moe=False)["scores"] == 0

    times, base = (layer_times(small.workload(model), small.machine(), moe=False) for model in (window, small.GQA))
    assert times.forward["memory"] - base.forward["memory"] == pytest.approx(100)
    assert times.inputs["memory"] - base.inputs["memory"] == pytest.approx(200)
    assert (times.kernels_forward, times.kernels_backward) == (base.kernels_forward + 1, base.kernels_backward + 1)
    again = layer_times(small.workload(window, **recomputing), small.machine(), moe=False)
    assert again.recompute["memory"] == pytest.approx(100)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_offloaded_modules_find_their_tensors_by_name(name: str) -> None:
    """A row that names a tensor otherwise would count it as still on the GPU."""
    one = small.workload(MODELS[name])
    costs = ATTENTION_COSTS[name].saved(one, one.description(moe=True).attention, frozenset())
    modules = ("attn_norm", "qkv_linear", "core_attn", "attn_proj")
    assert {tensor for module in modules for tensor in OFFLOADED[module]} <= set(costs)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_kernels_are_recomputed_by_modules_that_the_kind_has(name: str) -> None:
    one = small.workload(MODELS[name])
    kernels = ATTENTION_COSTS[name].elementwise(one, one.description(moe=True).attention)
    foreign = {module for kind in ATTENTIONS.values() if kind.name != name for module in kind.recompute_modules}
    assert {module for item in kernels for module in item.recomputed_by} <= set(RECOMPUTABLE) - foreign
