"""The values of label maps by the kind of their image, the classes they become, and the nearest pixel as Pillow has it."""

from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from recap_cli.core.task import IGNORED
from recap_cli.data.label_maps import MapError, nearest, numbers_of, open_map, reading_of, values_of
from recap_cli.data.map_classes import MapClasses
from recap_cli.errors import DataError

NUMBERS = np.array([[0, 1, 2], [2, 1, 0]])  # (2, 3)
COLOURS = {(128, 64, 128): 0, (0, 255, 0): 1, (70, 70, 70): 2}
SHADES = np.array(list(COLOURS), dtype=np.uint8)[NUMBERS]  # (2, 3, 3)


def grey(numbers: Any, kind: str = "uint8") -> Image.Image:
    return Image.fromarray(np.asarray(numbers, dtype=kind))


def palette(numbers: Any, colours: list[tuple[int, int, int]]) -> Image.Image:
    image = grey(numbers)
    image.putpalette([shade for colour in colours for shade in colour])
    return image


def stored(image: Image.Image, kind: str = "png", **how: Any) -> dict[str, Any]:
    file = BytesIO()
    image.save(file, kind, **how)
    return {"bytes": file.getvalue(), "path": None}


BLACK = [(0, 0, 0)] * 3
OTHERS = [(1, 2, 3), (4, 5, 6), (7, 8, 9)]
KINDS: dict[str, tuple[Image.Image, dict[Any, int] | None]] = {
    "L": (grey(NUMBERS), None),
    "L, beside colours": (grey(NUMBERS), COLOURS),
    "P": (palette(NUMBERS, [*COLOURS]), None),
    "P of other colours": (palette(NUMBERS, OTHERS), COLOURS),
    "P of one colour": (palette(NUMBERS, BLACK), COLOURS),
    "P of colours in another order": (palette(2 - NUMBERS, [*COLOURS][::-1]), COLOURS),
    "P of some known colours, at their values": (palette(NUMBERS, [*COLOURS][:2] + OTHERS[:1]), COLOURS),
    "RGB": (Image.fromarray(SHADES), COLOURS),
    "RGBA": (Image.fromarray(SHADES).convert("RGBA"), COLOURS),
    "RGB of shades of grey": (grey(NUMBERS).convert("RGB"), None),
    "RGB of shades of grey, beside colours": (grey(NUMBERS).convert("RGB"), COLOURS),
    "RGBA of shades of grey": (grey(NUMBERS).convert("RGBA"), None),
    "I;16": (grey(NUMBERS, "uint16"), None),
    "I": (grey(NUMBERS, "int32"), None),
}


@pytest.mark.parametrize("name", KINDS)
def test_values_of_each_kind_of_image(name: str) -> None:
    image, colours = KINDS[name]
    found = values_of(image, colours)
    assert found.dtype == np.int32
    assert found.tolist() == NUMBERS.tolist()


@pytest.mark.parametrize("kind", ["png", "tiff"])
@pytest.mark.parametrize("name", ["L", "P", "RGB", "I;16"])
def test_values_outlive_a_file(name: str, kind: str) -> None:
    image, colours = KINDS[name]
    assert open_map(stored(image, kind), lambda opened: values_of(opened, colours)).tolist() == NUMBERS.tolist()


def test_values_of_16_bits_are_kept() -> None:
    numbers = np.array([[0, 256], [1000, 65535]])
    assert open_map(stored(grey(numbers, "uint16")), lambda opened: values_of(opened, None)).tolist() == numbers.tolist()


def test_one_bit_is_0_and_1_or_black_and_white_where_these_have_names() -> None:
    image = grey([[0, 255]]).convert("1")
    assert values_of(image, None).tolist() == [[0, 1]]
    assert values_of(image, {(0, 0, 0): 5, (255, 255, 255): 7}).tolist() == [[5, 7]]


def test_black_and_white_of_8_bits_are_colours_where_these_have_names() -> None:
    """Else 255 would be what is ignored, and nobody would hear of it."""
    colours = {(0, 0, 0): 0, (255, 255, 255): 1}
    assert values_of(grey([[0, 255]]), colours).tolist() == [[0, 1]]
    assert values_of(grey([[0, 255]]), None).tolist() == [[0, 255]]


def test_a_palette_of_which_some_colours_are_known_is_not_read_by_its_places() -> None:
    """Programs that make files smaller renumber a palette; without the check its places would be taken for values."""
    image = palette(NUMBERS, [(0, 255, 0), (128, 64, 128), (9, 9, 8)])
    with pytest.raises(MapError, match=r"it has the colour \[9, 9, 8\] at row 1, column 3, which is no class") as caught:
        values_of(image, COLOURS)
    assert caught.value.hint == "say which colour is which class with --set data.classes=FILE"


