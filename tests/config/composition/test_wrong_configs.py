"""Wrong configurations: each ends in one line that names the field, with exit code 2, and with values that do work."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from moe_train.config.composition.compose import compose, hydra_entry
from moe_train.config.composition.validate import validate
from moe_train.config.schema import Config
from moe_train.config.walk import all_fields, typed, with_values
from tests.config.composition.wrong_configs import TABLE, Wrong

MOE_TRAIN = Path(sys.executable).parent / "moe-train"


@pytest.fixture(autouse=True)
def _in_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.iterdir()), "a wrong configuration left something behind"


def _never(cfg: Config) -> None:
    raise AssertionError("a wrong configuration was run")


def _suggested(line: str) -> list[list[str]]:
    """The overrides that a line suggests: `...; use a=1 or b=2 c=3` gives [[a=1], [b=2, c=3]]."""
    remedy = re.split(r"; use ", line)[-1]
    remedy = re.sub(r" for one value with commas, or -m to run each$", "", remedy)
    options = [re.sub(r", such as ", "", option) for option in remedy.removeprefix("KEY=VALUE").split(" or ")]
    # A suggestion is pasted into a shell, except for quotes, which Hydra wants to see. Those around a word are the
    # shell's.
    words = [re.findall(r"(?:'[^']*'|\[[^]]*\]|[^\s'\[])+", option.strip('"')) for option in options]
    return [[word[1:-1] if word.startswith("'") else word for word in option] for option in words if option]


def test_the_table_is_long_enough_and_has_no_doubles() -> None:
    assert len(TABLE) >= 45
    assert len({(tuple(row.words), row.world_size) for row in TABLE}) == len(TABLE)


@pytest.mark.parametrize("row", TABLE, ids=[f"{row.context} {row.overrides}".strip() for row in TABLE])
def test_wrong_config_ends_in_one_line_with_a_value_that_works(row: Wrong, capsys: pytest.CaptureFixture[str]) -> None:
    if row.world_size is None:
        assert hydra_entry(_never, argv=row.words) == 2
    else:  # as a launcher's rank does: it knows the number of ranks only in the job, whose directory Hydra has made
        assert hydra_entry(lambda cfg: validate(cfg, row.world_size) and None, argv=row.words) == 2
        Path("runs").rmdir()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    line = captured.err.strip()
    assert line.startswith(f"error: {row.field}")
    assert row.arithmetic in line
    assert "; " in line  # cause; remedy
    if not row.applies:
        return
    suggestions = _suggested(line)
    assert suggestions, line
    assert len(set(map(tuple, suggestions))) == len(suggestions), line
    if row.replaces:  # several existing fields can look like a wrong name: the first is meant
        validate(compose([*shlex.split(row.context), *suggestions[0]]))
        return
    wrong = _with_overrides(_context(row.context), shlex.split(row.overrides))
    for suggestion in suggestions:
        validate(_with_overrides(wrong, suggestion), row.world_size)


@cache
def _context(words: str) -> Config:
    return compose(shlex.split(words))


def _with_overrides(cfg: Config, overrides: list[str]) -> Config:
    """Read as Hydra reads them, without composing everything again."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    values = {one.key_or_group: one.value() for one in parsed}
    return with_values(
        cfg, {name: typed(name, value) if name in all_fields() else value for name, value in values.items()}
    )


@pytest.mark.parametrize(
    "overrides", ["parallel.tp=3", "path=x", "parallel.tp=two", "model=tinny", "train.tokens=1 train.steps=1"]
)
def test_the_installed_command_starts_nothing(overrides: str, tmp_path: Path) -> None:
    """As the rows of the table, from a shell; a process group, torch even, would take longer than the timeout."""
    done = subprocess.run(
        [MOE_TRAIN, *shlex.split(overrides)], cwd=tmp_path, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_rows_fail_only_because_of_their_wrong_overrides() -> None:
    """Each context alone passes, so that the line is about what the row says."""
    for context in sorted({row.context for row in TABLE if row.world_size is None}):
        if context != "data.source=files":
            assert validate(_context(context)).world_size >= 1, context
