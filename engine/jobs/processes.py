"""Which part of a job is this process's: told by hand, or read from what the cluster says.

| cluster        | this process                               | of all                                    |
|----------------|--------------------------------------------|-------------------------------------------|
| Open MPI       | OMPI_COMM_WORLD_RANK                       | OMPI_COMM_WORLD_SIZE                      |
| SLURM step     | SLURM_PROCID                               | SLURM_STEP_NUM_TASKS                      |
| SLURM array    | from SLURM_ARRAY_TASK_ID, _MIN, _STEP      | SLURM_ARRAY_TASK_COUNT                    |
| Kubernetes Job | JOB_COMPLETION_INDEX                       | JOB_COMPLETIONS                           |
| JobSet         | JOBSET_JOB_INDEX, and the Job's            | JOBSET_JOBS, times the Job's              |
| TPU on GKE     | TPU_WORKER_ID                              | TPU_PROCESS_ADDRESSES, or _WORKER_HOSTNAMES |
| TPU VM         | metadata agent-worker-number               | metadata worker-network-endpoints         |

The tasks of a SLURM array multiply with those of a step or of Open MPI inside; the slices of a multislice TPU
(MEGASCALE_SLICE_ID of MEGASCALE_NUM_SLICES) with the hosts of each. JOB_COMPLETION_INDEX and the TPU's
variables are set by the cluster; JOB_COMPLETIONS, JOBSET_JOB_INDEX and JOBSET_JOBS by our jobset.yaml.
"""

import dataclasses
import glob
import http.client
import os
import pathlib
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping

from engine.errors import Trouble, UserError

METADATA_HOST = "metadata.google.internal"
METADATA_TRIES = 3
METADATA_TIMEOUT = 5.0  # seconds, of each
METADATA_PAUSE = 0.5  # seconds between them
GOOGLE = "0x1ae0"  # as a vendor of PCI devices

Environ = Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Processes:
    """This process's part of a job: every shard k with k % count == id."""

    id: int
    count: int
    source: str  # who said so


def tpu_metadata(key: str, environ: Environ = os.environ) -> str | None:
    """What the metadata server knows of this TPU VM; None where it does not know, or this is none.

    Nothing is asked over the network on a machine without a TPU.
    """
    if environ.get("TPU_SKIP_MDS_QUERY") or not has_tpu():
        return None
    return read_metadata(key, environ.get("GCE_METADATA_IP") or METADATA_HOST)


def has_tpu(root: str = "/") -> bool:
    """Whether a TPU is plugged into this machine: a device of Google's, and a driver's file for it."""
    drivers = [*glob.glob(f"{root}/dev/accel[0-9]*"), *glob.glob(f"{root}/dev/vfio/[0-9]*")]
    vendors = map(pathlib.Path, glob.glob(f"{root}/sys/bus/pci/devices/*/vendor"))
    return bool(drivers) and any(file.read_text().strip() == GOOGLE for file in vendors)


def read_metadata(key: str, host: str) -> str | None:
    """An attribute of this machine, asked from the metadata server; None where it has no such attribute.

    Raises:
      Trouble: the server does not answer. A guess would let every host draw everything.
    """
    url = f"http://{host}/computeMetadata/v1/instance/attributes/{key}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is never behind a proxy
    for again in reversed(range(METADATA_TRIES)):
        try:
            with opener.open(request, timeout=METADATA_TIMEOUT) as reply:
                return reply.read().decode()
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            problem = str(error)
        except (OSError, http.client.HTTPException) as error:
            problem = str(getattr(error, "reason", error))
        if again:
            time.sleep(METADATA_PAUSE)
    raise Trouble(
        f"this machine has a TPU, but its metadata server {host} does not say {key} ({problem}); "
        "write --processes and --process_id"
    )


def find_processes(
    processes: int | None,
    process_id: int | None,
    environ: Environ = os.environ,
    metadata: Callable[[str], str | None] = tpu_metadata,
    array: bool = True,
) -> Processes:
    """Which of how many processes this is: what was told by hand, else what the cluster says, else 0 of 1.

    Agrees with what `jax.distributed` finds out for itself, and knows SLURM arrays beside.

    Args:
      processes: of all, as told by hand.
      process_id: of this one, likewise.
      metadata: key -> what the metadata server of a TPU VM says.
      array: whether the tasks of a SLURM array share the work. They are jobs of their own, which need not run
        at the same time, so that they cannot compute together.

    Raises:
      UserError: one number without the other, a number out of range, or an environment that contradicts
        itself.
    """
    if processes is not None or process_id is not None:
        return _told(processes, process_id)
    # Open MPI before SLURM: its daemons are a step of their own, with one task a node.
    inside = _open_mpi(environ) or _slurm_step(environ)
    if array and (tasks := _slurm_array(environ)):
        return _inside(tasks, inside or Processes(0, 1, ""), "SLURM array")
    found = inside or _kubernetes(environ) or _tpu_environment(environ) or _tpu_vm(environ, metadata)
    return found or Processes(0, 1, "alone")


def _told(processes: int | None, process_id: int | None) -> Processes:
    if processes is None or process_id is None:
        raise UserError("--processes and --process_id go together: write both, or neither")
    if processes < 1:
        raise UserError(f"--processes={processes}: write a number from 1")
    if not 0 <= process_id < processes:
        raise UserError(f"--process_id={process_id}: write 0 to {processes - 1}, one for each process")
    return Processes(process_id, processes, "--process_id")


