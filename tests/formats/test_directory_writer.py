"""A directory that is written appears whole or not at all, also when the process that writes it ends."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_train.formats import directory_writer
from moe_train.formats.communicator import Communicator, SingleProcess, TorchCommunicator
from moe_train.formats.directory_writer import FileJob, WritePlan, WriteResult, partial_of
from moe_train.formats.hashing_file import HashingFile
from parallel.errors import CheckpointError, MoeTrainError
from tests.conversion import tiny_v3
from tests.conversion.tiny_v3 import files_of
from tests.distributed.helper import run_distributed
from tests.launch.programs import ROOT, environment

Write = Callable[[HashingFile], Any]


def content(number: int) -> bytes:
    return random.Random(number).randbytes(5_000 + number)


def toy(target: Path, files: int = 5, identity: int = 1, **special: Write) -> WritePlan:
    """A plan of a few small files. `special` gives files another writer, by `file_N`."""

    def write(number: int, out: HashingFile) -> list[int]:
        out.write(content(number))
        return [number, out.position]

    def job(number: int) -> FileJob:
        usual: Write = lambda out: write(number, out)  # noqa: E731
        return FileJob(f"{number}.bin", 5_000, special.get(f"file_{number}", usual))

    def finish(facts: dict[str, Any]) -> dict[str, bytes]:
        return {"table.json": str(facts).encode(), "sub/small": b"small"}

    return WritePlan(target, {"identity": identity}, [job(i) for i in range(files)], finish)


def write(plan: WritePlan, comm: Communicator | None = None, threads: int = 1) -> WriteResult:
    return directory_writer.run(plan, comm or SingleProcess(), threads)


def fails(error: BaseException) -> Write:
    def write(out: HashingFile) -> None:
        out.write(b"half")
        raise error

    return write


@pytest.fixture
def good(tmp_path: Path) -> dict[str, bytes]:
    """The files of the toy plan, written in peace."""
    write(toy(tmp_path / "good"))
    found = files_of(tmp_path / "good")
    shutil.rmtree(tmp_path / "good")
    assert sorted(found) == ["0.bin", "1.bin", "2.bin", "3.bin", "4.bin", "manifest.json", "sub/small", "table.json"]
    assert all(found[f"{i}.bin"] == content(i) for i in range(5))
    return found


def in_child(action: Callable[[], Any]) -> int:
    """Exit code of a forked process that does `action`."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


CALLS = [(os, name) for name in ("replace", "rename", "fsync", "mkdir", "unlink", "open")] + [(shutil, "rmtree")]


def die_at(number: int) -> None:
    """End this process, without any cleaning up, before the `number`-th call that changes the file system."""
    counted = iter(range(10_000))

    def wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(counted) == number:
                os._exit(9)
            return original(*args, **kwargs)

        return call

    for module, name in CALLS:
        setattr(module, name, wrapped(getattr(module, name)))


def test_a_crash_between_any_two_calls_leaves_nothing_that_looks_complete(
    tmp_path: Path,
) -> None:
    target, crashes, published = tmp_path / "target", 0, 0
    write(toy(tmp_path / "good", files=2))
    good = files_of(tmp_path / "good")
    for number in range(10_000):

        def crash(number: int = number) -> None:
            die_at(number)
            write(toy(target, files=2))

        code = in_child(crash)
        if code == 0:
            break
        assert code == 9
        crashes += 1
        if target.exists():
            published += 1
            assert {n: b for n, b in files_of(target).items() if n != ".writing/lock"} == good
        else:
            assert in_child(lambda: write(toy(target, files=2))) == 0
            assert files_of(target) == good
        assert not partial_of(target).exists()
        shutil.rmtree(target)
    assert crashes > 30
    assert published > 0
    assert files_of(target) == good


