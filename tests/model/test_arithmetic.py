"""Parameter counts and FLOPs against published figures, an independent implementation, and shapes written by hand."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from itertools import takewhile
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from moe_train.config.model import ModelConfig
from moe_train.model.arithmetic import (
    count_parameters,
    flops_per_token,
    forward_flops_per_token,
    parameters_of_ranks,
    single_stage,
)

ROOT = Path(__file__).parents[2]
NAMES = sorted(path.stem for path in (ROOT / "conf" / "model").glob("*.yaml"))

# Parameters of the same architectures in Hugging Face transformers 5.23.0, built on the meta device from the values in
# conf/model: sum(p.numel() for p in model.parameters()). The selection bias is a buffer there, so it is not in the sum.
TRANSFORMERS = {
    "tiny": 9_419_648,  # DeepseekV3ForCausalLM
    "deepseek_v3": 671_026_404_352,
    "moonlight_16b": 15_960_108_544,  # DeepseekV3ForCausalLM
    "kimi_k2": 1_026_408_209_408,  # DeepseekV3ForCausalLM
    "deepseek_v2": 235_741_434_880,
    "deepseek_v2_lite": 15_706_484_224,
    "mixtral_8x7b": 46_702_792_704,
    "mixtral_8x22b": 140_620_634_112,
    "qwen3_30b_a3b": 30_532_122_624,
    "qwen3_235b_a22b": 235_093_634_560,
    "qwen2_moe_57b_a14b": 57_408_658_944,
    "glm4_moe_355b": 352_797_814_784,
    "glm4_5_air": 106_852_245_504,
    "olmoe_7b": 6_919_161_856,
    "glm4_7_flash": 29_943_390_976,  # Glm4MoeLiteForCausalLM
    "minimax_m2": 228_689_748_992,
    "llama3_8b": 8_030_261_248,
}

# Published (total, active), billions, as precise as the source states them.
PUBLISHED = {
    "deepseek_moe_16b": ("16.4", "2.8"),  # arXiv 2401.06066, section 5.1
    "deepseek_v2": ("236", "21"),  # arXiv 2405.04434, abstract
    "deepseek_v3": ("671", "37"),  # arXiv 2412.19437, abstract
    "mixtral_8x7b": ("46.7", "12.9"),  # mistral.ai/news/mixtral-of-experts
    "mixtral_8x22b": ("141", "39"),  # mistral.ai/news/mixtral-8x22b
    "qwen3_30b_a3b": ("30.5", "3.3"),  # model card of Qwen/Qwen3-30B-A3B
    "qwen3_235b_a22b": ("235", "22"),  # model card of Qwen/Qwen3-235B-A22B
    "qwen2_moe_57b_a14b": ("57.4", "14.2"),  # model card of Qwen/Qwen2-57B-A14B-Instruct
    "olmoe_7b": ("6.9", "1.3"),  # arXiv 2409.02060, section 2
    "llama3_8b": ("8.03", "8.03"),  # model card of meta-llama/Meta-Llama-3-8B
}

# Published (total, active) without embedding and output head, billions: arXiv 2502.16982, table of Moonlight's results.
PUBLISHED_WITHOUT_EMBEDDING = {
    "moonlight_16b": ("15.29", "2.24"),
    "deepseek_v2_lite": ("15.29", "2.24"),
    "glm4_5_air": ("106", "12"),  # arXiv 2508.06471, table 1
}


def load(name: str, **changes: object) -> ModelConfig:
    """The model of a YAML file, checked against the typed schema, with fields changed."""
    file = OmegaConf.load(ROOT / "conf" / "model" / f"{name}.yaml")
    model = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), file))
    assert isinstance(model, ModelConfig)
    return dataclasses.replace(model, **changes)  # type: ignore[arg-type]


def close_to(value: float, published: str) -> bool:
    """Whether `value` is within one unit of the last digit of `published`: sources round, some truncate."""
    decimals = len(published.partition(".")[2])
    return abs(value / 1e9 - float(published)) < 10.0**-decimals


def test_every_model_is_covered() -> None:
    """A new model file needs an independent count."""
    assert set(NAMES) == set(TRANSFORMERS) | {"deepseek_moe_16b"}


@pytest.mark.parametrize("name", NAMES)
def test_model_file_is_named_and_complete(name: str) -> None:
    """The name is the file's, lists of balance losses match, choices are known."""
    model = load(name)
    assert model.name == name
    assert len(model.balance_losses) == len(model.balance_loss_coeffs)
    for field in dataclasses.fields(model):
        choices = field.metadata["choices"]
        values = getattr(model, field.name)
        for value in values if isinstance(values, list) else [values]:
            assert not choices or value in choices, field.name


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_total_equals_transformers(name: str) -> None:
    """Parameter for parameter."""
    assert count_parameters(load(name)).total == TRANSFORMERS[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_total_and_active(name: str) -> None:
    """Within the rounding of the published figures."""
    count = count_parameters(load(name))
    total, active = PUBLISHED[name]
    assert close_to(count.total, total)
    assert close_to(count.active, active)


@pytest.mark.parametrize("name", PUBLISHED_WITHOUT_EMBEDDING)
def test_published_total_and_active_without_embedding(name: str) -> None:
    """The convention of Moonshot and Zhipu."""
    count = count_parameters(load(name))
    total, active = PUBLISHED_WITHOUT_EMBEDDING[name]
    assert close_to(count.total - count.embedding - count.output_head, total)
    assert close_to(count.active - count.embedding - count.output_head, active)


def test_glm_4_5_counts_multi_token_prediction() -> None:
    """355B and 32B include it, but neither embedding nor head (arXiv 2508.06471, note of table 1)."""
    count = count_parameters(load("glm4_moe_355b"))
    assert close_to(count.total_with_mtp - count.embedding - count.output_head, "355")
    assert close_to(count.active_with_mtp - count.embedding - count.output_head, "32")


def test_kimi_k2_is_near_its_report() -> None:
    """Its report rounds to 1.04T and 32.6B (arXiv 2507.20534); the released weights hold 1.026T."""
    count = count_parameters(load("kimi_k2"))
    assert count.total == pytest.approx(1.04e12, rel=0.015)
    assert count.active == pytest.approx(32.6e9, rel=0.01)


def test_minimax_m2_is_near_its_card() -> None:
    """Its card rounds to 230B, and to 10B without embedding and head."""
    count = count_parameters(load("minimax_m2"))
    assert count.total == pytest.approx(230e9, rel=0.01)
    assert close_to(count.active - count.embedding - count.output_head, "10")


def test_glm_4_7_flash_is_near_its_card() -> None:
    """Its card says 30B-A3B: the latter without embedding and head, as Zhipu counts."""
    count = count_parameters(load("glm4_7_flash"))
    assert close_to(count.total, "30")
    assert close_to(count.active - count.embedding - count.output_head, "3")


def test_deepseek_v3_exact() -> None:
    """Total, selection-bias entries (58 layers x 256) and what MTP adds, each held apart."""
    count = count_parameters(load("deepseek_v3"))
    assert count.total == 671_026_404_352
    assert count.expert_bias == 14_848
    assert count.mtp == 11_610_067_968
    assert count.mtp_expert_bias == 256
    assert count.total_with_mtp == 671_026_404_352 + 11_610_067_968
    without = count_parameters(load("deepseek_v3", mtp_num_layers=0))
    assert (without.total, without.mtp, without.mtp_idle) == (count.total, 0, 0)


@pytest.mark.parametrize("name", NAMES)
def test_parts_sum_to_total(name: str) -> None:
    """With MTP in and out; a token's share is smaller only where there are experts."""
    model = load(name)
    count = count_parameters(model)
    assert sum(count.by_part().values()) == count.total
    assert sum(count.by_part(include_mtp=True).values()) == count.total_with_mtp
    assert (count.active < count.total) == model.is_moe
    assert (count.router > 0) == (count.routed_experts > 0) == model.is_moe
    assert count.active_with_mtp - count.active == count.mtp - count.mtp_idle


def test_tiny_by_hand() -> None:
    """Every weight of tiny by its Hugging Face name and shape, written out with numbers only."""
    hidden, layer = 256, {}
    attention = {
        "q_a_proj": 96 * hidden,
        "q_b_proj": (4 * 48) * 96,
        "kv_a_proj_with_mqa": (64 + 16) * hidden,
        "kv_b_proj": (4 * (32 + 32)) * 64,
        "o_proj": hidden * (4 * 32),
    }
    norms = {"q_a_layernorm": 96, "kv_a_layernorm": 64, "input_layernorm": hidden, "post_attention_layernorm": hidden}
    expert = 3 * 160 * hidden
    layer = {"attention": sum(attention.values()), "norms": sum(norms.values())}
    dense, shared, router, routed = 3 * 768 * hidden, expert, 16 * hidden, 16 * expert
    mtp = (
        3 * hidden + hidden * 2 * hidden + sum(layer.values()) + shared + router + routed
    )  # enorm, hnorm, norm, eh_proj

    count = count_parameters(load("tiny"))
    assert count.by_part(include_mtp=True) == {
        "embedding": 4096 * hidden,
        "output_head": 4096 * hidden,
        "attention": 4 * layer["attention"],
        "dense_ffn": dense,
        "routed_experts": 3 * routed,
        "shared_experts": 3 * shared,
        "router": 3 * router,
        "norms": 4 * layer["norms"] + hidden,
        "mtp": mtp,
    }
    assert count.active == count.total - 3 * 12 * expert
    assert count.mtp_idle == 12 * expert
    assert 9e6 < count.total < 11e6


def test_gqa_by_hand() -> None:
    """Grouped queries with both kinds of q/k norm, tied embeddings, and a vocabulary that is padded to 128 rows."""
    model = ModelConfig(
        attention="gqa", num_layers=2, hidden_size=64, ffn_hidden_size=96, vocab_size=1000, tie_embeddings=True,
        num_attention_heads=8, num_query_groups=2, head_dim=16, qk_norm="head", num_experts=0, mtp_num_layers=0,
    )  # fmt: skip
    attention = 64 * (8 * 16) + 2 * 64 * (2 * 16) + (8 * 16) * 64
    ffn = 3 * 64 * 96
    count = count_parameters(model)
    assert count.total == 1024 * 64 + 2 * (attention + ffn + 2 * 64 + 2 * 16) + 64
    full = count_parameters(dataclasses.replace(model, qk_norm="full"))
    assert full.norms - count.norms == 2 * (8 * 16 + 2 * 16 - 2 * 16)
    untied = count_parameters(dataclasses.replace(model, tie_embeddings=False))
    assert untied.total - count.total == untied.output_head == 1024 * 64
    # The head is a matmul whether or not its matrix is shared.
    assert flops_per_token(model, 128, True, False) == 6 * (2 * (attention + ffn) + 1024 * 64) + 3 * 2 * (
        2 * 8 * 16 * 128
    )


def test_biases_gates_and_wide_shared_experts_by_hand() -> None:
    """Options of Qwen2-MoE and GLM-4-MoE, against the same model without them."""
    model = ModelConfig(
        attention="gqa", num_layers=3, hidden_size=64, ffn_hidden_size=96, vocab_size=1024, num_attention_heads=8,
        num_query_groups=2, head_dim=16, num_experts=4, num_shared_experts=2, moe_ffn_hidden_size=32,
        num_dense_layers=1,
    )  # fmt: skip
    plain = count_parameters(model)
    biased = dataclasses.replace(model, qkv_bias=True)
    assert count_parameters(biased).attention - plain.attention == 3 * (8 + 2 + 2) * 16
    assert flops_per_token(biased, 128) == flops_per_token(model, 128)
    gated = dataclasses.replace(model, shared_expert_gate=True)
    assert count_parameters(gated).active - plain.active == 2 * 64
    assert flops_per_token(gated, 128) - flops_per_token(model, 128) == 6 * 2 * 64
    wide = dataclasses.replace(model, shared_expert_ffn_hidden_size=80)
    assert count_parameters(wide).shared_experts - plain.shared_experts == 2 * 3 * 64 * (80 - 2 * 32)
    everything = dataclasses.replace(wide, shared_expert_gate=True, qkv_bias=True)
    for one, by_two in ((biased, 3 * 12 * 16), (gated, 0), (everything, 3 * 12 * 16 + 2 * 3 * 64 * 16)):
        held, before = (parameters_of_ranks(m, single_stage(m), tp=2, ep=2)[0].shared for m in (one, model))
        assert held - before == by_two // 2 + (2 * 64 if one.shared_expert_gate else 0)


@pytest.mark.parametrize(
    ("causal", "mtp", "published"),
    [(True, False, 0.2498e12), (True, True, 0.260e12), (False, False, 0.2805e12)],
)
def test_deepseek_v3_flops_published(causal: bool, mtp: bool, published: float) -> None:
    """What its throughput of 1,541.7 tokens/s/GPU and MFU of 38.94 % and 43.73 % imply (arXiv 2505.09343, table 4)."""
    assert flops_per_token(load("deepseek_v3"), 4096, causal, mtp) == pytest.approx(published, rel=5e-3)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("mtp", [True, False])
def test_deepseek_v3_flops_by_hand(causal: bool, mtp: bool) -> None:
    """All four conventions, from numbers only."""
    attention = 7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * 256 + 128 * 128 * 7168
    moe = 256 * 7168 + 9 * 3 * 7168 * 2048
    head = 129_280 * 7168
    layers = 61 + mtp
    matrices = layers * attention + 3 * (3 * 7168 * 18432) + (58 + mtp) * moe + (1 + mtp) * head + mtp * 2 * 7168 * 7168
    scores = layers * 2 * 128 * (192 + 128) * (2048 if causal else 4096)
    assert flops_per_token(load("deepseek_v3"), 4096, causal, mtp) == 3 * (2 * matrices + scores)


def test_flops_follow_sequence_and_topk() -> None:
    """Linear layers do not depend on the sequence; attention doubles with it; backward is twice forward."""
    model = load("olmoe_7b")
    at_1k, at_2k, at_3k = (flops_per_token(model, 1024 * n, True, False) for n in (1, 2, 3))
    assert at_3k - at_2k == at_2k - at_1k > 0
    assert flops_per_token(model, 1024, False, False) == at_2k
    assert flops_per_token(model, 1024) == 3 * forward_flops_per_token(model, 1024)
    one_more = dataclasses.replace(model, topk=model.topk + 1)
    assert flops_per_token(one_more, 1024) - at_1k == 6 * 16 * 3 * 2048 * 1024


def table() -> dict[str, list[str]]:
    """Rows of the first table of docs/models.md, by model."""
    lines = (ROOT / "docs" / "models.md").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("| Model |"))
    found = takewhile(lambda line: line.startswith("|"), lines[first + 2 :])
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in found]
    return {row[0]: row[1:] for row in rows}


