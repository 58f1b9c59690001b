"""What can go wrong with checkpoints: each ends in one line, and nothing that was saved is lost."""

import io
import json
import os
import pickle
import resource
import shutil
import signal
import threading
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe_train.checkpoint import checkpoint, storage
from moe_train.formats import dcp, dcp_metadata
from parallel.errors import CheckpointError
from tests.checkpoint import small_run
from tests.distributed.helper import run_distributed


def save_two(run_dir: Path) -> list[Path]:
    """Checkpoints of steps 1 and 2."""
    run = small_run.prepare(small_run.config(run_dir, {}))
    saved = []
    for _ in range(2):
        small_run.train(run, 1)
        saved.append(checkpoint.save(run))
    return saved


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory with the checkpoints of steps 1 and 2. Tests that damage it take `copy`."""
    run_dir = tmp_path_factory.mktemp("saved")
    run_distributed(save_two, 1, run_dir)
    return run_dir


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """Run directory with the checkpoints of steps 1 and 2, to be damaged."""
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def steps_of(run_dir: Path, settings: list[dict[str, Any]]) -> list[Any]:
    """For each of the `settings` of a run, the step it resumes at, or [exit code, line] of its error."""
    results: list[Any] = []
    for changes in settings:
        run = small_run.prepare(small_run.config(run_dir, {}, **changes))
        try:
            checkpoint.resume(run)
            results.append(run.state.step)
        except CheckpointError as error:
            results.append([error.exit_code, str(error)])
    return results


def resume(run_dir: Path, *settings: dict[str, Any]) -> list[Any]:
    """`steps_of` in a process of its own."""
    results: list[Any] = run_distributed(steps_of, 1, run_dir, list(settings))[0]
    return results


def test_resume_modes(saved: Path, tmp_path: Path) -> None:
    first, second = (saved / "checkpoints" / f"step_{i:08d}" for i in (1, 2))
    elsewhere = {"run_dir": str(tmp_path)}
    results = resume(
        saved,
        {},
        {"resume": "never"},
        {"resume": str(first)},
        elsewhere,
        elsewhere | {"resume": str(saved)},
        elsewhere | {"resume": str(second.parent)},
        elsewhere | {"checkpoint__dir": str(second.parent)},
        elsewhere | {"resume": str(tmp_path / "nothing")},
    )
    assert results[:7] == [2, 0, 1, 0, 2, 2, 2]
    assert results[7] == [
        2,
        f"resume={tmp_path}/nothing does not exist; name a directory like runs/NAME/checkpoints/step_00000100",
    ]
    assert sorted(os.listdir(tmp_path)) == []


def weights_only(run_dir: Path, source: Path) -> list[Any]:
    """State after `init_from`, and whether the model has the weights of the checkpoint and nothing else of it."""
    fresh = small_run.prepare(small_run.config(run_dir, {}, init_from=str(source)))
    checkpoint.resume(fresh)
    loaded = small_run.tensors(fresh)
    whole = small_run.prepare(small_run.config(run_dir, {}, resume=str(source)))
    checkpoint.resume(whole)
    wanted = small_run.tensors(whole)
    model = [name for name in wanted if not name.startswith("optimizer.")]
    moments = [name for name in wanted if name.startswith("optimizer.")]
    return [
        fresh.state.step,
        fresh.schedule.num_steps,
        fresh.state.optimizer_updates,
        all(loaded[name] == wanted[name] for name in model),
        all(loaded[name] == (0.0, 0.0) for name in moments),
        len(small_run.train(fresh, 1)),
    ]


def test_init_from_takes_the_weights_and_starts_at_step_0(saved: Path, tmp_path: Path) -> None:
    for changed in run_distributed(weights_only, 2, tmp_path, saved / "checkpoints" / "step_00000002"):
        assert changed == [0, 0, 0, True, True, 1]


def test_another_model_names_its_fields(saved: Path, tmp_path: Path) -> None:
    source = {"run_dir": str(tmp_path), "init_from": str(saved)}
    fields, wider, deeper = resume(
        saved,
        {"model__ffn_hidden_size": 128},
        source | {"model__ffn_hidden_size": 128},
        source | {"model__num_layers": 5},
    )
    assert fields[0] == wider[0] == deeper[0] == 2
    assert "model.ffn_hidden_size=96 in the checkpoint, model.ffn_hidden_size=128 in the run; set " in fields[1]
    another = f"init_from={saved} is of another model: "
    assert f"{another}model.ffn_hidden_size=96 there, model.ffn_hidden_size=128 in the run; set " in wider[1]
    assert f"{another}model.num_layers=4 there, model.num_layers=5 in the run; set model.num_layers=4" in deeper[1]


def test_tensors_that_are_not_those_of_their_config_are_named(copy: Path) -> None:
    """As where config.yaml was replaced, without a manifest that would tell."""
    newest = copy / "checkpoints" / "step_00000002"
    (newest / "manifest.json").unlink()
    state = json.loads((newest / "state.json").read_text())
    (newest / "state.json").write_text(json.dumps({k: v for k, v in state.items() if k != "manifest"}))
    config, results = (newest / "config.yaml").read_text(), []
    for old, new in (("ffn_hidden_size: 96", "ffn_hidden_size: 128"), ("num_layers: 4", "num_layers: 5")):
        assert config.count(f"  {old}\n") == 1
        (newest / "config.yaml").write_text(config.replace(f"  {old}\n", f"  {new}\n"))
        name, _, value = new.partition(": ")
        results += resume(copy, {f"model__{name}": int(value), "resume": str(newest)})
    (_, wider), (_, deeper) = results
    assert "decoder.layers.0.mlp.linear_fc1.weight has shape (192, 64) in checkpoint" in wider
    assert "and (256, 64) in this model; restore all of its files from one copy" in wider
    assert "has no tensor decoder.layers.4." in deeper


def test_a_different_seed_is_warned_about(saved: Path) -> None:
    assert run_distributed(resumed_with_warnings, 1, saved, {"seed": 7}) == [
        [2, ["warning: seed was 1234 when step_00000002 was saved and is 7 now"]]
    ]


def resumed_with_warnings(run_dir: Path, changes: dict[str, Any]) -> list[Any]:
    """The step that a run resumes at, and the lines that this writes to stderr."""
    import contextlib
    import io

    text = io.StringIO()
    run = small_run.prepare(small_run.config(run_dir, {}, **changes))
    with contextlib.redirect_stderr(text):
        checkpoint.resume(run)
    return [run.state.step, text.getvalue().splitlines()]


def scribble(path: Path) -> None:
    """Overwrite the middle of a file."""
    content = bytearray(path.read_bytes())
    third = len(content) // 3
    content[third : 2 * third] = bytes(third)
    path.write_bytes(bytes(content))


def damages(content: bytes) -> list[tuple[bytes | None, str]]:
    """What may become of a file, and what is said of it."""
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    return [(bytes(flipped), ""), (content[:-1], ""), (None, "is missing")]


def resume_over_damage(run_dir: Path) -> dict[str, list[list[str]]]:
    """For each file of the newest checkpoint and each damage to it, [cause, remedy, what is expected of it] of resuming
    by name. After the first damage to some files the run also resumes automatically, at step 1.
    """
    run = small_run.prepare(small_run.config(run_dir, {}))
    newest = run_dir / "checkpoints" / "step_00000002"
    contents = {path.name: path.read_bytes() for path in newest.iterdir()}
    found: dict[str, list[list[str]]] = {}
    for name, content in contents.items():
        for i, (damage, message) in enumerate(damages(content)):
            dist.barrier()
            if run.is_main:
                (newest / name).write_bytes(damage) if damage is not None else (newest / name).unlink()
            dist.barrier()
            run.cfg.resume = str(newest)
            with pytest.raises(CheckpointError) as error:
                checkpoint.resume(run)
            found.setdefault(name, []).append([error.value.cause, error.value.remedy, message])
            if i == 0 and name in ("__1_0.distcp", "manifest.json"):
                run.cfg.resume, run.state.step = "auto", 99
                checkpoint.resume(run)
                assert run.state.step == 1
        dist.barrier()
        if run.is_main:
            (newest / name).write_bytes(content)
    dist.barrier()
    run.cfg.resume = "auto"
    checkpoint.resume(run)
    assert run.state.step == 2
    return found


def test_damage_to_any_file_is_named_and_the_checkpoint_before_is_used(tmp_path: Path) -> None:
    run_distributed(save_two, 2, tmp_path)
    damaged, older = (tmp_path / "checkpoints" / f"step_{i:08d}" for i in (2, 1))
    first, second = run_distributed(resume_over_damage, 2, tmp_path)
    assert first == second  # every rank says the same
    assert sorted(first) == sorted(
        [".metadata", "__0_0.distcp", "__1_0.distcp", "common.pt", "config.yaml", "manifest.json", "metadata.json",
         "state.json"]
    )  # fmt: skip
    for name, cases in first.items():
        assert len(cases) == 3
        for cause, remedy, message in cases:
            assert cause.startswith(f"checkpoint {damaged} is damaged: {name} {message}")
            assert "\n" not in cause
            assert remedy == f"set resume={older}"


def scribble_where_one_rank_reads(run_dir: Path) -> list[Any]:
    """The step that a rank resumes at when only rank 1 reads what is damaged, without comparing bytes before."""
    run = small_run.prepare(small_run.config(run_dir, {"ep": 2}, checkpoint__verify=False))
    for _ in range(2):
        small_run.train(run, 1)
        checkpoint.save(run)
    newest = run_dir / "checkpoints" / "step_00000002"
    if run.is_main:
        for index, info in dcp_metadata.read(newest).storage_data.items():
            if ".experts." in index.fqn and index.offset is not None and 4 in index.offset:  # the first of rank 1
                with (newest / info.relative_path).open("r+b") as file:
                    file.seek(info.offset)
                    file.write(bytes(info.length))
    dist.barrier()
    losses = small_run.train(run, 1)
    checkpoint.resume(run)
    step = run.state.step
    small_run.train(run, 1)
    return [step, losses == small_run.train(run, 1)]


def test_damage_that_one_rank_notices_while_it_reads_sends_all_to_the_one_before(tmp_path: Path) -> None:
    assert run_distributed(scribble_where_one_rank_reads, 2, tmp_path) == [[1, True]] * 2


def test_a_checkpoint_of_a_version_without_manifests_is_loaded_with_a_warning(copy: Path) -> None:
    newest = copy / "checkpoints" / "step_00000002"
    state = json.loads((newest / "state.json").read_text())
    del state["manifest"]
    (newest / "state.json").write_text(json.dumps(state))
    (newest / "manifest.json").unlink()
    ((step, warnings),) = run_distributed(resumed_with_warnings, 1, copy, {})
    assert step == 2
    assert warnings == [f"warning: checkpoint {newest} has no manifest.json: its bytes cannot be verified"]


def test_unreadable_contents_end_in_one_line_on_every_rank(copy: Path) -> None:
    for number in (1, 2):
        scribble(copy / "checkpoints" / f"step_{number:08d}" / "__0_0.distcp")
    for results in run_distributed(steps_of, 2, copy, [{}]):
        (result,) = results
        assert result[0] == 2
        assert "step_00000002 is damaged: __0_0.distcp has other bytes than were written" in result[1]
        assert "\n" not in result[1]


def test_auto_does_not_start_afresh_over_damaged_checkpoints(copy: Path) -> None:
    for number in (1, 2):
        (copy / "checkpoints" / f"step_{number:08d}" / ".metadata").unlink()
    automatic, never = resume(copy, {}, {"resume": "never"})
    assert automatic[0] == 2
    assert "no checkpoint in" in automatic[1]
    assert "can be read" in automatic[1]
    assert never == 0


@pytest.mark.parametrize("version", [1, 99])
def test_a_state_of_another_format_is_refused(version: int, copy: Path) -> None:
    path = copy / "checkpoints" / "step_00000002" / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": version}))
    (result,) = resume(copy, {"checkpoint__verify": False})
    assert f"has format {version}, and" in result[1]


class Trap:
    """Runs a command when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.witness}",)


