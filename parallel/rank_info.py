"""Identity of a rank, and the address of the rendezvous. No torch import: every layer may use it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RankInfo:
    """One process of a job. Ranks count from 0; `master_addr:master_port` is the store of the rendezvous."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int
    launcher: str
    """What started this process: local, torchrun, srun, srun --mpi or mpirun."""

    def environment(self) -> dict[str, str]:
        """The variables that torch's `env://` and most libraries read."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
        }
