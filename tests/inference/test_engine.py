"""Generation from the KV cache against forward passes of the training model over the whole text."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.utils import unwrap_model

from moe_train.inference.engine import Engine, EngineOptions
from moe_train.inference.requests import Completion, RequestOutput
from moe_train.inference.sampling_params import SamplingParams
from moe_train.ranks import RankContext, build_model
from parallel.errors import ConfigError
from tests.checkpoint import small_run
from tests.distributed.helper import run_distributed

NEW = 24
SHAPES: dict[str, dict[str, Any]] = {
    "mla": {},
    "mla_yarn": {"model__rope_type": "yarn", "model__yarn_factor": 4.0, "model__yarn_original_max_position": 16},
    "mla_without_q_lora": {"model__q_lora_rank": 0},
    "gqa": {"model__attention": "gqa", "model__num_query_groups": 2, "model__head_dim": 16, "model__qk_norm": "head"},
    "gqa_one_group": {"model__attention": "gqa", "model__num_query_groups": 1, "model__head_dim": 16},
    "gqa_tied_partial_rope": {
        "model__attention": "gqa", "model__head_dim": 16, "model__rotary_percent": 0.5, "model__tie_embeddings": True,
        "model__qkv_bias": True,
    },
    "gqa_yarn": {
        "model__attention": "gqa", "model__head_dim": 16, "model__rope_type": "yarn", "model__yarn_factor": 4.0,
        "model__yarn_original_max_position": 16,
    },
}  # fmt: skip
OPTIONS = EngineOptions(num_blocks=64, block_size=4, max_batch_tokens=16, max_sequences=8)


def prompts() -> list[list[int]]:
    draw = random.Random(7)
    return [[draw.randrange(small_run.VOCABULARY) for _ in range(length)] for length in (5, 1, 22, 13)]


def built(degrees: dict[str, Any], changes: dict[str, Any]) -> tuple[RankContext, list[Any]]:
    # Larger weights than those of training, so that the most probable token is far from a tie.
    cfg = small_run.config(Path("unused"), degrees, **{"model__init_std": 0.2, **changes})
    ranks = small_run.join(cfg)
    return ranks, build_model(ranks)


def training_logprobs(chunks: list[Any], tokens: list[int]) -> torch.Tensor:
    """log p of every token at every position but the last, [s - 1, vocabulary], by one training forward pass.

    Multi-token prediction uses the output layer first, so the last logits are those of the next token.
    """
    (model,) = unwrap_model(list(chunks))
    logits: list[torch.Tensor] = []
    hook = model.output_layer.register_forward_hook(lambda *args: logits.append(args[-1][0].float()))
    text = torch.tensor([tokens])
    positions = torch.arange(text.size(1) - 1).unsqueeze(0)
    with torch.no_grad():
        losses = chunks[0].eval()(text[:, :-1], positions, None, labels=text[:, 1:])
    hook.remove()
    found = logits[-1][:, 0, : small_run.VOCABULARY].log_softmax(dim=-1)
    assert torch.allclose(found.gather(1, text[0, 1:, None])[:, 0], -losses[0].float(), atol=1e-5)  # as the loss has it
    return found


def texts(outputs: list[RequestOutput]) -> list[list[int]]:
    return [completion.tokens for output in outputs for completion in output.completions]


def greedy(
    degrees: dict[str, Any], changes: dict[str, Any], new: int = NEW, options: EngineOptions = OPTIONS
) -> list[list[int]]:
    ranks, chunks = built(degrees, changes)
    with Engine(ranks, chunks, options) as engine:
        outputs = engine.generate(prompts(), SamplingParams(max_new_tokens=new))
    assert engine.num_free_blocks == engine.num_blocks
    assert all(chunk.training for chunk in chunks)
    return texts(outputs)


def compared_with_training(changes: dict[str, Any], new: int = NEW, options: EngineOptions = OPTIONS) -> float:
    """The largest difference of a log-probability. Asserts that each token is the most probable after its prefix."""
    ranks, chunks = built({}, changes)
    with Engine(ranks, chunks, options) as engine:
        outputs = engine.generate(prompts(), SamplingParams(max_new_tokens=new))
    worst = 0.0
    for prompt, output in zip(prompts(), outputs, strict=True):
        (completion,) = output.completions
        logprobs = training_logprobs(chunks, prompt + completion.tokens)[len(prompt) - 1 :]
        assert completion.tokens == logprobs.argmax(dim=-1).tolist()
        worst = max(worst, float((torch.tensor(completion.logprobs) - logprobs.amax(dim=-1)).abs().max()))
    return worst


@pytest.mark.parametrize("shape", ["mla", "gqa"])
def test_a_model_in_emulated_fp8_has_the_log_probabilities_of_training(shape: str) -> None:
    ((found,),) = run_distributed(differences, 1, "fp32", [None], {**SHAPES[shape], "precision__fp8": "block"})
    assert found < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_cached_generation_is_recomputation_of_the_whole_prefix(shape: str) -> None:
    assert run_distributed(compared_with_training, 1, SHAPES[shape])[0] < 1e-5


@pytest.mark.parametrize(
    ("degrees", "shape", "ranks"),
    [
        ({"tp": 2, "ep": 2}, "mla_yarn", 2),
        ({"tp": 2}, "gqa", 2),
        ({"tp": 2}, "gqa_one_group", 2),  # which both ranks have
        ({"pp": 2, "vpp": 2}, "gqa_yarn", 2),
        ({"cp": 2, "ep": 2}, "mla", 2),
        ({"pp": 2}, "mla", 2),
        ({"dp": 2}, "gqa_tied_partial_rope", 2),
        ({"dp": 2, "ep": 2}, "mla_without_q_lora", 2),
        ({"dp": 2, "ep": 2, "dispatcher": "allgather"}, "gqa", 2),
        ({"tp": 2, "etp": 2}, "mla", 2),
        ({"etp": 2, "dp": 2}, "gqa", 2),
        ({"tp": 2, "dp": 2, "ep": 2}, "mla", 4),
        ({"tp": 2, "pp": 2, "ep": 2}, "mla", 4),
    ],
    ids=lambda value: "".join(f"{k}{v}" for k, v in value.items()) if isinstance(value, dict) else str(value),
)
def test_every_rank_of_every_layout_generates_what_a_single_rank_does(
    degrees: dict[str, Any], shape: str, ranks: int
) -> None:
    (alone,) = run_distributed(greedy, 1, {}, SHAPES[shape])
    assert len({tuple(text) for text in alone}) == len(alone)
    assert run_distributed(greedy, ranks, degrees, SHAPES[shape]) == [alone] * ranks


# Smaller logits than those of the other tests, of which more are rounded.
LONG, LONG_TEXT = 256, {"model__max_position_embeddings": 512, "train__seq_length": 512, "model__init_std": 0.12}
LONG_OPTIONS = EngineOptions(num_blocks=96, block_size=16, max_batch_tokens=64, max_sequences=8)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_long_texts_are_those_of_recomputation_in_every_layout(shape: str) -> None:
    changes = SHAPES[shape] | LONG_TEXT | {"model__tie_embeddings": False}  # which pipelines cannot have
    assert run_distributed(compared_with_training, 1, changes, LONG, LONG_OPTIONS, timeout_s=600)[0] < 1e-5
    (alone,) = run_distributed(greedy, 1, {}, changes, LONG, LONG_OPTIONS, timeout_s=600)
    for degrees in ({"tp": 2}, {"ep": 2}, {"pp": 2}, {"tp": 2, "pp": 2, "ep": 2}, {"tp": 2, "ep": 2, "dp": 2}):
        ranks = 4 if len(degrees) == 3 else 2
        layout = {"dp": 2, **degrees} if degrees == {"ep": 2} else degrees
        assert run_distributed(greedy, ranks, layout, changes, LONG, LONG_OPTIONS, timeout_s=600) == [alone] * ranks


def scored(changes: dict[str, Any]) -> None:
    """Log-probabilities of prompts, in chunks, with evictions, alone and with completions."""
    ranks, chunks = built({}, changes)
    tight = EngineOptions(num_blocks=9, block_size=4, max_batch_tokens=7)
    params = SamplingParams(max_new_tokens=6, n=2, temperature=1.0, prompt_logprobs=3)
    with Engine(ranks, chunks, tight) as engine:
        scores = engine.generate(prompts(), SamplingParams(max_new_tokens=0, prompt_logprobs=0))
        outputs = engine.generate(prompts(), params)
        assert engine.num_free_blocks == engine.num_blocks
        silent = engine.generate(prompts(), SamplingParams(max_new_tokens=0))
    assert all(output.prompt_logprobs is None for output in silent)
    for prompt, score, output in zip(prompts(), scores, outputs, strict=True):
        assert score.completions == [Completion([], [], [], "length")]
        assert [len(completion.tokens) for completion in output.completions] == [6, 6]
        assert output.prompt_logprobs is not None
        assert output.prompt_top_logprobs is not None
        assert score.prompt_logprobs == pytest.approx(output.prompt_logprobs, abs=1e-5)
        logprobs = training_logprobs(chunks, [*prompt, 0])[: len(prompt) - 1]
        own = logprobs.gather(1, torch.tensor(prompt[1:], dtype=torch.long).unsqueeze(1)).squeeze(1)
        assert output.prompt_logprobs == pytest.approx(own.tolist(), abs=1e-5)
        best = logprobs.topk(3)
        assert [list(top) for top in output.prompt_top_logprobs] == best.indices.tolist()
        found = [list(top.values()) for top in output.prompt_top_logprobs]
        assert torch.allclose(torch.tensor(found).view(-1, 3), best.values, atol=1e-5)


@pytest.mark.parametrize("shape", ["mla", "gqa"])
def test_prompts_have_the_log_probabilities_of_training(shape: str) -> None:
    run_distributed(scored, 1, SHAPES[shape])


def ended_early() -> None:
    ranks, chunks = built({}, {})
    (prompt, *_), params = prompts(), SamplingParams(max_new_tokens=9, n=2, temperature=1.0)
    with Engine(ranks, chunks, OPTIONS) as engine:
        (whole,) = engine.generate([prompt], params)
        request, tokens = engine.add_request(prompt, params), []
        while not (output := engine.step()).finished:
            tokens += [new.token for new in output.tokens if new.completion == 1]
            if len(tokens) == 3:
                engine.end_completion(request, 1)
                engine.end_completion(request, 1)  # once more is harmless
        first, second = output.finished[request].completions
        assert (first.tokens, first.finish_reason) == (whole.completions[0].tokens, "length")
        assert (second.tokens, second.finish_reason) == (whole.completions[1].tokens[:3], "stop")
        engine.end_completion(request, 0)
        assert engine.is_idle
        assert engine.num_free_blocks == engine.num_blocks


def test_a_completion_can_be_ended_early() -> None:
    run_distributed(ended_early, 1)


def lonely(degrees: dict[str, Any]) -> list[list[int]]:
    """One request, so that all replicas but one have nothing to do."""
    ranks, chunks = built(degrees, {})
    with Engine(ranks, chunks, OPTIONS) as engine:
        return texts(engine.generate(prompts()[:1], SamplingParams(max_new_tokens=4)))


@pytest.mark.parametrize("degrees", [{"dp": 2, "ep": 2}, {"dp": 2, "etp": 2}, {"dp": 2}], ids=str)
def test_replicas_without_requests_take_part_where_they_share_experts(degrees: dict[str, int]) -> None:
    (alone,) = run_distributed(lonely, 1, {})
    assert run_distributed(lonely, 2, degrees) == [alone, alone]


def replicated() -> tuple[list[int], list[list[int]]]:
    ranks, chunks = built({"dp": 2}, {})
    with Engine(ranks, chunks, OPTIONS) as engine:
        numbers = [engine.add_request(prompt, SamplingParams(max_new_tokens=NEW)) for prompt in prompts()]
        shares = [scheduler.num_sequences for scheduler in engine.replicas]
        engine.cancel(numbers[1])
        found: dict[int, RequestOutput] = {}
        while not engine.is_idle:
            found |= engine.step().finished
    return shares, texts([found[number] for number in sorted(found)])


def test_data_parallel_replicas_share_the_requests() -> None:
    alone = run_distributed(greedy, 1, {}, {})[0]
    for shares, found in run_distributed(replicated, 2):
        assert shares == [2, 2]
        assert found == [alone[0], *alone[2:]]


def options_of(draw: random.Random) -> EngineOptions:
    return EngineOptions(
        num_blocks=draw.randint(8, 11), block_size=4, max_batch_tokens=draw.choice([3, 8, 64]),
        max_sequences=draw.randint(1, 6),
    )  # fmt: skip


def requests_of(draw: random.Random) -> list[tuple[list[int], SamplingParams]]:
    """Prompts that share prefixes, greedy and drawn, with one or several completions."""
    stem = [draw.randrange(small_run.VOCABULARY) for _ in range(16)]
    made = []
    for seed in range(6):
        prompt = stem[: draw.randint(1, 16)] + [draw.randrange(small_run.VOCABULARY) for _ in range(draw.randint(0, 4))]
        params = SamplingParams(
            max_new_tokens=draw.randint(1, 12), temperature=draw.choice([0.0, 1.0]), top_p=draw.choice([1.0, 0.9]),
            seed=seed, n=draw.choice([1, 1, 2]), stop_token_ids=frozenset(range(draw.choice([0, 4]))), top_logprobs=2,
        )  # fmt: skip
        made.append((prompt, params))
    return made


def random_schedules(
    changes: dict[str, Any], seeds: range, degrees: dict[str, Any] | None = None, speculate: bool = False
) -> tuple[int, int]:
    """Requests alone, and in random company. Returns the numbers of evictions and of cancelled requests."""
    ranks, chunks = built(degrees or {}, changes)
    evictions = cancelled = 0
    requests = requests_of(random.Random(0))
    roomy = EngineOptions(num_blocks=64, block_size=4)
    alone: list[list[Completion]] = []
    for prompt, params in requests:
        with Engine(ranks, chunks, roomy) as engine:
            alone += [output.completions for output in engine.generate([prompt], params)]
    for seed in seeds:
        draw = random.Random(seed)
        with Engine(ranks, chunks, replace(options_of(draw), speculate=speculate)) as engine:
            to_come, running = draw.sample(range(len(requests)), len(requests)), {}
            found: dict[int, list[Completion]] = {}
            seen: dict[Any, int] = {}
            while to_come or running:
                if to_come and (not running or draw.random() < 0.4):
                    index = to_come.pop()
                    running[engine.add_request(*requests[index])] = index
                if running and draw.random() < 0.03:
                    victim = draw.choice(list(running))
                    engine.cancel(victim)
                    del running[victim]
                    cancelled += 1
                for number, output in engine.step().finished.items():
                    found[running.pop(number)] = output.completions
                waiting = [sequence for scheduler in engine.replicas for sequence in scheduler.waiting]
                seen |= {sequence: sequence.evictions for sequence in waiting}
            evictions += sum(seen.values())
            assert engine.num_free_blocks == engine.num_blocks
        for index, completions in found.items():
            for one, other in zip(completions, alone[index], strict=True):
                assert (one.tokens, one.finish_reason) == (other.tokens, other.finish_reason), (seed, index)
                assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
                assert [list(top) for top in one.top_logprobs] == [list(top) for top in other.top_logprobs]
    return evictions, cancelled


@pytest.mark.parametrize(
    ("shape", "seeds"),
    [
        ("mla", range(10)),
        ("gqa", range(10, 16)),
        pytest.param("mla_yarn", range(100), marks=pytest.mark.slow),
        pytest.param("gqa_yarn", range(100, 200), marks=pytest.mark.slow),
    ],
)
def test_results_do_not_depend_on_what_else_is_in_the_batch(shape: str, seeds: range) -> None:
    evictions, cancelled = run_distributed(random_schedules, 1, SHAPES[shape], seeds, timeout_s=600)[0]
    assert evictions >= len(seeds) / 2
    assert cancelled >= len(seeds) / 2


@pytest.mark.parametrize(
    ("degrees", "shape", "speculate"),
    [({"pp": 2}, "gqa", False), ({"dp": 2, "ep": 2}, "mla", True), ({}, "mla", True)],
    ids=lambda value: "".join(f"{k}{v}" for k, v in value.items()) if isinstance(value, dict) else str(value),
)
def test_results_do_not_depend_on_the_batch_in_layouts_and_with_drafts(
    degrees: dict[str, Any], shape: str, speculate: bool
) -> None:
    ranks = 2 if degrees else 1
    found = run_distributed(random_schedules, ranks, SHAPES[shape], range(4), degrees, speculate, timeout_s=600)
    assert len(set(found)) == 1
    evictions, _ = found[0]
    assert evictions >= 1


def differences(precision: str, formats: list[str | None], changes: dict[str, Any] | None = None) -> list[float]:
    """Mean difference of a log-probability from training's, over a continuation of each prompt."""
    ranks, chunks = built({}, {"precision__dtype": precision, **(changes or {})})
    found = []
    for cache_format in formats:
        options = EngineOptions(num_blocks=64, block_size=4, max_batch_tokens=16, cache_format=cache_format)
        with Engine(ranks, chunks, options) as engine:
            outputs = engine.generate(prompts(), SamplingParams(max_new_tokens=NEW))
        parts = []
        for prompt, output in zip(prompts(), outputs, strict=True):
            (completion,) = output.completions
            logprobs = training_logprobs(chunks, prompt + completion.tokens)[len(prompt) - 1 :]
            own = logprobs.gather(1, torch.tensor(completion.tokens).unsqueeze(1)).squeeze(1)
            parts.append((torch.tensor(completion.logprobs) - own).abs().mean())
        found.append(float(torch.stack(parts).mean()))
    return found


