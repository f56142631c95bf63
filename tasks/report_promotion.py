"""The promotion page: what the gate decided on a version and why, for the report of a retraining and as a page of its own."""

from __future__ import annotations

from typing import Any

from tasks import report_figures, report_forest, report_promotion_words, report_words
from tasks.report_page import KeyFigure, render_page
from tasks.report_pictures import inside
from tasks.report_promotion_content import Disagreements, PromotionContent, disagreements
from tasks.report_words import Values, number, percent, short

__all__ = ["PromotionContent", "disagreements", "figures", "render", "section"]

MOST_OPEN, MOST_LISTED = 20, 400
MOST_OVERLAPS = 50


def render(content: PromotionContent) -> str:
    """The whole page as text, the same for the same content."""
    return render_page(
        "report_of_promotion.html.j2",
        spec={},
        hovers={},
        figures=figures(content),
        content=content,
        key_figures=key_figures(content),
        promotion=section(content),
    )


def section(content: PromotionContent) -> dict[str, Any]:
    """What the template of the promotion's part shows besides the figures."""
    words, rules = report_promotion_words, content.judgement.get("rules") or []
    found = disagreements(content.rows)
    return {
        "content": content,
        "headline": words.headline(content),
        "finding": words.finding(content),
        "commands": words.commands(content),
        "rules": [rule_row(rule) for rule in sorted(rules, key=lambda rule: words.ORDER.index(rule["outcome"]))],
        "rules_said": " passed, ".join(words.rules_said(rules)),
        "models": models(content.evaluation),
        "gains": gains(content),
        "floors": [floor for name, noun in (("classes", "class"), ("slices", "slice")) if (floor := floor_of(content, name, noun))],
        "calibration": [words.calibration_row(one) for one in (words.rule_of(content, "calibration") or {}).get("figures") or []],
        "disagreements": found,
        "disagreements_said": words.disagreements_said(found),
        "galleries": galleries(content, found),
        "overlap": content.overlap[:MOST_OVERLAPS],
        "more_overlap": max(0, len(content.overlap) - MOST_OVERLAPS),
    }


def figures(content: PromotionContent) -> dict[str, report_figures.Figure | None]:
    """The figures that plotly draws, by name; the changes with their intervals are drawn by the template."""
    judged = {role: content.evaluation.get(role) for role in ("challenger", content.rival)}
    return {"comparison": report_figures.comparison(content.evaluation), "calibration": report_figures.calibration(judged)}


def key_figures(content: PromotionContent) -> list[KeyFigure]:
    """(name, value, remark) of the handful of numbers that a lead looks at first."""
    judgement, words = content.judgement, report_promotion_words
    metric = report_words.words_of(str(judgement.get("metric") or "accuracy"))
    passed, others = words.rules_said(judgement.get("rules") or [])
    judged = number(content.holdout.get("judged"))
    return [
        ("Challenger", percent(judgement.get("challenger")), f"{metric} of version {short(content.version, 20)}"),
        rival_figure(content, metric),
        gain_figure(content),
        worst_figure(content),
        ("Rules passed", passed, others),
        ("Images judged", "–" if judged is None else f"{judged:,.0f}", f"{content.removed:,} removed as seen in training"),
    ]


def rival_figure(content: PromotionContent, metric: str) -> KeyFigure:
    if content.rival == "champion":
        return "Champion", percent(content.judgement.get("champion")), f"{metric} of version {short(content.champion_version, 20)}"
    probe = content.evaluation.get("probe") or {}
    return "Its own probe", percent(probe.get(content.judgement.get("metric"))), f"{metric} without fine-tuning"


def gain_figure(content: PromotionContent) -> KeyFigure:
    name = "gain" if content.rival == "champion" else "probe"
    figure = report_promotion_words.first_figure(report_promotion_words.rule_of(content, name))
    title = "Change" if content.rival == "champion" else "Over the probe"
    if figure is None:
        return title, "–", "nothing to compare with"
    return title, report_forest.points(figure["value"], 1), f"points, interval {report_forest.between(figure) or '–'}"


