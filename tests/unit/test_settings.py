"""Where the settings come from, and what they make on disk."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from infra import settings
from infra.errors import UserError


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (
        "AWS_ENDPOINT_URL",
        "AWS_ENDPOINT_URL_S3",
        "MLFLOW_TRACKING_URI",
        "PREFECT_API_URL",
        "RAY_ADDRESS",
        "UNFREEZE_HOME",
        "UNFREEZE_CACHE_DIR",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def test_the_home_is_made_in_the_working_directory_for_the_owner_alone(tmp_path: Path) -> None:
    assert settings.home_dir() == tmp_path / ".unfreeze"
    assert stat.S_IMODE((tmp_path / ".unfreeze").stat().st_mode) == 0o700


def test_the_home_is_absolute_even_where_the_variable_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNFREEZE_HOME", "deep/state")
    assert settings.home_dir() == tmp_path / "deep" / "state"


def test_the_cache_is_in_the_home_unless_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings.cache_dir() == tmp_path / ".unfreeze" / "cache"
    monkeypatch.setenv("UNFREEZE_CACHE_DIR", str(tmp_path / "elsewhere"))
    assert settings.cache_dir() == tmp_path / "elsewhere"
    assert (tmp_path / "elsewhere").is_dir()


def test_a_home_that_is_a_file_is_the_users_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("UNFREEZE_HOME", str(tmp_path / "taken"))
    with pytest.raises(UserError, match="taken cannot be made a folder"):
        settings.home_dir()


def test_each_tools_own_variable_makes_its_service_external(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [settings.load().external(service) for service in settings.SERVICES] == [None] * 4
    addresses = {
        "AWS_ENDPOINT_URL": "http://s3",
        "MLFLOW_TRACKING_URI": "http://mlflow",
        "PREFECT_API_URL": "http://prefect/api",
        "RAY_ADDRESS": "ray:6379",
    }
    for name, value in addresses.items():
        monkeypatch.setenv(name, value)
    assert [settings.load().external(service) for service in settings.SERVICES] == list(addresses.values())


def test_the_endpoint_for_s3_alone_wins_over_the_one_for_all_of_aws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://all")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://s3")
    assert settings.load().external("s3") == "http://s3"


def test_an_empty_variable_counts_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "")
    assert settings.load().external("ray") is None


def test_a_wrong_value_is_named_with_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNFREEZE_NUM_CPUS", "many")
    with pytest.raises(UserError, match="UNFREEZE_NUM_CPUS=many"):
        settings.load()


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL", "MLFLOW_TRACKING_URI", "PREFECT_API_URL", "RAY_ADDRESS"])
@pytest.mark.parametrize("address", ["http://[bad", "http://me:secret@host:port", "http://", "https://a host/"])
def test_an_address_that_cannot_be_one_is_named_with_its_variable(monkeypatch: pytest.MonkeyPatch, variable: str, address: str) -> None:
    monkeypatch.setenv(variable, address)
    with pytest.raises(UserError, match=rf"^{variable}=") as raised:
        settings.load()
    assert "secret" not in str(raised.value)


def test_a_cluster_without_a_port_is_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for address in ("nonsense", "head:port", ":6379"):
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(UserError, match=rf"^RAY_ADDRESS={address}: "):
            settings.load()
    for address in ("head:6379", "[::1]:6379", "auto", "local", "ray://head:10001", "http://head:8265"):
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert settings.load().ray_address == address
