"""The server as the `openai` client sees it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import httpx
import pytest

from moe_train.inference.protocol import ScoredToken
from tests.tools.serving.server import Server
from tools.serving import responses
from tools.serving.schemas import ChatBody

if TYPE_CHECKING:
    import openai  # takes a second, of which only the process that runs these tests has use

PROMPT = "some text"


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    import openai

    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    import openai

    assert [model.id for model in client.models.list()] == ["test"]
    assert client.models.retrieve("test").id == "test"
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="other", prompt=PROMPT)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_completions(client: openai.OpenAI, server: Server) -> None:
    whole = client.completions.create(model="test", prompt=PROMPT, temperature=0, max_tokens=12)
    (choice,) = whole.choices
    assert (choice.finish_reason, whole.usage and whole.usage.completion_tokens) == ("length", 12)
    assert whole.usage is not None
    tokens = server.service.tokenizer.encode(PROMPT)
    assert whole.usage.prompt_tokens == len(tokens)
    by_ids = client.completions.create(model="test", prompt=[tokens, tokens], temperature=0, max_tokens=12)
    assert [one.text for one in by_ids.choices] == [choice.text] * 2
    stopped = client.completions.create(
        model="test", prompt=PROMPT, temperature=0, max_tokens=12, stop=choice.text[3:5]
    )
    assert stopped.choices[0].text == choice.text[: choice.text.index(choice.text[3:5])]
    assert stopped.choices[0].finish_reason == "stop"


def test_draws_are_those_of_the_seed(client: openai.OpenAI) -> None:
    def drawn(seed: int) -> list[str]:
        made = client.completions.create(model="test", prompt=PROMPT, n=2, seed=seed, top_p=0.9, max_tokens=8)
        return [one.text for one in made.choices]

    first, other = drawn(1), drawn(2)
    assert first == drawn(1)
    assert len({*first, *other}) == 4
    penalised = client.completions.create(
        model="test", prompt=PROMPT, temperature=0, frequency_penalty=2, presence_penalty=2, max_tokens=20
    )
    plain = client.completions.create(model="test", prompt=PROMPT, temperature=0, max_tokens=20)
    assert penalised.choices[0].text != plain.choices[0].text


def test_streams_add_up_to_the_whole_answer(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="test", prompt=PROMPT, temperature=0, max_tokens=12, logprobs=2)
    stream = client.completions.create(
        model="test", prompt=PROMPT, temperature=0, max_tokens=12, logprobs=2, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * 11 + ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None
    streamed = [lp for chunk in chunks[:-1] for lp in (chunk.choices[0].logprobs.token_logprobs or [])]  # type: ignore[union-attr]
    assert streamed == logprobs.token_logprobs
    assert [len(top) for top in logprobs.top_logprobs or []] == [2] * 12


def test_an_echoed_prompt_is_scored(client: openai.OpenAI, server: Server) -> None:
    scored = client.completions.create(model="test", prompt=PROMPT, max_tokens=0, echo=True, logprobs=0)
    logprobs = scored.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert scored.choices[0].text == PROMPT == "".join(logprobs.tokens or [])
    assert logprobs.token_logprobs[0] is None
    assert all(p is not None and p < 0 for p in logprobs.token_logprobs[1:])
    both = client.completions.create(model="test", prompt=PROMPT, max_tokens=3, echo=True, temperature=0)
    alone = client.completions.create(model="test", prompt=PROMPT, max_tokens=3, temperature=0)
    assert both.choices[0].text == PROMPT + alone.choices[0].text
    for prompts in (PROMPT, [PROMPT, "other"]):
        stream = client.completions.create(model="test", prompt=prompts, max_tokens=0, echo=True, stream=True)
        found = sorted((one.index, one.text, one.finish_reason) for chunk in stream for one in chunk.choices)
        texts = [prompts] if isinstance(prompts, str) else prompts
        assert found == [(index, text, "length") for index, text in enumerate(texts)]


def test_numbers_that_json_does_not_have(server: Server) -> None:
    tokenizer = server.service.tokenizer
    tokens = [ScoredToken(1, math.nan, {1: math.nan}), ScoredToken(2, -math.inf, {2: -math.inf})]
    chat = responses.chat_logprobs(tokenizer, tokens)
    assert [one["logprob"] for one in chat["content"]] == [None, -9999.0]
    assert [one["top_logprobs"][0]["logprob"] for one in chat["content"]] == [None, -9999.0]
    text = responses.completion_logprobs(tokenizer, [(t.token, t.logprob, t.top) for t in tokens], 0)
    assert text["token_logprobs"] == [None, -9999.0]
    assert [list(top.values()) for top in text["top_logprobs"]] == [[None], [-9999.0]]


def test_a_conversation_without_a_template_begins_as_a_prompt_does(
    client: openai.OpenAI, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = server.service
    monkeypatch.setitem(vars(service), "encode", lambda text: [7, *service.tokenizer.encode(text)])
    messages: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": PROMPT}]
    made = client.chat.completions.create(model="test", messages=messages, temperature=0, max_tokens=2)
    plain = client.completions.create(model="test", prompt=PROMPT, temperature=0, max_tokens=2)
    assert made.usage is not None
    assert made.usage == plain.usage
    assert made.usage.prompt_tokens == 1 + len(service.tokenizer.encode(PROMPT))


def test_the_template_gets_names_of_participants() -> None:
    body = {"messages": [{"role": "developer", "content": "a"}, {"role": "user", "content": "b", "name": "Ann"}]}
    assert [one.for_template() for one in ChatBody.model_validate(body).messages] == [
        {"role": "system", "content": "a"},
        {"role": "user", "content": "b", "name": "Ann"},
    ]


def test_chat(client: openai.OpenAI) -> None:
    messages: list[openai.types.chat.ChatCompletionMessageParam] = [
        {"role": "system", "content": "some "}, {"role": "user", "content": [{"type": "text", "text": "text"}]},
    ]  # fmt: skip
    made = client.chat.completions.create(
        model="test", messages=messages, temperature=0, max_completion_tokens=8, logprobs=True, top_logprobs=3
    )
    plain = client.completions.create(model="test", prompt=PROMPT, temperature=0, max_tokens=8)
    (choice,) = made.choices  # the model has no template: the text is continued
    assert choice.message.content == plain.choices[0].text
    assert choice.logprobs is not None
    content = choice.logprobs.content
    assert content is not None
    assert [len(token.top_logprobs) for token in content] == [3] * 8
    assert math.isclose(content[0].logprob, max(top.logprob for top in content[0].top_logprobs))
    stream = client.chat.completions.create(
        model="test", messages=messages, temperature=0, max_tokens=8, stream=True, n=2
    )
    texts = ["", ""]
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [choice.message.content] * 2


def test_the_state_of_the_server_can_be_watched(server: Server, client: openai.OpenAI) -> None:
    client.completions.create(model="test", prompt=PROMPT, max_tokens=2)
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    page = httpx.get(f"{server.url}/metrics").text
    assert 'moe_requests_total{path="/v1/completions",status="200"}' in page
    assert "moe_used_blocks 0.0" in page
    assert "moe_blocks 64.0" in page
