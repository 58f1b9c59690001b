"""What ranks that generate find in run_dir, apart from their config. No torch import."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from moe_train.config.inference import EngineConfig

ENTRY = "moe_train.inference.worker:run"
"""What each rank runs."""
_FILE = "engine.json"


@dataclass(frozen=True)
class EngineSetup:
    """How ranks set up their engine, and for whom they generate.

    Args:
        longest: tokens of the longest sequence that will come; None: the model decides.
        address, key: of the `multiprocessing.connection.Listener` to which rank 0 connects.
    """

    engine: EngineConfig
    longest: int | None
    address: str
    key: bytes


def write(run_dir: Path, setup: EngineSetup) -> None:
    """Leave `setup` in `run_dir`, for this user only."""
    content = {
        "engine": asdict(setup.engine), "longest": setup.longest, "address": setup.address, "key": setup.key.hex(),
    }  # fmt: skip
    path = run_dir / _FILE
    path.touch(mode=0o600)
    path.write_text(json.dumps(content), encoding="utf-8")


def read(run_dir: Path) -> EngineSetup:
    """What `write` left."""
    content = json.loads((run_dir / _FILE).read_text(encoding="utf-8"))
    engine, key = EngineConfig(**content["engine"]), bytes.fromhex(content["key"])
    return EngineSetup(engine, content["longest"], content["address"], key)
