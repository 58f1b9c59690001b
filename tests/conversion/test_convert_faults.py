"""What can be wrong with a conversion: each ends in one line that names it, with exit code 2, and writes nothing."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pickle
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from moe_train.formats import dcp_metadata
from moe_train.formats.directory_writer import partial_of
from tests.conversion import tiny_v3
from tests.conversion.tiny_v3 import EXPERTS, Command, Done

INDEX, SHARD = "model.safetensors.index.json", "model-00002-of-00003.safetensors"
EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`hf`: three files with an index. `megatron`: with a manifest. `run`: the same without, as a run writes it."""
    root = tmp_path_factory.mktemp("sources")
    hf = tiny_v3.write(root / "hf", tiny_v3.weights(), files=3)
    patch = pytest.MonkeyPatch()
    words = [str(hf), str(root / "megatron"), "convert.file_gb=0.001"]
    patch.setattr("sys.argv", ["moe-convert", *words])
    with pytest.raises(SystemExit) as end:
        tiny_v3.convert.main()
    patch.undo()
    assert not end.value.code
    shutil.copytree(root / "megatron", root / "run")
    (root / "run" / "manifest.json").unlink()
    return {name: root / name for name in ("hf", "megatron", "run")}


def fails(done: Done, *mentions: str) -> None:
    """One line with a cause and a remedy, and exit code 2."""
    assert done.code == 2, done
    assert done.out == ""
    assert done.err.startswith("error: "), done.err
    assert done.err.count("\n") == 1, done.err
    assert "; " in done.err
    for text in mentions:
        assert text in done.err


def nothing_written(target: Path) -> None:
    assert not os.path.lexists(target)
    assert not partial_of(target).exists()


def flip(path: Path, position: int) -> None:
    """Change one bit; a negative position counts from the end."""
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)


