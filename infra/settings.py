"""Where things are on this machine, and which services are the team's own: each tool's variables first, then UNFREEZE_*."""

from __future__ import annotations

import getpass
import os
import socket
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

from pydantic import AfterValidator, AliasChoices, ByteSize, Field, SecretStr, TypeAdapter, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from infra import addresses
from infra.errors import UserError

ServiceName = Literal["s3", "mlflow", "prefect", "ray"]
SERVICES: tuple[ServiceName, ...] = get_args(ServiceName)


def _has_a_host(address: str) -> str:
    if address.startswith(("http://", "https://")):
        parts = urlsplit(address)  # a ValueError of its own where it cannot be read
        _ = parts.port
        if not parts.hostname or any(map(str.isspace, address)):
            raise ValueError("not a web address")
    return address


def _names_a_cluster(address: str) -> str:
    if "://" not in address and address not in {"auto", "local"}:
        parts = urlsplit(f"//{address}")
        if not parts.hostname or parts.port is None:
            raise ValueError("neither HOST:PORT nor the http:// address of a job server")
    return address


Address = Annotated[str, AfterValidator(_has_a_host)]


class Settings(BaseSettings):
    """The environment of one process, read once when constructed; a set-but-empty variable counts as not set."""

    model_config = SettingsConfigDict(env_prefix="UNFREEZE_", env_ignore_empty=True, extra="ignore")

    aws_endpoint_url: Address | None = Field(default=None, validation_alias=AliasChoices("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"))
    mlflow_tracking_uri: Address | None = Field(default=None, validation_alias="MLFLOW_TRACKING_URI")
    prefect_api_url: Address | None = Field(default=None, validation_alias="PREFECT_API_URL")
    ray_address: Annotated[Address, AfterValidator(_names_a_cluster)] | None = Field(
        default=None, validation_alias=AliasChoices("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
    )

    home: Path = Field(default=Path(".unfreeze"), description="State of the embedded stack.")
    cache_dir: Path | None = Field(default=None, description="Scratch of this machine; the default is `cache` in the home.")
    cache_bytes: ByteSize = Field(
        default=ByteSize(20 * 10**9), gt=0, description="Features kept on this machine's disk, e.g. 50GB; the least recently used go first."
    )
    ledger_url: SecretStr | None = Field(
        default=None, description="Database of the ledger of promotions; by default the object store, or a file in the home."
    )
    user: str | None = Field(default=None, description="Who promotes, approves and rolls back; by default the login name.")
    webhook_secret: SecretStr | None = Field(default=None, description="Signs what is sent to the webhook that a spec names.")
    num_cpus: float | None = Field(default=None, gt=0, description="CPUs of the embedded Ray; the default is all of the machine's.")
    s3_deadline_s: float = Field(default=120.0, gt=0, description="How long S3 may refuse, fail or be silent before a request to it fails.")
    start_timeout_s: float = Field(default=180.0, gt=0, description="How long one embedded service may take to answer.")

    def external(self, service: ServiceName) -> str | None:
        """The address of a service that is the team's own: used, never started or stopped. None where it is embedded.

        Without the credentials that a web address may carry; a database, which MLflow takes too, keeps its own.
        """
        named = {"s3": self.aws_endpoint_url, "mlflow": self.mlflow_tracking_uri, "prefect": self.prefect_api_url, "ray": self.ray_address}
        found = named[service]
        return addresses.shown(found) if found and found.startswith(("http://", "https://")) else found


def load() -> Settings:
    """The settings of this process's environment. Raises UserError naming each wrong variable."""
    try:
        return Settings()
    except ValidationError as error:
        raise UserError("\n".join(_describe(mistake) for mistake in error.errors()), "Correct or unset the variable.") from None


def _describe(mistake: Any) -> str:
    value = str(mistake["input"]).rpartition("@")[2]  # what may carry a password is not shown
    return f"{_variable(str(mistake['loc'][0]))}={value}: {mistake['msg'].removeprefix('Value error, ')}"


def _variable(name: str) -> str:
    """The variable of a setting, by the name that pydantic has for it; a tool's own has two where the more special one goes before."""
    for field in Settings.model_fields.values():
        names = field.validation_alias.choices if isinstance(field.validation_alias, AliasChoices) else [field.validation_alias]
        if name in names:
            return next((str(one) for one in names if os.environ.get(str(one))), name)
    return f"UNFREEZE_{name.upper()}"


def home_dir() -> Path:
    """UNFREEZE_HOME, absolute, made with mode 0700 where missing."""
    return _private_dir(load().home.expanduser().absolute())


def cache_dir() -> Path:
    """UNFREEZE_CACHE_DIR, or `cache` in the home; absolute, made with mode 0700 where missing."""
    chosen = load().cache_dir
    return _private_dir(chosen.expanduser().absolute() if chosen else home_dir() / "cache")


def set_here() -> list[str]:
    """Each UNFREEZE_ variable that is set, as it may be shown: of secrets, only that they are."""
    found = load()
    named = [name for name, field in Settings.model_fields.items() if field.validation_alias is None and name in found.model_fields_set]
    values = {name: getattr(found, name) for name in named}
    return [f"UNFREEZE_{name.upper()}{' is set' if isinstance(value, SecretStr) else f'={value}'}" for name, value in values.items()]


def user() -> str:
    """Who acts: UNFREEZE_USER, or login name and host."""
    return load().user or f"{getpass.getuser()}@{socket.gethostname()}"


def webhook_secret() -> str | None:
    """UNFREEZE_WEBHOOK_SECRET."""
    secret = load().webhook_secret
    return secret.get_secret_value() if secret else None


def cache_bytes() -> int:
    """UNFREEZE_CACHE_BYTES."""
    return int(load().cache_bytes)


def bytes_of(size: str) -> int:
    """A size such as 5GB, 512MiB or 0, in bytes. Raises UserError."""
    try:
        return int(TypeAdapter(ByteSize).validate_python(size))
    except ValidationError:
        raise UserError(f"{size!r} is no size.", "Write it as 5GB, 512MiB or a number of bytes.") from None


def _private_dir(path: Path) -> Path:
    if path.is_dir():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{path} cannot be made a folder: {error.strerror}.", "Name another one with UNFREEZE_HOME or UNFREEZE_CACHE_DIR."
        ) from error
    return path
