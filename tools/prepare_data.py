"""`moe-data`: make the tokenised dataset of a configuration before training, on one machine.

    moe-data data=text data.path=corpus/ data.dir=data/mine
    moe-data data=text 'data.path=corpus/*.jsonl' data.dir=data/mine \\
        data.tokenizer=/models/tokenizer.json

It takes the overrides of `moe-train`, which reads the same data.dir.
The tokenizer has at most model.vocab_size entries.
"""

from __future__ import annotations

import sys

from rich.console import Console

from launch import quiet
from moe_train.config.composition.compose import hydra_entry
from moe_train.config.schema import Config

_COMMON = ("data", "data.path", "data.dir", "data.text_key", "data.tokenizer", "data.tokenizer_vocab_size",
          "model.vocab_size", "data.append_eod", "data.prepare_workers")  # fmt: skip


def main() -> None:
    """Console script."""
    sys.exit(hydra_entry(run, about=__doc__, common=_COMMON))


def run(cfg: Config) -> None:
    """Make the dataset, or compare every byte of datasets that are there with their checksums.

    Raises:
        DataError: the text, the tokenizer or a dataset is at fault.
    """
    quiet.silence()
    from moe_train.data import manifest, prepare
    from moe_train.data.index_file import read_index
    from moe_train.data.tokenizer import load_tokenizer

    if cfg.data.source == "none":
        prepare.check_prepared(cfg.data, cfg.model.vocab_size)
    else:
        prepare.prepare(cfg.data, cfg.model.vocab_size, progress=True)
    prepare.compare(cfg.data, progress=True)
    vocabulary = load_tokenizer(cfg.data).vocab_size
    console = Console(soft_wrap=True, highlight=False)
    for prefix in manifest.prefixes(cfg.data):
        index, made = read_index(prefix), manifest.manifest_of(prefix)
        name = cfg.data.dir if not cfg.data.blend else prefix
        unknown = "" if made else "; it has no manifest.json, so its bytes were compared with nothing"
        console.print(
            f"{name}: {len(index.lengths):,} documents, {index.tokens:,} tokens of a vocabulary of {vocabulary:,}"
            f"{unknown}",
            markup=False,
        )
        for line in prepare.summary(made or {}):
            console.print(f"  {line}", markup=False)


if __name__ == "__main__":
    main()
