"""What the comparison of optimizers concludes from its runs."""

from __future__ import annotations

from bench import bench_optimizers
from bench.parity import LAYOUTS


def test_the_best_learning_rate_of_each_optimizer_counts() -> None:
    losses = {("adamw", 1e-3): (4.0, 4.2, 4.4), ("adamw", 3e-3): (4.1, 4.0, 4.2),
              ("muon", 1e-3): (3.9, 4.1, 4.1), ("muon", 3e-3): (5.0, 3.0, 5.0)}  # fmt: skip
    rows = [
        {"optimizer": name, "lr": rate, "seed": seed, "valid_loss": loss}
        for (name, rate), of_seeds in losses.items()
        for seed, loss in enumerate(of_seeds)
    ]
    summary = bench_optimizers.summarise(rows)
    assert {name: best["lr"] for name, best in summary["comparison"].items()} == {"adamw": 3e-3, "muon": 1e-3}
    assert summary["seeds_in_which_muon_is_better"] == 2


def test_there_are_twelve_layouts_with_the_distributed_optimizer_on_and_off() -> None:
    assert len(set(bench_optimizers.MUON_LAYOUTS)) == 12
    assert set(bench_optimizers.MUON_LAYOUTS) <= LAYOUTS.keys()
    off = [name for name in bench_optimizers.MUON_LAYOUTS if "parallel.distributed_optimizer=false" in LAYOUTS[name]]
    assert 0 < len(off) < 12
