"""The one typed configuration of a run. Dataclass defaults < YAML groups under `conf/` < command line.

Every field has a one-line doc with its unit. Nothing here imports torch: login nodes read it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from moe_train.config.cluster import ClusterConfig
from moe_train.config.fields import REQUIRED, doc
from moe_train.config.launcher import LauncherConfig
from moe_train.config.model import ModelConfig
from moe_train.config.objective import OBJECTIVES
from moe_train.config.optimizer import OptimizerConfig
from moe_train.config.resilience import ResilienceConfig
from moe_train.config.schedule import ScheduleConfig
from parallel.architecture.attention import ATTENTIONS
from parallel.dispatchers import DISPATCHERS
from parallel.fp8_recipes import FP4, FP8


@dataclass
class ParallelConfig:
    """Layout of the ranks: tp x cp x dp x pp ranks, and the same ranks as etp x ep x edp x pp."""

    tp: int = doc(1, "Tensor-parallel degree.", minimum=1, maximum=1_000_000)
    pp: int = doc(1, "Pipeline-parallel degree.", minimum=1, maximum=1_000_000)
    vpp: int = doc(
        1,
        "Virtual pipeline stages (model chunks) of each rank, for the interleaved schedule; 1 means none.",
        minimum=1,
        maximum=1_000_000,
    )
    cp: int = doc(1, "Context-parallel degree.", minimum=1, maximum=1_000_000)
    ep: int = doc(1, "Expert-parallel degree.", minimum=1, maximum=1_000_000)
    etp: int = doc(1, "Tensor-parallel degree inside one expert.", minimum=1, maximum=1_000_000)
    dp: int | None = doc(
        None, "Data-parallel degree; null follows from the number of ranks.", minimum=1, maximum=1_000_000
    )
    sequence_parallel: bool | None = doc(None, "Split norms and dropout over tp ranks; null means yes when tp > 1.")
    pipeline_layout: str | None = doc(
        None, "Layers of each stage, such as 'E,t*4|t*4|t*4|t,m,L'; null means balanced by cost."
    )
    distributed_optimizer: bool = doc(True, "Shard optimizer state over data-parallel ranks (ZeRO-1).")
    overlap_grad_reduce: bool = doc(False, "Overlap gradient reduction with the backward pass.")
    overlap_param_gather: bool = doc(False, "Overlap parameter all-gather with the next forward pass.")
    overlap_p2p: bool | None = doc(
        None, "Overlap pipeline point-to-point communication with compute; null means yes when vpp > 1."
    )
    dispatcher: str = doc(
        "alltoall", "Token dispatcher; flex (DeepEP) needs GPUs.",
        choices=tuple(DISPATCHERS),
    )  # fmt: skip
    shared_expert_overlap: bool = doc(False, "Overlap the shared experts with token dispatch (GPUs only).")


@dataclass
class BackendConfig:
    """Which modules implement the model. Nothing is guessed from what happens to be installed."""

    name: str = doc(
        "auto", "Transformer Engine, or Megatron-Core's own modules; auto means te on cuda.",
        choices=("auto", "te", "local"),
    )  # fmt: skip
    apex: bool = doc(False, "Use NVIDIA apex (fused norm, Adam, gradient accumulation) where TE is absent.")
    fusions: bool | None = doc(None, "Fused kernels that Megatron-Core's docs recommend; null means yes on cuda.")
    grouped_gemm: bool | None = doc(None, "All local experts in one grouped GEMM; null means yes.")


@dataclass
class PrecisionConfig:
    """Number formats of weights, gradients and optimizer state."""

    name: str = doc("fp32", "Name of the recipe, for logs and reports.")
    dtype: str = doc("fp32", "Format of weights and activations.", choices=("fp32", "bf16", "fp16"))
    fp8: str | None = doc(
        None, "FP8 recipe of linear layers, by its scaling; null means none.",
        choices=FP8,
    )  # fmt: skip
    fp4: str | None = doc(None, "FP4 recipe of linear layers, instead of FP8 (te only); null means none.", choices=FP4)
    moments_dtype: str = doc("fp32", "Format of the two Adam moments.", choices=("fp32", "bf16"))
    stochastic_rounding: bool = doc(False, "Stochastic rounding of bf16 moments (local only).")
    fp8_format: str = doc(
        "e4m3", "FP8 format: e4m3 everywhere, or hybrid with e5m2 for gradients.", choices=("e4m3", "hybrid")
    )
    power_of_two_scales: bool | None = doc(
        None, "FP8 scales are powers of two; null means the recipe's default: true for block and mxfp8."
    )
    amax_history_len: int = doc(
        1024, "Steps (te: micro-batches) in the amax history of fp8=delayed.", minimum=1, maximum=1_000_000
    )
    first_last_layers_bf16: bool = doc(False, "Keep the first and last transformer layers in bf16.")
    num_layers_at_start_in_bf16: int = doc(1, "First layers that first_last_layers_bf16 keeps in bf16.", minimum=0)
    num_layers_at_end_in_bf16: int = doc(1, "Last layers that first_last_layers_bf16 keeps in bf16.", minimum=0)
    fp8_param_gather: bool = doc(False, "Store and all-gather the weights of linear layers in FP8 (te only).")
    fp8_dispatch: bool = doc(
        False, "Dispatch tokens, and gradients of expert outputs, in FP8 (fp8=block on local only)."
    )
    grad_reduce_fp32: bool = doc(True, "Accumulate and reduce gradients in fp32.")
    initial_loss_scale: float = doc(65536.0, "Initial dynamic loss scale of fp16.", minimum=1)


_OF_ATTENTIONS = tuple(module for kind in ATTENTIONS.values() for module in kind.recompute_modules)
RECOMPUTABLE = ("core_attn", *_OF_ATTENTIONS, "layernorm", "moe_act", "mlp", "moe", "shared_experts")
"""Modules that selective recomputation can name."""


@dataclass
class RecomputeStage:
    """What one pipeline stage, or chunk, recomputes: an entry of `recompute.stages`."""

    mode: str | None = doc(
        None, "As recompute.mode; null means selective with modules, else none.", choices=("none", "full", "selective")
    )
    modules: list[str] = doc([], "As recompute.modules.", choices=RECOMPUTABLE)

    @property
    def resolved_mode(self) -> str:
        """`mode`, or what it is where nothing says it."""
        return self.mode or ("selective" if self.modules else "none")


@dataclass
class RecomputeConfig:
    """Activation checkpointing: which activations the forward pass discards and the backward pass recomputes."""

    mode: str = doc(
        "none", "Save every activation; recompute whole layers; or recompute only `modules`.",
        choices=("none", "full", "selective"),
    )  # fmt: skip
    method: str = doc(
        "uniform", "full: save the input of every num_layers layers, or recompute num_layers layers of each chunk.",
        choices=("uniform", "block"),
    )  # fmt: skip
    num_layers: int = doc(1, "full: layers per group (uniform), or recomputed layers per chunk (block).", minimum=1)
    modules: list[str] = doc(
        [], "selective: modules to recompute.",
        choices=RECOMPUTABLE,
    )  # fmt: skip
    stages: list[RecomputeStage] = doc(
        [], "Recompute set of each of the pp stages (or pp x vpp chunks, in forward order), instead of mode and "
        "modules; empty means the same for all.", example="[{modules:[layernorm,moe_act]},{mode:none}]",
    )  # fmt: skip
    offload: str = doc(
        "none", "Offload saved activations until the backward pass: to memory (on cuda host memory), or, on the CPU "
        "only, to an unnamed file in run_dir.", choices=("none", "memory", "file"),
    )  # fmt: skip
    offload_modules: list[str] = doc(
        [], "te: modules whose inputs are offloaded. On the CPU every saved activation is.",
        choices=("attn_norm", "qkv_linear", "core_attn", "attn_proj", "mlp_norm", "expert_fc1", "moe_act"),
    )  # fmt: skip
    offload_min_bytes: int = doc(1048576, "Smallest tensor to offload, bytes.", minimum=1)


@dataclass
class BatchConfig:
    """Sequences in a step."""

    global_batch_size: int = doc(
        8, "Sequences in one optimizer step, over all ranks.", minimum=1, maximum=1_000_000_000
    )
    micro_batch_size: int = doc(1, "Sequences in one forward pass of one rank.", minimum=1, maximum=1_000_000_000)


@dataclass
class BlendEntry:
    """A dataset of a mixture: an entry of `data.blend`."""

    path: str = doc(REQUIRED, "Prefix of its .bin/.idx pair.")
    weight: float | None = doc(None, "Its weight, above 0; null, for all or none, weighs datasets by their tokens.")


@dataclass
class TextSource:
    """A named text: an entry of `data.sources`."""

    name: str = doc(REQUIRED, "Its name, and the directory of its dataset in `data.dir`.")
    path: str = doc(REQUIRED, "File, directory or glob, as in `data.path`.")
    text_key: str | None = doc(None, "Field or column that holds its text; null means `data.text_key`.")


@dataclass
class DataConfig:
    """Text, its tokenizer, and the tokenised dataset made from them."""

    name: str = doc("stdlib", "Name of the corpus, for logs and reports.")
    source: str = doc(
        "stdlib",
        "Where text comes from: Python's standard library, files at `path`, or none (already tokenised).",
        choices=("stdlib", "files", "none"),
    )
    path: str | None = doc(None, "File, directory or glob of txt, md, jsonl, jsonl.gz, jsonl.zst, parquet, warc.")
    sources: list[TextSource] = doc(
        [], "Named texts instead of `path`; each becomes a dataset of its own, dir/NAME/text_document.",
        example="[{name:web,path:web/*.jsonl},{name:code,path:code,text_key:content}]",
    )  # fmt: skip
    text_key: str = doc(
        "text", "Field of a jsonl line or column of a parquet file that holds the text; dots lead into nested ones, "
        "such as message.content.",
    )  # fmt: skip
    encoding: str = doc("utf-8", "Encoding of txt, md and jsonl files, such as latin-1; one that keeps line ends.")
    follow_links: bool = doc(True, "Read directories behind symbolic links too, each once.")
    deduplicate: str = doc(
        "exact", "Which repeated documents are skipped: none, identical ones, or also those that differ only in "
        "case and white space.", choices=("none", "exact", "normalized"),
    )  # fmt: skip
    min_characters: int = doc(
        1, "Shorter documents are skipped; leading and trailing white space does not count.", minimum=0
    )
    max_characters: int | None = doc(
        None, "Longer documents are skipped; leading and trailing white space does not count; null: none.", minimum=1
    )
    languages: list[str] = doc(
        [], "Languages whose documents are kept, by codes of ISO 639-1; py3langid identifies them; none keeps all."
    )
    filter: str | None = doc(
        None, "Function that gets the text of a document and returns whether to keep it, as module:function."
    )
    near_duplicates: float | None = doc(
        None, "Estimated Jaccard similarity to an earlier document at which a document is skipped, such as 0.8 "
        "(MinHash of sequences of 24 characters); null: not compared.", minimum=0.5, maximum=1,
    )  # fmt: skip
    null_text: str = doc("skip", "Records whose text is null: skip them, or stop.", choices=("skip", "error"))
    bad_records: str = doc(
        "error", "Records without text, and files that are damaged or in another encoding: stop, or skip them.",
        choices=("error", "skip"),
    )  # fmt: skip
    tokenizer: str | None = doc(None, "Directory or tokenizer.json of an existing tokenizer; null trains one.")
    tokenizer_vocab_size: int = doc(4096, "Size of the tokenizer that is trained.", minimum=257, maximum=100_000_000)
    dir: str = doc("data/stdlib", "Directory of the tokenised dataset: tokenizer.json and .bin/.idx files.")
    blend: list[BlendEntry] = doc(
        [], "Datasets to mix instead of the one in dir.",
        example="[{path:A/text_document,weight:0.7},{path:B/text_document,weight:0.3}]",
    )  # fmt: skip
    split: str = doc("90,5,5", "Shares of train, validation and test documents, percent.")
    shuffle: str = doc(
        "epoch", "Sequences that are shuffled together: those of an epoch, so that a longer run continues the same "
        "order, or those of the whole run, as Megatron-Core does by default.", choices=("epoch", "run"),
    )  # fmt: skip
    append_eod: bool = doc(True, "End each document with the end-of-document token.")
    eod_token: str | None = doc(
        None, "End-of-document token, by its text; null takes the tokenizer's end-of-sequence token."
    )
    prepend_bos: bool = doc(False, "Begin each document with the beginning-of-sequence token.")
    bos_token: str | None = doc(
        None, "Beginning-of-sequence token, by its text; null means that of the tokenizer's files."
    )
    parse_special_tokens: bool = doc(
        False, "Encode text that spells a special token as that token; false keeps it plain text."
    )
    reset_at_eod: bool = doc(False, "Restart positions and mask attention and loss at document ends.")
    on_resume: str = doc(
        "match", "Data, sequence length or seed that differ from the checkpoint's: reject them (match), or "
        "use them (change).", choices=("match", "change"),
    )  # fmt: skip
    verify: str = doc(
        "auto", "Which checksums are verified before a run starts, once until a file changes: those of up to 32 GiB, "
        "all, or none (sizes only).", choices=("auto", "full", "size"),
    )  # fmt: skip
    cache_dir: str | None = doc(
        None, "Directory of Megatron-Core's sample indices, shared by all nodes; null means dir/cache."
    )
    prepare_workers: int | None = doc(
        None, "Processes of each rank of moe-data; null shares the cores evenly.", minimum=1, maximum=10_000
    )
    prepare_memory_mib: int = doc(
        256, "Memory for tables of duplicates and for shuffling in each of these processes, MiB.", minimum=16
    )
    prepare_tokenizer: str = doc(
        "tokenizers", "Library that tokenises: Hugging Face tokenizers, or gigatoken where its ids equal those of "
        "tokenizers on a sample of the corpus.", choices=("tokenizers", "gigatoken"),
    )  # fmt: skip
    loader_workers: int = doc(0, "Worker processes of a rank's DataLoader (num_workers).", minimum=0, maximum=10_000)


@dataclass
class EvaluationSource:
    """A text whose loss is measured: an entry of `train.eval_sources` and `evaluate.sources`."""

    path: str = doc(
        REQUIRED, "Text file, directory or glob; directory of a dataset of moe-data; or the prefix of a .bin/.idx pair."
    )
    name: str | None = doc(None, "Its name in tables and metrics; null means the name of the file or directory.")


@dataclass
class TrainConfig:
    """Length of the run, evaluation and sampling."""

    steps: int | None = doc(None, "Optimizer steps; this or `tokens`; null for both means 200.", minimum=1)
    tokens: int | None = doc(None, "Training tokens, rounded up to whole steps; this or `steps`.", minimum=1)
    seq_length: int = doc(128, "Tokens in one training sequence.", minimum=2, maximum=1_000_000_000)
    eval_interval_steps: int = doc(50, "Steps between evaluations; 0 means only first and last.", minimum=0)
    eval_interval_tokens: int | None = doc(
        None, "Training tokens between evaluations, instead of eval_interval_steps; null means eval_interval_steps.",
        minimum=1,
    )  # fmt: skip
    eval_sources: list[EvaluationSource] = doc(
        [], "Texts whose loss each evaluation measures too, in addition to the validation split.",
        example="[{path:book.txt},{name:code,path:data/code/text_document}]",
    )  # fmt: skip
    eval_source_tokens: int | None = doc(
        None, "Tokens that an evaluation scores of each of eval_sources, its first; null means all.", minimum=1
    )
    eval_batches: int = doc(4, "Global batches in one evaluation; 0 means no evaluation.", minimum=0)
    eval_ema: bool = doc(False, "Measure the loss of the EMA of the weights too, in each evaluation.")
    sample_continuations: int = doc(0, "Held-out texts to sample continuations of at the end.", minimum=0)
    deterministic: bool = doc(False, "Deterministic kernels on CUDA (slower); the CPU always is.")


@dataclass
class CheckpointConfig:
    """When and where checkpoints are written."""

    dir: str | None = doc(None, "Directory of checkpoints; null means run_dir/checkpoints.")
    interval_steps: int = doc(0, "Steps between periodic checkpoints; 0 means none.", minimum=0)
    save_at_end: bool = doc(True, "Write a checkpoint after the last step.")
    asynchronous: bool = doc(False, "Async save: training waits only for the copy to host memory.")
    local_dir: str | None = doc(
        None, "Node-local directory that is written first and then copied to dir; null means none."
    )
    local_keep: int = doc(1, "Number of most recent checkpoints to retain in local_dir.", minimum=1)
    keep_last: int | None = doc(None, "Number of most recent checkpoints to retain; null means all.", minimum=1)
    keep_every: int | None = doc(
        None, "Retain checkpoints whose step is a multiple of this permanently; null means none.", minimum=1
    )
    max_consecutive_failures: int = doc(3, "Consecutive failed periodic saves before the run aborts.", minimum=1)
    verify: bool = doc(True, "Verify a checkpoint against the SHA-256 sums of its manifest before loading.")


@dataclass
class TelemetryConfig:
    """What is measured and where it goes."""

    log_interval_steps: int = doc(1, "Steps between lines of metrics.jsonl.", minimum=1)
    tensorboard: bool = doc(True, "Write TensorBoard events.")
    progress: bool = doc(True, "Show a live progress line on rank 0.")
    profile_memory_steps: int = doc(0, "First steps in which saved activations are measured; 0 means none.", minimum=0)
    peak_tflops: float | None = doc(
        None, "Peak of one rank for MFU, TFLOPS; null means the device's BF16 peak, measured on cpu."
    )


@dataclass
class Config:
    """Everything that defines a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    backend: BackendConfig = field(default_factory=BackendConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    resilience: ResilienceConfig = field(default_factory=ResilienceConfig)
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    objective: str = doc("language_model", "Training objective.", choices=tuple(OBJECTIVES))
    runtime: str = doc(
        "auto", "Device backend; auto means cuda where a GPU is visible.",
        choices=("auto", "cuda", "cpu", "simulated"),
    )  # fmt: skip
    rank: int = doc(0, "Rank that runtime=simulated builds.", minimum=0)
    seed: int = doc(1234, "Seed of weights and data order.", minimum=0)
    run_dir: str = doc("runs/run", "Directory of all output of the run.")
    resume: str = doc(
        "auto", "auto (the newest checkpoint of run_dir), never (a new run; an earlier one is moved aside), or the "
        "path of a checkpoint.",
    )  # fmt: skip
    init_from: str | None = doc(
        None,
        "Checkpoint or Hugging Face directory of the initial weights; training starts at step 0; null means random.",
    )
    export_hf: bool = doc(False, "Export the trained weights in Hugging Face format, to run_dir/hf.")
    verbose: bool = doc(False, "Show tracebacks of errors.")

    @property
    def checkpoint_root(self) -> Path:
        """Directory of the run's checkpoints."""
        return Path(self.checkpoint.dir or Path(self.run_dir) / "checkpoints")
