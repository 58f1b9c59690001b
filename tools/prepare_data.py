"""`moe-data`: make the tokenised dataset of a configuration before training, on one machine.

    moe-data data=text data.path=corpus/ data.dir=data/mine
    moe-data data=text 'data.path=corpus/*.jsonl' data.dir=data/mine \\
        data.tokenizer=/models/tokenizer.json

It takes the overrides of `moe-train`, which reads the same data.dir.
"""

from __future__ import annotations

import sys

from rich.console import Console

from launch import quiet
from moe_train.config.compose import hydra_entry
from moe_train.config.schema import Config
from parallel.errors import ConfigError

_COMMON = ("data", "data.path", "data.dir", "data.text_key", "data.tokenizer", "data.tokenizer_vocab_size",
          "data.append_eod", "data.prepare_workers")  # fmt: skip


def main() -> None:
    """Console script."""
    sys.exit(hydra_entry(run, about=__doc__, common=_COMMON))


def run(cfg: Config) -> None:
    """Make the dataset, or check the checksums of one that is there.

    Raises:
        ConfigError: the config has no text to make it from.
        DataError: the text, the tokenizer or the dataset is at fault.
    """
    quiet.silence()
    from moe_train.data.prepare import prepare, read_manifest

    if cfg.data.source == "none":
        raise ConfigError("data.source=none has no text to prepare", "set data=text data.path=... or data=stdlib")
    prepare(cfg.data, cfg.model.padded_vocab_size, progress=True, verify=True)
    manifest = read_manifest(cfg.data)
    Console(soft_wrap=True).print(
        f"{cfg.data.dir}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens of a vocabulary of "
        f"{manifest['vocab_size']:,}"
    )


if __name__ == "__main__":
    main()
