"""What is changed in place in a model that Megatron-Core has built: the list is in order, and complete."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from moe_train.config.schema import Config
from moe_train.model import surgery
from tests.checkpoint import small_run
from tests.distributed.helper import run_distributed
from tests.syntax import assigned, root_name

ROOT = Path(__file__).parents[2]
ALL = [
    "mark expert parameters",
    "epsilon of latent norms",
    "shared-expert gates on the device",
    "token dispatchers",
    "loss without vocabulary padding",
    "GEMM of the output layer",
    "activation offloading",
    "training precision",
    "initial weights",
]
CHANGES = {
    "moe_train/model/kernels/gemm.py: layer._forward_impl",
    "moe_train/model/local/dispatch.py: dispatcher.recipe",
    "moe_train/model/local/dispatch.py: layer.token_dispatcher",
    "moe_train/model/local/loss.py: model.compute_language_model_loss",
    "moe_train/model/local/offload.py: model.activation_offload",
    "moe_train/model/local/offload.py: model.forward",
    "moe_train/model/precision.py: setattr(module, name, buffer)",
    "moe_train/model/surgery.py: module.gate_weight",
    "moe_train/model/surgery.py: moved.sequence_parallel",
    "moe_train/model/surgery.py: norm.eps",
    "moe_train/model/surgery.py: parameter.allreduce",
}
"""Attributes that functions of the list set."""
ENTRIES = (
    "replace_dispatchers", "replace_forward", "replace_loss", "wrap_forward", "in_training_precision", "initialise",
)  # fmt: skip
"""Functions in other files that the list calls."""
OTHERS = {
    "moe_train/checkpoint/state.py: tensor.key": "an entry of a checkpoint's request",
    "moe_train/checkpoint/storage.py: _Plan.last": "our own class",
    "moe_train/data/datasets.py: config.mid_level_dataset_surplus": "config of a dataset",
    "moe_train/model/build.py: setattr(config, name, value)": "TransformerConfig, before a model is built",
    "moe_train/model/fp8/delayed_scaling.py: scale.latest": "our own class",
    "moe_train/model/kernels/gemm.py: weight.grad_added_to_main_grad": "how a layer tells DDP's hook of a gradient",
    "moe_train/model/kernels/cpu_gemm.py: onednn.enabled": "a switch of torch, set back at once",
    "moe_train/model/local/norm.py: norm.weight.sequence_parallel": "a module that our own spec makes",
    "moe_train/model/local/router.py: submodules.router": "a module spec, before a model is built",
    "moe_train/inference/engine.py: entry.sequence.draft": "our own class",
    "moe_train/inference/upstream_engine.py: config.inference_moe_token_dispatcher_type": "a copy of the config",
    "moe_train/inference/upstream_engine.py: wrapper.vocabulary": "our own class",
    "moe_train/inference/worker.py: instructions.added": "our own class",
    "moe_train/inference/worker.py: instructions.step": "our own class",
    "moe_train/inference/worker.py: update.finish_reason": "our own class",
    "moe_train/inference/worker.py: update.text": "our own class",
    "moe_train/model/attention_modules.py: attention.module": "a module spec",
    "moe_train/model/attention_modules.py: attention.submodules.k_layernorm": "a module spec",
    "moe_train/model/attention_modules.py: attention.submodules.q_layernorm": "a module spec",
    "moe_train/model/specs.py: submodules.linear_fc1": "a module spec",
    "moe_train/model/specs.py: submodules.linear_fc2": "a module spec",
    "moe_train/optim/optimizer.py: config.finalize_model_grads_func": "a field that upstream has for the trainer",
    "moe_train/optim/qk_clip.py: attention.core_attention.current_max_attn_logits": "a record that its reader resets",
    "moe_train/optim/optimizer.py: config.grad_scale_func": "a field that upstream has for the trainer",
    "moe_train/optim/optimizer.py: config.no_sync_func": "a field that upstream has for the trainer",
    **dict.fromkeys(
        (
            "moe_train/optim/scheduling.py: config.moe_aux_loss_coeff",
            "moe_train/optim/scheduling.py: config.moe_router_bias_update_rate",
            "moe_train/optim/scheduling.py: config.mtp_loss_scaling_factor",
        ),
        "TransformerConfig: what follows a schedule, which upstream reads in each step",
    ),
    "moe_train/optim/optimizer.py: part.optimizer": "Megatron-Core's optimizer, not a module",
    "moe_train/telemetry/model_metrics.py: compute.observe": "our own class",
    "moe_train/telemetry/model_metrics.py: dispatcher.sent_bytes": "our own class",
    "moe_train/telemetry/saved_tensors.py: offload.observe": "our own class",
}
"""Attributes of other objects that are set, and what those objects are."""


def target(*, local: bool = True, post: bool = True, weights: bool = True, **config: Any) -> surgery.Target:
    """A chunk that gets every change of its backend."""
    cfg = Config()
    cfg.model.latent_norm_epsilon, cfg.model.shared_expert_gate, cfg.model.num_experts = 1e-6, True, 8
    cfg.recompute.offload = "memory"
    sizes = {"expert_tensor_parallel_size": 1, "tensor_model_parallel_size": 2, "bf16": True, "fp16": False}
    options: Any = SimpleNamespace(**sizes | config)
    return surgery.Target(cfg, options, local=local, post=post, weights=weights)


def names(of: surgery.Target) -> list[str]:
    return [change.name for change in surgery.changes_of(of)]


def test_changes_are_applied_in_order_and_under_their_conditions() -> None:
    """Offloading wraps the forward pass that earlier changes made; the cast needs all parameters, the weights it."""
    assert [change.name for change in surgery.CHANGES] == ALL
    assert names(target()) == ALL
    own = {"token dispatchers", "GEMM of the output layer", "activation offloading"}
    assert names(target(local=False)) == [name for name in ALL if name not in own]
    assert names(target(post=False)) == [name for name in ALL if name not in ALL[4:6]]
    assert names(target(weights=False)) == ALL[:-2]
    assert names(target(bf16=False)) == [name for name in ALL if name != "training precision"]
    assert names(target(tensor_model_parallel_size=1)) == ALL[1:]
    plain = target(local=False, post=False, weights=False, tensor_model_parallel_size=1)
    plain.cfg.model.latent_norm_epsilon, plain.cfg.model.shared_expert_gate = None, False
    assert names(plain) == []


def test_each_change_says_why() -> None:
    assert all(len(change.why) > 40 and change.why.endswith(".") for change in surgery.CHANGES)


def test_a_change_may_replace_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def change(name: str, result: Any) -> surgery.Change:
        def apply(chunk: Any, _: surgery.Target) -> Any:
            order.append(f"{name} on {chunk}")
            return result

        return surgery.Change(name, "", lambda _: name != "never", apply)

    changes = (change("first", None), change("wrap", "wrapped"), change("never", "lost"), change("last", None))
    monkeypatch.setattr(surgery, "CHANGES", changes)
    plain: Any = "plain"
    assert surgery.operate(plain, target()) == "wrapped"  # type: ignore[comparison-overlap]
    assert order == ["first on plain", "wrap on plain", "last on wrapped"]


def _assigned(tree: ast.Module) -> Iterator[str]:
    """Attributes that a file sets of objects other than its own `self`, a run, or autograd's context."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "delattr"):
            yield ast.unparse(node)
        for target in assigned(node):
            if isinstance(target, ast.Attribute) and root_name(target) not in ("self", "cls", "ctx", "run"):
                yield ast.unparse(target)


