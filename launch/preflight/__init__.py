"""`moe-preflight`: looks at nodes and network before a job spends money on them.

    srun moe-preflight experiment=deepseek_v3/pretrain

It takes the overrides of moe-train, runs under the same launchers (alone it starts the ranks of the layout here), and
ends with 0 where all is well and 3 where something is wrong, with the nodes to exclude.
"""

from __future__ import annotations

ENTRY = "launch.preflight.rank:run"


def main() -> None:
    """Console script."""
    from launch import main as launcher

    launcher.main(ENTRY)
