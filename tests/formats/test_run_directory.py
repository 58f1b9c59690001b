import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_train.formats import run_directory
from parallel.errors import CheckpointError


def make(root: Path, name: str) -> Path:
    """A checkpoint directory with the files that every checkpoint has."""
    partial = run_directory.prepare(root, name)
    for file in (run_directory.STATE, run_directory.CONFIG, run_directory.METADATA):
        (partial / file).write_text(name)
    return run_directory.publish(root, name)


def test_a_checkpoint_appears_only_when_published(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    partial = run_directory.prepare(root, "step_00000010")
    (partial / "file").write_text("content")
    assert run_directory.candidates(root) == []
    assert not (root / "latest").exists()
    final = run_directory.publish(root, "step_00000010")
    assert run_directory.candidates(root) == [final]
    assert (final / "file").read_text() == "content"
    assert (root / "latest").read_text() == "step_00000010\n"
    assert sorted(os.listdir(root)) == ["latest", "step_00000010"]


def test_what_latest_names_comes_first_then_by_step(tmp_path: Path) -> None:
    for step in (10, 9, 100_000_000, 20):  # the last is the newest; the third has a longer name
        make(tmp_path, run_directory.name_of(step))
    names = [path.name for path in run_directory.candidates(tmp_path)]
    assert names == ["step_00000020", "step_100000000", "step_00000010", "step_00000009"]
    (tmp_path / "latest").unlink()
    assert run_directory.candidates(tmp_path)[0].name == "step_100000000"
    for text in (
        b"step_00000099",
        b"",
        b"\xff\xfe/../..",
        b"step_00000010\nstep_00000020",
    ):  # deleted by hand, or garbage
        (tmp_path / "latest").write_bytes(text)
        assert run_directory.candidates(tmp_path)[0].name == "step_100000000"
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").mkdir()
    assert run_directory.candidates(tmp_path)[0].name == "step_100000000"


def test_leftovers_of_a_killed_write_go_with_the_next(tmp_path: Path) -> None:
    first = make(tmp_path, "step_00000010")
    (run_directory.prepare(tmp_path, "step_00000020") / "half").write_text("x")
    assert run_directory.candidates(tmp_path) == [first]
    (tmp_path / ".latest.0123456789abcdef.part").write_text("step_0")
    run_directory.prepare(tmp_path, "step_00000030")
    assert sorted(os.listdir(tmp_path)) == [".step_00000030.partial", "latest", "step_00000010"]


def test_replacing_a_checkpoint_never_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "step_00000010")
    partial = run_directory.prepare(tmp_path, "step_00000010")
    (partial / run_directory.STATE).write_text("new")
    real, renamed = os.rename, []

    def killed_between(source: Path, target: Path) -> None:
        if renamed:
            raise KeyboardInterrupt
        renamed.append(target)
        real(source, target)

    monkeypatch.setattr(os, "rename", killed_between)
    with pytest.raises(KeyboardInterrupt):
        run_directory.publish(tmp_path, "step_00000010")
    monkeypatch.undo()
    assert (
        run_directory.candidates(tmp_path) == []
    )  # looking changes nothing: a living run may be between the two steps
    run_directory.recover(tmp_path)
    (found,) = run_directory.candidates(tmp_path)
    assert (found / run_directory.STATE).read_text() == "step_00000010"
    new = make(tmp_path, "step_00000010")
    assert sorted(os.listdir(tmp_path)) == ["latest", new.name]


def test_looking_changes_nothing_while_a_run_writes(tmp_path: Path) -> None:
    make(tmp_path / "checkpoints", "step_00000010")
    (run_directory.prepare(tmp_path / "checkpoints", "step_00000020") / "half").write_text("x")
    (tmp_path / "checkpoints" / ".step_00000005.removed").mkdir()
    (tmp_path / "checkpoints" / ".step_00000004.replaced").mkdir()

    def everything() -> list[tuple[str, int]]:
        return sorted((str(path), path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))

    before = everything()
    (found,) = run_directory.resolve(tmp_path, "resume")
    run_directory.check_files(found)
    run_directory.damaged(found, "for a test")
    assert everything() == before


