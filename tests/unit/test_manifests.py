"""The deployment manifests: of the right form, safe by default, and naming only what exists, in the versions that are pinned."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from importlib import resources
from itertools import chain
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests import manifests
from tests.manifests import BASE, INFRA, OVERLAYS, PINS, PROJECT, ROOT, Container, Document

KUBERNETES = ("1.29", "1.34", "1.37")
GIVEN = {name: value or f"given-{name.lower()}" for name, value in manifests.example_variables().items()}
SECRETS = {name for name, value in manifests.example_variables().items() if not value}
OPTIONAL = {"UNFREEZE_WEBHOOK_SECRET"}
IMAGE_OF_OTHERS = {"postgres": "pg_isready", "chrislusf/seaweedfs": "/usr/bin/weed"}
RAY_CLUSTER_KEYS = {"rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec", "workerGroupSpecs"}
HEAD_KEYS = {"serviceType", "rayStartParams", "template"}
GROUP_KEYS = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
AUTOSCALER_KEYS = {"version", "upscalingMode", "idleTimeoutSeconds", "resources", "securityContext"}
"""KubeRay's documented fields that we use: no package carries its schema. A typo in one is found here."""

IMPORTS_WARN = pytest.mark.filterwarnings("ignore")  # Prefect's and MLflow's command lines, when they are first imported
by_overlay = pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)


def compose() -> Document:
    return manifests.compose(GIVEN)


def every_container() -> list[Container]:
    overlays = chain.from_iterable(manifests.containers(manifests.rendered(overlay)) for overlay in OVERLAYS)
    return [*manifests.compose_containers(compose()), *overlays]


# --- form


@pytest.mark.parametrize("path", [manifests.COMPOSE, INFRA / "compose.gpu.yaml"], ids=lambda path: path.name)
def test_the_compose_file_fits_the_compose_specification(path: Path) -> None:
    bundled = resources.files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json"
    jsonschema.validate(manifests.compose(GIVEN, path), json.loads(bundled.read_text()))


@by_overlay
@pytest.mark.parametrize("version", KUBERNETES)
def test_every_manifest_fits_kubernetes_schemas(overlay: Path, version: str) -> None:
    for document in manifests.rendered(overlay):
        if document["kind"] != "RayCluster":
            kubernetes_validate.validate(document, version, strict=True)


@by_overlay
@pytest.mark.parametrize("version", KUBERNETES)
def test_the_ray_cluster_has_kuberays_fields_around_valid_pods(overlay: Path, version: str) -> None:
    cluster = ray_cluster(overlay)
    spec, options = cluster["spec"], cluster["spec"]["autoscalerOptions"]
    assert cluster["apiVersion"] == "ray.io/v1"
    assert set(spec) <= RAY_CLUSTER_KEYS
    assert set(spec["headGroupSpec"]) == HEAD_KEYS
    assert set(options) == AUTOSCALER_KEYS
    for group in spec["workerGroupSpecs"]:
        assert set(group) == GROUP_KEYS
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for template in manifests.pod_templates(cluster):
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template}
        kubernetes_validate.validate(pod, version, strict=True)
    sidecar = {"name": "x", "image": "x", "resources": options["resources"], "securityContext": options["securityContext"]}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": {"containers": [sidecar]}}
    kubernetes_validate.validate(pod, version, strict=True)


def test_rays_own_autoscaler_reads_both_groups_from_the_ray_cluster() -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    derived = _derive_autoscaling_config_from_ray_cr(ray_cluster(INFRA / "k8s" / "overlays" / "production"))
    found = {
        name: (group["resources"].get("CPU"), group["resources"].get("GPU")) for name, group in derived["available_node_types"].items()
    }
    assert found == {"headgroup": (0, 0), "cpu": (8, 0), "gpu": (8, 1)}


@by_overlay
def test_an_overlay_is_what_kustomize_makes_of_it(overlay: Path) -> None:
    program = shutil.which("kubectl")
    if program is None:
        pytest.skip("kubectl is not here: the overlays are rendered by the tests alone")
    made = subprocess.run([program, "kustomize", str(overlay)], check=True, capture_output=True, text=True).stdout
    ours = manifests.rendered(overlay)
    assert by_name(_without_labels(list(yaml.safe_load_all(made)))) == by_name(_without_labels(ours))


def test_every_file_of_the_base_is_one_of_its_resources() -> None:
    said = yaml.safe_load((BASE / "kustomization.yaml").read_text())
    assert {path.name for path in BASE.glob("*.yaml")} == {*said["resources"], "kustomization.yaml"}


# --- what exists, in its version


def test_every_image_is_pinned_and_comes_from_no_named_registry() -> None:
    for container in every_container():
        name, _, tag = container.image.partition(":")
        assert re.fullmatch(r"\d+\.\d+(\.\d+)?(-\w+)?", tag), container
        assert "." not in name.split("/")[0], container
        if container.is_ours:
            assert tag == PROJECT["project"]["version"], container
        else:
            assert name in IMAGE_OF_OTHERS, container


