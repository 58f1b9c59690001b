"""The GPU path without a GPU: what is asked of Megatron-Core on cuda with Transformer Engine passes its own checks."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from moe_train.config.composition.compose import compose
from moe_train.config.composition.validate import validate
from moe_train.config.resolve import resolve
from moe_train.model import backend
from parallel.errors import ConfigError, HardwareError
from tests.distributed.helper import run_distributed

MODELS = sorted(path.stem for path in Path("conf/model").glob("*.yaml"))
FUSED_NAMES = (
    "fused_compute_score_for_moe_aux_loss", "fused_moe_aux_loss", "fused_permute", "fused_permute_with_probs",
    "fused_sort_chunks_by_index", "fused_sort_chunks_by_index_with_probs", "fused_topk_with_score_function",
    "fused_unpermute",
)  # fmt: skip


@contextlib.contextmanager
def as_if_on_cuda() -> Iterator[None]:
    """Megatron-Core's config classes find Transformer Engine installed in here."""
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.transformer import transformer_config
    from megatron.core.transformer.moe import moe_utils

    with (
        mock.patch.object(transformer_config, "is_te_min_version", return_value=True),
        mock.patch.object(transformer_config, "HAVE_PACKAGING", True, create=True),
        mock.patch.object(rope_utils, "fused_apply_rotary_pos_emb", object(), create=True),
        mock.patch.object(rope_utils, "fused_apply_rotary_pos_emb_thd", object(), create=True),
        mock.patch.multiple(moe_utils, create=True, **dict.fromkeys(FUSED_NAMES, object())),
    ):
        yield


def cuda_options(*overrides: str, name: str = "te") -> dict[str, Any]:
    """Fields of Megatron-Core's config for a cuda run, as if Transformer Engine were installed."""
    from moe_train.model.build import transformer_config as make

    cfg = compose(["runtime=cuda", "precision=bf16", f"backend.name={name}", *overrides])
    with as_if_on_cuda():
        config = make(resolve(cfg, validate(cfg), runtime="cuda"))
    keep = (bool, int, float, str, list, type(None))
    return {f.name: v for f in dataclasses.fields(config) if isinstance(v := getattr(config, f.name, None), keep)}


def emulated_options(*overrides: str) -> dict[str, Any]:
    """The same for a run that emulates FP8."""
    return cuda_options("precision=fp8_block", "runtime=cpu", *overrides, name="local")


def every_model() -> dict[str, dict[str, Any]]:
    """`cuda_options` of every model."""
    return {name: cuda_options(f"model={name}") for name in MODELS}


def test_every_model_passes_megatron_cores_own_checks() -> None:
    """Fused paths are on, experts are grouped, and nothing is refused."""
    (found,) = run_distributed(every_model, 1)
    assert set(found) == set(MODELS)
    for name, options in found.items():
        assert options["bias_activation_fusion"], name
        assert options["apply_rope_fusion"] == (not options["multi_latent_attention"]), name
        assert options["cross_entropy_loss_fusion"], name
        assert options["deallocate_pipeline_outputs"], name
        assert not options["gradient_accumulation_fusion"], f"{name}: needs apex, which is not asked for"
        moe = options["num_moe_experts"] is not None
        assert (options["moe_grouped_gemm"], options["moe_permute_fusion"]) == (moe, moe), name
        # The fused router ranks groups of experts by another score.
        assert options["moe_router_fusion"] == (moe and name != "deepseek_v2"), name


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_the_fused_loss_is_for_bf16_alone(dtype: str) -> None:
    """It rounds gradients to bf16 for every dtype of the logits."""
    (options,) = run_distributed(cuda_options, 1, "model=tiny", f"precision={dtype}")
    assert options["bias_activation_fusion"]
    assert not options["cross_entropy_loss_fusion"]


def test_deepep_overlap_and_apex_reach_megatron_core() -> None:
    """Each option of the config is the one that Megatron-Core documents for it."""
    overrides = ("model=deepseek_v3", "parallel.ep=8", "parallel.dispatcher=flex", "batch.global_batch_size=16")
    (flex,) = run_distributed(cuda_options, 1, *overrides)
    assert flex["moe_token_dispatcher_type"] == "flex"
    (apex,) = run_distributed(
        cuda_options, 1, "model=tiny", "backend.apex=true", "backend.name=local", "backend.fusions=true"
    )
    assert apex["gradient_accumulation_fusion"]


