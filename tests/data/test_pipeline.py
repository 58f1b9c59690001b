"""moe-data in stages: the same bytes for any number of processes and after kills, and what the manifest says."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from moe_train.config.schema import DataConfig, TextSource
from moe_train.data import manifest, prepare, shards, team
from moe_train.data.prepare import read_manifest
from moe_train.data.team import RankGroup, Team
from parallel.errors import DataError
from tests.data.corpora import config, planted, texts, write_txt

ROOT = Path(__file__).parents[2]
OUTPUT = ("text_document.bin", "text_document.idx", "tokenizer.json")
# A rank as a launcher starts it, of shards of 20 kB, which removes nothing but what it has made.
RANK = """
import json, sys
from moe_train.config.schema import DataConfig
from moe_train.data import shards
from moe_train.data.prepare import prepare
from moe_train.data.team import RankGroup
shards._SMALLEST_SHARD_BYTES = 20_000
rank, size = map(int, sys.argv[2:])
prepare(DataConfig(**json.loads(sys.argv[1])), 300, progress=False, ranks=RankGroup(rank, size))
"""


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_SMALLEST_SHARD_BYTES", 20_000)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Near-duplicates and exact ones in a large jsonl file, a compressed one and many small files."""
    folder = tmp_path_factory.mktemp("text")
    documents, _ = planted(40, seed=1)
    lines = [json.dumps({"text": document}) + "\n" for document in [*documents, *documents[:9]]]
    half = len(lines) // 2
    (folder / "a.jsonl").write_text("".join(lines[:half]) + "{}\n" + json.dumps({"text": " "}) + "\n")
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines[half:]).encode()))
    write_txt(folder / "small", texts(30))
    (folder / "z.txt").write_text("\n\n".join(texts(300, seed=5)))
    return folder


def options(text: Path, directory: Path, **changes: Any) -> DataConfig:
    return config(text, directory, near_duplicates=0.8, bad_records="skip", **changes)


