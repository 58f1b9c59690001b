"""Rules of a run: length, schedule, data, backend and runtime."""

from __future__ import annotations

import os
import re
from dataclasses import replace

from moe_train.config import blend, sources
from moe_train.config.resolve import ResolvedConfig, Rule, decay_end
from parallel.suggest import Fix, Impossible, fixes_of, override_value


def run_length(facts: ResolvedConfig) -> None:
    """Either steps or tokens, and a warm-up that ends before the decay does."""
    train, schedule = facts.cfg.train, facts.cfg.schedule
    if train.steps is not None and train.tokens is not None:
        by_steps: Fix = {"train.tokens": None}
        if schedule.decay_steps is None and schedule.warmup_steps > train.steps:
            by_steps["schedule.warmup_steps"] = train.steps // 10
        raise Impossible(
            f"train.steps={train.steps} and train.tokens={train.tokens} both say how long the run is",
            [by_steps, {"train.steps": None}],
        )
    end = decay_end(schedule, facts.total_steps)
    if facts.trains and schedule.warmup_steps > end:
        what = f"the run's {end} steps" if schedule.decay_steps is None else f"schedule.decay_steps={end}"
        raise Impossible(
            f"schedule.warmup_steps={schedule.warmup_steps} exceeds {what}",
            [
                *fixes_of("schedule.warmup_steps", (end // 10, 0)),
                {"train.steps": schedule.warmup_steps, "train.tokens": None}
                if schedule.decay_steps is None
                else {"schedule.decay_steps": schedule.warmup_steps},
            ],
        )


def schedule_numbers(facts: ResolvedConfig) -> None:
    """Ranges of the schedule's numbers."""
    schedule = facts.cfg.schedule
    if not schedule.min_lr_ratio <= 1:
        raise Impossible(
            f"schedule.min_lr_ratio={schedule.min_lr_ratio} ends above the peak learning rate",
            fixes_of("schedule.min_lr_ratio", (0.1, 1.0)),
        )
    peak = facts.cfg.telemetry.peak_tflops
    if peak is not None and not peak > 0:
        raise Impossible(f"telemetry.peak_tflops={peak} is not above 0", [{"telemetry.peak_tflops": None}])


def data_source(facts: ResolvedConfig) -> None:
    """Where text comes from, and a tokenizer that fits the embedding."""
    data, model = facts.cfg.data, facts.cfg.model
    if data.source == "files" and data.path is None and not data.sources:
        raise Impossible(f"data.path={override_value(data.path)}, but data.source=files reads the text there", [],
                         "use data.path=FILE_OR_DIRECTORY or data=stdlib")  # fmt: skip
    if data.source != "files" and data.path:
        shown = override_value(data.path)  # data.source=files alone would share data.dir with another corpus
        raise Impossible(f"data.path={shown} is not read with data.source={data.source}", [],
                         f"use data=text data.path={shown} or data.path=null")  # fmt: skip
    if not _keeps_lines(data.encoding):
        raise Impossible(f"data.encoding={data.encoding} does not encode line ends as ASCII does",
                         [{"data.encoding": "utf-8"}, {"data.encoding": "latin-1"}])  # fmt: skip
    if data.source != "none" and data.tokenizer is None and data.tokenizer_vocab_size > model.vocab_size:
        raise Impossible(
            f"data.tokenizer_vocab_size={data.tokenizer_vocab_size} exceeds model.vocab_size={model.vocab_size}",
            [{"data.tokenizer_vocab_size": model.vocab_size}, {"model.vocab_size": data.tokenizer_vocab_size}],
        )


def text_sources(facts: ResolvedConfig) -> None:
    """Named texts have different names, which are directories, and replace data.path."""
    data = facts.cfg.data
    if not data.sources:
        return
    if data.source != "files":
        raise Impossible(f"data.sources names texts, but data.source={data.source} does not read them",
                         [{"data.source": "files"}, {"data.sources": []}])  # fmt: skip
    if data.path is not None:
        raise Impossible(f"data.sources and data.path={override_value(data.path)} both name the text",
                         [{"data.path": None}, {"data.sources": []}])  # fmt: skip
    sources.names("data.sources", data.sources)
    for number, entry in enumerate(data.sources):
        if entry.name in _NOT_NAMES:
            renamed = [*data.sources[:number], replace(entry, name=f"text{number}"), *data.sources[number + 1 :]]
            raise Impossible(f"data.sources[{number}].name={entry.name} is another directory of a dataset",
                             [{"data.sources": renamed}])  # fmt: skip


_NOT_NAMES = (".", "..", "cache", "parts")


def data_filter(facts: ResolvedConfig) -> None:
    """Limits of documents that leave some, and the name of a function."""
    data = facts.cfg.data
    if data.max_characters is not None and data.max_characters < data.min_characters:
        raise Impossible(
            f"data.max_characters={data.max_characters} is below data.min_characters={data.min_characters}, so that no "
            "document is kept", [{"data.max_characters": None}, {"data.min_characters": data.max_characters}],
        )  # fmt: skip
    if data.filter is not None and not re.fullmatch(r"[\w.]+:\w+", data.filter):
        raise Impossible(f"data.filter={override_value(data.filter)} is not module:function",
                         [{"data.filter": None}])  # fmt: skip


def _keeps_lines(encoding: str) -> bool:
    try:
        return "\n".encode(encoding) == b"\n"
    except (LookupError, ValueError):
        return False


def data_split(facts: ResolvedConfig) -> None:
    """Three shares that make 100, with something to train on."""
    text = facts.cfg.data.split
    try:
        shares = [float(share) for share in text.split(",")]
    except ValueError:
        shares = []
    usual = [{"data.split": "90,5,5"}]
    if len(shares) != 3 or any(not share >= 0 for share in shares):
        raise Impossible(f"data.split={text} is not three shares (train, validation, test) such as 90,5,5", usual)
    if abs(sum(shares) - 100) > 1e-6:
        sums = " + ".join(f"{share:g}" for share in shares)
        rest = 100 - shares[1] - shares[2]
        fitting = []
        if 0 < sum(shares) < float("inf") and shares[0]:  # in proportion, as Megatron-LM's --split is read
            train, valid = (round(100 * share / sum(shares), 4) for share in shares[:2])
            fitting.append({"data.split": f"{train:g},{valid:g},{round(100 - train - valid, 4):g}"})
        if rest > 0 and shares[0] <= 100:
            fitting.append({"data.split": f"{rest:g},{shares[1]:g},{shares[2]:g}"})
        raise Impossible(f"data.split={text} does not make 100: {sums} = {sum(shares):g}", [*fitting, *usual])
    if shares[0] == 0:
        raise Impossible(f"data.split={text} leaves nothing to train on", usual)
    if shares[1] == 0 and facts.cfg.train.eval_batches:
        raise Impossible(
            f"data.split={text} has no validation text, but train.eval_batches={facts.cfg.train.eval_batches}",
            [{"train.eval_batches": 0}, *usual],
        )


def evaluation_sources(facts: ResolvedConfig) -> None:
    """Texts that are evaluated have different names, and there are evaluations."""
    train = facts.cfg.train
    sources.names("train.eval_sources", train.eval_sources)
    if train.eval_sources and not train.eval_batches:
        raise Impossible(
            "train.eval_sources names texts, but train.eval_batches=0 means no evaluation",
            [{"train.eval_batches": 1}, {"train.eval_sources": []}],
        )


def data_blend(facts: ResolvedConfig) -> None:
    """Each entry of a blend is a weight and a prefix, or all are prefixes, and nothing else is trained on."""
    data = facts.cfg.data
    if problem := blend.problem(data.blend):
        cause, fixed = problem
        raise Impossible(cause, [{"data.blend": fixed}])
    if data.blend and data.source != "none":
        raise Impossible(f"data.blend names existing datasets, but data.source={data.source} makes one",
                         [{"data.source": "none", "data.path": None}, {"data.blend": []}])  # fmt: skip


def document_masks(facts: ResolvedConfig) -> None:
    """Documents kept apart need whole sequences, and tokens that end documents."""
    cfg = facts.cfg
    if cfg.data.reset_at_eod and not cfg.data.append_eod and cfg.data.source != "none":
        raise Impossible("data.reset_at_eod=true needs end-of-document tokens, but data.append_eod=false writes none",
                         [{"data.append_eod": True}, {"data.reset_at_eod": False}])  # fmt: skip
    if cfg.data.reset_at_eod and cfg.parallel.cp > 1:
        raise Impossible(
            f"data.reset_at_eod=true needs whole sequences on each rank, but parallel.cp={cfg.parallel.cp} splits them",
            [{"data.reset_at_eod": False}, {"parallel.cp": 1}],
        )
    # Its sequences are packed in one, over which Megatron-Core's router would then balance experts. With a coefficient
    # of 0 it neither computes nor logs the loss (`_apply_seq_aux_loss` in transformer/moe/router.py).
    coeffs = dict(zip(cfg.model.balance_losses, cfg.model.balance_loss_coeffs, strict=True))
    if cfg.data.reset_at_eod and cfg.batch.micro_batch_size > 1 and coeffs.get("seq_aux_loss"):
        raise Impossible(
            f"data.reset_at_eod=true packs the {cfg.batch.micro_batch_size} sequences of a micro-batch "
            "(batch.micro_batch_size) in one, but model.balance_losses has seq_aux_loss, which is a mean over each",
            [{"batch.micro_batch_size": 1}, {"data.reset_at_eod": False}],
        )


def backend(facts: ResolvedConfig) -> None:
    """Transformer Engine and apex are CUDA libraries."""
    cfg, runtime = facts.cfg, facts.runtime
    where = f"runtime={runtime}" + (" (no GPU is visible)" if cfg.runtime == "auto" else "")
    if facts.backend == "te" and runtime != "cuda":
        raise Impossible(
            f"backend.name=te needs runtime=cuda, not {where}", fixes_of("backend.name", ("local", "auto"))
        )
    if cfg.backend.apex and runtime != "cuda":
        raise Impossible(f"backend.apex=true needs runtime=cuda, not {where}", [{"backend.apex": False}])


def one_rank_of_many(facts: ResolvedConfig) -> None:
    """`rank` picks one of the simulated ranks; real ranks know who they are."""
    cfg, ranks = facts.cfg, facts.layout.world_size
    if cfg.rank >= ranks:
        raise Impossible(f"rank={cfg.rank} is not one of the layout's {ranks} ranks 0 .. {ranks - 1}",
                         fixes_of("rank", (ranks - 1, 0)))  # fmt: skip
    if cfg.rank and facts.runtime != "simulated":
        raise Impossible(f"rank={cfg.rank} is for runtime=simulated, but runtime={cfg.runtime}",
                         [{"rank": 0}, {"runtime": "simulated"}])  # fmt: skip


def where_to_start(facts: ResolvedConfig) -> None:
    """What a run starts from exists and is one thing."""
    cfg = facts.cfg
    if cfg.init_from is not None and not os.path.exists(cfg.init_from):
        shown = override_value(cfg.init_from)
        if re.fullmatch(r"[\w.-]+/[\w.-]+", cfg.init_from):
            folder = cfg.init_from.rpartition("/")[2]
            raise Impossible(
                f"init_from={shown} does not exist on this machine, and weights are not downloaded",
                otherwise=f"first `hf download {cfg.init_from} --local-dir {folder}`, then init_from={folder}",
            )
        raise Impossible(f"init_from={shown} does not exist", [],
                         "name the directory of a checkpoint, or init_from=null for random weights")  # fmt: skip
    if cfg.resume in ("auto", "never"):
        return
    if not os.path.exists(cfg.resume):
        raise Impossible(f"resume={cfg.resume} is neither auto, never nor the path of a checkpoint that exists",
                         fixes_of("resume", ("auto", "never")))  # fmt: skip
    if cfg.init_from is not None:
        raise Impossible(f"resume={cfg.resume} and init_from={cfg.init_from} both name weights to start from",
                         [{"init_from": None}, {"resume": "auto"}])  # fmt: skip


def export(facts: ResolvedConfig) -> None:
    """The export reads the last checkpoint."""
    if facts.cfg.export_hf and not facts.cfg.checkpoint.save_at_end:
        raise Impossible("export_hf=true reads the checkpoint of the last step, but checkpoint.save_at_end=false",
                         [{"checkpoint.save_at_end": True}, {"export_hf": False}])  # fmt: skip


RULES: tuple[Rule, ...] = (
    export, run_length, schedule_numbers, data_source, text_sources, data_filter, data_split, evaluation_sources,
    data_blend, document_masks,
    backend, one_rank_of_many, where_to_start,
)  # fmt: skip