def test_activation_offload_reaches_megatron_core() -> None:
    """Every module that its config class knows, past its own checks; on the CPU it is told of none."""
    modules = ["attn_norm", "qkv_linear", "core_attn", "attn_proj", "mlp_norm", "expert_fc1", "moe_act"]
    asked = ("recompute.offload=memory", f"recompute.offload_modules=[{','.join(modules)}]")
    (found,) = run_distributed(cuda_options, 1, "model=deepseek_v3", *asked, "recompute.offload_min_bytes=4096")
    assert found["fine_grained_activation_offloading"]
    assert (found["offload_modules"], found["min_offloaded_tensor_size"]) == (modules, 4096)
    (emulated,) = run_distributed(emulated_options, 1, "recompute.offload=file")
    assert not emulated["fine_grained_activation_offloading"]


FP8_OPTIONS = {
    "fp8_block": {"fp8": "e4m3", "fp8_recipe": "blockwise"},
    "fp8_tensor": {"fp8": "hybrid", "fp8_recipe": "tensorwise"},
    "fp8_delayed": {"fp8": "hybrid", "fp8_recipe": "delayed", "fp8_amax_history_len": 1024,
                    "fp8_amax_compute_algo": "max"},
    "mxfp8": {"fp8": "e4m3", "fp8_recipe": "mxfp8"},
    "nvfp4": {"fp4": "e2m1", "fp4_recipe": "nvfp4", "fp8": None},
}  # fmt: skip


@pytest.mark.parametrize("precision", FP8_OPTIONS)
def test_fp8_recipes_reach_megatron_core(precision: str) -> None:
    """Every option by the name that Megatron-Core's own config class has for it, past its own checks."""
    (found,) = run_distributed(
        cuda_options, 1, "model=deepseek_v3", f"precision={precision}", "checkpoint.save_at_end=false"
    )
    assert found | FP8_OPTIONS[precision] == found
    assert (found["bf16"], found["fp8_param"], found["first_last_layers_bf16"]) == (True, False, False)


def test_layers_and_weights_of_fp8_reach_megatron_core() -> None:
    """Layers that stay in bf16, and weights that are kept in FP8; on the CPU Megatron-Core is told of no FP8."""
    layers = ("precision.first_last_layers_bf16=true", "precision.num_layers_at_start_in_bf16=3",
              "precision.num_layers_at_end_in_bf16=2", "precision.fp8_param_gather=true")  # fmt: skip
    (found,) = run_distributed(cuda_options, 1, "model=deepseek_v3", "precision=fp8_block", *layers)
    assert (found["num_layers_at_start_in_bf16"], found["num_layers_at_end_in_bf16"]) == (3, 2)
    assert found["first_last_layers_bf16"]
    assert found["fp8_param"]
    (emulated,) = run_distributed(emulated_options, 1)
    assert emulated["fp8"] is None


