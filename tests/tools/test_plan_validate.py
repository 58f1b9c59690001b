"""`moe-plan validate`: the planner against tables of published runs, and how names in them find model files."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from parallel.errors import ConfigError
from tests.tools.test_plan import ROOT, run
from tools.published import models

ROW = {
    "source": "release 26.02 NeMo Container", "model": "Qwen3_30B_a3B", "hardware": "DGX-H100", "n_gpus": "16",
    "precision": "BF16", "seq_len": "4096", "gbs": "1024", "mbs": "1", "tp": "1", "pp": "1", "ep": "16",
    "tokens_per_s_per_gpu": "9000",
}  # fmt: skip


def validated(directory: Path, rows: list[dict[str, str]], *words: str) -> dict:  # type: ignore[type-arg]
    names = sorted({name for row in rows for name in row})
    with (directory / "runs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    done = run(directory, "validate", "runs=runs.csv", "results=out.json", *words)
    assert done.returncode == 0, done.stderr
    found: dict = json.loads((directory / "out.json").read_text())  # type: ignore[type-arg]
    return found


def test_published_runs_are_compared_row_by_row(tmp_path: Path) -> None:
    """Blanks, unknown models, and models of one's own."""
    (tmp_path / "own").mkdir()
    known = ROOT / "tools/published/validation_models/llama2_7b.yaml"
    (tmp_path / "own/wonder_7b.yaml").write_text(known.read_text())
    rows = [
        ROW,
        ROW | {"tokens_per_s_per_gpu": "", "tflops_per_gpu": "200"},
        ROW | {"model": "Wonder-7B", "ep": "", "step_time_s": "10", "peak_mem_gb": "50"},
        ROW | {"model": "Mystery-9B"},
        ROW | {"n_gpus": ""},
        ROW | {"hardware": "a toaster"},
        ROW | {"gbs": "x"},
        ROW | {"precision": "NVFP4"},
        ROW | {"ep": "7"},
    ]
    found = validated(tmp_path, rows, "models=own")
    by = found["rows"]
    assert found["rows_read"] == 9
    assert by[0]["error_tokens_per_s_per_gpu"] == pytest.approx(by[0]["predicted_tokens_per_s_per_gpu"] / 9000 - 1)
    assert by[1]["published_tokens_per_s_per_gpu"] == pytest.approx(200e12 / 0.0231e12, rel=0.01)
    assert by[2]["architecture"] == "llama2_7b"
    assert by[2]["error_step_time_s"] is not None
    assert by[2]["error_peak_mem_gb"] is not None
    for number in (3, 4, 5, 6, 8):
        assert by[number]["not_modelled"]
    assert by[7]["left_out"] == "NVFP4"
    assert found["rows_counted"] == 3
    assert sum('"row": ' in line for line in (tmp_path / "out.json").read_text().splitlines()) == 9  # one line each
    assert set(found["by_hardware"]) == {"h100"}


def test_nonsense_in_a_row_is_named_and_stops_no_other(tmp_path: Path) -> None:
    """Numbers that are none, layouts that cannot run, and what tables write for a blank; after a byte-order mark."""
    odd = {
        "n_gpus": "-16", "gbs": "0", "seq_len": "1e400", "mbs": "1.5", "tokens_per_s_per_gpu": "0", "step_time_s": "-3",
        "peak_mem_gb": "5,000",
    }  # fmt: skip
    rows = [ROW | {"mfu_pct": "n/a", "vpp": "-"}, *(ROW | {name: value} for name, value in odd.items())]
    rows.append(ROW | {"n_gpus": "64", "pp": "64", "ep": "1", "gbs": "3"})  # 48 layers
    with (tmp_path / "runs.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["model", *sorted({name for row in rows for name in row} - {"model"})])
        writer.writeheader()
        writer.writerows(rows)
    done = run(tmp_path, "validate", "runs=runs.csv", "results=out.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    first, *others = found["rows"]
    assert first["error_tokens_per_s_per_gpu"] is not None
    for row, (name, value) in zip(others, odd.items(), strict=False):
        assert row["not_modelled"].startswith(f"{name}={value} is not a ")
        assert f"not modelled: rows {row['row']}: {name}={value} is not a " in done.stdout
    assert others[-1]["not_modelled"].startswith("it cannot run so")
    assert found["rows_counted"] == 1


@pytest.mark.parametrize(
    ("name", "file"),
    [("OLMoE-1B-7B", "olmoe_7b"), ("Qwen2-57B-A14B", "qwen2_moe_57b_a14b"), ("GLM-4.5 355B-A32B", "glm4_moe_355b"),
     ("Nemotron-4 340B", "nemotron_340b"), ("Llama 3.1 405B", "llama3_405b"), ("DeepSeek-V2-Lite", "deepseek_v2_lite"),
     ("Qwen3 30B", "qwen3_30b_a3b"), ("Qwen3-32B", None), ("Qwen3", None), ("", None),
     ("Mixtral-8x22B-G8T8", "mixtral_8x22b_g8t8"), ("Mixtral-8x22B", "mixtral_8x22b"),
     ("Mixtral-8x22B (tokendrop)", "mixtral_8x22b")],
)  # fmt: skip
@pytest.mark.parametrize("directory", [None, "tools/published/validation_models", "conf/model"])
def test_published_names_find_their_files(name: str, file: str | None, directory: str | None) -> None:
    """The longest name that fits wins, whichever folder it is in and whichever folder was named."""
    found = models.find(name, directory and str(ROOT / directory))
    assert (found and found.name) == file


def test_of_files_of_one_name_the_one_in_the_named_directory_counts(tmp_path: Path) -> None:
    for name in ("mixtral_8x22b", "mixtral"):
        (tmp_path / f"{name}.yaml").write_text(f"name: own_{name}\n")
    names = {name: models.find(name, str(tmp_path)) for name in ("Mixtral-8x22B", "Mixtral-8x7B", "Mixtral Large")}
    assert {name: model and model.name for name, model in names.items()} == {
        "Mixtral-8x22B": "own_mixtral_8x22b", "Mixtral-8x7B": "mixtral_8x7b", "Mixtral Large": "own_mixtral",
    }  # fmt: skip


def test_a_table_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "runs.csv").write_text("a,b\n1,2\n")
    done = run(tmp_path, "validate", "runs=runs.csv")
    assert done.returncode == 2
    assert "has no column hardware, model" in done.stderr
    (tmp_path / "runs.csv").write_text("model,hardware\n")
    done = run(tmp_path, "validate", "runs=runs.csv")
    assert done.returncode == 2
    assert "runs=runs.csv has no rows" in done.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [("hidden_size: big", "'big'"), ("num_layers: -3", "num_layers=-3 is below"), ("hiden_size: 8", "hiden_size"),
     ("[", "while parsing"), ("- 1", "not a mapping"), ("name: &a [b]\nhidden_size: *a", "references"),
     ("num_layers: 1:30", "1:30")],
)  # fmt: skip
def test_a_model_file_that_fits_no_schema_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "wonder_7b.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"wonder_7b\.yaml: .*use the fields of model") as found:
        models.find("Wonder-7B", str(tmp_path))
    assert message in str(found.value)


def test_a_directory_of_models_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "runs.csv").write_text("model,hardware\n")
    done = run(tmp_path, "validate", "runs=runs.csv", "models=nowhere")
    assert done.returncode == 2
    assert done.stderr.startswith("error: models=nowhere is not a directory")
