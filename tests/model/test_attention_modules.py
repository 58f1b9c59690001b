"""Every kind of attention has rules and Megatron-Core modules of its own."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moe_train.config.composition.compose import compose
from moe_train.config.composition.validate import validate
from moe_train.config.resolve import ResolvedConfig, resolve
from moe_train.config.rules.model import ATTENTION_RULES, attention_heads
from moe_train.model import specs
from moe_train.model.attention_modules import ATTENTION_MODULES
from moe_train.model.build import transformer_config
from moe_train.model.specs import LocalBackend
from parallel.architecture.attention import ATTENTIONS
from parallel.suggest import Impossible
from tests.model.test_cuda_config import as_if_on_cuda

MODULES_ERROR = "model.attention=window has no row in ATTENTION_MODULES of moe_train/model/attention_modules.py"
RULES_ERROR = "model.attention=window has no row in ATTENTION_RULES of moe_train/config/rules/model.py"


def resolved(*overrides: str, kind: str = "") -> ResolvedConfig:
    cfg = compose(["model=tiny", "model.attention=gqa", *overrides])
    layout = validate(cfg)
    if kind:
        cfg.model = replace(cfg.model, attention=kind)
    return resolve(cfg, layout)


@pytest.fixture
def window(monkeypatch: pytest.MonkeyPatch) -> str:
    """A kind of attention with the linear layers and properties of grouped-query attention, and nothing else yet."""
    monkeypatch.setitem(ATTENTIONS, "window", replace(ATTENTIONS["gqa"], name="window"))
    return "window"


def test_every_kind_has_rules_and_modules() -> None:
    assert set(ATTENTION_RULES) == set(ATTENTION_MODULES) == set(ATTENTIONS)


def test_a_kind_without_rules_does_not_get_those_of_another(window: str) -> None:
    with pytest.raises(NotImplementedError, match=RULES_ERROR):
        attention_heads(resolved(kind=window))


def test_a_kind_without_modules_does_not_get_those_of_another(window: str) -> None:
    with pytest.raises(NotImplementedError, match=MODULES_ERROR):
        transformer_config(resolved(kind=window))
    config = transformer_config(resolved())
    with pytest.raises(NotImplementedError, match=MODULES_ERROR):
        specs.local_specs(config, resolved(kind=window).cfg.model, LocalBackend(), None)


def test_a_row_of_rules_and_modules_is_all_that_the_model_needs(window: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kind with the modules of grouped-query attention and an option and a rule of its own."""

    def one_head(facts: ResolvedConfig) -> None:
        if facts.cfg.model.num_attention_heads > 1:
            raise Impossible("model.num_attention_heads is above 1", [{"model.num_attention_heads": 1}])

    gqa = ATTENTION_MODULES["gqa"]
    own = replace(gqa, options=lambda model: {**gqa.options(model), "window_size": (7, 0)})
    monkeypatch.setitem(ATTENTION_MODULES, "window", own)
    monkeypatch.setitem(ATTENTION_RULES, "window", one_head)
    facts = resolved("model.mtp_num_layers=0", kind=window)
    with pytest.raises(Impossible, match="above 1"):
        attention_heads(facts)
    config = transformer_config(facts)
    assert config.window_size == (7, 0)
    # The first layer of a chunk, which upstream reads from the process groups.
    monkeypatch.setattr(specs, "get_transformer_layer_offset", lambda config, vp_stage: 0)
    block, _ = specs.local_specs(config, facts.cfg.model, LocalBackend(), None)
    assert block.layer_specs[0].submodules.self_attention == gqa.local_spec(LocalBackend(), facts.cfg.model)


@pytest.mark.parametrize(("kind", "by_model"), [("gqa", True), ("mla", False)])
def test_rotary_angles_of_yarn_are_computed_by_the_model_or_by_each_attention(kind: str, by_model: bool) -> None:
    with as_if_on_cuda():
        config = transformer_config(resolved(f"model.attention={kind}", "model.rope_type=yarn", "model.yarn_factor=8"))
    assert getattr(config, "yarn_rotary_scaling_factor", None) == (8 if by_model else None)
    assert getattr(config, "rotary_scaling_factor", None) == (None if by_model else 8)
