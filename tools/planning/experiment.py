"""A plan as an experiment file: one word on the command line, `experiment=NAME`, runs what was planned."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.global_hydra import GlobalHydra

from moe_train.config.composition.compose import compose
from moe_train.config.composition.explain import CONF_DIR, group_options
from moe_train.config.roots import PlanRoot
from moe_train.config.schema import Config, RecomputeStage
from moe_train.config.walk import all_fields, get
from parallel.dispatchers import ALLTOALL, DISPATCHERS
from parallel.errors import ConfigError
from parallel.fp8_recipes import RECIPES
from parallel.planner.estimate import Estimate

FOLDER = CONF_DIR / "experiment"
NAMED = ("model", "precision", "cluster")  # groups whose options are called as their field `name`
NOT_OF_A_RUN = ("run_dir", "verbose", "rank")
RUN = ("1f1b", "interleaved")  # schedules of Megatron-Core
MARK = "# Planned by moe-plan"


def target(write: str) -> Path:
    """The file that plan.write names: a bare name is that of an experiment, everything else a path.

    Raises:
        ConfigError: an experiment of that name exists that moe-plan did not write.
    """
    if not re.fullmatch(r"[\w-]+", write):
        return Path(write)
    path = FOLDER / f"{write}.yaml"
    if path.exists() and MARK not in path.read_text(encoding="utf-8"):
        raise ConfigError(f"plan.write={write} is an experiment that moe-plan did not write", "choose another name")
    return path


def how_to_run(path: Path) -> str:
    """The words that run the experiment in a file."""
    path = path.absolute()
    if path.is_relative_to(FOLDER):
        return f"run it with experiment={path.relative_to(FOLDER).with_suffix('')}"
    if path.parent.name == "experiment":
        return f"run it with --config-dir {path.parent.parent} experiment={path.stem}"
    return (
        f"run it with experiment={path.stem} from a copy in conf/experiment, or in DIR/experiment with --config-dir DIR"
    )


def planned(cfg: PlanRoot, plan: Estimate) -> PlanRoot:
    """`cfg` with the layout, batch, precision and recomputation of a plan."""
    result, workload = copy.deepcopy(cfg), plan.workload
    for field in dataclasses.fields(workload.layout):
        setattr(result.parallel, field.name, getattr(workload.layout, field.name))
    result.parallel.dispatcher = (
        plan.software.dispatcher if workload.model.num_experts and workload.layout.ep > 1 else ALLTOALL.name
    )
    result.parallel.distributed_optimizer = True
    result.parallel.overlap_grad_reduce = True
    result.parallel.overlap_param_gather = True
    if cfg.plan.search:
        result.parallel.pipeline_layout = None
    result.batch.micro_batch_size = workload.micro_batch_size
    result.recompute.mode, result.recompute.modules = workload.recompute, sorted(workload.recompute_modules)
    result.recompute.stages = [RecomputeStage(mode, sorted(modules)) for mode, modules in workload.recompute_of_chunks]
    if workload.fp8 != cfg.precision.fp8 and workload.dtype == "bf16":
        result.precision = _composed(
            [f"precision={RECIPES[workload.fp8].option if workload.fp8 else 'bf16'}"]
        ).precision
    return result


def as_yaml(cfg: PlanRoot, plan: Estimate) -> str:
    """The file: groups by name, and each field that is not as they and the defaults have it."""
    wanted = planned(cfg, plan)
    plain = dataclasses.asdict(wanted)
    names = {group: get(wanted, group).name for group in NAMED if get(wanted, group).name in group_options(group)}
    base = _composed([f"{group}={name}" for group, name in names.items()])
    values: dict[str, Any] = {}
    for name in all_fields():
        if name.startswith(NOT_OF_A_RUN) or get(wanted, name) == get(base, name):
            continue
        group, _, leaf = name.rpartition(".")
        (values.setdefault(group, {}) if group else values)[leaf] = plain[group][leaf] if group else plain[leaf]
    parallel = values.setdefault("parallel", {})  # all degrees, changed or not
    values["parallel"] = {name: getattr(wanted.parallel, name) for name in ("tp", "pp", "vpp", "cp", "ep", "etp", "dp")}
    values["parallel"] |= parallel
    lines = ["# @package _global_", *_comments(cfg, plan), "defaults:"]
    lines += [f"  - override /{group}: {name}" for group, name in names.items()]
    return "\n".join(lines) + "\n\n" + yaml.safe_dump(values, sort_keys=False)


def _composed(overrides: Sequence[str]) -> Config:
    """`compose`, also within a job of Hydra, which is global and allows one job at a time."""
    hydra = GlobalHydra.instance()
    running, hydra.hydra = hydra.hydra, None
    try:
        return compose(overrides)
    finally:
        hydra.hydra = running


def _comments(cfg: Config, plan: Estimate) -> list[str]:
    rate, gib = plan.step.tokens_per_s_per_gpu, plan.memory_bytes / 2**30
    lines = [
        f"{MARK} for {plan.workload.layout.world_size:,} GPUs of {cfg.cluster.name}:",
        f"# {rate:,.0f} tokens/s/GPU, {gib:.1f} GiB on the fullest.",
        "# Data, learning rate and schedule are not planned: give them, or add them here.",
    ]
    if plan.schedule not in RUN:
        lines.append(f"# Time and memory are those of {plan.schedule}; moe-train has only {' and '.join(RUN)}.")
    row = DISPATCHERS[plan.software.dispatcher]
    if row.library and plan.workload.layout.ep > 1:
        lines.append(
            f"# dispatcher: {row.name} needs GPUs and {row.library}; parallel.dispatcher={ALLTOALL.name} needs neither."
        )
    return lines
