"""Continuations of text are the same in every layout of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_train.inference import uncached
from tests.checkpoint import small_run
from tests.distributed.helper import run_distributed

COUNT = 6


def _prompts() -> torch.Tensor:
    return torch.randint(0, small_run.VOCABULARY, (3, 5), generator=torch.Generator().manual_seed(7))


def _continue(degrees: dict[str, int], changes: dict[str, Any], temperature: float) -> list[list[int]]:
    run = small_run.prepare(small_run.config(Path("unused"), degrees, **changes))
    tokens = uncached.continue_prompts(run, run.chunks, _prompts(), COUNT, temperature, seed=3)
    assert all(chunk.training for chunk in run.chunks)
    assert not run.expert_load.counts.any()  # the text is no part of what training measures
    return tokens.tolist()


def _alone(changes: dict[str, Any], temperature: float = 0.0) -> list[list[int]]:
    return run_distributed(_continue, 1, {}, changes, temperature)[0]


def _greedy_by_hand() -> tuple[list[list[int]], list[list[int]]]:
    """Tokens of the helper, and those of plain forward passes over texts without padding."""
    run = small_run.prepare(small_run.config(Path("unused"), {}, model__mtp_num_layers=0))
    helper = uncached.continue_prompts(run, run.chunks, _prompts(), COUNT).tolist()
    tokens = _prompts()
    with torch.no_grad():
        for _ in range(COUNT):
            positions = torch.arange(tokens.size(1)).expand_as(tokens)
            logits = run.chunks[0].eval()(tokens, positions, None)[:, -1, : small_run.VOCABULARY]
            tokens = torch.cat([tokens, logits.argmax(dim=-1, keepdim=True)], dim=1)
    return helper, tokens[:, -COUNT:].tolist()


def test_greedy_continuation_takes_the_largest_logit_of_an_unpadded_text() -> None:
    helper, by_hand = run_distributed(_greedy_by_hand, 1)[0]
    assert helper == by_hand
    assert len({tuple(row) for row in helper}) == 3  # the texts differ, so rows were not mixed up


@pytest.mark.parametrize(
    ("degrees", "ranks"),
    [
        ({"tp": 2}, 2),
        ({"pp": 2}, 2),
        ({"cp": 2}, 2),
        ({"ep": 2}, 2),
        ({"pp": 2, "vpp": 2}, 2),
        ({"tp": 2, "pp": 2, "ep": 2}, 4),
        ({"tp": 2, "cp": 2}, 4),
    ],
    ids=lambda value: "".join(f"{k}{v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_every_rank_of_every_layout_continues_as_a_single_rank(degrees: dict[str, int], ranks: int) -> None:
    alone = _alone({})
    assert run_distributed(_continue, ranks, degrees, {}, 0.0) == [alone] * ranks


def test_multi_token_prediction_layers_do_not_change_the_next_token() -> None:
    assert _alone({"model__mtp_num_layers": 1}) == _alone({"model__mtp_num_layers": 0})


def test_draws_depend_on_the_seed_and_not_on_the_layout() -> None:
    drawn = _alone({}, temperature=1.0)
    assert drawn != _alone({})
    assert run_distributed(_continue, 2, {"tp": 2}, {}, 1.0) == [drawn] * 2


def _too_long() -> str:
    run = small_run.prepare(small_run.config(Path("unused"), {}))
    with pytest.raises(ValueError, match=r"5 \+ 12 tokens do not fit into train.seq_length=16") as caught:
        uncached.continue_prompts(run, run.chunks, _prompts(), 12)
    return str(caught.value)


def test_a_continuation_that_does_not_fit_is_refused() -> None:
    assert run_distributed(_too_long, 1)


def _continue_with_likely_padding(degrees: dict[str, int], vocabulary: int, temperature: float) -> list[list[int]]:
    """The embedding has 128 rows. Those from `vocabulary` on get scores of +-100 times the sum of the hidden state."""
    run = small_run.prepare(small_run.config(Path("unused"), degrees, model__vocab_size=vocabulary))
    with torch.no_grad():
        for chunk in run.chunks:
            for name, weight in chunk.named_parameters():
                if name.endswith("output_layer.weight"):
                    first = run.rank.rank % run.layout.tp * len(weight)
                    padding = torch.arange(first, first + len(weight)) >= vocabulary
                    weight[padding] = 100.0 * (1 - 2 * (torch.arange(int(padding.sum())) % 2)).unsqueeze(1).to(weight)
    prompts = _prompts() % vocabulary
    return uncached.continue_prompts(run, run.chunks, prompts, COUNT, temperature, seed=3).tolist()


@pytest.mark.parametrize(("degrees", "ranks"), [({}, 1), ({"tp": 2}, 2)])
def test_a_row_that_pads_the_vocabulary_is_never_chosen(degrees: dict[str, int], ranks: int) -> None:
    for temperature in (0.0, 1.0):
        (tokens, *others) = run_distributed(_continue_with_likely_padding, ranks, degrees, 100, temperature)
        assert max(max(row) for row in tokens) < 100
        assert others == [tokens] * (ranks - 1)
