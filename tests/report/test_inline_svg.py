"""A figure in a page has the page's colours, ids of its own, letters that can be selected, and words at its marks."""

import re
from xml.etree import ElementTree as Xml

import pytest

from recap_cli.memory.picture import PAGE, Picture, picture
from recap_cli.memory.plot_parts import Marks, mark
from recap_cli.memory.plot_style import EVERY, METHODS, Look
from recap_cli.report.inline_svg import glyph, inline
from tests.report.drawing import closest, marks


def line(look: Look = METHODS["recap"], words: tuple[str, ...] = ("one", "two <b>", "three")) -> Picture:
    """A line of three marks with words."""
    with picture(PAGE, 2.0) as drawn:
        axes = drawn.figure.add_subplot()
        mark(drawn, axes, Marks([1.0, 2.0, 3.0], [1.0, 3.0, 2.0], (), words), look, label=None, linestyle="--")
        axes.set_xlabel("an <axis> & its name")
    return drawn


def test_a_figure_is_as_wide_as_a_phone_and_says_what_it_is() -> None:
    drawing = Xml.fromstring(inline(line(), "a", 'what "it" <is>'))
    assert drawing.attrib == {"viewBox": "0 0 360 144", "role": "img", "aria-label": 'what "it" <is>'}
    assert "an <axis> & its name" in [one.text for one in drawing.iter("text")]
    assert not {"metadata", "style", "image", "a"} & {one.tag for one in drawing.iter()}


def test_every_mark_has_its_own_words() -> None:
    places = marks(Xml.fromstring(inline(line(), "a", "")))
    assert list(places) == ["one", "two <b>", "three"]
    (first, low), (second, high), (third, middle) = places.values()
    assert first < second < third
    assert low > middle > high  # SVG counts from the top


def test_words_that_do_not_belong_to_the_marks_are_an_error() -> None:
    with pytest.raises(ValueError, match="2 words for 3 marks"):
        inline(line(words=("one", "two")), "a", "")


def test_a_colour_that_a_dark_page_would_not_know_is_an_error() -> None:
    with pytest.raises(KeyError, match="#123456"):
        inline(line(Look("#123456", "#ffffff", "o")), "a", "")


def test_figures_of_one_page_share_no_id() -> None:
    first, second = (set(re.findall(r'id="([^"]+)"', inline(line(), name, ""))) for name in ("a", "b"))
    assert first
    assert not first & second


def test_black_is_a_colour_of_the_page_too() -> None:
    drawing = inline(line(METHODS["full-ft"]), "a", "")
    assert "#000000" not in drawing
    assert "var(--c000000)" in drawing


@pytest.mark.parametrize("look", EVERY, ids=lambda look: look.marker)
def test_a_glyph_is_the_marker_and_needs_no_id(look: Look) -> None:
    drawing = Xml.fromstring(glyph(look))
    (path,) = drawing.iter("path")
    assert closest(path.attrib["d"]) == look.marker
    assert drawing.get("aria-hidden") == "true"
    assert not [one for one in drawing.iter() if "id" in one.attrib]
