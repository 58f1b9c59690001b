"""Rules of checkpoints: which are kept and where they go."""

from __future__ import annotations

import os

from moe_train.config.resolve import ResolvedConfig, Rule
from parallel.suggest import Impossible, fixes_of, multiples, override_value


def retention(facts: ResolvedConfig) -> None:
    """Checkpoints that are kept permanently are saved, and matter only where others are removed."""
    settings = facts.cfg.checkpoint
    every, interval = settings.keep_every, settings.interval_steps
    if every is None:
        return
    if settings.keep_last is None:
        raise Impossible(f"checkpoint.keep_every={every} says which stay, but checkpoint.keep_last=null keeps all",
                         [{"checkpoint.keep_last": 3}, {"checkpoint.keep_every": None}])  # fmt: skip
    if interval and every % interval:
        raise Impossible(
            f"checkpoint.keep_every={every} is not a multiple of checkpoint.interval_steps={interval}, the steps "
            "that are saved",
            fixes_of("checkpoint.keep_every", multiples(interval, every)),
        )


def places(facts: ResolvedConfig) -> None:
    """The nodes' disks are another place than that of all checkpoints."""
    cfg = facts.cfg
    near, shared = cfg.checkpoint.local_dir, cfg.checkpoint_root
    if near is not None and os.path.abspath(near) == os.path.abspath(shared):
        raise Impossible(f"checkpoint.local_dir={override_value(near)} is where all checkpoints go, no node's own disk",
                         [{"checkpoint.local_dir": None}])  # fmt: skip


RULES: tuple[Rule, ...] = (retention, places)