@by_overlay
def test_ray_is_the_version_that_is_locked(overlay: Path) -> None:
    assert ray_cluster(overlay)["spec"]["rayVersion"] == PINS["ray"]


def test_the_image_has_the_locked_versions_python_and_all_packages() -> None:
    dockerfile = (INFRA / "docker" / "Dockerfile").read_text()
    python = PROJECT["project"]["requires-python"].removeprefix(">=").split(",")[0]
    assert set(re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE)) == {f"python:{python}-slim-bookworm"}
    assert "--constraint requirements.txt" in dockerfile
    copied = re.findall(r"^COPY (\w+) (\w+)$", dockerfile, re.MULTILINE)
    assert copied == [(package, package) for package in [*PROJECT["tool"]["setuptools"]["packages"], "examples"]]
    assert re.search(r"^USER 10001:10001$", dockerfile, re.MULTILINE)
    assert not re.findall(r"https?://", dockerfile)
    ignored = (INFRA / "docker" / "Dockerfile.dockerignore").read_text().splitlines()
    assert ignored[1] == "*"
    assert {line[1:] for line in ignored if line.startswith("!")} == set(copied_paths(dockerfile))


def copied_paths(dockerfile: str) -> list[str]:
    lines = re.findall(r"^COPY (?!--from)(.+) \S+$", dockerfile, re.MULTILINE)
    return [path for line in lines for path in line.split()]


@IMPORTS_WARN
def test_every_program_exists_and_knows_its_options() -> None:
    containers = every_container()
    for container in containers:
        assert container.is_ours or not container.command or container.command[0] == IMAGE_OF_OTHERS[container.image.split(":")[0]]
    for command in {tuple(container.command) for container in containers if container.is_ours and container.command}:
        parse(list(command))


def parse(command: list[str]) -> None:
    """Have the program read its own arguments, without doing what they say. Raises where it does not know one."""
    program, *arguments = command
    assert (ROOT / ".venv" / "bin" / program).exists() or shutil.which(program), command
    if program == "ray":
        from ray.scripts import scripts

        scripts.cli.commands[arguments[0]].make_context(arguments[0], arguments[1:])
    elif program == "mlflow":
        from mlflow import cli

        cli.cli.commands[arguments[0]].make_context(arguments[0], arguments[1:])
    elif program == "prefect":
        from prefect.cli._app import _app

        _app.parse_args(arguments, exit_on_error=False, print_error=False)
    else:
        assert program == "rclone"


@IMPORTS_WARN
def test_every_variable_is_one_that_somebody_reads() -> None:
    known = known_variables()
    for container in every_container():
        unknown = container.environment - known
        assert not unknown, f"{container.where}: {sorted(unknown)}"
    named = re.findall(
        r"([A-Z][A-Z0-9_]+)=", " ".join(re.findall(r"^ENV ((?:.+\\\n)*.+)", (INFRA / "docker" / "Dockerfile").read_text(), re.M))
    )
    assert named
    assert set(named) <= known | {"PATH", "HF_HOME", "DO_NOT_TRACK", "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE"} | PIP | NVIDIA


