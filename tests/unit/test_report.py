"""The report as text: what it says, what it escapes, and what it copes with."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from typing import Any

import pytest
from PIL import Image
from plotly.offline import get_plotlyjs

from tasks import report, report_figures, report_search_figures, report_search_words, report_words
from tasks.report import ReportContent, render, thumbnail


def png(colour: str = "red", size: tuple[int, int] = (40, 20)) -> bytes:
    written = io.BytesIO()
    Image.new("RGB", size, colour).save(written, "PNG")
    return written.getvalue()


def scores(classes: list[str], right: int = 8, wrong: int = 2) -> dict[str, Any]:
    """A model that is right `right` times a class and takes `wrong` for the next class."""
    count = len(classes)
    confusion = [[right if j == i else wrong if j == (i + 1) % count else 0 for j in range(count)] for i in range(count)]
    share = right / (right + wrong)
    per_class = {label: {"precision": share, "recall": share, "f1": share, "support": right + wrong} for label in classes}
    averages = dict.fromkeys(("accuracy", "balanced_accuracy", "macro_precision", "macro_recall", "macro_f1"), share)
    reliability = [{"confidence": 0.95, "accuracy": share, "count": count * 10}, {"confidence": None, "accuracy": None, "count": 0}]
    rest = {"log_loss": 0.6, "ece": 0.15, "images": 10 * count, "per_class": per_class, "confusion": confusion, "reliability": reliability}
    return {**averages, **rest}


def trial(number: int, depth: int, lr: float, accuracy: float | None, status: str = "finished") -> dict[str, Any]:
    epochs = {"finished": 4, "stopped": 2, "diverged": 1}.get(status, 0)
    curve = [{"epoch": e + 1, "val_accuracy": accuracy, "val_loss": 0.5, "train_loss": 0.4} for e in range(epochs)]
    detail = {"trial_id": f"{number:05d}", "unfreeze_depth": depth, "lr": lr, "accuracy": accuracy, "epochs": epochs}
    return {**detail, "status": status, "seconds": 2.0 * epochs * (1 + depth), "curve": curve}


def content(classes: tuple[str, ...] = ("cat", "dog", "owl"), trials: list[dict[str, Any]] | None = None, **changes: Any) -> ReportContent:
    """A plausible small result; the browser test uses it too."""
    labels = sorted(classes)
    trials = trials or [
        trial(0, 0, 1e-3, 0.70), trial(1, 1, 1e-3, 0.80), trial(2, 2, 5e-4, 0.801), trial(3, 2, 5e-3, 0.60, "stopped"),
        trial(4, 2, 1e-2, float("nan"), "diverged"), trial(5, 2, 2e-3, None, "out_of_memory"), trial(6, 1, 2e-3, None, "failed"),
    ]  # fmt: skip
    counts = {label: {"train": 70, "val": 15, "holdout": 15} for label in labels}
    total = {split: sum(by_split[split] for by_split in counts.values()) for split in ("train", "val", "holdout")}
    size = {"min": 20, "median": 40, "max": 80}
    fit_curve = [{"epoch": e, "train_loss": 1 / e, "val_accuracy": 0.6 + 0.05 * e, "val_loss": 1 / e, "seconds": 2.0} for e in (1, 2, 3)]
    whole = ReportContent(
        name="pets",
        created_at="2026-11-21T10:32:05+00:00",
        spec={"name": "pets", "data": {"source": "pets.zip"}},
        versions={"torch": "2.15.0", "timm": "1.0.31"},
        git_commit=None,
        dataset={"version": "9f86d0", "uri": "s3://unfreeze/datasets/pets/9f86d0", "images": sum(total.values()), "classes": labels,
                 **total, "quarantined": 3, "duplicates": 1, "imbalance_ratio": 1.5},
        stats={"counts": counts, "width": size, "height": size, "modes": {"RGB": 300}, "quarantine_reasons": {"conflicting_labels": 3}},
        samples=[{"label": label, "image": thumbnail(png())} for label in labels],
        search={"search_id": "5c1d7e", "trials": len(trials), "best": {"unfreeze_depth": 2, "lr": 5e-4, "accuracy": 0.801},
                "probe": {"lr": 1e-3, "accuracy": 0.70, "val_loss": 0.9}, "seconds": 93.4, "trials_detail": trials},
        fit={"workers": 2, "epochs": 3, "accuracy": 0.82, "val_loss": 0.5, "unfreeze_depth": 2, "lr": 5e-4, "curve": fit_curve,
             "stopped_early": True, "best_epoch": 3},
        chosen="fit",
        chosen_reason="The fit is better than the probe on val.",
        evaluation={"challenger": scores(labels), "champion": scores(labels, 7, 3), "probe": scores(labels, 6, 4)},
        mistakes=[{"image": thumbnail(png()), "file": "cat/1.png", "true": labels[0], "predicted": labels[-1], "probability": 0.97}],
        decision={"status": "promoted", "reason": "accuracy rose by 10.0 points", "metric": "accuracy", "challenger": 0.8, "champion": 0.7,
                  "min_gain": 0.0, "version": "4", "champion_version": "3"},
        seconds={"total": 171.4, "search": 93.4, "prepare": 6.2},
        features={"computed_images": 255},
    )  # fmt: skip
    return dataclasses.replace(whole, **changes)


class Page(HTMLParser):
    """What a browser would make of a page: its text by id of the enclosing section, its scripts, and every address in it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.scripts, self.addresses, self.tags = "", [""], [], []
        self.feed(html.replace(get_plotlyjs(), ""))  # five megabytes that say nothing about us

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data", "poster")]
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "script":
            self.scripts[-1] += data
        else:
            self.text += data

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            self.tags.append("/script")