def test_documented_table_is_current() -> None:
    """Every model has its row in docs/models.md, with the figures that the code computes now."""
    rows = table()
    assert sorted(rows) == NAMES
    for name, (total, active, mtp, causal, not_causal, *_) in rows.items():
        model = load(name)
        count = count_parameters(model)
        assert [total, active, mtp] == [f"{n:,}" for n in (count.total, count.active, count.mtp)], name
        for text, is_causal in ((causal, True), (not_causal, False)):
            decimals = len(text.partition(".")[2])
            assert text == f"{flops_per_token(model, 4096, is_causal, False) / 1e12:.{decimals}f}", name


@pytest.mark.parametrize("name", NAMES)
def test_one_rank_holds_everything(name: str) -> None:
    """Without parallelism: embedding once, MTP included."""
    model = load(name)
    count, (rank,) = count_parameters(model), parameters_of_ranks(model, single_stage(model))
    assert rank.total == count.total_with_mtp
    assert rank.expert_bias == count.expert_bias + count.mtp_expert_bias


def deepseek_v3_stages() -> list[list[str]]:
    """Sixteen stages: 61 layers, the last stage with one layer, MTP and loss."""
    return [["E", *"tttt"], *[[*"tttt"]] * 14, [*"tmL"]]


def test_pipeline_and_expert_ranks_sum_to_deepseek_v3() -> None:
    """PP16 x EP64: weights outside experts once a stage, experts over all expert ranks, and MTP's embedding copy."""
    model = load("deepseek_v3")
    ranks = parameters_of_ranks(model, deepseek_v3_stages(), pp=16, ep=64)
    total = sum(rank.shared + 64 * rank.experts for rank in ranks)
    assert total == 671_026_404_352 + 11_610_067_968 + 129_280 * 7168
    assert sum(rank.expert_bias for rank in ranks) == 14_848 + 256

    plain = dataclasses.replace(model, mtp_num_layers=0)
    stages = [[item for item in stage if item != "m"] for stage in deepseek_v3_stages()]
    ranks = parameters_of_ranks(plain, stages, pp=16, ep=64)
    assert sum(rank.shared + 64 * rank.experts for rank in ranks) == 671_026_404_352


