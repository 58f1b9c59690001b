"""What ranks do with Hugging Face weights in the tests. Called on every rank by `run_distributed`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as ps
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.router import TopKRouter

from moe_train.checkpoint import checkpoint
from moe_train.conversion import hf_config as config
from moe_train.loop import forward
from moe_train.run import Run
from tests.checkpoint import small_run

Degrees = dict[str, int]


def load(source: Path, run_dir: Path, degrees: Degrees, described: Path | None = None, **changes: Any) -> Run:
    """A run in this layout that starts with the weights at `source`, of the model of the config.json at `described`."""
    cfg = small_run.config(run_dir, degrees, **changes)
    cfg.model = config.to_model(config.read(described or source))
    cfg.init_from, cfg.resume = str(source), "never"
    run = small_run.prepare(cfg)
    checkpoint.resume(run)
    return run


def outputs(run: Run) -> dict[str, Any]:
    """Logits [samples, s, vocabulary] of the evaluation batch, and chosen experts [samples, s, experts] by layer.

    Each rank returns what it has: {"logits": {sample: ...}, "routes": {(layer, sample): ...}}.
    """
    logits: list[torch.Tensor] = []
    routes: dict[int, list[torch.Tensor]] = {}
    hooks = []
    for chunk in run.chunks:
        chunk.eval()
        for module in chunk.modules():
            if isinstance(module, GPTModel) and module.post_process:
                # The loss overwrites logits in place.
                hooks.append(module.output_layer.register_forward_hook(lambda m, i, o: logits.append(o[0].clone())))
            if isinstance(module, TopKRouter):
                routes[module.layer_number] = held = []
                hooks.append(module.register_forward_hook(lambda m, i, o, held=held: held.append(o[1].clone())))
    with torch.no_grad():
        forward.forward_backward(
            run, run.chunks, run.objective, small_run.batches(run), small_run.BATCH, forward_only=True
        )
    for hook in hooks:
        hook.remove()
    dp, dp_rank = run.layout.dp, run.layout.coordinates(run.rank.rank).dp
    calls = len(logits) // run.micro_batches if logits else 0
    heads = 1 + run.cfg.model.mtp_num_layers
    found: dict[str, Any] = {"logits": {}, "prediction_logits": {}, "routes": {}}
    for i in range(len(logits) // heads if calls else 0):
        *prediction, main = logits[i * heads : (i + 1) * heads]  # upstream uses the head for the predictions first
        found["logits"][dp_rank + i * dp] = _gather(main, -1)
        if prediction:
            found["prediction_logits"][dp_rank + i * dp] = _gather(prediction[0], -1)
    for layer, held in routes.items():
        for i, chosen in enumerate(held):
            found["routes"][layer, dp_rank + i * dp] = _gather(chosen, 0, run.config.sequence_parallel)
    return found


def _gather(part: torch.Tensor, dim: int, split: bool = True) -> torch.Tensor:
    """The whole tensor from those of the tensor-parallel ranks."""
    group = ps.get_tensor_model_parallel_group()
    if group.size() == 1 or not split:
        return part
    parts = [torch.empty_like(part) for _ in range(group.size())]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts, dim=dim)


def load_and_save(sources: dict[str, tuple[Path, Path]], work: Path, degrees: Degrees) -> dict[str, dict[str, Any]]:
    """For each model, whose Hugging Face and Megatron directories are given: its outputs in this layout, where the
    checkpoint is that this layout saves, and whether loading the Hugging Face directory gives the same weights."""
    found = {}
    for name, (described, weights) in sources.items():
        run = load(weights, work / name, degrees, described)
        found[name] = outputs(run) | {"saved": checkpoint.save(run)}
        same = small_run.bits(run) == small_run.bits(load(described, work / name, degrees))
        found[name]["same_from_hf"] = same
    return found


def in_bf16(described: Path, weights: Path, work: Path, degrees: Degrees) -> bool:
    """Whether both ways of loading agree bit by bit in bf16 too, fp32 master weights included."""
    loaded = [load(w, work, degrees, described, precision__dtype="bf16") for w in (weights, described)]
    return small_run.bits(loaded[0]) == small_run.bits(loaded[1])