def test_a_path_may_be_a_checkpoint_its_directory_or_its_run(tmp_path: Path) -> None:
    final = make(tmp_path / "checkpoints", "step_00000010")
    for path in (final, final.parent, tmp_path):
        assert run_directory.resolve(path, "resume") == [final]


def test_wrong_paths_are_explained(tmp_path: Path) -> None:
    final = make(tmp_path / "checkpoints", "step_00000010")
    with pytest.raises(CheckpointError, match=r"resume=.*step_00000011 does not exist; did you mean .*step_00000010"):
        run_directory.resolve(final.parent / "step_00000011", "resume")
    empty = tmp_path / "elsewhere" / "empty"
    empty.mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"init_from=.*empty holds no checkpoint; name a directory like"):
        run_directory.resolve(empty, "init_from")
    (empty / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"is a Hugging Face model, not a checkpoint"):
        run_directory.resolve(empty, "init_from")


def test_missing_files_are_named_with_the_other_checkpoints(tmp_path: Path) -> None:
    older, newer = make(tmp_path, "step_00000010"), make(tmp_path, "step_00000020")
    run_directory.check_files(newer)
    (newer / run_directory.STATE).unlink()
    with pytest.raises(CheckpointError, match=rf"state.json is missing; set resume={older}"):
        run_directory.check_files(newer)


def test_no_torch_is_imported() -> None:
    program = (
        "import sys, moe_train.formats.run_directory, moe_train.formats.run_config; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_links_among_leftovers_are_removed_and_not_followed(tmp_path: Path) -> None:
    victim, root = tmp_path / "victim", tmp_path / "checkpoints"
    victim.mkdir()
    (victim / "data").write_text("data")
    root.mkdir()
    (root / ".step_00000001.partial").symlink_to(victim)
    (root / ".step_00000002.removed").symlink_to(victim / "data")
    (root / ".latest.0123456789abcdef.part").symlink_to(victim / "data")
    assert list(run_directory.prepare(root, "step_00000001").iterdir()) == []
    run_directory.write_latest(root, "step_00000001")
    assert (root / "latest").read_text() == "step_00000001\n"
    assert not (root / ".step_00000002.removed").is_symlink()
    assert [path.read_text() for path in victim.iterdir()] == ["data"]


def test_latest_and_state_are_read_up_to_a_size(tmp_path: Path) -> None:
    """4,096 bytes and 16 MiB. Spaces count for nothing but the size."""
    for step in (10, 20):
        make(tmp_path, run_directory.name_of(step))
    name = "step_00000010"
    for size, first in ((4096, name), (4097, "step_00000020")):
        (tmp_path / "latest").write_text(name.ljust(size))
        assert run_directory.candidates(tmp_path)[0].name == first
    state = tmp_path / name / run_directory.STATE
    state.write_text('{"format": 2}'.ljust(2**24))
    assert run_directory.read_state(tmp_path / name) == {"format": 2}
    state.write_text('{"format": 2}'.ljust(2**24 + 1))
    with pytest.raises(run_directory.DamagedCheckpoint, match="it has more than 16,777,216 bytes"):
        run_directory.read_state(tmp_path / name)


@pytest.mark.parametrize("text", ["[]", "2", "{}", '{"format": "2"}', '{"format": true}', '{"format": 2.0}'])
def test_a_state_has_a_whole_number_as_its_format(text: str, tmp_path: Path) -> None:
    checkpoint = make(tmp_path, "step_00000010")
    (checkpoint / run_directory.STATE).write_text(text)
    with pytest.raises(run_directory.DamagedCheckpoint, match="it has no format"):
        run_directory.read_state(checkpoint)
