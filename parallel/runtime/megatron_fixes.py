"""What Megatron-Core needs changed in itself to run without CUDA and Transformer Engine. One function each.

Apply them through `parallel.runtime.patching.apply`. Each names the upstream file and when it can go.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from parallel.runtime.patching import Replace


def attention_without_transformer_engine(device: torch.device, replace: Replace) -> None:
    """Multi-latent attention builds where Transformer Engine is absent.

    Upstream: transformer/multi_latent_attention.py of 0.16 sets HAVE_TE although the names are mocks, so
    `isinstance(x, TELinear)` fails. Goes with the end of support for 0.16.
    """
    from megatron.core.transformer import multi_latent_attention

    if not isinstance(multi_latent_attention.TELinear, type):
        replace(multi_latent_attention, "HAVE_TE", False)


def router_without_transformer_engine(device: torch.device, replace: Replace) -> None:
    """The router multiplies with torch where Transformer Engine is absent.

    Upstream: transformer/moe/moe_utils.py of 0.16 leaves `te_general_gemm` undefined. Goes with support for 0.16.
    """
    from megatron.core.transformer.moe import moe_utils

    if not moe_utils.HAVE_TE and not hasattr(moe_utils, "te_general_gemm"):
        replace(moe_utils, "te_general_gemm", None)


def split_sizes_as_lists(device: torch.device, replace: Replace) -> None:
    """Token counts become NumPy arrays, as all-to-all wants them, when they already are on the CPU.

    Upstream: transformer/moe/moe_utils.py `maybe_move_tensor_to_cpu`, used by token_dispatcher.py, converts only CUDA
    tensors. Goes when it converts CPU tensors too.
    """
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    def to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    replace(moe_utils, "maybe_move_tensor_to_cpu", to_cpu)
    replace(token_dispatcher, "maybe_move_tensor_to_cpu", to_cpu)


def recompute_without_transformer_engine(device: torch.device, replace: Replace) -> None:
    """A recomputed norm is not in FP8 where Transformer Engine is absent.

    Upstream: tensor_parallel/random.py. `CheckpointWithoutOutput()` takes its default `fp8=False` for FP8 and asks
    Transformer Engine's state, whose import has failed. Goes when it no longer compares with None.
    """
    from megatron.core.tensor_parallel import random as mcore_random

    class NoFP8:
        @staticmethod
        def is_fp8_enabled() -> bool:
            return False

    if not mcore_random.HAVE_TE:
        replace(mcore_random, "FP8GlobalStateManager", NoFP8)
        replace(mcore_random, "activation_recompute_forward", lambda **_: contextlib.nullcontext())
        replace(mcore_random, "fp8_autocast", lambda **_: contextlib.nullcontext())


def recomputed_outputs_without_a_compiler(device: torch.device, replace: Replace) -> None:
    """A recomputed output is copied into the storage of the one that was discarded.

    Upstream: tensor_parallel/random.py. From 0.19 `_get_share_storage` compiles an extension for it on first use, which
    needs a C++ compiler on every machine and seconds. Goes when upstream has a path without compiler.
    """
    from megatron.core.tensor_parallel import random as mcore_random

    def copy_storage(discarded: torch.Tensor, recomputed: torch.Tensor) -> None:
        source, target = recomputed.untyped_storage(), discarded.untyped_storage()
        target.resize_(source.size())
        target.copy_(source)

    if hasattr(mcore_random, "_get_share_storage"):
        replace(mcore_random, "_get_share_storage", lambda: copy_storage)


def chunks_in_order_stay(device: torch.device, replace: Replace) -> None:
    """Tokens that are sorted by expert already, as on a rank that has all experts, are not copied.

    Upstream: transformer/moe/moe_utils.py `sort_chunks_by_idxs`, used by token_dispatcher.py, splits and joins them
    again whatever their order: a tenth of the step of a small model. Goes when it returns its input then.
    """
    from megatron.core.transformer.moe import token_dispatcher

    original = token_dispatcher.sort_chunks_by_idxs

    def sort(
        input: torch.Tensor, split_sizes: torch.Tensor, sorted_idxs: torch.Tensor, probs: Any = None, **options: Any
    ) -> tuple[torch.Tensor, Any]:
        if torch.equal(sorted_idxs, torch.arange(len(sorted_idxs))):
            return input, probs
        return original(input, split_sizes, sorted_idxs, probs=probs, **options)

    replace(token_dispatcher, "sort_chunks_by_idxs", sort)


PATCHES = (
    attention_without_transformer_engine,
    router_without_transformer_engine,
    split_sizes_as_lists,
    recompute_without_transformer_engine,
    recomputed_outputs_without_a_compiler,
    chunks_in_order_stay,
)
