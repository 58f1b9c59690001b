"""`moe-preflight`: look at nodes and network before a job spends money on them.

    moe-preflight parallel.ep=2                            on this machine
    srun moe-preflight experiment=deepseek_v3/pretrain     on all ranks of a job
    moe-submit launcher.preflight=check ...                before a job trains

It takes the overrides of moe-train and runs under the same launchers; alone it starts the ranks of the layout here.
Exit codes: 0 where all is well, 3 where something is wrong, with the nodes to exclude.
"""

from __future__ import annotations

ENTRY = "launch.preflight.rank:run"

_COMMON = (
    "experiment", "cluster", "parallel", "run_dir", "launcher.expected_gbps", "launcher.expected_fraction",
    "launcher.slow_ratio", "launcher.clock_skew_s", "launcher.timeout_s", "checkpoint.dir",
)  # fmt: skip


def main() -> None:
    """Console script."""
    from launch import main as launcher

    launcher.main(ENTRY, __doc__, _COMMON)
