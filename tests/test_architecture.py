"""Rules of the house that a program can check: which package imports which, where patches live, how long things are."""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from parallel.architecture.attention import ATTENTIONS
from parallel.dispatchers import DISPATCHERS
from tests.syntax import assigned, root_name

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("parallel", "moe_train", "launch", "tools", "bench")
# Arrows point one way: each package may import those before it.
MAY_IMPORT = {
    "parallel": {"parallel"},
    "moe_train": {"parallel", "moe_train"},
    "launch": {"parallel", "moe_train", "launch"},
    "tools": {"parallel", "moe_train", "launch", "tools"},
    "bench": set(PACKAGES),
}
WITHOUT_TORCH = (
    *sorted((ROOT / "moe_train/config").rglob("*.py")),
    *sorted((ROOT / "moe_train/files").glob("*.py")),
    *(ROOT / "moe_train/inference" / f"{name}.py" for name in ("blocks", "scheduler", "text")),
    ROOT / "moe_train/schedules.py",
    ROOT / "moe_train/resilience/reactions.py",
    ROOT / "moe_train/model/arithmetic.py",
    ROOT / "moe_train/model/memory.py",
    ROOT / "moe_train/telemetry/registry.py",
    *sorted((ROOT / "launch/slurm").glob("*.py")),
    *(ROOT / "tools" / f"{name}.py" for name in ("plan", "memory", "schedule", "published/predict", "planning/answer")),
    *sorted((ROOT / "parallel/planner").glob("*.py")),
    *sorted((ROOT / "parallel/architecture").glob("*.py")),
    *(
        ROOT / "parallel" / f"{name}.py"
        for name in ("dispatchers", "fp8_recipes", "layout", "pipeline", "errors", "suggest", "rank_info")
    ),
)
UPSTREAM = ("torch", "megatron")
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
LONGEST_FILE, LONGEST_FUNCTION = 600, 120
LARGEST_FOLDER = 0.25  # of the lines of moe_train


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(module, name that it is bound to) of every import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, alias.asname or alias.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", alias.asname or alias.name


def _type_checking(tree: ast.Module) -> set[ast.AST]:
    """Nodes under `if TYPE_CHECKING:`, which no process runs."""
    blocks = (n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test).endswith("TYPE_CHECKING"))
    return {inner for block in blocks for statement in block.body for inner in ast.walk(statement)}


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_arrows_between_packages_point_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    imported = {module.split(".")[0] for module, _ in _imports(_tree(path))}
    assert imported & set(PACKAGES) <= MAY_IMPORT[package]
    assert "tests" not in imported


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {_module(path): path for path in FILES}


def _imported_files(path: Path) -> Iterator[Path]:
    """Our own files that `path` imports, lazily or for type checking too."""
    for module, _ in _imports(_tree(path)):
        while module and module not in MODULES:
            module = module.rpartition(".")[0]
        if module:
            yield MODULES[module]


def _folder(path: Path) -> str:
    """Folder of a file. A file directly in `moe_train` counts as a folder of its own: `train.py` is above all others,
    `run.py` below most of them."""
    folder = path.relative_to(ROOT).parent
    return _name(path) if str(folder) == "moe_train" else str(folder)


def _below(folder: str, arrows: dict[str, set[str]]) -> set[str]:
    """Folders that `folder` imports, directly or through others."""
    reached: set[str] = set()
    waiting = [folder]
    while waiting:
        for imported in arrows[waiting.pop()] - reached:
            reached.add(imported)
            waiting.append(imported)
    return reached


def test_folders_of_moe_train_import_in_one_direction() -> None:
    """No cycle of any length between two folders."""
    files = [path for path in FILES if path.is_relative_to(ROOT / "moe_train")]
    arrows: dict[str, set[str]] = {_folder(path): set() for path in files}
    for path in files:
        imported = {_folder(other) for other in _imported_files(path) if other in files}
        arrows[_folder(path)] |= imported - {_folder(path)}
    assert len(arrows) > 15
    cycles = sorted(folder for folder in arrows if folder in _below(folder, arrows))
    assert not cycles


def test_no_folder_of_moe_train_is_overfull() -> None:
    lines: dict[str, int] = {}
    for path in FILES:
        if path.is_relative_to(ROOT / "moe_train"):
            folder = str(path.relative_to(ROOT).parent)
            lines[folder] = lines.get(folder, 0) + len(path.read_text(encoding="utf-8").splitlines())
    total = sum(lines.values())
    assert {folder: n for folder, n in lines.items() if n > LARGEST_FOLDER * total} == {}


@pytest.mark.parametrize("path", WITHOUT_TORCH, ids=_name)
def test_what_login_nodes_run_imports_no_torch(path: Path) -> None:
    """Its imports, followed through our own packages, lead to the standard library, Hydra, what prints and draws, and
    tokenizers, which takes 30 ms to import."""
    hydra = {"hydra", "omegaconf", "yaml"}
    allowed = {*sys.stdlib_module_names, *hydra, "rich", "jinja2", "matplotlib", "psutil", "tokenizers"}
    seen: set[Path] = set()
    waiting = [path]
    while waiting:
        file = waiting.pop()
        if file in seen or not file.exists():
            continue
        seen.add(file)
        skipped = _type_checking(_tree(file))
        for node in ast.walk(_tree(file)):
            if node in skipped or not isinstance(node, (ast.Import, ast.ImportFrom)):
                continue
            for module, _ in _imports(node):
                top = module.split(".")[0]
                assert top in allowed or top in PACKAGES, f"{_name(file)} imports {module}"
                if top in PACKAGES:
                    parts = module.split(".")
                    waiting += [ROOT.joinpath(*parts[:n]).with_suffix(".py") for n in range(1, len(parts) + 1)]
                    waiting += [ROOT.joinpath(*parts[:n], "__init__.py") for n in range(1, len(parts) + 1)]


