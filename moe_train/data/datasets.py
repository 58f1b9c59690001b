"""Training, validation and test sequences from indexed datasets, by Megatron-Core's dataset builder."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder

from moe_train.config.schema import Config, DataConfig
from moe_train.data import manifest
from moe_train.data.index_file import read_index
from moe_train.data.prepare import check_vocabulary
from moe_train.data.sequences import EpochSequences, Sequences, SequencesConfig
from moe_train.data.tokenizer import load_tokenizer
from parallel.errors import DataError

_MOST_EPOCHS = 100  # of the training text, before a warning
log = logging.getLogger(__name__)
SPLITS = ("training", "validation", "test")


def build_datasets(cfg: Config, train_samples: int, valid_samples: int, test_samples: int) -> tuple[Any, Any, Any]:
    """Datasets with at least that many sequences each, documents repeated as often as needed; None where 0 are asked.

    A sample is tokens, labels, loss_mask and position_ids [s]; with `data.reset_at_eod` each document of it begins at
    position 0. The order of samples depends on `seed`; with `data.shuffle=run` also on how many
    are asked for.

    Rank 0 of the process group builds the indices in data.dir/cache, then the others read them: `data.dir` must be one
    directory for all nodes. A blend needs a process group, of one rank at least.

    Raises:
        DataError: a dataset is missing, damaged, or too small for its split.
    """
    data = cfg.data
    tokenizer = load_tokenizer(data)
    check_vocabulary(tokenizer.vocab_size, cfg.model.vocab_size)
    prefixes = manifest.prefixes(data)
    if _is_main():  # the others wait for it below
        manifest.verify(data)
    indices = [read_index(prefix) for prefix in prefixes]
    _warn_of_epochs(cfg, train_samples * cfg.train.seq_length, sum(index.tokens for index in indices))
    weights = _weights(data, [index.tokens for index in indices])
    cache = Path(data.cache_dir or Path(data.dir) / "cache") / _identity(prefixes)
    config = SequencesConfig(
        random_seed=cfg.seed,
        sequence_length=cfg.train.seq_length,
        blend=(prefixes, weights),
        split=data.split,
        path_to_cache=str(cache),
        tokenizer=tokenizer,
        reset_position_ids=data.reset_at_eod,
        reset_attention_mask=data.reset_at_eod,
        eod_mask_loss=data.reset_at_eod,
        create_attention_mask=False,
        model_vocab_size=cfg.model.vocab_size,
        tokenizer_path=str(tokenizer.path),
    )
    sizes = (train_samples, valid_samples, test_samples)
    # Upstream counts epochs of a split without text endlessly: it only sees splits that are asked for and have text.
    for i, size in enumerate(sizes):
        if not size:
            config.split_matrix[i] = None
        elif config.split_matrix[i] is None:
            raise DataError(f"data.split={data.split} has no {SPLITS[i]} text", "give it a share in data.split")
    for prefix, index in zip(prefixes, indices, strict=True):
        _check_splits(prefix, index.lengths, config, data.split)
    if _is_main():
        _make_directory(cache)
    if weights is not None:
        config.mid_level_dataset_surplus = _surplus(weights, sizes, config.mid_level_dataset_surplus)
    try:
        kind = EpochSequences if data.shuffle == "epoch" else Sequences
        train, valid, test = BlendedMegatronDatasetBuilder(kind, list(sizes), lambda: True, config).build()
    except RuntimeError:  # another rank is gone, and its own error says why
        raise
    except Exception as error:
        raise DataError(f"the indices in {cache} cannot be made or read: {error}", f"delete {cache}") from error
    return train, valid, test


def _make_directory(cache: Path) -> None:
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"the indices of the samples cannot be written to {cache}: {error.strerror}",
            "set data.cache_dir to a directory that this user can write and all nodes share",
        ) from error


def _is_main() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _warn_of_epochs(cfg: Config, tokens: int, available: int) -> None:
    """A line of rank 0 where the run would read its datasets very often."""
    if tokens > _MOST_EPOCHS * available and _is_main():
        log.warning(
            "the run of %s tokens reads the %s tokens of %s %s times: set data=... to a larger corpus",
            *(f"{tokens:,}", f"{available:,}", "data.blend" if cfg.data.blend else f"data.dir={cfg.data.dir}"),
            f"{tokens // available:,}",
        )


def _weights(data: DataConfig, tokens: Sequence[int]) -> list[float] | None:
    """Weights of the datasets of `data.blend`, or of those of `data.sources`, by their `tokens` where it has none; None
    for a single dataset."""
    if not data.blend:
        return list(map(float, tokens)) if len(tokens) > 1 else None
    weights = [entry.weight for entry in data.blend]
    return [float(size) if weight is None else weight for weight, size in zip(weights, tokens, strict=True)]


def _identity(prefixes: Sequence[str]) -> str:
    """A name for the caches of these datasets, another one when a dataset is made again at the same place."""
    digest = hashlib.sha256()
    for prefix in prefixes:
        for suffix in (".bin", ".idx"):
            file = Path(prefix + suffix)
            digest.update(f"{file}|{file.stat().st_size}|".encode())
        with open(f"{prefix}.idx", "rb") as index:
            digest.update(index.read(2**20))  # lengths of the first documents
    return digest.hexdigest()[:16]


def _check_splits(prefix: str, lengths: np.ndarray, config: SequencesConfig, split: str) -> None:
    """Raise DataError if a split of the dataset has no text for one sequence."""
    for name, share in zip(SPLITS, config.split_matrix, strict=True):
        if share is None:
            continue
        begin, end = (round(edge * float(len(lengths))) for edge in share)  # as upstream does
        tokens = int(lengths[begin:end].sum(dtype=np.int64))
        if tokens <= config.sequence_length:
            raise DataError(
                f"the {name} split of data.split={split} has no sequence of {config.sequence_length} tokens: it is "
                f"{end - begin} of the {len(lengths)} documents of {prefix}, with {tokens} tokens",
                "use more text, a larger share for it in data.split, or a smaller train.seq_length",
            )


def _surplus(weights: Sequence[float], sizes: Sequence[int], usual: float) -> float:
    """Share of samples that upstream must draw in excess from each dataset of a blend, so that none runs out.

    Upstream rounds the samples of each dataset up and then distributes the sum of them by weight. With few samples and
    many datasets, or very unequal weights, that asks a dataset for more than the usual 0.5 % in excess.
    """
    total = sum(weights)
    needed = usual
    for size in filter(None, sizes):
        requested = [math.ceil(size * weight / total) for weight in weights]
        for own, weight in zip(requested, weights, strict=True):
            needed = max(needed, (sum(requested) * weight / total + 1) / own - 1)
    return needed
