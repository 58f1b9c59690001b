"""A command line continues an existing run unchanged, changes it as asked, or is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_train.checkpoint import continuing
from moe_train.config.composition import compose as compose_module
from moe_train.config.composition.compose import compose, from_yaml, hydra_entry, to_yaml
from moe_train.config.composition.validate import validate
from moe_train.config.resolve import total_steps
from moe_train.config.schedule import ScheduleSegment
from moe_train.config.schema import Config
from moe_train.formats import manifest, run_directory
from parallel.errors import ConfigError, MoeTrainError

FIRST = ("train.steps=10", "schedule.warmup_steps=2", "data=text", "data.path=a.txt", "data.dir=d", "parallel.ep=2")


@pytest.fixture(autouse=True)
def _in_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(continuing, "_told", set())


def begin(*words: str, step: int = 10, run_dir: str = "R", tokens: int | None = None) -> Config:
    """As if a run with these overrides had saved at `step`."""
    cfg = compose([*(words or FIRST), f"run_dir={run_dir}"])
    tokens = step * cfg.batch.global_batch_size * cfg.train.seq_length if tokens is None else tokens
    Path(run_dir).mkdir(exist_ok=True)
    Path(run_dir, "config.yaml").write_text(to_yaml(cfg))
    path = cfg.checkpoint_root / run_directory.name_of(step)
    path.mkdir(parents=True)
    (path / run_directory.CONFIG).write_text(yaml.safe_dump(asdict(cfg)))
    progress = {"step": step, "consumed_samples": 0, "consumed_tokens": tokens}
    state = {"format": run_directory.FORMAT, "progress": progress, "schedule": {"num_steps": step}}
    (path / run_directory.STATE).write_text(json.dumps(state))
    return cfg


def again(*words: str, run_dir: str = "R") -> Config:
    """What the command line of another start makes."""
    words = (*words, f"run_dir={run_dir}")
    return continuing.continued(compose(words), words, compose)


def test_a_run_goes_on_as_it_was() -> None:
    assert again() == compose(["run_dir=R"])  # there is none yet
    first = begin()
    assert again() == first
    assert again(*FIRST) == first  # a requeued job says all of it again
    assert again("resume=never") == compose(["run_dir=R", "resume=never"])


def begin_without_a_checkpoint(*words: str) -> Config:
    """As if a run with these overrides had ended before it saved anything."""
    cfg = compose([*words, "run_dir=R"])
    Path("R").mkdir(exist_ok=True)
    Path("R/config.yaml").write_text(to_yaml(cfg))
    return cfg


def test_a_run_that_ended_before_its_first_checkpoint_goes_on_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    first = begin_without_a_checkpoint(*FIRST)
    assert again(*FIRST) == first
    assert capsys.readouterr().err == ""  # a requeued job says all of it again
    assert again() == first
    assert again(run_dir=os.path.abspath("R")).data == first.data  # Hydra makes it absolute on the way to the job
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("no checkpoint yet: the run begins with R/config.yaml (parallel.ep=2 ")
    assert "and 3 more); resume=never takes the defaults" in said
    assert again("resume=never") == compose(["run_dir=R", "resume=never"])


def test_a_runtime_that_was_resolved_is_not_told(capsys: pytest.CaptureFixture[str]) -> None:
    begin_without_a_checkpoint("runtime=cpu")
    assert again().runtime == "cpu"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "fields"),
    [
        (("train.steps=20",), {"train.steps": 20, "schedule.warmup_steps": 2, "data.path": "a.txt"}),
        (("train.tokens=20480",), {"train.steps": None, "train.tokens": 20480}),
        (("data=stdlib", "seed=7"), {"data.source": "stdlib", "data.path": None, "seed": 7, "train.steps": 10}),
        (("model.num_layers=2", "train.seq_length=64"), {"model.num_layers": 2, "train.seq_length": 64}),
        (("schedule=linear",), {"schedule.decay": "linear", "train.steps": 10}),
    ],
    ids=" ".join,
)
def test_without_a_checkpoint_every_field_may_change(words: Sequence[str], fields: dict[str, Any]) -> None:
    """Nothing was trained, so that nothing needs a permission."""
    first = begin_without_a_checkpoint(*FIRST)
    cfg = again(*words)
    for name, value in fields.items():
        assert continuing.get(cfg, name) == value
    assert cfg.parallel == first.parallel


def test_the_weights_of_a_run_without_a_checkpoint_are_still_needed() -> None:
    """It would begin with random ones."""
    begin_without_a_checkpoint("init_from=gone")
    assert again().init_from == "gone"
    with pytest.raises(ConfigError, match="init_from=gone does not exist"):
        validate(again())


def test_first_weights_that_are_gone_are_not_needed_but_told(capsys: pytest.CaptureFixture[str]) -> None:
    begin("init_from=gone")
    assert again().init_from is None
    assert again().init_from is None
    assert capsys.readouterr().err == (
        "warning: init_from=gone is gone: the checkpoints have its weights, and an export will lack the other files "
        "that came with them\n"
    )
    begin("init_from=gone", run_dir="S")
    Path("S/init_from").mkdir()  # where these files were kept
    assert again(run_dir="S").init_from is None
    assert capsys.readouterr().err == ""


def test_a_config_that_cannot_be_read_is_not_replaced_by_the_defaults() -> None:
    Path("R").mkdir()
    Path("R/config.yaml").write_text("model: [")
    with pytest.raises(ConfigError, match=r"R/config\.yaml cannot be read .* and the run has no checkpoint"):
        again()
    assert again("resume=never") == compose(["run_dir=R", "resume=never"])


@pytest.mark.parametrize(
    ("words", "fields"),
    [
        (("parallel.pp=2", "batch.micro_batch_size=2"), {"parallel.pp": 2, "parallel.ep": 2}),
        (("parallel=single",), {"parallel.ep": 1}),  # an option replaces all fields of its group
        (("precision=bf16",), {"precision.dtype": "bf16", "train.steps": 10}),
        (("recompute=full", "launcher.restarts=3"), {"recompute.mode": "full", "launcher.restarts": 3}),
        (("optimizer.lr=5e-4",), {"optimizer.lr": 5e-4}),  # asked for by name
        (("batch.global_batch_size=16",), {"batch.global_batch_size": 16, "train.steps": 10}),
        (("train.steps=20", "schedule.decay_steps=10"), {"train.steps": 20, "schedule.decay_steps": 10}),
        (("train.steps=20", "schedule.on_resume=override"), {"train.steps": 20, "schedule.decay_steps": None}),
        (("train.steps=20", "schedule.on_resume=checkpoint"), {"train.steps": 20, "schedule.decay_steps": 10}),
        (("train.tokens=20480", "schedule.decay_steps=20"), {"train.tokens": 20480, "train.steps": None}),
        (("schedule=constant", "schedule.on_resume=override"), {"schedule.decay": "constant"}),
        (("data.path=b.txt", "data.on_resume=change"), {"data.path": "b.txt", "data.dir": "d"}),
        (("seed=7", "data.on_resume=change"), {"seed": 7}),
        (("export_hf=true",), {"export_hf": True, "train.steps": 10}),
    ],
    ids=" ".join,
)
def test_what_the_command_line_names_changes_and_nothing_else(words: Sequence[str], fields: dict[str, Any]) -> None:
    first = begin()
    cfg = again(*words)
    for name, value in fields.items():
        assert continuing.get(cfg, name) == value
    assert (cfg.data.source, cfg.model) == (first.data.source, first.model)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("model.num_layers=2",), "is of another model: model.num_layers=4 in the checkpoint"),
        (("data=stdlib",), "other data than R/checkpoints/step_00000010: data.source was files and is stdlib"),
        (("data.dir=e",), "data.dir was d and is e now; use data.dir=d, or add data.on_resume=change"),
        (("seed=7",), "seed was 1234 and is 7 now"),
        (("train.seq_length=64",), "train.seq_length was 128 and is 64"),
        (
            ("train.steps=20",),
            "0.000628 instead of 0.0001 at step 10: this command changes the end of its decay from step 10 to 20; add",
        ),
        (("train.tokens=20480", "batch.global_batch_size=16"), "the end of its decay from step 10 to 15"),
        (("schedule=linear",), "schedule.decay from cosine to linear"),
        (("experiment=tiny_tp2_pp2_ep2",), "the end of its decay"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_must_not_change_unnoticed_is_refused(words: Sequence[str], told: str) -> None:
    begin()
    with pytest.raises(MoeTrainError) as error:
        again(*words)
    assert told in str(error.value)
    assert error.value.exit_code == 2


def test_segments_that_end_with_the_run_keep_their_ends() -> None:
    begin(*FIRST, "schedule=wsd")
    with pytest.raises(MoeTrainError, match="changes the end of its decay from token 10240 to token 20480; add"):
        again("train.steps=20")
    with pytest.raises(MoeTrainError, match=r"schedule\.min_lr_ratio from 0\.0 to 0\.1 and schedule\.lr from"):
        again("schedule=cosine")
    assert again("train.steps=20", "schedule.on_resume=override").schedule.lr == again().schedule.lr
    kept = again("train.steps=20", "schedule.on_resume=checkpoint")
    assert [segment.until_tokens for segment in kept.schedule.lr] == [8192, 10240, None]
    assert again("schedule.lr=[{shape:cosine}]").schedule.lr == [ScheduleSegment("cosine")]  # asked for by name
    assert again("schedule.weight_decay=[{value:0.2}]").schedule.weight_decay == [ScheduleSegment(value=0.2)]


def test_an_option_does_not_change_the_learning_rate_that_was_asked_for() -> None:
    begin(*FIRST, "optimizer.lr=3e-4")
    with pytest.raises(MoeTrainError, match=r"optimizer\.lr from 0\.0003 to 0\.001"):
        again("optimizer=adamw")
    assert again("optimizer=adamw", "optimizer.lr=3e-4").optimizer.lr == 3e-4


@pytest.mark.parametrize("length", [("train.steps=12",), ("train.tokens=12288",)], ids=["steps", "tokens"])
def test_an_option_of_the_schedule_warms_up_for_a_tenth_of_a_short_run(length: Sequence[str]) -> None:
    """Of the run, whose length the command line does not repeat."""
    begin(*length, "batch.global_batch_size=8", "train.seq_length=128", step=5, tokens=5120)
    cfg = again("schedule=constant", "schedule.on_resume=override")
    assert (cfg.schedule.decay, cfg.schedule.warmup_steps) == ("constant", 1)
    assert again("schedule=constant", "schedule.on_resume=override", "train.steps=40").schedule.warmup_steps == 20


def test_a_constant_rate_has_no_end_that_could_move() -> None:
    begin(*FIRST, "schedule=constant")
    assert again("train.steps=20").train.steps == 20


def test_what_was_asked_for_holds_until_the_next_checkpoint_and_no_longer() -> None:
    begin()
    accepted = again("train.steps=20", "schedule.on_resume=override")
    Path("R/config.yaml").write_text(to_yaml(accepted))  # and then the run is killed
    assert again() == accepted
    begin("train.steps=20", *FIRST[1:], "schedule.on_resume=override", step=12)
    assert again().schedule.on_resume == "match"
    with pytest.raises(MoeTrainError, match="the end of its decay from step 20 to 30"):
        again("train.steps=30")


@pytest.mark.parametrize(
    ("words", "step", "tokens", "steps"),
    [
        (("train.tokens=20480",), 0, 0, 20),
        (("train.tokens=20480",), 10, 10240, 20),
        (("train.tokens=20480", "batch.global_batch_size=16"), 10, 10240, 15),  # the example of docs/checkpoints.md
        (("train.tokens=20481", "batch.global_batch_size=16"), 10, 10240, 16),
        (("train.tokens=20480", "batch.global_batch_size=16"), 13, 10240 + 3 * 2048, 15),
        (("train.tokens=20480",), 30, 30720, 30),
        (("train.steps=12", "batch.global_batch_size=16"), 10, 10240, 12),
    ],
)
def test_a_token_budget_counts_the_tokens_that_were_consumed(
    words: Sequence[str], step: int, tokens: int, steps: int
) -> None:
    assert total_steps(compose(words), step, tokens) == steps


def test_a_config_of_another_version_or_none_at_all_is_made_up_for(capsys: pytest.CaptureFixture[str]) -> None:
    first = begin()
    own = Path("R/config.yaml")
    values = yaml.safe_load(own.read_text())
    values["of_the_future"] = 1
    del values["checkpoint"]
    own.write_text(yaml.safe_dump(values))
    assert again() == first
    for text in ("model: [", "seed: text\nrun_dir: R\n", "", "data: 3\nrun_dir: R\n"):
        own.write_text(text)
        assert again() == first
        assert capsys.readouterr().err.count("R/config.yaml cannot be read") == 1
        assert again() == first  # said once
        assert capsys.readouterr().err == ""
    own.unlink()
    assert again() == first


@pytest.mark.parametrize("place", ["run", "checkpoint"])
def test_a_config_that_was_cut_off_does_not_pass_for_that_of_an_earlier_version(
    place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the end of each line it may be valid YAML, in which later fields are missing."""
    begin(*FIRST, step=5)
    first = begin(*FIRST, step=10)
    newest = first.checkpoint_root / "step_00000010"
    manifest.write(newest, {name: manifest.entry_of(newest / name) for name in ("config.yaml", "state.json")})
    file = Path("R/config.yaml") if place == "run" else newest / "config.yaml"
    whole = file.read_text()
    # A file that ends with `run_dir`, or later, counts as whole: only fields of the command line follow.
    ends = [end for end, letter in enumerate(whole) if letter == "\n"][3:-5:13]
    for end in ends:
        file.write_text(whole[:end] + "\n")
        assert again() == first
        resume_point = continuing.find(first)
        assert resume_point is not None
        assert resume_point.path.name == ("step_00000010" if place == "run" else "step_00000005")
        continuing._told.clear()
    told = capsys.readouterr().err.count("warning: R/config.yaml cannot be read (")
    assert told == (len(ends) if place == "run" else 0)


