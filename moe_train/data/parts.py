"""A corpus in tokenised parts: written by several processes, kept over an interruption, merged into one dataset.

Part N is N.tokens, the ids of its documents end to end, and N.npy, their lengths, which is written last. What is in a
part depends on the corpus alone, so any number of processes writes the same bytes.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from moe_train.config.schema import DataConfig
from moe_train.data import corpus
from moe_train.data.report import Report
from moe_train.data.tokenizer import Tokenizer
from moe_train.files import atomic
from parallel.errors import DataError
from parallel.exit_codes import ExitCode

_PART_CHARACTERS = 2_000_000
_SHUFFLE_SEED = 0  # fixed, so that every run splits the same documents into training and validation


def tokenize(
    data: DataConfig, files: list[Path], tokenizer: Path, parts: Path, dtype: np.dtype[Any], bar: Progress,
    report: Report,
) -> int:  # fmt: skip
    """Write every part that is not there yet; returns how many parts the corpus has.

    Args:
        report: counts what is read and left out, also of parts that are there already.

    Raises:
        DataError: the corpus cannot be read, or a process was killed.
    """
    workers = data.prepare_workers or os.cpu_count() or 1
    count = 0
    context = multiprocessing.get_context("spawn")  # a fork would copy locks of the tokenizer's threads
    alive, writer = context.Pipe(duplex=False)
    setup = (alive, tokenizer, parts, dtype, data)
    pool = ProcessPoolExecutor(workers, context, _start_worker, setup)
    waiting: deque[Future[None]] = deque()  # bounded, so that the text in memory is too
    task = bar.add_task("tokenising", total=sum(file.stat().st_size for file in files))
    try:
        texts_of = corpus.documents(data, files, lambda f: bar.advance(task, f.stat().st_size), report)
        for texts in _batches(texts_of):
            if not _lengths(parts, count).exists():
                if len(waiting) >= 2 * workers:
                    waiting.popleft().result()
                with _no_interrupt():
                    waiting.append(pool.submit(_tokenize_part, count, texts))
            count += 1
        while waiting:
            waiting.popleft().result()
    except BrokenProcessPool as error:
        raise DataError("a process that tokenises was killed", "free memory or set data.prepare_workers=1") from error
    except BaseException:
        for child in multiprocessing.active_children():  # nothing that one of them waits for may hold the others up
            child.kill()
        raise
    finally:
        writer.close()  # the workers end now: what they still do is not wanted after an error, and nothing otherwise
        pool.shutdown(cancel_futures=True)
        alive.close()
    return count


@contextlib.contextmanager
def _no_interrupt() -> Iterator[None]:
    """Hold Ctrl-C back for a moment. Processes that start in it never see it, and the parent acts on it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    """The corpus in pieces of about `_PART_CHARACTERS`."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _PART_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _tokens(parts: Path, number: int) -> Path:
    return parts / f"{number:06d}.tokens"


def _lengths(parts: Path, number: int) -> Path:
    return parts / f"{number:06d}.npy"


_worker: dict[str, Any] = {}


def _start_worker(alive: Connection, tokenizer: Path, parts: Path, dtype: np.dtype[Any], data: DataConfig) -> None:
    threading.Thread(target=_end_with_parent, args=(alive,), daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process a core already
    tokenizer_of_worker = Tokenizer(tokenizer, data.eod_token, data.bos_token, data.parse_special_tokens)
    begin = [tokenizer_of_worker.bos] if data.prepend_bos else []
    end = [tokenizer_of_worker.eod] if data.append_eod else []
    _worker.update(tokenizer=tokenizer_of_worker, parts=parts, dtype=dtype, begin=begin, end=end)


def _end_with_parent(alive: Connection) -> None:
    """Idle workers of a pool outlive a parent that was killed: they hold both ends of the queue that they wait for."""
    alive.poll(None)  # nothing is ever sent, so this returns when the other end is closed or its process has ended
    os._exit(ExitCode.FAILED)


def _tokenize_part(number: int, texts: list[str]) -> None:
    tokenizer: Tokenizer = _worker["tokenizer"]
    begin, end = _worker["begin"], _worker["end"]
    documents = [np.asarray(begin + ids + end, dtype=_worker["dtype"]) for ids in tokenizer.encode_batch(texts)]
    for path, array in (
        (_tokens(_worker["parts"], number), np.concatenate(documents)),
        (_lengths(_worker["parts"], number), np.asarray([len(d) for d in documents], dtype=np.int64)),
    ):
        with atomic.replacement(path) as temporary, temporary.open("xb") as file:
            array.tofile(file) if path.suffix == ".tokens" else np.save(file, array)


def merge(
    parts: Path, count: int, bin_path: Path, idx_path: Path, dtype: np.dtype[Any], bar: Progress
) -> tuple[int, int]:
    """Shuffle the documents of all parts into one indexed dataset, so that its splits have the same distribution.

    Returns:
        how many documents and tokens it has.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    lengths = [np.load(_lengths(parts, number), allow_pickle=False) for number in range(count)]
    where = np.repeat(np.arange(count), [len(part) for part in lengths])
    starts = np.concatenate([np.cumsum(part) - part for part in lengths])
    sizes = np.concatenate(lengths)
    order = np.random.default_rng(_SHUFFLE_SEED).permutation(np.flatnonzero(sizes))
    builder = IndexedDatasetBuilder(str(bin_path), dtype=dtype.type)
    for i in bar.track(order, description="shuffling"):
        size = int(sizes[i])
        # Opened for each document: a corpus may have more parts than a process may have open files.
        document = np.fromfile(_tokens(parts, where[i]), dtype, size, offset=int(starts[i]) * dtype.itemsize)
        if len(document) != size:
            raise DataError(f"{_tokens(parts, where[i])} is damaged", f"delete {parts} and run the command again")
        builder.add_document(document, [size])
    builder.finalize(str(idx_path))
    return len(order), int(sizes.sum())
