"""What Prefect raises when its server is away is a failed service, not a bug of ours; what is ours stays what it is."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from prefect.exceptions import PrefectException

from flows import commands
from infra.errors import ServiceError, UserError
from tasks.deployments import prefect_errors


@pytest.mark.parametrize("error", [httpx.ConnectError("refused"), httpx.ReadTimeout("late"), PrefectException("no")])
def test_a_prefect_that_fails_is_a_failed_service_with_its_address(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://me:secret@prefect.test/api")
    with pytest.raises(ServiceError, match=r"Prefect at http://prefect\.test/api failed"), prefect_errors():
        raise error


def test_other_errors_pass() -> None:
    with pytest.raises(UserError), prefect_errors():
        raise UserError("yours", "mend it")


def test_the_last_log_lines_are_not_waited_for_where_prefect_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never() -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr("prefect.logging.handlers.APILogHandler.aflush", never)
    monkeypatch.setattr(commands, "LOGS_S", 0.01)
    commands._send_logs()