def test_a_run_without_its_config_is_not_begun_again_though_its_checkpoints_are_elsewhere() -> None:
    begin(*FIRST, "checkpoint.dir=C")
    file = Path("R/config.yaml")
    whole = file.read_text()
    for group in ("\ncheckpoint:", "\nresilience:", "\nrun_dir:"):
        file.write_text(whole[: whole.index(group)] + "\n")
        with pytest.raises(ConfigError, match=r"R/config\.yaml cannot be read \(it was cut off.*restore the file"):
            again()


def test_a_field_that_this_version_does_not_have_is_not_missed(capsys: pytest.CaptureFixture[str]) -> None:
    first = begin(*FIRST, "telemetry.tensorboard=false")
    file = first.checkpoint_root / "step_00000010" / "config.yaml"
    values = yaml.safe_load(file.read_text())
    values["telemetry"] |= {"of_an_earlier_version": 1, "tensorboard": True}
    file.write_text(yaml.safe_dump(values))
    assert again() == first
    assert capsys.readouterr().err == ""


def test_a_run_of_an_earlier_version_keeps_the_order_of_its_data() -> None:
    """Also where the command line names the group of data again, as the first one did; it changes by name only."""
    begin(*FIRST)
    files = (Path("R/config.yaml"), *Path("R").glob("checkpoints/step_*/config.yaml"))
    for file in files:  # of a version without the field
        values = yaml.safe_load(file.read_text())
        del values["data"]["shuffle"]
        file.write_text(yaml.safe_dump(values))
    assert len(files) == 2
    for words in ((), FIRST, ("data=text", "data.path=a.txt", "data.dir=d")):
        assert again(*words).data.shuffle == "run"
    with pytest.raises(MoeTrainError, match=r"data\.shuffle was run and is epoch now"):
        again("data.shuffle=epoch")
    assert again("data.shuffle=epoch", "data.on_resume=change").data.shuffle == "epoch"


