"""Messages of a conversation to the tokens of a prompt. No torch import.

A tokenizer's chat template is a program from the author of the checkpoint. It runs in Jinja's sandbox, set up as
transformers does (utils/chat_template_utils.py): what it can reach are strings, numbers, lists and dictionaries.
Special tokens that a message spells stay plain text, so that a message cannot end itself and begin another role.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser

from moe_train.data.tokenizer import CONFIG, Tokenizer
from moe_train.files import untrusted
from parallel.errors import ConfigError, DataError

_FILE = "chat_template.jinja"
_LARGEST_BYTES = 1 << 20
# Private-use characters around what a message has of special tokens.
_BEGIN, _END = "\U000f0000", "\U000f0001"
_MARKED = re.compile(f"{_BEGIN}(.*?){_END}|[{_BEGIN}{_END}]", re.DOTALL)

Message = Mapping[str, str]
"""`role` (system, user, assistant) and `content`, and optionally the `name` of the participant."""


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}`, with which templates mark what the model wrote. Its content is kept."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Any) -> Any:
        return caller()


class _Dictionary:
    """`dict` without its other attributes, by which a template could leave the sandbox."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)


class _Namespace(jinja2.utils.Namespace):
    """`namespace` without names that begin with an underscore."""

    def __init__(*args: Any, **values: Any) -> None:  # as in Jinja, `namespace(self=...)` is possible
        self, rest = args[0], args[1:]
        names = dict(*rest, **values)
        for name in names:
            _refuse_hidden(name)
        jinja2.utils.Namespace.__init__(self, names)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_hidden(name)
        super().__setitem__(name, value)


def _refuse_hidden(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot have the name {name!r}")


class ChatTemplate:
    """A chat template with its tokenizer.

    Args:
        text: of the template; None continues the text of the messages.
        where: file of the template, for errors.

    Raises:
        DataError: the template is not valid.
    """

    def __init__(self, text: str | None, tokenizer: Tokenizer, where: Path | str) -> None:
        self._where, self._tokenizer = where, tokenizer
        self._parsing = Tokenizer(tokenizer.path, tokenizer.eod_token, tokenizer.bos_token, parse_special_tokens=True)
        self._special = _any_of(self._parsing.special_texts)
        self._template: jinja2.Template | None = None
        if text is not None:
            try:
                self._template = _environment().from_string(text)
            except jinja2.TemplateError as error:
                raise DataError(
                    f"{where} is not a chat template: {error}", "correct it, or set chat.template=FILE"
                ) from error

    @property
    def exists(self) -> bool:
        """Whether the tokenizer has a template. Without one the text of the messages is continued."""
        return self._template is not None

    def encode(self, messages: Sequence[Message], encode_text: Callable[[str], list[int]]) -> list[int]:
        """Tokens of the conversation, up to where the next answer begins.

        Args:
            encode_text: tokens of a text that begins as those of training do. It is used without a template.

        Raises:
            ConfigError: the template refuses these messages.
        """
        if self._template is None:
            return encode_text("".join(message["content"] for message in messages))
        marked = [
            {key: value if key == "role" else self._mark(value) for key, value in message.items()}
            for message in messages
        ]
        special = self._tokenizer.special
        named = {"bos_token": self._tokenizer.bos_token, "eos_token": special.eos or self._tokenizer.eod_token}
        named |= {"pad_token": special.pad, "unk_token": special.unk}
        texts = {name: text for name, text in named.items() if text is not None}
        try:
            rendered = self._template.render(messages=marked, add_generation_prompt=True, tools=None, **texts)
            return self._encode(rendered)
        except Exception as error:  # of any kind, since it is a program
            raise ConfigError(
                f"the chat template of {self._where} refuses these messages: {error}", "change their roles or order"
            ) from error

    def _mark(self, text: str) -> str:
        """Marks around special tokens that a message spells."""
        text = text.replace(_BEGIN, "").replace(_END, "")
        return text if self._special is None else self._special.sub(lambda m: f"{_BEGIN}{m[0]}{_END}", text)

    def _encode(self, rendered: str) -> list[int]:
        ids: list[int] = []
        # [text, marked, text, marked, ..., text]; None for a mark that the template has separated from its other end.
        for index, piece in enumerate(_MARKED.split(rendered)):
            if piece:
                ids += (self._tokenizer if index % 2 else self._parsing).encode(piece)
        return ids


def load(tokenizer: Tokenizer, file: str | None = None) -> ChatTemplate:
    """The chat template in `file`, else that of the tokenizer: chat_template.jinja, or in tokenizer_config.json.

    Args:
        tokenizer: one that keeps special tokens in texts as text.

    Raises:
        DataError: it cannot be read.
    """
    if file is not None:
        return ChatTemplate(_read(Path(file), f"chat.template={file}"), tokenizer, file)
    path = tokenizer.path.with_name(_FILE)
    if path.is_file():
        return ChatTemplate(_read(path, str(path)), tokenizer, path)
    path = tokenizer.path.with_name(CONFIG)
    try:
        named = untrusted.read_object(path).get("chat_template") if path.is_file() else None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not a tokenizer's configuration: {error}", "replace or remove it") from error
    if isinstance(named, list):
        by_name = {entry.get("name"): entry.get("template") for entry in named if isinstance(entry, dict)}
        named = by_name.get("default")
    return ChatTemplate(named if isinstance(named, str) else None, tokenizer, path)


def _read(path: Path, name: str) -> str:
    try:
        return untrusted.read_bytes(path, _LARGEST_BYTES).decode()
    except (OSError, ValueError) as error:
        raise DataError(f"{name} cannot be read: {error}", "name a file with a Jinja template") from error


def _any_of(texts: Sequence[str]) -> re.Pattern[str] | None:
    """Finds any of the texts, the longest first."""
    longest_first = sorted(filter(None, texts), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise, "strftime_now": _now, "dict": _Dictionary(), "namespace": _Namespace,
    }  # fmt: skip
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Unlike Jinja's own filter, without escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