def test_a_cache_in_fewer_bits_costs_accuracy_in_their_order() -> None:
    (found,) = run_distributed(differences, 1, "fp32", ["fp32", "bf16", "int8", "fp8", "int4"])
    assert found == sorted(found)
    assert found[0] < 1e-5


def test_a_model_in_16_bits_is_that_of_training_within_their_precision() -> None:
    (found,) = run_distributed(differences, 1, "bf16", [None])
    assert 1e-5 < found[0] < 0.1


def left_behind() -> None:
    """Requests that are still running when another is waited for, or when the block ends."""
    ranks, chunks = built({}, {})
    short, long = ([1, 2, 3], SamplingParams(2)), ([4, 5, 6, 7, 8], SamplingParams(9))
    with Engine(ranks, chunks, OPTIONS) as engine:
        expected = [texts(engine.generate([prompt], params))[0] for prompt, params in (short, long)]
        queued = engine.add_request(*short)
        assert texts(engine.generate([long[0]], long[1])) == [expected[1]]
        output = engine.step()
        assert [token.token for token in output.tokens] == expected[0]
        assert {token.request for token in output.tokens} == {queued}
        assert texts([output.finished.pop(queued)]) == [expected[0]]
        assert not output.finished
        engine.add_request(*long)
        engine.step()
    assert engine.is_idle
    assert engine.num_free_blocks == OPTIONS.num_blocks
    with torch.no_grad():
        for parameter in chunks[0].parameters():
            parameter.mul_(-0.7)
    with Engine(ranks, chunks, OPTIONS) as fresh:
        (changed,) = texts(fresh.generate([long[0]], long[1]))
    assert changed != expected[1]
    with engine:
        assert texts(engine.generate([long[0]], long[1])) == [changed]