def _patches(tree: ast.Module) -> Iterator[str]:
    """Statements that set an attribute of something imported from torch or Megatron-Core."""
    upstream = {bound for module, bound in _imports(tree) if module.split(".")[0] in UPSTREAM}
    for node in ast.walk(tree):
        targets = assigned(node)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "setattr",
            "delattr",
            "patch.object",
            "mock.patch.object",
        ):
            targets = [ast.Attribute(value=node.args[0], attr="")] if node.args else []
        for target in targets:
            if isinstance(target, (ast.Attribute, ast.Subscript)) and root_name(target) in upstream:
                yield f"line {node.lineno}: {ast.unparse(node)}"  # type: ignore[attr-defined]


OUTSIDE_RUNTIME = [path for path in FILES if "parallel/runtime" not in _name(path)]


@pytest.mark.parametrize("path", OUTSIDE_RUNTIME, ids=_name)
def test_nothing_outside_of_the_runtime_patches_upstream(path: Path) -> None:
    assert not list(_patches(_tree(path)))


@pytest.mark.parametrize(
    "patch",
    [
        "import torch\ntorch.cuda.current_device = f",
        "import torch as t\nsetattr(t.cuda, 'x', f)",
        "from megatron.core import parallel_state as ps\nps.get_rank, a = f, g",
        "from megatron.core.transformer.moe.router import TopKRouter\nTopKRouter.forward = f",
        "import megatron.core\ndel megatron.core.x",
        "from torch import nn\nnn.Module.__dict__['x'] += f",
    ],
)
def test_the_check_for_patches_sees_them(patch: str) -> None:
    assert list(_patches(ast.parse(patch)))


# Names of rows whose properties a table holds -> the file with the table.
TABLES = {
    **dict.fromkeys(ATTENTIONS, "parallel/architecture/attention.py"),
    **dict.fromkeys(DISPATCHERS, "parallel/dispatchers.py"),
}


def _compared(tree: ast.Module) -> Iterator[str]:
    """Names of rows that an expression compares, looks for in a collection, or matches."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            operands = [node.value]
        else:
            continue
        for operand in operands:
            for inner in ast.walk(operand):
                if isinstance(inner, ast.Constant) and inner.value in TABLES:
                    yield str(inner.value)


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_rows_of_tables_are_not_compared_by_name(path: Path) -> None:
    found = [name for name in _compared(_tree(path)) if TABLES[name] != _name(path)]
    assert not found, f"read a property of the row in {TABLES[found[0]]}"


@pytest.mark.parametrize("code", ['a.b == "mla"', 'c in ("flex", "x")', 'if "alltoall" != d: pass'])
def test_the_check_for_names_of_rows_sees_them(code: str) -> None:
    assert list(_compared(ast.parse(code)))


REPLACES_FILES = ("moe_train/files/atomic.py", "moe_train/formats/directory_writer.py")
# They move directories, or make a lock: `rename` is theirs.
MOVES_DIRECTORIES = (
    "moe_train/checkpoint/continuing.py", "moe_train/checkpoint/node_local.py", "moe_train/checkpoint/retention.py",
    "moe_train/conversion/small_files.py", "moe_train/formats/run_directory.py", "launch/lock.py",
)  # fmt: skip


def _renames(tree: ast.AST, directories: bool) -> Iterator[int]:
    """Lines with `os.replace`, or `replace` of a path, which takes one argument (that of a text takes two). With
    `directories` those with `rename` and `move` too."""
    names = {"replace", "rename", "renames", "move"} if directories else {"replace"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in ("os", "shutil"):
            if names & {alias.name for alias in node.names}:
                yield node.lineno
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in names:
            is_of_path = len(node.args) + len(node.keywords) == 1
            if is_of_path or root_name(node.func) in ("os", "shutil"):
                yield node.lineno


@pytest.mark.parametrize("path", [path for path in FILES if _name(path) not in REPLACES_FILES], ids=_name)
def test_files_are_replaced_in_one_place(path: Path) -> None:
    lines = list(_renames(_tree(path), _name(path) not in MOVES_DIRECTORIES))
    assert not lines, f"line {lines[0]}: use moe_train.files.atomic"


@pytest.mark.parametrize(
    "code",
    ["os.replace(a, b)", "os.rename(a, b)", "a.rename(b)", "a.replace(b)", "a.replace(target=b)", "shutil.move(a, b)",
     "from os import replace"],
)  # fmt: skip
def test_the_check_for_renamed_files_sees_them(code: str) -> None:
    assert list(_renames(ast.parse(code), directories=True))
    assert not list(_renames(ast.parse('text.replace("a", "b")'), directories=True))


def test_no_two_classes_share_a_name() -> None:
    """Nested classes of functions are left out: they replace classes of others, whose names they have."""
    places: dict[str, list[str]] = defaultdict(list)
    for path in FILES:
        for node in _tree(path).body:
            if isinstance(node, ast.ClassDef):
                places[node.name].append(_name(path))
    assert {name: files for name, files in places.items() if len(files) > 1} == {}


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_files_and_functions_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE
    for node in ast.walk(_tree(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno:
            assert node.end_lineno - node.lineno < LONGEST_FUNCTION, node.name
