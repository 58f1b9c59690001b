"""Bounds on files that anyone may have written."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

import pytest

from moe_train.files import untrusted

BOMB = "\n".join(["a0: &a0 x", *(f"a{i}: &a{i} [{f'*a{i - 1},' * 9}]" for i in range(1, 10))])
REFUSED = {
    "Infinity": b"[Infinity]",
    "NaN": b'{"a": NaN}',
    "infinite": b"[1e999]",
    "long number": b"[" + b"1" * 100_000 + b"]",
    "number of 65 bits": b"[18446744073709551616]",
    "a name twice": b'{"a": 1, "b": {"c": 1, "c": 2}}',
    "100,000 levels": b"[" * 100_000,
    "65 levels": b"[" * 65 + b"]" * 65,
    "levels in names": b'{"a":' * 70 + b"1" + b"}" * 70,
    "too much memory": b"[" + b"[]," * 9_000_000 + b"[]]",
    "no UTF-8": b'"\xff"',
    "nothing": b"",
}


@pytest.mark.parametrize("name", REFUSED)
def test_json_that_is_refused(name: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the reasons differ
        untrusted.parse_json(REFUSED[name])


def test_json_that_is_read() -> None:
    assert untrusted.parse_json(b'{"a": [1, -2.5e3, null, true, "\\u00e9"], "b": 18446744073709551615}') == {
        "a": [1, -2500.0, None, True, "\u00e9"],
        "b": 2**64 - 1,
    }


@pytest.mark.parametrize(
    "text",
    [
        "a: &x [1]\nb: *x", "[" * 100, "[" + "[]," * 30_000 + "]", "a: [", "a: !!python/name:os.system", "\x00",
        "<<: *x", "- !!int 1:30", "a: !!set {b}", "a: ! 1", "a: 18446744073709551616", "a: 0x" + "f" * 17,
        pytest.param("a: " + "1" * 100_000, id="100,000 digits"),
        pytest.param(BOMB, id="billion laughs"),
    ],
)  # fmt: skip
def test_yaml_that_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text(text)
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the reasons differ
        untrusted.read_yaml(tmp_path / "file")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fits", "exceeds"),
    [
        (b"[" + b"1," * 58 + b"1]", b"[" + b"1," * 59 + b"1]"),  # 64 bytes of a list and 16 of each further item
        (b"[" * 15 + b"]" * 15, b"[" * 16 + b"]" * 16),
        (
            b"{" + b",".join(b'"%d":1' % i for i in range(8)) + b"}",
            b"{" + b",".join(b'"%d":1' % i for i in range(9)) + b"}",
        ),
    ],
)
def test_memory_of_a_json_text_is_bounded_before_it_is_parsed(
    fits: bytes, exceeds: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Containers take 64 bytes, entries of objects 100 and further items 16: here 1,000 in all are allowed."""
    monkeypatch.setattr(untrusted, "_LARGEST_PARSED_BYTES", 1000)
    untrusted.parse_json(fits)
    with pytest.raises(ValueError, match="GB of memory"):
        untrusted.parse_json(exceeds)


def test_the_name_that_occurs_twice_is_told() -> None:
    with pytest.raises(ValueError, match="it has 'b' twice"):
        untrusted.parse_json(b'{"a": 1, "b": 2, "c": 3, "b": 4, "c": 5}')


def test_yaml_up_to_each_bound_is_read(tmp_path: Path) -> None:
    """64 levels and 20,000 values. The list around the values is a value too."""
    file = tmp_path / "file"
    file.write_text("[" + "1," * 19_999 + "]")
    assert untrusted.read_yaml(file) == [1] * 19_999
    file.write_text("[" * 64 + "]" * 64)
    assert str(untrusted.read_yaml(file)) == "[" * 64 + "]" * 64
    file.write_text("[" * 65 + "]" * 65)
    with pytest.raises(ValueError, match="nested too deeply"):
        untrusted.read_yaml(file)
    file.write_text("[" + "1," * 20_000 + "]")
    with pytest.raises(ValueError, match="more than 20,000 values"):
        untrusted.read_yaml(file)
    for size in (2**18, 2**18 + 1):  # bytes
        file.write_text("a: " + "x" * (size - 3))
        if size == 2**18:
            assert len(untrusted.read_yaml(file)["a"]) == size - 3
        else:
            with pytest.raises(ValueError, match="more than 262,144 bytes"):
                untrusted.read_yaml(file)


