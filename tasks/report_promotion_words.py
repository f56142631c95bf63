"""The promotion page's words: the verdict in one sentence, what each rule found, and how to answer."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from tasks.report_forest import between, points
from tasks.report_promotion_content import Disagreements, PromotionContent
from tasks.report_words import Values, counted, number, percent, printable, short, when, words_of

SIGNS = {"refused": ("✕", "refused"), "warned": ("!", "warning"), "passed": ("✓", "passed"), "skipped": ("–", "not asked")}
TITLES = {
    "numbers": "Answers are numbers", "size": "Enough images", "overlap": "Images not seen before", "gain": "A proven gain",
    "classes": "No class breaks", "calibration": "Probabilities hold", "slices": "No slice breaks", "probe": "No negative transfer",
}  # fmt: skip
ORDER = ("refused", "warned", "passed", "skipped")
MOST_NAMED = 5


def headline(content: PromotionContent) -> str:
    """The lead's question in one sentence: which version serves, and why not the other?"""
    name, version, champion = content.name, content.version, content.champion_version
    serves = f"{name} version {champion} keeps serving" if champion else f"No version of {name} serves yet"
    metric, challenger = words_of(str(content.judgement.get("metric") or "accuracy")), percent(content.judgement.get("challenger"))
    if content.status == "promoted":
        if not champion:
            return f"{name} version {version} now serves, with {challenger} {metric} on the holdout. It is the first version."
        return f"{name} version {version} was promoted and now serves: {challenger} {metric}, {ahead(content)} version {champion}."
    if content.status == "awaiting_approval":
        than = f", {ahead(content)} version {champion}, which serves until then" if champion else ". No version serves until then"
        return f"{name} version {version} {_gated(content)} and waits for approval: {challenger} {metric}{than}."
    if content.status == "kept":
        return f"{serves}: {why_kept(content)}."
    return f"{serves}: {_unanswered(content)}."


def _unanswered(content: PromotionContent) -> str:
    """Why a version that the gate would have let through does not serve."""
    version, approver = content.version, (content.entry or {}).get("approver")
    return {
        "rejected": f"version {version} {_gated(content)}, and {approver or 'the approver'} rejected it",
        "expired": f"version {version} {_gated(content)}, but nobody approved it in time",
        "stale": f"version {version} was judged against another champion, so nothing was changed",
    }.get(content.status, f"version {version} is {words_of(content.status)}")


def _gated(content: PromotionContent) -> str:
    return "passed the gate" if content.judgement.get("status") == "promoted" else "was refused by the gate"


def why_kept(content: PromotionContent) -> str:
    """What refused, in half a sentence; a gain that was there all the same is said too."""
    rules = content.judgement.get("rules") or []
    refused = [rule for rule in rules if rule.get("outcome") == "refused"]
    if not rules:
        return f"version {content.version} is that very model"
    if not refused:
        return f"version {content.version} was not promoted"
    gain = first_figure(rule_of(content, "gain"))
    won = gain and points_of(gain) > 0 and not any(rule["name"] == "gain" for rule in refused)
    first, *others = [_refusal(rule) for rule in refused]
    said = f"version {content.version} is {_loss(gain)} ahead, but it {first}" if gain and won else f"version {content.version} {first}"
    if others:
        said += f"; it also {others[0]}"
    return said + (f", and {counted(len(others) - 1, 'more rule')} refused" if len(others) > 1 else "")


def _refusal(rule: Values) -> str:
    """What a refusing rule has against the challenger, to follow "version 4 ..."."""
    name, figure = str(rule.get("name")), first_figure(rule)
    broken = [one for one in rule.get("figures") or [] if one.get("outcome") == "refused"]
    if name == "gain" and figure:
        return _no_gain(rule, figure)
    if name in ("classes", "slices") and broken:
        if len(broken) > 1:
            return f"broke {len(broken)} {name}"
        return f"lost {_loss(broken[0])} in {'class ' if name == 'classes' else ''}“{short(printable(broken[0]['what']), 40)}”"
    return {
        "numbers": "answered some images with no number",
        "size": "had too few images to be judged on",
        "overlap": "had seen too much of the holdout in training",
        "slices": "could not be held to a slice that the holdout lacks",
        "calibration": "is surer of itself than it may be" if _names(broken) == ["ece"] else "has worse probabilities",
        "probe": "is worse than its own linear probe",
    }.get(name, f"was refused by the rule {name}")


def _no_gain(rule: Values, figure: Values) -> str:
    asked, value = number(rule.get("limit")) or 0.0, number(figure.get("value")) or 0.0
    if value < 0 and asked >= 0:
        return f"is {_loss(figure)} behind"
    if value == 0 and asked >= 0:
        return "is level with it"
    gained = f"is {_loss(figure)} {'ahead' if value >= 0 else 'behind'}"
    return f"{gained}, which luck can explain" if value > asked else f"{gained}, and more than {points(asked)} is asked for"


