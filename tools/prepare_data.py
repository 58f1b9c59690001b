"""`moe-data`: make the tokenised dataset of a configuration before training.

    moe-data data=text data.path=corpus/ data.dir=data/mine
    moe-data data=text 'data.path=corpus/*.jsonl' data.dir=data/mine \\
        data.tokenizer=/models/tokenizer.json
    mpirun -n 4 moe-data ...         ranks share the work; so do tasks of srun

It takes the overrides of `moe-train`, which reads the same data.dir.
The tokenizer has at most model.vocab_size entries.
"""

from __future__ import annotations

import contextlib
import os
import sys
from functools import partial

from rich.console import Console

from launch import quiet
from moe_train.config.composition.compose import hydra_entry
from moe_train.config.schema import Config
from moe_train.data.team import RankGroup

_COMMON = ("data", "data.path", "data.sources", "data.dir", "data.text_key", "data.deduplicate",
           "data.near_duplicates", "data.bad_records", "data.tokenizer", "data.tokenizer_vocab_size",
           "model.vocab_size", "data.append_eod", "data.prepare_workers", "data.prepare_memory_mib")  # fmt: skip


def main() -> None:
    """Console script."""
    from moe_train.formats import communicator

    ranks = RankGroup(*communicator.rank_and_sizes())
    with contextlib.ExitStack() as stack:
        if ranks.rank:  # rank 0 tells what any of them has to say
            stack.enter_context(contextlib.redirect_stderr(stack.enter_context(open(os.devnull, "w"))))
        sys.exit(hydra_entry(partial(run, ranks=ranks), about=__doc__, common=_COMMON))


def run(cfg: Config, ranks: RankGroup) -> None:
    """Make the dataset, or compare every byte of datasets that are there with their checksums.

    Args:
        ranks: which of the processes this is that make it together.

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
        prepare.prepare(cfg.data, cfg.model.vocab_size, progress=True, ranks=ranks)
    if ranks.rank:
        return
    prepare.compare(cfg.data, progress=True)
    vocabulary = load_tokenizer(cfg.data).vocab_size
    console = Console(soft_wrap=True, highlight=False)
    prefixes = manifest.prefixes(cfg.data)
    for prefix in prefixes:
        index, made = read_index(prefix), manifest.manifest_of(prefix)
        name = cfg.data.dir if len(prefixes) == 1 and not cfg.data.blend else prefix
        unknown = "" if made else "; it has no manifest.json, so its bytes were compared with nothing"
        console.print(
            f"{name}: {len(index.lengths):,} documents, {index.tokens:,} tokens of a vocabulary of {vocabulary:,}"
            f"{unknown}",
            markup=False,
        )
        if prefix == prefixes[-1] or cfg.data.blend:
            for line in prepare.summary(made or {}):
                console.print(f"  {line}", markup=False)


if __name__ == "__main__":
    main()
