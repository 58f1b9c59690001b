from __future__ import annotations

import os
import sysconfig
from pathlib import Path

import pytest

from moe_train.config.schema import DataConfig
from moe_train.data.files import fingerprint, source_files
from moe_train.data.report import Reason, Report
from parallel.errors import DataError
from tests.data.corpora import config, write_txt


def names(path: Path, **changes: object) -> tuple[list[str], dict[str, int]]:
    """Files that are read, relative to `path`, and counts of what is not."""
    data, report = config(path, Path(str(changes.pop("dir", path.parent / "unused"))), **changes), Report()
    root = path if path.is_dir() else path.parents[1]
    found = [str(file.relative_to(root)) for file in source_files(data, report)]
    return found, {reason.name: count for reason, count in report.counts.items()}


def test_directories_and_globs_are_read_in_one_order_and_leave_the_dataset_out(tmp_path: Path) -> None:
    write_txt(tmp_path / "b", ["b"])
    write_txt(tmp_path / "a", ["a"])
    write_txt(tmp_path / "out" / "cache", ["of the dataset"])
    (tmp_path / "notes.rst").write_text("not text of the corpus")
    files = ["a/00000.txt", "b/00000.txt"]
    assert names(tmp_path, dir=tmp_path / "out") == (files, {"OTHER_KIND": 1, "OWN": 1})
    assert names(tmp_path / "**" / "*.txt", dir=tmp_path / "out") == (files, {"OWN": 1})


def test_directories_behind_links_are_read_once_and_never_around(tmp_path: Path) -> None:
    root, elsewhere = write_txt(tmp_path / "root", ["a"]), write_txt(tmp_path / "elsewhere", ["b", "c"])
    write_txt(root / "z", ["d"])
    (root / "around").symlink_to(root)
    (root / "linked").symlink_to(elsewhere)
    (root / "linked again").symlink_to(elsewhere)
    (root / "m").symlink_to(root / "z")
    (root / "one.txt").symlink_to(elsewhere / "00000.txt")
    (root / "gone.txt").symlink_to(tmp_path / "nothing")
    (root / "self.txt").symlink_to("self.txt")
    own = ["00000.txt", "z/00000.txt"]
    found, counts = names(root)
    assert found == ["00000.txt", "linked/00000.txt", "linked/00001.txt", "z/00000.txt"]
    assert counts == {"SECOND_PATH": 4, "BROKEN_LINK": 2}
    found, counts = names(root, follow_links=False)
    assert found == [own[0], "one.txt", own[1]]
    assert counts == {"LINKED_DIRECTORY": 4, "BROKEN_LINK": 2}


def test_what_is_not_read_is_counted(tmp_path: Path) -> None:
    write_txt(tmp_path / "text", ["a", ""])
    os.mkfifo(tmp_path / "text" / "pipe.txt")
    (tmp_path / "text" / "image.png").write_bytes(b"x")
    assert names(tmp_path / "text") == (
        ["00000.txt"], {"EMPTY_FILE": 1, "NOT_REGULAR": 1, "OTHER_KIND": 1},
    )  # fmt: skip
    (tmp_path / "text" / "more.txt").mkdir()
    assert names(tmp_path / "text" / "*.txt")[1]["DIRECTORY"] == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every directory")
def test_a_directory_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    write_txt(tmp_path / "text", ["a"])
    (tmp_path / "text" / "closed").mkdir(mode=0)
    with pytest.raises(DataError, match="closed cannot be read: Permission denied"):
        names(tmp_path / "text")


def test_without_any_text_the_counts_say_what_was_found(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(DataError, match=r"has no \.txt.* file; 1 files of other kinds; correct data\.path"):
        source_files(config(tmp_path, tmp_path / "out"))


def test_the_report_names_what_changes_each_count() -> None:
    report = Report()
    report.add(Reason.DUPLICATE, "a.txt line 3", 2)
    assert report.to_dict()["left_out_or_changed"] == {
        "duplicate": {"what": "documents that repeat an earlier one", "count": 2, "first": "a.txt line 3"}
    }


def test_the_standard_library_has_its_own_sources_and_nobody_elses() -> None:
    files = source_files(DataConfig())
    root = Path(sysconfig.get_path("stdlib"))
    names = {str(file.relative_to(root)) for file in files}
    assert {"json/decoder.py", "asyncio/base_events.py", "dataclasses.py"} <= names
    assert not any("site-packages" in name or name.startswith("encodings/") for name in names)
    assert files == sorted(files)
    assert max(file.stat().st_size for file in files) <= 300_000


def test_the_fingerprint_changes_with_the_files_and_not_with_the_order_of_reading(tmp_path: Path) -> None:
    write_txt(tmp_path, ["a", "b"])
    data = config(tmp_path, tmp_path / "out")
    before = fingerprint(data, source_files(data))
    assert fingerprint(data, source_files(data)) == before
    (tmp_path / "00001.txt").write_text("c2")
    assert fingerprint(data, source_files(data)) != before
