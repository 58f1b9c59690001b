"""Requests from another process to ranks that generate in lockstep."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.local.engine_ranks import EngineRanks, Event, Lost
from moe_train.config.composition.validate import validate
from moe_train.config.inference import EngineConfig
from moe_train.config.roots import InferenceRoot
from moe_train.inference import protocol, source
from moe_train.inference.text import TextStream
from parallel.errors import ConfigError

SETTINGS = EngineConfig(num_blocks=24, block_size=4, max_sequences=4)
Events = list[protocol.Update | protocol.Finished | protocol.Rejected | Lost]


def ranks_of(path: Path, tp: int = 1, settings: EngineConfig = SETTINGS) -> EngineRanks:
    root = InferenceRoot()
    root.parallel.tp = tp
    cfg = source.config_of(source.find(path), root, ["parallel.tp"])
    cfg.runtime = "cpu"
    return EngineRanks(cfg, validate(cfg), settings)


@pytest.fixture(scope="module")
def single(trained: Path) -> Iterator[EngineRanks]:
    with ranks_of(trained / "run") as ranks:
        ranks.wait()
        yield ranks


def tokenizer_of(trained: Path) -> Any:
    return source.load_tokenizer(source.config_of(source.find(trained / "run"), InferenceRoot(), []))


def collected(ranks: EngineRanks, prompt: list[int], stop: tuple[str, ...] = (), **params: Any) -> Events:
    """All events of a request."""
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    ranks.submit(prompt, params, stop, events.put)
    found: Events = [events.get(timeout=60)]
    while isinstance(found[-1], protocol.Update):
        found.append(events.get(timeout=60))
    return found


def text_of(events: Events, completion: int = 0) -> str:
    return "".join(e.text for e in events if isinstance(e, protocol.Update) and e.completion == completion)


def tokens_of(events: Events, completion: int = 0) -> list[int]:
    updates = [e for e in events if isinstance(e, protocol.Update) and e.completion == completion]
    return [token.token for update in updates for token in update.tokens]


def reasons(events: Events) -> list[str]:
    return [e.finish_reason for e in events if isinstance(e, protocol.Update) and e.finish_reason is not None]


def test_a_request_comes_token_by_token_and_frees_its_blocks(single: EngineRanks, trained: Path) -> None:
    events = collected(single, [5, 6, 7], max_new_tokens=12, top_logprobs=2, prompt_logprobs=1)
    assert [len(e.tokens) for e in events[:-1]] == [1] * 12  # type: ignore[union-attr]
    assert reasons(events) == ["length"]
    finished = events[-1]
    assert isinstance(finished, protocol.Finished)
    assert [len(scored.top) for scored in finished.prompt or []] == [1, 1]
    first = events[0]
    assert isinstance(first, protocol.Update)
    assert max(first.tokens[0].top.values()) == first.tokens[0].logprob
    stream = TextStream(tokenizer_of(trained), [5, 6, 7])
    assert text_of(events) == "".join(map(stream.push, tokens_of(events))) + stream.end()
    assert (single.load.used_blocks, single.load.running) == (0, 0)


def second_ranks() -> list[int]:
    """Process ids of running ranks 1."""
    return [process.pid or 0 for process in multiprocessing.active_children() if process.name == "rank 1"]


def test_two_ranks_in_lockstep_generate_what_one_does(single: EngineRanks, trained: Path) -> None:
    prompts = [[5, 6, 7], [9], [11, 12] * 4]
    wanted = [tokens_of(collected(single, prompt, max_new_tokens=10)) for prompt in prompts]
    with ranks_of(trained / "run", tp=2) as ranks:
        assert ranks.wait().layout == "tp=2"
        events: list[queue.SimpleQueue[Event]] = [queue.SimpleQueue() for _ in prompts]
        for prompt, own in zip(prompts, events, strict=True):
            ranks.submit(prompt, {"max_new_tokens": 10}, (), own.put)
        found: list[list[int]] = []
        for own in events:
            mine: Events = [own.get(timeout=60)]
            while isinstance(mine[-1], protocol.Update):
                mine.append(own.get(timeout=60))
            found.append(tokens_of(mine))
        assert found == wanted
        assert ranks.load.used_blocks == 0
    assert not second_ranks()


def test_a_stop_string_ends_a_continuation_and_no_token_follows(single: EngineRanks, trained: Path) -> None:
    whole = text_of(collected(single, [5, 6, 7], max_new_tokens=24))
    stop = whole[8:10]
    events = collected(single, [5, 6, 7], stop=(stop,), max_new_tokens=24)
    assert text_of(events) == whole[: whole.index(stop)]
    assert reasons(events) == ["stop"]
    assert len(tokens_of(events)) < 24
    collected(single, [1], max_new_tokens=1)
    assert single.load.used_blocks == 0


def test_every_completion_of_a_prompt_ends_by_itself(single: EngineRanks) -> None:
    events = collected(single, [5, 6, 7], n=3, temperature=1.0, seed=4, max_new_tokens=6)
    assert reasons(events) == ["length"] * 3
    assert len({text_of(events, k) for k in range(3)}) == 3


def test_a_request_that_cannot_be_is_rejected_and_others_go_on(single: EngineRanks) -> None:
    for prompt, params, cause in (
        ([5] * 95, {"max_new_tokens": 20}, "exceed 96 tokens"),
        ([10**6], {}, "outside of the vocabulary"),
        ([5], {"temperature": -1.0}, "temperature=-1.0"),
        ([], {}, "has no token"),
    ):
        (event,) = collected(single, prompt, **params)
        assert isinstance(event, protocol.Rejected)
        assert cause in event.cause
    assert reasons(collected(single, [5], max_new_tokens=2)) == ["length"]


def test_thousands_of_requests_can_be_submitted_while_the_ranks_report(single: EngineRanks) -> None:
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    for number in range(3000):
        single.submit([5] if number % 300 == 0 else [], {"max_new_tokens": 1}, (), events.put)
    found = [events.get(timeout=60) for _ in range(3000 + 10)]
    assert sum(isinstance(event, protocol.Rejected) for event in found) == 2990
    assert sum(isinstance(event, protocol.Finished) for event in found) == 10


def test_cancelled_requests_free_their_blocks(single: EngineRanks) -> None:
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    numbers = [single.submit([5] * 10, {"max_new_tokens": 80}, (), events.put) for _ in range(6)]
    events.get(timeout=60)
    for number in [*numbers, 12345]:
        single.cancel(number)
    assert reasons(collected(single, [5], max_new_tokens=2)) == ["length"]
    assert (single.load.used_blocks, single.load.waiting) == (0, 0)


def test_the_death_of_a_rank_ends_all_and_is_told_to_every_request(trained: Path) -> None:
    with ranks_of(trained / "run", tp=2) as ranks:
        ranks.wait()
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        ranks.submit([5], {"max_new_tokens": 90}, (), events.put)
        events.get(timeout=60)
        (second,) = second_ranks()
        os.kill(second, signal.SIGKILL)
        event: Event = events.get(timeout=60)
        while isinstance(event, protocol.Update):
            event = events.get(timeout=60)
        assert isinstance(event, Lost)
        assert "rank 1 was killed by SIGKILL" in str(event.error)
        assert not ranks.is_alive
        (late,) = collected(ranks, [5])
        assert isinstance(late, Lost)


def test_a_model_that_cannot_be_loaded_is_an_error_of_wait(trained: Path) -> None:
    root = InferenceRoot()
    cfg = source.config_of(source.find(trained / "run"), root, [])
    cfg.runtime, cfg.model.capacity_factor = "cpu", 1.0
    with (
        EngineRanks(cfg, validate(cfg), SETTINGS) as ranks,
        pytest.raises(Exception, match="capacity_factor") as caught,
    ):
        ranks.wait()
    assert getattr(caught.value, "exit_code", None) == ConfigError.exit_code
