"""Weights of another model are refused with one remedy that works; other positions of a run's own are a warning."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from moe_train.checkpoint import origin
from moe_train.config.composition.compose import compose
from moe_train.config.composition.validate import validate
from moe_train.conversion import hf_config as config
from moe_train.formats import run_config, run_directory
from parallel.errors import CheckpointError

MODEL_NAMES = sorted(path.stem for path in (Path(__file__).parents[2] / "conf" / "model").glob("*.yaml"))


def hugging_face(name: str, path: Path) -> Path:
    """A directory with the config.json of that model of conf/model."""
    path.mkdir(exist_ok=True)
    (path / config.FILE).write_text(json.dumps(config.to_hf(compose([f"model={name}"]).model, "bfloat16")))
    return path


def checkpoint(overrides: list[str], path: Path) -> Path:
    """What is read of a checkpoint of a run before its weights are."""
    path.mkdir()
    (path / run_directory.CONFIG).write_text(run_config.dump(compose(overrides)))
    for name in (run_directory.STATE, run_directory.METADATA):
        (path / name).write_text("{}")
    return path


@pytest.mark.parametrize("theirs", MODEL_NAMES)
@pytest.mark.parametrize("ours", ["tiny", "mixtral_8x7b", "llama3_8b"])
def test_the_one_remedy_works(ours: str, theirs: str, tmp_path: Path) -> None:
    """Between any two families: the run is valid with it, and is the model of the weights."""
    path = hugging_face(theirs, tmp_path / "hf")
    if ours == theirs:
        assert origin.check(compose([f"model={ours}"]).model, path) == []
        return
    with pytest.raises(CheckpointError, match=r"is of another model: .* there, .* in the run") as caught:
        origin.check(compose([f"model={ours}"]).model, path)
    remedy = str(caught.value).rpartition("; set ")[2].split()
    changed = compose([f"model={ours}", *remedy, "precision=bf16"])
    assert origin.check(changed.model, path) == []
    validate(changed, trains=False)


def test_fewer_layers_than_the_checkpoint_has_are_refused(tmp_path: Path) -> None:
    path = checkpoint(["model=tiny"], tmp_path / "step_00000002")
    with pytest.raises(CheckpointError, match=r"model\.num_layers=4 there, model\.num_layers=2 in the run; set model"):
        origin.check(compose(["model=tiny", "model.num_layers=2"]).model, path)


@pytest.mark.parametrize("change", ["topk=2", "vocab_size=4000", "router_scaling_factor=1.0", "router_num_groups=2"])
def test_what_has_the_same_shapes_and_computes_something_else_is_refused(change: str, tmp_path: Path) -> None:
    path = checkpoint(["model=tiny"], tmp_path / "step_00000002")
    with pytest.raises(CheckpointError, match=rf"model\.{re.escape(change)} in the run"):
        origin.check(compose(["model=tiny", f"model.{change}"]).model, path)


def test_another_context_and_fewer_predictions_are_no_other_model(tmp_path: Path) -> None:
    path = checkpoint(["model=tiny"], tmp_path / "step_00000002")
    longer = compose(["model=tiny", "model.yarn_factor=16.0", "model.mtp_num_layers=0", "model.name=longer"]).model
    assert origin.check(longer, path) == [f"model.yarn_factor is 4.0 in {path} and 16.0 now"]


def test_predictions_that_the_weights_do_not_have_are_refused(tmp_path: Path) -> None:
    path = checkpoint(["model=tiny", "model.mtp_num_layers=0"], tmp_path / "step_00000002")
    with pytest.raises(CheckpointError, match=r"; set model\.mtp_num_layers=0"):
        origin.check(compose(["model=tiny"]).model, path)


def test_a_checkpoint_of_a_version_with_other_fields_can_be_started_from(tmp_path: Path) -> None:
    path = checkpoint(["model=tiny"], tmp_path / "step_00000002")
    text = (path / run_directory.CONFIG).read_text()
    (path / run_directory.CONFIG).write_text(text.replace("model:\n", "model:\n  of_another_version: 1\n"))
    assert origin.check(compose(["model=tiny"]).model, path) == []
