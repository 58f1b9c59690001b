"""Requests in JSON lines."""

from __future__ import annotations

import json
import re

import pytest

from moe_train.inference.sampling_params import SamplingParams
from parallel.errors import ConfigError, DataError
from tools.prompts import read_lines

HUGE = 10**400


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ({"prompt": "\ud800"}, "in.jsonl, line 2 is not valid Unicode text; write surrogates in pairs"),
        ({"prompt": "a", "stop": ["\udc00"]}, "line 2 is not valid Unicode text"),
        ({"prompt": "a", "id": {"\ud800": 1}}, "line 2 is not valid Unicode text"),
        ({"prompt": "a", "temperature": float("nan")}, "line 2 has temperature=nan, which is not a number"),
        ({"prompt": "a", "temperature": float("inf")}, "line 2 has temperature=inf, which is not a number"),
    ],
)
def test_the_line_is_named(line: object, told: str) -> None:
    with pytest.raises(DataError, match=re.escape(told)):
        read_lines('{"prompt": "good \\ud83c\\udf4f"}\n' + json.dumps(line), "in.jsonl")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_k", HUGE), ("top_k", 2**31), ("n", 10**9), ("n", 1025), ("max_new_tokens", 2**31), ("seed", 2**63),
        ("seed", -HUGE), ("top_logprobs", HUGE), ("prompt_logprobs", HUGE), ("temperature", HUGE),
        ("temperature", 1e-7), ("temperature", 1e7), ("temperature", float("nan")), ("repetition_penalty", HUGE),
        ("repetition_penalty", 0), ("presence_penalty", -HUGE), ("frequency_penalty", float("nan")), ("top_p", HUGE),
    ],
)  # fmt: skip
def test_numbers_without_bounds_are_refused(name: str, value: float) -> None:
    """In JSON a number can have any size."""
    lines = json.dumps({"prompt": "a", name: value})
    if name in ("top_k", "n", "seed", "temperature") and value == value:
        assert read_lines(lines, "in.jsonl")[0].changes == {name: value}
    with pytest.raises(ConfigError, match=f"^{name}=.{{1,50}} is outside its range; set {name} to "):
        SamplingParams(**{name: value})  # type: ignore[arg-type]


def test_the_largest_values_are_allowed() -> None:
    SamplingParams(
        max_new_tokens=2**31 - 1, temperature=1e6, top_k=2**31 - 1, seed=-(2**63), n=1024, top_logprobs=2**31 - 1,
        prompt_logprobs=2**31 - 1, repetition_penalty=1e6, presence_penalty=-1e6,
    )  # fmt: skip
