"""Command lines that mix words (a command, paths) with Hydra's options and overrides. No torch import."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from moe_train.config.composition.command_line import WITH_VALUE, literal
from moe_train.config.roots import all_groups, field_info


@dataclass
class CommandLine:
    """What the words of a command line are."""

    command: str | None = None
    """The first word, where it is one of the commands."""
    flags: set[str] = field(default_factory=set)
    """Options of the tool itself."""
    paths: list[str] = field(default_factory=list)
    options: list[str] = field(default_factory=list)
    """Options of Hydra, with their values."""
    overrides: list[str] = field(default_factory=list)

    def argv(self, *fields: str) -> list[str]:
        """What Hydra gets: each path as the override of a field. Paths without a field stay, and Hydra refuses them.

        Options come first, since argparse takes no more positional words after an option that follows some.
        """
        given = [f"{name}={literal(path)}" for name, path in zip(fields, self.paths, strict=False)]
        options, last = self.options, []
        if options and options[-1] in WITH_VALUE:  # without it: argparse must not take the next word
            options, last = options[:-1], options[-1:]
        return [*options, *given, *self.overrides, *self.paths[len(fields) :], *last]


def parse(words: Sequence[str], commands: Collection[str] = (), flags: Collection[str] = ()) -> CommandLine:
    """Sort the words into options, overrides and paths; `_is_override` tells the last two apart."""
    line = CommandLine()
    takes_value = False
    for word in words:
        if takes_value:
            line.options.append(word)
            takes_value = False
        elif word in flags:
            line.flags.add(word)
        elif word.startswith("-"):
            line.options.append(word)
            takes_value = word in WITH_VALUE
        elif _is_override(word):
            line.overrides.append(word)
        elif word in commands and line.command is None and not line.paths:
            line.command = word
        else:
            line.paths.append(word)
    return line


def _is_override(word: str) -> bool:
    """Whether a word is an override. One with `=`, or that begins with ~ or +, is a path where it has a slash before
    the `=`, or where a file of that name exists and no field does."""
    key = word.partition("=")[0].lstrip("+~")
    if "=" not in word and not word.startswith(("+", "~")):
        return False
    if field_info(key) or key in all_groups() or key.split("/")[0].split(".")[0] in ("hydra", "experiment"):
        return True
    return "/" not in key and not os.path.lexists(word)
