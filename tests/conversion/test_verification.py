"""`moe-convert verify SOURCE DIR` finds every planted error of an export, and none in a good one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.conversion import quantised
from tests.conversion.convert import convert as converted
from tests.conversion.tiny_v3 import Command

FAMILY = "qwen3_moe"
LAYER = "model.layers.1."
DOWN, OTHER_DOWN = (f"{LAYER}mlp.experts.{e}.down_proj.weight" for e in (2, 3))
GATE, UP = (f"{LAYER}mlp.experts.1.{p}_proj.weight" for p in ("gate", "up"))
QUERY, NORM = f"{LAYER}self_attn.q_proj.weight", f"{LAYER}input_layernorm.weight"
ROUTER = f"{LAYER}mlp.gate.weight"
PACKED, SCALE, SHAPE = "_packed", "_scale", "_shape"

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The source, and an export in each format, in one file each."""
    root = tmp_path_factory.mktemp("exports")
    source = quantised.save(FAMILY, root / "source")
    made = {form: quantised.export(source, root / form, form) for form in quantised.FORMATS}
    converted(source, root / "bf16", to="hf")
    return {"source": source, "bf16": root / "bf16", **made}


@dataclass(frozen=True)
class Planted:
    """An error of an export."""

    form: str
    plant: Callable[[Path], Any]
    mentions: tuple[str, ...]


def tensors(change: Callable[[Tensors], Any]) -> Callable[[Path], None]:
    """Change the tensors of a directory with one file; the index follows, and config.json stays."""

    def plant(directory: Path) -> None:
        (file,) = directory.glob("*.safetensors")
        held = {name: tensor.clone() for name, tensor in load_file(file).items()}
        change(held)
        save_file({name: tensor.contiguous() for name, tensor in held.items()}, file, metadata={"format": "pt"})
        index = directory / "model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(held, file.name)}))

    return plant


