"""The embedded stack, up for as long as one file of tests runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.site import Site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    made = Site(tmp_path_factory.mktemp("site"))
    made.run("up")
    made.status = made.json("status")
    try:
        yield made
    finally:
        made.run("down")
