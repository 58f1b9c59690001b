"""What earlier versions wrote, as this version means it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_train.checkpoint.continuing import config_of
from moe_train.config import former
from moe_train.config.composition.compose import compose, from_yaml, hydra_entry, to_yaml
from moe_train.config.launcher import FallbackLayout
from moe_train.config.plan import TrainingStage
from moe_train.config.resilience import Fault
from moe_train.config.schema import BlendEntry, Config, RecomputeStage
from moe_train.config.walk import get
from moe_train.formats import run_config
from parallel.errors import CheckpointError

ENTRIES = {
    ("data.blend", "0.7 my data/a"): BlendEntry("my data/a", 0.7),
    ("data.blend", " 3  b/text"): BlendEntry("b/text", 3.0),
    ("data.blend", "c/text document"): BlendEntry("c/text document"),
    ("recompute.stages", "none"): RecomputeStage("none"),
    ("recompute.stages", "full"): RecomputeStage("full"),
    ("recompute.stages", "layernorm+moe_act"): RecomputeStage(modules=["layernorm", "moe_act"]),
    ("launcher.fallbacks", "parallel.pp=1 parallel.dp=null batch.micro_batch_size=2"): FallbackLayout(
        {"pp": 1, "dp": None}, batch={"micro_batch_size": 2}
    ),
    ("launcher.fallbacks", "recompute.stages=[full,mlp+moe]"): FallbackLayout(
        recompute={"stages": [asdict(RecomputeStage("full")), asdict(RecomputeStage(modules=["mlp", "moe"]))]}
    ),
    ("resilience.inject", "kill:rank=1:step=7:at=end:after=0.05"): Fault("kill", rank=1, step=7, at="end", after=0.05),
    ("resilience.inject", "nan:sample=32:samples=8"): Fault("nan", sample=32, samples=8),
    ("plan.recipe", "pre-training tokens=14.8T"): TrainingStage("pre-training", tokens=14_800_000_000_000),
    ("plan.recipe", "to 32K seq=32k batch=1920 steps=1000 cp=8 failures=1"): TrainingStage(
        "to 32K", steps=1000, seq_length=32768, global_batch_size=1920, cp=8, failures=True
    ),
    ("plan.recipe", "gpu_hours=5000"): TrainingStage(gpu_hours=5000),
}


@pytest.mark.parametrize(("name", "text"), list(ENTRIES))
def test_an_entry_of_text_is_read_as_it_was_meant(name: str, text: str) -> None:
    assert former.entry(name, text) == ENTRIES[name, text]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("resilience.inject", "kill:step=x"),
        ("resilience.inject", "kill:node=1:step=2"),
        ("resilience.inject", "kill:step"),
        ("launcher.fallbacks", "train.steps=3"),
        ("launcher.fallbacks", "parallel.tp=[&a,*a"),
        ("launcher.fallbacks", "parallel.dp"),
        ("launcher.fallbacks", "recompute.stages=none"),
        ("resilience.inject", "kill:kind=nan"),
        ("plan.recipe", "a tokens=many"),
        ("plan.recipe", "a length=3"),
    ],
)
def test_an_entry_that_was_none_is_none(name: str, text: str) -> None:
    assert former.entry(name, text) is None


def old(**groups: Any) -> dict[str, Any]:
    """The config of a run as an earlier version wrote it: with options of tools, and entries as text."""
    config = yaml.safe_load(to_yaml(compose(["parallel.pp=2"])))
    config |= {"plan": {"recipe": ["a tokens=1T"], "gpus": 8}, "convert": {"dtype": "bf16"}, "inspect": {"rows": 3}}
    config["data"] |= {"source": "none", "path": None, "blend": ["0.5 a", "0.5 b"]}
    config["recompute"]["stages"] = ["layernorm+moe_act", "none"]
    config["launcher"]["fallbacks"] = ["parallel.pp=1"]
    config["resilience"]["inject"] = ["kill:rank=0:step=7"]
    return config | groups


def test_the_config_of_an_old_run_is_read_wherever_it_is_read(tmp_path: Path) -> None:
    """By ranks, by the command that continues it, and from its checkpoints."""
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(old()))
    for cfg in (from_yaml(file), config_of(yaml.safe_load(file.read_text()), file)):
        assert cfg.data.blend == [BlendEntry("a", 0.5), BlendEntry("b", 0.5)]
        assert cfg.recompute.stages == [RecomputeStage(modules=["layernorm", "moe_act"]), RecomputeStage("none")]
        assert cfg.launcher.fallbacks == [FallbackLayout({"pp": 1})]
        assert cfg.resilience.inject == [Fault("kill", rank=0, step=7)]
    saved = run_config.read(tmp_path)
    assert not {"plan", "convert", "inspect"} & saved.keys()
    run_config.check_data(saved, cfg, tmp_path)  # the same data, in two spellings
    cfg.data.blend[1].weight = 0.25
    with pytest.raises(CheckpointError, match=r"use 'data.blend=\[{path:a,weight:0.5},{path:b,weight:0.5}\]', or add"):
        run_config.check_data(saved, cfg, tmp_path)


@pytest.mark.parametrize("lacks", ["a field", "the group"])
def test_what_an_old_run_lacks_has_the_default_of_its_version(lacks: str, tmp_path: Path) -> None:
    """By ranks, by the command that continues it, and from its checkpoints."""
    config = old()
    if lacks == "a field":
        for name in former.DEFAULTS:
            del config["data"][name.removeprefix("data.")]
    else:
        del config["data"]
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    saved = run_config.read(tmp_path)
    for cfg in (from_yaml(file), config_of(config, file)):
        assert {name: get(cfg, name) for name in former.DEFAULTS} == former.DEFAULTS
        assert {name: saved["data"][name.removeprefix("data.")] for name in former.DEFAULTS} == former.DEFAULTS
        run_config.check_data(saved, cfg, tmp_path)


def test_what_a_config_names_is_not_replaced_by_a_former_default(tmp_path: Path) -> None:
    config = old()
    assert former.current(config)["data"]["shuffle"] == config["data"]["shuffle"] == "epoch"
    assert config_of(config, tmp_path).data.deduplicate == Config().data.deduplicate


@pytest.mark.parametrize(
    ("values", "why"),
    [(None, "is not the config of a run"), ([1], "is not the config of a run"), ({"data": 3}, "has data=3, which is")],
)
def test_a_file_without_a_config_is_refused(values: object, why: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.yaml {why}"):
        config_of(values, tmp_path / "config.yaml")


def test_an_entry_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    damaged = old(resilience={"inject": ["kill:whom=0"]})
    with pytest.raises(CheckpointError, match=r"resilience.inject=.*'kill:whom=0', which is not a mapping"):
        config_of(damaged, tmp_path / "config.yaml")
    for entry, why in (
        ({"kind": "kill", "stap": 3}, "an entry that has 'stap', which is not one of kind, rank"),
        ({"kind": "kill", "step": "3"}, "step='3', which is not a whole number"),
        ({"step": 3}, "an entry without kind"),
    ):
        with pytest.raises(CheckpointError, match=why):
            config_of(old(resilience={"inject": [entry]}), tmp_path / "config.yaml")


def test_an_old_entry_in_a_yaml_file_of_the_user_is_told_with_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "mine/experiment/x.yaml"
    own.parent.mkdir(parents=True)
    told = {
        "data: {blend: [0.7 a/text]}": "data.blend is a list of mappings, not of text such as '0.7 a/text'; write "
        "{path:a/text,weight:0.7}",
        "recompute: {stages: [{mode: none}, moe+mlp]}": "recompute.stages is a list of mappings, not of text such as "
        "'moe+mlp'; write {modules:[moe,mlp]}",
        "resilience: {inject: [{kind: kill, stap: 3}]}": "resilience.inject has an entry with stap, which is not",
        "resilience: {inject: [{rank: 3, step: 1}]}": "resilience.inject has an entry without kind; use ",
        "resilience: {inject: [{kind: kill, step: soon}]}": "has an entry whose step is not an integer; use ",
        "launcher: {fallbacks: [{parallel: 3}]}": "launcher.fallbacks has an entry whose parallel is not",
    }
    for text, line in told.items():
        own.write_text(f"# @package _global_\n{text}\n")
        assert hydra_entry(print, argv=["--config-dir", "mine", "experiment=x", "run_dir=R"]) == 2
        said = capsys.readouterr().err
        assert line in said
        assert said.startswith("error: ")
        assert said.count("\n") == 1
