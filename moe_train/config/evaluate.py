"""Options of moe-evaluate. YAML files under `conf/evaluate/` fill them. No torch import."""

from __future__ import annotations

from dataclasses import dataclass

from moe_train.config.fields import doc
from moe_train.config.schema import EvaluationSource


@dataclass
class EvaluateConfig:
    """What is scored, and where the scores go."""

    sources: list[EvaluationSource] = doc(
        [], "Texts to score; empty means the validation samples of the run.",
        example="[{path:book.txt},{name:code,path:data/code/text_document}]",
    )  # fmt: skip
    data_dir: str | None = doc(
        None, "Dataset of the run, where its data.dir has moved; null means data.dir of the run."
    )
    seq_length: int | None = doc(
        None,
        "Tokens of one sequence, and so the longest context; null means train.seq_length of the run, and without "
        "a run as many as the model allows, up to 2,048.",
        minimum=2,
    )
    micro_batch_size: int = doc(4, "Sequences in one forward pass of one rank.", minimum=1, maximum=1_000_000)
    max_tokens: int | None = doc(None, "Tokens to score of each source, its first; null means all.", minimum=1)
    output: str | None = doc(None, "JSON file for the scores; null writes none.")
    tasks: list[str] = doc(
        [], "Tasks of lm-evaluation-harness, instead of sources; needs the extra eval.", example="[my_task,hellaswag]"
    )
    task_dir: str | None = doc(None, "Directory with YAML files of further tasks; null means none.")
    num_fewshot: int | None = doc(None, "Examples before each question of a task; null means as each task says.",
                                  minimum=0)  # fmt: skip
    limit: int | None = doc(None, "Questions of each task, its first; null means all.", minimum=1)
