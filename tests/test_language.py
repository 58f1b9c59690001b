"""README, docs, error messages, field descriptions, comments and docstrings use the terms of docs/glossary.md."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GLOSSARY = ROOT / "docs" / "glossary.md"
PAGES = sorted(page for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")] if page != GLOSSARY)
SOURCES = sorted(
    path for folder in ("moe_train", "parallel", "launch", "tools", "bench") for path in (ROOT / folder).rglob("*.py")
)
NOT_SHOWN = ("bench",)
"""Folders whose messages are for developers only, and are not checked."""


@cache
def terms() -> tuple[tuple[str, re.Pattern[str]], ...]:
    """(term, pattern) of each entry in the glossary's first column.

    A row is `term`, `term` (except `phrase`): the phrases contain the term and are allowed.
    """
    result = []
    for line in GLOSSARY.read_text(encoding="utf-8").splitlines():
        if not line.startswith("| `"):
            continue
        first_column = line.split("|")[1]
        forbidden, _, allowed = first_column.partition("(except")
        exceptions = re.findall(r"`([^`]+)`", allowed)
        for term in re.findall(r"`([^`]+)`", forbidden):
            result.append((term, _pattern(term, exceptions)))
    return tuple(result)


def _pattern(term: str, exceptions: list[str]) -> re.Pattern[str]:
    """Matches the term between word boundaries, in any case, unless it is part of an exception."""
    unless = ""
    for phrase in exceptions:
        if re.search(rf"\b{re.escape(term)}\b", phrase):
            before, after = re.split(rf"\b{re.escape(term)}\b", phrase, maxsplit=1)
            if before:
                unless += rf"(?<!{re.escape(before)})"
            if after:
                unless += rf"(?!{re.escape(term + after)})"
    return re.compile(rf"{unless}\b{re.escape(term)}\b", re.IGNORECASE)


def forbidden_in(text: str) -> list[str]:
    text = " ".join(text.split())
    lower_case = text.lower()  # searching for a substring first is several times as fast
    return [term for term, pattern in terms() if term.lower() in lower_case and pattern.search(text)]


def prose(markdown: str) -> str:
    """A page without code blocks, code spans and the targets of links."""
    text = re.sub(r"^```.*?^```", "", markdown, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"`[^`\n]*`", "`", text)
    return re.sub(r"\]\([^)]*\)", "]", text)


def strings(source: str) -> Iterator[tuple[int, str, str]]:
    """(line, "message" or "field", text) of the strings that a user may read.

    Fields are the descriptions in `doc(...)`. Messages are all other strings with a space that are not docstrings:
    errors, warnings, log records, output of commands, and the parts that functions return for them.
    """
    tree = ast.parse(source)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    fields = {
        id(constant)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "doc"
        for constant in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            if id(node) in fields:
                yield node.lineno, "field", node.value
            elif " " in node.value:
                yield node.lineno, "message", node.value


def comments(source: str) -> Iterator[tuple[int, str, str]]:
    """(line, "comment", text) of comments, those on adjacent lines joined, and (line, "docstring", text)."""
    block: list[tokenize.TokenInfo] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        if block and block[-1].start != (token.start[0] - 1, token.start[1]):
            yield block[0].start[0], "comment", _joined(block)
            block = []
        block.append(token)
    if block:
        yield block[0].start[0], "comment", _joined(block)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, "docstring", prose(node.value.value)


def _joined(block: list[tokenize.TokenInfo]) -> str:
    return prose("\n".join(token.string.lstrip("#") for token in block))


def in_page(page: Path) -> list[str]:
    text = prose(page.read_text(encoding="utf-8"))
    return [f"{page.name}: {term!r}" for term in forbidden_in(text)]


@cache
def texts(source: str) -> tuple[tuple[int, str, str], ...]:
    return (*strings(source), *comments(source))


def in_source(path: Path, kind: str, source: str | None = None) -> list[str]:
    text = path.read_text(encoding="utf-8") if source is None else source
    return [
        f"{path.relative_to(ROOT)}:{line}: {term!r}"
        for line, kind_of_string, string in texts(text)
        if kind_of_string == kind
        for term in forbidden_in(string)
    ]


def test_the_glossary_has_its_pairs() -> None:
    rows = [line for line in GLOSSARY.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert len(rows) >= 60
    assert all(len(row.split("|")) == 5 for row in rows)
    assert len(terms()) == len({term for term, _ in terms()}), "a term is there twice"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_use_the_terms_of_the_field(page: Path) -> None:
    assert in_page(page) == [], "docs/glossary.md says what to write instead"


@pytest.mark.parametrize("kind", ["message", "field", "comment", "docstring"])
def test_code_uses_the_terms_of_the_field(kind: str) -> None:
    sources = [path for path in SOURCES if kind != "message" or path.relative_to(ROOT).parts[0] not in NOT_SHOWN]
    problems = [problem for path in sources for problem in in_source(path, kind)]
    assert problems == [], "docs/glossary.md says what to write instead"


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("message", 'raise ConfigError(f"the two ranks {n} Meet at {place}")'),
        ("message", 'raise ConfigError("no rank", "use tp=1, " "whatever pp is")'),
        ("message", 'log.warning("this is no file of %s", name)'),
        ("message", 'def reason():\n    """Why."""\n    return "it is no file"'),
        ("field", 'x: int = field(1, doc("Tokens\\n that are passed  over."))'),
        ("comment", "x = 1  # where it stands"),
        ("comment", "# the tokens are passed\n# over here\nx = 1"),
        ("docstring", '"""A module\nthat goes on."""'),
        ("docstring", 'class A:\n    x: int\n    """Whatever it is."""'),
    ],
)
def test_a_planted_term_is_noticed(kind: str, source: str) -> None:
    assert in_source(ROOT / "moe_train" / "planted.py", kind, source)
    others = {"message", "field", "comment", "docstring"} - {kind}
    assert not any(in_source(ROOT / "moe_train" / "planted.py", other, source) for other in others)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Which is no file.", ["is no"]),
        ("There\nis no file, and it is no longer read.", []),
        ("A stand-in stands for it.", []),
        ("Where the rank\nstands.", ["stands"]),
        ("A besides, anewer, Mendel.", []),
    ],
)
def test_terms_are_words_and_phrases(text: str, expected: list[str]) -> None:
    assert forbidden_in(prose(text)) == expected


def test_code_in_a_page_is_exempt() -> None:
    assert forbidden_in(prose("```text\nwhatever\n```\n`anew` and [text](beside.md)")) == []
