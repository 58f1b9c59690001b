"""Requests that are read from a file or a stream: text, or one JSON object on a line. No torch import."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from moe_train.inference.text import is_unicode
from parallel.errors import DataError

_WHOLE = ("max_new_tokens", "top_k", "seed", "n", "logprobs")
_NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_FIELDS = ("prompt", "id", "stop", *_WHOLE, *_NUMBERS)


@dataclass(frozen=True)
class Prompt:
    """A request.

    Args:
        changes: sampling parameters that differ from those of the command, by name.
        identifier: the line's own `id`, which its results repeat.
    """

    text: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    identifier: Any = None


def read_lines(text: str, name: str) -> list[Prompt]:
    """The requests in JSON lines. Empty lines are skipped.

    Args:
        name: of the file, for errors.

    Raises:
        DataError: a line is not a request; names file, line and field.
    """
    prompts = list(_lines(text, name))
    if not prompts:
        raise DataError(f"{name} has no prompts", 'give each its own line, such as {"prompt": "text"}')
    return prompts


def _lines(text: str, name: str) -> Iterator[Prompt]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            content = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} is not JSON: {error}", "write one object in each line") from error
        yield _prompt(content, where)


def _prompt(content: Any, where: str) -> Prompt:
    if not isinstance(content, dict) or not isinstance(content.get("prompt"), str):
        raise DataError(f"{where} has no text `prompt`", 'write it as {"prompt": "text"}')
    if not is_unicode(content):
        raise DataError(f"{where} is not valid Unicode text", "write surrogates in pairs, such as \\ud83c\\udf4f")
    for name, value in content.items():
        if name not in _FIELDS:
            raise DataError(f"{where} has {name!r}, which is not a field of a request", f"use {', '.join(_FIELDS)}")
        if why := _problem(name, value):
            raise DataError(f"{where} has {name}={value!r:.100}, which is {why}", f"correct {name}")
    changes = {name: value for name, value in content.items() if name not in ("prompt", "id")}
    if isinstance(changes.get("stop"), str):
        changes["stop"] = [changes["stop"]]
    return Prompt(content["prompt"], changes, content.get("id"))


def _problem(name: str, value: Any) -> str:
    """Why a field cannot have this value; "" where it can. Ranges are checked with the other parameters."""
    if name in _WHOLE and (isinstance(value, bool) or not isinstance(value, int)):
        return "not a whole number"
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf
    if name in _NUMBERS and not is_number:
        return "not a number"
    if name == "stop":
        listed = [value] if isinstance(value, str) else value
        if not isinstance(listed, list) or not all(isinstance(item, str) and item for item in listed):
            return "neither text nor a list of texts"
    return ""
