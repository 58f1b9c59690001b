"""The processes of `make bench-generate`: our engine, and `generate` of transformers, on one checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import step_data
from bench.step_data import LIKE_TRANSFORMERS, MODELS
from bench.workers import Requests

OURS = "moe-train"
MAX_CONTEXT = 16_384
LONG_CONTEXT, PREFILL_CHUNK = 4096, 512


@dataclass(frozen=True)
class GenerateTask:
    """What both sides run.

    Args:
        model: a key of `step_data.MODELS`.
        dtype: fp32 or bf16.
    """

    model: str
    dtype: str
    threads: int

    def overrides(self) -> list[str]:
        """Of our config."""
        length = [f"model.max_position_embeddings={MAX_CONTEXT}", f"precision={self.dtype}"]
        # Larger weights than those of training, so that the most probable token is seldom close to the next.
        return [*LIKE_TRANSFORMERS, *MODELS[self.model], *length, "model.init_std=0.06"]


@dataclass(frozen=True)
class Timing:
    """One generation.

    Args:
        prefill_s: until each sequence has its first token; None where the prompts were not all computed.
        decode_s: of the steps after that, in which every sequence gets a token.
        steps: their number.
        tokens: of each sequence, or of the first where the others are copies.
    """

    prefill_s: float | None
    decode_s: float
    steps: int
    tokens: list[list[int]]


def write_checkpoint(task: GenerateTask, directory: Path) -> None:
    """A Hugging Face checkpoint with random weights."""
    import torch

    from bench import step_transformers
    from moe_train.config.composition.compose import compose
    from moe_train.ranks import build_model, setup_ranks
    from parallel.rank_info import RankInfo

    cfg = compose([*task.overrides(), "precision=fp32"])
    ranks = setup_ranks(cfg, RankInfo(0, 1, 0, 1, "127.0.0.1", step_data.free_port(), "local"))
    (model,) = build_model(ranks)
    state = {name: value.detach() for name, value in [*model.named_parameters(), *model.named_buffers()]}
    weights = step_transformers.from_megatron(state, cfg.model)
    transformer: Any = step_transformers.build(cfg, weights, "grouped_mm")
    transformer.to({"bf16": torch.bfloat16, "fp32": torch.float32}[task.dtype])
    transformer.save_pretrained(directory)


def prompts(batch: int, context: int, vocabulary: int, seed: int) -> list[list[int]]:
    """Random text."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    text: list[list[int]] = torch.randint(vocabulary, (batch, context), generator=generator).tolist()
    return text


def prepare(side: str, task: GenerateTask, directory: Path) -> Requests:
    """The requests of the process of `side`: moe-train, or an experts implementation of transformers."""
    import torch

    from parallel.runtime.threads import use_threads

    if side != OURS:
        torch.set_num_threads(task.threads)
        return {"generate": _transformers(side, directory)}
    use_threads(task.threads)  # as the launcher does
    generate, profile = _ours(task, directory)
    return {"generate": generate, "profile": profile}


def _ours(task: GenerateTask, directory: Path) -> tuple[Callable[..., Timing], Callable[..., Any]]:
    from bench import step_profile
    from moe_train.checkpoint import weights
    from moe_train.config.composition.compose import compose
    from moe_train.inference.engine import Engine, EngineOptions
    from moe_train.inference.sampling_params import SamplingParams
    from moe_train.ranks import build_model, setup_ranks
    from parallel.rank_info import RankInfo

    cfg = compose(task.overrides())
    ranks = setup_ranks(cfg, RankInfo(0, 1, 0, 1, "127.0.0.1", step_data.free_port(), "local"))
    chunks = build_model(ranks)
    weights.load(ranks, chunks, directory)

    def start(batch: int, context: int, new: int, seed: int) -> tuple[Engine, list[int]]:
        """An engine that has computed the prompts, and the numbers of the requests."""
        options = EngineOptions(num_blocks=batch * -(-(context + new) // 16), max_batch_tokens=8192)
        engine = Engine(ranks, chunks, options).__enter__()
        params = SamplingParams(max_new_tokens=new)
        requests = [engine.add_request(p, params) for p in prompts(batch, context, cfg.model.vocab_size, seed)]
        return engine, requests

    def generate(batch: int, context: int, new: int, seed: int) -> Timing:
        engine, requests = start(batch, context, new, seed)
        tokens: dict[int, list[int]] = {request: [] for request in requests}
        began, prefill_s, decode_s, steps = time.perf_counter(), 0.0, 0.0, 0
        while not engine.is_idle:
            before = time.perf_counter()
            output = engine.step()
            after = time.perf_counter()
            for token in output.tokens:
                tokens[token.request].append(token.token)
            if not prefill_s:
                prefill_s = after - began if all(tokens.values()) else 0.0
            elif len(output.tokens) == batch:
                decode_s, steps = decode_s + after - before, steps + 1
        engine.__exit__()
        return Timing(prefill_s, decode_s, steps, list(tokens.values()))

    def profile(batch: int, context: int, count: int) -> Any:
        engine, _ = start(batch, context, count + batch + 8, seed=0)
        while engine.num_running < batch or any(not s.num_new_tokens for s in engine.replicas[0].running):
            engine.step()
        parts = step_profile.profile(chunks, None, lambda: float(len(engine.step().tokens)), count)
        engine.__exit__()
        return parts

    return generate, profile


def _transformers(experts: str, directory: Path) -> Callable[..., Timing]:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.generation.streamers import BaseStreamer

    from parallel.runtime.cpu import keep_freed_memory

    keep_freed_memory()  # as `setup_ranks` does for ours
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", experts_implementation=experts).eval()
    model.generation_config.pad_token_id = 0

    class Clock(BaseStreamer):
        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: Any) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    def continued(text: torch.Tensor, new: int, **options: Any) -> tuple[Any, list[float]]:
        """What `generate` returns for `text` [batch, t], and the times of the prompt and of each new token."""
        clock = Clock()
        with torch.no_grad():
            output = model.generate(
                text, attention_mask=torch.ones_like(text), max_new_tokens=new, min_new_tokens=new, do_sample=False,
                use_cache=True, streamer=clock, eos_token_id=None, return_dict_in_generate=True, **options,
            )  # fmt: skip
        return output, clock.times

    def generate(batch: int, context: int, new: int, seed: int) -> Timing:
        is_long = context > LONG_CONTEXT
        # Whole prompts of this length make it take more memory than a laptop has.
        model.generation_config.prefill_chunk_size = PREFILL_CHUNK if is_long else None
        text = torch.tensor(prompts(batch, context, model.config.vocab_size, seed))
        if is_long and batch > 1:
            return generate_alike(text[:1], batch, new)
        began = time.perf_counter()
        output, times = continued(text, new)
        return Timing(times[1] - began, times[-1] - times[1], new - 1, output.sequences[:, context:].tolist())

    def generate_alike(text: torch.Tensor, batch: int, new: int) -> Timing:
        """Its prefill of all prompts would take most of an hour. So it computes one, and copies the cache. The copies
        continue with tokens of their own, so that they choose experts of their own."""
        first, _ = continued(text, 1)
        cache = first.past_key_values
        cache.batch_repeat_interleave(batch)
        model.generation_config.prefill_chunk_size = None
        texts = first.sequences.repeat(batch, 1)
        texts[1:, -1] = torch.arange(1, batch) * 37 % model.config.vocab_size
        output, times = continued(texts, new - 1, past_key_values=cache)
        return Timing(None, times[-1] - times[1], new - 2, output.sequences[:1, text.size(1) :].tolist())

    return generate
