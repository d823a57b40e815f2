"""Our batch script in a real SLURM of two nodes: lost nodes, preemption, mistakes, arrays."""

import os
import pathlib
import subprocess
import sys

import pytest

from tests.cluster import slurm
from tests.tiny import tiny_folder

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / "launch/cluster/slurm.sh"
SHARDS = 40
pytestmark = pytest.mark.skipif(bool(slurm.missing()), reason=slurm.missing())


@pytest.fixture(scope="module")
def daemons(tmp_path_factory):
    with slurm.cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture
def cluster(daemons):
    """Without jobs."""
    yield daemons
    daemons.end_jobs()


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """Of a job of small pictures for launch.generate; --steps says how long it takes."""
    folder = tmp_path_factory.mktemp("job")
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(f"a red fox, {number} times" for number in range(2 * SHARDS)))
    model = tiny_folder(folder / "tiny")
    flags = {
        "prompts_file": prompts,
        "model": model,
        "shard_size": 2,
        "batch_size": 2,
        "seed": 7,
    }
    return [f"--{name}={value}" for name, value in flags.items()]


def submit(cluster, log, *arguments, python=sys.executable, options=("--nodes=2",), script=SCRIPT):
    """sbatch; returns the number of the job."""
    settings = {
        "FOGSCULPT_PYTHON": python,
        "PYTHONPATH": ROOT,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false",
    }
    export = ",".join(["ALL", *(f"{name}={value}" for name, value in settings.items())])
    where = (f"--output={log}", f"--chdir={log.parent}", f"--export={export}", "--time=10")
    return cluster.run("sbatch", "--parsable", *where, *options, script, *arguments)


def shards(out):
    """Numbers of those that are done."""
    return {int(file.stem) for file in out.glob("manifests/*.json")}


def wait_until_at_work(cluster, job, log, done):
    """Waits until both nodes are at work and `done` is true."""
    try:
        slurm.wait_for("first shards", lambda: done() and all(map(cluster.tasks, slurm.NODES)), 90)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{cluster.job(job)}\n{log.read_text()}") from None


