"""What the words of a command line mean: any path, numbers with units, references, sweeps."""

from __future__ import annotations

import os
import random
import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from moe_train.config.composition.command_line import for_hydra, literal, text_override
from moe_train.config.composition.compose import compose, from_yaml, hydra_entry, to_yaml
from moe_train.config.numbers import as_integer
from moe_train.config.roots import PlanRoot
from moe_train.config.schema import BlendEntry
from moe_train.config.walk import get
from parallel.errors import ConfigError
from parallel.suggest import override

NAMES = ("runs/epoch=9", "runs/lr=1e-3", "ü/漢字 [1]{2}", "2024_01_02", "1e5", "a b, c", "it's", 'say "so"', "x;y:z",
         "~tilde", "tail\\", "a\\'b", "100%", "true", " lead", "trail ", "new\nline",
         "-dash", "(1)", "range(3)")  # fmt: skip
PARSER = OverridesParser.create()


def _read(word: str) -> str:
    """The value as Hydra and OmegaConf read it."""
    return OmegaConf.create({"value": PARSER.parse_overrides(for_hydra([word]))[0].value()}).value


@pytest.mark.parametrize("name", NAMES)
def test_a_path_is_taken_as_the_shell_passes_it(name: str) -> None:
    for field in ("run_dir", "data.dir", "data.path", "init_from", "resume", "checkpoint.dir", "convert.source"):
        assert _read(f"{field}={name}") == name
    assert _read(text_override("data.dir", name)) == name


def test_any_text_survives_quoting() -> None:
    rng = random.Random(0)
    pieces = [*"ab/=,[]{}()'\"\\$ :;~+-@#%*?!&|<>.0123_éß漢\n\t🙂", "${", "\\${", "null", "1e3", "''", '"x"', "${seed}"]
    for _ in range(300):
        text = "".join(rng.choice(pieces) for _ in range(rng.randint(1, 10)))
        assert _read(f"data.dir={literal(text)}") == text
        assert _read(text_override("data.dir", text)) == text
        mounts = PARSER.parse_overrides(for_hydra([text_override("launcher.mounts", [text, "a"])]))[0].value()
        assert list(OmegaConf.create({"value": mounts}).value) == [text, "a"]
        entries = [BlendEntry(text, 0.5), BlendEntry("a")]
        blend = PARSER.parse_overrides(for_hydra([text_override("data.blend", entries)]))[0].value()
        assert [BlendEntry(**entry) for entry in OmegaConf.create({"value": blend}).value] == entries
        if "${" not in text:  # which a remedy shows as it was given
            shown = PARSER.parse_overrides(for_hydra(shlex.split(override("data.blend", entries))))[0].value()
            assert [BlendEntry(**entry) for entry in OmegaConf.create({"value": shown}).value] == entries
        quoted_or_reference = text[0] in "'\"" or "${" in text or text.lower() == "null"
        if not quoted_or_reference:
            assert _read(f"data.dir={text}") == text


@pytest.mark.parametrize("name", ["runs/epoch=9", "ü [1]{2}", "2024_01_02", "100%, 'a'"])
def test_the_run_directory_has_the_name_that_was_given(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    seen: list[str] = []

    def work(cfg: object) -> None:
        seen.append(get(cfg, "run_dir"))  # type: ignore[arg-type]
        Path(seen[-1], "file").touch()

    assert hydra_entry(work, argv=[f"run_dir={name}"]) == 0
    assert seen == [str(tmp_path / name)]
    assert Path(tmp_path, name, "file").exists()


def test_references_null_and_quotes_keep_their_meaning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch/a=b")
    words = ["run_dir=${oc.env:SCRATCH}/lr=${optimizer.lr}", "data.tokenizer=null", "data.dir='a=b'",
             "checkpoint.dir=\\${x}"]  # fmt: skip
    cfg = compose(words)
    assert cfg.run_dir == "/scratch/a=b/lr=0.001"
    assert (cfg.data.tokenizer, cfg.data.dir, cfg.checkpoint.dir) == (None, "a=b", "${x}")


def test_entries_of_a_list_are_taken_literally_too() -> None:
    blend = 'data.blend=[{path:a=b/text, weight: 0.7},{path: ü/x y:z},{path:"c,d",weight:1}]'
    cfg = compose([blend, "plan.micro_batch_sizes=[1,2k]"], PlanRoot)
    assert cfg.data.blend == [BlendEntry("a=b/text", 0.7), BlendEntry("ü/x y:z"), BlendEntry("c,d", 1.0)]
    assert cfg.plan.micro_batch_sizes == [1, 2000]


def test_a_sweep_splits_at_commas_outside_of_quotes(tmp_path: Path) -> None:
    seen = []
    argv = ["-m", f"run_dir={tmp_path}/s=1", "data.dir=a=b,'c,d',2024_01", "train.tokens=1M,2M"]
    assert hydra_entry(lambda cfg: seen.append((cfg.data.dir, cfg.train.tokens)), argv=argv) == 0
    assert seen == [(name, tokens) for name in ("a=b", "c,d", "2024_01") for tokens in (1_000_000, 2_000_000)]


def test_the_written_config_is_read_back_whatever_the_names(tmp_path: Path) -> None:
    for name in (*NAMES, "${x}", "null", "1.5", "0x10"):
        cfg = compose([f"data.dir={literal(name)}"])
        file = tmp_path / "config.yaml"
        file.write_text(to_yaml(cfg), encoding="utf-8")
        assert from_yaml(file) == cfg


def test_a_name_that_is_not_utf8_is_refused() -> None:
    with pytest.raises(ConfigError, match="not UTF-8"):
        for_hydra(["run_dir=" + os.fsdecode(b"a\xff")])


NUMBERS = {"2T": 2 * 10**12, "14.8T": 14_800 * 10**9, "100B": 10**11, "2e12": 2 * 10**12, "8k": 8000, "1_000": 1000,
           "0.5M": 500_000, "1e3": 1000, "100.0": 100, "2t": 2 * 10**12, "7": 7}  # fmt: skip


@pytest.mark.parametrize("text", NUMBERS)
def test_integers_may_have_units(text: str) -> None:
    cfg = compose([f"train.tokens={text}", f"train.eval_interval_steps={text}", f"plan.gpus={text}"], PlanRoot)
    assert (cfg.train.tokens, cfg.train.eval_interval_steps, cfg.plan.gpus) == (NUMBERS[text],) * 3


def test_k_is_1024_in_the_length_of_a_sequence() -> None:
    cfg = compose(["train.seq_length=8k", "model.max_position_embeddings=128K", "checkpoint.interval_steps=1k"])
    assert (cfg.train.seq_length, cfg.model.max_position_embeddings) == (8192, 131_072)
    assert cfg.checkpoint.interval_steps == 1000


@pytest.mark.parametrize("text", ["", "k", "1.5", "1kk", "1 k", "0x10", "1e-3", "nan", "inf", "1Q", "--1", "1e9999"])
def test_what_is_not_an_integer_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="number"):
        as_integer(text)
