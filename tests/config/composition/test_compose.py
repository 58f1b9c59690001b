"""The command is a Hydra application: --cfg, -m, groups, experiments; and errors of a run end as its type says."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from moe_train.config.aliases import RENAMED, with_current_names
from moe_train.config.composition import compose as compose_module
from moe_train.config.composition.compose import compose, from_yaml, hydra_entry, to_yaml
from moe_train.config.composition.explain import CONF_DIR, group_options
from moe_train.config.composition.validate import validate
from moe_train.config.resolve import total_steps
from moe_train.config.schema import Config
from moe_train.config.walk import all_fields, get, group_names, typed
from parallel.errors import ConfigError, HardwareError

OPTIONS = [(group, option) for group in (*group_names(), "experiment") for option in group_options(group)]


@pytest.fixture(autouse=True)
def _in_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Jobs:
    """Takes the place of a run, keeps the configs that it was given, and leaves a file."""

    def __init__(self, error: Exception | None = None) -> None:
        self.configs: list[Config] = []
        self.error = error

    def __call__(self, cfg: Config) -> None:
        self.configs.append(cfg)
        if self.error:
            raise self.error
        Path(cfg.run_dir, "ran").touch()


@pytest.mark.parametrize(("answers", "told"), [(True, False), (False, True)])
def test_only_a_command_that_prints_ends_quietly_where_its_reader_is_gone(
    answers: bool, told: bool, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`moe-submit --dry-run | head`; a submission that was interrupted so must be noticed."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8", closefd=False) as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        code = hydra_entry(lambda cfg: print("text", flush=True), argv=["run_dir=R"], answers=answers)
        assert (code, "BrokenPipeError" in capfd.readouterr().err) == (1, told)
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)  # so that the stream can be closed
    os.close(writer)


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        ((), 20), (("train.steps=200",), 20), (("train.steps=20",), 20), (("train.steps=19",), 1),
        (("train.steps=3",), 0), (("train.steps=3", "schedule=linear"), 0),
        (("train.steps=3", "schedule.warmup_steps=2"), 2), (("schedule.decay_steps=10",), 1),
        (("train.steps=3", "schedule.decay_steps=100"), 20),
        (("train.tokens=12k", "train.seq_length=100", "batch.global_batch_size=10"), 1),
        (("train.tokens=40k", "train.seq_length=100", "batch.global_batch_size=10"), 20),
    ],
)  # fmt: skip
def test_a_short_run_warms_up_for_a_tenth_of_its_steps(words: tuple[str, ...], steps: int) -> None:
    """`moe-train train.steps=3` needs no second override. Runs of 20 steps and more are as they were."""
    cfg = compose(words)
    assert cfg.schedule.warmup_steps == steps
    validate(cfg)


@pytest.mark.parametrize(
    "word", ["train.steps=-5", "schedule.decay_steps=-5", "batch.global_batch_size=0", "train.seq_length=0"]
)
def test_a_wrong_length_of_a_short_run_is_named_itself(word: str) -> None:
    field = word.partition("=")[0]
    with pytest.raises(ConfigError, match=f"^{field}=.* is below the smallest value"):
        validate(compose(["train.tokens=1000", word] if "batch" in word or "length" in word else [word]))


def test_a_run_gets_a_typed_config_and_hydras_directory(capfd: pytest.CaptureFixture[str]) -> None:
    jobs = Jobs()
    assert hydra_entry(jobs, argv=["parallel.tp=2", "run_dir=here", "optimizer.lr=1e-4"]) == 0
    (cfg,) = jobs.configs
    assert type(cfg) is Config
    assert (cfg.parallel.tp, cfg.optimizer.lr, cfg.run_dir) == (2, 1e-4, str(Path("here").absolute()))
    assert [path.name for path in Path("here").iterdir()] == ["ran"]
    assert capfd.readouterr() == ("", "")


def test_a_command_that_writes_nothing_leaves_no_directory() -> None:
    assert hydra_entry(lambda cfg: None, argv=["run_dir=here"]) == 0
    assert not list(Path().iterdir())


def test_a_command_that_is_no_run_gets_the_same_config_and_the_same_refusals(
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen: list[Config] = []
    for runs in (True, False):
        assert hydra_entry(seen.append, argv=["parallel.tp=2", "run_dir=here", "schedule=constant"], runs=runs) == 0
    assert seen[1] == dataclasses.replace(seen[0], run_dir="here")
    assert not list(Path().iterdir())
    for wrong in ("parallel.tp=3", "parallel.tpp=3", "parallel.tp=1,2", "verbose=perhaps"):
        codes = [hydra_entry(seen.append, argv=[wrong], runs=runs) for runs in (True, False)]
        lines = capsys.readouterr().err.splitlines()
        assert codes == [2, 2]
        assert lines[0] == lines[1]
    assert hydra_entry(seen.append, argv=["--cfg", "job"], runs=False) == 0
    assert "parallel:" in capsys.readouterr().out
    assert len(seen) == 2


def test_defaults_then_yaml_then_command_line() -> None:
    assert Config().schedule.min_lr_ratio == compose().schedule.min_lr_ratio == 0.1
    assert compose(["schedule=constant"]).schedule.min_lr_ratio == 1.0
    assert compose(["schedule=constant", "schedule.min_lr_ratio=0.5"]).schedule.min_lr_ratio == 0.5
    assert compose(["experiment=tiny_tp2_pp2_ep2", "parallel.ep=4"]).parallel.ep == 4


def test_cfg_job_prints_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    jobs = Jobs()
    assert hydra_entry(jobs, argv=["--cfg", "job", "model.topk=2"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    names = {f"{group}.{leaf}" for group in group_names() for leaf in printed.pop(group)} | set(printed)
    assert names == set(all_fields())
    assert not jobs.configs
    assert not list(Path().iterdir())


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert hydra_entry(Jobs(), argv=["--help"]) == 0
    assert "deepseek_v3_h800" in capsys.readouterr().out
    assert hydra_entry(Jobs(), argv=["--version"]) == 0


def test_multirun_runs_each_job_in_its_own_directory(capsys: pytest.CaptureFixture[str]) -> None:
    jobs = Jobs()
    argv = ["-m", "parallel.tp=1,2", "seed=range(0,2)", "run_dir=sweep"]
    assert hydra_entry(jobs, argv=argv) == 0
    assert [(cfg.parallel.tp, cfg.seed, Path(cfg.run_dir)) for cfg in jobs.configs] == [
        (tp, seed, Path("sweep").absolute() / str(2 * (tp - 1) + seed)) for tp in (1, 2) for seed in (0, 1)
    ]
    assert capsys.readouterr().err == ""


def test_a_wrong_job_of_a_sweep_is_named_and_the_others_run(capsys: pytest.CaptureFixture[str]) -> None:
    jobs = Jobs()
    assert hydra_entry(jobs, argv=["--multirun", "parallel.tp=1,3,2", "run_dir=sweep"]) == 2
    assert [cfg.parallel.tp for cfg in jobs.configs] == [1, 2]
    err = capsys.readouterr().err
    assert err.startswith("error: job 1: parallel.tp=3 ")
    assert err.count("\n") == 1
    assert sorted(path.name for path in Path("sweep").iterdir() if path.is_dir()) == ["0", "2"]


def test_a_typed_error_of_a_run_is_one_line_with_its_own_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert hydra_entry(Jobs(HardwareError("no GPU\nhere", "plug one in")), argv=[]) == 3
    assert capsys.readouterr().err == "error: no GPU\\nhere; plug one in\n"
    assert hydra_entry(Jobs(ConfigError("wrong", "use right")), argv=[]) == 2
    assert capsys.readouterr().err == "error: wrong; use right\n"


def test_a_bug_shows_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert hydra_entry(Jobs(ValueError("surprise")), argv=[]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("error: ValueError: surprise\n")


@pytest.mark.parametrize("flag", ["-v", "verbose=true"])
def test_verbose_shows_the_traceback_of_a_users_error(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in ("parallel.tp=3", "parallel.tpp=3"):
        assert hydra_entry(Jobs(), argv=[wrong, flag]) == 2
        err = capsys.readouterr().err
        assert "Traceback" in err
        assert err.splitlines()[-1].startswith(f"error: {wrong.split('=')[0]}")


def test_hydra_full_error_shows_the_traceback_and_stays_as_it_was(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    assert hydra_entry(Jobs(), argv=["parallel.tp=3"]) == 2
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.delenv("HYDRA_FULL_ERROR")
    seen: list[bool] = []
    import os

    assert hydra_entry(lambda cfg: seen.append("HYDRA_FULL_ERROR" in os.environ), argv=[]) == 0
    assert seen == [False]


def test_an_interrupt_ends_a_run_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(cfg: Config) -> None:
        raise KeyboardInterrupt

    assert hydra_entry(interrupted, argv=[]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_argv_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["moe-train", "seed=7"])
    jobs = Jobs()
    assert hydra_entry(jobs) == 0
    assert jobs.configs[0].seed == 7
    assert sys.argv == ["moe-train", "seed=7"]


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=["=".join(pair) for pair in OPTIONS])
def test_every_option_composes_and_begins_with_what_it_is(group: str, option: str) -> None:
    text = (CONF_DIR / group / f"{option}.yaml").read_text().splitlines()
    lines = [line for line in text if line != "# @package _global_"]
    assert lines[0].startswith("# "), "the first line of an option says what it is"
    cfg = compose([f"{group}={option}"])
    if group == "model":
        assert validate(cfg).world_size == 1
    if group == "experiment" and option == "continue":
        with pytest.raises(ConfigError, match="init_from=HUGGING_FACE_DIRECTORY does not exist"):
            validate(cfg)
        return
    if group == "experiment":
        assert validate(cfg).world_size > (0 if option.startswith("tiny/") else 1)
        return
    for name, value in yaml.safe_load("\n".join(text)).items():
        composed = get(cfg, f"{group}.{name}")
        if "${" in str(value):  # follows from other fields
            continue
        if isinstance(value, list) and all_fields()[f"{group}.{name}"].entry:
            value = typed(f"{group}.{name}", value)
        assert composed == value or float(composed) == float(value)  # YAML 1.1 takes 1e-3 for a string


def test_user_yaml_can_extend_a_groups_schema(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine/optimizer").mkdir(parents=True)
    own = Path("mine/optimizer/slow.yaml")
    own.write_text("defaults: [schema, _self_]\nlr: 1e-5\n")
    jobs = Jobs()
    assert hydra_entry(jobs, argv=["--config-dir", "mine", "optimizer=slow"]) == 0
    assert (jobs.configs[0].optimizer.lr, jobs.configs[0].optimizer.beta2) == (1e-5, 0.95)
    own.write_text("lrr: 1e-5\n")
    assert hydra_entry(jobs, argv=["--config-dir", "mine", "optimizer=slow"]) == 2
    err = capsys.readouterr().err
    assert "lrr is not a field" in err
    assert "use optimizer.lr=" in err
    own.write_text("lr: [\n")
    assert hydra_entry(jobs, argv=["--config-dir", "mine", "optimizer=slow"]) == 2
    assert capsys.readouterr().err.startswith("error: a config file is not YAML")


def test_yaml_round_trip(tmp_path: Path) -> None:
    blend = "data.blend=[{path:a,weight:1.0},{path:b,weight:2.0}]"
    cfg = compose(["experiment=deepseek_v3/pretrain", "optimizer.lr=1e-7", blend])
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(cfg))
    assert from_yaml(path) == cfg
    assert compose_module.schema() == OmegaConf.structured(Config), "reading a file changed the schema of the next"
    path.write_text(to_yaml(cfg) + "extra: 1\n")
    with pytest.raises(ConfigError, match="extra is not a field"):
        from_yaml(path)
    with pytest.raises(ConfigError, match="does not exist"):
        from_yaml(tmp_path / "none.yaml")
    for text, why in (("seed: [", "while parsing"), ("a: &a [1]\nb: *a", "references"), ("[" * 100_000, "nested")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=rf"config\.yaml cannot be read: .*{why}"):
            from_yaml(path)


def test_a_config_of_an_earlier_version_may_have_the_old_names(tmp_path: Path) -> None:
    """Every field of RENAMED, both alone and next to the current name, which then counts."""
    own = yaml.safe_load(to_yaml(Config()))
    for old, new in RENAMED.items():
        group, _, leaf = old.partition(".")
        current = new.partition(".")[2]
        assert old not in all_fields()
        own[group][leaf] = own[group].pop(current) + 7
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(own))
    cfg = from_yaml(path)
    assert all(get(cfg, new) == get(Config(), new) + 7 for new in RENAMED.values())
    both = {"checkpoint": {"tries": 1, "max_consecutive_failures": 2}}
    assert with_current_names(both) == {"checkpoint": {"max_consecutive_failures": 2}}


def test_length_of_a_run() -> None:
    assert total_steps(compose()) == 200
    assert total_steps(compose(["train.steps=7"])) == 7
    per_step = 8 * 128
    assert (
        total_steps(compose([f"train.tokens={3 * per_step}", "batch.global_batch_size=8", "train.seq_length=128"])) == 3
    )
    assert total_steps(compose([f"train.tokens={3 * per_step + 1}", "train.seq_length=128"])) == 4


def test_deepseek_v3_layout_is_the_papers() -> None:
    layout = validate(compose(["model=deepseek_v3", "parallel=deepseek_v3_h800", "runtime=simulated", "rank=2047"]))
    assert (layout.world_size, layout.pp, layout.ep, layout.dp, layout.edp) == (2048, 16, 64, 128, 2)


def test_every_field_has_a_doc_line() -> None:
    for name, info in all_fields().items():
        assert info.doc.endswith("."), name
        assert "\n" not in info.doc, name
        assert len(info.doc) > 10, name


def test_walk_sees_every_field() -> None:
    count = sum(len(dataclasses.fields(getattr(Config(), group))) for group in group_names())
    assert len(all_fields()) == count + len(dataclasses.fields(Config)) - len(group_names())


def test_a_default_run_dir_is_one_directory_however_slow_the_checks_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name has the second in it, which passes while the configuration is checked."""

    def slowly(*args: Any, **options: Any) -> Any:
        time.sleep(1.1)
        return validate(*args, **options)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compose_module, "validate", slowly)
    seen: list[str] = []
    assert hydra_entry(lambda cfg: seen.append(cfg.run_dir), argv=[]) == 0
    assert len(seen) == 1
    assert list((tmp_path / "runs").iterdir()) == [], "what a command leaves empty is removed"
