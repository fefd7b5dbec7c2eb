"""Pages for a browser: plain values in, one HTML text out that needs nothing else, neither files nor a network.

Figures are SVG in the page, drawn by the code that draws those in files; `inline_svg` gives them the page's colours, dark or
light, and its letters. A phone shows them at their own size.
"""

from collections.abc import Mapping
from typing import Any

from recap_cli.report.comparison_page import view as comparison_view
from recap_cli.report.state_page import view as state_view
from recap_cli.report.template import MARK, MARK_WITHIN_BYTES, render

__all__ = ["MARK", "MARK_WITHIN_BYTES", "results_page", "state_page"]


def state_page(found: Mapping[str, Any]) -> str:
    """The page of a state, of what `report.report.of_state` gives."""
    return render("state.html", {**found, **state_view(found)})


def results_page(found: Mapping[str, Any]) -> str:
    """The page of a comparison, of what `compare.schema.read` gives."""
    return render("comparison.html", {**found, **comparison_view(found)})
