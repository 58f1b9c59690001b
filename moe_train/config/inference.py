"""Options of the commands that run a trained model. No torch import."""

from __future__ import annotations

from dataclasses import dataclass

from moe_train.config.fields import doc
from parallel.architecture.kv_cache import CACHE_FORMATS


@dataclass
class CacheConfig:
    """The KV cache and the batches of generation: fields that plans and engines share."""

    cache_format: str | None = doc(
        None, "Format of the KV cache; null means the precision of the model. moe-memory and moe-plan then show all.",
        choices=tuple(CACHE_FORMATS),
    )  # fmt: skip
    rotary_format: str | None = doc(
        None, "Format of the rotary key of latent attention; null means cache_format, or bf16 where that is scaled.",
        choices=tuple(CACHE_FORMATS),
    )  # fmt: skip
    block_size: int = doc(16, "Tokens in one block of the KV cache.", minimum=1, maximum=1_000_000)
    max_batch_tokens: int = doc(
        2048, "Tokens in one forward pass, over all sequences.", minimum=1, maximum=1_000_000_000
    )
    max_sequences: int = doc(64, "Sequences that run at the same time.", minimum=1, maximum=1_000_000)
    speculate: bool = doc(
        False,
        "Draft tokens with multi-token prediction, while that is measured to be faster; the tokens are the same, up to "
        "rounding in 16 bits.",
    )


@dataclass
class EngineConfig(CacheConfig):
    """The KV cache and the batches of generation."""

    num_blocks: int | None = doc(
        None, "Blocks of the KV cache; null follows from memory_gib.", minimum=1, maximum=1_000_000_000
    )
    memory_gib: float | None = doc(
        None, "Memory of the KV cache on one rank, GiB; null means what max_sequences sequences can use, but at most a "
        "quarter of the memory that is free.", minimum=1e-6,
    )  # fmt: skip


@dataclass
class PlannedEngineConfig(CacheConfig):
    """What moe-memory and moe-plan count as KV cache."""

    context_length: int | None = doc(
        None,
        "moe-memory and moe-plan: tokens of one sequence, prompt and continuation; null means train.seq_length.",
        minimum=1,
    )


@dataclass
class SamplingConfig:
    """How the continuation of a prompt is chosen."""

    max_new_tokens: int = doc(256, "Tokens of a continuation, at most.", minimum=1, maximum=1_000_000_000)
    temperature: float = doc(0.0, "Divides the logits; 0 takes the most probable token.", minimum=0)
    top_k: int = doc(0, "Draw only from the top_k most probable tokens; 0 means all.", minimum=0)
    top_p: float = doc(
        1.0, "Draw only from the most probable tokens whose probabilities add up to top_p.", minimum=1e-9, maximum=1
    )
    min_p: float = doc(
        0.0, "Draw only tokens with at least min_p times the probability of the most probable one.", minimum=0,
        maximum=1,
    )  # fmt: skip
    seed: int = doc(0, "Seed of the draws.", minimum=0)
    stop: list[str] = doc([], "Strings that end a continuation; they are not part of it.", example="['\\n\\n']")
    ignore_eod: bool = doc(False, "Continue after the token that ends a document.")


@dataclass
class GenerateConfig:
    """What moe-generate reads and writes."""

    prompt: str | None = doc(None, "The prompt; null reads `input`.")
    input: str | None = doc(None, "File with a prompt, or with one JSON object on each line; null means stdin.")
    output: str | None = doc(None, "File of JSON lines to write; null prints the text, or the lines.")
    format: str | None = doc(
        None, "Format of the input: one prompt (text) or one in each line (jsonl); null follows from its suffix.",
        choices=("text", "jsonl"),
    )  # fmt: skip
    n: int = doc(1, "Continuations of each prompt.", minimum=1, maximum=1024)
    logprobs: int | None = doc(
        None, "Write log-probabilities of the tokens, and of so many of the most probable ones; null writes none.",
        minimum=0, maximum=1_000,
    )  # fmt: skip


@dataclass
class ChatConfig:
    """A conversation."""

    system: str | None = doc(None, "System message at the start of the conversation.")
    template: str | None = doc(
        None, "File of a chat template (Jinja); null means that of the tokenizer. Without one, the text is continued."
    )


@dataclass
class ServeConfig:
    """An HTTP server with OpenAI's completion interface, and what it accepts."""

    host: str = doc("127.0.0.1", "Address to listen at; any but a loopback address needs a token.")
    port: int = doc(8000, "Port; 0 lets the system choose.", minimum=0, maximum=65535)
    token_file: str | None = doc(
        None, "File with the bearer token that requests must have; null means none. MOE_SERVE_TOKEN sets it too."
    )
    model_name: str | None = doc(None, "Name of the model in requests; null means that of its directory.")
    max_body_bytes: int = doc(1048576, "Largest body of a request, bytes.", minimum=1)
    max_prompt_tokens: int | None = doc(None, "Longest prompt, tokens; null means what the model allows.", minimum=1)
    max_new_tokens: int = doc(4096, "Most tokens that a request can ask for.", minimum=1)
    max_concurrent: int = doc(64, "Requests that generate at the same time.", minimum=1, maximum=1_000_000)
    max_queued: int = doc(256, "Further requests that wait; more get status 429.", minimum=0, maximum=1_000_000)
    timeout_s: float = doc(600.0, "Seconds after which a request is cancelled.", minimum=0.001)
    drain_s: float = doc(30.0, "Seconds that running requests get to end after SIGTERM.", minimum=0)