def test_loading_runs_no_code_from_a_checkpoint(copy: Path, tmp_path: Path) -> None:
    directory, witness = copy / "checkpoints" / "step_00000002", tmp_path / "witness"
    pickle.loads(pickle.dumps(Trap(witness)))
    assert witness.exists()  # the trap works
    witness.unlink()

    torch.save({"x": Trap(witness)}, directory / "common.pt")
    contents = dcp_metadata.read(directory)
    part = next(info for index, info in contents.storage_data.items() if index.fqn == "output_layer.weight")
    with (directory / part.relative_path).open("r+b") as file:
        file.seek(part.offset)
        file.write(pickle.dumps(Trap(witness)).ljust(part.length, b"\0"))
    unverified = {"checkpoint__verify": False}
    (result,) = resume(copy, unverified | {"resume": str(directory)})
    assert "step_00000002 is damaged" in result[1]

    (directory / ".metadata").write_bytes(pickle.dumps(Trap(witness)))
    with pytest.raises(CheckpointError, match=r"it names (posix|nt)\.system, which is not part of a checkpoint"):
        dcp_metadata.read(directory)
    assert resume(copy, unverified) == [1]
    assert not witness.exists()


def compress_items(directory: Path) -> None:
    """Put compressed archives of the same length in the place of the items of one tensor."""
    for index, place in dcp_metadata.read(directory).storage_data.items():
        if index.fqn == "output_layer.weight":
            packed = io.BytesIO()
            with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr("archive/data.pkl", bytes(1 << 20))
                archive.writestr(zipfile.ZipInfo("archive/data/0"), bytes(place.length - 4096))
            with (directory / place.relative_path).open("r+b") as file:
                file.seek(place.offset)
                file.write(packed.getvalue().rjust(place.length, b"\0"))