@pytest.fixture(scope="module")
def alone(text: Path, tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """A dataset of one process and one shard size."""
    data = options(text, tmp_path_factory.mktemp("alone"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "_SMALLEST_SHARD_BYTES", 20_000)
        prepare.prepare(data, 300, progress=False)
    return data


def content(data: DataConfig) -> dict[str, Any]:
    """The files, and the manifest without times and inodes."""
    found: dict[str, Any] = {name: Path(data.dir, name).read_bytes() for name in OUTPUT}
    made = read_manifest(data)
    for file in made["files"].values():
        del file["identity"]
    return found | {"manifest": made}


def start(data: DataConfig, rank: int, size: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RANK, json.dumps(asdict(data)), str(rank), str(size)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)


@pytest.mark.parametrize(("workers", "memory_mib"), [(2, 256), (4, 16)])
def test_any_number_of_processes_makes_the_same_dataset(
    workers: int, memory_mib: int, alone: DataConfig, tmp_path: Path
) -> None:
    data = replace(alone, dir=str(tmp_path), prepare_workers=workers, prepare_memory_mib=memory_mib)
    prepare.prepare(data, 300, progress=False)
    assert content(data) == content(alone)


def test_two_ranks_make_the_same_dataset(alone: DataConfig, tmp_path: Path) -> None:
    data = replace(alone, dir=str(tmp_path))
    ranks = [start(data, rank, 2) for rank in range(2)]
    errors = [process.communicate(timeout=120)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], errors
    assert content(data) == content(alone)
    assert sorted(os.listdir(tmp_path)) == sorted(os.listdir(alone.dir))


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_after_any_number_of_kills_the_dataset_is_the_same(kills: int, alone: DataConfig, tmp_path: Path) -> None:
    data = replace(alone, dir=str(tmp_path), prepare_workers=2)
    draw = random.Random(kills)
    landed = 0
    for _ in range(10 * kills):
        process = start(data, 0, 1)
        deadline = time.monotonic() + draw.uniform(0.7, 3.0)
        while time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
        helpers = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            landed += 1
        assert not psutil.wait_procs(helpers, timeout=20)[1]
        _, errors = process.communicate(timeout=60)
        assert process.returncode in (0, -signal.SIGKILL), errors
        if landed == kills:
            break
        if (tmp_path / "manifest.json").exists():  # it was faster than the kill: again from the start
            assert content(data) == content(alone)
            (tmp_path / "manifest.json").unlink()
            (tmp_path / "parts").mkdir()
    assert landed == kills
    prepare.prepare(data, 300, progress=False)
    assert content(data) == content(alone)


def test_the_manifest_tells_what_became_of_each_shard(text: Path, alone: DataConfig) -> None:
    made = read_manifest(alone)
    counts = {name: row["count"] for name, row in made["corpus"]["left_out_or_changed"].items()}
    near = counts.pop("near_duplicate")
    assert counts == {"bad_record": 1, "short": 1, "duplicate": 9}
    copies = planted(40, seed=1)[1]
    assert near == len(copies)
    lineage = made["lineage"]
    (source,) = lineage["sources"]
    assert source["documents"] == made["corpus"]["documents"]
    assert source["kept"] == made["documents"] == made["corpus"]["kept"]
    assert source["tokens"] == made["tokens"]
    for key in ("documents", "kept", "tokens", "text_bytes"):
        assert sum(shard[key] for shard in lineage["shards"]) == source[key]
    for name in ("near_duplicate", "duplicate"):
        assert sum(shard["left_out_or_changed"].get(name, 0) for shard in lineage["shards"]) == (counts | {
            "near_duplicate": near
        })[name]  # fmt: skip
    ranges = [shard["bytes"] for shard in lineage["shards"] if shard["first_file"].endswith("a.jsonl")]
    assert len(ranges) > 2
    assert [begin for begin, _ in ranges] == [0, *(end for _, end in ranges[:-1])]
    assert ranges[-1][1] == (text / "a.jsonl").stat().st_size
    place = made["corpus"]["left_out_or_changed"]["bad_record"]["first"]
    number = len((text / "a.jsonl").read_text().splitlines()) - 1
    assert place.startswith(f"{text}/a.jsonl line {number} has no text"), "counted from the start of the file"
    kept_lines = (text / "a.jsonl").read_text().splitlines()[: number - 1]
    first = next(i for i in range(len(kept_lines)) if i in copies)
    assert made["corpus"]["left_out_or_changed"]["near_duplicate"]["first"] == f"{text}/a.jsonl line {first + 1}"


def test_a_bad_line_of_a_range_is_named_by_its_number_in_the_file(text: Path, tmp_path: Path) -> None:
    data = options(text, tmp_path)
    data.bad_records = "error"
    number = len((text / "a.jsonl").read_text().splitlines()) - 1
    with pytest.raises(DataError, match=rf"a\.jsonl line {number} has no text under 'text'"):
        prepare.prepare(data, 300, progress=False)


def test_sources_are_filtered_together_and_become_datasets_of_their_own(tmp_path: Path) -> None:
    write_txt(tmp_path / "web", texts(200))
    lines = [{"message": {"content": text}} for text in [*texts(5), *texts(200, seed=7)]]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = config(tmp_path / "unused", tmp_path / "out", prepare_workers=2)
    data.path = None
    data.sources = [
        TextSource("web", str(tmp_path / "web")),
        TextSource("chat", str(tmp_path / "chat.jsonl"), "message.content"),
    ]
    prepare.prepare(data, 300, progress=False)
    assert prepare.prepare(data, 300, progress=False, verify=True) is False, "made already"
    made = read_manifest(data)
    assert [(s["name"], s["documents"], s["kept"]) for s in made["lineage"]["sources"]] == [
        ("web", 200, 200), ("chat", 205, 200),
    ]  # fmt: skip
    assert made["documents"] == 400
    prefixes = [f"{tmp_path}/out/{name}/text_document" for name in ("web", "chat")]
    assert manifest.prefixes(data) == prefixes
    assert manifest.tokens_of(data) == made["tokens"]
    assert all(manifest.manifest_of(prefix) == made for prefix in prefixes)
    Path(f"{prefixes[0]}.bin").write_bytes(b"\0" * Path(f"{prefixes[0]}.bin").stat().st_size)
    with pytest.raises(DataError, match=r"web/text_document\.bin is damaged"):
        manifest.verify(data, again=True)


def only_numbers_below_20(text: str) -> bool:
    """For `data.filter`. A document of `texts` begins with its number."""
    return int(text.split()[2].rstrip(":")) < 20


def test_documents_are_filtered_by_length_language_and_function(tmp_path: Path) -> None:
    pytest.importorskip("py3langid")
    german = "Der Hund lief schnell durch den dunklen Wald, und niemand wusste, wohin er wollte. " * 3
    english = "The dog ran quickly through the dark wood, and nobody knew where it wanted to go. " * 3
    documents = [german, english, "x" * 3000]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in documents))
    data = config(tmp_path, tmp_path / "out", languages=["en"], max_characters=2000)
    prepare.prepare(data, 300, progress=False)
    made = read_manifest(data)["corpus"]["left_out_or_changed"]
    assert {name: (row["count"], row["first"]) for name, row in made.items()} == {
        "language": (1, f"{tmp_path}/a.jsonl line 1"), "long": (1, f"{tmp_path}/a.jsonl line 3"),
    }  # fmt: skip
    write_txt(tmp_path / "text", texts(50))
    data = config(tmp_path / "text", tmp_path / "out2", filter=f"{__name__}:only_numbers_below_20")
    prepare.prepare(data, 300, progress=False)
    assert read_manifest(data)["documents"] == 20
    wrong = {"languages": ["klingon"], "filter": "nowhere:f"}
    for field, told in (("languages", "has klingon, which"), ("filter", "cannot be imported: ModuleNotFoundError")):
        data = config(tmp_path / "text", tmp_path / "out3", **{field: wrong[field]})
        with pytest.raises(DataError, match=rf"data\.{field}.*{told}"):
            prepare.prepare(data, 300, progress=False)


def test_the_error_of_a_rank_ends_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = tmp_path / "manifest.json"
    with Team(RankGroup(0, 2), tmp_path, 1, done) as first:
        with pytest.raises(DataError), Team(RankGroup(1, 2), tmp_path, 1, done):
            raise DataError("a.jsonl line 3 is not JSON", "correct it")
        with pytest.raises(DataError, match=r"a\.jsonl line 3 is not JSON; correct it"):
            first.wait(lambda: False)
    with Team(RankGroup(0, 2), tmp_path, 1, done) as again:
        monkeypatch.setattr(team, "LOST_S", 0.3)
        with pytest.raises(DataError, match="rank 1 of moe-data has not run for 0 s; run the command again"):
            again.wait(lambda: False)


def test_a_rank_that_waits_for_what_was_removed_sees_that_all_is_done(tmp_path: Path) -> None:
    done = tmp_path / "manifest.json"
    done.touch()
    with pytest.raises(team.TeamFinished), Team(RankGroup(1, 2), tmp_path, 1, done) as second:
        second.wait(lambda: False)
    assert not (tmp_path / ".ranks/1.failed").exists()