def test_a_run_directory_with_the_old_name_of_a_field_keeps_its_value() -> None:
    """In run_dir/config.yaml, and in a checkpoint's config where that is all there is."""
    cfg = begin(*FIRST, "checkpoint.max_consecutive_failures=7")
    own = Path("R/config.yaml")
    for path in (own, cfg.checkpoint_root / "step_00000010" / run_directory.CONFIG):
        values = yaml.safe_load(path.read_text())
        values["checkpoint"]["tries"] = values["checkpoint"].pop("max_consecutive_failures")
        path.write_text(yaml.safe_dump(values))
    assert again() == cfg
    own.unlink()
    assert again() == cfg


def test_a_run_whose_checkpoints_are_damaged_is_not_begun_with_the_defaults() -> None:
    """Its ranks say what is wrong with them, or find an earlier one that is whole."""
    first = begin(step=10)
    state = first.checkpoint_root / "step_00000010" / run_directory.STATE
    for text in ("{", '{"format": 2}', f'{{"format": {run_directory.FORMAT}, "progress": 3}}'):
        state.write_text(text)
        assert again() == first
    state.write_text(f'{{"format": {run_directory.FORMAT + 1}}}')
    with pytest.raises(MoeTrainError, match="update moe-train"):
        again()


def test_checkpoints_elsewhere_are_found_by_the_runs_own_config() -> None:
    first = begin(*FIRST, "checkpoint.dir=elsewhere")
    assert again() == first


