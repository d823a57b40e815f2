"""A SLURM cluster on this machine: a controller and two nodes, with a key, ports and folders of its own.

Nothing outside the given folder is written, and only what was started here is ended.
"""

import contextlib
import os
import pathlib
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator

NODES = ("n1", "n2")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")

CONFIG = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
# cred_expire: seconds until a job that went back into the queue may start again, 5 at least
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmctldPort={controller}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
StateSaveLocation={folder}/state
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
SlurmdSpoolDir={folder}/spool-%n
SwitchType=switch/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
PriorityType=priority/basic
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
SlurmdTimeout=10
MessageTimeout=5
SlurmctldTimeout=30
KillWait=5
InactiveLimit=0
MinJobAge=300
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=common Nodes=ALL Default=YES PriorityTier=1 GraceTime=30
PartitionName=no_grace Nodes=ALL PriorityTier=1
PartitionName=urgent Nodes=ALL PriorityTier=2
"""


def missing() -> str:
    """Why there can be no cluster on this machine; '' where there can."""
    if os.geteuid() != 0:
        return "only root can start SLURM's daemons"
    absent = [name for name in PROGRAMS if not program(name)]
    return f"no {', '.join(absent)}: apt-get install slurm-wlm munge" if absent else ""


def program(name: str) -> str | None:
    """Where a program is; root's are not on everybody's PATH."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def wait_for(what: str, condition: Callable[[], object], seconds: float = 60) -> object:
    """The first true answer of `condition`."""
    end = time.monotonic() + seconds
    while not (answer := condition()):
        if time.monotonic() > end:
            raise AssertionError(f"{what}: not within {seconds} s")
        time.sleep(0.2)
    return answer


class Cluster:
    """The daemons, and the commands that talk to them."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.environ = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self.daemons: dict[str, subprocess.Popen] = {}

    def write_config(self) -> None:
        """slurm.conf, the key, and the folders."""
        controller, *ports = free_ports(1 + len(NODES))
        host = socket.gethostname()
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1"
            for name, port in zip(NODES, ports, strict=True)
        )
        text = CONFIG.format(folder=self.folder, controller=controller, nodes=nodes)
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "munge.key").write_bytes(secrets.token_bytes(128))
        (self.folder / "munge.key").chmod(0o600)
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir()

    def start(self, name: str, *command: str) -> None:
        """Starts a daemon in the foreground of a session of its own."""
        path = program(command[0])
        assert path, command
        output = (self.folder / f"{name}.out").open("ab")
        self.daemons[name] = subprocess.Popen(
            [path, *command[1:]],
            env=self.environ,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )

    def start_munge(self) -> None:
        """The keeper of the key, on a socket of its own."""
        files = [
            f"--{option}={self.folder}/munge.{ending}"
            for option, ending in (
                ("socket", "socket"),
                ("key-file", "key"),
                ("pid-file", "pid"),
                ("seed-file", "seed"),
                ("log-file", "log"),
            )
        ]
        # --force: for it, a folder under /tmp is too open to hold a socket
        self.start("munged", "munged", "--foreground", "--force", "--num-threads=2", *files)
        wait_for("munge", (self.folder / "munge.socket").exists)

    def start_node(self, node: str) -> None:
        self.start(node, "slurmd", "-D", "-N", node)

    def run(self, *command: object) -> str:
        """What a SLURM command prints."""
        done = subprocess.run(
            list(map(str, command)), env=self.environ, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{command}: {done.stdout} {done.stderr}"
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What scontrol knows of a job."""
        words = self.run("scontrol", "--oneliner", "show", "job", number)
        return dict(re.findall(r"(\w+)=(\S*)", words))

    def node_state(self, node: str) -> str:
        words = self.run("scontrol", "--oneliner", "show", "node", node)
        return dict(re.findall(r"(\w+)=(\S*)", words))["State"]

    def wait_for_state(self, number: str, *states: str, seconds: float = 60) -> dict[str, str]:
        """Waits until the job is in one of the states."""
        found = {}

        def reached() -> bool:
            found.update(self.job(number))
            return found["JobState"] in states

        try:
            wait_for(f"job {number} in {states}", reached, seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}, but {found}\n{self.logs()}") from None
        return found

    def tasks(self, node: str) -> dict[int, int]:
        """Processes of jobs on a node, with their parents."""
        mine = (f"SLURM_CONF={self.folder / 'slurm.conf'}".encode(), f"SLURMD_NODENAME={node}".encode())
        found = {}
        for entry in pathlib.Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if set(mine) <= set((entry / "environ").read_bytes().split(b"\0")):
                    found[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        return found

    def lose_node(self, node: str) -> None:
        """As if its power failed: the daemon, the keepers of the steps, and the steps, all at once."""
        daemon = self.daemons.pop(node)
        tasks = self.tasks(node)
        assert tasks, f"nothing runs on {node}"
        keepers = {pid for parent in tasks.values() if "slurmstepd" in _command(pid := parent)}
        assert keepers, f"no slurmstepd on {node}"
        for pid in (daemon.pid, *keepers, *tasks):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        daemon.wait()

    def end_jobs(self) -> None:
        """Cancels all jobs, and waits until they are gone and both nodes are there again."""
        for node in NODES:
            if node not in self.daemons:
                self.start_node(node)
        wait_for("empty queue", lambda: not self.run("scancel", "--user=root") and not self.queue())
        wait_for("idle nodes", lambda: all(self.node_state(node) == "IDLE" for node in NODES))

    def queue(self) -> str:
        return self.run("squeue", "--noheader")

    def stop(self) -> None:
        """Ends all that runs for the cluster."""
        for name in sorted(self.daemons, key=["n1", "n2", "slurmctld", "munged"].index):
            daemon = self.daemons[name]
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for node in NODES:
            for pid in self.tasks(node):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        files = sorted(self.folder.glob("*.log"))
        return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')[-3000:]}" for file in files)


def _command(pid: int) -> str:
    try:
        return pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


@contextlib.contextmanager
def cluster(folder: pathlib.Path) -> Iterator[Cluster]:
    """A cluster of two idle nodes, while the context lasts."""
    made = Cluster(folder)
    made.write_config()
    try:
        made.start_munge()
        made.start("slurmctld", "slurmctld", "-D")
        for node in NODES:
            made.start_node(node)
        try:
            wait_for("two idle nodes", lambda: all(made.node_state(node) == "IDLE" for node in NODES))
        except AssertionError as error:
            raise AssertionError(f"{error}\n{made.logs()}") from None
        yield made
    finally:
        made.stop()