def many_small_files(tmp_path: Path, direction: str) -> list[str]:
    """Arguments of a conversion of some 15 MB into hundreds of files, and its undisturbed result, `good`."""
    source = tiny_v3.write(tmp_path / "hf", tiny_v3.weights(experts=28), n_routed_experts=28)
    small = "convert.file_gb=0.00006"
    if direction == "to hf":
        assert in_child(lambda: command([str(source), str(tmp_path / "megatron")])) == 0
        source = tmp_path / "megatron"
    words = [str(source), str(tmp_path / "target"), small, "convert.threads=1"]
    assert in_child(lambda: command([words[0], str(tmp_path / "good"), *words[2:]])) == 0
    return words


def complete_in(partial: Path) -> set[str]:
    try:
        records = os.listdir(partial / ".writing" / "done")
    except FileNotFoundError:
        return set()
    return {name.removesuffix(".json") for name in records if name.endswith(".json")}


def command(words: list[str]) -> None:
    """`moe-convert` in this process."""
    sys.argv = ["moe-convert", *words]
    try:
        tiny_v3.convert.main()
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"moe-convert ended with {end.code}") from end


def forked(words: list[str]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            os.nice(10)  # so that it is killed at once when its time has come
            command(words)
        finally:
            os._exit(0)
    return pid


def installed(words: list[str]) -> int:
    log = os.open(os.devnull, os.O_WRONLY)
    program = [shutil.which("nice") or "nice", "-n", "10", str(Path(sys.executable).parent / "moe-convert")]
    actions = [(os.POSIX_SPAWN_DUP2, log, 1), (os.POSIX_SPAWN_DUP2, log, 2)]
    try:
        return os.posix_spawn(program[0], [*program, *words], environment(), file_actions=actions)
    finally:
        os.close(log)


@pytest.mark.parametrize("direction", ["to megatron", "to hf"])
@pytest.mark.parametrize("start", [forked, pytest.param(installed, marks=pytest.mark.slow)])
def test_kill_9_at_ten_random_moments(
    start: Callable[[list[str]], int], direction: str, tmp_path: Path, convert: tiny_v3.Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Each time the conversion goes on with what it had; in the end it is as if nothing had happened."""
    monkeypatch.chdir(ROOT)
    words = many_small_files(tmp_path, direction)
    target, partial = tmp_path / "target", partial_of(tmp_path / "target")
    total = len([name for name in files_of(tmp_path / "good") if name.endswith((".distcp", ".safetensors"))])
    assert total > 100
    moments = random.Random(direction)
    done: dict[str, int] = {}
    for wanted in sorted(moments.sample(range(1, total * 2 // 3), 10)):
        pid = start(words)
        deadline = time.monotonic() + 120
        while len(complete_in(partial)) < wanted and time.monotonic() < deadline:
            assert os.waitpid(pid, os.WNOHANG) == (0, 0), "the conversion ended before it was to be killed"
            time.sleep(0.002)
        time.sleep(moments.random() * 0.005)  # anywhere within a file
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        assert not target.exists()
        for name, written in done.items():
            assert (partial / name).stat().st_mtime_ns == written, "a complete file was written again"
        complete = complete_in(partial)
        assert len(complete) >= wanted
        done = {name: (partial / name).stat().st_mtime_ns for name in complete}
    finished = convert.well(*words)
    assert f"{total} files, {len(done)} of them from an earlier try" in finished.out
    assert all((target / name).stat().st_mtime_ns == written for name, written in done.items())
    assert files_of(target) == files_of(tmp_path / "good")
    assert not partial.exists()


def test_another_plan_starts_anew(tmp_path: Path, good: dict[str, bytes]) -> None:
    target = tmp_path / "target"
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(CheckpointError, match=r"No space .* the 3 complete files in .* are kept"):
        write(toy(target, identity=2, file_3=fails(full)))
    assert write(toy(target)).reused == 0
    assert files_of(target) == good


def test_the_same_plan_goes_on(tmp_path: Path, good: dict[str, bytes]) -> None:
    target = tmp_path / "target"
    with pytest.raises(CheckpointError, match=r"4\.bin: Input/output error"):
        write(toy(target, file_4=fails(OSError(errno.EIO, "Input/output error"))))
    untouched: Write = lambda out: pytest.fail("a complete file was written again")  # noqa: E731
    special = {f"file_{i}": untouched for i in (0, 3)}
    partial = partial_of(target)
    (partial / "1.bin").write_bytes(b"short")
    (partial / ".writing" / "done" / "2.bin.json").write_text("[]")
    assert write(toy(target, **special)).reused == 2
    assert files_of(target) == good


def test_an_error_that_would_come_again_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the source is damaged; restore it"):
        write(toy(tmp_path / "target", file_3=fails(CheckpointError("the source is damaged", "restore it"))))
    assert os.listdir(tmp_path) == []


def test_a_bug_shows_where_it_is(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        write(toy(tmp_path / "target", file_3=fails(ZeroDivisionError())))
    assert write(toy(tmp_path / "target")).reused == 3  # and the lock is free again


def test_files_begin_in_their_order_and_none_after_one_has_failed(tmp_path: Path) -> None:
    begun: list[int] = []

    def begins(number: int) -> Write:
        def write(out: HashingFile) -> None:
            begun.append(number)
            time.sleep(0.001)  # time for others to push forward
            if number == 30:
                raise OSError(errno.EIO, "Input/output error")

        return write

    with pytest.raises(CheckpointError, match="the 30 complete files"):
        write(toy(tmp_path / "target", files=60, **{f"file_{i}": begins(i) for i in range(60)}))
    assert begun == list(range(31))


def test_a_target_that_appears_meanwhile_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "target"

    def appears(out: HashingFile) -> None:
        target.mkdir()
        (target / "mine").write_text("mine")

    with pytest.raises(CheckpointError, match="target"):
        write(toy(target, file_2=appears))
    assert files_of(target) == {"mine": b"mine"}


def test_any_number_of_threads_writes_the_same(tmp_path: Path, good: dict[str, bytes]) -> None:
    write(toy(tmp_path / "target"), threads=4)
    assert files_of(tmp_path / "target") == good


def test_two_at_a_time_do_not_mix(tmp_path: Path, good: dict[str, bytes]) -> None:
    """The second is refused while the first writes, and finds the target afterwards."""
    target, seen = tmp_path / "target", []

    def second(out: HashingFile) -> list[int]:
        with pytest.raises(CheckpointError, match="is being written by another process"):
            write(toy(target))
        seen.append(partial_of(target).is_dir())
        out.write(content(2))
        return [2, out.position]

    write(toy(target, file_2=second))
    assert seen == [True]
    assert files_of(target) == good
    with pytest.raises(CheckpointError, match="exists"):
        write(toy(target))


# ---- several processes ----


class Threads:
    """Ranks of a comm that are threads of this process."""

    def __init__(self, size: int) -> None:
        self.size, self._barrier, self._values = size, threading.Barrier(size, timeout=20), [None] * size

    def rank(self, rank: int) -> Communicator:
        outer = self

        class Rank:
            size = outer.size

            def __init__(self) -> None:
                self.rank = rank

            def all_gather(self, value: Any) -> list[Any]:
                outer._values[rank] = value
                outer._barrier.wait()
                values = list(outer._values)
                outer._barrier.wait()
                return values

            def broadcast(self, value: Any) -> Any:
                return self.all_gather(value)[0]

        return Rank()

    def run(self, action: Callable[[Communicator], Any]) -> list[Any]:
        """What `action` returns or raises on each rank."""
        results: list[Any] = [None] * self.size

        def work(rank: int) -> None:
            try:
                results[rank] = action(self.rank(rank))
            except MoeTrainError as error:
                results[rank] = str(error)

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert not any(thread.is_alive() for thread in threads), "a rank waits without end"
        return results


@pytest.mark.parametrize("size", [2, 3, 7])
def test_a_team_writes_the_same(size: int, tmp_path: Path, good: dict[str, bytes]) -> None:
    wrote: set[tuple[int, int]] = set()

    def recording(rank: int, number: int) -> Write:
        def write(out: HashingFile) -> list[int]:
            wrote.add((rank, number))
            out.write(content(number))
            return [number, out.position]

        return write

    def work(comm: Communicator) -> WriteResult:
        special = {f"file_{i}": recording(comm.rank, i) for i in range(5)}
        return write(toy(tmp_path / "target", **special), comm)

    assert Threads(size).run(work) == [WriteResult(5, sum(len(content(i)) for i in range(5)), 0)] * size
    assert files_of(tmp_path / "target") == good
    assert wrote == {(number % size, number) for number in range(5)}  # each rank did its share


@pytest.mark.parametrize(
    ("error", "mentions", "kept"),
    [
        (CheckpointError("the source is damaged", "restore it"), "the source is damaged; restore it", False),
        (OSError(errno.ENOSPC, "No space left on device"), "3.bin: No space left on device; free space", True),
        (ZeroDivisionError("by zero"), "rank 1: ZeroDivisionError: by zero", True),
    ],
    ids=["typed", "disk", "bug"],
)
def test_an_error_of_one_rank_ends_all_of_them(
    error: Exception, mentions: str, kept: bool, tmp_path: Path, good: dict[str, bytes]
) -> None:
    """With the same line, so that the first rank can print it."""
    plan = toy(tmp_path / "target", file_3=fails(error))
    lines = Threads(2).run(lambda comm: write(plan, comm))
    assert lines[0] == lines[1]
    assert lines[0].startswith(mentions) or mentions in lines[0]
    assert ("complete files" in lines[0]) is kept
    assert partial_of(tmp_path / "target").exists() is kept
    outcome = Threads(2).run(lambda comm: write(toy(tmp_path / "target"), comm))[0]
    assert (outcome.reused >= 3) is kept
    assert files_of(tmp_path / "target") == good


def test_a_target_that_exists_ends_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    lines = Threads(3).run(lambda comm: write(toy(tmp_path / "target"), comm))
    assert len(set(lines)) == 1
    assert "exists" in lines[0]


def test_a_rank_that_fails_before_writing_ends_all_ranks() -> None:
    def plan(comm: Communicator) -> Any:
        def action() -> str:
            if comm.rank == 1:
                raise CheckpointError("no file on this node", "mount it")
            return "fine"

        return directory_writer.together(comm, action)

    assert Threads(2).run(plan) == ["no file on this node; mount it"] * 2
    assert Threads(2).run(lambda comm: directory_writer.together(comm, lambda: comm.rank)) == [0, 1]


def convert_together(source: Path, target: Path) -> WriteResult:
    from moe_train.config.checkpoint_tools import ConvertConfig
    from moe_train.config.roots import ConvertRoot
    from tools.convert import make_plan

    comm = TorchCommunicator()
    cfg = ConvertRoot(convert=ConvertConfig(file_gb=0.0003))
    plan = directory_writer.together(comm, lambda: make_plan(cfg, source, target, comm=comm))
    torch.set_num_threads(1)
    return directory_writer.run(plan, comm, threads=1)


def test_ranks_of_a_training_run_convert_together(tmp_path: Path, convert: tiny_v3.Command) -> None:
    source = tiny_v3.write(tmp_path / "hf", tiny_v3.weights(), files=2)
    convert.well(source, tmp_path / "alone", "convert.file_gb=0.0003")
    outcomes = run_distributed(convert_together, 2, source, tmp_path / "together")
    assert outcomes[0] == outcomes[1]
    assert outcomes[0].files > 4
    assert files_of(tmp_path / "together") == files_of(tmp_path / "alone")
