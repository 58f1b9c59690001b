"""The loss leaves out the rows that pad the vocabulary, with every kernel and in every layout of ranks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state as ps
from megatron.core.models.common.language_module.language_module import LanguageModule
from torch import Tensor
from torch.nn.functional import cross_entropy

from moe_train.config.model import ModelConfig
from moe_train.loop import step
from moe_train.model.local import loss
from parallel import groups, runtime
from parallel.layout import ParallelLayout
from parallel.rank_info import RankInfo
from tests.checkpoint import small_run
from tests.conversion import ranks
from tests.distributed.helper import run_distributed

VOCABULARY, PADDED = 301, 384  # over four ranks the last one has 13 rows of it and 83 of padding
KERNELS = {"own": (True, False), "upstream": (False, False), "upstream, fused": (False, True)}


def kernels() -> dict[tuple[str, int], dict[str, Tensor]]:
    """`kernel` with each kernel and size of the vocabulary, on tensor-parallel ranks."""
    world, rank = dist.get_world_size(), dist.get_rank()
    runtime.start("cpu", RankInfo(rank, world, rank, world, "127.0.0.1", 0, "local"), 60)
    groups.create(ParallelLayout.resolve(tp=world, pp=1, vpp=1, cp=1, ep=1, etp=1, world_size=world), 1)
    return {(name, size): kernel(size, *KERNELS[name]) for name in KERNELS for size in (2, VOCABULARY, PADDED)}


def kernel(vocabulary: int, own: bool, fused: bool) -> dict[str, Tensor]:
    """Losses and gradients of this rank's part of random logits, and those of torch's cross entropy."""
    world, rank = dist.get_world_size(), dist.get_rank()
    generator = torch.Generator().manual_seed(5)
    dtype = torch.bfloat16 if fused else torch.float32  # the fused kernel rounds gradients to bf16
    whole = torch.randn(7, 2, PADDED, generator=generator).mul_(3).to(dtype)
    labels = torch.randint(0, vocabulary, (2, 7), generator=generator)
    weights = torch.rand(2, 7, generator=generator)
    config = SimpleNamespace(cross_entropy_loss_fusion=fused, cross_entropy_fusion_impl="native")
    tp_group = ps.get_tensor_model_parallel_group()
    model = SimpleNamespace(config=config, pg_collection=SimpleNamespace(tp=tp_group), tp_group=tp_group)
    model.compute_language_model_loss = lambda *given: LanguageModule.compute_language_model_loss(model, *given)
    loss.replace_loss(model, vocabulary, own)
    leaf = whole.chunk(world, dim=-1)[rank].clone().requires_grad_()
    losses = model.compute_language_model_loss(labels, leaf * 1)
    (losses * weights).sum().backward()
    exact = whole[..., :vocabulary].float().requires_grad_()
    expected = cross_entropy(exact.flatten(0, 1), labels.t().flatten(), reduction="none").view(7, 2).t()
    (expected * weights).sum().backward()
    gradient = torch.nn.functional.pad(exact.grad, (0, PADDED - vocabulary)).chunk(world, dim=-1)[rank]
    return {"losses": losses.detach(), "gradient": leaf.grad, "expected": expected.detach(), "right": gradient}


@pytest.mark.parametrize("world", [1, 2, 4])
def test_kernels_compute_the_cross_entropy_of_the_vocabulary_alone(world: int) -> None:
    """Also where some ranks have padding alone."""
    for rank, results in enumerate(run_distributed(kernels, world, timeout_s=300)):
        for (name, vocabulary), found in results.items():
            tolerance = {"rtol": 1e-2, "atol": 1e-3} if "fused" in name else {"rtol": 1e-5, "atol": 1e-6}
            torch.testing.assert_close(found["losses"], found["expected"], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(found["gradient"].float(), found["right"], **tolerance)
            columns = PADDED // world
            padding = found["gradient"][..., max(0, min(vocabulary - rank * columns, columns)) :]
            assert not padding.any(), f"{name}: a row that pads {vocabulary} tokens has a gradient"


def reference(run: Any) -> tuple[float, float] | None:
    """Mean losses of the next token and of the one after it, from the logits of the run by torch's cross entropy; None
    where this rank has no logits. Every rank calls it."""
    found = ranks.outputs(run)
    if not found["logits"]:
        return None
    next_token, after = [], []
    for sample, logits in found["logits"].items():
        text = torch.randint(0, small_run.VOCABULARY, (small_run.SEQUENCE + 1,),
                             generator=torch.Generator().manual_seed(sample))  # fmt: skip
        next_token.append(cross_entropy(logits[:, 0, :VOCABULARY], text[1:]))
        predicted = found["prediction_logits"][sample]
        after.append(cross_entropy(predicted[:-1, 0, :VOCABULARY], text[2:]))
    return float(torch.stack(next_token).mean()), float(torch.stack(after).mean())


def padding_of(run: Any) -> dict[str, Tensor]:
    """Rows that pad the vocabulary on this rank, by parameter."""
    found = {}
    for name, parameter in run.chunks[-1].named_parameters():
        if name.endswith(("word_embeddings.weight", "output_layer.weight")):
            first = ps.get_tensor_model_parallel_rank() * len(parameter)
            found[name] = parameter.detach()[max(0, VOCABULARY - first) :]
    return found


def trained(run_dir: Path, degrees: small_run.Degrees, changes: dict[str, Any], filled: float = 0.0) -> dict[str, Any]:
    """Losses before and in training, with `filled` in all rows that pad the vocabulary."""
    run = small_run.prepare(small_run.config(run_dir, degrees, model__vocab_size=VOCABULARY, **changes))
    for rows in padding_of(run).values():
        assert not rows.any(), "rows that pad the vocabulary begin as zeros"
        rows.fill_(filled)
    run.optimizer.reload_model_params()
    expected = reference(run)
    valid = step.evaluate(run, small_run.batches(run), 1).loss
    steps = [step.train_step(run, small_run.batches(run)) for _ in range(3)]
    padding = [float(rows.abs().max()) for rows in padding_of(run).values() if rows.numel()]
    return {
        "expected": expected, "valid": valid, "predicted": steps[0].get("mtp_loss"), "padding": padding,
        "losses": [s["lm_loss"] for s in steps], "norms": [s["grad_norm"] for s in steps],
    }  # fmt: skip


@pytest.mark.parametrize("degrees", [{}, {"tp": 2}, {"tp": 4}, {"tp": 2, "pp": 2}], ids=str)
def test_a_run_reports_the_loss_of_its_vocabulary(degrees: small_run.Degrees, tmp_path: Path) -> None:
    """Against torch's cross entropy of the run's own logits, in multi-token prediction too; padding stays zero."""
    (alone,) = run_distributed(trained, 1, tmp_path, {}, {})
    world = degrees.get("tp", 1) * degrees.get("pp", 1)
    for found in run_distributed(trained, world, tmp_path, degrees, {}, timeout_s=300):
        if found["expected"] is not None:
            assert (found["valid"], found["predicted"]) == pytest.approx(found["expected"], rel=1e-5)
        assert found["valid"] == pytest.approx(alone["valid"], rel=1e-6)
        assert found["losses"] == pytest.approx(alone["losses"], rel=1e-4)
        assert found["norms"] == pytest.approx(alone["norms"], rel=1e-3)
        assert not any(found["padding"])


@pytest.mark.parametrize("changes", [{}, {"model__tie_embeddings": True, "model__mtp_num_layers": 1}], ids=str)
def test_what_is_in_the_padding_changes_nothing(changes: dict[str, Any], tmp_path: Path) -> None:
    """Checkpoints of before have trained rows there."""
    results = [run_distributed(trained, 1, tmp_path, {}, changes, filled)[0] for filled in (0.0, 3.0)]
    for name in ("valid", "losses", "norms", "predicted"):
        assert results[0][name] == results[1][name], name


def with_more_padding(run_dir: Path) -> dict[str, Any]:
    """`trained` with a vocabulary that is padded to 512 rows."""
    ModelConfig.padded_vocab_size = property(lambda model: 512)  # type: ignore[method-assign, assignment]
    return trained(run_dir, {}, {})


def test_more_padding_changes_nothing(tmp_path: Path) -> None:
    (usual,), (more,) = run_distributed(trained, 1, tmp_path, {}, {}), run_distributed(with_more_padding, 1, tmp_path)
    for name in ("valid", "losses", "norms", "predicted"):
        assert more[name] == pytest.approx(usual[name], rel=1e-6), name


def of_vocabulary(run_dir: Path, vocabulary: int) -> float:
    """Validation loss of an untrained model."""
    run = small_run.prepare(small_run.config(run_dir, {}, model__vocab_size=vocabulary))
    loss_before = step.evaluate(run, small_run.batches(run), 1).loss
    assert loss_before is not None
    return loss_before


def test_vocabularies_with_the_same_padding_have_different_losses(tmp_path: Path) -> None:
    """An untrained model spreads its probability over more tokens."""
    losses = [run_distributed(of_vocabulary, 1, tmp_path, size)[0] for size in (VOCABULARY, PADDED)]
    assert losses[1] - losses[0] == pytest.approx(torch.log(torch.tensor(PADDED / VOCABULARY)).item(), rel=0.1)
