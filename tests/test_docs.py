"""Every command in a ```bash block of the README and of docs/ runs, from a directory like a fresh clone; what the pages
name exists."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_train.data import prepare
from moe_train.formats import run_directory
from tests import forked, test_architecture

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ABOUT_THE_CODE = [ROOT / "CONTRIBUTING.md", ROOT / "docs" / "architecture.md", ROOT / "docs" / "extending.md"]
LONGEST_RECIPE = 25
# Added to training commands only, so that each takes seconds: what they show is the command, not the length.
SHORT = [
    "train.steps=2",
    "schedule.warmup_steps=1",
    "train.eval_batches=1",
    "train.sample_continuations=0",
    "train.seq_length=32",
    "schedule.on_resume=override",  # each command of a block is a step longer than the one before
]


def blocks() -> list[tuple[str, list[str]]]:
    """(page and number, commands) of each bash block."""
    found = []
    for page in PAGES:
        for number, block in enumerate(re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)):
            found.append((f"{page.name}-{number}", block.strip().splitlines()))
    return found


def cases() -> list[Any]:
    """The blocks. Those that train are slow, but for the two that a newcomer meets first."""
    found = []
    for name, commands in blocks():
        slow = name not in ("README.md-0", "README.md-1") and any(
            trains(shlex.split(line, comments=True)) for line in commands
        )
        found.append(pytest.param(name, commands, id=name, marks=pytest.mark.slow if slow else ()))
    return found


def trains(words: list[str]) -> bool:
    return words[0] == "moe-train" and "--cfg" not in words and "runtime=simulated" not in words


def test_there_are_commands_to_run() -> None:
    """The pattern still finds them, on most pages."""
    assert len(blocks()) >= 8
    assert {name.split("-")[0] for name, _ in blocks()} >= {"README.md", "parallelism.md", "planning.md", "data.md"}


@pytest.mark.parametrize(("name", "commands"), cases())
def test_commands_of_a_block_run(name: str, commands: list[str], tmp_path: Path, small_data: tuple[str, ...]) -> None:
    """In order, in one directory, each with exit code 0."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "README.md", tmp_path / "README.md")
    shutil.copy(ROOT / "LICENSE", tmp_path / "LICENSE.txt")
    steps = 0
    for line in commands:
        words = shlex.split(line, comments=True)
        if words[0] == "moe-data" and len(words) == 1:
            continue  # the default corpus: `make train` makes it
        own_data = any(word.startswith("data") for word in words)
        if trains(words):
            steps += 1
            words += [*SHORT, f"train.steps={1 + steps}", *([] if own_data else small_data)]
        program = shutil.which(words[0], path=str(Path(sys.executable).parent))
        assert program, f"{words[0]} is not installed"
        environment = dict(os.environ) | {"PYTHONWARNINGS": "ignore"}
        done = forked.run(
            [program, *words[1:]], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def test_links_between_pages_hold() -> None:
    """Every relative link names a file."""
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links {target}"


@cache
def _names_of(path: Path) -> set[str]:
    """Everything that a Python file defines or mentions by name."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    defined = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    mentioned = {node.id for node in nodes if isinstance(node, ast.Name)}
    return defined | mentioned | {node.attr for node in nodes if isinstance(node, ast.Attribute)}


def _spans(page: Path) -> list[str]:
    """Text in backticks, outside of blocks. A span may go on in the next line."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


@pytest.mark.parametrize("page", ABOUT_THE_CODE, ids=lambda page: page.name)
def test_files_that_a_page_about_the_code_names_exist(page: Path) -> None:
    """Paths from the root of the repository; NAME and SITE stand for what a reader chooses."""
    named = [span for span in _spans(page) if re.fullmatch(r"\.?[\w-]+(/[\w.-]*)+", span)]
    files = [name for name in named if not re.search(r"[A-Z]{4}", name) and not name.startswith("bench/results/")]
    assert len(files) >= 15
    assert [name for name in files if not (ROOT / name).exists()] == []
    drawn = re.findall(
        r"(?<![\w/])(?:moe_train|parallel|launch)/[\w/]+(?:\.py|\.sbatch|/)", page.read_text(encoding="utf-8")
    )
    assert [name for name in drawn if not ("NAME" in name or (ROOT / name).exists())] == []


@pytest.mark.parametrize("page", ABOUT_THE_CODE, ids=lambda page: page.name)
def test_names_after_a_file_are_in_that_file(page: Path) -> None:
    """`path.py` (`name`), `name` in `path.py`, `path.py`: `name`, `name`."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    found = [(file, name) for file, names in re.findall(r"`([\w/]+\.py)`:? \(?((?:`[A-Za-z_]\w+`[, ]*)+)", text)
             for name in re.findall(r"\w+", names)]  # fmt: skip
    found += [(file, name) for name, file in re.findall(r"`([A-Za-z_]\w+)`\s+(?:in|of)\s+`([\w/]+\.py)`", text)]
    assert len(found) >= 10 or page.name != "extending.md"
    assert [(file, name) for file, name in found if name not in _names_of(ROOT / file)] == []


@pytest.mark.parametrize("page", [*ABOUT_THE_CODE, *PAGES], ids=lambda page: page.name)
def test_commands_that_a_page_names_exist(page: Path) -> None:
    """Console scripts, targets of the Makefile, modules that Python runs."""
    text = page.read_text(encoding="utf-8")
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    own = {"moe-train"}  # the distribution
    assert set(re.findall(r"(?<![\w/.-])moe-[a-z]+(?![\w-])", text)) <= {*scripts, *own}
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"(?:`|^)make ([a-z][a-z0-9-]+)", text, re.MULTILINE)) <= targets
    for module in re.findall(r"python3? -m ((?:bench|tools|launch|moe_train)[\w.]*)", text):
        path = ROOT.joinpath(*module.split("."))
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


def test_the_architecture_page_names_every_test_of_the_rules() -> None:
    """A rule that is enforced is written down, and the other way round."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    tests = {name for name in vars(test_architecture) if name.startswith("test_")}
    assert set(re.findall(r"`(test_\w+)`", page)) == tests


def test_recipes_are_short_and_complete() -> None:
    sections = re.split(r"^## ", (ROOT / "docs" / "extending.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    lines = {section.splitlines()[0]: len(section.strip().splitlines()) - 1 for section in sections}
    wanted = {"model family", "dispatcher", "attention", "FP8 recipe", "objective", "callback", "sink", "cluster",
              "config rule", "upstream patch", "benchmark", "test on ranks"}  # fmt: skip
    assert {name for name in wanted if any(name in title for title in lines)} == wanted
    assert {title: count for title, count in lines.items() if count > LONGEST_RECIPE} == {}


def test_the_recipe_of_an_attention_names_every_table_with_a_row_for_each_kind() -> None:
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    recipe = re.search(r"^## Add an attention\n(.*?)^## ", page, re.MULTILINE | re.DOTALL)
    assert recipe
    calls = [
        (node.args, str(file.relative_to(ROOT)))
        for file in test_architecture.FILES
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "row_of"
    ]
    tables = {(ast.unparse(args[1]), file) for args, file in calls}
    assert len(tables) == len(calls) == 4
    for table, file in tables:
        assert f"`{table}` in `{file}`" in recipe[1]


def test_the_changelog_has_the_formats_on_disk() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    formats = text.partition("## Formats")[2]
    checkpoint, _, dataset = formats.partition("tokenised dataset")
    assert [int(n) for n in re.findall(r"\| (\d+) \|", checkpoint)] == [*range(1, run_directory.FORMAT + 1)]
    assert int(re.findall(r"\| (\d+) \|", dataset)[-1]) == prepare._FORMAT
    assert text.index("## [Unreleased]") > 0


def test_hooks_and_the_workflow_run_what_make_lint_and_ci_run() -> None:
    """The hooks of pre-commit are the commands of `make lint`, and look at the same shell scripts."""
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert lint
    programs = [line.split()[0].removeprefix("$(BIN)/") for line in lint[1].splitlines()]
    assert [Path(hook["entry"].split()[0]).name for hook in hooks] == programs
    scripts = next(line.split()[1:] for line in lint[1].splitlines() if "shellcheck" in line)
    files = {str(file.relative_to(ROOT)) for pattern in scripts for file in ROOT.glob(pattern)}
    pattern = next(hook["files"] for hook in hooks if hook["id"] == "shellcheck")
    assert files
    assert all(re.search(pattern, file) for file in files)
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    steps = [step.get("run", "") for job in workflow["jobs"].values() for step in job["steps"]]
    assert sum(".ci/run" in step for step in steps) == sum("make test-latest" in step for step in steps) == 1


def test_configuration_page_is_current() -> None:
    """Its tables are those of the schema: `python -m tools.config_reference` writes them."""
    from tools.config_reference import PAGE, page

    assert PAGE.read_text(encoding="utf-8") == page()


def test_metrics_page_is_current() -> None:
    """Its tables are those of the registry: `python -m tools.metrics_reference` writes them."""
    from tools.metrics_reference import PAGE, page

    assert PAGE.read_text(encoding="utf-8") == page()
