"""What each rank of moe-generate, moe-chat and moe-serve runs: the engine in lockstep, for the requests of rank 0.

Rank 0 reads commands from the process that started it. Before each step it broadcasts what all ranks are to do with
their engines. Ranks without work wait in that broadcast, which takes no processor time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moe_train.config.schema import Config
from moe_train.inference import loading, protocol, setup
from moe_train.inference.base_engine import BaseEngine
from moe_train.inference.opening import open_engine
from moe_train.inference.requests import RequestOutput
from moe_train.inference.sampling_params import SamplingParams
from moe_train.inference.text import TextStream
from moe_train.ranks import RankContext
from parallel.errors import ConfigError
from parallel.rank_info import RankInfo

_MOST_HEARTBEAT_S = 60.0


def run(cfg: Config, rank: RankInfo) -> None:
    """Load the model and generate until the command tells to end, or is gone."""
    asked = setup.read(Path(cfg.run_dir))
    model = loading.load(cfg, rank)
    options = loading.engine_options(model.ranks, asked.engine, asked.longest)
    with open_engine(model.ranks, model.chunks, options) as engine:
        group = _control_group(model.ranks)
        if rank.rank > 0:
            _follow(engine, group)
            return
        with Client(asked.address, authkey=asked.key) as connection:
            Coordinator(engine, model, connection, group).run()


def _control_group(ranks: RankContext) -> Any:
    """Process group of the commands, on the CPU: a collective of NCCL would keep a core busy while it waits."""
    return dist.new_group(backend="gloo") if ranks.layout.world_size > 1 else None


@dataclass
class _Instructions:
    """What all ranks do with their engines, in this order."""

    ended: list[tuple[int, int]] = field(default_factory=list)  # completions, by request and index
    cancelled: list[int] = field(default_factory=list)
    added: list[tuple[list[int], SamplingParams]] = field(default_factory=list)
    step: bool = False
    finish: bool = False

    @property
    def do_something(self) -> bool:
        return bool(self.ended or self.cancelled or self.added or self.step or self.finish)


def _carry_out(engine: BaseEngine, instructions: _Instructions) -> tuple[list[int], Any]:
    """Numbers of the requests that were added, and the output of the step where there is one."""
    for request, completion in instructions.ended:
        engine.end_completion(request, completion)
    for request in instructions.cancelled:
        engine.cancel(request)
    numbers = [engine.add_request(prompt, params) for prompt, params in instructions.added]
    return numbers, engine.step() if instructions.step else None


def _follow(engine: BaseEngine, group: Any) -> None:
    """Do what rank 0 broadcasts, until it says that all is done."""
    while True:
        shared: list[Any] = [None]
        dist.broadcast_object_list(shared, src=0, group=group)
        _carry_out(engine, shared[0])
        if shared[0].finish:
            return


@dataclass
class _Running:
    """A request that has not finished, as rank 0 knows it."""

    number: int
    params: SamplingParams
    streams: list[TextStream]
    counts: list[int]
    done: list[bool]


class Coordinator:
    """Rank 0: commands in, reports out, and one broadcast before each step.

    Args:
        group: process group of the broadcasts; None for one rank.
    """

    def __init__(self, engine: BaseEngine, model: loading.LoadedModel, connection: Connection, group: Any) -> None:
        self._engine, self._model, self._connection, self._group = engine, model, connection, group
        self._running: dict[int, _Running] = {}  # by the engine's number
        self._engine_number: dict[int, int] = {}
        self._next = _Instructions()
        self._heartbeat_s = min(_MOST_HEARTBEAT_S, model.cfg.launcher.timeout_s / 3)

    def run(self) -> None:
        """Serve until a command says that all is done, or the process with the commands is gone."""
        self._connection.send(self._ready())
        while True:
            submitted = self._receive()
            accepted, events = self._accepted(submitted)
            instructions, self._next = self._next, _Instructions()
            instructions.added = [(submit.prompt, params) for submit, params in accepted]
            instructions.step = not instructions.finish and bool(accepted or self._is_busy)
            if self._group is not None:
                dist.broadcast_object_list([instructions], src=0, group=self._group)
            numbers, output = _carry_out(self._engine, instructions)
            if instructions.finish:
                return
            self._note(numbers, accepted)
            if output is not None:
                events += self._events(output)
            if events or instructions.do_something:
                self._report(events)

    def _ready(self) -> protocol.Ready:
        engine, layout = self._engine, self._model.ranks.layout
        degrees = {name: getattr(layout, name) for name in ("tp", "pp", "cp", "ep", "etp", "dp")}
        text = " ".join(f"{name}={degree}" for name, degree in degrees.items() if degree > 1) or "one rank"
        return protocol.Ready(
            engine.num_blocks, engine.block_size, engine.cache_bytes, engine.max_sequence_length, text
        )

    @property
    def _is_busy(self) -> bool:
        """Whether a step has something to do, or something to report."""
        return bool(self._running) or not self._engine.is_idle

    def _receive(self) -> list[protocol.Submit]:
        """New requests. Waits for a command if there is nothing else to do, but not for longer than a heartbeat: the
        broadcast of the other ranks would time out."""
        submitted: list[protocol.Submit] = []
        timeout = None if self._group is None else self._heartbeat_s
        try:
            if self._is_busy or self._next.do_something or self._connection.poll(timeout):
                while self._connection.poll(0):
                    self._take(self._connection.recv(), submitted)
        except (EOFError, OSError):  # the command is gone
            self._next.finish = True
        return submitted

    def _take(self, command: protocol.Command, submitted: list[protocol.Submit]) -> None:
        if isinstance(command, protocol.Submit):
            submitted.append(command)
        elif isinstance(command, protocol.Cancel):
            submitted[:] = [submit for submit in submitted if submit.number != command.number]
            request = self._engine_number.pop(command.number, None)
            if request is not None:
                del self._running[request]
                self._next.cancelled.append(request)
        else:
            self._next.finish = True

    def _accepted(
        self, submitted: Iterable[protocol.Submit]
    ) -> tuple[list[tuple[protocol.Submit, SamplingParams]], list[Any]]:
        """The requests that the engine can take, and the rejections of the others. No rank has seen any of them."""
        accepted, events = [], []
        for submit in submitted:
            try:
                params = SamplingParams(**submit.params)
                if params.seed is None:
                    params = replace(params, seed=self._engine.any_seed())
                self._engine.check(submit.prompt, params)
                accepted.append((submit, params))
            except ConfigError as error:
                events.append(protocol.Rejected(submit.number, error.cause, error.remedy))
        return accepted, events

    def _note(self, numbers: list[int], accepted: list[tuple[protocol.Submit, SamplingParams]]) -> None:
        for request, (submit, params) in zip(numbers, accepted, strict=True):
            streams = [TextStream(self._model.tokenizer, submit.prompt, submit.stop) for _ in range(params.n)]
            self._running[request] = _Running(submit.number, params, streams, [0] * params.n, [False] * params.n)
            self._engine_number[submit.number] = request

    def _events(self, output: Any) -> list[Any]:
        updates: dict[tuple[int, int], protocol.Update] = {}
        for new in output.tokens:
            request = self._running.get(new.request)
            if request is None or request.done[new.completion]:
                continue  # cancelled, or generated in the same step as a stop string
            key = (new.request, new.completion)
            update = updates.setdefault(key, protocol.Update(request.number, new.completion))
            update.tokens.append(protocol.ScoredToken(new.token, new.logprob, new.top_logprobs))
            self._advance(new.request, request, new.token, update)
        finished = [self._finished(number, result) for number, result in output.finished.items()]
        return [*updates.values(), *(event for event in finished if event is not None)]

    def _advance(self, number: int, request: _Running, token: int, update: protocol.Update) -> None:
        """Add a token to the text of a continuation, which may end with it."""
        index, params = update.completion, request.params
        stream = request.streams[index]
        request.counts[index] += 1
        if token in params.stop_token_ids:
            update.finish_reason = "stop"
        else:
            update.text += stream.push(token)
            if stream.stopped:
                update.finish_reason = "stop"
                self._next.ended.append((number, index))
            elif request.counts[index] == params.max_new_tokens:
                update.finish_reason = "length"
        if update.finish_reason is not None:
            request.done[index] = True
            update.text += stream.end()
            if stream.stopped:  # by the last characters, which were incomplete
                update.finish_reason = "stop"

    def _finished(self, number: int, result: RequestOutput) -> protocol.Finished | None:
        request = self._running.pop(number, None)
        if request is None:
            return None
        del self._engine_number[request.number]
        if result.prompt_logprobs is None:
            return protocol.Finished(request.number)
        tops = result.prompt_top_logprobs or [{} for _ in result.prompt_logprobs]
        scored = [protocol.ScoredToken(-1, p, top) for p, top in zip(result.prompt_logprobs, tops, strict=True)]
        return protocol.Finished(request.number, scored)

    def _report(self, events: list[Any]) -> None:
        engine = self._engine
        load = protocol.Load(
            engine.num_blocks - engine.num_free_blocks, engine.num_running, engine.num_waiting
        )  # fmt: skip
        try:
            self._connection.send(protocol.StepReport(events, load))
        except OSError:  # the command is gone, which the next `_receive` finds
            self._next.finish = True
