"""`recap compress`: what it guesses of a model and its data, what it says at the end, and what it refuses."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import recap_cli
from recap_cli.cli import main
from recap_cli.errors import DataError, ModelError, RecapError
from recap_cli.recipe.recipe import Recipe
from recap_cli.rounds.guessed_recipe import guess_recipe
from recap_cli.state.store import State
from tests.stages.test_distillation import KINDS, finetuned
from tests.tasks import made
from tests.tiny import TRAIN, VALIDATION, data_folder

COLUMNS = {
    "text-classification": {"text": "sentence", "label": "label"},
    "image-classification": {"image": None, "label": "label"},
    **made.COLUMNS,
}


def files(kind: str) -> tuple[str, str]:
    """The training and the validation data of a task."""
    if kind in made.KINDS:
        return str(made.folder() / f"{kind}-train.jsonl"), str(made.folder() / f"{kind}-validation.jsonl")
    suffix = ".csv" if kind.startswith("text") else ""
    return str(data_folder() / f"train{suffix}"), str(data_folder() / f"validation{suffix}")


def guessed(kind: str, *overrides: str) -> Recipe:
    train, validation = files(kind)
    return guess_recipe(str(finetuned(kind)), train, validation, 0.5, overrides).recipe


@pytest.mark.parametrize("kind", KINDS)
def test_the_task_is_that_of_the_head_and_the_columns_are_those_that_fit(kind: str) -> None:
    recipe = guessed(kind)
    assert recipe.task.kind == kind
    assert {key: getattr(recipe.data, key) for key in COLUMNS[kind]} == COLUMNS[kind]
    assert recipe.distill.teacher == "self"
    assert recipe.prune.ratio == 0.5
    assert recipe.head.warmup_epochs == 0
    assert recipe.data.validation == files(kind)[1]


def test_two_columns_of_texts_are_a_pair_and_numbers_are_no_label_beside_one(tmp_path: Path) -> None:
    rows = [{"idx": n, "first": f"w{n} w3", "second": f"w{n} w4", "label": ["cat", "dog", "newt"][n % 3]} for n in range(12)]
    file = made.write(tmp_path / "pairs.csv", rows)
    found = guess_recipe(str(finetuned("text-classification")), str(file), None, 0.3)
    assert (found.recipe.data.text, found.recipe.data.text_pair, found.recipe.data.label) == ("first", "second", "label")
    assert found.recipe.data.validation_share == 0.1
    assert "data.validation_share=0.1: no --validation was given" in found.reasons
    assert "data.text_pair=second: the second column that fits" in found.reasons


def test_what_is_set_is_not_guessed() -> None:
    sets = ("data.text=sentence", "data.label=label", "data.max_length=20", "finetune.lr=0.01", "finetune.epochs=1")
    train, _ = files("text-classification")
    found = guess_recipe(str(finetuned("text-classification")), train, None, 0.5, sets)
    assert found.recipe.finetune.lr == 0.01
    assert [reason.partition("=")[0] for reason in found.reasons] == ["task.kind", "data.validation_share"]


def refusal(error: type[RecapError], *given: Any) -> tuple[str, str]:
    with pytest.raises(error) as caught:
        guess_recipe(*given)
    return str(caught.value), str(caught.value.hint)


def test_columns_that_nobody_can_choose_are_listed(tmp_path: Path) -> None:
    rows = [{f"text{i}": f"w{n} w{i}" for i in range(3)} | {"kind": ["cat", "dog"][n % 2]} for n in range(12)]
    file = str(made.write(tmp_path / "three.csv", rows))
    message, hint = refusal(DataError, str(finetuned("text-classification")), file, None, 0.5)
    assert "several columns that may hold text: text0, text1, text2" in message
    assert hint == "name it with --set data.text=text0"
    (tmp_path / "none.csv").write_text("a,b\n1.5,2.5\n2.5,3.5\n3.5,9.5\n")
    message, _ = refusal(DataError, str(finetuned("text-classification")), str(tmp_path / "none.csv"), None, 0.5)
    assert "no column of" in message
    assert "its columns are: a, b" in message


def test_a_model_without_a_head_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(finetuned("text-classification"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["BertModel"]}))
    message, hint = refusal(ModelError, str(folder), files("text-classification")[0], None, 0.5)
    assert "is a BertModel, which has no head for a task that is known" in message
    assert "--set task.kind=NAME" in hint
    with pytest.raises(ModelError, match="there is no folder"):
        guess_recipe(str(tmp_path / "nothing"), files("text-classification")[0], None, 0.5)
    with pytest.raises(DataError, match="does not exist"):
        guess_recipe(str(finetuned("text-classification")), str(tmp_path / "no.csv"), None, 0.5)


def command(tmp_path: Path, *more: str) -> list[str]:
    train, validation = files("text-classification")
    given = ["compress", str(finetuned("text-classification")), "--data", train, "--validation", validation]
    quick = ["rounds=2", "finetune.epochs=1", "finetune.batch_size=8", "importance.batches=2", "prune.steps=2"]
    sets = [word for each in quick for word in ("--set", each)]
    return [*given, "--state", str(tmp_path / "state"), *sets, *more]


def test_a_run_says_what_it_guessed_and_ends_with_the_model_before_and_after(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "small"
    assert main(command(tmp_path, "--out", str(out), "--json")) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert "task.kind=text-classification: the checkpoint is a BertForSequenceClassification" in printed.err
    state = State.open(tmp_path / "state")
    assert found["metric"] == "accuracy"
    assert found["before"]["value"] == state.manifest.made["teacher"]["figures"]["accuracy"]
    assert found["after"]["value"] == (state.manifest.best or {})["value"]
    assert found["before"]["parameters"] == state.manifest.made["parameters"]
    small = recap_cli.load(out)
    assert found["after"]["parameters"] == sum(param.numel() for param in small.parameters()) < found["before"]["parameters"]
    assert found["after"]["bytes"] == 4 * found["after"]["parameters"]
    assert found["latency_batches"] == [1, min(32, VALIDATION)]
    assert all(seconds > 0 for name in ("before", "after") for seconds in found[name]["latency_seconds"])
    assert found["held_bytes"] < found["full_held_bytes"] == 16 * found["before"]["parameters"]
    assert found["steps"] == 2 * TRAIN // 8
    assert main(command(tmp_path)) == 0  # nothing is left to do, and it says the same
    again = capsys.readouterr()
    assert again.out.strip() == found["product"]
    assert f"{found['before']['value']:.4f}" in again.err
    assert "Before and after" in again.err


def test_nothing_is_done_where_the_export_has_no_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "there"
    out.mkdir()
    (out / "file").touch()
    assert main(command(tmp_path, "--out", str(out))) == 12
    assert "there" in capsys.readouterr().err
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (("--ratio", "1.5"), 3, "prune.ratio"),
        (("--ratio", "half"), 2, "'--ratio'"),
        (("--set", "prune.rato=0.5"), 3, "did you mean prune.ratio"),
        (("--set", "distill.teacher=null"), 3, "compress has the model itself as its teacher"),
    ],
)
def test_bad_input_is_named(
    more: tuple[str, ...], code: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(tmp_path, *more)) == code
    printed = capsys.readouterr()
    assert said in printed.err
    assert "Traceback" not in printed.err
    assert not (tmp_path / "state").exists()


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(tmp_path, "--dry-run")) == 0
    assert "small-full-000: text-classification, best by accuracy" in capsys.readouterr().out
    assert not (tmp_path / "state").exists()
    assert torch.is_grad_enabled()