def test_items_that_are_compressed_are_not_unpacked(copy: Path, tmp_path: Path) -> None:
    directory = copy / "checkpoints" / "step_00000002"
    compress_items(directory)
    unverified = {"checkpoint__verify": False}
    elsewhere = unverified | {"run_dir": str(tmp_path / "new"), "init_from": str(directory)}
    for code, line in resume(copy, unverified | {"resume": str(directory)}, elsewhere):
        assert code == 2
        assert "is compressed, and torch.save compresses nothing" in line


def test_a_run_keeps_the_small_files_of_the_weights_that_it_begins_with(copy: Path, tmp_path: Path) -> None:
    """An export needs them after init_from is gone."""
    directory = copy / "checkpoints" / "step_00000002"
    (directory / "hf").mkdir()  # as a conversion from Hugging Face leaves it
    (directory / "hf/config.json").write_text("{}")
    begun, resumed = tmp_path / "begun", tmp_path / "resumed"
    settings = {"run_dir": str(begun), "init_from": str(directory)}, {"run_dir": str(resumed), "resume": str(directory)}
    assert resume(copy, *settings) == [0, 2]
    for run_dir in (begun, resumed):
        assert [path.name for path in (run_dir / "init_from").iterdir()] == ["config.json"]
    assert not (copy / "init_from").exists()
    assert resume(copy, {"run_dir": str(begun)}) == [0]  # random weights
    assert not (begun / "init_from").exists()


