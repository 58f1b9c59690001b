"""`optimizer.groups` on the ranks: names, learning rates and weight decays of Megatron-Core's parameter groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_train.config.optimizer import ParameterGroup
from moe_train.config.parameter_groups import group_of, named_parameters, weight_decay_of
from moe_train.config.schema import Config
from tests.checkpoint import small_run
from tests.distributed.helper import run_distributed

GROUPS = [
    ParameterGroup("decoder.layers.1.mlp.router.weight", lr_multiplier=0.1, weight_decay=0.0),
    ParameterGroup("*layernorm.weight", weight_decay=0.05),
    ParameterGroup("*.experts.*", lr_multiplier=2.0),
]
ROUTER = "decoder.layers.1.mlp.router.weight"
LR, DECAY = 3e-4, 0.1


def settings(run_dir: Path, degrees: dict[str, int], groups: list[ParameterGroup], **changes: Any) -> Config:
    constant = {"schedule__decay": "constant", "schedule__warmup_steps": 0}
    return small_run.config(run_dir, degrees, optimizer__groups=groups, **constant | changes)


def found(run_dir: Path, degrees: dict[str, int], changes: dict[str, Any]) -> dict[str, tuple[float, float, bool]]:
    """Name of each of this rank's parameters -> learning rate, weight decay, and whether its name is right."""
    from moe_train.optim.names import global_names

    run = small_run.prepare(settings(run_dir, degrees, GROUPS, **changes))
    names = {id(parameter): name for parameter, name in global_names(run.chunks).items()}
    rates: dict[int, tuple[float, float]] = {}
    for group in run.optimizer.param_groups:
        for parameter in group["params"]:  # without the distributed optimizer these are the model's own
            rates[id(parameter)] = (group["lr"], group["weight_decay"])
    own = {id(p): name for chunk in run.chunks for name, p in chunk.module.named_parameters()}
    # A name in the model ends as that in the checkpoint, but for norms, which Transformer Engine fuses, and experts.
    right = {
        key: own[key].rpartition(".")[2] == name.rpartition(".")[2] or "norm" in own[key] for key, name in names.items()
    }
    return {name: (*rates[key], right[key]) for key, name in names.items()}


@pytest.mark.parametrize(
    ("world", "degrees", "changes"),
    [(2, {"pp": 2}, {}), (2, {"tp": 2, "ep": 2}, {}), (1, {}, {"model__num_experts": 0})],
    ids=["pp2", "tp2 ep2", "dense"],
)
def test_each_parameter_gets_what_its_entry_says(
    tmp_path: Path, world: int, degrees: dict[str, int], changes: dict[str, Any]
) -> None:
    changes = {"parallel__distributed_optimizer": False, **changes}
    if changes.get("model__num_experts") == 0:
        changes |= {"model__num_shared_experts": 0, "model__router_bias": False, "model__balance_losses": [],
                    "model__balance_loss_coeffs": [], "model__num_dense_layers": 0}  # fmt: skip
    cfg = settings(tmp_path, degrees, GROUPS, **changes)
    expected = {}
    for name, tensor in named_parameters(cfg.model):
        index = group_of(name, GROUPS)
        group = None if index is None else GROUPS[index]
        rate = LR * (group.lr_multiplier if group else 1.0)
        expected[name] = (pytest.approx(rate), pytest.approx(weight_decay_of(group, len(tensor.shape), DECAY)), True)
    together: dict[str, tuple[float, float, bool]] = {}
    for part in run_distributed(found, world, tmp_path, degrees, changes):
        together |= part
    assert together == expected


def step_of_router(run_dir: Path, groups: list[ParameterGroup]) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The router's weight before the first update, its change, and the learning rate in the metrics."""
    from moe_train.loop import step
    from moe_train.optim.names import global_names

    run = small_run.prepare(settings(run_dir, {}, groups))
    router = next(p for p, name in global_names(run.chunks).items() if name == ROUTER)
    before = router.detach().clone()
    metrics = step.train_step(run, small_run.batches(run))
    return before, router.detach() - before, metrics["lr"]


def test_an_update_is_scaled_and_decays_as_its_entry_says(tmp_path: Path) -> None:
    """AdamW changes a weight by -lr (u + decay w), where u depends on gradients only, which are the same here."""
    ((before, change, rate),) = run_distributed(step_of_router, 1, tmp_path, [])
    ((same, scaled, _),) = run_distributed(step_of_router, 1, tmp_path, GROUPS[:1])
    ((_, _, of_others),) = run_distributed(step_of_router, 1, tmp_path, [ParameterGroup("*", lr_multiplier=5.0)])
    assert torch.equal(before, same)
    torch.testing.assert_close(10 * scaled, change + LR * DECAY * before, rtol=1e-3, atol=1e-8)
    assert rate == of_others == pytest.approx(LR)
