"""The model of memory: what counts once, what recomputation leaves, how many micro-batches are alive."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import pytest

from moe_train.config.composition.compose import compose
from moe_train.config.composition.validate import validate
from moe_train.config.schema import Config
from moe_train.model.memory import predict, weights_of, workload_of
from parallel.planner.activations import layer
from parallel.planner.memory import (
    StageMemory,
    Weights,
    chunk_activations,
    interleaved,
    peak_in_flight,
    saved_logits,
    saved_per_micro_batch,
    stage_memory,
)
from parallel.planner.workload import Workload

GB = 1e9
V3 = ["model=deepseek_v3", "parallel=deepseek_v3_h800", "runtime=cuda", "batch=large", "train.seq_length=4096"]


def workload(*overrides: str) -> Workload:
    cfg = compose(["batch.global_batch_size=64", *overrides])
    return workload_of(cfg, validate(cfg))


def kept(some: Workload, moe: bool = True) -> float:
    return sum(layer(some, moe).values())


@pytest.mark.parametrize("recompute", ["none", "deepseek_v3"])
def test_deepseek_v3_fits_its_gpus_only_with_its_recomputation(recompute: str) -> None:
    """80 GB is 80 GiB, of which torch can have about 78.6."""
    cfg = compose([*V3, "precision=fp8_block", f"recompute={recompute}"])
    stages = predict(cfg, validate(cfg))
    assert len(stages) == 16
    assert [stage.micro_batches_in_flight for stage in stages] == list(range(16, 0, -1))
    assert (max(stage.total for stage in stages) < 78.6 * 2**30) == (recompute == "deepseek_v3")


def test_deepseek_v3_activations_are_those_that_were_published() -> None:
    """131.0 GB a GPU in bf16 at pp=4 vpp=4 ep=64 (arXiv 2603.07685, tables 3 and 4)."""
    layout = ["parallel.pp=4", "parallel.vpp=4", "parallel.ep=64", "parallel.dp=64"]
    cfg = compose(["model=deepseek_v3", "runtime=cuda", "precision=bf16", "batch=large", "train.seq_length=4096",
                   *layout])  # fmt: skip
    fullest = max(predict(cfg, validate(cfg)), key=lambda stage: stage.total)
    assert fullest.activations / GB == pytest.approx(131.0, rel=0.05)


def test_full_recomputation_keeps_layer_inputs_only() -> None:
    """4 layers of 256 x 2 bytes a token, token ids, norms and head of the last stage in addition."""
    some = workload("runtime=cpu", "precision=bf16", "recompute=full", "model.mtp_num_layers=0")
    inputs = [size for name, size in chunk_activations(some, 0).items() if name.startswith("layer")]
    assert inputs == [128 * 256 * 2] * 4
    grouped = replace(some, recompute_num_layers=2)
    assert len([name for name in chunk_activations(grouped, 0) if name.startswith("layer")]) == 2
    block = replace(some, recompute_method="block", recompute_num_layers=3)
    recomputed = [name for name in chunk_activations(block, 0) if name in {f"layer {i} input" for i in range(4)}]
    assert len(recomputed) == 3  # the fourth keeps an fp32 copy of its input, under another name


def test_each_module_that_is_recomputed_saves_memory_and_all_save_more_than_any() -> None:
    """On both backends, and never more than there is."""
    for runtime in ("cpu", "cuda"):
        some = workload(f"runtime={runtime}", "precision=bf16")
        whole = kept(some) + kept(some, moe=False)
        modules = ["core_attn", "mla_up_proj", "layernorm", "moe_act", "mlp", "moe", "shared_experts"]
        saved = {}
        for module in modules:
            one = replace(some, recompute="selective", recompute_modules=frozenset({module}))
            saved[module] = whole - kept(one) - kept(one, moe=False)
        every = replace(some, recompute="selective", recompute_modules=frozenset(modules))
        least = whole - kept(every) - kept(every, moe=False)
        assert all(value > 0 for value in saved.values()), saved
        assert max(saved.values()) < least < whole


def test_core_attention_recomputed_on_transformer_engine_saves_only_statistics_in_bf16() -> None:
    """Its output is also the input of the projection, which keeps it: upstream warns that it is hardly worth it."""
    some = workload("runtime=cuda", "precision=bf16")
    without = replace(some, recompute="selective", recompute_modules=frozenset({"core_attn"}))
    assert kept(some) - kept(without) == 4 * some.tokens * some.model.num_attention_heads


def test_a_dense_layer_on_transformer_engine_keeps_what_one_can_count() -> None:
    """Llama 3 8B in bf16: 32 heads of 128, of which 8 for keys and values each, and an inner width of 14,336."""
    some = workload("model=llama3_8b", "runtime=cuda", "precision=bf16")
    norms = 2 * (2 * 4096 + 2 * 4096 + 4)  # input, output, and an fp32 root for a token
    attention = 2 * 128 * (32 + 8 + 8 + 32) + 4 * 32  # queries, keys, values, output; an fp32 log-sum-exp for a head
    assert kept(some, moe=False) == some.tokens * (norms + attention + 2 * 3 * 14336)


def test_grouped_experts_keep_only_the_input_of_their_activation() -> None:
    """Their function is fused on both backends, and on a CPU that of dense and shared experts is too. Experts one by
    one also keep what their weights multiply."""
    one, grouped = (layer(workload("runtime=cpu", f"backend.grouped_gemm={on}"), True) for on in ("false", "null"))
    assert set(one) - set(grouped) == {"routed experts: silu x up"}
    unfused = ("runtime=cuda", "backend.name=local", "backend.fusions=false")
    elsewhere = [layer(workload(*unfused, f"backend.grouped_gemm={on}"), True) for on in ("false", "null")]
    assert set(elsewhere[0]) - set(elsewhere[1]) == {f"routed experts: {name}" for name in ("silu", "up", "silu x up")}


def test_the_cpu_keeps_attention_probabilities_of_short_sequences_only() -> None:
    """Beyond 512 tokens, and wherever it is not one CPU rank's whole sequence, flash attention keeps none. Four blocks
    of 128 queries see 128, 256, 384 and 512 keys; in fp32 a block has 64 queries."""
    short = workload("runtime=cpu", "precision=bf16", "train.seq_length=512")
    name, heads = "attention probabilities", short.model.num_attention_heads
    assert layer(short, False)[name] == 2 * heads * 128 * (128 + 256 + 384 + 512)
    fp32 = workload("runtime=cpu", "precision=fp32", "train.seq_length=96")
    assert layer(fp32, False)[name] == 4 * heads * (64 * 64 + 32 * 96)
    assert "log-sum-exp" not in layer(short, False)
    for other in ("runtime=cuda", "runtime=cpu train.seq_length=640", "runtime=cpu parallel.cp=2"):
        kept_by = layer(workload("precision=bf16", "train.seq_length=512", *other.split()), False)
        assert name not in kept_by, other
        assert "log-sum-exp" in kept_by, other


def test_the_loss_keeps_a_gradient_on_the_cpu_and_fp32_scores_elsewhere() -> None:
    """Of each of the two losses; tensor parallelism splits the scores, and then upstream's loss runs."""
    size = {
        where: saved_logits(workload("precision=bf16", "train.seq_length=128", *where.split()), "ttmL")
        for where in ("runtime=cpu", "runtime=cpu parallel.tp=2", "runtime=cuda")
    }
    scores = 128 * workload("runtime=cpu").model.padded_vocab_size * 2
    assert size["runtime=cpu"] == pytest.approx(2 * scores, rel=0.01)
    assert size["runtime=cpu parallel.tp=2"] == pytest.approx(4 * scores / 2, rel=0.01)
    assert size["runtime=cuda"] == pytest.approx(4 * scores, rel=0.01)


