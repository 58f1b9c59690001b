"""Multi-token prediction, which transformers neither builds nor saves: against a reference written from the paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.errors import CheckpointError
from tests.checkpoint import small_run
from tests.conversion import models, ranks
from tests.conversion.convert import convert
from tests.conversion.families.test_families import LAYOUTS, batch, same_tensors
from tests.distributed.helper import run_distributed
from tests.quick import slow_but


def make(directory: Path, layers: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    """DeepSeek-V3 with `layers` layers and one prediction layer at `directory`; a transformers model of layers + 1."""
    stem, settings = models.MODELS["deepseek_v3"]
    monkeypatch.setitem(models.MODELS, "with_one_more", (stem, {**settings, "num_hidden_layers": layers + 1}))
    model = models.save("with_one_more", directory)
    generator = torch.Generator().manual_seed(7)
    hidden, prefix = models.SMALL["hidden_size"], f"model.layers.{layers}."

    def change(held: dict[str, torch.Tensor]) -> None:
        for norm in ("enorm", "hnorm", "shared_head.norm"):
            held[f"{prefix}{norm}.weight"] = torch.rand(hidden, generator=generator) + 0.5
        held[f"{prefix}eh_proj.weight"] = torch.randn(hidden, 2 * hidden, generator=generator) * 0.08
        held[f"{prefix}embed_tokens.weight"] = held["model.embed_tokens.weight"].clone()
        held[f"{prefix}shared_head.head.weight"] = held["lm_head.weight"].clone()

    models.edit(directory, change, num_hidden_layers=layers, num_nextn_predict_layers=1)
    return model


@torch.no_grad()
def reference(model: Any, directory: Path, layers: int) -> torch.Tensor:
    """Logits [samples, s, vocabulary] of the prediction depth (arXiv 2412.19437, section 2.2, equations 21 to 23)."""
    held = models.tensors(directory)
    prefix, tokens, epsilon = f"model.layers.{layers}.", batch(), model.config.rms_norm_eps
    extra = model.model.layers[layers]
    model.model.layers = model.model.layers[:layers]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * held[f"{prefix}{name}.weight"]

    hidden = model.model(tokens).last_hidden_state
    following = torch.cat([tokens[:, 1:], tokens[:, :1]], dim=1)  # the last position is not compared
    both = torch.cat([norm(model.model.embed_tokens(following), "enorm"), norm(hidden, "hnorm")], dim=-1)
    x = both @ held[f"{prefix}eh_proj.weight"].t()
    positions = torch.arange(x.size(1))[None]
    mask = torch.full((x.size(1), x.size(1)), float("-inf")).triu(1)[None, None]
    x = extra(
        x,
        attention_mask=mask,
        position_ids=positions,
        position_embeddings=model.model.rotary_emb(x, positions),
    )
    return model.lm_head(norm(x[0] if isinstance(x, tuple) else x, "shared_head.norm"))


@pytest.mark.parametrize(
    ("layers", "layout"),
    slow_but(
        [(4, "tp2"), (4, "pp2 vpp2"), (4, "ep2"), (61, "tp2 pp2 ep2")],
        [(4, name) for name in LAYOUTS] + [(61, "single"), (61, "pp2 vpp2"), (61, "tp2 pp2 ep2")],
        "{0[0]}-{0[1]}".format,
    ),
)
def test_prediction_layers_compute_what_the_paper_says_and_come_back(
    layers: int, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, degrees = tmp_path / "hf", LAYOUTS[layout]
    model = make(source, layers, monkeypatch)
    convert(source, tmp_path / "megatron")
    world = degrees.get("tp", 1) * degrees.get("pp", 1) * (2 if degrees.get("ep") and "tp" not in degrees else 1)
    given = {"model": (source, tmp_path / "megatron")}
    results = [r["model"] for r in run_distributed(ranks.load_and_save, world, given, tmp_path, degrees, timeout_s=300)]
    expected = reference(model, source, layers)
    with torch.no_grad():
        main = model(batch()).logits  # without the extra layer, which `reference` has taken off
    seen = set()
    for result in results:
        for sample, ours in result["prediction_logits"].items():
            mine = ours[:-1, 0, : models.VOCABULARY]
            assert float((mine - expected[sample][:-1]).abs().max()) < 1e-4
            assert float((result["logits"][sample][:, 0, : models.VOCABULARY] - main[sample]).abs().max()) < 1e-4
            seen.add(sample)
    assert seen == set(range(small_run.BATCH))
    assert all(result["same_from_hf"] for result in results)
    convert(results[0]["saved"], tmp_path / "back")
    same_tensors(models.tensors(source), models.tensors(tmp_path / "back"), f"{layers} layers")


def test_lost_prediction_layers_are_an_error_that_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers drops them when it saves, and config.json goes on naming them."""
    make(tmp_path / "hf", 2, monkeypatch)
    models.edit(tmp_path / "hf", lambda held: [held.pop(n) for n in list(held) if n.startswith("model.layers.2.")])
    with pytest.raises(CheckpointError, match=r"has no tensor model\.layers\.2\..*set model\.mtp_num_layers=0"):
        convert(tmp_path / "hf", tmp_path / "megatron")
    assert not (tmp_path / "megatron").exists()


def test_another_embedding_in_the_prediction_layer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "hf", 2, monkeypatch)
    models.edit(tmp_path / "hf", lambda held: held["model.layers.2.embed_tokens.weight"].add_(1))
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.embed_tokens\.weight differs from"):
        convert(tmp_path / "hf", tmp_path / "megatron")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]