WRONG: dict[str, tuple[Image.Image, dict[Any, int] | None, str]] = {
    "colours without names": (Image.fromarray(SHADES), None, "it is coloured, and the colours have no names"),
    "an unknown colour": (Image.fromarray(SHADES + np.uint8(1)), COLOURS, r"the colour \[129, 65, 129\] at row 1, column 1"),
    "floats": (grey(NUMBERS, "float32"), None, "its pixels are floats"),
    "a negative value": (grey(-NUMBERS, "int32"), None, "it has values from -2 to 0; expected 0 to 65535"),
    "a value of 17 bits": (grey(NUMBERS * 65536, "int32"), None, "it has values from 0 to 131072"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_class_is_told_with_its_place(name: str) -> None:
    image, colours, said = WRONG[name]
    with pytest.raises(MapError, match=said) as caught:
        values_of(image, colours)
    assert "--set data.classes=FILE" in caught.value.hint or "8 or 16 bits" in caught.value.hint


def test_values_become_numbers_of_classes_in_the_order_of_the_names() -> None:
    reading = reading_of(MapClasses(("road", "tree"), (7, 3), None, frozenset({0, 255})), ["road", "tree"])
    assert numbers_of(np.array([[0, 7], [3, 255]]), reading).tolist() == [[IGNORED, 0], [1, IGNORED]]
    assert numbers_of(np.array([[0, 7]]), reading).dtype == np.int16


def test_classes_without_names_are_their_values() -> None:
    reading = reading_of(MapClasses(ignored=frozenset({255})), ["4", "9"])
    assert numbers_of(np.array([[9, 4, 255]]), reading).tolist() == [[1, 0, IGNORED]]


def test_a_value_that_is_no_class_is_named_with_its_place_and_the_classes() -> None:
    reading = reading_of(MapClasses(("road", "tree"), (0, 1)), ["road", "tree"])
    with pytest.raises(MapError) as caught:
        numbers_of(np.array([[0, 1], [1, 12]]), reading)
    assert str(caught.value) == "it has the value 12 at row 2, column 2, which is no class: they are road, tree"
    assert "--set 'data.ignore_index=[12]'" in caught.value.hint


def test_a_file_of_classes_that_has_changed_is_refused() -> None:
    with pytest.raises(
        DataError, match=r"the classes of data\.classes are now road, tree, but those of the model are road, car"
    ):
        reading_of(MapClasses(("road", "tree"), (0, 1)), ["road", "car"])


@pytest.mark.parametrize("broken", [b"", b"GIF89a", stored(grey(NUMBERS))["bytes"][:-30], b"hello"])
def test_a_broken_map_is_one_of_the_known_failures(broken: bytes) -> None:
    from recap_cli.data.pixels import BROKEN

    with pytest.raises(BROKEN):
        open_map({"bytes": broken, "path": None}, lambda opened: values_of(opened, None))


def test_a_map_is_not_turned_by_its_exif() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert open_map(stored(grey(NUMBERS), exif=exif), lambda opened: values_of(opened, None)).tolist() == NUMBERS.tolist()


def drawn(seed: int) -> tuple[np.ndarray, tuple[int, int], tuple[float, float, float, float]]:
    """A map, the size it gets, and a part of it."""
    random = np.random.default_rng(seed)
    height, width, high, wide = (int(side) for side in random.integers(1, 40, 4))
    left, right = sorted(random.random(2) * width)
    top, bottom = sorted(random.random(2) * height)
    return random.integers(0, 255, (height, width)), (high, wide), (left, top, right, bottom)


@pytest.mark.parametrize("seed", range(10))
def test_the_nearest_pixel_is_that_of_pillow_and_of_a_naive_loop(seed: int) -> None:
    numbers, (high, wide), part = drawn(seed)
    whole = (0.0, 0.0, float(numbers.shape[1]), float(numbers.shape[0]))
    for box in (whole, part):
        found = nearest(numbers, (high, wide), box)
        wanted = grey(numbers).resize((wide, high), Image.Resampling.NEAREST, box=box)
        assert found.dtype == torch.int16
        assert torch.equal(found, torch.from_numpy(np.array(wanted)).short())
        left, top, right, bottom = box
        for y, x in np.ndindex(high, wide):
            row, column = top + (y + 0.5) * (bottom - top) / high, left + (x + 0.5) * (right - left) / wide
            if min(abs(row - round(row)), abs(column - round(column))) > 1e-4:  # between two pixels either is the nearest
                assert found[y, x] == numbers[int(row), int(column)]


def test_what_is_ignored_stays_so() -> None:
    assert nearest(np.full((2, 2), IGNORED, dtype=np.int16), (3, 1), (0.0, 0.0, 2.0, 2.0)).tolist() == [[IGNORED]] * 3


def test_a_map_at_its_own_size_is_as_it_was() -> None:
    numbers = np.arange(35).reshape(5, 7)
    assert nearest(numbers, (5, 7), (0.0, 0.0, 7.0, 5.0)).tolist() == numbers.tolist()
