"""Command lines that mix words (a command, paths) with Hydra's options and overrides. No torch import."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

# Hydra's options that take the next word (hydra/_internal/utils.py, get_args_parser).
_WITH_VALUE = {"--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd",
               "--experimental-rerun"}  # fmt: skip


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

        Options come first, since argparse takes no more positional words after an option that stands behind some.
        """
        given = [f"{name}={_quoted(path)}" for name, path in zip(fields, self.paths, strict=False)]
        options, last = self.options, []
        if options and options[-1] in _WITH_VALUE:  # without it: argparse must not take the next word
            options, last = options[:-1], options[-1:]
        return [*options, *given, *self.overrides, *self.paths[len(fields) :], *last]


def parse(words: Sequence[str], commands: Collection[str] = (), flags: Collection[str] = ()) -> CommandLine:
    """Sort the words. One with `=` is an override: a path that has it is given as its field, quoted."""
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
            takes_value = word in _WITH_VALUE
        elif word.startswith(("~", "+")) or "=" in word:
            line.overrides.append(word)
        elif word in commands and line.command is None and not line.paths:
            line.command = word
        else:
            line.paths.append(word)
    return line


def _quoted(path: str) -> str:
    """The path as a string of Hydra's grammar, where backslashes count only before a quote and ${} is a reference."""
    text = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), path)
    return "'" + text.replace("${", r"\${") + "'"
