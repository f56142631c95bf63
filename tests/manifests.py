"""What the deployment manifests of infra/ say, read for tests: documents, containers, and an overlay as kustomize would render it."""

from __future__ import annotations

import copy
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonpatch
import yaml

ROOT = Path(__file__).parents[1]
INFRA = ROOT / "infra"
COMPOSE = INFRA / "compose.yaml"
BASE = INFRA / "k8s" / "base"
OVERLAYS = sorted(path.parent for path in (INFRA / "k8s" / "overlays").glob("*/kustomization.yaml"))
AWS = INFRA / "ray-cluster-aws.yaml"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINS = dict(line.split("==") for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line)
VARIABLE = re.compile(r"\$\{(?P<name>\w+)(?P<kind>:-|:\?)(?P<rest>[^}]*)\}")

Document = dict[str, Any]


@dataclass(frozen=True)
class Container:
    """A container of either kind of manifest: where it is, what it runs, and the names in its environment."""

    where: str
    image: str
    command: list[str]
    environment: frozenset[str]
    said: Document
    pod: Document

    @property
    def is_ours(self) -> bool:
        return self.image.split(":")[0] in {"unfreeze", "unfreeze-cpu", "unfreeze-gpu"}


def compose(environment: Mapping[str, str], path: Path = COMPOSE) -> Document:
    """The compose file with its variables filled in as compose does. Raises KeyError naming one that must be given."""

    def filled(match: re.Match[str]) -> str:
        name, given = match["name"], environment.get(match["name"], "")
        if given or match["kind"] == ":-":
            return given or match["rest"]
        raise KeyError(f"{name}: {match['rest']}")

    document: Document = yaml.safe_load(VARIABLE.sub(filled, path.read_text()))
    return document


def compose_containers(document: Document) -> Iterator[Container]:
    """A container a service."""
    for name, said in document["services"].items():
        command = [*said.get("entrypoint", []), *said.get("command", [])]
        yield Container(f"compose {name}", said["image"], command, frozenset(said.get("environment", {})), said, said)


def example_variables() -> dict[str, str]:
    """What infra/example.env gives: names to values, most of them empty."""
    lines = [line for line in (INFRA / "example.env").read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def rendered(overlay: Path) -> list[Document]:
    """The documents of an overlay: base, merged literals, images and JSON patches, the few things that ours use."""
    said = yaml.safe_load((overlay / "kustomization.yaml").read_text())
    assert set(said) <= {"apiVersion", "kind", "resources", "images", "configMapGenerator", "patches"}
    assert [(overlay / path).resolve() for path in said["resources"]] == [BASE]
    documents = base()
    for generated in said.get("configMapGenerator", []):
        _one(documents, "ConfigMap", generated["name"])["data"] |= _literals(generated)
    for patch in said.get("patches", []):
        target = _one(documents, patch["target"]["kind"], patch["target"]["name"])
        changed = jsonpatch.apply_patch(copy.deepcopy(target), yaml.safe_load(patch["patch"]))
        documents[documents.index(target)] = changed
    for image in said.get("images", []):
        for document in documents:
            for template in pod_templates(document):
                _rename(template, image)
    return documents


def base() -> list[Document]:
    """The documents of the base, with the namespace that its kustomization gives them."""
    said = yaml.safe_load((BASE / "kustomization.yaml").read_text())
    documents = [document for name in said["resources"] for document in yaml.safe_load_all((BASE / name).read_text())]
    for generated in said["configMapGenerator"]:
        files = {name: (BASE / name).read_text() for name in generated.get("files", [])}
        data = _literals(generated) | files
        documents.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": generated["name"]}, "data": data})
    for document in documents:
        if document["kind"] != "Namespace":
            document["metadata"]["namespace"] = said["namespace"]
    return copy.deepcopy(documents)  # the anchors' aliases of one another, apart


def pod_templates(document: Document) -> Iterator[Document]:
    """The pod templates of a document: those of a RayCluster with the labels that KubeRay adds."""
    if document["kind"] in {"Deployment", "StatefulSet"}:
        yield document["spec"]["template"]
    if document["kind"] == "RayCluster":
        groups = [("head", document["spec"]["headGroupSpec"]), *(("worker", group) for group in document["spec"]["workerGroupSpecs"])]
        for role, group in groups:
            labels = {"ray.io/cluster": document["metadata"]["name"], "ray.io/node-type": role}
            group["template"].setdefault("metadata", {})["labels"] = labels
            yield group["template"]


def containers(documents: list[Document]) -> Iterator[Container]:
    """Every container that Kubernetes would start."""
    for document in documents:
        for template in pod_templates(document):
            for said in template["spec"]["containers"]:
                names = {entry["name"] for entry in said.get("env", [])}
                for source in said.get("envFrom", []):
                    names |= set(_one(documents, "ConfigMap", source["configMapRef"]["name"])["data"])
                where = f"{document['kind']} {document['metadata']['name']}/{said['name']}"
                yield Container(where, said["image"], said.get("command", []), frozenset(names), said, template["spec"])


def _literals(generated: Document) -> dict[str, str]:
    return dict(literal.split("=", 1) for literal in generated.get("literals", []))


def _one(documents: list[Document], kind: str, name: str) -> Document:
    [found] = [document for document in documents if (document["kind"], document["metadata"]["name"]) == (kind, name)]
    return found


def _rename(template: Document, image: Document) -> None:
    for container in template["spec"]["containers"]:
        if container["image"].split(":")[0] == image["name"]:
            container["image"] = f"{image['newName']}:{image['newTag']}"
