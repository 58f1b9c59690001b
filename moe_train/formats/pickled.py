"""Reads pickles of plain data without Python's unpickler. No torch import.

`pickle.Unpickler` with a restricted `find_class` runs no foreign code, but a few bytes still make it allocate any
amount of memory (an index into the memo) or compute forever (the hash of nested tuples), and `BUILD` changes
objects that the program shares. This machine knows the opcodes that torch.save and torch.distributed.checkpoint write,
and only the classes that the caller names. Its time and memory are proportional to the size of the pickle.

Opcodes: CPython's Lib/pickletools.py.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Mapping
from typing import Any

Names = Mapping[tuple[str, str], Any]
"""(module, name) -> its replacement: a class or function of the caller, or any other value."""

_BYTES_PER_OBJECT = 3
"""A table of contents has at least as many bytes for each object in it; an empty list takes one."""
_MOST_ARGUMENTS = 1024


class _Global:
    """A class or function that a pickle names."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Plain:
    """Base of the classes that a pickle may make. `__setstate__` gets the state that it gives an instance."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError(f"{type(self).__name__} has no state")


def load(data: bytes, names: Names, persistent: Callable[[Any], Any] | None = None) -> Any:
    """The value of a pickle of protocol 2 to 5.

    Args:
        names: what may be named. Callables among them are called with what the pickle gives; they must bound what they
            make of it.
        persistent: what an object is that the pickle only refers to.

    Raises:
        ValueError, TypeError, pickle.UnpicklingError, ...: it is damaged, or has anything else in it.
    """
    return _Machine(data, names, persistent).run()


class _Machine:
    def __init__(self, data: bytes, names: Names, persistent: Callable[[Any], Any] | None) -> None:
        self.data, self.at, self.names, self.persistent = data, 0, names, persistent
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.objects = 0

    def run(self) -> Any:
        data, steps, end, at = self.data, _STEPS, len(self.data), 0
        stack, memo = self.stack, self.memo
        while at < end:
            opcode = data[at]
            at += 1
            if opcode == _MEMOIZE:  # these two are half of all
                memo[len(memo)] = stack[-1]
            elif opcode == _LONG_BINGET:
                stack.append(memo[int.from_bytes(data[at : at + 4], "little")])
                at += 4
            elif opcode == _STOP:
                return self._result()
            else:
                step = steps[opcode]
                if step is None:
                    raise pickle.UnpicklingError(f"it has the operation {bytes((opcode,))!r}, which plain data has not")
                self.at = at
                step(self)
                at = self.at
        raise EOFError("it is cut off")

    def _result(self) -> Any:
        if len(self.stack) != 1 or isinstance(self.stack[0], _Global):
            raise pickle.UnpicklingError("it does not end with one value")
        return self.stack[0]

    def take(self, count: int) -> bytes:
        """The next bytes."""
        start, self.at = self.at, self.at + count
        if self.at > len(self.data):
            raise EOFError("it is cut off")
        return self.data[start : self.at]

    def number(self, size: int) -> int:
        """The next bytes as a whole number."""
        return int.from_bytes(self.take(size), "little")

    def line(self) -> str:
        """The rest of the line."""
        end = self.data.find(b"\n", self.at, self.at + 1000)
        if end < 0:
            raise EOFError("it is cut off")
        return self.take(end + 1 - self.at)[:-1].decode()

    def push(self, value: Any) -> None:
        self.objects += 1
        if self.objects * _BYTES_PER_OBJECT > len(self.data) + 3000:
            raise pickle.UnpicklingError("it makes more objects than such a file has")
        self.stack.append(value)

    def pop(self) -> Any:
        """The last value."""
        if self.marks and len(self.stack) <= self.marks[-1]:
            raise pickle.UnpicklingError("it takes values that are not there")
        return self.stack.pop()

    def pop_all(self) -> list[Any]:
        """The values since the last mark."""
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def top(self, kind: type) -> Any:
        """The last value, a container that is to be filled."""
        value = self.stack[-1]
        if not isinstance(value, kind):
            raise pickle.UnpicklingError("it fills a value that is not a container")
        return value

    def fill(self, items: list[Any]) -> None:
        """Put keys and values into the last dictionary."""
        target = self.top(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            # The hash of other values may never end: that of nested tuples that share their parts.
            hashes_itself = isinstance(key, Plain) and type(key).__hash__ is not object.__hash__
            if type(key) not in (str, int) and not hashes_itself:
                raise pickle.UnpicklingError("it has a key that is not a name")
            target[key] = value

    def remember(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def find(self, module: str, name: str) -> None:
        try:
            value = self.names[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not part of a checkpoint") from None
        self.push(_Global(value) if callable(value) else value)

    def find_on_stack(self) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise pickle.UnpicklingError("it uses a value as a name that is not one")
        self.find(module, name)

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, _Global) or not isinstance(arguments, tuple) or len(arguments) > _MOST_ARGUMENTS:
            raise pickle.UnpicklingError("it calls a value that is not a class or function")
        self.push(function.value(*arguments))

    def new(self) -> None:
        """An instance whose fields follow."""
        arguments, function = self.pop(), self.pop()
        cls = function.value if isinstance(function, _Global) else None
        if not isinstance(cls, type) or not issubclass(cls, Plain) or arguments != ():
            raise pickle.UnpicklingError("it makes an instance of a value that is not a class")
        self.push(cls.__new__(cls))

    def build(self) -> None:
        state, target = self.pop(), self.stack[-1]
        if not isinstance(target, Plain):
            raise pickle.UnpicklingError("it sets the state of a value that has none")
        target.__setstate__(state)

    def long(self) -> None:
        size = self.number(1)
        if size > 9:
            raise pickle.UnpicklingError("it has a number of more than 64 bits")
        self.push(int.from_bytes(self.take(size), "little", signed=True))

    def tuple_of(self, count: int) -> None:
        start = len(self.stack) - count
        if start < (self.marks[-1] if self.marks else 0):
            raise pickle.UnpicklingError("it takes values that are not there")
        values = tuple(self.stack[start:])
        del self.stack[start:]
        self.push(values)

    def refer(self) -> None:
        if self.persistent is None:
            raise pickle.UnpicklingError("it refers to something outside")
        self.push(self.persistent(self.pop()))


def _signed(size: int) -> Callable[[_Machine], None]:
    return lambda m: m.push(int.from_bytes(m.take(size), "little", signed=True))


def _text(length_bytes: int) -> Callable[[_Machine], None]:
    return lambda m: m.push(m.take(m.number(length_bytes)).decode("utf-8", "surrogatepass"))


def _constant(make: Callable[[], Any]) -> Callable[[_Machine], None]:
    return lambda m: m.push(make())


def _table() -> list[Callable[[_Machine], Any] | None]:
    steps: dict[bytes, Callable[[_Machine], Any]] = {
        pickle.PROTO: lambda m: m.take(1),
        pickle.FRAME: lambda m: m.take(8),
        pickle.MARK: lambda m: m.marks.append(len(m.stack)),
        pickle.POP: lambda m: m.pop(),
        pickle.POP_MARK: lambda m: m.pop_all(),
        pickle.NONE: lambda m: m.stack.append(None),
        pickle.NEWTRUE: lambda m: m.stack.append(True),
        pickle.NEWFALSE: lambda m: m.stack.append(False),
        pickle.BININT: _signed(4),
        pickle.BININT1: lambda m: m.stack.append(m.take(1)[0]),
        pickle.BININT2: lambda m: m.push(m.number(2)),
        pickle.LONG1: _Machine.long,
        pickle.BINFLOAT: lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
        pickle.BINUNICODE: _text(4),
        pickle.SHORT_BINUNICODE: _text(1),
        pickle.BINBYTES: lambda m: m.push(m.take(m.number(4))),
        pickle.SHORT_BINBYTES: lambda m: m.push(m.take(m.number(1))),
        pickle.EMPTY_LIST: _constant(list),
        pickle.EMPTY_DICT: _constant(dict),
        pickle.EMPTY_SET: _constant(list),  # nothing here depends on what is in a set
        pickle.EMPTY_TUPLE: lambda m: m.stack.append(()),
        pickle.TUPLE: lambda m: m.push(tuple(m.pop_all())),
        pickle.TUPLE1: lambda m: m.tuple_of(1),
        pickle.TUPLE2: lambda m: m.tuple_of(2),
        pickle.TUPLE3: lambda m: m.tuple_of(3),
        pickle.APPEND: lambda m: _append(m, [m.pop()]),
        pickle.APPENDS: lambda m: _append(m, m.pop_all()),
        pickle.ADDITEMS: lambda m: _append(m, m.pop_all()),
        pickle.SETITEM: lambda m: m.fill([m.pop(), m.pop()][::-1]),
        pickle.SETITEMS: lambda m: m.fill(m.pop_all()),
        pickle.GLOBAL: lambda m: m.find(m.line(), m.line()),
        pickle.STACK_GLOBAL: _Machine.find_on_stack,
        pickle.REDUCE: _Machine.reduce,
        pickle.NEWOBJ: _Machine.new,
        pickle.BUILD: _Machine.build,
        pickle.BINPERSID: _Machine.refer,
        pickle.BINPUT: lambda m: m.remember(m.number(1)),
        pickle.LONG_BINPUT: lambda m: m.remember(m.number(4)),
        pickle.BINGET: lambda m: m.stack.append(m.memo[m.number(1)]),
    }
    return [steps.get(bytes((code,))) for code in range(256)]


def _append(machine: _Machine, values: list[Any]) -> None:
    machine.top(list).extend(values)


_STEPS = _table()
_STOP, _MEMOIZE, _LONG_BINGET = pickle.STOP[0], pickle.MEMOIZE[0], pickle.LONG_BINGET[0]
