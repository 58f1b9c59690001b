"""`make gpu-check` with a CPU as a stand-in for the GPU: right numbers pass, and nothing wrong does."""

from __future__ import annotations

import json
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor

from bench import gpu_cases, gpu_check, gpu_runner, gpu_task, gpu_tensors, gpu_worker
from bench.gpu_cases import GpuCase, Plan
from bench.gpu_runner import FAILED, MEASURED, NOT_RUN, NOT_SUPPORTED, PASSED, CheckRow, Runner, judge
from launch.local import forkserver
from moe_train.config.composition.compose import compose
from moe_train.config.composition.validate import validate
from moe_train.model.arithmetic import count_parameters
from moe_train.model.memory import predict
from tests.bench import gpu_faults

FAULTS = "tests.bench.gpu_faults"
LIMITS = {"error": 1.0}


@pytest.fixture(scope="module", autouse=True)
def _server() -> None:
    """Processes are forked from one that has imported everything."""
    forkserver.wait()


def fault(name: str, **more: Any) -> GpuCase:
    """The case whose process calls that function of gpu_faults."""
    return GpuCase(name, f"{FAULTS}:{name}", **{"limits": LIMITS, "timeout_s": 60.0, **more})


def rows_of(
    cases: Sequence[GpuCase],
    directory: Path,
    preparations: Sequence[GpuCase] = (),
    budget_s: float = 300,
    jobs: int = 1,
) -> dict[tuple[str, str], CheckRow]:
    plan = Plan(list(cases), {case.name: case for case in preparations}, [])
    found = Runner(plan, directory, budget_s, forked=True, jobs=jobs).run(lambda row: None)
    return {(row.case, row.part): row for row in found}


def test_a_case_that_goes_wrong_is_reported_and_ends_no_other(tmp_path: Path) -> None:
    names = ["wrong", "silent", "nan", "other_number", "unsupported", "raises", "crashes", "crashes_after_reporting",
             "right"]  # fmt: skip
    rows = rows_of([*map(fault, names), fault("absent"), fault("hangs", timeout_s=8.0)], tmp_path, jobs=2)
    assert {case: row.status for (case, _), row in rows.items()} == {
        "wrong": FAILED, "silent": FAILED, "nan": FAILED, "other_number": FAILED, "unsupported": NOT_SUPPORTED,
        "raises": FAILED, "crashes": FAILED, "crashes_after_reporting": FAILED, "right": PASSED, "absent": FAILED,
        "hangs": FAILED,
    }  # fmt: skip
    why = {case: row.why for (case, _), row in rows.items()}
    assert why["wrong"] == "error is -1.5, and its limit 1"
    assert why["silent"] == "its process ended without a result"
    assert why["nan"] == "error is nan, and its limit 1"
    assert why["other_number"] == "error is missing, and its limit 1"
    assert why["raises"] == "exit code 1: RuntimeError: CUDA error: an illegal memory access was encountered"
    assert why["crashes"].startswith("ended by SIGSEGV")
    assert "has no such function" in why["absent"]
    assert why["hangs"] == "killed after 8 s without an end"
    _ends(int((tmp_path / f"{gpu_faults.CHILD}.pt").read_text()))


def test_a_process_that_starts_takes_no_status_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second process starts while the thread that waits for the first one is about to read how that ended."""
    ended, real = threading.Event(), multiprocessing.connection.wait
    calls: list[Any] = []

    def slow(waited: Any, timeout: float | None = None) -> list[Any]:
        found = real(waited, timeout)
        if found and threading.current_thread() is not threading.main_thread():
            calls.append(waited)
            if len(calls) == 2:  # the first is that of `join`, the second that of `poll`, which reads next
                ended.set()
                time.sleep(1)
        return found

    def code(name: str) -> int | None:
        files = (str(tmp_path), str(tmp_path / f"{name}.jsonl"), str(tmp_path / f"{name}.log"))
        task = gpu_task.Task(name, f"{FAULTS}:right", [], ["a"], {}, *files)
        return gpu_task.run(task, lambda: 60.0, set(), forked=True)

    monkeypatch.setattr(multiprocessing.connection, "wait", slow)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(code, "first")
        assert ended.wait(60)
        assert code("second") == 0
        assert first.result() == 0


def _ends(pid: int) -> None:
    """The process is gone, or waits only for its parent to take note."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    pytest.fail(f"process {pid} is left")


