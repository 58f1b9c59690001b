"""The cases of `make gpu-check`: what each process runs, what it needs, and within which limits its numbers must be.

A case is one process, so that a crash, a CUDA error or memory that runs out in one leaves the others alone. A case with
several parts reports each when it is done. When its process fails, the part that ran has failed, and another process
runs the remaining parts. What a process does is in bench/gpu_worker.py. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bench.recompute_sets import SETS
from moe_train.config.composition.compose import compose
from moe_train.config.composition.validate import validate
from parallel.errors import ConfigError

WORKER = "bench.gpu_worker"
NO_TF32 = {"NVIDIA_TF32_OVERRIDE": "0"}
"""fp32 is fp32 in cuBLAS and cuDNN, whichever library calls them."""

COMMON = [
    "model=tiny", "model.qk_rope_head_dim=32",  # MXFP8 and NVFP4 take widths that are multiples of 32
    "train.seq_length=128", "train.eval_batches=0", "batch.global_batch_size=8", "batch.micro_batch_size=4",
    "schedule.warmup_steps=5", "resume=never", "checkpoint.save_at_end=false", "telemetry.tensorboard=false",
    "telemetry.progress=false", "telemetry.log_interval_steps=1",
]  # fmt: skip

# Relative differences from the CPU: of losses over three steps, of all gradients of the first one, and of the
# parameter whose gradient differs most. In bf16 tokens that are close between two experts go to another one.
GRADIENT_LIMITS = {
    "fp32": {"loss_difference": 1e-4, "gradient_difference": 1e-3, "worst_gradient_difference": 1e-2},
    "bf16": {"loss_difference": 5e-3, "gradient_difference": 0.1, "worst_gradient_difference": 0.5},
}
RECOMPUTE_LIMITS = {"gradient_difference": 1e-5, "worst_gradient_difference": 1e-4}
CHECKPOINT_LIMITS = {"loss_difference": 1e-4}
MEMORY_LIMITS = {"prediction_error": 0.15}
# Largest relative difference of smoothed losses from those of bf16, after the warm-up: DeepSeek-V3's criterion, where
# emulation on a CPU is at most 0.07 % apart (bench/results/fp8_loss.json). fp16 skips its first steps while it looks
# for a loss scale, and FP4 rounds more.
RECIPE_LIMITS = {
    "fp32": 0.0025, "fp16": 0.01, "fp8_block": 0.0025, "fp8_tensor": 0.0025, "fp8_delayed": 0.0025, "mxfp8": 0.0025,
    "nvfp4": 0.01,
}  # fmt: skip
RECIPE_STEPS, RECIPE_WARM_UP = 50, 20
RECIPES = {
    ("cuda", "local"): ("fp32", "fp16"),  # FP8 on GPUs is Transformer Engine's
    ("cuda", "te"): ("fp32", "fp16", "fp8_block", "fp8_tensor", "fp8_delayed", "mxfp8", "nvfp4"),
    ("cpu", "local"): ("fp32", "fp16", "fp8_block", "fp8_tensor", "fp8_delayed", "mxfp8"),
}
"""Recipes against bf16, by runtime and backend. Whether the GPU has them is asked in the process of the case."""

_TO_MEMORY = ["recompute.offload=memory", "recompute.offload_min_bytes=65536"]
OFFLOAD = {
    ("cuda", "te"): {
        f"offload {modules}": [*_TO_MEMORY, f"recompute.offload_modules=[{modules}]"]
        for modules in ("qkv_linear", "core_attn,attn_proj", "expert_fc1,moe_act")
    },
    ("cuda", "local"): {"offload to memory": _TO_MEMORY},
    ("cpu", "local"): {
        "offload to memory": _TO_MEMORY, "offload to a file": [*_TO_MEMORY, "recompute.offload=file"],
    },
}  # fmt: skip

# 1.05 billion parameters of DeepSeek-V3's kind, 32 experts top-4; it needs some 25 GB.
LARGE = [
    "model.num_layers=12", "model.hidden_size=1024", "model.ffn_hidden_size=2816", "model.num_experts=32",
    "model.moe_ffn_hidden_size=896", "model.num_attention_heads=16", "model.q_lora_rank=384", "model.kv_lora_rank=256",
    "model.qk_nope_head_dim=64", "model.qk_rope_head_dim=32", "model.v_head_dim=64", "model.mtp_num_layers=0",
    "precision=bf16", "train.seq_length=2048", "batch.micro_batch_size=4", "batch.global_batch_size=16",
]  # fmt: skip
LARGE_STEPS = 12
STEP_TIME, PEAK_MEMORY = "step time", "peak memory"

# The cluster whose GPU reports this name to the driver.
CLUSTERS = {
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA H800": "h800",
    "NVIDIA B200": "b200",
    "NVIDIA GB200": "gb200",
    "NVIDIA B300 SXM6 AC": "b300",
    "NVIDIA GB300": "gb300",
}


@dataclass(frozen=True)
class GpuCase:
    """One process.

    Args:
        name: of the case, in the table and in bench/results/gpu_check.json.
        entry: what the process calls, as module:function, with a `bench.gpu_worker.Task`.
        overrides: of the config, after `COMMON`.
        limits: largest magnitude of each number that a part must report.
        needs: names of preparations, which run before, once for all cases.
        parts: the names that it reports separately; a case of one part has the name "".
        measured_only: parts that are reported without limits.
        options: further arguments of `entry`.
        environment: variables of the process.
        alone: no other process runs meanwhile, because it measures time or memory.
    """

    name: str
    entry: str
    overrides: Sequence[str] = ()
    limits: Mapping[str, float] = field(default_factory=dict)
    needs: Sequence[str] = ()
    parts: Sequence[str] = ("",)
    measured_only: Sequence[str] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    timeout_s: float = 90
    alone: bool = False

    def limits_of(self, part: str) -> Mapping[str, float]:
        """Limits of a part's numbers; none where it is only measured."""
        return {} if part in self.measured_only else self.limits


