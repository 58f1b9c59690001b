"""Makes Megatron-Core's dynamic engine, in the versions that are supported. The differences between them are here.

Before 0.19 each class has arguments of its own. From 0.19 on all of them read one `InferenceConfig`.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext
from megatron.core.inference.engines.dynamic_engine import DynamicInferenceEngine
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController
from megatron.core.transformer import attention
from megatron.core.utils import is_fa_min_version
from packaging.version import Version
from torch import Tensor

ONE_CONFIG = Version(version("megatron-core")) >= Version("0.19")
"""Whether this version has `InferenceConfig`. It also has inference with multi-token prediction."""


@dataclass(frozen=True)
class EngineSizes:
    """Sizes of an engine, in Megatron-Core's terms.

    Args:
        buffer_bytes: of the KV cache.
        block_size: tokens of a block.
        max_sequences: sequences that run at the same time, a multiple of the tensor-parallel ranks.
        max_tokens: tokens of one forward pass.
    """

    buffer_bytes: int
    block_size: int
    max_sequence_length: int
    max_sequences: int
    max_tokens: int

    @property
    def buffer_gb(self) -> float:
        """What Megatron-Core multiplies by 1024^3 again. Both are exact: 1024^3 is a power of two."""
        return self.buffer_bytes / 1024**3


class TokenNumbers:
    """A tokenizer whose text of a token is its number. Megatron-Core gives log-probabilities by text.

    It has no `eod`: each request has an end token of its own.
    """

    def detokenize(self, tokens: list[int]) -> str:
        """Numbers, separated by spaces."""
        return " ".join(str(token) for token in tokens)


class MaskedWrapper(GPTInferenceWrapper):
    """Runs the model, with no probability for the rows that pad its vocabulary."""

    vocabulary = 0
    """Tokens without padding."""

    def run_one_forward_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Logits [1, tokens, padded vocabulary]."""
        logits: Tensor = super().run_one_forward_step(*args, **kwargs)
        logits[..., self.vocabulary :] = -torch.inf
        return logits


def kernels_missing() -> bool:
    """Whether no version of flash-attn that Megatron-Core takes is installed."""
    if attention.HAVE_FA3 or getattr(attention, "HAVE_FA4", False):
        return False
    return find_spec("flash_attn") is None or not is_fa_min_version("2.7.3")


def make(model: Any, vocabulary: int, sizes: EngineSizes, seed: int) -> DynamicInferenceEngine:
    """An engine for a GPT model without wrappers, on one pipeline stage.

    Args:
        vocabulary: tokens without padding.
        seed: of what Megatron-Core draws apart from tokens.
    """
    context = _context(model, sizes)
    if ONE_CONFIG:
        wrapper = MaskedWrapper(model, context)
    else:
        wrapper = MaskedWrapper(model, _wrapper_config(model, sizes), context)
    wrapper.vocabulary = vocabulary
    controller = TextGenerationController(wrapper, TokenNumbers())
    if ONE_CONFIG:
        return DynamicInferenceEngine(controller, context)
    return DynamicInferenceEngine(controller, context, random_seed=seed, enable_chunked_prefill=True)


def _context(model: Any, sizes: EngineSizes) -> DynamicInferenceContext:
    config = model.config
    shared = {
        "max_sequence_length": sizes.max_sequence_length, "buffer_size_gb": sizes.buffer_gb,
        "max_requests": sizes.max_sequences, "max_tokens": sizes.max_tokens, "block_size_tokens": sizes.block_size,
        "materialize_only_last_token_logits": True,
    }  # fmt: skip
    if ONE_CONFIG:
        from megatron.core.inference.config import InferenceConfig

        # The context prepares exchanges between experts over NVLink by default, which only `inference_optimized` models
        # use, and which need Hopper GPUs.
        config = copy(config)
        config.inference_moe_token_dispatcher_type = "nccl"
        return DynamicInferenceContext(config, InferenceConfig(enable_chunked_prefill=True, **shared))
    return DynamicInferenceContext(
        params_dtype=config.params_dtype, num_layers=len(model.decoder.layers), kv_channels=config.kv_channels,
        num_attention_heads=config.num_query_groups, **shared,
    )  # fmt: skip


def _wrapper_config(model: Any, sizes: EngineSizes) -> Any:
    from megatron.core.inference.model_inference_wrappers.inference_wrapper_config import InferenceWrapperConfig

    config = model.config
    return InferenceWrapperConfig(
        hidden_size=config.hidden_size, params_dtype=config.params_dtype, inference_batch_times_seqlen_threshold=-1,
        padded_vocab_size=model.vocab_size, inference_max_requests=sizes.max_sequences,
        inference_max_seq_length=sizes.max_sequence_length, fp32_residual_connection=config.fp32_residual_connection,
    )  # fmt: skip


def allocator(engine: DynamicInferenceEngine) -> Any:
    """The allocator of blocks."""
    return engine.context.kv_block_allocator if ONE_CONFIG else engine.context.block_allocator


def leave_inference_mode() -> None:
    """Have modules compute as in training again. Before 0.19 they have no such mode."""
    if ONE_CONFIG:
        from megatron.core.inference.utils import InferenceMode

        InferenceMode.unset_active()
