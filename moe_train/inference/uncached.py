"""Continues text with the model of a run, in the layout it is trained in, without a KV cache.

It runs the training forward pass on the whole text for every token, on any backend: for models that `engine.py`
cannot run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as ps
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from moe_train.inference.forward import whole_vocabulary
from moe_train.ranks import RankContext
from parallel import sequence


@torch.no_grad()
def continue_prompts(
    ranks: RankContext,
    chunks: Sequence[nn.Module],
    prompts: Tensor,
    count: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """`count` tokens [n, count] that the model adds to `prompts` [n, p], all ranks being given the same.

    Every rank must call this: each computes its part of the model, and data-parallel ranks compute the same texts,
    because the experts of one text can be on any of them. The texts are padded on the right to the training sequence
    length, which causal attention makes harmless; only experts with a capacity limit see the padding.

    Args:
        chunks: this rank's part of the model, with or without DDP around it.
        temperature: 0 takes the most probable token, else tokens are drawn from softmax(logits / temperature).
        seed: of the draws.

    Raises:
        ValueError: prompt and continuation are longer than `train.seq_length`.
    """
    n, start = prompts.shape
    if start < 1 or start + count > ranks.cfg.train.seq_length:
        raise ValueError(f"{start} + {count} tokens do not fit into train.seq_length={ranks.cfg.train.seq_length}")
    tokens = torch.zeros(n, ranks.cfg.train.seq_length, dtype=torch.long, device=ranks.device)
    tokens[:, :start] = prompts
    generator = torch.Generator().manual_seed(seed)
    chooser = ranks.layout.rank_of(pp=ranks.layout.pp - 1)  # one of the ranks that have the logits decides for all
    with _LogitReader(ranks, chunks) as reader:
        for end in range(start, start + count):
            logits = reader.logits(tokens, end - 1)
            chosen = torch.zeros(n, dtype=torch.long, device=ranks.device)
            if ranks.rank.rank == chooser and logits is not None:
                chosen = _choose(logits, temperature, generator).to(ranks.device)
            dist.broadcast(chosen, src=chooser)
            tokens[:, end] = chosen
    return tokens[:, start : start + count]


def _choose(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """A token for each row of `logits` [n, vocabulary] -> [n]."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    return torch.multinomial((logits / temperature).softmax(dim=-1).cpu(), 1, generator=generator).squeeze(1)


class _LogitReader:
    """Runs forward passes in evaluation mode and reads the logits of one position, inside a `with` block."""

    def __init__(self, ranks: RankContext, chunks: Sequence[nn.Module]) -> None:
        self._ranks, self._chunks = ranks, chunks
        self._index = torch.empty(0, dtype=torch.long)  # of the position in this rank's part of the sequence
        self._rows: Tensor | None = None
        self._hooks: list[Any] = []

    def __enter__(self) -> _LogitReader:
        for chunk in self._chunks:
            chunk.eval()
            for module in chunk.modules():
                if isinstance(module, GPTModel) and module.post_process:
                    self._hooks.append(module.output_layer.register_forward_hook(self._read))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        for chunk in self._chunks:
            chunk.train()

    def logits(self, tokens: Tensor, position: int) -> Tensor | None:
        """Logits [n, vocabulary] of the token after `position` of `tokens` [n, s]; None before the last stage."""
        ranks, n = self._ranks, tokens.size(0)
        # The interleaved schedule wants a multiple of the pipeline's depth.
        micro_batches = ranks.layout.pp if ranks.layout.vpp > 1 else 1
        rows = -(-n // micro_batches)
        padding = tokens[-1:].expand(rows * micro_batches - n, -1)
        parts = torch.cat([tokens, padding]).split(rows)
        iterators = [iter(parts) for _ in self._chunks]
        outputs = get_forward_backward_func()(
            forward_step_func=partial(self._forward, position),
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self._chunks,
            num_microbatches=micro_batches,
            seq_length=ranks.cfg.train.seq_length,
            micro_batch_size=rows,
            forward_only=True,
            collect_non_loss_data=True,
        )
        if not outputs:
            return None
        return self._gather(torch.cat(outputs)[:n])

    def _forward(self, position: int, parts: Iterator[Tensor], chunk: nn.Module) -> tuple[Tensor, Any]:
        tokens = next(parts)
        positions = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens).contiguous()
        batch = {"tokens": tokens, "position_ids": positions, "loss_mask": torch.ones_like(tokens, dtype=torch.float)}
        batch = sequence.on_this_rank(batch, ps.get_context_parallel_rank(), ps.get_context_parallel_world_size())
        self._index = (batch["position_ids"][0] == position).nonzero().squeeze(1)
        # With labels, because upstream's GPTModel wants them where it has multi-token-prediction layers. Those use the
        # output layer first, so what the hook reads last is the prediction of the next token.
        output = chunk(
            batch["tokens"], batch["position_ids"], None, labels=batch["tokens"], loss_mask=batch["loss_mask"]
        )
        return output, self._take

    def _read(self, module: nn.Module, inputs: Any, output: tuple[Tensor, Any]) -> None:
        logits = output[0]  # [s/cp, b, vocabulary/tp]; the loss overwrites them in place
        here = logits[self._index].float().sum(dim=0)  # zeros where another context-parallel rank has the position
        self._rows = here

    def _take(self, output: Tensor, non_loss_data: bool = False) -> Tensor:
        if self._rows is None:
            raise RuntimeError("the last pipeline stage computed no logits")
        rows, self._rows = self._rows, None
        return rows

    def _gather(self, rows: Tensor) -> Tensor:
        """[n, vocabulary/tp] of the rank that has the position -> [n, vocabulary] without the rows that only pad it."""
        if self._ranks.layout.cp > 1:
            dist.all_reduce(rows, group=ps.get_context_parallel_group())
        return whole_vocabulary(self._ranks, rows)
