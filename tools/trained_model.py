"""What the commands that run a trained model have in common: from the config of the command to ranks that generate."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from launch import quiet, rendezvous
from launch.local import forkserver, signals
from launch.local.engine_ranks import EngineRanks
from moe_train.config.composition.compose import hydra_entry
from moe_train.config.composition.validate import validate
from moe_train.config.inference import EngineConfig
from moe_train.config.roots import InferenceRoot
from moe_train.config.schema import Config
from moe_train.data.tokenizer import Tokenizer
from moe_train.inference import source
from moe_train.inference.text import is_unicode
from parallel.errors import ConfigError
from parallel.layout import ParallelLayout
from tools.words import CommandLine, parse

COMMON = (
    "source", "tokenizer", "precision", "parallel.tp", "parallel.pp", "parallel.ep", "engine.cache_format",
    "engine.memory_gib", "engine.max_sequences", "runtime",
)  # fmt: skip
"""What --help explains."""


@dataclass(frozen=True)
class TrainedModel:
    """A model whose ranks have not been started.

    Args:
        stop_token_ids: tokens that end a text.
    """

    name: str
    cfg: Config
    layout: ParallelLayout
    tokenizer: Tokenizer
    stop_token_ids: frozenset[int]

    def ranks(self, engine: EngineConfig, longest: int | None = None) -> EngineRanks:
        """The ranks, which are not started yet.

        Args:
            longest: tokens of the longest sequence that will come; None: the model decides.
        """
        return EngineRanks(self.cfg, self.layout, engine, longest)

    def encode(self, text: str) -> list[int]:
        """Tokens of a prompt, which begins as the texts of training do. There is at least one.

        Raises:
            ConfigError: the text is not valid Unicode.
        """
        if not is_unicode(text):
            raise ConfigError("the text is not valid Unicode", "write it in UTF-8")
        tokenizer = self.tokenizer
        begins = self.cfg.data.prepend_bos or tokenizer.special.adds_bos
        first = [tokenizer.bos] if begins and tokenizer.bos is not None else []
        # In the training data an end of document comes before the next one's first token.
        return [*first, *tokenizer.encode(text)] or [tokenizer.eod]


def find(cfg: InferenceRoot, words: Sequence[str], command: str) -> TrainedModel:
    """The model that `source` names, with its config checked.

    Args:
        words: overrides of the command line.

    Raises:
        ConfigError, CheckpointError, DataError: the model, its layout or its tokenizer cannot be used.
    """
    if cfg.source is None:
        raise ConfigError("source is missing: the model", f"use {command} runs/NAME, or a Hugging Face directory")
    info = rendezvous.detect()
    if info is not None:
        raise ConfigError(
            f"{info.launcher} has started this process as one of {info.world_size} ranks, and {command} starts the "
            "ranks of its layout itself",
            f"start {command} alone, on one machine",
        )
    found = source.find(Path(cfg.source))
    config = source.config_of(found, cfg, words, cfg.tokenizer)
    if config.runtime == "simulated":
        raise ConfigError("runtime=simulated computes nothing", "set runtime=auto, cpu or cuda")
    layout = validate(config)
    tokenizer = source.load_tokenizer(config)
    return TrainedModel(found.name, config, layout, tokenizer, source.stop_token_ids(config, tokenizer))


def _one_path(line: CommandLine) -> list[str]:
    return line.argv("source")


def main(
    run: Callable[[Any, Sequence[str]], None],
    root: type,
    *,
    about: str | None,
    common: Sequence[str],
    argv: Callable[[CommandLine], Sequence[str]] = _one_path,
    answers: bool = False,
    forks_early: bool = True,
) -> NoReturn:
    """What console scripts do: `run` with the config and the overrides, then exit. A signal ends the command with its
    exit code.

    Args:
        argv: from the words of the command to those for Hydra. By default one path names the model.
        root, about, common, answers: as `hydra_entry` has them.
        forks_early: whether the process that forks ranks starts at once, where the words name a model.
    """
    line = parse(sys.argv[1:])
    words = argv(line)

    def with_overrides(cfg: Any) -> None:
        run(cfg, line.overrides)

    try:
        with _command(line if forks_early else None):
            code = hydra_entry(
                with_overrides, argv=words, root=root, runs=False, answers=answers, about=about, common=common
            )
    except signals.Interrupted as interrupt:
        print(f"\ninterrupted by {interrupt.signal.name}", file=sys.stderr)
        code = interrupt.exit_code
    signals.leave(code)


@contextlib.contextmanager
def _command(line: CommandLine | None) -> Iterator[None]:
    """The main part of a command: signals that end it are raised in this block as `signals.Interrupted`.

    Args:
        line: its words. Where they name a model, the process that forks ranks starts at once.
    """
    quiet.silence()
    was_running = forkserver.is_running()
    try:
        with signals.interruptible(last=True):
            if line is not None and line.paths and not line.options:  # it imports while the config is composed
                forkserver.begin_on_cpu()
            yield
    finally:
        if not was_running:
            forkserver.kill()  # at once, even if it still imports
