"""What the page of a state shows of label maps: pictures side by side, a legend, and a table of the classes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recap_cli.core.task import IGNORED
from recap_cli.report.map_examples import Example, MapExamples
from recap_cli.report.map_pictures import Array, jpeg_uri, painted, png_uri, void_colour

PANELS = ("image", "truth", "full model", "small model")
NAMED = 3  # classes in the text that stands for a picture
NAMES = {"iou": "IoU"}  # of figures that there is one of for each class
MANY = 40  # classes of which a page shows the rows, or the legend, on demand only


def view(found: MapExamples | None) -> dict[str, Any] | None:
    """The names that `maps.html` uses beside those of a state, or None where there are no pictures."""
    if found is None:
        return None
    void = void_colour(found.colours)
    shown = [*found.best, *found.worst]
    groups = [("The best", found.best), ("The worst", found.worst)]
    seen = {number for one in shown for part in (one.truth, one.full, one.small) for number in np.unique(part).tolist()}
    entries = list(zip(found.labels, map(_hex, found.colours), strict=True))
    return {
        "looked_at": found.looked_at,
        "of": found.of,
        "full_round": found.full_round,
        "small_round": found.small_round,
        "groups": [(title, [_row(one, found, void) for one in group]) for title, group in groups if group],
        "legend": [entry for number, entry in enumerate(entries) if number in seen],
        "unseen": [entry for number, entry in enumerate(entries) if number not in seen],
        "void": _hex(void) if IGNORED in seen else None,
    }


def tables(
    figures: Mapping[str, Mapping[str, float]], labels: Sequence[str], found: MapExamples | None
) -> list[dict[str, Any]]:
    """The tables of figures of each class: those of the best round, and the IoU of both models, where they were asked.

    These two are of the same examples, so that they may be compared.
    """
    return [
        {
            "name": NAMES.get(prefix, prefix),
            "rows": [(label, values.get(label), *_again(label, found)) for label in labels],
            "has_again": prefix == "iou" and found is not None,
            "is_long": len(labels) > MANY,
        }
        for prefix, values in figures.items()
        if values
    ]


def _again(label: str, found: MapExamples | None) -> tuple[float | None, float | None]:
    """The IoU of a class, of the small and of the full model, over the examples that were looked at."""
    return (None, None) if found is None else (found.small_iou.get(label), found.full_iou.get(label))


def _row(one: Example, found: MapExamples, void: tuple[int, int, int]) -> dict[str, Any]:
    """An example: its caption, and its pictures with their titles and what stands for them."""
    maps = [painted(part, found.colours, void) for part in (one.truth, one.full, one.small)]
    texts = [f"the photo in {one.place}"]
    texts += [
        f"{what}: {described(part, found.labels)}"
        for what, part in (
            ("the true classes", one.truth),
            ("as the full model sees it", one.full),
            ("as the small model sees it", one.small),
        )
    ]
    height, width = one.truth.shape
    return {
        "place": one.place,
        "full_miou": one.full_miou,
        "small_miou": one.small_miou,
        "width": width,
        "height": height,
        "pictures": list(zip(PANELS, [jpeg_uri(one.image), *map(png_uri, maps)], texts, strict=True)),
    }


def described(numbers: Array, labels: Sequence[str]) -> str:
    """The classes that a map shows most of, with their shares of what is counted: `road 40%, sky 31%, tree 12%, and 3 more`."""
    shown, pixels = np.unique(numbers[numbers != IGNORED], return_counts=True)
    order = np.argsort(-pixels, kind="stable").tolist()
    texts = [f"{labels[int(shown[at])]} {pixels[at] / pixels.sum():.0%}" for at in order[:NAMED]]
    more = [f"and {len(order) - NAMED} more"] if len(order) > NAMED else []
    return ", ".join([*texts, *more]) or "nothing that is counted"


def _hex(colour: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)
