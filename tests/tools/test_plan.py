"""`moe-plan`: a question on the command line, an answer in tables and files, on a login node."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import hydra
import pytest

from moe_train.config.composition import store
from moe_train.config.composition.compose import compose, to_config
from moe_train.config.composition.explain import CONF_DIR
from moe_train.config.composition.validate import validate
from moe_train.config.roots import PlanRoot
from moe_train.config.schema import Config
from moe_train.config.walk import all_fields, get
from moe_train.model.memory import predict as memory
from parallel.errors import ConfigError
from parallel.planner import cost
from tests import forked
from tests.startup import startup
from tools import plan
from tools.planning import experiment
from tools.planning.answer import answer
from tools.planning.pictures import COLOURS
from tools.planning.recipe import count, stages
from tools.published.free_text import date_of

OLD_RECIPE = (
    "'plan.recipe=[{name:pre-training,tokens:14800000000000},{name:to 32K,steps:1000,seq_length:32768,"
    "global_batch_size:1920}]'"
)
ROOT = Path(__file__).parents[2]
V3 = ("model=deepseek_v3", "cluster=h800", "gpus=2048", "tokens=14.8T")
NO_ROOM = (
    "error: no layout of mixtral_8x7b fits 8 GPUs of h800: weights, gradients and optimizer alone need more memory "
    "than there is (40 of 40 layouts); use more GPUs (plan.gpus), or a cluster with more memory"
)


def run(directory: Path, *words: str, tool: str = "plan", columns: str = "160") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": columns}
    return forked.run(
        [sys.executable, "-m", f"tools.{tool}", *words], cwd=directory, env=environment, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize(
    "command",
    [
        ["tools.plan", *V3, "search=false", "parallel=deepseek_v3_h800"],
        [],
    ],
    ids=["rich", "print"],
)
def test_a_reader_that_has_seen_enough_gets_no_traceback(tmp_path: Path, command: list[str]) -> None:
    """`moe-plan ... | head`."""
    reader, writer = os.pipe()
    os.close(reader)
    entry = "import sys; from moe_train.config.composition.compose import hydra_entry as run"
    prints = f"{entry}; sys.exit(run(lambda cfg: print('x' * 10**6), argv=[], trains=False, runs=False))"
    words = [sys.executable, *(["-m", *command] if command else ["-c", prints])]
    done = subprocess.run(
        words, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=writer, stderr=subprocess.PIPE,
        text=True, timeout=120,
    )  # fmt: skip
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The files and the text of one plan."""
    folder = tmp_path_factory.mktemp("plan")
    done = run(folder, *V3, "top=3", "output=out", "write=own/experiment/best.yaml", "plan.precisions=[block]")
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_the_answer_says_what_was_asked(answered: tuple[Path, str]) -> None:
    folder, text = answered
    for words in ("tokens/s/GPU", "MFU", "bubble", "GiB", "dollars", "kWh", "t CO2", "failures a day", "layouts:"):
        assert words in text
    found = json.loads((folder / "out/plan.json").read_text())
    assert found["gpus_used"] == 2048
    assert len(found["plans"]) == 3
    first = found["plans"][0]
    assert max(first["memory_bytes_by_stage"]) == first["memory_bytes"] < 80 * 2**30
    assert sum(first["components_s"].values()) == pytest.approx(first["step_s"])
    assert found["total"]["dollars"] == pytest.approx(found["total"]["gpu_hours"] * 2)
    assert found["costs"][0]["tokens"] == 14.8e12
    best = next(line for line in text.splitlines() if f" {first['tokens_per_s_per_gpu']:,.0f} " in line)
    hours = 14.8e12 / first["tokens_per_s_per_gpu"] / 3600
    assert [cell.strip() for cell in best.split("│")][-3:-1] == [f"{hours / 2048 / 24:,.1f}", f"{hours * 2:,.0f}"]
    formats = {row["cache_format"]: row for row in found["kv_cache"]["formats"]}
    assert formats["fp8"]["bytes_per_token"] == 40_016
    assert found["kv_cache"]["replicas"] == first["dp"]
    assert found["kv_cache"]["uncompressed_bytes_per_token"] == 4_997_120
    assert f" {formats['fp8']['tokens']:,} " in text
    assert formats["fp8"]["tokens"] * formats["fp8"]["rank_bytes_per_token"] <= found["kv_cache"]["free_bytes"]
    assert {"own", "out"} == {path.name for path in folder.iterdir()}
    assert f"wrote own/experiment/best.yaml; run it with --config-dir {folder}/own experiment=best" in text


