from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from moe_train.config.schema import BlendEntry, Config
from moe_train.data.datasets import build_datasets
from moe_train.data.iterator import BatchIterator
from moe_train.data.prepare import PREFIX, prepare
from moe_train.data.tokenizer import load_tokenizer
from moe_train.schedules import BatchSchedule
from parallel.errors import DataError
from tests.data.corpora import config, texts, write_txt
from tests.distributed.helper import run_distributed

LENGTH = 32


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of 200 documents of about 100 tokens."""
    root = tmp_path_factory.mktemp("datasets")
    prepare(config(write_txt(root / "text", texts(200)), root / "data"), 300, progress=False)
    return root / "data"


def settings(directory: Path, **data: Any) -> Config:
    cfg = Config()
    cfg.model.vocab_size, cfg.train.seq_length = 512, LENGTH
    cfg.data = config(directory, directory, **data)
    return cfg


def write(prefix: Path, documents: list[list[int]]) -> str:
    """A Megatron dataset as another program would write it."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for document in documents:
        builder.add_document(np.array(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def test_a_run_that_reads_its_text_very_often_is_told(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    cfg = settings(directory)
    held = json.loads((directory / "manifest.json").read_text())["tokens"]
    build_datasets(cfg, 100 * held // LENGTH, 0, 0)
    assert caplog.messages == []
    build_datasets(cfg, 100 * held // LENGTH + 1, 0, 0)
    assert f"reads the {held:,} tokens of data.dir={directory} 100 times" in caplog.text


def test_a_sample_is_text_with_the_next_token_as_label(directory: Path) -> None:
    cfg = settings(directory)
    train, valid, test = build_datasets(cfg, 40, 8, 8)
    assert len(train) >= 40
    assert len(valid) >= 8
    assert len(test) >= 8
    sample = train[0]
    assert sorted(sample) == ["labels", "loss_mask", "position_ids", "tokens"]
    assert sample["tokens"].dtype == sample["labels"].dtype == torch.int64
    assert torch.equal(sample["tokens"][1:], sample["labels"][:-1])
    assert sample["loss_mask"].tolist() == [1.0] * LENGTH
    assert sample["position_ids"].tolist() == list(range(LENGTH))
    assert load_tokenizer(cfg.data).decode(sample["tokens"].tolist()).isascii()


def test_no_document_is_in_two_splits_and_all_are_in_one(directory: Path) -> None:
    splits = [
        set(dataset.indices.tolist()) for dataset in build_datasets(settings(directory, split="80,15,5"), 9, 9, 9)
    ]
    assert [len(split) for split in splits] == [160, 30, 10]
    assert set.union(*splits) == set(range(200))


def test_the_order_depends_on_the_seed_and_is_the_same_again_from_the_cache(directory: Path) -> None:
    def order(seed: int) -> list[list[int]]:
        cfg = settings(directory)
        cfg.seed = seed
        data = build_datasets(cfg, 20, 0, 0)[0]
        return [data[i]["tokens"].tolist() for i in range(20)]

    first = order(1)
    assert order(1) == first
    assert order(2) != first


def order(cfg: Config, samples: int) -> list[list[int]]:
    data = build_datasets(cfg, samples, 0, 0)[0]
    assert len(data) >= samples
    return [data[i]["tokens"].tolist() for i in range(samples)]


def per_epoch(cfg: Config) -> int:
    return len(build_datasets(cfg, 1, 0, 0)[0])


def test_a_longer_run_continues_the_same_order(directory: Path) -> None:
    cfg = settings(directory)
    epoch = per_epoch(cfg)
    assert order(cfg, 3 * epoch)[: epoch + 10] == order(cfg, epoch + 10)
    cfg.data.shuffle = "run"
    assert order(cfg, 3 * epoch)[: epoch + 10] != order(cfg, epoch + 10)


def test_the_first_epoch_is_ordered_as_upstream_orders_a_single_one(directory: Path) -> None:
    cfg = settings(directory)
    first = order(cfg, per_epoch(cfg))
    cfg.data.shuffle = "run"
    assert order(cfg, len(first)) == first


def test_each_epoch_has_each_document_once_in_another_order(directory: Path, tmp_path: Path) -> None:
    """Document i is 7 times the token i + 1, so that tokens say which documents were read."""
    known = write(tmp_path / "known", [[i + 1] * 7 for i in range(100)])
    cfg = settings(directory, blend=[BlendEntry(str(known), 1)], split="100,0,0")
    epoch = (7 * 100 - 1) // LENGTH
    read = np.array(run_distributed(order, 1, cfg, 2 * epoch)[0]).reshape(2, -1)
    for tokens in read:
        counts = np.bincount(tokens, minlength=101)[1:]
        assert counts.max() == 7  # never twice
        assert counts.sum() == epoch * LENGTH
        # What is left out is the end of the last documents.
        assert (counts == 7).sum() >= 95
    assert read[0].tolist() != read[1].tolist()


def test_a_longer_run_of_a_blend_continues_the_same_order(directory: Path, tmp_path: Path) -> None:
    low = write(tmp_path / "low", [[i % 100] * 50 for i in range(30)])
    high = write(tmp_path / "high", [[100 + i % 100] * 50 for i in range(30)])
    cfg = settings(directory, blend=[BlendEntry(low, 3), BlendEntry(high, 1)])
    (short,), (long,) = (run_distributed(order, 1, cfg, samples) for samples in (150, 400))
    assert long[:150] == short


def test_only_what_is_asked_for_is_built_and_needs_text(tmp_path: Path) -> None:
    data = config(write_txt(tmp_path / "text", texts(3)), tmp_path / "data")
    prepare(data, 300, progress=False)
    train, valid, test = build_datasets(settings(tmp_path / "data"), 10, 0, 0)
    assert (len(train) >= 10, valid, test) == (True, None, None)
    for sizes, name in (((10, 4, 0), "validation"), ((10, 0, 4), "test")):
        with pytest.raises(
            DataError, match=rf"the {name} split of data\.split=90,5,5 has no sequence of 32 tokens.*use more"
        ):
            build_datasets(settings(tmp_path / "data"), *sizes)
    with pytest.raises(DataError, match=r"data\.split=100,0,0 has no validation text"):
        build_datasets(settings(tmp_path / "data", split="100,0,0"), 10, 4, 0)


def test_documents_are_kept_apart_where_that_is_asked_for(directory: Path) -> None:
    cfg = settings(directory, reset_at_eod=True)
    cfg.train.seq_length = 256
    data = build_datasets(cfg, 8, 0, 0)[0]
    schedule = BatchSchedule.constant(2)
    batch = next(BatchIterator(data, dp_rank=0, dp_size=1, micro_batch_size=2, schedule=schedule, packed=True))
    tokens, positions = batch["tokens"].view(2, 256), batch["position_ids"].view(2, 256)
    ends = (tokens == load_tokenizer(cfg.data).eod).int()
    assert (ends.sum(1) >= 1).all()
    begins = {0, 256, 512, *((ends.flatten().nonzero().flatten() + 1).tolist())}
    assert batch["cu_seqlens"].tolist() == sorted(begins)
    for own_ends, own_positions, loss_mask in zip(ends, positions, batch["loss_mask"].view(2, 256), strict=True):
        document = torch.cumsum(own_ends, 0) - own_ends  # the end token belongs to the document that it ends
        assert torch.equal(own_positions, torch.arange(256) - torch.searchsorted(document, document))
        assert torch.equal(loss_mask, 1.0 - own_ends)


def both_kinds(cfg: Config) -> tuple[list[int], list[list[int]]]:
    """How many of 200 samples are from each dataset of a blend, and the first samples, on this rank."""
    train = build_datasets(cfg, 200, 4, 0)[0]
    kinds = [int(train[i]["tokens"][0]) >= 100 for i in range(200)]
    return [kinds.count(False), kinds.count(True)], [train[i]["tokens"].tolist() for i in range(5)]


def test_a_blend_keeps_its_proportions_and_is_the_same_on_all_ranks(directory: Path, tmp_path: Path) -> None:
    low = write(tmp_path / "low", [[i % 100] * 50 for i in range(100)])
    high = write(tmp_path / "high", [[100 + i % 100] * 50 for i in range(300)])
    cfg = settings(directory, blend=[BlendEntry(low, 3), BlendEntry(high, 1)])
    (counts, samples), (others, same) = run_distributed(both_kinds, 2, cfg)
    assert counts == others == [150, 50]
    assert samples == same


def tokens_of(cfg: Config) -> list[list[list[int]]]:
    dp = dist.get_world_size()
    data = build_datasets(cfg, 24, 8, 0)[0]
    batches = BatchIterator(
        data,
        dp_rank=dist.get_rank(),
        dp_size=dp,
        micro_batch_size=2,
        schedule=BatchSchedule.constant(8),
        workers=1,
        start_sample=8,
    )
    found = [next(batches)["tokens"].tolist() for _ in range(2 * 8 // (2 * dp))]
    # One worker, and no server that imports torch again for it, which a rank would start if it were not told otherwise.
    assert len(psutil.Process().children(recursive=True)) == 1
    batches.close()
    return found


def test_ranks_together_read_what_one_rank_reads_alone_with_indices_that_rank_0_makes(directory: Path) -> None:
    cfg = settings(directory)
    cfg.seed = 77  # not in the cache yet
    first, second = run_distributed(tokens_of, 2, cfg)
    alone = BatchIterator(
        build_datasets(cfg, 24, 8, 0)[0],
        dp_rank=0,
        dp_size=1,
        micro_batch_size=2,
        schedule=BatchSchedule.constant(8),
        start_sample=8,
    )
    assert [batch for pair in zip(first, second, strict=True) for batch in pair] == [
        next(alone)["tokens"].tolist() for _ in range(8)
    ]


def test_datasets_that_cannot_be_read_are_named(directory: Path, tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", [[5] * 50] * 40)
    cfg = settings(directory, blend=[BlendEntry(prefix, 1)])

    def cause() -> str:
        with pytest.raises(DataError) as caught:
            build_datasets(cfg, 4, 0, 0)
        assert caught.value.remedy
        return str(caught.value)

    whole, index = Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()
    Path(f"{prefix}.bin").write_bytes(whole[:-2])
    assert f"{prefix}.bin is cut off: its index needs 4000 bytes, it has 3998" in cause()
    Path(f"{prefix}.bin").write_bytes(b"")
    assert f"{prefix}.bin is empty" in cause()
    Path(f"{prefix}.bin").write_bytes(whole)
    Path(f"{prefix}.idx").write_bytes(b"something else")
    assert f"{prefix}.idx is not a whole index of a Megatron dataset" in cause()
    Path(f"{prefix}.idx").write_bytes(index[:-1])
    assert f"{prefix}.idx is not a whole index of a Megatron dataset" in cause()
    Path(f"{prefix}.idx").unlink()
    assert f"data.blend names {prefix}.idx, which is not there" in cause()


def test_a_model_with_fewer_tokens_than_the_tokenizer_is_refused(directory: Path) -> None:
    cfg = settings(directory)
    cfg.model.vocab_size = 256
    with pytest.raises(DataError, match=r"the tokenizer has 300 tokens, model\.vocab_size only 256"):
        build_datasets(cfg, 4, 0, 0)


def test_a_dataset_made_again_at_one_place_is_not_read_through_old_indices(tmp_path: Path, directory: Path) -> None:
    """Upstream names its caches after the path of a dataset."""
    (tmp_path / "tokenizer.json").write_bytes((directory / "tokenizer.json").read_bytes())
    cfg = settings(tmp_path, blend=[BlendEntry(str(tmp_path / PREFIX), 1)])
    assert run_distributed(tokens_seen, 1, cfg, write(tmp_path / PREFIX, [[5] * 100] * 40)) == [[5]]
    assert run_distributed(tokens_seen, 1, cfg, write(tmp_path / PREFIX, [[6] * 40] * 80)) == [[6]]


def tokens_seen(cfg: Config, _: str) -> list[int]:
    data = build_datasets(cfg, 50, 0, 0)[0]
    return sorted({int(token) for i in range(50) for token in data[i]["tokens"]})


def test_a_cut_index_of_the_cache_is_explained(directory: Path) -> None:
    cfg = settings(directory)
    cfg.seed = 78
    build_datasets(cfg, 10, 0, 0)
    for file in (directory / "cache").rglob("*shuffle_index.npy"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DataError, match=r"the indices in .*cache.* cannot be made or read.*; delete .*cache"):
        build_datasets(cfg, 10, 0, 0)


def sizes_of(cfg: Config, samples: int) -> tuple[int, int]:
    train = build_datasets(cfg, samples, 0, 0)[0]
    return len(train), sum(len(train[i]["tokens"]) == LENGTH for i in range(len(train)))


def test_a_blend_of_many_small_datasets_with_unequal_weights_runs_out_of_none(directory: Path, tmp_path: Path) -> None:
    """Each has ten sequences. Upstream rounds the samples of each up, and then asks the first one for 26 of ten."""
    prefixes = [write(tmp_path / f"{i}", [[i] * 50] * 7) for i in range(21)]
    blend = [BlendEntry(prefixes[0], 90), *(BlendEntry(prefix, 0.5) for prefix in prefixes[1:])]
    ((length, whole),) = run_distributed(sizes_of, 1, settings(directory, blend=blend, split="100,0,0"), 10)
    assert length >= 10
    assert whole == length


def test_a_blend_without_weights_takes_each_dataset_by_its_tokens(directory: Path, tmp_path: Path) -> None:
    low = write(tmp_path / "low", [[i % 100] * 50 for i in range(300)])
    high = write(tmp_path / "high", [[100 + i % 100] * 50 for i in range(100)])
    ((counts, _),) = run_distributed(both_kinds, 1, settings(directory, blend=[BlendEntry(low), BlendEntry(high)]))
    assert counts == [150, 50]


def test_indices_can_be_kept_elsewhere_and_a_directory_that_cannot_be_written_is_explained(
    directory: Path, tmp_path: Path
) -> None:
    cfg = settings(directory, cache_dir=str(tmp_path / "indices"))
    cfg.seed = 79
    build_datasets(cfg, 10, 0, 0)
    assert list((tmp_path / "indices").rglob("*shuffle_index.npy"))
    (tmp_path / "file").write_text("")
    cfg.data.cache_dir = str(tmp_path / "file")
    with pytest.raises(DataError, match=r"cannot be written to .*: Not a directory; set data\.cache_dir"):
        build_datasets(cfg, 10, 0, 0)


def test_a_dataset_of_other_than_integers_is_refused(directory: Path, tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", [[5] * 50] * 40)
    index = bytearray(Path(f"{prefix}.idx").read_bytes())
    index[17] = 7  # float32
    Path(f"{prefix}.idx").write_bytes(index)
    with pytest.raises(DataError, match=r"a\.idx says that tokens are of type 7, not an integer"):
        build_datasets(settings(directory, blend=[BlendEntry(prefix, 1)]), 4, 0, 0)
