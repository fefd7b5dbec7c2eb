"""The figures of a state's page show the values that they are given."""

from typing import Any
from xml.etree import ElementTree as Xml

import pytest

from recap_cli.report import state_plots
from recap_cli.report.inline_svg import inline
from recap_cli.report.template import duration
from tests.report.drawing import boxes, heights, marks, on_a_line, with_styles

HEADS = [[True, False, True, True], [False, False, True, True], [True, True, True, True]]


def drawn(picture: Any) -> Xml.Element:
    return Xml.fromstring(inline(picture, "a", "label"))


def words(drawing: Xml.Element) -> list[str]:
    """The texts of a figure, in order."""
    return [str(one.text) for one in drawing.iter("text")]


def row(number: int, **values: Any) -> dict[str, Any]:
    """A round as `report.of_state` gives it, in as far as figures need it."""
    held = {"weights_bytes": 600_000 + number, "gradients_bytes": 300_000, "optimizer_bytes": 500_000}
    full = {f"full_{key}": 2 * size for key, size in held.items()}
    return {"round": number, "best": False, "seconds": {"prune": 1.0, "finetune": 2.0 * number}, **held, **full, **values}


def test_the_metric_of_each_round_stands_at_its_value_and_the_best_has_a_square() -> None:
    values = [0.5, 0.7, 0.65]
    drawing = drawn(state_plots.metric_by_round([row(n, value=v, best=n == 2) for n, v in enumerate(values, 1)], "f1"))
    places = marks(drawing)
    assert list(places) == ["round 1: 0.5000", "round 2: 0.7000", "round 3: 0.6500"]
    assert on_a_line([(value, y) for value, (_, y) in zip(values, places.values(), strict=True)])
    assert on_a_line([(number, x) for number, (x, _) in enumerate(places.values())])
    squares = [(float(one.attrib["x"]), float(one.attrib["y"])) for one in drawing.iter("use") if one.find("title") is None]
    assert places["round 2: 0.7000"] in squares
    assert "the best, which is the product" in words(drawing)


def test_the_loss_goes_on_over_the_rounds_with_a_line_where_one_ends() -> None:
    def seen(*losses: float) -> list[dict[str, Any]]:
        return [{"step": 10 * n, "loss": loss, "lr": 1e-3} for n, loss in enumerate(losses, 1)]

    drawn = state_plots.loss_by_step({1: seen(3.0, 2.5), 2: [], 3: seen(2.0, 1.5, 1.0)})
    assert drawn is not None
    (axes,) = drawn.figure.axes
    line, curve = axes.lines
    assert list(line.get_xdata()) == [20, 20]
    assert list(curve.get_xdata()) == [10, 20, 30, 40, 50]
    assert list(curve.get_ydata()) == [3.0, 2.5, 2.0, 1.5, 1.0]
    assert state_plots.loss_by_step({1: []}) is None
    many = state_plots.loss_by_step({1: seen(*map(float, range(1200))), 2: seen(7.0)})
    assert many is not None
    curve = many.figure.axes[0].lines[-1]
    assert list(curve.get_ydata())[:2] == [2.0, 7.0]  # each of five
    assert list(curve.get_xdata())[-2:] == [12_000, 12_010]
    assert len(curve.get_xdata()) == 241


def test_what_is_not_known_of_a_round_has_no_mark() -> None:
    rows = [row(1, coverage=0.25, overlap=None), row(2, coverage=0.5, overlap=0.75), row(3, coverage=None, overlap=0.9)]
    drawing = drawn(state_plots.change_by_round(rows))
    places = marks(drawing)
    assert list(places) == [
        "round 1: 25.0% visited by updates so far",
        "round 2: 50.0% visited by updates so far",
        "round 2: 75.0% kept in the round before too",
        "round 3: 90.0% kept in the round before too",
    ]
    ticks = [(float(label[:-1]) / 100, y - 4.2) for label, y in heights(drawing).items()]
    assert on_a_line(ticks + [(value, y) for value, (_, y) in zip((0.25, 0.5, 0.75, 0.9), places.values(), strict=True)])
    assert state_plots.change_by_round([row(1, coverage=None, overlap=None)]) is None


