"""Hydra's work for the same groups of config files, done once in a process of tests.

Tests compose about two thousand configs, most of them from the same files. Reading and merging these takes most of the
0.12 s of a composition; a copy of the result takes 2 ms. Hydra applies the overrides of fields to the copy. References
are resolved later, from what the environment has then. Only this project's files are cached: those of other directories
may change. MOE_TESTS_COMPOSE=1 reads them for each config.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from hydra._internal import config_loader_impl
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.defaults_list import DefaultsList, Overrides
from hydra.core.config_store import ConfigStore

from moe_train.config.composition.explain import CONF_DIR

_FIXED = {f"file://{CONF_DIR}", "pkg://hydra.conf", "structured://", "<empty>"}


def install(patch: pytest.MonkeyPatch, directory: Path | None = None) -> None:
    """Replace three steps of Hydra's loader by ones that remember.

    Args:
        directory: where other processes find what this one has made; None to keep it to itself.
    """
    if os.environ.get("MOE_TESTS_COMPOSE") == "1":
        return
    stock_list = config_loader_impl.create_defaults_list
    stock_merge = ConfigLoaderImpl._compose_config_from_defaults_list
    stock_load = FileConfigSource.load_config
    results = _Results(directory)

    def create_defaults_list(repo: Any, config_name: Any, overrides_list: Any, **more: Any) -> DefaultsList:
        places = _places(repo)
        if places is None:
            return stock_list(repo=repo, config_name=config_name, overrides_list=overrides_list, **more)
        fields = Overrides(repo=repo, overrides_list=overrides_list).config_overrides
        groups = [word for word in overrides_list if not any(word is field for field in fields)]
        key = places, config_name, tuple(word.input_line for word in groups), tuple(more.items())
        result = results.get(
            ("list", *key), lambda: stock_list(repo=repo, config_name=config_name, overrides_list=groups, **more)
        )
        result.config_overrides = fields
        return cast(DefaultsList, result)

    def merge(self: Any, defaults: Any, repo: Any) -> Any:
        places = _places(repo)
        if places is None:
            return stock_merge(self, defaults, repo)
        key = places, tuple(dataclasses.astuple(default) for default in defaults)
        return results.get(("merged", *key), lambda: stock_merge(self, defaults, repo))

    def load_config(self: Any, config_path: str) -> Any:
        if f"{self.scheme()}://{self.path}" not in _FIXED:
            return stock_load(self, config_path)
        return results.get(("file", self.path, config_path), lambda: stock_load(self, config_path))

    # Hydra copies its sources for each composition, and with them all schemas of the store, which it only reads.
    patch.setattr(ConfigStore, "__deepcopy__", lambda store, _: store, raising=False)
    patch.setattr(config_loader_impl, "create_defaults_list", create_defaults_list)
    patch.setattr(ConfigLoaderImpl, "_compose_config_from_defaults_list", merge)
    patch.setattr(FileConfigSource, "load_config", load_config)


class _Results:
    """Copies of what was made once for a key."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._pickles: dict[Any, bytes] = {}

    def get(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        if key not in self._pickles:
            file = self._directory / hashlib.sha256(repr(key).encode()).hexdigest() if self._directory else None
            if file is not None and file.exists():
                self._pickles[key] = file.read_bytes()
            else:
                self._pickles[key] = pickle.dumps(make())
                if file is not None:
                    part = file.with_suffix(f".{os.getpid()}")
                    part.write_bytes(self._pickles[key])
                    part.replace(file)
        return pickle.loads(self._pickles[key])


def _places(repo: Any) -> tuple[str, ...] | None:
    """Where its files are, or None where they may change."""
    places = tuple(f"{source.scheme()}://{source.path}" for source in repo.get_sources())
    return places if _FIXED.issuperset(places) else None
