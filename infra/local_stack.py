"""The embedded stack: S3, MLflow, Prefect and Ray on loopback, shared by the commands of one UNFREEZE_HOME, ended with the last of them.

Crash order: a server waits, before it becomes itself, until its process is recorded; so whatever a killed command leaves behind
is on record, and the next start ends it.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from infra import launching, processes, services, stack_file, stack_worker, worker_environment
from infra.addresses import credentials_of
from infra.errors import ServiceError
from infra.object_store import object_store, split_uri
from infra.processes import ProcessRecord
from infra.services import Site
from infra.settings import SERVICES, ServiceName, Settings, home_dir, load
from infra.stack_file import Holder, Server, StackFile

DEFAULT_STORAGE = "s3://unfreeze"
POLL_S = 0.1
SLOW_ANSWER_S = 20.0
MAX_SCRATCH_CHARS = 40
"""Ray adds up to 66 characters for its sockets, and the system allows 107."""
Claim = Callable[[Collection[str]], set[str]]
"""Of some names, those that no other command uses, this one's alone from now on: `Stack.claim`."""


class Stack:
    """The services of one command, while it holds them."""

    def __init__(self, home: Path, settings: Settings, embedded: Collection[ServiceName], storage: str, holder: Holder) -> None:
        self._home = home
        self._holder = holder
        self._storage = storage
        self._timeout_s = settings.start_timeout_s
        self._embedded = frozenset(embedded)
        self._healthy: set[ServiceName] = set()

    def wait(self, service: ServiceName) -> None:
        """Return when the service answers. Raises ServiceError with the end of its log where it does not."""
        if service not in self._embedded or service in self._healthy:
            return
        stack = stack_file.read(self._home)
        site, deadline = _site(self._home, stack), time.monotonic() + self._timeout_s
        while not self._is_ready(service, site, stack):
            if not stack.runs(service):
                raise _failed(service, site, "ended before it answered")
            if time.monotonic() > deadline:
                raise _failed(service, site, f"does not answer after {self._timeout_s:.0f} s")
            time.sleep(POLL_S)
        _record_members(self._home, service)
        self._healthy.add(service)
        if service == "prefect":
            _have_worker(self._home)

    def _is_ready(self, service: ServiceName, site: Site, stack: StackFile) -> bool:
        if not services.is_healthy(service, site):
            return False
        uris = (self._storage, *stack.artifacts.values())
        return service != "s3" or services.ensure_buckets(site, {split_uri(uri)[0] for uri in uris})

    def stays(self, service: ServiceName) -> bool:
        """Whether the service is the stack's own, and outlives this command."""
        return service in self._embedded and stack_file.read(self._home).long_lived

    def claim(self, names: Collection[str]) -> set[str]:
        """Those of `names` that no other living command has, now this one's alone until it ends."""
        with stack_file.locked(self._home):
            stack = stack_file.read(self._home)
            taken = {name for holder in stack.living_holders() if holder.token != self._holder.token for name in holder.claims}
            mine = set(names) - taken
            for holder in stack.holders:
                if holder.token == self._holder.token:
                    holder.claims = sorted({*holder.claims, *mine})
            stack_file.write(self._home, stack)
            return mine


@contextmanager
def session(wanted: Collection[ServiceName], *, storage: str, background: Collection[ServiceName] = ()) -> Iterator[Stack]:
    """Have the wanted services, started where they are neither the team's own nor running, and their variables in os.environ.

    Those in `background` are not waited for before the body: call `Stack.wait`. On exit this command leaves, and the last to leave
    ends what was started, unless it is up for long (`up`).
    """
    split_uri(storage)
    settings, home = load(), home_dir()
    holder = Holder(token=secrets.token_hex(8), process=processes.record_self("command"))
    with stack_file.locked(home):
        stack = _without_leftovers(home, stack_file.read(home))
        embedded = [service for service in wanted if _is_embedded(service, settings, stack)]
        stack.holders.append(holder)
        stack_file.write(home, stack)
        try:
            _start(home, stack, embedded, settings, storage)
        except BaseException:
            _leave(home, holder)
            raise
    try:
        with _environment(_client_variables(embedded, _site(home, stack), settings)):
            handle = Stack(home, settings, embedded, storage, holder)
            for service in (service for service in wanted if service not in background):
                handle.wait(service)
            if "s3" in wanted and "s3" not in embedded:
                object_store().require_bucket(storage)
            yield handle
    finally:
        with stack_file.locked(home):
            _leave(home, holder)


def up(storage: str = DEFAULT_STORAGE, wanted: Collection[ServiceName] = SERVICES) -> dict[str, Any]:
    """Start what is not the team's own, to stay until `down`, and the worker beside an embedded Prefect. Returns what `status` does."""
    with session(wanted, storage=storage):
        home = home_dir()
        with stack_file.locked(home):
            stack = stack_file.read(home)
            stack.long_lived = True
            stack_file.write(home, stack)
        _have_worker(home)
    return status()


