"""Pictures of label maps on the page of a state: colours, which examples are shown, and a page without them."""

import base64
import io
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import yaml

from recap_cli.cli import main
from recap_cli.core.label_maps import padded
from recap_cli.core.task import IGNORED
from recap_cli.data.map_classes import MapClasses
from recap_cli.errors import DataError
from recap_cli.progress import silent
from recap_cli.recipe import recipe as recipes
from recap_cli.report import map_examples as examples
from recap_cli.report import pages
from recap_cli.report import report as reporting
from recap_cli.report.map_examples import Example, MapExamples, counts_of, extremes, iou_of, maps_in, shrunk
from recap_cli.report.map_page import described
from recap_cli.report.map_pictures import VOIDS, class_colours, painted, png_uri, voc_colour, void_colour
from recap_cli.report.report import of_state, report
from recap_cli.rounds.scoring import PredictionFile
from recap_cli.stages.eval import evaluate
from recap_cli.stages.run import run
from recap_cli.state.store import State
from tests.report.test_pages import NASTY, read
from tests.segmentation import CONFIGS
from tests.tiny import tiny

LABELS = ["road", "tree", "sky"]


def pixels_of(address: str) -> Any:
    """The pixels of a picture that stands in its address."""
    content = base64.b64decode(address.partition("base64,")[2])
    return np.asarray(PIL.Image.open(io.BytesIO(content)).convert("RGB"))


def test_colours_are_those_of_the_development_kit_of_voc() -> None:
    names = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 8: (64, 0, 0), 15: (192, 128, 128), 20: (0, 64, 128)}
    assert {number: voc_colour(number) for number in names} == names
    assert voc_colour(255) == (224, 224, 192)
    assert len({voc_colour(number) for number in range(10_000)}) == 10_000


def test_colours_of_the_classes_file_come_first_in_the_order_of_the_labels() -> None:
    classes = MapClasses(("road", "sky"), (7, 3), {(1, 2, 3): 3, (9, 9, 9): 7, (0, 0, 0): 11}, frozenset([11]))
    assert class_colours(classes, 2) == [(9, 9, 9), (1, 2, 3)]
    assert class_colours(MapClasses(("road", "sky"), (7, 3)), 2) == [voc_colour(0), voc_colour(1)]


@pytest.mark.parametrize(
    "colours",
    [
        [(128, 64, 128), (70, 130, 180)],
        [voc_colour(number) for number in range(21)],
        [voc_colour(number) for number in range(256)],
        [*VOIDS, (255, 255, 255)],
    ],
)
def test_what_is_not_counted_has_the_colour_of_no_class(colours: list[tuple[int, int, int]]) -> None:
    found = void_colour(colours)
    assert min(np.linalg.norm(np.subtract(found, colour)) for colour in colours) > 30  # the eye tells them apart
    assert (found == (0, 0, 0)) == (len(colours) == 2)  # black, where no class is dark


def test_a_map_is_painted_pixel_by_pixel() -> None:
    numbers = np.array([[0, 1, IGNORED], [2, 0, 1]], dtype=np.int16)
    colours, void = [(10, 20, 30), (40, 50, 60), (70, 80, 90)], (1, 1, 1)
    found = pixels_of(png_uri(painted(numbers, colours, void)))
    assert found.shape == (2, 3, 3)
    assert found[0].tolist() == [[10, 20, 30], [40, 50, 60], [1, 1, 1]]
    assert found[1].tolist() == [[70, 80, 90], [10, 20, 30], [40, 50, 60]]


def test_a_large_map_is_shrunk_to_values_that_it_has() -> None:
    numbers = np.zeros((1000, 2000), dtype=np.int64)
    numbers[:, 1000:] = 9
    found = shrunk(numbers)
    assert found.shape == (160, 320)
    assert set(found[:, :160].flat) == {0}
    assert set(found[:, 160:].flat) == {9}  # no 4 or 5 at the edge
    small = np.array([[1, IGNORED, 2]])
    assert shrunk(small).tolist() == small.tolist()


def test_the_iou_of_each_class_is_that_of_the_sets_of_its_pixels() -> None:
    random = np.random.default_rng(0)
    found, truth = (torch.from_numpy(random.integers(0, 5, (13, 17))) for _ in range(2))
    truth[truth == 3], found[found == 3] = 2, 2  # a class that does not occur
    truth[:3] = IGNORED
    values = iou_of(counts_of(found, truth, 5)).tolist()
    for number in (0, 1, 2, 4):
        places = {
            name: {at for at in np.ndindex(13, 17) if one[at] == number and truth[at] != IGNORED}
            for name, one in (("found", found), ("truth", truth))
        }
        both, either = places["found"] & places["truth"], places["found"] | places["truth"]
        assert values[number] == pytest.approx(len(both) / len(either))
    assert np.isnan(values[3])


