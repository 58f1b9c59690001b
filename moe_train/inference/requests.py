"""Requests to the engine, and what they have so far. No torch import."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from moe_train.inference.sampling_params import SamplingParams
from moe_train.inference.scheduler import SequenceState

TopLogprobs = dict[int, float]
"""The most probable tokens at a position, with their log-probabilities."""


@dataclass(frozen=True)
class Completion:
    """One continuation of a prompt.

    Args:
        tokens: token ids, with the stop token where there is one.
        logprobs: of each token, under the model's own distribution, which no sampling parameter changes.
        top_logprobs: for each token, the most probable tokens at its position.
        finish_reason: "stop" (a stop token, or ended by the caller) or "length".
    """

    tokens: list[int]
    logprobs: list[float]
    top_logprobs: list[TopLogprobs]
    finish_reason: str


@dataclass(frozen=True)
class RequestOutput:
    """A finished request.

    Args:
        completions: those of its prompt.
        prompt_logprobs: of each token of the prompt but the first; None where they were not asked for.
        prompt_top_logprobs: the most probable tokens at the same positions.
    """

    completions: list[Completion]
    prompt_logprobs: list[float] | None = None
    prompt_top_logprobs: list[TopLogprobs] | None = None


@dataclass(frozen=True)
class NewToken:
    """A token that a step has generated.

    Args:
        request: number of the request.
        completion: which of its completions, from 0.
    """

    request: int
    completion: int
    token: int
    logprob: float
    top_logprobs: TopLogprobs


@dataclass(frozen=True)
class StepOutput:
    """What a step has brought: tokens in their order, and the requests that have finished, by number."""

    tokens: list[NewToken] = field(default_factory=list)
    finished: dict[int, RequestOutput] = field(default_factory=dict)


@dataclass(eq=False)
class GeneratedSequence:
    """A completion that is being generated.

    Args:
        request: number of the request.
        index: of the completion, from 0.
        replica: data-parallel replica that computes it.
    """

    request: int
    index: int
    replica: int
    params: SamplingParams
    state: SequenceState
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
    prompt_logprobs: dict[int, tuple[float, TopLogprobs]] = field(default_factory=dict)
    """By position in the prompt."""


@dataclass(eq=False)
class _Request:
    sequences: list[GeneratedSequence]
    completions: list[Completion | None]
    prompt: list[tuple[float, TopLogprobs]] | None = None


class RequestTable:
    """All requests that have not finished, and the output that nobody has taken yet."""

    def __init__(self) -> None:
        self._requests: dict[int, _Request] = {}
        self._sequences: dict[SequenceState, GeneratedSequence] = {}
        self._output = StepOutput()
        self._next_number = 0

    @property
    def numbers(self) -> list[int]:
        """Of the requests that have not finished."""
        return list(self._requests)

    def add(self, prompt: tuple[int, ...], params: SamplingParams, replica: int) -> list[GeneratedSequence]:
        """A new request: its sequences, of which the first computes the prompt for the others."""
        number = self._next_number
        sequences: list[GeneratedSequence] = []
        self._next_number += 1
        for index in range(params.n):
            parent = sequences[0].state if sequences else None
            scored = params.prompt_logprobs is not None and parent is None
            state = SequenceState(prompt, params.max_new_tokens, parent, needs_prompt_logits=scored)
            sequences.append(GeneratedSequence(number, index, replica, params, state))
        self._requests[number] = _Request(sequences, [None] * params.n)
        self._sequences |= {sequence.state: sequence for sequence in sequences}
        return sequences

    def find(self, state: SequenceState) -> GeneratedSequence | None:
        """The sequence of a state; None after it has ended."""
        return self._sequences.get(state)

    def of(self, request: int) -> list[GeneratedSequence]:
        """The sequences of a request that have not ended; none of one that has finished or is unknown."""
        found = self._requests.get(request)
        return [s for s in found.sequences if s.state in self._sequences] if found is not None else []

    def note_token(self, sequence: GeneratedSequence, token: int, logprob: float, top: TopLogprobs) -> str | None:
        """Record the next token of a sequence, and return why it ends with it; None if it continues."""
        sequence.logprobs.append(logprob)
        sequence.top_logprobs.append(top)
        self._output.tokens.append(NewToken(sequence.request, sequence.index, token, logprob, top))
        if token in sequence.params.stop_token_ids:
            return "stop"
        return "length" if len(sequence.logprobs) == sequence.params.max_new_tokens else None

    def end(self, sequence: GeneratedSequence, reason: str) -> None:
        """Keep what a sequence has generated as its completion. The last one finishes the request."""
        del self._sequences[sequence.state]
        request = self._requests[sequence.request]
        tokens = sequence.state.new_tokens
        request.completions[sequence.index] = Completion(tokens, sequence.logprobs, sequence.top_logprobs, reason)
        if sequence.state.needs_prompt_logits:
            request.prompt = [sequence.prompt_logprobs[i] for i in sorted(sequence.prompt_logprobs)]
        completions = [completion for completion in request.completions if completion is not None]
        if len(completions) == len(request.completions):
            del self._requests[sequence.request]
            output = RequestOutput(completions)
            if request.prompt is not None:
                logprobs, tops = [logprob for logprob, _ in request.prompt], [top for _, top in request.prompt]
                output = RequestOutput(completions, logprobs, tops)
            self._output.finished[sequence.request] = output

    def forget(self, request: int) -> None:
        """Drop a request. One that has finished, or is unknown, is left alone."""
        for sequence in self.of(request):
            del self._sequences[sequence.state]
        self._requests.pop(request, None)

    def take_output(self) -> StepOutput:
        """What has happened since the last call."""
        output, self._output = self._output, StepOutput()
        return output

    def give_back(self, outputs: Iterable[StepOutput], without: Iterable[int]) -> None:
        """Have the next `take_output` return what `outputs` have of other requests than those in `without`."""
        left_out = set(without)
        for output in outputs:
            self._output.tokens.extend(token for token in output.tokens if token.request not in left_out)
            self._output.finished.update((n, own) for n, own in output.finished.items() if n not in left_out)
