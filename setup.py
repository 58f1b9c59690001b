"""How a wheel is laid out. Everything else about the package is in pyproject.toml.

The packages `launch`, `parallel`, `tools` and `conf` have names that other distributions use too. A wheel therefore
puts nothing of ours but `moe_train` at the top level of site-packages:

    site-packages/moe_train/__init__.py     a copy; it redirects imports to the folder below
    site-packages/moe_train/_code/          the folders of the repository, unchanged
        moe_train/ parallel/ launch/ tools/ conf/

Code that looks for its neighbours (`conf/`, `launch/train.sbatch`, the packages that moe-submit copies) finds them as
in a clone. Editable installations (`make setup`) use the repository itself.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

TOP_LEVEL, CODE = "moe_train", "_code"


class BuildPrivateFolder(build_py):
    """Builds the packages into moe_train/_code."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.top = Path(self.build_lib, TOP_LEVEL)
        if not self.editable_mode:
            self.build_lib = str(self.top / CODE)

    def run(self) -> None:
        if not self.editable_mode:
            # build/lib survives between builds, and a file that was deleted since would still be packed.
            shutil.rmtree(self.top.parent, ignore_errors=True)
        super().run()
        if not self.editable_mode:
            shutil.copy(Path(TOP_LEVEL, "__init__.py"), self.top / "__init__.py")


class NameTopLevel(bdist_wheel):
    """Names the one top-level package in the metadata, which setuptools takes from the list of packages."""

    def write_wheelfile(self, wheelfile_base: str, *args: str, **kwargs: str) -> None:
        super().write_wheelfile(wheelfile_base, *args, **kwargs)
        Path(wheelfile_base, "top_level.txt").write_text(f"{TOP_LEVEL}\n", encoding="utf-8")


setup(cmdclass={"build_py": BuildPrivateFolder, "bdist_wheel": NameTopLevel})
