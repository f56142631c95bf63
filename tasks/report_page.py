"""What every page of a report shares: its template, plotly.js inside it, and JSON that is safe in a script."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from tasks import report_promotion_words, report_search_words, report_words
from tasks.report_figures import Figure

KeyFigure = tuple[str, str, str]
"""A name, a value and a remark."""


def render_page(
    template: str, *, spec: Mapping[str, Any], figures: Mapping[str, Figure | None], hovers: Mapping[str, str], **values: Any
) -> str:
    """The whole page as text; nothing in it asks the network for anything. `hovers` are the descriptions of the trials by name."""
    drawn = {name: figure for name, figure in figures.items() if figure is not None}
    page = _environment().get_template(template).render(
        figures=drawn,
        figures_json=for_script(drawn),
        hovers_json=for_script(hovers),
        spec_text=json.dumps(spec, indent=2, ensure_ascii=False),
        plotly_js=get_plotlyjs(),
        **values,
    )  # fmt: skip
    return re.sub(r"[\ud800-\udfff\x00]", "\ufffd", page)  # labels from file names that are no UTF-8: the page must still be writable


def for_script(values: Any) -> Markup:
    """JSON that is safe inside a <script> element, with NaN as null."""
    text = json.dumps(finite(values), separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    if isinstance(value, float):
        return (
            None if report_words.number(value) is None else float(f"{value:.5g}")
        )  # more digits than a screen shows only make the page heavier
    return value


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "percent": report_words.percent, "rate": report_words.rate, "duration": report_words.duration, "plain": report_words.plain,
        "words": report_words.words_of, "counted": report_words.counted, "number": report_words.number, "when": report_words.when,
        "short": report_words.short, "value_of": report_search_words.value_of,
    }  # fmt: skip
    environment.globals |= {"words_about": report_words, "search_words": report_search_words, "promotion_words": report_promotion_words}
    return environment
