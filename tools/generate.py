"""`moe-generate`: continue prompts with a trained model.

    moe-generate runs/NAME "Once upon a time" sampling.temperature=0.8
    moe-generate runs/NAME < prompt.txt
    moe-generate runs/NAME generate.input=in.jsonl generate.output=out.jsonl
    moe-generate hf-directory "Text" parallel.tp=2 engine.cache_format=fp8

The model is a run (its newest checkpoint), a Megatron checkpoint or a Hugging Face directory; it is short for source=,
the prompt for generate.prompt=. The text of one prompt appears token by token. JSON lines have `prompt`, and where
they differ from the command line sampling parameters: max_new_tokens, temperature, top_k, top_p, min_p,
repetition_penalty, presence_penalty, frequency_penalty, seed, n, stop, logprobs.
"""

from __future__ import annotations

import json
import queue
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from launch.local.engine_ranks import EngineRanks, Event, Lost
from moe_train.config.inference import SamplingConfig
from moe_train.config.roots import GenerateRoot
from moe_train.files import atomic, untrusted
from moe_train.inference import protocol
from moe_train.inference.sampling_params import SamplingParams
from parallel.errors import ConfigError, DataError
from tools import terminal, trained_model
from tools.prompts import Prompt, read_lines

_COMMON = (
    *trained_model.COMMON, "sampling.max_new_tokens", "sampling.temperature", "sampling.top_p", "sampling.stop",
    "generate.input", "generate.output", "generate.n", "generate.logprobs",
)  # fmt: skip
_LARGEST_INPUT_BYTES = 1 << 30


def main() -> NoReturn:
    """Console script."""
    trained_model.main(
        run,
        GenerateRoot,
        about=__doc__,
        common=_COMMON,
        argv=lambda line: line.argv("source", "generate.prompt"),
        answers=True,
    )


def run(cfg: GenerateRoot, words: Sequence[str]) -> None:
    """Generate and print, or write the output file.

    Args:
        words: overrides of the command line.

    Raises:
        MoeTrainError: with a cause and a remedy; no output file was written.
    """
    model = trained_model.find(cfg, words, "moe-generate")
    if cfg.generate.output is not None:
        _check_output(Path(cfg.generate.output))
    prompts, is_lines = _prompts(cfg)
    requests = [_request(index, prompt, cfg, model) for index, prompt in enumerate(prompts)]
    longest = max(len(request.tokens) + request.params.max_new_tokens for request in requests)
    sequences = min(cfg.engine.max_sequences, sum(request.params.n for request in requests))
    with model.ranks(replace(cfg.engine, max_sequences=sequences), longest) as ranks:
        ranks.wait()
        only = requests[0]
        if not is_lines and cfg.generate.output is None and cfg.generate.logprobs is None and only.params.n == 1:
            _stream(ranks, only)
            return
        _generate_all(ranks, requests, cfg.generate.output)


@dataclass
class _PromptRequest:
    """A prompt, and what has been generated for it."""

    index: int
    prompt: Prompt
    tokens: list[int]
    params: SamplingParams
    stop: list[str]
    logprobs: bool
    updates: list[protocol.Update] = field(default_factory=list)
    is_finished: bool = False

    def submit(self, ranks: EngineRanks, deliver: Callable[[Event], None]) -> None:
        """Queue it."""
        ranks.submit(self.tokens, dict(vars(self.params)), self.stop, deliver)

    def results(self) -> list[dict[str, Any]]:
        """What is written of it: an object for each completion."""
        found = []
        for completion in range(self.params.n):
            own = [update for update in self.updates if update.completion == completion]
            tokens = [token for update in own for token in update.tokens]
            result: dict[str, Any] = {
                "index": self.index,
                **({} if self.prompt.identifier is None else {"id": self.prompt.identifier}),
                "prompt": self.prompt.text,
                "completion": completion,
                "text": "".join(update.text for update in own),
                "tokens": [token.token for token in tokens],
                "finish_reason": own[-1].finish_reason if own else "length",
            }
            if self.logprobs:
                result["logprobs"] = [protocol.json_logprob(token.logprob) for token in tokens]
                if self.params.top_logprobs:
                    result["top_logprobs"] = [
                        {str(t): protocol.json_logprob(p) for t, p in token.top.items()} for token in tokens
                    ]
            found.append(result)
        return found


def _check_output(path: Path) -> None:
    if path.is_dir() or not path.parent.is_dir():
        what = "is a directory" if path.is_dir() else f"cannot be written: {path.parent} does not exist"
        raise ConfigError(f"generate.output={path} {what}", "name a file in a directory that exists")


def _prompts(cfg: GenerateRoot) -> tuple[list[Prompt], bool]:
    """The prompts, and whether they are JSON lines."""
    given, path = cfg.generate.prompt, cfg.generate.input
    if given is not None and path is not None:
        raise ConfigError(f"generate.prompt and generate.input={path} are both set", "leave one of them out")
    if given is not None:
        return [Prompt(given)], False
    if path is None and sys.stdin.isatty():
        raise ConfigError(
            "generate.prompt is missing", 'use moe-generate RUN "text", generate.input=FILE, or a pipe to stdin'
        )
    name = path if path is not None and path != "-" else "standard input"
    text = _text(path)
    is_lines = cfg.generate.format == "jsonl" or (cfg.generate.format is None and name.endswith(".jsonl"))
    if is_lines:
        return read_lines(text, name), True
    return [Prompt(text.removesuffix("\n"))], False


