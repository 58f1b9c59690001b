"""Options of the optimizer. YAML files under `conf/optimizer/` fill them. No torch import."""

from __future__ import annotations

from dataclasses import dataclass

from moe_train.config.fields import REQUIRED, doc

ADAMW, MUON = "adamw", "muon"


@dataclass
class ParameterGroup:
    """Parameters with a learning rate or weight decay of their own: an entry of `optimizer.groups`."""

    match: str = doc(REQUIRED, "Pattern of parameter names in a checkpoint, such as '*.mlp.router.weight'.")
    lr_multiplier: float = doc(1.0, "Factor on the learning rate.", minimum=0)
    weight_decay: float | None = doc(
        None, "Weight decay instead of optimizer.weight_decay; null means that, and 0 for norms and biases.", minimum=0
    )


@dataclass
class OptimizerConfig:
    """AdamW or Muon with decoupled weight decay, gradient clipping, and what is done to weights after an update."""

    name: str = doc(
        ADAMW, "AdamW; or Muon for matrices, experts included, and AdamW for embedding, output head, norms and biases.",
        choices=(ADAMW, MUON),
    )  # fmt: skip
    lr: float = doc(1e-3, "Peak learning rate.", minimum=0)
    beta1: float = doc(0.9, "Decay of the first moment.")
    beta2: float = doc(0.95, "Decay of the second moment.")
    eps: float = doc(1e-8, "Epsilon added to the root of the second moment.")
    weight_decay: float = doc(0.1, "Decoupled weight decay; norms and biases are exempt.", minimum=0)
    clip_grad: float = doc(1.0, "Largest global gradient norm; 0 means no clipping.", minimum=0)
    groups: list[ParameterGroup] = doc(
        [], "Parameters with a learning rate or weight decay of their own; the first entry that matches counts.",
        example="[{match:*.mlp.router.weight,lr_multiplier:0.1,weight_decay:0}]",
    )  # fmt: skip
    muon_momentum: float = doc(0.95, "Muon: decay of the momentum.", minimum=0)
    muon_nesterov: bool = doc(True, "Muon: Nesterov momentum.")
    muon_ns_steps: int = doc(5, "Muon: Newton-Schulz iterations.", minimum=1, maximum=100)
    muon_coefficients: str = doc(
        "quintic", "Muon: coefficients of the iterations.",
        choices=("simple", "quintic", "polar_express", "cans", "aol", "deepseekv4"),
    )  # fmt: skip
    muon_scale_mode: str = doc(
        "spectral", "Muon: an update is scaled by the root of max(out, in), of out / in, or of max(1, out / in).",
        choices=("spectral", "unit_rms_norm", "shape_scaling"),
    )  # fmt: skip
    muon_scale_factor: float = doc(
        0.2, "Muon: further factor on an update; with 0.2 and spectral it is about as large as one of AdamW.",
        minimum=0,
    )  # fmt: skip
    muon_split_qkv: bool = doc(True, "Muon: orthogonalise queries, keys and values of gqa each by itself.")
    muon_tp_mode: str = doc(
        "duplicated", "Muon: tensor-parallel ranks orthogonalise whole matrices, each by itself or together; or their "
        "parts only, which depends on tp.", choices=("duplicated", "distributed", "blockwise"),
    )  # fmt: skip
    muon_matmul_precision: str | None = doc(
        None, "Muon: precision of the iterations' fp32 matmuls, as torch names it (medium is bf16); null means highest "
        "with fp32 weights, else medium.", choices=("highest", "high", "medium"),
    )  # fmt: skip
    qk_clip_threshold: float | None = doc(
        None, "QK-Clip: largest attention logit, above which the query and key projections of a head are rescaled; "
        "null means no QK-Clip.",
    )  # fmt: skip
    qk_clip_alpha: float = doc(
        0.5, "QK-Clip: exponent of the query's part of the factor, where a head has a key of its own.", minimum=0
    )
    ema_decay: float | None = doc(
        None, "EMA of the weights: its decay in each step, such as 0.999; null means none, or ema_half_life_tokens.",
        minimum=0,
    )  # fmt: skip
    ema_half_life_tokens: int | None = doc(
        None, "EMA of the weights: tokens after which a weight counts half, instead of ema_decay.", minimum=1
    )

    @property
    def averages_weights(self) -> bool:
        """Whether there is an EMA of the weights."""
        return self.ema_decay is not None or self.ema_half_life_tokens is not None
