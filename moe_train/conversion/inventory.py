"""What a checkpoint holds, in either format, counted from the tensors that are there. Needs no process group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

from moe_train.config.model import ModelConfig
from moe_train.config.parameter_groups import GroupSummary, summarise
from moe_train.conversion import hf_config as config
from moe_train.conversion import quantised_weights
from moe_train.conversion.hf import quantization
from moe_train.conversion.mapping import pieces, refuse_larger
from moe_train.conversion.quantised_weights import QuantisedWeight
from moe_train.formats import dcp, directory_writer, run_config, run_directory, safetensors
from moe_train.formats.dcp_metadata import EMA_PREFIX
from moe_train.formats.dtypes import Dtype
from moe_train.formats.nonfinite import Tally
from moe_train.formats.tensor_slices import FileRegion
from moe_train.formats.weight_formats import BlockFp8
from moe_train.model.arithmetic import ParameterCount, count_parameters
from parallel.architecture.layers import EMBEDDING, EXPERTS, HEAD
from parallel.errors import CheckpointError, MoeTrainError

_OLDEST_FORMAT = 1
"""Of a checkpoint of a run. Nothing but names has changed since."""
HUGGING_FACE, MEGATRON = "Hugging Face", "Megatron"
BIAS, COPIES, OTHER = "expert_bias", "copies", "other"
SCALES, WEIGHT_SCALES = "fp8_scales", "weight_scales"
"""Of FP8, in training and in weights; and of other quantised weights."""
MOMENTS, MASTERS, AVERAGES, RANDOM = "moments", "fp32_weights", "ema_of_weights", "random_streams"
NOT_PARAMETERS = (BIAS, COPIES, SCALES, WEIGHT_SCALES, MOMENTS, MASTERS, AVERAGES, RANDOM)
"""Parts of a checkpoint other than parameters. Copies are numbers that are stored again under another name."""

# The first that fits a Megatron name decides. Names of optimizer state carry that of their parameter behind a prefix.
_PARTS: tuple[tuple[Callable[[str], bool], str], ...] = (
    (lambda key: key.startswith("optimizer.state.fp32_param."), MASTERS),
    (lambda key: key.startswith("optimizer."), MOMENTS),
    (lambda key: key.startswith(EMA_PREFIX), AVERAGES),
    (lambda key: key.startswith("rng."), RANDOM),
    (lambda key: key.startswith("fp8_scales."), SCALES),
    (lambda key: key.endswith(".expert_bias"), BIAS),
    (lambda key: key.startswith("mtp."), "mtp"),
    (lambda key: key == EMBEDDING, "embedding"),
    (lambda key: key == HEAD, "output_head"),
    (lambda key: "layernorm." in key or key.endswith(".layer_norm_weight"), "norms"),
    (lambda key: EXPERTS in key, "routed_experts"),
    (lambda key: ".mlp.shared_experts." in key, "shared_experts"),
    (lambda key: ".mlp.router." in key, "router"),
    (lambda key: ".mlp." in key, "dense_ffn"),
    (lambda key: ".self_attention." in key, "attention"),
)


def part_of(key: str) -> str:
    """The part of a checkpoint that a tensor with this Megatron name belongs to."""
    return next((part for fits, part in _PARTS if fits(key)), OTHER)


@dataclass
class Inventory:
    """What is in a checkpoint."""

    path: Path
    format: str
    name: str
    model: ModelConfig | None
    """None where the family is not one of ours: then every tensor counts as `other`."""
    facts: dict[str, str] = field(default_factory=dict)
    """What its files say of how it came about, ready to be printed."""
    elements: Counter[str] = field(default_factory=Counter)
    """Numbers stored, by part."""
    dtypes: dict[str, tuple[int, int]] = field(default_factory=dict)
    """dtype -> (tensors, bytes)."""
    groups: list[GroupSummary] = field(default_factory=list)
    """Parameter groups of the run's optimizer; none where there is no optimizer state."""

    def add(self, part: str, shape: tuple[int, ...], dtype: Dtype) -> None:
        """Count a tensor."""
        self.elements[part] += prod(shape)
        self.add_stored(shape, dtype)

    def add_stored(self, shape: tuple[int, ...], dtype: Dtype) -> None:
        """Count the bytes of a tensor."""
        tensors, size = self.dtypes.get(dtype.name, (0, 0))
        self.dtypes[dtype.name] = (tensors + 1, size + prod(shape) * dtype.itemsize)

    @property
    def parameters(self) -> dict[str, int]:
        """Part -> parameters that are there, in the order of `arithmetic.MAIN_PARTS`, then `other`."""
        names = [*ParameterCount().by_part(include_mtp=True), OTHER]
        return {name: self.elements[name] for name in names if self.elements[name] or name != OTHER}

    @property
    def active(self) -> int:
        """Parameters that are there and serve one token, multi-token prediction left out."""
        main = sum(n for part, n in self.parameters.items() if part != "mtp")
        if self.model is None or not self.model.is_moe:
            return main
        routed = self.elements["routed_experts"]
        return main - (routed - routed // self.model.num_experts * self.model.topk)

    def expected(self) -> ParameterCount | None:
        """What the arithmetic says of the model; the padding of the vocabulary only where the format stores it."""
        if self.model is None:
            return None
        count = count_parameters(self.model)
        if self.format == HUGGING_FACE:
            padding = (self.model.padded_vocab_size - self.model.vocab_size) * self.model.hidden_size
            count = _without(count, padding)
        return count


def _without(count: ParameterCount, padding: int) -> ParameterCount:
    head = count.output_head - padding if count.output_head else 0
    return replace(count, embedding=count.embedding - padding, output_head=head)


def is_hugging_face(path: Path) -> bool:
    """Whether the directory is meant as a Hugging Face checkpoint."""
    return (path / config.FILE).is_file() or (path / safetensors.INDEX).is_file()


def find(path: Path, name: str) -> Path:
    """The checkpoint that the user means by `path`, given as `name`: itself, or the newest of a run.

    Raises:
        CheckpointError: nothing is there, or it is not a checkpoint.
    """
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{name}={path} is not a directory", "name the directory of a checkpoint")
    return path if is_hugging_face(path) else run_directory.resolve(path, name)[0]


def take(path: Path) -> Inventory:
    """The inventory of the checkpoint that `find` returned.

    Raises:
        CheckpointError: a file is missing, damaged, or contradicts the table of contents.
    """
    return _hugging_face(path) if is_hugging_face(path) else _megatron(path)


def _hugging_face(path: Path) -> Inventory:
    written = config.read(path)
    extents = safetensors.open_directory(path)
    kind, architectures = written.get("model_type"), written.get("architectures")
    inventory = Inventory(path, HUGGING_FACE, str(kind), None)
    named = architectures if isinstance(architectures, list) else []
    inventory.facts["architecture"] = ", ".join(map(str, named)) or "not said"
    weights = _quantised(inventory, written, extents)
    stored_parts = {part for name, weight in weights.items() for part in weight.names(name)}
    plain = {name: extent for name, extent in extents.items() if name not in stored_parts}
    shapes = [extent.shape for extent in plain.values()] + [weight.shape for weight in weights.values()]
    numbers = sum(prod(shape) for shape in shapes)
    parts: dict[str, str] = {}
    try:
        inventory.model = config.to_model(written, path / config.FILE)
        refuse_larger(inventory.model, numbers, path / config.FILE)
        parts = _hugging_face_parts(inventory.model)
    except MoeTrainError as error:
        inventory.facts["parts"] = f"unknown: {error.cause}"
    for key, extent in plain.items():
        inventory.add(parts.get(key, OTHER), extent.shape, extent.dtype)
    for name, weight in weights.items():
        _add_quantised(inventory, parts.get(name, OTHER), weight, [extents[part] for part in weight.names(name)])
    if weights:
        matrices = len(weights) + sum(len(extent.shape) > 1 for extent in plain.values())
        inventory.facts["quantised"] = _described(list(weights.values()), matrices)
    for field_name in ("quantization_config", "transformers_version"):
        if value := written.get(field_name):
            inventory.facts[field_name] = str(value.get("quant_method", value) if isinstance(value, dict) else value)
    return inventory


def _quantised(
    inventory: Inventory, written: dict[str, Any], extents: dict[str, FileRegion]
) -> dict[str, QuantisedWeight]:
    """The quantised weights by name; none where their format cannot be read here, which the inventory then says."""
    try:
        declared = quantization.of_config(written, inventory.path / config.FILE)
        return quantised_weights.collect(inventory.path, extents, declared)
    except CheckpointError as error:
        inventory.facts["quantised"] = f"unknown: {error.cause}"
        return {}


def _add_quantised(inventory: Inventory, part: str, weight: QuantisedWeight, stored: Sequence[FileRegion]) -> None:
    """Count a quantised weight as the numbers that it represents, and the bytes of its tensors."""
    inventory.elements[part] += prod(weight.shape)
    scales = SCALES if isinstance(weight.format, BlockFp8) else WEIGHT_SCALES
    inventory.elements[scales] += sum(prod(region.shape) for _, region in weight.parts[1:])
    for region in stored:
        inventory.add_stored(region.shape, region.dtype)


def _described(weights: Sequence[QuantisedWeight], matrices: int) -> str:
    numbers = sum(prod(weight.shape) for weight in weights)
    bits = sum(weight.format.bits(weight.shape) * prod(weight.shape) for weight in weights) / max(1, numbers)
    return f"{weights[0].format.text}: {len(weights):,} of {matrices:,} matrices, {bits:.3f} bits for each number"


def _hugging_face_parts(model: ModelConfig) -> dict[str, str]:
    """Every name that a tensor of the model can have -> part."""
    parts: dict[str, str] = {}
    for piece in pieces(model):
        for part in piece.parts:
            names = [part.name]
            if part.other is not None:
                names.append(part.other)
            if part.fused is not None:
                names += [part.fused.name, part.fused.name + ".weight"]
            parts |= dict.fromkeys(names, part_of(piece.key)) | dict.fromkeys(part.copies, COPIES)
    return parts


def _megatron(path: Path) -> Inventory:
    run_directory.check_files(path)
    checkpoint = dcp.Checkpoint(path)
    model = run_config.model_of(path)
    inventory = Inventory(path, MEGATRON, model.name, model, _facts(path))
    for key, entry in checkpoint.tensors.items():
        inventory.add(part_of(key), tuple(entry.size), entry.properties.dtype)
    others = checkpoint.contents.state_dict_metadata.keys() - checkpoint.tensors.keys()
    if others:
        inventory.facts["pickled objects"] = f"{len(others)}, not read"
    if inventory.elements[MOMENTS]:
        inventory.groups = summarise(model, run_config.optimizer_of(path))
    return inventory


def _facts(path: Path) -> dict[str, str]:
    """state.json, in words."""
    try:
        state = run_directory.read_state(path, _OLDEST_FORMAT)
        progress = state["progress"]
        facts = {
            "step": f"{progress['step']:,}",
            "tokens": f"{progress['consumed_tokens']:,}",
            "version": f"format {state['format']}",
        }
        if state.get("weights_only"):
            facts["use"] = "weights only: for init_from, not for resume"
        if "layout" in state:
            degrees = " ".join(f"{name}={degree}" for name, degree in state["layout"].items() if degree != 1)
            facts["saved by"] = f"{degrees or 'one rank'}, {state.get('device', '')}".rstrip(", ")
        if "seed" in state:
            facts["seed"] = str(state["seed"])
        if "versions" in state:
            facts["software"] = ", ".join(f"{name} {version}" for name, version in state["versions"].items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise run_directory.damaged(path, f"{run_directory.STATE} cannot be read: {error}") from error
    return facts


def sizes(path: Path) -> tuple[int, int]:
    """Files below the directory and their bytes."""
    file_sizes = [file.stat().st_size for file in path.rglob("*") if file.is_file()]
    return len(file_sizes), sum(file_sizes)


def verify(
    path: Path, threads: int, progress: Callable[[int], None], rank: int = 0, size: int = 1
) -> tuple[int, int, Tally]:
    """Compare every file with the manifest; returns how many files and bytes that were, and the numbers in their
    tensors that are not finite. Of `size` processes each compares its share.

    Raises:
        CheckpointError: there is no manifest, or a file is missing, damaged or not what its table of contents says.
    """
    tally, problem = Tally(), None
    try:
        places = _places(path)
    except CheckpointError as error:  # the manifest says which file is not what was written
        places, problem = {}, error
    files, checked = directory_writer.verify(path, threads, progress, rank, size, places=places, tally=tally)
    if problem is not None:
        raise problem
    return files, checked, tally


def _places(path: Path) -> dict[str, list[tuple[str, FileRegion]]]:
    """Where the tensors of each file of a checkpoint are: file -> (tensor, place). Nothing for other directories."""
    by_file: dict[str, list[tuple[str, FileRegion]]] = {}
    if is_hugging_face(path):
        for name, extent in safetensors.open_directory(path).items():
            by_file.setdefault(extent.path.name, []).append((name, extent))
    elif (path / run_directory.METADATA).is_file():
        checkpoint = dcp.Checkpoint(path)
        for key in checkpoint.tensors:
            for chunk in checkpoint.chunks(key):
                by_file.setdefault(chunk.file.name, []).append((key, chunk.extent))
    return by_file


def has_manifest(path: Path) -> bool:
    """Whether every byte of the checkpoint can be verified."""
    return (path / directory_writer.MANIFEST).is_file()
