"""The HTTP application: OpenAI's completion interface, /health and /metrics."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from launch.local.engine_ranks import EngineRanks
from moe_train.config.inference import ServeConfig
from moe_train.data.tokenizer import Tokenizer
from moe_train.inference import protocol
from moe_train.inference.chat_template import ChatTemplate
from moe_train.inference.sampling_params import SamplingParams
from parallel.errors import ConfigError
from tools.serving import errors, responses
from tools.serving.errors import RequestError
from tools.serving.limits import Receive, Scope, Send
from tools.serving.metrics import Metrics
from tools.serving.requests import Admission, Generation
from tools.serving.responses import GrowingText, Json
from tools.serving.schemas import ChatBody, CompletionBody, SamplingBody

_MOST_CONTINUATIONS = 128
"""Of one request: prompts times `n`."""
_DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's


@dataclass(frozen=True)
class Service:
    """What the routes answer with.

    Args:
        encode: tokens of a prompt's text.
        stop_token_ids: tokens that end a text.
    """

    name: str
    ranks: EngineRanks
    facts: protocol.Ready
    tokenizer: Tokenizer
    encode: Callable[[str], list[int]]
    stop_token_ids: frozenset[int]
    template: ChatTemplate
    limits: ServeConfig
    admission: Admission
    metrics: Metrics

    @property
    def longest_prompt(self) -> int:
        """Tokens, at most."""
        longest = self.facts.max_sequence_length - 1
        return min(longest, self.limits.max_prompt_tokens or longest)

    def generation(self) -> Generation:
        """One request to the engine."""
        return Generation(self.ranks, self.limits, self.admission, self.metrics)

    def check_model(self, name: str | None) -> None:
        """Raise RequestError where a request names another model."""
        if name is not None and name != self.name:
            message = f"the model {name!r} does not exist; this server has {self.name!r}"
            raise RequestError(404, message, "model", "model_not_found")

    def check_prompt(self, tokens: Sequence[int], param: str) -> None:
        """Raise RequestError where a prompt is too long."""
        if len(tokens) > self.longest_prompt:
            raise RequestError(
                400, f"{param} has {len(tokens)} tokens, and at most {self.longest_prompt} are allowed", param,
                "context_length_exceeded",
            )  # fmt: skip

    def new_tokens(self, asked: int | None, longest_prompt: int, default: int | None, param: str) -> int:
        """Tokens to generate after prompts of up to `longest_prompt` tokens."""
        room = self.facts.max_sequence_length - longest_prompt
        if asked is None:
            return min(room, self.limits.max_new_tokens, default if default is not None else room)
        if asked > self.limits.max_new_tokens:
            raise RequestError(400, f"{param}={asked} exceeds serve.max_new_tokens={self.limits.max_new_tokens}", param)
        if asked > room:
            raise RequestError(
                400, f"a prompt of {longest_prompt} tokens and {param}={asked} exceed the model's "
                f"{self.facts.max_sequence_length} tokens", param, "context_length_exceeded",
            )  # fmt: skip
        return asked

    def params(self, body: SamplingBody, new_tokens: int, top_logprobs: int) -> dict[str, Any]:
        """Values of `SamplingParams`. What the request leaves out has OpenAI's default."""
        values: dict[str, Any] = {
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "top_k": max(0, body.top_k or 0),
            "min_p": body.min_p or 0.0,
            "presence_penalty": body.presence_penalty or 0.0,
            "frequency_penalty": body.frequency_penalty or 0.0,
            "repetition_penalty": 1.0 if body.repetition_penalty is None else body.repetition_penalty,
            "seed": body.seed,
            "n": body.n or 1,
            "max_new_tokens": new_tokens,
            "top_logprobs": top_logprobs,
            "stop_token_ids": frozenset() if body.ignore_eos else self.stop_token_ids,
        }
        if body.stream_options is not None and not body.stream:
            raise RequestError(400, "stream_options is only for stream=true", "stream_options")
        if isinstance(body.stop, list) and len(body.stop) > len(body.stops):
            raise RequestError(400, f"stop has more than {len(body.stops)} strings", "stop")
        try:
            SamplingParams(**values)  # the engine does so too, but then a stream has begun
        except ConfigError as error:
            raise RequestError(400, str(error)) from error
        return values


def build(service: Service) -> FastAPI:
    """The application."""
    app = FastAPI(title="moe-serve", docs_url=None, redoc_url=None)
    errors.install(app)

    @app.get("/health")
    async def health() -> Response:
        if service.admission.draining or not service.ranks.is_alive:
            return JSONResponse({"status": "shutting down" if service.ranks.is_alive else "failed"}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.page(), media_type="text/plain; version=0.0.4")

    model = {"id": service.name, "object": "model", "created": int(time.time()), "owned_by": "moe-train",
             "max_model_len": service.facts.max_sequence_length}  # fmt: skip

    @app.get("/v1/models")
    async def models() -> Json:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name}")
    async def one_model(name: str) -> Json:
        service.check_model(name)
        return model

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        return await _Completion(service, body).respond(request)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        return await _Chat(service, body).respond(request)

    return app


