"""Tasks of lm-evaluation-harness on ranks that generate: its model interface, and one evaluation."""

from __future__ import annotations

import contextlib
import difflib
import logging
import queue
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from rich.console import Console
from rich.progress import Progress

from launch.local.engine_ranks import EngineRanks, Event, Lost
from moe_train.config.evaluate import EvaluateConfig
from moe_train.config.inference import EngineConfig
from moe_train.inference import protocol
from parallel.errors import ConfigError
from tools.trained_model import TrainedModel

_MAX_NEW_TOKENS = 256
"""Where a task does not say it, as in the package's own backends."""
_BOOTSTRAP = 1_000


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task."""

    task: str
    metric: str
    value: float
    stderr: float | None
    samples: int


class TrainedLM(TemplateLM):
    """A trained model as lm-evaluation-harness sees it.

    Args:
        ranks: that have loaded the model.
        max_length: tokens that the model reads at most, to predict one more.
    """

    def __init__(self, model: TrainedModel, ranks: EngineRanks, max_length: int) -> None:
        super().__init__()
        self._model, self._ranks = model, ranks
        self._begins = model.cfg.data.prepend_bos or model.tokenizer.special.adds_bos
        self.max_length = max_length

    @property
    def eot_token_id(self) -> int:
        """Ends a text."""
        return self._model.tokenizer.eod

    @property
    def prefix_token_id(self) -> int:
        """Comes before a text without context."""
        bos = self._model.tokenizer.bos
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids. None begins the text as texts of training begin, unless it spells that token itself."""
        tokenizer = self._model.tokenizer
        spelled = tokenizer.bos_token is not None and string.startswith(tokenizer.bos_token)
        begins = self._begins and not spelled if add_special_tokens is None else add_special_tokens
        first = [tokenizer.bos] if begins and tokenizer.bos is not None else []
        return [*first, *tokenizer.encode(string)]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability of each continuation after its context, and whether it is the most probable one."""
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)  # `_all` has a bar
        return answers

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation after its context, and whether each token is the most probable one."""
        prompts = [(context + continuation)[-(self.max_length + 1) :] for _key, context, continuation in requests]
        params = {"max_new_tokens": 0, "prompt_logprobs": 1}
        results = self._all([(prompt, params, ()) for prompt in prompts], "scoring", disable_tqdm)
        answers = []
        for (key, _context, continuation), prompt, result in zip(requests, prompts, results, strict=True):
            count = min(len(continuation), len(prompt) - 1)
            scored, tokens = result.prompt[len(result.prompt) - count :], prompt[len(prompt) - count :]
            best = [max(token.top, key=lambda other, top=token.top: top[other]) for token in scored]  # type: ignore[misc]
            answer = (sum(token.logprob for token in scored), best == tokens)
            answers.append(answer)
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text, whose tokens are scored once, in windows."""
        windows: list[tuple[Any, list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            (text,) = request.args
            rolling = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=self.max_length,
                context_len=1,
            )  # fmt: skip
            own = [(None, *utils.make_disjoint_window(window)) for window in rolling]
            windows += own
            owners += [number] * len(own)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context, up to one of its stop strings."""
        asked = []
        for request in requests:
            context, given = request.args
            options = normalize_gen_kwargs(given, _MAX_NEW_TOKENS)
            count = int(options["max_gen_toks"])
            room = self.max_length - count
            if room < 1:
                raise ConfigError(
                    f"a task generates {count} tokens, and sequences have {self.max_length}",
                    "use a task with a smaller max_gen_toks",
                )
            params = {
                "max_new_tokens": count,
                "temperature": float(options.get("temperature") or 0.0),
                "top_p": float(options.get("top_p") or 1.0),
                "top_k": int(options.get("top_k") or 0),
                "stop_token_ids": self._model.stop_token_ids,
            }
            tokens = self.tok_encode(context)[-room:] or [self.prefix_token_id]
            asked.append((tokens, params, tuple(text for text in options["until"] if text)))
        texts = [result.text for result in self._all(asked, "generating", disable_tqdm)]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _all(self, asked: Sequence[_HarnessRequest], what: str, quiet: bool) -> list[_RequestResult]:
        """The results of all requests, in order. Prompts with a common beginning share its cache."""
        events: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
        results = [_RequestResult() for _ in asked]
        for number, (prompt, params, stop) in enumerate(asked):
            self._ranks.submit(prompt, params, stop, partial(_put, events, number))
        left = len(asked)
        with _bar(what, left, quiet) as advance:
            while left:
                number, event = events.get()
                if isinstance(event, Lost):
                    raise event.error
                if isinstance(event, protocol.Rejected):
                    raise ConfigError(event.cause, event.remedy)
                if isinstance(event, protocol.Update):
                    results[number].text += event.text
                else:
                    results[number].prompt = event.prompt or []
                    left -= 1
                    advance()
        return results