def put_nan(directory: Path, name: str) -> None:
    """Into the first number of a tensor of a checkpoint, in each of its parts."""
    stored = dcp.Checkpoint(directory)
    for chunk in stored.chunks(stored.master(name)):
        with chunk.file.open("r+b") as file:
            file.seek(chunk.extent.offset)
            file.write(b"\xff\xff\xff\x7f")


def test_weights_that_are_not_finite_are_no_beginning(copy: Path, tmp_path: Path) -> None:
    directory = copy / "checkpoints" / "step_00000002"
    put_nan(directory, "output_layer.weight")
    changes = {"checkpoint__verify": False, "run_dir": str(tmp_path / "new"), "init_from": str(directory)}
    ((code, line),) = resume(copy, changes)
    assert code == 2
    assert "output_layer.weight has NaN or infinite numbers" in line


@pytest.mark.parametrize("name", ["output_layer.weight", "decoder.layers.1.mlp.router.expert_bias"])
def test_a_run_does_not_go_on_with_weights_that_are_not_finite(name: str, copy: Path) -> None:
    """Nor does it go back silently: the same steps would lead there again."""
    newest, before = (copy / "checkpoints" / f"step_0000000{step}" for step in (2, 1))
    put_nan(newest, name)
    unverified = {"checkpoint__verify": False}
    told, step = resume(copy, unverified, unverified | {"resume": str(before)})
    assert told[0] == 2
    assert f"resume={newest}: {name} has NaN or infinite numbers, and every loss would be NaN; restore" in told[1]
    assert told[1].endswith(f"or set resume={before}")
    assert step == 1


