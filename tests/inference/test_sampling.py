"""Tokens are drawn from the distribution that the parameters describe, by random streams of their own."""

from __future__ import annotations

import math

import pytest
import torch

from moe_train.inference.sampling import TokenChoice, choose, gumbel_noise
from moe_train.inference.sampling_params import SamplingParams
from parallel.errors import ConfigError

LOGITS = torch.tensor([0.5, 2.0, -1.0, 1.0, 0.0, 1.9])
DRAWS = 20_000


def frequencies(**options: float) -> torch.Tensor:
    choices = [TokenChoice(SamplingParams(seed=seed, **options), 0, 0) for seed in range(DRAWS)]  # type: ignore[arg-type]
    return torch.bincount(choose(LOGITS.expand(DRAWS, -1), choices), minlength=len(LOGITS)) / DRAWS


def expected(temperature: float, kept: list[int]) -> torch.Tensor:
    probabilities = torch.zeros_like(LOGITS)
    probabilities[kept] = (LOGITS[kept] / temperature).softmax(dim=0)
    return probabilities


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"temperature": 1.0}, [0, 1, 2, 3, 4, 5]),
        ({"temperature": 2.5}, [0, 1, 2, 3, 4, 5]),
        ({"temperature": 1.0, "top_k": 3}, [1, 3, 5]),
        ({"temperature": 1.0, "top_p": 0.8}, [1, 3, 5]),  # 0.379 + 0.343 + 0.139 is the first sum above it
        ({"temperature": 1.0, "top_p": 0.7}, [1, 5]),
        ({"temperature": 1.0, "top_p": 1e-6}, [1]),
        ({"temperature": 1.0, "min_p": 0.3}, [1, 3, 5]),  # the others have less than 0.23 of the largest probability
        ({"temperature": 1.0, "min_p": 0.5}, [1, 5]),
        ({"temperature": 1.0, "min_p": 1.0}, [1]),
        ({"temperature": 0.01}, [1, 5]),
    ],
)
def test_tokens_have_the_probabilities_of_the_parameters(options: dict[str, float], kept: list[int]) -> None:
    wanted, found = expected(options["temperature"], kept), frequencies(**options)
    error = (wanted * (1 - wanted) / DRAWS).sqrt()
    assert ((found - wanted).abs() <= 4.5 * error).all()


def test_greedy_takes_the_most_probable_token_for_any_seed() -> None:
    assert {
        choose(LOGITS.unsqueeze(0), [TokenChoice(SamplingParams(seed=seed), 0, 0)]).item() for seed in range(20)
    } == {1}


def test_a_row_does_not_depend_on_the_others() -> None:
    def choice(seed: int) -> TokenChoice:
        return TokenChoice(SamplingParams(temperature=1.0, top_p=0.9 if seed % 2 else 1.0, seed=seed), 0, 0)

    rows = torch.randn(5, 40, generator=torch.Generator().manual_seed(2))
    together = choose(rows, [choice(seed) for seed in range(5)]).tolist()
    assert together == [choose(rows[i : i + 1], [choice(i)]).item() for i in range(5)]
    mixed = [choice(0), TokenChoice(SamplingParams(), 0, 0), choice(2)]
    assert choose(rows[:3], mixed).tolist() == [together[0], rows[1].argmax().item(), together[2]]


def test_seeds_completions_and_positions_have_independent_noise() -> None:
    params = [SamplingParams(temperature=1.0, seed=seed) for seed in range(2)]
    choices = [TokenChoice(p, completion, position) for p in params for completion in (0, 1) for position in range(500)]
    assert len({choice.noise_seed for choice in choices}) == len(choices)
    noise = gumbel_noise([choice.noise_seed for choice in choices], torch.empty(len(choices), 50))
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)  # of the Gumbel distribution: Euler's constant
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.05)
    correlations = torch.corrcoef(noise.unflatten(0, (4, 500)).flatten(1)) - torch.eye(4)
    assert correlations.abs().max() < 0.03
    neighbours = torch.corrcoef(torch.stack([noise[:, :-1].flatten(), noise[:, 1:].flatten()]))[0, 1]
    assert neighbours.abs() < 0.02


def test_penalties_change_the_logits_of_tokens_that_were_there() -> None:
    prompt, generated = [1, 4, 2], [3, 3, 2]

    def argmax_with(**options: float) -> int:
        params = SamplingParams(**options)  # type: ignore[arg-type]
        return int(choose(LOGITS.unsqueeze(0), [TokenChoice(params, 0, 3, prompt, generated)]))

    before = LOGITS.clone()
    assert argmax_with(repetition_penalty=1.04) == 1  # 2.0 / 1.04 > 1.9
    assert argmax_with(repetition_penalty=1.06) == 5
    assert argmax_with(repetition_penalty=0.4) == 1
    assert argmax_with(presence_penalty=-1.2) == 3
    assert argmax_with(presence_penalty=-0.9) == 1  # 3 is there once for this penalty
    assert argmax_with(frequency_penalty=-0.6) == 3  # and twice for this one
    assert torch.equal(LOGITS, before)


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_new_tokens", -1), ("temperature", -1.0), ("temperature", float("nan")), ("top_k", -1), ("top_p", 0.0),
     ("top_p", 1.1), ("min_p", -0.1), ("min_p", 1.1), ("n", 0), ("top_logprobs", -1),
     ("prompt_logprobs", -1), ("repetition_penalty", 0.0), ("presence_penalty", float("inf")),
     ("frequency_penalty", float("nan"))],
)  # fmt: skip
def test_a_value_outside_its_range_is_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{name}=.* is outside its range; set {name} to"):
        SamplingParams(**{name: value})  # type: ignore[arg-type]
