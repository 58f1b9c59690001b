"""Tiny random Hugging Face models of every family, with the structure that real ones have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.conversion import reference

VOCABULARY = 300  # no multiple of 128, so that padding is seen
SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "attn_implementation": "eager",
}  # fmt: skip
MLA = {
    "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12,
    "v_head_dim": 10, "intermediate_size": 96, "moe_intermediate_size": 32, "n_routed_experts": 8,
    "n_shared_experts": 2, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
    "routed_scaling_factor": 2.5,
}  # fmt: skip
YARN = {
    "rope_theta": 10000.0, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64,
    "beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.8,
}  # fmt: skip
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "intermediate_size": 96}

# Name -> (transformers class stem, settings).
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v3": ("DeepseekV3", {**MLA, "rope_parameters": YARN, "num_nextn_predict_layers": 0}),
    "deepseek_v2": ("DeepseekV2", {**MLA, "topk_method": "group_limited_greedy", "rope_parameters": YARN}),
    "deepseek_v2_lite": ("DeepseekV2", {**MLA, "q_lora_rank": None, "n_group": 1, "topk_method": "greedy"}),
    "mixtral": ("Mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 48}),
    "qwen3_moe": ("Qwen3Moe", {**EXPERTS, "head_dim": 20, "norm_topk_prob": True, "mlp_only_layers": [0]}),
    "qwen2_moe": ("Qwen2Moe", {**EXPERTS, "shared_expert_intermediate_size": 40, "norm_topk_prob": False}),
    "olmoe": ("Olmoe", {"num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 48}),
    "glm4_moe": ("Glm4Moe", {
        "moe_intermediate_size": 32, "intermediate_size": 96, "num_experts_per_tok": 2, "head_dim": 16,
        "n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1,
        "n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5, "attention_bias": True, "use_qk_norm": True,
        "partial_rotary_factor": 0.5, "num_nextn_predict_layers": 0,
    }),
    "glm4_moe_lite": ("Glm4MoeLite", {**MLA, "mlp_layer_types": ["dense"] + ["sparse"] * 3}),
    "minimax_m2": ("MiniMaxM2", {
        "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 48, "head_dim": 20,
        "rope_parameters": {"rope_theta": 5e6, "rope_type": "default", "partial_rotary_factor": 0.4},
    }),
    "llama": ("Llama", {"intermediate_size": 96}),
    "llama3_tied": ("Llama", {
        "intermediate_size": 96, "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_theta": 1e6, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    }),
}  # fmt: skip
DENSE = ("llama", "llama3_tied")
IN_TRANSFORMERS = tuple(MODELS)
# Its code comes with its weights and is not part of transformers: `reference.py` has what it computes.
MODELS["deepseek_moe"] = ("Llama", {"num_key_value_heads": 4, "intermediate_size": 96})
DEEPSEEK_MOE = {
    "model_type": "deepseek", "architectures": ["DeepseekForCausalLM"], "n_routed_experts": 8, "n_shared_experts": 2,
    "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1, "moe_layer_freq": 1,
    "norm_topk_prob": False, "scoring_func": "softmax", "aux_loss_alpha": 0.001, "seq_aux": True,
}  # fmt: skip


def build(name: str, **changes: Any) -> Any:
    """A transformers model with random weights of every kind: no norm is 1, no bias is 0. `changes` are settings."""
    stem, settings = MODELS[name]
    config = getattr(transformers, f"{stem}Config")(**(SMALL | settings | changes))
    torch.manual_seed(len(name))
    model = getattr(transformers, f"{stem}ForCausalLM")(config).eval()
    if name == "deepseek_moe":
        reference.add_experts(model, DEEPSEEK_MOE)
    with torch.no_grad():
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in key:
                tensor.uniform_(0.5, 1.5)
            elif key.endswith(("bias", "e_score_correction_bias")):
                tensor.normal_(0, 0.1)
            elif tensor.dim() > 1:
                tensor.normal_(0, 0.08)
    return model


def save(name: str, directory: Path, **changes: Any) -> Any:
    """Write the model of that name, with `changes` of its settings, as transformers does; returns it."""
    model = build(name, **changes)
    write(model, name, directory)
    return model


def write(model: Any, name: str, directory: Path) -> None:
    """Write a model that `build` made."""
    model.save_pretrained(directory)
    if name == "deepseek_moe":
        held = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        edit(directory, lambda old: (old.clear(), old.update(held)), **DEEPSEEK_MOE)


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a Hugging Face directory."""
    return {
        name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def edit(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any], **settings: Any) -> None:
    """Change the tensors of a directory with a single file, and settings of its config.json."""
    file = directory / "model.safetensors"
    held = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(held)
    save_file(held, file, metadata={"format": "pt"})
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
