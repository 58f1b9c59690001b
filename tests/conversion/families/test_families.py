"""Every family in every layout of ranks computes what transformers computes, and comes back bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint import small_run
from tests.conversion import models, ranks
from tests.conversion.convert import convert
from tests.distributed.helper import run_distributed
from tests.quick import slow_but

LAYOUTS: dict[str, dict[str, int]] = {
    "single": {},
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
    "pp2 vpp2": {"pp": 2, "vpp": 2},
    "ep2": {"ep": 2},
    "tp2 pp2 ep2": {"tp": 2, "pp": 2, "ep": 2},
}
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Directory and model of each name, converted to root/megatron/name too."""
    root = tmp_path_factory.mktemp("hf")
    found = {name: (root / name, models.save(name, root / name)) for name in models.MODELS}
    for name in found:
        convert(root / name, root / "megatron" / name)
    return found


def megatron(directory: Path) -> Path:
    """The same weights, converted."""
    return directory.parent / "megatron" / directory.name


def batch() -> torch.Tensor:
    """The tokens that `ranks.outputs` evaluates, one sample a row."""
    rows = []
    for index in range(small_run.BATCH):
        generator = torch.Generator().manual_seed(index)
        rows.append(torch.randint(0, small_run.VOCABULARY, (small_run.SEQUENCE + 1,), generator=generator)[:-1])
    return torch.stack(rows)


def expected(model: Any) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """Logits [samples, s, vocabulary] and chosen experts [samples, s, k] by number of the layer, from 1."""
    chosen: dict[int, torch.Tensor] = {}
    hooks = []
    for number, layer in enumerate(model.model.layers, 1):
        experts = getattr(layer.mlp, "experts", None)
        if experts is not None:

            def look(_: Any, inputs: Any, number: int = number) -> None:
                chosen[number] = inputs[1].view(small_run.BATCH, small_run.SEQUENCE, -1)

            hooks.append(experts.register_forward_pre_hook(look))
    with torch.no_grad():
        logits = model(batch()).logits
    for hook in hooks:
        hook.remove()
    return logits, chosen


@pytest.mark.parametrize("layout", slow_but(["single", "tp2 pp2 ep2"], LAYOUTS))
def test_a_layout_computes_what_transformers_does_and_gives_the_weights_back(
    layout: str, saved: dict[str, tuple[Path, Any]], tmp_path: Path
) -> None:
    degrees = LAYOUTS[layout]
    names = [name for name in saved if "ep" not in degrees or name not in models.DENSE]
    world = degrees.get("tp", 1) * degrees.get("pp", 1) * (2 if degrees.get("ep") and "tp" not in degrees else 1)
    sources = {name: (saved[name][0], megatron(saved[name][0])) for name in names}
    results = run_distributed(ranks.load_and_save, world, sources, tmp_path, degrees, timeout_s=300)
    for name in names:
        directory, model = saved[name]
        compare(name, model, [result[name] for result in results])
        assert all(result[name]["same_from_hf"] for result in results), name
        back = tmp_path / f"{name}-hf"
        convert(results[0][name]["saved"], back)
        same_tensors(models.tensors(directory), models.tensors(back), name)


def compare(name: str, model: Any, results: list[dict[str, Any]]) -> None:
    """Logits and routes of all ranks against transformers'."""
    logits, routes = expected(model)
    seen: set[int] = set()
    for result in results:
        for sample, ours in result["logits"].items():
            mine = ours[:, 0, : models.VOCABULARY].float()
            worst = float((mine - logits[sample]).abs().max())
            assert worst < TOLERANCE, f"{name}: logits differ by {worst}"
            assert torch.equal(mine.argmax(-1), logits[sample].argmax(-1)), name
            seen.add(sample)
    assert seen == set(range(small_run.BATCH)), name
    looked = set()
    for result in results:
        for (layer, sample), chosen in result["routes"].items():
            theirs = torch.zeros_like(chosen).scatter(1, routes[layer][sample], True)
            assert torch.equal(chosen.bool(), theirs.bool()), f"{name}: layer {layer} chooses other experts"
            looked.add((layer, sample))
    assert looked == {(layer, sample) for layer in routes for sample in range(small_run.BATCH)}, name


def same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], name: str) -> None:
    """The same names, precisions and bits."""
    assert sorted(a) == sorted(b), name
    for key, tensor in a.items():
        assert tensor.dtype == b[key].dtype, f"{name}: {key}"
        assert torch.equal(tensor, b[key]), f"{name}: {key}"


def test_both_ways_to_load_agree_in_bf16(saved: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    described = saved["deepseek_v3"][0]
    degrees = {"tp": 2, "ep": 2}
    assert all(run_distributed(ranks.in_bf16, 2, described, megatron(described), tmp_path, degrees))


@pytest.mark.parametrize("name", models.IN_TRANSFORMERS)
def test_transformers_loads_what_comes_back(name: str, saved: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    """config.json is written again, with the keys of the releases: the model must still be the same."""
    directory, model = saved[name]
    back = tmp_path / "hf"
    convert(megatron(directory), back)
    loaded, report = type(model).from_pretrained(back, attn_implementation="eager", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    with torch.no_grad():
        assert torch.equal(loaded(batch()).logits, model(batch()).logits)
    ours, theirs = loaded.config.to_dict(), model.config.to_dict()
    ours["rope_parameters"].pop("type", None)  # the released name of rope_type
    differing = {key: (ours.get(key), value) for key, value in theirs.items() if ours.get(key) != value}
    assert not differing.keys() - {"_name_or_path"}, differing