def test_interleaved_chunks_are_dealt_round_robin() -> None:
    """Chunk v of rank p is stage v * pp + p; the dense layers stand on the first ranks."""
    model = load("tiny", mtp_num_layers=0)
    stages = [["E", "t"], ["t", "t"], ["t"], ["L"]]
    first, last = parameters_of_ranks(model, stages, pp=2)
    count = count_parameters(model)
    assert first.total + last.total == count.total
    expert = 3 * 160 * 256
    assert (first.experts, last.experts) == (16 * expert, 2 * 16 * expert)
    assert first.total - last.total == 3 * 768 * 256 - 17 * expert - 16 * 256 - 256  # dense for MoE, no final norm


def test_tensor_parallel_split_by_hand() -> None:
    """tp=2 ep=4 etp=2 of tiny: norms, routers and MLA's down-projections stay whole on every rank."""
    model = load("tiny", mtp_num_layers=0)
    count = count_parameters(model)
    (rank,) = parameters_of_ranks(model, single_stage(model), tp=2, ep=4, etp=2)
    whole = count.norms + count.router + 4 * (96 + 64 + 16) * 256
    assert rank.experts == count.routed_experts // 8
    assert rank.shared == whole + (count.total - count.routed_experts - whole) // 2


def test_tied_embedding_is_copied_to_the_last_stage() -> None:
    """Megatron-Core gives the last pipeline stage its own copy; on a single stage both uses share one matrix."""
    model = load("llama3_8b", tie_embeddings=True)
    stages = [["E", *["t"] * 16], [*["t"] * 16, "L"]]
    total = sum(rank.total for rank in parameters_of_ranks(model, stages, pp=2))
    assert total == count_parameters(model).total + 128_256 * 4096


def test_uneven_split_is_refused() -> None:
    """A weight that does not divide is named, not rounded."""
    model = load("tiny")
    with pytest.raises(ValueError, match=r"does not divide over 7 ranks"):
        parameters_of_ranks(model, single_stage(model), tp=7)


def test_imports_no_torch() -> None:
    """Login nodes count parameters without loading torch."""
    code = "import sys, moe_train.model.arithmetic; sys.exit('torch' in sys.modules or 'megatron' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
