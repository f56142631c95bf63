"""The seam to MLflow's model registry: versions, their tags, and the aliases champion and challenger."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from infra.tracking import client, translated

CHAMPION = "champion"
CHALLENGER = "challenger"


@dataclass(frozen=True)
class ModelVersion:
    """One registered version."""

    name: str
    version: str
    tags: Mapping[str, str]
    run_id: str


def champion(name: str) -> ModelVersion | None:
    """The version that the alias champion names, or None where there is none (or no such model)."""
    return by_alias(name, CHAMPION)


def by_alias(name: str, alias: str) -> ModelVersion | None:
    """The version under an alias, or None."""
    from mlflow.exceptions import MlflowException, RestException

    with translated():
        try:
            found = client().get_model_version_by_alias(name, alias)
        except RestException as error:
            if error.error_code in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}:
                return None
            raise
        except MlflowException as error:
            if "not found" in str(error):
                return None
            raise
    return ModelVersion(name, str(found.version), dict(found.tags), str(found.run_id))


def find(name: str, identity: str) -> ModelVersion | None:
    """The version that was registered under this identity, or None."""
    with translated():
        versions = client().search_model_versions(f"name = '{name}'", max_results=10_000)
    for found in versions:
        if found.tags.get("unfreeze.identity") == identity:
            return ModelVersion(name, str(found.version), dict(found.tags), str(found.run_id))
    return None


def get(name: str, version: str) -> ModelVersion | None:
    """One version, or None where the model has no such version."""
    from mlflow.exceptions import RestException

    with translated():
        try:
            found = client().get_model_version(name, version)
        except RestException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
    return ModelVersion(name, str(found.version), dict(found.tags), str(found.run_id))


def register(name: str, *, run_id: str, artifact: str, tags: Mapping[str, str], description: str) -> ModelVersion:
    """A new version of `name` from the artifact folder of a run; the identity among the tags makes it findable again."""
    from mlflow.exceptions import MlflowException

    with translated():
        try:
            client().create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        source = f"{client().get_run(run_id).info.artifact_uri}/{artifact}"
        made = client().create_model_version(name, source, run_id=run_id, tags=dict(tags), description=description)
    return ModelVersion(name, str(made.version), dict(tags), run_id)


def set_tags(version: ModelVersion, tags: Mapping[str, str]) -> None:
    """Add tags to a version."""
    with translated():
        for key, value in tags.items():
            _again_if_raced(client().set_model_version_tag, version.name, version.version, key, value)


def newest(name: str) -> ModelVersion | None:
    """The version of the highest number, or None where the model has none."""
    with translated():
        versions = client().search_model_versions(f"name = '{name}'", max_results=10_000)
    found = max(versions, key=lambda version: int(version.version), default=None)
    return None if found is None else ModelVersion(name, str(found.version), dict(found.tags), str(found.run_id))


def model_tags(name: str) -> dict[str, str] | None:
    """The tags of a registered model, or None where there is no such model."""
    from mlflow.exceptions import RestException

    with translated():
        try:
            return dict(client().get_registered_model(name).tags)
        except RestException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise


def names() -> list[str]:
    """Every registered model."""
    found: list[str] = []
    token: str | None = None
    with translated():
        while True:
            page = client().search_registered_models(max_results=500, page_token=token)
            found += [model.name for model in page]
            token = page.token
            if not token:
                return sorted(found)


def set_model_tag(name: str, key: str, value: str) -> None:
    """Add a tag to a registered model."""
    with translated():
        _again_if_raced(client().set_registered_model_tag, name, key, value)


def set_alias(name: str, alias: str, version: str) -> None:
    """Let an alias name this version."""
    with translated():
        _again_if_raced(client().set_registered_model_alias, name, alias, version)


def delete_alias(name: str, alias: str) -> None:
    """Let an alias name nothing."""
    with translated():
        _again_if_raced(client().delete_registered_model_alias, name, alias)


def _again_if_raced(write: Callable[..., object], *args: str) -> None:
    """Write to the registry; again where another did so at the same moment.

    MLflow looks for a row and then inserts, changes or deletes it: of two who do so at once its database lets one fail, with BAD_REQUEST.
    """
    again = Retrying(retry=retry_if_exception(_raced), stop=stop_after_attempt(10), wait=wait_random_exponential(0.05, 1.0), reraise=True)
    again(write, *args)


def _raced(error: BaseException) -> bool:
    from mlflow.exceptions import MlflowException

    return isinstance(error, MlflowException) and error.error_code == "BAD_REQUEST"
