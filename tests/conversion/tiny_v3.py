"""A tiny checkpoint in the form of the DeepSeek-V3 release, written by hand, and `moe-convert` to convert it.

Names and shapes are spelled out here, and files are written by the `safetensors` library: nothing comes from the
converter. No size is a multiple of 128, so that FP8 blocks are ragged.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tools import convert

Tensors = dict[str, Tensor]

HIDDEN, DENSE, EXPERT, VOCABULARY, EXPERTS, HEADS = 200, 300, 136, 300, 4, 4
CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "num_hidden_layers": 2,
    "hidden_size": HIDDEN, "vocab_size": VOCABULARY, "max_position_embeddings": 512, "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6, "initializer_range": 0.02, "num_attention_heads": HEADS, "num_key_value_heads": HEADS,
    "intermediate_size": DENSE, "q_lora_rank": 144, "kv_lora_rank": 130, "qk_nope_head_dim": 20,
    "qk_rope_head_dim": 8, "v_head_dim": 24, "n_routed_experts": EXPERTS, "num_experts_per_tok": 4,
    "moe_intermediate_size": EXPERT, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 2,
    "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
    "norm_topk_prob": True, "hidden_act": "silu", "attention_bias": False, "moe_layer_freq": 1, "rope_theta": 10000.0,
    "rope_scaling": None, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
ATTENTION: dict[str, tuple[int, ...]] = {
    "q_a_proj": (144, HIDDEN), "q_b_proj": (HEADS * 28, 144), "kv_a_proj_with_mqa": (138, HIDDEN),
    "kv_b_proj": (HEADS * 44, 130), "o_proj": (HIDDEN, HEADS * 24),
}  # fmt: skip


def _swiglu(name: str, inner: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.{part}_proj.weight": (inner, HIDDEN) for part in ("gate", "up")} | {
        f"{name}.down_proj.weight": (HIDDEN, inner)
    }


def _layer(number: int, experts: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"self_attn.{name}.weight": shape for name, shape in ATTENTION.items()}
    shapes |= {"self_attn.q_a_layernorm.weight": (144,), "self_attn.kv_a_layernorm.weight": (130,)}
    shapes |= {"input_layernorm.weight": (HIDDEN,), "post_attention_layernorm.weight": (HIDDEN,)}
    if number == 0:
        shapes |= _swiglu("mlp", DENSE)
    else:
        shapes |= {"mlp.gate.weight": (experts, HIDDEN), "mlp.gate.e_score_correction_bias": (experts,)}
        shapes |= _swiglu("mlp.shared_experts", EXPERT)
        for expert in range(experts):
            shapes |= _swiglu(f"mlp.experts.{expert}", EXPERT)
    if number == 2:  # multi-token prediction
        shapes |= {f"{name}.weight": (HIDDEN,) for name in ("enorm", "hnorm", "shared_head.norm")}
        shapes |= {"eh_proj.weight": (HIDDEN, 2 * HIDDEN)}
        shapes |= {"embed_tokens.weight": (VOCABULARY, HIDDEN), "shared_head.head.weight": (VOCABULARY, HIDDEN)}
    return {f"model.layers.{number}.{name}": shape for name, shape in shapes.items()}


def shapes(experts: int = EXPERTS) -> dict[str, tuple[int, ...]]:
    """Every tensor of the release's form."""
    outer = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)}
    return outer | {"model.norm.weight": (HIDDEN,)} | _layer(0, experts) | _layer(1, experts) | _layer(2, experts)


def quantised(names: Sequence[str]) -> list[str]:
    """Those that the DeepSeek-V3 release holds in FP8: the projections of attention, feed-forward and experts."""
    return [name for name in names if name.endswith("_proj.weight") or "kv_a_proj" in name if "eh_proj" not in name]


def weights(seed: int = 0, experts: int = EXPERTS) -> Tensors:
    """Random weights in bf16, selection biases in fp32."""
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shape, generator=generator) * 0.05 for name, shape in shapes(experts).items()}
    made = {name: t if name.endswith("_bias") else t.to(torch.bfloat16) for name, t in made.items()}
    made["model.layers.2.embed_tokens.weight"] = made["model.embed_tokens.weight"].clone()
    made["model.layers.2.shared_head.head.weight"] = made["lm_head.weight"].clone()
    return made


def write(directory: Path, tensors: Tensors, files: int = 1, **changes: Any) -> Path:
    """A checkpoint directory of one file, or of several with an index. `changes` are of config.json."""
    directory.mkdir(parents=True)
    names = list(tensors)
    if files == 1:
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    else:
        weight_map = {name: f"model-{i % files + 1:05d}-of-{files:05d}.safetensors" for i, name in enumerate(names)}
        for file in set(weight_map.values()):
            save_file({n: tensors[n] for n in names if weight_map[n] == file}, directory / file, {"format": "pt"})
        index = {"metadata": {}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(CONFIG | changes))
    (directory / "tokenizer.json").write_text('{"version": "1.0"}')
    return directory


def read(directory: Path) -> Tensors:
    """Every tensor of a Hugging Face directory, by the `safetensors` library."""
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


class Command:
    """`moe-convert` inside this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *words: object) -> Done:
        """Run it with these words."""
        self._monkeypatch.setattr(sys, "argv", ["moe-convert", *map(str, words)])
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            convert.main()
        captured = self._capsys.readouterr()
        return Done(end.value.code, captured.out, captured.err)  # type: ignore[arg-type]

    def well(self, *words: object) -> Done:
        """The same, when nothing may go wrong."""
        done = self(*words)
        assert (done.code, done.err) == (0, ""), done
        return done


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Same format, shape and bytes."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def files_of(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, and its bytes."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}