def test_parts_after_a_crash_run_in_another_process(tmp_path: Path) -> None:
    case = fault("crashes_in_part_b", parts=["a", "b", "c", "d"])
    rows = rows_of([case], tmp_path)
    assert [(row.part, row.status) for row in rows.values()] == [
        ("a", PASSED), ("b", FAILED), ("c", PASSED), ("d", PASSED),
    ]  # fmt: skip
    processes = {part: row.values["process"] for (_, part), row in rows.items() if row.status == PASSED}
    assert processes["c"] == processes["d"] != processes["a"]


def test_what_does_not_fit_the_budget_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_runner, "LEAST_S", 0.5)
    began = time.monotonic()
    rows = rows_of([fault("hangs", parts=["a", "b"]), fault("silent")], tmp_path, budget_s=2)
    assert time.monotonic() - began < 20
    assert [row.status for row in rows.values()] == [NOT_RUN, NOT_RUN, NOT_RUN]
    assert "ended while it ran" in rows["hangs", "a"].why
    assert gpu_check.exit_code(list(rows.values())) == gpu_check.EXIT_INCOMPLETE


def test_a_preparation_runs_once_and_its_failure_is_that_of_its_cases(tmp_path: Path) -> None:
    preparations = [fault("counts"), fault("raises"), GpuCase("late", f"{FAULTS}:right", needs=["raises"])]
    cases = [
        GpuCase(name, f"{FAULTS}:right", limits=LIMITS, needs=needs)
        for name, needs in (("one", ["counts"]), ("two", ["counts"]), ("three", ["raises"]), ("four", ["late"]))
    ]
    rows = rows_of(cases, tmp_path, preparations, jobs=2)
    assert [rows[name, ""].status for name in ("one", "two", "three", "four")] == [PASSED, PASSED, FAILED, FAILED]
    assert "illegal memory access" in rows["four", ""].why
    assert (tmp_path / "count.pt").read_text() == "x"


def test_numbers_are_judged_by_the_limits_of_their_part() -> None:
    case = GpuCase("case", "m:f", limits={"error": 0.1}, parts=["a", "b"], measured_only=["a"])
    assert judge(case, "a", {"error": 5.0}).status == MEASURED
    assert judge(case, "b", {"error": 5.0}).status == FAILED
    assert judge(case, "b", {"error": -0.1}).status == PASSED
    assert judge(case, "b", {"error": float("inf")}).status == FAILED


@pytest.fixture(scope="module")
def stand_in(small_data: tuple[str, ...]) -> Plan:
    """The cases for the CPU, on little data and with short sequences."""
    return gpu_cases.plan("cpu", ["local"], more=[*small_data, "model.vocab_size=512", "train.seq_length=32"])


def short(case: GpuCase) -> GpuCase:
    """A recipe's run of a few steps."""
    words = ["train.steps=4", "schedule.warmup_steps=1", "batch.global_batch_size=4", "batch.micro_batch_size=4"]
    return replace(case, overrides=[*case.overrides, *words], options={**case.options, "warm_up": 1})


@pytest.mark.slow
def test_real_cases_pass_and_their_perturbed_twins_fail(stand_in: Plan, tmp_path: Path) -> None:
    real = {case.name: case for case in stand_in.cases}
    preparations = dict(stand_in.preparations)
    preparations["bf16 local"] = short(preparations["bf16 local"])
    sets = ["layernorm", "offload to a file"]
    chosen = {
        "perturbed_gradients": real["gradients fp32, local"],
        "wrong_memory": real["large model, local"],
        "wrong_checkpoint": real["checkpoint cpu to local"],
        "wrong_recomputation": replace(real["recompute, local"], parts=sets),
        "wrong_recipe": short(real["precision fp8_block, local"]),
    }
    twins = [replace(case, name=entry, entry=f"{FAULTS}:{entry}") for entry, case in chosen.items()]
    patient = [replace(case, timeout_s=900) for case in (*chosen.values(), *twins)]  # the machine may be busy
    prepared = [replace(case, timeout_s=900) for case in preparations.values()]
    rows = rows_of(patient, tmp_path, prepared, budget_s=3600, jobs=2)
    failed = {case for case, _ in rows if case in chosen}
    for (case, part), row in rows.items():
        expected = FAILED if case in failed else PASSED
        if part == gpu_cases.STEP_TIME:
            expected = MEASURED
        assert (case, part, row.status) == (case, part, expected), row
    assert rows["perturbed_gradients", ""].values["worst_parameter"] == "decoder.final_layernorm.weight"
    assert rows["gradients fp32, local", ""].values["parameters"] > 40
    assert rows["recompute, local", "layernorm"].values["bit_identical"]
    assert rows["large model, local", gpu_cases.STEP_TIME].values["predicted_s"] is None
    shown = gpu_check.table(gpu_check.stand_in(), list(rows.values()))
    assert shown.row_count == len(rows)