def _inside(outer: Processes, inner: Processes, source: str) -> Processes:
    """Number and count, where each of `outer` is made of as many as `inner` counts."""
    return Processes(outer.id * inner.count + inner.id, outer.count * inner.count, source)


def _number(environ: Environ, name: str, source: str) -> int:
    """A variable that has to be there."""
    text = environ.get(name, "")
    if not (text.strip().isascii() and text.strip().isdigit()):
        raise UserError(
            f"{name}={text!r} should be a whole number ({source}); "
            "correct it, or write --processes and --process_id"
        )
    return int(text)


def _pair(environ: Environ, number: str, count: str, source: str) -> Processes:
    found = Processes(_number(environ, number, source), _number(environ, count, source), source)
    if found.id >= found.count:
        raise UserError(
            f"{number}={found.id} and {count}={found.count} contradict each other ({source}); "
            "correct them, or write --processes and --process_id"
        )
    return found


def _open_mpi(environ: Environ) -> Processes | None:
    if "OMPI_COMM_WORLD_RANK" not in environ:
        return None
    return _pair(environ, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "Open MPI")


def _slurm_step(environ: Environ) -> Processes | None:
    # A batch script without srun has SLURM_PROCID=0 and the SLURM_NTASKS of what it could start.
    if "SLURM_STEP_ID" not in environ or "SLURM_PROCID" not in environ:
        return None
    of_step = "SLURM_STEP_NUM_TASKS" in environ
    return _pair(environ, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS" if of_step else "SLURM_NTASKS", "SLURM step")


def _slurm_array(environ: Environ) -> Processes | None:
    if "SLURM_ARRAY_TASK_ID" not in environ:
        return None
    names = ("ID", "MIN", "MAX", "COUNT", "STEP")
    values = {name: _number(environ, f"SLURM_ARRAY_TASK_{name}", "SLURM array") for name in names}
    step = max(values["STEP"], 1)
    number, odd = divmod(values["ID"] - values["MIN"], step)
    regular = (values["MAX"] - values["MIN"]) // step + 1 == values["COUNT"]
    if odd or not regular or not 0 <= number < values["COUNT"]:
        raise UserError(
            f"SLURM_ARRAY_TASK_ID={values['ID']} is of an array with gaps; "
            "write sbatch --array=0-7 or the like, or --elastic"
        )
    return Processes(number, values["COUNT"], "SLURM array")


def _kubernetes(environ: Environ) -> Processes | None:
    pod = None
    if "JOB_COMPLETIONS" in environ:
        pod = _pair(environ, "JOB_COMPLETION_INDEX", "JOB_COMPLETIONS", "Kubernetes Job")
    elif "JOB_COMPLETION_INDEX" in environ and not _hosts(environ):
        raise UserError(
            "JOB_COMPLETION_INDEX says that this pod is one of several, but not of how many; "
            "set JOB_COMPLETIONS too, or write --processes and --process_id"
        )
    if "JOBSET_JOB_INDEX" not in environ:
        return pod
    job = _pair(environ, "JOBSET_JOB_INDEX", "JOBSET_JOBS", "JobSet")
    return _inside(job, pod or _tpu_hosts(environ) or Processes(0, 1, ""), "JobSet")


def _hosts(environ: Environ) -> str:
    """The hosts of this TPU slice, with commas between; '' where the environment does not say."""
    return environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES") or ""


def _tpu_hosts(environ: Environ) -> Processes | None:
    hosts = _hosts(environ)
    if not hosts:
        return None
    counted = {"hosts": str(hosts.count(",") + 1), "TPU_WORKER_ID": "0"}
    if "TPU_WORKER_ID" in environ or "," in hosts:
        counted["TPU_WORKER_ID"] = environ.get("TPU_WORKER_ID", "")
    return _pair(counted, "TPU_WORKER_ID", "hosts", "TPU")


def _tpu_environment(environ: Environ) -> Processes | None:
    host = _tpu_hosts(environ)
    return host and _inside(_slice(environ), host, "TPU")


def _tpu_vm(environ: Environ, metadata: Callable[[str], str | None]) -> Processes | None:
    number = metadata("agent-worker-number")
    if number is None:
        return None
    hosts = metadata("worker-network-endpoints") or ""
    known = {"agent-worker-number": number, "hosts": str(hosts.count(",") + 1)}
    host = _pair(known, "agent-worker-number", "hosts", "TPU VM")
    # Lines such as MEGASCALE_NUM_SLICES: '2'
    lines = (line.partition(":") for line in (metadata("tpu-env") or "").splitlines())
    of_slice = {name.strip(): value.strip().strip("'") for name, _, value in lines}
    return _inside(_slice({**of_slice, **environ}), host, "TPU VM")


def _slice(environ: Environ) -> Processes:
    """Which slice of a multislice TPU this is."""
    if not environ.get("MEGASCALE_NUM_SLICES"):
        return Processes(0, 1, "")
    return _pair(
        {"MEGASCALE_SLICE_ID": "0", **environ}, "MEGASCALE_SLICE_ID", "MEGASCALE_NUM_SLICES", "TPU slice"
    )
