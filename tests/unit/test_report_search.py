"""The search in the report, and the page of a search alone: what it says, what it draws, what it copes with."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tasks import report_cost_figures, report_search, report_search_figures, report_search_words
from tasks.report_search import render
from tasks.report_words import duration
from tests.report_cases import DECISIONS, HOSTILE, MAX_EPOCHS, search_content, searched
from tests.unit.test_report import Page, figures_in, trial


def timed(number: int, seconds: float, accuracy: float | None, status: str = "finished") -> dict[str, Any]:
    return {**trial(number, 1, 1e-3, accuracy, status), "seconds": seconds}


def test_the_headline_names_the_best_trial_and_the_page_warns_that_it_was_chosen_on_val() -> None:
    search = searched(12)
    best = search["best"]
    html = render(search_content(search))
    assert f"pets: unfreeze depth {best['unfreeze_depth']} with learning rate {best['lr']:.2g} is the best of 12 trials" in html
    assert "284 val images, so expect a little less" in html


def test_the_front_has_no_trial_that_another_beats_in_both_time_and_accuracy() -> None:
    trials = [timed(0, 1.0, 0.7), timed(1, 2.0, 0.6), timed(2, 2.0, 0.8), timed(3, 9.0, 0.8), timed(4, 10.0, 0.81), timed(5, 0.0, 0.9)]
    trials += [timed(6, 1.0, float("nan"), "diverged"), timed(7, 1.0, 0.99, "diverged"), timed(8, 1.0, None, "failed")]
    assert [one["trial_id"] for one in report_cost_figures.front({"trials_detail": trials})] == ["00000", "00002", "00004"]


def test_of_front_points_that_cost_about_the_same_the_most_accurate_is_named() -> None:
    trials = [timed(0, 1.0, 0.7), timed(1, 1.1, 0.71), timed(2, 1.2, 0.72), timed(3, 9.0, 0.8)]
    assert [(name, one["trial_id"]) for name, one in report_cost_figures.named_front({"trials_detail": trials})] == [
        ("A", "00002"),
        ("B", "00003"),
    ]


def test_rungs_are_marked_where_trials_were_judged() -> None:
    figure = report_search_figures.learning_curves(searched(40))
    assert figure is not None
    assert [shape["x0"] for shape in figure["layout"]["shapes"]] == [2, 6]


def test_the_hover_of_a_stopped_trial_says_why_it_was_stopped() -> None:
    search = searched(40)
    said = report_search_figures.descriptions(search)
    stopped = [one for one in search["trials_detail"] if one["status"] == "stopped"]
    assert stopped
    for one in stopped:
        assert "stopped early" in said[one["trial_id"]]
        assert "below the cutoff" in said[one["trial_id"]].replace("<br>", " ")


def test_a_row_for_each_rung_and_depth_counts_every_judgement_once() -> None:
    search = searched(200)
    rows = report_search_words.judgements(search)
    assert {row["rung"] for row in rows} == {2, 6}
    assert sum(row["judged"] for row in rows) == len(search["rungs"])
    assert sum(row["stopped"] for row in rows) == sum(one["status"] == "stopped" for one in search["trials_detail"])
    assert len(rows) <= 8  # 2 rungs x 4 depths, however many trials


def test_the_figure_of_endings_holds_every_trial_once() -> None:
    budget = {**timed(9, 1.0, 0.5, "stopped"), "reason": "the search's budget was spent"}
    search = {"trials_detail": [*searched(200)["trials_detail"], budget]}
    figure = report_cost_figures.how_trials_ended(search)
    assert figure is not None
    labels = list(figure["layout"]["yaxis"]["ticktext"])
    assert labels == ["stopped after 2 epochs", "stopped after 6 epochs", "stopped by the budget", "ran to the end", "ran out of memory"]
    assert sum(sum(trace["x"]) for trace in figure["data"] if trace["type"] == "bar") == 201


def test_where_nothing_was_stopped_nothing_about_stopping_is_shown() -> None:
    search = {**searched(12), "trials_detail": [timed(0, 1.0, 0.7), timed(1, 2.0, 0.8)], "rungs": []}
    html = render(search_content(search))
    assert "ended" not in figures_in(html)
    assert "What was stopped" not in html


def test_stopping_early_is_put_in_epochs_that_were_spared() -> None:
    trials = [{**timed(0, 1.0, 0.7), "epochs": 8, "epochs_run": 8}, {**timed(1, 1.0, 0.5, "stopped"), "epochs": 2, "epochs_run": 3}]
    said = report_search_words.how_it_was_stopped({"trials_detail": trials}, MAX_EPOCHS)
    assert said == "10 of 16 epochs were trained (62%), and 1 more that a later judgement discarded."


@pytest.mark.parametrize(
    ("measured", "said"),
    [
        (100.0, "took 1 min 40 s, as estimated."),
        (150.0, "50% more than the estimate of 1 min 40 s"),
        (50.0, "50% less than the estimate"),
        (420.0, "4.2 times the estimate of 1 min 40 s"),
    ],
)
def test_the_estimate_is_held_against_what_it_came_to(measured: float, said: str) -> None:
    search = {"cost": {"estimated_s": 100.0, "measured_s": measured, "prefix_s": 5.0}, "plan": {"prefix_s": 10.0, "trials_s": 90.0}}
    assert said in report_search_words.estimate_said(search)
    figure = report_cost_figures.estimate(search)
    assert figure is not None
    shown = [trace["customdata"] for trace in figure["data"] if trace["type"] == "bar"]
    assert shown == [["shared features: 10.0 s", "shared features: 5.0 s"], ["trials: 1 min 30 s", f"trials: {duration(measured - 5.0)}"]]


@pytest.mark.parametrize(
    ("computed", "said"),
    [
        (1635, "ran once over all 1,635 images"),
        (87, "ran over 87 images; the features of 1,548 were there"),
        (0, "ran over 0 images; the features of 1,635 were"),
    ],
)
def test_what_the_cache_saved_is_put_in_images(computed: int, said: str) -> None:
    assert said in report_search_words.sharing_said({}, {"computed_images": computed}, {"train": 1351, "val": 284})


def test_knn_stands_beside_the_probe_and_a_probe_below_it_is_called_odd() -> None:
    assert "(k-NN), give 70.2%" in report_search_words.features_said(searched(12))
    odd = {"probe": {"accuracy": 0.6, "knn_accuracy": 0.7}}
    assert "A probe below k-NN has not learned what the features hold" in report_search_words.features_said(odd)


def test_only_dimensions_that_vary_get_a_panel_and_a_column() -> None:
    narrow, wide = render(search_content(searched(12))), render(search_content(searched(12, wide=True)))
    assert not any(name.startswith("by-") for name in figures_in(narrow))
    assert {name for name in figures_in(wide) if name.startswith("by-")} == {
        "by-weight_decay", "by-label_smoothing", "by-layer_decay", "by-optimizer", "by-batch_size",
        "by-augmentation_strength", "by-backbone",
    }  # fmt: skip
    assert "Weight decay</th>" in wide
    assert "Weight decay</th>" not in narrow


def test_a_search_of_several_backbones_names_the_best_ones_and_tells_long_names_apart() -> None:
    search = searched(12, wide=True)
    assert f"pets: {search['best']['backbone']} with unfreeze depth" in report_search_words.headline("pets", search)
    assert "vit" not in report_search_words.headline("pets", searched(12))
    panel = report_search_figures.by_dimension(search)["by-backbone"]
    assert list(panel["layout"]["xaxis"]["ticktext"]) == [
        "vit_small_<br>patch16_224.<br>augreg_in21k",
        "vit_small_<br>patch16_224.<br>dino",
    ]


def test_any_number_of_backbones_has_a_panel() -> None:
    trials = [{**trial(number, 1, 1e-3, 0.5 + number / 50), "backbone": f"resnet{number}"} for number in range(12)]
    panel = report_search_figures.by_dimension({"trials_detail": trials})["by-backbone"]
    assert len(panel["layout"]["xaxis"]["ticktext"]) == 12


def test_the_ladders_decisions_are_listed() -> None:
    html = render(search_content(searched(12, by_depth=True)))
    assert [f"{decision[0].upper()}{decision[1:]}." for decision in DECISIONS] == re.findall(r"<li>(Depth .*?)</li>", html)


def test_a_thousand_trials_are_summarised_in_a_page_of_plotly_and_less_than_a_megabyte() -> None:
    html = render(search_content(searched(1000, wide=True)))
    own = len(html.encode()) - len(render(search_content(searched(12))).encode())
    assert own < 1_000_000
    assert html.count("<tr>") < 120
    assert "The best 50 of 1,000 trials" in html
    assert "CUDA out of memory" in html  # failed trials are far down the leaderboard, their reasons are not


def test_no_name_or_reason_becomes_markup() -> None:
    html = render(search_content(searched(12, wide=True, hostile=True)))
    html.encode("utf-8")
    page, harmless = Page(html), Page(render(search_content(searched(12, wide=True))))
    assert page.tags.count("script") == harmless.tags.count("script")
    assert page.tags.count("img") == 0
    assert page.tags.count("b") - len(report_cost_figures.named_front(searched(12, wide=True, hostile=True))) == 1
    assert HOSTILE in page.text
    said = json.loads(re.search(r'id="trials-said">(.*?)</script>', html, re.DOTALL).group(1))  # type: ignore[union-attr]
    assert not any("<img" in text or "<script" in text for text in said.values())


def test_a_search_with_hardly_anything_in_it_still_makes_a_page() -> None:
    html = render(search_content({}, dataset={}, features={}, spec={}, versions={}))
    assert figures_in(html) == {}
    assert "gave a usable model" in html


def test_the_page_is_the_same_for_the_same_search_and_dated_by_its_last_trial() -> None:
    content = search_content(searched(12))
    assert render(content) == render(content)
    assert content.created_at.startswith("2026-11-21T16:0")
    assert report_search.leaderboard(content.search)[0]["accuracy"] == content.search["best"]["accuracy"]