def check_complete(cluster, job, log, out):
    assert cluster.wait_for_state(job, "COMPLETED", "FAILED", seconds=400)["JobState"] == "COMPLETED", (
        log.read_text()
    )
    assert cluster.job(job)["Restarts"] == "1"
    assert "shards are done" in log.read_text()  # says the second start
    assert shards(out) == set(range(SHARDS))
    command = [sys.executable, "-m", "launch.generate", "--verify", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_job_outlives_a_lost_node(cluster, arguments, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    job = submit(cluster, log, *arguments, f"--out={out}", "--steps=150")

    def of_n2():
        return {number for number in shards(out) if number % 2}

    wait_until_at_work(cluster, job, log, of_n2)
    cluster.lose_node("n2")
    slurm.wait_for("back in the queue", lambda: cluster.job(job)["Restarts"] == "1", 120)
    assert len(of_n2()) < SHARDS // 2
    assert cluster.node_state("n2").startswith("DOWN")
    cluster.start_node("n2")
    check_complete(cluster, job, log, out)


def test_a_preempted_job_stops_cleanly_and_goes_on(cluster, arguments, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    job = submit(cluster, log, *arguments, f"--out={out}", "--steps=300", "--elastic", "--lease=5")
    wait_until_at_work(cluster, job, log, lambda: shards(out))
    submit_urgent(cluster, tmp_path)
    slurm.wait_for("back in the queue", lambda: cluster.job(job)["Restarts"] == "1", 60)
    assert 0 < len(shards(out)) < SHARDS
    assert log.read_text().count("the same command goes on") == 2  # says every worker that stops cleanly
    assert "stopped with exit code 143: back into the queue" in log.read_text()
    check_complete(cluster, job, log, out)


def submit_urgent(cluster, folder):
    """A short job that takes both nodes from others."""
    options = ("--partition=urgent", "--nodes=2")
    return submit(cluster, folder / "urgent", options=options, script="--wrap=true")


def stand_in(folder, text):
    """A program to run in place of python."""
    file = folder / "python"
    file.write_text(f"#!/bin/bash\n{text}\n")
    file.chmod(0o755)
    return file


STOPS = """
trap 'exit {code}' TERM
echo up ${{SLURM_ARRAY_TASK_ID-}}
for i in $(seq 600); do sleep 0.1; done"""


def submit_standing(cluster, folder, *options, code=143, nodes=2):
    """A job that only waits for SIGTERM, and then exits with the code; returns once it runs."""
    python = stand_in(folder, STOPS.format(code=code))
    job = submit(cluster, folder / "log", python=python, options=(f"--nodes={nodes}", *options))
    slurm.wait_for("start", lambda: starts(folder) == nodes)
    return job


def starts(folder):
    return log_of(folder).count(": up")


@pytest.mark.parametrize(("code", "restarts"), [(143, "1"), (0, "0"), (1, "0"), (2, "0")])
def test_near_its_time_limit_only_a_job_that_has_more_to_do_goes_back(cluster, tmp_path, code, restarts):
    job = submit_standing(cluster, tmp_path, code=code)
    cluster.run("scancel", "--signal=TERM", "--batch", job)  # as --signal=B:TERM@60 does
    if restarts == "1":
        slurm.wait_for("second start", lambda: starts(tmp_path) == 4)
        assert log_of(tmp_path).count("back into the queue") == 1
    else:
        assert cluster.wait_for_state(job, "COMPLETED", "FAILED")["ExitCode"] == f"{code}:0"
    assert cluster.job(job)["Restarts"] == restarts


def test_a_job_preempted_without_grace_goes_back_once(cluster, tmp_path):
    job = submit_standing(cluster, tmp_path, "--partition=no_grace")
    cluster.wait_for_state(submit_urgent(cluster, tmp_path), "COMPLETED")
    slurm.wait_for("second start", lambda: starts(tmp_path) == 4)
    assert cluster.job(job)["Restarts"] == "1"
    assert "back into the queue" not in log_of(tmp_path)  # SLURM itself has put it there


def test_one_job_of_an_array_goes_back_alone(cluster, tmp_path):
    python = stand_in(tmp_path, STOPS.format(code=143))
    array = submit(cluster, tmp_path / "log", python=python, options=("--array=0-1",))
    slurm.wait_for("start of both", lambda: starts(tmp_path) == 2)

    last = next(
        task for task in (0, 1) if cluster.job(f"{array}_{task}")["JobId"] == array
    )  # an alias of all
    cluster.run("scancel", "--signal=TERM", "--batch", f"{array}_{last}")
    slurm.wait_for("second start", lambda: log_of(tmp_path).count(f"up {last}") == 2)
    assert [cluster.job(f"{array}_{task}")["Restarts"] for task in (last, 1 - last)] == ["1", "0"]


def log_of(folder):
    log = folder / "log"
    return log.read_text() if log.exists() else ""


@pytest.mark.parametrize("how", [(), ("--full",)], ids=["", "full"])
def test_a_cancelled_job_stays_away(cluster, tmp_path, how):
    job = submit_standing(cluster, tmp_path)
    cluster.run("scancel", *how, job)
    assert cluster.wait_for_state(job, "CANCELLED")["Restarts"] == "0"
    slurm.wait_for("end", lambda: not any(map(cluster.tasks, slurm.NODES)))
    assert "back into the queue" not in log_of(tmp_path)


def test_a_mistake_ends_the_job(cluster, tmp_path):
    job = submit(cluster, tmp_path / "log", "--no_such_flag")
    ended = cluster.wait_for_state(job, "FAILED", "COMPLETED")
    assert (ended["ExitCode"], ended["Restarts"]) == ("2:0", "0")
    assert "unknown flag --no_such_flag" in log_of(tmp_path)


FIND = """exec {python} -c '
from engine.jobs.processes import find_processes
found = find_processes(None, None)
print("found", found.id, found.count, found.source, flush=True)'"""


def found(folder):
    return sorted(line.partition("found ")[2] for line in log_of(folder).splitlines() if "found" in line)


def test_every_task_of_a_step_finds_its_part(cluster, tmp_path):
    python = stand_in(tmp_path, FIND.format(python=sys.executable))
    cluster.wait_for_state(submit(cluster, tmp_path / "log", python=python), "COMPLETED")
    assert found(tmp_path) == ["0 2 SLURM step", "1 2 SLURM step"]


def test_every_job_of_an_array_finds_its_part(cluster, tmp_path):
    python = stand_in(tmp_path, FIND.format(python=sys.executable))
    submit(cluster, tmp_path / "log", python=python, options=("--array=3-7:2",))
    slurm.wait_for("all three", lambda: len(found(tmp_path)) == 3)
    assert found(tmp_path) == ["0 3 SLURM array", "1 3 SLURM array", "2 3 SLURM array"]


def test_a_batch_script_without_srun_is_one_process(cluster, tmp_path):
    script = stand_in(tmp_path, FIND.format(python=sys.executable))
    job = submit(cluster, tmp_path / "log", script=script, options=("--nodes=2", "--ntasks=2"))
    cluster.wait_for_state(job, "COMPLETED")
    assert found(tmp_path) == ["0 1 alone"]
