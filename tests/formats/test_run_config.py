from pathlib import Path

import pytest
import yaml

from moe_train.config.schema import BlendEntry, Config
from moe_train.formats import run_config
from parallel.errors import CheckpointError

HERE = Path("runs/a/checkpoints/step_00000010")


def saved(cfg: Config) -> dict:
    """The config as a checkpoint would give it back."""
    read: dict = yaml.safe_load(run_config.dump(cfg))
    return read


def test_the_same_config_has_no_differences() -> None:
    cfg = Config()
    cfg.model.norm_epsilon, cfg.optimizer.eps = 1e-6, 1e-15  # YAML is particular about exponents
    cfg.data.blend = [BlendEntry("a", 0.5), BlendEntry("b", 0.5)]
    assert run_config.check(saved(cfg), cfg, HERE) == []


def test_another_layout_run_directory_or_name_is_no_difference() -> None:
    cfg, now = Config(), Config()
    now.parallel.tp, now.run_dir, now.model.name, now.batch.micro_batch_size = 8, "elsewhere", "mine", 4
    assert run_config.check(saved(cfg), now, HERE) == []


def test_another_model_is_refused_field_by_field() -> None:
    cfg, now = Config(), Config()
    cfg.model.hidden_size, now.model.hidden_size = 256, 128
    cfg.model.qk_norm, now.model.qk_norm = "head", "none"
    with pytest.raises(CheckpointError) as error:
        run_config.check(saved(cfg), now, HERE)
    assert error.value.exit_code == 2
    assert "model.hidden_size=256 model.qk_norm=head in the checkpoint" in error.value.cause
    assert "model.hidden_size=128 model.qk_norm=none in the run" in error.value.cause
    assert "set model.hidden_size=256 model.qk_norm=head" in error.value.remedy


def test_settings_that_change_the_numbers_are_warned_about() -> None:
    cfg, now = Config(), Config()
    now.seed, now.data.path, now.model.router_bias_update_rate, now.optimizer.lr = 7, "b.txt", 0.0, 3e-4
    cfg.data.path = "a.txt"
    lines = run_config.check(saved(cfg), now, HERE)
    assert "seed was 1234 when step_00000010 was saved and is 7 now" in lines
    assert "data.path was a.txt when step_00000010 was saved and is b.txt now" in lines
    assert "model.router_bias_update_rate was 0.001 when step_00000010 was saved and is 0.0 now" in lines
    assert "optimizer.lr was 0.001 when step_00000010 was saved and is 0.0003 now" in lines
    assert len(lines) == 4


def test_fields_of_another_version_are_no_difference() -> None:
    before = saved(Config())
    del before["model"]["qk_norm"], before["schedule"]
    before["model"]["of_the_future"] = 1
    assert run_config.check(before, Config(), HERE) == []


@pytest.mark.parametrize("text", ["", "model: [1", "model: 3", "\x00"])
def test_an_unreadable_config_is_a_damaged_checkpoint(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(CheckpointError, match=r"is damaged: config\.yaml"):
        run_config.read(tmp_path)


@pytest.mark.parametrize("groups", ["[x]", "[{match: '*', of_the_future: 1}]"])
def test_parameter_groups_that_cannot_be_read_are_damage(groups: str, tmp_path: Path) -> None:
    content = yaml.safe_load(run_config.dump(Config()))
    content["optimizer"]["groups"] = yaml.safe_load(groups)
    (tmp_path / run_config.CONFIG).write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"optimizer\.groups"):
        run_config.optimizer_of(tmp_path)
