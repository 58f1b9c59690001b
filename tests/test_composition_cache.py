"""Configs that tests compose are those that Hydra composes without the cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import hydra
import pytest
from hydra._internal import config_loader_impl
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from moe_train.config.composition import store
from moe_train.config.composition.command_line import for_hydra
from moe_train.config.composition.explain import CONF_DIR
from tests import composition_cache

STOCK = (
    config_loader_impl.create_defaults_list,
    config_loader_impl.ConfigLoaderImpl._compose_config_from_defaults_list,
    FileConfigSource.load_config,
)
"""Hydra's own functions: this module is imported before any fixture runs."""


store.register()


def composed(words: Sequence[str], name: str = "train") -> str:
    """All of the composed config, that of Hydra included, or the error."""
    try:
        with hydra.initialize_config_dir(str(CONF_DIR), job_name="moe-train", version_base="1.3"):
            config = hydra.compose(name, overrides=for_hydra(words), return_hydra_config=True)
        return OmegaConf.to_yaml(config)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def stock(words: Sequence[str], name: str = "train") -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config_loader_impl, "create_defaults_list", STOCK[0])
        patch.setattr(config_loader_impl.ConfigLoaderImpl, "_compose_config_from_defaults_list", STOCK[1])
        patch.setattr(FileConfigSource, "load_config", STOCK[2])
        patch.delattr(ConfigStore, "__deepcopy__")
        return composed(words, name)


WORDS = [
    ([], True),
    (["model=tiny", "parallel=tp2_pp2_ep2"], True),
    (["model=tiny", "parallel=tp2_pp2_ep2", "optimizer.lr=1e-3", "parallel.tp=1"], True),
    (["experiment=deepseek_v3/pretrain", "cluster=h100", "precision=bf16"], True),
    (["experiment=deepseek_v3/pretrain", "hydra/job_logging=disabled", "hydra.job.name=other"], True),
    (["cluster=h100", "experiment=deepseek_v3/pretrain"], True),
    (["model={hidden_size: 64}"], True),
    (["~precision"], True),
    (["model=tinny"], False),
    (["model.hiden_size=3"], False),
    (["model=[tiny,deepseek_v3]"], True),
    (["~model=deepseek_v3", "model=tiny"], False),
    (["++model=tiny"], False),
    (["optimizer.lr=fast"], False),
]


@pytest.mark.parametrize(("words", "works"), WORDS)
def test_it_is_the_stock_composition(words: list[str], works: bool) -> None:
    expected = stock(words)
    assert expected.startswith("hydra:\n") == works, expected
    assert [composed(words) for _ in range(2)] == [expected, expected]
    changed = composed([*words, "train.steps=77"])
    assert changed == stock([*words, "train.steps=77"])
    assert composed(words) == expected, "a config is a copy"


@pytest.mark.parametrize("name", ["plan", "convert", "inspect", "estimate"])
def test_roots_are_kept_apart(name: str) -> None:
    assert composed([], name) == stock([], name) != composed([])


def test_files_of_other_directories_are_read_again(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    words = [f"hydra.searchpath=[file://{tmp_path}]", "model=mine"]
    for size in (64, 128):
        (tmp_path / "model/mine.yaml").write_text(f"defaults: [tiny, _self_]\nhidden_size: {size}\n")
        assert f"hidden_size: {size}\n" in composed(words)


def test_the_environment_counts_when_a_reference_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("one", "two"):
        monkeypatch.setenv("PLACE", place)
        with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            assert hydra.compose("train", overrides=["data.dir=${oc.env:PLACE}"]).data.dir == place


def test_commands_find_what_others_have_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["model=tiny", "precision=fp8_block"]
    expected = stock(words)
    for _ in range(2):  # two processes
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(config_loader_impl, "create_defaults_list", STOCK[0])
            patch.setattr(config_loader_impl.ConfigLoaderImpl, "_compose_config_from_defaults_list", STOCK[1])
            composition_cache.install(patch, tmp_path)
            assert composed(words) == expected
        files = sorted(tmp_path.iterdir())
        assert len(files) == 2
        monkeypatch.setitem(globals(), "STOCK", (_never, _never))


def _never(*_: object, **__: object) -> None:
    raise AssertionError("it is read again")


def test_it_is_in_use() -> None:
    assert config_loader_impl.create_defaults_list.__module__ == composition_cache.__name__
