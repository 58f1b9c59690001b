"""Rare states of files and machines that the converter must get right: what it reuses and reads, on how many cores."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_train.checkpoint import hf_exchange
from moe_train.conversion import hf_config as config
from moe_train.conversion import small_files
from moe_train.formats import communicator, dcp, directory_writer, safetensors
from moe_train.formats.communicator import SingleProcess
from parallel.errors import CheckpointError
from tests.conversion.convert import convert
from tests.tools.test_inspect import EXPERT, MODEL, add_optimizer, weights, write_hf, write_megatron


class ThisMachine(SingleProcess):
    """One of several ranks here, of which the others may use `others` cores."""

    def __init__(self, *others: set[int]) -> None:
        self._others = others

    def all_gather(self, value: Any) -> list[Any]:
        machine, _ = value
        return [value, *((machine, allowed) for allowed in self._others), ("elsewhere", set(range(10_000)))]


def test_ranks_of_one_machine_share_the_cores_that_they_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not those of the whole machine, and not with ranks on other machines."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert communicator.cores(SingleProcess()) == 8
    assert communicator.cores(ThisMachine()) == 8
    assert communicator.cores(ThisMachine(*[set(range(8))] * 3)) == 2  # all are free to use the same eight
    assert communicator.cores(ThisMachine(set(range(8, 16)))) == 8  # each is bound to eight of its own
    assert communicator.cores(ThisMachine(*[set(range(8))] * 20)) == 1


def _write(path: Path, table: dict[str, Any], data: bytes) -> Path:
    text = json.dumps(table).encode()
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_an_empty_tensor_next_to_another_is_not_damage(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    empty = {"dtype": "F32", "shape": [0, 3], "data_offsets": [0, 0]}
    path = _write(tmp_path / "a.safetensors", {"full": entry, "empty": empty}, bytes(4))
    assert {name: e.shape for name, e in safetensors.contents(path).items()} == {"full": (1,), "empty": (0, 3)}


def test_an_unknown_number_format_is_said_to_be_that(tmp_path: Path) -> None:
    entry = {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}
    path = _write(tmp_path / "a.safetensors", {"w": entry}, bytes(1))
    with pytest.raises(CheckpointError, match="format F4"):
        safetensors.contents(path)


def test_a_name_in_two_files_is_refused(tmp_path: Path) -> None:
    """Releases exist with the same weights in files of two kinds: which one counts is not for us to guess."""
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    for name in ("a", "b"):
        _write(tmp_path / "both" / f"{name}.safetensors", {"w": entry}, bytes(4))
    with pytest.raises(CheckpointError, match=r"w is in .*a\.safetensors and in b\.safetensors"):
        safetensors.open_directory(tmp_path / "both")


@pytest.mark.parametrize("kind", ["yarn", "llama3"])
def test_scaled_positions_without_a_factor_are_refused_by_name(kind: str) -> None:
    settings = config.to_hf(MODEL, "bfloat16") | {"rope_scaling": {"type": kind}}
    with pytest.raises(CheckpointError, match="no factor"):
        config.to_model(settings)


@pytest.fixture(scope="module")
def run_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a run whose fp32 weights are not the bf16 ones."""
    root = tmp_path_factory.mktemp("run")
    hf = write_hf(root / "hf", weights())
    return add_optimizer(write_megatron(root / "megatron", hf), root / "step_00000100", scale=1 + 2**-12)


def test_an_fp32_copy_without_the_optimizer_has_its_fp32_weights(run_checkpoint: Path, tmp_path: Path) -> None:
    convert(run_checkpoint, tmp_path / "copy", to="megatron", dtype="fp32", optimizer=False)
    copy, key = dcp.Checkpoint(tmp_path / "copy"), "decoder.layers.1.mlp.router.weight"
    assert not [name for name in copy.tensors if name.startswith(("optimizer.", "rng."))]
    expected = weights()["model.layers.1.mlp.gate.weight"].float() * (1 + 2**-12)
    assert torch.equal(copy.read(key, None, 0, MODEL.num_experts).tensor(), expected)
    convert(run_checkpoint, tmp_path / "hf", dtype="fp32")
    extent = safetensors.open_directory(tmp_path / "hf")[EXPERT]
    assert torch.equal(extent.read().tensor(), weights()[EXPERT].float() * (1 + 2**-12))


