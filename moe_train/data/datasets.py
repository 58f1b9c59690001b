"""Training, validation and test sequences from indexed datasets, by Megatron-Core's dataset builder."""

from __future__ import annotations

import hashlib
import logging
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from moe_train.config.schema import Config, DataConfig
from moe_train.data.prepare import PREFIX, check_vocabulary, read_manifest
from moe_train.data.tokenizer import load_tokenizer
from parallel.errors import DataError

# As megatron/core/datasets/indexed_dataset.py writes it: magic, version, token type, numbers of sequences, documents.
_HEADER, _MAGIC = struct.Struct("<9sQBQQ"), b"MMIDIDX\0\0"
_MOST_EPOCHS = 100  # of the training text, before a warning
log = logging.getLogger(__name__)
SPLITS = ("training", "validation", "test")


def build_datasets(cfg: Config, train_samples: int, valid_samples: int, test_samples: int) -> tuple[Any, Any, Any]:
    """Datasets with at least that many sequences each, documents repeated as often as needed; None where 0 are asked.

    A sample is tokens, labels, loss_mask and position_ids [s], and with `data.reset_at_eod` attention_mask [1, s, s],
    True where attention is forbidden. The order of samples depends on `seed` and on how many are asked for.

    Rank 0 of the process group builds the indices in data.dir/cache, then the others read them: `data.dir` must be one
    directory for all nodes. A blend needs a process group, of one rank at least.

    Raises:
        DataError: a dataset is missing, damaged, or too small for its split.
    """
    data = cfg.data
    tokenizer = load_tokenizer(data)
    check_vocabulary(tokenizer.vocab_size, cfg.model.padded_vocab_size)
    prefixes, weights = _blend(data)
    _warn_of_epochs(cfg, train_samples * cfg.train.seq_length)
    cache = Path(data.dir) / "cache" / _identity(prefixes)
    config = GPTDatasetConfig(
        random_seed=cfg.seed,
        sequence_length=cfg.train.seq_length,
        blend=(prefixes, weights),
        split=data.split,
        path_to_cache=str(cache),
        tokenizer=tokenizer,
        reset_position_ids=data.reset_at_eod,
        reset_attention_mask=data.reset_at_eod,
        eod_mask_loss=data.reset_at_eod,
        create_attention_mask=data.reset_at_eod,
    )
    sizes = (train_samples, valid_samples, test_samples)
    # Upstream counts epochs of a split without text for ever, so it only sees splits that are asked for and have text.
    for i, size in enumerate(sizes):
        if not size:
            config.split_matrix[i] = None
        elif config.split_matrix[i] is None:
            raise DataError(f"data.split={data.split} has no {SPLITS[i]} text", "give it a share in data.split")
    for prefix in prefixes:
        _check(prefix, config, data.split)
    try:
        train, valid, test = BlendedMegatronDatasetBuilder(GPTDataset, list(sizes), lambda: True, config).build()
    except RuntimeError:  # another rank is gone, and its own error says why
        raise
    except Exception as error:
        raise DataError(f"the indices in {cache} cannot be made or read: {error}", f"delete {cache}") from error
    return train, valid, test


def _warn_of_epochs(cfg: Config, tokens: int) -> None:
    """A line of rank 0 where the run would read the dataset at `data.dir` very often."""
    if cfg.data.blend or (dist.is_initialized() and dist.get_rank()):
        return
    held = read_manifest(cfg.data)["tokens"]
    if tokens > _MOST_EPOCHS * held:
        log.warning(
            "the run of %s tokens reads the %s tokens of data.dir=%s %s times: set data=... to a larger corpus",
            *(f"{tokens:,}", f"{held:,}", cfg.data.dir, f"{tokens // held:,}"),
        )


def _blend(data: DataConfig) -> tuple[list[str], list[float] | None]:
    """The dataset at `data.dir`, or those of `data.blend` with their weights."""
    if not data.blend:
        read_manifest(data)
        return [str(Path(data.dir) / PREFIX)], None
    entries = [entry.split(maxsplit=1) for entry in data.blend]
    return [prefix for _, prefix in entries], [float(weight) for weight, _ in entries]


def _identity(prefixes: Sequence[str]) -> str:
    """A name for the caches of these datasets, another one when a dataset is made anew at the same place."""
    digest = hashlib.sha256()
    for prefix in prefixes:
        for suffix in (".bin", ".idx"):
            file = Path(prefix + suffix)
            if not file.is_file():
                raise DataError(f"data.blend names {file}, which is not there", "correct the prefix in data.blend")
            digest.update(f"{file}|{file.stat().st_size}|".encode())
        with open(f"{prefix}.idx", "rb") as index:
            digest.update(index.read(2**20))  # lengths of the first documents
    return digest.hexdigest()[:16]


def _check(prefix: str, config: GPTDatasetConfig, split: str) -> None:
    """Raise DataError if the dataset is cut off, or a split of it has no text for one sequence."""
    size = Path(f"{prefix}.bin").stat().st_size
    if size == 0:
        raise DataError(f"{prefix}.bin is empty", "make it again")
    _check_index(Path(f"{prefix}.idx"))
    index = GPTDataset.build_low_level_dataset(prefix, config).index
    lengths = index.sequence_lengths
    needed = int(index.sequence_pointers[-1]) + int(lengths[-1]) * index.dtype_size if len(lengths) else 0
    if size < needed:
        raise DataError(
            f"{prefix}.bin is cut off: its index needs {needed} bytes, it has {size}", "make or copy it again"
        )
    for name, share in zip(SPLITS, config.split_matrix, strict=True):
        if share is None:
            continue
        begin, end = (round(edge * float(len(lengths))) for edge in share)  # as upstream does
        tokens = int(lengths[begin:end].sum())
        if tokens <= config.sequence_length:
            raise DataError(
                f"the {name} split of data.split={split} has no sequence of {config.sequence_length} tokens: it is "
                f"{end - begin} of the {len(lengths)} documents of {prefix}, with {tokens} tokens",
                "use more text, a larger share for it in data.split, or a smaller train.seq_length",
            )


def _check_index(file: Path) -> None:
    """Raise DataError if `file` is not whole, before upstream fails on it with an assertion and noise."""
    with open(file, "rb") as stream:
        header = stream.read(_HEADER.size)
    magic, _, _, sequences, documents = _HEADER.unpack(header.ljust(_HEADER.size, b"\0"))
    # Lengths of sequences are 4 bytes, where each begins 8, where each document begins 8.
    if magic != _MAGIC or file.stat().st_size < _HEADER.size + 12 * sequences + 8 * documents:
        raise DataError(f"{file} is not a whole index of a Megatron dataset", "make or copy it again")
