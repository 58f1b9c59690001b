"""The task of `make bench-step`: one small model, one stream of learnable tokens, one set of hyperparameters."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_train.config.composition.compose import compose
from moe_train.config.schema import Config

# Without what transformers' DeepseekV3ForCausalLM does not train with: further tokens, balance losses, a moving bias.
LIKE_TRANSFORMERS = [
    "model=tiny",
    "model.mtp_num_layers=0",
    "model.balance_losses=[]",
    "model.balance_loss_coeffs=[]",
    "model.router_bias_update_rate=0.0",
    "runtime=cpu",
    "backend.name=local",
    "schedule=constant",
    "schedule.warmup_steps=0",
    "optimizer.lr=3e-4",
    "train.steps=1000",
    "train.eval_batches=0",
]

MODELS = {
    "tiny": (),
    # 63 M parameters: experts as fine-grained as DeepSeek-V3's, in a width that a laptop trains.
    "60m": (
        "model.num_layers=6", "model.num_dense_layers=3", "model.hidden_size=512", "model.ffn_hidden_size=1536",
        "model.num_experts=64", "model.topk=8", "model.moe_ffn_hidden_size=176", "model.router_num_groups=8",
        "model.router_topk_groups=4", "model.num_attention_heads=8", "model.q_lora_rank=192", "model.kv_lora_rank=128",
    ),
}  # fmt: skip
"""Overrides of `model=tiny` by the name of the benchmark's model."""
SHAPES = {"tiny": (8, 256), "60m": (4, 512)}
"""Sequences in a step, and tokens in a sequence."""


@dataclass(frozen=True)
class StepTask:
    """What every side trains on."""

    dtype: str
    """fp32 or bf16."""
    sequences: int
    """Sequences in one step, in one forward pass."""
    seq_length: int
    threads: int
    model: str = "tiny"
    """A key of `MODELS`."""
    overrides: tuple[str, ...] = ()
    """Further overrides of our config, such as backend.grouped_gemm=false."""

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.sequences * self.seq_length

    def config(self) -> Config:
        """The config of our run, which also says the shape and the hyperparameters of the other side's."""
        batch = [f"batch.global_batch_size={self.sequences}", f"batch.micro_batch_size={self.sequences}"]
        length = [f"train.seq_length={self.seq_length}", f"precision={self.dtype}"]
        return compose([*LIKE_TRANSFORMERS, *MODELS[self.model], *batch, *length, *self.overrides])


def batches(task: StepTask, vocabulary: int) -> Iterator[dict[str, Tensor]]:
    """Endless batches of text in which half of the tokens follow from the one before. The same on every side."""
    generator = torch.Generator().manual_seed(0)
    shape = (task.sequences, task.seq_length + 1)
    while True:
        rare = torch.rand(shape, generator=generator, dtype=torch.float64)
        free = (vocabulary * rare**4).long()  # few words are frequent and many are rare
        follows = torch.rand(shape, generator=generator) < 0.5
        text = free.clone()
        for i in range(1, shape[1]):
            text[:, i] = torch.where(follows[:, i], (text[:, i - 1] * 31 + 7) % vocabulary, free[:, i])
        yield {
            "tokens": text[:, :-1].contiguous(),
            "labels": text[:, 1:].contiguous(),
            "loss_mask": torch.ones(task.sequences, task.seq_length),
            "position_ids": torch.arange(task.seq_length).expand(task.sequences, -1).contiguous(),
        }


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
