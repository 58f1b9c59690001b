"""Generation from the KV cache against forward passes of the training model over the whole text."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.utils import unwrap_model

from moe_train.inference.engine import Completion, Engine, EngineOptions
from moe_train.inference.sampling import SamplingParams
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


def built(degrees: dict[str, int], changes: dict[str, Any]) -> tuple[RankContext, list[Any]]:
    # Larger weights than those of training, so that the most probable token is far from a tie.
    cfg = small_run.config(Path("unused"), degrees, model__init_std=0.2, **changes)
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


def greedy(degrees: dict[str, int], changes: dict[str, Any]) -> list[list[int]]:
    ranks, chunks = built(degrees, changes)
    with Engine(ranks, chunks, OPTIONS) as engine:
        completions = engine.generate(prompts(), SamplingParams(max_new_tokens=NEW))
    assert engine.pool.available == OPTIONS.num_blocks
    assert all(chunk.training for chunk in chunks)
    return [one.tokens for (one,) in completions]


def compared_with_training(changes: dict[str, Any]) -> float:
    """The largest difference of a log-probability. Asserts that each token is the most probable after its prefix."""
    ranks, chunks = built({}, changes)
    with Engine(ranks, chunks, OPTIONS) as engine:
        completions = engine.generate(prompts(), SamplingParams(max_new_tokens=NEW))
    worst = 0.0
    for prompt, (completion,) in zip(prompts(), completions, strict=True):
        logprobs = training_logprobs(chunks, prompt + completion.tokens)[len(prompt) - 1 :]
        assert completion.tokens == logprobs.argmax(dim=-1).tolist()
        worst = max(worst, float((torch.tensor(completion.logprobs) - logprobs.amax(dim=-1)).abs().max()))
    return worst


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
        ({"tp": 2, "pp": 2, "ep": 2}, "mla", 4),
    ],
    ids=lambda value: "".join(f"{k}{v}" for k, v in value.items()) if isinstance(value, dict) else str(value),
)
def test_every_rank_of_every_layout_generates_what_a_single_rank_does(
    degrees: dict[str, int], shape: str, ranks: int
) -> None:
    (alone,) = run_distributed(greedy, 1, {}, SHAPES[shape])
    assert len({tuple(text) for text in alone}) == len(alone)
    assert run_distributed(greedy, ranks, degrees, SHAPES[shape]) == [alone] * ranks


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


def random_schedules(changes: dict[str, Any], seeds: range) -> tuple[int, int]:
    """Requests alone, and in random company. Returns the numbers of evictions and of cancelled requests."""
    ranks, chunks = built({}, changes)
    evictions = cancelled = 0
    requests = requests_of(random.Random(0))
    roomy = EngineOptions(num_blocks=64, block_size=4)
    alone: list[list[Completion]] = []
    for prompt, params in requests:
        with Engine(ranks, chunks, roomy) as engine:
            alone += engine.generate([prompt], params)
    for seed in seeds:
        draw = random.Random(seed)
        with Engine(ranks, chunks, options_of(draw)) as engine:
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
                for number, completions in engine.step().items():
                    found[running.pop(number)] = completions
                seen |= {sequence: sequence.evictions for sequence in engine.scheduler.waiting}
            evictions += sum(seen.values())
            assert engine.pool.available == engine.pool.num_blocks
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


def differences(precision: str, formats: list[str | None]) -> list[float]:
    """Mean difference of a log-probability from training's, over a continuation of each prompt."""
    ranks, chunks = built({}, {"precision__dtype": precision})
    found = []
    for cache_format in formats:
        options = EngineOptions(num_blocks=64, block_size=4, max_batch_tokens=16, cache_format=cache_format)
        with Engine(ranks, chunks, options) as engine:
            completions = engine.generate(prompts(), SamplingParams(max_new_tokens=NEW))
        parts = []
        for prompt, (completion,) in zip(prompts(), completions, strict=True):
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
        expected = [engine.generate([prompt], params)[0][0].tokens for prompt, params in (short, long)]
        queued = engine.add_request(*short)
        assert engine.generate([long[0]], long[1])[0][0].tokens == expected[1]
        ((number, (completion,)),) = engine.step().items()
        assert (number, completion.tokens) == (queued, expected[0])
        engine.add_request(*long)
        engine.step()
    assert engine.scheduler.is_idle
    assert engine.pool.available == OPTIONS.num_blocks
    with torch.no_grad():
        for parameter in chunks[0].parameters():
            parameter.mul_(-0.7)
    with Engine(ranks, chunks, OPTIONS) as fresh:
        changed = fresh.generate([long[0]], long[1])[0][0].tokens
    assert changed != expected[1]
    with engine:
        assert engine.generate([long[0]], long[1])[0][0].tokens == changed


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
        assert engine.scheduler.is_idle
    ranks.cfg.model.capacity_factor = 1.0
    with pytest.raises(ConfigError) as caught:
        Engine(ranks, chunks, OPTIONS)
    return [*messages, str(caught.value)]


def test_requests_and_models_that_cannot_be_run_are_refused() -> None:
    empty, beyond, negative, long, top, capacity = run_distributed(refused, 1)[0]
    assert empty == beyond == negative
    assert "use token ids from 0 to 127" in empty
    assert "a prompt of 8 tokens and max_new_tokens=1 exceed 8 tokens" in long
    assert "shorten the prompt to 7" in long
    assert "top_logprobs=129 exceeds model.vocab_size=128" in top
    assert "model.capacity_factor" in capacity
