"""A trained model in several layouts, from a run and from its export."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch.distributed as dist

from moe_train.checkpoint import continuing
from moe_train.config.inference import EngineConfig
from moe_train.config.roots import InferenceRoot
from moe_train.formats import run_directory
from moe_train.inference import loading, source
from moe_train.inference.engine import Engine, EngineOptions
from moe_train.inference.sampling_params import SamplingParams
from parallel import groups
from parallel.architecture.kv_cache import bytes_per_token
from parallel.errors import CheckpointError, ConfigError
from parallel.rank_info import RankInfo
from tests.distributed.helper import run_distributed

STEP = run_directory.name_of(2)


def load(path: Path, degrees: dict[str, int]) -> loading.LoadedModel:
    root = InferenceRoot()
    for name, degree in degrees.items():
        setattr(root.parallel, name, degree)
    cfg = source.config_of(source.find(path), root, [f"parallel.{name}={value}" for name, value in degrees.items()])
    groups.destroy()
    rank, world = dist.get_rank(), dist.get_world_size()
    return loading.load(cfg, RankInfo(rank, world, rank, world, "127.0.0.1", 0, "local"))


def generated(paths: list[Path], degrees: dict[str, int]) -> list[list[int]]:
    texts = []
    for path in paths:
        model = load(path, degrees)
        assert not any(hasattr(chunk, "ddp_config") for chunk in model.chunks)
        with Engine(model.ranks, model.chunks, EngineOptions(num_blocks=16)) as engine:
            (output,) = engine.generate([model.tokenizer.encode("some text")], SamplingParams(max_new_tokens=12))
            texts.append(output.completions[0].tokens)
    return texts


def test_every_form_of_a_model_generates_the_same_in_every_layout(trained: Path) -> None:
    run = trained / "run"
    ((first, *others),) = run_distributed(generated, 1, [run, run / continuing.EXPORTS / STEP], {})
    assert len(set(first)) > 4
    assert others == [first]
    assert run_distributed(generated, 2, [run / "checkpoints" / STEP], {"tp": 2, "ep": 2}) == [[first]] * 2


def sizes(path: Path) -> list[int]:
    ranks = load(path, {"tp": 2}).ranks
    per_token = bytes_per_token(ranks.cfg.model, "fp32", None, tp=2)
    roomy = EngineConfig(memory_gib=100 * 16 * per_token / 2**30)
    with pytest.raises(ConfigError, match=r"engine.memory_gib=1e-06 is less than one block .*; set engine.memory_gib="):
        loading.engine_options(ranks, EngineConfig(memory_gib=1e-6))
    found = [
        loading.engine_options(ranks, roomy),
        # Four layers, and one of multi-token prediction.
        loading.engine_options(ranks, dataclasses.replace(roomy, speculate=True)),
        loading.engine_options(ranks, EngineConfig(num_blocks=7, block_size=4, cache_format="int8")),
        loading.engine_options(ranks, EngineConfig(max_sequences=3), longest=33),
        # Ranks with different memory take what all of them have.
        loading.engine_options(ranks, EngineConfig(num_blocks=20 + dist.get_rank())),
    ]
    assert (found[2].block_size, found[2].cache_format) == (4, "int8")
    assert [options.speculate for options in found[:2]] == [False, True]
    return [options.num_blocks for options in found]


def test_the_cache_has_the_size_that_is_asked_for_on_every_rank(trained: Path) -> None:
    assert run_distributed(sizes, 2, trained / "run") == [[100, 80, 7, 9, 20]] * 2


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(path, {})
    return str(caught.value)


def test_weights_that_are_not_what_was_written_are_refused(trained: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(trained / "run" / "checkpoints" / STEP, tmp_path / "checkpoints" / STEP)
    file = next(checkpoint.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    (told,) = run_distributed(refused, 1, checkpoint)
    assert "is damaged" in told
    assert "with source=PATH" in told
