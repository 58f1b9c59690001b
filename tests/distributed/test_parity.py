"""Every layout of ranks trains the same model: losses, gradient norms and expert loads as on one rank."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from bench.parity import COMMON, DIVISIONS, LAYOUTS, compare, holds, measure
from parallel.errors import MoeTrainError
from tests.quick import slow_but

# The model of `make parity`, narrower, for fewer steps and half as many micro-batches: each layout takes seconds.
SMALL = [
    "train.steps=3",
    "batch.micro_batch_size=2",
    "train.seq_length=32",
    "schedule.warmup_steps=1",
    "model.hidden_size=64",
    "model.ffn_hidden_size=128",
    "model.moe_ffn_hidden_size=32",
    "model.vocab_size=512",
]
QUICK_LAYOUTS = ["dp2", "pp2 vpp2", "cp2", "tp2 etp2 ep2", "tp2 pp2 ep2 dp2", "ep4", "ep2, optimizer not distributed",
                 "tp2 ep2, allgather", "dp2 ep2, overlapped"]  # fmt: skip


def layout_of(name: str) -> list[str]:
    """Overrides of a layout in which each rank adds up the gradients of two micro-batches or more."""
    return [*LAYOUTS[name], *(["batch.micro_batch_size=1"] if name == "ep4" else [])]


@cache
def reference(data: tuple[str, ...], *overrides: str) -> list[dict[str, Any]]:
    """Metrics of the single rank."""
    return measure([*SMALL, *data, *overrides])


@pytest.mark.parametrize("layout", slow_but(QUICK_LAYOUTS, LAYOUTS))
def test_layout_changes_nothing(layout: str, small_data: tuple[str, ...]) -> None:
    """With multi-token prediction on, which the tiny model has."""
    expected = reference(small_data)
    assert sum(expected[0]["expert_load"][1]) == 8 * 32 * 4  # sequences x tokens x topk: the loads are counted
    row = compare(expected, measure([*SMALL, *small_data, *layout_of(layout)]))
    assert row["steps"] == 3
    assert holds(row), row


@pytest.mark.parametrize("layout", ["pp2 vpp2", "tp2 pp2 ep2"])
def test_layout_changes_nothing_without_multi_token_prediction(layout: str, small_data: tuple[str, ...]) -> None:
    """The same for a model that ends with its last layer."""
    off = "model.mtp_num_layers=0"
    row = compare(reference(small_data, off), measure([*SMALL, *small_data, off, *layout_of(layout)]))
    assert holds(row), row


@pytest.mark.parametrize("name", ["seq_aux_loss, 4 sequences, dp2", "global_aux_loss, 2 sequences, dp2"])
def test_division_of_the_batch_changes_nothing(name: str, small_data: tuple[str, ...]) -> None:
    """Losses that upstream weighs by micro-batch size and by ranks; test_micro_batches.py covers all losses."""
    case = DIVISIONS[name]
    common = [*SMALL, *small_data, "batch.micro_batch_size=1", *case.loss]
    row = compare(measure([*common, *case.one]), measure([*common, *case.other]))
    assert holds(row), row


GQA = ["model.attention=gqa", "model.num_query_groups=2", "model.mtp_num_layers=0"]
NO_GROUPS = ["model.router_num_groups=0", "model.router_topk_groups=0"]
SOFTMAX = [*NO_GROUPS, "model.router_score=softmax", "model.router_bias=false", "model.router_scaling_factor=1.0"]
ONE_BY_ONE = "backend.grouped_gemm=false"
FEATURES: dict[str, list[str]] = {
    "mla without query compression": ["model.q_lora_rank=0"],
    "mla with plain rotary": ["model.rope_type=rope"],
    "gqa, softmax after top-k": [*GQA, *SOFTMAX],
    "gqa, softmax before top-k": [*GQA, *SOFTMAX, "model.router_pre_softmax=true"],
    "gqa with norm of each head": [*GQA, "model.qk_norm=head"],
    "gqa with norm of all heads": [*GQA, "model.qk_norm=full"],
    "gqa with yarn": [*GQA, "model.rope_type=yarn"],
    "dense": [*GQA, *SOFTMAX, "model.num_experts=0", "model.num_shared_experts=0", "model.num_dense_layers=0",
              "model.balance_losses=[]", "model.balance_loss_coeffs=[]"],
    "gqa with bias on queries, keys and values": [*GQA, "model.qkv_bias=true"],
    "gqa with rotary position in half of a head": [*GQA, "model.rope_type=rope", "model.rotary_percent=0.5"],
    # Lengths from 2,048 tokens on are slowed down: with this base some of the eight frequencies are, and some are not.
    "gqa with the rotary position of llama 3.1": [*GQA, "model.rope_type=llama3", "model.rope_base=1e6"],
    "gated shared experts of their own width": ["model.num_shared_experts=2", "model.shared_expert_gate=true",
                                                "model.shared_expert_ffn_hidden_size=48"],
    "groups of experts by their best": [*SOFTMAX[2:], "model.router_pre_softmax=true", "model.router_group_score=max"],
    "latent norms with an epsilon of their own": ["model.latent_norm_epsilon=0.1"],
    "experts one by one": [ONE_BY_ONE],
    "tied embeddings": ["model.tie_embeddings=true", "model.mtp_num_layers=0"],
    "all balance losses": [*SOFTMAX, "model.balance_losses=[aux_loss,seq_aux_loss,global_aux_loss]",
                           "model.balance_loss_coeffs=[0.01,0.01,0.01]", "model.z_loss_coeff=0.001"],
}  # fmt: skip
QUICK_FEATURES = ["mla without query compression", "gqa, softmax before top-k", "gqa with yarn", "dense",
                  "gated shared experts of their own width", "groups of experts by their best", "tied embeddings",
                  "all balance losses"]  # fmt: skip


@pytest.mark.parametrize("feature", slow_but(QUICK_FEATURES, FEATURES))
def test_feature_is_the_same_with_tensor_pipeline_and_expert_parallelism(
    feature: str, small_data: tuple[str, ...]
) -> None:
    """Each option of the model at tp=2 pp=2 (and ep=2 where there are experts), against one rank."""
    overrides = FEATURES[feature]
    layout = ["parallel.tp=2", "parallel.pp=2", *(["parallel.ep=2"] if feature != "dense" else [])]
    row = compare(reference(small_data, *overrides), measure([*SMALL, *small_data, *overrides, *layout]))
    assert holds(row), row


@pytest.mark.parametrize("layout", ["tp2 etp2", "tp2 ep2, allgather", "ep4"])
def test_grouped_experts_train_as_experts_one_by_one(layout: str, small_data: tuple[str, ...]) -> None:
    """Grouped experts in a layout against experts one by one on one rank."""
    row = compare(reference(small_data, ONE_BY_ONE), measure([*SMALL, *small_data, *layout_of(layout)]))
    assert holds(row), row


@pytest.mark.parametrize("padded", ["true", "false"])
def test_grouped_experts_drop_tokens_as_experts_one_by_one(padded: str, small_data: tuple[str, ...]) -> None:
    """Over-full experts drop tokens, with inputs padded to the capacity and without."""
    overrides = [*SOFTMAX, "model.capacity_factor=0.5", f"model.pad_to_capacity={padded}"]
    row = compare(reference(small_data, *overrides), measure([*SMALL, *small_data, *overrides, ONE_BY_ONE]))
    assert holds(row), row


def test_dropped_tokens_are_the_same_with_data_and_pipeline_parallelism(small_data: tuple[str, ...]) -> None:
    """Capacity counts the tokens of one rank's micro-batch, so only layouts that keep micro-batches whole can agree."""
    overrides = [*SOFTMAX, "model.capacity_factor=0.5", "model.pad_to_capacity=true"]
    dropped = reference(small_data, *overrides)
    row = compare(dropped, measure([*SMALL, *small_data, *overrides, "parallel.pp=2"]))
    assert holds(row), row
    assert dropped[0]["lm_loss"] != reference(small_data, *SOFTMAX)[0]["lm_loss"]


def test_comparison_notices_a_difference(small_data: tuple[str, ...]) -> None:
    """A different seed is not within the tolerances, so the tests above can fail."""
    assert not holds(compare(reference(small_data), reference(small_data, "seed=99")))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 2.0])
def test_comparison_looks_at_every_step(wrong: float) -> None:
    """A run that goes wrong after the first step does not hold."""
    good = [{"lm_loss": 1.0, "grad_norm": 1.0, "expert_load": [[1]]} for _ in range(3)]
    bad = [*good[:1], {**good[1], "lm_loss": wrong}, good[2]]
    assert holds(compare(good, good))
    assert not holds(compare(good, bad))


def test_error_of_a_rank_reaches_the_caller(small_data: tuple[str, ...], tmp_path: Path) -> None:
    """`measure` runs the real command path: a dataset that vanishes is an error, not an empty result."""
    missing = [f"data.dir={tmp_path}/none", "data=indexed"]
    with pytest.raises(MoeTrainError, match=r"data\.dir"):
        measure([*SMALL, *missing])
    assert "model=tiny" in COMMON
