"""Files that nobody should have written: bounds before work, one line, and nothing half-written."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path, PosixPath
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from moe_train.config.checkpoint_tools import ConvertConfig, InspectConfig
from moe_train.config.roots import ConvertRoot, InspectRoot
from moe_train.formats import dcp_metadata, directory_writer
from moe_train.formats.communicator import SingleProcess
from parallel.errors import CheckpointError
from tests.checkpoint import mutated_runs, mutations
from tests.conversion import tiny_v3
from tests.conversion.convert import convert
from tests.distributed.helper import run_distributed
from tools import convert as tool
from tools import inspect
from tools.words import parse


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Hugging Face, in several files and in one; Megatron, with a manifest and without."""
    root = tmp_path_factory.mktemp("sources")
    many = tiny_v3.write(root / "many", tiny_v3.weights(), files=3)
    one = tiny_v3.write(root / "one", tiny_v3.weights())
    convert(many, root / "megatron")
    convert(root / "megatron", root / "written")
    shutil.copytree(root / "megatron", root / "run")
    (root / "run" / "manifest.json").unlink()
    return [many, one, root / "megatron", root / "run", root / "run", root / "written"]


def test_mutated_files_end_in_one_line(sources: list[Path], tmp_path: Path) -> None:
    refused, wrong = mutations.judged_aside(sources, 200, 1, tmp_path)
    assert not wrong, "\n".join(wrong)
    assert refused > 100  # the others changed what nobody reads


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 12))
def test_many_mutated_files_end_in_one_line(sources: list[Path], seed: int, tmp_path: Path) -> None:
    _, wrong = mutations.judged_aside(sources, 500, seed, tmp_path)
    assert not wrong, "\n".join(wrong)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints, and its weights in the formats that `init_from` reads."""
    root = tmp_path_factory.mktemp("runs")
    run_distributed(mutated_runs.write_sources, 1, root)
    return root


def test_runs_refuse_mutated_files_in_one_line_or_train_on(runs: Path, tmp_path: Path) -> None:
    ((refusals, wrong),) = run_distributed(mutated_runs.judged, 1, runs, 40, 1, tmp_path, timeout_s=400)
    assert not wrong, "\n".join(wrong)
    assert refusals > 10  # of the others many go back to the checkpoint before


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 6))
def test_runs_refuse_many_mutated_files(runs: Path, seed: int, tmp_path: Path) -> None:
    ((_, wrong),) = run_distributed(mutated_runs.judged, 1, runs, 500, seed, tmp_path, timeout_s=2000)
    assert not wrong, "\n".join(wrong)


def refused(source: Path, target: Path, mention: str, **options: Any) -> None:
    """The conversion ends with an error, and nothing is written."""
    with pytest.raises(CheckpointError, match=mention) as error:
        convert(source, target, **options)
    assert "\n" not in str(error.value)
    assert not os.path.lexists(target)


@pytest.fixture
def copied(sources: list[Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of one of `sources`, to be damaged."""

    def copy(name: str) -> Path:
        (source,) = {path for path in sources if path.name == name}
        return Path(shutil.copytree(source, tmp_path / name))

    return copy


def test_no_symbolic_link_decides_where_is_written(sources: list[Path], tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").write_text("data")
    directory_writer.partial_of(tmp_path / "target").symlink_to(victim)
    refused(sources[0], tmp_path / "target", "target.partial is not a directory")
    assert os.listdir(victim) == ["precious"]


@pytest.mark.parametrize("name", [".writing/lock", ".writing/plan.json", ".config.json.part", "config.json"])
def test_links_in_an_unfinished_directory_are_not_followed(name: str, sources: list[Path], tmp_path: Path) -> None:
    link, victim = directory_writer.partial_of(tmp_path / "target") / name, tmp_path / "victim"
    link.parent.mkdir(parents=True)
    victim.write_text("data")
    link.symlink_to(victim)
    try:
        convert(sources[0], tmp_path / "target")
    except CheckpointError:
        assert name == ".writing/lock"
    assert victim.read_text() == "data"


def test_a_source_may_have_files_of_any_name(copied: Callable[[str], Path], tmp_path: Path) -> None:
    source = copied("one")
    names = ["plan.json", "done", "lock", "manifest.json.part", "config.json.part", "index.json"]
    for name in names:
        (source / name).write_text(name)
    convert(source, tmp_path / "target", to="hf")
    assert [(tmp_path / "target" / name).read_text() for name in names] == names
    assert directory_writer.verify(tmp_path / "target", 1)[0] == len(names) + 4
    assert not any(path.name.startswith(".") for path in (tmp_path / "target").iterdir())


def change_table(directory: Path, change: Callable[[dcp_metadata.Metadata], None]) -> None:
    contents = dcp_metadata.read(directory)
    change(contents)
    (directory / ".metadata").write_bytes(dcp_metadata.dump(contents))


def test_a_part_of_ten_thousand_million_rows(copied: Callable[[str], Path], tmp_path: Path) -> None:
    def widen(contents: dcp_metadata.Metadata) -> None:
        entry = contents.state_dict_metadata["output_layer.weight"]
        assert isinstance(entry, dcp_metadata.TensorStorageMetadata)
        for chunk in entry.chunks:
            chunk.sizes = dcp_metadata.Size((10**10, chunk.sizes[1]))
        entry.size = dcp_metadata.Size((10**10, entry.size[1]))

    source = copied("run")
    change_table(source, widen)
    refused(source, tmp_path / "target", "does not fit into its item")


def test_an_item_that_unpacks_to_more_than_it_is(copied: Callable[[str], Path], tmp_path: Path) -> None:
    source = copied("run")
    place = next(p for index, p in dcp_metadata.read(source).storage_data.items() if index.fqn == "output_layer.weight")
    with zipfile.ZipFile(tmp_path / "item", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(64 << 20))
        archive.writestr(zipfile.ZipInfo("archive/data/0"), bytes(place.length - 80_000))
    item = (tmp_path / "item").read_bytes()
    with (source / place.relative_path).open("r+b") as file:
        file.seek(place.offset)
        file.write(bytes(place.length - len(item)) + item)
    refused(source, tmp_path / "target", "compressed")


def test_a_model_with_more_experts_than_can_be_listed(copied: Callable[[str], Path], tmp_path: Path) -> None:
    source = copied("one")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10_000, "n_routed_experts": 100_000}))
    refused(source, tmp_path / "target", "describes a model of [0-9,]+ parameters")
    cfg = InspectRoot()
    cfg.inspect.path = str(source)
    assert inspect.run(cfg, compared=False)  # it lists what is there