def test_every_case_of_a_gpu_has_a_valid_config() -> None:
    """With Transformer Engine and apex too: what is sent to a GPU is not refused there."""
    plan = gpu_cases.plan("cuda", ["local", "te"], apex=True)
    names = [case.name for case in plan.cases]
    assert len(set(names)) == len(names)
    for case in [*plan.cases, *plan.preparations.values()]:
        assert callable(getattr(gpu_worker, case.entry.partition(":")[2]))
        if "runtime=cuda" in case.overrides:
            validate(compose(case.overrides))
        assert set(case.needs) <= plan.preparations.keys()
    runtimes = {word for case in plan.cases for word in case.overrides if word.startswith("runtime=")}
    assert runtimes == {"runtime=cuda", "runtime=cpu"}
    assert [one.name for one in plan.refused] == ["recompute, local: offload to memory"]
    assert "needs backend.name=te" in plan.refused[0].why or "on runtime=cpu only" in plan.refused[0].why


def test_every_precision_is_compared_where_it_runs() -> None:
    known = {path.stem for path in (Path(gpu_cases.__file__).parents[1] / "conf/precision").glob("*.yaml")}
    assert set(gpu_cases.RECIPES["cuda", "te"]) | {"bf16"} == known == gpu_cases.RECIPE_LIMITS.keys() | {"bf16"}


@pytest.mark.parametrize("backend", ["local", "te"])
def test_the_large_model_has_a_billion_parameters_and_fits_80_gb(backend: str) -> None:
    cfg = compose([*gpu_cases.COMMON, *gpu_cases.LARGE, "runtime=cuda", f"backend.name={backend}"])
    assert 0.95e9 < count_parameters(cfg.model).total_with_mtp < 1.15e9
    assert predict(cfg, validate(cfg))[0].total < 60e9


def test_the_planner_predicts_the_step_of_every_gpu_with_a_cluster_file() -> None:
    cfg = compose([*gpu_cases.COMMON, *gpu_cases.LARGE, "runtime=cuda", "backend.name=te"])
    predicted = {name: gpu_worker.predicted_step_s(cfg, cluster) for name, cluster in gpu_cases.CLUSTERS.items()}
    assert all(0.05 < seconds < 5 for seconds in predicted.values())
    assert predicted["NVIDIA B200"] < predicted["NVIDIA H100 80GB HBM3"] < predicted["NVIDIA A100-SXM4-80GB"]


def test_a_gpu_without_a_cluster_file_gets_no_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_worker, "gemm_tflops", lambda runtime: 700.0)
    cfg = compose([*gpu_cases.COMMON, *gpu_cases.LARGE, "runtime=cuda", "backend.name=te"])
    lines = [{"lm_loss": 1.0, "step_time_s": 0.5, "mfu": None}] * gpu_cases.LARGE_STEPS
    found = gpu_worker.step_time(cfg, lines, "NVIDIA L4")
    assert found["prediction"] == "no file in conf/cluster describes 'NVIDIA L4'"
    assert gpu_worker.step_time(cfg, lines, "NVIDIA H200")["cluster"] == "h200"
    with pytest.raises(RuntimeError, match="not finite"):
        gpu_worker.step_time(cfg, [{**lines[0], "lm_loss": float("nan")}], "NVIDIA H200")


