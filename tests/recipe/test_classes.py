"""The classes that a recipe names in a file stand in the recipe that is read, so that a later change of the file is seen."""

import json
from pathlib import Path

import pytest

from recap_cli.errors import RecipeError
from recap_cli.recipe import recipe

TEXT = """
model: {config: {model_type: segformer}}
task: {kind: semantic-segmentation}
data: {train: images, validation_share: 0.5, image: images, classes: CLASSES}
"""


def read(tmp_path: Path, classes: object) -> recipe.Recipe:
    file = tmp_path / "classes.json"
    file.write_text(json.dumps(classes), encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text(TEXT.replace("CLASSES", str(file)), encoding="utf-8")
    return recipe.read(str(tmp_path / "recipe.yaml"))


@pytest.mark.parametrize(
    "classes", [["road", "tree"], {"7": "road", "21": "tree"}, [{"name": "road", "id": 7}, {"name": "tree"}]]
)
def test_a_recipe_that_is_read_has_the_content_of_its_file_of_classes(tmp_path: Path, classes: object) -> None:
    for held in (classes, {"classes": classes}):
        got = read(tmp_path, held)
        assert got.data.classes == classes
        assert recipe.parse(recipe.dump(got), "dump") == got


def test_another_file_of_the_same_names_is_another_recipe(tmp_path: Path) -> None:
    first, second = read(tmp_path, {"7": "road", "21": "tree"}), read(tmp_path, {"21": "road", "7": "tree"})
    assert recipe.differences(first, second) == ["data.classes.7", "data.classes.21"]


def test_whole_numbers_as_keys_are_refused_with_advice() -> None:
    with pytest.raises(RecipeError, match=r"expected text as a key; found 7 \(put it in quotes\)"):
        recipe.parse(TEXT.replace("CLASSES", "{7: road, 21: tree}"), "x")


def test_a_file_that_cannot_be_read_is_told_when_the_data_are(tmp_path: Path) -> None:
    got = read(tmp_path, 5)
    assert got.data.classes == str(tmp_path / "classes.json")
