"""What each command composes: the config of a run, or a root of its own. No torch import.

A run's config.yaml holds what trains it. Options of the tools are not part of it: moe-plan adds `plan` to the config of
a run, moe-memory adds `engine`, and moe-convert and moe-inspect compose neither layout nor data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moe_train.config.checkpoint_tools import ConvertConfig, InspectConfig
from moe_train.config.evaluate import EvaluateConfig
from moe_train.config.fields import doc
from moe_train.config.inference import (
    ChatConfig,
    EngineConfig,
    GenerateConfig,
    PlannedEngineConfig,
    SamplingConfig,
    ServeConfig,
)
from moe_train.config.launcher import LauncherConfig
from moe_train.config.model import ModelConfig
from moe_train.config.plan import EstimateConfig, PlanConfig
from moe_train.config.schema import BackendConfig, Config, ParallelConfig, PrecisionConfig
from moe_train.config.view import ScheduleViewConfig
from moe_train.config.walk import FieldInfo, all_fields, group_names

_TRACEBACKS = "Show tracebacks of errors."


@dataclass
class MemoryRoot(Config):
    """A run whose memory moe-memory predicts, and the KV cache of its model at inference."""

    engine: PlannedEngineConfig = field(default_factory=PlannedEngineConfig)


@dataclass
class PlanRoot(MemoryRoot):
    """A run that moe-plan plans, and the question to the planner."""

    plan: PlanConfig = field(default_factory=PlanConfig)


@dataclass
class ScheduleRoot(Config):
    """A run whose schedules moe-schedule shows."""

    view: ScheduleViewConfig = field(default_factory=ScheduleViewConfig)


@dataclass
class EstimateRoot:
    """What moe-submit assumes of the software when it estimates time and cost of a run."""

    plan: EstimateConfig = field(default_factory=EstimateConfig)
    verbose: bool = doc(False, _TRACEBACKS)


@dataclass
class ConvertRoot:
    """A conversion by moe-convert. `model` is that of the checkpoint, unless the command line names one."""

    model: ModelConfig = field(default_factory=ModelConfig)
    convert: ConvertConfig = field(default_factory=ConvertConfig)
    verbose: bool = doc(False, _TRACEBACKS)


@dataclass
class InspectRoot:
    """A look by moe-inspect."""

    inspect: InspectConfig = field(default_factory=InspectConfig)
    verbose: bool = doc(False, _TRACEBACKS)


def _as_in_a_run(name: str) -> Any:
    """A field of `Config` in another root."""
    item = Config.__dataclass_fields__[name]
    return field(default=item.default, metadata=item.metadata)


@dataclass
class InferenceRoot:
    """A trained model, and what differs from its run where it is used.

    Of `model`, `parallel`, `backend`, `precision` and `launcher` only those fields count that the command line names.
    """

    source: str | None = doc(
        None, "The model: a run (its newest checkpoint), a Megatron checkpoint, or a Hugging Face directory."
    )
    tokenizer: str | None = doc(
        None, "Directory or tokenizer.json of the tokenizer; null means that of the weights, or of the run's data."
    )
    verify: bool = doc(
        True,
        "Verify the weights against the SHA-256 sums of their manifest; for a checkpoint that reads all its files.",
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    backend: BackendConfig = field(default_factory=BackendConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    runtime: str = _as_in_a_run("runtime")
    verbose: bool = doc(False, _TRACEBACKS)


@dataclass
class EvaluateRoot(InferenceRoot):
    """An evaluation by moe-evaluate."""

    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


@dataclass
class GenerateRoot(InferenceRoot):
    """Generation by moe-generate."""

    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)


@dataclass
class ChatRoot(InferenceRoot):
    """A conversation by moe-chat."""

    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    chat: ChatConfig = field(default_factory=ChatConfig)


@dataclass
class ServeRoot(InferenceRoot):
    """A server by moe-serve."""

    serve: ServeConfig = field(default_factory=ServeConfig)


@dataclass(frozen=True)
class RootInfo:
    """Where a root is found.

    Args:
        config_name: its YAML file in `conf/`, without suffix.
        commands: the commands that compose it.
        moved: fields of a run that have another name here.
    """

    config_name: str
    commands: tuple[str, ...]
    moved: Mapping[str, str] = field(default_factory=dict)

    @property
    def schema(self) -> str:
        """Name of its dataclass in defaults lists."""
        return "schema" if self.config_name == "train" else f"schema_{self.config_name}"


_OF_EVALUATIONS = {
    "init_from": "source", "data.tokenizer": "tokenizer", "data.dir": "evaluate.data_dir",
    "data.path": "evaluate.sources", "train.seq_length": "evaluate.seq_length",
    "batch.micro_batch_size": "evaluate.micro_batch_size",
}  # fmt: skip
_SOURCES = {"init_from": "source", "data.tokenizer": "tokenizer"}

ROOTS: Mapping[type, RootInfo] = {
    Config: RootInfo("train", ("moe-train", "moe-submit", "moe-data", "moe-dryrun", "moe-preflight")),
    MemoryRoot: RootInfo("memory", ("moe-memory",)),
    PlanRoot: RootInfo("plan", ("moe-plan",)),
    ScheduleRoot: RootInfo("view", ("moe-schedule",)),
    EstimateRoot: RootInfo("estimate", ("moe-submit",)),
    ConvertRoot: RootInfo("convert", ("moe-convert",), {"data.dir": "convert.data_dir"}),
    InspectRoot: RootInfo("inspect", ("moe-inspect",)),
    EvaluateRoot: RootInfo("evaluate", ("moe-evaluate",), _OF_EVALUATIONS),
    GenerateRoot: RootInfo("generate", ("moe-generate",), _SOURCES),
    ChatRoot: RootInfo("chat", ("moe-chat",), _SOURCES),
    ServeRoot: RootInfo("serve", ("moe-serve",), _SOURCES),
}


def field_info(name: str) -> FieldInfo | None:
    """The field of this full name in any root: the same name means the same in all."""
    return next((info for root in ROOTS if (info := all_fields(root).get(name))), None)


def all_groups() -> tuple[str, ...]:
    """The groups of all roots, each once."""
    return tuple(dict.fromkeys(group for root in ROOTS for group in group_names(root)))


def commands_with(name: str) -> list[str]:
    """The commands that have a field, or a group, of this name."""
    owners = [info for root, info in ROOTS.items() if name in all_fields(root) or name in group_names(root)]
    return list(dict.fromkeys(command for info in owners for command in info.commands))
