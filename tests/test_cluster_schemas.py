"""Every document of docs/clusters/kubernetes is held against its schema, and broken copies must be refused.

Core kinds by Kubernetes' own strict JSON Schema (kubernetes-validate), the JobSet by the models that
kubeflow-trainer-api makes from its OpenAPI text, the job in it by both. Also what a schema leaves open: words
of the JobSet, the `restricted` standard of pod security, the kustomization. No cluster and no network.
"""

from __future__ import annotations

import copy
import functools
import re
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet
from pydantic import ValidationError

from tests.cluster_examples import DOCUMENTS, FOLDER, JOBSET, PODS, ROOT, Document

KUBERNETES_VERSION = "1.37"
OLDEST_VERSION = "1.31"  # since when podFailurePolicy is stable
# Mere strings to the models. From api/jobset/v1alpha2/jobset_types.go of kubernetes-sigs/jobset, 08dfbdf.
RESTART_STRATEGIES = {"Recreate", "BlockingRecreate", "InPlaceRestart"}
FAILURE_ACTIONS = {
    "FailJobSet",
    *("RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts", "RestartJob", "RestartJobAndIgnoreMaxRestarts"),
}
FREE_KEYS = {"labels", "matchLabels", "selector", "limits", "requests", "data"}  # their keys are ours

Path = tuple[str | int, ...]


@pytest.fixture(autouse=True, scope="module")
def read_schemas_once() -> Iterator[None]:
    """Else each validation parses 1.8 MB of definitions."""
    with pytest.MonkeyPatch.context() as patch:
        contents = kubernetes_validate.utils.schema_contents
        patch.setattr(kubernetes_validate.utils, "schema_contents", functools.cache(contents))
        yield


def breaches(document: Document, version: str = KUBERNETES_VERSION) -> list[str]:
    """What its schema has against a document; an unknown field is a breach too."""
    if document["kind"] != "JobSet":
        try:
            kubernetes_validate.validate(document, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            return [f"{'.'.join(map(str, error.path))}: {error.message}"]
        return []
    try:
        understood = JobsetV1alpha2JobSet.from_dict(copy.deepcopy(document)).to_dict()
    except (ValidationError, AttributeError, TypeError, ValueError) as error:
        return [str(error)]
    found = [] if understood == document else ["a field was not understood, or a required one is missing"]
    for job in document["spec"]["replicatedJobs"]:
        found += breaches(
            {"apiVersion": "batch/v1", "kind": "Job", "metadata": {}, **job["template"]}, version
        )
    return found


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_document_is_what_its_schema_says(name: str) -> None:
    assert breaches(DOCUMENTS[name]) == []
    assert breaches(DOCUMENTS[name], OLDEST_VERSION) == []


def places(value: Any, kinds: type | tuple[type, ...], path: Path = ()) -> Iterator[Path]:
    """Paths of all values of these kinds, without those whose keys are ours."""
    if isinstance(value, kinds):
        yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        if key not in FREE_KEYS:
            yield from places(part, kinds, (*path, key))


def at(document: Any, path: Path) -> Any:
    for key in path:
        document = document[key]
    return document


def broken_copies(document: Document) -> Iterator[tuple[str, Document]]:
    """What is wrong, and a copy with it: fields that do not exist, wrong types, names that are missing."""
    mappings = list(places(document, dict))
    for path in {(), mappings[len(mappings) // 2], max(mappings, key=len)}:
        broken = copy.deepcopy(document)
        at(broken, path)["misspelt"] = "here"
        yield f"an unknown field in {path}", broken
    for path in [path for path in places(document, (bool, int)) if path[-1] != "port"][-3:]:
        broken = copy.deepcopy(document)
        at(broken, path[:-1])[path[-1]] = ["a list"]
        yield f"a list as {path}", broken
    for path in (path for path in mappings if path[-2:-1] == ("containers",)):
        broken = copy.deepcopy(document)
        del at(broken, path)["name"]
        yield f"no name in {path}", broken
    broken = copy.deepcopy(document)
    broken["metadata"]["name"] = 7
    yield "a number as name", broken


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_broken_copy_is_refused(name: str) -> None:
    for what, broken in broken_copies(DOCUMENTS[name]):
        assert breaches(broken), f"{what} passed"


def test_the_job_set_uses_words_that_its_controller_knows() -> None:
    policy = JOBSET["spec"]["failurePolicy"]
    assert policy["restartStrategy"] in RESTART_STRATEGIES
    assert {rule["action"] for rule in policy["rules"]} <= FAILURE_ACTIONS
    assert {reason for rule in policy["rules"] for reason in rule["onJobFailureReasons"]} == {
        "PodFailurePolicy"
    }


@pytest.mark.parametrize("name", PODS)
def test_a_pod_passes_the_restricted_standard_that_its_namespace_enforces(name: str) -> None:
    labels = DOCUMENTS["Namespace/hpt"]["metadata"]["labels"]
    assert labels == {"pod-security.kubernetes.io/enforce": "restricted"}
    pod = PODS[name]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    uid = re.search(r"useradd --uid (\d+)", (ROOT / "Dockerfile").read_text("utf-8"))
    assert uid is not None
    assert pod["securityContext"]["runAsUser"] == (999 if name == "StatefulSet/hpt-redis" else int(uid[1]))
    for container in pod["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert "memory" in container["resources"]["limits"]
    kinds = {kind for volume in pod.get("volumes", []) for kind in volume if kind != "name"}
    assert kinds <= {"secret", "emptyDir", "persistentVolumeClaim"}


def test_the_kustomization_names_every_file_and_only_images_that_are_used() -> None:
    kustomization = yaml.safe_load((FOLDER / "kustomization.yaml").read_text("utf-8"))
    files = {file.name for file in FOLDER.glob("*.yaml")} - {"kustomization.yaml"}
    assert set(kustomization["resources"]) == files
    assert kustomization["namespace"] == DOCUMENTS["Namespace/hpt"]["metadata"]["name"]
    used = {container["image"] for pod in PODS.values() for container in pod["containers"]}
    assert {image["name"] for image in kustomization["images"]} == used - {"redis:8"}
    if shutil.which("kubectl"):
        built = subprocess.run(
            ["kubectl", "kustomize", FOLDER], check=True, capture_output=True, text=True
        ).stdout
        images = set(re.findall(r"image: (\S+)", built))
        assert images == {f"{i['newName']}:{i['newTag']}" for i in kustomization["images"]} | {"redis:8"}
        assert not [name for d in yaml.safe_load_all(built) if (name := breaches(d))]
