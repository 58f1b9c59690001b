"""A small MoE run on made-up tokens, for the tests of checkpoints. Called on every rank by `run_distributed`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import Dataset

from moe_train.checkpoint import checkpoint, state
from moe_train.config.model import ModelConfig
from moe_train.config.resolve import resolve
from moe_train.config.schema import Config
from moe_train.loop import step
from moe_train.ranks import RankContext, build_model
from moe_train.run import Run
from moe_train.train import build_trainer
from parallel import groups, runtime
from parallel.layout import ParallelLayout
from parallel.rank_info import RankInfo

BATCH, SEQUENCE, VOCABULARY = 4, 16, 128
STEPS, HALF = 6, 3

# Degrees that a test changes; the rest is 1.
Degrees = dict[str, int]


def two_micro_batches(degrees: Degrees) -> dict[str, Any]:
    """Changes for tests of what training leaves: each step of a rank adds up two micro-batches of the same samples, in
    about half the time of four. With four data-parallel ranks there is one."""
    model_parallel = degrees.get("tp", 1) * degrees.get("pp", 1) * degrees.get("cp", 1)
    data_parallel = dist.get_world_size() // model_parallel
    return {"batch__micro_batch_size": max(1, BATCH // 2 // data_parallel)}


def config(run_dir: Path, degrees: Degrees, /, **changes: Any) -> Config:
    """Config of the small run. `changes` are values by full name with `__` for the dot, such as model__topk=2."""
    cfg = Config()
    # A head size of 10 makes Megatron-Core pad between the buckets of its buffers (there is one for the embedding).
    cfg.model = ModelConfig(
        hidden_size=64, ffn_hidden_size=96, moe_ffn_hidden_size=32, vocab_size=VOCABULARY, num_attention_heads=4,
        qk_nope_head_dim=10, qk_rope_head_dim=8, v_head_dim=8, kv_lora_rank=16, q_lora_rank=24, num_experts=8, topk=2,
        num_shared_experts=1, num_dense_layers=1, router_score="sigmoid", router_bias=True, init_std=0.05,
        balance_losses=["seq_aux_loss"], balance_loss_coeffs=[1e-3], mtp_num_layers=1,
    )  # fmt: skip
    cfg.batch.global_batch_size, cfg.train.seq_length, cfg.train.steps = BATCH, SEQUENCE, STEPS
    cfg.schedule.warmup_steps, cfg.optimizer.lr = 2, 3e-4  # larger ones flip near-tied routes between layouts
    cfg.runtime, cfg.run_dir = "cpu", str(run_dir)
    for name, degree in degrees.items():
        setattr(cfg.parallel, name, degree)
    for name, value in changes.items():
        group, _, field = name.partition("__")
        setattr(getattr(cfg, group) if field else cfg, field or group, value)
    return cfg


def join(cfg: Config) -> RankContext:
    """What `moe_train.ranks.setup_ranks` makes, in a process group that exists."""
    world = dist.get_world_size()
    rank = RankInfo(dist.get_rank(), world, dist.get_rank(), world, "127.0.0.1", 0, "local")
    degrees = {name: getattr(cfg.parallel, name) for name in ("tp", "pp", "vpp", "cp", "ep", "etp")}
    layout = ParallelLayout.resolve(**degrees, world_size=world)
    device = runtime.start("cpu", rank, 60)
    groups.destroy()
    groups.create(layout, cfg.seed)
    torch.manual_seed(cfg.seed)
    return RankContext(resolve(cfg, layout, runtime="cpu"), rank, device)


def prepare(cfg: Config) -> Run:
    """This rank's part of the run, as `moe_train.train.prepare` makes it, without callbacks."""
    ranks = join(cfg)
    run = build_trainer(ranks, build_model(ranks))
    run.callbacks = []
    return run


def batches(run: Run) -> list[Iterator[dict[str, torch.Tensor]]]:
    """From the next sample on, one iterator for each model chunk. Sample i is the same in every layout."""
    return [samples_from(run, run.state.consumed_samples) for _ in run.chunks]


def batches_again(run: Run) -> list[Iterator[dict[str, torch.Tensor]]]:
    """From the first sample on."""
    return [samples_from(run, 0) for _ in run.chunks]


