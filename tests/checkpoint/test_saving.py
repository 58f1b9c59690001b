"""Checkpoints that are written while training goes on, and on the nodes' own disks first."""

import os
import resource
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from moe_train.checkpoint import checkpoint, storage
from moe_train.formats import dcp_metadata, manifest
from moe_train.loop.callbacks import checkpoint as module
from moe_train.loop.callbacks.checkpoint import CheckpointCallback
from moe_train.run import Run
from parallel.errors import CheckpointError
from tests.checkpoint import small_run
from tests.distributed.helper import run_distributed


def save_both_ways(run_dir: Path, degrees: small_run.Degrees, changes: dict[str, Any]) -> list[manifest.Files]:
    """The files of two checkpoints of one step: saved while the run waits, and while it makes two more steps.

    The writer begins only after those.
    """
    run = small_run.prepare(small_run.config(run_dir, degrees, **small_run.two_micro_batches(degrees) | changes))
    small_run.train(run, 2)
    found = [manifest.read(checkpoint.save(run)) or {}]
    write, trained = storage.Share.write, threading.Event()

    def write_late(self: storage.Share, where: Path, stop: threading.Event) -> storage.Written:
        assert trained.wait(60)
        return write(self, where, stop)

    storage.Share.write = write_late  # type: ignore[method-assign]
    saving = checkpoint.begin(run)
    small_run.train(run, 2)
    assert not saving.advance()
    trained.set()
    assert saving.wait() == run_dir / "checkpoints" / "step_00000002"
    storage.Share.write = write  # type: ignore[method-assign]
    found.append(manifest.read(saving.job.final) or {})
    after = small_run.bits(run)
    checkpoint.resume(run)
    assert run.state.step == 2
    small_run.train(run, 2)
    assert small_run.bits(run) == after  # going on from it is the same as not having stopped
    return found


@pytest.mark.parametrize(
    ("degrees", "changes"),
    [
        ({"tp": 2}, {"precision__dtype": "bf16"}),
        ({"pp": 2}, {"parallel__distributed_optimizer": False}),
        ({"ep": 2}, {}),
    ],
)
def test_what_is_written_during_training_is_the_state_at_its_step(
    tmp_path: Path, degrees: small_run.Degrees, changes: dict[str, Any]
) -> None:
    for waiting, overlapped in run_distributed(save_both_ways, 2, tmp_path, degrees, changes):
        assert {name for name in waiting if name.endswith(".distcp")} == {"__0_0.distcp", "__1_0.distcp"}
        for name in ("__0_0.distcp", "__1_0.distcp", "state.json", "config.yaml"):
            assert waiting[name] == overlapped[name]


def count_plans(run_dir: Path) -> list[tuple[int, set[str]]]:
    """After each save how often ranks have gathered their parts, and the tensors that the checkpoint has."""
    gathered, reduce_scatter = 0, storage._DistWrapper.reduce_scatter

    def counted(self: Any, *arguments: Any) -> Any:
        nonlocal gathered
        gathered += 1
        return reduce_scatter(self, *arguments)

    storage._DistWrapper.reduce_scatter = counted  # type: ignore[method-assign]
    found = []
    run = small_run.prepare(small_run.config(run_dir, {"ep": 2}, **small_run.two_micro_batches({"ep": 2})))
    other = storage.share_of
    for step in range(4):
        small_run.train(run, 1)
        if step == 2:  # one rank alone has something more

            def share_of(state: dict[str, Any]) -> storage.Share:
                more = ShardedTensor.from_rank_offsets("more", torch.ones(3), replica_id=0)
                return other(state | {"more": more} if dist.get_rank() == 1 else state)

            storage.share_of = share_of
        saved = checkpoint.save(run)
        found.append((gathered, set(dcp_metadata.read(saved).state_dict_metadata)))
        storage.share_of = other
    storage._DistWrapper.reduce_scatter = reduce_scatter  # type: ignore[method-assign]
    return found