class _Answer(ABC):
    """A request that generates: what both kinds have in common."""

    object_name = ""
    chunk_name = ""
    prefix = ""

    def __init__(self, service: Service, body: Any, prompts: list[list[int]], params: dict[str, Any]) -> None:
        self.service, self.body, self.prompts, self.params = service, body, prompts, params
        self.prompt_tokens = sum(map(len, prompts))
        self.common = {"id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time()),
                       "model": service.name}  # fmt: skip
        total = len(prompts) * params["n"]
        if total > _MOST_CONTINUATIONS:
            raise RequestError(400, f"the request asks for {total} continuations, at most {_MOST_CONTINUATIONS}", "n")

    @abstractmethod
    def choice(self, index: int, one: GrowingText, prompt_scores: list[protocol.ScoredToken] | None) -> Json:
        """A finished continuation."""

    @abstractmethod
    def chunk(self, index: int, update: protocol.Update, is_first: bool, before: int) -> Json:
        """The choice of a streamed chunk. `before`: characters of the continuation so far."""

    async def respond(self, request: Request) -> Response:
        """The answer, whole or as a stream. It is cancelled when the client is gone."""
        if self.body.stream:
            await self._fail_early()
            return EventStream(self._stream(), self.service.limits.timeout_s)
        work = asyncio.ensure_future(self._whole())
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({work, gone}, timeout=self.service.limits.timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return JSONResponse(work.result())
            if gone.done():
                return Response(status_code=499)  # nobody reads it
            raise RequestError(504, f"the request took longer than serve.timeout_s={self.service.limits.timeout_s:g}")
        finally:
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)

    async def _fail_early(self) -> None:
        """A stream begins with status 200: what can be refused is refused before."""
        admission, limits = self.service.admission, self.service.limits
        if not self.service.ranks.is_alive:
            raise RequestError(503, "the model is not running any more")
        if admission.draining or (admission.active >= limits.max_concurrent and admission.queued >= limits.max_queued):
            async with admission.slot():
                return

    async def _whole(self) -> Json:
        n = self.params["n"]
        found = [[GrowingText() for _ in range(n)] for _ in self.prompts]
        scores: list[list[protocol.ScoredToken] | None] = [None] * len(self.prompts)
        async with self.service.generation() as generation:
            generation.submit(self.prompts, self.params, self.body.stops)
            async for position, event in generation.events():
                if isinstance(event, protocol.Update):
                    found[position][event.completion].add(event)
                else:
                    scores[position] = event.prompt
            count = generation.completion_tokens
        choices = [
            self.choice(position * n + k, one, scores[position])
            for position, group in enumerate(found)
            for k, one in enumerate(group)
        ]
        tokens = responses.usage(self.prompt_tokens, count)
        return {**self.common, "object": self.object_name, "choices": choices, "usage": tokens}

    async def _stream(self) -> AsyncGenerator[Json, None]:
        n = self.params["n"]
        lengths: dict[int, int] = {}
        with_usage = self.body.stream_options is not None and self.body.stream_options.include_usage
        extra: Json = {"usage": None} if with_usage else {}
        head = {**self.common, "object": self.chunk_name}
        async with self.service.generation() as generation:
            generation.submit(self.prompts, self.params, self.body.stops)
            async for position, event in generation.events():
                if not isinstance(event, protocol.Update):
                    if self.params["max_new_tokens"]:
                        continue
                    # Without new tokens there was no update. The echoed prompt is the whole answer.
                    event = protocol.Update(event.number, 0, finish_reason="length")
                index = position * n + event.completion
                choice = self.chunk(index, event, index not in lengths, lengths.get(index, 0))
                lengths[index] = lengths.get(index, 0) + len(event.text)
                yield {**head, "choices": [choice], **extra}
            count = generation.completion_tokens
        if with_usage:
            yield {**head, "choices": [], "usage": responses.usage(self.prompt_tokens, count)}


