"""Generates text with a model, from a paged KV cache, for many requests at a time (continuous batching).

The model is that of a training run or of a checkpoint, in its layout of ranks, without a copy of the weights. Every
rank calls the methods of its `Engine` in the same order with the same arguments, and gets the same results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.utils import unwrap_model
from torch import Tensor, nn

from moe_train.inference.blocks import BlockPool
from moe_train.inference.cache import PagedKVCache, format_of
from moe_train.inference.context import PagedContext, RotaryTable
from moe_train.inference.forward import CachedModel
from moe_train.inference.sampling import Sampler, SamplingParams, choose
from moe_train.inference.scheduler import Batch, Scheduler, SequenceState
from moe_train.ranks import RankContext
from parallel.architecture.kv_cache import cache_parts
from parallel.errors import ConfigError


@dataclass(frozen=True)
class EngineOptions:
    """Sizes of an engine.

    Args:
        num_blocks, block_size: of the KV cache: blocks, and tokens of each.
        max_batch_tokens: tokens of one forward pass, over all sequences.
        max_sequences: sequences that run at the same time.
        cache_format, rotary_format: of the KV cache (parallel/architecture/kv_cache.py). None takes the precision of
            the model.
    """

    num_blocks: int
    block_size: int = 16
    max_batch_tokens: int = 2048
    max_sequences: int = 64
    cache_format: str | None = None
    rotary_format: str | None = None


@dataclass(frozen=True)
class Completion:
    """One continuation of a prompt.

    Args:
        tokens: token ids, with the stop token where there is one.
        logprobs: of each token, under the model's own distribution, which no sampling parameter changes.
        top_logprobs: for each token, the most probable tokens at its position with their log-probabilities.
        finish_reason: "stop" (a stop token) or "length".
    """

    tokens: list[int]
    logprobs: list[float]
    top_logprobs: list[dict[int, float]]
    finish_reason: str


@dataclass(eq=False)
class _Request:
    """A request, and what its sequences have so far."""

    params: SamplingParams
    sequences: list[SequenceState]
    completions: list[Completion | None]


def unsupported(ranks: RankContext) -> str | None:
    """Why an engine cannot run a model of this config, for an error message; None if it can."""
    if ranks.backend != "local":
        return f"the engine has no KV cache for backend.name={ranks.backend} yet"
    if ranks.cfg.model.capacity_factor is not None:
        return "with model.capacity_factor, tokens of other requests would decide which tokens an expert drops"
    return None


class Engine:
    """Use it as a context manager: inside the block the model is in evaluation mode, and its weights do not change.

    At the end of the block requests that have not finished are cancelled, and the contents of the cache are forgotten.

    Args:
        chunks: the model of this rank, with or without DDP around it.

    Raises:
        ConfigError: the model is one that the engine cannot run.
    """

    def __init__(self, ranks: RankContext, chunks: Sequence[nn.Module], options: EngineOptions) -> None:
        reason = unsupported(ranks)
        if reason is not None:
            raise ConfigError(reason, "set backend.name=local and model.capacity_factor=null")
        self._ranks = ranks
        self._chunks: Sequence[Any] = chunks
        self._model = CachedModel(ranks, unwrap_model(list(chunks)))
        self.pool = BlockPool(options.num_blocks, options.block_size)
        self.scheduler = Scheduler(self.pool, options.max_batch_tokens, options.max_sequences)
        cache_format = options.cache_format or format_of(self._model.dtype)
        parts = cache_parts(ranks.cfg.model, cache_format, options.rotary_format, ranks.layout.tp)
        self.cache = PagedKVCache(
            parts, self._model.layers, options.num_blocks, options.block_size, self._model.dtype, ranks.device
        )
        self._rotary = RotaryTable()
        self._requests: dict[int, _Request] = {}
        self._unreported: dict[int, list[Completion]] = {}  # requests that ended while another was waited for
        self._sampling: dict[SequenceState, tuple[_Request, int, Sampler]] = {}
        self._logprobs: dict[SequenceState, tuple[list[float], list[dict[int, float]]]] = {}
        self._next_id = 0
        self._was_training: list[bool] = []

    def __enter__(self) -> Engine:
        self._was_training = [chunk.training for chunk in self._chunks]
        for chunk in self._chunks:
            if self._ranks.cfg.parallel.overlap_param_gather and hasattr(chunk, "disable_forward_pre_hook"):
                chunk.disable_forward_pre_hook()  # gathers the parameters, which single modules would wait for
            chunk.eval()
        return self

    def __exit__(self, *_: object) -> None:
        for request in list(self._requests):
            self.cancel(request)
        self.pool.forget_contents()
        for chunk, training in zip(self._chunks, self._was_training, strict=True):
            chunk.train(training)
            if self._ranks.cfg.parallel.overlap_param_gather and hasattr(chunk, "enable_forward_pre_hook"):
                chunk.enable_forward_pre_hook()

    @property
    def max_sequence_length(self) -> int:
        """Tokens of a prompt with its continuation, at most."""
        return min(self._ranks.cfg.model.max_position_embeddings, self.pool.num_blocks * self.pool.block_size)

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[list[Completion]]:
        """The completions of each prompt, in order.

        Raises:
            ConfigError: one of them cannot be a request, and none of them was queued.
        """
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        for prompt, own in zip(prompts, each, strict=True):
            self._check(prompt, own)
        ids = [self._queue(prompt, own) for prompt, own in zip(prompts, each, strict=True)]
        finished: dict[int, list[Completion]] = {}
        while not finished.keys() >= set(ids):
            finished |= self.step()
        completions = [finished.pop(request) for request in ids]
        self._unreported |= finished
        return completions

    def add_request(self, prompt: Sequence[int], params: SamplingParams) -> int:
        """Queue a request, and return the number under which `step` reports it.

        Raises:
            ConfigError: the prompt is empty, has an unknown token, or does not fit with its continuation; or more
                log-probabilities are asked for than there are tokens.
        """
        self._check(prompt, params)
        return self._queue(prompt, params)

    def _queue(self, prompt: Sequence[int], params: SamplingParams) -> int:
        """Queue a request that was checked."""
        sequences: list[SequenceState] = []
        for _ in range(params.n):
            parent = sequences[0] if sequences else None
            sequences.append(SequenceState(tuple(prompt), params.max_new_tokens, parent))
        request, number = _Request(params, sequences, [None] * params.n), self._next_id
        self._next_id += 1
        for index, sequence in enumerate(sequences):
            self.scheduler.add(sequence)
            self._sampling[sequence] = (request, index, Sampler.of(params, index))
            self._logprobs[sequence] = ([], [])
        self._requests[number] = request
        return number

    def _check(self, prompt: Sequence[int], params: SamplingParams) -> None:
        """Raise ConfigError where they cannot be a request."""
        vocabulary, longest = self._ranks.cfg.model.vocab_size, self.max_sequence_length
        if not prompt or not all(0 <= token < vocabulary for token in prompt):
            raise ConfigError(
                "a prompt has no token, or one outside of the vocabulary", f"use token ids from 0 to {vocabulary - 1}"
            )
        if len(prompt) + params.max_new_tokens > longest:
            room = longest - len(prompt)
            raise ConfigError(
                f"a prompt of {len(prompt)} tokens and max_new_tokens={params.max_new_tokens} exceed {longest} tokens, "
                "the smaller of model.max_position_embeddings and the KV cache",
                f"set max_new_tokens to {room} or less" if room > 0 else f"shorten the prompt to {longest - 1} or less",
            )
        if params.top_logprobs > vocabulary:
            raise ConfigError(
                f"top_logprobs={params.top_logprobs} exceeds model.vocab_size={vocabulary}",
                f"set top_logprobs to {vocabulary} or less",
            )

    def cancel(self, request: int) -> None:
        """Forget a request and free its blocks. One that has finished, or is unknown, is left alone."""
        cancelled = self._requests.pop(request, None)
        for sequence in cancelled.sequences if cancelled is not None else ():
            self._drop(sequence)

    def step(self) -> dict[int, list[Completion]]:
        """One forward pass. Returns the requests that have finished since the last call."""
        reported, self._unreported = self._unreported, {}
        batch = self.scheduler.schedule()
        if batch.entries:
            self._run(batch)
        done = {number: request for number, request in self._requests.items() if None not in request.completions}
        for number, request in done.items():
            del self._requests[number]
            reported[number] = [completion for completion in request.completions if completion is not None]
        return reported

    def _run(self, batch: Batch) -> None:
        """A forward pass, and the next token of each sequence whose tokens are all in the cache then."""
        self.cache.copy(batch.copies)
        context = PagedContext(batch, self.cache, self._rotary, self._ranks.device, self._model.multiple)
        logits = self._model.logits(context)
        sampled = [entry.sequence for entry in context.entries if entry.samples]
        tokens = self._sample(logits, sampled)
        self.scheduler.complete(batch, tokens)
        for sequence in sampled:
            self._end_if_done(sequence)

    def _sample(self, logits: Tensor | None, sequences: list[SequenceState]) -> dict[SequenceState, int]:
        """The next token of each sequence, chosen by one of the ranks that have the logits [n, vocabulary]."""
        if not sequences:
            return {}
        samplers = [self._sampling[sequence][2] for sequence in sequences]
        top = max(sampler.params.top_logprobs for sampler in samplers)
        # Token, log-probability, most probable tokens, their log-probabilities; fp64 has each token id exactly.
        chosen = torch.zeros(len(sequences), 2 + 2 * top, dtype=torch.float64, device=self._ranks.device)
        layout = self._ranks.layout
        chooser = layout.rank_of(pp=layout.pp - 1)
        if logits is not None and self._ranks.rank.rank == chooser:
            tokens = choose(logits, samplers)
            logprobs = logits.log_softmax(dim=-1)
            best = logprobs.topk(top, dim=-1)
            own = logprobs.gather(1, tokens.unsqueeze(1))
            chosen.copy_(torch.cat([tokens.unsqueeze(1).double(), own, best.indices, best.values], dim=1))
        if layout.world_size > 1:
            dist.broadcast(chosen, src=chooser)
        result = {}
        for sequence, sampler, row in zip(sequences, samplers, chosen.tolist(), strict=True):
            result[sequence] = int(row[0])
            logprobs_of, top_of = self._logprobs[sequence]
            logprobs_of.append(row[1])
            wanted = sampler.params.top_logprobs
            top_of.append({int(row[2 + i]): row[2 + top + i] for i in range(wanted)})
        return result

    def _end_if_done(self, sequence: SequenceState) -> None:
        """Keep the completion of a sequence that has reached its end, and release its blocks."""
        request, index, _ = self._sampling[sequence]
        tokens = sequence.new_tokens
        stopped = tokens[-1] in request.params.stop_token_ids
        if stopped or len(tokens) == sequence.max_new_tokens:
            reason = "stop" if stopped else "length"
            request.completions[index] = Completion(tokens, *self._logprobs[sequence], reason)
            self._drop(sequence)

    def _drop(self, sequence: SequenceState) -> None:
        self.scheduler.remove(sequence)
        self._sampling.pop(sequence, None)
        self._logprobs.pop(sequence, None)