def test_fp8_needs_a_gpu_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Known only where the run is: block scaling begins with Hopper, MXFP8 with Blackwell."""
    monkeypatch.setattr(backend, "_require", lambda *_: None)
    cases = {"fp8_block": (8, 9), "fp8_tensor": (8, 0), "fp8_delayed": (8, 0), "mxfp8": (9, 0), "nvfp4": (9, 0)}
    for precision, capability in cases.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda found=capability: found)
        with pytest.raises(HardwareError, match=rf"needs .*has {capability[0]}\.{capability[1]}; use precision="):
            backend.choose(compose(["runtime=cuda", f"precision={precision}"]), "cuda")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
        assert backend.choose(compose(["runtime=cuda", f"precision={precision}"]), "cuda") == "te"


def test_scales_are_what_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformer Engine takes them from variables that are set before it is imported."""
    monkeypatch.setattr(backend, "_require", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    cases = [
        ("fp8_block", "false", "NVTE_FP8_BLOCK_SCALING_FP32_SCALES"),
        ("fp8_tensor", "true", "NVTE_FP8_CURRENT_SCALING_POWER_2_SCALES"),
    ]
    for precision, cut, variable in cases:
        cfg = compose(["runtime=cuda", f"precision={precision}", f"precision.power_of_two_scales={cut}"])
        monkeypatch.delenv(variable, raising=False)
        with pytest.raises(ConfigError, match=f"export {variable}=1"):
            backend.choose(cfg, "cuda")
        monkeypatch.setenv(variable, "1")
        assert backend.choose(cfg, "cuda") == "te"
        with pytest.raises(ConfigError, match=f"export {variable}=0"):
            backend.choose(compose(["runtime=cuda", f"precision={precision}"]), "cuda")


def test_no_fusion_when_switched_off() -> None:
    """backend.fusions=false is obeyed on cuda."""
    (options,) = run_distributed(cuda_options, 1, "model=deepseek_v3", "backend.fusions=false")
    fused = {name for name, value in options.items() if "fusion" in name and value is True}
    assert not fused


def te_layers(*overrides: str) -> tuple[int, int, str, bool, str, str]:
    """What is specified: layers, how many kinds of layer, the module that norms queries, whether there is a prediction
    block, and of its layer (or else the last one) the modules of attention and of the router."""
    from megatron.core.models.gpt import gpt_layer_specs

    from moe_train.model.build import transformer_config
    from moe_train.model.specs import te_specs
    from parallel import groups
    from parallel.runtime import simulated

    torch.distributed.destroy_process_group()
    simulated.start(0, 1)
    cfg = compose(["runtime=cuda", "backend.fusions=false", *overrides])
    layout = validate(cfg)
    groups.create(layout, cfg.seed)
    provider = mock.MagicMock()
    provider.grouped_mlp_modules.return_value = (mock.MagicMock(), None)
    with (
        mock.patch.object(gpt_layer_specs, "TENorm", mock.MagicMock(), create=True),
        mock.patch.object(gpt_layer_specs, "TESpecProvider", return_value=provider, create=True),
    ):
        block, mtp = te_specs(transformer_config(resolve(cfg, layout, runtime="cuda")), cfg.model, None)
    norm = block.layer_specs[-1].submodules.self_attention.submodules.q_layernorm
    kinds = len({id(layer) for layer in block.layer_specs})
    last = block.layer_specs[-1] if mtp is None else _predicting_layer(mtp)
    mlp = last.submodules.mlp
    moe = mlp.keywords["submodules"] if isinstance(mlp, partial) else mlp.submodules
    names = (last.submodules.self_attention.module.__name__, moe.router.__name__)
    return len(block.layer_specs), kinds, getattr(norm, "__name__", ""), mtp is not None, *names


def _predicting_layer(mtp: Any) -> Any:
    """The transformer layer of the first prediction depth; Megatron-Core 0.19 renamed the field."""
    submodules = mtp.layer_specs[0].submodules
    return getattr(submodules, "transformer_layer", None) or submodules.mtp_model_layer


def test_transformer_engine_layers_are_composed_as_upstream_composes_them() -> None:
    """Through upstream's own spec functions, with stand-ins for Transformer Engine's classes."""
    (v3,) = run_distributed(te_layers, 1, "model=deepseek_v3")
    assert v3[:2] == (61, 2)
    assert v3[3:] == (True, "SpecifiedLatentAttention", "Router")
    (olmoe,) = run_distributed(te_layers, 1, "model=olmoe_7b")
    assert olmoe == (16, 1, "QueryAllHeadsRMSNorm", False, "SelfAttention", "Router")
    (v2,) = run_distributed(te_layers, 1, "model=deepseek_v2", "model.mtp_num_layers=1")
    assert v2[3:] == (True, "SpecifiedLatentAttention", "BestExpertOfGroupRouter")


@pytest.mark.parametrize(
    ("overrides", "named"), [(["backend.name=te"], "Transformer Engine"), (["backend.apex=true"], "apex")]
)
def test_what_is_asked_for_and_missing_is_named(overrides: list[str], named: str) -> None:
    """No guessing from imports: asking for what is not installed says how to get it."""
    cfg = compose(["runtime=cuda", "backend.name=local", *overrides])
    with pytest.raises(HardwareError, match=named) as caught:
        backend.choose(cfg, "cuda")
    assert "set backend" in str(caught.value)


def test_the_wrong_apex_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyPI's package of that name imports, but has nothing of NVIDIA's."""
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    cfg = compose(["runtime=cuda", "backend.name=local", "backend.apex=true"])
    with pytest.raises(HardwareError, match="is not NVIDIA's"):
        backend.choose(cfg, "cuda")
