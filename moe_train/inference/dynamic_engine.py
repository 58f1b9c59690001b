"""Generates text with Megatron-Core's dynamic engine, for models that Transformer Engine computes.

Megatron-Core schedules, keeps the cache and chooses tokens. This module gives it requests and reads its results.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.core.inference.sampling_params import SamplingParams as UpstreamParams
from megatron.core.utils import unwrap_model
from torch import nn

from moe_train.inference import upstream_engine
from moe_train.inference.base_engine import BaseEngine, capacity_error
from moe_train.inference.engine import EngineOptions
from moe_train.inference.requests import GeneratedSequence, StepOutput
from moe_train.inference.sampling_params import SamplingParams
from moe_train.ranks import RankContext
from parallel.architecture.attention import attention_kind
from parallel.architecture.kv_cache import cache_parts
from parallel.errors import ConfigError

BLOCK_SIZE = 256
"""The kernels of flash-attn 2 take blocks of a multiple of so many tokens."""
_TOKEN_UNIT = 64
"""Megatron-Core pads a forward pass to a multiple of so many tokens."""
_LOCAL = "set backend.name=local"


def unsupported(ranks: RankContext) -> ConfigError | None:
    """Why the engine cannot run a model of this config; None if it can."""
    model, layout, precision = ranks.cfg.model, ranks.layout, ranks.cfg.precision
    degrees = {name: getattr(layout, name) for name in ("dp", "pp", "cp")}
    several = [f"{name}={degree}" for name, degree in degrees.items() if degree > 1]
    newer = f"{_LOCAL}, or install megatron-core 0.19 (Python 3.12)"
    predicts = bool(model.mtp_num_layers)
    scales_angles = model.rope_type == "yarn" and model.yarn_mscale != model.yarn_mscale_all_dim
    refused = [
        (ranks.backend != "te", f"DynamicEngine runs backend.name=te, not {ranks.backend}", "set backend.name=te"),
        (
            attention_kind(model).latent,
            f"generation with backend.name=te has no KV cache for model.attention={model.attention}",
            _LOCAL,
        ),
        (
            predicts and not upstream_engine.ONE_CONFIG,
            f"Megatron-Core before 0.19 cannot generate with model.mtp_num_layers={model.mtp_num_layers}",
            newer,
        ),
        (
            scales_angles and not upstream_engine.ONE_CONFIG,
            f"Megatron-Core before 0.19 generates without model.yarn_mscale={model.yarn_mscale:g}",
            newer,
        ),
        (
            bool(several),
            f"generation with backend.name=te runs one replica on one pipeline stage, not {' '.join(several)}",
            f"use as many ranks as parallel.tp, or {_LOCAL}",
        ),
        (
            bool(precision.fp8 or precision.fp4),
            f"generation with backend.name=te computes in {precision.dtype}, not in FP8 or FP4",
            f"set precision={precision.dtype}",
        ),
    ]
    for applies, cause, remedy in refused:
        if applies:
            return ConfigError(cause, remedy)
    error = capacity_error(ranks)
    if error is None and upstream_engine.kernels_missing():
        error = ConfigError(
            "generation with backend.name=te needs flash-attn 2.7.3 or later", f"install it, or {_LOCAL}"
        )
    return error


def _check_options(ranks: RankContext, options: EngineOptions) -> None:
    dtype = ranks.cfg.precision.dtype
    refused = [
        (options.speculate, "engine.speculate=true", "set engine.speculate=false"),
        (
            options.cache_format not in (None, dtype),
            f"engine.cache_format={options.cache_format}",
            f"set engine.cache_format={dtype}, the precision of the model",
        ),
        (
            options.rotary_format is not None,
            f"engine.rotary_format={options.rotary_format}",
            "set engine.rotary_format=null",
        ),
        (
            options.block_size % BLOCK_SIZE != 0,
            f"engine.block_size={options.block_size}",
            f"set engine.block_size to a multiple of {BLOCK_SIZE}",
        ),
    ]
    for applies, field, remedy in refused:
        if applies:
            raise ConfigError(f"generation with backend.name=te does not have {field}", f"{remedy}, or {_LOCAL}")


def _check_params(params: SamplingParams) -> None:
    """Refuse what Megatron-Core would ignore or cannot compute."""
    neutral = SamplingParams()
    fields = ["min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "prompt_logprobs"]
    if params.seed and params.temperature:
        fields.append("seed")
    for name in fields:
        value, usual = getattr(params, name), getattr(neutral, name)
        if value != usual:
            remedy = "leave it out" if usual is None else f"set it to {usual:g}"
            raise ConfigError(f"generation with backend.name=te does not have {name}={value}", f"{remedy}, or {_LOCAL}")
    if params.max_new_tokens == 0:
        raise ConfigError(
            "generation with backend.name=te does not have max_new_tokens=0", f"set max_new_tokens to 1, or {_LOCAL}"
        )
    if params.temperature and params.top_k and params.top_p < 1:
        raise ConfigError(
            f"generation with backend.name=te does not have top_k={params.top_k} and top_p={params.top_p:g} at a time",
            f"set top_k=0 or top_p=1, or {_LOCAL}",
        )


def upstream_params(params: SamplingParams, vocabulary: int) -> UpstreamParams:
    """The same in Megatron-Core's terms. One stop token is its end token; the engine sees to the others.

    Log-probabilities are those of the model: no sampling parameter changes them.
    """
    greedy = params.temperature == 0
    filters = 0 < params.top_k < vocabulary
    return UpstreamParams(
        temperature=1.0 if greedy else params.temperature,
        top_k=1 if greedy else params.top_k * filters,
        top_p=params.top_p if not greedy and params.top_p < 1 else 0.0,
        return_log_probs=True,
        skip_prompt_log_probs=True,
        num_tokens_to_generate=params.max_new_tokens,
        termination_id=min(params.stop_token_ids, default=-1),
        top_n_logprobs=params.top_logprobs,
    )


class DynamicEngine(BaseEngine):
    """The engine of the Transformer Engine backend. It has not run on a GPU yet.

    Draws of all requests come from one stream of random numbers, so that they depend on what else is in the batch.

    Raises:
        ConfigError: the engine cannot run the model, or lacks one of the options.
    """

    def __init__(self, ranks: RankContext, chunks: Sequence[nn.Module], options: EngineOptions) -> None:
        error = unsupported(ranks)
        if error is not None:
            raise error
        _check_options(ranks, options)
        super().__init__(ranks, chunks, options.num_blocks, options.block_size)
        self._options = options
        (self._model,) = unwrap_model(list(chunks))
        parts = cache_parts(ranks.cfg.model, ranks.cfg.precision.dtype, None, ranks.layout.tp)
        per_token = len(self._model.decoder.layers) * sum(part.bytes_per_token for part in parts)
        # Megatron-Core takes one block for the tokens that pad a forward pass.
        self._cache_bytes = (options.num_blocks + 1) * options.block_size * per_token
        self._engine: Any = None
        self._sequences: dict[int, GeneratedSequence] = {}
        """By Megatron-Core's number of the request: one for each completion."""
        self._numbers: dict[GeneratedSequence, int] = {}
        self._ended: set[int] = set()
        """Requests that Megatron-Core is to end at its next step."""
        self._next_number = 0

    def _open(self) -> None:
        self._engine = upstream_engine.make(
            self._model, self._ranks.cfg.model.vocab_size, self._sizes(), self._ranks.cfg.seed
        )

    def _sizes(self) -> upstream_engine.EngineSizes:
        options, tp = self._options, self._ranks.layout.tp
        sequences = max(options.max_sequences // tp, 1) * tp
        unit = _TOKEN_UNIT * tp
        tokens = -(-max(options.max_batch_tokens, sequences) // unit) * unit
        return upstream_engine.EngineSizes(
            self._cache_bytes, options.block_size, self.max_sequence_length, sequences, tokens
        )

    def _close(self) -> None:
        self._engine.reset()
        upstream_engine.leave_inference_mode()
        self._sequences.clear()
        self._numbers.clear()
        self._ended.clear()

    @property
    def cache_bytes(self) -> int:
        """Memory of the cache on this rank."""
        return self._cache_bytes

    @property
    def num_blocks(self) -> int:
        """Blocks of the cache for tokens of requests."""
        return self._options.num_blocks

    @property
    def num_free_blocks(self) -> int:
        """Blocks of the cache that can be allocated."""
        return int(upstream_engine.allocator(self._engine).total_avail)

    @property
    def num_running(self) -> int:
        """Sequences that have blocks."""
        return int(self._engine.context.total_request_count)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for blocks."""
        return len(self._engine.waiting_request_ids)

    @property
    def is_idle(self) -> bool:
        """Whether a step has nothing to do."""
        return not self._engine.has_unfinished_requests()

    def any_seed(self) -> int:
        """The one that means none."""
        return 0

    def check(self, prompt: Sequence[int], params: SamplingParams) -> None:
        """Refuse what cannot be a request, and what Megatron-Core lacks.

        Raises:
            ConfigError: it cannot be one.
        """
        super().check(prompt, params)
        _check_params(params)

    def _queue(self, prompt: Sequence[int], params: SamplingParams) -> int:
        sequences = self._requests.add(tuple(prompt), params, replica=0)
        for sequence in sequences:
            number, self._next_number = self._next_number, self._next_number + 1
            self._sequences[number], self._numbers[sequence] = sequence, number
            own = upstream_params(params, self._ranks.cfg.model.vocab_size)
            self._engine.add_request(number, list(prompt), own)
        return sequences[0].request

    def cancel(self, request: int) -> None:
        """Forget a request; its blocks are free after the next step. One that has finished is left alone."""
        sequences = self._requests.of(request)
        self._requests.forget(request)
        for sequence in sequences:
            self._release(sequence)

    def _end(self, sequence: GeneratedSequence, reason: str) -> None:
        self._requests.end(sequence, reason)
        self._release(sequence)

    def _release(self, sequence: GeneratedSequence) -> None:
        """Have Megatron-Core forget a sequence: at once where it waits, else at the next step, as at a stop word."""
        number = self._numbers.pop(sequence)
        del self._sequences[number]
        engine = self._engine
        if number in engine.waiting_request_ids and number != engine.context.chunked_prefill_request_id:
            engine.waiting_request_ids.remove(number)
            del engine.requests[number]
        elif number in engine.requests:
            self._ended.add(number)

    def step(self) -> StepOutput:
        """Run a forward pass if there is something to do, and return what has happened since the last call."""
        if not self.is_idle:
            # Each time: Megatron-Core forgets it while a part of the prompt is computed.
            self._engine.stop_word_finished_request_ids |= self._ended
            result = self._engine.step_modern()
            finished = {record.request_id: record for record in result["finished_request_records"]}
            running = {number: self._engine.requests[number].record for number in result["active_request_ids"]}
            self._ended -= finished.keys()
            for number, record in (running | finished).items():
                self._note(number, record)
            for number in finished.keys() & self._sequences.keys():
                raise RuntimeError(f"Megatron-Core ended request {number} before its last token")
        return self._requests.take_output()

    def _note(self, number: int, record: Any) -> None:
        """Record the token that a step has added to a request.

        Args:
            record: its parts: each eviction from the cache begins another one.
        """
        sequence = self._sequences.get(number)
        if sequence is None:
            return  # cancelled or ended
        generated = sum(len(part.generated_tokens) for part in record.requests)
        if generated == sequence.state.num_new_tokens:
            return  # a part of the prompt was computed
        last = next(part for part in reversed(record.requests) if part.generated_tokens)
        best: dict[int, float] = {}
        if sequence.params.top_logprobs:
            best = {int(token): logprob for token, logprob in last.generated_top_n_logprobs[-1].items()}
        token = int(last.generated_tokens[-1])
        sequence.state.tokens.append(token)
        reason = self._requests.note_token(sequence, token, last.generated_log_probs[-1], best)
        if reason is not None:
            self._end(sequence, reason)