def test_another_runs_checkpoint_brings_its_config_but_not_its_places() -> None:
    begin(*FIRST, "checkpoint.dir=elsewhere", "init_from=.")
    cfg = again("resume=elsewhere/step_00000010", run_dir="S")
    assert (cfg.train.steps, cfg.data.path, cfg.checkpoint.dir, cfg.init_from) == (10, "a.txt", None, None)
    begin(run_dir="S", step=3)
    with pytest.raises(ConfigError, match="would begin another run in run_dir=S, whose own is at step_00000003"):
        again("resume=elsewhere/step_00000010", run_dir="S")


def test_a_finished_run_needs_no_rank_until_something_is_left_to_do() -> None:
    cfg = begin()
    assert continuing.nothing_to_do(cfg) == ""  # its last evaluation and its summary are missing
    Path("R/summary.json").touch()
    assert continuing.nothing_to_do(cfg).startswith("nothing to do: run_dir=R is at step 10 of 10")
    exporting = again("export_hf=true")
    assert continuing.nothing_to_do(exporting) == ""
    checkpoint = cfg.checkpoint_root / "step_00000010"
    manifest = continuing.export_of(cfg, checkpoint) / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.touch()
    assert continuing.nothing_to_do(exporting) != ""
    later = manifest.stat().st_mtime_ns + 1
    os.utime(checkpoint / run_directory.STATE, ns=(later, later))  # the last steps were done again, and reported
    os.utime("R/summary.json", ns=(later, later))
    assert continuing.nothing_to_do(exporting) == ""  # what was exported is older
    assert continuing.nothing_to_do(cfg) != ""
    assert continuing.nothing_to_do(again("train.steps=11", "schedule.decay_steps=10")) == ""