def test_the_winner_is_a_layout_that_a_run_accepts(answered: tuple[Path, str]) -> None:
    """Its experiment alone passes validation over 2,048 ranks, and needs the memory and the time that the plan says."""
    folder, _ = answered
    best = json.loads((folder / "out/plan.json").read_text())["plans"][0]
    own = ["--config-dir", "own", "experiment=best"]
    taken = run(folder, *own, tool="memory")
    assert f"with {max(best['memory_bytes_by_stage']) / 2**30:,.2f} GiB" in taken.stdout, taken.stderr
    timed = run(folder, *own, "search=false", "output=again", tool="plan")
    assert timed.returncode == 0, timed.stderr
    again = json.loads((folder / "again/plan.json").read_text())["plans"][0]
    assert again["step_s"] == pytest.approx(best["step_s"], rel=1e-6)
    store.register(Config)
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        search_path = [f"hydra.searchpath=[file://{folder}/own]"]
        cfg = to_config(hydra.compose("train", overrides=["experiment=best", *search_path]), Config)
    assert (cfg.train.tokens, cfg.train.seq_length, cfg.batch.global_batch_size) == (14_800_000_000_000, 4096, 15360)
    layout = validate(cfg, world_size=2048)
    assert [getattr(layout, name) for name in ("tp", "pp", "vpp", "ep")] == [best[n] for n in ("tp", "pp", "vpp", "ep")]
    assert cfg.precision.fp8 == "block"
    assert [one.total for one in memory(cfg, layout)] == pytest.approx(best["memory_bytes_by_stage"])


def test_the_pictures_show_every_rank(answered: tuple[Path, str]) -> None:
    folder, _ = answered
    pp = json.loads((folder / "out/plan.json").read_text())["plans"][0]["pp"]
    trace = json.loads((folder / "out/trace.json").read_text())["traceEvents"]
    passes = [event for event in trace if event["ph"] == "X"]
    assert {event["tid"] for event in passes} == set(range(pp))
    root = ElementTree.fromstring((folder / "out/pipeline.svg").read_text())
    boxes = [item for item in root.iter() if item.tag.endswith("path") and "fill: #" in item.get("style", "")]
    colours = {kind: [box for box in boxes if colour in box.get("style", "")] for kind, colour in COLOURS.items()}
    assert len(colours["F"]) == sum(event["cat"] == "F" for event in passes) + 1  # and the legend
    assert len(colours["B"]) == sum(event["cat"] == "B" for event in passes) + 1
    page = (folder / "out/report.html").read_text()
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    assert page.count('<div class="table"><table>') == page.count("<table>") > 4  # which scroll by themselves
    assert "<svg" in page
    assert "conf/experiment file" in page
    assert "<caption>KV cache at inference, sequences of 4,096 tokens." in page
    assert "&lt;svg" not in page


@pytest.mark.parametrize(
    ("words", "month"),
    [
        ("release 25.11 nemo container", 202511),
        ("arxiv 2603.07685", 202603),
        ("qwen3 best practice; hybridep", 202511),  # the first release that had it
        ("qwen3 best practice; deepep", 202509),
    ],
)
def test_a_source_is_as_old_as_it_says(words: str, month: int) -> None:
    assert date_of(words) == month