_HarnessRequest = tuple[list[int], dict[str, Any], tuple[str, ...]]
"""Prompt, values of `SamplingParams`, stop strings."""


@dataclass
class _RequestResult:
    """What a request has brought: text, and the scores of the prompt's tokens but the first."""

    text: str = ""
    prompt: list[protocol.ScoredToken] = field(default_factory=list)


def _put(events: queue.SimpleQueue[tuple[int, Event]], number: int, event: Event) -> None:
    events.put((number, event))


@contextlib.contextmanager
def _bar(what: str, total: int, quiet: bool) -> Iterator[Callable[[], None]]:
    """What to call for each request that is done: a bar where standard error is a terminal."""
    if quiet or not sys.stderr.isatty():
        yield lambda: None
        return
    with Progress(console=Console(stderr=True), transient=True) as progress:
        row = progress.add_task(what, total=total)
        yield lambda: progress.advance(row)


def scores(model: TrainedModel, engine: EngineConfig, asked: EvaluateConfig) -> list[TaskScore]:
    """Evaluate `asked.tasks`.

    Raises:
        ConfigError: a task does not exist.
        DataError: the data of a task cannot be read.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every default that a task takes
    tasks = _task_manager(asked)
    with model.ranks(engine) as ranks:
        ready = ranks.wait()
        longest = ready.max_sequence_length - 1
        language_model = TrainedLM(model, ranks, min(asked.seq_length or longest, longest))
        found = lm_eval.simple_evaluate(
            model=language_model, tasks=list(asked.tasks), num_fewshot=asked.num_fewshot, limit=asked.limit,
            bootstrap_iters=_BOOTSTRAP, task_manager=tasks, log_samples=False,
        )  # fmt: skip
    return task_scores(found)


def task_scores(found: Mapping[str, Any]) -> list[TaskScore]:
    """The metrics in the package's results."""
    result = []
    for task, metrics in found["results"].items():
        samples = found.get("n-samples", {}).get(task, {}).get("effective", 0)
        for key, value in metrics.items():
            metric, _, kind = key.partition(",")
            if not isinstance(value, int | float) or isinstance(value, bool) or metric.endswith("_stderr") or not kind:
                continue
            error = metrics.get(f"{metric}_stderr,{kind}")
            name = metric if kind == "none" else key
            result.append(TaskScore(task, name, float(value), error if isinstance(error, float) else None, samples))
    return result


def _task_manager(asked: EvaluateConfig) -> TaskManager:
    """The tasks of `task_dir`, and those of the package where another one is asked for: reading these takes seconds."""
    if asked.task_dir is not None:
        if not Path(asked.task_dir).is_dir():
            raise ConfigError(f"evaluate.task_dir={asked.task_dir} is not a directory", "name one with YAML files")
        own = TaskManager(include_path=asked.task_dir, include_defaults=False)
        if all(own.match_tasks([task]) for task in asked.tasks):
            return own
    every = TaskManager(include_path=asked.task_dir)
    for task in asked.tasks:
        if not every.match_tasks([task]):
            near = difflib.get_close_matches(task, every.all_tasks, 1)
            hint = f"use {near[0]}" if near else "see evaluate.task_dir, or `lm-eval ls tasks`"
            raise ConfigError(f"evaluate.tasks has {task}, which is not a task", hint)
    return every
