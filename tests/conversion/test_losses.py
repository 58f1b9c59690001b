"""Losses and gradients of every family are transformers', for every size of the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_train.checkpoint import checkpoint
from moe_train.loop import forward, step
from moe_train.objectives.reduction import reduce
from tests.checkpoint import small_run
from tests.conversion import models, ranks
from tests.conversion.convert import convert
from tests.distributed.helper import run_distributed

# Name -> (model, size of its vocabulary, settings that differ). No vocabulary is a multiple of 128.
CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "deepseek_v3": ("deepseek_v3", 301, {}),
    "deepseek_v3, without query compression, groups and yarn": (
        "deepseek_v3", 1003, {"q_lora_rank": None, "n_group": 1, "rope_parameters": None},
    ),
    "deepseek_v2": ("deepseek_v2", 129, {}),
    "deepseek_v2_lite": ("deepseek_v2_lite", 127, {}),
    "deepseek_moe": ("deepseek_moe", 257, {}),
    "mixtral": ("mixtral", 1003, {}),
    "mixtral, tied": ("mixtral", 385, {"tie_word_embeddings": True}),
    "qwen3_moe": ("qwen3_moe", 301, {}),
    "qwen3_moe, tied": ("qwen3_moe", 130, {"tie_word_embeddings": True}),
    "qwen2_moe": ("qwen2_moe", 127, {}),
    "olmoe": ("olmoe", 2, {"pad_token_id": None}),
    "glm4_moe": ("glm4_moe", 129, {}),
    "glm4_moe_lite": ("glm4_moe_lite", 385, {}),
    "minimax_m2": ("minimax_m2", 127, {}),
    "llama": ("llama", 1003, {}),
    "llama3_tied": ("llama3_tied", 301, {}),
}  # fmt: skip
MOE = [case for case in CASES if not case.startswith("llama")]
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4
Sources = dict[str, tuple[Path, int]]


def texts(vocabulary: int) -> torch.Tensor:
    """Token ids [samples, s + 1], the highest among them."""
    generator = torch.Generator().manual_seed(vocabulary)
    ids = torch.randint(0, vocabulary, (small_run.BATCH, small_run.SEQUENCE + 1), generator=generator)
    ids[0, 1] = vocabulary - 1
    return ids


def batches(run: Any, vocabulary: int) -> Iterator[dict[str, torch.Tensor]]:
    """Each data-parallel rank's rows of `texts`, one a micro-batch, over and over."""
    rows = texts(vocabulary)[run.layout.coordinates(run.rank.rank).dp :: run.layout.dp]
    length = small_run.SEQUENCE
    while True:
        for row in rows:
            yield {
                "tokens": row[None, :-1].contiguous(), "labels": row[None, 1:].contiguous(),
                "loss_mask": torch.ones(1, length), "position_ids": torch.arange(length)[None],
            }  # fmt: skip


def ours(sources: Sources, work: Path, degrees: small_run.Degrees) -> dict[str, tuple[float, float, Path]]:
    """Validation and training loss of each model in this layout, and a checkpoint with its gradients as weights."""
    found = {}
    for number, (name, (source, vocabulary)) in enumerate(sources.items()):
        # The distributed optimizer would leave each rank the sums of a part of its gradients.
        run = ranks.load(source, work / str(number), degrees, parallel__distributed_optimizer=False)
        valid = step.evaluate(run, [batches(run, vocabulary) for _ in run.chunks], 1).loss
        assert valid is not None
        data = [batches(run, vocabulary) for _ in run.chunks]
        losses = forward.forward_backward(run, run.chunks, run.objective, data, small_run.BATCH, forward_only=False)
        for chunk in run.chunks:
            for parameter in chunk.parameters():
                parameter.data.copy_(parameter.main_grad)
        loss = reduce(run.objective, losses, run.device).loss
        assert loss is not None
        found[name] = (valid, loss, Path(checkpoint.save(run)))
    return found


def theirs(name: str, directory: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """Transformers' loss and gradients, under the names that it saves weights with."""
    model_name, vocabulary, changes = CASES[name]
    model = models.build(model_name, vocab_size=vocabulary, **changes)
    ids = texts(vocabulary)
    loss = model(ids, labels=ids).loss
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    models.write(model, model_name, directory)
    held = models.tensors(directory)
    return float(loss), {key: tensor for key, tensor in held.items() if not key.endswith("e_score_correction_bias")}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[float, dict[str, torch.Tensor]]]:
    """Transformers' losses and gradients."""
    root = tmp_path_factory.mktemp("gradients")
    return {name: theirs(name, root / str(number)) for number, name in enumerate(CASES)}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """Directories with the weights."""
    root = tmp_path_factory.mktemp("weights")
    for number, (model, vocabulary, changes) in enumerate(CASES.values()):
        models.save(model, root / str(number), vocab_size=vocabulary, **changes)
    return {name: (root / str(number), CASES[name][1]) for number, name in enumerate(CASES)}


LAYOUTS: dict[str, small_run.Degrees] = {
    "single": {},
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
    "ep2": {"ep": 2},
    "tp2 pp2 ep2": {"tp": 2, "pp": 2, "ep": 2},
    "tp4": {"tp": 4},
}
QUICK = ("single", "tp2")


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in LAYOUTS]
)
def test_losses_and_gradients_are_those_of_transformers(
    layout: str, sources: Sources, expected: dict[str, tuple[float, dict[str, torch.Tensor]]], tmp_path: Path
) -> None:
    degrees = LAYOUTS[layout]
    names = MOE if "ep" in degrees else list(CASES)
    if layout == "tp4":  # as many key/value heads as ranks
        names = [name for name in names if name.startswith("deepseek")]
    world = degrees.get("tp", 1) * degrees.get("pp", 1) * (2 if layout == "ep2" else 1)
    found = run_distributed(ours, world, {n: sources[n] for n in names}, tmp_path, degrees, timeout_s=400)[0]
    for name in names:
        loss, gradients = expected[name]
        valid, trained, saved = found[name]
        assert (valid, trained) == pytest.approx((loss, loss), abs=LOSS_TOLERANCE), name
        back = tmp_path / f"{saved.parent.parent.name}-hf"
        convert(saved, back)
        compare(name, gradients, models.tensors(back))


def compare(name: str, right: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> None:
    """Each gradient, relative to its norm."""
    assert len(right) > 20, name
    for key, gradient in right.items():
        error = float((found[key].float() - gradient.float()).norm())
        assert error <= GRADIENT_TOLERANCE * float(gradient.norm()) + 1e-7, f"{name}: gradient of {key} is {error} off"