def test_each_further_loss_keeps_its_sum_and_weights_too() -> None:
    """Per token: fp32 scores, a label of 8 bytes and a mask of 1; multi-token prediction two fp32 numbers more."""
    some = workload("runtime=cuda", "precision=bf16", "train.seq_length=128")
    each = 4 * some.model.padded_vocab_size + 8 + 1
    assert saved_logits(some, "ttL") == 128 * each
    assert saved_logits(some, "ttmL") == 128 * (each + each + 4 + 4)
    assert saved_logits(some, "tt") == 0


def test_multi_token_prediction_recomputed_keeps_its_two_inputs() -> None:
    """The hidden states and the embedding of the next token, in 16 bits; the token ids have 8 bytes."""
    some = workload("runtime=cuda", "precision=bf16", "recompute=full", "model.mtp_num_layers=1")
    found = {name: size for name, size in chunk_activations(some, 0).items() if name.startswith("mtp 0")}
    states = 2 * 128 * 256
    assert found == {
        "mtp 0 embedding: token ids": 8 * 128, "mtp 0 hidden states": states, "mtp 0 next embedding": states,
    }  # fmt: skip


def test_inputs_of_modules_that_move_to_the_host_do_not_count() -> None:
    """On te each named module takes the input that it alone keeps; FP8 copies of it, too."""
    for precision in ("bf16", "fp8_block"):
        some = workload("runtime=cuda", f"precision={precision}")
        whole, moved = kept(some), ["recompute.offload=memory", "recompute.offload_modules=[core_attn,expert_fc1]"]
        left = kept(workload("runtime=cuda", f"precision={precision}", *moved))
        names = ["queries", "keys", "values", *(name for name in layer(some, True) if "routed expert input" in name)]
        assert len(names) == 4
        assert whole - left == pytest.approx(sum(layer(some, True)[name] for name in names))


