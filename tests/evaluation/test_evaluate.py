"""moe-evaluate: losses of training, the same in every layout and format, and what it refuses."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from moe_train.config.composition.compose import compose
from moe_train.config.composition.validate import validate
from moe_train.config.evaluate import EvaluateConfig
from moe_train.config.roots import EvaluateRoot
from moe_train.config.schema import BlendEntry
from moe_train.config.walk import with_values
from moe_train.inference import source
from moe_train.telemetry.sinks.jsonl import read
from parallel.errors import ConfigError, MoeTrainError
from tests.conftest import fixed_text
from tests.conversion.convert import convert
from tests.evaluation.evaluate import evaluated, scores
from tools import evaluate


def last_validation_loss(run_dir: Path) -> float:
    return float([line["valid_loss"] for line in read(run_dir / "metrics.jsonl") if "valid_loss" in line][-1])


@pytest.mark.parametrize("layout", [(), ("parallel.tp=2", "parallel.pp=2", "parallel.ep=2")], ids=["one rank", "4"])
def test_the_loss_on_the_validation_samples_is_the_last_one_of_training(
    layout: tuple[str, ...], run_dir: Path, tmp_path: Path
) -> None:
    report = evaluated(tmp_path / "scores.json", str(run_dir), *layout)
    (row,) = report["scores"]
    assert row["name"] == "validation"
    assert row["tokens"] == 3 * 8 * 32
    assert row["loss"] == pytest.approx(last_validation_loss(run_dir), rel=1e-6)
    assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
    assert row["bits_per_byte"] == pytest.approx(row["loss"] * row["tokens"] / math.log(2) / row["num_bytes"])
    assert 2 < row["num_bytes"] / row["tokens"] < 6


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two files of different lengths."""
    directory = tmp_path_factory.mktemp("texts")
    whole = next(fixed_text())
    (directory / "long.txt").write_text(whole[:3000])
    (directory / "short.txt").write_text(whole[3000:3500])
    return [str(directory / "long.txt"), str(directory / "short.txt")]


def test_the_export_scores_as_the_run(run_dir: Path, exported: Path, texts: list[str], tmp_path: Path) -> None:
    of_run = scores(evaluated(tmp_path / "run.json", str(run_dir), *texts))
    of_export = scores(
        evaluated(tmp_path / "export.json", str(exported), *texts, "evaluate.seq_length=32", "parallel.ep=2",
                  "parallel.dp=2", "evaluate.micro_batch_size=3")
    )  # fmt: skip
    assert of_run.keys() == of_export.keys() == {"long", "short", "total"}
    for name, row in of_run.items():
        assert of_export[name]["loss"] == pytest.approx(row["loss"], rel=1e-5)
        assert of_export[name]["tokens"] == row["tokens"]
    assert [of_run[name]["num_bytes"] for name in of_run] == [3000, 500, 3500]
    total = sum(of_run[name]["loss"] * of_run[name]["tokens"] for name in ("long", "short"))
    assert of_run["total"]["loss"] == pytest.approx(total / of_run["total"]["tokens"])
    assert of_run["total"]["tokens"] == of_run["long"]["tokens"] + of_run["short"]["tokens"]


def test_a_dataset_in_another_precision_and_with_fewer_tokens(
    run_dir: Path, small_data: tuple[str, ...], tmp_path: Path
) -> None:
    data = next(word.partition("=")[2] for word in small_data if word.startswith("data.dir="))
    source = f"evaluate.sources=[{{name:own,path:{data}}}]"
    found = {}
    for precision in ("fp32", "fp8_block"):
        report = evaluated(
            tmp_path / "scores.json", str(run_dir), source, "evaluate.max_tokens=500", f"precision={precision}"
        )  # fmt: skip
        assert report["precision"] == precision
        (row,) = report["scores"]
        assert (row["name"], row["tokens"]) == ("own", 500)
        found[precision] = row["loss"]
    assert found["fp8_block"] == pytest.approx(found["fp32"], rel=0.02)
    assert found["fp8_block"] != pytest.approx(found["fp32"], rel=1e-6)


def test_quantised_exports_cost_more_with_fewer_bits(run_dir: Path, texts: list[str], tmp_path: Path) -> None:
    length = "evaluate.seq_length=32"
    losses = [scores(evaluated(tmp_path / "scores.json", str(run_dir), texts[0], length))["long"]["loss"]]
    for dtype in ("int8", "int4"):
        convert(run_dir, tmp_path / dtype, dtype=dtype, group_size=32)
        report = evaluated(tmp_path / "scores.json", str(tmp_path / dtype), texts[0], length, "precision=fp32")
        losses.append(scores(report)["long"]["loss"])
    exact, int8, int4 = losses
    assert 0 < abs(int8 - exact) < abs(int4 - exact) < 0.02 * exact


def test_a_mixture_has_a_row_for_each_dataset(run_dir: Path, tmp_path: Path) -> None:
    found = source.find(run_dir)
    data = Path(found.config.data.dir)
    shutil.copytree(data, tmp_path / "other")
    blend = [BlendEntry(f"{data}/text_document", 0.75), BlendEntry(f"{tmp_path}/other/text_document", 0.25)]
    mixed = replace(found, config=with_values(found.config, {"data.blend": blend, "data.source": "none"}))
    cfg = source.config_of(mixed, compose(["runtime=cpu"], EvaluateRoot), ["runtime=cpu"])
    asked = EvaluateConfig()
    config = evaluate.scoring_config(asked, mixed, cfg, validate(cfg))
    first, other, total = evaluate.scored(config, validate(config), evaluate.task_of(asked, mixed))
    assert (first.name, other.name, total.name) == (data.name, "other", "total")
    assert first.tokens + other.tokens == total.tokens == 3 * 8 * 32
    assert first.tokens == pytest.approx(3 * other.tokens, rel=0.2)
    assert first.loss is not None
    assert other.loss is not None
    mean = (first.loss * first.tokens + other.loss * other.tokens) / total.tokens
    assert total.loss == pytest.approx(mean)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["evaluate.seq_length=33", "parallel.cp=2"], "evaluate.seq_length=33 is not divisible by 4"),
        (["evaluate.seq_length=8000"], "evaluate.seq_length=8000 exceeds model.max_position_embeddings=4096"),
        (["evaluate.output=absent/x.json"], "evaluate.output=absent/x.json cannot be written: absent does not exist"),
        (["evaluate.tasks=[a]", "a.txt"], "evaluate.tasks and evaluate.sources are both set"),
        (["evaluate.data_dir=absent"], "absent, the data of the run, has no tokenizer.json"),
    ],
)
def test_what_cannot_be_scored_is_refused(words: list[str], told: str, run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(MoeTrainError) as caught:
        evaluated(tmp_path / "scores.json", str(run_dir), *words)
    assert caught.value.cause.startswith(told)
    assert not (tmp_path / "scores.json").exists()


def test_weights_without_a_run_need_a_text(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"evaluate\.sources is missing: .* is not a run"):
        evaluated(tmp_path / "scores.json", str(exported))