@dataclass(frozen=True)
class Refused:
    """A case that the config rules exclude on this runtime and backend."""

    name: str
    why: str


@dataclass(frozen=True)
class Plan:
    """The cases in the order in which they run, and the preparations by name."""

    cases: list[GpuCase]
    preparations: dict[str, GpuCase]
    refused: list[Refused]


def plan(runtime: str, backends: Sequence[str], *, apex: bool = False, more: Sequence[str] = ()) -> Plan:
    """Every case for a device.

    Args:
        runtime: cuda, or cpu for a stand-in.
        backends: local, and te where Transformer Engine is installed.
        apex: whether NVIDIA apex is installed.
        more: overrides of every process.
    """
    preparations = {"data": _process("data", "data", [], timeout_s=150)}
    for precision in GRADIENT_LIMITS:
        words = ["runtime=cpu", "backend.name=local", f"precision={precision}"]
        preparations[f"reference {precision}"] = _process(f"reference {precision}", "reference", words, needs=["data"])
    preparations["saved by cpu"] = _saves("saved by cpu", ["runtime=cpu", "backend.name=local"])
    cases: list[GpuCase] = []
    refused: list[Refused] = []
    kinds = {backend: [f"runtime={runtime}", f"backend.name={backend}"] for backend in backends}
    variants = dict(kinds)
    if apex and runtime == "cuda":
        variants["local with apex"] = [*kinds["local"], "backend.apex=true"]
    for backend, words in kinds.items():
        cases.append(_large(backend, words, runtime))
    for name, words in variants.items():
        cases += _gradients(name, words)
    for backend, words in kinds.items():
        saved = f"saved by {backend}"
        preparations[saved] = _saves(saved, words)
        cases += _checkpoints(backend, words, saved)
    for backend, words in kinds.items():
        sets = {
            **{name: words_of_set for name, words_of_set in SETS.items() if name != "none"},
            **OFFLOAD[runtime, backend],
        }
        case, impossible = _recompute(backend, words, sets, more)
        cases.append(case)
        refused += impossible
    for backend, words in kinds.items():
        baseline = f"bf16 {backend}"
        preparations[baseline] = _recipe(baseline, "bf16", words, entry="baseline", needs=["data"])
        for precision in RECIPES[runtime, backend]:
            case = _recipe(f"precision {precision}, {backend}", precision, words, entry="recipe", needs=[baseline])
            limits = {"largest_difference": RECIPE_LIMITS[precision]}
            cases.append(replace(case, limits=limits, options={**case.options, "baseline": baseline}))
    everything = [*cases, *preparations.values()]
    named = {case.name: replace(case, overrides=[*COMMON, *case.overrides, *more]) for case in everything}
    return Plan(
        [named[case.name] for case in cases], {name: named[name] for name in preparations}, refused
    )  # fmt: skip