def flip_middle(path: Path) -> None:
    """Change one bit of a tensor; the ends of a .distcp file have padding too, which is not read."""
    flip(path, path.stat().st_size // 2)


def cut(path: Path, size: int) -> None:
    os.truncate(path, path.stat().st_size - size)


def header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite the table of contents of a safetensors file; the data stay."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    table = json.loads(data[8 : 8 + length])
    text = json.dumps(change(table) or table).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def first_of(table: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = next(entry for name, entry in table.items() if name != "__metadata__")
    return entry


def overlap(table: dict[str, Any]) -> None:
    entries = sorted((e for n, e in table.items() if n != "__metadata__"), key=lambda e: e["data_offsets"])
    size = entries[1]["data_offsets"][1] - entries[1]["data_offsets"][0]
    entries[1]["data_offsets"] = [2, 2 + size]


def resave(name: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    """Rewrite the file that holds the tensor `name`, by the safetensors library."""

    def damage(directory: Path) -> None:
        index = json.loads((directory / INDEX).read_text())
        file = directory / index["weight_map"][name]
        tensors = load_file(file)
        change(tensors)
        index["weight_map"] = {n: f for n, f in index["weight_map"].items() if f != file.name or n in tensors}
        index["weight_map"] |= dict.fromkeys(tensors, file.name)
        save_file(tensors, file)
        (directory / INDEX).write_text(json.dumps(index))

    return damage


def edit(name: str, change: Callable[[Any], Any]) -> Damage:
    """Change a JSON file."""

    def damage(directory: Path) -> None:
        value = json.loads((directory / name).read_text())
        (directory / name).write_text(json.dumps(change(value) or value))

    return damage


def text(name: str, content: str | bytes) -> Damage:
    """Replace the content of a file."""
    data = content.encode() if isinstance(content, str) else content
    return lambda directory: (directory / name).write_bytes(data) and None


def change_config(**changes: Any) -> Damage:
    return edit("config.json", lambda config: config | changes)


def without(*names: str) -> Damage:
    return lambda directory: [(directory / name).unlink() for name in names] and None


def only_pickled(directory: Path) -> None:
    for file in directory.glob("model*"):
        file.unlink()
    torch.save({}, directory / "pytorch_model.bin")


class Malicious:
    """Pickled, it makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def malicious_metadata(directory: Path) -> None:
    (directory / ".metadata").write_bytes(pickle.dumps(Malicious(directory.parent / "pwned")))


def malicious_item(directory: Path) -> None:
    """An item that is a pickle of something else, of the length that the table of contents says."""
    contents = dcp_metadata.read(directory)
    place = min((p for p in contents.storage_data.values() if p.offset == 0), key=lambda p: p.relative_path)
    path = directory / place.relative_path
    evil, data = pickle.dumps(Malicious(directory.parent / "pwned")), path.read_bytes()
    assert len(evil) < place.length
    path.write_bytes(evil + b"\0" * (place.length - len(evil)) + data[place.length :])


def rewrite_metadata(change: Callable[[Metadata], None]) -> Damage:
    def damage(directory: Path) -> None:
        contents = pickle.loads((directory / ".metadata").read_bytes())
        change(contents)
        (directory / ".metadata").write_bytes(pickle.dumps(contents))

    return damage


def _tensor(contents: Metadata, key: str) -> TensorStorageMetadata:
    entry = contents.state_dict_metadata[key]
    assert isinstance(entry, TensorStorageMetadata)
    return entry


def elsewhere(contents: Metadata) -> None:
    next(iter(contents.storage_data.values())).relative_path = "../secret"


def gap(contents: Metadata) -> None:
    _tensor(contents, "output_layer.weight").chunks.clear()


NORM = "decoder.final_layernorm.weight"


@dataclass(frozen=True)
class Fault:
    """What is wrong with a source.

    Args:
        source: a key of `sources`.
        damage: makes a copy of it wrong.
        mentions: parts of the line.
        words: more of the command line.
    """

    source: str
    damage: Damage
    mentions: tuple[str, ...]
    words: tuple[str, ...] = ()


FAULTS = {
    # safetensors files
    "a file is cut off": Fault("hf", lambda d: cut(d / SHARD, 100), (SHARD, "cut off")),
    "a file is empty": Fault("hf", text(SHARD, ""), (SHARD, "header")),
    "a header's length is garbage": Fault("hf", lambda d: flip(d / SHARD, 7), (SHARD, "header")),
    "a header's length is too small": Fault(
        "hf", lambda d: (d / SHARD).write_bytes(struct.pack("<Q", 9) + (d / SHARD).read_bytes()[8:]) and None, (SHARD,)
    ),
    "a header is no JSON": Fault("hf", lambda d: flip(d / SHARD, 8), (SHARD, "damaged")),
    "a header is no object": Fault("hf", lambda d: header(d / SHARD, lambda _: [1]), (SHARD, "damaged")),
    "offsets overlap": Fault("hf", lambda d: header(d / SHARD, overlap), (SHARD, "overlap")),
    "offsets do not fit the shape": Fault(
        "hf", lambda d: header(d / SHARD, lambda t: first_of(t).update(shape=[3])), (SHARD, "[3] does not take")
    ),
    "a shape is negative": Fault(
        "hf", lambda d: header(d / SHARD, lambda t: first_of(t).update(shape=[-1, -200])), (SHARD, "damaged")
    ),
    "a shape is no list": Fault("hf", lambda d: header(d / SHARD, lambda t: first_of(t).update(shape=7)), (SHARD,)),
    "an unknown format": Fault("hf", lambda d: header(d / SHARD, lambda t: first_of(t).update(dtype="F4")), ("F4",)),
    "bytes after the last tensor": Fault(
        "hf", lambda d: (d / SHARD).write_bytes((d / SHARD).read_bytes() + b"x") and None, (SHARD, "1 bytes")
    ),
    "a file is missing": Fault("hf", without(SHARD), (SHARD,)),
    # keys and shapes
    "a key is missing": Fault("hf", resave(EXPERT, lambda t: t.pop(EXPERT)), (EXPERT,)),
    "a key too many": Fault("hf", resave(EXPERT, lambda t: t.update({"model.extra": torch.ones(3)})), ("model.extra",)),
    "an expert too many": Fault(
        "hf",
        resave(EXPERT, lambda t: t.update({EXPERT.replace("experts.2", "experts.9"): t[EXPERT].clone()})),
        ("experts.9",),
    ),
    "a wrong shape": Fault(
        "hf", resave(EXPERT, lambda t: t.update({EXPERT: t[EXPERT].T.contiguous()})), (EXPERT, "[200, 136]")
    ),
    "a key in the index and not in its file": Fault(
        "hf", edit(INDEX, lambda i: i["weight_map"].update({"model.more": SHARD})), ("model.more", SHARD)
    ),
    "a key in a file and not in the index": Fault(
        "hf", edit(INDEX, lambda i: i["weight_map"].pop(EXPERT) and None), (EXPERT,)
    ),
    "the index is no JSON": Fault("hf", text(INDEX, "{"), (INDEX,)),
    "the index is a list": Fault("hf", text(INDEX, "[1]"), (INDEX,)),
    "the index points outside": Fault(
        "hf", edit(INDEX, lambda i: i["weight_map"].update({EXPERT: "../x.safetensors"})), (INDEX, "outside")
    ),
    "copies that differ": Fault(
        "hf",
        resave("model.layers.2.embed_tokens.weight", lambda t: t["model.layers.2.embed_tokens.weight"][7].zero_()),
        ("model.layers.2.embed_tokens.weight differs",),
    ),
    "only pickled weights": Fault("hf", only_pickled, ("pytorch_model.bin", "never loaded")),
    "FP8 without scales": Fault(
        "hf", resave(EXPERT, lambda t: t.update({EXPERT: t[EXPERT].to(torch.float8_e4m3fn)})), (EXPERT, "scale")
    ),
    # config.json
    "no config.json": Fault("hf", without("config.json"), ("holds no checkpoint",)),
    "config.json is no JSON": Fault("hf", text("config.json", "{'a': 1}"), ("config.json",)),
    "config.json is no text": Fault("hf", text("config.json", b"\xff\xfe\x00"), ("config.json",)),
    "config.json is a list": Fault("hf", text("config.json", "[]"), ("config.json", "not a JSON object")),
    "no model_type": Fault("hf", edit("config.json", lambda c: c.pop("model_type") and None), ("model_type=None",)),
    "an unknown model_type": Fault("hf", change_config(model_type="gpt2"), ("model_type='gpt2'", "deepseek_v3")),
    "another family": Fault(
        "hf", change_config(model_type="mixtral", num_local_experts=4), ("n_shared_experts=1", "the mixtral models")
    ),
    "a field is missing": Fault("hf", edit("config.json", lambda c: c.pop("kv_lora_rank") and None), ("kv_a_",)),
    "a field is text": Fault("hf", change_config(hidden_size="200"), ("hidden_size='200'", "not a whole number")),
    "a field is null": Fault("hf", change_config(num_hidden_layers=None), ("num_hidden_layers",)),
    "a field is a list": Fault("hf", change_config(n_group=[2]), ("n_group",)),
    "a field is zero": Fault("hf", change_config(num_attention_heads=0), ("num_attention_heads=0",)),
    "a field is a fraction": Fault("hf", change_config(moe_intermediate_size=136.5), ("moe_intermediate_size",)),
    "a field is huge": Fault("hf", change_config(num_hidden_layers=10**9), ("num_hidden_layers", "above")),
    "rope_scaling is text": Fault("hf", change_config(rope_scaling="yarn"), ("rotary position",)),
    "rope_scaling lacks its factor": Fault("hf", change_config(rope_scaling={"type": "yarn"}), ("factor",)),
    "an unknown rotary scaling": Fault("hf", change_config(rope_scaling={"type": "ntk"}), ("'ntk'",)),
    "another width": Fault("hf", change_config(hidden_size=208), ("has shape",)),
    "another activation": Fault("hf", change_config(hidden_act="gelu"), ("hidden_act='gelu'",)),
    # Megatron checkpoints
    "a flipped byte of a directory with a manifest": Fault(
        "megatron", lambda d: flip_middle(d / "__1_0.distcp"), ("__1_0.distcp", "damaged")
    ),
    "a flipped byte of a run's checkpoint": Fault(
        "run", lambda d: flip_middle(d / "__1_0.distcp"), ("__1_0.distcp", "damaged")
    ),
    "a flipped byte of a run's checkpoint that is copied": Fault(
        "run", lambda d: flip_middle(d / "__1_0.distcp"), ("__1_0.distcp",), ("convert.to=megatron",)
    ),
    "the manifest is no JSON": Fault("megatron", text("manifest.json", "{"), ("manifest.json",)),
    "the manifest points outside": Fault(
        "megatron", edit("manifest.json", lambda m: m["files"].update({"../x": {"bytes": 1, "sha256": ""}})), ("../x",)
    ),
    "a .distcp file is cut off": Fault("run", lambda d: cut(d / "__0_0.distcp", 1), ("__0_0.distcp",)),
    "a .distcp file is missing": Fault("run", without("__0_0.distcp"), ("__0_0.distcp is missing",)),
    "an item is no archive": Fault("run", lambda d: text("__0_0.distcp", bytes(9_000_000))(d), ("__0_0.distcp",)),
    "a malicious item": Fault("run", malicious_item, (".distcp",)),
    ".metadata is missing": Fault("run", without(".metadata"), (".metadata is missing",)),
    ".metadata is cut off": Fault("run", lambda d: cut(d / ".metadata", 9), (".metadata cannot be read",)),
    ".metadata is no pickle": Fault("run", text(".metadata", "nothing"), (".metadata cannot be read",)),
    ".metadata is a pickled list": Fault("run", text(".metadata", pickle.dumps([1])), (".metadata is not a table",)),
    "a malicious .metadata": Fault("run", malicious_metadata, (".metadata", "mkdir")),
    ".metadata names a file outside": Fault("run", rewrite_metadata(elsewhere), ("../secret",)),
    ".metadata lacks a part": Fault("run", rewrite_metadata(gap), ("output_layer.weight",)),
    ".metadata lacks a tensor": Fault(
        "run", rewrite_metadata(lambda c: c.state_dict_metadata.pop(NORM) and None), ("no tensor " + NORM,)
    ),
    ".metadata has a tensor too many": Fault(
        "run", rewrite_metadata(lambda c: c.state_dict_metadata.update(more=_tensor(c, NORM))), ("more",)
    ),
    "state.json is no JSON": Fault("run", text("state.json", "{"), ("state.json",), ("convert.to=megatron",)),
    "config.yaml is no YAML": Fault("run", text("config.yaml", "a: ["), ("config.yaml",)),
    "config.yaml has another field": Fault("run", text("config.yaml", "model: {foo: 1}"), ("config.yaml", "foo")),
    "config.yaml has text for a number": Fault(
        "run", text("config.yaml", "model: {num_layers: two}"), ("model.num_layers=two",)
    ),
    "the kept config.json is no JSON": Fault("run", text("hf/config.json", "{"), ("hf/config.json",)),
    # the command line
    "FP8 in a Megatron checkpoint": Fault("hf", lambda d: None, ("convert.dtype=fp8",), ("convert.dtype=fp8",)),
    "a third path": Fault("hf", lambda d: None, ("KEY=VALUE",), ("more",)),
    "an unknown field": Fault("hf", lambda d: None, ("convert.dtyp", "convert.dtype"), ("convert.dtyp=bf16",)),
    "files of no size": Fault("hf", lambda d: None, ("convert.file_gb",), ("convert.file_gb=0",)),
    "files of less than no size": Fault("hf", lambda d: None, ("convert.file_gb",), ("convert.file_gb=-1",)),
    "too few layers": Fault(
        "hf", lambda d: None,
        ("source with model.num_layers=1: ", f"model.num_experts={EXPERTS};", "leave model.num_layers out"),
        ("model.num_layers=1",),
    ),
    "too few layers of a run": Fault(
        "run", lambda d: None,
        ("source with model.num_layers=1: ", f"model.num_experts={EXPERTS};", "leave model.num_layers out"),
        ("model.num_layers=1",),
    ),
    "more experts of a token than there are": Fault(
        "hf", lambda d: None, (f"model.topk=99 exceeds model.num_experts={EXPERTS};",), ("model.topk=99",)
    ),
    "no layer": Fault("run", lambda d: None, ("model.num_layers=0 is below",), ("model.num_layers=0",)),
    "another model": Fault("hf", lambda d: None, ("has shape",), ("model=mixtral_8x7b",)),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_damaged_source(name: str, sources: dict[str, Path], tmp_path: Path, convert: Command) -> None:
    fault = FAULTS[name]
    shutil.copytree(sources[fault.source], tmp_path / "source")
    fault.damage(tmp_path / "source")
    before = tiny_v3.files_of(tmp_path / "source")
    done = convert(tmp_path / "source", tmp_path / "target", *fault.words)
    fails(done, *fault.mentions)
    nothing_written(tmp_path / "target")
    assert os.listdir(tmp_path) == ["source"], "something was written or run"
    assert tiny_v3.files_of(tmp_path / "source") == before


@pytest.mark.parametrize("name", ["__1_0.distcp", ".metadata", "config.yaml", "hf/tokenizer.json"])
def test_verify_finds_a_flipped_byte_of_every_file(
    name: str, sources: dict[str, Path], tmp_path: Path, convert: Command
) -> None:
    shutil.copytree(sources["megatron"], tmp_path / "copy")
    assert "every byte as written" in convert.well("verify", tmp_path / "copy").out
    size = (tmp_path / "copy" / name).stat().st_size
    flip(tmp_path / "copy" / name, size // 2)
    fails(convert("verify", tmp_path / "copy"), str(tmp_path / "copy" / name))
    flip(tmp_path / "copy" / name, size // 2)
    os.truncate(tmp_path / "copy" / name, size - 1)
    fails(convert("verify", tmp_path / "copy"), str(tmp_path / "copy" / name))
    (tmp_path / "copy" / name).unlink()
    fails(convert("verify", tmp_path / "copy"), str(tmp_path / "copy" / name))


def test_verify_of_a_run_takes_its_newest_checkpoint(
    sources: dict[str, Path], tmp_path: Path, convert: Command
) -> None:
    for step in (1, 2):
        shutil.copytree(sources["megatron"], tmp_path / "run" / "checkpoints" / f"step_{step:08d}")
    flip(tmp_path / "run" / "checkpoints" / "step_00000001" / "__1_0.distcp", 100)
    for path in (tmp_path / "run", tmp_path / "run" / "checkpoints"):
        assert "step_00000002: " in convert.well("verify", path).out
    flip(tmp_path / "run" / "checkpoints" / "step_00000002" / "__1_0.distcp", 100)
    fails(convert("verify", tmp_path / "run"), "step_00000002/__1_0.distcp")


def test_verify_of_what_has_no_manifest(sources: dict[str, Path], tmp_path: Path, convert: Command) -> None:
    fails(convert("verify", sources["hf"]), "manifest.json")
    fails(convert("verify", tmp_path / "nothing"), "nothing")
    fails(convert("verify"), "convert.source", "moe-convert verify DIR")


def test_a_target_that_exists_is_left_alone(sources: dict[str, Path], tmp_path: Path, convert: Command) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("directory", "file", "link"):
        fails(convert(sources["hf"], tmp_path / name), f"{tmp_path / name} exists")
    assert sorted(os.listdir(tmp_path)) == ["directory", "file", "link"]
    assert (tmp_path / "file").read_text() == "mine"


def test_a_target_that_another_process_writes_is_left_alone(
    sources: dict[str, Path], tmp_path: Path, convert: Command
) -> None:
    partial = partial_of(tmp_path / "target")
    (partial / ".writing").mkdir(parents=True)
    (partial / "theirs").write_text("data")
    with (partial / ".writing" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        fails(convert(sources["hf"], tmp_path / "target"), "is being written by another process")
        assert (partial / "theirs").read_text() == "data"
    convert.well(sources["hf"], tmp_path / "target")  # they have died
    assert os.listdir(tmp_path) == ["target"]
    assert not (tmp_path / "target" / "theirs").exists()


def test_missing_sources_and_targets(tmp_path: Path, convert: Command) -> None:
    fails(convert(), "convert.source")
    fails(convert(tmp_path / "no", tmp_path / "target"), str(tmp_path / "no"))
    (tmp_path / "empty").mkdir()
    fails(convert(tmp_path / "empty", tmp_path / "target"), "empty")
    fails(convert(tmp_path / "empty"), "convert.target")
    assert os.listdir(tmp_path) == ["empty"]


def test_a_target_below_a_file(sources: dict[str, Path], tmp_path: Path, convert: Command) -> None:
    (tmp_path / "file").write_text("mine")
    fails(convert(sources["hf"], tmp_path / "file" / "target"), str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"


@pytest.fixture
def as_nobody() -> Iterator[Path]:
    """A directory that anyone can reach, while this process has no rights of root."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        before = os.geteuid()
        if before == 0:
            os.seteuid(65534)
        try:
            yield Path(name)
        finally:
            os.seteuid(before)


def test_a_target_without_permission(sources: dict[str, Path], as_nobody: Path, convert: Command) -> None:
    euid = os.geteuid()
    if euid == 65534:
        os.seteuid(0)
    closed, source = as_nobody / "closed", as_nobody / "source"
    shutil.copytree(sources["hf"], source)
    closed.mkdir(mode=0o555)
    for path in [source, *source.iterdir()]:
        path.chmod(0o755)
    os.seteuid(euid)
    fails(convert(source, closed / "target"), "Permission denied", str(closed))
    assert os.listdir(closed) == []
    fails(convert(source, closed / "deeper" / "target"), "Permission denied", str(closed))


def test_a_source_without_permission(sources: dict[str, Path], as_nobody: Path, convert: Command) -> None:
    euid = os.geteuid()
    if euid == 65534:
        os.seteuid(0)
    source, target = as_nobody / "source", as_nobody / "open" / "target"
    shutil.copytree(sources["hf"], source)
    target.parent.mkdir()
    target.parent.chmod(0o777)
    for path in [source, *source.iterdir()]:
        path.chmod(0o755)
    (source / SHARD).chmod(0)
    os.seteuid(euid)
    fails(convert(source, target), SHARD, "Permission denied")
    os.seteuid(0 if euid == 65534 else euid)
    (source / SHARD).chmod(0o755)
    (source / "config.json").chmod(0)
    os.seteuid(euid)
    fails(convert(source, target), "config.json", "Permission denied")
    nothing_written(target)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_too_small_is_found_before_writing(
    sources: dict[str, Path], small_disk: Path, convert: Command
) -> None:
    fails(convert(sources["hf"], small_disk / "target", "convert.dtype=fp32"), "needs 0.01 GB", str(small_disk))
    assert os.listdir(small_disk) == []


def test_a_disk_that_fills_up_keeps_complete_files_for_the_next_try(
    sources: dict[str, Path], small_disk: Path, convert: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process takes the space after the check: two thirds of the files still fit."""
    from moe_train.formats import directory_writer

    convert.well(sources["hf"], small_disk.parent / "good", "convert.file_gb=0.0003")
    small_disk_statvfs = os.statvfs
    (small_disk / "filler").write_bytes(bytes(2_500_000))

    def roomy(path: Any) -> Any:
        """The disk as it was before the filler."""
        return type("Usage", (), {"f_bavail": 1 << 30, "f_frsize": small_disk_statvfs(path).f_frsize})

    monkeypatch.setattr(directory_writer.os, "statvfs", roomy)
    words = (sources["hf"], small_disk / "target", "convert.file_gb=0.0003", "convert.threads=1")
    done = convert(*words)
    fails(done, "No space left on device", ".distcp", "complete files in", "are kept")
    assert not (small_disk / "target").exists()
    monkeypatch.undo()
    kept = len(list((partial_of(small_disk / "target") / ".writing" / "done").iterdir()))
    assert f"the {kept} complete files" in done.err
    assert kept >= 2
    (small_disk / "filler").unlink()
    done = convert.well(*words)
    assert f"{kept} of them from an earlier try" in done.out
    assert tiny_v3.files_of(small_disk / "target") == tiny_v3.files_of(small_disk.parent / "good")


def test_a_disk_that_is_full_from_the_start_keeps_nothing(
    sources: dict[str, Path], small_disk: Path, convert: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moe_train.formats import directory_writer

    with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))
    monkeypatch.setattr(directory_writer, "_check_space", lambda *_: None)
    fails(convert(sources["hf"], small_disk / "target"), "No space left on device", str(small_disk))
    assert os.listdir(small_disk) == ["filler"]
