from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from moe_train.config.schema import DataConfig
from moe_train.data import corpus, readers
from moe_train.data.files import source_files
from moe_train.data.report import Reason, Report
from parallel.errors import DataError
from tests.data.corpora import config, texts

TEXTS = ["first text\n", "zweiter Text: ä ß 漢字 🙂\n", "third\r\nwith three\n\nlines\n"]


def read(path: Path, **changes: object) -> list[str]:
    data = config(path, path.parent / "unused", **changes)
    return list(corpus.documents(data, source_files(data)))


def jsonl(documents: list[str], key: str = "text") -> bytes:
    return b"".join(json.dumps({"id": i, key: d}).encode() + b"\n" for i, d in enumerate(documents))


def parquet(documents: list[str | None], path: Path, key: str = "text") -> None:
    pyarrow.parquet.write_table(pyarrow.table({"id": range(len(documents)), key: documents}), path)


def several_frames(content: bytes) -> bytes:
    half = len(content) // 2
    return b"".join(zstandard.ZstdCompressor().compress(part) for part in (content[:half], content[half:]))


WRITERS: dict[str, Callable[[Path], object]] = {
    "a.jsonl": lambda p: p.write_bytes(jsonl(TEXTS)),
    "a.jsonl.gz": lambda p: p.write_bytes(gzip.compress(jsonl(TEXTS))),
    "a.jsonl.zst": lambda p: p.write_bytes(zstandard.ZstdCompressor().compress(jsonl(TEXTS))),
    "frames.jsonl.zst": lambda p: p.write_bytes(several_frames(jsonl(TEXTS))),
    "a.parquet": lambda p: parquet([*TEXTS, None], p),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_text_as_it_was_written(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    assert read(tmp_path / name) == TEXTS


def test_a_zst_file_larger_than_every_buffer_is_read_whole(tmp_path: Path) -> None:
    documents = texts(4000, words=100)
    (tmp_path / "a.jsonl.zst").write_bytes(several_frames(jsonl(documents)))
    assert read(tmp_path / "a.jsonl.zst") == documents


@pytest.mark.parametrize("name", ["a.txt", "a.md"])
def test_a_text_file_is_a_document_with_unix_line_ends_and_no_byte_order_mark(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    assert read(tmp_path / name) == ["one\ntwo\n"]


def test_one_big_txt_file_becomes_enough_documents_for_every_split_and_loses_nothing(tmp_path: Path) -> None:
    paragraphs = [text + "\n" for text in texts(3000)]
    whole = "".join(paragraphs)
    (tmp_path / "a.txt").write_text(whole)
    found = read(tmp_path / "a.txt")
    assert "".join(found) == whole
    assert len(found) > 100
    assert all(piece.endswith(".\n\n") for piece in found), "cut between paragraphs"


def test_text_without_blank_lines_is_cut_at_line_ends(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(texts(300)))
    found = read(tmp_path / "a.txt")
    assert "".join(found) == "".join(texts(300))
    assert len(found) > 5
    assert all(piece.endswith(".\n") for piece in found)


def test_where_a_text_file_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first blank line after 20 characters, else at the first line end after 40. Lines have 8 characters."""
    monkeypatch.setattr(corpus, "_SMALLEST_PIECE_CHARACTERS", 20)
    paragraph = ["1234567\n", "\n", "1234567\n", "\n", "\n", "\n"]  # 20 characters: the last blank line is the cut
    lines = [*paragraph, *paragraph, *["1234567\n"] * 7]
    (tmp_path / "a.txt").write_text("".join(lines))
    data = config(tmp_path / "a.txt", tmp_path / "unused")
    (file,) = source_files(data)
    found = list(readers.read(readers.FileSpan(file), data, 20, Report()))
    assert [piece.text for piece in found] == ["".join(paragraph)] * 2 + ["1234567\n" * 5, "1234567\n" * 2]
    assert [str(piece.where) for piece in found] == [f"{file} line {first}" for first in (1, 7, 13, 18)]


REPEATED = ["One  two\nthree", "one two three", " ONE TWO THREE ", "One  two\nthree", "one two", "", " \n"]


def counted(path: Path, **changes: object) -> tuple[list[str], dict[str, int], Report]:
    """Documents, how often something was left out, and the report."""
    data, report = config(path, path.parent / "unused", **changes), Report()
    found = list(corpus.documents(data, source_files(data, report), report=report))
    assert report.kept == len(found)
    dropped = (Reason.SHORT, Reason.DUPLICATE, Reason.NULL, Reason.BAD_RECORD)
    assert report.documents == report.kept + sum(report.counts.get(reason, 0) for reason in dropped)
    return found, {reason.name: count for reason, count in report.counts.items()}, report


@pytest.mark.parametrize(("deduplicate", "kept", "duplicates"), [("exact", 4, 1), ("none", 5, 0), ("normalized", 2, 3)])
def test_only_equal_documents_are_left_out_and_counted_unless_asked_otherwise(
    tmp_path: Path, deduplicate: str, kept: int, duplicates: int
) -> None:
    """Case and indentation are part of source code."""
    (tmp_path / "a.jsonl").write_bytes(jsonl(REPEATED))
    usual, counts, report = counted(tmp_path / "a.jsonl", deduplicate=deduplicate)
    assert len(usual) == kept
    assert counts == {"SHORT": 2} | ({"DUPLICATE": duplicates} if duplicates else {})
    assert (report.files, report.documents) == (1, 7)
    if duplicates == 1:
        assert str(report.first[Reason.DUPLICATE]) == f"{tmp_path}/a.jsonl line 4"


def test_short_documents_are_left_out_where_that_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(REPEATED))
    assert counted(tmp_path / "a.jsonl", min_characters=8, deduplicate="none")[:2] == (
        REPEATED[:4],
        {"SHORT": 3},
    )
    assert len(counted(tmp_path / "a.jsonl", min_characters=0, deduplicate="none")[0]) == 7


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_null_text_is_counted_or_named_by_its_place(tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        file.write_text('{"text": "a"}\n{"text": null}\n{"text": null}\n')
    else:
        parquet(["a", None, None], file)
    found, counts, report = counted(file)
    assert (found, counts) == (["a"], {"NULL": 2})
    place = f"{file} {'line' if kind == 'jsonl' else 'row'} 2"
    assert str(report.first[Reason.NULL]) == place
    with pytest.raises(DataError) as caught:
        read(file, null_text="error")
    assert str(caught.value) == f"{place} has null under 'text'; correct the record, or set data.null_text=skip"


def test_bad_records_and_files_are_counted_where_that_is_asked_for(tmp_path: Path) -> None:
    """What is before the damage in a file is kept."""
    lines = [b'{"text": "a"}', b"{", b'{"body": "x"}', b'{"text": 5}', b'{"text": "\xe4"}', b"[]", b'{"text": "b"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "b.jsonl.gz").write_bytes(cut(gzip.compress(jsonl(["c"]), mtime=0)))
    (tmp_path / "c.txt").write_bytes("\xe4\n".encode("latin-1"))
    (tmp_path / "d.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"a\.jsonl line 2 is not JSON.*data\.bad_records=skip"):
        read(tmp_path)
    found, counts, report = counted(tmp_path, bad_records="skip")
    assert found == ["a", "b"]
    assert counts == {"BAD_RECORD": 5, "BAD_FILE": 3}
    assert str(report.first[Reason.BAD_RECORD]).startswith(f"{tmp_path}/a.jsonl line 2 is not JSON")
    assert str(report.first[Reason.BAD_FILE]).startswith(f"{tmp_path}/b.jsonl.gz cannot be read")


def test_parquet_text_in_another_encoding_is_named_by_its_row(tmp_path: Path) -> None:
    wrong = pyarrow.array([b"a", b"\xe4"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": wrong}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet row 2 is not UTF-8 text \(byte 0\).*data\.bad_records=skip"):
        read(tmp_path)
    assert counted(tmp_path, bad_records="skip")[:2] == (["a"], {"BAD_RECORD": 1})


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_another_encoding_is_read_where_it_is_named(tmp_path: Path, name: str) -> None:
    text = "\xe4 \xf6\n"
    content = json.dumps({"text": text}, ensure_ascii=False) if name.endswith("jsonl") else text
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=r"line 1 is not UTF-8 text .*set data\.encoding"):
        read(tmp_path)
    assert read(tmp_path, encoding="latin-1") == [text]


def test_half_of_a_surrogate_pair_becomes_a_replacement_character(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "bad \\ud83d end"}\n{"text": "pair \\ud83d\\ude42"}\n')
    assert read(tmp_path / "a.jsonl") == ["bad \ufffd end", "pair 🙂"]


def cut(content: bytes) -> bytes:
    return content[: len(content) * 2 // 3]


def broken(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + b"\xff\x00\xff\x00\xff\x00" + content[middle + 6 :]


LONG = jsonl(texts(300))
GZ, ZST = gzip.compress(LONG, mtime=0), zstandard.ZstdCompressor(write_checksum=True).compress(LONG)
WRONG: dict[str, tuple[str, bytes, str]] = {
    "not json": ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', "a.jsonl line 3 is not JSON: Expecting value"),
    "nested too deep": ("a.jsonl", b"[" * 100_000, "a.jsonl line 1 is not JSON"),
    "no field": ("a.jsonl", b'{"body": "a", "id": 1}\n', "a.jsonl line 1 has no text under 'text' (it has body, id)"),
    "not an object": ("a.jsonl", b'["a"]\n', "a.jsonl line 1 has no text under 'text' (it has a list)"),
    "not text": ("a.jsonl", b'{"text": 5}\n', "a.jsonl line 1 has no text under 'text'"),
    "jsonl not utf-8": ("a.jsonl", b'{"text": "a"}\n{"text": "\xe4"}\n', "a.jsonl line 2 is not UTF-8 text (byte 10"),
    "txt not utf-8": ("a.txt", "ä\nöx".encode("latin-1"), "a.txt line 1 is not UTF-8 text"),
    "gz not gz": ("a.jsonl.gz", LONG, "a.jsonl.gz cannot be read: Not a gzipped file"),
    "gz cut": ("a.jsonl.gz", cut(GZ), "a.jsonl.gz cannot be read"),
    "gz broken": ("a.jsonl.gz", broken(GZ), "a.jsonl.gz"),
    "zst not zst": ("a.jsonl.zst", LONG, "a.jsonl.zst cannot be read"),
    "zst cut": ("a.jsonl.zst", cut(ZST), "a.jsonl.zst cannot be read: it ends in the middle of a frame"),
    "zst broken": ("a.jsonl.zst", broken(ZST), "a.jsonl.zst"),
    "parquet not parquet": ("a.parquet", LONG, "a.parquet is not a whole parquet file"),
    "unknown kind": ("a.rst", b"text", "a.rst is of an unknown kind"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_damaged_file_is_named_with_its_line_and_its_text_is_never_cut_silently(tmp_path: Path, name: str) -> None:
    file, content, cause = WRONG[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read(tmp_path / file)
    assert cause in str(caught.value)
    assert caught.value.remedy
    assert caught.value.exit_code == 2


def test_parquet_columns_that_are_absent_or_not_text_and_cut_files(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    parquet(TEXTS, file, key="body")
    with pytest.raises(DataError, match=r"a\.parquet has no column 'text' \(it has id, body\)"):
        read(file)
    assert read(file, text_key="body") == TEXTS
    with pytest.raises(DataError, match=r"a\.parquet column 'id' holds int, not text"):
        read(file, text_key="id")
    file.write_bytes(cut(file.read_bytes()))
    with pytest.raises(DataError, match=r"a\.parquet is not a whole parquet file"):
        read(file)


def test_text_in_nested_fields_is_found_by_its_path(tmp_path: Path) -> None:
    """A field whose own name has a dot goes before."""
    records: list[dict[str, object]] = [{"message": {"content": text}} for text in TEXTS]
    (tmp_path / "a.jsonl").write_text(
        "\n".join(map(json.dumps, [*records, {"message": None}, {"message.content": "x"}]))
    )
    pyarrow.parquet.write_table(
        pyarrow.table({"message": [*(r["message"] for r in records), None]}), tmp_path / "a.parquet"
    )
    assert read(tmp_path / "a.jsonl", text_key="message.content") == [*TEXTS, "x"]
    assert read(tmp_path / "a.parquet", text_key="message.content") == TEXTS
    with pytest.raises(DataError, match=r"line 1 has no text under 'message\.body' \(it has content\)"):
        read(tmp_path / "a.jsonl", text_key="message.body")
    with pytest.raises(DataError, match=r"a\.parquet has no column 'message\.body' \(it has content in message\)"):
        read(tmp_path / "a.parquet", text_key="message.body")


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_the_ranges_of_a_file_have_each_of_its_documents_once(name: str, tmp_path: Path) -> None:
    """Wherever they are cut, in the middle of a line or at its end."""
    lines = ['{"text": "a"}', '{"text": "漢字 and more"}', "", '{"text": "b"}', '{"text": "cc"}']
    (tmp_path / name).write_text("\n".join(lines) + "\n")
    data, size = config(tmp_path, tmp_path / "unused"), (tmp_path / name).stat().st_size
    whole = [document.text for document in readers.read(readers.FileSpan(tmp_path / name), data, 1, Report())]
    assert len(whole) == (4 if name.endswith(".jsonl") else 5)
    for cut in range(1, size):
        found, count = [], 0
        for span in (readers.FileSpan(tmp_path / name, 0, cut), readers.FileSpan(tmp_path / name, cut)):
            read_lines = readers.Lines()
            for document in readers.read(span, data, 1, Report(), read_lines):
                assert document.offset is not None
                assert document.text in lines[document.number + count - 1] + "\n"
                found.append(document.text)
            count += read_lines.count
        assert count == 5
        assert "".join(found) == "".join(whole)


def warc(*records: tuple[str, str, bytes]) -> bytes:
    """Records of (WARC-Type, Content-Type, content)."""
    return b"".join(
        f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Record-ID: <urn:uuid:{i}>\r\nWARC-Date: 2026-01-01T00:00:00Z\r\n"
        f"Content-Type: {content_type}\r\nContent-Length: {len(content)}\r\n\r\n".encode()
        + content
        + b"\r\n\r\n"
        for i, (kind, content_type, content) in enumerate(records)
    )


RECORDS = [
    ("warcinfo", "application/warc-fields", b"software: test"),
    ("conversion", "text/plain", TEXTS[0].encode()),
    ("response", "application/http; msgtype=response", b"HTTP/1.1 200 OK\r\n\r\n<p>not text"),
    ("resource", "text/plain", TEXTS[1].encode()),
    ("conversion", "text/plain", b"\xe4"),
]


@pytest.mark.parametrize("suffix", [".warc", ".warc.gz", ".warc.wet.gz"])
def test_the_text_records_of_warc_files_are_read(suffix: str, tmp_path: Path) -> None:
    pytest.importorskip("fastwarc")
    content = warc(*RECORDS)
    file = tmp_path / f"a{suffix}"
    file.write_bytes(gzip.compress(content, mtime=0) if suffix.endswith(".gz") else content)
    found, counts, report = counted(tmp_path, bad_records="skip")
    assert (found, counts) == (TEXTS[:2], {"BAD_RECORD": 1})
    assert str(report.first[Reason.BAD_RECORD]) == f"{file} record 5 is not utf-8 text (byte 0)"
    file.write_bytes(cut(file.read_bytes()))
    with pytest.raises(DataError, match=r"a\.warc.*data\.bad_records=skip"):
        read(tmp_path)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.txt", tmp_path / "*.jsonl"):
        with pytest.raises(DataError, match=r"data\.path=.* has no .*\.parquet file; correct data\.path"):
            read(path)
    with pytest.raises(DataError, match=r"data\.path is not set"):
        source_files(DataConfig(source="files"))
