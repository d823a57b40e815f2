"""Which process of how many: every cluster of the table, held against what JAX finds where it can."""

import contextlib
import http.server
import threading
import time

import pytest
from jax._src.clusters import ClusterEnv, cloud_tpu_cluster

from engine.errors import UserError
from engine.jobs import processes
from engine.jobs.processes import Processes, find_processes, has_tpu, read_metadata, tpu_metadata
from engine.parallel import gpus_of_node

STEP = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_LOCALID": "0",
    "SLURM_PROCID": "1",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "2",
}
BATCH = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4"}
MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}
GKE = {"TPU_WORKER_ID": "2", "TPU_WORKER_HOSTNAMES": "a,b,c,d"}
SLICE = {"MEGASCALE_NUM_SLICES": "3", "MEGASCALE_SLICE_ID": "1"}
POD = {"JOB_COMPLETION_INDEX": "2", "JOB_COMPLETIONS": "4"}
JOBSET = {"JOBSET_JOB_INDEX": "1", "JOBSET_JOBS": "2"}


def array(number, first, last, count, step):
    values = {"ID": number, "MIN": first, "MAX": last, "COUNT": count, "STEP": step}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items()}


def nothing(key):
    """What the metadata server says on a machine without a TPU."""
    return None


# What JAX looks for, too.
SHARED = {
    "alone": ({}, (0, 1, "alone")),
    "a step of SLURM": (STEP, (1, 2, "SLURM step")),
    "a batch script without srun": (BATCH, (0, 1, "alone")),
    "Open MPI": (MPI, (3, 8, "Open MPI")),
    "Open MPI, its daemons a step of SLURM": (
        MPI | STEP | {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"},
        (3, 8, "Open MPI"),
    ),
    "a TPU host on GKE": ({"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost"}, (0, 1, "TPU")),
    "one of four TPU hosts on GKE": (GKE, (2, 4, "TPU")),
    "TPU processes with addresses": (
        {"TPU_WORKER_ID": "1", "TPU_PROCESS_ADDRESSES": "a:8476,b:8476", "TPU_WORKER_HOSTNAMES": "a"},
        (1, 2, "TPU"),
    ),
    "a multislice TPU": (GKE | SLICE, (6, 12, "TPU")),
    "slices of one host": (
        SLICE | {"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost"},
        (1, 3, "TPU"),
    ),
}
# What JAX does not know, asks Kubernetes for, or cannot need.
OURS = {
    "an old SLURM": ({k: v for k, v in STEP.items() if k != "SLURM_STEP_NUM_TASKS"}, (1, 2, "SLURM step")),
    "a step smaller than its job": (STEP | {"SLURM_NTASKS": "9"}, (1, 2, "SLURM step")),
    "an array": (BATCH | array(2, 0, 3, 4, 1), (2, 4, "SLURM array")),
    "an array from 3 in steps of 2": (array(7, 3, 7, 3, 2), (2, 3, "SLURM array")),
    "an array of one": (array(5, 5, 5, 1, 1), (0, 1, "SLURM array")),
    "an array of steps": (STEP | array(3, 0, 3, 4, 1), (7, 8, "SLURM array")),
    "an array of Open MPI": (MPI | array(1, 1, 2, 2, 1), (3, 16, "SLURM array")),
    "a Kubernetes Job": (POD, (2, 4, "Kubernetes Job")),
    "a JobSet of single pods": (JOBSET, (1, 2, "JobSet")),
    "a JobSet of Jobs": (JOBSET | POD, (6, 8, "JobSet")),
    "our jobset.yaml": (
        JOBSET
        | {"JOB_COMPLETION_INDEX": "0", "JOB_COMPLETIONS": "1"}
        | {"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost"},
        (1, 2, "JobSet"),
    ),
    "a JobSet of TPU slices": (JOBSET | GKE | SLICE | {"JOB_COMPLETION_INDEX": "2"}, (6, 8, "JobSet")),
    "a Job of TPU hosts": (GKE | {"JOB_COMPLETION_INDEX": "2"}, (2, 4, "TPU")),
    "one TPU host without a number": ({"TPU_WORKER_HOSTNAMES": "localhost"}, (0, 1, "TPU")),
}
EVERY = SHARED | OURS


@pytest.mark.parametrize("environ, found", EVERY.values(), ids=EVERY)
def test_finds_its_part(environ, found):
    assert find_processes(None, None, environ, nothing) == Processes(*found)


def test_tasks_of_an_array_that_do_not_work_together():
    environ = array(3, 0, 7, 8, 1)
    assert find_processes(None, None, environ, nothing).count == 8
    assert find_processes(None, None, environ, nothing, array=False) == Processes(0, 1, "alone")


@pytest.mark.parametrize(
    ("environ", "found"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x4)", "SLURM_GPUS_ON_NODE": "8"}, [*range(8)]),
        ({"SLURM_STEP_TASKS_PER_NODE": "1", "CUDA_VISIBLE_DEVICES": "2,3"}, [0, 1]),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "CUDA_VISIBLE_DEVICES": "0,1,2"}, [0, 1, 2]),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x4)", "SLURM_GPUS_ON_NODE": "8"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x4)"}, None),
        ({}, None),
    ],
)
def test_the_only_task_of_a_node_has_all_its_gpus(environ, found):
    assert gpus_of_node(environ) == found


