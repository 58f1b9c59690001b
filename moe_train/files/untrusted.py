"""Reads files that anyone may have written or damaged: bounds come before work. No torch import.

Checkpoints, datasets and run directories are downloaded, copied and mounted. Their files are opened only where they are
regular files (a named pipe would block forever, a device never ends); symbolic links are followed, because the
snapshots of the Hugging Face cache consist of them. Text has a largest size, numbers a largest value and structures a
largest depth, so that no file costs more time or memory than its size justifies.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, get_type_hints

T = TypeVar("T")

LARGEST_JSON_BYTES = 100_000_000
"""As the safetensors library bounds a header. The largest released index has some 10 MB."""

_LARGEST_LINE_BYTES, _MORE_BYTES = 1 << 26, 1 << 16
_LARGEST_YAML_BYTES = 1 << 18
_LARGEST_YAML_NODES = 20_000
_YAML_TEXT = "tag:yaml.org,2002:str"
_YAML_PLAIN = {_YAML_TEXT, *(f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float"))}
_DEEPEST = 64
_LARGEST_NUMBER = 1 << 64
_LARGEST_PARSED_BYTES = 512 << 20
# About what Python needs for one container, one entry of an object and one item of a list.
_CONTAINER_BYTES, _ENTRY_BYTES, _ITEM_BYTES = 64, 100, 16
_KINDS = {
    stat.S_IFDIR: "a directory", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
}  # fmt: skip


def open_regular(path: Path) -> int:
    """Descriptor for reading a regular file, or what a symbolic link leads to.

    Raises:
        OSError: it cannot be opened, or is a pipe, a device, a socket or a directory.
    """
    _check_regular(path, os.stat(path).st_mode)  # before it is opened, which can have an effect on a device
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _check_regular(path, os.fstat(descriptor).st_mode)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _check_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise OSError(errno.EINVAL, f"it is {kind} and not a file", str(path))


def open_binary(path: Path) -> BinaryIO:
    """A regular file, for reading. Raises as `open_regular`."""
    return os.fdopen(open_regular(path), "rb")


def read_bytes(path: Path, largest: int) -> bytes:
    """The content of a small regular file.

    Raises:
        OSError: as `open_regular`.
        ValueError: it has more than `largest` bytes.
    """
    with open_binary(path) as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(min(size, largest) + 1)  # which takes memory for all that is asked for
        while len(data) <= largest and (more := file.read(min(_MORE_BYTES, largest + 1 - len(data)))):
            data += more  # another process has written it since
    if len(data) > largest:
        raise ValueError(f"it has more than {largest:,} bytes")
    return data


def last_lines(path: Path, count: int, largest: int = 1 << 16) -> list[str]:
    """The last `count` lines of a text file of any size, of which at most `largest` bytes are read.

    Bytes that are not UTF-8 are replaced. A line that does not fit is cut off at its beginning.

    Raises:
        OSError: as `open_regular`.
    """
    with open_binary(path) as file:
        start = max(0, file.seek(0, os.SEEK_END) - largest)
        file.seek(start)
        lines = file.read(largest).decode(errors="replace").removesuffix("\n").split("\n")
    is_cut = start > 0 and len(lines) > 1  # the first line may begin before `start`
    return lines[1:][-count:] if is_cut else lines[-count:]


def read_json(path: Path, largest: int = LARGEST_JSON_BYTES) -> Any:
    """The value in a JSON file. Raises as `read_bytes` and `parse_json`."""
    return parse_json(read_bytes(path, largest))


def read_object(path: Path, largest: int = LARGEST_JSON_BYTES) -> dict[str, Any]:
    """The object in a JSON file. Raises as `read_json`, and ValueError where it holds another value."""
    value = read_json(path, largest)
    if not isinstance(value, dict):
        raise ValueError("it holds no JSON object")
    return value


def read_record(path: Path, kind: type[T], largest: int = LARGEST_JSON_BYTES) -> T:
    """The dataclass `kind` whose fields (numbers, text, None) are in a JSON file.

    Raises:
        OSError, ValueError: as `read_json`; or a field is unknown, missing or of another type.
    """
    values = read_object(path, largest)
    for name, type_ in get_type_hints(kind).items():
        value = values.get(name)
        is_typed = isinstance(value, type_) and (type_ is bool or not isinstance(value, bool))
        if name in values and not is_typed:
            raise ValueError(f"it has {name}={value!r:.200}")
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(str(error)) from None


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects in a file of JSON lines, without lines that a crash cut short. One at a time: such files grow large.

    Raises:
        OSError: as `open_regular`.
    """
    with open_binary(path) as file:
        is_whole = True
        while piece := file.readline(_LARGEST_LINE_BYTES):
            starts, is_whole = is_whole, piece.endswith(b"\n") or len(piece) < _LARGEST_LINE_BYTES
            if not (starts and is_whole):
                continue
            try:
                value = json.loads(piece.decode(errors="replace"))  # `parse_json` takes several times as long
            except (ValueError, RecursionError):
                continue
            if isinstance(value, dict):
                yield value