class _Completion(_Answer):
    """/v1/completions."""

    object_name = chunk_name = "text_completion"
    prefix = "cmpl"

    def __init__(self, service: Service, body: CompletionBody) -> None:
        service.check_model(body.model)
        self.echo = bool(body.echo)
        prompts = _prompts(service, body.prompt)
        for prompt in prompts:
            service.check_prompt(prompt, "prompt")
        longest = max(map(len, prompts))
        new = service.new_tokens(body.max_tokens, longest, _DEFAULT_COMPLETION_TOKENS, "max_tokens")
        if new == 0 and not self.echo:
            raise RequestError(400, "max_tokens=0 needs echo=true", "max_tokens")
        if body.best_of is not None and body.best_of != (body.n or 1):
            raise RequestError(400, "best_of has to be n: other continuations are not ranked", "best_of")
        if self.echo and body.stream and body.logprobs is not None:
            raise RequestError(400, "echo with logprobs is only for stream=false", "echo")
        if new == 0 and (body.n or 1) > 1:
            raise RequestError(400, "max_tokens=0 needs n=1", "n")
        params = service.params(body, new, body.logprobs or 0)
        if self.echo and body.logprobs is not None:
            params["prompt_logprobs"] = body.logprobs
        super().__init__(service, body, prompts, params)

    def _prompt_of(self, index: int) -> list[int]:
        return self.prompts[index // self.params["n"]]

    def _echoed(self, index: int) -> str:
        """The text of a prompt."""
        given = self.body.prompt
        if isinstance(given, str):
            return given
        own = given[index // self.params["n"]] if given and not isinstance(given[0], int) else given
        return own if isinstance(own, str) else self.service.tokenizer.decode(list(own))

    def choice(self, index: int, one: GrowingText, prompt_scores: list[protocol.ScoredToken] | None) -> Json:
        text, logprobs, offset = one.text, None, 0
        tokens: list[tuple[int, float | None, dict[int, float]]] = [(t.token, t.logprob, t.top) for t in one.tokens]
        if self.echo:
            text = self._echoed(index) + text
            if prompt_scores is not None:
                prompt = self._prompt_of(index)
                scored = [(t, s.logprob, s.top) for t, s in zip(prompt[1:], prompt_scores, strict=True)]
                tokens = [(prompt[0], None, {}), *scored, *tokens]
            else:
                offset = len(self._echoed(index))
        if self.body.logprobs is not None:
            logprobs = responses.completion_logprobs(self.service.tokenizer, tokens, offset)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": one.finish_reason or "length"}

    def chunk(self, index: int, update: protocol.Update, is_first: bool, before: int) -> Json:
        text = self._echoed(index) + update.text if is_first and self.echo else update.text
        logprobs = None
        if self.body.logprobs is not None:
            tokens = [(t.token, t.logprob, t.top) for t in update.tokens]
            logprobs = responses.completion_logprobs(self.service.tokenizer, tokens, before)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": update.finish_reason}


class _Chat(_Answer):
    """/v1/chat/completions."""

    object_name, chunk_name, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, service: Service, body: ChatBody) -> None:
        service.check_model(body.model)
        try:
            prompt = service.template.encode([one.for_template() for one in body.messages], service.encode)
        except ConfigError as error:
            raise RequestError(400, str(error), "messages") from error
        prompt = prompt or service.encode("")
        service.check_prompt(prompt, "messages")
        if body.top_logprobs is not None and not body.logprobs:
            raise RequestError(400, "top_logprobs needs logprobs=true", "top_logprobs")
        asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        new = service.new_tokens(asked, len(prompt), None, name)
        super().__init__(service, body, [prompt], service.params(body, new, body.top_logprobs or 0))

    def choice(self, index: int, one: GrowingText, prompt_scores: list[protocol.ScoredToken] | None) -> Json:
        message = {"role": "assistant", "content": one.text, "refusal": None}
        return {"index": index, "message": message, "logprobs": self._logprobs(one.tokens),
                "finish_reason": one.finish_reason or "length"}  # fmt: skip

    def chunk(self, index: int, update: protocol.Update, is_first: bool, before: int) -> Json:
        delta: Json = {"role": "assistant", "content": update.text} if is_first else {"content": update.text}
        return {"index": index, "delta": delta, "logprobs": self._logprobs(update.tokens),
                "finish_reason": update.finish_reason}  # fmt: skip

    def _logprobs(self, tokens: list[protocol.ScoredToken]) -> Json | None:
        return responses.chat_logprobs(self.service.tokenizer, tokens) if self.body.logprobs else None


def _prompts(service: Service, given: str | list[str] | list[int] | list[list[int]]) -> list[list[int]]:
    """Token ids of each prompt of a completion."""
    if isinstance(given, str):
        return [service.encode(given)]
    if not given:
        raise RequestError(400, "prompt is empty", "prompt")
    if len(given) > _MOST_CONTINUATIONS and not isinstance(given[0], int):
        raise RequestError(400, f"prompt has {len(given)} texts, at most {_MOST_CONTINUATIONS}", "prompt")
    groups: list[Any] = [given] if isinstance(given[0], int) else list(given)
    prompts = [service.encode(group) if isinstance(group, str) else list(group) for group in groups]
    if not all(prompts):
        raise RequestError(400, "prompt has an empty list of tokens", "prompt")
    return prompts


async def _disconnected(request: Request) -> None:
    """Return when the client is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events. The generator is closed when the client is gone, reads too slowly, or time is up."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[Json, None], timeout_s: float) -> None:
        super().__init__()
        self._events, self._timeout_s = events, timeout_s
        self.headers["cache-control"] = "no-cache"
        del self.headers["content-length"]  # of an empty body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all events."""

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        writing, watching = asyncio.ensure_future(self._write(send)), asyncio.ensure_future(watch())
        try:
            await asyncio.wait({writing, watching}, timeout=self._timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()
        finally:
            for task in (writing, watching):
                task.cancel()
            await asyncio.gather(writing, watching, return_exceptions=True)

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with contextlib.aclosing(self._events) as events:
            try:
                async for event in events:
                    await send(_data(json.dumps(event, ensure_ascii=False)))
                await send(_data("[DONE]"))
            except RequestError as error:
                await send(_data(json.dumps(error.body)))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _data(text: str) -> Json:
    return {"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": True}
