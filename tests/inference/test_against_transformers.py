"""The engine on Hugging Face directories of several families, against the `generate` of transformers."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from moe_train.checkpoint import weights
from moe_train.conversion import hf_config
from moe_train.inference.engine import Engine, EngineOptions
from moe_train.inference.sampling_params import SamplingParams
from moe_train.ranks import build_model
from tests.checkpoint import small_run
from tests.conversion import models
from tests.distributed.helper import run_distributed

NEW = 10
FAMILIES = ("deepseek_v3", "deepseek_v2_lite", "qwen3_moe", "minimax_m2")
"""Latent attention with YaRN, and without q_lora; norms of each head, and over all heads with partial rotary."""


def prompts() -> list[list[int]]:
    draw = random.Random(3)
    return [[draw.randrange(models.VOCABULARY) for _ in range(length)] for length in (3, 17, 9)]


def by_engine(directories: list[Path]) -> list[list[list[int]]]:
    found = []
    for directory in directories:
        cfg = small_run.config(Path("unused"), {}, model=hf_config.to_model(hf_config.read(directory)))
        ranks = small_run.join(cfg)
        chunks = build_model(ranks)
        weights.load(ranks, chunks, directory)
        with Engine(ranks, chunks, EngineOptions(num_blocks=32, block_size=4, max_batch_tokens=16)) as engine:
            outputs = engine.generate(prompts(), SamplingParams(max_new_tokens=NEW))
        found.append([output.completions[0].tokens for output in outputs])
    return found


def test_greedy_tokens_are_those_of_transformers(tmp_path: Path) -> None:
    theirs = []
    for name in FAMILIES:
        model = models.save(name, tmp_path / name)
        model.generation_config.eos_token_id = None
        with torch.no_grad():
            texts = [
                model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False)[0, len(prompt) :].tolist()
                for prompt in prompts()
            ]
        theirs.append(texts)
    (ours,) = run_distributed(by_engine, 1, [tmp_path / name for name in FAMILIES])
    for name, own, other in zip(FAMILIES, ours, theirs, strict=True):
        assert len({tuple(text) for text in other}) > 1, name
        assert own == other, name
