"""What models compute that transformers does not have, written from their papers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.ModuleList):
    """Called with tokens [t, hidden], chosen experts [t, k] and their weights [t, k]."""

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        rows = [
            sum(weight * self[int(expert)](token) for expert, weight in zip(experts, of_token, strict=True))
            for token, experts, of_token in zip(x, chosen, weights, strict=True)
        ]
        return torch.stack(rows)


class DeepSeekMoE(nn.Module):
    """Shared experts, and routed ones weighted by a softmax over all (arXiv 2401.06066, equations 9 to 11)."""

    def __init__(self, hidden: int, settings: dict[str, Any]) -> None:
        super().__init__()
        inner, count = settings["moe_intermediate_size"], settings["n_routed_experts"]
        self.topk = settings["num_experts_per_tok"]
        self.gate = nn.Linear(hidden, count, bias=False)
        self.experts = Experts(SwiGLU(hidden, inner) for _ in range(count))
        self.shared_experts = SwiGLU(hidden, inner * settings["n_shared_experts"])

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.size(-1))
        weights, chosen = self.gate(tokens).softmax(dim=-1).topk(self.topk)
        return self.experts(tokens, chosen, weights).view_as(x) + self.shared_experts(x)


def add_experts(llama: Any, settings: dict[str, Any]) -> None:
    """Make DeepSeek-MoE-16B's architecture of a Llama model with as many key/value heads as heads."""
    for layer in llama.model.layers[settings["first_k_dense_replace"] :]:
        layer.mlp = DeepSeekMoE(llama.config.hidden_size, settings)


# configuration_deepseek.py of huggingface.co/deepseek-ai/deepseek-moe-16b-base: transformers has no such class.
DEEPSEEK_MOE_DEFAULTS: dict[str, Any] = {
    "vocab_size": 102400, "hidden_size": 4096, "intermediate_size": 11008, "moe_intermediate_size": 1407,
    "num_hidden_layers": 30, "num_attention_heads": 32, "num_key_value_heads": 32, "n_shared_experts": None,
    "n_routed_experts": None, "num_experts_per_tok": None, "moe_layer_freq": 1, "first_k_dense_replace": 0,
    "norm_topk_prob": False, "scoring_func": "softmax", "aux_loss_alpha": 0.001, "seq_aux": True, "hidden_act": "silu",
    "max_position_embeddings": 2048, "initializer_range": 0.02, "rms_norm_eps": 1e-6, "use_cache": True,
    "pad_token_id": None, "bos_token_id": 100000, "eos_token_id": 100001, "pretraining_tp": 1,
    "tie_word_embeddings": False, "rope_theta": 10000.0, "rope_scaling": None, "attention_bias": False,
    "attention_dropout": 0.0,
}  # fmt: skip
