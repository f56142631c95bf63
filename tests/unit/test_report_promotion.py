"""The promotion page as text: the verdict in one sentence, each rule with its outcome, and whatever odd evidence there is."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_jobs.promotion_spec import PromotionSpec
from tasks import report_forest, report_promotion_words
from tasks.gate import judge, plain_judgement
from tasks.report import render as render_report
from tasks.report_promotion import PromotionContent, disagreements, render, section
from tests.promotion_cases import BROKEN, asked, promotion
from tests.report_cases import HOSTILE
from tests.unit.test_gate import counted
from tests.unit.test_report import Page, content, figures_in

BARE = PromotionContent(name="dogs", version="2", status="kept", judgement={})


def judged(wins: int, losses: int, **changes: Any) -> PromotionContent:
    """A gate's answer to so many wins and losses, without models or images to show."""
    spec = changes.pop("spec", PromotionSpec())
    judgement = plain_judgement(judge(counted(wins, losses, **changes.pop("evidence", {})), spec))
    whole = {"name": "dogs", "version": "4", "champion_version": "3", "status": judgement["status"], "judgement": judgement} | changes
    return PromotionContent(**whole)


def test_the_verdict_stands_first_in_one_sentence() -> None:
    html = render(judged(65, 35))
    assert "<h1>dogs version 4 was promoted and now serves: 83.0% accuracy, 3.0 points ahead of version 3.</h1>" in html
    assert html.index("<h1>") < html.index('id="decision"') < html.index('id="gain"' if 'id="gain"' in html else 'id="evidence"')


@pytest.mark.parametrize(
    ("wins", "losses", "spec", "said"),
    [
        (40, 35, PromotionSpec(), "version 4 is 0.5 points ahead, which luck can explain."),
        (35, 35, PromotionSpec(), "version 4 is level with it."),
        (35, 40, PromotionSpec(), "version 4 is 0.5 points behind."),
        (65, 55, PromotionSpec(min_gain=0.02), "version 4 is 1.0 points ahead, and more than +2 is asked for."),
    ],
)
def test_a_kept_champion_is_named_with_the_reason(wins: int, losses: int, spec: PromotionSpec, said: str) -> None:
    assert report_promotion_words.headline(judged(wins, losses, spec=spec)) == f"dogs version 3 keeps serving: {said}"


def test_a_gain_that_a_broken_class_cost_is_said_with_the_class() -> None:
    said = report_promotion_words.headline(promotion(broken=BROKEN, better=1.4, pictures=False))
    assert said.startswith("dogs version 13 keeps serving: version 14 is ")
    assert "points ahead, but it lost " in said
    assert f"in class “{BROKEN}”" in said


@pytest.mark.parametrize(
    ("status", "said"),
    [
        ("awaiting_approval", "dogs version 4 passed the gate and waits for approval: 83.0% accuracy, 3.0 points ahead of version 3,"),
        ("rejected", "dogs version 3 keeps serving: version 4 passed the gate, and ada rejected it."),
        ("expired", "dogs version 3 keeps serving: version 4 passed the gate, but nobody approved it in time."),
        ("stale", "dogs version 3 keeps serving: version 4 was judged against another champion, so nothing was changed."),
        ("rolled_back", "dogs version 3 keeps serving: version 4 is rolled back."),
    ],
)
def test_every_status_has_its_sentence(status: str, said: str) -> None:
    case = judged(65, 35, status=status, entry={"verdict": "rejected", "approver": "ada"}, requested=asked())
    assert report_promotion_words.headline(case).startswith(said)
    assert said in Page(render(case)).text


def test_the_very_champion_and_a_version_that_fails_before_any_champion_are_said_plainly() -> None:
    same = judged(65, 35, evidence={"is_champion": True})
    assert report_promotion_words.headline(same) == "dogs version 3 keeps serving: version 4 is that very model."
    assert "This very model already is the champion." in Page(render(same)).text
    evidence = dataclasses.replace(counted(65, 35), champion=None)
    evidence.challenger.probabilities_NK[0] = math.nan
    case = judged(0, 0, judgement=plain_judgement(judge(evidence, PromotionSpec())), status="kept", champion_version=None, version="1")
    assert report_promotion_words.headline(case) == "No version of dogs serves yet: version 1 answered some images with no number."
    render(case)