def samples_from(run: RankContext, start: int) -> Iterator[dict[str, torch.Tensor]]:
    """Micro-batches of this data-parallel rank, from sample `start` on."""
    size, length = run.cfg.batch.micro_batch_size, run.cfg.train.seq_length
    index = start + run.layout.coordinates(run.rank.rank).dp * size
    while True:
        text = torch.cat([_text(sample, length) for sample in range(index, index + size)])
        yield {
            "tokens": text[:, :-1].contiguous(),
            "labels": text[:, 1:].contiguous(),
            "loss_mask": torch.ones(size, length),
            "position_ids": torch.arange(length).repeat(size, 1),
        }
        index += run.layout.dp * size


class Samples(Dataset[dict[str, torch.Tensor]]):
    """A dataset of the same texts, in memory."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        text = _text(index, SEQUENCE).squeeze(0)
        return {
            "tokens": text[:-1], "labels": text[1:], "loss_mask": torch.ones(SEQUENCE),
            "position_ids": torch.arange(SEQUENCE),
        }  # fmt: skip


def _text(sample: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sample)
    return torch.randint(0, VOCABULARY, (1, length + 1), generator=generator)


def train(run: Run, steps: int) -> list[float]:
    """Loss of each of the next `steps` steps."""
    data = batches(run)
    return [step.train_step(run, data)["lm_loss"] for _ in range(steps)]


def tensors(run: Run) -> dict[str, tuple[float, float]]:
    """(sum, sum of squares) of every tensor of the run over all ranks, by its global name: the same in every layout."""
    from moe_train.checkpoint.storage import Request

    model = state.model_state(run.chunks)
    optimizer = state.without_masters(state.optimizer_state(run, model, loading=False))
    sums: dict[str, tuple[float, float]] = {}
    for shard in Request({"model": model, "optimizer": optimizer}).tensors:
        if shard.replica_id in (0, (0, 0, 0)) or (isinstance(shard.replica_id, tuple) and not any(shard.replica_id)):
            total, squares = sums.get(shard.key, (0.0, 0.0))
            data = shard.data.double()
            sums[shard.key] = (total + float(data.sum()), squares + float(data.square().sum()))
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, sums)
    everything: dict[str, tuple[float, float]] = {}
    for part in gathered:
        for name, (total, squares) in part.items():
            before = everything.get(name, (0.0, 0.0))
            everything[name] = (before[0] + total, before[1] + squares)
    return everything


def shards(state_dict: dict[str, Any]) -> list[Any]:
    """Every sharded tensor of a state, with what is stored in several parts taken apart."""
    from moe_train.checkpoint.storage import Request

    return Request(state_dict).tensors


def bits(run: Run) -> list[bytes]:
    """Every parameter, buffer, moment and random stream of this rank, bit by bit."""
    from moe_train.checkpoint.storage import Request

    model = state.model_state(run.chunks)
    wanted = {
        "model": model,
        "optimizer": state.optimizer_state(run, model, loading=False),
        "rng": state.random_state(run),
    }
    return [shard.data.contiguous().view(torch.uint8).numpy().tobytes() for shard in Request(wanted).tensors]


def save_halfway(run_dir: Path, degrees: Degrees, changes: dict[str, Any]) -> dict[str, Any]:
    """Train half of the steps, save, and train the rest without interruption."""
    run = prepare(config(run_dir, degrees, **two_micro_batches(degrees) | changes))
    train(run, HALF)
    saved = checkpoint.save(run)
    halfway, losses = tensors(run), train(run, STEPS - HALF)
    return {"saved": saved, "halfway": halfway, "losses": losses, "bits": bits(run), "state": asdict(run.state)}


def continue_halfway(run_dir: Path, degrees: Degrees, changes: dict[str, Any]) -> dict[str, Any]:
    """Resume and train the rest of the steps."""
    run = prepare(config(run_dir, degrees, **two_micro_batches(degrees) | changes))
    checkpoint.resume(run)
    halfway, losses = tensors(run), train(run, STEPS - HALF)
    return {"halfway": halfway, "losses": losses, "bits": bits(run), "state": asdict(run.state)}
