"""Which pipeline stage has which layers, in Megatron-Core's notation. No torch import.

The notation (megatron/core/transformer/pipeline_parallel_layer_layout.py): `E` embedding, `t` transformer layer, `m`
multi-token-prediction layer, `L` output head and loss, `|` between stages, `x*n` and `(...)*n` for repeats; commas mean
nothing. With virtual stages, the stages of model chunk 0 of every rank come first, then those of chunk 1, and so on.
"""

from __future__ import annotations

import re

from parallel.suggest import Impossible

_FIELD = "parallel.pipeline_layout"
_ITEMS = {"E": "embedding", "t": "transformer layer", "m": "multi-token-prediction layer", "L": "loss"}


def smallest_num_layers(stages: int) -> int:
    """Fewest layers that `stages` virtual stages need: the first may hold just the embedding, the last the loss."""
    return max(1, stages - 2)


def balanced_layout(
    num_layers: int, pp: int, vpp: int, mtp_num_layers: int, *,
    layer_cost: float = 1.0, embedding_cost: float = 0.0, mtp_cost: float = 1.5, loss_cost: float = 0.5,
) -> str:  # fmt: skip
    """Layers of each stage such that the costliest stage is as cheap as can be, such as "Et*3|t*4|t*3mL".

    Costs are relative times of one item on one rank. Multi-token prediction and the loss share the last stage. Among
    equals, earlier stages get more layers, and stages are as even as they can be. No commas, so that a shell and Hydra
    take the string unchanged (between quotes for the shell's sake).

    Raises:
        Impossible: (a ConfigError) where there are too few layers for a stage each.
    """
    stages = pp * vpp
    if num_layers < smallest_num_layers(stages):
        raise Impossible(
            f"model.num_layers={num_layers} cannot fill parallel.pp x vpp = {pp} x {vpp} = {stages} stages: the first "
            f"can do with the embedding and the last with the loss, so {stages} - 2 = {stages - 2} layers are needed",
            [
                *({"parallel.vpp": v} for v in range(vpp - 1, 0, -1) if num_layers >= smallest_num_layers(pp * v)),
                *({"parallel.pp": p} for p in range(pp - 1, 0, -1) if num_layers >= smallest_num_layers(p * vpp)),
                {"model.num_layers": smallest_num_layers(stages)},
            ],
        )
    if stages == 1:
        return "E" + _repeat("t", num_layers) + _repeat("m", mtp_num_layers) + "L"
    # Giving each layer to the stage that it makes least costly is optimal, because all layers cost the same.
    counts = [0, *[1] * (stages - 2), 0]
    costs = [embedding_cost, *[layer_cost] * (stages - 2), mtp_num_layers * mtp_cost + loss_cost]
    for _ in range(num_layers - sum(counts)):
        stage = min(range(stages), key=lambda s: (costs[s] + layer_cost, s))
        counts[stage] += 1
        costs[stage] += layer_cost
    texts = [_repeat("t", count) for count in counts]
    texts[0] = "E" + texts[0]
    texts[-1] += _repeat("m", mtp_num_layers) + "L"
    return "|".join(texts)


def stage_items(text: str | None, pp: int, vpp: int, num_layers: int, mtp_num_layers: int) -> list[list[str]]:
    """The items of each of the pp x vpp stages, for a layout as text or None for a balanced one.

    Raises:
        Impossible: (a ConfigError) as `parse_layout` and `balanced_layout` do.
    """
    if pp == 1 and vpp == 1:
        return [["E", *["t"] * num_layers, *["m"] * mtp_num_layers, "L"]]
    text = text or balanced_layout(num_layers, pp, vpp, mtp_num_layers)
    return parse_layout(text, pp, vpp, num_layers, mtp_num_layers)


def _repeat(item: str, count: int) -> str:
    return item if count == 1 else f"{item}*{count}" if count else ""


def parse_layout(text: str, pp: int, vpp: int, num_layers: int, mtp_num_layers: int) -> list[list[str]]:
    """The items of each virtual stage, such as [["E", "t", "t"], ["t", "m", "L"]], first to last.

    Raises:
        Impossible: (a ConfigError) where `text` is not in the notation, has another number of stages or layers, leaves
            a stage empty, or puts multi-token prediction elsewhere than on the last stage. Names a layout that works.
    """
    stages = [list(stage) for stage in _unroll(text).split("|")]
    if problem := _problem(stages, pp, vpp, num_layers, mtp_num_layers):
        shown = text if len(text) <= 60 else text[:57] + "..."
        works = balanced_layout(num_layers, pp, vpp, mtp_num_layers)  # raises where no layout can work
        raise Impossible(f"{_FIELD}={shown} {problem}", [{_FIELD: works}, {_FIELD: None}])
    return stages


def _unroll(text: str) -> str:
    """Without commas, and with every repeat written out, as upstream does it."""
    text = text.replace(",", "")
    for pattern in (r"\(([^)]+)\)\*(\d+)", r"(.)\*(\d+)"):
        # Guards against typos such as t*1000000000: no model has this many layers.
        text = re.sub(pattern, lambda match: match.group(1) * min(int(match.group(2)), 10_000), text)
    return text


def _problem(stages: list[list[str]], pp: int, vpp: int, num_layers: int, mtp_num_layers: int) -> str:
    """Why a parsed layout is invalid, as the end of a sentence; empty when it is valid."""
    items = [item for stage in stages for item in stage]
    if unknown := sorted(set(items) - set(_ITEMS)):
        return f"has {unknown[0]!r}, but a layout is made of " + ", ".join(f"{k} ({v})" for k, v in _ITEMS.items())
    if len(stages) != pp * vpp:
        return f"has {len(stages)} stages, but parallel.pp x vpp = {pp} x {vpp} = {pp * vpp}"
    for number, stage in enumerate(stages, 1):
        if not stage:
            return f"leaves stage {number} of {len(stages)} empty"
    if items.count("t") != num_layers:
        return f"has {items.count('t')} transformer layers (t), but model.num_layers={num_layers}"
    if items.count("m") != mtp_num_layers:
        return f"has {items.count('m')} multi-token-prediction layers (m), but model.mtp_num_layers={mtp_num_layers}"
    if items[0] != "E" or items.count("E") != 1:
        return "must begin with the embedding (E), exactly once"
    if items[-1] != "L" or items.count("L") != 1:
        return "must end with the loss (L), exactly once"
    if "m" in items and items[items.index("m") : -1] != ["m"] * mtp_num_layers:
        return "must have every multi-token-prediction layer (m) after the last transformer layer (t)"
    if stages[-1].count("m") != mtp_num_layers:
        return "must have multi-token prediction (m) on the last stage, with the loss"
    return ""
