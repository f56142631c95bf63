"""Check a backbone and put it on the object store, in a worker of this machine's cluster, which has torch loaded, or here."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from infra.committed_folder import commit, read_manifest
from infra.object_store import join_uri, object_store
from infra.ray_cluster import Cluster
from ray_jobs.features_on_ray import result_of
from ray_jobs.light_timm import import_timm
from ray_jobs.spec import Spec
from ray_jobs.workers import submit


def prepare_backbone(spec: Spec, cluster: Cluster) -> dict[str, Any]:
    """The backbone's config, with its URI and the number of its groups. Raises UserError where it does not fit the spec."""
    if not cluster.on_this_machine:
        return prepare_here(spec)
    found: dict[str, Any] = result_of(submit(prepare_here, spec, name="backbone"))
    return found


def prepare_here(spec: Spec) -> dict[str, Any]:
    """The same in this process: a weights file, or the package that holds it, may be on this machine alone."""
    import_timm()
    from ray_jobs import backbone

    name, image_size, store = spec.backbone.name, spec.data.image_size, object_store()
    backbone.check(name, image_size, spec.search.unfreeze_depth)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        config = backbone.build(spec.backbone, image_size=image_size, seed=spec.search.seed, folder=folder, store=store)
        uri = join_uri(spec.storage, "backbones", config["digest"])
        if read_manifest(store, uri) is None:  # the digest names what computes: an equal one from elsewhere will do
            commit(store, uri, {path.name: path for path in folder.iterdir()})
    return {**config, "uri": uri, "groups": len(config["groups"])}
