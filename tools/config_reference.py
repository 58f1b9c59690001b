"""Writes docs/configuration.md's tables from the typed schema: `python -m tools.config_reference`."""

from __future__ import annotations

from pathlib import Path

from moe_train.config.roots import ROOTS, commands_with
from moe_train.config.walk import all_fields

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
# Fields whose choices another page lists, so that a further one changes only that page.
CHOICES_ELSEWHERE = {"model.family": "[models.md](models.md)"}
MARK = "<!-- fields, written by python -m tools.config_reference -->\n"


def tables() -> str:
    """A Markdown table for each group of every command: field, default, meaning."""
    groups: dict[str, list[str]] = {}
    fields = {name: info for root in ROOTS for name, info in all_fields(root).items()}
    for name, info in fields.items():
        group = name.rpartition(".")[0]
        listed = CHOICES_ELSEWHERE.get(name) or ", ".join(f"`{choice}`" for choice in info.choices)
        choices = f" One of {'those in ' if name in CHOICES_ELSEWHERE else ''}{listed}." if info.choices else ""
        value = info.default
        default = "null" if value is None else str(value).lower() if isinstance(value, bool) else value
        groups.setdefault(group, []).append(f"| `{name}` | `{default}` | {info.doc}{choices} |")
    header = "| field | default | meaning |\n|---|---|---|\n"
    return "\n".join(
        f"### {group or 'top level'}{_owners(group)}\n\n{header}" + "\n".join(rows) + "\n"
        for group, rows in groups.items()
    )


def _owners(group: str) -> str:
    """The commands that have a group which is not part of a run."""
    known = {name.rpartition(".")[0] for name in all_fields()}
    return "" if group in known else f" ({', '.join(commands_with(group))})"


def page() -> str:
    """The whole page, with its tables generated again."""
    return PAGE.read_text(encoding="utf-8").split(MARK)[0] + MARK + "\n" + tables()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
