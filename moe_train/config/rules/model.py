"""Rules of the architecture alone, for any layout."""

from __future__ import annotations

from moe_train.config.model import ModelConfig
from moe_train.config.resolve import ResolvedConfig, Rule, resolve
from moe_train.config.schema import Config
from parallel.architecture.attention import attention_kind, row_of
from parallel.layout import ParallelLayout
from parallel.suggest import Fix, Impossible, divisors, fixes_of, multiples, nearest


def positive_numbers(facts: ResolvedConfig) -> None:
    """Numbers that must be above zero (or one), which no integer minimum can say."""
    model = facts.cfg.model
    above_zero = {"norm_epsilon": 1e-6, "init_std": 0.006, "rope_base": 10000.0, "yarn_beta_slow": 1.0}
    for name, usual in above_zero.items():
        if not getattr(model, name) > 0:
            raise Impossible(f"model.{name}={getattr(model, name)} is not above 0", [{f"model.{name}": usual}])
    if model.latent_norm_epsilon is not None and not model.latent_norm_epsilon > 0:
        raise Impossible(f"model.latent_norm_epsilon={model.latent_norm_epsilon} is not above 0",
                         fixes_of("model.latent_norm_epsilon", (1e-6, None)))  # fmt: skip
    if not model.llama3_factor >= 1:
        raise Impossible(f"model.llama3_factor={model.llama3_factor} is below 1 and would shorten the context",
                         fixes_of("model.llama3_factor", (1.0, 8.0)))  # fmt: skip
    if not model.yarn_factor >= 1:
        raise Impossible(f"model.yarn_factor={model.yarn_factor} is below 1 and would shorten the context",
                         fixes_of("model.yarn_factor", (1.0, 40.0)))  # fmt: skip
    if not model.yarn_beta_fast >= model.yarn_beta_slow:
        raise Impossible(
            f"model.yarn_beta_fast={model.yarn_beta_fast} is below model.yarn_beta_slow={model.yarn_beta_slow}",
            [{"model.yarn_beta_fast": 32.0 * model.yarn_beta_slow}],
        )
    if not model.router_bias_update_rate >= 0:
        raise Impossible(f"model.router_bias_update_rate={model.router_bias_update_rate} is negative",
                         fixes_of("model.router_bias_update_rate", (0.001, 0.0)))  # fmt: skip
    if not model.router_scaling_factor > 0:
        raise Impossible(f"model.router_scaling_factor={model.router_scaling_factor} is not above 0",
                         [{"model.router_scaling_factor": 1.0}])  # fmt: skip


def attention_heads(facts: ResolvedConfig) -> None:
    """Heads and their sizes must come out whole, and rotary dimensions in pairs."""
    kind = attention_kind(facts.cfg.model)
    row_of(kind, ATTENTION_RULES, "ATTENTION_RULES of moe_train/config/rules/model.py")(facts)


def _latent_attention(facts: ResolvedConfig) -> None:
    """Rotary dimensions of multi-head latent attention, and no option that it does not have."""
    model = facts.cfg.model
    if model.qk_rope_head_dim % 2:
        raise Impossible(
            f"model.qk_rope_head_dim={model.qk_rope_head_dim} is odd, but rotary dimensions come in pairs",
            fixes_of("model.qk_rope_head_dim", (model.qk_rope_head_dim - 1, model.qk_rope_head_dim + 1)),
        )
    if model.qk_norm != "none":
        raise Impossible(
            f"model.qk_norm={model.qk_norm} is for model.attention=gqa; mla always norms its compressed latents",
            [{"model.qk_norm": "none"}],
        )
    _only_for_gqa(facts)


def _grouped_attention(facts: ResolvedConfig) -> None:
    """Heads, key/value heads and rotary dimensions of grouped-query attention, and no option that it does not have."""
    model = facts.cfg.model
    heads = model.num_attention_heads
    if model.latent_norm_epsilon is not None:
        raise Impossible(
            f"model.latent_norm_epsilon={model.latent_norm_epsilon} is for model.attention=mla; gqa has no latents",
            [{"model.latent_norm_epsilon": None}],
        )
    if not model.head_dim and model.hidden_size % heads:
        raise Impossible(
            f"model.num_attention_heads={heads} does not divide model.hidden_size={model.hidden_size} "
            f"({model.hidden_size} = {model.hidden_size // heads} x {heads} + {model.hidden_size % heads})",
            [
                *fixes_of("model.num_attention_heads", nearest(divisors(model.hidden_size), heads)),
                *fixes_of("model.hidden_size", nearest(multiples(heads, model.hidden_size), model.hidden_size)),
            ],
        )
    if heads % model.kv_heads:
        raise Impossible(
            f"model.num_query_groups={model.kv_heads} does not divide model.num_attention_heads={heads} "
            f"({heads} = {heads // model.kv_heads} x {model.kv_heads} + {heads % model.kv_heads})",
            fixes_of("model.num_query_groups", nearest(divisors(heads), model.kv_heads)),
        )
    if model.attention_head_dim % 2:
        dim = model.attention_head_dim
        raise Impossible(
            f"model.head_dim={dim} is odd, but rotary dimensions come in pairs",
            fixes_of("model.head_dim", nearest((dim - 1, dim + 1), dim, minimum=2)),
        )
    _rotary_part(facts)


