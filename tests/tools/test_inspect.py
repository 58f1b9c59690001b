"""`moe-inspect` on small checkpoints of both formats, made without a training run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch import Tensor

from moe_train.config.checkpoint_tools import ConvertConfig
from moe_train.config.model import ModelConfig
from moe_train.config.roots import ConvertRoot
from moe_train.conversion import hf_config as config
from moe_train.conversion import plans
from moe_train.conversion.hf_source import names_of
from moe_train.conversion.mapping import pieces
from moe_train.formats import block_fp8, dcp, directory_writer, safetensors
from moe_train.formats.communicator import SingleProcess
from moe_train.formats.dtypes import of_torch
from moe_train.formats.hashing_file import HashingFile
from moe_train.formats.tensor_slices import TensorSlice
from moe_train.model.arithmetic import count_parameters
from tools import inspect
from tools.convert import make_plan

MODEL = ModelConfig(
    num_layers=2, hidden_size=32, ffn_hidden_size=48, moe_ffn_hidden_size=16, vocab_size=200, num_attention_heads=2,
    qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, kv_lora_rank=16, q_lora_rank=24, num_experts=4, topk=2,
    num_shared_experts=1, num_dense_layers=1, router_score="sigmoid", router_bias=True, mtp_num_layers=1,
)  # fmt: skip
Command = Callable[..., tuple[int, str, str]]
PADDING = 2 * (256 - 200) * 32  # of embedding and output head, in Megatron only
EXPERT = "model.layers.1.mlp.experts.3.down_proj.weight"


def weights(model: ModelConfig = MODEL) -> dict[str, Tensor]:
    """Random Hugging Face tensors of `model`, the copies among them equal to their originals."""
    generator = torch.Generator().manual_seed(7)
    found: dict[str, Tensor] = {}
    for piece in pieces(model):
        dtype = torch.float32 if piece.keeps_fp32 else torch.bfloat16
        for part in piece.parts:
            tensor = torch.randn(piece.part_shape(part), generator=generator).to(dtype)
            found |= dict.fromkeys((part.name, *part.copies), tensor)
    assert found.keys() == names_of(pieces(model)).keys()
    return found


def write_hf(directory: Path, tensors: dict[str, Tensor], settings: config.Json | None = None) -> Path:
    """A Hugging Face checkpoint in one file, without a manifest."""
    directory.mkdir(parents=True)
    out = HashingFile(directory / safetensors.SINGLE)
    out.write(safetensors.header([(name, of_torch(t.dtype), tuple(t.shape)) for name, t in tensors.items()]))
    for tensor in tensors.values():
        out.write(TensorSlice.of(tensor).data)
    out.close()
    settings = config.to_hf(MODEL, "bfloat16") if settings is None else settings
    (directory / config.FILE).write_text(json.dumps(settings))
    return directory


def write_megatron(directory: Path, source: Path) -> Path:
    """`source` converted, with a manifest."""
    cfg = ConvertRoot(convert=ConvertConfig(to="megatron"))
    directory_writer.run(make_plan(cfg, source, directory), SingleProcess(), 1)
    return directory


def add_optimizer(weights_only: Path, directory: Path, scale: float = 1.0) -> Path:
    """A copy with moments and fp32 weights, its bytes unverified, as a training run leaves it."""
    source = dcp.Checkpoint(weights_only)
    directory.mkdir(parents=True)
    items: dict[str, list[list[object]]] = {"__0_0.distcp": []}
    out = HashingFile(directory / "__0_0.distcp")
    for key, entry in source.tensors.items():
        tensor = torch.cat([chunk.extent.read().tensor() for chunk in source.chunks(key)])
        states = ("exp_avg", "exp_avg_sq", "fp32_param") if not key.endswith("expert_bias") else ()
        for name in ("", *(f"optimizer.state.{state}." for state in states)):
            data = (tensor.float() * scale if name else tensor).contiguous()
            start = out.position
            torch.save(data, out)
            dtype = str(data.dtype).removeprefix("torch.")
            offsets = [0] * len(entry.size)
            items["__0_0.distcp"].append(
                [name + key, list(entry.size), dtype, offsets, list(data.shape), start, out.position - start]
            )
    out.close()
    (directory / ".metadata").write_bytes(dcp.table(plans._items(items)))
    (directory / "config.yaml").write_bytes((weights_only / "config.yaml").read_bytes())
    state = {
        "format": 2,
        "progress": {"step": 1200, "consumed_samples": 5, "consumed_tokens": 34567},
        "layout": {"tp": 2, "pp": 1, "ep": 4},
        "device": "cpu",
        "seed": 99,
        "versions": {"torch": "2.13.0", "megatron-core": "0.16.1"},
    }
    (directory / "state.json").write_text(json.dumps(state))
    return directory


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One model in both formats. Tests that change something write their own."""
    root = tmp_path_factory.mktemp("made")
    hf = write_hf(root / "hf", weights())
    megatron = write_megatron(root / "megatron", hf)
    run = add_optimizer(megatron, root / "run" / "checkpoints" / "step_00001200")
    return SimpleNamespace(hf=hf, megatron=megatron, run=root / "run", step=run)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """`moe-inspect` in this process: (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["moe-inspect", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            inspect.main()
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return call


def rows(text: str) -> dict[str, list[str]]:
    """First cell -> the others, of every table in the output."""
    cells = [[c.strip() for c in line.strip("│").split("│")] for line in text.splitlines() if line.startswith("│")]
    return {first: rest for first, *rest in cells}


def test_names_in_a_checkpoint_cannot_control_the_terminal(command: Command, tmp_path: Path) -> None:
    """Nor are they taken for markup, of which `[/x]` would be wrong."""
    hostile = "[/x][red]\x1b[2J\x9b\r"
    settings = config.to_hf(MODEL, "bfloat16") | {"architectures": [hostile]}
    sources = [
        write_hf(tmp_path / name, weights() | {f"{hostile}.weight": torch.full((2,), value)}, settings)
        for name, value in (("a", 1.0), ("b", 2.0))
    ]
    _, text, _ = command(sources[0])
    assert fact(text, "architecture") == r"[/x][red]\x1b[2J\x9b\r"
    _, compared, _ = command(*sources, "--diff")
    assert r"[/x][red]\x1b[2J\x9b\r.weight" in compared
    assert all(line.isprintable() for line in (text + compared).split("\n"))


def fact(text: str, name: str) -> str:
    """The value next to `name`."""
    lines = (line.strip() for line in text.splitlines())
    return next(line.removeprefix(name).strip() for line in lines if line.startswith(name + " "))


@pytest.mark.parametrize("kind", ["hf", "megatron", "run"])
def test_every_part_is_counted_and_is_what_arithmetic_says(kind: str, made: SimpleNamespace, command: Command) -> None:
    code, out, err = command(getattr(made, kind))
    assert code == 0, err
    found, count = rows(out), count_parameters(MODEL)
    padding = PADDING if kind == "hf" else 0
    expected = {part.replace("_", " "): n for part, n in count.by_part(include_mtp=True).items()}
    for part in ("embedding", "output head"):
        expected[part] -= padding // 2
    expected |= {
        "total": count.total_with_mtp - padding,
        "total without mtp": count.total - padding,
        "active, without mtp": count.active - padding,
        "expert bias": count.expert_bias + count.mtp_expert_bias,
    }
    assert {part: found[part] for part in expected} == {p: [f"{n:,}", f"{n:,}", ""] for p, n in expected.items()}
    assert ("copies" in found) == (kind == "hf")  # multi-token prediction repeats embedding and head there
    assert fact(out, "family") == "deepseek_v3"


def test_a_checkpoint_of_a_run_says_how_it_came_about(made: SimpleNamespace, command: Command) -> None:
    code, out, _ = command(made.run)
    assert code == 0
    assert fact(out, "checkpoint") == str(made.step)  # the newest one of the run
    assert fact(out, "format") == "Megatron"
    assert (fact(out, "step"), fact(out, "tokens"), fact(out, "seed")) == ("1,200", "34,567", "99")
    assert fact(out, "saved by") == "tp=2 ep=4, cpu"
    assert fact(out, "software") == "torch 2.13.0, megatron-core 0.16.1"
    parameters = count_parameters(MODEL).total_with_mtp
    assert fact(out, "optimizer") == f"{2 * parameters:,} moments, {parameters:,} fp32 weights"
    assert rows(out)["bfloat16"][1] == f"{2 * parameters:,}"
    assert rows(out)["float32"][1] == f"{4 * 3 * parameters + 4 * 2 * MODEL.num_experts:,}"
    size = sum(file.stat().st_size for file in made.step.iterdir())
    assert fact(out, "files") == f"4, {size:,} bytes"
    assert "bytes unverified" in out


def test_parameter_groups_of_a_run_are_shown(made: SimpleNamespace, tmp_path: Path, command: Command) -> None:
    step = add_optimizer(made.megatron, tmp_path / "step_00000001")
    settings = yaml.safe_load((step / "config.yaml").read_text())
    settings["optimizer"] = {
        "name": "muon", "lr": 1e-3, "weight_decay": 0.1,
        "groups": [{"match": "*.router.weight", "lr_multiplier": 0.1, "weight_decay": 0.0}],
    }  # fmt: skip
    (step / "config.yaml").write_text(yaml.safe_dump(settings))
    code, out, _ = command(step)
    assert code == 0
    table = [
        [c.strip() for c in line.strip("│").split("│")] for line in out.partition("parameter groups")[2].splitlines()
    ]
    groups = {(row[0], row[1]): row[2:] for row in table if len(row) == 6}
    # One MoE layer and one multi-token-prediction layer have a router of 4 experts.
    assert groups["*.router.weight", "muon"] == ["0.1", "0", "2", f"{2 * 4 * MODEL.hidden_size:,}"]
    assert groups["all others", "muon"][:2] == ["1", "0.1"]
    vocabulary = 2 * MODEL.padded_vocab_size * MODEL.hidden_size
    assert ["1", "0.1", "2", f"{vocabulary:,}"] in [row[2:] for row in table if row[:2] == ["all others", "adamw"]]
    assert "parameter groups" not in command(made.megatron)[1]


def test_weights_alone_are_said_to_be_that_and_verified(made: SimpleNamespace, command: Command) -> None:
    code, out, _ = command(made.megatron)
    assert code == 0
    assert fact(out, "optimizer") == "none"
    assert "init_from" in fact(out, "use")
    assert "as their manifest says" in out


def test_a_part_that_is_not_there_is_seen(tmp_path: Path, command: Command) -> None:
    """Counts come from the tensors: transformers drops multi-token prediction and keeps it in config.json."""
    kept = {name: t for name, t in weights().items() if not name.startswith("model.layers.2.")}
    code, out, _ = command(write_hf(tmp_path / "hf", kept))
    mtp = count_parameters(MODEL).mtp
    assert code == 0
    assert rows(out)["mtp"] == ["0", f"{mtp:,}", f"differs by {-mtp:+,}"]


def test_scales_of_fp8_are_no_parameters(tmp_path: Path, command: Command) -> None:
    tensors = weights()
    tensors[EXPERT], tensors[EXPERT + block_fp8.SUFFIX] = block_fp8.quantise(tensors[EXPERT])
    code, out, _ = command(write_hf(tmp_path / "hf", tensors))
    assert code == 0
    assert rows(out)["fp8 scales"][0] == "1"
    assert rows(out)["float8_e4m3fn"] == ["1", str(tensors[EXPERT].numel())]
    assert rows(out)["total"][2] == ""


@pytest.mark.parametrize(("dtype", "bits"), [("int4", 6.0), ("int8", 8.0)])
def test_packed_weights_count_as_the_numbers_that_they_represent(
    dtype: str, bits: float, made: SimpleNamespace, tmp_path: Path, command: Command
) -> None:
    group_size = 8 if dtype == "int4" else None
    cfg = ConvertRoot(convert=ConvertConfig(to="hf", dtype=dtype, group_size=group_size))
    directory_writer.run(make_plan(cfg, made.hf, tmp_path / "packed"), SingleProcess(), 1)
    code, out, _ = command(tmp_path / "packed")
    assert code == 0
    plain = rows(command(made.hf)[1])
    assert {part: cells for part, cells in rows(out).items() if part in plain and len(cells) == 3} == {
        part: cells for part, cells in plain.items() if len(cells) == 3
    }
    described = fact(out, "quantised")
    assert described.startswith(f"{dtype}, a scale for each {'8 inputs' if group_size else 'row'}: ")
    assert float(described.rpartition(",")[2].split()[0]) > bits
    assert rows(out)["weight scales"][0] != "0"
    assert command("--diff", made.hf, tmp_path / "packed", "inspect.norm_rtol=0.2")[0] == 0
    assert command("--diff", made.hf, tmp_path / "packed")[0] == 1


def test_a_format_that_is_not_read_is_still_counted(tmp_path: Path, command: Command) -> None:
    scheme = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "config_groups": {}}
    settings = config.to_hf(MODEL, "bfloat16") | {"quantization_config": scheme}
    code, out, _ = command(write_hf(tmp_path / "hf", weights(), settings))
    assert code == 0
    assert "0 config_groups" in fact(out, "quantised")
    assert fact(out, "quantization_config") == "compressed-tensors"


def test_a_family_that_is_not_ours_is_still_counted(tmp_path: Path, command: Command) -> None:
    directory = write_hf(
        tmp_path / "hf", {"a.weight": torch.ones(3, 5), "b": torch.tensor(1.0)}, {"model_type": "gpt2"}
    )
    code, out, _ = command(directory)
    assert code == 0
    assert rows(out)["total"][0] == "16"
    assert not any(part.startswith("active") for part in rows(out))  # nobody knows
    assert "'gpt2'" in fact(out, "parts")


@pytest.mark.parametrize("kind", ["hf", "megatron"])
def test_a_flipped_bit_is_found_where_there_is_a_manifest(
    kind: str, made: SimpleNamespace, tmp_path: Path, command: Command
) -> None:
    directory = tmp_path / "copy"
    directory_writer.run(
        make_plan(ConvertRoot(convert=ConvertConfig(to=kind)), made.megatron, directory), SingleProcess(), 1
    )
    victim = max(directory.rglob("*"), key=lambda file: file.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    code, _, err = command(directory)
    assert code == 2
    assert f"{victim} is damaged" in err


@pytest.mark.parametrize(("kind", "suffix"), [("hf", ".safetensors"), ("step", ".distcp")])
def test_a_file_that_is_cut_off_is_named(
    kind: str, suffix: str, made: SimpleNamespace, tmp_path: Path, command: Command
) -> None:
    directory = tmp_path / "step_00001200"
    directory.mkdir()
    for file in getattr(made, kind).iterdir():
        data = file.read_bytes()
        (directory / file.name).write_bytes(data[:-100] if file.suffix == suffix else data)
    victim = next(file for file in directory.iterdir() if file.suffix == suffix)
    code, _, err = command(directory)
    assert code == 2
    assert victim.name in err
    assert command("--diff", directory, getattr(made, kind))[0] == 2


def test_what_is_no_checkpoint_is_refused(tmp_path: Path, command: Command) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for words, said in (
        ([], "use moe-inspect DIR"),
        (["empty"], "holds no checkpoint"),
        (["file"], "is not a directory"),
        (["nowhere"], "does not exist"),
        (["--diff", "empty"], "inspect.other is missing"),
    ):
        code, out, err = command(*words)
        assert (code, out) == (2, "")
        assert said in err


def test_the_same_weights_in_both_formats_are_equal(made: SimpleNamespace, command: Command) -> None:
    for a, b in ((made.hf, made.megatron), (made.run, made.hf)):
        code, out, err = command("--diff", a, b)
        assert code == 0, out + err
        assert f"all {len(weights())} tensors are equal" in out


def test_a_checkpoint_equals_itself_with_its_optimizer(made: SimpleNamespace, command: Command) -> None:
    code, out, _ = command("--diff", made.run, made.step)
    assert code == 0
    assert f"all {len(dcp.Checkpoint(made.step).tensors)} tensors are equal" in out


def test_optimizer_state_is_compared(made: SimpleNamespace, tmp_path: Path, command: Command) -> None:
    other = add_optimizer(made.megatron, tmp_path / "step_00000001", scale=2.0)
    code, out, _ = command("--diff", made.step, other, "inspect.rows=0")
    tensors = dcp.Checkpoint(made.step).tensors
    moved = sum(key.startswith("optimizer.") for key in tensors)
    assert code == 1
    assert f"{len(tensors) - moved} of {len(tensors)} tensors are equal; differing: {moved} values" in out


@pytest.mark.parametrize("against", ["hf", "megatron"])
def test_one_flipped_bit_is_one_number_of_one_tensor(
    against: str, made: SimpleNamespace, tmp_path: Path, command: Command
) -> None:
    tensors = weights()
    changed = tensors[EXPERT].clone()
    before = float(changed[5, 7])
    changed.view(torch.int16)[5, 7] ^= 1
    gap = abs(float(changed[5, 7]) - before)
    tensors[EXPERT] = changed
    code, out, _ = command("--diff", write_hf(tmp_path / "hf", tensors), getattr(made, against))
    assert code == 1
    relative = gap / max(abs(before), abs(float(changed[5, 7])))
    shape = f"bfloat16 {list(changed.shape)}"
    norm = gap / float(changed.double().norm())
    assert rows(out) == {EXPERT: ["values", shape, shape, "1", f"{gap:.3g}", f"{relative:.3g}", f"{norm:.3g}"]}
    assert f"{len(tensors) - 1} of {len(tensors)} tensors are equal; differing: 1 values" in out


def test_minus_zero_and_nan_are_differences(tmp_path: Path, command: Command) -> None:
    other = {"model_type": "gpt2"}
    values = torch.tensor([0.0, 1.0, float("nan"), float("inf")])
    a = write_hf(tmp_path / "a", {"w": values, "same": values}, other)
    b = write_hf(tmp_path / "b", {"w": torch.tensor([-0.0, 1.0, 2.0, float("inf")]), "same": values}, other)
    code, out, _ = command("--diff", a, b)
    assert code == 1
    assert rows(out) == {"w": ["values", "float32 [4]", "float32 [4]", "2", "inf", "inf", "inf"]}


@pytest.mark.parametrize("against", ["hf", "megatron"])
def test_missing_misshaped_and_other_dtypes_have_a_row_each(
    against: str, made: SimpleNamespace, tmp_path: Path, command: Command
) -> None:
    tensors = weights()
    head, norm = tensors["lm_head.weight"], tensors["model.norm.weight"]
    del tensors[EXPERT]
    tensors["lm_head.weight"] = head[:-1].clone()
    tensors["model.norm.weight"] = norm.float()
    tensors["model.extra"] = torch.ones(2)
    code, out, _ = command("--diff", write_hf(tmp_path / "hf", tensors), getattr(made, against))
    assert code == 1
    found = rows(out)
    assert found.keys() == {EXPERT, "lm_head.weight", "model.norm.weight", "model.extra"}
    assert found[EXPERT][:3] == ["only in B", "-", "bfloat16 [32, 16]"]
    assert found["lm_head.weight"][:3] == ["shape", "bfloat16 [199, 32]", "bfloat16 [200, 32]"]
    assert found["model.extra"][:3] == ["only in A", "float32 [2]", "-"]
    assert found["model.norm.weight"] == ["dtype", "float32 [32]", "bfloat16 [32]", "0", "0", "0", "0"]
    assert list(found)[-1] == "model.norm.weight"  # worst first


def test_rows_are_sorted_and_limited(made: SimpleNamespace, tmp_path: Path, command: Command) -> None:
    tensors = weights()
    names = [f"model.layers.1.mlp.experts.{i}.up_proj.weight" for i in range(4)]
    for size, name in zip((1, 8, 2, 4), names, strict=True):
        tensors[name] = tensors[name] + size
    code, out, _ = command("--diff", made.hf, write_hf(tmp_path / "hf", tensors), "inspect.rows=3")
    assert code == 1
    assert list(rows(out)) == [names[1], names[3], names[2]]
    assert "and 1 more" in out
    assert "differing: 4 values; largest difference 8" in out


def test_fp8_is_compared_as_the_numbers_that_it_stands_for(
    made: SimpleNamespace, tmp_path: Path, command: Command
) -> None:
    tensors = weights()
    quantised, scale = block_fp8.quantise(tensors[EXPERT])
    rounded = block_fp8.dequantise(quantised, scale)
    stored = write_hf(tmp_path / "fp8", {**tensors, EXPERT: quantised, EXPERT + block_fp8.SUFFIX: scale})
    assert command("--diff", stored, write_hf(tmp_path / "bf16", {**tensors, EXPERT: rounded}))[0] == 0
    code, out, _ = command("--diff", stored, made.megatron)
    assert code == 1
    wrong = int((rounded != tensors[EXPERT]).sum())
    assert rows(out)[EXPERT][3] == f"{wrong:,}"


def test_a_scale_of_fp8_that_rounding_would_hide_is_a_difference(tmp_path: Path, command: Command) -> None:
    """Where both store FP8, codes and scales are compared, not what they come to in bf16."""
    tensors = weights()
    quantised, scale = block_fp8.quantise(tensors[EXPERT])
    nudged = scale * (1 + 2**-20)
    assert torch.equal(block_fp8.dequantise(quantised, scale), block_fp8.dequantise(quantised, nudged))
    a, b = (
        write_hf(tmp_path / name, {**tensors, EXPERT: quantised, EXPERT + block_fp8.SUFFIX: s})
        for name, s in (("a", scale), ("b", nudged))
    )
    code, out, _ = command("--diff", a, b)
    assert code == 1
    assert list(rows(out)) == [EXPERT + block_fp8.SUFFIX]


def test_experts_in_one_tensor_are_compared_one_by_one(made: SimpleNamespace, tmp_path: Path, command: Command) -> None:
    tensors = {name: t for name, t in weights().items() if ".experts." not in name}
    for layer in (1, 2):
        experts = {p: [weights()[f"model.layers.{layer}.mlp.experts.{i}.{p}_proj.weight"] for i in range(4)]
                   for p in ("gate", "up", "down")}  # fmt: skip
        both = [torch.cat(pair) for pair in zip(experts["gate"], experts["up"], strict=True)]
        tensors[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.stack(both)
        tensors[f"model.layers.{layer}.mlp.experts.down_proj"] = torch.stack(experts["down"])
    fused = write_hf(tmp_path / "fused", tensors)
    for other in (made.hf, made.megatron):
        code, out, err = command("--diff", fused, other)
        assert code == 0, out + err
    assert rows(command(fused)[1])["routed experts"][2] == ""
    tensors["model.layers.1.mlp.experts.down_proj"][3, 2, 1] += 1
    code, out, _ = command("--diff", write_hf(tmp_path / "other", tensors), made.hf)
    assert (code, list(rows(out))) == (1, [EXPERT])


def test_settings_that_change_what_weights_compute_are_shown(
    made: SimpleNamespace, tmp_path: Path, command: Command
) -> None:
    settings = config.to_hf(replace(MODEL, rope_base=5e5), "bfloat16")
    code, out, _ = command("--diff", made.hf, write_hf(tmp_path / "hf", weights(), settings))
    assert code == 1  # the same weights, and another model
    assert "model.rope_base is 10000.0 in A and 500000.0 in B" in out


def test_a_family_that_is_not_ours_cannot_be_compared_with_megatron(
    made: SimpleNamespace, tmp_path: Path, command: Command
) -> None:
    directory = write_hf(tmp_path / "hf", {"a.weight": torch.ones(3)}, {"model_type": "gpt2"})
    code, _, err = command("--diff", directory, made.megatron)
    assert code == 2
    assert "'gpt2'" in err


def test_tolerances_let_a_lossy_copy_pass(made: SimpleNamespace, tmp_path: Path, command: Command) -> None:
    """bf16 -> FP8 moves a number by 1/16 at most, those near 0 by more of themselves, and a tensor by about 1/40."""
    cfg = ConvertRoot(convert=ConvertConfig(to="hf", dtype="fp8"))
    directory_writer.run(make_plan(cfg, made.hf, tmp_path / "fp8"), SingleProcess(), 1)
    compare = ("--diff", made.hf, tmp_path / "fp8")
    code, out, _ = command(*compare)
    assert code == 1
    norms = [float(cells[6]) for cells in rows(out).values()]
    assert 0.015 < max(norms) < 0.035
    assert command(*compare, "inspect.norm_rtol=0.035")[0] == 0
    code, out, _ = command(*compare, "inspect.norm_rtol=0.001")
    assert code == 1
    assert "differing: 48 values" in out
    assert "beyond the tolerances: 48" in out
    assert command(*compare, "inspect.rtol=0.0626", "inspect.atol=1e-3")[0] == 0
    assert command(*compare, "inspect.rtol=0.0626", "inspect.atol=1e-3", "inspect.norm_rtol=0.001")[0] == 1
    assert command(*compare, "inspect.rtol=0.01")[0] == 1


def test_the_norm_is_that_of_the_whole_tensor(made: SimpleNamespace, tmp_path: Path, command: Command) -> None:
    """Also of the part that is equal, and measured against A."""
    tensors = weights()
    changed = tensors["lm_head.weight"].clone()
    changed[5] *= 2
    expected = float(tensors["lm_head.weight"][5].double().norm() / tensors["lm_head.weight"].double().norm())
    other = write_hf(tmp_path / "hf", tensors | {"lm_head.weight": changed})
    _, out, _ = command("--diff", made.hf, other)
    assert float(rows(out)["lm_head.weight"][6]) == pytest.approx(expected, rel=5e-3)
    for share, code in ((1.01, 0), (0.99, 1)):
        assert command("--diff", made.hf, other, f"inspect.norm_rtol={expected * share}")[0] == code


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_tolerance_covers_what_is_not_finite_or_not_there(
    value: float, made: SimpleNamespace, tmp_path: Path, command: Command
) -> None:
    wide = ("inspect.atol=1e9", "inspect.rtol=1e9", "inspect.norm_rtol=1e9")
    broken = weights()
    broken[EXPERT] = broken[EXPERT].clone()
    broken[EXPERT][1, 1] = value
    assert command("--diff", made.hf, write_hf(tmp_path / "broken", broken), *wide)[0] == 1
    fewer = weights()
    del fewer["model.norm.weight"]
    assert command("--diff", made.hf, write_hf(tmp_path / "fewer", fewer), *wide)[0] == 1


def test_precisions_may_differ_where_a_tolerance_is_given(
    made: SimpleNamespace, tmp_path: Path, command: Command
) -> None:
    wider = write_hf(tmp_path / "fp32", {name: tensor.float() for name, tensor in weights().items()})
    assert command("--diff", made.hf, wider)[0] == 1
    assert command("--diff", made.hf, wider, "inspect.norm_rtol=0")[0] == 0


def test_only_weights_are_compared_on_request(made: SimpleNamespace, command: Command) -> None:
    """A copy for `init_from` has no optimizer."""
    assert command("--diff", made.step, made.megatron)[0] == 1
    assert command("--diff", made.step, made.megatron, "inspect.weights_only=true")[0] == 0
