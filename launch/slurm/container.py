"""The container that ranks run in: its image, and that it has the directories of the run where they are. No torch."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moe_train.config.launcher import LauncherConfig
from parallel.errors import ConfigError

PYTHON = "python3"
"""What starts ranks in an image, where a virtual environment of the login node most often is not."""


@dataclass(frozen=True)
class Mount:
    """An entry of `launcher.mounts`: a directory of the machine, and where the container has it."""

    source: Path
    target: Path
    flags: str = ""

    @classmethod
    def read(cls, entry: str) -> Mount:
        """From HOST, HOST:CONTAINER or HOST:CONTAINER:FLAGS."""
        source, _, rest = entry.partition(":")
        target, _, flags = rest.partition(":")
        return cls(Path(source).absolute(), Path(target or source).absolute(), flags)

    def __str__(self) -> str:
        return ":".join(str(part) for part in (self.source, self.target, self.flags) if part != "")


def python(launcher: LauncherConfig) -> str:
    """The Python that starts the ranks."""
    return launcher.python or (sys.executable if launcher.container is None else PYTHON)


def mounts(launcher: LauncherConfig) -> list[Mount]:
    """What the container is given; the working directory where nothing is named, as `train.sbatch` does."""
    here = Path.cwd()
    return [Mount.read(entry) for entry in launcher.mounts] or [Mount(here, here)]


def check(launcher: LauncherConfig) -> None:
    """Raise ConfigError where the image or what it is given is not there, or what starts ranks knows no image."""
    image = launcher.container
    local = image is not None and (image.startswith(("/", "./")) or image.endswith((".sif", ".sqsh")))
    if image is not None and local and not Path(image).exists():
        raise ConfigError(f"launcher.container={image} does not exist", "name an image file, or one of a registry")
    if image is not None and launcher.start == "mpirun" and launcher.container_runtime == "pyxis":
        raise ConfigError(
            "launcher.start=mpirun starts ranks outside launcher.container, which is a flag of srun with pyxis",
            "use launcher.start=pmi2 or launcher.container_runtime=apptainer",
        )
    if launcher.mounts and image is None:
        raise ConfigError("launcher.mounts is for launcher.container, which is null", "use launcher.mounts=[]")
    for entry in launcher.mounts:
        if not Mount.read(entry).source.exists():
            raise ConfigError(f"launcher.mounts has {entry}, which is not on this machine", "name a shared directory")


def sees(launcher: LauncherConfig, read: Mapping[str, str], written: Mapping[str, str]) -> None:
    """Raise ConfigError where a path, by the field that has it, is elsewhere in the container, missing or read-only."""
    if launcher.container is None:
        return
    given = mounts(launcher)
    if launcher.container_runtime == "apptainer":  # which mounts it unasked
        given.append(Mount(Path.home(), Path.home()))
    for name, text in {**read, **written, "the working directory": str(Path.cwd())}.items():
        path = Path(text).absolute()
        mount = _mount_of(path, given)
        if mount is None:
            raise ConfigError(
                f"{name}={path} is not in launcher.container: nothing of launcher.mounts={launcher.mounts} is mounted "
                "there from the same place",
                f"add {path.parent if path.is_file() else path} or a directory above it to launcher.mounts",
            )
        if name in written and "ro" in mount.flags.split("+"):
            raise ConfigError(f"{name}={path} is read-only in launcher.container: launcher.mounts has {mount}",
                              f"mount {mount.source}:{mount.target} without ro")  # fmt: skip


def _mount_of(path: Path, given: list[Mount]) -> Mount | None:
    """The mount by which the container has `path`, and what it links to, as this machine does."""
    for mount in given:
        if not path.is_relative_to(mount.target):
            continue
        real = (mount.source / path.relative_to(mount.target)).resolve()
        if real != path.resolve():  # another directory has its name
            continue
        if real.is_relative_to(mount.source.resolve()) or (real != path and _mount_of(real, given)):
            return mount
    return None
