"""The documents of docs/clusters/kubernetes, read once for the tests. Judges nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "clusters" / "kubernetes"

Document = dict[str, Any]


def documents() -> dict[str, Document]:
    """Kind/name -> document, of all files but the kustomization."""
    files = sorted(set(FOLDER.glob("*.yaml")) - {FOLDER / "kustomization.yaml"})
    found = [document for file in files for document in yaml.safe_load_all(file.read_text("utf-8"))]
    named = {f"{document['kind']}/{document['metadata']['name']}": document for document in found}
    assert len(named) == len(found)
    return named


DOCUMENTS = documents()


RUN: dict[str, str] = DOCUMENTS["ConfigMap/hpt-run"]["data"]
JOBSET = DOCUMENTS["JobSet/hpt"]
[REPLICATED_JOB] = JOBSET["spec"]["replicatedJobs"]
JOB = REPLICATED_JOB["template"]["spec"]
PODS: dict[str, Document] = {
    name: document["spec"]["template"]["spec"]
    for name, document in DOCUMENTS.items()
    if document["kind"] in ("StatefulSet", "Deployment")
} | {"JobSet/hpt": JOB["template"]["spec"]}
NODES = {
    "trainer": "JobSet/hpt",
    "predictor": "Deployment/hpt-predictor",
    "monitor": "Deployment/hpt-monitor",
}
