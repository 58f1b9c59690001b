"""What Megatron-Core needs changed in itself: to run without CUDA and Transformer Engine, and, last, to train the same
model in every layout on any device. One function each.

Apply them through `parallel.runtime.patching.apply`. Each names the upstream file and when it can go.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
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
    again, even if they are sorted: a tenth of the step of a small model. Goes when it returns its input then.
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


def gradients_scaled_in_place(device: torch.device, replace: Replace) -> None:
    """Clipping multiplies each gradient in place where neither Transformer Engine nor apex is installed.

    Upstream: utils.py `local_multi_tensor_scale`, used by optimizer/clip_grads.py, makes a scaled copy and copies it
    back, which takes three times as long. The bits are the same. Goes when it scales in place.
    """
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads

    def scale_in_place(chunk_size: int, noop_flag: Any, tensor_lists: Any, scale: Any) -> None:
        for source, target in zip(tensor_lists[0], tensor_lists[1], strict=True):
            if source.dtype is target.dtype:
                torch.mul(source, scale, out=target)
            else:
                target.copy_(source * scale)

    if clip_grads.multi_tensor_scale_impl is utils.local_multi_tensor_scale:
        replace(clip_grads, "multi_tensor_scale_impl", scale_in_place)


def parameters_broadcast_by_their_ranks(device: torch.device, replace: Replace) -> None:
    """Data-parallel ranks that each update some of the parameters exchange them, over gloo.

    Upstream: optimizer/layer_wise_optimizer.py `allgather_params` gathers parts of unequal size, which NCCL takes and
    gloo does not. Its `broadcast_params` does the same parameter by parameter. Goes when gloo takes them.
    """
    from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer

    replace(LayerWiseDistributedOptimizer, "allgather_params", LayerWiseDistributedOptimizer.broadcast_params)


def parts_of_unequal_length(device: torch.device, replace: Replace) -> None:
    """Ranks that split experts (etp) exchange as many tokens as each happens to have, over gloo.

    Upstream: tensor_parallel/mappings.py `_gather_along_first_dim` and `_reduce_scatter_along_first_dim` pass tensors
    of unequal length to `all_gather` and `reduce_scatter`, which NCCL takes and gloo does not. Here they are padded to
    the longest. Goes when gloo takes them (torch/csrc/distributed/c10d/ProcessGroupGloo.cpp).
    """
    from megatron.core.tensor_parallel import mappings

    gather, scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather_parts(input_: Any, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if output_split_sizes is None or group.size() == 1:
            return gather(input_, group, output_split_sizes, use_global_buffer)
        longest = max(output_split_sizes)
        padded = input_.new_zeros(longest, *input_.shape[1:])
        padded[: input_.size(0)] = input_
        gathered = padded.new_empty(group.size(), *padded.shape)
        torch.distributed.all_gather_into_tensor(gathered.flatten(0, 1), padded, group=group)
        return torch.cat([part[:size] for part, size in zip(gathered, output_split_sizes, strict=True)])

    def scatter_parts(input_: Any, group: Any, input_split_sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if input_split_sizes is None or group.size() == 1:
            return scatter(input_, group, input_split_sizes, use_global_buffer)
        padded = input_.new_zeros(group.size(), max(input_split_sizes), *input_.shape[1:])
        for row, part in zip(padded, input_.split(list(input_split_sizes)), strict=True):
            row[: part.size(0)] = part
        own = torch.empty_like(padded[0])
        torch.distributed.reduce_scatter_tensor(own, padded.flatten(0, 1), group=group)
        return own[: input_split_sizes[group.rank()]]

    replace(mappings, "_gather_along_first_dim", gather_parts)
    replace(mappings, "_reduce_scatter_along_first_dim", scatter_parts)


def predicted_tokens_of_whole_sequences(device: torch.device, replace: Replace) -> None:
    """The loss of multi-token prediction weighs the same wherever the tokens of a batch are.

    Upstream: transformer/multi_token_prediction.py and models/gpt/gpt_model.py take the tokens that each rank predicts
    in a micro-batch. From 0.19 on the loss is multiplied by the tokens that count over those that are predicted, so its
    weight changes with the micro-batch size where a mask leaves tokens out, and on the context-parallel rank that has
    the end of the sequence. Here that ratio is the one of sequences in which every token counts, and 1 for packed
    documents, whose lengths differ between micro-batches. Goes when upstream sums the counts over the global batch.
    """
    from megatron.core.models.gpt import gpt_model
    from megatron.core.transformer import multi_token_prediction

    original = multi_token_prediction.roll_tensor

    def roll(
        tensor: Any, shifts: int = -1, dims: int = -1, cp_group: Any = None, packed_seq_params: Any = None
    ) -> tuple[Any, Any]:
        rolled, count = original(tensor, shifts, dims, cp_group, packed_seq_params)
        is_loss_mask = torch.is_tensor(tensor) and tensor.is_floating_point()  # the others are token ids and positions
        if not is_loss_mask:
            return rolled, count
        # A mask carries the tokens of before its first roll, and how often it was rolled.
        tokens, depth = getattr(tensor, "tokens_and_depth", (tensor.sum(), 0))
        rolled.tokens_and_depth = tokens, depth + 1
        if packed_seq_params is not None:
            return rolled, tokens
        length = tensor.size(dims) * (1 if cp_group is None else cp_group.size())
        return rolled, tokens * (length - depth - 1) / length

    replace(multi_token_prediction, "roll_tensor", roll)
    if hasattr(gpt_model, "roll_tensor"):
        replace(gpt_model, "roll_tensor", roll)


def prediction_recomputed_with_packed_documents(device: torch.device, replace: Replace) -> None:
    """A prediction layer is recomputed with packed documents.

    Upstream: transformer/multi_token_prediction.py of 0.16 passes `packed_seq_params`, which is not a tensor, through
    the checkpoint function, which saves tensors only. Goes with the end of support for 0.16.
    """
    from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer

    original = MultiTokenPredictionLayer._checkpointed_forward
    if "forward_func" not in inspect.signature(original).parameters:
        return

    def checkpointed(self: Any, forward_func: Callable[..., Any], **arguments: Any) -> Any:
        packed, names = arguments["packed_seq_params"], list(arguments)

        def forward(*values: Any, **named: Any) -> Any:
            tensors = dict(zip(names, values, strict=False)) | named
            return forward_func(**{**tensors, "packed_seq_params": packed})

        return original(self, forward, **{**arguments, "packed_seq_params": None})

    replace(MultiTokenPredictionLayer, "_checkpointed_forward", checkpointed)


PATCHES = (
    attention_without_transformer_engine,
    router_without_transformer_engine,
    split_sizes_as_lists,
    recompute_without_transformer_engine,
    recomputed_outputs_without_a_compiler,
    chunks_in_order_stay,
    gradients_scaled_in_place,
    parameters_broadcast_by_their_ranks,
    parts_of_unequal_length,
    predicted_tokens_of_whole_sequences,
    prediction_recomputed_with_packed_documents,
)
"""What a machine without GPU needs."""

ON_ANY_DEVICE = (predicted_tokens_of_whole_sequences, prediction_recomputed_with_packed_documents)
