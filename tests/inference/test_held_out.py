"""Continuations of held-out text, by the engine and without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_train.inference import held_out, uncached
from tests.checkpoint import small_run
from tests.distributed.helper import run_distributed


def _held_out(degrees: dict[str, int], changes: dict[str, Any], cached: bool) -> list[held_out.Continuation]:
    """With only one of the two ways to generate."""
    with pytest.MonkeyPatch.context() as patch:
        if cached:
            patch.delattr(uncached, "continue_prompts")
        else:
            patch.delattr(held_out, "open_engine")
        run = small_run.prepare(small_run.config(Path("unused"), degrees, **changes))
        run.valid_data = [{"tokens": torch.arange(16) + i} for i in range(8)]
        found = held_out.continue_held_out(run, 2)
    assert all(chunk.training for chunk in run.chunks)
    assert not run.expert_load.counts.any()  # the text is no part of what training measures
    return found


def test_held_out_texts_are_spread_over_the_data_and_split_in_prompt_and_rest() -> None:
    first, second = run_distributed(_held_out, 1, {}, {}, True)[0]
    assert first.prompt == list(range(8))
    assert first.text == list(range(8, 16))
    assert second.prompt == list(range(4, 12))
    assert len(first.model) == 8


def _after_a_step(changes: dict[str, Any]) -> list[list[int]]:
    changes = {"optimizer__lr": 0.02, "schedule__warmup_steps": 0, **changes}
    run = small_run.prepare(small_run.config(Path("unused"), {}, **changes))
    small_run.train(run, 1)
    prompts = [list(range(i, i + 6)) for i in range(4)]
    before = held_out.continue_prompts(run, run.chunks, prompts, 10)
    small_run.train(run, 1)
    after = held_out.continue_prompts(run, run.chunks, prompts, 10)
    assert before != after
    return before + after


def test_a_run_that_gathers_parameters_late_continues_text_between_steps() -> None:
    late = {"parallel__overlap_param_gather": True, "parallel__overlap_grad_reduce": True}
    now, delayed = (run_distributed(_after_a_step, 2, changes) for changes in ({}, late))
    assert delayed == now


def test_a_model_whose_experts_have_a_capacity_is_continued_without_a_cache() -> None:
    first, _ = run_distributed(_held_out, 1, {}, {"model__capacity_factor": 2.0}, False)[0]
    assert len(first.model) == 8