def test_the_true_maps_of_a_batch_are_without_padding() -> None:
    maps = [torch.full((2, 3), 1), torch.full((4, 2), 2)]
    for batch in (padded(maps), padded(maps[:1]), padded(maps[1:])):  # of one size there are no sizes
        found = maps_in(batch)
        assert {tuple(one.shape): set(one.flatten().tolist()) for one in found}.items() <= {(2, 3): {1}, (4, 2): {2}}.items()
        assert len(found) == len(batch["labels"])


def test_the_extremes_are_the_best_first_the_worst_first_and_no_example_twice() -> None:
    nan = float("nan")
    assert extremes([0.5, nan, 0.9, 0.1, 0.7, 0.3, 0.8, 0.2]) == ([2, 6, 4], [3, 7, 5])
    assert extremes([0.5, 0.9, 0.1]) == ([1, 0], [2])
    assert extremes([nan]) == ([], [])
    assert extremes([0.4]) == ([0], [])


def test_a_picture_has_a_text_that_says_what_it_shows() -> None:
    numbers = np.array([[0, 0, 0, 2], [1, 1, IGNORED, IGNORED]])
    assert described(numbers, LABELS) == "road 50%, tree 33%, sky 17%"
    assert described(np.full((2, 2), IGNORED), LABELS) == "nothing that is counted"
    assert described(np.arange(5)[None], list("abcde")) == "a 20%, b 20%, c 20%, and 2 more"


# The page, of examples that are made up: it needs no model of segmentation.


def made_example(place: str, value: int) -> Example:
    size = (6, 8)
    image = np.full((*size, 3), 200, dtype=np.uint8)
    truth, full, small = (np.full(size, number, dtype=np.int16) for number in (value, 1, 0))
    truth[0, 0] = IGNORED
    return Example(place, image, truth, full, small, 0.25, 0.125)


def made(**changes: Any) -> MapExamples:
    best, worst = ([made_example(f"row {at}", 0) for at in range(first, first + 3)] for first in (1, 4))
    facts: dict[str, Any] = {"looked_at": 64, "of": 1000, "labels": LABELS, "best": best, "worst": worst}
    facts |= {"colours": [(255, 0, 0), (0, 255, 0), (0, 0, 255)], "full_round": 2, "small_round": 1}
    facts |= {"full_iou": {"road": 0.125, "sky": 0.5}, "small_iou": {"road": 0.0625}}
    return MapExamples(**{**facts, **changes})


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> State:
    return run(tiny("vit", rounds=1), tmp_path_factory.mktemp("classifier") / "state")


def page_of(state: State, maps: MapExamples) -> str:
    figures = {"iou": {"sky": 0.75, "road": 0.875}}
    return pages.state_page({**of_state(state), "maps": maps, "labels": maps.labels, "label_figures": figures})


def test_the_page_has_four_pictures_of_each_example_and_says_how_many_it_looked_at(classifier: State) -> None:
    text = page_of(classifier, made())
    reader = read(text)
    pictures = [attributes for tag, attributes in reader.tags if tag == "img"]
    assert len(pictures) == 4 * 6
    assert all(one["alt"] for one in pictures)
    said = " ".join(" ".join(reader.text).split())
    assert "Of the first 64 of 1,000 validation examples" in said
    assert "small model 0.1250, full model 0.2500" in said
    assert said.index("The best") < said.index("row 1") < said.index("The worst") < said.index("row 4")
    image, truth, full, small = (pixels_of(str(one["src"])) for one in pictures[:4])
    assert abs(int(image[3, 3, 0]) - 200) < 4  # a JPEG
    assert (truth[3, 3].tolist(), full[3, 3].tolist(), small[3, 3].tolist()) == ([255, 0, 0], [0, 255, 0], [255, 0, 0])
    assert truth[0, 0].tolist() == [0, 0, 0]  # what is not counted
    assert small[0, 0].tolist() == [255, 0, 0]  # a prediction is shown there too


def legend(text: str) -> list[tuple[str, str]]:
    return re.findall(r'<li><span class="swatch" style="background:(#\w+)"></span>(.*?)</li>', text)


