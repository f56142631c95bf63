"""Addresses as they may be shown, logged and kept: without the user and password that a URL may carry."""

from __future__ import annotations

from urllib.parse import unquote, urlsplit


def shown(address: str) -> str:
    """The address without the credentials in it."""
    parts = urlsplit(address)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl() if "@" in parts.netloc else address


def credentials_of(address: str) -> tuple[str, str] | None:
    """The user and the password in a URL, None where it names no password."""
    parts = urlsplit(address)
    return None if parts.password is None else (unquote(parts.username or ""), unquote(parts.password))