@pytest.mark.parametrize(("module", "width"), [
    ("attn_norm", 256), ("qkv_linear", 256), ("mlp_norm", 256), ("core_attn", 4 * (48 + 48 + 32)),
    ("core_attn,attn_proj", 4 * (48 + 48 + 32 + 32)), ("expert_fc1", 4 * 256), ("moe_act", 4 * 2 * 160),
])  # fmt: skip
def test_each_module_moves_its_own_input(module: str, width: int) -> None:
    """Numbers of 2 bytes for a token: 4 heads with 48 of queries and keys and 32 of values, 4 experts of 160."""
    some = workload("runtime=cuda", "precision=bf16")
    left = workload(
        "runtime=cuda", "precision=bf16", "recompute.offload=memory", f"recompute.offload_modules=[{module}]"
    )
    assert kept(some) - kept(left) == 2 * 128 * width


def test_the_share_of_experts_is_what_their_tokens_keep() -> None:
    """Of 4 MoE layers, one of them for prediction: input, gate and up, router's weight and down input of each visit."""
    some = workload("runtime=cuda", "precision=bf16")
    visit = 2 * 256 + 2 * 2 * 160 + 4 + 2 * 160
    assert stage_memory(some, 0, Weights(0, 0)).expert_share == 4 * 128 * 4 * visit


def test_a_recomputed_layer_comes_back_for_its_backward_pass() -> None:
    """The largest layer, or group of them; with selected modules what they throw away."""

    def back(*overrides: str) -> int:
        some = workload("runtime=cuda", "precision=bf16", "model.mtp_num_layers=0", *overrides)
        return stage_memory(some, 0, Weights(0, 0)).recompute

    some = workload("runtime=cuda", "precision=bf16")
    largest = max(kept(some), kept(some, moe=False))
    assert back() == 0
    assert back("recompute=full") == back("recompute=full", "recompute.method=block") == largest
    assert back("recompute=full", "recompute.num_layers=2") == 2 * largest
    assert back("recompute=selective", "recompute.modules=[moe_act]") == 2 * 128 * 4 * 160  # the last layer's input