def _only_for_gqa(facts: ResolvedConfig) -> None:
    """Options of grouped-query attention that upstream's multi-latent attention does not have."""
    model = facts.cfg.model
    if model.qkv_bias:
        raise Impossible("model.qkv_bias=true is for model.attention=gqa; mla has no such bias",
                         [{"model.qkv_bias": False}])  # fmt: skip
    if model.rotary_percent != 1:
        raise Impossible(
            f"model.rotary_percent={model.rotary_percent} is for model.attention=gqa; mla has "
            f"model.qk_rope_head_dim={model.qk_rope_head_dim} rotary dimensions",
            [{"model.rotary_percent": 1.0}],
        )
    if model.rope_type == "llama3":
        raise Impossible("model.rope_type=llama3 is for model.attention=gqa",
                         fixes_of("model.rope_type", ("rope", "yarn")))  # fmt: skip


def _rotary_part(facts: ResolvedConfig) -> None:
    """The rotary part of a head is some of it, in pairs."""
    model = facts.cfg.model
    share, dim = model.rotary_percent, model.attention_head_dim
    if not 0 < share <= 1:
        raise Impossible(f"model.rotary_percent={share} is not in (0, 1]",
                         fixes_of("model.rotary_percent", (1.0, 0.5)))  # fmt: skip
    if model.rotary_dim % 2 or not model.rotary_dim:
        shares = (n / dim for n in range(2, dim + 1, 2) if int(dim * (n / dim)) == n)
        raise Impossible(
            f"model.rotary_percent={share} of a head of {dim} is {model.rotary_dim} dimensions, but rotary dimensions "
            "come in pairs",
            fixes_of("model.rotary_percent", sorted(shares, key=lambda x: abs(x - share))),
        )


ATTENTION_RULES = {"mla": _latent_attention, "gqa": _grouped_attention}


def shared_experts(facts: ResolvedConfig) -> None:
    """What describes shared experts needs some."""
    model = facts.cfg.model
    if model.num_shared_experts and model.is_moe:
        return
    what = "model.num_shared_experts=0" if model.is_moe else "model.num_experts=0"
    more: Fix = {"model.num_shared_experts": 1} if model.is_moe else {"model.num_experts": 8}
    if model.shared_expert_ffn_hidden_size:
        raise Impossible(
            f"model.shared_expert_ffn_hidden_size={model.shared_expert_ffn_hidden_size} needs shared experts, "
            f"but {what}",
            [{"model.shared_expert_ffn_hidden_size": 0}, more],
        )
    if model.shared_expert_gate:
        raise Impossible(f"model.shared_expert_gate=true needs shared experts, but {what}",
                         [{"model.shared_expert_gate": False}, more])  # fmt: skip


def experts_of_a_token(facts: ResolvedConfig) -> None:
    """A token cannot visit more experts than there are."""
    model = facts.cfg.model
    if not model.is_moe:
        return
    if model.topk > model.num_experts:
        raise Impossible(
            f"model.topk={model.topk} exceeds model.num_experts={model.num_experts}",
            [*fixes_of("model.topk", range(model.num_experts, 0, -1)), {"model.num_experts": model.topk}],
        )
    if model.topk == 1 and model.router_score == "softmax" and not model.router_pre_softmax:
        raise Impossible(
            "model.topk=1 with model.router_pre_softmax=false gives the router no gradient: "
            "the softmax of one score is always 1",
            [{"model.router_pre_softmax": True}, {"model.topk": 2}, {"model.router_score": "sigmoid"}],
        )
    if model.num_dense_layers >= model.num_layers:
        raise Impossible(
            f"model.num_dense_layers={model.num_dense_layers} of model.num_layers={model.num_layers} leaves no "
            f"layer for model.num_experts={model.num_experts}",
            [
                *fixes_of("model.num_dense_layers", range(model.num_layers - 1, -1, -1)),
                {"model.num_layers": model.num_dense_layers + 1},
                {"model.num_experts": 0},
            ],
        )


