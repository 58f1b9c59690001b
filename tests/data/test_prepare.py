from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from moe_train.config.model import ModelConfig
from moe_train.config.schema import DataConfig
from moe_train.data import prepare as prepare_module
from moe_train.data import shards, shuffle, team
from moe_train.data.files import Source, sources_of
from moe_train.data.manifest import PREFIX, read_manifest
from moe_train.data.pipeline import Pipeline, WrittenPair
from moe_train.data.prepare import prepare
from moe_train.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from parallel.errors import DataError
from tests.data.corpora import config, die, texts, write_txt

ROOT = Path(__file__).parents[2]
TEXTS = texts(400)
FILES = (f"{PREFIX}.bin", f"{PREFIX}.idx", "tokenizer.json")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_txt(tmp_path_factory.mktemp("text"), TEXTS)


@pytest.fixture(scope="module")
def made(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """A dataset made in one go by one process, as one part."""
    data = config(corpus, tmp_path_factory.mktemp("made"))
    prepare(data, 300, progress=False)
    return data


@pytest.fixture
def copy(made: DataConfig, tmp_path: Path) -> DataConfig:
    """A copy of it that a test may damage."""
    for file in Path(made.dir).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return replace(made, dir=str(tmp_path))


def content(data: DataConfig) -> dict[str, bytes]:
    return {name: Path(data.dir, name).read_bytes() for name in FILES}


def test_every_document_is_there_once_and_ends_with_the_end_token(made: DataConfig) -> None:
    tokenizer = load_tokenizer(made)
    dataset = IndexedDataset(f"{made.dir}/{PREFIX}")
    documents = [dataset[i] for i in range(len(dataset))]
    assert dataset.index.dtype == np.uint16
    assert all(d[-1] == tokenizer.eod and tokenizer.eod not in d[:-1] for d in documents)
    found = [tokenizer.decode(d[:-1].tolist()) for d in documents]
    assert sorted(found) == sorted(TEXTS)
    assert found != TEXTS, "shuffled, so that every split has text from everywhere"
    manifest = read_manifest(made, verify=True)
    assert (manifest["documents"], manifest["tokens"]) == (400, sum(map(len, documents)))
    assert sorted(manifest["files"]) == sorted(FILES)
    assert sorted(p.name for p in Path(made.dir).iterdir()) == sorted([*FILES, "manifest.json", ".lock"])


def test_any_number_of_processes_and_parts_writes_the_same_bytes(
    made: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_SMALLEST_SHARD_BYTES", 10_000)
    data = replace(made, dir=str(tmp_path), prepare_workers=3)
    prepare(data, 300, progress=False)
    assert content(data) == content(made)


# It stops after four parts, so that it cannot be done before the test ends it.
# A shell starts what runs in its background with SIGINT ignored, and Python then leaves it so.
KILLED = """
import json, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from moe_train.config.schema import DataConfig
from moe_train.data import shards
from moe_train.data.prepare import prepare
from moe_train.data.team import Team
shards._SMALLEST_SHARD_BYTES = 2_000
finish, done = Team._finish, []
def finish_four(self, task, *args):
    finish(self, task, *args)
    done.extend([task] if task.output.suffix == ".npy" and task.output.parent.name == "parts" else [])
    time.sleep(60 if len(done) == 4 else 0)
Team._finish = finish_four
prepare(DataConfig(**json.loads(sys.argv[1])), 300, progress=False)
"""


def test_a_killed_command_leaves_no_process_and_its_parts_are_used_again(
    made: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = replace(made, dir=str(tmp_path), prepare_workers=2)
    command = [sys.executable, "-c", KILLED, json.dumps(vars(data))]
    process = subprocess.Popen(command, cwd=ROOT)
    wait_for(lambda: len(finished(tmp_path)) >= 2)
    helpers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(helpers, timeout=20)
    assert not alive
    done = finished(tmp_path)
    assert len(done) >= 2
    assert not (tmp_path / "manifest.json").exists()
    with pytest.raises(DataError, match="has no dataset"):
        read_manifest(data)

    kept: dict[str, Any] = {}
    write = Pipeline.write

    def write_and_look(*args: Any) -> list[WrittenPair]:
        kept.update(finished(tmp_path))
        return write(*args)

    monkeypatch.setattr(shards, "_SMALLEST_SHARD_BYTES", 2_000)
    monkeypatch.setattr(Pipeline, "write", write_and_look)
    prepare(data, 300, progress=False)
    assert len(kept) > len(done), "killed in the middle"
    assert {name: kept[name] for name in done} == done, "not written a second time"
    assert content(data) == content(made)
    read_manifest(data, verify=True)


def finished(directory: Path) -> dict[str, tuple[int, int]]:
    """Finished parts, with what a second writing would change."""
    files = (directory / "parts").glob("*.npy")
    return {f.name: (f.stat().st_ino, f.stat().st_mtime_ns) for f in files}


def wait_for(condition: Any, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_interrupted_from_the_terminal_it_ends_soon_and_says_nothing_but_where(
    made: DataConfig, tmp_path: Path
) -> None:
    """Ctrl-C reaches the whole process group; the workers leave it to their parent."""
    data = replace(made, dir=str(tmp_path), prepare_workers=2)
    command = [sys.executable, "-c", KILLED, json.dumps(vars(data))]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        wait_for(lambda: finished(tmp_path))
        helpers = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode != 0
    assert re.findall("^KeyboardInterrupt", errors, re.MULTILINE) == ["KeyboardInterrupt"], f"the parent's:\n{errors}"
    assert "Process " not in errors, f"a worker has complained:\n{errors}"
    assert not psutil.wait_procs(helpers, timeout=10)[1]


def test_parts_of_other_settings_are_thrown_away(made: DataConfig, tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    (folder / "settings.json").write_text("{}")
    (folder / "tokenizer.done").touch()
    (tmp_path / "tokenizer.json").write_text("of other text")
    np.save(folder / "000000.npy", np.array([3]))
    (folder / "000000.tokens").write_bytes(b"\0" * 6)
    data = replace(made, dir=str(tmp_path))
    prepare(data, 300, progress=False)
    assert content(data) == content(made)


def test_files_of_an_earlier_tokenizer_go(made: DataConfig, tmp_path: Path) -> None:
    """They would be taken for companions of the new one. So would indices for those of the new dataset."""
    (tmp_path / "parts").mkdir()
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<other>"}')
    (tmp_path / "cache").mkdir()
    data = replace(made, dir=str(tmp_path))
    assert prepare(data, 300, progress=False) is True
    assert content(data) == content(made)
    assert not (tmp_path / "special_tokens_map.json").exists()
    assert not (tmp_path / "cache").exists()


def test_the_tokenizer_of_an_interrupted_run_is_used_again(
    made: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only where it was complete."""
    trained: list[Path] = []

    def train(texts: Any, vocab_size: int, path: Path) -> None:
        trained.append(path)
        train_tokenizer(texts, vocab_size, path)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_module, "train_tokenizer", train)
    data = replace(made, dir=str(tmp_path))
    for done in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Pipeline, "run", interrupt)
            with pytest.raises(KeyboardInterrupt):
                prepare(data, 300, progress=False)
        if not done:
            (tmp_path / "parts/tokenizer.done").unlink()
    prepare(data, 300, progress=False)
    assert len(trained) == 2
    assert content(data) == content(made)


def test_a_run_that_ended_before_its_manifest_goes_on(
    made: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its merged files are there, and its parts say that they are not those of another program."""

    def interrupt(_: Path) -> list[int]:
        raise KeyboardInterrupt

    data = replace(made, dir=str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "identity", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(data, 300, progress=False)
    assert (tmp_path / "text_document.bin").is_file()
    assert prepare(data, 300, progress=False)
    assert content(data) == content(made)


@pytest.mark.parametrize(("size", "dtype"), [(65_536, np.uint16), (65_537, np.int32)])
def test_every_id_has_room_in_a_token(
    size: int, dtype: type, made: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Large(Tokenizer):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.vocab_size = size

    found: list[Any] = []

    def pipeline(*args: Any) -> None:
        found.append(args[5])
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_module, "Tokenizer", Large)
    monkeypatch.setattr(prepare_module, "Pipeline", pipeline)
    with pytest.raises(KeyboardInterrupt):
        prepare(replace(made, dir=str(tmp_path)), 10**6, progress=False)
    assert found == [np.dtype(dtype)]


def test_documents_without_a_token_are_counted(
    made: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer may know none of the characters of a document."""
    write = Pipeline.write

    def fewer(*args: Any) -> list[WrittenPair]:
        return [replace(pair, documents=pair.documents - 2) for pair in write(*args)]

    monkeypatch.setattr(Pipeline, "write", fewer)
    data = replace(made, dir=str(tmp_path))
    prepare(data, 300, progress=False)
    found = read_manifest(data)["corpus"]
    assert found["kept"] == 398
    assert found["left_out_or_changed"]["no_tokens"]["count"] == 2


def test_a_full_disk_keeps_nothing_of_the_size_of_the_dataset(
    made: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokenised parts stay, since the next try continues with them."""

    def full(*args: Any) -> None:
        for path in args[2:4]:
            path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    data = replace(made, dir=str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(shuffle, "join", full)
        with pytest.raises(DataError, match="cannot be written: No space left on device"):
            prepare(data, 300, progress=False)
    assert sorted(os.listdir(tmp_path)) == [".lock", "parts", "tokenizer.json"]
    (tmp_path / f".{PREFIX}.bin.0123456789abcdef.part").write_bytes(b"half")  # of a try that was killed
    prepare(data, 300, progress=False)
    assert content(data) == content(made)
    assert sorted(os.listdir(tmp_path)) == sorted(os.listdir(made.dir))


def test_a_tokenizer_that_cannot_be_used_is_not_copied(made: DataConfig, tmp_path: Path) -> None:
    train_tokenizer(texts(5), 280, tmp_path / "tokenizer.json")
    data = replace(made, dir=str(tmp_path / "out"), tokenizer=str(tmp_path), eod_token="</s>")
    with pytest.raises(DataError, match=r"data\.eod_token=</s> is not a token of .*/tokenizer\.json"):
        prepare(data, 300, progress=False)
    assert not (tmp_path / "out/tokenizer.json").exists()
    assert not list((tmp_path / "out").glob(".*.part"))


def test_a_complete_dataset_is_left_as_it_is(copy: DataConfig) -> None:
    before = {f.name: f.stat().st_mtime_ns for f in Path(copy.dir).iterdir()}
    assert prepare(copy, 300, progress=False, verify=True) is False
    assert {f.name: f.stat().st_mtime_ns for f in Path(copy.dir).iterdir()} == before


@pytest.mark.parametrize(
    ("field", "value"),
    [("text_key", "body"), ("tokenizer_vocab_size", 290), ("append_eod", False), ("tokenizer", "DIR")],
)
def test_other_settings_are_noticed_and_nothing_is_overwritten(copy: DataConfig, field: str, value: object) -> None:
    before = content(copy)
    changes: dict[str, Any] = {field: copy.dir if value == "DIR" else value}
    with pytest.raises(DataError, match=rf"was made with other settings \(.*data\.{field}.*set data\.dir="):
        prepare(replace(copy, **changes), 300, progress=False)
    assert content(copy) == before


OTHER_TEXT: dict[str, Any] = {
    "source": "none", "path": "elsewhere", "text_key": "body", "encoding": "latin-1", "follow_links": False,
    "deduplicate": "none", "min_characters": 9, "max_characters": 99, "languages": ["en"], "filter": "builtins:len",
    "near_duplicates": 0.8, "null_text": "error", "bad_records": "skip",
    "tokenizer_vocab_size": 290, "append_eod": False, "eod_token": "</s>", "prepend_bos": True, "bos_token": "<s>",
    "parse_special_tokens": True,
}  # fmt: skip
SAME_TEXT: dict[str, Any] = {
    "name": "other", "dir": "moved", "split": "80,10,10", "reset_at_eod": True, "verify": "full", "cache_dir": "cache",
    "prepare_workers": 7, "prepare_memory_mib": 16, "prepare_tokenizer": "gigatoken", "loader_workers": 2,
}  # fmt: skip


def test_every_setting_that_changes_the_dataset_is_compared(corpus: Path, tmp_path: Path) -> None:
    data = config(corpus, tmp_path)
    sources = sources_of(data)
    made = prepare_module._settings(data, sources)
    for field, value in OTHER_TEXT.items():
        changed = prepare_module._changed(made, prepare_module._settings(replace(data, **{field: value}), sources))
        assert [name for name in changed if name != "corpus"] == [field]
    for field, value in SAME_TEXT.items():
        assert prepare_module._settings(replace(data, **{field: value}), sources) == made


def test_what_cannot_be_set_again_is_not_offered(copy: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Settings with a field can be put back, and the corpus cannot. They are named in order."""
    with pytest.raises(DataError, match=r"\(data\.append_eod, data\.text_key\); .* data\.append_eod=true data\."):
        prepare(replace(copy, append_eod=False, text_key="body"), 300, progress=False)
    text = write_txt(tmp_path_factory.mktemp("other"), texts(3))
    with pytest.raises(DataError, match=r"\(corpus, data\.path\); set data\.dir=NEW_DIRECTORY, or delete \S+$"):
        prepare(replace(copy, path=str(text)), 300, progress=False)


def test_a_dataset_is_not_taken_for_a_model_with_a_smaller_vocabulary(copy: DataConfig) -> None:
    assert prepare(copy, 300, progress=False) is False
    with pytest.raises(DataError, match=r"has 300 tokens, model\.vocab_size only 299"):
        prepare(copy, 299, progress=False)


def test_what_was_left_out_of_an_older_dataset_is_unknown(copy: DataConfig) -> None:
    path = Path(copy.dir, "manifest.json")
    manifest = json.loads(path.read_text())
    assert prepare_module.summary(manifest) == ["400 files with 400 documents read, 400 kept"]
    assert prepare_module.left_out(copy) == []
    del manifest["corpus"]
    path.write_text(json.dumps(manifest))
    assert prepare_module.summary(manifest) == prepare_module.left_out(copy) == []


def test_a_changed_corpus_is_noticed(tmp_path: Path) -> None:
    text = write_txt(tmp_path / "text", texts(30))
    data = config(text, tmp_path / "out")
    prepare(data, 300, progress=False)
    write_txt(text, texts(31))
    with pytest.raises(DataError, match=r"was made with other settings \(corpus\)"):
        prepare(data, 300, progress=False)


def test_a_changed_tokenizer_at_the_same_place_is_noticed(tmp_path: Path) -> None:
    text = write_txt(tmp_path / "text", texts(30))
    train_tokenizer(texts(30), 280, tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    data = config(text, tmp_path / "out", tokenizer=str(tmp_path))
    prepare(data, 300, progress=False)
    assert (
        load_tokenizer(data).unique_identifiers == load_tokenizer(replace(data, dir=str(tmp_path))).unique_identifiers
    )
    manifest = read_manifest(data, verify=True)
    assert "tokenizer_config.json" in manifest["files"]
    assert manifest["special_tokens"] == {"eod": "<|endoftext|>", "bos": None}
    assert prepare(replace(data, tokenizer_vocab_size=290), 300, progress=False) is False, "none is trained"
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "the"}')
    with pytest.raises(DataError, match=r"other settings \(tokenizer files\)"):
        prepare(data, 300, progress=False)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    train_tokenizer(texts(30, seed=1), 270, tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match=r"other settings \(tokenizer files\)"):
        prepare(data, 300, progress=False)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_cut_or_missing_is_noticed_at_once_and_a_flipped_bit_by_its_checksum(
    copy: DataConfig, name: str
) -> None:
    file = Path(copy.dir, name)
    whole = file.read_bytes()
    middle = len(whole) // 2
    file.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    with pytest.raises(DataError, match=rf"{name} is damaged.*delete .* and run moe-data"):
        prepare(copy, 300, progress=False, verify=True)
    file.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=rf"{name} is damaged"):
        prepare(copy, 300, progress=False)
    file.unlink()
    with pytest.raises(DataError, match=rf"{name} is missing"):
        prepare(copy, 300, progress=False)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"files": []}', '{"files": {"tokenizer.json": {}}}', "\xff"])
def test_a_damaged_manifest_is_named(copy: DataConfig, text: str) -> None:
    Path(copy.dir, "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"manifest\.json is damaged; delete"):
        prepare(copy, 300, progress=False)


@pytest.mark.parametrize("lost", [[], ["text_document.bin"], ["text_document.idx"]])
def test_a_dataset_of_another_program_is_not_overwritten(lost: list[str], copy: DataConfig) -> None:
    """Nor a part of one."""
    for name in ("manifest.json", *lost):
        Path(copy.dir, name).unlink()
    before = {file.name: file.read_bytes() for file in Path(copy.dir).iterdir()}
    with pytest.raises(DataError, match="has a dataset that another program made"):
        prepare(copy, 300, progress=False)
    assert {file.name: file.read_bytes() for file in Path(copy.dir).iterdir()} == before


def test_a_command_waits_for_another_one_that_makes_the_dataset(
    made: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both then have it, and it was made once."""
    data = replace(made, dir=str(tmp_path / "out"))
    started = threading.Event()
    make, calls = prepare_module._Making.make, []

    def slowly(*args: Any) -> None:
        calls.append(threading.get_ident())
        started.set()
        time.sleep(0.5)
        make(*args)

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor() as pool:
        patch.setattr(prepare_module._Making, "make", slowly)
        first = pool.submit(prepare, data, 300, False)
        assert started.wait(30)
        prepare(data, 300, progress=False)
        first.result()
    assert len(calls) == 1
    assert content(data) == content(made)
    assert f"waiting for process {os.getpid()} on " in capsys.readouterr().err


def test_a_killed_worker_is_explained(made: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(team, "_start_worker", die)
    with pytest.raises(DataError, match=r"a worker process of moe-data was killed; .*data\.prepare_workers=1"):
        prepare(replace(made, dir=str(tmp_path)), 300, progress=False)


def test_what_cannot_become_a_dataset(made: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data\.dir=.* cannot be written: Not a directory"):
        prepare(replace(made, dir=str(tmp_path / "file" / "out")), 300, progress=False)
    with pytest.raises(DataError, match=r"has 300 tokens, model\.vocab_size only 299; set model\.vocab_size=300"):
        prepare(replace(made, dir=str(tmp_path / "out")), 299, progress=False)
    (tmp_path / "blank").mkdir()
    (tmp_path / "blank" / "a.txt").write_text(" \n\n")
    with pytest.raises(DataError, match="the corpus has no text"):
        prepare(config(tmp_path / "blank", tmp_path / "out2"), 300, progress=False)
    assert not (tmp_path / "out2" / "manifest.json").exists()


def test_documents_begin_and_end_with_the_chosen_tokens_and_the_dataset_remembers_them(tmp_path: Path) -> None:
    text = write_txt(tmp_path / "text", [*texts(30), "a text that spells <s> and </s>\n"])
    own = tmp_path / "tokenizer"
    own.mkdir()
    train_tokenizer(texts(30), 280, own / "tokenizer.json")
    content = json.loads((own / "tokenizer.json").read_text())
    highest = max(content["model"]["vocab"].values())
    content["added_tokens"] += [
        {**content["added_tokens"][0], "content": token, "id": highest + 1 + i}
        for i, token in enumerate(("<s>", "</s>"))
    ]
    (own / "tokenizer.json").write_text(json.dumps(content))
    (own / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    begin, end = highest + 1, highest + 2

    def documents(name: str, **options: object) -> list[list[int]]:
        data = config(text, tmp_path / name, tokenizer=str(own), **options)
        prepare(data, 300, progress=False)
        read_manifest(data, verify=True)
        assert Path(data.dir, "special_tokens_map.json").is_file(), "so that an export has it too"
        dataset = IndexedDataset(f"{data.dir}/{PREFIX}")
        return [dataset[i].tolist() for i in range(len(dataset))]

    usual = documents("usual")
    assert all(d[0] not in (begin, end) and d[-1] == 0 and not {begin, end} & set(d) for d in usual)
    chosen = documents("chosen", eod_token="</s>", prepend_bos=True, bos_token="<s>")
    assert [d[1:-1] for d in chosen] == [d[:-1] for d in usual]
    assert all(d[0] == begin and d[-1] == end for d in chosen)
    found = load_tokenizer(config(text, tmp_path / "chosen"))
    assert (found.eod, found.bos) == (end, begin), "without the options that it was made with"
    parsed = documents("parsed", parse_special_tokens=True)
    assert [sum(d.count(token) for d in parsed) for token in (begin, end)] == [1, 1]
    with pytest.raises(DataError, match=r"data\.prepend_bos=true, .* define no beginning.*data\.bos_token"):
        documents("none", prepend_bos=True)


def test_the_manifest_tells_what_was_left_out_and_for_what_option(tmp_path: Path) -> None:
    text = write_txt(tmp_path / "text", [*texts(30), *texts(5), " \n"])
    data = config(text, tmp_path / "out")
    prepare(data, 300, progress=False)
    manifest = read_manifest(data)
    assert manifest["documents"] == 30
    assert manifest["corpus"]["documents"] == 36
    assert {name: row["count"] for name, row in manifest["corpus"]["left_out_or_changed"].items()} == {
        "short": 1, "duplicate": 5,
    }  # fmt: skip
    told = "\n".join(prepare_module.left_out(data))
    assert "36 files with 36 documents read, 30 kept" in told
    assert re.search(r"left out +5 documents that repeat .*00030\.txt line 1\); data\.deduplicate=none", told)


def test_a_dataset_of_an_older_version_can_still_be_used(copy: DataConfig) -> None:
    """It was made without documents that differ only in case."""
    path = Path(copy.dir, "manifest.json")
    manifest = json.loads(path.read_text())
    for name in ("deduplicate", "follow_links", "min_characters", "eod_token"):
        del manifest["settings"][name]
    path.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"set data\.deduplicate=normalized data\.follow_links=false again$"):
        prepare(copy, 300, progress=False)
    prepare(replace(copy, deduplicate="normalized", follow_links=False), 300, progress=False)


@pytest.mark.parametrize(
    ("files", "characters", "expected"),
    [
        (100, 10**6, range(100)),
        (100, 1_000, range(17)),  # until there is enough, from the first file on
        (101, 1_000, range(0, 101, 6)),  # of a corpus of 6,060 characters every sixth file
        (101, 10**6, range(101)),
        (3, 120, range(2)),  # exactly enough
    ],
)
def test_a_tokenizer_is_trained_on_text_from_everywhere(
    files: int, characters: int, expected: range, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Documents of 60 characters, one a file."""
    text = [f"{number:03d} {'x' * 55}\n" for number in range(files)]
    data = config(write_txt(tmp_path / "text", text), tmp_path / "out")
    monkeypatch.setattr(prepare_module, "_TOKENIZER_SAMPLE_CHARACTERS", characters)
    paths = tuple(sorted((tmp_path / "text").iterdir()))
    assert [int(one[:3]) for one in prepare_module._sample([Source("", data, paths)])] == list(expected)


@pytest.mark.parametrize(
    ("tokens", "size", "tied", "unused"),
    [(257, 460, False, None), (257, 461, False, 2 * 8 * (512 - 384)), (257, 461, True, 8 * (512 - 384)),
     (256, 307, False, None), (256, 308, False, 2 * 8 * (384 - 256))],
)  # fmt: skip
def test_rows_of_the_embedding_without_a_token_are_counted_in_steps_of_128(
    tokens: int, size: int, tied: bool, unused: int | None
) -> None:
    model = ModelConfig(vocab_size=size, hidden_size=8, tie_embeddings=tied)
    told = prepare_module.unused_vocabulary(tokens, model)
    if unused is None:
        assert told is None
    else:
        assert told is not None
        assert f": {unused:,} parameters " in told
