"""The network policies: everybody reaches what their own variables name, and nothing else."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest
import yaml

from tests import manifests
from tests.manifests import BASE, OVERLAYS, Document

Labels = dict[str, str]
POLICIES: list[Document] = list(yaml.safe_load_all((BASE / "network-policies.yaml").read_text()))
HEAD_SERVICE = {"unfreeze-head-svc": ({"ray.io/cluster": "unfreeze", "ray.io/node-type": "head"}, 8265)}
"""KubeRay makes this one, and names it after the RayCluster."""
ALLOWED = {
    ("worker", "postgres", 5432),
    ("worker", "mlflow", 5000),
    ("worker", "prefect", 4200),
    ("worker", "head", 8265),
    ("mlflow", "postgres", 5432),
    ("prefect", "postgres", 5432),
    *((one, other, port) for one, other in product(("head", "ray worker"), repeat=2) for port in (6379, 8265, 5000, 5432, 4200)),
}

by_overlay = pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)


def test_without_a_policy_nobody_is_allowed_anything() -> None:
    first = POLICIES[0]["spec"]
    assert first == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


@by_overlay
def test_the_ways_that_are_open_are_those_that_are_meant_to_be(overlay: Path) -> None:
    named = pods(overlay)
    ports = (5432, 5000, 4200, 6379, 8265)
    ways = {(a, b, port) for (a, one), (b, other), port in product(named.items(), named.items(), ports) if is_open(one, other, port)}
    assert ways == ALLOWED


@by_overlay
def test_every_service_that_a_variable_names_is_there_and_reachable(overlay: Path) -> None:
    documents = manifests.rendered(overlay)
    services = HEAD_SERVICE | {
        document["metadata"]["name"]: (document["spec"]["selector"], document["spec"]["ports"][0]["port"])
        for document in documents
        if document["kind"] == "Service"
    }
    [settings] = [
        document["data"] for document in documents if (document["kind"], document["metadata"]["name"]) == ("ConfigMap", "unfreeze")
    ]
    seen = 0
    for document in documents:
        for template in manifests.pod_templates(document):
            for name, port in addresses(template, settings):
                target, served = services[name]
                assert port == served
                assert is_open(template["metadata"]["labels"], target, port), (document["metadata"]["name"], name)
                seen += 1
    assert seen == 6  # the worker's four, and the databases of MLflow and Prefect


@by_overlay
def test_only_who_needs_s3_gets_out_and_nobody_to_the_machines_own_credentials(overlay: Path) -> None:
    assert {name for name, labels in pods(overlay).items() if gets_out(labels)} == {"worker", "mlflow", "head", "ray worker"}
    [block] = [
        peer["ipBlock"]
        for policy in POLICIES
        for rule in policy["spec"].get("egress", [])
        for peer in rule.get("to", [])
        if "ipBlock" in peer
    ]
    assert "169.254.169.254/32" in block["except"]


def addresses(template: Document, settings: dict[str, str]) -> list[tuple[str, int]]:
    """Host and port of each service of the cluster that the pod's variables name."""
    [container] = template["spec"]["containers"]
    values = {entry["name"]: entry["value"] for entry in container.get("env", []) if "value" in entry}
    values |= settings if "envFrom" in container else {}
    found = {match for value in values.values() for match in re.findall(r"://(?:\w+@)?([a-z-]+):(\d+)", value)}
    if "PREFECT_SERVER_DATABASE_HOST" in values:
        found.add((values["PREFECT_SERVER_DATABASE_HOST"], values["PREFECT_SERVER_DATABASE_PORT"]))
    return [(host, int(port)) for host, port in sorted(found)]


def pods(overlay: Path) -> dict[str, Labels]:
    """The kinds of pod, by a short name."""
    templates = [template for document in manifests.rendered(overlay) for template in manifests.pod_templates(document)]
    labels = [template["metadata"]["labels"] for template in templates]
    return {short_name(each): each for each in labels}


def short_name(labels: Labels) -> str:
    role = labels.get("ray.io/node-type")
    return {"head": "head", "worker": "ray worker"}[role] if role else labels["app.kubernetes.io/name"]


def is_open(source: Labels, target: Labels, port: int) -> bool:
    """Whether a pod reaches another's port: its own policies let it out, and the other's let it in."""
    out = any(matches(peer, target) for peer in peers(source, "egress", port))
    return out and any(matches(peer, source) for peer in peers(target, "ingress", port))


def gets_out(labels: Labels) -> bool:
    return any("ipBlock" in peer for peer in peers(labels, "egress", 443))


def peers(labels: Labels, direction: str, port: int) -> list[Document]:
    """The peers of the rules in one direction that hold for a pod and a port; a rule without peers means any."""
    found: list[Document] = []
    for policy in POLICIES:
        if not selects(policy["spec"]["podSelector"], labels):
            continue
        for rule in policy["spec"].get(direction, []):
            if not rule.get("ports") or any(said["port"] == port and said["protocol"] == "TCP" for said in rule["ports"]):
                found += rule.get({"egress": "to", "ingress": "from"}[direction], [{"podSelector": {}}])
    return found


def matches(peer: Document, labels: Labels) -> bool:
    """Whether a peer is this pod of our namespace; no other namespace's pods carry our labels."""
    return "podSelector" in peer and "namespaceSelector" not in peer and selects(peer["podSelector"], labels)


def selects(selector: Document, labels: Labels) -> bool:
    if any(labels.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    for rule in selector.get("matchExpressions", []):
        assert rule["operator"] in {"In", "NotIn"}
        if (labels.get(rule["key"]) in rule["values"]) != (rule["operator"] == "In"):
            return False
    return True
