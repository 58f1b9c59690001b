"""What the words of a command line mean, before Hydra reads them. No torch import.

Hydra's grammar does not know the types of fields: it reads `data.dir=2024_01_02` as an integer and fails on
`run_dir=runs/epoch=9`. The schema has the types, so that values are rewritten here, once for every command:

- The value of a text field is taken literally. Exceptions: a value in quotes is a string of Hydra's grammar, `null`
  means no value, `${...}` is a reference (`\\${` is the text `${`), and with -m commas separate the values of a sweep.
- An integer may be written as 2T, 14.8T, 100B, 8k, 2e12 or 1_000.
- The same holds between braces, in entries of lists: `data.blend=[{path:A/text_document,weight:0.7}]`.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from moe_train.config import former
from moe_train.config.numbers import SEQUENCE_FIELDS, as_integer
from moe_train.config.roots import field_info
from moe_train.config.walk import FieldInfo, all_fields, plain
from parallel.errors import ConfigError
from parallel.suggest import override, override_value

# Hydra's options that take the next word (hydra/_internal/utils.py, get_args_parser).
WITH_VALUE = {"--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd",
              "--experimental-rerun"}  # fmt: skip
PATHS = ("run_dir", "init_from", "resume", "data.path", "data.dir", "data.tokenizer", "checkpoint.dir",
         "checkpoint.local_dir", "launcher.scratch_dir")  # fmt: skip
"""Fields of a run that hold a path; `data.blend` holds several."""
_SWEEP_FUNCTION = re.compile(r"(choice|range|interval|glob|shuffle|sort|tag)\(.*\)", re.DOTALL)
_QUOTED = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", re.DOTALL)
_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")  # what Hydra reads as text, or as null
_CLOSING = {"[": "]", "{": "}", "(": ")"}


def for_hydra(words: Sequence[str]) -> list[str]:
    """The same command line, with every value written so that Hydra reads what the schema's type means.

    Raises:
        ConfigError: a word has bytes that are not UTF-8.
    """
    sweeps = bool({"-m", "--multirun"} & set(words))
    return [_rewritten(word, sweeps) if is_override else word for word, is_override in sorted_words(words)]


def sorted_words(words: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """Each word, and whether it is an override: neither an option nor the value of one."""
    takes_value = False
    for word in words:
        is_option = word.startswith("-") and not takes_value
        yield word, not is_option and not takes_value
        takes_value = is_option and word in WITH_VALUE


def field_of(word: str) -> FieldInfo | None:
    """The field that an override sets; None for a group, a deletion, an unknown name."""
    return field_info(word.partition("=")[0].lstrip("+")) if "=" in word else None


def is_list(kind: Any) -> bool:
    """Whether a field of this type holds a list."""
    return typing.get_origin(plain(kind)) is list


def is_text(info: FieldInfo) -> bool:
    """Whether a field holds free text, such as a path."""
    return plain(info.type) is str and not info.choices


def quoted(text: str) -> str:
    """`text` as a string of Hydra's grammar, where backslashes count only before a quote.

    References stay references.
    """
    return "'" + re.sub(r"(\\*)('|\Z)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), text) + "'"


def literal(text: str) -> str:
    """`text` as a string of Hydra's grammar in which nothing is a reference."""
    return quoted(escaped(text))


def text_override(name: str, value: str | Sequence[Any]) -> str:
    """The override that gives a text field, or a list of texts or entries, this value.

    One text has quotes only where they are needed. Nothing in it is a reference.
    """
    if not isinstance(value, str):
        return f"{name}={_in_grammar(value)}"
    means_itself = value and value[0] not in "'\"" and "${" not in value and value.lower() != "null"
    return f"{name}={value if means_itself else literal(value)}"