def _process(name: str, entry: str, overrides: Sequence[str], **options: Any) -> GpuCase:
    return GpuCase(name, f"{WORKER}:{entry}", overrides, **options)


def _gradients(name: str, words: Sequence[str]) -> Iterator[GpuCase]:
    for precision, limits in GRADIENT_LIMITS.items():
        reference = f"reference {precision}"
        yield _process(
            f"gradients {precision}, {name}", "gradients", [*words, f"precision={precision}"],
            limits={**limits, "missing_parameters": 0}, needs=[reference], options={"reference": reference},
            environment=NO_TF32 if precision == "fp32" else {},
        )  # fmt: skip


def _large(backend: str, words: Sequence[str], runtime: str) -> GpuCase:
    shape = LARGE if runtime == "cuda" else ["precision=bf16"]
    return _process(
        f"large model, {backend}", "large", [*words, *shape, f"train.steps={LARGE_STEPS}"], limits=MEMORY_LIMITS,
        needs=["data"], parts=[STEP_TIME, PEAK_MEMORY], measured_only=[STEP_TIME], timeout_s=120,
        alone=True,
    )  # fmt: skip


def _saves(name: str, words: Sequence[str]) -> GpuCase:
    return _process(
        name, "save", [*words, "precision=fp32", "train.steps=6"], needs=["data"], environment=NO_TF32
    )  # fmt: skip


def _checkpoints(backend: str, words: Sequence[str], saved: str) -> Iterator[GpuCase]:
    ways = {
        f"checkpoint cpu to {backend}": ("saved by cpu", words),
        f"checkpoint {backend} to cpu": (saved, ["runtime=cpu", "backend.name=local"]),
    }
    for name, (source, reader) in ways.items():
        yield _process(
            name, "resume", [*reader, "precision=fp32", "train.steps=6"], limits=CHECKPOINT_LIMITS, needs=[source],
            options={"saved": source}, environment=NO_TF32,
        )  # fmt: skip


def _recompute(
    backend: str, words: Sequence[str], sets: Mapping[str, Sequence[str]], more: Sequence[str]
) -> tuple[GpuCase, list[Refused]]:
    """The sets that this backend takes, as parts of one case, and those that it refuses."""
    name = f"recompute, {backend}"
    shared = [*words, "precision=fp32", "train.steps=1", "schedule.warmup_steps=1"]
    possible: dict[str, Sequence[str]] = {}
    refused = []
    for part, overrides in sets.items():
        try:
            validate(compose([*COMMON, *shared, *overrides, *more]))
        except ConfigError as error:
            refused.append(Refused(f"{name}: {part}", error.cause))
        else:
            possible[part] = list(overrides)
    case = _process(
        name, "recompute", shared, limits=RECOMPUTE_LIMITS, needs=["data"], parts=list(possible),
        options={"sets": possible}, environment=NO_TF32, timeout_s=150,
    )  # fmt: skip
    return case, refused


def _recipe(name: str, precision: str, words: Sequence[str], *, entry: str, needs: Sequence[str]) -> GpuCase:
    length = [
        f"train.steps={RECIPE_STEPS}", f"schedule.warmup_steps={RECIPE_WARM_UP}", "batch.global_batch_size=32",
        "batch.micro_batch_size=32",
    ]  # fmt: skip
    options = {"warm_up": RECIPE_WARM_UP}
    return _process(name, entry, [*words, *length, f"precision={precision}"], needs=needs, options=options)
