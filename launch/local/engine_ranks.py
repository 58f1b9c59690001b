"""Ranks that generate for this process: started in the background, with a connection to rank 0.

The process that starts them owns the terminal, the files or the HTTP server. It needs neither torch nor the model.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import queue
import secrets
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

from launch.local import forkserver
from moe_train.config.inference import EngineConfig
from moe_train.config.schema import Config
from moe_train.inference import protocol, setup
from parallel.errors import LaunchError
from parallel.layout import ParallelLayout

_POLL_S = 0.1
_END_S = 10.0
"""What ranks get to end by themselves, seconds."""


@dataclass(frozen=True)
class Lost:
    """The last event of every request that was running when the ranks ended."""

    error: BaseException


Event = protocol.Update | protocol.Finished | protocol.Rejected | Lost
Deliver = Callable[[Event], None]
"""Is called in another thread, for each event of a request in its order. It must return at once."""


class EngineRanks:
    """The ranks of one model.

    Args:
        cfg: from `moe_train.inference.source.config_of`; its run_dir is replaced by a temporary one.
        longest: tokens of the longest sequence that will be submitted; None: what the model allows.
    """

    def __init__(self, cfg: Config, layout: ParallelLayout, engine: EngineConfig, longest: int | None = None) -> None:
        self._cfg, self._layout, self._engine, self._longest = cfg, layout, engine, longest
        self._numbers = itertools.count()
        # Rank 0 reads commands between two steps, and the connection holds few of them. So a thread of its own sends:
        # who submits or cancels, such as the event loop of a server, does not wait.
        self._commands: queue.SimpleQueue[protocol.Command | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # of everything below
        self._connection: Connection | None = None
        self._deliver: dict[int, Deliver] = {}
        self._failure: BaseException | None = None
        self._ended = False
        self._is_ready = threading.Event()
        self._ready: protocol.Ready | None = None
        self._launcher = threading.Thread(target=self._launch, name="launcher", daemon=True)
        self.load = protocol.Load()
        """After the last step."""

    def start(self) -> None:
        """Start the ranks, and return while they load the model."""
        if self._cfg.runtime == "cpu":
            forkserver.begin()
        else:
            forkserver.begin_on_cpu()
        self._launcher.start()

    def wait(self) -> protocol.Ready:
        """Return once the model is loaded.

        Raises:
            MoeTrainError: a rank failed.
        """
        while not self._is_ready.wait(_POLL_S):  # with a timeout, so that a signal is noticed
            pass
        if self._ready is None:
            raise self.error
        return self._ready

    @property
    def is_alive(self) -> bool:
        """Whether the model is loaded and no rank has ended."""
        return self._ready is not None and not self._ended

    @property
    def error(self) -> BaseException:
        """Why the ranks have ended."""
        return self._failure or LaunchError("the ranks have ended", "start the command again")

    def submit(self, prompt: Sequence[int], params: dict[str, Any], stop: Sequence[str], deliver: Deliver) -> int:
        """Queue a request, and return its number. `deliver` gets its events.

        Args:
            prompt: token ids.
            params: values of `SamplingParams`, by name.
            stop: strings that end a continuation.
        """
        number = next(self._numbers)
        with self._lock:
            is_lost = self._ended
            if not is_lost:
                self._deliver[number] = deliver
        if is_lost:
            deliver(Lost(self.error))
        else:
            self._send(protocol.Submit(number, list(prompt), dict(params), tuple(stop)))
        return number

    def cancel(self, number: int) -> None:
        """Forget a request and free its blocks. One that has ended is left alone."""
        with self._lock:
            is_running = self._deliver.pop(number, None) is not None
        if is_running:
            self._send(protocol.Cancel(number))

    def close(self) -> None:
        """End the ranks, and what they have not finished."""
        self._send(protocol.Finish())
        self._launcher.join(_END_S if self._is_ready.is_set() else 0)
        if self._launcher.is_alive():
            forkserver.kill()  # with which its ranks end
            for process in multiprocessing.active_children():
                process.kill()
            self._launcher.join(_END_S)

    def __enter__(self) -> EngineRanks:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, command: protocol.Command) -> None:
        if self._connection is not None:
            self._commands.put(command)

    def _write(self, connection: Connection) -> None:
        """Send commands in their order, until None."""
        with contextlib.suppress(OSError):  # the launcher's thread reports why rank 0 is gone
            while (command := self._commands.get()) is not None:
                connection.send(command)

    def _launch(self) -> None:
        """The launcher's thread, to the end of the ranks."""
        try:
            with tempfile.TemporaryDirectory(prefix="moe-") as directory, self._listening() as (address, key):
                self._start_ranks(replace(self._cfg, run_dir=directory), address, key)
        except BaseException as error:
            self._failure = error
        with self._lock:
            self._ended = True
            left, self._deliver = list(self._deliver.values()), {}
        for deliver in left:
            deliver(Lost(self.error))
        self._is_ready.set()

    def _start_ranks(self, cfg: Config, address: str, key: bytes) -> None:
        from launch import failures, job

        with failures.packages():
            from launch.local import launcher

            job.resolve_runtime(cfg)
            if cfg.runtime == "cuda":
                job.check_gpus(self._layout, job.visible_gpus())
            setup.write(Path(cfg.run_dir), setup.EngineSetup(self._engine, self._longest, address, key))
            launcher.start(cfg, self._layout, setup.ENTRY)

    @contextlib.contextmanager
    def _listening(self) -> Iterator[tuple[str, bytes]]:
        """Accept rank 0 and read what it reports, in a thread of its own."""
        key = secrets.token_bytes(32)
        with Listener(None, "AF_UNIX", authkey=key) as listener:
            thread = threading.Thread(target=self._read, args=[listener], name="reports", daemon=True)
            thread.start()
            yield str(listener.address), key
        if self._ready is not None:
            thread.join(_END_S)

    def _read(self, listener: Listener) -> None:
        try:
            with listener.accept() as connection, self._writing(connection):
                while True:
                    self._take(connection.recv(), connection)
        except (EOFError, OSError):  # rank 0 has ended; the launcher's thread says why
            return

    @contextlib.contextmanager
    def _writing(self, connection: Connection) -> Iterator[None]:
        """Commands are sent inside the block."""
        thread = threading.Thread(target=self._write, args=[connection], name="commands", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._commands.put(None)
            thread.join(_END_S)  # before the connection is closed

    def _take(self, report: protocol.Report, connection: Connection) -> None:
        if isinstance(report, protocol.Ready):
            with self._lock:
                self._ready, self._connection = report, connection
            self._is_ready.set()
            return
        self.load = report.load
        for event in report.events:
            with self._lock:
                last = not isinstance(event, protocol.Update)
                deliver = self._deliver.pop(event.number, None) if last else self._deliver.get(event.number)
            if deliver is not None:
                deliver(event)
