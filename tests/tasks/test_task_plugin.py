"""The task that docs/plugins/task.md prints, run as it stands there; and what comes of a task that is wrong."""

import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyarrow import parquet

import recap_cli
from recap_cli import registry
from recap_cli.api import Task
from recap_cli.errors import DataError, PluginError
from recap_cli.recipe.recipe import Recipe
from recap_cli.rounds.scoring import PredictionFile
from recap_cli.rounds.status import summary
from recap_cli.stages.eval import evaluate
from recap_cli.stages.export import export
from recap_cli.stages.init import init
from recap_cli.stages.run import run
from recap_cli.tasks.calls import guarding, task_named
from tests.tasks import made

PAGE = Path(__file__).parents[2] / "docs" / "plugins" / "task.md"


def printed(language: str) -> str:
    """The one code block of a language that the page has."""
    (block,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return str(block)


@pytest.fixture
def ratings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with examples, and the printed task, installed as the printed lines of pyproject.toml have it."""
    (tmp_path / "recap_ratings.py").write_text(printed("python"), encoding="utf-8")
    group, name, target = re.findall(r'^\[project\.entry-points\."(.+)"\]\n(\S+) = "(.+)"$', printed("toml"), re.MULTILINE)[0]
    info = tmp_path / "recap_extra-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: recap-extra\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {target}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for split, seed in (("train", 0), ("validation", 1)):
        examples = made.rows("text-regression", 30, seed)
        stars = [{"text": example["text"], "stars": int(2.5 + example["score"])} for example in examples]
        made.write(tmp_path / f"{split}.csv", stars)
    yield tmp_path
    sys.modules.pop("recap_ratings", None)


def recipe(folder: Path, **sections: Any) -> Recipe:
    files = {split: str(folder / f"{split}.csv") for split in ("train", "validation")}
    task = {"kind": "text-rating", "metric": "mae"}
    return made.recipe("text-regression", task=task, data={**files, "label": "stars"}, **sections)


def test_the_printed_task_runs_from_a_recipe_to_an_export(ratings: Path, tmp_path: Path) -> None:
    state = run(recipe(ratings, finetune={"micro_batch_size": 4}), tmp_path / "state")
    assert state.manifest.plugins["used"]
    assert {"kind": "tasks", "name": "text-rating", "distribution": "recap-extra", "version": "0.1.0"}.items() <= next(
        plugin.items() for plugin in state.manifest.plugins["used"] if plugin["kind"] == "tasks"
    )
    (row,) = evaluate(state, which=["best"], predictions=PredictionFile(tmp_path / "p.parquet"))
    table = parquet.read_table(tmp_path / "p.parquet").to_pydict()
    found, wanted = np.array(table["predicted"]), np.array(table["label"])
    assert wanted.tolist() == [int(2.5 + example["score"]) for example in made.rows("text-regression", 30, 1)]
    assert row["mae"] == pytest.approx(np.abs(found - wanted).mean())
    assert row["exact"] == pytest.approx((found == wanted).mean())
    assert row["loss"] == pytest.approx(np.mean(table["loss"]), rel=1e-5)
    best, errors = state.manifest.best or {}, [e["mae"] for e in state.manifest.history if e["stage"] == "finetune"]
    assert best["value"] == min(errors)
    chance = [np.abs(stars - wanted).mean() for stars in range(1, 7)]
    assert summary(state)["chance"] == pytest.approx(min(chance))
    model = recap_cli.load(export(state, tmp_path / "small")["path"])
    assert list(model.config.id2label.values()) == ["above 3", "above 4", "above 5"]


def test_the_printed_task_names_the_row_of_a_rating_that_is_none(ratings: Path, tmp_path: Path) -> None:
    lines = (ratings / "validation.csv").read_text().splitlines()
    (ratings / "validation.csv").write_text("\n".join([*lines[:5], "w1 w2,3.5", *lines[6:]]) + "\n")
    with pytest.raises(DataError, match=r"column 'stars' of .*validation\.csv holds 3.5 in row 5; expected whole"):
        init(recipe(ratings), tmp_path / "state")
    assert not (tmp_path / "state").exists()


def test_a_task_is_listed_without_being_imported_and_read_without_torch_of_its_own(ratings: Path) -> None:
    assert "text-rating" in registry.names("tasks")
    assert "recap_ratings" not in sys.modules
    assert isinstance(task_named("text-rating"), Task)


BATCH = {"labels": torch.tensor([0, 1, 1])}
LOGITS = torch.zeros(3, 2)
WRONG: dict[str, tuple[dict[str, Any], str]] = {  # what is wrong with a task, and what is said of it
    "a loss per example": ({"loss": lambda logits, batch: logits.sum(1)}, r"gave a loss that is no number: .* of shape \(3,\)"),
    "a whole loss": ({"loss": lambda logits, batch: batch["labels"].sum()}, "gave a loss that is no number: torch.int64"),
    "a loss that fails": ({"loss": lambda logits, batch: 1 / 0}, "failed: ZeroDivisionError"),
    "no accuracy": ({"score": lambda stream, labels: {"f1": 1.0, "matthews": 0.0}}, "gave no accuracy"),
    "a row too few": (
        {"predict": lambda logits, batch, labels: {"label": [0], "predicted": [0], "loss": [0.0]}},
        "gave predictions of label .1., predicted .1., loss .1. for 3 examples",
    ),
    "no label": (
        {"predict": lambda logits, batch, labels: {"predicted": [0, 0, 0], "loss": [0.0] * 3}},
        "gave predictions .* for 3 ex",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_task_that_is_wrong_is_named(name: str) -> None:
    change, said = WRONG[name]
    task = guarding(replace(task_named("text-classification"), **change), "odd")
    calls = {
        "loss": lambda: task.loss(LOGITS, BATCH),
        "score": lambda: task.score(iter([(LOGITS, BATCH)]), ["a", "b"]),
        "predict": lambda: task.predict(LOGITS, BATCH, ["a", "b"]),
    }
    (call,) = (calls[key] for key in change)
    with pytest.raises(PluginError, match=f"^the task 'odd' {said}") as caught:
        call()
    assert "docs/plugins/task.md" in str(caught.value.hint)
