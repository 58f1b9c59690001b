"""docs/megatron_lm.md names fields, files and symbols that exist, and the configuration suggests the same fields."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moe_train.config.aliases import ABSENT
from moe_train.config.composition import explain
from moe_train.config.walk import all_fields

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "megatron_lm.md"
MOST_ARGUMENTS = 40


def rows(heading: str) -> list[list[str]]:
    """Cells of the rows of the table under a heading."""
    section = PAGE.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def codes(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


ARGUMENTS = [(argument, codes(row[1])) for row in rows("Arguments") for argument in codes(row[0])]


def test_the_table_of_arguments_is_short() -> None:
    assert 30 <= len(rows("Arguments")) <= MOST_ARGUMENTS
    assert len(ARGUMENTS) == len({argument for argument, _ in ARGUMENTS})


@pytest.mark.parametrize(("argument", "fields"), ARGUMENTS, ids=[argument for argument, _ in ARGUMENTS])
def test_an_argument_leads_to_a_field_of_its_row(argument: str, fields: list[str]) -> None:
    """The page and the error for the argument on a command line agree."""
    assert set(fields) <= set(all_fields())
    leaf = argument.removeprefix("--").replace("-", "_")
    if fields and leaf not in ABSENT:
        suggested = explain.similar_fields(leaf)
        assert set(suggested[:1]) <= set(fields), f"{argument}: {suggested}"
        assert suggested
    else:
        assert ABSENT[leaf]


def test_files_and_symbols_exist() -> None:
    """`path` or `path` `symbol`, where the symbols are those of the nearest path before them."""
    for row in rows("Functions and classes"):
        path = ROOT
        for code in codes(row[1]):
            if "/" in code:
                path = ROOT / code
                assert path.exists(), code
            else:
                text = path.read_text(encoding="utf-8")
                assert re.search(rf"^(class|def) {code}\b|^{code}\b.*=", text, re.MULTILINE), f"{path}: {code}"
    named = [code for row in rows("Arguments") for code in codes(row[2]) if code.startswith("moe_train/")]
    assert all((ROOT / code).exists() for code in named)