@pytest.mark.parametrize("environ", [environ for environ, _ in EVERY.values()], ids=EVERY)
def test_told_by_hand_goes_before_all(environ):
    assert find_processes(5, 4, environ, nothing) == Processes(4, 5, "--process_id")


@pytest.fixture
def jax_finds(monkeypatch):
    """environ -> what jax.distributed.initialize() would find there: (number, count), or None."""

    def find(environ):
        environ = {"TPU_SKIP_MDS_QUERY": "1", **NO_SLICES, **environ}
        if "GCE_METADATA_IP" in environ:  # and may be asked
            for name in ("TPU_SKIP_MDS_QUERY", *NO_SLICES):
                del environ[name]
        for name in NAMES - set(environ):
            monkeypatch.delenv(name, raising=False)
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
        kinds = (kind for kind in ClusterEnv._cluster_types if not kind.opt_in_only_method)
        kind = next((kind for kind in kinds if kind.is_env_present()), None)
        return kind and (kind.get_process_id(), kind.get_process_count())

    return find


NO_SLICES = {"MEGASCALE_NUM_SLICES": "1", "MEGASCALE_SLICE_ID": "0"}
NAMES = {name for environ, _ in EVERY.values() for name in environ} | {
    "TPU_SKIP_MDS_QUERY",
    "KUBERNETES_SERVICE_HOST",
}


@pytest.mark.parametrize("environ, found", SHARED.values(), ids=SHARED)
def test_agrees_with_jax(jax_finds, environ, found):
    number, count, source = found
    assert jax_finds(environ) == (None if source == "alone" else (number, count))


