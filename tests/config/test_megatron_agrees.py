"""What `validate` lets pass, Megatron-Core's own checks let pass too: nobody meets an assertion deep in a run."""

from __future__ import annotations

import random
from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest

from moe_train.config.composition.compose import compose
from moe_train.config.composition.validate import validate
from moe_train.config.resolve import resolve
from moe_train.config.schema import Config, RecomputeStage
from moe_train.config.walk import with_values
from parallel.layout import ParallelLayout
from parallel.suggest import Impossible
from tests.model.test_cuda_config import as_if_on_cuda

CHOICES: dict[str, tuple[Any, ...]] = {
    "model.attention": ("mla", "gqa"),
    "model.rope_type": ("rope", "yarn", "llama3"),
    "model.rotary_percent": (1.0, 1.0, 0.5),
    "model.qkv_bias": (True, False, False),
    "model.latent_norm_epsilon": (None, None, 1e-5),
    "model.num_layers": (2, 4, 7),
    "model.num_attention_heads": (4, 6, 8),
    "model.num_query_groups": (0, 1, 2),
    "model.head_dim": (32,),
    "model.num_experts": (0, 8, 16),
    "model.topk": (1, 2, 4),
    "model.num_dense_layers": (0, 1),
    "model.num_shared_experts": (0, 1),
    "model.shared_expert_ffn_hidden_size": (0, 0, 96),
    "model.shared_expert_gate": (True, False, False),
    "model.router_group_score": ("sum", "max"),
    "model.router_score": ("softmax", "sigmoid"),
    "model.router_bias": (True, False),
    "model.router_pre_softmax": (True, False),
    "model.router_num_groups": (0, 4),
    "model.router_topk_groups": (0, 2),
    "model.capacity_factor": (None, 1.5),
    "model.pad_to_capacity": (True, False, False),
    "model.mtp_num_layers": (0, 1),
    "parallel.tp": (1, 2, 4),
    "parallel.pp": (1, 2, 4),
    "parallel.vpp": (1, 1, 2),
    "parallel.ep": (1, 2),
    "parallel.etp": (1, 2),
    "parallel.cp": (1, 2),
    "parallel.sequence_parallel": (None, None, True, False),
    "parallel.overlap_p2p": (None, None, True, False),
    "parallel.dispatcher": ("alltoall", "allgather"),
    "recompute.mode": ("none", "none", "none", "full", "selective"),
    "recompute.method": ("uniform", "block"),
    "recompute.num_layers": (1, 1, 2),
    "recompute.modules": ([], [], [], [], [], ["layernorm"], ["mla_up_proj", "mlp"], ["moe", "core_attn"], ["moe_act"]),
    "recompute.stages": (
        *[[]] * 12,
        [RecomputeStage("full"), RecomputeStage(modules=["layernorm", "mla_up_proj"])],
        [
            RecomputeStage("none"),
            RecomputeStage(modules=["moe"]),
            RecomputeStage("full"),
            RecomputeStage(modules=["mlp", "core_attn"]),
        ],
    ),
    "batch.global_batch_size": (8, 16, 24),
    "precision.dtype": (*["bf16"] * 9, "fp32"),
    "precision.fp8": (*[None] * 4, "block", "tensor", "delayed", "mxfp8"),
    "precision.first_last_layers_bf16": (True, *[False] * 4),
    "precision.num_layers_at_start_in_bf16": (0, 1, 3),
    "precision.num_layers_at_end_in_bf16": (0, 1, 3),
}


BACKENDS = {"local": ["runtime=cpu"], "te": ["runtime=cuda", "backend.name=te", "checkpoint.save_at_end=false"]}


def _random_configs(count: int, backend: str = "local") -> list[Config]:
    rng, base = random.Random(1), compose(BACKENDS[backend])
    drawn = [{name: rng.choice(values) for name, values in CHOICES.items()} for _ in range(count)]
    return [with_values(base, _with_effect(values)) for values in drawn]


def _mended(cfg: Config) -> tuple[Config, ParallelLayout] | None:
    """A config with the first remedy of every refusal taken, and its layout. Nearly all random ones are refused, often
    for several reasons: each remedy must do away with one."""
    last = None
    for _ in range(15):
        try:
            return cfg, validate(cfg)
        except Impossible as error:
            refused = error
        assert refused.fixes, refused
        assert refused.cause != last, f"{refused} does not help"
        cfg, last = with_values(cfg, refused.fixes[0]), refused.cause
    return None


def _with_effect(values: dict[str, Any]) -> dict[str, Any]:
    """Without what would change nothing, which nearly all configs would be refused for."""
    full = values["recompute.mode"] == "full" or any(stage.mode == "full" for stage in values["recompute.stages"])
    unused = [] if full else ["recompute.method", "recompute.num_layers"]
    if not values["precision.first_last_layers_bf16"]:
        unused += ["precision.num_layers_at_start_in_bf16", "precision.num_layers_at_end_in_bf16"]
    return {name: value for name, value in values.items() if name not in unused}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("backend", BACKENDS)
def test_megatron_core_accepts_what_passes_and_remedies_lead_there(backend: str) -> None:
    from moe_train.model.build import transformer_config

    drawn = _random_configs(500, backend)
    passed = [found for cfg in drawn if (found := _mended(cfg)) is not None]
    assert len(passed) > 0.98 * len(drawn)
    seen = Counter(cfg.precision.fp8 for cfg, _ in passed) + Counter(cfg.recompute.mode for cfg, _ in passed)
    assert min(seen[choice] for choice in ("block", "tensor", "delayed", "mxfp8", "none", "full", "selective")) > 20
    for cfg, layout in passed:
        with as_if_on_cuda() if backend == "te" else nullcontext():
            for stage in range(max(1, len(cfg.recompute.stages))):
                transformer_config(resolve(cfg, layout), stage)
        # Upstream checks these only while it builds modules or runs the schedule.
        model, micro_batches = cfg.model, cfg.batch.global_batch_size // (cfg.batch.micro_batch_size * layout.dp)
        assert model.padded_vocab_size % layout.tp == 0
        assert not model.is_moe or model.num_experts % layout.ep == 0
        assert layout.vpp == 1 or (layout.pp > 1 and micro_batches % layout.pp == 0)
        assert cfg.train.seq_length % (layout.tp * layout.cp) == 0
