"""An address as it may be shown holds no password, and is otherwise the same."""

from __future__ import annotations

from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.addresses import credentials_of, shown
from infra.settings import load, set_here

words = st.text(min_size=1, max_size=20)


@given(user=words, password=words, path=st.sampled_from(["", "/", "/api", "/a@b?c=d#e"]), port=st.sampled_from(["", ":5000"]))
def test_credentials_are_read_as_they_were_written_and_are_gone_from_what_is_shown(user: str, password: str, path: str, port: str) -> None:
    bare = f"https://mlflow.example{port}{path}"
    url = bare.replace("https://", f"https://{quote(user, safe='')}:{quote(password, safe='')}@")
    assert credentials_of(url) == (user, password)
    assert shown(url) == shown(bare) == bare
    assert credentials_of(bare) is None


@pytest.mark.parametrize("address", ["10.0.0.1:6379", "auto", "", "sqlite:///mlflow.db", "http://[::1]:5000/"])
def test_what_carries_none_stays_as_it_is(address: str) -> None:
    assert (shown(address), credentials_of(address)) == (address, None)


def test_a_service_named_with_a_password_is_known_by_its_bare_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://ada:secret@mlflow.example/")
    assert load().external("mlflow") == "https://mlflow.example/"


def test_what_is_set_is_told_but_of_a_secret_only_that_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNFREEZE_USER", "ada")
    monkeypatch.setenv("UNFREEZE_LEDGER_URL", "postgresql://a:secret@db/ledger")
    monkeypatch.setenv("UNFREEZE_WEBHOOK_SECRET", "secret")
    told = set_here()
    assert {"UNFREEZE_USER=ada", "UNFREEZE_LEDGER_URL is set", "UNFREEZE_WEBHOOK_SECRET is set"} <= set(told)
    assert "secret" not in repr(told).replace("WEBHOOK_SECRET", "")
