"""tpu_vm.sh with a stand-in for gcloud: what it asks for, in which order, and what each answer leads to."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from engine.loading import SHIPPED
from tests.cluster import gcloud

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / "launch/cluster/tpu_vm.sh"
WHERE = ["--name", "fog", "--zone", "us-west4-a"]
JOB = ["--prompts_file", "prompts.csv", "--out", "gs://bucket/out", "--elastic"]
DRAWN = ["scp", "ssh", "ssh"]  # files, installation, job


class Cloud:
    """A folder for the stand-in, the only gcloud there, and a copy of the script with little around it."""

    def __init__(self, folder, hosts=2):
        self.folder = folder
        source = folder / "source"
        for name in ("engine", "configs", "launch/cluster"):
            (source / name).mkdir(parents=True)
        for name in ("setup.py", "pyproject.toml", "README.md"):
            (source / name).touch()
        self.script = shutil.copy(SCRIPT, source / "launch/cluster")
        for number in range(hosts):
            (folder / f"host-{number}").mkdir()
        (folder / "bin").mkdir()
        file = folder / "bin/gcloud"
        file.write_text(f'#!/bin/sh\nexec {sys.executable} {gcloud.__file__} {folder} "$@"\n')
        file.chmod(0o755)
        self.plan()

    def plan(self, requests=("ACTIVE",), vms=("READY",), exit_codes=(0,)):
        """Answers, one after the other, to `queued-resources list` and `tpu-vm list`; and ends of the job."""
        steps = {"queued-resources": requests, "tpu-vm": vms, "exit codes": exit_codes}
        (self.folder / "plan.json").write_text(json.dumps(steps))

    def run(self, *arguments, script=None):
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        return subprocess.run(
            [script or self.script, *map(str, arguments)],
            env={**os.environ, "PATH": path, "FOGSCULPT_POLL": "0"},
            capture_output=True,
            text=True,
            timeout=60,
        )

    def calls(self):
        file = self.folder / "calls.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def verbs(self):
        """The calls that change something."""
        return [call[3] for call in self.calls() if call[3] != "list"]

    def call(self, verb):
        return next(call for call in self.calls() if call[3] == verb)

    def drawn(self, host=0):
        """What the job was started with on a host."""
        arguments = (self.folder / f"host-{host}/arguments").read_text().split("\0")[:-1]
        assert arguments[:3] == ["-u", "-m", "launch.generate"]
        return arguments[3:]


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


def test_from_asking_to_the_last_picture(cloud):
    cloud.plan(["", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"], ["CREATING", "READY"])
    done = cloud.run("run", *WHERE, "--", *JOB)
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == ["create", *DRAWN]
    assert cloud.call("create") == [
        *("compute", "tpus", "queued-resources", "create", "fog", "--zone=us-west4-a", "--node-id=fog"),
        *("--accelerator-type=v5litepod-8", "--runtime-version=v2-alpha-tpuv5-lite", "--spot", "--quiet"),
    ]
    told = [line.removeprefix("tpu_vm: ") for line in done.stderr.splitlines() if "tpu_vm: " in line]
    assert told == [
        "fog: asking for v5litepod-8 in us-west4-a",
        "fog: ACCEPTED",
        "fog: WAITING_FOR_RESOURCES",
        "fog: PROVISIONING",
        "fog: ACTIVE CREATING",
        "fog: ACTIVE",
        "installing fogsculpt",
        "drawing",
        "all done",
        f"the TPU is there until: {cloud.script} delete --name fog --zone=us-west4-a",
    ]


def test_every_host_gets_everything_and_runs_the_job(cloud):
    assert cloud.run("run", *WHERE, "--", *JOB, script=SCRIPT).returncode == 0
    for call in cloud.calls():
        assert call[3] not in ("scp", "ssh") or "--worker=all" in call
    for number in (0, 1):
        home = cloud.folder / f"host-{number}"
        assert (home / "fogsculpt" / SHIPPED.relative_to(ROOT) / "model_index.json").exists()
        assert (home / "fogsculpt/setup.py").exists()
        assert not list((home / "fogsculpt").rglob("__pycache__"))
        venv, install = (home / "installed").read_text().splitlines()
        assert venv == "uv venv --quiet --allow-existing --python 3.12 fogsculpt-venv"
        assert install.startswith("uv pip install ") and install.endswith(" ./fogsculpt[tpu,jobs,quantize]")
        assert cloud.drawn(number) == JOB


def test_nothing_is_lost_on_the_way_to_the_hosts(cloud, tmp_path):
    prompts = tmp_path / "my prompts.csv"
    prompts.write_text("a fox\n")
    model = tmp_path / "my model"
    (model / "unet").mkdir(parents=True)
    job = [
        *("--prompts_file=my prompts.csv", "--out=gs://bucket/a  b", "--model", "my model"),
        *("--negative_prompt", 'it\'s "blurred", $HOME `id` \\ *\n#grün; --', ""),
    ]
    done = cloud.run("run", *WHERE, "--copy", prompts, f"--copy={model}", "--", *job)
    assert done.returncode == 0, done.stderr
    for number in (0, 1):
        assert (cloud.folder / f"host-{number}/my prompts.csv").read_text() == "a fox\n"
        assert (cloud.folder / f"host-{number}/my model/unet").is_dir()
        assert cloud.drawn(number) == job


def test_options_of_the_request(cloud):
    cloud.plan(["", "ACTIVE"])
    options = [
        "--project=p",
        "--accelerator-type",
        "v6e-16",
        "--runtime-version=v2-alpha-tpuv6e",
        "--on-demand",
    ]
    flags = ["--create-flag=--service-account=a@b", "--create-flag", "--labels=team=my team"]
    assert cloud.run("run", *WHERE, *options, *flags, "--", *JOB).returncode == 0
    assert cloud.call("create")[5:] == [
        *("--project=p", "--zone=us-west4-a", "--node-id=fog", "--accelerator-type=v6e-16"),
        *("--runtime-version=v2-alpha-tpuv6e", "--service-account=a@b", "--labels=team=my team", "--quiet"),
    ]
    assert all("--project=p" in call and "--zone=us-west4-a" in call for call in cloud.calls())


def test_a_tpu_that_is_there_is_used(cloud):
    assert cloud.run("run", *WHERE, "--", *JOB).returncode == 0
    assert cloud.verbs() == DRAWN


@pytest.mark.parametrize(
    "requests, vms",
    [
        (["SUSPENDED", "", "ACTIVE"], ["READY"]),
        (["SUSPENDING", "SUSPENDED", "", "ACTIVE"], ["READY"]),
        (["DELETING", "", "ACCEPTED", "ACTIVE"], ["READY"]),
        (["ACTIVE", "", "ACTIVE"], ["PREEMPTED", "READY"]),
    ],
)
def test_after_a_preemption_another_is_asked_for(cloud, requests, vms):
    cloud.plan(requests, vms)
    done = cloud.run("run", *WHERE, "--", *JOB)
    assert done.returncode == 0, done.stderr
    given_back = [] if "DELETING" in requests else ["delete"]
    assert cloud.verbs() == [*given_back, "create", *DRAWN]


def test_preempted_while_it_draws(cloud):
    # Looks: before the job, after it, and while waiting.
    cloud.plan(["ACTIVE", "SUSPENDING", "SUSPENDING", "SUSPENDED", "", "ACTIVE"], ["READY"], [255, 0])
    done = cloud.run("run", *WHERE, "--", *JOB)
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == [*DRAWN, "delete", "create", *DRAWN]
    assert cloud.call("delete") == [
        *("compute", "tpus", "queued-resources", "delete", "fog", "--zone=us-west4-a", "--force", "--quiet")
    ]
    assert "the TPU fog was lost; what was drawn stays, and the job goes on" in done.stderr


def test_told_to_stop_before_the_preemption_is_seen(cloud):
    cloud.plan(["ACTIVE"], ["READY", "PREEMPTED", "READY"], [143, 0])
    done = cloud.run("run", *WHERE, "--", *JOB)
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == [*DRAWN, "delete", *DRAWN]


def test_a_request_that_failed(cloud):
    cloud.plan(["", "ACCEPTED", "FAILED"])
    done = cloud.run("run", *WHERE, "--", *JOB)
    assert done.returncode == 3
    assert cloud.verbs() == ["create"]
    *_, why, then = done.stderr.splitlines()
    assert why == (
        "tpu_vm: the request for fog has FAILED; this says why: "
        "gcloud compute tpus queued-resources describe fog --zone=us-west4-a"
    )
    assert then.endswith(f"{cloud.script} delete --name fog --zone=us-west4-a")


@pytest.mark.parametrize("code", [1, 2, 137, 255])
def test_the_exit_code_of_the_job(cloud, code):
    cloud.plan(exit_codes=[code])
    done = cloud.run("run", *WHERE, "--", *JOB)
    assert done.returncode == code
    assert cloud.verbs() == DRAWN
    assert ("no connection to fog" if code == 255 else f"ended with exit code {code}") in done.stderr


def test_gcloud_that_fails(cloud):
    (cloud.folder / "bin/gcloud").write_text("#!/bin/sh\necho 'ERROR: no account' >&2\nexit 1\n")
    done = cloud.run("run", *WHERE, "--", *JOB)
    assert done.returncode == 1
    assert done.stderr == "ERROR: no account\n"


def test_delete(cloud):
    done = cloud.run("delete", *WHERE, "--project", "p")
    assert done.returncode == 0, done.stderr
    assert cloud.calls() == [
        [
            *("compute", "tpus", "queued-resources", "delete", "fog"),
            *("--project=p", "--zone=us-west4-a", "--force", "--quiet"),
        ]
    ]


def test_a_worker_that_outlived_its_connection_is_stopped_first(tmp_path):
    cloud = Cloud(tmp_path, hosts=1)
    with subprocess.Popen(["bash", "-c", "exec -a launch.generate sleep 100"]) as left:
        (tmp_path / "host-0/fogsculpt.pid").write_text(str(left.pid))
        assert cloud.run("run", *WHERE, "--", *JOB).returncode == 0
        assert left.wait(30) == -15
    assert int((tmp_path / "host-0/fogsculpt.pid").read_text()) != left.pid


def test_another_process_of_the_same_number_is_not(tmp_path):
    cloud = Cloud(tmp_path, hosts=1)
    with subprocess.Popen(["sleep", "100"]) as other:
        (tmp_path / "host-0/fogsculpt.pid").write_text(str(other.pid))
        assert cloud.run("run", *WHERE, "--", *JOB).returncode == 0
        assert other.poll() is None
        other.terminate()


MISTAKES = {
    "command": (["walk"], "walk is unknown; write run, delete or --help"),
    "no name": (["run", "--zone", "z", "--", *JOB], "--name ''"),
    "name": (["run", "--name", "Fog 1", "--zone", "z", "--", *JOB], "--name 'Fog 1': write small letters"),
    "no zone": (["run", "--name", "fog", "--", *JOB], "write --zone ZONE"),
    "no value": (["run", "--name"], "write a value after --name"),
    "option": (["run", *WHERE, "--zune", "z", "--", *JOB], "--zune is unknown"),
    "no --": (["run", *WHERE, *JOB], "-- goes before the arguments of the job"),
    "no job": (["run", *WHERE], "write -- --prompts_file FILE"),
    "a disk that goes": (
        ["run", *WHERE, "--", "--prompts_file=p.csv", "--out", "out"],
        "write --out gs://BUCKET/FOLDER",
    ),
    "no file": (["run", *WHERE, "--copy", "nowhere.csv", "--", *JOB], "--copy nowhere.csv: there is no such"),
    "delete what": (["delete", "--zone", "z"], "--name ''"),
}


@pytest.mark.parametrize("arguments, message", MISTAKES.values(), ids=MISTAKES)
def test_mistakes(cloud, arguments, message):
    done = cloud.run(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not cloud.calls()


@pytest.mark.parametrize("arguments", [["--help"], [], ["run", "--help"]])
def test_help(cloud, arguments):
    done = cloud.run(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    parsed = set(re.findall(r"^ +(--[a-z-]+)\)", SCRIPT.read_text(), re.M)) - {"--help"}
    assert set(re.findall(r"^  (--[a-z-]+)", done.stdout, re.M)) == parsed
    assert "#" not in done.stdout


@pytest.mark.skipif(not shutil.which("gcloud"), reason="no gcloud to ask whether it knows these calls")
def test_the_real_gcloud_knows_these_calls(cloud, tmp_path):
    cloud.plan(["SUSPENDED", "", "ACTIVE"])
    file = tmp_path / "a b.csv"
    file.touch()
    assert cloud.run("run", *WHERE, "--project=p", "--copy", file, "--", *JOB).returncode == 0
    assert {call[3] for call in cloud.calls()} == {"list", "delete", "create", "scp", "ssh"}
    # Without an account it reads its arguments, and goes no further.
    nobody = {
        "CLOUDSDK_CONFIG": str(tmp_path / "nobody"),
        "CLOUDSDK_CORE_DISABLE_USAGE_REPORTING": "true",
        "NO_GCE_CHECK": "true",
    }
    for call in {tuple(call[2:4]): call for call in cloud.calls()}.values():
        done = subprocess.run(
            ["gcloud", *call], env={**os.environ, **nobody}, capture_output=True, text=True, timeout=120
        )
        assert (done.returncode, "account selected" in done.stderr) == (1, True), done.stderr


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="no shellcheck")
@pytest.mark.parametrize("script", sorted(SCRIPT.parent.glob("*.sh")), ids=lambda script: script.name)
def test_shellcheck(script):
    done = subprocess.run(["shellcheck", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
