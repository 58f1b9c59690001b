"""A private Slurm on this machine: munge, a controller, and nodes with host names of their own. Needs root on Linux.

    python -m tests.slurm.cluster start DIR [NODES]    # then: export SLURM_CONF=DIR/slurm.conf
    python -m tests.slurm.cluster crash DIR NODE       # as if its power failed: daemon and tasks are killed
    python -m tests.slurm.cluster restart DIR NODE
    python -m tests.slurm.cluster stop DIR

Nothing outside DIR is written. Each started daemon is recorded with the time at which its process began, and only
processes that still match their record are ever signalled.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol", "unshare")
PACKAGES = ("munge", "slurmctld", "slurmd", "slurm-client", "util-linux")
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
_GPUS = 8  # of each node; /dev/null under other names

# Ports of a job follow from its number, and other clusters of this machine share its ports.
_CONF = """\
ClusterName=private
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
FirstJobId={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={dir}/run/munge.socket,cred_expire=5
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool/%n
SlurmctldPidFile={dir}/run/slurmctld.own
SlurmdPidFile={dir}/run/slurmd.%n.own
SlurmctldLogFile={dir}/log/slurmctld.log
SlurmdLogFile={dir}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={dir}/log/jobs.txt
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
SlurmdTimeout=10
SlurmctldTimeout=10
MessageTimeout=10
KillWait=10
MinJobAge=3600
ReturnToService=2
JobRequeue=1
RebootProgram=/bin/true
SlurmdParameters=config_overrides
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=2-00:00:00 State=UP
"""
_NODE = (
    "NodeName={name} NodeHostname={name} NodeAddr={address} Port={port} "
    "CPUs=8 Sockets=1 CoresPerSocket=8 ThreadsPerCore=1 RealMemory=4000 Gres=gpu:{gpus} State=UNKNOWN"
)
# In namespaces of its own a node has its host name, and finds the others by theirs.
_ENTER = 'hostname "$1" && mount --bind "$2" /etc/hosts && exec slurmd -D -N "$1" -f "$3"'


def missing() -> str:
    """What this machine lacks, in words; "" where a cluster can start."""
    if sys.platform != "linux":
        return "a private Slurm needs Linux"
    lacking = [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]
    if lacking:
        return f"not installed: {', '.join(lacking)} (Debian and Ubuntu: apt-get install {' '.join(PACKAGES)})"
    if os.geteuid() != 0:
        return "a private Slurm needs root, to give each node its host name"
    probe = subprocess.run(["unshare", "--mount", "--uts", "true"], env=_environment(), capture_output=True, text=True)
    return f"namespaces are not permitted here: {probe.stderr.strip()}" if probe.returncode else ""


def install() -> str:
    """Install what is missing with apt, as root. Returns what went wrong; "" where nothing did."""
    if all(shutil.which(name, path=_PATH) for name in PROGRAMS):
        return ""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return missing()
    for words in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(
            ["apt-get", *words], env=_environment(DEBIAN_FRONTEND="noninteractive"), capture_output=True, text=True
        )
        if done.returncode:
            return f"apt-get {words[0]} failed: {done.stderr.strip().splitlines()[-1]}"
    return ""


class Cluster:
    """`nodes` nodes called node1, node2, ..., with their state in `directory`."""

    def __init__(self, directory: Path, nodes: int = 4) -> None:
        self.dir, self.names = directory.resolve(), [f"node{i}" for i in range(1, nodes + 1)]
        self.conf = self.dir / "slurm.conf"

    def environment(self, **more: str) -> dict[str, str]:
        """For commands that shall talk to this cluster."""
        return _environment(SLURM_CONF=str(self.conf), **more)

    def start(self) -> None:
        """Start everything and return when all nodes are idle. RuntimeError with the logs when they do not come up."""
        for name in ("run", "state", "log", "munge", "dev", *(f"spool/{node}" for node in self.names)):
            (self.dir / name).mkdir(parents=True, exist_ok=True)
        self.dir.chmod(0o755)
        self._configure()
        (self.dir / "munge").chmod(0o700)
        key = self.dir / "munge/key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        munge, run = self.dir / "munge", self.dir / "run"
        self._daemon(
            "munged", "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={run}/munge.socket",
            f"--pid-file={run}/munged.own", f"--log-file={munge}/log", f"--seed-file={munge}/seed",
        )  # fmt: skip
        wait_for(lambda: (run / "munge.socket").exists(), 20)
        self._daemon("slurmctld", "slurmctld", "-D", "-i", "-c", "-f", str(self.conf))
        for node in self.names:
            self.restart(node)
        try:
            wait_for(lambda: self._idle() == len(self.names), 60)
        except TimeoutError as error:
            logs = "\n".join(path.read_text(errors="replace")[-2000:] for path in (self.dir / "log").glob("*"))
            self.stop()
            raise RuntimeError(f"the private Slurm did not come up:\n{logs}") from error

    def _configure(self) -> None:
        ports = _free_ports(len(self.names) + 1)
        addresses = {name: f"127.0.1.{i}" for i, name in enumerate(self.names, 1)}
        hosts = [f"127.0.0.1 localhost {socket.gethostname()}", *(f"{a} {name}" for name, a in addresses.items())]
        (self.dir / "hosts").write_text("\n".join(hosts) + "\n")
        lines = [
            _NODE.format(name=name, address=address, port=port, gpus=_GPUS)
            for (name, address), port in zip(addresses.items(), ports[1:], strict=True)
        ]
        host = socket.gethostname().partition(".")[0]
        settings = {"host": host, "controller_port": ports[0], "dir": self.dir, "nodes": "\n".join(lines)}
        self.conf.write_text(_CONF.format(**settings))
        for number in range(_GPUS):
            device = self.dir / f"dev/nvidia{number}"
            if not device.exists():
                os.mknod(device, 0o666 | 0o020000, os.makedev(1, 3))
        names = f"node[1-{len(self.names)}]"
        (self.dir / "gres.conf").write_text(f"NodeName={names} Name=gpu File={self.dir}/dev/nvidia[0-{_GPUS - 1}]\n")

    def restart(self, node: str) -> None:
        """Start the daemon of a node, the first time or after a crash."""
        entered = ("sh", "-c", _ENTER, "-", node, str(self.dir / "hosts"), str(self.conf))
        self._daemon(node, "unshare", "--mount", "--uts", *entered)

    def crash(self, node: str) -> None:
        """Kill everything that runs on a node, found by its namespace of host names."""
        space = self._space(node)
        for _ in range(2):  # what was being started while the first round went on
            for other in _inside(space):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(other, signal.SIGKILL)
        self._record(node).unlink()

    def processes(self, node: str) -> list[int]:
        """Everything that runs on a node. RuntimeError where the node has no namespace of its own."""
        return _inside(self._space(node))

    def _space(self, node: str) -> str:
        pid = self._alive(node)
        space = os.readlink(f"/proc/{pid}/ns/uts") if pid else ""
        if not space or space == os.readlink("/proc/self/ns/uts"):
            raise RuntimeError(f"{node} does not run in a namespace of its own")
        return space

    def stop(self) -> None:
        """End all jobs, then the daemons, nodes first."""
        spaces = {os.readlink(f"/proc/{pid}/ns/uts") for node in self.names if (pid := self._alive(node))}
        if self._alive("slurmctld"):
            self.run("scancel", "--full", "--user=root", check=False)
            with contextlib.suppress(TimeoutError):
                wait_for(lambda: not self.run("squeue", "--noheader", check=False).strip(), 20)
        for name in (*self.names, "slurmctld", "munged"):
            if pid := self._alive(name):
                os.kill(pid, signal.SIGTERM)
                try:
                    wait_for(lambda name=name: not self._alive(name), 10)  # type: ignore[misc]
                except TimeoutError:
                    os.kill(pid, signal.SIGKILL)
            self._record(name).unlink(missing_ok=True)
        own = os.readlink("/proc/self/ns/uts")
        for space in spaces - {own}:  # tasks that outlived their daemon
            for pid in _inside(space):
                os.kill(pid, signal.SIGKILL)

    def leftovers(self) -> list[str]:
        """Command lines of processes that belong to this cluster, by its directory in their arguments."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                words = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if str(self.dir) in words and path.parent.name != str(os.getpid()):
                    found.append(words)
        return found

    def run(self, *words: str, check: bool = True, **more: str) -> str:
        """Output of a command of Slurm. RuntimeError with its errors where it fails and `check` is set."""
        done = subprocess.run(words, env=self.environment(**more), capture_output=True, text=True, timeout=60)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")
        return done.stdout

    def _idle(self) -> int:
        return len(set(self.run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N", check=False).split()))

    def _daemon(self, name: str, *words: str) -> None:
        with (self.dir / f"log/{name}.out").open("ab") as log:
            process = subprocess.Popen(
                words, env=self.environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self._record(name).write_text(json.dumps([process.pid, _began(process.pid)]))

    def _record(self, name: str) -> Path:
        return self.dir / f"run/{name}.json"

    def _alive(self, name: str) -> int | None:
        """Process id of a daemon that was started from here and still runs."""
        try:
            pid, began = json.loads(self._record(name).read_text())
        except OSError:
            return None
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)  # or an ended child of this process would look alive
        return pid if began is not None and _began(pid) == began else None


def wait_for(condition: Callable[[], bool], timeout_s: float, every_s: float = 0.2) -> None:
    """Return once `condition` holds. TimeoutError when that takes longer than `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not so after {timeout_s:g} s")
        time.sleep(every_s)


def _environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_", "MOE_"))}
    return kept | {"PATH": _PATH} | more


def _began(pid: int) -> str | None:
    """When the process began, in ticks since boot: a number that is used again has another."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def _inside(space: str) -> list[int]:
    """Processes in a namespace of host names."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.readlink(path / "ns/uts") == space:
                found.append(int(path.name))
    return found


def _free_ports(count: int) -> list[int]:
    listeners = [socket.socket() for _ in range(count)]
    for listener in listeners:
        listener.bind(("", 0))
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


def main(words: list[str]) -> int:
    """The command line of this file."""
    if len(words) < 2 or words[0] not in ("start", "stop", "crash", "restart"):
        print((__doc__ or "").partition("\n\n")[2], file=sys.stderr)
        return 2
    action, directory, *rest = words
    if action == "start":
        if problem := install() or missing():
            print(f"error: {problem}", file=sys.stderr)
            return 1
        cluster = Cluster(Path(directory), int(rest[0]) if rest else 4)
        cluster.start()
        print(f"export SLURM_CONF={cluster.conf}")
        return 0
    started = len(list(Path(directory).resolve().glob("spool/node*")))
    cluster = Cluster(Path(directory), started)
    if action == "stop":
        cluster.stop()
    else:
        getattr(cluster, action)(rest[0])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
