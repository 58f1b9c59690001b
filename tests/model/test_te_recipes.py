"""What Transformer Engine is asked for, without it: Megatron-Core's own function makes a recipe from our options, with
classes that have the fields of Transformer Engine's (te_recipes.json, recorded from two of its versions)."""

from __future__ import annotations

import ast
import inspect
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from moe_train.config.schema import PrecisionConfig
from moe_train.model import backend
from tests.distributed.helper import run_distributed

RECIPES: dict[str, dict[str, dict[str, str]]] = json.loads((Path(__file__).parent / "te_recipes.json").read_text())[
    "versions"
]
# Megatron-Core passes it still; pydantic's dataclasses pass over what they do not know.
IGNORED = {"override_linear_precision"}
EXPECTED: dict[str, tuple[str, dict[str, str]]] = {
    "fp8_block": ("Float8BlockScaling", {
        "fp8_format": "Format.E4M3", "x_block_scaling_dim": "1", "w_block_scaling_dim": "2",
        "grad_block_scaling_dim": "1", "fp8_dpa": "False",
        "fp8_quant_fwd_inp": "QParams(power_2_scale=not use_f32_scales, amax_epsilon=0.0)",
    }),
    "fp8_tensor": ("Float8CurrentScaling", {
        "fp8_format": "Format.HYBRID", "fp8_dpa": "False",
        "fp8_quant_fwd_inp": "QParams(power_2_scale=use_power_2_scales, amax_epsilon=0.0)",
    }),
    "fp8_delayed": ("DelayedScaling", {
        "fp8_format": "Format.HYBRID", "amax_history_len": "1024", "amax_compute_algo": "'max'", "margin": "0",
        "reduce_amax": "True", "fp8_dpa": "False", "fp8_mha": "False",
    }),
    "mxfp8": ("MXFP8BlockScaling", {"fp8_format": "Format.E4M3", "fp8_dpa": "False"}),
    "nvfp4": ("NVFP4BlockScaling", {"fp4_format": "Format.E2M1", "fp8_format": "Format.E4M3"}),
}  # fmt: skip


class Format:
    """Names as Transformer Engine's source has them."""

    E4M3, HYBRID = "Format.E4M3", "Format.HYBRID"


def classes(fields: dict[str, dict[str, str]]) -> dict[str, Callable[..., dict[str, str]]]:
    """A function for each recipe: its name and its fields, as source text, with those of the call in them."""

    def make(name: str, defaults: dict[str, str]) -> Callable[..., dict[str, str]]:
        def recipe(**given: Any) -> dict[str, str]:
            unknown = given.keys() - defaults.keys() - IGNORED
            assert not unknown, f"{name} has no {unknown}"
            shown = {key: v if str(v).startswith("Format.") else repr(v) for key, v in given.items()}
            return {"name": name, **defaults, **{key: v for key, v in shown.items() if key in defaults}}

        return recipe

    return {name: make(name, defaults) for name, defaults in fields.items()}


def made(version: str, precision: str) -> dict[str, str]:
    """The recipe that Megatron-Core makes from our options for `precision`."""
    from megatron.core import fp4_utils, fp8_utils
    from megatron.core.enums import Fp4Recipe, Fp8Recipe

    from tests.model.test_cuda_config import cuda_options

    config = SimpleNamespace(
        **cuda_options(f"precision={precision}", "model=deepseek_v3", "checkpoint.save_at_end=false")
    )
    recipes = classes(RECIPES[version])

    def delayed(config: Any, **given: Any) -> dict[str, str]:  # as extensions/transformer_engine.py calls it
        return recipes["DelayedScaling"](
            margin=config.fp8_margin, amax_compute_algo=config.fp8_amax_compute_algo,
            amax_history_len=config.fp8_amax_history_len, fp8_dpa=config.fp8_dot_product_attention,
            fp8_mha=config.fp8_multi_head_attention, **given,
        )  # fmt: skip

    engine = SimpleNamespace(common=SimpleNamespace(recipe=SimpleNamespace(Format=Format, **recipes)))
    names = {
        "transformer_engine": engine, "TEDelayedScaling": delayed, "Fp8Recipe": Fp8Recipe, "Fp4Recipe": Fp4Recipe,
        "is_te_min_version": lambda *_: True, "TransformerConfig": object,
    }  # fmt: skip
    module, name = (fp8_utils, "get_fp8_recipe") if config.fp8 else (fp4_utils, "get_fp4_recipe")
    tree = ast.parse(inspect.getsource(module))
    first = next(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == name)  # the one with TE
    exec(compile(ast.Module([first], []), module.__file__, "exec"), names)
    recipe: dict[str, str] = names[name](config)  # type: ignore[operator]
    return recipe


def all_made() -> dict[str, dict[str, str]]:
    return {f"{version} {name}": made(version, name) for version in RECIPES for name in EXPECTED}


def test_each_precision_makes_the_recipe_that_it_says() -> None:
    """With no field that Transformer Engine lacks, and the formats, tiles and histories that are documented."""
    (found,) = run_distributed(all_made, 1)
    assert len(found) == 10
    for key, recipe in found.items():
        name, fields = EXPECTED[key.partition(" ")[2]]
        assert recipe["name"] == name, key
        assert recipe | fields == recipe, key


@pytest.mark.parametrize("version", RECIPES)
@pytest.mark.parametrize(
    ("fp8", "recipe", "field"),
    [("block", "Float8BlockScaling", "use_f32_scales"), ("tensor", "Float8CurrentScaling", "use_power_2_scales")],
)
def test_scales_are_of_the_kind_that_the_environment_asks_for(version: str, fp8: str, recipe: str, field: str) -> None:
    """`moe-train` goes on only where Transformer Engine's own expression gives the scales that the config asks for."""
    expression = RECIPES[version][recipe][field]
    for value in ("0", "1"):
        variable = expression.split("'")[1]
        with mock.patch.dict(os.environ, {variable: value}):
            switched = eval(expression, {"os": os})
            powers_of_two = switched if fp8 == "tensor" else not switched
            backend._require_scales(PrecisionConfig(fp8=fp8, power_of_two_scales=powers_of_two))
            with pytest.raises(Exception, match=variable):
                backend._require_scales(PrecisionConfig(fp8=fp8, power_of_two_scales=not powers_of_two))
