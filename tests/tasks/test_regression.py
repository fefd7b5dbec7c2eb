"""Text regression: a whole run, figures beside numpy's and scipy's, an export, numbers as files have them, wrong labels."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyarrow import parquet
from scipy import stats
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import recap_cli
from recap_cli.errors import DataError
from recap_cli.models.head_labels import places_of
from recap_cli.plugins.tasks.text_regression import constant, metrics_of
from recap_cli.rounds.examples import read_raw
from recap_cli.rounds.scoring import OtherData, PredictionFile
from recap_cli.stages.eval import evaluate
from recap_cli.stages.export import export
from recap_cli.stages.init import init
from recap_cli.stages.run import run
from recap_cli.state.store import State
from tests.tasks import made

KIND = "text-regression"


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> State:
    torch.set_num_threads(1)
    return run(made.recipe(KIND, task={"metric": "mse"}), tmp_path_factory.mktemp("regression") / "state")


def test_the_figures_are_those_of_the_predictions_that_are_written(state: State, tmp_path: Path) -> None:
    (row,) = evaluate(state, which=["best"], predictions=PredictionFile(tmp_path / "p.parquet"))
    table = parquet.read_table(tmp_path / "p.parquet").to_pydict()
    found, wanted = np.array(table["predicted"]), np.array(table["label"])
    examples = [json.loads(line) for line in (made.folder() / f"{KIND}-validation.jsonl").read_text().splitlines()]
    assert wanted.tolist() == [example["score"] for example in examples]
    assert row["pearson"] == pytest.approx(stats.pearsonr(found, wanted).statistic, abs=1e-5)
    assert row["spearman"] == pytest.approx(stats.spearmanr(found, wanted).statistic, abs=1e-5)
    assert row["mse"] == pytest.approx(np.square(found - wanted).mean(), rel=1e-5)
    assert row["loss"] == pytest.approx(row["mse"], rel=1e-5)
    assert table["loss"] == pytest.approx(np.square(found - wanted).tolist(), rel=1e-4)


def test_the_best_round_is_the_one_with_the_least_error(state: State) -> None:
    rounds = [entry["mse"] for entry in state.manifest.history if entry["stage"] == "finetune"]
    assert len(rounds) == 2
    assert (state.manifest.best or {})["round"] == 1 + int(np.argmin(rounds))


def test_chance_is_the_mean_of_the_validation_numbers(state: State) -> None:
    numbers = [example["score"] for example in made.rows(KIND, made.VALIDATION, 1)]
    chance = state.manifest.made["chance"]
    assert (chance["pearson"], chance["spearman"]) == (0.0, 0.0)
    assert chance["mse"] == chance["loss"] == pytest.approx(np.var(numbers))


def test_a_dense_export_is_a_plain_model_of_transformers_with_its_own_loss(state: State, tmp_path: Path) -> None:
    facts = export(state, tmp_path / "dense", dense=True)
    plain = AutoModelForSequenceClassification.from_pretrained(facts["path"]).eval()
    assert (plain.config.problem_type, plain.config.num_labels) == ("regression", 1)
    tokens = AutoTokenizer.from_pretrained(facts["path"])(["w0 w12 w1", "w30"], padding=True, return_tensors="pt")
    with torch.no_grad():
        theirs = plain(**tokens, labels=torch.tensor([2.5, 0.5]))
        ours = recap_cli.load(facts["path"])(**tokens).logits[:, 0]  # (2,)
    torch.testing.assert_close(theirs.logits[:, 0], ours)
    torch.testing.assert_close(theirs.loss, (ours - torch.tensor([2.5, 0.5])).square().mean())


@pytest.mark.parametrize("write", [str, float, lambda score: f" {score:e} "])
def test_numbers_may_be_texts(write: Any, tmp_path: Path) -> None:
    examples = [{**example, "score": write(example["score"])} for example in made.rows(KIND, 12)]
    file = made.write(tmp_path / "numbers.jsonl", examples)
    raw = read_raw(made.recipe(KIND, data={"train": str(file)}))
    assert raw.train["label"][:] == [example["score"] for example in made.rows(KIND, 12)]
    assert raw.label_names == ["score"]


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        ("good", "holds 'good' in row 5, which is no number"),
        (float("nan"), "holds nan in row 5, which is no finite number of 32 bits"),
        (float("inf"), "holds inf in row 5, which is no finite number of 32 bits"),
        ("1_000", "holds '1_000' in row 5, which is no number"),
        ("1e300", "holds '1e300' in row 5, which is no finite number of 32 bits"),
        (None, "has no value in row 5"),
    ],
)
def test_a_row_that_has_no_number_is_named(odd: Any, said: str, tmp_path: Path) -> None:
    examples = made.rows(KIND, 12)
    changed = [{**example, "score": odd if row == 5 else str(example["score"])} for row, example in enumerate(examples, 1)]
    if isinstance(odd, float):
        changed = [{**example, "score": odd if row == 5 else example["score"]} for row, example in enumerate(examples, 1)]
    file = made.write(tmp_path / "odd.jsonl", changed)
    with pytest.raises(DataError, match=r"column 'score' of .*odd\.jsonl") as caught:
        init(made.recipe(KIND, data={"train": str(file)}), tmp_path / "state")
    assert said in caught.value.message
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(("score", "said"), [(2.0, "holds only one number, 2"), ([1.0], "list<item: double>"), (True, "bool")])
def test_a_column_that_has_no_numbers_to_learn_is_refused(score: Any, said: str, tmp_path: Path) -> None:
    file = made.write(tmp_path / "odd.jsonl", [{**example, "score": score} for example in made.rows(KIND, 12)])
    with pytest.raises(DataError) as caught:
        init(made.recipe(KIND, data={"train": str(file)}), tmp_path / "state")
    assert said in caught.value.message
    assert "--set data.label=" in str(caught.value.hint)


def test_correlations_with_numbers_that_are_all_the_same_are_0_as_at_chance() -> None:
    targets = torch.tensor([1.0, 2.0, 4.0])
    same = metrics_of(torch.full((3,), 7 / 3), targets)
    assert (same["pearson"], same["spearman"]) == (0.0, 0.0)
    assert same["mse"] == pytest.approx(constant(targets, ["score"])["mse"])


def test_other_data_whose_numbers_are_all_minus_one_have_labels(state: State, tmp_path: Path) -> None:
    file = made.write(tmp_path / "low.jsonl", [{**example, "score": -1.0} for example in made.rows(KIND, 6)])
    (row,) = evaluate(state, which=["best"], other=OtherData(file))
    assert row["mse"] > 0


def test_a_head_of_one_number_fits_whatever_its_column_is_called() -> None:
    assert places_of(["label"], ["score"]) == [0]