def _in_grammar(value: Any) -> str:
    """A value as Hydra's grammar has it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return "{" + ",".join(f"{name}:{_in_grammar(item)}" for name, item in vars(value).items()) + "}"
    if isinstance(value, str):
        return literal(value)
    return f"[{','.join(map(_in_grammar, value))}]" if isinstance(value, (list, tuple)) else override_value(value)


def escaped(text: str) -> str:
    """`text` as OmegaConf has to be given it, so that nothing in it is a reference."""
    return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", text)


def _rewritten(word: str, sweeps: bool) -> str:
    try:
        word.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"the command line has {word!a}, which is not UTF-8", "rename what it names") from None
    info = field_of(word)
    if info is None:
        return word
    key, _, value = word.partition("=")
    one = _reader(info)
    if one is None or not value:
        return word
    if not sweeps:
        return f"{key}={one(value)}"
    if _SWEEP_FUNCTION.fullmatch(value):
        return word
    return f"{key}={','.join(one(part) for part in split(value))}"


def _reader(info: FieldInfo) -> Callable[[str], str] | None:
    """What rewrites one value of a field; None where Hydra reads it right."""
    if is_text(info):
        return _text
    if plain(info.type) is int:
        return lambda value: _integer(value, info.name)
    if is_list(info.type):
        (entry,) = typing.get_args(plain(info.type))
        if info.entry:
            return lambda value: _entries(value, info)
        if entry is str and not info.choices:
            return lambda value: _list(value, _text)
        if entry is int:
            return lambda value: _list(value, lambda text: _integer(text, info.name))
    return None


def _text(value: str) -> str:
    kept = _PLAIN.fullmatch(value) and value.lower() not in ("true", "false", "inf", "nan")
    return value if kept or _QUOTED.fullmatch(value) else quoted(value)


def _integer(value: str, name: str) -> str:
    """Digits, where the value is an integer in our grammar; else the text unchanged, for Hydra to refuse."""
    try:
        return str(as_integer(value, 1024 if name in SEQUENCE_FIELDS else 1000))
    except ValueError:
        return value


def _list(value: str, one: Callable[[str], str]) -> str:
    inner = re.fullmatch(r"\s*\[(.*)\]\s*", value, re.DOTALL)
    if not inner or not inner[1].strip():
        return value
    return f"[{','.join(one(part.strip()) for part in split(inner[1]))}]"


def _entries(value: str, info: FieldInfo) -> str:
    """A list of `{name:value,...}`.

    Raises:
        ConfigError: an entry is written as in earlier versions.
    """
    inner = re.fullmatch(r"\s*\[(.*)\]\s*", value, re.DOTALL)
    if not inner or not inner[1].strip():
        return value
    parts = [part.strip() for part in split(inner[1])]
    texts = [_content(part) for part in parts if not (part.startswith("{") and part.endswith("}"))]
    if texts and len(texts) == len(parts) and "null" not in parts:
        raise old_spelling(info, texts)
    if texts:
        raise _not_an_entry(info, texts[0])
    assert info.entry is not None
    fields = all_fields(info.entry)
    return f"[{','.join(_mapping(part, fields) for part in parts)}]"


def _mapping(value: str, fields: Mapping[str, FieldInfo]) -> str:
    """`{name:value,...}` with each value written so that Hydra reads what its field means."""
    pairs = []
    for pair in split(value[1:-1]):
        name, colon, text = pair.partition(":")
        info = fields.get(name.strip())
        if info is not None and typing.get_origin(info.type) is dict and text.strip().startswith("{"):
            group = f"{info.name}."  # fields of a group of the config
            own = {
                full.removeprefix(group): info_of_field
                for full, info_of_field in all_fields().items()
                if full.startswith(group)
            }
            text = _mapping(text.strip(), own)
        elif info is not None and (one := _reader(info)):
            text = one(text.strip())
        pairs.append(f"{name}{colon}{text}")
    return "{" + ",".join(pairs) + "}"


def old_spelling(info: FieldInfo, texts: Sequence[str]) -> ConfigError:
    """An error for a list of entries that is written as text, with the same list in today's syntax."""
    entries = [former.entry(info.name, text) for text in texts]
    if texts and None not in entries:
        return ConfigError(
            f"{info.name} is a list of entries in braces, not of text such as {texts[0]!r}",
            f"use {override(info.name, entries)}",
        )
    return _not_an_entry(info, texts[entries.index(None)] if texts else "")


def _not_an_entry(info: FieldInfo, text: str) -> ConfigError:
    return ConfigError(
        f"{info.name} has {text!r}, which is not an entry in braces", f"use '{info.name}={info.example}'"
    )


def _content(part: str) -> str:
    """The text that a string of Hydra's grammar has."""
    if not _QUOTED.fullmatch(part):
        return part
    quote = part[0]
    return re.sub(rf"(\\*)\\{quote}", lambda match: match[1][: len(match[1]) // 2] + quote, part[1:-1])


def split(value: str) -> list[str]:
    """The parts between commas that are outside of quotes and brackets."""
    parts, start, position, open_brackets = [], 0, 0, []
    while position < len(value):
        char = value[position]
        if match := _QUOTED.match(value, position):
            position = match.end()
            continue
        if char in _CLOSING:
            open_brackets.append(_CLOSING[char])
        elif open_brackets and char == open_brackets[-1]:
            open_brackets.pop()
        elif char == "," and not open_brackets:
            parts.append(value[start:position])
            start = position + 1
        position += 1
    return [*parts, value[start:]]
