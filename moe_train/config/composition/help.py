"""What --help prints: what a command is for, its common overrides with their meaning, how values are written."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence

from moe_train.config.composition.explain import group_options
from moe_train.config.roots import all_groups
from moe_train.config.schema import Config
from moe_train.config.walk import all_fields
from parallel.suggest import override_value

GROUPS = {
    "experiment": "a whole run, which other overrides change",
    "model": "the architecture",
    "parallel": "the layout of ranks",
    "precision": "number formats",
    "recompute": "activations that are computed again",
    "optimizer": "AdamW",
    "schedule": "the learning rate over the steps",
    "batch": "sequences of a step",
    "data": "the corpus: text for your own files, indexed for .bin/.idx files",
    "cluster": "the GPUs and network that are planned for",
}
"""What an option of a group sets."""

_VALUES = """\
Values: 2T, 14.8T, 100B, 2e12 and 1_000 are integers; 8k is 8,192 for a sequence length and 8,000 elsewhere. \
A path is taken as the shell passes it; ${...} in it refers to another field or to the environment (${oc.env:NAME}), \
\\${ is the text ${. With -m commas separate the values of a sweep."""
_OPTIONS = """\
Options: -m runs each value of a sweep; --cfg job prints the resulting configuration; --config-dir DIR adds your own \
groups; -v shows tracebacks; --hydra-help lists the options of Hydra. docs/configuration.md describes every field."""


def page(about: str, common: Sequence[str] = (), root: type = Config) -> str:
    """The page of a command: `about`, and a line for each of its `common` groups and fields."""
    width = max(60, min(shutil.get_terminal_size((80, 24)).columns, 100))
    blocks = [
        block if block.startswith(" ") else textwrap.fill(" ".join(block.split()), width)
        for block in about.strip().split("\n\n")
    ]
    if groups := [name for name in common if name in GROUPS]:
        shown = [(f"{name}=NAME", f"{GROUPS[name]}: {_options(name)}") for name in groups]
        blocks.append("Groups:\n" + "\n".join(_row(*row, width) for row in shown))
    if fields := [name for name in common if name not in GROUPS]:
        blocks.append("Fields, with their defaults:\n" + "\n".join(_row(*_field(name, root), width) for name in fields))
    blocks += [textwrap.fill(text, width) for text in (_VALUES, _OPTIONS)]
    return "\n\n".join(blocks)


def _field(name: str, root: type) -> tuple[str, str]:
    info = all_fields(root)[name]
    choices = f" One of {', '.join(info.choices)}." if info.choices else ""
    return f"{name}={override_value(info.default)}", info.doc + choices


def _options(group: str) -> str:
    assert group == "experiment" or group in all_groups()
    names = group_options(group)
    shown = ", ".join(names[:8])
    return f"{shown}, ... ({len(names)} in conf/{group})" if len(names) > 8 else shown


def _row(name: str, meaning: str, width: int) -> str:
    indent = 30
    lines = textwrap.wrap(meaning, width - indent)
    head = f"  {name}"
    if len(head) + 2 > indent:
        return "\n".join([head, *(" " * indent + line for line in lines)])
    return "\n".join([head.ljust(indent) + lines[0], *(" " * indent + line for line in lines[1:])])
