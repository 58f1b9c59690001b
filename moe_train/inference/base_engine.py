"""What every engine that generates text offers, and the part that does not depend on how it computes."""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Self

from torch import nn

from moe_train.inference.requests import GeneratedSequence, RequestOutput, RequestTable, StepOutput
from moe_train.inference.sampling_params import SamplingParams
from moe_train.inference.speculation import SpeculationStatistics
from moe_train.ranks import RankContext
from parallel.errors import ConfigError


def capacity_error(ranks: RankContext) -> ConfigError | None:
    """Why no engine can run a model whose experts drop tokens; None for other models."""
    if ranks.cfg.model.capacity_factor is None:
        return None
    return ConfigError(
        "with model.capacity_factor, tokens of other requests would decide which tokens an expert drops",
        "set model.capacity_factor=null",
    )


class BaseEngine(ABC):
    """Use it as a context manager: inside the block the model is in evaluation mode, and its weights do not change.

    At the end of the block requests that have not finished are cancelled, and the contents of the cache are forgotten.
    Every rank calls the methods in the same order with the same arguments, and gets the same results.

    Args:
        chunks: the model of this rank, with or without DDP around it.
        num_blocks, block_size: of the KV cache of a replica: blocks, and tokens of each.
    """

    def __init__(self, ranks: RankContext, chunks: Sequence[nn.Module], num_blocks: int, block_size: int) -> None:
        self._ranks = ranks
        self.block_size = block_size
        self.max_sequence_length = min(ranks.cfg.model.max_position_embeddings, num_blocks * block_size)
        """Tokens of a prompt with its continuation, at most."""
        self._chunks: Sequence[Any] = chunks
        self._requests = RequestTable()
        self._was_training: list[bool] = []
        self.speculation = SpeculationStatistics()

    def __enter__(self) -> Self:
        self._was_training = [chunk.training for chunk in self._chunks]
        for chunk in self._chunks:
            if self._ranks.cfg.parallel.overlap_param_gather and hasattr(chunk, "disable_forward_pre_hook"):
                chunk.disable_forward_pre_hook()  # gathers the parameters, which single modules would wait for
            chunk.eval()
        self._open()
        return self

    def __exit__(self, *_: object) -> None:
        for request in self._requests.numbers:
            self.cancel(request)
        self._close()
        self._requests.take_output()
        for chunk, training in zip(self._chunks, self._was_training, strict=True):
            chunk.train(training)
            if self._ranks.cfg.parallel.overlap_param_gather and hasattr(chunk, "enable_forward_pre_hook"):
                chunk.enable_forward_pre_hook()

    @abstractmethod
    def _open(self) -> None:
        """Prepare for requests. The model is in evaluation mode."""

    @abstractmethod
    def _close(self) -> None:
        """Forget what the cache has. All requests have been cancelled."""

    @abstractmethod
    def _queue(self, prompt: Sequence[int], params: SamplingParams) -> int:
        """Queue a request that was checked, and return its number."""

    @abstractmethod
    def _end(self, sequence: GeneratedSequence, reason: str) -> None:
        """Keep the completion of a sequence, and release its blocks."""

    @abstractmethod
    def cancel(self, request: int) -> None:
        """Forget a request and free its blocks. One that has finished, or is unknown, is left alone."""

    @abstractmethod
    def step(self) -> StepOutput:
        """Run a forward pass if there is something to do, and return what has happened since the last call."""

    @property
    @abstractmethod
    def is_idle(self) -> bool:
        """Whether a step has nothing to do."""

    @property
    @abstractmethod
    def cache_bytes(self) -> int:
        """Memory of the cache on this rank."""

    @property
    @abstractmethod
    def num_blocks(self) -> int:
        """Blocks of the cache, over all data-parallel replicas."""

    @property
    @abstractmethod
    def num_free_blocks(self) -> int:
        """Blocks of the cache that can be allocated, over all data-parallel replicas."""

    @property
    @abstractmethod
    def num_running(self) -> int:
        """Sequences that have blocks."""

    @property
    @abstractmethod
    def num_waiting(self) -> int:
        """Sequences that wait for blocks."""

    def any_seed(self) -> int:
        """For a request without a seed. One rank calls it, and tells the others."""
        return secrets.randbits(62)

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[RequestOutput]:
        """The output for each prompt, in order.

        Raises:
            ConfigError: one of them cannot be a request, and none of them was queued.
        """
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        for prompt, own in zip(prompts, each, strict=True):
            self.check(prompt, own)
        numbers = [self._queue(prompt, own) for prompt, own in zip(prompts, each, strict=True)]
        finished: dict[int, RequestOutput] = {}
        others: list[StepOutput] = []
        while not finished.keys() >= set(numbers):
            output = self.step()
            finished |= output.finished
            others.append(output)
        self._requests.give_back(others, without=numbers)
        return [finished[number] for number in numbers]

    def add_request(self, prompt: Sequence[int], params: SamplingParams) -> int:
        """Queue a request, and return the number under which `step` reports it.

        Raises:
            ConfigError: the prompt is empty, has an unknown token, or does not fit with its continuation; more
                log-probabilities are asked for than there are tokens; or the engine lacks what the request asks for.
        """
        self.check(prompt, params)
        return self._queue(prompt, params)

    def check(self, prompt: Sequence[int], params: SamplingParams) -> None:
        """Refuse what cannot be a request.

        Raises:
            ConfigError: it cannot.
        """
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
        for name in ("top_logprobs", "prompt_logprobs"):
            count = getattr(params, name)
            if count is not None and count > vocabulary:
                raise ConfigError(
                    f"{name}={count} exceeds model.vocab_size={vocabulary}", f"set {name} to {vocabulary} or less"
                )

    def end_completion(self, request: int, completion: int) -> None:
        """End a completion with the tokens that it has, as at a stop token. One that has ended is left alone."""
        for sequence in self._requests.of(request):
            if sequence.index == completion:
                self._end(sequence, "stop")