def test_the_end_of_the_block_cancels_requests_and_forgets_the_cache() -> None:
    run_distributed(left_behind, 1)


def refused() -> list[str]:
    ranks, chunks = built({}, {})
    messages = []
    with Engine(ranks, chunks, EngineOptions(num_blocks=2, block_size=4)) as engine:
        for prompt in ([], [small_run.VOCABULARY], [-1], [0] * 8):
            with pytest.raises(ConfigError) as caught:
                engine.generate([[1], prompt], SamplingParams(max_new_tokens=1))
            messages.append(str(caught.value))
        with pytest.raises(ConfigError) as caught:
            engine.add_request([1], SamplingParams(max_new_tokens=1, top_logprobs=129))
        messages.append(str(caught.value))
        assert engine.is_idle
    ranks.cfg.precision.fp8 = "delayed"
    with pytest.raises(ConfigError) as caught:
        Engine(ranks, chunks, OPTIONS)
    messages.append(str(caught.value))
    ranks.cfg.model.capacity_factor = 1.0
    with pytest.raises(ConfigError) as caught:
        Engine(ranks, chunks, OPTIONS)
    return [*messages, str(caught.value)]


def test_requests_and_models_that_cannot_be_run_are_refused() -> None:
    empty, beyond, negative, long, top, scale, capacity = run_distributed(refused, 1)[0]
    assert empty == beyond == negative
    assert "use token ids from 0 to 127" in empty
    assert "a prompt of 8 tokens and max_new_tokens=1 exceed 8 tokens" in long
    assert "shorten the prompt to 7" in long
    assert "top_logprobs=129 exceeds model.vocab_size=128" in top
    assert "set precision.fp8=block" in scale
    assert "set model.capacity_factor=null" in capacity
