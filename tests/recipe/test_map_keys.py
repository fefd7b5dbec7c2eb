"""The keys of a recipe for label maps: what they may be, and where they mean nothing."""

from typing import Any

import pytest

from recap_cli.errors import RecipeError
from recap_cli.recipe import recipe
from tests.recipe.test_recipe import parsed, refused_beside

MAPS = ["task.kind=semantic-segmentation", "task.metric=miou", "data.image=image", "data.text=null"]
IMAGES = ["task.kind=image-classification", "data.image=image", "data.text=null"]


@pytest.mark.parametrize(
    ("typed", "found"),
    [("11", 11), ("null", None), ("[0,255]", (0, 255)), ("65535", 65535), ("1e1", 10)],
)
def test_what_is_ignored_is_a_value_several_or_none(typed: str, found: Any) -> None:
    assert parsed("", *MAPS, f"data.ignore_index={typed}").data.ignore_index == found
    assert parsed("", *MAPS).data.ignore_index == 255


@pytest.mark.parametrize("typed", ["-1", "65536", "[]", "[0,-1]", "void", "true", "1.5", "[[0]]"])
def test_what_is_no_value_of_a_map_is_refused(typed: str) -> None:
    (line,) = refused_beside("", *MAPS, f"data.ignore_index={typed}")
    assert line.startswith(f"--set data.ignore_index={typed} data.ignore_index")
    assert "expected" in line


def test_a_map_may_be_named_by_either_key_and_folders_need_neither() -> None:
    assert parsed("", *MAPS, "data.label_map=truth", "data.classes=c.json").data.label_map == "truth"
    assert parsed("", *MAPS, "data.label=truth").data.label == "truth"
    local = ["data.train=FOLDER", "data.validation_share=0.1", "data.image=null"]
    assert parsed("", *MAPS, *local).data.image is None


@pytest.mark.parametrize("key", ["label_map", "classes"])
@pytest.mark.parametrize("others", [IMAGES, []], ids=["images", "texts"])
def test_keys_of_maps_mean_nothing_where_labels_are_none(key: str, others: list[str]) -> None:
    kind = "image-classification" if others else "text-classification"
    assert refused_beside("", *others, f"data.{key}=x") == [f"--set data.{key}=x data.{key} expected null, for {kind}; found x"]


def test_a_value_to_ignore_means_nothing_where_labels_are_no_maps() -> None:
    assert refused_beside("", "data.ignore_index=11") == [
        "--set data.ignore_index=11 data.ignore_index expected 255, for text-classification; found 11"
    ]


AUGMENTS: list[tuple[list[str], str, str]] = [
    ([], "flip", "expected none, for text-classification; found flip"),
    ([], "crop", "expected none, for text-classification; found crop"),
    (IMAGES, "crop", "expected none or flip, for image-classification; found crop"),
]


@pytest.mark.parametrize(("others", "augment", "said"), AUGMENTS)
def test_crops_are_for_maps_and_flips_for_images(others: list[str], augment: str, said: str) -> None:
    assert refused_beside("", *others, f"data.augment={augment}") == [f"--set data.augment={augment} data.augment {said}"]
    for one in ("none", "flip", "crop"):
        assert parsed("", *MAPS, f"data.augment={one}").data.augment == one


def test_a_teacher_and_crops_do_not_go_together() -> None:
    (line,) = refused_beside("", *MAPS, "data.augment=crop", "distill.teacher=initial")
    assert "data.augment expected none or flip, as a teacher's outputs for every crop are too many to be kept" in line
    assert parsed("", *MAPS, "data.augment=flip", "distill.teacher=initial").data.augment == "flip"


def test_the_digits_have_no_maps() -> None:
    with pytest.raises(RecipeError, match=r'expected "image-classification", as data\.builtin is digits'):
        recipe.read("quickstart", ["task.kind=semantic-segmentation", "task.metric=miou"])


def test_columns_of_several_maps_are_refused() -> None:
    (line,) = refused_beside("", *MAPS, "data.label=[a,b]")
    assert "data.label expected one column, for semantic-segmentation; found 2: a, b" in line
