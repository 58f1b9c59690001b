"""What Megatron-Core needs changed in itself to route by another score of expert groups, on every runtime."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.transformer.moe import moe_utils
from torch import Tensor


@contextmanager
def groups_scored_by_their_best_expert() -> Iterator[None]:
    """Within it, group-limited routing ranks a group of experts by its best expert (DeepSeek-V2, arXiv 2405.04434).

    Upstream: transformer/moe/moe_utils.py `group_limited_topk` adds up a group's best experts, and
    `topk_routing_with_score_function` calls it by name. Entered only by the routers of models that ask for it. Goes
    when upstream has an option for the score of a group.
    """
    of_upstream = moe_utils.group_limited_topk
    moe_utils.group_limited_topk = _by_best_expert
    try:
        yield
    finally:
        moe_utils.group_limited_topk = of_upstream


def _by_best_expert(
    scores: Tensor, topk: int, num_tokens: int, num_experts: int, num_groups: int, group_topk: int
) -> tuple[Tensor, Tensor]:
    """Scores and numbers [tokens, topk] of the chosen experts; `scores` is [tokens, experts]."""
    grouped = scores.view(num_tokens, num_groups, num_experts // num_groups)
    chosen = grouped.amax(dim=-1).topk(group_topk, dim=-1, sorted=False).indices
    allowed = torch.zeros(num_tokens, num_groups, dtype=torch.bool, device=scores.device).scatter(1, chosen, True)
    return grouped.masked_fill(~allowed.unsqueeze(-1), float("-inf")).flatten(1).topk(topk, dim=-1)
