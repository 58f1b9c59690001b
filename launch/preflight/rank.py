"""One rank of `moe-preflight`: it looks at its node, measures with the others, and rank 0 reports."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from launch.preflight import disks, facts, measure, verdict
from launch.preflight.facts import RankFacts
from launch.slurm import submission
from moe_train.config.composition.validate import validate
from moe_train.config.schema import Config
from moe_train.files import atomic
from parallel import runtime
from parallel.errors import LaunchError
from parallel.exit_codes import ExitCode
from parallel.layout import ParallelLayout
from parallel.rank_info import RankInfo

_MOST_RESUBMISSIONS = 3
_COUNT = "MOE_PREFLIGHT_ROUND"


def run(cfg: Config, info: RankInfo) -> None:
    """Check, and end with exit code 3 on every rank where something is wrong.

    Raises:
        SystemExit: with `ExitCode.BAD_NODE`.
    """
    layout = validate(cfg, info.world_size)
    device = _start(cfg, info)
    mine = look(cfg, layout, info, device)
    gathered: list[RankFacts] = [mine] * info.world_size
    dist.all_gather_object(gathered, mine)
    findings = verdict.diagnose(gathered, cfg.launcher, cfg.cluster, info.local_world_size)
    if info.rank == 0:
        _report(cfg, gathered, findings)
    dist.barrier()
    if findings:
        raise SystemExit(ExitCode.BAD_NODE)


def look(cfg: Config, layout: ParallelLayout, info: RankInfo, device: torch.device) -> RankFacts:
    """Everything that this rank can find out, alone and together with the others."""
    cuda = device.type == "cuda"
    measured = RankFacts(facts.node_name(), info.rank, facts.versions())
    if cuda:
        free, total = torch.cuda.mem_get_info()
        measured.gpus, measured.memory_free = torch.cuda.device_count(), free / total
        measured.gpu = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        measured.gpu_problems, measured.gpu_unchecked = facts.gpu_problems(measured.gpu)
        measured.versions |= {"driver": facts.gpu_driver(), "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    else:
        measured.memory_free = facts.memory_free()
    measured.clock_s = measure.clock()
    size = 256 if cuda else 4
    places = disks.places(cfg, layout, info.local_world_size)
    measured.unseen, measured.disks = measure.storage(places, info, 256 if cuda else 16)
    dist.barrier()
    products = measure.gemm_times(device)
    measured.matmul_s, measured.waited = products.mean_s, products.waited
    measured.matmul_median_s, measured.matmul_worst_s = products.median_s, products.worst_s
    nodes = [""] * info.world_size
    dist.all_gather_object(nodes, measured.node)
    measured.link_gb_s = measure.links(nodes, info, device, size)
    measured.groups = measure.bandwidth(layout, info, device, size, cfg.launcher.timeout_s)
    return measured


def _start(cfg: Config, info: RankInfo) -> torch.device:
    name = runtime.choose(cfg.runtime)
    if name == "cuda":
        return runtime.start(name, info, cfg.launcher.timeout_s)
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "0")
    dist.init_process_group(  # without Megatron-Core, which takes seconds to import and has no part in this
        "gloo",
        init_method=f"tcp://{info.master_addr}:{info.master_port}",
        rank=info.rank,
        world_size=info.world_size,
        timeout=timedelta(seconds=cfg.launcher.timeout_s),
    )
    return torch.device("cpu")


def _report(cfg: Config, gathered: list[RankFacts], findings: list[verdict.Finding]) -> None:
    nodes = verdict.excluded(findings)
    lines = verdict.table(gathered, findings)
    if nodes:
        lines.append(f"exclude: {','.join(nodes)}")
        lines.append(_again(cfg, nodes))
    elif findings:
        lines.append(f"no single node is to blame: {verdict.remedy(findings)}")
    suspects = verdict.suspected(findings)
    if suspects:
        lines.append(f"suspects, not excluded: {','.join(suspects)}")
    text = "\n".join(lines)
    result = {
        "exclude": nodes,
        "suspects": suspects,
        "findings": [asdict(f) for f in findings],
        "ranks": [asdict(f) for f in gathered],
    }
    print(text, flush=True)
    directory = Path(cfg.run_dir)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        atomic.write_text(directory / "preflight.txt", text + "\n")
        atomic.write_text(directory / "preflight.json", json.dumps(result, indent=1) + "\n")
    except OSError as error:  # the disk is full, as was said above
        print(f"warning: {directory}/preflight.json cannot be written: {error.strerror}", file=sys.stderr, flush=True)


def _again(cfg: Config, nodes: list[str]) -> str:
    """Submit the job again without these nodes where the config says so; else the command that would."""
    exclude = ",".join(sorted({*nodes, *cfg.launcher.exclude}))
    submitted = os.environ.get("MOE_SUBMITTED")
    if submitted is None:  # what moe-submit has started with this run_dir is another job
        return f"submit again with: sbatch --exclude={exclude} ..."
    place = Path(cfg.run_dir, submission.FOLDER, submitted)
    recorded = (place / submission.FACTS).is_file()  # a sweep has it elsewhere, for all of its runs
    if cfg.launcher.preflight != "resubmit" or "SLURM_JOB_ID" not in os.environ or not recorded:
        return f"submit again with: moe-submit ... 'launcher.exclude=[{exclude}]'"
    round_ = int(os.environ.get(_COUNT, "0"))
    if round_ >= _MOST_RESUBMISSIONS:
        return f"not submitted again: that was done {round_} times already"
    record = submission.read(place)
    command = [word for word in record.command if not word.startswith("--exclude=")]
    record.command, record.environment = command, record.environment | {_COUNT: str(round_ + 1)}
    try:
        job = record.submit(f"--exclude={exclude}")
    except LaunchError as error:
        return f"not submitted again: {error.cause}"
    submission.write(record, place)
    return f"submitted again as {job} with --exclude={exclude}"
