"""Generates text with a model, from a paged KV cache, for many requests at a time (continuous batching).

The model is that of a training run or of a checkpoint, in its layout of ranks, without a copy of the weights. Every
rank calls the methods of its `Engine` in the same order with the same arguments, and gets the same results.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.utils import unwrap_model
from torch import Tensor, nn

from moe_train.inference.base_engine import BaseEngine, capacity_error
from moe_train.inference.blocks import BlockPool
from moe_train.inference.cache import PagedKVCache, format_of
from moe_train.inference.context import PagedContext, RotaryTable, partly_filled_blocks
from moe_train.inference.drafting import Drafter, new_tokens
from moe_train.inference.forward import CachedModel, PassOutput
from moe_train.inference.requests import GeneratedSequence, StepOutput, TopLogprobs
from moe_train.inference.sampling import TokenChoice, choose
from moe_train.inference.sampling_params import SamplingParams
from moe_train.inference.scheduler import Batch, BatchEntry, Scheduler, SequenceState
from moe_train.inference.speculation import SpeculationControl
from moe_train.ranks import RankContext
from parallel.architecture.kv_cache import cache_parts
from parallel.dispatchers import DISPATCHERS
from parallel.errors import ConfigError
from parallel.fp8_recipes import RECIPES


@dataclass(frozen=True)
class EngineOptions:
    """Sizes of an engine.

    Args:
        num_blocks, block_size: of the KV cache: blocks, and tokens of each.
        max_batch_tokens: tokens of one forward pass, over all sequences.
        max_sequences: sequences that run at the same time.
        cache_format, rotary_format: of the KV cache (parallel/architecture/kv_cache.py). None takes the precision of
            the model.
        speculate: whether multi-token-prediction layers draft tokens, for as long as that is measured to be faster. The
            tokens are the same, up to rounding in 16 bits.
    """

    num_blocks: int
    block_size: int = 16
    max_batch_tokens: int = 2048
    max_sequences: int = 64
    cache_format: str | None = None
    rotary_format: str | None = None
    speculate: bool = False


@dataclass(frozen=True)
class _Launched:
    """A forward pass whose results are not known yet.

    Args:
        batches: one for each data-parallel replica.
        results: [rows of all batches, 2 + 2 top] in fp64, which has each token id exactly: token, log-probability, the
            most probable tokens, their log-probabilities.
        drafts: [sampled entries of all batches + 1, depths or 2]: the tokens that multi-token prediction guesses next;
            in the last row, nanoseconds of the pass and of making the drafts. None where none are made.
        pending: communication of the results, of the drafts, and of what was sent to the next pipeline stage.
    """

    batches: list[Batch]
    results: Tensor
    top: int
    drafts: Tensor | None
    pending: list[Any]

    @property
    def sampled(self) -> list[BatchEntry]:
        """Entries that get tokens."""
        return [entry for batch in self.batches for entry in batch.entries if entry.samples]


def unsupported(ranks: RankContext) -> ConfigError | None:
    """Why an engine cannot run a model of this config; None if it can."""
    if ranks.backend != "local":
        return ConfigError(f"Engine runs backend.name=local, not {ranks.backend}", "set backend.name=local")
    error = capacity_error(ranks)
    if error is not None:
        return error
    recipe = ranks.cfg.precision.fp8
    if recipe is not None and not RECIPES[recipe].scaled_blocks:
        return ConfigError(
            f"with precision.fp8={recipe}, tokens of other requests would decide the scale of a tensor",
            "set precision.fp8=block or precision.fp8=null",
        )
    return None


class Engine(BaseEngine):
    """The engine of the local backend.

    Raises:
        ConfigError: the model is one that the engine cannot run.
    """

    def __init__(self, ranks: RankContext, chunks: Sequence[nn.Module], options: EngineOptions) -> None:
        error = unsupported(ranks)
        if error is not None:
            raise error
        super().__init__(ranks, chunks, options.num_blocks, options.block_size)
        layout = ranks.layout
        # Ranks that hold the experts of one layer are then in several replicas, and all of them run every pass.
        self._shares_experts = ranks.cfg.model.is_moe and layout.ep * layout.etp > layout.tp * layout.cp
        self._depths = ranks.cfg.model.mtp_num_layers if options.speculate else 0
        if options.speculate and not self._depths:
            raise ConfigError("speculation needs multi-token-prediction layers", "set speculate to false")
        self._control = SpeculationControl() if options.speculate else None
        self._model = CachedModel(ranks, unwrap_model(list(chunks)))
        self._replica = ranks.layout.coordinates(ranks.rank.rank).dp
        # Virtual stages take turns within a forward pass, so that another one cannot begin meanwhile.
        self._depth = ranks.layout.pp if ranks.layout.vpp == 1 else 1
        self.replicas = [
            Scheduler(
                BlockPool(options.num_blocks, options.block_size), options.max_batch_tokens, options.max_sequences,
                self._depth,
            )
            for _ in range(ranks.layout.dp)
        ]  # fmt: skip
        """Of all data-parallel replicas: each rank knows what the others compute."""
        cache_format = options.cache_format or format_of(self._model.dtype)
        parts = cache_parts(ranks.cfg.model, cache_format, options.rotary_format, ranks.layout.tp)
        self.cache = PagedKVCache(
            parts, self._layers_in_cache(), options.num_blocks, options.block_size, self._model.dtype, ranks.device
        )
        self._rotary = RotaryTable(self._model.dtype)
        self._drafter: Drafter | None = None
        if options.speculate:
            self._drafter = Drafter(self._model, self.cache, self._rotary, self._depths, ranks.device)
        self._launched: deque[_Launched] = deque()

    def _layers_in_cache(self) -> list[int]:
        return [*self._model.layers, *(self._model.prediction_layers if self._depths else ())]

    def _open(self) -> None:
        self._model.prepare()

    def _close(self) -> None:
        while self._launched:
            self._finish(self._launched.popleft())
        for scheduler in self.replicas:
            scheduler.pool.forget_contents()

    @property
    def cache_bytes(self) -> int:
        """Memory of the cache on this rank."""
        return self.cache.num_bytes

    @property
    def num_free_blocks(self) -> int:
        """Blocks of the cache that can be allocated, over all data-parallel replicas."""
        return sum(scheduler.pool.available for scheduler in self.replicas)

    @property
    def num_blocks(self) -> int:
        """Blocks of the cache, over all data-parallel replicas."""
        return sum(scheduler.pool.num_blocks for scheduler in self.replicas)

    @property
    def num_running(self) -> int:
        """Sequences that have blocks."""
        return sum(len(scheduler.running) for scheduler in self.replicas)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for blocks."""
        return sum(len(scheduler.waiting) for scheduler in self.replicas)

    @property
    def is_idle(self) -> bool:
        """Whether a step has nothing to do."""
        return not self._launched and all(scheduler.is_idle for scheduler in self.replicas)

    def _queue(self, prompt: Sequence[int], params: SamplingParams) -> int:
        """Queue a request that was checked, for the replica with the fewest sequences."""
        replica = min(range(len(self.replicas)), key=lambda i: self.replicas[i].num_sequences)
        sequences = self._requests.add(tuple(prompt), params, replica)
        for sequence in sequences:
            self.replicas[replica].add(sequence.state)
        return sequences[0].request

    def cancel(self, request: int) -> None:
        """Forget a request and free its blocks. One that has finished, or is unknown, is left alone."""
        for sequence in self._requests.of(request):
            self.replicas[sequence.replica].remove(sequence.state)
        self._requests.forget(request)

    def step(self) -> StepOutput:
        """Launch a forward pass, and return what the last one has brought that is not in flight any more.

        With pipeline parallelism, passes of other sequences go through the earlier stages meanwhile.
        """
        batches = [scheduler.schedule() for scheduler in self.replicas]
        launched = any(batch.entries for batch in batches)
        if launched:
            self._launched.append(self._launch(batches))
        if self._launched and (len(self._launched) == self._depth or not launched):
            self._finish(self._launched.popleft())
        return self._requests.take_output()

    def _launch(self, batches: list[Batch]) -> _Launched:
        """Begin a forward pass of this rank's replica, and the exchange of its results with all other ranks."""
        began = time.perf_counter()
        own = batches[self._replica]
        output = PassOutput()
        pending: list[Any] = []
        if own.entries or self._shares_experts:
            self.cache.copy(own.copies)
            self.cache.clear(partly_filled_blocks(own, self.cache.block_size))
            padded = self._padded_tokens([batch.num_tokens for batch in batches])
            context = PagedContext(own, self.cache, self._rotary, self._ranks.device, padded)
            output = self._model.run(context, pending)
        sequences = [self._sequence(entry) for batch in batches for entry in batch.entries]
        top = max((_top(sequence.params) for sequence in sequences), default=0)
        first = [sum(batch.num_rows for batch in batches[:replica]) for replica in range(len(batches) + 1)]
        results = torch.zeros(first[-1], 2 + 2 * top, dtype=torch.float64, device=self._ranks.device)
        if output.logits is not None and self._decides:
            results[first[self._replica] : first[self._replica + 1]] = self._results(own, output.logits, top)
        exchanged = self._exchange(results)
        launched = _Launched(batches, results, top, None, pending)
        if self._control is not None and self._control.drafts:
            seconds = time.perf_counter() - began
            launched = replace(launched, drafts=self._draft(launched, output.hidden, exchanged, seconds))
            exchanged = exchanged + self._exchange(launched.drafts)
        pending += exchanged
        return launched

    @property
    def _decides(self) -> bool:
        """Whether this rank, of those that have the logits of a replica, chooses tokens for all."""
        coordinates = self._ranks.layout.coordinates(self._ranks.rank.rank)
        return (coordinates.tp, coordinates.cp, coordinates.pp) == (0, 0, self._ranks.layout.pp - 1)

    def _exchange(self, values: Tensor | None) -> list[Any]:
        """Begin to give all ranks what the deciding ranks of the replicas have, each in rows of its own among zeros."""
        layout = self._ranks.layout
        if values is None or layout.world_size == 1:
            return []
        if layout.dp > 1:
            return [dist.all_reduce(values, async_op=True)]
        return [dist.broadcast(values, src=layout.rank_of(pp=layout.pp - 1), async_op=True)]

    def _draft(self, launched: _Launched, hidden: Tensor | None, exchanged: list[Any], seconds: float) -> Tensor:
        """Drafts behind the tokens that a pass has added, as `_Launched.drafts` has them, on the ranks that decide.

        Args:
            hidden: of the decoder, on ranks of the last pipeline stage.
            exchanged: communication of the results of the pass.
            seconds: that the pass took.
        """
        assert self._drafter is not None
        layout, device = self._ranks.layout, self._ranks.device
        drafts = torch.zeros(len(launched.sampled) + 1, max(self._depths, 2), dtype=torch.long, device=device)
        if layout.coordinates(self._ranks.rank.rank).pp != layout.pp - 1:
            return drafts
        began = time.perf_counter()
        for work in exchanged:
            work.wait()
        batches, own = launched.batches, launched.batches[self._replica]
        new = new_tokens(batches, launched.results[:, 0].long().tolist())
        if own.entries or self._shares_experts:
            padded = self._padded_tokens([batch.num_tokens for batch in batches])
            guesses = self._drafter.drafts(own, hidden, new, padded)
            if self._decides:
                first = sum(entry.samples for batch in batches[: self._replica] for entry in batch.entries)
                drafts[first : first + len(guesses), : self._depths] = guesses
        if self._decides and self._replica == 0:
            times = seconds, time.perf_counter() - began
            drafts[-1, :2] = torch.tensor([round(value * 1e9) for value in times])
        return drafts

    def _padded_tokens(self, counts: list[int]) -> int:
        """Tokens of a pass of this rank, at least one, given those of the replicas."""
        own, multiple = counts[self._replica], self._model.multiple
        if DISPATCHERS[self._ranks.cfg.parallel.dispatcher].needs_equal_counts and self._shares_experts:
            own = max(counts)
        return max(-(-own // multiple), 1) * multiple

    def _results(self, batch: Batch, logits: Tensor, top: int) -> Tensor:
        """The results of `batch` from its logits [rows, vocabulary], by the rank that decides for all."""
        targets: list[int] = []
        choices: list[TokenChoice] = []
        sampled: list[int] = []
        for entry in batch.entries:
            sequence = self._sequence(entry)
            targets += sequence.state.prompt[entry.scored_positions.start + 1 : entry.scored_positions.stop + 1]
            for position in entry.sampled_positions:
                sampled.append(len(targets))
                choices.append(_choice(sequence, entry, position))
                targets.append(0)
        tokens = torch.tensor(targets, dtype=torch.long, device=logits.device)
        if sampled:
            rows = torch.tensor(sampled, device=logits.device)
            tokens[rows] = choose(logits[rows], choices)
        logprobs = logits.log_softmax(dim=-1)
        best = logprobs.topk(top, dim=-1)
        tokens = tokens.unsqueeze(1)
        return torch.cat([tokens.double(), logprobs.gather(1, tokens), best.indices, best.values], dim=1)

    def _finish(self, launched: _Launched) -> None:
        """Wait for the results of a forward pass, and hand them to the sequences."""
        for work in launched.pending:
            work.wait()
        rows = iter(launched.results.tolist())
        added: dict[SequenceState, list[int]] = {}
        for scheduler, batch in zip(self.replicas, launched.batches, strict=True):
            new: dict[SequenceState, list[int]] = {}
            ended: list[tuple[GeneratedSequence, str]] = []
            for entry in batch.entries:
                sequence = self._requests.find(entry.sequence)
                scored = [next(rows) for _ in entry.scored_positions]
                sampled = [next(rows) for _ in entry.sampled_positions]
                if sequence is None:  # cancelled meanwhile
                    continue
                for position, row in zip(entry.scored_positions, scored, strict=True):
                    _, logprob, best = _read(row, launched.top, sequence.params.prompt_logprobs or 0)
                    sequence.prompt_logprobs[position] = (logprob, best)
                reason = self._note(sequence, entry, sampled, launched.top, new)
                if reason is not None:
                    ended.append((sequence, reason))
            scheduler.complete(batch, new)
            for sequence, reason in ended:
                self._end(sequence, reason)
            added |= new
        if launched.drafts is not None:
            self._take_drafts(launched, launched.drafts.tolist(), added)
        elif self._control is not None:
            self._control.rest(len(launched.sampled))

    def _take_drafts(self, launched: _Launched, drafts: list[list[int]], added: dict[SequenceState, list[int]]) -> None:
        """Have the next pass verify the drafts, unless it is to measure what it costs without them."""
        assert self._control is not None
        entries = launched.sampled
        decodes = all(e.samples and e.decodes for batch in launched.batches for e in batch.entries)
        if decodes and len(added) == len(entries):
            seconds, drafting_s = (value / 1e9 for value in drafts[-1][:2])
            verified = any(e.end > e.known for e in entries)
            self._control.note(verified, seconds, drafting_s, len(entries), sum(map(len, added.values())))
        if self._control.verifies:
            for entry, own in zip(entries, drafts[:-1], strict=True):
                if self._requests.find(entry.sequence) is not None and entry.sequence.table is not None:
                    entry.sequence.draft = own[: self._depths]

    def _note(
        self, sequence: GeneratedSequence, entry: BatchEntry, rows: list[list[float]], top: int,
        new: dict[SequenceState, list[int]],
    ) -> str | None:  # fmt: skip
        """Record the new tokens of a sequence, up to the first that is not the draft. Returns why it ends."""
        if not sequence.params.max_new_tokens:
            return "length" if entry.end == entry.known else None
        right = entry.num_right([int(row[0]) for row in rows])
        tokens = new.setdefault(entry.sequence, [])
        reason: str | None = None
        for row in rows[: right + 1]:
            token, logprob, best = _read(row, top, sequence.params.top_logprobs)
            tokens.append(token)
            reason = self._requests.note_token(sequence, token, logprob, best)
            if reason is not None:
                break
        if entry.drafts:
            self.speculation.note(len(entry.drafts), min(right, len(tokens)))
        return reason

    def _sequence(self, entry: BatchEntry) -> GeneratedSequence:
        """The sequence of an entry that was just scheduled."""
        sequence = self._requests.find(entry.sequence)
        assert sequence is not None
        return sequence

    def _end(self, sequence: GeneratedSequence, reason: str) -> None:
        """Keep the completion of a sequence, and release its blocks."""
        self._requests.end(sequence, reason)
        self.replicas[sequence.replica].remove(sequence.state)


def _choice(sequence: GeneratedSequence, entry: BatchEntry, position: int) -> TokenChoice:
    """Of the token after `position` of a sequence."""
    state, generated = sequence.state, position + 1 - len(sequence.state.prompt)
    if not sequence.params.penalises:
        return TokenChoice(sequence.params, sequence.index, generated)
    drafts = entry.drafts[: position + 1 - entry.known]
    return TokenChoice(sequence.params, sequence.index, generated, state.prompt, (*state.new_tokens, *drafts))


def _top(params: SamplingParams) -> int:
    """How many of the most probable tokens a request wants at a position."""
    return max(params.top_logprobs, params.prompt_logprobs or 0)


def _read(row: list[float], top: int, wanted: int) -> tuple[int, float, TopLogprobs]:
    """Token, log-probability and `wanted` of the `top` most probable tokens, of a row of results."""
    return int(row[0]), row[1], {int(row[2 + i]): row[2 + top + i] for i in range(wanted)}