def down() -> int:
    """Stop what was started. Where other commands still use it, it ends with the last of them; returns their number."""
    home = home_dir()
    with stack_file.locked(home):
        stack = stack_file.read(home)
        stack.long_lived = False
        stack.holders = stack.living_holders()
        stack_file.write(home, stack)
        if not stack.holders:
            _end_all(home, stack)
        return len(stack.holders)


def status() -> dict[str, Any]:
    """Each service with its state, address and credentials, as `unfreeze status --json` prints it."""
    settings, home = load(), home_dir()
    stack = stack_file.read(home)
    site = _site(home, stack)
    return {service: _describe(service, settings, stack, site) for service in SERVICES}


def is_stopped(service: ServiceName) -> bool:
    """Whether the service is the embedded one and does not run; one that is only slow to answer does."""
    stack = stack_file.read(home_dir())
    return _is_embedded(service, load(), stack) and not stack.runs(service)


def _describe(service: ServiceName, settings: Settings, stack: StackFile, site: Site) -> dict[str, Any]:
    external = None if _is_embedded(service, settings, stack) else settings.external(service)
    runs = external is None and _answers(service, site, stack)
    where = external or (services.address(service, site.ports) if runs else None)
    facts = _facts(service, where, site if runs else None, stack)
    state = "external" if external else "running" if runs else "stopped"
    return {**facts, "state": state, "log": None if external else str(site.log(service))}


def _answers(service: ServiceName, site: Site, stack: StackFile) -> bool:
    """Whether the server answers. One whose processes live may only be slow: it is asked again for a while."""
    deadline = time.monotonic() + SLOW_ANSWER_S
    while stack.runs(service):
        if services.is_healthy(service, site):
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return False


def _facts(service: ServiceName, where: str | None, site: Site | None, stack: StackFile) -> dict[str, Any]:
    """The service's own part of its status; `site` only where it is ours and runs."""
    if service == "s3":
        bucket, prefix = split_uri(stack.storage or DEFAULT_STORAGE)
        keys = {"access_key": site.access_key if site else None, "secret_key": site.secret_key if site else None}
        return {"endpoint": where, "bucket": bucket, "prefix": prefix, **keys}
    if service == "mlflow":
        return {"uri": where}
    if service == "prefect":
        return {"api_url": where, "ui_url": where.removesuffix("/api") if where else None}
    dashboard_url = f"http://{services.HOST}:{site.ports['ray_dashboard']}" if site else None
    # an outside driver needs these too: Ray's token, and what keeps it on loopback
    environment = {name: value for name, value in services.ray_environment(site).items() if value} if site else {}
    return {
        "address": where,
        "dashboard_url": dashboard_url,
        "token": site.ray_token_file.read_text() if site else None,
        "environment": environment,
    }


def _is_embedded(service: ServiceName, settings: Settings, stack: StackFile) -> bool:
    """No variable names another one. A variable that names our own running server (a session within a session) changes nothing."""
    named = settings.external(service)
    return named is None or (stack.runs(service) and named == services.address(service, stack.ports))


def _site(home: Path, stack: StackFile, artifacts_uri: str = "", num_cpus: float | None = None) -> Site:
    return Site(home, stack.access_key, stack.secret_key, dict(stack.ports), artifacts_uri, num_cpus)


def _without_leftovers(home: Path, stack: StackFile) -> StackFile:
    """Forget the commands that were killed; where nobody is left to use the servers, end those too."""
    stack.holders = stack.living_holders()
    if not stack.holders and not stack.long_lived:
        _end_all(home, stack)
    return stack


def _start(home: Path, stack: StackFile, embedded: Collection[ServiceName], settings: Settings, storage: str) -> None:
    """Start, side by side, what does not run yet; every process is on record before it runs."""
    s3_address = settings.external("s3") if not _is_embedded("s3", settings, stack) else None
    stack.storage = storage
    stack.artifacts.setdefault(s3_address or "embedded", f"s3://{split_uri(storage)[0]}/mlflow")
    missing = [service for service in embedded if not stack.runs(service)]
    for service in missing:
        _end_server(stack, service)
        if service == "prefect":
            _end_worker(stack)  # it knows the old address
        stack.ports |= services.choose_ports(service, stack.ports)
    if s3_address is None and "s3" not in stack.ports:
        stack.ports |= services.choose_ports("s3", stack.ports)  # MLflow is told where S3 will be, even where this command does not need S3
    site = _site(home, stack, stack.artifacts[s3_address or "embedded"], settings.num_cpus)
    if not site.ray_token_file.exists():
        stack_file.write_private(site.ray_token_file, secrets.token_hex(32))
    s3_variables = services.client_environment("s3", site) if s3_address is None else {}
    for service in missing:
        _launch(home, stack, service, site, s3_variables)


def _launch(home: Path, stack: StackFile, service: ServiceName, site: Site, s3: Mapping[str, str | None]) -> None:
    services.prepare(service, site)
    scratch = _new_scratch()

    def remember(pid: int) -> None:
        stack.servers[service] = Server(leader=processes.record(pid, service), scratch=scratch)
        stack_file.write(home, stack)

    launching.launch(
        services.command(service, site, scratch),
        environment=services.server_environment(service, site, dict(s3)),
        cwd=home,
        log=site.log(service),
        remember=remember,
    )