def worst_figure(content: PromotionContent) -> KeyFigure:
    """The class that lost most; without a champion the class that is found least."""
    rule = report_promotion_words.rule_of(content, "classes") or {}
    worst = report_forest.worst_first(rule.get("figures") or [])
    if worst:
        least = min(worst, key=lambda one: float(one["value"]))
        return "Lowest class", report_forest.points(least["value"], 1), f"points recall: {short(least['what'], 24)}"
    found = (content.evaluation.get("challenger") or {}).get("per_class") or {}
    recalls = sorted((value, label) for label, one in found.items() if (value := number(one.get("recall"))) is not None)
    return ("Weakest class", percent(recalls[0][0]), f"recall: {short(recalls[0][1], 24)}") if recalls else ("Weakest class", "–", "")


def models(evaluation: Values) -> list[dict[str, Any]]:
    """Challenger, champion and probe, those that exist, for the table."""
    return [{"kind": kind, **evaluation[kind]} for kind in report_figures.MODELS if evaluation.get(kind)]


def rule_row(rule: Values) -> dict[str, str]:
    """A rule as a row of the table."""
    words, name = report_promotion_words, str(rule.get("name"))
    return {
        "title": words.TITLES.get(name, name), "outcome": rule["outcome"], "said": words.rule_said(rule), "limit": words.limit_said(rule),
    }  # fmt: skip


def gains(content: PromotionContent) -> dict[str, Any] | None:
    """The challenger against champion and probe, on one axis, with the gain that is asked for as its limit."""
    words, drawn = report_promotion_words, []
    gain = words.rule_of(content, "gain")
    champion = f"the champion, version {content.champion_version}" if content.champion_version else "the champion"
    for rule, against in ((gain, champion), (words.rule_of(content, "probe"), "its own linear probe")):
        figure = words.first_figure(rule)
        if rule and figure:
            drawn.append({**figure, "what": against, "outcome": rule["outcome"], "confidence": rule.get("confidence")})
    asked = number((gain or {}).get("limit")) if words.first_figure(gain) else None
    forest = report_forest.forest(drawn, limit=asked)
    if forest is None:
        return None
    ends = [f"{percent(one['confidence'], 0)} against {one['what']}" for one in drawn if number(one.get("confidence")) is not None]
    said = "" if not ends else f"Each end of an interval holds with a confidence of {', '.join(ends)}."
    if asked is not None:
        said += " Dashed: the gain that is asked for; the whole interval against the champion must lie beyond it."
    return {"forest": forest, "said": said, "metric": str(content.judgement.get("metric") or "accuracy")}


def floor_of(content: PromotionContent, name: str, noun: str) -> dict[str, Any] | None:
    """The classes, or slices, worst first: those shown at once, those behind a click, and how many more there are."""
    words, rule = report_promotion_words, report_promotion_words.rule_of(content, name)
    ranked = report_forest.worst_first((rule or {}).get("figures") or [])
    limit = number((rule or {}).get("limit"))
    floor = None if limit is None or limit >= 1 else -limit
    forest = report_forest.forest(ranked[:MOST_LISTED], limit=floor)
    if rule is None or forest is None:
        return None
    opened = MOST_OPEN if len(ranked) > MOST_OPEN + 3 else len(ranked)  # a click for three rows would be one too many
    return {
        "id": name, "noun": noun, "rule": rule_row(rule), "forest": forest, "open": forest.rows[:opened], "folded": forest.rows[opened:],
        "unlisted": max(0, len(ranked) - MOST_LISTED), "skipped": len(rule.get("figures") or []) - len(ranked),
        "said": words.floor_said(rule, noun), "interval_said": words.interval_said(rule),
        "cut": any(row.cut_low or row.cut_high for row in forest.rows),
    }  # fmt: skip


def galleries(content: PromotionContent, found: Disagreements) -> list[dict[str, Any]]:
    """The images to show: first those that the challenger loses, for they are what a promotion costs."""
    rival = found.rival
    kinds = (
        ("lost", f"The {rival} is right, the challenger wrong", found.lost, found.only_rival),
        ("won", f"The challenger is right, the {rival} wrong", found.won, found.only_challenger),
    )
    return [
        {"kind": kind, "title": title, "count": count, "images": [_picture(content, row, rival) for row in rows]}
        for kind, title, rows, count in kinds
    ]  # fmt: skip


def _picture(content: PromotionContent, row: Values, rival: str) -> dict[str, Any]:
    answers = [{"role": role, **row[role], "right": row[role].get("class") == row.get("true")} for role in ("challenger", rival)]
    return {
        "image": inside(content.pictures.get(str(row.get("sha256")))),
        "true": row.get("true"),
        "file": row.get("file"),
        "answers": answers,
    }