def _text(path: str | None) -> str:
    try:
        content = sys.stdin.buffer.read() if path in (None, "-") else untrusted.read_bytes(
            Path(str(path)), _LARGEST_INPUT_BYTES
        )  # fmt: skip
        return content.decode()
    except (OSError, ValueError) as error:
        where = "standard input" if path in (None, "-") else f"generate.input={path}"
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DataError(f"{where} cannot be read: {why}", "name a file of UTF-8 text or JSON lines") from error


def params_of(
    sampling: SamplingConfig, stop_token_ids: frozenset[int], changes: dict[str, Any], **more: Any
) -> tuple[SamplingParams, list[str]]:
    """Sampling parameters and stop strings of a command, with the changes of a request.

    Raises:
        ConfigError: a value is outside of its range.
    """
    values = {name: value for name, value in vars(sampling).items() if name not in ("stop", "ignore_eod")}
    values |= {"stop_token_ids": frozenset() if sampling.ignore_eod else stop_token_ids} | more
    stop = list(changes.get("stop", sampling.stop))
    values |= {name: value for name, value in changes.items() if name != "stop"}
    if "" in stop:
        raise ConfigError("sampling.stop has an empty string", "leave it out")
    return SamplingParams(**values), stop


def _request(index: int, prompt: Prompt, cfg: GenerateRoot, model: trained_model.TrainedModel) -> _PromptRequest:
    changes = dict(prompt.changes)
    logprobs = changes.pop("logprobs", cfg.generate.logprobs)
    try:
        params, stop = params_of(
            cfg.sampling,
            model.stop_token_ids,
            changes,
            **{"n": cfg.generate.n, "top_logprobs": logprobs or 0} | changes,
        )
        tokens = model.encode(prompt.text)
        longest = model.cfg.model.max_position_embeddings
        if len(tokens) + params.max_new_tokens > longest:
            room = longest - len(tokens)
            raise ConfigError(
                f"its {len(tokens)} tokens and max_new_tokens={params.max_new_tokens} exceed "
                f"model.max_position_embeddings={longest}",
                f"set sampling.max_new_tokens={room} or less" if room > 0 else "shorten it",
            )
    except ConfigError as error:
        raise ConfigError(f"prompt {index}: {error.cause}", error.remedy) from error
    return _PromptRequest(index, prompt, tokens, params, stop, logprobs is not None)


def _raise(event: Event, request: _PromptRequest) -> None:
    """Raise what an event says that is an error."""
    if isinstance(event, Lost):
        raise event.error
    if isinstance(event, protocol.Rejected):
        raise ConfigError(f"prompt {request.index}: {event.cause}", event.remedy)


def _stream(ranks: EngineRanks, request: _PromptRequest) -> None:
    """Print the text of a request as it comes."""
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    request.submit(ranks, events.put)
    on_terminal = sys.stdout.isatty()
    while True:
        event = events.get()
        _raise(event, request)
        if isinstance(event, protocol.Finished):
            print(flush=True)
            return
        if isinstance(event, protocol.Update):
            print(terminal.printable(event.text) if on_terminal else event.text, end="", flush=True)


def _generate_all(ranks: EngineRanks, requests: list[_PromptRequest], output: str | None) -> None:
    """All requests at a time; results in the order of the requests, printed as they come or written at the end."""
    events: queue.SimpleQueue[tuple[_PromptRequest, Event]] = queue.SimpleQueue()
    for request in requests:
        request.submit(ranks, lambda event, own=request: events.put((own, event)))  # type: ignore[misc]
    lines: list[str] = []
    printed = 0
    with _bar(len(requests)) as advance:
        for _ in requests:
            _wait_for_one(events)
            advance()
            while printed < len(requests) and requests[printed].is_finished:
                own = [json.dumps(result, ensure_ascii=False) for result in requests[printed].results()]
                requests[printed].updates.clear()
                printed += 1
                if output is None:
                    print("\n".join(own), flush=True)
                else:
                    lines += own
    if output is not None:
        try:
            atomic.write_text(Path(output), "\n".join(lines) + "\n", durable=True)
        except OSError as error:
            raise DataError(f"generate.output={output} cannot be written: {error.strerror}", "name another") from error
        print(f"{output}: {len(lines)} continuations", file=sys.stderr)


def _wait_for_one(events: queue.SimpleQueue[tuple[_PromptRequest, Event]]) -> None:
    """Collect events until one more request has finished."""
    while True:
        request, event = events.get()
        _raise(event, request)
        if isinstance(event, protocol.Update):
            request.updates.append(event)
        else:
            request.is_finished = True
            return


class _bar:
    """A progress bar on a terminal; elsewhere nothing."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._progress: Any = None

    def __enter__(self) -> Callable[[], None]:
        if not sys.stderr.isatty():
            return lambda: None
        from rich.console import Console
        from rich.progress import Progress

        self._progress = Progress(console=Console(stderr=True), transient=True)
        self._progress.start()
        task = self._progress.add_task("generating", total=self._total)
        return lambda: self._progress.advance(task)

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()


if __name__ == "__main__":
    main()
