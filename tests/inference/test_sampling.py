"""Tokens are drawn from the distribution that the parameters describe, by random streams of their own."""

from __future__ import annotations

import pytest
import torch

from moe_train.inference.sampling import Sampler, SamplingParams, choose
from parallel.errors import ConfigError

LOGITS = torch.tensor([0.5, 2.0, -1.0, 1.0, 0.0, 1.9])
DRAWS = 20_000


def frequencies(**options: float) -> torch.Tensor:
    samplers = [Sampler.of(SamplingParams(seed=seed, **options), 0) for seed in range(DRAWS)]  # type: ignore[arg-type]
    return torch.bincount(choose(LOGITS.expand(DRAWS, -1), samplers), minlength=len(LOGITS)) / DRAWS


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


def test_greedy_takes_the_most_probable_token_and_no_random_number() -> None:
    sampler = Sampler.of(SamplingParams(), 0)
    before = sampler.generator.get_state()
    assert choose(LOGITS.unsqueeze(0), [sampler]).tolist() == [1]
    assert torch.equal(sampler.generator.get_state(), before)


def test_a_row_does_not_depend_on_the_others() -> None:
    def sampler(seed: int) -> Sampler:
        return Sampler.of(SamplingParams(temperature=1.0, top_p=0.9, seed=seed), 0)

    rows = torch.randn(5, 40, generator=torch.Generator().manual_seed(2))
    together = choose(rows, [sampler(seed) for seed in range(5)]).tolist()
    assert together == [choose(rows[i : i + 1], [sampler(i)]).item() for i in range(5)]
    mixed = [sampler(0), Sampler.of(SamplingParams(), 0), sampler(2)]
    assert choose(rows[:3], mixed).tolist() == [together[0], rows[1].argmax().item(), together[2]]


def test_completions_of_a_prompt_have_streams_of_their_own() -> None:
    params = SamplingParams(temperature=1.0, seed=3)
    assert Sampler.of(params, 0).uniform() == Sampler.of(params, 0).uniform()
    assert Sampler.of(params, 0).uniform() != Sampler.of(params, 1).uniform()


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_new_tokens", 0), ("temperature", -1.0), ("temperature", float("nan")), ("top_k", -1), ("top_p", 0.0),
     ("top_p", 1.1), ("min_p", -0.1), ("min_p", 1.1), ("n", 0), ("top_logprobs", -1)],
)  # fmt: skip
def test_a_value_outside_its_range_is_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{name}=.* is outside its range; set {name} to"):
        SamplingParams(**{name: value})  # type: ignore[arg-type]
