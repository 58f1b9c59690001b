"""The model at a path: a run, a Megatron checkpoint or a Hugging Face directory. No torch import.

`find` reads the config of the model there. `config_of` makes of it the config with which ranks load the weights:
`init_from` names them, and `data.dir` the tokenizer.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from moe_train.checkpoint import continuing
from moe_train.config.assumed import names_of
from moe_train.config.schema import BatchConfig, Config, DataConfig, PrecisionConfig, TrainConfig
from moe_train.config.walk import all_fields, get, with_values
from moe_train.conversion import hf_config, small_files
from moe_train.data import tokenizer as tokenizers
from moe_train.files import untrusted
from moe_train.formats import run_config, run_directory
from parallel.errors import CheckpointError, DataError
from parallel.layout import ParallelLayout

_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}  # transformers' names
_DEGREES = ("tp", "pp", "vpp", "cp", "ep", "etp", "dp")


@dataclass(frozen=True)
class ModelSource:
    """A trained model.

    Args:
        path: of the weights, a Megatron checkpoint or a Hugging Face directory.
        config: that of the run that trained it; for other weights the default run with their model and precision.
        run_dir: of the run; None for other weights.
    """

    path: Path
    config: Config
    run_dir: Path | None = None

    @property
    def name(self) -> str:
        """A short name of the model: that of the run's or the weights' directory."""
        return (self.run_dir or self.path).resolve().name


def find(path: Path, field: str = "source") -> ModelSource:
    """The model at `path`, for a run that of its newest checkpoint.

    Args:
        field: of the config, which names `path`, for errors.

    Raises:
        CheckpointError: there is none, or its config cannot be read.
    """
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not path.parent.exists():
        raise CheckpointError(
            f"{field}={path} does not exist on this machine, and weights are not downloaded",
            f"first `hf download {path} --local-dir {path.name}`, then {field}={path.name}",
        )
    if (path / hf_config.FILE).is_file():
        config = hf_config.read(path)
        return ModelSource(path, _default_run(Config(model=hf_config.to_model(config, path / hf_config.FILE)), config))
    with own_remedy(field):
        return _of_checkpoint(run_directory.resolve(path, field)[0])


def _of_checkpoint(directory: Path) -> ModelSource:
    run_directory.check_files(directory)
    stored = continuing.config_of(run_config.read(directory), directory / run_directory.CONFIG)
    if run_directory.read_state(directory).get("weights_only"):
        kept = directory / small_files.KEPT
        return ModelSource(directory, _default_run(stored, hf_config.read(kept)) if kept.is_dir() else stored)
    in_run = directory.parent.name == "checkpoints"
    return ModelSource(directory, stored, directory.parent.parent if in_run else Path(stored.run_dir))


@contextlib.contextmanager
def own_remedy(field: str) -> Iterator[None]:
    """Have errors about a damaged checkpoint name `field`, where those of a training run name `resume`."""
    try:
        yield
    except run_directory.DamagedCheckpoint as error:
        remedy = f"restore it from a copy, or name another checkpoint of the run with {field}=PATH"
        raise CheckpointError(error.cause, remedy) from error


def _default_run(cfg: Config, hugging_face: hf_config.Json) -> Config:
    """`cfg` with the precision of the weights, and sequences that fit the model."""
    dtype = hugging_face.get("dtype", hugging_face.get("torch_dtype"))
    name = _DTYPES.get(str(dtype), "fp32")
    length = min(cfg.train.seq_length, cfg.model.max_position_embeddings)
    precision = PrecisionConfig(name=name, dtype=name)
    return replace(cfg, precision=precision, train=replace(cfg.train, seq_length=length))


def config_of(source: ModelSource, root: Any, words: Sequence[str], tokenizer: str | None = None) -> Config:
    """The config with which ranks load `source`: one rank, the precision of the run, and what the command line names.

    Args:
        root: the config of the command. Of the groups that it shares with a run, the fields that `words` name count.
        words: overrides of the command line.
        tokenizer: file or directory of a tokenizer; None takes that of the weights.

    Raises:
        ConfigError: no layout has these degrees.
        DataError: there is no tokenizer.
    """
    run = source.config
    cfg = Config(
        model=run.model, precision=run.precision, train=TrainConfig(seq_length=run.train.seq_length),
        seed=run.seed, init_from=str(source.path), resume="never",
    )  # fmt: skip
    usual = {"backend.name": "local", "launcher.restarts": 0, "checkpoint.verify": root.verify}
    cfg = with_values(cfg, {**usual, **_named(root, words)})
    cfg = replace(cfg, data=_data(source, tokenizer))
    layout = ParallelLayout.resolve(**{name: getattr(cfg.parallel, name) for name in _DEGREES}, world_size=None)
    multiple = 2 * layout.cp * layout.tp  # no sequence of this length is computed, but rules of a run look at it
    length = max(cfg.train.seq_length // multiple, 1) * multiple
    batch = BatchConfig(global_batch_size=layout.dp * layout.pp, micro_batch_size=1)
    return replace(cfg, batch=batch, train=replace(cfg.train, seq_length=length))


def _named(root: Any, words: Sequence[str]) -> dict[str, Any]:
    """Values of the fields of a run that the command line names, or sets by an option of their group."""
    given = names_of(words)
    fields = all_fields(cast(type, type(root)))
    shared = fields.keys() & all_fields().keys()
    return {name: get(root, name) for name in shared if name in given or name.partition(".")[0] in given}


def _data(source: ModelSource, tokenizer: str | None) -> DataConfig:
    """Where the tokenizer is, and its tokens with a role."""
    run = source.config.data
    if tokenizer is not None:
        found = tokenizers.find_tokenizer(tokenizer, "tokenizer")
        if found.name != tokenizers.TOKENIZER:
            raise DataError(
                f"tokenizer={tokenizer} is not named {tokenizers.TOKENIZER}", "name its directory, or rename the file"
            )
        return DataConfig(source="none", dir=str(found.parent))
    directory = next((path for path in _tokenizer_places(source) if (path / tokenizers.TOKENIZER).is_file()), None)
    if directory is None:
        raise DataError(
            f"{source.path} has no {tokenizers.TOKENIZER}, nor has the data of its run ({run.dir})",
            "set tokenizer=PATH to that of the training data",
        )
    return DataConfig(
        source="none", dir=str(directory), eod_token=run.eod_token, bos_token=run.bos_token,
        prepend_bos=run.prepend_bos, parse_special_tokens=run.parse_special_tokens,
    )  # fmt: skip


def _tokenizer_places(source: ModelSource) -> Iterator[Path]:
    """Directories that may have the tokenizer, best first: the weights', the data's, those of exports of the run."""
    yield source.path
    yield source.path / small_files.KEPT
    if source.run_dir is None:
        return
    yield Path(source.config.data.dir)
    exports = source.run_dir / continuing.EXPORTS
    yield from sorted(exports.glob("step_*"), reverse=True)
    yield source.run_dir / run_directory.BEGAN


def load_tokenizer(cfg: Config) -> tokenizers.Tokenizer:
    """The tokenizer of a config that `config_of` made.

    Raises:
        DataError: it is damaged, or has tokens that the model does not have.
    """
    tokenizer = tokenizers.load_tokenizer(cfg.data)
    if tokenizer.vocab_size > cfg.model.vocab_size:
        raise DataError(
            f"{tokenizer.path} has {tokenizer.vocab_size} tokens, and model.vocab_size is {cfg.model.vocab_size}",
            "set tokenizer=PATH to that of the training data",
        )
    return tokenizer


def stop_token_ids(cfg: Config, tokenizer: tokenizers.Tokenizer) -> frozenset[int]:
    """Tokens that end a text: that of the tokenizer, and those that generation_config.json next to it names."""
    try:
        settings = untrusted.read_object(tokenizer.path.with_name(small_files.GENERATION))
    except (OSError, ValueError):  # without it, or with a damaged one, the tokenizer's own counts
        settings = {}
    named = settings.get("eos_token_id")
    listed: Iterable[Any] = named if isinstance(named, list) else [named]
    known = {token for token in listed if type(token) is int and 0 <= token < cfg.model.vocab_size}
    return frozenset({tokenizer.eod, *known})
