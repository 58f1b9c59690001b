"""Prints the run_dir of a command line, for `launch/train.sbatch`: `python -m MODULE OVERRIDES`."""

from __future__ import annotations

import sys

from moe_train.config.composition.compose import hydra_entry
from moe_train.config.schema import Config


def show(cfg: Config) -> None:
    """Print the directory, without references and quotes."""
    print(cfg.run_dir)


if __name__ == "__main__":
    sys.exit(hydra_entry(show, trains=False, runs=False))
