"""Words, Hydra's options and overrides on one command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from moe_train.config.composition.compose import compose
from moe_train.config.roots import ConvertRoot
from tools.words import parse

FIELDS = ("convert.source", "convert.target")


def test_paths_become_overrides_and_the_rest_stays() -> None:
    line = parse(["a/b", "model=tiny", "c", "-v", "~experiment", "+x=1"])
    assert (line.paths, line.options) == (["a/b", "c"], ["-v"])
    assert line.argv(*FIELDS) == [
        "-v", "convert.source='a/b'", "convert.target='c'", "model=tiny", "~experiment", "+x=1",
    ]  # fmt: skip


def test_a_command_is_one_only_as_the_first_word() -> None:
    assert parse(["verify", "a"], ["verify"]).command == "verify"
    line = parse(["a", "verify"], ["verify"])  # a target of that name
    assert line.command is None
    assert line.paths == ["a", "verify"]


def test_the_value_of_an_option_is_no_path() -> None:
    line = parse(["a", "--cfg", "job", "model=tiny"])
    assert line.paths == ["a"]
    assert line.argv(*FIELDS) == ["--cfg", "job", "convert.source='a'", "model=tiny"]


def test_flags_are_kept_from_hydra() -> None:
    line = parse(["--diff", "a", "b"], flags=["--diff"])
    assert line.flags == {"--diff"}
    assert line.argv("inspect.path", "inspect.other") == ["inspect.path='a'", "inspect.other='b'"]


def test_hydra_reads_back_any_path() -> None:
    paths = (
        "it's here",
        "a,b",
        "a b",
        "[x]",
        "{y}",
        "50%",
        "a:b",
        "null",
        "1e3",
        "tail\\",
        "a\\'b",
        "${model.topk}",
    )
    for path in paths:
        cfg = compose(parse([path]).argv(*FIELDS), ConvertRoot)
        assert cfg.convert.source == path


def test_a_third_path_is_refused() -> None:
    assert parse(["a", "b", "c"]).argv(*FIELDS)[-1] == "c"  # no override, so Hydra refuses it


def test_hydras_own_options_work_with_paths() -> None:
    program = Path(sys.executable).parent / "moe-convert"
    command = [str(program), "a", "--cfg", "job", "b", "convert.dtype=bf16"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert {"  source: a", "  target: b", "  dtype: bf16"} <= set(done.stdout.splitlines())
