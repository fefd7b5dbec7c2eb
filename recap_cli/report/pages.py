"""Pages for a browser: plain values in, one HTML text out that needs nothing else, neither files nor a network.

Figures are SVG in the page, drawn by the code that draws those in files; `inline_svg` gives them the page's colours, dark or
light, and its letters. A phone shows them at their own size.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from recap_cli.report import joined_page
from recap_cli.report.comparison_page import view as comparison_view
from recap_cli.report.state_page import view as state_view
from recap_cli.report.template import MARK, MARK_WITHIN_BYTES, render

__all__ = ["MARK", "MARK_WITHIN_BYTES", "joined_results_page", "results_page", "state_page"]


def state_page(found: Mapping[str, Any]) -> str:
    """The page of a state, of what `report.report.of_state` gives."""
    return render("state.html", {**found, **state_view(found)})


def results_page(found: Mapping[str, Any]) -> str:
    """The page of a comparison, of what `compare.schema.read` gives."""
    return render("comparison.html", {**found, **comparison_view(found)})


def joined_results_page(found: Sequence[Mapping[str, Any]]) -> str:
    """The page of several comparisons: a table over all of them, and a section for each."""
    sections = []
    for number, (one, title) in enumerate(zip(found, joined_page.titles(found), strict=True), 1):
        shown = {**one, **comparison_view(one, f"c{number}-", level=3)}
        html = render("comparison_facts.html", shown) + render("comparison_body.html", shown)
        sections.append(
            {"at": shown["at"], "title": title, "metric": one["metric"], "held_out": shown["held_out"], "html": html}
        )
    return render("joined.html", {"comparisons": sections, "summary": joined_page.summary(found)})