def test_a_pending_request_shows_the_very_commands_that_answer_it() -> None:
    text = Page(render(judged(65, 35, status="awaiting_approval", requested=asked()))).text
    assert "unfreeze promote dogs --approve 9c41f07ab2e3" in text
    assert "unfreeze promote dogs --reject 9c41f07ab2e3" in text
    assert "Asked for by mira@example.org on 21 November 2026, 10:32 UTC, because: the retraining with the new photos." in text
    assert "Expires on 28 November 2026, 10:32 UTC." in text
    assert "--approve" not in render(judged(65, 35))
    assert "unfreeze promote dogs --version 4" in render(judged(65, 35, status="stale"))


def test_each_rule_has_a_row_with_its_outcome_in_words_and_what_refused_comes_first() -> None:
    rows = section(promotion(broken=BROKEN, better=1.4, pictures=False))["rules"]
    assert len(rows) == 8
    outcomes = [row["outcome"] for row in rows]
    assert outcomes == sorted(outcomes, key=report_promotion_words.ORDER.index)
    assert rows[0]["title"] == "No class breaks"
    text = Page(render(promotion(broken=BROKEN, better=1.4, pictures=False))).text
    assert "✕ refused" in " ".join(text.split())


def test_classes_stand_worst_first_with_the_refused_one_on_top() -> None:
    floor = section(promotion(broken=BROKEN, better=1.4, pictures=False))["floors"][0]
    assert floor["open"][0].label == BROKEN
    assert floor["open"][0].outcome == "refused"
    assert [row.at for row in floor["open"][1:]] == sorted(row.at for row in floor["open"][1:])


def test_five_hundred_classes_are_bounded_and_the_rest_is_counted() -> None:
    many = tuple(f"class {k:03d}" for k in range(500))
    case = promotion(classes=many, images=3000, pictures=False)
    floor = section(case)["floors"][0]
    assert (len(floor["open"]), len(floor["folded"])) == (20, 380)
    assert floor["unlisted"] + floor["skipped"] == 100
    assert len(render(case).encode()) < 6_000_000


def test_a_first_version_says_so_and_is_compared_with_its_probe() -> None:
    html = render(promotion(champion=False))
    text = Page(html).text
    assert "dogs version 1 now serves" in text
    assert "There was no champion to compare with: this is the first version of dogs." in text
    assert "Challenger against its own probe" in text
    assert "The probe is right, the challenger wrong" in text
    assert {one["name"].split(" ")[0] for one in figures_in(html)["calibration"]["data"] if one.get("name")} == {"challenger", "probe"}


def test_an_image_found_in_two_places_is_removed_once() -> None:
    case = promotion(pictures=False)
    twice = dataclasses.replace(case, overlap=case.overlap * 2)
    assert twice.removed == dataclasses.replace(twice, holdout={}).removed == 12
    assert "12 removed as seen in training" in Page(render(twice)).text


def test_the_calibration_curves_name_their_error() -> None:
    drawn = figures_in(render(promotion(pictures=False)))["calibration"]["data"]
    assert [
        one["name"].startswith(role) and "(ECE " in one["name"] for one, role in zip(drawn[1:], ("champion", "challenger"), strict=True)
    ]


def test_images_are_shown_where_just_one_is_right_the_surest_answers_first() -> None:
    case = promotion(better=0.3, pictures=False)
    found = disagreements(case.rows, most=5)
    assert (len(found.lost), len(found.won)) == (5, 5)
    assert found.images == len(case.rows)
    for rows, right, wrong in ((found.lost, "champion", "challenger"), (found.won, "challenger", "champion")):
        assert all(row[right]["class"] == row["true"] != row[wrong]["class"] for row in rows)
        sure = [row["challenger"]["probability"] for row in rows]
        assert sure == sorted(sure, reverse=True)
    assert found.digests == {row["sha256"] for row in (*found.lost, *found.won)}


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.sampled_from([0.1, 0.9, math.nan, None]))))
def test_every_answered_image_is_counted_once_whatever_its_order(answers: list[tuple[bool, bool, float | None]]) -> None:
    rows: list[dict[str, Any]] = [
        {"sha256": str(n), "true": "a", "challenger": {"class": "ab"[not mine], "probability": p}, "champion": {"class": "ab"[not theirs]}}
        for n, (mine, theirs, p) in enumerate(answers)
    ]
    found = disagreements(rows)
    assert found.images == len(rows)
    assert found.only_challenger == sum(mine and not theirs for mine, theirs, _ in answers)
    assert found.only_rival == sum(theirs and not mine for mine, theirs, _ in answers)
    assert disagreements(reversed(rows)) == found