def test_the_legend_has_the_classes_of_the_pictures_first(classifier: State) -> None:
    maps = made(best=[made_example("row 1", 2)], worst=[])
    found = legend(page_of(classifier, maps))
    assert found[:3] == [("#ff0000", "road"), ("#00ff00", "tree"), ("#0000ff", "sky")]
    maps = made(labels=["road", "lake", "tree"], best=[made_example("row 1", 0)], worst=[])
    names = [name for _, name in legend(page_of(classifier, maps))]
    assert names == ["road", "lake", "ignored: not counted, in the truth", "tree"]


def test_the_iou_of_each_class_stands_in_the_order_of_the_labels_with_a_dash_where_there_is_none(classifier: State) -> None:
    text = page_of(classifier, made())
    table = text[text.index('aria-label="table of IoU by class"') :].partition("</table>")[0]
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>.*?</tr>", table)]
    assert rows[0] == ["class", "small model, in its round", "small model, 64 examples", "full model, 64 examples"]
    assert rows[1:] == [["road", "0.8750", "0.0625", "0.1250"], ["tree", "–", "–", "–"], ["sky", "0.7500", "–", "0.5000"]]


def test_names_of_classes_and_files_are_escaped(classifier: State) -> None:
    maps = made(labels=[NASTY, "b", "c"], best=[made_example(NASTY, 0)])
    text = page_of(classifier, maps)
    read(text)
    assert "<script" not in text


def test_a_task_without_maps_has_neither_pictures_nor_a_table(classifier: State) -> None:
    page = report(classifier.path).read_text()
    assert "<img" not in page
    assert "Best and worst examples" not in page
    assert "by class" not in page


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (DataError("there is no file\nor folder gone.parquet", hint="--set"), "there is no file or folder gone.parquet"),
        (torch.OutOfMemoryError("CUDA out of memory"), "the memory of the device is too small to run the models"),
    ],
)
def test_a_page_without_pictures_says_why(
    classifier: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, why: str
) -> None:
    def fail(*_: Any) -> MapExamples:
        raise error

    monkeypatch.setattr(reporting, "task_named", lambda _: SimpleNamespace(maps_of=len))
    monkeypatch.setattr(reporting, "map_examples", fail)
    told: list[str] = []
    page = report(classifier.path, tmp_path / "page.html", told.append)
    assert told == [f"note: the page has no pictures: {why}"]
    said = " ".join(" ".join(read(page.read_text()).text).split())
    assert f"There are no pictures: {why}" in said
    assert "What was pruned where" in said


# A whole state, of the smallest SegFormer.


def segmentation_recipe(root: Path) -> Any:
    random = np.random.default_rng(0)
    for split, count in (("train", 16), ("validation", 9)):
        for at in range(count):
            size = (5, 6 + at % 2)  # a batch has maps of two sizes, and some are padded
            numbers = random.integers(0, 3, size, dtype=np.uint8).repeat(8, 0).repeat(8, 1)  # (40, 48) or (40, 56)
            image = np.stack([numbers * 80] * 3, -1) + random.integers(0, 60, (*numbers.shape, 3), dtype=np.uint8)
            numbers[:4] = 255
            for kind, pixels in (("images", image), ("labels", numbers)):
                file = root / split / kind / f"{at}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                PIL.Image.fromarray(pixels).save(file)
    (root / "classes.json").write_text(json.dumps(LABELS))
    whole = {
        "name": "tiny-segformer",
        "rounds": 1,
        "model": {"config": {"model_type": "segformer", **CONFIGS["segformer"]}},
        "task": {"kind": "semantic-segmentation"},
        "data": {
            **{split: str(root / split) for split in ("train", "validation")},
            **{"image": "images", "label_map": "labels", "classes": str(root / "classes.json"), "ignore_index": 255},
            "image_size": 32,
        },
        "importance": {"batches": 2, "batch_size": 4},
        "prune": {"ratio": 0.4, "steps": 2},
        "finetune": {"epochs": 4, "batch_size": 4, "lr": 0.01, "device": "cpu"},
        "evaluate": {"batch_size": 4},
    }
    return recipes.parse(yaml.safe_dump(whole), "tiny segformer")


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> State:
    root = tmp_path_factory.mktemp("segmenter")
    return run(segmentation_recipe(root / "data"), root / "state")


