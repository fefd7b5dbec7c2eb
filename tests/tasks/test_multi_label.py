"""Several classes for each text or image: figures beside scikit-learn's, both forms of labels, exports, wrong labels."""

from itertools import product
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import sklearn.metrics
import torch
from pyarrow import parquet
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from recap_cli.cli import main
from recap_cli.core.task import Labels
from recap_cli.data.other_data import read_other
from recap_cli.errors import DataError
from recap_cli.plugins.tasks.multi_label import TEXT_MULTI_LABEL, constant, metrics_of
from recap_cli.recipe import recipe as recipes
from recap_cli.rounds.examples import read_raw
from recap_cli.rounds.scoring import OtherData, PredictionFile
from recap_cli.stages.eval import evaluate
from recap_cli.stages.export import export
from recap_cli.stages.init import init
from recap_cli.stages.run import run
from recap_cli.state.store import State
from tests.tasks import made
from tests.tiny import data_folder

KINDS = ("text-multi-label", "image-multi-label")


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> dict[str, State]:
    torch.set_num_threads(1)
    return {kind: run(made.recipe(kind), tmp_path_factory.mktemp("multi") / kind) for kind in KINDS}


def random_case(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities and true classes, both (40, 5); the last class never occurs."""
    random = np.random.default_rng(seed)
    targets = (random.random((40, 5)) < [0.2, 0.5, 0.8, 0.1, 0.0]).astype(np.int64)
    return np.clip(0.4 * targets + random.random((40, 5)) * 0.6, 0, 1).astype(np.float32), targets


@pytest.mark.parametrize("seed", range(3))
def test_the_metrics_are_those_of_scikit_learn(seed: int) -> None:
    probabilities, targets = random_case(seed)
    found = metrics_of(torch.from_numpy(probabilities), torch.from_numpy(targets))
    predicted, there = probabilities >= 0.5, targets.any(0)
    f1 = sklearn.metrics.f1_score(targets[:, there], predicted[:, there], average="macro", zero_division=0)
    assert found["f1"] == pytest.approx(f1, abs=1e-6)
    micro = sklearn.metrics.f1_score(targets, predicted, average="micro", zero_division=0)
    assert found["micro_f1"] == pytest.approx(micro, abs=1e-6)
    precision = sklearn.metrics.average_precision_score(targets[:, there], probabilities[:, there], average="macro")
    assert found["map"] == pytest.approx(precision, abs=1e-5)
    assert found["exact"] == pytest.approx(sklearn.metrics.accuracy_score(targets, predicted))


@pytest.mark.parametrize("seed", range(3))
def test_chance_is_the_best_of_all_answers_that_are_the_same_for_every_example(seed: int) -> None:
    _, targets = random_case(seed)
    wanted = torch.from_numpy(targets)
    answers = [metrics_of(torch.tensor([answer] * 40, dtype=torch.float32), wanted) for answer in product((0, 1), repeat=5)]
    found = constant(wanted.float(), list("abcde"))
    for name in ("f1", "micro_f1", "map", "exact"):
        assert found[name] == pytest.approx(max(answer[name] for answer in answers), abs=1e-6), name
    share = wanted.double().mean(0)
    best = torch.nn.functional.binary_cross_entropy(share.expand(40, 5), wanted.double())
    assert found["loss"] == pytest.approx(float(best))


@pytest.mark.parametrize("kind", KINDS)
def test_the_figures_are_those_of_the_predictions_that_are_written(kind: str, states: dict[str, State], tmp_path: Path) -> None:
    (row,) = evaluate(states[kind], which=["best"], predictions=PredictionFile(tmp_path / "p.parquet"))
    table = parquet.read_table(tmp_path / "p.parquet").to_pydict()

    def flags(texts: list[str]) -> np.ndarray:
        return np.array([[name in text.split(", ") for name in made.CLASSES] for text in texts])

    wanted = [example["kinds"] for example in made.rows(kind, made.VALIDATION, 1)]
    assert [text.split(", ") if text else [] for text in table["label"]] == wanted
    f1 = sklearn.metrics.f1_score(flags(table["label"]), flags(table["predicted"]), average="macro", zero_division=0)
    assert row["f1"] == pytest.approx(f1, abs=1e-6)
    assert row["loss"] == pytest.approx(np.mean(table["loss"]), rel=1e-5)


def test_a_dense_export_is_a_plain_model_of_transformers_with_its_own_loss(states: dict[str, State], tmp_path: Path) -> None:
    (row,) = evaluate(states["text-multi-label"], which=["best"])
    facts = export(states["text-multi-label"], tmp_path / "dense", dense=True)
    plain = AutoModelForSequenceClassification.from_pretrained(facts["path"]).eval()
    assert plain.config.problem_type == "multi_label_classification"
    assert list(plain.config.id2label.values()) == list(made.CLASSES)
    examples = made.rows("text-multi-label", made.VALIDATION, 1)
    tokenizer = AutoTokenizer.from_pretrained(facts["path"])
    tokens = tokenizer(
        [example["text"] for example in examples], padding=True, truncation=True, max_length=16, return_tensors="pt"
    )
    flags = torch.tensor([[float(name in example["kinds"]) for name in made.CLASSES] for example in examples])
    with torch.no_grad():
        assert float(plain(**tokens, labels=flags).loss) == pytest.approx(row["loss"], rel=1e-4)


def as_columns(example: dict[str, Any]) -> dict[str, Any]:
    return {"text": example["text"], **{name: int(name in example["kinds"]) for name in made.CLASSES}}


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_columns_of_0_and_1_are_the_same_labels_as_lists(suffix: str, tmp_path: Path) -> None:
    examples = made.rows("text-multi-label", 12)
    file = made.write(tmp_path / f"columns.{suffix}", list(map(as_columns, examples)))
    other = made.write(tmp_path / "lists.jsonl", examples)
    columns = read_raw(
        made.recipe("text-multi-label", data={"train": str(file), "validation": str(file), "label": list(made.CLASSES)})
    )
    lists = read_raw(made.recipe("text-multi-label", data={"train": str(other), "validation": str(other)}))
    assert columns.label_names == lists.label_names == list(made.CLASSES)
    assert columns.train["label"][:] == lists.train["label"][:]


def test_lists_of_numbers_have_the_names_that_the_file_brings_along(tmp_path: Path) -> None:
    names = ["cow", "bee", "ant"]
    examples = made.rows("text-multi-label", 12)
    columns = {
        "text": [example["text"] for example in examples],
        "kinds": [[names.index(name) for name in example["kinds"]] for example in examples],
    }
    kinds = datasets.Sequence(datasets.ClassLabel(names=names))
    features = datasets.Features({"text": datasets.Value("string"), "kinds": kinds})
    table = datasets.Dataset.from_dict(columns, features=features)
    parquet.write_table(table.data.table.replace_schema_metadata(features.arrow_schema.metadata), tmp_path / "named.parquet")
    file = str(tmp_path / "named.parquet")
    raw = read_raw(made.recipe("text-multi-label", data={"train": file}))
    assert raw.label_names == names
    assert raw.train["label"][:] == [[float(name in example["kinds"]) for name in names] for example in examples]


def test_texts_without_labels_are_given_classes_and_no_loss(states: dict[str, State], tmp_path: Path) -> None:
    file = made.write(tmp_path / "new.csv", [{"text": example["text"]} for example in made.rows("text-multi-label", 5, 7)])
    out = PredictionFile(tmp_path / "p.parquet")
    (row,) = evaluate(states["text-multi-label"], which=["best"], other=OtherData(file), predictions=out)
    table = parquet.read_table(out.path).to_pydict()
    assert "f1" not in row
    assert table["label"] == table["loss"] == [None] * 5
    assert all(set(text.split(", ")) <= {*made.CLASSES, ""} for text in table["predicted"])


def test_of_lists_that_are_all_empty_no_example_has_a_class(tmp_path: Path) -> None:
    file = made.write(tmp_path / "none.jsonl", [{**row, "kinds": []} for row in made.rows("text-multi-label", 3)])
    raw = read_raw(made.recipe("text-multi-label", data={"validation": str(file)}))
    assert raw.validation["label"][:] == [[0.0, 0.0, 0.0]] * 3


def test_data_that_lack_one_of_several_columns_are_not_taken_for_unlabelled(tmp_path: Path) -> None:
    rows = list(map(as_columns, made.rows("text-multi-label", 12)))
    data = made.recipe("text-multi-label", data={"label": list(made.CLASSES)}).data.model_dump()
    labels = Labels(made.CLASSES, words=False)
    lacking = made.write(
        tmp_path / "lacking.jsonl", [{key: value for key, value in row.items() if key != "bee"} for row in rows]
    )
    with pytest.raises(DataError, match="has no column 'bee'"):
        read_other(TEXT_MULTI_LABEL, lacking, None, labels, data)
    bare = made.write(tmp_path / "bare.jsonl", [{"text": row["text"]} for row in rows])
    assert not read_other(TEXT_MULTI_LABEL, bare, None, labels, data).labelled


WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {  # what is changed in each row, the recipe's data, what is said
    "one text": ({"kinds": "ant"}, {}, "has values of type string in column 'kinds', not lists of labels"),
    "one column of 0 and 1": ({"kinds": 1}, {}, "holds values of type int64; expected lists of classes"),
    "a 2": ({"ant": 1, "bee": 2}, {"label": ["ant", "bee"]}, "column 'bee' of odd.jsonl holds 2 in row 1; expected 0 or 1"),
    "columns of lists": ({"bee": ["x"]}, {"label": ["kinds", "bee"]}, "in row 1; expected 0 or 1 in each of several columns"),
    "no class at all": ({"kinds": []}, {}, "holds no class in any of its lists"),
    "a missing class": ({"kinds": ["ant", None]}, {}, "has a list with a missing value in row 1"),
    "an empty name": ({"kinds": ["ant", " "]}, {}, "holds a label that is empty"),
    "one class": ({"kinds": ["ant"]}, {}, "holds only one label, 'ant'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_labels_of_another_kind_are_refused_and_nothing_is_made(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, data, said = WRONG[name]
    monkeypatch.chdir(tmp_path)
    made.write(Path("odd.jsonl"), [{**example, **change} for example in made.rows("text-multi-label", 12)])
    with pytest.raises(DataError) as caught:
        init(
            made.recipe("text-multi-label", data={"train": "odd.jsonl", "validation": "odd.jsonl", **data}), tmp_path / "state"
        )
    assert said in caught.value.message
    assert "--set" in str(caught.value.hint) or "name it" in str(caught.value.hint) or "row" in str(caught.value.hint)
    assert not (tmp_path / "state").exists()


def test_a_class_that_the_training_data_lack_is_named_with_its_row_and_list(tmp_path: Path) -> None:
    examples = made.rows("text-multi-label", 12)
    examples[6]["kinds"] = ["bee", "zebu"]
    file = made.write(tmp_path / "odd.jsonl", examples)
    with pytest.raises(DataError, match=r"holds 'zebu' in row 7, but the labels are ant, bee, cow"):
        init(made.recipe("text-multi-label", data={"validation": str(file)}), tmp_path / "state")


def test_a_folder_of_class_folders_is_refused_as_it_says_one_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    Path("recipe.yaml").write_text(recipes.dump(made.recipe("image-multi-label")), encoding="utf-8")
    assert main(["run", "recipe.yaml", "--state", "s", "--set", f"data.train={data_folder() / 'train'}"]) == DataError.exit_code
    err = capsys.readouterr().err
    assert "is a folder of class folders: one class for each image. The task reads lists of labels" in err
    assert "hint: name a file that has them beside the paths of the images: --set data.train=FILE" in err
    assert not Path("s").exists()
