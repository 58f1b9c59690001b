"""Which entry of optimizer.groups a parameter belongs to, by its name."""

from __future__ import annotations

import pytest

from moe_train.config.composition.compose import compose
from moe_train.config.optimizer import OptimizerConfig, ParameterGroup
from moe_train.config.parameter_groups import close_patterns, group_of, named_parameters, summarise
from moe_train.model.arithmetic import count_parameters

ROUTER = "decoder.layers.1.mlp.router.weight"


@pytest.mark.parametrize("name", ["tiny", "deepseek_v3", "llama3_8b", "olmoe_7b"])
def test_every_trained_parameter_is_in_one_group(name: str) -> None:
    model = compose([f"model={name}"]).model
    names = [name for name, _ in named_parameters(model)]
    assert len(names) == len(set(names))
    groups = summarise(model, OptimizerConfig(groups=[ParameterGroup("*.self_attention.*", 0.5)]))
    assert sum(group.parameters for group in groups) == count_parameters(model).total_with_mtp
    assert sum(group.tensors for group in groups) == len(names)


def test_the_first_entry_that_matches_counts() -> None:
    entries = [ParameterGroup("*.layers.1.*"), ParameterGroup("*.router.weight")]
    assert group_of(ROUTER, entries) == 0
    assert group_of(ROUTER.replace("1", "2"), entries) == 1
    assert group_of("output_layer.weight", entries) is None


def test_norms_and_biases_decay_only_where_an_entry_says_so() -> None:
    model = compose(["model=tiny", "model.mtp_num_layers=0"]).model
    entries = [ParameterGroup("*layernorm.weight", 1.0, 0.01), ParameterGroup("*.router.weight", 0.1)]
    rows = {
        (g.match, g.lr_multiplier, g.weight_decay): g.tensors for g in summarise(model, OptimizerConfig(groups=entries))
    }
    # tiny: 4 layers, 3 of them with experts. Those have the norm before the feed-forward under a name of its own; the
    # norms of latents and of the first layers are fused, and the final norm is a layernorm too.
    norms = sum("layernorm.weight" in name for name, _ in named_parameters(model))
    assert rows[("*layernorm.weight", 1.0, 0.01)] == norms
    assert rows[("*.router.weight", 0.1, 0.1)] == 3
    assert {decay for match, _, decay in rows if match == ""} == {0.1, 0.0}


def test_muon_has_the_matrices_but_for_the_vocabulary() -> None:
    model = compose(["model=tiny", "model.mtp_num_layers=0"]).model
    rows = {(g.optimizer, g.weight_decay): g.parameters for g in summarise(model, OptimizerConfig(name="muon"))}
    vocabulary = 2 * model.padded_vocab_size * model.hidden_size
    assert rows["adamw", 0.1] == vocabulary
    assert rows["muon", 0.1] + rows["adamw", 0.0] + vocabulary == count_parameters(model).total


def test_close_patterns_match_what_was_meant() -> None:
    model = compose(["model=tiny"]).model
    assert close_patterns("*.ruter.weight", model)[0] == "*.mlp.router.weight"
    assert close_patterns("decoder.layers.1.mlp.routr.weight", model)[0] == "decoder.layers.1.mlp.router.weight"