def one(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    """Replace one tensor."""
    return tensors(lambda held: held.update({name: change(held[name])}))


def swap(first: str, second: str, *suffixes: str) -> Callable[[Path], None]:
    """Exchange the tensors of two weights."""

    def change(held: Tensors) -> None:
        for suffix in suffixes:
            held[first + suffix], held[second + suffix] = held[second + suffix], held[first + suffix]

    return tensors(change)


def setting(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change config.json."""

    def plant(directory: Path) -> None:
        values = json.loads((directory / "config.json").read_text())
        change(values)
        (directory / "config.json").write_text(json.dumps(values))

    return plant


def edited(change: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    def apply(tensor: Tensor) -> Tensor:
        change(tensor)
        return tensor

    return apply


def as_bytes(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda tensor: change(tensor.view(torch.uint8)).contiguous().view(tensor.dtype).reshape(tensor.shape)


def swap_halves(data: Tensor) -> Tensor:
    return data << 4 | data >> 4


def scheme(values: dict[str, Any]) -> dict[str, Any]:
    return values["quantization_config"]["config_groups"]["group_0"]["weights"]


PLANTED: dict[str, Planted] = {
    "one scale is 1 % larger": Planted(
        "int4", one(DOWN + SCALE, edited(lambda t: t[7].mul_(1.01))), (DOWN + SCALE, "1 of 128 scales")
    ),
    "scales of two rows are exchanged": Planted(
        "int8", one(QUERY + SCALE, lambda t: t[[1, 0, *range(2, len(t))]]), (QUERY + SCALE, "2 of 128 scales")
    ),
    "scales of the largest number over 7": Planted(
        "int4", one(QUERY + SCALE, lambda t: (t.float() * 7.5 / 7).bfloat16()), (QUERY + SCALE, "scales differ")
    ),
    "scales in fp32": Planted("int4", one(QUERY + SCALE, lambda t: t.float()), (QUERY + SCALE, "float32")),
    "an exponent one higher": Planted(
        "mxfp4", one(GATE + SCALE, edited(lambda t: t[3, 2:3].add_(1))), (GATE + SCALE, "1 of 512 scales")
    ),
    "FP8 scales are not inverted": Planted("fp8", one(UP + "_scale_inv", lambda t: 1 / t), (UP + "_scale_inv",)),
    "codes without a zero point in int4": Planted(
        "int4", one(DOWN + PACKED, as_bytes(lambda t: t ^ 0x88)), (DOWN + PACKED, "zero point of 0", "one of 8")
    ),
    "codes without a zero point in int8": Planted(
        "int8", one(DOWN + PACKED, as_bytes(lambda t: t ^ 0x80)), (DOWN + PACKED, "zero point of 0", "one of 128")
    ),
    "a tensor of zero points": Planted(
        "int4", tensors(lambda held: held.update({QUERY + "_zero_point": torch.zeros(16, 1, dtype=torch.int32)})),
        (QUERY + "_zero_point", "no tensor of the export"),
    ),
    "numbers of a byte in reverse order in int4": Planted(
        "int4", one(QUERY + PACKED, as_bytes(swap_halves)), (QUERY + PACKED, "reverse order")
    ),
    "numbers of a byte in reverse order in MXFP4": Planted(
        "mxfp4", one(QUERY + PACKED, swap_halves), (QUERY + PACKED, "reverse order")
    ),
    "bytes of a word in reverse order": Planted(
        "int8", one(QUERY + PACKED, as_bytes(lambda t: t.reshape(-1, 4).flip(1))), (QUERY + PACKED, "packed word")
    ),
    "one bit of a packed word": Planted(
        "int4", one(UP + PACKED, edited(lambda t: t[100, 3:4].bitwise_xor_(1 << 30))), (UP + PACKED, "1 of 2,048")
    ),
    "one FP8 number": Planted(
        "fp8", one(UP, edited(lambda t: t.view(torch.uint8)[5, 5:6].bitwise_xor_(1))), (UP, "1 of 16,384 numbers")
    ),
    "a row of zeros": Planted("mxfp4", one(UP + PACKED, edited(lambda t: t[9].zero_())), (UP + PACKED,)),
    "two experts are exchanged": Planted(
        "int4", swap(DOWN, OTHER_DOWN, PACKED, SCALE), (f"{DOWN}{PACKED}: has the numbers of {OTHER_DOWN}",)
    ),
    "gate and up are exchanged": Planted("int8", swap(GATE, UP, PACKED, SCALE), (GATE, UP, "has the numbers of")),
    "experts are exchanged in bf16": Planted(
        "bf16", swap(DOWN, OTHER_DOWN, ""), (f"{DOWN}: has the numbers of {OTHER_DOWN}",)
    ),
    "a tensor is missing": Planted("int4", tensors(lambda held: held.pop(GATE + SCALE)), (GATE + SCALE, "is missing")),
    "a weight is missing": Planted(
        "int8", tensors(lambda held: [held.pop(GATE + suffix) for suffix in (PACKED, SCALE, SHAPE)]),
        (GATE + PACKED, "is missing"),
    ),
    "a tensor too many": Planted(
        "int4", tensors(lambda held: held.update({LAYER + "extra.weight": torch.zeros(2)})), ("extra.weight",)
    ),
    "another stored shape": Planted("int4", one(QUERY + SHAPE, lambda t: t + 1), (QUERY + SHAPE, "differ")),
    "a transposed matrix": Planted(
        "int8", one(QUERY + PACKED, lambda t: t.t().contiguous()), (QUERY + PACKED, "[32, 128]")
    ),
    "packed words as bytes": Planted(
        "int4", one(QUERY + PACKED, lambda t: t.view(torch.uint8)), (QUERY + PACKED, "uint8 [128, 64]")
    ),
    "a changed norm": Planted("int4", one(NORM, edited(lambda t: t[3:4].add_(0.01))), (NORM, "1 of 128 numbers")),
    "a router in lower precision": Planted(
        "int4", one(ROUTER, lambda t: t.to(torch.float8_e4m3fn).bfloat16()), (ROUTER, "numbers differ")
    ),
    "a weight that is not quantised": Planted(
        "int4",
        tensors(lambda h: [h.pop(QUERY + s) for s in (PACKED, SCALE, SHAPE)] and h.update({QUERY: torch.zeros(2, 2)})),
        (QUERY, "no tensor of the export"),
    ),
    "another rotary base": Planted(
        "int4", setting(lambda c: c.update(rope_theta=5e5)), ("config.json", "rope_theta is 500000.0")
    ),
    "another group size": Planted("int4", setting(lambda c: scheme(c).update(group_size=64)), ("[128, 2]",)),
    "another width": Planted("int4", setting(lambda c: scheme(c).update(num_bits=8)), (PACKED,)),
    "asymmetric": Planted("int4", setting(lambda c: scheme(c).update(symmetric=False)), ("symmetric=False",)),
    "a module less is ignored": Planted(
        "int4", setting(lambda c: c["quantization_config"]["ignore"].remove("lm_head")), ("lm_head.weight_packed",)
    ),
    "a module more is ignored": Planted(
        "int4", setting(lambda c: c["quantization_config"]["ignore"].append(QUERY.removesuffix(".weight"))),
        (f"{QUERY}: is missing",),
    ),
    "experts per token": Planted("mxfp4", setting(lambda c: c.update(num_experts_per_tok=3)), ("num_experts_per_tok",)),
    "no quantization_config": Planted("int8", setting(lambda c: c.pop("quantization_config")), (PACKED,)),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_error_is_found(name: str, exports: dict[str, Path], tmp_path: Path, convert: Command) -> None:
    planted = PLANTED[name]
    shutil.copytree(exports[planted.form], tmp_path / "export")
    planted.plant(tmp_path / "export")
    done = convert("verify", exports["source"], tmp_path / "export")
    assert (done.code, done.err.count("\n")) == (2, 1), done
    assert all(text in done.out + done.err for text in planted.mentions), done


@pytest.mark.parametrize("form", ["bf16", *quantised.FORMATS])
def test_a_good_export_has_no_finding(form: str, exports: dict[str, Path], convert: Command) -> None:
    done = convert.well("verify", exports["source"], exports[form])
    assert "exports to" in done.out


def test_good_exports_of_other_options_have_no_finding(
    exports: dict[str, Path], tmp_path: Path, convert: Command
) -> None:
    """Of a Megatron checkpoint, in several files, with other kept layers, in another precision."""
    converted(exports["source"], tmp_path / "megatron")
    cases = {
        "a": ("convert.dtype=int4", "convert.file_gb=0.0003", "convert.threads=3"),
        "b": ("convert.dtype=int8", "convert.group_size=64", "convert.keep=['*.o_proj']"),
        "c": ("convert.dtype=fp8", "convert.keep=[lm_head,'*.o_proj']"),
        "d": ("convert.dtype=fp32",),
        "e": (),
    }
    for name, words in cases.items():
        convert.well(tmp_path / "megatron", tmp_path / name, *words)
        convert.well("verify", tmp_path / "megatron", tmp_path / name)
    convert.well("verify", exports["source"], tmp_path / "a")
    convert.well(
        exports["source"], tmp_path / "f", "convert.to=hf", "convert.dtype=fp8", "convert.power_of_two_scales=false"
    )
    convert.well("verify", exports["source"], tmp_path / "f", "convert.power_of_two_scales=false")


def test_what_cannot_be_compared(exports: dict[str, Path], tmp_path: Path, convert: Command) -> None:
    converted(exports["source"], tmp_path / "megatron")
    for target, mention in ((tmp_path / "megatron", "moe-inspect --diff"), (tmp_path / "none", "is not a directory")):
        done = convert("verify", exports["source"], target)
        assert (done.code, done.err.count("\n")) == (2, 1), done
        assert mention in done.err
