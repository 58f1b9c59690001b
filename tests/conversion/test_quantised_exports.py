"""Quantised exports: transformers loads them and computes what our dequantised weights compute."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.quantizers import quantizer_finegrained_fp8

from moe_train.config.roots import ConvertRoot
from moe_train.config.walk import all_fields
from moe_train.conversion import hf_outputs
from moe_train.conversion.hf_source import HuggingFace
from moe_train.formats import weight_formats
from tests.conversion import models, quantised, ranks
from tests.conversion.convert import convert
from tests.conversion.families.test_families import batch
from tests.conversion.tiny_v3 import Command, same_bits
from tests.distributed.helper import run_distributed
from tests.quick import slow_but

FAMILIES = ("deepseek_v3", "qwen3_moe")
TOLERANCE = 1e-3
Sources = Callable[[str], Path]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """Directory of the wide model of a name."""
    root, made = tmp_path_factory.mktemp("wide"), {}

    def of(name: str) -> Path:
        if name not in made:
            made[name] = quantised.save(name, root / name)
        return made[name]

    return of


def logits(directory: Path) -> torch.Tensor:
    """Of the model that transformers loads, in fp32."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.bfloat16, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    with torch.no_grad():
        model(quantised.tokens()[:, :1])  # decompresses
        result: torch.Tensor = in_fp32(model)(quantised.tokens()).logits
    return result


def in_fp32(model: Any) -> Any:
    """The model in fp32, which transformers refuses for quantised ones."""
    return torch.nn.Module.float(model)


