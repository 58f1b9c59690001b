"""What `launch/train.sbatch` takes for the run_dir of a command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_train.config.composition.compose import hydra_entry
from moe_train.config.composition.run_dir import show


@pytest.mark.parametrize("options", [[], ["--config-dir=own"]], ids=["overrides", "an option of Hydra"])
def test_the_directory_is_the_one_that_is_named(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With references, which Python reads. A job of Hydra for a command that trains nothing has a scratch directory."""
    monkeypatch.chdir(tmp_path)
    Path("own").mkdir()
    words = [*options, "run_dir=/shared/${model.name}", "model=tiny", "runtime=cpu"]
    assert hydra_entry(show, words, trains=False, runs=False) == 0
    assert capsys.readouterr().out == "/shared/tiny\n"