def test_ranks_gather_who_writes_what_only_where_it_has_changed(tmp_path: Path) -> None:
    for first, second, third, fourth in run_distributed(count_plans, 2, tmp_path):
        assert [first[0], second[0], third[0], fourth[0]] == [1, 1, 2, 3]
        assert first[1] == second[1] == fourth[1] == third[1] - {"more"}
        assert "more" in third[1]


def fail_and_recover(run_dir: Path) -> list[Any]:
    """Rank 1 cannot write at steps 2 and 3. The steps after which each rank is told of it, and what is there then."""
    cfg = small_run.config(run_dir, {}, checkpoint__interval_steps=1, checkpoint__asynchronous=True)
    cfg.checkpoint.max_consecutive_failures, cfg.checkpoint.keep_last = 3, 2
    run, callback = small_run.prepare(cfg), CheckpointCallback()
    seen = []
    for step in range(1, 6):
        small_run.train(run, 1)
        if step in (2, 4) and dist.get_rank() == 1:
            limit = 100_000 if step == 2 else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        callback.on_step_end(run, {})
        callback.finish(run)
        seen.append(callback._failed)
        dist.barrier()
    return [seen, sorted(os.listdir(checkpoint.root_of(run)))]


def test_a_writer_that_fails_is_a_warning_on_every_rank_and_the_next_is_tried(tmp_path: Path) -> None:
    for seen, left in run_distributed(fail_and_recover, 2, tmp_path):
        assert seen == [0, 1, 2, 0, 0]
        assert left == ["latest", "step_00000004", "step_00000005"]


def fail_too_often(run_dir: Path) -> list[Any]:
    """Where a run ends that can never write, and with which line."""
    cfg = small_run.config(run_dir, {}, checkpoint__interval_steps=1, checkpoint__asynchronous=True)
    cfg.checkpoint.max_consecutive_failures = 2
    run, callback = small_run.prepare(cfg), CheckpointCallback()
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    try:
        for _ in range(5):
            small_run.train(run, 1)
            callback.on_step_end(run, {})
    except CheckpointError as error:
        return [run.state.step, str(error).partition(": this rank needs")[0]]
    return []


def test_too_many_failures_in_a_row_end_the_run_on_every_rank_in_one_step(tmp_path: Path) -> None:
    first, second = run_distributed(fail_too_often, 2, tmp_path)
    assert first == second
    assert first[0] == 3  # noticed when the next is due, at the latest
    assert first[1].endswith("/.step_00000002.partial/__1_0.distcp: File too large")


def fail_to_start_a_thread(run_dir: Path) -> list[Any]:
    """Rank 1 has no address space for the stack of another thread at step 2. What each rank is told, how long it took,
    and the checkpoints after step 3."""
    run, callback = small_run.prepare(small_run.config(run_dir, {}, checkpoint__interval_steps=1)), CheckpointCallback()
    told: list[str] = []
    warn, module.warn = module.warn, told.append
    small_run.train(run, 1)
    callback.on_step_end(run, {})
    small_run.train(run, 1)
    before = resource.getrlimit(resource.RLIMIT_AS)
    if dist.get_rank() == 1:
        threading.stack_size(2**30)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, before[1]))
    began = time.monotonic()
    callback.on_step_end(run, {})
    seconds = time.monotonic() - began
    threading.stack_size(0)
    resource.setrlimit(resource.RLIMIT_AS, before)
    small_run.train(run, 1)
    callback.on_step_end(run, {})
    module.warn = warn
    return [told, seconds, sorted(os.listdir(checkpoint.root_of(run)))]


def test_a_thread_that_cannot_start_is_a_failed_checkpoint_on_every_rank_at_once(tmp_path: Path) -> None:
    first, second = run_distributed(fail_to_start_a_thread, 2, tmp_path, timeout_s=60)
    assert second[0] == []  # the first rank speaks for all
    (line,) = first[0]
    assert "can't start new thread; raise the limits on memory and processes" in line
    assert "not saved; 1 in a row" in line
    for _, seconds, left in (first, second):
        assert seconds < 20
        assert left == ["latest", "step_00000001", "step_00000003"]