@pytest.fixture(autouse=True)
def _without_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers asks for accelerate before it loads FP8; it dequantises on a CPU, which does not use it."""
    monkeypatch.setattr(quantizer_finegrained_fp8, "is_accelerate_available", lambda: True)


@pytest.mark.parametrize("form", quantised.FORMATS)
@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_computes_what_our_dequantised_weights_do(
    name: str, form: str, source: Sources, tmp_path: Path
) -> None:
    kept = {"keep": quantised.RAGGED} if (name, form) == ("deepseek_v3", "fp8") else {}
    export = quantised.export(source(name), tmp_path / "export", form, **kept)
    convert(export, tmp_path / "plain", to="hf")
    theirs, ours = logits(export), logits(tmp_path / "plain")
    assert (theirs - ours).abs().max() < TOLERANCE
    assert (theirs - logits(source(name))).abs().max() > TOLERANCE, "nothing was quantised"
    convert(export, tmp_path / "a")  # Megatron format, directly and from the dequantised weights
    convert(tmp_path / "plain", tmp_path / "b")
    files = [{p.name: p.read_bytes() for p in (tmp_path / d).glob("*.distcp")} for d in "ab"]
    assert files[0] == files[1]


@pytest.mark.parametrize("name", slow_but(["mixtral"], [n for n in quantised.WIDE if n not in FAMILIES]))
def test_transformers_loads_int4_of_every_family(name: str, source: Sources, tmp_path: Path) -> None:
    export = quantised.export(source(name), tmp_path / "export", "int4")
    convert(export, tmp_path / "plain", to="hf")
    assert (logits(export) - logits(tmp_path / "plain")).abs().max() < TOLERANCE


def test_a_run_starts_from_a_quantised_export(source: Sources, tmp_path: Path) -> None:
    """The model of Megatron-Core computes from the export what transformers does."""
    exports = {name: quantised.export(source(name), tmp_path / name, "int4") for name in FAMILIES}
    found = run_distributed(outputs, 1, exports, tmp_path / "run")[0]
    for name, directory in exports.items():
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
        with torch.no_grad():
            model(quantised.tokens()[:, :1])
            expected = in_fp32(model)(batch()).logits
        for sample, ours in found[name].items():
            assert (ours[:, 0, : models.VOCABULARY].float() - expected[sample]).abs().max() < TOLERANCE, name


def outputs(exports: dict[str, Path], work: Path) -> dict[str, dict[int, torch.Tensor]]:
    return {name: ranks.outputs(ranks.load(d, work / name, {}))["logits"] for name, d in exports.items()}


@pytest.mark.parametrize("form", quantised.FORMATS)
def test_a_copy_in_the_same_format_has_the_same_numbers(form: str, source: Sources, tmp_path: Path) -> None:
    """Quantising a second time would choose other scales, as the largest number has become 7 or 8 steps."""
    export = quantised.export(source("qwen3_moe"), tmp_path / "export", form)
    quantised.export(export, tmp_path / "copy", form, file_gb=0.0002)
    assert len(list((tmp_path / "copy").glob("*.safetensors"))) > 1
    ours, theirs = models.tensors(export), models.tensors(tmp_path / "copy")
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not same_bits(ours[name], theirs[name])] == []


def test_scales_and_shapes_of_other_writers(source: Sources, tmp_path: Path) -> None:
    """llm-compressor keeps scales in the precision of the model, and the shape in int32 in older versions."""
    export = quantised.export(source("qwen3_moe"), tmp_path / "export", "int4")
    expected = {name: HuggingFace(export).read(name, 0, 4).tensor() for name in HuggingFace(export).quantised}
    (file,) = export.glob("*.safetensors")
    held = load_file(file)
    for name in list(held):
        if name.endswith("_scale"):
            held[name] = held[name].float()
        elif name.endswith("_shape"):
            held[name] = held[name].int()
    save_file(held, file, metadata={"format": "pt"})
    changed = HuggingFace(export)
    assert all(same_bits(changed.read(name, 0, 4).tensor(), rows) for name, rows in expected.items())
    assert len(expected) == 4 * 2 + 3 * 9


@pytest.mark.parametrize("form", quantised.FORMATS)
def test_any_rows_are_those_of_the_whole(form: str, source: Sources, tmp_path: Path) -> None:
    """Also from the middle of an FP8 block to the next one: this matrix has 176 rows."""
    export = HuggingFace(quantised.export(source("deepseek_v3"), tmp_path / "export", form))
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    whole = export.read(name, 0, 176).tensor()
    assert (whole.shape, whole.dtype) == ((176, 128), torch.bfloat16)
    for start, stop in ((100, 150), (127, 128), (128, 176)):
        assert same_bits(export.read(name, start, stop).tensor(), whole[start:stop])


def test_fused_experts_export_like_separate_ones(source: Sources, tmp_path: Path) -> None:
    """transformers 5 holds the experts of a layer in 3-D weights, and can save them so."""
    model = transformers.AutoModelForCausalLM.from_pretrained(source("qwen3_moe"), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    assert models.tensors(tmp_path / "fused")["model.layers.1.mlp.experts.gate_up_proj"].dim() == 3
    for number, directory in enumerate((source("qwen3_moe"), tmp_path / "fused")):
        quantised.export(directory, tmp_path / str(number), "int4")
    same = [{p.name: p.read_bytes() for p in (tmp_path / n).glob("*.safetensors")} for n in "01"]
    assert same[0] == same[1]


def test_what_stays_in_bf16(source: Sources, tmp_path: Path) -> None:
    """Norms, routers, embedding and head by default; with `convert.keep` other layers too."""
    plain = models.tensors(source("deepseek_v3"))
    for number, keep in enumerate((["lm_head"], ["lm_head", "*.kv_b_proj", "model.layers.0.*"], [])):
        target = tmp_path / str(number)
        convert(source("deepseek_v3"), target, to="hf", dtype="int4", keep=keep)
        written = models.tensors(target)
        kept = {name for name in plain if name in written}
        always = {n for n in plain if "norm" in n or "embed" in n or "mlp.gate." in n}
        chosen = {n for n in plain if n.startswith("model.layers.0.") or "kv_b_proj" in n} if number == 1 else set()
        assert kept == always | chosen | ({"lm_head.weight"} if "lm_head" in keep else set())
        assert all(same_bits(written[n], plain[n].to(written[n].dtype)) for n in kept)
        declared = json.loads((target / "config.json").read_text())["quantization_config"]["ignore"]
        assert set(declared) == {n.removesuffix(".weight") for n in kept if plain[n].dim() == 2 and "embed" not in n}
        logits(target)


def test_fp8_with_kept_layers_names_them(source: Sources, tmp_path: Path) -> None:
    convert(source("qwen3_moe"), tmp_path / "export", to="hf", dtype="fp8", keep=["lm_head", "*.o_proj"])
    declared = json.loads((tmp_path / "export" / "config.json").read_text())["quantization_config"]
    assert "model.layers.1.self_attn.o_proj" in declared["modules_to_not_convert"]
    convert(tmp_path / "export", tmp_path / "plain", to="hf")
    assert (logits(tmp_path / "export") - logits(tmp_path / "plain")).abs().max() < TOLERANCE


def test_fp8_of_ragged_blocks_is_remarked(source: Sources, tmp_path: Path, convert: Command) -> None:
    """transformers divides a matrix into as many equal blocks as there are scales: it reads other weights, or fails.

    Once it reads them, the remark in moe_train/conversion/hf_outputs.py can go.
    """
    words = ("convert.to=hf", "convert.dtype=fp8")
    done = convert.well(source("deepseek_v3"), tmp_path / "ragged", *words)
    assert "note: transformers cannot dequantise FP8 of 4 layers, such as model.layers.0.self_attn.kv_" in done.out
    keep = f"convert.keep=[{','.join(quantised.RAGGED)}]"
    assert f"'{keep}' keeps them in bf16" in done.out
    convert.well(tmp_path / "ragged", tmp_path / "plain", "convert.to=hf")
    assert (logits(tmp_path / "ragged") - logits(tmp_path / "plain")).abs().max() > TOLERANCE
    assert "note:" not in convert.well(source("deepseek_v3"), tmp_path / "kept", *words, keep).out


def test_a_reader_of_compressed_tensors_accepts_the_declared_scheme(source: Sources, tmp_path: Path) -> None:
    """Every argument is one that the schema of compressed-tensors has, and it means what is stored."""
    from compressed_tensors.quantization import QuantizationConfig

    for form in ("int8", "int8, groups of 64", "int4", "mxfp4"):
        target = quantised.export(source("qwen3_moe"), tmp_path / form, form)
        declared = json.loads((target / "config.json").read_text())["quantization_config"]
        (group,) = QuantizationConfig.model_validate(declared).config_groups.values()
        assert group.weights is not None
        assert group.weights.symmetric
        scale = models.tensors(target)["model.layers.0.self_attn.q_proj.weight_scale"]
        groups = 1 if group.weights.strategy == "channel" else 128 // (group.weights.group_size or 1)
        assert scale.shape == (128, groups)


REFUSED: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "inputs that are no multiple of a group": (
        "int4", ("convert.group_size=48",), ("128 inputs", "multiple of 48", "set convert.group_size=128"),
    ),
    "a routed expert in bf16": (
        "int4", ("convert.keep=['*.experts.0.*']",), ("experts.0.", "one format", "remove routed experts"),
    ),
    "a pattern of nothing": ("int4", ("convert.keep=['*.o_prj']",), ("*.o_prj", "no linear layer")),
    "groups of FP8": (
        "fp8", ("convert.group_size=64",), ("convert.group_size=64", "convert.dtype=fp8", "int8 or int4"),
    ),
    "kept layers of bf16": ("bf16", ("convert.keep=['*.o_proj']",), ("convert.keep=[*.o_proj]", "convert.dtype=bf16")),
    "int4 in a Megatron checkpoint": ("int4", ("convert.to=megatron",), ("convert.dtype=int4", "convert.to=hf")),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_options_name_the_field_and_a_remedy(
    name: str, source: Sources, tmp_path: Path, convert: Command
) -> None:
    dtype, words, mentions = REFUSED[name]
    to = [] if any(word.startswith("convert.to=") for word in words) else ["convert.to=hf"]
    done = convert(source("qwen3_moe"), tmp_path / "target", f"convert.dtype={dtype}", *to, *words)
    assert (done.code, done.err.count("\n")) == (2, 1), done
    assert all(text in done.err for text in mentions), done.err
    assert list(tmp_path.iterdir()) == []


def test_odd_widths_get_a_remedy_that_works(tmp_path: Path, convert: Command) -> None:
    """Layers of 40, 64 and 100 inputs: the smallest common group, else the layers to keep."""
    models.write(models.build("deepseek_v3").bfloat16(), "deepseek_v3", tmp_path / "hf")
    words = ("convert.to=hf", "convert.dtype=int4")
    done = convert(tmp_path / "hf", tmp_path / "target", *words)
    assert "set convert.group_size=8" in done.err
    convert.well(tmp_path / "hf", tmp_path / "target", *words, "convert.group_size=8")
    done = convert(tmp_path / "hf", tmp_path / "mx", "convert.to=hf", "convert.dtype=mxfp4")
    assert "set convert.dtype=int4 convert.group_size=8" in done.err
    done = convert(tmp_path / "hf", tmp_path / "keep", *words, "convert.group_size=32")
    assert "set convert.group_size=8" in done.err
    models.write(models.build("llama", intermediate_size=100).bfloat16(), "llama", tmp_path / "llama")
    done = convert(tmp_path / "llama", tmp_path / "mx", "convert.to=hf", "convert.dtype=mxfp4")
    keep = "convert.keep=[lm_head,*.mlp.down_proj]"
    assert "model.layers.0.mlp.down_proj has 100 inputs, which are not a multiple of 32 (mxfp4, a " in done.err
    assert f"set '{keep}', or convert.dtype=int8" in done.err
    convert.well(tmp_path / "llama", tmp_path / "mx", "convert.to=hf", "convert.dtype=mxfp4", keep)


def test_the_config_field_names_the_formats() -> None:
    choices = all_fields(ConvertRoot)["convert.dtype"].choices
    assert set(choices) == {*hf_outputs.PLAIN, *weight_formats.FORMATS}
    assert tuple(all_fields(ConvertRoot)["convert.keep"].default) == hf_outputs.KEPT


def unlike(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        path = directory / "config.json"
        values = json.loads(path.read_text())
        change(values["quantization_config"])
        path.write_text(json.dumps(values))

    return damage


def weights(config: dict[str, Any]) -> dict[str, Any]:
    return config["config_groups"]["group_0"]["weights"]


UNREADABLE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "asymmetric": (lambda c: weights(c).update(symmetric=False), "symmetric=False"),
    "another width": (lambda c: weights(c).update(num_bits=3), "num_bits=3"),
    "other groups": (lambda c: weights(c).update(group_size=64), "weight_scale is bfloat16 [128, 1]"),
    "two schemes": (lambda c: c["config_groups"].update(group_1={}), "2 config_groups"),
    "no scheme": (lambda c: c["config_groups"]["group_0"].pop("weights"), "config_groups.group_0.weights"),
    "no method": (lambda c: c.clear(), "declares no compressed-tensors format"),
    "quantised inputs": (lambda c: c["config_groups"]["group_0"].update(input_activations={}), "quantised inputs"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_an_export_that_cannot_be_read_says_why(name: str, source: Sources, tmp_path: Path, convert: Command) -> None:
    change, mention = UNREADABLE[name]
    target = quantised.export(source("qwen3_moe"), tmp_path / "export", "int4")
    (target / "manifest.json").unlink()
    unlike(change)(target)
    done = convert(target, tmp_path / "back")
    assert (done.code, done.err.count("\n")) == (2, 1), done
    assert mention in done.err
    assert not (tmp_path / "back").exists()