def test_an_export_continues_only_what_was_of_the_same_checkpoint(run_checkpoint: Path, tmp_path: Path) -> None:
    """A run that starts again saves other weights under the name of the step that the first was killed at."""
    source = tmp_path / run_checkpoint.name
    shutil.copytree(run_checkpoint, source)
    cfg = SimpleNamespace(model=MODEL, init_from=None, data=SimpleNamespace(dir=str(tmp_path / "none")))

    def plan() -> directory_writer.WritePlan:
        run = SimpleNamespace(cfg=cfg, run_dir=tmp_path / "run")
        return hf_exchange._export_plan(run, source, tmp_path / "out")  # type: ignore[arg-type]

    before = plan().identity
    assert plan().identity == before
    os.utime(source / "__0_0.distcp", (1, 1))
    assert plan().identity != before


def test_an_export_keeps_what_only_the_first_config_json_knows(run_checkpoint: Path, tmp_path: Path) -> None:
    """Also where the weights came over a conversion to Megatron."""
    settings = config.to_hf(MODEL, "bfloat16") | {"bos_token_id": 77}
    megatron = write_megatron(tmp_path / "megatron", write_hf(tmp_path / "hf", weights(), settings))
    cfg = SimpleNamespace(model=MODEL, init_from=str(megatron), data=SimpleNamespace(dir=str(tmp_path / "none")))
    run = SimpleNamespace(cfg=cfg, run_dir=tmp_path / "run")
    small_files.keep(megatron, run.run_dir)  # as the run did when it began
    shutil.rmtree(megatron)
    plan = hf_exchange._export_plan(run, run_checkpoint, tmp_path / "out")  # type: ignore[arg-type]
    directory_writer.run(plan, SingleProcess(), 1)
    assert config.read(tmp_path / "out")["bos_token_id"] == 77


def test_a_file_of_another_version_with_other_contents_is_not_reused(run_checkpoint: Path, tmp_path: Path) -> None:
    """The same source and options, and another idea of what goes into which file."""
    from moe_train.config.roots import ConvertRoot
    from tools.convert import make_plan

    identities = []
    for size in (0.00001, 0.00002):
        cfg = ConvertRoot()
        cfg.convert.file_gb = size
        identities.append(make_plan(cfg, run_checkpoint, tmp_path / "out").identity["written"])
    assert identities[0] != identities[1]


def _plan(target: Path) -> directory_writer.WritePlan:
    jobs = [directory_writer.FileJob(name, 3, lambda file: file.write(b"abc")) for name in ("one", "two")]
    return directory_writer.WritePlan(
        target, {"of": "a test"}, jobs, lambda facts: {"table": json.dumps(facts).encode()}
    )


def _dies_at(patch: Callable[[pytest.MonkeyPatch], None], target: Path) -> None:
    """A process that `patch` ends as `kill -9` would, at some point of writing `target`."""
    child = os.fork()
    if child == 0:
        patch(pytest.MonkeyPatch())
        directory_writer.run(_plan(target), SingleProcess(), 1)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("what", [directory_writer._PLAN, directory_writer._DONE])
def test_a_process_killed_while_it_tidies_up_leaves_what_the_next_can_finish(what: str, tmp_path: Path) -> None:
    target, unlink, rmtree = tmp_path / "target", Path.unlink, shutil.rmtree

    def dies(method: Callable[..., None]) -> Callable[..., None]:
        return lambda path, *rest, **options: os._exit(9) if path.name == what else method(path, *rest, **options)

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Path, "unlink", dies(unlink))
        monkeypatch.setattr(shutil, "rmtree", dies(rmtree))

    _dies_at(patch, target)
    assert not target.exists()
    assert directory_writer.run(_plan(target), SingleProcess(), 1).files == 2
    assert directory_writer.verify(target, 1)[0] == 3
    assert sorted(file.name for file in target.iterdir()) == ["manifest.json", "one", "table", "two"]
