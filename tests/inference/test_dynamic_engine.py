"""Megatron-Core's dynamic engine behind the interface of the local engine.

Its own classes run on the CPU (tests/inference/simulated_kernels.py), with models of the local backend.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moe_train.config.resolve import resolve
from moe_train.inference import held_out, opening, upstream_engine
from moe_train.inference.base_engine import BaseEngine
from moe_train.inference.dynamic_engine import DynamicEngine, upstream_params
from moe_train.inference.engine import Engine, EngineOptions
from moe_train.inference.requests import RequestOutput, StepOutput
from moe_train.inference.sampling_params import SamplingParams
from moe_train.ranks import RankContext
from parallel.architecture.kv_cache import bytes_per_token
from parallel.errors import ConfigError
from parallel.layout import ParallelLayout
from parallel.rank_info import RankInfo
from tests.checkpoint import small_run
from tests.distributed.helper import run_distributed
from tests.inference import simulated_kernels
from tests.inference.test_engine import built, prompts

GQA = {
    "model__attention": "gqa", "model__head_dim": 16, "model__num_query_groups": 2, "model__mtp_num_layers": 0,
    "model__vocab_size": 131,
}  # fmt: skip
"""With a vocabulary that Megatron-Core pads."""
SHAPES: dict[str, dict[str, Any]] = {
    "yarn": {"model__rope_type": "yarn", "model__yarn_factor": 4.0, "model__yarn_original_max_position": 16},
    "llama3, tied": {"model__rope_type": "llama3", "model__tie_embeddings": True, "model__qkv_bias": True},
}
SCALED = {"model__yarn_mscale": 1.0, "model__yarn_mscale_all_dim": 0.5}
"""Where YaRN scales cos and sin."""
OPTIONS = EngineOptions(num_blocks=8, block_size=256, max_batch_tokens=64, max_sequences=8)
LONG = [7, 3, 5] * 50


def compared(engine: BaseEngine, wanted: list[RequestOutput], texts: list[list[int]], params: SamplingParams) -> float:
    """The largest difference of a log-probability. Asserts that all else is the same."""
    worst = 0.0
    for output, right in zip(engine.generate(texts, params), wanted, strict=True):
        (own,), (other,) = output.completions, right.completions
        assert (own.tokens, own.finish_reason) == (other.tokens, other.finish_reason)
        assert [list(best) for best in own.top_logprobs] == [list(best) for best in other.top_logprobs]
        pairs = [*zip(own.logprobs, other.logprobs, strict=True)]
        for best, right_best in zip(own.top_logprobs, other.top_logprobs, strict=True):
            pairs += zip(best.values(), right_best.values(), strict=True)
        worst = max(worst, *(abs(a - b) for a, b in pairs))
    assert engine.is_idle
    assert engine.num_free_blocks == engine.num_blocks
    return worst


def both_engines(degrees: dict[str, int], shapes: list[dict[str, Any]]) -> list[float]:
    params = SamplingParams(max_new_tokens=8, top_logprobs=3)
    differences = []
    for changes in shapes:
        ranks, chunks = built(degrees, GQA | changes)
        texts = [*prompts(), LONG]  # the last is computed in several parts
        with Engine(ranks, chunks, replace(OPTIONS, num_blocks=64, block_size=16)) as engine:
            wanted = engine.generate(texts, params)
        with pytest.MonkeyPatch.context() as patch:
            simulated_kernels.install(patch)
            te = simulated_kernels.as_te(ranks)
            with opening.open_engine(te, chunks, OPTIONS) as dynamic:
                assert isinstance(dynamic, DynamicEngine)
                differences.append(compared(dynamic, wanted, texts, params))
            assert all(chunk.training for chunk in chunks)
            ours = held_out.continue_prompts(ranks, chunks, [[1, 2, 3], [4, 5, 6]], 4)
            assert held_out.continue_prompts(te, chunks, [[1, 2, 3], [4, 5, 6]], 4) == ours
            if upstream_engine.ONE_CONFIG:
                from megatron.core.inference.utils import InferenceMode

                assert not InferenceMode.is_active()
    return differences


def test_megatrons_engine_generates_what_the_local_engine_does() -> None:
    shapes = [*SHAPES.values()]
    if upstream_engine.ONE_CONFIG:
        shapes.append({"model__mtp_num_layers": 1, **SHAPES["yarn"], **SCALED})
    (differences,) = run_distributed(both_engines, 1, {}, shapes)
    assert max(differences) < 2e-5


def test_tensor_and_expert_parallel_ranks_agree_with_the_local_engine() -> None:
    for differences in run_distributed(both_engines, 2, {"tp": 2, "ep": 2}, [{}]):
        assert max(differences) < 2e-5


def drained(engine: BaseEngine) -> StepOutput:
    """The output of all steps, which are few: requests that have ended take none."""
    tokens, finished = [], {}
    for _ in range(20):
        if engine.is_idle:
            break
        output = engine.step()
        tokens += output.tokens
        finished |= output.finished
    assert engine.is_idle
    return StepOutput(tokens, finished)


def requests() -> None:
    """What a request can ask for, and how it ends."""
    ranks, chunks = built({}, GQA)
    with pytest.MonkeyPatch.context() as patch:
        simulated_kernels.install(patch)
        te = simulated_kernels.as_te(ranks)
        with opening.open_engine(te, chunks, OPTIONS) as engine:
            check_stop_tokens(engine)
            check_ends(engine)
            check_draws(engine)
            check_refusals(engine)
            engine.add_request([1], SamplingParams(max_new_tokens=8))
        with opening.open_engine(te, chunks, replace(OPTIONS, num_blocks=3, max_batch_tokens=1024)) as tight:
            check_evictions(tight)
        check_sizes(te, chunks)


def check_stop_tokens(engine: BaseEngine) -> None:
    (free,) = engine.generate([[9, 8]], SamplingParams(max_new_tokens=12))
    tokens = free.completions[0].tokens
    unused = next(token for token in range(131) if token not in tokens)
    for stops in ([tokens[5]], [tokens[5], unused], [tokens[5], 130 if 130 not in tokens else unused]):
        length = tokens.index(tokens[5]) + 1
        (output,) = engine.generate([[9, 8]], SamplingParams(max_new_tokens=12, stop_token_ids=frozenset(stops)))
        assert output.completions[0].tokens == tokens[:length]
        assert output.completions[0].finish_reason == "stop"
        assert len(output.completions[0].logprobs) == length
        drained(engine)
        assert engine.num_free_blocks == engine.num_blocks


def check_ends(engine: BaseEngine) -> None:
    params = SamplingParams(max_new_tokens=12)
    (alone,) = engine.generate([[9, 8]], params)
    pair = engine.add_request([9, 8], replace(params, n=2))
    cancelled = engine.add_request([4], params)
    assert (engine.num_waiting, engine.num_running) == (3, 0)
    first = engine.step()
    assert {(token.request, token.completion) for token in first.tokens} == {(pair, 0), (pair, 1), (cancelled, 0)}
    assert (engine.num_waiting, engine.num_running) == (0, 3)
    engine.end_completion(pair, 1)
    engine.cancel(cancelled)
    engine.cancel(cancelled)
    waiting, partial = engine.add_request([5], params), engine.add_request(LONG, replace(params, max_new_tokens=99))
    engine.cancel(waiting)
    assert engine.num_waiting == 1
    rest = [engine.step()]
    engine.cancel(partial)  # while its prompt is being computed
    rest.append(drained(engine))
    assert {(t.request, t.completion) for output in rest for t in output.tokens} == {(pair, 0)}
    finished = {number: output for step in rest for number, output in step.finished.items()}
    assert list(finished) == [pair]
    whole, ended = finished[pair].completions
    assert whole.tokens == alone.completions[0].tokens
    assert (ended.tokens, ended.finish_reason) == (whole.tokens[:1], "stop")
    assert engine.num_free_blocks == engine.num_blocks


def check_draws(engine: BaseEngine) -> None:
    params = SamplingParams(max_new_tokens=16, temperature=1.5, top_k=3, top_logprobs=3, n=4)
    (output,) = engine.generate([[9, 8]], params)
    assert len({tuple(completion.tokens) for completion in output.completions}) > 1
    for completion in output.completions:
        for token, best in zip(completion.tokens, completion.top_logprobs, strict=True):
            assert token in best


def check_evictions(engine: BaseEngine) -> None:
    """Sequences that do not fit together take turns, and get the tokens that they get alone."""
    params = SamplingParams(max_new_tokens=10, stop_token_ids=frozenset([130, 129]))
    texts = [[9, 8] * 126, [4, 5, 6] * 84]  # of 252 tokens: each needs a second block while it is continued
    alone = [engine.generate([text], params)[0].completions[0] for text in texts]
    upstream = engine._engine  # type: ignore[attr-defined]
    before = upstream.evicted_request_count
    together = [output.completions[0] for output in engine.generate(texts, params)]
    assert upstream.evicted_request_count > before
    assert [completion.tokens for completion in together] == [completion.tokens for completion in alone]


def check_refusals(engine: BaseEngine) -> None:
    refused: dict[str, dict[str, Any]] = {
        "min_p": {"min_p": 0.1},
        "repetition_penalty": {"repetition_penalty": 1.1},
        "presence_penalty": {"presence_penalty": 0.5},
        "frequency_penalty": {"frequency_penalty": 0.5},
        "seed": {"seed": 3, "temperature": 1.0},
        "prompt_logprobs": {"prompt_logprobs": 0},
        "max_new_tokens=0": {"max_new_tokens": 0},
        "top_k": {"temperature": 1.0, "top_k": 2, "top_p": 0.5},
    }
    for name, values in refused.items():
        with pytest.raises(ConfigError) as caught:
            engine.add_request([1], SamplingParams(**values))
        assert name in caught.value.cause
        assert "backend.name=local" in caught.value.remedy
    with pytest.raises(ConfigError):
        engine.add_request([1], SamplingParams(max_new_tokens=engine.max_sequence_length))
    assert engine.is_idle
    engine.check([1], SamplingParams(seed=3))  # the most probable token is not drawn
    engine.check([1], SamplingParams(temperature=1.0, seed=engine.any_seed()))
    engine.check([1], SamplingParams(min_p=0.0, temperature=0.0, top_k=2, top_p=0.5))


def check_sizes(ranks: RankContext, chunks: list[Any]) -> None:
    engine = DynamicEngine(ranks, chunks, OPTIONS)
    with engine:
        context = engine._engine.context
        assert context.block_size_bytes == OPTIONS.block_size * bytes_per_token(ranks.cfg.model, "fp32")
        assert upstream_engine.allocator(engine._engine).total_count == OPTIONS.num_blocks + 1
        assert context.memory_buffer.nbytes == engine.cache_bytes
    named = {
        "engine.block_size": {"block_size": 16}, "engine.speculate": {"speculate": True},
        "engine.cache_format": {"cache_format": "int8"}, "engine.rotary_format": {"rotary_format": "fp32"},
    }  # fmt: skip
    for name, changes in named.items():
        with pytest.raises(ConfigError) as caught:
            DynamicEngine(ranks, chunks, replace(OPTIONS, **changes))  # type: ignore[arg-type]
        assert name in caught.value.cause
        assert name in caught.value.remedy


def test_requests_end_and_are_refused_as_they_should_be() -> None:
    run_distributed(requests, 1)


def ranks_of(degrees: dict[str, int], **changes: Any) -> RankContext:
    """Of a GPU, without one."""
    cfg = small_run.config(Path("unused"), degrees, **{**GQA, **changes})
    world = 1
    for degree in degrees.values():
        world *= degree
    parallel = {name: getattr(cfg.parallel, name) for name in ("tp", "pp", "vpp", "cp", "ep", "etp")}
    layout = ParallelLayout.resolve(**parallel, world_size=world)
    return RankContext(resolve(cfg, layout, runtime="cuda"), RankInfo(0, world, 0, world, "", 0, "local"), None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("degrees", "changes", "named"),
    [
        ({}, {"model__attention": "mla"}, "model.attention=mla"),
        ({"pp": 2}, {}, "pp=2"),
        ({"cp": 2}, {}, "cp=2"),
        ({"ep": 2}, {}, "dp=2"),
        ({}, {"precision__fp8": "block"}, "FP8"),
        ({}, {"model__capacity_factor": 1.0}, "model.capacity_factor"),
        ({}, {}, "flash-attn"),
    ],
)
def test_models_that_megatrons_engine_cannot_run_are_refused(
    degrees: dict[str, int], changes: dict[str, Any], named: str
) -> None:
    ranks = ranks_of(degrees, **changes)
    error = opening.unsupported(ranks)
    assert error is not None
    assert named in error.cause
    with pytest.raises(ConfigError) as caught:
        opening.open_engine(ranks, [], OPTIONS)
    assert caught.value.cause == error.cause


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"model__mtp_num_layers": 1}, "model.mtp_num_layers"), ({**SHAPES["yarn"], **SCALED}, "model.yarn_mscale")],
)
def test_some_models_need_a_newer_version(changes: dict[str, Any], named: str) -> None:
    error = opening.unsupported(ranks_of({}, **changes))
    assert error is not None
    assert (named in error.cause) is not upstream_engine.ONE_CONFIG


def test_sampling_parameters_in_megatrons_terms() -> None:
    greedy = upstream_params(SamplingParams(top_k=5, top_p=0.5), 100)
    assert (greedy.temperature, greedy.top_k, greedy.top_p, greedy.termination_id) == (1.0, 1, 0.0, -1)
    drawn = upstream_params(SamplingParams(temperature=0.5, top_p=0.5, stop_token_ids=frozenset([7, 4])), 100)
    assert (drawn.temperature, drawn.top_k, drawn.top_p, drawn.termination_id) == (0.5, 0, 0.5, 4)
    assert upstream_params(SamplingParams(temperature=1.0, top_k=100), 100).top_k == 0
    assert (greedy.return_log_probs, greedy.skip_prompt_log_probs) == (True, True)
