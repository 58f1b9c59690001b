"""What the container of a job has, and how the batch script starts ranks in it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from launch.slurm import commands, container
from moe_train.config.launcher import LauncherConfig
from moe_train.config.schema import Config
from parallel.errors import ConfigError
from tests.launch.test_batch_script import Batch


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory in which moe-submit is called."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def sees(read: Path, *mounts: str, written: Path | None = None, runtime: str = "pyxis") -> str:
    """Why not; "" where the container has what is read and what is written."""
    launcher = LauncherConfig(container="image", container_runtime=runtime, mounts=list(mounts))
    try:
        container.sees(launcher, {"data.dir": str(read)}, {} if written is None else {"run_dir": str(written)})
    except ConfigError as error:
        return str(error)
    return ""


def test_the_working_directory_is_mounted_where_nothing_else_is(work: Path, tmp_path: Path) -> None:
    assert sees(work / "data") == ""
    assert sees(tmp_path / "data") == (
        f"data.dir={tmp_path}/data is not in launcher.container: nothing of launcher.mounts=[] is mounted there from "
        f"the same place; add {tmp_path}/data or a directory above it to launcher.mounts"
    )


def test_every_path_must_be_where_it_is_here(work: Path, tmp_path: Path) -> None:
    assert sees(tmp_path / "data", str(tmp_path)) == sees(tmp_path / "data", f"{tmp_path}:{tmp_path}:ro") == ""
    assert sees(tmp_path / "data", f"{tmp_path}/data").startswith(f"the working directory={work} is not in")
    assert "data.dir=" in sees(tmp_path / "data", str(work), f"{tmp_path}/other:{tmp_path}/data")
    assert "data.dir=" in sees(tmp_path / "data", str(work), f"{tmp_path}/data:/data")


def test_what_a_link_leads_to_must_be_there_too(work: Path, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (work / "data").symlink_to(tmp_path / "store")
    assert f"data.dir={work}/data is not in" in sees(work / "data", str(work))
    assert sees(work / "data", str(work), f"{tmp_path}/store") == ""
    assert (
        sees(work / "data", str(work), f"{tmp_path}/store:{work}/data") == ""
    )  # a directory there, in place of the link


def test_what_is_written_needs_more_than_to_be_read(work: Path) -> None:
    told = sees(work / "data", f"{work}:{work}:rprivate+ro", written=work / "run")
    assert told == (
        f"run_dir={work}/run is read-only in launcher.container: launcher.mounts has {work}:{work}:rprivate+ro; "
        f"mount {work}:{work} without ro"
    )
    assert sees(work / "data", f"{work}:{work}:ro", f"{work}/run", written=work / "run")  # the first that has it counts


def test_apptainer_mounts_the_home_directory_unasked(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sees(tmp_path / "data", str(work)) != ""
    assert sees(tmp_path / "data", str(work), runtime="apptainer") == ""


def _variables(**launcher: object) -> dict[str, str]:
    cfg = Config()
    for name, value in launcher.items():
        setattr(cfg.launcher, name, value)
    return commands.environment(cfg, Path("/shared/run/submissions/monday"), [1])


def test_the_python_of_the_login_node_is_not_looked_for_in_an_image() -> None:
    assert _variables()["MOE_PYTHON"] == sys.executable
    assert _variables(container="image")["MOE_PYTHON"] == "python3"
    assert _variables(container="image", python="/opt/python")["MOE_PYTHON"] == "/opt/python"
    assert _variables(python="/opt/python")["MOE_PYTHON"] == "/opt/python"


def test_mounts_are_written_out(work: Path) -> None:
    """Not every version of pyxis takes one directory for two."""
    assert _variables(container="image")["MOE_MOUNTS"] == f"{work}:{work}"
    assert _variables(container="image", mounts=["/a", "/b:/c:ro"])["MOE_MOUNTS"] == "/a:/a,/b:/c:ro"


@pytest.mark.parametrize("runtime", ["pyxis", "apptainer"])
def test_ranks_start_in_the_image(runtime: str, tmp_path: Path) -> None:
    batch = Batch(tmp_path)
    code, text = batch.run("", "run_dir=run", MOE_CONTAINER="image", MOE_CONTAINER_RUNTIME=runtime)
    assert code == 0, text
    (line,) = batch.lines()
    start = " python3 -P -m launch.main run_dir=run"
    if runtime == "pyxis":
        assert (
            f"--container-image=image --container-mounts={tmp_path}:{tmp_path} --container-workdir={tmp_path}" in line
        )
        assert line.endswith(f"run/logs{start}")
    else:
        assert line.endswith(f"run/logs apptainer exec --nv --bind {tmp_path} --pwd {tmp_path} image{start}")


def test_what_is_mounted_must_be_on_this_machine(tmp_path: Path) -> None:
    for place, refused in ((tmp_path, False), (tmp_path / "gone", True)):
        launcher = LauncherConfig(container="image", mounts=[f"{place}:/data"])
        if refused:
            with pytest.raises(ConfigError, match="gone:/data, which is not on this machine"):
                container.check(launcher)
        else:
            container.check(launcher)