def ahead(content: PromotionContent) -> str:
    """By how much the challenger is before the champion: "3.0 points ahead of"."""
    difference = points_of({"value": _difference(content)})
    if difference == 0:
        return "level with"
    return f"{abs(difference):.1f} points {'ahead of' if difference > 0 else 'behind'}"


def finding(content: PromotionContent) -> str:
    """The gain with its bounds, and on what it was measured."""
    rule = rule_of(content, "gain")
    figure, judged = first_figure(rule), number(content.holdout.get("judged"))
    unseen = "" if content.unchecked else " that neither model was trained on"
    on = f" Judged on {counted(judged, 'holdout image')}{unseen}." if judged is not None else ""
    if figure is None:
        return (f"There is no champion to beat; the other rules still ran.{on}" if content.judgement.get("rules") else on).strip()
    return gain_said(rule or {}) + on


def gain_said(rule: Values) -> str:
    """What the rule on the gain found, in points."""
    figure = first_figure(rule)
    if figure is None:
        return sentence(rule.get("words"))
    metric, asked = words_of(str(figure.get("what"))).capitalize(), number(rule.get("limit")) or 0.0
    scores = f"from {percent(figure.get('other'))} to {percent(figure.get('challenger'))}"
    change = points_of(figure)
    moved = (
        f"{'rose' if change > 0 else 'fell'} by {abs(change):.1f} points, {scores}" if change else f"stayed at {percent(figure['other'])}"
    )
    bound = f"with {percent(rule.get('confidence'), 0)} confidence the change is at least {points(figure.get('low'), 1)}"
    return f"{metric} {moved}; {bound}, and more than {points(asked)} is asked for."


def rule_said(rule: Values) -> str:
    """What a rule found, for its row in the table: the gate's own words, but shares as points where there is a figure."""
    name, figures = rule.get("name"), rule.get("figures") or []
    if name == "gain" and figures:
        return gain_said(rule)
    if name == "calibration" and figures:
        return sentence("; ".join(_calibration_said(figure) for figure in figures))
    if name == "probe" and figures:
        tail = ": fine-tuning hurts" if rule.get("outcome") in ("refused", "warned") else ""
        figure, change = figures[0], points_of(figures[0])
        side = f"{abs(change):.1f} points {'above' if change > 0 else 'below'}" if change else "level with"
        return f"{words_of(str(figure.get('what'))).capitalize()} {percent(figure.get('challenger'))} is {side} its own linear probe{tail}."
    return sentence(rule.get("words"))


def _calibration_said(figure: Values) -> str:
    name, shown = ("calibration error", percent) if figure.get("what") == "ece" else (words_of(str(figure.get("what"))), _three)
    over = ", more than may be" if figure.get("outcome") == "refused" else ""
    return f"{name} {shown(figure.get('other'))} → {shown(figure.get('challenger'))}{over}"


def limit_said(rule: Values) -> str:
    """The limit of a rule as a person writes it."""
    limit, name = number(rule.get("limit")), rule.get("name")
    if limit is None or rule.get("outcome") == "skipped":
        return ""
    return {
        "numbers": "no exception",
        "size": f"at least {limit:g}",
        "overlap": f"at most {percent(limit, 0)} seen",
        "gain": f"more than {points(limit)} points",
        "classes": f"at most {100 * limit:g} points lost",
        "slices": f"at most {100 * limit:g} points lost",
        "probe": "not below the probe",
    }.get(str(name), f"{limit:g}")


def rules_said(rules: Sequence[Values]) -> tuple[str, str]:
    """How many of the rules that were asked passed, and what the others said."""
    asked = [rule for rule in rules if rule.get("outcome") != "skipped"]
    counts = {outcome: sum(rule.get("outcome") == outcome for rule in rules) for outcome in ORDER}
    words = (("refused", "refused"), ("warned", "warning" if counts["warned"] == 1 else "warnings"), ("skipped", "not asked"))
    others = [f"{counts[outcome]} {word}" for outcome, word in words if counts[outcome]]
    return f"{counts['passed']} of {len(asked)}", ", ".join(others) or "none refused, no warning"


def floor_said(rule: Values, noun: str) -> str:
    """How the classes or slices moved, counted."""
    moved = [points_of(figure) for figure in rule.get("figures") or [] if figure.get("outcome") != "skipped"]
    if not moved:
        return sentence(rule.get("words"))
    better, worse = sum(value > 0 for value in moved), sum(value < 0 for value in moved)
    limit = f" At most {100 * rule['limit']:g} points may be lost beyond noise." if number(rule.get("limit")) is not None else ""
    return f"Of {counted(len(moved), noun)}, {better} got better and {worse} worse.{limit}"


