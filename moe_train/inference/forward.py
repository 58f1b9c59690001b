"""A forward pass of a model with the KV cache, on all ranks of its layout.

`GPTModel.forward` computes multi-token prediction and wants labels for it, and checks that differ between versions of
Megatron-Core. Here its parts run: embedding, decoder, output layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as ps
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from torch import Tensor

from moe_train.inference.context import PagedContext
from moe_train.model.kernels import gemm
from moe_train.model.local.cached_layers import CachedLayer
from moe_train.model.local.cached_parts import PreparedEmbedding, PreparedLinear, PreparedNorm
from moe_train.ranks import RankContext


@dataclass(frozen=True)
class PassOutput:
    """What a rank of the last pipeline stage has after a forward pass; other ranks have nothing.

    Args:
        hidden: of all tokens, [t, h].
        logits: fp32 [rows, vocabulary]; None where no row is wanted.
    """

    hidden: Tensor | None = None
    logits: Tensor | None = None


class _PredictionLayer:
    """A layer of multi-token prediction: hidden states of the depth before [t / tp, h] -> its own."""

    def __init__(self, module: Any, number: int, model: Any) -> None:
        self._module, self._embedding = module, PreparedEmbedding(model.embedding)
        self._norms = PreparedNorm(module.enorm), PreparedNorm(module.hnorm)
        self._projection, self._final_norm = PreparedLinear(module.eh_proj), PreparedNorm(module.final_layernorm)
        layer = getattr(module, "transformer_layer", None) or module.mtp_model_layer  # its name from 0.19 on
        self._layer = CachedLayer(layer, number, getattr(model, "rotary_pos_emb", None))

    def __call__(self, hidden: Tensor, context: PagedContext) -> Tensor:
        embedded = self._embedding(context.tokens, context.positions)
        if self._projection.is_plain:
            norm_of_embedding, norm_of_hidden = self._norms
            joined = self._projection(torch.cat([norm_of_embedding(embedded), norm_of_hidden(hidden)], dim=-1))
        else:
            joined = self._module._concat_embeddings(hidden.unsqueeze(1), embedded.unsqueeze(1)).squeeze(1)
        return self._final_norm(self._layer(joined, context))


class CachedModel:
    """The model chunks of this rank, run one pipeline stage after the other.

    Tensor-parallel ranks share the work. Data-parallel ranks have tokens of their own. Context-parallel ranks compute
    the same tokens.

    Args:
        models: GPT models, without wrappers, one a virtual pipeline stage.
    """

    def __init__(self, ranks: RankContext, models: Sequence[Any]) -> None:
        self._ranks, self._models = ranks, models
        self._config = models[0].config
        self._layers: list[list[CachedLayer]] = []
        self._prediction_layers: list[_PredictionLayer] = []
        self._embedding: PreparedEmbedding | None = None
        self._final_norms: list[PreparedNorm | None] = []

    def prepare(self) -> None:
        """Look up the weights. Call it before the first forward pass, and again when the weights have changed."""
        self._layers = [
            [
                CachedLayer(layer, layer.layer_number, getattr(model, "rotary_pos_emb", None))
                for layer in model.decoder.layers
            ]
            for model in self._models
        ]
        first = self._models[0]
        self._embedding = PreparedEmbedding(first.embedding) if first.pre_process else None
        norms = [model.decoder.final_layernorm for model in self._models]
        self._final_norms = [None if norm is None else PreparedNorm(norm) for norm in norms]
        if self.prediction_layers:
            last = self._models[-1]
            modules = zip(last.mtp.layers, self.prediction_layers, strict=True)
            self._prediction_layers = [_PredictionLayer(module, number, last) for module, number in modules]

    @property
    def layers(self) -> list[int]:
        """Numbers of the decoder layers of this rank."""
        return [layer.layer_number for model in self._models for layer in model.decoder.layers]

    @property
    def prediction_layers(self) -> list[int]:
        """Numbers of the multi-token-prediction layers in the cache: they follow those of the decoder."""
        layers = self._config.mtp_num_layers if getattr(self._models[-1], "mtp_process", False) else None
        return [self._config.num_layers + 1 + depth for depth in range(layers or 0)]

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations."""
        dtype: torch.dtype = self._config.params_dtype
        return dtype

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""
        return int(self._config.hidden_size)

    @property
    def multiple(self) -> int:
        """What the number of tokens has to be divisible by."""
        return self._ranks.layout.tp if self._config.sequence_parallel else 1

    @torch.inference_mode()
    def run(self, context: PagedContext, pending: list[Any]) -> PassOutput:
        """A forward pass. Every rank calls it. What is sent to the next stage is added to `pending`."""
        stages = self._ranks.layout.pp * len(self._models)
        hidden: Tensor | None = None
        for index in range(len(self._models)):
            stage = index * self._ranks.layout.pp + self._ranks.layout.coordinates(self._ranks.rank.rank).pp
            if stage > 0:
                hidden = self._receive(context)
            hidden = self._decoder(index, hidden, context)
            if stage < stages - 1:
                pending.append(_Sent(hidden.contiguous(), ps.get_pipeline_model_parallel_next_rank()))
                hidden = None
        return self._output(hidden, context) if hidden is not None else PassOutput()

    @torch.inference_mode()
    def predict(self, depth: int, hidden: Tensor, context: PagedContext) -> PassOutput:
        """A pass of one multi-token-prediction layer. Every rank of the last pipeline stage calls it.

        Args:
            depth: from 0.
            hidden: of the depth before, or of the decoder, at the positions of `context`, [t, h] on every rank.
            context: its tokens are those that follow `depth` + 1 later.
        """
        padding = len(context.tokens) - len(hidden)
        hidden = torch.nn.functional.pad(hidden, (0, 0, 0, padding))
        if self._config.sequence_parallel:
            hidden = scatter_to_sequence_parallel_region(hidden, group=ps.get_tensor_model_parallel_group())
        return self._output(self._prediction_layers[depth](hidden, context), context)

    def _decoder(self, index: int, hidden: Tensor | None, context: PagedContext) -> Tensor:
        """[t / tp, h] of the stage before (None at the first) -> [t / tp, h]."""
        if hidden is None:
            assert self._embedding is not None
            hidden = self._embedding(context.tokens, context.positions)
        for layer in self._layers[index]:
            hidden = layer(hidden, context)
        norm = self._final_norms[index]
        return hidden if norm is None else norm(hidden)

    def _receive(self, context: PagedContext) -> Tensor:
        rows = len(context.tokens) // self.multiple
        hidden = torch.empty(rows, self._config.hidden_size, dtype=self.dtype, device=self._ranks.device)
        dist.recv(hidden, ps.get_pipeline_model_parallel_prev_rank())
        return hidden

    def _output(self, hidden: Tensor, context: PagedContext) -> PassOutput:
        """Hidden states [t / tp, h] of the last stage, and the logits of the rows that are wanted, without the numbers
        that pad the vocabulary."""
        model = self._models[-1]
        if self._config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=ps.get_tensor_model_parallel_group())
        if not len(context.rows):
            return PassOutput(hidden)
        tied = model.share_embeddings_and_output_weights
        weight = model.shared_embedding_or_output_weight() if tied else model.output_layer.weight
        logits = gemm.matmul_few_rows(hidden[context.rows], weight.mT)
        return PassOutput(hidden, whole_vocabulary(self._ranks, logits).float())


class _Sent:
    """Hidden states that are being sent to another rank, and are kept until it has them."""

    def __init__(self, hidden: Tensor, rank: int) -> None:
        self._hidden = hidden
        self._work: Any = dist.isend(hidden, rank)

    def wait(self) -> None:
        """Until the other rank has them."""
        self._work.wait()


def whole_vocabulary(ranks: RankContext, logits: Tensor) -> Tensor:
    """[n, padded vocabulary / tp] of each tensor-parallel rank -> [n, vocabulary], without the rows that pad it."""
    if ranks.layout.tp > 1:
        parts = [torch.empty_like(logits) for _ in range(ranks.layout.tp)]
        dist.all_gather(parts, logits.contiguous(), group=ps.get_tensor_model_parallel_group())
        logits = torch.cat(parts, dim=-1)
    return logits[:, : ranks.cfg.model.vocab_size]
