"""Writes docs/configuration.md's tables from the typed schema: `python -m tools.config_reference`."""

from __future__ import annotations

from dataclasses import MISSING
from pathlib import Path
from typing import Any

from moe_train.config.roots import ROOTS, commands_with
from moe_train.config.walk import FieldInfo, all_fields

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
# Fields whose choices another page lists, so that a further one changes only that page.
CHOICES_ELSEWHERE = {"model.family": "[models.md](models.md)"}
MARK = "<!-- fields, written by python -m tools.config_reference -->\n"


def tables() -> str:
    """A Markdown table for each group of every command: field, default, meaning."""
    groups: dict[str, list[str]] = {}
    described: dict[type, str] = {}  # the first field with entries of a class, where their fields are described
    fields = {name: info for root in ROOTS for name, info in all_fields(root).items()}
    for name, info in fields.items():
        group = name.rpartition(".")[0]
        choices = _choices(info)
        default = _text(info.default)
        example = f" Example: `{info.example}`." if info.example else ""
        as_before = ""
        if info.entry and (first := described.setdefault(info.entry, name)) != name:
            as_before = f" Entries as in `{first}`."
        groups.setdefault(group, []).append(f"| `{name}` | `{default}` | {info.doc}{choices}{example}{as_before} |")
        if info.entry and not as_before:
            groups[group] += [_row_of_entry(name, part) for part in all_fields(info.entry).values()]
    header = "| field | default | meaning |\n|---|---|---|\n"
    return "\n".join(
        f"### {group or 'top level'}{_owners(group)}\n\n{header}" + "\n".join(rows) + "\n"
        for group, rows in groups.items()
    )


def _row_of_entry(name: str, info: FieldInfo) -> str:
    """The row of a field of the entries of a list."""
    default = "required" if info.default is MISSING else f"`{_text(info.default)}`"
    return f"| `{name}[].{info.name}` | {default} | {info.doc}{_choices(info)} |"


def _choices(info: FieldInfo) -> str:
    if not info.choices:
        return ""
    elsewhere = CHOICES_ELSEWHERE.get(info.name)
    listed = f"those in {elsewhere}" if elsewhere else ", ".join(f"`{choice}`" for choice in info.choices)
    return f" One of {listed}."


def _text(value: Any) -> Any:
    """A default as YAML has it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else value


def _owners(group: str) -> str:
    """The commands that have a group which is not part of a run."""
    known = {name.rpartition(".")[0] for name in all_fields()}
    return "" if group in known else f" ({', '.join(commands_with(group))})"


def page() -> str:
    """The whole page, with its tables generated again."""
    return PAGE.read_text(encoding="utf-8").split(MARK)[0] + MARK + "\n" + tables()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