def parse_json(data: bytes) -> Any:
    """The value of a JSON text in the strict form of the standard (RFC 8259).

    Raises:
        ValueError: it is not a JSON text in UTF-8, or has NaN, an infinite number, a whole number of more than 64 bits,
            the same name twice in an object, too many levels, or more items than fit into memory.
    """
    containers = data.count(b"{") + data.count(b"[")
    size = containers * _CONTAINER_BYTES + data.count(b":") * _ENTRY_BYTES + data.count(b",") * _ITEM_BYTES
    if size > _LARGEST_PARSED_BYTES:
        raise ValueError(f"it would take some {size / 1e9:.1f} GB of memory")
    try:
        value = json.loads(
            data.decode(), parse_constant=_no_number, parse_float=_finite, parse_int=_bounded, object_pairs_hook=_object
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _check_depth(value)
    return value


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is not a number in JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large a number")
    return value


def _bounded(text: str) -> int:
    value = int(text) if len(text) <= 20 else _LARGEST_NUMBER  # a long one takes quadratic time
    if abs(value) >= _LARGEST_NUMBER:
        raise ValueError(f"{text[:40]} is too large a number")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"it has {twice[:200]!r} twice")
    return result


def _check_depth(value: Any) -> None:
    """Raise ValueError for more than `_DEEPEST` levels: other functions walk the value recursively."""
    level: list[Any] = [value]
    for _ in range(_DEEPEST):
        level = list(_inside(level))
        if not level:
            return
    raise ValueError("it is nested too deeply")


def _inside(values: list[Any]) -> Iterator[Any]:
    """Containers one level further in."""
    for value in values:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        for item in inner:
            if isinstance(item, dict | list):
                yield item


@cache
def _loader() -> Any:
    """PyYAML's loader, for null, booleans, numbers, text, lists and mappings only, with a bound on what it builds.

    The import is here because the launcher reads no YAML before it can say that a package is missing.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def __init__(self, stream: Any) -> None:
            super().__init__(stream)
            self._nodes = self._depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):  # a few lines of them can expand to any amount of memory
                raise yaml.YAMLError("it has references (*name)")
            if getattr(self.peek_event(), "tag", None) is not None:
                raise yaml.YAMLError("it has a tag (!name)")
            self._nodes, self._depth = self._nodes + 1, self._depth + 1
            if self._nodes > _LARGEST_YAML_NODES:
                raise yaml.YAMLError(f"it has more than {_LARGEST_YAML_NODES:,} values")
            if self._depth > _DEEPEST:
                raise yaml.YAMLError("it is nested too deeply")
            try:
                return super().compose_node(parent, index)
            finally:
                self._depth -= 1

        def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
            """YAML 1.1 takes 1:30:00 for 5400, in quadratic time, and has dates and merge keys (<<): here text."""
            if kind is not yaml.ScalarNode:
                return super().resolve(kind, value, implicit)
            tag = _YAML_TEXT if ":" in value else super().resolve(kind, value, implicit)
            return tag if tag in _YAML_PLAIN else _YAML_TEXT

        def construct_yaml_int(self, node: Any) -> int:
            value = int(super().construct_yaml_int(node))
            if abs(value) >= _LARGEST_NUMBER:
                raise yaml.YAMLError(f"{node.value[:40]} is too large a number")
            return value

    Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)
    return Loader


def read_yaml(path: Path) -> Any:
    """The value in a YAML file. Raises as `read_bytes` and `parse_yaml`."""
    return parse_yaml(read_bytes(path, _LARGEST_YAML_BYTES).decode())


def parse_yaml(text: str) -> Any:
    """The value of a YAML text of null, booleans, numbers, text, lists and mappings.

    Base-60 numbers, dates and merge keys of YAML 1.1 are text.

    Raises:
        ValueError: it is not YAML, or has references, tags, too many values or levels, or whole numbers of more than
            64 bits.
    """
    import yaml

    try:
        return yaml.load(text, Loader=_loader())  # derived from SafeLoader
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())) from None