def expert_groups(facts: ResolvedConfig) -> None:
    """Group-limited routing: equal groups, and a whole number of experts from each chosen group."""
    model = facts.cfg.model
    groups, chosen = model.router_num_groups, model.router_topk_groups
    off = {"model.router_num_groups": 0, "model.router_topk_groups": 0}
    if not model.is_moe or (not groups and not chosen):
        return
    if not groups or not chosen:
        missing = "router_num_groups" if not groups else "router_topk_groups"
        given = "router_topk_groups" if not groups else "router_num_groups"
        values = [d for d in divisors(model.num_experts if not groups else model.topk) if d > 1 or groups]
        raise Impossible(
            f"model.{given}={groups or chosen} needs model.{missing}, which is 0: group-limited routing takes both",
            [*fixes_of(f"model.{missing}", values), off],
        )
    if model.num_experts % groups:
        raise Impossible(
            f"model.router_num_groups={groups} does not divide model.num_experts={model.num_experts} "
            f"({model.num_experts} = {model.num_experts // groups} x {groups} + {model.num_experts % groups})",
            [*fixes_of("model.router_num_groups", nearest(divisors(model.num_experts), groups)), off],
        )
    if chosen > groups:
        raise Impossible(
            f"model.router_topk_groups={chosen} exceeds model.router_num_groups={groups}",
            [*fixes_of("model.router_topk_groups", range(groups, 0, -1)), off],
        )
    if model.router_group_score == "max":
        reachable = chosen * (model.num_experts // groups)
        if model.topk > reachable:
            raise Impossible(
                f"model.topk={model.topk} exceeds the {chosen} x {model.num_experts // groups} = {reachable} experts "
                f"of model.router_topk_groups={chosen} groups",
                [
                    *fixes_of("model.topk", range(reachable, 0, -1)),
                    *fixes_of("model.router_topk_groups", range(chosen + 1, groups + 1)),
                ],
            )
        return
    if model.topk % chosen:
        raise Impossible(
            f"model.topk={model.topk} is not a multiple of model.router_topk_groups={chosen}: groups are ranked by "
            f"their best topk / router_topk_groups experts",
            [
                *fixes_of("model.topk", nearest(multiples(chosen, model.topk), model.topk)),
                *fixes_of("model.router_topk_groups", nearest(divisors(model.topk), chosen)),
            ],
        )
    if model.topk // chosen > model.num_experts // groups:
        raise Impossible(
            f"model.topk={model.topk} takes {model.topk} / {chosen} = {model.topk // chosen} experts from each of "
            f"model.router_topk_groups={chosen} groups, but a group has {model.num_experts} / {groups} = "
            f"{model.num_experts // groups}",
            [
                *fixes_of("model.topk", range(model.topk - 1, 0, -1)),
                *fixes_of("model.router_topk_groups", divisors(model.topk)),
            ],
        )


def capacity(facts: ResolvedConfig) -> None:
    """Padding to a capacity needs one, and a capacity is above zero (upstream takes a negative one for none)."""
    model = facts.cfg.model
    if model.capacity_factor is not None and not model.capacity_factor > 0:
        raise Impossible(
            f"model.capacity_factor={model.capacity_factor} leaves the experts no tokens",
            fixes_of("model.capacity_factor", (1.0, None)),
        )
    if model.pad_to_capacity and model.capacity_factor is None:
        raise Impossible(
            "model.pad_to_capacity=true needs a capacity, but model.capacity_factor=null",
            [{"model.capacity_factor": 1.0}, {"model.pad_to_capacity": False}],
        )


def balance(facts: ResolvedConfig) -> None:
    """One coefficient for each balance loss, and a selection bias only where upstream has one."""
    model = facts.cfg.model
    losses, coeffs = model.balance_losses, model.balance_loss_coeffs
    if len(losses) != len(coeffs):
        fitting = (list(coeffs) + [1e-3] * len(losses))[: len(losses)]
        raise Impossible(
            f"model.balance_loss_coeffs has {len(coeffs)} entries, but model.balance_losses has {len(losses)}",
            [{"model.balance_loss_coeffs": fitting}],
        )
    if len(set(losses)) != len(losses):
        kept = list(dict.fromkeys(losses))
        raise Impossible(
            f"model.balance_losses names a loss twice: {', '.join(losses)}",
            [{"model.balance_losses": kept, "model.balance_loss_coeffs": list(coeffs[: len(kept)])}],
        )
    if any(not coeff >= 0 for coeff in coeffs):
        raise Impossible(
            f"model.balance_loss_coeffs={coeffs} has a negative coefficient, which would unbalance the experts",
            [{"model.balance_loss_coeffs": [abs(c) for c in coeffs]}],
        )
    if model.router_bias and model.router_score != "sigmoid":
        raise Impossible(
            f"model.router_bias=true needs model.router_score=sigmoid, not {model.router_score}",
            [{"model.router_score": "sigmoid"}, {"model.router_bias": False}],
        )


RULES: tuple[Rule, ...] = (
    positive_numbers, attention_heads, experts_of_a_token, shared_experts, expert_groups, capacity, balance,
)  # fmt: skip


def check(model: ModelConfig) -> None:
    """Every rule of a model that came from another place than the configuration.

    Raises:
        Impossible: no model can be like that.
    """
    facts = resolve(Config(model=model), ParallelLayout(tp=1, pp=1, vpp=1, cp=1, ep=1, etp=1, dp=1), trains=False)
    for rule in RULES:
        rule(facts)
