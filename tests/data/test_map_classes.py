"""The classes of label maps: every form of their file, and each wrong one with its own message."""

import json
from pathlib import Path
from typing import Any

import pytest

from recap_cli.data.map_classes import MapClasses, map_classes
from recap_cli.errors import DataError


def read(folder: Path, found: Any, ignore: Any = 255) -> MapClasses:
    file = folder / "classes.json"
    file.write_bytes(found if isinstance(found, bytes) else (found if isinstance(found, str) else json.dumps(found)).encode())
    return map_classes({"classes": str(file), "ignore_index": ignore})


FORMS: dict[str, tuple[Any, tuple[int, ...]]] = {  # what the file holds, and the values of road and tree
    "a list of names": (["road", "tree"], (0, 1)),
    "an id2label": ({"3": "road", "7": "tree"}, (3, 7)),
    "a configuration of transformers": ({"num_labels": 2, "id2label": {"0": "road", "1": "tree"}}, (0, 1)),
    "names below `classes`": ({"classes": ["road", "tree"], "size": [480, 360]}, (0, 1)),
    "objects": ([{"name": "road"}, {"name": "tree", "id": 70}], (0, 70)),
    "objects by value": ({"5": {"name": "road"}, "9": {"name": "tree"}}, (5, 9)),
    "16 bits": ({"0": "road", "65535": "tree"}, (0, 65535)),
    "a byte order mark": ('\ufeff["road", " tree "]', (0, 1)),
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_the_file_gives_names_and_values(form: str, tmp_path: Path) -> None:
    found, ids = FORMS[form]
    assert read(tmp_path, found) == MapClasses(("road", "tree"), ids, None, frozenset({255}))


def test_colours_are_those_of_all_entries_and_what_is_ignored_is_no_class(tmp_path: Path) -> None:
    entries = [
        {"name": "road", "color": [128, 64, 128]},
        {"name": "void", "colour": [0, 0, 0]},
        {"name": "tree", "color": [0, 255, 0], "id": 8},
    ]
    found = read(tmp_path, entries, ignore=1)
    assert (found.names, found.ids, found.ignored) == (("road", "tree"), (0, 8), frozenset({1}))
    assert found.colours == {(128, 64, 128): 0, (0, 0, 0): 1, (0, 255, 0): 8}


@pytest.mark.parametrize(("given", "ignored"), [(None, ()), (11, (11,)), ((0, 255), (0, 255))])
def test_without_a_file_there_are_only_values_that_are_ignored(given: Any, ignored: tuple[int, ...]) -> None:
    found = map_classes({"classes": None, "ignore_index": given})
    assert found == MapClasses(ignored=frozenset(ignored))


WRONG: dict[str, tuple[Any, str]] = {
    "no JSON": ("[road]", "is no JSON: Expecting value"),
    "no text": (b"\xff\xfe\xfd", "is no JSON: 'utf-8' codec"),
    "too deep": ("[" * 100_000, "is no JSON"),
    "a number": ("7", "it holds 7"),
    "no class": ([], "it has 0 entries; expected 1 to 10,000"),
    "too many": ([str(i) for i in range(10_001)], "it has 10,001 entries"),
    "names as keys": ({"road": 0}, "it gives a class the value 'road'; expected 0 to 65535"),
    "a negative value": ([{"name": "road", "id": -1}], "it gives a class the value -1"),
    "true as a value": ([{"name": "road", "id": True}], "it gives a class the value True"),
    "a value of 17 bits": ({"65536": "road"}, "it gives a class the value 65536"),
    "a value of 5,000 digits": ({"9" * 5000: "road"}, f"it gives a class the value '{'9' * 79}; expected"),
    "no name": ([{"color": [0, 0, 0]}], "it has no name for the value 0"),
    "a blank name": (["road", " "], "it has no name for the value 1"),
    "two of a value": ({"7": "road", "07": "tree"}, "several classes have the value 7"),
    "two of a name": (["road", "road", "tree"], "several classes have the name road"),
    "a colour of two": ([{"name": "road", "color": [0, 0]}], r"it gives the value 0 the colour \[0, 0\]; expected three whole"),
    "a colour beyond 255": ([{"name": "road", "color": [0, 0, 256]}], "from 0 to 255"),
    "a colour as text": ([{"name": "road", "color": "#fff"}], "it gives the value 0 the colour '#fff'"),
    "one without a colour": ([{"name": "road", "color": [0, 0, 0]}, {"name": "tree"}], "'tree' has no colour, and others have"),
    "two of a colour": (
        [{"name": "road", "color": [0, 0, 9]}, {"name": "tree", "color": [0, 0, 9]}],
        r"several classes have the colour \[0, 0, 9\]",
    ),
    "one beside what is ignored": ({"0": "road", "255": "void"}, "names 1 classes beside what is ignored; expected 2 at least"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_refused_by_what_is_wrong_and_the_hint_says_the_forms(name: str, tmp_path: Path) -> None:
    found, said = WRONG[name]
    with pytest.raises(DataError, match=said) as caught:
        read(tmp_path, found)
    assert caught.value.message.startswith(f"{tmp_path / 'classes.json'} ")
    assert "--set data.classes=FILE" in (caught.value.hint or "")


def test_a_file_that_is_not_there_is_named_with_the_key(tmp_path: Path) -> None:
    for place in (tmp_path / "gone.json", tmp_path):
        with pytest.raises(DataError, match=r"cannot be read: (No such file|Is a directory)") as caught:
            map_classes({"classes": str(place), "ignore_index": 255})
        assert "--set data.classes=FILE" in (caught.value.hint or "")


def test_ten_thousand_classes_are_read_at_once(tmp_path: Path) -> None:
    assert len(read(tmp_path, [f"class {i}" for i in range(10_000)]).names) == 9_999  # without 255
