"""Options of `moe-plan`, and those that moe-submit takes too. YAML files under `conf/plan/` fill them. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from moe_train.config.fields import doc


@dataclass
class EstimateConfig:
    """What an estimate of step time and memory assumes beyond the config of the run: software, and what it can do."""

    schedules: list[str] = doc(
        ["1f1b", "interleaved"], "Pipeline schedules to try; Megatron-Core runs 1f1b and interleaved.",
        choices=("1f1b", "interleaved", "zb1p", "dualpipe", "dualpipev"),
    )  # fmt: skip
    software: str = doc(
        "megatron", "Software to model: Megatron-Core as of `software_date`, or DeepSeek's own of 2024.",
        choices=("megatron", "deepseek"),
    )  # fmt: skip
    software_date: int = doc(202604, "Month of the software, year x 100 + month.", minimum=202001, maximum=210012)
    cuda_graphs: str | None = doc(
        None, "CUDA graphs: none, scoped (attention, norms, router), or full (the whole step); null means as usual at "
        "software_date.", choices=("none", "scoped", "full"),
    )  # fmt: skip
    overlap_all_to_all: bool | None = doc(
        None, "Expert dispatch overlaps with compute; null means as usual at software_date."
    )
    overlap_tp: bool | None = doc(
        None, "Tensor-parallel collectives overlap with their GEMM; null means as usual at software_date."
    )
    attention_kernel: str | None = doc(
        None, "Kernel of core attention: the fastest of the GPU, FlashAttention-2, or unfused; null means as usual at "
        "software_date.", choices=("fastest", "flash2", "unfused"),
    )  # fmt: skip
    imbalance: float | None = doc(
        1.0, "Tokens of the most loaded expert-parallel rank, relative to the mean; null takes that of learned "
        "routing, as fitted.", minimum=1,
    )  # fmt: skip
    fsdp: bool = doc(False, "Shard weights and gradients over data-parallel ranks, and gather them layer by layer.")
    frozen_weights: bool = doc(False, "Weights without gradients and optimizer state, as under LoRA.")
    loss: str = doc(
        "megatron", "Cross entropy whose memory is counted: Megatron-Core's, or that of torch, eager or compiled.",
        choices=("megatron", "torch", "torch_compiled"),
    )  # fmt: skip


@dataclass
class TrainingStage:
    """A stage of the whole training, an entry of `plan.recipe`: so many tokens, steps or GPU-hours.

    It runs as the plan, except for the sequences and the batch that it names.
    """

    name: str = doc("training", "Name, for the tables.")
    tokens: int | None = doc(None, "Its length, tokens.", minimum=1)
    steps: int | None = doc(None, "Its length, optimizer steps.", minimum=1)
    gpu_hours: int | None = doc(None, "Its length, GPU-hours that are known; no plan is made for it.", minimum=1)
    seq_length: int | None = doc(None, "Tokens in one sequence; null means train.seq_length.", minimum=1)
    global_batch_size: int | None = doc(None, "Sequences in one step; null means batch.global_batch_size.", minimum=1)
    cp: int | None = doc(
        None, "Context-parallel degree; null means the plan's, or with other sequences the smallest that can run.",
        minimum=1,
    )  # fmt: skip
    failures: bool = doc(False, "Count failures, restarts and checkpoints in its time.")

    @property
    def as_planned(self) -> bool:
        """Whether it runs exactly as the plan."""
        return self.seq_length is None and self.global_batch_size is None and self.cp is None


@dataclass
class PlanConfig(EstimateConfig):
    """The question to the planner: how many GPUs, which choices, which stages of a recipe, where the answer goes."""

    gpus: int | None = doc(None, "GPUs to plan for; null takes those of parallel.*.", minimum=1, maximum=10_000_000)
    search: bool = doc(True, "Search all layouts; false times the one of parallel.* alone.")
    top: int = doc(10, "Number of plans to show.", minimum=1, maximum=1_000)
    precisions: list[str] = doc(
        [], "FP8 recipes to try in addition to precision.fp8 (none means BF16); empty means only that.",
        choices=("none", "block", "tensor", "mxfp8"),
    )  # fmt: skip
    micro_batch_sizes: list[int] = doc([1, 2, 4], "Micro-batch sizes to try, sequences.", minimum=1)
    cp: list[int] = doc(
        [], "Context-parallel degrees to try; empty means 1, and up to 16 for long sequences.", minimum=1
    )
    recipe: list[TrainingStage] = doc(
        [], "Stages of the whole training; empty means one stage of train.tokens.",
        example="[{name:pre-training,tokens:14.8T},{name:to 32K,seq_length:32k,global_batch_size:1920,steps:1000}]",
    )  # fmt: skip
    checkpoint_interval_s: float | None = doc(
        None, "Time between checkpoints, seconds; null means the optimum for the expected failures.", minimum=1
    )
    output: str | None = doc(
        None, "Directory for report.html, pipeline.svg, trace.json and plan.json; null writes none."
    )
    write: str | None = doc(None, "File to which the best plan is written as a parallel/ YAML; null writes none.")
    runs: str | None = doc(None, "validate: table of published runs; null means tools/published/published_runs.csv.")
    models: str | None = doc(
        None, "validate: directory of model YAML files, in addition to conf/model and "
        "tools/published/validation_models.",
    )  # fmt: skip
    results: str | None = doc(
        None,
        "validate: JSON file to write; null means plan_validate.json, in bench/results of a "
        "clone, else in the current directory.",
    )