def test_a_given_layout_is_timed_as_it_is(tmp_path: Path) -> None:
    """DeepSeek-V3's whole recipe costs what was published: 2.788M GPU-hours, $5.576M (arXiv 2412.19437, table 1)."""
    done = run(
        tmp_path, *V3, "parallel=deepseek_v3_h800", "precision=fp8_block", "recompute=deepseek_v3", "plan=deepseek_v3",
        "output=out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out/plan.json").read_text())
    assert found["plans"][0]["schedule"] == "dualpipe"
    assert found["costs"][0]["gpu_hours"] == pytest.approx(2.664e6, rel=0.05)
    extension = sum(bill["gpu_hours"] for bill in found["costs"] if "extension" in bill["name"])
    assert extension == pytest.approx(0.119e6, rel=0.05)
    assert found["total"]["gpu_hours"] == pytest.approx(2.788e6, rel=0.05)
    assert found["total"]["dollars"] == pytest.approx(5.576e6, rel=0.05)


def test_each_rank_of_dualpipe_is_shown_with_all_it_holds(tmp_path: Path) -> None:
    words = (*V3, "parallel=deepseek_v3_h800", "precision=fp8_block", "recompute=deepseek_v3", "plan=deepseek_v3")
    done = run(tmp_path, *words, "output=out")
    assert done.returncode == 0, done.stderr
    best = json.loads((tmp_path / "out/plan.json").read_text())["plans"][0]
    assert max(best["memory_bytes_by_stage"]) == best["memory_bytes"]
    fullest = f"{best['memory_bytes'] / 2**30:.2f}"
    row = next(line for line in done.stdout.splitlines() if "rank under dualpipe" in line)
    page = (tmp_path / "out/report.html").read_text()
    assert fullest in row
    assert f"<td>{fullest}</td>" in page
    assert "<th>stage 15</th>" in page


def test_an_interval_that_is_asked_for_is_shown_with_the_best_one() -> None:
    """Failures that a stage of the recipe counts already are counted once."""
    given = ["model=tiny", "cluster=h100", "runtime=cuda", "precision=bf16", "plan.gpus=64", "plan.search=false",
             "batch=large", "train.seq_length=4096"]  # fmt: skip
    rows = {}
    for failures in (False, True):
        cfg = compose(
            [*given, "plan.checkpoint_interval_s=36000", f"plan.recipe=[{{name:main,tokens:9T,failures:{failures}}}]"],
            PlanRoot,
        )
        result = answer(cfg, validate(cfg, trains=False))
        rows[failures] = {name: (fraction, days) for name, fraction, days, _ in result.sensitivity}
    now = rows[0]["as planned, with failures and checkpoints"][0]
    best = next(fraction for name, (fraction, _) in rows[0].items() if "the best interval" in name)
    assert now < best
    assert next(fraction for name, (fraction, _) in rows[0].items() if "price" in name) == now
    assert rows[0].keys() == rows[1].keys()
    for name, (_, days) in rows[0].items():
        assert rows[1][name][1] == pytest.approx(days)


def test_a_search_says_why_the_layout_that_was_asked_for_is_slower(tmp_path: Path) -> None:
    words = (*V3, "parallel=deepseek_v3_h800", "precision=fp8_block", "recompute=deepseek_v3", "plan=deepseek_v3")
    done = run(tmp_path, *words, "search=true", "output=out", "top=1")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out/plan.json").read_text())
    asked, best = found["asked"], found["plans"][0]
    assert [asked[name] for name in ("tp", "pp", "ep", "dp", "schedule")] == [1, 16, 64, 128, "dualpipe"]
    longer = asked["step_s"] / best["step_s"] - 1
    assert longer < 0.05
    bubble = asked["components_s"]["bubble"] - best["components_s"]["bubble"]
    assert longer > 0
    assert f"takes {longer:.1%} longer than the best" in done.stdout
    assert f"bubble {bubble:+.2f} s" in done.stdout
    assert f"takes {longer:.1%} longer" in (tmp_path / "out/report.html").read_text()


