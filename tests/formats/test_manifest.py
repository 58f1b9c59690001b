import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from moe_train.formats import directory_writer, manifest
from parallel.errors import CheckpointError


def make(root: Path) -> Path:
    """A directory of three files and their manifest."""
    path = root / "step_00000010"
    path.mkdir()
    for name, content in (("a", b"alpha" * 100), (".b", b"beta"), ("c", b"")):
        (path / name).write_bytes(content)
    manifest.write(path, manifest.describe(path, {}))
    return path


def check(path: Path) -> None:
    """Every share of three ranks."""
    files = manifest.read(path)
    assert files is not None
    assert sorted(files) == [".b", "a", "c"]
    for rank in range(3):
        manifest.check(path, files, rank, 3)


def test_every_flipped_byte_of_every_file_is_found(tmp_path: Path) -> None:
    path = make(tmp_path)
    check(path)
    for file in path.iterdir():
        content = file.read_bytes()
        for i in range(0, len(content), 7):
            file.write_bytes(content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :])
            with pytest.raises(CheckpointError, match=f"damaged: {file.name} "):
                check(path)
        for shorter in (content[:-1], content[: len(content) // 2], b""):
            if shorter != content:
                file.write_bytes(shorter)
                with pytest.raises(CheckpointError, match=f"damaged: {file.name} (has|cannot)"):
                    check(path)
        file.write_bytes(content)
    check(path)
    (path / "c").unlink()
    with pytest.raises(CheckpointError, match="damaged: c is missing"):
        check(path)


def test_only_one_rank_looks_at_a_file(tmp_path: Path) -> None:
    path = make(tmp_path)
    files = manifest.read(path) or {}
    (path / "a").write_bytes(b"")
    found = []
    for rank in range(4):
        try:
            manifest.check(path, files, rank, 4)
        except CheckpointError:
            found.append(rank)
    assert len(found) == 1


def test_a_file_is_read_once_for_its_digest_and_another_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other reader gets every byte in order, also where the last block is not full."""
    monkeypatch.setattr(manifest, "_BLOCK_BYTES", 64)
    content, seen = bytes(range(256)) + b"end", bytearray()
    (tmp_path / "a").write_bytes(content)
    entry = manifest.entry_of(tmp_path / "a", also=seen.extend)
    assert bytes(seen) == content
    assert entry == manifest.Entry(259, hashlib.sha256(content).hexdigest())


def test_it_is_the_format_of_the_tools(tmp_path: Path) -> None:
    path = make(tmp_path)
    assert directory_writer.verify(path, 1) == (3, 504)
    (path / ".b").write_bytes(b"bet_")
    with pytest.raises(CheckpointError, match=r"\.b is damaged"):
        directory_writer.verify(path, 1)


def test_a_manifest_may_not_name_files_elsewhere(tmp_path: Path) -> None:
    path = make(tmp_path)
    entry = manifest.entry_of(path / "a")
    for name in ("../a", "/etc/passwd"):
        manifest.write(path, {name: entry})
        with pytest.raises(CheckpointError, match=r"manifest\.json cannot be read: it names files elsewhere"):
            manifest.read(path)


def test_no_torch_is_imported() -> None:
    program = "import sys, moe_train.formats.manifest, moe_train.checkpoint.retention; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
