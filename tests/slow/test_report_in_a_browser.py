"""The report opened in headless Chromium: it draws, asks nobody for anything, and fits a phone and paper."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tasks import report_promotion, report_search
from tasks.report import render
from tests.promotion_cases import BROKEN, asked, promotion
from tests.report_cases import search_content, searched
from tests.unit.test_report import content

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="needs Debian's chromium: apt-get install chromium")]
SEARCH = {"landscape", "depths", "curves", "front", "ended", "estimate", "flops"}
DIMENSIONS = {
    "by-weight_decay", "by-label_smoothing", "by-layer_decay", "by-optimizer", "by-batch_size", "by-augmentation_strength", "by-backbone",
}  # fmt: skip
RETRAIN = {"comparison", "fit", "confusion", "calibration", "counts", "seconds"}
PAGES = {
    "few": SEARCH | RETRAIN,
    "hostile": SEARCH | RETRAIN | {"by-optimizer"},
    "many": SEARCH | RETRAIN,
    "search of few": SEARCH,
    "search of hostile": SEARCH | DIMENSIONS,
    "search of many": SEARCH | DIMENSIONS,
}
"""What each page must draw."""
HOSTILE = (
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    "😀/🙃 & co",
    "a label that goes on and on and on and never seems to end",
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module", params=PAGES)
def report_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    many = tuple(f"class {i:03d}" for i in range(130))
    html = {
        "few": lambda: render(content(search=searched(12, by_depth=True))),
        "hostile": lambda: render(content(classes=HOSTILE, search=searched(12, hostile=True))),
        "many": lambda: render(content(classes=many, search=searched(400))),
        "search of few": lambda: report_search.render(search_content(searched(12, by_depth=True))),
        "search of hostile": lambda: report_search.render(search_content(searched(12, wide=True, hostile=True))),
        "search of many": lambda: report_search.render(search_content(searched(1000, wide=True))),
    }[str(request.param)]()
    path = tmp_path_factory.mktemp("report") / f"{request.param}.html"
    path.write_text(html, encoding="utf-8")
    return path


class Opened:
    """A report in a page, with everything that the browser complained about or asked for."""

    def __init__(self, browser: Browser, path: Path, *, width: int, scheme: str = "light") -> None:
        self.page: Page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)  # type: ignore[arg-type]
        self.page.set_default_timeout(600_000)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.complaints.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-drawn]")

    def drawn(self) -> set[str]:
        return set(
            self.page.eval_on_selector_all(".plot:has(svg.main-svg)", "places => places.map(place => place.id.replace('plot-', ''))")
        )


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light")])
def test_every_figure_is_drawn_without_a_complaint_or_an_outside_request(
    browser: Browser, report_file: Path, width: int, scheme: str
) -> None:
    opened = Opened(browser, report_file, width=width, scheme=scheme)
    assert opened.drawn() == PAGES[report_file.stem]
    assert opened.complaints == []
    assert [url for url in opened.requests if not url.startswith("data:")] == [report_file.as_uri()]
    opened.page.close()


@pytest.mark.parametrize("width", [390, 320])
def test_a_phone_scrolls_down_only(browser: Browser, report_file: Path, width: int) -> None:
    opened = Opened(browser, report_file, width=width)
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    assert (
        opened.page.evaluate("Math.max(...[...document.querySelectorAll('.plot svg')].map(svg => svg.getBoundingClientRect().right))")
        <= width
    )
    opened.page.close()


@pytest.fixture(scope="module", params=["broken class", "waiting", "first version", "hostile", "three hundred classes", "in a retraining"])
def promotion_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    many = tuple(f"class {i:03d}" for i in range(300))
    html = {
        "broken class": lambda: report_promotion.render(promotion(broken=BROKEN, better=1.4)),
        "waiting": lambda: report_promotion.render(promotion(better=0.8, status="awaiting_approval", requested=asked(), entry=None)),
        "first version": lambda: report_promotion.render(promotion(champion=False)),
        "hostile": lambda: report_promotion.render(
            promotion(classes=HOSTILE, images=400, name="x" * 60, unchecked=[HOSTILE[1]], status="stale")
        ),
        "three hundred classes": lambda: report_promotion.render(promotion(classes=many, images=3000)),
        "in a retraining": lambda: render(content(search=searched(12), promotion=vars(promotion(broken=BROKEN, better=1.4)))),
    }[str(request.param)]()
    path = tmp_path_factory.mktemp("promotion") / f"{request.param}.html"
    path.write_text(html, encoding="utf-8")
    return path


@pytest.mark.parametrize(("width", "scheme"), [(1280, "dark"), (390, "light")])
def test_a_promotion_shows_every_section_without_a_complaint_a_request_or_a_thing_cut_off(
    browser: Browser, promotion_file: Path, width: int, scheme: str
) -> None:
    opened = Opened(browser, promotion_file, width=width, scheme=scheme)
    assert {"comparison", "calibration"} <= opened.drawn()
    first = promotion_file.stem == "first version"
    for part in ("decision", "gain", *(() if first else ("classes", "slices")), "calibration", "disagreements", "evidence"):
        assert opened.page.locator(f"#{part} h2").is_visible(), part
    for drawing in opened.page.locator(".forest tbody tr:visible .dot").all()[:3]:
        box, row = drawing.bounding_box(), drawing.locator("xpath=ancestor::td").bounding_box()
        assert box
        assert row
        assert row["x"] <= box["x"]
        assert box["x"] + box["width"] <= row["x"] + row["width"]
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    assert opened.complaints == []
    assert [url for url in opened.requests if not url.startswith("data:")] == [promotion_file.as_uri()]
    opened.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    opened.page.set_viewport_size({"width": 680, "height": 900})
    opened.page.emulate_media(media="print")
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= 688  # A4 less its margins, in CSS pixels
    assert opened.page.pdf(format="A4")[:5] == b"%PDF-"
    opened.page.close()


def test_hovering_a_trial_tells_everything_about_it(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(render(content()), encoding="utf-8")
    opened = Opened(browser, path, width=1280)
    best = opened.page.locator("#plot-landscape .scatterlayer .point").nth(2)
    best.scroll_into_view_if_needed()
    box = best.bounding_box()
    assert box
    opened.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    hover = opened.page.wait_for_selector("#plot-landscape .hoverlayer .hovertext")
    assert hover
    said = hover.text_content() or ""
    assert "trial 00002" in said
    assert "unfreeze depth 2, learning rate 0.0005" in said
    opened.page.close()


def test_hovering_the_end_of_a_stopped_trial_tells_why_it_was_stopped(browser: Browser, tmp_path: Path) -> None:
    path, search = tmp_path / "report.html", searched(12, by_depth=True)
    path.write_text(report_search.render(search_content(search)), encoding="utf-8")
    opened = Opened(browser, path, width=1280)
    said = opened.page.evaluate(
        """() => document.getElementById("plot-curves").data
        .filter((trace) => trace.marker && trace.marker.symbol === "circle-open").flatMap((trace) => trace.text)"""
    )
    assert len(said) == sum(one["status"] == "stopped" for one in search["trials_detail"]) > 0
    assert all("below the cutoff" in text.replace("<br>", " ") for text in said)
    opened.page.close()


def test_paper_gets_light_figures_that_fit_the_page_and_the_screen_gets_its_own_back(
    browser: Browser, report_file: Path, tmp_path: Path
) -> None:
    opened = Opened(browser, report_file, width=1280, scheme="dark")
    before = opened.page.evaluate("document.getElementById('plot-landscape').clientWidth")
    opened.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    opened.page.emulate_media(media="print")
    widths = opened.page.eval_on_selector_all(".plot .main-svg", "all => all.map(svg => svg.getBoundingClientRect().width)")
    assert max(widths) <= 688  # A4 less its margins, in CSS pixels
    assert opened.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert opened.page.evaluate("[...document.querySelectorAll('details')].every(one => one.open)")
    opened.page.emulate_media(media="screen")
    opened.page.evaluate("dispatchEvent(new Event('afterprint'))")
    opened.page.wait_for_function(f"document.querySelector('#plot-landscape .main-svg').getBoundingClientRect().width > {before} - 2")
    assert not opened.page.evaluate("[...document.querySelectorAll('details')].some(one => one.open)")
    assert opened.page.pdf(format="A4")[:5] == b"%PDF-"
    assert opened.complaints == []
    opened.page.close()