def on_two_nodes(run_dir: Path, **changes: Any) -> Run:
    """A run in which each of two ranks has a node of its own."""
    rank = dist.get_rank()
    run = small_run.prepare(small_run.config(run_dir, {}, **changes))
    run.cfg.checkpoint.local_dir = str(run_dir / f"node{rank}")
    run.rank = replace(run.rank, local_rank=0, local_world_size=1)
    return run


def local_names(run_dir: Path, node: int) -> list[list[str]]:
    """Files of each checkpoint on a node's disk."""
    (root,) = (run_dir / f"node{node}").iterdir()
    return [sorted(path.name for path in step.iterdir()) for step in sorted(root.iterdir())]


def save_near_only(run_dir: Path) -> list[Any]:
    """Save at step 1 in both places, and lose the run at step 2 when it is on the nodes' disks only."""
    run = on_two_nodes(run_dir)
    small_run.train(run, 1)
    checkpoint.save(run)
    small_run.train(run, 1)
    saving = checkpoint.begin(run)
    saving.job.send = lambda: (_ for _ in ()).throw(OSError(5, "Input/output error"))  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match="Input/output error"):
        saving.wait()
    return [small_run.bits(run), local_names(run_dir, dist.get_rank()), os.listdir(run_dir / "checkpoints")]


def resume_on_two_nodes(run_dir: Path) -> list[Any]:
    """The step at which the run goes on, its state, and the checkpoints that are shared."""
    run = on_two_nodes(run_dir)
    checkpoint.resume(run)
    return [run.state.step, small_run.bits(run), sorted(os.listdir(run_dir / "checkpoints"))]


def test_the_nodes_disks_are_written_first_and_used_while_no_node_is_lost(tmp_path: Path) -> None:
    saved = run_distributed(save_near_only, 2, tmp_path / "run")
    small = [".metadata", "common.pt", "config.yaml", "manifest.json", "metadata.json", "state.json"]
    assert [near[-1] for _, near, _ in saved] == [sorted([*small, "__0_0.distcp"]), ["__1_0.distcp"]]
    for _, _, shared in saved:
        assert sorted(shared) == ["latest", "step_00000001"]

    names = ["latest", "step_00000001", "step_00000002"]
    resumed = run_distributed(resume_on_two_nodes, 2, tmp_path / "run")
    assert resumed == [[2, bits, names] for bits, _, _ in saved]
    manifest_of_both = manifest.read(tmp_path / "run" / "checkpoints" / "step_00000002")
    assert manifest_of_both is not None
    manifest.check(tmp_path / "run" / "checkpoints" / "step_00000002", manifest_of_both, 0, 1)
    # What is damaged where it is shared is whole on the nodes.
    (tmp_path / "run" / "checkpoints" / "step_00000002" / "__1_0.distcp").write_bytes(b"damage")
    assert run_distributed(resume_on_two_nodes, 2, tmp_path / "run") == resumed
    # With a node its files are lost.
    shutil.rmtree(tmp_path / "run" / "node1")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000002")
    lost = run_distributed(resume_on_two_nodes, 2, tmp_path / "run")
    assert [[step, shared] for step, _, shared in lost] == [[1, names[:2]]] * 2


def begin_again(run_dir: Path) -> None:
    """One step of another run in the directories of the one before."""
    run = on_two_nodes(run_dir, resume="never")
    checkpoint.resume(run)
    assert run.state.step == 0
    small_run.train(run, 1)
    checkpoint.save(run)


def test_another_run_does_not_go_on_from_what_an_earlier_one_left_on_the_nodes(tmp_path: Path) -> None:
    run_distributed(save_near_only, 2, tmp_path)
    shutil.move(tmp_path / "checkpoints", tmp_path / "earlier")  # as the launcher does
    run_distributed(begin_again, 2, tmp_path)
    assert [step for step, *_ in run_distributed(resume_on_two_nodes, 2, tmp_path)] == [1, 1]
    for node in ("node0", "node1"):
        assert sum("earlier" in path.name for path in (tmp_path / node).iterdir()) == 1
