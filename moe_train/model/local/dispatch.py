"""Token dispatch of the `local` backend: upstream's all-to-all, which counts what it sends and can send it in FP8.

FP8 (DeepSeek-V3, arXiv 2412.19437, section 3.3.3) is the format of tokens in dispatch and, in the backward pass, of the
gradients of the experts' outputs: both are inputs of FP8 GEMMs. Each row is cut into tiles of 1 x 128,
whose fp32 scales are sent with it. Outputs of experts, and gradients of tokens, come back in 16 bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor, nn

from moe_train.model.fp8 import quantisation
from moe_train.model.fp8.linear import Recipe, recipe_of

Splits = Sequence[int] | None
TILE = (1, quantisation.BLOCK)


class Dispatcher(MoEAlltoAllTokenDispatcher):
    """Upstream's, with `sent_bytes` of tokens (and their scales) that left this rank for experts on others."""

    recipe: Recipe | None = None
    sent_bytes = 0
    _counts = False

    def token_dispatch(self, tokens: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [t, h] and their router weights [t], sorted by rank, to the ranks of their experts."""
        self._counts = torch.is_grad_enabled()  # not while evaluating, and once where the layer is recomputed
        if self.recipe is None:
            received: tuple[Tensor, Tensor] = super().token_dispatch(tokens, probs)
            self._count(tokens)
            return received
        # Upstream sends the weights, and learns how many tokens go where, with tokens of no width.
        _, probs = super().token_dispatch(tokens[:, :0], probs)
        tokens = Exchange.apply(
            tokens, self.ep_group, _sizes(self.output_splits), _sizes(self.input_splits), self, None
        )
        return tokens, probs

    def token_combine(self, outputs: Tensor, *options: Any, **more: Any) -> Tensor:
        """Outputs of experts [t, h] back to the ranks of their tokens."""
        if self.recipe is None:
            back: Tensor = super().token_combine(outputs, *options, **more)
            return back
        sizes = _sizes(self.input_splits), _sizes(self.output_splits)
        combined: Tensor = Exchange.apply(outputs, self.ep_group, *sizes, None, self)
        return combined

    def send(self, x: Tensor, received: Splits, sent: Splits, gradient: bool) -> Tensor:
        """Rows of `x` in FP8 to other ranks: [t, h] -> [t', h]."""
        assert self.recipe is not None
        dtype = quantisation.E5M2 if gradient and self.recipe.hybrid else quantisation.E4M3
        # E4M3 has no infinity, and a saturated one would hide that the run diverges.
        data = quantisation.quantise(
            x.masked_fill(x.isinf(), torch.nan), TILE, dtype=dtype, power_of_two=self.recipe.power_of_two
        )
        if not gradient:
            self._count(data.data, data.scale_inv)
        codes = _all_to_all(data.data.view(torch.uint8), self.ep_group, received, sent)
        inverse = _all_to_all(data.scale_inv, self.ep_group, received, sent)
        return quantisation.Quantised(codes.view(dtype), inverse, TILE).dequantise(x.dtype)

    def _count(self, *tensors: Tensor) -> None:
        sizes = _sizes(self.input_splits)
        if sizes is not None and self.ep_size > 1 and self._counts:
            leaving = sum(sizes) - sizes[self.ep_group.rank()]
            self.sent_bytes += sum(leaving * t[:1].numel() * t.element_size() for t in tensors if len(t))


class Exchange(torch.autograd.Function):
    """All-to-all of rows [t, h] -> [t', h], in FP8 where a dispatcher is given for the direction, else unchanged."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: Any, received: Splits, sent: Splits,
        forth: Dispatcher | None, back: Dispatcher | None,
    ) -> Tensor:  # fmt: skip
        """`received` and `sent` rows of each rank of `group`."""
        ctx.group, ctx.received, ctx.sent, ctx.back = group, received, sent, back
        if forth is not None:
            return forth.send(x, received, sent, gradient=False)
        return _all_to_all(x, group, received, sent)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.back is not None:
            grad = ctx.back.send(grad, ctx.sent, ctx.received, gradient=True)
        else:
            grad = _all_to_all(grad, ctx.group, ctx.sent, ctx.received)
        return grad, None, None, None, None, None


def _all_to_all(x: Tensor, group: Any, received: Splits, sent: Splits) -> Tensor:
    if group.size() == 1:
        return x.clone()
    rows = len(x) if received is None else sum(received)
    result = x.new_empty(rows, *x.shape[1:])
    sizes = {"output_split_sizes": received, "input_split_sizes": sent}
    dist.all_to_all_single(result, x.contiguous(), **sizes, group=group)  # type: ignore[arg-type]
    return result


def _sizes(splits: Any) -> Splits:
    """Upstream's splits, which are None, a list, or an array."""
    return None if splits is None else [int(size) for size in splits]


def replace_dispatchers(model: nn.Module) -> None:
    """Let the MoE layers of `model` dispatch with `Dispatcher`, in FP8 where the recipe of their experts says so.

    Upstream's layers make their dispatcher themselves; its transformer layer knows no other class of MoE layer
    (transformer/transformer_layer.py, "Unknown MLP type").
    """
    layer: Any
    for layer in model.modules():
        upstream: Any = getattr(layer, "token_dispatcher", None)
        if type(upstream) is not MoEAlltoAllTokenDispatcher or upstream.shared_experts is not None:
            continue
        experts = layer.num_local_experts, layer.local_expert_indices
        dispatcher = Dispatcher(*experts, config=layer.config, pg_collection=get_default_pg_collection())
        recipes = [recipe for module in layer.experts.modules() if (recipe := recipe_of(module)) is not None]
        dispatcher.recipe = next((recipe for recipe in recipes if recipe.dispatch), None)
        layer.token_dispatcher = dispatcher


def dispatchers(chunks: Iterable[nn.Module]) -> list[Dispatcher]:
    """Those of every MoE layer of a rank."""
    modules = [module for chunk in chunks for module in chunk.modules()]
    candidates = [getattr(module, "token_dispatcher", None) for module in modules]
    return [dispatcher for dispatcher in candidates if isinstance(dispatcher, Dispatcher)]
