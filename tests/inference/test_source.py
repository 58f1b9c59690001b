"""The model, the tokenizer and the config that a path means."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from moe_train.checkpoint import continuing
from moe_train.config.composition.validate import validate
from moe_train.config.roots import ConvertRoot, InferenceRoot
from moe_train.formats import run_directory
from moe_train.formats.communicator import SingleProcess
from moe_train.formats.directory_writer import run as write
from moe_train.inference import source
from parallel.errors import CheckpointError, DataError
from tools.convert import make_plan

STEP = run_directory.name_of(2)


def test_a_run_a_checkpoint_and_an_export_are_the_same_model(trained: Path) -> None:
    run = trained / "run"
    found = [source.find(path) for path in (run, run / "checkpoints", run / "checkpoints" / STEP)]
    assert {one.path for one in found} == {run / "checkpoints" / STEP}
    assert {one.name for one in found} == {"run"}
    exported = source.find(run / continuing.EXPORTS / STEP)
    assert exported.name == STEP
    root = InferenceRoot()
    configs = [source.config_of(one, root, []) for one in [*found, exported]]
    assert [cfg.data.dir for cfg in configs] == [*[str(trained / "data")] * 3, str(exported.path)]
    for cfg in configs:
        assert (cfg.model.num_layers, cfg.precision.dtype, cfg.backend.name) == (4, "fp32", "local")
        assert source.stop_token_ids(cfg, source.load_tokenizer(cfg)) == {0}
        assert validate(cfg, 1)


def test_a_run_whose_data_is_gone_takes_the_tokenizer_of_its_export(trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained / "run", tmp_path / "run")
    config = run / "checkpoints" / STEP / run_directory.CONFIG
    config.write_text(config.read_text().replace(str(trained / "data"), str(tmp_path / "gone")))
    cfg = source.config_of(source.find(run), InferenceRoot(), [])
    assert cfg.data.dir == str(run / continuing.EXPORTS / STEP)
    shutil.rmtree(run / continuing.EXPORTS)
    with pytest.raises(DataError, match=r"nor has the data of its run \(.*gone\); set tokenizer=PATH"):
        source.config_of(source.find(run), InferenceRoot(), [])
    cfg = source.config_of(source.find(run), InferenceRoot(), [], tokenizer=str(trained / "data"))
    assert source.load_tokenizer(cfg).eod == 0


def test_converted_weights_have_the_precision_and_tokenizer_of_their_origin(trained: Path, tmp_path: Path) -> None:
    exported = shutil.copytree(trained / "run" / continuing.EXPORTS / STEP, tmp_path / "hf")
    (exported / run_directory.MANIFEST).unlink()
    settings = json.loads((exported / "config.json").read_text())
    settings |= {"dtype": "bfloat16", "max_position_embeddings": 100}
    settings.pop("torch_dtype", None)
    (exported / "config.json").write_text(json.dumps(settings))
    (exported / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 0, 10**9]}))
    converted = tmp_path / "megatron"
    write(make_plan(ConvertRoot(), exported, converted), SingleProcess(), 1)
    for path in (exported, converted):
        cfg = source.config_of(source.find(path), InferenceRoot(), [])
        assert (cfg.precision.dtype, cfg.train.seq_length) == ("bf16", 100)
        assert source.stop_token_ids(cfg, source.load_tokenizer(cfg)) == {0, 5}
        validate(cfg, 1)


def test_only_what_the_command_line_names_changes_the_config(trained: Path) -> None:
    root = InferenceRoot()
    root.parallel.tp, root.parallel.pp, root.model.num_layers, root.precision.dtype = 2, 2, 9, "bf16"
    root.verify = False
    cfg = source.config_of(source.find(trained / "run"), root, ["parallel.tp=2", "+precision=bf16", "engine.x=1"])
    assert (cfg.parallel.tp, cfg.parallel.pp, cfg.model.num_layers) == (2, 1, 4)
    assert (cfg.precision.dtype, cfg.checkpoint.verify) == ("bf16", False)
    assert validate(cfg).world_size == 2


@pytest.mark.parametrize(
    "degrees", [{"cp": 2}, {"tp": 2, "pp": 2, "ep": 2}, {"dp": 4, "ep": 4}, {"pp": 2, "vpp": 2}], ids=str
)
def test_no_layout_is_refused_because_of_a_batch_that_it_does_not_have(degrees: dict[str, int], trained: Path) -> None:
    root = InferenceRoot()
    for name, degree in degrees.items():
        setattr(root.parallel, name, degree)
    words = [f"parallel.{name}={degree}" for name, degree in degrees.items()]
    assert validate(source.config_of(source.find(trained / "run"), root, words))


def test_errors_name_the_field_and_a_remedy_that_works(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"source=a/b does not exist on this machine.*hf download a/b"):
        source.find(Path("a/b"))
    with pytest.raises(CheckpointError, match=r"source=.* holds no checkpoint"):
        source.find(tmp_path)
    run = shutil.copytree(trained / "run", tmp_path / "run")
    (run / "checkpoints" / STEP / run_directory.STATE).write_text("{")
    with pytest.raises(CheckpointError, match=r"is damaged: state.json .*name another checkpoint.* source=PATH"):
        source.find(run)
    other = shutil.copy(trained / "data" / "tokenizer.json", tmp_path / "other.json")
    with pytest.raises(DataError, match=r"tokenizer=.* is not named tokenizer\.json"):
        source.config_of(source.find(trained / "run"), InferenceRoot(), [], tokenizer=str(other))


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(trained: Path) -> None:
    cfg = source.config_of(source.find(trained / "run"), InferenceRoot(), [])
    cfg.model.vocab_size = 100
    with pytest.raises(DataError, match=r"has \d+ tokens, and model.vocab_size is 100; set tokenizer=PATH"):
        source.load_tokenizer(cfg)