def test_it_starts_quickly_and_without_torch(tmp_path: Path) -> None:
    words = ("model=tiny", "cluster=h100", "search=false", "gpus=1", "batch.global_batch_size=8")
    calls, slow = startup("from tools import plan; plan.main()", *words, directory=tmp_path)
    assert slow == []
    assert calls < 1_400_000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gpus=many"], "error: plan.gpus='many' is not a whole number"),
        (["tokens=1e400"], "error: train.tokens='1e400' is not a whole number"),
        (["gpus=2.5"], "error: plan.gpus='2.5' is not a whole number"),
        (["model=deepseek_v3", "gpus=8", "batch.global_batch_size=8"], "error: no layout of deepseek_v3 fits 8 GPUs"),
        (["model=mixtral_8x7b", "gpus=8"], NO_ROOM),
        (["cluster=h801"], "error: cluster=h801"),
        (["cluster=a100", "model=mixtral_8x7b", "precision=fp8_block"], "error: cluster=a100 has no FP8"),
        (["model=deepseek_v3", "precision=mxfp8"], "error: cluster=h800 has no MXFP8"),
        (["model=deepseek_v3", "cluster=b200", "precision=nvfp4"], "error: precision.fp4=nvfp4 is not timed"),
        (["model=tiny", "gpus=1", "plan.schedules=[]"], "error: plan.schedules=[] leaves nothing to try"),
        (["model=tiny", "gpus=8", "plan.cp=[3]"], "error: plan.cp=[3] divides none of"),
        (["model=tiny", "gpus=1", "write=."], "error: plan.write=. cannot be written: it is a directory"),
        (["model=tiny", "gpus=1", "output=a_file/out"], "error: plan.output=a_file/out cannot be written"),
        (
            ["model=tiny", "gpus=1", "output=a_file"],
            "error: plan.output=a_file cannot be written: it is not a directory",
        ),
        (["model=tiny", "gpus=1", "write=new/"], "error: plan.write=new/ cannot be written: it is not a file name"),
        (["model=tiny", "gpus=1", "write=./x", "output=x"], "error: plan.write and plan.output are both ./x"),
        (
            ["model=tiny", "gpus=1", "write=continue"],
            "error: plan.write=continue is an experiment that moe-plan did not",
        ),
        (["model=tiny", "gpus=1", "--package"], "error: command line: argument --package/-p: expected one argument"),
        (
            ["model=tiny", "gpus=1", "tokens=1T", "plan.recipe=[{name:a,tokens:2000000000000}]"],
            "error: train.tokens=1000000000000 is of no stage of plan.recipe",
        ),
        (
            ["model=tiny", "gpus=1", "plan.recipe=[{name:a,tokens:2000000000000,steps:3}]"],
            "error: plan.recipe: {name:a,tokens:2000000000000,steps:3} has tokens and steps",
        ),
        (["plan.software_date=202613", "model=tiny", "gpus=1"], "error: plan.software_date=202613 is not a month"),
        (
            ["model=deepseek_v3", "parallel=deepseek_v3_h800", "plan.search=false", "gpus=64"],
            "error: parallel.ep=64 does",
        ),
        (
            ["model=qwen3_30b_a3b", "parallel.ep=8", "plan.search=false", "gpus=24", "batch.global_batch_size=1000"],
            "error: batch.global_batch_size=1000 is not a multiple of",
        ),
        (["validate", "runs=none.csv"], "error: runs=none.csv cannot be read: "),
        (
            ["plan.recipe=[{name:pretraining}]", "model=tiny", "gpus=1"],
            "error: plan.recipe: {name:pretraining} has no tokens",
        ),
        (
            ["plan.recipe=['pre-training tokens=14.8T','to 32K seq=32k batch=1920 steps=1k']", "model=tiny", "gpus=1"],
            "error: plan.recipe is a list of entries in braces, not of text such as 'pre-training tokens=14.8T'; use "
            + OLD_RECIPE,
        ),
    ],
)
def test_a_wrong_question_is_one_line_and_exit_code_2(tmp_path: Path, words: list[str], message: str) -> None:
    (tmp_path / "a_file").touch()
    done = run(tmp_path, *(["validate"] if "validate" in words else []), *[w for w in words if w != "validate"])
    assert done.returncode == 2
    assert done.stderr.startswith(message)
    assert len(done.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a_file"]


def test_a_full_disk_behind_the_answer_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = forked.run(
            [sys.executable, "-m", "tools.plan", "model=tiny", "gpus=1"], cwd=ROOT, stdout=full, stderr=subprocess.PIPE,
            text=True, timeout=120,
        )  # fmt: skip
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("error: the output cannot be written: No space left")


def test_a_file_gets_whole_tables(tmp_path: Path) -> None:
    """Nothing is cut off where there is no terminal whose width would ask for it."""
    done = run(tmp_path, *V3, "search=false", "parallel=deepseek_v3_h800", "recompute=full", columns="")
    assert done.returncode == 0
    assert "…" not in done.stdout


def test_spares_are_paid_for() -> None:
    """A layout of 96 GPUs is the best for 100: four idle, as dear as the rest."""
    model = ["model=mixtral_8x7b", "runtime=cuda", "precision=bf16", "train.seq_length=4096"]
    work = ["batch.global_batch_size=1152", "train.tokens=1000000000", "train.steps=null", "plan.gpus=100"]
    cfg = compose([*model, *work], PlanRoot)
    found = answer(cfg, validate(cfg, trains=False))
    assert (found.gpus, found.used) == (100, 96)
    useful = cost.gpu_hours(1e9, found.best.step.tokens_per_s_per_gpu)
    assert found.costs[0].gpu_hours == pytest.approx(useful * 100 / 96)
    assert found.costs[0].days == pytest.approx(useful / 96 / 24)
    cluster = cfg.cluster
    busy = useful * cluster.watts_per_gpu / 1000 * cluster.power_usage_effectiveness
    assert found.costs[0].kwh == pytest.approx(busy)


@pytest.mark.parametrize(
    ("batch", "cp", "micro_batches"), [(1920, 8, 120), (2048, 1, 16), (3072, 1, 24), (3840, 4, 120)]
)
def test_a_stage_of_longer_sequences_gets_the_smallest_ring_that_can_run_it(
    batch: int, cp: int, micro_batches: int
) -> None:
    """Where its cp is not given: 15, 30 and 60 micro-batches do not fill an interleaved pipeline of 8, and 120 do."""
    cfg = compose(["model=deepseek_v3", "runtime=cuda", "precision=bf16", "batch=large", "train.seq_length=4096",
                   "recompute=full", "plan.gpus=2048", "plan.search=false", "parallel.tp=2", "parallel.pp=8",
                   "parallel.vpp=2", "parallel.ep=64",
                   f"plan.recipe=[{{name:long,seq_length:32k,global_batch_size:{batch},steps:1000}}]"],
                  PlanRoot)  # fmt: skip
    found = answer(cfg, validate(cfg, trains=False))
    workload = found.plans_of_stages["long"].workload
    assert (workload.layout.cp, workload.micro_batches) == (cp, micro_batches)
    assert workload.layout.world_size == 2048
    assert workload.seq_length == 32768
    assert workload.micro_batches * workload.micro_batch_size * workload.layout.dp == batch


def test_a_layout_that_does_not_fit_is_not_offered(tmp_path: Path) -> None:
    """It is shown with its memory, and has no bill, no files and an exit code."""
    words = ("model=qwen3_30b_a3b", "cluster=h100", "gpus=64", "search=false", "tokens=1T")
    done = run(tmp_path, *words, "write=bad.yaml", "output=out")
    assert done.returncode == 2
    assert "IT DOES NOT FIT" in done.stdout
    assert "Memory of one rank" in done.stdout
    for absent in ("Plans that fit", "dollars", "kWh", "Goodput"):
        assert absent not in done.stdout
    assert done.stderr.startswith("error: the layout of parallel.* needs ")
    assert "78.6 of cluster=h100 can be used" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_bare_name_becomes_an_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the user gave is in the file: fields of the model, of the cluster, and a precision that was searched."""
    monkeypatch.setattr(experiment, "FOLDER", tmp_path / "conf/experiment")
    file = experiment.target("mine-2")
    assert file == tmp_path / "conf/experiment/mine-2.yaml"
    assert experiment.how_to_run(file) == "run it with experiment=mine-2"
    words = ["model=qwen3_30b_a3b", "model.num_layers=24", "cluster=h200", "cluster.dollars_per_gpu_hour=1.5",
             "plan.gpus=64", "plan.precisions=[block]", "runtime=cuda", "precision=bf16", "batch.global_batch_size=512",
             "train.seq_length=4096", "optimizer.lr=3e-4", "seed=7"]  # fmt: skip
    cfg = compose(words, PlanRoot)
    found = answer(cfg, validate(cfg, trains=False))
    file.parent.mkdir(parents=True)
    file.write_text(experiment.as_yaml(cfg, found.best))
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        overrides = ["experiment=mine-2", f"hydra.searchpath=[file://{tmp_path}/conf]"]
        again = to_config(hydra.compose("train", overrides=overrides), Config)
    wanted = experiment.planned(cfg, found.best)
    # The run directory of each composition has the time in its name.
    assert {name for name in all_fields() if get(again, name) != get(wanted, name)} <= {"run_dir"}
    assert "run_dir" not in file.read_text()
    assert again.precision.name == "fp8_block"
    assert validate(again).world_size == 64


def test_the_command_writes_the_experiment_that_a_bare_name_means(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(experiment, "FOLDER", tmp_path / "conf/experiment")
    monkeypatch.chdir(tmp_path)
    words = ["model=qwen3_30b_a3b", "parallel.pp=2", "parallel.ep=8", "parallel.dp=32", "plan.gpus=64", "runtime=cuda",
             "cluster=h200", "precision=bf16", "recompute=full", "plan.search=false", "batch.global_batch_size=512",
             "plan.write=mine"]  # fmt: skip
    plan.run(compose(words, PlanRoot))
    file = tmp_path / "conf/experiment/mine.yaml"
    assert experiment.MARK in file.read_text()
    assert "run it with experiment=mine" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["conf"]


def test_tools_assume_the_same_precision(tmp_path: Path) -> None:
    """moe-memory and moe-plan count BF16 on GPUs where nothing is said, as moe-submit trains."""
    words = ("model=qwen3_30b_a3b", "parallel.pp=2", "parallel.ep=8", "parallel.dp=32", "cluster=h200")
    held = run(tmp_path, *words, "batch.global_batch_size=4096", tool="memory").stdout
    planned = run(tmp_path, *words, "batch.global_batch_size=4096", "search=false").stdout
    assert "qwen3_30b_a3b, 64 ranks, bf16" in held
    assert "Memory of one rank, bf16" in planned
    totals = [
        next(line for line in text.splitlines() if line.strip(" │").startswith("total")) for text in (held, planned)
    ]
    assert totals[0].split("│")[2:] == totals[1].split("│")[2:]


def test_a_cpu_gets_no_dispatcher_for_gpus() -> None:
    cfg = compose(["model=tiny", "cluster=local_cpu", "plan.gpus=4", "runtime=cpu"], PlanRoot)
    assert answer(cfg, validate(cfg, trains=False)).best.software.dispatcher == "alltoall"


def test_the_dispatcher_of_a_given_layout_is_timed() -> None:
    given = ["model=deepseek_v3", "parallel=deepseek_v3_h800", "runtime=cuda", "precision=bf16", "batch=large"]
    seconds = []
    for dispatcher in ("flex", "alltoall"):
        cfg = compose([*given, "plan.search=false", f"parallel.dispatcher={dispatcher}"], PlanRoot)
        seconds.append(answer(cfg, validate(cfg)).best.step.seconds)
    assert seconds[1] > 1.2 * seconds[0]


def test_a_run_that_is_planned_may_be_shorter_than_its_warm_up() -> None:
    cfg = compose(
        [
            "model=tiny",
            "runtime=cuda",
            "batch=large",
            "train.steps=null",
            "train.tokens=1000000",
            "precision=bf16",
            "schedule.warmup_steps=20",
        ],
        PlanRoot,
    )
    assert validate(cfg, trains=False)
    with pytest.raises(ConfigError, match="warmup_steps"):
        validate(cfg)


def test_short_names_are_written_out() -> None:
    words = plan.translated(["model=tiny", "gpus=2k", "tokens=1.5B", "precision=fp8_block"])
    assert set(words) >= {"plan.gpus=2000", "train.tokens=1500000000", "precision=fp8_block", "runtime=cuda"}
    assert "precision=bf16" in plan.translated(["model=tiny"])


def test_a_sweep_over_gpus_answers_each_and_leaves_nothing(tmp_path: Path) -> None:
    done = run(tmp_path, "-m", "gpus=1,1.024k", "model=tiny", "top=1")
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split(":")[0] for line in done.stdout.splitlines() if line.startswith("tiny on")] == [
        "tiny on 1 x NVIDIA H800 SXM 80GB", "tiny on 1,024 x NVIDIA H800 SXM 80GB",
    ]  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_hours_that_are_given_do_not_change_in_the_sensitivity_analysis() -> None:
    recipe = "plan.recipe=[{name:first,tokens:1000000000,failures:true},{name:second,gpu_hours:5000}]"
    cfg = compose(["model=mixtral_8x7b", "runtime=cuda", "precision=bf16", "batch=large", "train.seq_length=4096",
                   "plan.gpus=64", "train.steps=null", "train.tokens=1000000000", recipe], PlanRoot)  # fmt: skip
    found = answer(cfg, validate(cfg, trains=False))
    rows = {name: (days, dollars) for name, _, days, dollars in found.sensitivity}
    total, (days, dollars) = found.total(), rows["as planned, with failures and checkpoints"]
    assert (days, dollars) == (pytest.approx(total.days), pytest.approx(total.dollars))
    given = 5000 * cfg.cluster.dollars_per_gpu_hour
    assert rows["MFU +10%"][1] == pytest.approx(given + (dollars - given) / 1.1)


@pytest.mark.parametrize("options", [["--cfg", "job"], ["--config-dir", "."], ["-v"]])
def test_options_of_hydra_go_before_what_is_assumed(tmp_path: Path, options: list[str]) -> None:
    """argparse takes no more overrides behind an option that follows some."""
    for words in ([*options, "model=tiny", "gpus=1"], ["model=tiny", "gpus=1", *options]):
        assert plan.translated(words)[: len(options)] == options
        done = run(tmp_path, *words)
        assert (done.returncode, done.stderr) == (0, "")


def test_numbers_and_recipes_are_read() -> None:
    recipe = "[{name:main part,tokens:1T},{name:longer,seq_length:32k,global_batch_size:480,steps:10,cp:8}]"
    assert [count(text) for text in ("14.8T", "4e9", "1_000", "2k")] == [14_800_000_000_000, 4 * 10**9, 1000, 2000]
    one, two = stages(compose([f"plan.recipe={recipe}"], PlanRoot).plan.recipe, None)
    assert (one.name, one.tokens, one.as_planned) == ("main part", 1e12, True)
    assert (two.seq_length, two.global_batch_size, two.steps, two.cp, two.as_planned) == (32768, 480, 10, 8, False)
    assert stages([], 5)[0].tokens == 5
    assert stages([], None) == []