def die_while_saving(run_dir: Path, overlapped: bool) -> None:
    """Train a step more than the newest checkpoint, and lose rank 1 when it has written half of its part."""
    run = small_run.prepare(small_run.config(run_dir, {}))
    checkpoint.resume(run)
    small_run.train(run, 1)
    write = storage.Share.write

    def write_half(self: storage.Share, where: Path, stop: threading.Event) -> storage.Written:
        if dist.get_rank() == 1:
            write(replace(self, items=self.items[: len(self.items) // 2]), where, stop)
            os.kill(os.getpid(), signal.SIGKILL)
        return write(self, where, stop)

    storage.Share.write = write_half  # type: ignore[method-assign]
    saving = checkpoint.begin(run, copy=overlapped)
    if overlapped:
        small_run.train(run, 100)
    saving.wait()


def save_next(run_dir: Path) -> list[Any]:
    """Resume, train a step and save."""
    run = small_run.prepare(small_run.config(run_dir, {}))
    checkpoint.resume(run)
    step = run.state.step
    small_run.train(run, 1)
    return [step, checkpoint.save(run).name]


@pytest.mark.parametrize("overlapped", [False, True])
def test_a_rank_killed_while_saving_costs_only_that_checkpoint(copy: Path, overlapped: bool) -> None:
    with pytest.raises(AssertionError, match="rank 1"):
        run_distributed(die_while_saving, 2, copy, overlapped)
    root = copy / "checkpoints"
    assert (root / "latest").read_text().strip() == "step_00000002"
    assert list((root / ".step_00000003.partial").glob("__1_*.distcp"))  # it did die in the middle
    assert not (root / "step_00000003").exists()
    assert run_distributed(save_next, 2, copy) == [[2, "step_00000003"]] * 2
    assert sorted(os.listdir(root)) == ["latest", "step_00000001", "step_00000002", "step_00000003"]


def fail_to_save(run_dir: Path, where: Path, limit_bytes: int) -> list[Any]:
    """[exit code, line] of the error of saving, on each rank. Files of rank 1 may not be larger than `limit_bytes`."""
    run = small_run.prepare(small_run.config(run_dir, {}, checkpoint__dir=str(where)))
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, resource.RLIM_INFINITY))
    try:
        checkpoint.save(run)
    except CheckpointError as error:
        return [error.exit_code, str(error)]
    return [0, ""]


def test_a_full_disk_on_one_rank_is_one_line_on_every_rank(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    for code, line in run_distributed(fail_to_save, 2, tmp_path, root, 100_000):
        assert code == 2
        assert line.startswith(
            f"cannot write {root}/.step_00000000.partial/__1_0.distcp: File too large: this rank needs "
        )
        assert " GB are free; check free space" in line
        assert "\n" not in line
    assert os.listdir(root) == []


def too_large(run_dir: Path) -> list[str]:
    """The error of a checkpoint that is larger than what is free."""
    run = small_run.prepare(small_run.config(run_dir, {}))
    free = checkpoint.free_bytes
    try:
        checkpoint.free_bytes = lambda path: 1_000_000  # type: ignore[attr-defined]
        checkpoint.save(run)
    except CheckpointError as error:
        return [str(error)]
    finally:
        checkpoint.free_bytes = free  # type: ignore[attr-defined]
    return []


def test_what_does_not_fit_is_not_begun(tmp_path: Path) -> None:
    for (line,) in run_distributed(too_large, 2, tmp_path):
        assert "step_00000000 needs 0.00" in line
        assert "has 0.001 GB free; free space" in line
    assert os.listdir(tmp_path / "checkpoints") == []


def test_a_directory_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ((code, line),) = run_distributed(fail_to_save, 1, tmp_path, tmp_path / "file" / "checkpoints", 0)
    assert code == 2
    assert line.startswith(f"cannot write to {tmp_path}/file/checkpoints: Not a directory")


def save_unstepped(run_dir: Path) -> list[float]:
    """Save before the first step and train on: saving makes optimizer state, which must be whole."""
    run = small_run.prepare(small_run.config(run_dir, {}))
    checkpoint.save(run)
    return small_run.train(run, 2)


def test_saving_changes_nothing(tmp_path: Path) -> None:
    saving = run_distributed(save_unstepped, 1, tmp_path)
    resumed = run_distributed(continue_unstepped, 1, tmp_path)
    assert saving == resumed == run_distributed(only_train, 1, tmp_path)


def continue_unstepped(run_dir: Path) -> list[float]:
    """Two steps after resuming at step 0."""
    run = small_run.prepare(small_run.config(run_dir, {}))
    checkpoint.resume(run)
    return small_run.train(run, 2)


def only_train(run_dir: Path) -> list[float]:
    """Two steps of a run without checkpoints."""
    return small_run.train(small_run.prepare(small_run.config(run_dir, {}, resume="never")), 2)