def test_the_worst_example_is_the_worst_and_the_best_the_best(segmenter: State, tmp_path: Path) -> None:
    file = tmp_path / "each.jsonl"
    evaluate(segmenter, which=["full", "best"], predictions=PredictionFile(file))
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    figures = {name: {row["index"] + 1: row["miou"] for row in rows if row["model"] == name} for name in ("full", "best")}
    order = sorted(figures["best"], key=lambda row: figures["best"][row])
    found = examples.map_examples(segmenter, silent)
    assert [one.place for one in found.worst] == [f"row {row}, {row - 1}.png" for row in order[:3]]
    assert [one.place for one in found.best] == [f"row {row}, {row - 1}.png" for row in order[:-4:-1]]
    assert found.worst[0].small_miou == pytest.approx(figures["best"][order[0]])
    assert found.worst[0].full_miou == pytest.approx(figures["full"][order[0]])
    assert (found.looked_at, found.of) == (9, 9)


def test_the_small_model_says_which_are_the_best(segmenter: State, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = examples.map_examples(segmenter, silent)
    predicted = examples._predicted

    def all_as_the_first(context: Any, name: str, *rest: Any) -> Any:
        found = predicted(context, name, *rest)
        return found if name == "best" else replace(found, counts=found.counts[:1].expand_as(found.counts))

    monkeypatch.setattr(examples, "_predicted", all_as_the_first)
    found = examples.map_examples(segmenter, silent)
    shown = [*found.best, *found.worst]
    assert [one.place for one in shown] == [one.place for one in (*plain.best, *plain.worst)]
    assert len({one.full_miou for one in shown}) == 1 < len({one.small_miou for one in shown})
    assert found.small_iou == plain.small_iou != found.full_iou


def test_what_is_shown_is_the_image_and_the_map_of_that_row(segmenter: State) -> None:
    found = examples.map_examples(segmenter, silent)
    one = found.best[0]
    data = Path(str(recipes.parse(segmenter.recipe_text, "state").data.validation))
    name = one.place.rpartition(" ")[2]
    with PIL.Image.open(data / "images" / name) as image, PIL.Image.open(data / "labels" / name) as labels:
        assert (one.image == np.asarray(image)).all()
        wanted = np.asarray(labels).astype(int)
    assert (one.truth == np.where(wanted == 255, IGNORED, wanted)).all()


def test_the_iou_over_all_examples_is_that_of_an_evaluation(segmenter: State) -> None:
    found = examples.map_examples(segmenter, silent)
    for row, figures in zip(evaluate(segmenter, which=["full", "best"]), (found.full_iou, found.small_iou), strict=True):
        assert figures == pytest.approx({name: row[f"iou/{name}"] for name in LABELS if f"iou/{name}" in row})


def test_only_the_first_examples_are_looked_at(segmenter: State, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples, "LOOKED_AT", 5)
    found = examples.map_examples(segmenter, silent)
    assert (found.looked_at, found.of) == (5, 9)
    assert {one.place for one in (*found.best, *found.worst)} == {f"row {at + 1}, {at}.png" for at in range(5)}


def without_data(state: State) -> None:
    shutil.rmtree(Path(str(recipes.parse(state.recipe_text, "state").data.validation)))


def without_model(state: State) -> None:
    (state.path / str((state.manifest.best or {})["folder"]) / "model.safetensors").write_bytes(b"no model")


@pytest.mark.parametrize("damage", [without_data, without_model])
def test_without_data_or_a_model_there_is_a_page_and_a_note(
    damage: Callable[[State], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = run(segmentation_recipe(tmp_path / "data"), tmp_path / "state")
    damage(state)
    page = tmp_path / "page.html"
    assert main(["report", str(state.path), "--out", str(page)]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{page}\n"
    assert shown.err.count("note: the page has no pictures: ") == 1
    assert "Traceback" not in shown.err
    text = page.read_text()
    assert "There are no pictures: " in text
    assert "<img" not in text
    assert "small model, in its round" in text


def test_figures_of_each_class_have_a_table_of_their_own(segmenter: State, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(segmenter.path), "--which", "full,best"]) == 0
    first, _, second = capsys.readouterr().out.partition("iou by class")
    assert "miou" in first
    assert "iou/" not in first + second
    assert [line.split()[0] for line in second.splitlines() if line.strip()][2:] == LABELS
    assert main(["eval", str(segmenter.path), "--json"]) == 0
    assert "iou/road" in json.loads(capsys.readouterr().out)[0]
    assert main(["status", str(segmenter.path)]) == 0
    assert "iou/" not in capsys.readouterr().out
    assert "iou/" not in report(segmenter.path).read_text()
