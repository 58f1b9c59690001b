"""Which documents are kept: by length, language, and a function of the user."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path

from moe_train.config.schema import DataConfig
from moe_train.data.report import Reason, TextPlace
from parallel.errors import DataError

_MODEL_CHARACTERS = 4096
"""Start of a document whose language is identified: py3langid reads it byte by byte in Python."""


class DocumentFilter:
    """The filters of a configuration, in the order of what they cost.

    Raises:
        DataError: a library is missing, a language is unknown, or `data.filter` is not a function.
    """

    def __init__(self, data: DataConfig) -> None:
        self._min, self._max = data.min_characters, data.max_characters
        self._languages = frozenset(data.languages)
        self._classify = _language_model(data.languages) if data.languages else None
        self._name = data.filter
        self._function = load_function(data.filter) if data.filter is not None else None

    def reason(self, text: str, where: TextPlace) -> Reason | None:
        """Why the document is left out; None where it is kept.

        Raises:
            DataError: `data.filter` raises an exception.
        """
        length = len(text.strip())
        if length < self._min:
            return Reason.SHORT
        if self._max is not None and length > self._max:
            return Reason.LONG
        if self._classify is not None and self._classify(text[:_MODEL_CHARACTERS]) not in self._languages:
            return Reason.LANGUAGE
        if self._function is not None and not self._call(text, where):
            return Reason.FILTERED
        return None

    def _call(self, text: str, where: TextPlace) -> bool:
        assert self._function is not None
        try:
            return bool(self._function(text))
        except Exception as error:
            raise DataError(
                f"data.filter={self._name} raised {type(error).__name__} for {where}: {error}", "correct the function"
            ) from error


def _language_model(languages: list[str]) -> Callable[[str], str]:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise DataError(
            f"data.languages=[{','.join(languages)}] needs py3langid, which is not installed",
            "pip install 'moe-train[data]', or set data.languages=[]",
        ) from error
    model = LanguageIdentifier.from_model_file(MODEL_FILE)
    unknown = sorted(set(languages) - set(model.labels))
    if unknown:
        raise DataError(
            f"data.languages has {', '.join(unknown)}, which py3langid does not know",
            f"use codes of ISO 639-1 such as en; it knows {', '.join(sorted(model.labels))}",
        )
    return partial(_language, model.classify)


def _language(classify: Callable[[str], tuple[str, float]], text: str) -> str:
    return classify(text)[0]


def load_function(name: str) -> Callable[[str], bool]:
    """The function that `name`, module:function, refers to.

    Raises:
        DataError: there is none.
    """
    module_name, _, function_name = name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:  # the module may raise any
        raise DataError(
            f"data.filter={name} cannot be imported: {type(error).__name__} {error}",
            "name it as module:function, with the directory of the module in PYTHONPATH",
        ) from error
    if not callable(function):
        raise DataError(f"data.filter={name} is not a function", "name a function of a document's text")
    return function


def source_of(name: str) -> Path | None:
    """The file that defines the function `name`; None where it is not Python's."""
    try:
        found = inspect.getsourcefile(load_function(name))
    except TypeError:
        return None
    return Path(found) if found else None
