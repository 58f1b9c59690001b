"""Linear layers and norms of the `local` backend, prepared for forward passes of few tokens without gradients.

Preparing looks up once what a module would look up in every call. The weights are views of the module's.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from moe_train.model.kernels import gemm
from moe_train.model.local.norm import RMSNorm


def through_module(module: Any, x: Tensor) -> Tensor:
    """x [t, in] through a module of Megatron-Core, which takes [t, 1, in] and returns its bias apart: [t, out]."""
    output, bias = module(x.unsqueeze(1))
    output = output.squeeze(1)
    result: Tensor = output if bias is None else output + bias
    return result


class PreparedLinear:
    """x [t, in] -> [t, out], with the bias of the layer. With sequence parallelism t is what the module divides."""

    def __init__(self, module: Any) -> None:
        self._module = module
        group = getattr(module, "tp_group", None)
        alone = group is None or group.size() == 1
        high_precision = getattr(module, "kernel", None) is gemm.HIGH_PRECISION
        # A GEMM and nothing else: no collective, no bias, no other number format.
        self.is_plain = alone and high_precision and getattr(module, "bias", None) is None
        self._matrix: Tensor = module.weight.detach().mT

    def __call__(self, x: Tensor) -> Tensor:
        if self.is_plain:
            return gemm.matmul_few_rows(x, self._matrix)
        return through_module(self._module, x)


class PreparedEmbedding:
    """Tokens and positions [t] -> [t / tp, h]."""

    def __init__(self, module: Any) -> None:
        self._module = module
        words = module.word_embeddings
        alone = words.weight.size(0) == words.num_embeddings
        # A table of words and nothing else.
        self._is_plain = alone and not (
            module.add_position_embedding or module.num_tokentypes or module.config.fp32_residual_connection
        )
        self._table: Tensor = words.weight.detach()

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        if self._is_plain:
            return F.embedding(tokens, self._table)
        result: Tensor = self._module(input_ids=tokens.unsqueeze(0), position_ids=positions.unsqueeze(0)).squeeze(1)
        return result


class PreparedNorm:
    """RMSNorm over the last dimension."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._is_plain = type(module) is RMSNorm
        self._shape: tuple[int, ...] = module.weight.shape
        self._weight: Tensor = module.weight.detach()
        self._eps = float(getattr(module, "eps", 0.0))

    def __call__(self, x: Tensor) -> Tensor:
        if self._is_plain:
            return F.rms_norm(x, self._shape, self._weight, self._eps)
        result: Tensor = self._module(x)
        return result
