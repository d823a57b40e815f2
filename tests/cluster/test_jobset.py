"""jobset.yaml against the published schema of JobSet, Job and Pod; and what a schema cannot know."""

import copy
import pathlib
import re

import jsonschema
import pytest
import yaml
from kubeflow_trainer_api.models import JobsetV1alpha2JobSet

from engine.jobs.processes import find_processes
from launch import generate

FILE = pathlib.Path(__file__).parents[2] / "launch/cluster/jobset.yaml"


def strict(schema):
    """The schema, where what it does not name is an error, and nothing may be null.

    It comes from models made from the OpenAPI document, which wrap a quantity (2 or "2Gi") in a class.
    """
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if "actual_instance" in schema.get("properties", {}):
        return {"type": ["string", "number"]}
    if "anyOf" in schema:  # a type, or null
        (kind,) = [each for each in schema["anyOf"] if each != {"type": "null"}]
        return strict(kind) | {"description": schema["description"]}
    closed = {"additionalProperties": False} if "properties" in schema else {}
    return closed | {key: strict(value) for key, value in schema.items()}


SCHEMA = strict(JobsetV1alpha2JobSet.model_json_schema(by_alias=True))
DOCUMENT = yaml.safe_load(FILE.read_text())
(WORKER,) = DOCUMENT["spec"]["replicatedJobs"]
JOB = WORKER["template"]["spec"]
POD = JOB["template"]["spec"]
(CONTAINER,) = POD["containers"]


def problems(document):
    """What the schema says against it: paths and words."""
    errors = jsonschema.Draft202012Validator(SCHEMA).iter_errors(document)
    return [f"{error.json_path}: {error.message[:200]}" for error in errors]


def test_is_a_jobset():
    assert not problems(DOCUMENT)
    assert (DOCUMENT["apiVersion"], DOCUMENT["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")


IN_WORKER = ("spec", "replicatedJobs", 0)
IN_JOB = (*IN_WORKER, "template", "spec")
IN_POD = (*IN_JOB, "template", "spec")
IN_CONTAINER = (*IN_POD, "containers", 0)
GONE = object()
MISTAKES = {
    "misspelt, in the JobSet": ("spec", "failurePolicy", "maxRestart", 3),
    "misspelt, in its worker": (*IN_WORKER, "replica", 4),
    "misspelt, in the Job": (*IN_JOB, "backofLimit", 6),
    "misspelt, in the Pod": (*IN_POD, "nodeselector", {}),
    "misspelt, in the container": (*IN_CONTAINER, "arguments", []),
    "in the wrong place": ("spec", "completions", 1),
    "a text for a number": (*IN_WORKER, "replicas", "4"),
    "a fraction for a number": (*IN_JOB, "completions", 1.5),
    "a number for a text": (*IN_CONTAINER, "env", 2, "value", 1),
    "true for a text": (*IN_POD, "nodeSelector", "cloud.google.com/gke-spot", True),
    "a text for a list": (*IN_CONTAINER, "command", "python -m launch.generate"),
    "a text for true": (*IN_CONTAINER, "volumeMounts", 0, "readOnly", "true"),
    "a list for a quantity": (*IN_CONTAINER, "resources", "limits", "google.com/tpu", [4]),
    "nothing for a list": (*IN_CONTAINER, "args", None),
    "no template": (*IN_WORKER, "template", GONE),
    "no name of the worker": (*IN_WORKER, "name", GONE),
    "no Pod": (*IN_JOB, "template", GONE),
    "no containers": (*IN_POD, "containers", GONE),
    "no name of the container": (*IN_CONTAINER, "name", GONE),
    "no field": (*IN_CONTAINER, "env", 0, "valueFrom", "fieldRef", "fieldPath", GONE),
    "no action of the JobSet": ("spec", "failurePolicy", "rules", 0, "action", GONE),
    "no action of the Job": (*IN_JOB, "podFailurePolicy", "rules", 0, "action", GONE),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_the_schema_finds_a_mistake(mistake):
    *path, last, value = mistake
    document = copy.deepcopy(DOCUMENT)
    place = document
    for key in path:
        place = place[key]
    if value is GONE:
        del place[last]
    else:
        place[last] = value
    (problem,) = problems(document)
    assert last in problem


def words_for(name, field):
    """What the schema says that a field means."""
    return SCHEMA["$defs"][name]["properties"][field]["description"]


def test_words_that_stand_for_a_choice_are_known():
    for rule in DOCUMENT["spec"]["failurePolicy"]["rules"]:
        assert rule["action"] in words_for("JobsetV1alpha2FailurePolicyRule", "action")
    for rule in JOB["podFailurePolicy"]["rules"]:
        assert rule["action"] in words_for("IoK8sApiBatchV1PodFailurePolicyRule", "action")
    assert JOB["completionMode"] in words_for("IoK8sApiBatchV1JobSpec", "completionMode")
    assert POD["restartPolicy"] in words_for("IoK8sApiCoreV1PodSpec", "restartPolicy")


def test_names_that_point_to_each_other():
    assert JOB["podFailurePolicy"]["rules"][1]["onExitCodes"]["containerName"] == CONTAINER["name"]
    assert [mount["name"] for mount in CONTAINER["volumeMounts"]] == [
        volume["name"] for volume in POD["volumes"]
    ]
    assert CONTAINER["resources"]["limits"] == CONTAINER["resources"]["requests"]


def test_waits_in_a_queue_and_a_lost_worker_is_only_that():
    assert "kueue.x-k8s.io/queue-name" in DOCUMENT["metadata"]["labels"]
    assert JOB["podFailurePolicy"]["rules"][0] == {
        "action": "Ignore",
        "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
    }
    assert POD["restartPolicy"] == "Never"  # no podFailurePolicy with another
    assert JOB["backoffLimit"] > 0  # or one crash would take all workers down
    assert POD["terminationGracePeriodSeconds"] >= 15


def test_runs_python_without_a_shell_that_would_swallow_signals():
    assert CONTAINER["command"] == ["python", "-u", "-m", "launch.generate"]


def test_the_arguments_are_those_of_the_program():
    given, other = generate.read_command(CONTAINER["args"])
    assert given["elastic"] and given["out"].startswith("gs://") and "seed" in given
    assert not other


def test_every_worker_finds_its_part_without_elastic():
    found = [
        find_processes(None, None, environment(index, pod), lambda key: None)
        for index in range(WORKER["replicas"])
        for pod in range(JOB["completions"])
    ]
    assert [part.id for part in found] == list(range(len(found)))
    assert {part.count for part in found} == {len(found)}


def environment(index, pod):
    """Of a container: what the file says, the labels that JobSet sets, and what Kubernetes and GKE add."""
    labels = {
        "jobset.sigs.k8s.io/job-index": str(index),
        "jobset.sigs.k8s.io/replicatedjob-replicas": str(WORKER["replicas"]),
    }
    environ = {"JOB_COMPLETION_INDEX": str(pod), "TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost"}
    for entry in CONTAINER["env"]:
        environ[entry["name"]] = entry.get("value") or labels[label_of(entry["valueFrom"])]
    return environ


def label_of(source):
    return re.fullmatch(r"metadata\.labels\['(.+)'\]", source["fieldRef"]["fieldPath"]).group(1)