PIP = {"PIP_NO_CACHE_DIR", "PIP_DISABLE_PIP_VERSION_CHECK"}
NVIDIA = {"NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES"}
POSTGRES = {"POSTGRES_USER", "POSTGRES_PASSWORD", "PGDATA", "PGPASSWORD"}
OUR_SCRIPT = {"PREFECT_DB_PASSWORD", "MLFLOW_DB_PASSWORD", "LEDGER_DB_PASSWORD"}
AWS = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"}
RCLONE = {"RCLONE_S3_PROVIDER", "RCLONE_S3_ENV_AUTH", "RCLONE_S3_ENDPOINT"}
RAY = {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_USAGE_STATS_ENABLED"}


def known_variables() -> set[str]:
    """The names that our settings and the tools read."""
    import mlflow.environment_variables
    from mlflow.cli import server
    from prefect.settings import Settings as PrefectSettings
    from prefect.settings.legacy import _get_valid_setting_names
    from pydantic import AliasChoices

    from infra.settings import Settings

    ours: set[str] = set()
    for name, field in Settings.model_fields.items():
        alias = field.validation_alias
        names = [str(choice) for choice in alias.choices] if isinstance(alias, AliasChoices) else [alias or f"UNFREEZE_{name}".upper()]
        ours |= {str(name) for name in names}
    options = {str(option.envvar) for option in server.params if getattr(option, "envvar", None)}
    tracking = {name for name in vars(mlflow.environment_variables) if name.startswith("MLFLOW_")}
    return ours | options | tracking | _get_valid_setting_names(PrefectSettings) | POSTGRES | OUR_SCRIPT | AWS | RCLONE | RAY


# --- safe by default


def test_compose_starts_nothing_while_a_secret_is_missing() -> None:
    text = manifests.COMPOSE.read_text()
    for name in sorted(SECRETS - OPTIONAL):
        assert not re.search(rf"\$\{{{name}(?!:\?)", text), name
        with pytest.raises(KeyError, match=f"{name}: fill in infra/.env"):
            manifests.compose({**GIVEN, name: ""})
    manifests.compose({**GIVEN, **dict.fromkeys(OPTIONAL, "")})


def test_the_file_with_the_secrets_is_none_of_gits_and_not_in_the_image() -> None:
    assert "/infra/.env" in (ROOT / ".gitignore").read_text().splitlines()
    assert "infra/.env" in (INFRA / "docker" / "Dockerfile.dockerignore").read_text().splitlines()


@by_overlay
def test_kubernetes_gets_secrets_by_reference_alone(overlay: Path) -> None:
    documents = manifests.rendered(overlay)
    assert not [document for document in documents if document["kind"] == "Secret"]
    wanted = {ray_cluster(overlay)["spec"]["authOptions"]["secretName"]: {"auth_token"}}
    for container in manifests.containers(documents):
        for entry in container.said.get("env", []):
            reference = entry.get("valueFrom", {}).get("secretKeyRef")
            if reference:
                wanted.setdefault(reference["name"], set()).add(reference["key"])
            else:
                assert not re.search("PASSWORD|SECRET|TOKEN|ACCESS_KEY", entry["name"]), f"{container.where}: {entry}"
    told = (ROOT / "docs" / "deployment.md").read_text()
    assert wanted == {"unfreeze": set(re.findall(r"--from-(?:literal|file)=([\w-]+)", told))}


def test_no_container_of_kubernetes_is_root_or_without_limits_and_probes() -> None:
    for container in chain.from_iterable(manifests.containers(manifests.rendered(overlay)) for overlay in OVERLAYS):
        pod, said = container.pod["securityContext"], container.said
        assert pod["runAsNonRoot"] is True, container.where
        assert pod["runAsUser"] > 0, container.where
        assert pod["seccompProfile"] == {"type": "RuntimeDefault"}, container.where
        assert locked(said["securityContext"]), container.where
        assert {"cpu", "memory"} <= set(said["resources"]["limits"]), container.where
        assert {"cpu", "memory"} <= set(said["resources"]["requests"]), container.where
        assert {"startupProbe", "livenessProbe", "readinessProbe"} <= set(said), container.where
        assert not container.pod.get("hostNetwork"), container.where


@by_overlay
def test_the_autoscaler_beside_rays_head_is_locked_and_limited_too(overlay: Path) -> None:
    options = ray_cluster(overlay)["spec"]["autoscalerOptions"]
    assert locked(options["securityContext"])
    assert set(options["resources"]["limits"]) == {"cpu", "memory"}


def test_no_container_of_compose_is_root_or_without_limits_and_health() -> None:
    for container in manifests.compose_containers(compose()):
        said = container.said
        assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", said["user"]), container.where
        assert said["cap_drop"] == ["ALL"], container.where
        assert said["security_opt"] == ["no-new-privileges:true"], container.where
        assert set(said["deploy"]["resources"]["limits"]) == {"cpus", "memory"}, container.where
        assert "healthcheck" in said or container.where == "compose bucket", container.where
        assert not said.get("privileged"), container.where


def test_compose_shows_its_pages_on_loopback_alone() -> None:
    ports = [port for service in compose()["services"].values() for port in service.get("ports", [])]
    assert len(ports) == 3
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_a_spot_worker_has_time_to_drain() -> None:
    for group in ray_cluster(INFRA / "k8s" / "overlays" / "production")["spec"]["workerGroupSpecs"]:
        [container] = group["template"]["spec"]["containers"]
        command = container["lifecycle"]["preStop"]["exec"]["command"][-1]
        [drain, wait] = command.split(" && ")
        parse([*re.sub(r'"[^"]*"', "said", drain).split()])
        assert int(wait.removeprefix("sleep ")) < group["template"]["spec"]["terminationGracePeriodSeconds"]


def ray_cluster(overlay: Path) -> Document:
    [cluster] = [document for document in manifests.rendered(overlay) if document["kind"] == "RayCluster"]
    return cluster


def locked(context: Document) -> bool:
    wanted = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    return context == wanted


def by_name(documents: list[Document]) -> dict[tuple[str, str], Document]:
    return {(document["kind"], document["metadata"]["name"]): document for document in documents}


def _without_labels(documents: list[Document]) -> list[Document]:
    """Without those that KubeRay adds, and not kustomize."""
    for document in documents:
        if document["kind"] == "RayCluster":
            for template in manifests.pod_templates(document):
                template.pop("metadata")
    return documents