def test_gradients_are_compared_by_norms_and_names() -> None:
    a = {"x": torch.ones(4), "y": torch.full((4,), 1e-9), "z": torch.ones(2)}
    same = gpu_tensors.compare(a, a)
    assert same["gradient_difference"] == same["missing_parameters"] == 0
    other = gpu_tensors.compare({"x": a["x"] * 1.1, "y": a["y"] * 2}, a)
    assert other["worst_gradient_difference"] == pytest.approx(0.1)
    assert (other["worst_parameter"], other["missing_parameters"]) == ("x", 1)
    assert gpu_tensors.compare({**a, "x": a["x"] * float("nan")}, a)["worst_parameter"] == "x"


def test_the_gradient_of_every_parameter_is_found_and_weights_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard is the parameter itself, or a view of it; a buffer has no gradient."""
    weight, fused = (torch.nn.Parameter(torch.ones(shape)) for shape in ((3,), (4, 2)))
    for parameter in (weight, fused):
        parameter.main_grad = torch.full_like(parameter, 7.0)  # type: ignore[attr-defined]
    bias = torch.zeros(5)

    def shards(run: Any) -> list[ShardedTensor]:
        halves = [
            ShardedTensor.from_rank_offsets("fused", half, (0, part, 2)) for part, half in enumerate(fused.chunk(2))
        ]
        plain = [ShardedTensor.from_rank_offsets(name, data) for name, data in (("weight", weight), ("bias", bias))]
        return [*plain, *halves]

    monkeypatch.setattr(gpu_tensors, "_shards", shards)
    run: Any = SimpleNamespace(chunks=[SimpleNamespace(parameters=lambda: [weight, fused])])
    found = gpu_tensors.gradients_of(run)
    assert {name: (tuple(gradient.shape), set(gradient.flatten().tolist())) for name, gradient in found.items()} == {
        "weight": ((3,), {7.0}), "fused": ((4, 2), {7.0}),
    }  # fmt: skip
    assert torch.equal(weight, torch.ones(3))
    assert torch.equal(fused, torch.ones(4, 2))


def test_libraries_are_listed_and_a_broken_one_has_failed() -> None:
    libraries = {"Transformer Engine": {"version": "2.8", "error": "OSError: libcudnn.so"}, "apex": {"version": None},
                 "DeepEP": {"version": "1.2"}}  # fmt: skip
    device = gpu_check.Device("NVIDIA H200", "cuda", {"libraries": libraries})
    assert [row.status for row in gpu_check.installed(device)] == [FAILED, NOT_SUPPORTED, MEASURED]
    assert not device.usable("Transformer Engine")
    assert device.usable("DeepEP")
    assert gpu_worker.installed()["libraries"]["DeepEP"] == {"version": None}


@pytest.mark.parametrize(
    ("statuses", "code"),
    [([PASSED, MEASURED, NOT_SUPPORTED], 0), ([PASSED, FAILED, NOT_RUN], 1), ([PASSED, NOT_RUN], 3),
     ([NOT_SUPPORTED], 3), ([], 3)],
)  # fmt: skip
def test_exit_code_and_summary_say_what_did_not_pass(statuses: list[str], code: int) -> None:
    rows = [CheckRow("case", "", status) for status in statuses]
    assert gpu_check.exit_code(rows) == code
    summary = gpu_check.summarise(gpu_check.stand_in(), rows, 1.0)
    assert summary["all_hold"] == (code == 0)
    assert summary["not_run"] == statuses.count(NOT_RUN)


def test_without_a_gpu_it_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check"])
    monkeypatch.setattr(gpu_check, "visible_gpus", lambda: 0)
    with pytest.raises(SystemExit) as stopped:
        gpu_check.main()
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: no GPU is visible; gpu-check needs one, and a torch with CUDA (torch ")
    assert len(captured.err.splitlines()) == 1
    assert not captured.out


def test_results_begin_with_the_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--stand-in", "cpu", "--output", str(tmp_path)])
    row = CheckRow("case", "", FAILED, "why", values={"error": 2.0}, limits=LIMITS)
    monkeypatch.setattr(gpu_check, "check", lambda *given: [row])
    with pytest.raises(SystemExit) as stopped:
        gpu_check.main()
    assert stopped.value.code == 1
    written = json.loads((tmp_path / "gpu_check.json").read_text())
    assert next(iter(written)) == "all_hold"
    assert list(written)[-2:] == ["rows", "machine"]
    assert written["rows"][0] == {"case": "case", "part": "", "status": FAILED, "why": "why", "seconds": 0.0,
                                  "limits": LIMITS, "error": 2.0}  # fmt: skip
