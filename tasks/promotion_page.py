"""The steps that show a verdict: the page of a promotion, beside its version in MLflow, on S3, on this disk, and on Prefect's page."""

from __future__ import annotations

from typing import Any

from infra import progress, registry, settings, tracking
from infra.object_store import join_uri, object_store
from ray_jobs.dataset import open_dataset
from ray_jobs.spec import Spec, digest_of
from tasks import approval_page, stale_pages
from tasks.policies import effect
from tasks.report_promotion_content import disagreements

PAGE = "promotion.html"


def page_content(name: str, dataset: dict[str, Any], verdict: dict[str, Any], settled: dict[str, Any] | None = None) -> dict[str, Any]:
    """The values of a PromotionContent, with small pictures of the images that the models disagree on."""
    from tasks.report_pictures import thumbnail

    shown = disagreements(verdict["rows"]).digests
    opened = open_dataset(dataset["uri"], object_store(), settings.cache_dir() / "datasets")
    pictures = {row.sha256: thumbnail(image) for row, image in opened.images(["holdout"]) if row.sha256 in shown} if shown else {}
    return {
        "name": name,
        "version": verdict["version"],
        "champion_version": verdict["champion_version"],
        "status": settled["status"] if settled else verdict["status"],
        "judgement": verdict["judgement"],
        "evaluation": verdict["scores"],
        "holdout": verdict["holdout"],
        "overlap": verdict["overlap"],
        "unchecked": verdict["unchecked"],
        "rows": verdict["rows"],
        "pictures": pictures,
        "requested": settled["request"] if settled else None,
        "entry": settled["entry"] if settled else None,
    }


@effect(name="show promotion", timeout_s=600)
def show_promotion(
    spec: Spec, dataset: dict[str, Any], verdict: dict[str, Any], settled: dict[str, Any], report_link: str | None
) -> dict[str, Any]:
    """What was settled, with its "page", and "page_path" on this disk. A request waits on Prefect's page from now on, older ones no more.

    Where a report has told of a verdict already (`report_link`), only a request gets a page of its own: it says how to answer.
    """
    stale_pages.end_all(spec.name)
    if report_link is not None and settled["request"] is None:
        return {**settled, "page": report_link}
    from tasks.report_promotion import PromotionContent, render

    with progress.step("Rendering the page of the promotion"):
        html = render(PromotionContent(**page_content(spec.name, dataset, verdict, settled)))
        page = _keep(spec, verdict["version"], html, settled)
    if settled["request"]:
        asked = approval_page.ask(settled["request"] | {"page": page["page"]})
        settled = {**settled, "request": settled["request"] | {"prefect_url": asked["url"]}}
    return {**settled, **page}


def _keep(spec: Spec, version: str, html: str, settled: dict[str, Any]) -> dict[str, str]:
    """The page beside the version's run in MLflow (for its link), below `pages/` on S3, and on this disk."""
    name = f"{spec.name}-{version}-{digest_of([settled['entry'], settled['request']])[:8]}"
    path = settings.home_dir() / "reports" / f"promotion-{name}.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html, encoding="utf-8", errors="replace")
    object_store().write(join_uri(spec.storage, "pages", spec.name, f"{name}.html"), path.read_bytes())
    found = registry.get(spec.name, version)
    assert found is not None
    tracking.add_file(found.run_id, path, as_name=path.name)
    return {"page": tracking.link(tracking.experiment_id(spec.name), found.run_id, path.name), "page_path": str(path)}
