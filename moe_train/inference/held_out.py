"""Continuations of held-out text, which a run shows at its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from moe_train.inference import uncached
from moe_train.inference.engine import EngineOptions
from moe_train.inference.opening import least_block_size, open_engine, unsupported
from moe_train.inference.sampling_params import SamplingParams
from moe_train.ranks import RankContext
from moe_train.run import Run

PROMPT_TOKENS = 48
NEW_TOKENS = 24


@dataclass(frozen=True)
class Continuation:
    """A held-out text, token ids: prompt, the model's continuation, and the true continuation."""

    prompt: list[int]
    model: list[int]
    text: list[int]


def continue_held_out(run: Run, count: int) -> list[Continuation]:
    """The model's greedy continuations of `count` texts of `run.valid_data` (fewer if it is smaller).

    Every rank must call this. It returns the same on all of them.
    """
    available = len(run.valid_data)
    count = min(count, available)
    if count == 0:
        return []
    length = run.cfg.train.seq_length
    prompt = min(PROMPT_TOKENS, length // 2)
    new = min(NEW_TOKENS, length - prompt)
    texts = [torch.as_tensor(run.valid_data[i * available // count]["tokens"]).tolist() for i in range(count)]
    continued = continue_prompts(run, run.chunks, [text[:prompt] for text in texts], new)
    return [
        Continuation(text[:prompt], own, text[prompt : prompt + new])
        for text, own in zip(texts, continued, strict=True)
    ]


def continue_prompts(
    ranks: RankContext, chunks: Sequence[nn.Module], prompts: Sequence[list[int]], count: int
) -> list[list[int]]:
    """The `count` most probable next tokens of each prompt; the prompts have the same length.

    A model that the engine cannot run is continued without a cache: the tokens are the same, but take longer.
    """
    if unsupported(ranks) is not None:
        tokens: list[list[int]] = uncached.continue_prompts(ranks, chunks, torch.tensor(prompts), count).tolist()
        return tokens
    block_size = max(EngineOptions.block_size, least_block_size(ranks))
    options = EngineOptions(len(prompts) * -(-(len(prompts[0]) + count) // block_size), block_size)
    with open_engine(ranks, chunks, options) as engine:
        return [output.completions[0].tokens for output in engine.generate(prompts, SamplingParams(count))]