@pytest.mark.parametrize("value", [7, "x", {"a": 1}, [None], None])
def test_architectures_that_are_not_a_list_of_names(value: Any, copied: Callable[[str], Path]) -> None:
    source = copied("one")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"architectures": value}))
    check(source, "inspect")


def test_a_state_of_a_later_format(copied: Callable[[str], Path], tmp_path: Path) -> None:
    source = copied("run")
    state = json.loads((source / "state.json").read_text())
    (source / "state.json").write_text(json.dumps(state | {"format": 99}))
    refused(source, tmp_path / "target", "has format 99, and this version of moe-train reads up to")


def put(source: Path, name: str, value: float) -> None:
    """Set numbers of a tensor of the only file."""

    tensors = tiny_v3.read(source)
    tensors[name].view(-1)[3:5] = value
    (source / "model.safetensors").unlink()
    tiny_v3.save_file(tensors, source / "model.safetensors", {"format": "pt"})


EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [{}, {"to": "hf"}, {"dtype": "fp8", "to": "hf"}, {"dtype": "fp32"}], ids=str)
def test_numbers_that_are_not_finite_end_a_conversion(
    value: float, options: dict[str, Any], copied: Callable[[str], Path], tmp_path: Path
) -> None:
    source = copied("one")
    put(source, EXPERT, value)
    what = "2 NaN" if value != value else "2 infinite numbers"
    refused(source, tmp_path / "target", f"has {what}.*convert.allow_nonfinite=true", **options)


def test_numbers_that_are_not_finite_are_taken_where_allowed(
    copied: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = copied("one")
    put(source, EXPERT, float("nan"))
    convert(source, tmp_path / "target", allow_nonfinite=True)
    with pytest.raises(CheckpointError, match=r"not all numbers are finite.* has 2 NaN"):
        check(tmp_path / "target", "verify")
    check(tmp_path / "target", "verify", allow_nonfinite=True)
    assert "has 2 NaN" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"not all numbers are finite.* has 2 NaN"):
        check(tmp_path / "target", "inspect")
    refused(tmp_path / "target", tmp_path / "back", "has 2 NaN", to="hf")
    refused(tmp_path / "target", tmp_path / "back", "has 2 NaN", to="megatron")
    convert(tmp_path / "target", tmp_path / "back", to="hf", allow_nonfinite=True)
    assert int(torch.isnan(tiny_v3.read(tmp_path / "back")[EXPERT]).sum()) == 2
    with pytest.raises(CheckpointError, match=f"{EXPERT} has 2 NaN"):
        check(tmp_path / "back", "verify")


def check(directory: Path, command: str, **options: Any) -> None:
    """`moe-convert verify` or `moe-inspect`."""
    if command == "verify":
        cfg = ConvertRoot(convert=ConvertConfig(source=str(directory), **options))
        tool.run(cfg, parse(["verify"], ["verify"]), SingleProcess())
    else:
        inspect.run(InspectRoot(inspect=InspectConfig(path=str(directory))), compared=False)


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
def test_a_table_of_contents_of_any_version_of_python(module: str, copied: Callable[[str], Path]) -> None:
    """Python 3.13 writes paths with the name of another module than 3.11, 3.12 and 3.14 do."""
    source = copied("run")
    plain = dcp_metadata.read(source)
    contents = pickle.loads((source / ".metadata").read_bytes())
    assert isinstance(contents, Metadata)
    contents.storage_meta = StorageMeta(checkpoint_id=PosixPath("/runs/a/checkpoints/step_00000010"))
    written = pickle.dumps(contents, protocol=2)
    for name in (b"pathlib._local", b"pathlib"):
        written = written.replace(b"c" + name + b"\nPosixPath\n", f"c{module}\nPosixPath\n".encode())
    assert f"c{module}\n".encode() in written
    (source / ".metadata").write_bytes(written)
    assert dcp_metadata.read(source) == plain