@pytest.mark.parametrize("number", ["1:30:00", "-1:30", "190:20:30.15", "1" + ":59" * 80_000])
def test_base_60_numbers_are_text(number: str, tmp_path: Path) -> None:
    """PyYAML alone takes them for numbers, and quadratic time for the last one."""
    (tmp_path / "file").write_text(f"a: {number}")
    assert untrusted.read_yaml(tmp_path / "file") == {"a": number}


def test_yaml_of_plain_values_only(tmp_path: Path) -> None:
    text = "{a: 2001-01-01, <<: {b: 1}, =: 2, c: [~, yes, 0x10, 012, 1_0, -1.5e+3, .inf, 1e3, '7'], d: e:f}"
    (tmp_path / "file").write_text(text)
    assert untrusted.read_yaml(tmp_path / "file") == {
        "a": "2001-01-01", "<<": {"b": 1}, "=": 2, "c": [None, True, 16, 10, 10, -1500.0, float("inf"), "1e3", "7"],
        "d": "e:f",
    }  # fmt: skip


@dataclass
class Record:
    name: str
    count: int
    weight: float | None = None
    done: bool = False


def test_a_record_is_read_with_its_types(tmp_path: Path) -> None:
    (tmp_path / "file").write_text('{"name": "a", "count": 3, "weight": 0.5, "done": true}')
    assert untrusted.read_record(tmp_path / "file", Record) == Record("a", 3, 0.5, done=True)
    (tmp_path / "file").write_text('{"name": "a", "count": 3, "weight": null}')
    assert untrusted.read_record(tmp_path / "file", Record) == Record("a", 3)


@pytest.mark.parametrize(
    "text", ["[]", '{"name": "a"}', '{"name": "a", "count": 1, "more": 2}', '{"name": 1, "count": 1}',
             '{"name": "a", "count": true}', '{"name": "a", "count": 1, "done": 1}', '{"name": ["a"], "count": 1}'],
)  # fmt: skip
def test_a_record_of_other_fields_or_types_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text(text)
    with pytest.raises(ValueError):  # noqa: PT011 - the reasons differ
        untrusted.read_record(tmp_path / "file", Record)


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        for path, kind in ((tmp_path / "pipe", "named pipe"), (tmp_path / "socket", "socket"),
                           (Path("/dev/zero"), "device"), (tmp_path, "directory")):  # fmt: skip
            with pytest.raises(OSError, match=f"it is a {kind} and not a file"):
                untrusted.read_bytes(path, 10)


def test_links_are_followed_and_sizes_are_bounded(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"123")
    (tmp_path / "link").symlink_to("blob")
    assert untrusted.read_bytes(tmp_path / "link", 3) == b"123"
    with pytest.raises(ValueError, match="more than 2 bytes"):
        untrusted.read_bytes(tmp_path / "link", 2)


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (b"", [""]), (b"a", ["a"]), (b"a\n", ["a"]), (b"a\n\n", ["a", ""]), (b"a\nb\nc\n", ["b", "c"]),
        (b"1234\n67890\n", ["67890"]),  # of the first line only a part is read
        (b"12345678901\n", ["345678901"]),  # of the only line the end
        (b"\n\xff\n", ["", "\ufffd"]),
    ],
)  # fmt: skip
def test_the_last_lines_of_a_file(text: bytes, lines: list[str], tmp_path: Path) -> None:
    """Two lines, of which ten bytes are read."""
    (tmp_path / "file").write_bytes(text)
    assert untrusted.last_lines(tmp_path / "file", 2, 10) == lines


def test_a_bound_on_a_file_is_not_taken_from_memory(tmp_path: Path) -> None:
    """Where a process may have little memory, a small file with a large bound is read."""
    import tracemalloc

    (tmp_path / "file").write_bytes(b"text")
    tracemalloc.start()
    try:
        assert untrusted.read_bytes(tmp_path / "file", 1 << 30) == b"text"
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
