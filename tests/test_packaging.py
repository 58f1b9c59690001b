"""What an installed package needs, from a wheel that is built here and installed next to a distribution whose
packages have the same names as ours."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.tools.test_help import COMMANDS

ROOT = Path(__file__).parents[1]
FOLDERS = ("conf", "launch", "moe_train", "parallel", "tools")
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
PROBE = """
import json, sys
from importlib.metadata import distribution
from pathlib import Path

scripts = {point.name: point.load() for point in distribution("moe-train").entry_points}
mains = {name: script.args[0] for name, script in scripts.items()}  # of functools.partial
import launch.main, launch.slurm.commands, launch.slurm.submit, launch.preflight, moe_train.train, parallel.layout
import tools.chat, tools.convert, tools.dryrun, tools.evaluate, tools.generate, tools.inspect, tools.memory, tools.plan
import tools.prepare_data, tools.schedule, tools.serve
from launch.slurm import submission
from moe_train.config.composition import compose, explain
from moe_train.config.schema import Config

code = submission.take(compose.compose(["model=tiny"]), Path(sys.argv[1]) / "submission")
ours = {name: module for name, module in sys.modules.items()
        if name.partition(".")[0] in ("launch", "parallel", "tools", "moe_train", "conf")}
print(json.dumps({
    "mains": {name: callable(getattr(sys.modules[module], "main", None)) for name, module in mains.items()},
    "files": {name: module.__file__ for name, module in ours.items()},
    "conf": str(explain.CONF_DIR), "script": str(launch.slurm.commands.SCRIPT), "code": str(code),
}))
"""


@dataclass(frozen=True)
class Installation:
    """A virtual environment with the wheel, the other distribution, and the dependencies of this process."""

    wheel: Path
    prefix: Path

    @property
    def packages(self) -> Path:
        return next(self.prefix.glob("lib/python3*/site-packages"))

    def run(self, *words: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
        """A program of the environment, in a process that knows nothing of this repository."""
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        program = str(self.prefix / "bin" / words[0])
        return subprocess.run(
            [program, *words[1:]], cwd=cwd, env=environment | variables, capture_output=True, text=True, timeout=600
        )


def _copy_of_the_sources(directory: Path) -> Path:
    """What a build reads. setuptools writes into the folder that it builds from."""
    for name in FOLDERS:
        shutil.copytree(ROOT / name, directory / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, directory / name)
    return directory


def _other_distribution(directory: Path) -> Path:
    """A wheel with packages `tools`, `launch`, `parallel` and `conf`, which cannot be imported."""
    path = directory / "generic_names-1.0-py3-none-any.whl"
    info = "generic_names-1.0.dist-info"
    files = {f"{name}/__init__.py": f"raise ImportError('{name} of generic-names')\n"
             for name in ("tools", "launch", "parallel", "conf")}  # fmt: skip
    files[f"{info}/METADATA"] = "Metadata-Version: 2.1\nName: generic-names\nVersion: 1.0\n"
    files[f"{info}/WHEEL"] = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


@pytest.fixture(scope="session")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    directory = tmp_path_factory.mktemp("installed")
    sources = _copy_of_the_sources(directory / "sources")
    # A file of an older build, as `pip install .` leaves it in a clone.
    stale = sources / "build" / "lib" / "tools" / "stale.py"
    stale.parent.mkdir(parents=True)
    stale.write_text("")
    subprocess.run([sys.executable, "-c", BUILD, str(directory)], cwd=sources, check=True, capture_output=True)
    wheel = next(directory.glob("moe_train-*.whl"))
    prefix = directory / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(prefix)], check=True)
    installed = Installation(wheel, prefix)
    dependencies = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    # Paths that a .pth file adds are searched for packages, but not for .pth files, such as our editable one.
    (installed.packages / "dependencies.pth").write_text("\n".join(dependencies) + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(prefix / "bin/python"), "install", "--no-deps", "--no-index"]
    others = _other_distribution(directory)
    subprocess.run([*pip, "--no-compile", "--quiet", str(others), str(wheel)], check=True, capture_output=True)
    return installed


def test_a_wheel_has_every_file_below_one_package(installation: Installation) -> None:
    names = set(zipfile.ZipFile(installation.wheel).namelist())
    files = {path.relative_to(ROOT).as_posix() for name in FOLDERS for path in (ROOT / name).rglob("*")
             if path.is_file() and "__pycache__" not in path.parts}  # fmt: skip
    assert {"launch/train.sbatch", "conf/train.yaml", "parallel/layout.py"} <= files
    code = {f"moe_train/_code/{name}" for name in files}
    assert {name for name in names if ".dist-info/" not in name} == code | {"moe_train/__init__.py"}
    info = next(name.partition("/")[0] for name in names if name.endswith(".dist-info/METADATA"))
    assert zipfile.ZipFile(installation.wheel).read(f"{info}/top_level.txt").split() == [b"moe_train"]


def test_an_installed_package_imports_its_own_code(installation: Installation, tmp_path: Path) -> None:
    """Console scripts resolve; every module has one file, in the private folder; a submission copies that folder."""
    done = installation.run("python", "-c", PROBE, str(tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    private = installation.packages / "moe_train" / "_code"
    assert said["mains"] == dict.fromkeys(COMMANDS, True)
    at_top = said["files"].pop("moe_train")
    assert at_top == str(installation.packages / "moe_train" / "__init__.py")
    expected = {name: {private.joinpath(*name.split(".")).with_suffix(".py"),
                       private.joinpath(*name.split("."), "__init__.py")} for name in said["files"]}  # fmt: skip
    assert len(expected) > 100
    assert [name for name, file in said["files"].items() if Path(file) not in expected[name]] == []
    assert (said["conf"], said["script"]) == (str(private / "conf"), str(private / "launch" / "train.sbatch"))

    def below(folder: Path) -> dict[str, bytes]:
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*")
                if path.is_file() and path.suffix != ".pyc"}  # fmt: skip

    assert below(Path(said["code"])) == below(private)


def test_a_package_of_the_same_name_that_came_first_is_named(installation: Installation, tmp_path: Path) -> None:
    (tmp_path / "tools.py").write_text("")
    done = installation.run("python", "-c", "import tools, moe_train", cwd=tmp_path)
    assert done.returncode == 1
    assert "ImportError: moe_train has a package tools, and this process has already imported another" in done.stderr
    assert str(tmp_path / "tools.py") in done.stderr


def test_console_scripts_are_the_commands_of_the_tests() -> None:
    """Those whose --help and whose installation are tested."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    from moe_train import commands

    named = {}
    for name, target in project["scripts"].items():
        module, _, function = target.partition(":")
        assert module == "moe_train.commands"
        named[name] = getattr(commands, function).args[0]
    assert named == COMMANDS


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_an_installed_command_explains_itself(command: str, installation: Installation, tmp_path: Path) -> None:
    done = installation.run(command, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"`{command}`: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_installed_package_plans_and_submits(installation: Installation, tmp_path: Path) -> None:
    plan = installation.run("moe-plan", "model=deepseek_v3", "cluster=h800", "gpus=2048", "tokens=14.8T", cwd=tmp_path)
    assert plan.returncode == 0, plan.stderr
    words = ("--dry-run", "model=tiny", "runtime=cpu", "parallel.ep=2", "launcher.ranks_per_node=2", "train.steps=3")
    submit = installation.run("moe-submit", *words, cwd=tmp_path)
    assert submit.returncode == 0, submit.stderr
    assert str(installation.packages / "moe_train/_code/launch/train.sbatch") in submit.stdout


@pytest.mark.slow
def test_an_installed_package_trains_from_an_empty_directory(installation: Installation, tmp_path: Path) -> None:
    """With the default corpus, which is made of the standard library. Nothing is written into the package."""
    before = sorted(path for path in (installation.packages / "moe_train").rglob("*") if path.suffix != ".pyc")
    done = installation.run("moe-train", "model=tiny", "parallel.ep=2", "train.steps=3", "run_dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "lm_loss" in line] == [1, 2, 3]
    assert "Error" not in done.stderr
    after = sorted(path for path in (installation.packages / "moe_train").rglob("*") if path.suffix != ".pyc")
    assert [path for path in after if path not in before and path.name != "__pycache__"] == []
