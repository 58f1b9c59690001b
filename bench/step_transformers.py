"""The other side of `make bench-step`: transformers' DeepseekV3ForCausalLM with the shape and the weights of ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moe_train.config.model import ModelConfig
from moe_train.config.schema import Config
from parallel.errors import HardwareError

Weights = dict[str, Tensor]


def require() -> str:
    """The version of transformers.

    Raises:
        HardwareError: it is not installed, with the line that installs it.
    """
    try:
        import transformers
    except ImportError as error:
        raise HardwareError(
            "bench-step compares with Hugging Face transformers, which is not installed",
            "install it: .venv/bin/pip install -c constraints.txt 'moe-train[hf]' or -e '.[dev,hf]'",
        ) from error
    return str(transformers.__version__)


def build(cfg: Config, weights: Weights, experts: str) -> nn.Module:
    """The model, with our `weights` (`from_megatron`) in the precision of `cfg`. `experts` is eager or grouped_mm."""
    from transformers import DeepseekV3ForCausalLM

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[cfg.precision.dtype]
    model: nn.Module = DeepseekV3ForCausalLM(_config(cfg.model, experts)).to(dtype)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if missing or unexpected:
        raise ValueError(f"weights of transformers without ours: {missing}; ours without theirs: {unexpected}")
    return model.train()


def _config(model: ModelConfig, experts: str) -> Any:
    from transformers import DeepseekV3Config

    rope = {
        "rope_type": "yarn", "rope_theta": model.rope_base, "factor": model.yarn_factor,
        "original_max_position_embeddings": model.yarn_original_max_position, "beta_fast": model.yarn_beta_fast,
        "beta_slow": model.yarn_beta_slow, "mscale": model.yarn_mscale, "mscale_all_dim": model.yarn_mscale_all_dim,
    }  # fmt: skip
    config = DeepseekV3Config(
        vocab_size=model.padded_vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        moe_intermediate_size=model.moe_ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_attention_heads,
        n_shared_experts=model.num_shared_experts,
        n_routed_experts=model.num_experts,
        routed_scaling_factor=model.router_scaling_factor,
        kv_lora_rank=model.kv_lora_rank,
        q_lora_rank=model.q_lora_rank or None,
        qk_rope_head_dim=model.qk_rope_head_dim,
        qk_nope_head_dim=model.qk_nope_head_dim,
        v_head_dim=model.v_head_dim,
        n_group=model.router_num_groups,
        topk_group=model.router_topk_groups,
        num_experts_per_tok=model.topk,
        first_k_dense_replace=model.num_dense_layers,
        max_position_embeddings=model.max_position_embeddings,
        rms_norm_eps=model.norm_epsilon,
        rope_parameters=rope,
        use_cache=False,
        num_mtp_layers=0,
    )
    config._attn_implementation = "sdpa"
    config._experts_implementation = experts
    return config


def train_step(cfg: Config, model: nn.Module) -> Callable[[dict[str, Tensor]], float]:
    """One optimizer step on a batch, which returns its loss: AdamW (fused, as transformers' Trainer has it) and
    clipping with the numbers of `cfg`."""
    wanted = cfg.optimizer
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": wanted.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=wanted.lr, betas=(wanted.beta1, wanted.beta2), eps=wanted.eps, fused=True,
    )  # fmt: skip

    def step(batch: dict[str, Tensor]) -> float:
        labels = batch["labels"]
        loss = model(input_ids=batch["tokens"], labels=labels, shift_labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), wanted.clip_grad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss)

    return step


def from_megatron(state: Weights, model: ModelConfig) -> Weights:
    """Weights of our model (parameters and buffers by name, per-expert weights) under the names of transformers."""
    renamed = {
        "model.embed_tokens.weight": state["embedding.word_embeddings.weight"],
        "model.norm.weight": state["decoder.final_layernorm.weight"],
        "lm_head.weight": state["output_layer.weight"],
    }
    same = {
        "self_attention.linear_q_down_proj.weight": "self_attn.q_a_proj.weight",
        "self_attention.q_layernorm.weight": "self_attn.q_a_layernorm.weight",
        "self_attention.linear_q_up_proj.weight": "self_attn.q_b_proj.weight",
        "self_attention.linear_kv_down_proj.weight": "self_attn.kv_a_proj_with_mqa.weight",
        "self_attention.kv_layernorm.weight": "self_attn.kv_a_layernorm.weight",
        "self_attention.linear_kv_up_proj.weight": "self_attn.kv_b_proj.weight",
        "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
        "input_layernorm.weight": "input_layernorm.weight",
        "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    }
    for layer, moe in enumerate(model.moe_layer_pattern):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        renamed |= {theirs + hf: state[ours + name] for name, hf in same.items()}
        dense = {"mlp.": "mlp."} if not moe else {"mlp.shared_experts.": "mlp.shared_experts."}
        for name, hf in dense.items():
            gate, up = state[f"{ours}{name}linear_fc1.weight"].chunk(2)
            renamed |= {f"{theirs}{hf}gate_proj.weight": gate, f"{theirs}{hf}up_proj.weight": up}
            renamed[f"{theirs}{hf}down_proj.weight"] = state[f"{ours}{name}linear_fc2.weight"]
        if moe:
            renamed[f"{theirs}mlp.gate.weight"] = state[f"{ours}mlp.router.weight"]
            renamed[f"{theirs}mlp.gate.e_score_correction_bias"] = state[f"{ours}mlp.router.expert_bias"]
            for linear, hf in (("linear_fc1", "gate_up_proj"), ("linear_fc2", "down_proj")):
                renamed[f"{theirs}mlp.experts.{hf}"] = _experts(state, f"{ours}mlp.experts.", linear, model.num_experts)
    return renamed


def _experts(state: Weights, prefix: str, linear: str, experts: int) -> Tensor:
    """[experts, out, in], whether one parameter holds all experts or each has its own."""
    if f"{prefix}{linear}.weight" in state:
        return state[f"{prefix}{linear}.weight"]
    return torch.stack([state[f"{prefix}local_experts.{i}.{linear}.weight"] for i in range(experts)])