def test_what_an_earlier_run_left_is_set_aside_and_not_lost(capsys: pytest.CaptureFixture[str]) -> None:
    cfg = begin()
    Path("R/metrics.jsonl").write_text("{}\n")
    Path("R/loss.svg").write_text("<svg/>")
    assert continuing.set_aside(cfg) is None  # resume=auto
    place = continuing.set_aside(again("resume=never"))
    assert place is not None
    assert sorted(path.name for path in place.iterdir()) == ["checkpoints", "config.yaml", "loss.svg", "metrics.jsonl"]
    assert [path.name for path in Path("R").iterdir()] == [place.name]
    assert "held an earlier run, which is now in R/earlier_" in capsys.readouterr().err
    assert continuing.set_aside(again("resume=never")) is None


def test_checkpoints_elsewhere_are_set_aside_where_they_are() -> None:
    begin(*FIRST, "checkpoint.dir=elsewhere")
    assert continuing.set_aside(again("resume=never", "checkpoint.dir=elsewhere"))
    assert run_directory.candidates(Path("elsewhere")) == []
    assert len(list(Path("elsewhere").glob("earlier_*/step_00000010"))) == 1


@pytest.mark.parametrize("options", [[], ["-m"]])
def test_a_command_gets_the_config_of_the_run_that_it_continues(options: list[str]) -> None:
    run_dir = "R/0" if options else "R"
    Path("R").mkdir(exist_ok=True)
    begin(run_dir=run_dir)
    seen: list[Config] = []
    code = hydra_entry(seen.append, argv=[*options, "run_dir=R", "parallel.pp=2"], revise=continuing.continued)
    assert code == 0
    (cfg,) = seen
    assert (cfg.train.steps, cfg.data.path, cfg.parallel.pp, cfg.parallel.ep) == (10, "a.txt", 2, 2)
    assert Path(cfg.run_dir) == Path(run_dir).absolute()


def test_a_refusal_is_one_line_before_anything_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    first = begin()
    assert hydra_entry(_never, argv=["run_dir=R", "train.steps=20"], revise=continuing.continued) == 2
    assert capsys.readouterr().err.startswith("error: the run would continue with another learning rate")
    assert from_yaml("R/config.yaml") == first


def _never(cfg: Config) -> None:
    raise AssertionError("it must not run")


def test_the_command_composes_again_where_an_experiment_is_named() -> None:
    """Its fields are those that are not the same without it."""
    begin("experiment=tiny_tp2_pp2_ep2", step=10)
    revise: Callable[..., Config] = continuing.continued
    seen: list[Config] = []
    words = ["run_dir=R", "experiment=tiny_tp2_pp2_ep2"]
    assert hydra_entry(seen.append, argv=words, revise=revise) == 0
    assert seen[0].parallel.tp == 2
    assert compose_module._REVISE.get() is None