def test_scores_are_there_in_the_training_precision_too_while_a_loss_is_computed() -> None:
    for layout, scores in (("parallel.tp=1", 128 * 4096), ("parallel.tp=2", 128 * 4096 // 2)):
        some = workload("runtime=cuda", "precision=bf16", layout)
        saved = saved_logits(some, "".join(some.stages[0]))
        assert stage_memory(some, 0, Weights(0, 0)).logits == saved + 2 * scores


def test_communication_is_messages_tokens_of_experts_and_the_gathered_sequence() -> None:
    """In hidden states of a micro-batch; each token visits 4 experts, and goes there and back."""

    def states(*overrides: str, stage: int = 0) -> float:
        some = workload("precision=bf16", *overrides)
        return stage_memory(some, stage, Weights(0, 0)).communication / (2 * 128 * 256)

    assert states("runtime=cuda") == 0
    assert states("runtime=cuda", "parallel.ep=2") == 2 * 4
    assert states("runtime=cuda", "parallel.tp=2") == 1
    assert states("runtime=cuda", "parallel.pp=2") == 2  # one on its way in each direction
    # Nothing is freed early on the CPU: what was sent for two micro-batches, and what was received for one.
    assert states("runtime=cpu", "parallel.pp=2") == 2 + 2
    assert states("runtime=cpu", "parallel.pp=2", stage=1) == 2 + 1
    assert states("runtime=cuda", "parallel.pp=2", "parallel.tp=2") == 2 / 2 + 1


def test_on_the_cpu_large_tensors_move_and_small_ones_stay() -> None:
    some = workload("runtime=cpu", "precision=bf16")
    moves = workload("runtime=cpu", "precision=bf16", "recompute.offload=file", "recompute.offload_min_bytes=65536")
    stays = chunk_activations(moves, 0)
    assert stays == {name: size for name, size in chunk_activations(some, 0).items() if size < 65536}
    assert 0 < sum(stays.values()) < sum(chunk_activations(some, 0).values()) / 2
    assert saved_logits(moves, "ttL") == 0
    assert saved_logits(some, "ttL") > 0


@pytest.mark.parametrize(("recipe", "element"), [("block", 1 + 4 / 128), ("tensor", 1), ("mxfp8", 1 + 1 / 32)])
def test_fp8_keeps_linear_inputs_in_a_byte_and_caches_two_copies_of_weights(recipe: str, element: float) -> None:
    bf16 = workload("runtime=cuda", "precision=bf16")
    fp8 = replace(bf16, fp8=recipe)
    name = "routed expert input"
    assert layer(fp8, True)[f"{name} in fp8"] == pytest.approx(layer(bf16, True)[name] / 2 * element)
    # Both down-projections of latent attention read the norm's output, and each makes a copy of it.
    assert layer(fp8, True)["input norm output in fp8"] == pytest.approx(2 * 128 * 256 * element)
    cfg = compose(["runtime=cuda", "precision=bf16"])
    weights = weights_of(cfg.model, bf16)[0]
    embeddings, routers = 2 * 4096 * 256, 4 * 16 * 256
    norms = 5 * (2 * 256 + 96 + 64) + 3 * 256 + 256  # of 5 layers and their latents, of the prediction, the final one
    assert weights.shared + weights.experts - weights.in_fp8 == embeddings + routers + norms
    cached = stage_memory(fp8, 0, weights).parameters - stage_memory(bf16, 0, weights).parameters
    assert cached == pytest.approx(2 * element * weights.in_fp8, abs=1)


def test_weights_in_fp8_alone_save_memory() -> None:
    common = [*V3, "precision=fp8_block", "recompute=deepseek_v3"]
    both, alone = (
        predict(cfg, validate(cfg)) for cfg in (compose(common), compose([*common, "precision.fp8_param_gather=true"]))
    )
    assert alone[0].parameters < both[0].parameters


def test_optimizer_state_is_divided_over_the_ranks_that_hold_the_same_weights() -> None:
    """12 bytes a 16-bit weight; experts have ep times fewer replicas; bf16 moments take 4 bytes off."""
    cfg = compose(["precision=bf16", "parallel.ep=2", "parallel.dp=4"])
    some = workload_of(cfg, validate(cfg))
    weights = weights_of(cfg.model, some)[0]
    assert stage_memory(some, 0, weights).optimizer == pytest.approx(12 * (weights.shared / 4 + weights.experts / 2))
    both = compose(["precision=bf16", "parallel.cp=2", "parallel.dp=2"])  # cp replicates weights as dp does
    other = workload_of(both, validate(both))
    weights = weights_of(both.model, other)[0]
    expected = 12 * (weights.shared + weights.experts) / 4
    assert stage_memory(other, 0, weights).optimizer == pytest.approx(expected)
    whole = stage_memory(replace(some, distributed_optimizer=False, moment_bytes=2), 0, weights).optimizer
    assert whole == 8 * (weights.shared + weights.experts)


def test_sequence_parallelism_divides_what_tensor_parallelism_alone_repeats() -> None:
    """tp=2 halves every tensor of a layer but the small tables and the latents' rotary part."""
    one, two = workload("precision=bf16", "runtime=cpu"), workload("precision=bf16", "runtime=cpu", "parallel.tp=2")
    assert kept(two, moe=False) == pytest.approx(kept(one, moe=False) / 2, rel=0.01)
    assert kept(replace(two, sequence_parallel=False), moe=False) > 1.3 * kept(two, moe=False)


def test_experts_get_topk_visits_a_token_whatever_the_number_of_ranks() -> None:
    """Even routing: ep moves tokens and changes no mean. Capacity caps it, or pads it."""
    assert workload("runtime=cpu", "parallel.ep=4").expert_tokens == workload("runtime=cpu").expert_tokens == 128 * 4
    assert workload("runtime=cpu", "model.capacity_factor=0.5").expert_tokens == 128 * 2
    assert workload("runtime=cpu", "model.capacity_factor=1.5").expert_tokens == 128 * 4
    padded = workload("runtime=cpu", "model.capacity_factor=1.5", "model.pad_to_capacity=true")
    assert padded.expert_tokens == 128 * 6


@pytest.mark.parametrize(("pp", "micro_batches", "alive"), [(4, 8, [4, 3, 2, 1]), (4, 2, [2, 2, 2, 1]), (1, 8, [1])])
def test_a_stage_holds_a_micro_batch_for_each_stage_after_it(pp: int, micro_batches: int, alive: list[int]) -> None:
    some = replace(workload("runtime=cpu", f"parallel.pp={pp}"), micro_batches=micro_batches)
    assert [peak_in_flight(some, stage, [1.0])[0] for stage in range(pp)] == alive


def test_the_interleaved_schedule_holds_more() -> None:
    """(pp - stage - 1) x 2 + (vpp - 1) x pp + 1 chunks, and each passes forward before it passes backward."""
    pp, chunks, micro_batches = 4, 3, 8
    some = replace(workload("runtime=cpu", "parallel.pp=4", "model.num_layers=12"), micro_batches=micro_batches)
    for stage in range(pp):
        passes = list(interleaved(pp, chunks, stage, micro_batches))
        forward = [chunk for chunk, is_forward in passes if is_forward]
        assert sorted(forward) == sorted(chunk for chunk, is_forward in passes if not is_forward)
        assert len(forward) == micro_batches * chunks
        for chunk in range(chunks):
            alive = list(accumulate((1 if f else -1) for c, f in passes if c == chunk))
            assert min(alive) >= 0
            assert alive[-1] == 0
        expected = (pp - stage - 1) * 2 + (chunks - 1) * pp + 1
        assert sum(peak_in_flight(some, stage, [1.0] * chunks)) == expected


def test_a_pipeline_keeps_what_one_rank_keeps() -> None:
    """The stages' activations add up to those of the whole model."""
    whole = workload("runtime=cpu", "precision=bf16")
    for layout in (["parallel.pp=2"], ["parallel.pp=2", "parallel.vpp=2"], ["parallel.pp=4"]):
        stages = workload("runtime=cpu", "precision=bf16", *layout)
        parts = sum(saved_per_micro_batch(stages, stage) for stage in range(stages.layout.pp))
        assert parts == pytest.approx(saved_per_micro_batch(whole, 0))


def test_each_stage_and_each_chunk_counts_what_it_recomputes() -> None:
    """As if the whole pipeline recomputed it; an entry for each of pp stages holds for all of their chunks."""
    pipeline = ["runtime=cuda", "precision=bf16", "parallel.pp=2", "parallel.vpp=2"]

    def stages(*overrides: str) -> list[StageMemory]:
        cfg = compose(["batch.global_batch_size=64", *pipeline, *overrides])
        return predict(cfg, validate(cfg))

    none, full = stages(), stages("recompute=full")
    some = stages("recompute=selective", "recompute.modules=[layernorm,moe_act]")
    assert stages("recompute.stages=[{mode:full},{mode:none}]") == [full[0], none[1]]
    assert stages("recompute.stages=[{modules:[layernorm,moe_act]},{mode:full}]") == [some[0], full[1]]
    first, last = stages("recompute.stages=[{mode:full},{mode:none},{mode:none},{mode:none}]")
    assert last == none[1]
    assert full[0].activations < first.activations < none[0].activations


def test_layers_kept_in_bf16_have_no_fp8_copies_and_keep_wider_inputs() -> None:
    base = [*V3, "precision=fp8_block", "recompute=deepseek_v3", "model.mtp_num_layers=0"]
    mixed = compose([*base, "precision.first_last_layers_bf16=true", "precision.num_layers_at_start_in_bf16=1",
                     "precision.num_layers_at_end_in_bf16=2"])  # fmt: skip
    plain, layout = compose(base), validate(mixed)
    bf16 = compose([*V3, "precision=bf16", "recompute=deepseek_v3", "model.mtp_num_layers=0"])
    before, after = predict(plain, layout), predict(mixed, layout)
    assert workload_of(mixed, layout).bf16_layers == {0, 59, 60}
    assert [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b] == [0, len(after) - 1]
    for stage in (0, len(after) - 1):
        assert before[stage].activations_per_micro_batch < after[stage].activations_per_micro_batch
        # Of each weight of a linear layer in FP8 there are two copies with the scales of 128 x 128 blocks.
        gone = before[stage].parameters - after[stage].parameters
        assert gone == pytest.approx(2 * (1 + 4 / 128) * in_layers(plain, stage), rel=1e-6)
    assert all(a.parameters < b.parameters for a, b in zip(predict(bf16, layout), before, strict=True))


def in_layers(cfg: Config, stage: int) -> int:
    """Weights of linear layers of the first layer, or of the last two, on one rank, counted from the model's shape."""
    model = cfg.model
    heads, nope, rope = model.num_attention_heads, model.qk_nope_head_dim, model.qk_rope_head_dim
    hidden, query, latent, value = model.hidden_size, model.q_lora_rank, model.kv_lora_rank, model.v_head_dim
    attention = hidden * (query + latent + rope + heads * value) + heads * (
        query * (nope + rope) + latent * (nope + value)
    )
    if stage == 0:
        return attention + 3 * hidden * model.ffn_hidden_size
    experts = model.num_experts // cfg.parallel.ep + model.num_shared_experts
    return 2 * (attention + 3 * hidden * model.moe_ffn_hidden_size * experts)