def test_every_unit_is_a_square_filled_if_it_is_kept() -> None:
    drawing = drawn(state_plots.kept_squares(HEADS))
    assert words(drawing) == ["1", "2", "3", "3 of 4", "2 of 4", "4 of 4", "kept", "pruned"]
    places: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for one, style in with_styles(drawing):
        if one.tag == "use":
            places["fill-opacity:0;" not in style].append((float(one.attrib["y"]), float(one.attrib["x"])))
    (kept_at, pruned_at) = (sorted(found)[:-1] for found in places.values())  # the last is of the legend
    rows, columns = sorted({y for y, _ in kept_at}), sorted({x for _, x in kept_at + pruned_at})
    assert (len(rows), len(columns)) == (3, 4)
    assert [[(y, x) in kept_at for x in columns] for y in rows] == HEADS
    assert [[(y, x) not in pruned_at for x in columns] for y in rows] == HEADS


def test_the_kept_units_of_a_layer_are_as_long_a_bar_as_they_are_many() -> None:
    layers = [[True] * kept + [False] * (256 - kept) for kept in (227, 16, 131)]
    drawing = drawn(state_plots.kept_bars(layers))
    found = boxes(drawing)
    assert list(found) == ["layer 1: 227 of 256", "layer 2: 16 of 256", "layer 3: 131 of 256"]
    assert on_a_line([(kept, right - left) for kept, (left, right) in zip((227, 16, 131), found.values(), strict=True)])
    assert {"227 of 256", "16 of 256", "131 of 256"} <= set(words(drawing))


def test_a_cell_is_as_full_of_colour_as_its_layer_is_of_kept_units() -> None:
    rows = [{"round": n, "kept": {"heads": kept}, "of": {"heads": [4, 8]}} for n, kept in ((1, [4, 6]), (2, [1, 2]))]
    drawing = drawn(state_plots.kept_by_round(rows, "heads"))
    found = {}
    for one, style in with_styles(drawing):
        if (title := one.find("title")) is not None:
            (said,) = [part for part in style.split(";") if part.startswith("fill-opacity")] or ["fill-opacity:1"]
            found[title.text] = float(said.partition(":")[2])
    assert found == {
        "round 1, layer 1: 4 of 4": 1.0,
        "round 1, layer 2: 6 of 8": 0.75,
        "round 2, layer 1: 1 of 4": 0.25,
        "round 2, layer 2: 2 of 8": 0.25,
    }
    assert sorted(words(drawing)) == sorted(["1", "2", "1", "2", "4", "6", "1", "2"])


def test_memory_and_time_of_a_round_are_bars_with_their_sums() -> None:
    rows = [row(1), row(2)]
    memory = drawn(state_plots.memory_by_round(rows))
    assert boxes(memory).keys() >= {"round 1: weights 0.6 MB", "full finetuning: optimizer state 1.0 MB"}
    assert words(memory)[:3] == ["round 1", "round 2", "full finetuning"]
    assert words(memory).count("2.8 MB") == 1
    time = drawn(state_plots.time_by_round(rows, duration))
    found = boxes(time)
    assert list(found) == ["round 1: prune 1.0 s", "round 2: prune 1.0 s", "round 1: finetune 2.0 s", "round 2: finetune 4.0 s"]
    assert on_a_line([(s, right - left) for s, (left, right) in zip((1.0, 1.0, 2.0, 4.0), found.values(), strict=True)])
    assert {"3.0 s", "5.0 s"} <= set(words(time))
    assert "merge" not in words(time), "a stage that took no time needs no place in the legend"


@pytest.mark.parametrize(("layers", "units"), [(1, 1), (1, 64), (2, 12), (24, 1), (24, 64)])
def test_models_of_any_size_have_room(layers: int, units: int) -> None:
    for draw in (state_plots.kept_squares, state_plots.kept_bars):
        assert f"{units} of {units}" in words(drawn(draw([[True] * units] * layers)))
    rows = [{"round": n, "kept": {"x": [units] * layers}, "of": {"x": [units] * layers}} for n in range(1, 1 + units)]
    assert str(layers) in words(drawn(state_plots.kept_by_round(rows, "x")))