def figures_in(html: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', html, re.DOTALL)
    assert found
    return dict(json.loads(found.group(1)))


def test_the_headline_says_what_was_promoted_and_what_it_beat() -> None:
    assert "<h1>pets version 4 was promoted and now serves: 80.0% accuracy on the holdout, 10.0 points above version 3.</h1>" in render(
        content()
    )


def test_a_kept_champion_is_named_as_the_one_that_serves() -> None:
    decision = {**content().decision, "status": "kept", "challenger": 0.69, "champion": 0.7, "min_gain": 0.01}
    html = render(content(decision=decision))
    assert "pets version 3 keeps serving: version 4 reached 69.0% accuracy and does not beat its 70.0% by more than 1 points." in html


def test_the_headline_never_says_that_a_better_challenger_did_not_beat_the_champion() -> None:
    decision = {**content().decision, "status": "kept", "challenger": 0.9, "champion": 0.7}
    assert "does not beat" not in report_words.headline("pets", decision, "fit")
    assert "version 3 keeps serving" in report_words.headline("pets", decision, "fit")


def test_a_first_version_has_no_champion_column_and_says_so() -> None:
    decision = {**content().decision, "champion": None, "champion_version": None, "version": "1"}
    html = render(content(decision=decision, evaluation={**content().evaluation, "champion": None}))
    assert "pets version 1 now serves, with 80.0% accuracy on the holdout. It is the first version." in html
    assert "There was no champion to compare with" in html
    assert "F1 vs champion" not in html
    assert "Against the probe" in html


def test_negative_transfer_is_said_at_the_top() -> None:
    html = render(content(chosen="probe", chosen_reason="The fit reached 60% on val, the probe 70%."))
    notice = html.index("Negative transfer")
    assert html.index("<h1>") < notice < html.index('id="decision"')
    assert "The fit reached 60% on val, the probe 70%." in html[notice : notice + 300]
    assert "Negative transfer" not in render(content())
    assert "Negative transfer" not in render(content(chosen="probe", fit={**content().fit, "unfreeze_depth": 0}))


def test_a_fit_that_falls_short_of_its_trial_is_said_at_the_top_and_is_no_negative_transfer() -> None:
    for chosen in ("fit", "probe"):
        fit = {**content().fit, "falls_short": True, "augmentation": "none"}
        html = render(content(chosen=chosen, chosen_reason="The fit reached 60% on val, its trial 90%.", fit=fit))
        notice = html.index("falls short of its trial")
        assert html.index("<h1>") < notice < html.index('id="decision"')
        assert "its trial 90%." in html[notice : notice + 300]
        assert "Negative transfer" not in html
        assert "trained without augmentation" in html


@pytest.mark.parametrize(
    "label", ["<script>alert(1)</script>", "</script><img src=x onerror=alert(1)>", '"><b>', "a & b", "😀/🙃", "caf\udce9", "\x00\x1b"]
)
def test_no_label_becomes_markup_and_every_page_can_be_written(label: str) -> None:
    mistake = {"image": thumbnail(png()), "file": label, "true": label, "predicted": label, "probability": 0.9}
    html = render(content(classes=(label, "other"), mistakes=[mistake], name="pets", chosen="probe", chosen_reason=label))
    html.encode("utf-8")
    page, harmless = Page(html), Page(render(content(classes=("harmless", "other"), chosen="probe")))
    assert page.tags.count("script") == harmless.tags.count("script")
    assert page.tags.count("img") == harmless.tags.count("img")
    shown = report_words.printable(label) if label != "\x00\x1b" else "\ufffd"
    assert shown in page.text
    figures_in(html)


def test_plotly_gets_labels_as_text_and_not_as_its_own_markup() -> None:
    figure = figures_in(render(content(classes=("<b>bold</b>", "other"))))["confusion"]
    assert "&lt;b&gt;bold&lt;/b&gt;" in figure["layout"]["yaxis"]["ticktext"]


def test_the_page_refers_to_nothing_outside_itself() -> None:
    evil = [
        {"label": "cat", "image": "https://example.org/cat.png"},
        {"label": "dog", "image": 'data:image/png;base64,AA" onerror="alert(1)'},
    ]
    page = Page(render(content(samples=evil)))
    assert page.addresses
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    assert "no picture" in page.text


def test_plotly_is_inlined_once_and_the_page_stays_below_six_megabytes() -> None:
    html = render(content())
    assert html.count("plotly.js v") == 1
    assert len(html.encode()) < 6_000_000


def test_a_thousand_trials_and_a_hundred_classes_stay_below_six_megabytes() -> None:
    trials = [
        trial(i, i % 5, 1e-4 * (1 + i % 90), 0.6 + 0.3 * ((i * 7) % 100) / 100, "stopped" if i % 3 else "finished") for i in range(1000)
    ]
    classes = tuple(f"class {i:03d}" for i in range(100))
    html = render(content(classes=classes, trials=trials))
    assert len(html.encode()) < 6_000_000
    drawn = figures_in(html)["curves"]["data"]
    assert (
        sum(one["x"].count(None) for one in drawn if one.get("legendgroup") and one.get("customdata") and "here" in one["hovertemplate"])
        == report_search_figures.MOST_CURVES
    )


def test_every_trial_is_in_the_landscape_with_the_way_it_ended() -> None:
    figure = report_search_figures.landscape(content().search)
    assert figure is not None
    said = report_search_figures.descriptions(content().search)
    hovers = [said[name] for trace in figure["data"] if trace.get("meta") == report_search_figures.TRIALS for name in trace["customdata"]]
    assert sorted(re.findall(r"trial (\d+)</b>: ([a-z ]+)", " ".join(hovers))) == [
        ("00000", "ran to the end"), ("00001", "ran to the end"), ("00002", "ran to the end"), ("00003", "stopped early"),
        ("00004", "diverged"), ("00005", "out of memory"), ("00006", "failed"),
    ]  # fmt: skip
    assert any(trace.get("text") == ["<b>best 80.1%</b>"] and trace["x"] == [5e-4] for trace in figure["data"])


def test_a_stopped_trials_curve_ends_where_it_was_stopped() -> None:
    figure = report_search_figures.learning_curves(content().search)
    assert figure is not None
    ends = [trace["x"] for trace in figure["data"] if trace.get("marker", {}).get("symbol") == "circle-open"]
    assert [x for xs in ends for x in xs] == [2]


def test_saturation_is_put_in_words() -> None:
    said = report_search_words.does_deeper_pay(content().search)
    assert (
        said == "Depth 1 is enough: it reaches 80.0%, 10.0 points above depth 0; depth 2 reaches 80.1% at 1.5 times the time of an epoch."
    )


def test_a_diverged_trial_cannot_be_the_best() -> None:
    best = report_search_words.best_trial({"trials_detail": content().search["trials_detail"]})
    assert best is not None
    assert best["trial_id"] == "00002"


def test_confusion_rows_are_shares_and_cells_show_counts() -> None:
    classes = ["cat", "dog", "owl"]
    figure = report_figures.confusion_matrix(scores(classes), classes)
    assert figure is not None
    heatmap = figure["data"][0]
    assert heatmap["z"][0] == [0.8, 0.2, None]
    assert heatmap["text"][0] == ["8", "2", ""]
    assert figure["layout"]["yaxis"]["range"] == [2.5, -0.5]  # the first true class on top, as in a table


def test_of_very_many_classes_the_most_confused_are_drawn() -> None:
    counts = [[10 if i == j else 0 for j in range(300)] for i in range(300)]
    counts[250][7] = 5
    shown = report_figures.confused_classes(counts)
    assert len(shown) == report_figures.MOST_CONFUSED
    assert {7, 250} <= set(shown)


def test_classes_are_listed_weakest_first_with_the_change_against_champion_and_probe() -> None:
    evaluation = content().evaluation
    evaluation["challenger"]["per_class"]["owl"] = {"precision": None, "recall": 0.5, "f1": 0.5, "support": 10}
    evaluation["challenger"]["per_class"]["dog"] = {"precision": None, "recall": None, "f1": None, "support": 0}
    rows = report.class_rows(evaluation)
    assert [(row["label"], row["champion"], row["probe"]) for row in rows] == [
        ("owl", -20.0, -10.0),
        ("cat", 10.0, 20.0),
        ("dog", None, None),
    ]


def test_a_result_with_hardly_anything_in_it_still_makes_a_page() -> None:
    bare = content(
        stats={}, samples=[], mistakes=[], seconds={}, features={}, fit={}, search={}, versions={}, spec={},
        dataset={"classes": ["cat", "dog"]},
        evaluation={"challenger": {}, "champion": None, "probe": {}}, decision={"status": "kept", "reason": ""},
    )  # fmt: skip
    html = render(bare)
    assert figures_in(html).keys() <= {"comparison"}
    assert "no version serves yet" in html


def test_of_many_samples_every_class_shows_one_before_any_shows_two() -> None:
    samples = [{"label": f"class {i}"} for i in range(50) for _ in range(2)]
    labels = [sample["label"] for sample in report.some_samples(samples)]
    assert len(labels) == report.MOST_SAMPLES
    assert len(set(labels)) == 50


def test_a_thumbnail_is_a_small_picture_and_broken_bytes_are_none() -> None:
    uri = thumbnail(png(size=(400, 200)), side=96)
    assert report.DATA_URI.fullmatch(uri)
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as small:
        assert small.size == (96, 48)
    assert thumbnail(b"") == thumbnail(b"no image") == thumbnail(png()[:40]) == ""


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.0, "0.0 s"), (0.04, "< 0.1 s"), (59.96, "1 min 00 s"), (171.4, "2 min 51 s"), (7260, "2 h 01 min"), (float("nan"), "–")],
)
def test_durations_read_as_a_person_says_them(seconds: float, said: str) -> None:
    assert report_words.duration(seconds) == said


def test_the_interval_of_a_share_stays_within_nought_and_one() -> None:
    low, high = report_words.wilson(1.0, 20)
    assert 0.83 < low < 0.85
    assert high == pytest.approx(1.0)


def test_rendering_needs_no_service_and_no_training_library() -> None:
    heavy = "import sys, tasks.report; print([name for name in ('torch', 'ray', 'mlflow', 'prefect', 'timm') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True).stdout.strip() == "[]"