def _have_worker(home: Path) -> None:
    """Start the worker beside an embedded Prefect that stays, where it does not run."""
    settings = load()
    with stack_file.locked(home):
        stack = stack_file.read(home)
        if not stack.long_lived or not stack.runs("prefect") or (stack.worker is not None and processes.is_alive(stack.worker)):
            return
        _end_worker(stack)

        def remember(pid: int) -> None:
            stack.worker = processes.record(pid, "worker")
            stack_file.write(home, stack)

        embedded = [service for service in SERVICES if _is_embedded(service, settings, stack)]
        launching.launch(
            stack_worker.command(),
            environment=stack_worker.environment(_site(home, stack), embedded),
            cwd=home,
            log=stack_worker.log(home),
            remember=remember,
        )


def _new_scratch() -> Path:
    """A new folder with a path short enough for Ray's sockets."""
    base = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="unfreeze-", dir=base if len(base) + len("/unfreeze-12345678") <= MAX_SCRATCH_CHARS else "/tmp"))


def _record_members(home: Path, service: ServiceName) -> None:
    """Put what a server has started by now on record."""
    with stack_file.locked(home):
        stack = stack_file.read(home)
        if (server := stack.servers.get(service)) is not None:
            server.members = processes.family([server.leader])
            server.vital = processes.named(server.members, services.VITAL.get(service, ()))
            stack_file.write(home, stack)


def _leave(home: Path, holder: Holder) -> None:
    """The caller has the lock."""
    stack = stack_file.read(home)
    stack.holders = [other for other in stack.living_holders() if other.token != holder.token]
    stack_file.write(home, stack)
    if not stack.holders and not stack.long_lived:
        _end_all(home, stack)


def _end_all(home: Path, stack: StackFile) -> None:
    """End every server, those that need the longest time first and all side by side."""
    records: dict[float, list[ProcessRecord]] = {}
    for service, server in stack.servers.items():
        records.setdefault(services.GRACE_S[service], []).extend([server.leader, *server.members])
    if stack.worker is not None:
        records.setdefault(stack_worker.GRACE_S, []).append(stack.worker)
    processes.end_by_grace(records)
    for server in stack.servers.values():
        shutil.rmtree(server.scratch, ignore_errors=True)
    shutil.rmtree(home / worker_environment.FOLDER, ignore_errors=True)
    stack.servers, stack.worker = {}, None
    stack_file.write(home, stack)


def _end_server(stack: StackFile, service: ServiceName) -> None:
    """End what is left of one server whose leader has died."""
    if (server := stack.servers.pop(service, None)) is not None:
        processes.end([server.leader, *server.members], services.GRACE_S[service])
        shutil.rmtree(server.scratch, ignore_errors=True)


def _end_worker(stack: StackFile) -> None:
    """End the worker, with whatever it has started."""
    if stack.worker is not None:
        processes.end([stack.worker], stack_worker.GRACE_S)
        stack.worker = None


def _client_variables(embedded: Collection[ServiceName], site: Site, settings: Settings) -> dict[str, str | None]:
    variables: dict[str, str | None] = dict(services.NO_PHONING_HOME)
    for service in embedded:
        variables |= services.client_environment(service, site)
    if "s3" not in embedded and (endpoint := settings.external("s3")) is not None:
        variables["AWS_ENDPOINT_URL"] = endpoint  # wherever it came from, one name for all who ask
    variables |= _credentials_apart(embedded, settings)
    if embedded and (no_proxy := services.no_proxy()):
        variables |= {"NO_PROXY": no_proxy, "no_proxy": no_proxy}
    return variables


def _credentials_apart(embedded: Collection[ServiceName], settings: Settings) -> dict[str, str | None]:
    """What addresses of the team's own carry, under the variables that each tool has for it: an address is logged, kept and linked to."""
    variables: dict[str, str | None] = {}
    if "mlflow" not in embedded and (found := credentials_of(settings.mlflow_tracking_uri or "")):
        names = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
        variables |= {"MLFLOW_TRACKING_URI": settings.external("mlflow"), **dict(zip(names, found, strict=True))}
    if "prefect" not in embedded and (found := credentials_of(settings.prefect_api_url or "")):
        variables |= {"PREFECT_API_URL": settings.external("prefect"), "PREFECT_API_AUTH_STRING": ":".join(found)}
    return variables


@contextmanager
def _environment(variables: Mapping[str, str | None]) -> Iterator[None]:
    """Change this process's variables for the body; None unsets."""
    before = {name: os.environ.get(name) for name in variables}
    _set(variables)
    object_store.cache_clear()
    try:
        yield
    finally:
        _set(before)
        object_store.cache_clear()


def _set(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _failed(service: ServiceName, site: Site, how: str) -> ServiceError:
    log = site.log(service)
    return ServiceError(
        f"The embedded {service} server {how}. The end of {log}:\n{services.tail(log)}", "Run the command again; it carries on."
    )
