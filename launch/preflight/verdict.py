"""From the measurements of all ranks to defects and the nodes that have them. Pure functions; no torch import."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median, median_low

from launch.preflight.disks import Disk
from launch.preflight.facts import UNKNOWN, RankFacts
from moe_train.config.cluster import ClusterConfig
from moe_train.config.launcher import LauncherConfig

_LEAST_FREE = {"GPU": 0.9, "main memory": 0.1}
_NOTED_WAITED, _MOST_WAITED = 0.1, 0.9  # shares of the time


@dataclass(frozen=True)
class Finding:
    """Something wrong. `node` is to be excluded; "" where no node can be blamed, and then `suspects` may be."""

    check: str
    node: str
    text: str
    suspects: tuple[str, ...] = ()


def diagnose(
    facts: list[RankFacts], launcher: LauncherConfig, cluster: ClusterConfig, ranks_per_node: int
) -> list[Finding]:
    """Everything wrong, in the order of the checks."""
    return [
        *_versions(facts),
        *_clocks(facts, launcher.clock_skew_s),
        *_devices(facts, ranks_per_node),
        *_storage(facts),
        *_matmuls(facts, launcher.slow_ratio),
        *_links(facts, relaxed(launcher.slow_ratio, facts)),
        *_groups(facts, launcher, cluster),
    ]


def excluded(findings: Iterable[Finding]) -> list[str]:
    """Nodes that Slurm should not use."""
    return sorted({finding.node for finding in findings if finding.node})


def suspected(findings: Iterable[Finding]) -> list[str]:
    """Nodes of slow groups that no single node can be blamed for; none of them is excluded."""
    return sorted({node for finding in findings for node in finding.suspects})


def _versions(facts: list[RankFacts]) -> list[Finding]:
    findings = []
    for name in facts[0].versions:
        known = [f for f in facts if f.versions[name] != UNKNOWN]
        usual = Counter(f.versions[name] for f in known or facts).most_common(1)[0][0]
        nodes = {f.node: f.versions[name] for f in known if f.versions[name] != usual}
        findings += [
            Finding("versions", node, f"{name} is {other}, elsewhere {usual}") for node, other in sorted(nodes.items())
        ]
    return findings


def _clocks(facts: list[RankFacts], most_s: float) -> list[Finding]:
    of_node: dict[str, float] = {}
    for f in facts:  # the rank of a node that was disturbed least
        if f.node not in of_node or abs(f.clock_s) < abs(of_node[f.node]):
            of_node[f.node] = f.clock_s
    usual = median(of_node.values())
    return [
        Finding("clock", node, f"{offset - usual:+.1f} s against the other nodes")
        for node, offset in sorted(of_node.items())
        if abs(offset - usual) > most_s
    ]


def _devices(facts: list[RankFacts], ranks_per_node: int) -> list[Finding]:
    findings = []
    for f in facts:
        findings += [Finding("GPU", f.node, f"rank {f.rank}: {problem}") for problem in f.gpu_problems]
        kind = "main memory" if f.gpus is None else "GPU"
        if f.gpus is not None and f.gpus < ranks_per_node and f.gpus != 1:  # 1: bound to the rank, and its own
            findings.append(Finding("GPU", f.node, f"rank {f.rank} sees {f.gpus} of {ranks_per_node} GPUs"))
        if f.memory_free < _LEAST_FREE[kind]:
            findings.append(Finding("memory", f.node, f"{f.memory_free:.0%} of {kind} of rank {f.rank} is free"))
    seldom = {item for item, ranks in _unchecked(facts).items() if len(ranks) < len(facts) / 2}
    for f in facts:
        if items := [item for item in f.gpu_unchecked if item in seldom]:
            text = f"{', '.join(items)} could not be checked, as on most others: {f.gpu_unchecked[items[0]]}"
            findings.append(Finding("GPU", f.node, f"rank {f.rank}: {text}"))
    return findings


def _unchecked(facts: list[RankFacts]) -> dict[str, list[RankFacts]]:
    """Ranks whose GPU could not be asked, by what."""
    by_check: dict[str, list[RankFacts]] = {}
    for f in facts:
        for item in f.gpu_unchecked:
            by_check.setdefault(item, []).append(f)
    return by_check


def notes(facts: list[RankFacts]) -> list[str]:
    """What could not be checked on so many ranks that none of their nodes is to blame for it."""
    return [
        f"{item} could not be checked on {len(ranks)} of {len(facts)} ranks: {ranks[0].gpu_unchecked[item]}"
        for item, ranks in _unchecked(facts).items()
        if len(ranks) >= len(facts) / 2
    ]


def _storage(facts: list[RankFacts]) -> list[Finding]:
    findings = [
        Finding("storage", f.node, f"{field} there is not the directory that rank 0 sees")
        for f in facts
        for field in f.unseen
    ]
    for field in dict.fromkeys(disk.field for f in facts for disk in f.disks):
        on = [(f.node, disk) for f in facts for disk in f.disks if disk.field == field]
        wrong = {node: text for node, disk in on if (text := _disk_problem(disk))}
        if wrong and on[0][1].shared and len(wrong) == len(on):
            findings.append(Finding("storage", "", next(iter(wrong.values()))))
        else:
            findings += [Finding("storage", node, text) for node, text in sorted(wrong.items())]
    return findings


def _disk_problem(disk: Disk) -> str:
    name = f"{disk.field} ({disk.path})"
    if disk.problem:
        return f"{name} cannot be written: {disk.problem}"
    if disk.free_bytes < disk.least_bytes:
        return f"{name} has {_size(disk.free_bytes)} free, and the run soon needs {_size(disk.least_bytes)}"
    return ""


def _disk_notes(facts: list[RankFacts]) -> list[str]:
    """Directories that will be full before the run ends, if nothing is removed."""
    tightest: dict[str, Disk] = {}
    for disk in (disk for f in facts for disk in f.disks if not _disk_problem(disk)):
        if disk.field not in tightest or disk.free_bytes < tightest[disk.field].free_bytes:
            tightest[disk.field] = disk
    return [
        f"{field} ({disk.path}) has {_size(disk.free_bytes)} free, and the whole run writes {_size(disk.all_bytes)}: "
        "set checkpoint.keep_last or make space"
        for field, disk in tightest.items()
        if disk.free_bytes < disk.all_bytes
    ]


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"


def _matmuls(facts: list[RankFacts], ratio: float) -> list[Finding]:
    """Ranks whose multiplications take much longer than those of most."""
    usual = median_low(f.matmul_s for f in facts)  # of two ranks the faster one
    findings = []
    for f in facts:
        if usual > 0 and f.matmul_s > ratio * usual:
            text = f"rank {f.rank} takes {f.matmul_s / usual:.1f} times the median {usual * 1e3:.3g} ms"
            if f.matmul_s > ratio * f.matmul_median_s:
                single_ms = f.matmul_median_s * 1e3
                text += f": single products take {single_ms:.3g} ms, and the process is stopped between them"
            findings.append(Finding("matmul", f.node, text))
    return findings


def relaxed(ratio: float, facts: list[RankFacts]) -> float:
    """`ratio` for what ranks do together: it takes longer where they wait for cores that other processes have."""
    return ratio / (1 - min(max(f.waited for f in facts), _MOST_WAITED))


def _contended(facts: list[RankFacts]) -> list[str]:
    """Nodes that other processes compute on."""
    waited = {f.node: max(g.waited for g in facts if g.node == f.node) for f in facts}
    busy = {node: share for node, share in waited.items() if share > _NOTED_WAITED}
    if not busy:
        return []
    worst = max(busy, key=lambda node: busy[node])
    where = f"other processes use cores of {len(busy)} of {len(waited)} nodes"
    relaxed_too = "which is not counted, and links and bandwidth are compared less strictly"
    return [f"{where}: a rank of {worst} waited {busy[worst]:.0%} of the time for one, {relaxed_too}"]


def remedy(findings: Iterable[Finding]) -> str:
    """What to do where no node is to be excluded."""
    checks = {finding.check for finding in findings if not finding.node}
    remedies = {"storage": "make space, or set other directories", "bandwidth": "see the switches between them"}
    return "; ".join(text for check, text in remedies.items() if check in checks)


def _links(facts: list[RankFacts], ratio: float) -> list[Finding]:
    speeds = {f.node: f.link_gb_s for f in facts if f.link_gb_s is not None}
    if len(speeds) < 3:  # of two nodes neither can be blamed
        return []
    usual = median(speeds.values())
    return [
        Finding("links", node, f"{speed:.2f} GB/s to its neighbours, the median is {usual:.2f}")
        for node, speed in sorted(speeds.items())
        if speed * ratio < usual
    ]


def _groups(facts: list[RankFacts], launcher: LauncherConfig, cluster: ClusterConfig) -> list[Finding]:
    """Slow groups. A node is blamed only where the group lies within it; of others the suspects are named."""
    findings = []
    for name in sorted({name for f in facts for name in f.groups}):
        members: dict[int, list[RankFacts]] = {}
        for f in facts:
            if name in f.groups:
                members.setdefault(f.groups[name][0], []).append(f)
        nodes = {first: {f.node for f in ranks} for first, ranks in members.items()}
        for place, collective in enumerate(("all-reduce", "all-to-all"), 1):
            speeds = {first: ranks[-1].groups[name][place] for first, ranks in members.items()}
            usual = median(speeds.values())
            slow = {}
            for first, speed in sorted(speeds.items()):
                expected = _least(collective, members[first], len(facts), launcher, cluster)
                if speed * relaxed(launcher.slow_ratio, facts) < usual or speed < expected:
                    slow[first] = f", expected {expected:.3g}" + _source(launcher, cluster) if expected else ""
            healthy = {node for first in nodes if first not in slow for node in nodes[first]}
            for first, wanted in slow.items():
                measured = f"{collective} {speeds[first]:.2f} GB/s, the median is {usual:.2f}"
                text = f"{name} group of rank {first}: {measured}{wanted}"
                alone = len(nodes[first]) == 1
                suspects = () if alone else tuple(sorted(nodes[first] - healthy or nodes[first]))
                findings.append(Finding("bandwidth", next(iter(nodes[first])) if alone else "", text, suspects))
    return findings


def _least(
    collective: str, ranks: list[RankFacts], world: int, launcher: LauncherConfig, cluster: ClusterConfig
) -> float:
    """GB/s that a group must reach; 0 where nothing is expected of it."""
    if launcher.expected_gbps is not None:
        return launcher.expected_gbps
    if not launcher.expected_fraction or any(f.gpus is None for f in ranks):
        return 0.0
    on_node = Counter(f.node for f in ranks)
    return launcher.expected_fraction * reachable(collective, len(ranks), min(on_node.values()), world, cluster)


def _source(launcher: LauncherConfig, cluster: ClusterConfig) -> str:
    if launcher.expected_gbps is not None:
        return " (launcher.expected_gbps)"
    return f" ({launcher.expected_fraction:.0%} of what cluster={cluster.name} gives)"


def reachable(collective: str, size: int, on_node: int, world: int, cluster: ClusterConfig) -> float:
    """GB/s (bytes of a rank's tensor over time) of a collective of one group, while all groups run it.

    NVLink and the network are taken to work one after the other, as a lower bound; NVLink to end at the node, which
    asks less than there is where a domain is larger; each GPU to have an adapter of its own.

    Args:
        collective: all-reduce (scattered in the node, reduced between nodes, gathered) or all-to-all.
        size: ranks of the group, of which `on_node` are on one node, the fewest of any.
        world: ranks of the job; where they fill more than a pod, `spine_fraction` counts.
    """
    domain = cluster.domain_gb_per_s * cluster.domain_fraction
    network = cluster.network_gb_per_s * cluster.network_fraction
    if world > cluster.pod_gpus:
        network *= cluster.spine_fraction
    near = min(on_node, cluster.domain_gpus)
    if collective == "all-to-all":
        return 1 / ((near - 1) / size / domain + (size - near) / size / network)
    across = size / near
    return 1 / (2 * (near - 1) / near / domain + 2 * (across - 1) / across / near / network)


def table(facts: list[RankFacts], findings: list[Finding]) -> list[str]:
    """A line for each check: what was measured, and which nodes fail it."""
    nodes = {f.node for f in facts}
    usual = Counter(tuple(sorted(f.versions.items())) for f in facts).most_common(1)[0][0]
    clocks = [f.clock_s for f in facts]
    times = sorted(f.matmul_s for f in facts)
    speeds = [f.link_gb_s for f in facts if f.link_gb_s is not None]
    rows = {
        "versions": ", ".join(f"{name} {value}" for name, value in usual if value != "absent"),
        "clock": f"{max(clocks) - min(clocks):.3f} s between the first and the last",
        "GPU": f"{facts[0].gpus} on each node" if facts[0].gpus is not None else "none is used",
        "memory": f"{min(f.memory_free for f in facts):.0%} is free where it is least",
        "storage": _storages(facts),
        "matmul": f"median {median(times) * 1e3:.3g} ms, slowest {times[-1] * 1e3:.3g} ms",
        "links": f"slowest node {min(speeds):.2f} GB/s" if speeds else "one node",
        "bandwidth": _bandwidths(facts),
    }
    noted = {"GPU": notes(facts), "storage": _disk_notes(facts), "matmul": _contended(facts)}
    lines = [f"preflight of {len(facts)} ranks on {len(nodes)} nodes"]
    for check, text in rows.items():
        wrong = [finding for finding in findings if finding.check == check]
        nowhere = "every node" if check == "storage" else "some node"
        lines.append(f"  {'BAD' if wrong else 'ok':<4}{check:<10}{text}")
        lines += [f"      {finding.node or nowhere}: {finding.text}" for finding in wrong]
        lines += [f"      note: {note}" for note in noted.get(check, [])]
    return lines


def _storages(facts: list[RankFacts]) -> str:
    """Of each directory what the node with the least finds."""
    texts = []
    for field in dict.fromkeys(disk.field for f in facts for disk in f.disks):
        disks = [disk for f in facts for disk in f.disks if disk.field == field]
        speeds = [(disk.write_mb_s, disk.read_mb_s or 0.0) for disk in disks if disk.write_mb_s is not None]
        text = f"{field} {_size(min(disk.free_bytes for disk in disks))} free"
        if speeds:
            write, read = (min(each) for each in zip(*speeds, strict=True))
            text += f", writes {write:,.0f} and reads {read:,.0f} MB/s"
        texts.append(text)
    return "; ".join(texts)


def _bandwidths(facts: list[RankFacts]) -> str:
    texts = []
    for name in sorted({name for f in facts for name in f.groups}):
        of_group = {f.groups[name][0]: f.groups[name][1:] for f in facts if name in f.groups}
        reduce, exchange = (min(speeds[i] for speeds in of_group.values()) for i in (0, 1))
        texts.append(f"{name} all-reduce {reduce:.2f} and all-to-all {exchange:.2f} GB/s")
    return "; ".join(texts) or "one rank"