def test_no_other_code_sets_attributes_of_upstreams_modules() -> None:
    """A new assignment belongs into the list of changes, or with its reason into `OTHERS`."""
    found: set[str] = set()
    callers: set[str] = set()
    for path in sorted((ROOT / "moe_train").rglob("*.py")):
        text, name = path.read_text(encoding="utf-8"), str(path.relative_to(ROOT))
        tree = ast.parse(text)
        if "import torch" in text or "from torch" in text or "from megatron" in text:
            found |= {f"{name}: {assigned}" for assigned in _assigned(tree)}
        calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
        callers |= {name for call in calls if call.rpartition(".")[2] in ENTRIES}
    assert found == CHANGES | OTHERS.keys()
    assert callers == {"moe_train/model/surgery.py"}


def recorded(run_dir: Path) -> set[tuple[str, str]]:
    """(file, attribute) of every attribute of a module that our code sets from outside of it, in a whole run."""
    found: set[tuple[str, str]] = set()
    upstream = nn.Module.__setattr__

    def record(module: nn.Module, name: str, value: Any) -> None:
        frame = sys._getframe(1)
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT / "moe_train") and frame.f_locals.get("self") is not module:
            found.add((str(path.relative_to(ROOT)), name))
        upstream(module, name, value)

    nn.Module.__setattr__ = record  # type: ignore[assignment, method-assign]
    from moe_train.checkpoint import checkpoint
    from moe_train.inference import held_out
    from moe_train.loop import step

    changes = {
        "model__latent_norm_epsilon": 1e-6, "model__shared_expert_gate": True, "precision__dtype": "bf16",
        "recompute__offload": "memory", "recompute__offload_min_bytes": 1,
    }  # fmt: skip
    run = small_run.prepare(small_run.config(run_dir, {}, **changes))
    small_run.train(run, 1)
    step.evaluate(run, small_run.batches(run), 1)
    checkpoint.save(run)
    checkpoint.resume(run)
    prompts = next(small_run.samples_from(run, 0))["tokens"][:, :4].tolist()
    held_out.continue_prompts(run, run.chunks, prompts, 2)
    return found


def test_a_run_changes_modules_only_by_the_list(tmp_path: Path) -> None:
    (found,) = run_distributed(recorded, 1, tmp_path)
    assert found == {
        ("moe_train/model/kernels/gemm.py", "_forward_impl"),
        ("moe_train/model/local/dispatch.py", "token_dispatcher"),
        ("moe_train/model/local/loss.py", "compute_language_model_loss"),
        ("moe_train/model/local/offload.py", "activation_offload"),
        ("moe_train/model/local/offload.py", "forward"),
        ("moe_train/model/precision.py", "expert_bias"),
        ("moe_train/model/precision.py", "local_tokens_per_expert"),
        ("moe_train/model/surgery.py", "eps"),
        ("moe_train/model/surgery.py", "gate_weight"),
    }
