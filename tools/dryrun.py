"""`moe-dryrun`: build every distinct rank of a layout on the meta device, and add up its parameters.

    moe-dryrun model=deepseek_v3 parallel=deepseek_v3_h800
    moe-dryrun model=mixtral_8x7b parallel.pp=4 parallel.ep=8

It takes the overrides of `moe-train`.
"""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import track

from launch import quiet
from moe_train.config.composition.compose import hydra_entry
from moe_train.config.composition.validate import validate
from moe_train.config.schema import Config
from parallel.errors import MoeTrainError
from parallel.layout import ParallelLayout

_COMMON = ("model", "parallel", "precision", "model.mtp_num_layers", "parallel.pp", "parallel.ep")


def main() -> None:
    """Console script. Exits with 1 if the ranks do not add up to the model."""
    sys.exit(hydra_entry(run, argv=[*sys.argv[1:], "runtime=simulated"], about=__doc__, common=_COMMON))


def run(cfg: Config) -> None:
    """Compare the sum over ranks with the arithmetic of the model.

    Raises:
        MoeTrainError: the two differ.
    """
    quiet.silence()
    from moe_train.model.arithmetic import count_parameters

    layout = validate(cfg)
    ranks = distinct_ranks(layout)
    parameters, bias = add_up(cfg, layout, ranks)
    count = count_parameters(cfg.model)
    expected, expected_bias = count.total_with_mtp, count.expert_bias + count.mtp_expert_bias
    Console(soft_wrap=True).print(
        f"{cfg.model.name}: {len(ranks):,} distinct ranks of {layout.world_size:,} hold {parameters:,} parameters "
        f"and {bias:,} expert-bias entries; the model has {expected:,} and {expected_bias:,}"
    )
    if (parameters, bias) != (expected, expected_bias):
        raise MoeTrainError("the ranks do not add up to the model", "report this layout as a bug")


def distinct_ranks(layout: ParallelLayout) -> list[int]:
    """One rank for each pipeline stage and place among the expert ranks, of the first expert-data-parallel replica."""
    return [r for r in range(layout.world_size) if layout.coordinates(r).edp == 0]


def add_up(cfg: Config, layout: ParallelLayout, ranks: list[int]) -> tuple[int, int]:
    """Parameters and expert-bias entries of the whole model, each counted once; weights split over tp are summed."""
    from parallel.runtime.imports import without_compilation

    with without_compilation():
        from moe_train import simulate

    if layout.tp > 1 or layout.etp > 1:
        raise MoeTrainError("only layouts with parallel.tp=1 and parallel.etp=1 are added up", "use pp and ep")
    parameters = bias = 0
    for rank in track(ranks, description="building ranks", transient=True):
        counts = simulate.build_rank(cfg, layout, rank)
        parameters += counts.experts
        if layout.coordinates(rank).ep == 0:
            parameters += counts.shared - counts.embedding_copy
            bias += counts.expert_bias
    return parameters, bias


if __name__ == "__main__":
    main()