def commands(content: PromotionContent) -> list[tuple[str, str]]:
    """(command, what it does) for whoever has to act on this page; none where nobody has to."""
    name = shlex.quote(content.name)
    request = str((content.requested or {}).get("id") or "")
    if content.status == "awaiting_approval" and request:
        serves = f"version {content.version} serves"
        stays = f"version {content.champion_version} keeps serving" if content.champion_version else "no version serves"
        return [
            (f"unfreeze promote {name} --approve {shlex.quote(request)}", f"yes: {serves}"),
            (f"unfreeze promote {name} --reject {shlex.quote(request)}", f"no: {stays}"),
        ]
    if content.status in ("stale", "expired"):
        return [(f"unfreeze promote {name} --version {shlex.quote(content.version)}", "judges it again, against what serves now")]
    return []


def asked_said(content: PromotionContent) -> str:
    """Who asked for an answer, when, why, and until when it counts."""
    request = content.requested or {}
    who = f"Asked for by {request['by']}" if request.get("by") else "Asked for"
    at = f" on {when(str(request['at']))}" if request.get("at") else ""
    why = f", because: {request['reason']}" if request.get("reason") else ""
    until = f" Expires on {when(str(request['expires_at']))}." if request.get("expires_at") else ""
    return f"{who}{at}{why}".rstrip(".") + f".{until}"


def disagreements_said(found: Disagreements) -> str:
    """How often the two differ, and which way."""
    differ = found.only_challenger + found.only_rival
    if not found.images:
        return ""
    if not differ:
        return f"On each of the {counted(found.images, 'image')} both are right or both are wrong."
    return (
        f"On {differ:,} of {counted(found.images, 'image')} just one of the two is right: "
        f"the challenger on {found.only_challenger:,}, the {found.rival} on {found.only_rival:,}."
    )


def rule_of(content: PromotionContent, name: str) -> Values | None:
    return next((rule for rule in content.judgement.get("rules") or [] if rule.get("name") == name), None)


def first_figure(rule: Values | None) -> Values | None:
    """A rule's first figure, if it is a number."""
    figures = (rule or {}).get("figures") or []
    return figures[0] if figures and number(figures[0].get("value")) is not None else None


def points_of(figure: Values) -> float:
    """A change in points as it is shown, so that words and sign never differ."""
    return round(100 * (number(figure.get("value")) or 0.0), 1)


def sentence(text: Any) -> str:
    """Words of the gate as a sentence."""
    said = str(text or "")
    return said[:1].upper() + said[1:] + ("." if said and said[-1] not in ".!?" else "")


def interval_said(rule: Values | None) -> str:
    """What the ends of the drawn intervals mean."""
    confidence = number((rule or {}).get("confidence"))
    return "" if confidence is None else f"Each end of an interval holds with {100 * confidence:.4g}% confidence."


def calibration_row(figure: Values) -> dict[str, str]:
    """A figure of the calibration rule for its table: the error in points, the loss as it is."""
    shown = percent if figure.get("what") == "ece" else _three
    if figure.get("what") == "ece":
        name = "Calibration error (ECE)"
        change, interval = f"{points(figure.get('value'), 1)} points", between(figure)
    else:
        name = words_of(str(figure.get("what"))).capitalize()
        change, interval = _signed(figure.get("value")), f"{_signed(figure.get('low'))} to {_signed(figure.get('high'))}"
    if number(figure.get("low")) is None or number(figure.get("high")) is None:
        interval = ""
    return {
        "name": name, "before": shown(figure.get("other")), "after": shown(figure.get("challenger")), "change": change,
        "interval": interval, "outcome": str(figure.get("outcome") or "passed"),
    }  # fmt: skip


def _difference(content: PromotionContent) -> float | None:
    mine, theirs = (number(content.judgement.get(role)) for role in ("challenger", "champion"))
    return None if mine is None or theirs is None else mine - theirs


def _loss(figure: Values) -> str:
    return f"{abs(points_of(figure)):.1f} points"


def _names(figures: Sequence[Values]) -> list[str]:
    return [str(figure.get("what")) for figure in figures]


def _three(value: Any) -> str:
    return "–" if number(value) is None else f"{value:.3f}"


def _signed(value: Any) -> str:
    if number(value) is None:
        return "–"
    rounded = round(value, 3)
    return ("+" if rounded > 0 else "−" if rounded < 0 else "") + f"{abs(rounded):.3f}"
