"""Architecture of one model, in the field's terms. YAML files under `conf/model/` fill it. No torch import."""

from __future__ import annotations

from dataclasses import dataclass

from moe_train.config.families import family_names
from moe_train.config.fields import doc
from parallel.architecture.attention import ATTENTIONS


@dataclass
class ModelConfig:
    """A decoder-only transformer: dense, or Mixture-of-Experts after the first `num_dense_layers` layers."""

    name: str = doc("tiny", "Name of the model, for logs and reports.")
    family: str = doc(
        "deepseek_v3", "Checkpoint family: which Hugging Face naming the model follows.",
        choices=family_names(),
    )  # fmt: skip

    # Backbone
    num_layers: int = doc(4, "Decoder layers, multi-token-prediction layers not counted.", minimum=1, maximum=10_000)
    hidden_size: int = doc(256, "Width of the residual stream.", minimum=1, maximum=10_000_000)
    ffn_hidden_size: int = doc(768, "Inner width of the dense SwiGLU feed-forward.", minimum=1, maximum=10_000_000)
    vocab_size: int = doc(
        4096, "Rows of the embedding, before padding to a multiple of 128.", minimum=2, maximum=100_000_000
    )
    max_position_embeddings: int = doc(
        4096, "Maximum sequence length of the model, tokens.", minimum=1, maximum=1_000_000_000
    )
    tie_embeddings: bool = doc(False, "Output head shares the embedding matrix.")
    norm_epsilon: float = doc(1e-6, "Epsilon of every RMSNorm.")
    latent_norm_epsilon: float | None = doc(
        None, "Epsilon of the norms of mla's query and key/value latents; null means norm_epsilon."
    )
    init_std: float = doc(0.006, "Standard deviation of initial weights (DeepSeek-V3: 0.006 for all).")

    # Attention
    attention: str = doc("mla", "Multi-head latent attention or grouped-query attention.", choices=tuple(ATTENTIONS))
    num_attention_heads: int = doc(4, "Query heads.", minimum=1, maximum=100_000)
    num_query_groups: int = doc(
        0, "Key/value heads of gqa; 0 means as many as query heads.", minimum=0, maximum=100_000
    )
    head_dim: int = doc(
        0, "Size of a gqa head; 0 means hidden_size / num_attention_heads.", minimum=0, maximum=10_000_000
    )
    qk_norm: str = doc(
        "none", "RMSNorm on gqa queries and keys: none, per head, or over all heads.", choices=("none", "head", "full")
    )
    qkv_bias: bool = doc(False, "Bias on the gqa query, key and value projections.")
    q_lora_rank: int = doc(
        0, "Rank of the mla query compression; 0 means an uncompressed query.", minimum=0, maximum=10_000_000
    )
    kv_lora_rank: int = doc(64, "Rank of the mla key/value compression.", minimum=1, maximum=10_000_000)
    qk_nope_head_dim: int = doc(
        32, "Part of an mla query/key head without rotary position.", minimum=1, maximum=10_000_000
    )
    qk_rope_head_dim: int = doc(
        16, "Part of an mla query/key head with rotary position.", minimum=2, maximum=10_000_000
    )
    v_head_dim: int = doc(32, "Size of an mla value head.", minimum=1, maximum=10_000_000)

    # Position
    rope_type: str = doc(
        "rope", "Plain rotary embedding, YaRN-scaled, or scaled as Llama 3.1 (gqa).",
        choices=("rope", "yarn", "llama3"),
    )  # fmt: skip
    rope_base: float = doc(10000.0, "Rotary base (theta).")
    rotary_percent: float = doc(1.0, "Leading fraction of a gqa head with rotary position.")
    llama3_factor: float = doc(
        8.0, "Llama 3.1: how much low frequencies slow down; 1, 4 and 8192 tokens bound them, as in every release."
    )
    yarn_factor: float = doc(40.0, "YaRN: extended over original context length.")
    yarn_original_max_position: int = doc(
        4096, "YaRN: context length before extension, tokens.", minimum=1, maximum=1_000_000_000
    )
    yarn_beta_fast: float = doc(32.0, "YaRN: rotations above which a dimension is not interpolated.")
    yarn_beta_slow: float = doc(1.0, "YaRN: rotations below which a dimension is fully interpolated.")
    yarn_mscale: float = doc(1.0, "YaRN: attention temperature applied to cos and sin.")
    yarn_mscale_all_dim: float = doc(1.0, "YaRN: attention temperature applied to the softmax scale.")

    # Experts
    num_experts: int = doc(0, "Routed experts in each MoE layer; 0 means a dense model.", minimum=0, maximum=100_000)
    topk: int = doc(2, "Routed experts per token (top-k).", minimum=1, maximum=100_000)
    moe_ffn_hidden_size: int = doc(192, "Inner width of one routed expert.", minimum=1, maximum=10_000_000)
    num_shared_experts: int = doc(0, "Shared experts, each as wide as a routed one.", minimum=0, maximum=100_000)
    shared_expert_ffn_hidden_size: int = doc(
        0, "Inner width of all shared experts together; 0 means num_shared_experts x moe_ffn_hidden_size.",
        minimum=0, maximum=10_000_000,
    )  # fmt: skip
    shared_expert_gate: bool = doc(False, "Scale the shared experts' output by a sigmoid of the token's own score.")
    num_dense_layers: int = doc(0, "Leading layers with a dense feed-forward.", minimum=0, maximum=10_000)
    capacity_factor: float | None = doc(
        None, "Capacity of an expert as a multiple of the mean load; null drops no token."
    )
    pad_to_capacity: bool = doc(False, "Pad every expert's input to its capacity (static shapes).")
    token_drop_policy: str = doc(
        "probs",
        "Which tokens an expert over capacity drops: lowest probability, or last.",
        choices=("probs", "position"),
    )

    # Router
    router_score: str = doc("softmax", "Score function of the router.", choices=("softmax", "sigmoid"))
    router_pre_softmax: bool = doc(False, "Softmax over all experts before top-k (weights then do not sum to 1).")
    router_bias: bool = doc(False, "Aux-loss-free balancing: an expert bias for top-k, updated after each step.")
    router_bias_update_rate: float = doc(1e-3, "Update of the expert bias per step.")
    router_scaling_factor: float = doc(1.0, "Factor on the weights of the routed experts.")
    router_num_groups: int = doc(
        0, "Groups of experts for group-limited routing; 0 means no groups.", minimum=0, maximum=100_000
    )
    router_topk_groups: int = doc(0, "Groups whose experts a token may select.", minimum=0, maximum=100_000)
    router_group_score: str = doc(
        "sum", "Score of a group: sum of its topk / router_topk_groups best experts, or its best (DeepSeek-V2).",
        choices=("sum", "max"),
    )  # fmt: skip
    router_dtype: str = doc("fp32", "Precision of the router's scores.", choices=("fp32", "fp64"))
    balance_losses: list[str] = doc(
        [], "Load-balance (auxiliary) losses, each over: micro-batch, sequence, global batch.",
        choices=("aux_loss", "seq_aux_loss", "global_aux_loss"),
    )  # fmt: skip
    balance_loss_coeffs: list[float] = doc([], "Coefficient of each entry of balance_losses.")
    z_loss_coeff: float = doc(0.0, "Coefficient of the router z-loss; 0 means off.", minimum=0)

    # Multi-token prediction
    mtp_num_layers: int = doc(0, "Multi-token-prediction depth; 0 means off.", minimum=0, maximum=100)
    mtp_loss_coeff: float = doc(0.3, "Weight of the multi-token-prediction loss.", minimum=0)

    @property
    def is_moe(self) -> bool:
        """Whether any layer has routed experts."""
        return self.num_experts > 0

    @property
    def kv_heads(self) -> int:
        """Key/value heads of gqa, with the default filled in."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def attention_head_dim(self) -> int:
        """Size of one gqa head, with the default filled in."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        """Leading dimensions of a gqa head that carry rotary position, cut to a whole number as upstream does."""
        return int(self.attention_head_dim * self.rotary_percent)

    @property
    def shared_expert_width(self) -> int:
        """Inner width of all shared experts together, 0 where there are none."""
        if not self.num_shared_experts:
            return 0
        return self.shared_expert_ffn_hidden_size or self.num_shared_experts * self.moe_ffn_hidden_size

    @property
    def padded_vocab_size(self) -> int:
        """Vocabulary rounded up to 128 rows. It never depends on the layout, so that the loss does not either."""
        return -(-self.vocab_size // 128) * 128

    @property
    def moe_layer_pattern(self) -> list[int]:
        """1 for each MoE layer and 0 for each dense layer, first to last."""
        dense = self.num_dense_layers if self.is_moe else self.num_layers
        return [0] * dense + [1] * (self.num_layers - dense)
