"""What a version that is registered already needs for being judged: its rules and data, from the lineage in its published folder."""

from __future__ import annotations

from typing import Any

from infra import registry
from infra.errors import UserError
from infra.object_store import object_store
from ray_jobs.spec_file import parse_spec
from tasks.ledger_book import ARTIFACT, open_book
from tasks.lineage import read_lineage
from tasks.serving import check_published


def find_candidate(name: str, version: str | None) -> dict[str, Any]:
    """The version to judge (by default the challenger, else the newest), with its spec and data. Raises UserError where it cannot serve."""
    open_book(name)  # says so where there is no such model
    found = registry.get(name, version) if version else registry.by_alias(name, registry.CHALLENGER) or registry.newest(name)
    if found is None:
        newest = registry.newest(name)
        raise UserError(f"There is no version {version} of {name}.", f"The newest is {newest.version if newest else 'none'}.")
    uri = found.tags.get(ARTIFACT, "")
    lineage = read_lineage(object_store(), uri) if uri else None
    if lineage is None:
        raise UserError(
            f"Version {found.version} of {name} was never published with the data it was made from ({uri or 'no folder'}).",
            "It cannot be judged: `unfreeze retrain` makes a version that can.",
        )
    check_published(uri, f"Version {found.version} of {name}")
    spec = parse_spec(lineage["spec"], named=f"the spec of version {found.version}")
    return {
        "spec": spec,
        "dataset": lineage["dataset"],
        "model": {
            "name": name, "version": found.version, "artifact_uri": uri, "model_uri": uri, "trained_on": lineage["trained_on"],
            "probe_uri": lineage["probe_uri"], "code": lineage["code"],
        },
    }  # fmt: skip