WRONG = {
    "no size": ({"OMPI_COMM_WORLD_RANK": "3"}, "OMPI_COMM_WORLD_SIZE='' should be a whole number (Open MPI)"),
    "no rank": (MPI | {"OMPI_COMM_WORLD_RANK": "-1"}, "OMPI_COMM_WORLD_RANK='-1' should be"),
    "not ASCII": (MPI | {"OMPI_COMM_WORLD_RANK": "٣"}, "OMPI_COMM_WORLD_RANK='٣' should be"),
    "too high": (
        STEP | {"SLURM_PROCID": "2"},
        "SLURM_PROCID=2 and SLURM_STEP_NUM_TASKS=2 contradict each other (SLURM step)",
    ),
    "none": (STEP | {"SLURM_STEP_NUM_TASKS": "0"}, "SLURM_PROCID=1 and SLURM_STEP_NUM_TASKS=0 contradict"),
    "gaps": (array(7, 0, 7, 3, 1), "SLURM_ARRAY_TASK_ID=7 is of an array with gaps"),
    "more gaps": (array(4, 1, 7, 4, 2), "SLURM_ARRAY_TASK_ID=4 is of an array with gaps"),
    "beside the array": (array(9, 0, 7, 8, 1), "SLURM_ARRAY_TASK_ID=9 is of an array with gaps"),
    "half an array": ({"SLURM_ARRAY_TASK_ID": "1"}, "SLURM_ARRAY_TASK_MIN='' should be"),
    "a pod of how many": ({"JOB_COMPLETION_INDEX": "0"}, "set JOB_COMPLETIONS too"),
    "a pod of how many, in a JobSet": (JOBSET | {"JOB_COMPLETION_INDEX": "0"}, "set JOB_COMPLETIONS too"),
    "not indexed": ({"JOB_COMPLETIONS": "4"}, "JOB_COMPLETION_INDEX='' should be"),
    "a Job of how many": ({"JOBSET_JOB_INDEX": "0"}, "JOBSET_JOBS='' should be a whole number (JobSet)"),
    "a Job too many": (JOBSET | {"JOBSET_JOBS": "1"}, "JOBSET_JOB_INDEX=1 and JOBSET_JOBS=1 contradict"),
    "which host": ({"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU_WORKER_ID='' should be a whole number (TPU)"),
    "no such host": (GKE | {"TPU_WORKER_ID": "4"}, "TPU_WORKER_ID=4 and hosts=4 contradict"),
    "no such slice": (
        GKE | SLICE | {"MEGASCALE_SLICE_ID": "3"},
        "MEGASCALE_SLICE_ID=3 and MEGASCALE_NUM_SLICES=3 contradict each other (TPU slice)",
    ),
}


@pytest.mark.parametrize("environ, message", WRONG.values(), ids=WRONG)
def test_an_environment_that_contradicts_itself(environ, message):
    with pytest.raises(UserError) as error:
        find_processes(None, None, environ, nothing)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert "--process" in str(error.value) or "--elastic" in str(error.value)


@pytest.mark.parametrize(
    "count, number, message",
    [
        (2, None, "write both"),
        (None, 1, "write both"),
        (0, 0, "--processes=0: write a number from 1"),
        (2, 2, "--process_id=2: write 0 to 1"),
        (2, -1, "--process_id=-1: write 0 to 1"),
    ],
)
def test_told_wrongly(count, number, message):
    with pytest.raises(UserError, match=message):
        find_processes(count, number, {}, nothing)


class Metadata(http.server.ThreadingHTTPServer):
    """The metadata server of a TPU VM, on this machine. Attributes that it does not have are 404."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.attributes = {}
        self.codes = []  # of the next answers
        self.delay = 0.0
        self.asked = []

    @property
    def host(self):
        return f"127.0.0.1:{self.server_port}"


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        key = self.path.removeprefix("/computeMetadata/v1/instance/attributes/")
        self.server.asked.append(key)
        time.sleep(self.server.delay)
        code = self.server.codes.pop(0) if self.server.codes else 200
        if self.headers["Metadata-Flavor"] != "Google":
            code = 403
        elif code == 200 and key not in self.server.attributes:
            code = 404
        with contextlib.suppress(ConnectionError):  # whoever asked may have given up
            self.send_response(code)
            self.end_headers()
            self.wfile.write(self.server.attributes.get(key, "<html>no such thing</html>").encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(processes, "METADATA_PAUSE", 0.01)
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    with Metadata() as server:
        monkeypatch.setenv("GCE_METADATA_IP", server.host)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def tpu(monkeypatch):
    monkeypatch.setattr(processes, "has_tpu", lambda: True)


ENDPOINTS = {
    "names": "t1v-n-0,t1v-n-1,t1v-n-2,t1v-n-3",
    "triples": "unknown:unknown:10.0.0.1,unknown:unknown:10.0.0.2,unknown:unknown:10.0.0.3,u:u:10.0.0.4",
}
TPU_ENV = "ACCELERATOR_TYPE: 'v5litepod-16'\nWORKER_ID: '2'\nZONE: 'us-central1-a'\n"


@pytest.mark.parametrize("endpoints", ENDPOINTS.values(), ids=ENDPOINTS)
@pytest.mark.parametrize(
    "env, found",
    [
        (TPU_ENV, (2, 4)),
        (TPU_ENV + "MEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n", (6, 8)),
    ],
    ids=["slice", "slices"],
)
def test_a_tpu_vm_asks_its_metadata_server_as_jax_does(server, tpu, jax_finds, endpoints, env, found):
    server.attributes = {
        "agent-worker-number": "2",
        "worker-network-endpoints": endpoints,
        "tpu-env": env,
    }
    assert find_processes(None, None, {}) == Processes(*found, "TPU VM")
    assert jax_finds({"GCE_METADATA_IP": server.host}) == found


def test_the_environment_goes_before_the_metadata_server(server, tpu):
    server.attributes = {"agent-worker-number": "2"}
    for environ, found in EVERY.values():
        if found[-1] != "alone":
            assert find_processes(None, None, environ) == Processes(*found)
    assert not server.asked


def test_a_tpu_vm_of_one_host(server, tpu):
    server.attributes = {"agent-worker-number": "0", "worker-network-endpoints": "t1v-n-0"}
    assert find_processes(None, None, {}) == Processes(0, 1, "TPU VM")


def test_slices_of_tpu_vms_by_environment(server, tpu):
    server.attributes = {"agent-worker-number": "1", "worker-network-endpoints": "a,b", "tpu-env": TPU_ENV}
    assert find_processes(None, None, SLICE) == Processes(3, 6, "TPU VM")


def test_a_machine_with_a_tpu_that_is_no_tpu_vm(server, tpu):
    assert find_processes(None, None, {}) == Processes(0, 1, "alone")
    assert server.asked == ["agent-worker-number"]


@pytest.mark.parametrize("number", ["", "two", "4"])
def test_a_tpu_vm_that_says_nonsense(server, tpu, number):
    server.attributes = {"agent-worker-number": number, "worker-network-endpoints": "a,b,c,d"}
    with pytest.raises(UserError, match=r"agent-worker-number=.*\(TPU VM\)"):
        find_processes(None, None, {})


def test_never_asks_without_a_tpu(server, monkeypatch):
    monkeypatch.setattr(processes, "has_tpu", lambda: False)
    server.attributes = {"agent-worker-number": "2"}
    assert find_processes(None, None, {}) == Processes(0, 1, "alone")
    assert not server.asked


def test_never_asks_where_it_should_not(server, tpu, monkeypatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    assert tpu_metadata("agent-worker-number") is None
    assert not server.asked


def test_never_asks_through_a_proxy(server, tpu, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    server.attributes = {"agent-worker-number": "2"}
    assert tpu_metadata("agent-worker-number") == "2"


def test_asks_again_after_an_error(server):
    server.attributes = {"agent-worker-number": "2"}
    server.codes = [503, 500]
    assert read_metadata("agent-worker-number", server.host) == "2"
    assert len(server.asked) == 3


def test_gives_up_after_some_errors(server):
    server.codes = [500] * 9
    with pytest.raises(UserError) as error:
        read_metadata("agent-worker-number", server.host)
    assert len(server.asked) == processes.METADATA_TRIES
    assert "does not say agent-worker-number (HTTP Error 500" in str(error.value)
    assert "write --processes and --process_id" in str(error.value)
    assert "\n" not in str(error.value)


def test_gives_up_on_a_server_that_says_nothing(server, monkeypatch):
    monkeypatch.setattr(processes, "METADATA_TIMEOUT", 0.05)
    server.delay = 0.5
    with pytest.raises(UserError, match="timed out"):
        read_metadata("agent-worker-number", server.host)


def test_gives_up_on_a_server_that_is_not_there(server):
    with Metadata() as gone:
        host = gone.host
    with pytest.raises(UserError, match="refused"):
        read_metadata("agent-worker-number", host)


@pytest.mark.parametrize(
    "files, found",
    [
        ({}, False),
        ({"dev/accel0": "", "sys/bus/pci/devices/0/vendor": "0x1ae0\n"}, True),
        (
            {
                "dev/vfio/0": "",
                "sys/bus/pci/devices/0/vendor": "0x8086\n",
                "sys/bus/pci/devices/1/vendor": "0x1ae0\n",
            },
            True,
        ),
        (
            {"dev/vfio/vfio": "", "sys/bus/pci/devices/0/vendor": "0x1ae0\n"},
            False,
        ),  # a network card of Google's
        ({"dev/vfio/0": "", "sys/bus/pci/devices/0/vendor": "0x10de\n"}, False),
        ({"dev/accel0": ""}, False),
    ],
)
def test_knows_a_tpu(tmp_path, files, found):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert has_tpu(str(tmp_path)) == found
