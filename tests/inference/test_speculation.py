"""Speculation with multi-token prediction changes how many passes a text takes, and not the text."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from megatron.core.utils import unwrap_model

from moe_train.inference import context
from moe_train.inference.engine import Engine, EngineOptions
from moe_train.inference.sampling_params import SamplingParams
from moe_train.inference.speculation import (
    PAUSE,
    PLAIN_EVERY,
    SpeculationControl,
    SpeculationStatistics,
    _PassComparison,
)
from parallel.errors import ConfigError
from tests.checkpoint import small_run
from tests.distributed.helper import run_distributed
from tests.inference.test_engine import SHAPES, built, prompts, texts

NEW = 16


def options(**changes: Any) -> EngineOptions:
    return EngineOptions(**{"num_blocks": 64, "block_size": 4, "max_batch_tokens": 16, "speculate": True} | changes)


def generated(
    degrees: dict[str, Any], changes: dict[str, Any], speculate: bool = True
) -> tuple[list[list[int]], list[int]]:
    """Greedy and drawn texts, and how many drafts were verified by depth."""
    ranks, chunks = built(degrees, changes)
    with Engine(ranks, chunks, options(speculate=speculate)) as engine, pytest.MonkeyPatch.context() as patch:
        patch.setattr(SpeculationControl, "note", lambda *args: None)  # decides by time
        outputs = engine.generate(prompts(), SamplingParams(max_new_tokens=NEW))
        outputs += engine.generate(prompts(), SamplingParams(max_new_tokens=NEW, temperature=0.7, top_p=0.9, n=2))
        assert engine.num_free_blocks == engine.num_blocks
    return texts(outputs), engine.speculation.verified


def shaped(shape: str, depths: int = 1) -> dict[str, Any]:
    return {**SHAPES[shape], "model__mtp_num_layers": depths}


@pytest.mark.parametrize(("shape", "depths"), [("mla_yarn", 1), ("gqa_yarn", 1), ("mla", 2)])
def test_the_text_is_that_without_speculation(shape: str, depths: int) -> None:
    (plain,) = run_distributed(generated, 1, {}, shaped(shape, depths), False)
    (speculated,) = run_distributed(generated, 1, {}, shaped(shape, depths))
    assert speculated[0] == plain[0]
    assert plain[1] == []
    assert speculated[1][0] > 3 * NEW


def drafted(changes: dict[str, Any], gathered_tokens: int) -> int:
    """Passes for texts whose drafts come from the texts themselves, one in five of them wrong."""
    ranks, chunks = built({}, changes)
    context.GATHERED_TOKENS = gathered_tokens
    draw, passes = random.Random(5), 0
    params = SamplingParams(max_new_tokens=NEW, temperature=0.7)
    with Engine(ranks, chunks, options(speculate=False, block_size=8)) as engine:
        expected = texts(engine.generate(prompts(), params))
        numbers = [engine.add_request(prompt, params) for prompt in prompts()]
        found: dict[int, list[list[int]]] = {}
        while not engine.is_idle:
            for sequence in engine.replicas[0].running:
                text = expected[prompts().index(list(sequence.prompt))][sequence.num_new_tokens :]
                wrong = [draw.random() < 0.2 for _ in text]
                count = draw.randint(0, 4)
                pairs = zip(text[:count], wrong, strict=False)
                sequence.draft = [(token + bad) % small_run.VOCABULARY for token, bad in pairs]
            output = engine.step()
            passes += 1
            found |= {number: texts([own]) for number, own in output.finished.items()}
        assert [text for number in numbers for text in found[number]] == expected
    assert sum(engine.speculation.accepted) > sum(engine.speculation.verified) / 2
    return passes


@pytest.mark.parametrize("gathered_tokens", [context.GATHERED_TOKENS, 0])
@pytest.mark.parametrize("shape", ["mla", "gqa"])
def test_drafts_that_are_right_save_passes_and_others_change_nothing(shape: str, gathered_tokens: int) -> None:
    """Also where attention reads the tokens of each sequence where they are."""
    assert run_distributed(drafted, 1, shaped(shape), gathered_tokens)[0] < 0.75 * NEW


@pytest.mark.parametrize(
    "degrees",
    [{"tp": 2, "ep": 2}, {"pp": 2}, {"dp": 2, "ep": 2}],
    ids=lambda degrees: "".join(f"{k}{v}" for k, v in degrees.items()),
)
def test_the_text_is_the_same_in_every_layout(degrees: dict[str, int]) -> None:
    ((alone, _),) = run_distributed(generated, 1, {}, shaped("mla"), False)
    found = run_distributed(generated, 2, degrees, shaped("mla"))
    assert [own for own, _ in found] == [alone, alone]
    assert all(verified[0] > NEW for _, verified in found)


def drafts_of_training(chunks: list[Any], tokens: list[int]) -> int:
    """The token that multi-token prediction finds most probable after `tokens`, by a training forward pass."""
    (model,) = unwrap_model(list(chunks))
    logits: list[torch.Tensor] = []
    hook = model.output_layer.register_forward_hook(lambda *args: logits.append(args[-1][0].float()))
    text = torch.tensor([tokens])
    with torch.no_grad():
        chunks[0].eval()(text, torch.arange(text.size(1)).unsqueeze(0), None, labels=text)
    hook.remove()
    # It uses the output layer first. Its row of position i reads the token at i + 1.
    return int(logits[0][-2, 0, : small_run.VOCABULARY].argmax())


def compared_with_training(changes: dict[str, Any]) -> int:
    ranks, chunks = built({}, changes)
    compared = 0
    with Engine(ranks, chunks, options(max_batch_tokens=64)) as engine, pytest.MonkeyPatch.context() as patch:
        patch.setattr(SpeculationControl, "note", lambda *args: None)  # decides by time
        for prompt in prompts():
            engine.add_request(prompt, SamplingParams(max_new_tokens=NEW, temperature=1.0))
        while not engine.is_idle:
            engine.step()
            for sequence in engine.replicas[0].running:
                if sequence.draft and len(sequence.tokens) > 2:
                    assert sequence.draft == [drafts_of_training(chunks, sequence.tokens)]
                    compared += 1
    return compared


@pytest.mark.parametrize("shape", ["mla", "gqa"])
def test_drafts_are_the_predictions_of_training(shape: str) -> None:
    assert run_distributed(compared_with_training, 1, shaped(shape))[0] > 2 * NEW


def resumed() -> tuple[list[bool], int]:
    """Whether each pass made drafts, where they are measured to be slow."""
    ranks, chunks = built({}, shaped("mla"))
    drafted = []
    with Engine(ranks, chunks, options()) as engine, pytest.MonkeyPatch.context() as patch:
        patch.setattr("moe_train.inference.speculation.PAUSE", 5)
        patch.setattr(_PassComparison, "is_slower", True)
        engine.add_request([1, 2, 3], SamplingParams(max_new_tokens=40))
        control = engine._control
        assert control is not None
        while not engine.is_idle:
            drafted.append(control.drafts)
            engine.step()
    return drafted, sum(engine.speculation.verified)


def test_drafts_are_made_again_after_a_pause() -> None:
    ((drafted, verified),) = run_distributed(resumed, 1)
    first = drafted.index(False)
    assert drafted[first : first + 6] == [False] * 5 + [True]
    assert verified > 4


def refused() -> str:
    ranks, chunks = built({}, {"model__mtp_num_layers": 0})
    with pytest.raises(ConfigError) as caught:
        Engine(ranks, chunks, options())
    return str(caught.value)


def test_a_model_without_multi_token_prediction_cannot_speculate() -> None:
    assert "speculation needs multi-token-prediction layers" in run_distributed(refused, 1)[0]


def test_statistics_count_drafts_up_to_the_first_wrong_one() -> None:
    statistics = SpeculationStatistics()
    statistics.note(verified=3, accepted=1)
    statistics.note(verified=3, accepted=3)
    statistics.note(verified=1, accepted=0)
    assert statistics.verified == [3, 2, 1]
    assert statistics.accepted == [2, 1, 1]
    assert statistics.rates() == [2 / 3, 1 / 2, 1.0]


def speculating(plain_s: float, speculative_s: float, tokens: int, passes: int = 200) -> list[bool]:
    control, chosen = SpeculationControl(), []
    for _ in range(passes):
        verified = control.verifies
        chosen.append(control.drafts)
        if control.drafts:
            control.note(verified, speculative_s if verified else plain_s, 0.1, sequences=4, tokens=tokens)
        else:
            control.rest(sequences=4)
    return chosen


def test_speculation_is_kept_while_it_gives_more_tokens_a_second() -> None:
    assert all(speculating(plain_s=1.0, speculative_s=1.1, tokens=6))
    control, verified = SpeculationControl(), []
    for _ in range(2 * PLAIN_EVERY):
        verified.append(control.verifies)
        control.note(control.verifies, 1.0, 0.1, sequences=1, tokens=2 if control.verifies else 1)
    assert control.drafts
    plain = [index for index, own in enumerate(verified) if not own]
    assert plain == [1, 3, 5, 7, PLAIN_EVERY - 1, 2 * PLAIN_EVERY - 1]


def test_speculation_that_does_not_pay_off_is_paused_and_tried_again() -> None:
    chosen = speculating(plain_s=1.0, speculative_s=1.5, tokens=5, passes=2 * PAUSE)
    assert chosen.index(False) < 10
    assert 0.005 < sum(chosen) / len(chosen) < 0.03


def test_a_few_slow_passes_do_not_pause_speculation_that_pays_off() -> None:
    """The first pass of a kind compiles kernels, and another process may take the cores."""
    control = SpeculationControl()
    for number in range(4 * PLAIN_EVERY):
        slow = 20.0 if number in (0, 6, 30) else 0.0
        control.note(control.verifies, 1.2 + slow if control.verifies else 1.0, 0.1, 1, 2 if control.verifies else 1)
    assert control.drafts


def ramped(sizes: list[int], seconds: dict[int, tuple[float, float]]) -> list[bool]:
    """Whether drafts are made, in passes of so many sequences that take so long without and with drafts."""
    control, drafts = SpeculationControl(), []
    for size in sizes:
        verified, (plain, speculative) = control.verifies, seconds[size]
        drafts.append(control.drafts)
        if control.drafts:
            control.note(verified, speculative if verified else plain, 0.0, size, int((1.8 if verified else 1) * size))
        else:
            control.rest(size)
    return drafts


def test_passes_are_compared_with_those_of_as_many_sequences() -> None:
    """Each of them pays off at 10 sequences. At one it does not."""
    assert all(ramped([10] * 50 + [40] * 300 + [10] * 100, {10: (2.0, 2.4), 40: (10.0, 12.0)}))
    drafts = ramped([40] * 100 + [1] * 200 + [40] * 20, {40: (10.0, 12.0), 1: (2.0, 4.2)})
    assert all(drafts[:101])
    assert sum(drafts[100:300]) <= 10
    assert all(drafts[-19:])