FIGURES = st.builds(
    lambda what, value, ends, outcome: {"what": what, "value": value, "low": ends and value - ends[0], "high": ends and value + ends[1],
                                        "outcome": outcome},
    st.text(max_size=5), st.floats(-1, 1), st.none() | st.tuples(st.floats(0, 2), st.floats(0, 2)),
    st.sampled_from(["passed", "warned", "refused"]),
)  # fmt: skip


@given(st.lists(FIGURES, min_size=1), st.none() | st.floats(-1, 1))
def test_every_change_lies_on_the_axis_inside_its_interval(figures: list[dict[str, Any]], limit: float | None) -> None:
    drawn = report_forest.forest(report_forest.worst_first(figures), limit=limit)
    assert drawn
    places = [drawn.zero, *([drawn.limit] if drawn.limit is not None else []), *(tick[0] for tick in drawn.ticks)]
    assert all(0 <= place <= 100 for place in places)
    assert 1 <= len(drawn.ticks) <= report_forest.MOST_TICKS + 1
    for row in drawn.rows:
        assert 0 < row.at < 100
        assert row.low is None or row.high is None or 0 <= row.low <= row.at <= row.high <= 100


def test_figures_that_are_no_numbers_are_left_out_and_the_page_still_stands() -> None:
    case = promotion(pictures=False)
    nan = json.loads(json.dumps(case.judgement))
    for rule in nan["rules"]:
        for figure in rule["figures"]:
            figure.update(value=math.nan, low=None, high=math.inf, challenger=None, other=math.nan)
    html = render(dataclasses.replace(case, judgement=nan | {"challenger": None, "champion": math.nan}))
    text = Page(html).text
    assert "nan" not in text.lower().replace("finance", "")
    assert "None" not in text
    assert "–" in text


def test_a_result_with_hardly_anything_in_it_still_makes_a_page() -> None:
    for status in ("promoted", "kept", "awaiting_approval", "rejected", "stale", "something new"):
        text = Page(render(dataclasses.replace(BARE, status=status))).text
        assert "no entry yet" in text
        assert "None" not in text


def test_no_class_file_or_name_becomes_markup_or_an_address() -> None:
    classes = (HOSTILE, "caf\udce9\x00", "__proto__", "b" * 300)
    base = promotion(classes=classes, images=400)
    over = [{**base.overlap[0], "file": HOSTILE, "label": HOSTILE, "with_file": HOSTILE, "seen_by": [HOSTILE]}]
    pictures = dict.fromkeys(base.pictures, "https://example.org/dog.png")
    request = dict.fromkeys(asked(), HOSTILE)
    case = dataclasses.replace(
        base, name=HOSTILE, version=HOSTILE, champion_version=HOSTILE, status="awaiting_approval", overlap=over, unchecked=[HOSTILE],
        requested=request, pictures=pictures, holdout={**base.holdout, "uri": HOSTILE}, entry=dict.fromkeys(base.entry or {}, HOSTILE),
    )  # fmt: skip
    for made in (case, dataclasses.replace(case, status="kept"), dataclasses.replace(case, status=HOSTILE)):
        html = render(made)
        html.encode("utf-8")
        page = Page(html)
        assert page.tags.count("script") == Page(render(promotion(pictures=False))).tags.count("script")
        assert "img" not in page.tags
        assert all(address.startswith(("data:", "#")) for address in page.addresses)
        assert "no picture" in page.text
        figures_in(html)


def test_the_report_of_a_retraining_holds_the_same_section_and_without_one_stays_as_it_was() -> None:
    case = promotion(broken=BROKEN, better=1.4, pictures=False)
    html = render_report(content(promotion=vars(case)))
    assert report_promotion_words.headline(case) in Page(html).text
    for part in ("decision", "gain", "classes", "slices", "calibration", "disagreements", "evidence", "search", "holdout", "spec"):
        assert html.count(f'id="{part}"') == 1
    assert html.count('id="plot-calibration"') == html.count('id="plot-comparison"') == 1
    assert "What the gate decided" not in render_report(content())


def test_drawing_a_promotion_needs_no_service_and_choosing_its_images_no_drawing_library() -> None:
    heavy = (
        "import sys, tasks.report_promotion_content; assert 'plotly' not in sys.modules, 'plotly'; import tasks.report_promotion;"
        " print([name for name in ('torch', 'ray', 'mlflow', 'prefect', 'timm') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True).stdout.strip() == "[]"
