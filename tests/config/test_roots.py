"""What each command composes: options of tools are not part of a run."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import yaml

from launch.slurm import commands, submit
from moe_train.config.composition.compose import compose, hydra_entry, to_yaml
from moe_train.config.composition.explain import CONF_DIR
from moe_train.config.plan import EstimateConfig
from moe_train.config.roots import (
    ROOTS,
    ConvertRoot,
    EstimateRoot,
    InspectRoot,
    PlanRoot,
    all_groups,
    commands_with,
    field_info,
)
from moe_train.config.schema import Config
from moe_train.config.walk import all_fields, group_names
from parallel.errors import ConfigError
from parallel.suggest import override


def test_the_config_of_a_run_has_no_options_of_tools() -> None:
    written = yaml.safe_load(to_yaml(compose([])))
    assert not {"plan", "convert", "inspect", "estimate", "engine"} & written.keys()
    assert set(all_groups()) - set(group_names()) == {
        "plan", "convert", "inspect", "engine", "evaluate", "sampling", "generate", "chat", "serve", "view",
    }  # fmt: skip


def test_tools_that_read_checkpoints_compose_no_run() -> None:
    assert group_names(ConvertRoot) == ("model", "convert")
    assert group_names(InspectRoot) == ("inspect",)
    assert compose([], ConvertRoot).convert == ConvertRoot().convert
    assert compose([], InspectRoot) == InspectRoot()
    assert compose([], EstimateRoot) == EstimateRoot()


def test_a_plan_is_a_run_and_a_question() -> None:
    cfg = compose(["plan.gpus=2k", "parallel.tp=2", "experiment=deepseek_v3/pretrain", "run_dir=r"], PlanRoot)
    assert isinstance(cfg, Config)
    assert (cfg.plan.gpus, cfg.parallel.tp, cfg.model.name) == (2000, 2, "deepseek_v3")
    run = compose(["parallel.tp=2", "experiment=deepseek_v3/pretrain", "run_dir=r"])
    assert {name: value for name, value in vars(cfg).items() if name not in ("plan", "engine")} == vars(run)


def test_every_root_has_a_file_and_no_two_mean_different_things() -> None:
    assert {f"{info.config_name}.yaml" for info in ROOTS.values()} | {"run.yaml"} == {
        path.name for path in CONF_DIR.glob("*.yaml")
    }
    for root in ROOTS:
        for name, info in all_fields(root).items():
            assert field_info(name) == info
    assert commands_with("plan.imbalance") == ["moe-plan", "moe-submit"]
    assert commands_with("plan.gpus") == ["moe-plan"]


def test_moe_convert_names_the_field_that_took_the_place_of_one_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert hydra_entry(print, argv=["convert.source=a", "data.dir=x"], root=ConvertRoot, runs=False) == 2
    assert capsys.readouterr().err == "error: data.dir is not a field of moe-convert; use convert.data_dir=x\n"


def test_what_an_estimate_assumes_is_not_given_to_the_job() -> None:
    words = ["--config-name", "plan.x", "model=tiny", "plan.imbalance=1.5", "-m", "++plan.fsdp=true", "planner=3"]
    assert submit._without_plan(words) == (
        ["--config-name", "plan.x", "model=tiny", "-m", "planner=3"],
        EstimateConfig(imbalance=1.5, fsdp=True),
    )


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("plan.gpus=8", "plan.gpus is not in the configuration of this command, but in that of moe-plan; leave it out"),
        ("plan=deepseek_v3", "plan=VALUE: this command has no options of plan by name; use plan.FIELD=VALUE, such as"),
        ("plan.imbalance=0.5", "plan.imbalance=0.5 is below the smallest value 1; use plan.imbalance=1"),
        ("plan.software_dat=202601", "plan.software_dat is not a field of the configuration; use plan.software_date"),
    ],
)
def test_moe_submit_refuses_what_it_cannot_assume(
    word: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert submit.run(["--dry-run", "model=tiny", word, "run_dir=R"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {told}")
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


MINE = "experiment/mine.yaml"
GIVE_PLAN = "give plan.FIELD=VALUE to moe-plan or moe-submit on the command line"


@pytest.mark.parametrize(
    ("section", "root", "told"),
    [
        ("plan: {imbalance: 1.5}", Config, "plan (in experiment/mine.yaml) is not part of the configuration of a run"),
        ("plan: {imbalance: 1.5}", Config, f"; remove it from experiment/mine.yaml, and {GIVE_PLAN}"),
        ("convert: {dtype: bf16}", Config, "and give convert.FIELD=VALUE to moe-convert on the command line"),
        ("convert: {dtype: bf16}", PlanRoot, "is not part of the configuration of moe-plan; remove it from exp"),
        ("inspect: {rows: 3}", Config, "and give inspect.FIELD=VALUE to moe-inspect on the command line"),
        ("plan.imbalance: 1.5", Config, "plan.imbalance (in experiment/mine.yaml) is not part of"),
        ("defaults: [override /plan: default]", Config, "plan (in experiment/mine.yaml) is not part of"),
        ("defaults: [/convert: default]", Config, "remove it from the defaults list or override that names it, and"),
        ("estimate: {imbalance: 1.5}", Config, f"estimate is not a field of the configuration (in {MINE}); give plan."),
        ("modle: {}", Config, f"modle is not a field of the configuration (in {MINE}); use model=VALUE"),
    ],
)  # fmt: skip
def test_options_of_tools_in_a_file_of_a_run_are_refused_with_a_way_to_give_them(
    section: str, root: type, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _experiment(tmp_path, section)
    words = [f"--config-dir={tmp_path}", "experiment=mine", f"run_dir={tmp_path}/run"]
    assert hydra_entry(print, argv=words, root=root) == 2
    said = capsys.readouterr().err
    assert told in said
    assert said.count("\n") == 1


def test_moe_submit_takes_what_the_file_must_not_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(commands, "installed", lambda: False)
    _experiment(tmp_path, "plan: {imbalance: 1.5}")
    words = ["--dry-run", f"--config-dir={tmp_path}", "experiment=mine", "model=tiny", "runtime=cpu",
             "launcher.ranks_per_node=1", f"run_dir={tmp_path}/run"]  # fmt: skip
    assert submit.run(words) == 2
    assert GIVE_PLAN in capsys.readouterr().err
    _experiment(tmp_path, "seed: 3")
    assert submit.run([*words, "plan.imbalance=1.5"]) == 0
    assert "experiment=mine" in capsys.readouterr().out
    _experiment(tmp_path, "plan: {imbalance: 1.5}")
    found: list[PlanRoot] = []
    argv = [f"--config-dir={tmp_path}", "experiment=mine"]
    assert hydra_entry(found.append, argv=argv, root=PlanRoot, trains=False, runs=False) == 0
    assert found[0].plan.imbalance == 1.5


def _experiment(directory: Path, lines: str) -> None:
    (directory / "experiment").mkdir(exist_ok=True)
    (directory / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{lines}\n")


def test_a_remedy_with_braces_is_in_quotes_and_is_read_back() -> None:
    """Commas, brackets, quotes and what a shell or Hydra would take for something else."""
    entries = compose([
        "data.blend=[{path:'a, b'},{path:\"c's\"},{path:'[d]'},{path:null/e:f},{path:' g'},{path:\"h\\\"i\"}]"
    ]).data.blend  # fmt: skip
    assert [entry.path for entry in entries] == ["a, b", "c's", "[d]", "null/e:f", " g", 'h"i']
    (word,) = shlex.split(override("data.blend", entries))
    assert compose([word]).data.blend == entries
    with pytest.raises(ConfigError, match="has an entry without path"):
        compose(["data.blend=[{}]"])
