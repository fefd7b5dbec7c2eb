"""`recap compress`: what it guesses of a model and its data, what it says at the end, and what it refuses."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

import recap_cli
from recap_cli import registry
from recap_cli.cli import main
from recap_cli.data import guess
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
    assert (recipe.rounds, recipe.head.warmup_epochs) == (1, 0)
    assert (recipe.prune.scope, recipe.prune.compensate, recipe.distill.hidden_weight) == ("global", "auto", 10.0)
    assert recipe.data.validation == files(kind)[1]


def test_two_columns_whose_names_say_so_are_a_pair_and_identifiers_are_no_text(tmp_path: Path) -> None:
    rows = [
        {"id": f"train_{n}", "text_a": f"w{n} w3", "text_b": f"w{n} w4", "label": ["cat", "dog", "newt"][n % 3]}
        for n in range(12)
    ]
    file = made.write(tmp_path / "pairs.csv", rows)
    found = guess_recipe(str(finetuned("text-classification")), str(file), None, 0.3)
    assert (found.recipe.data.text, found.recipe.data.text_pair, found.recipe.data.label) == ("text_a", "text_b", "label")
    assert found.recipe.data.validation_share == 0.1
    assert "data.validation_share=0.1: no --validation was given" in found.reasons
    assert "data.text_pair=text_b: the second column of the pair" in found.reasons


def test_what_is_set_is_not_guessed() -> None:
    sets = ("data.text=sentence", "data.label=label", "data.max_length=20", "finetune.lr=0.01", "finetune.epochs=1")
    train, _ = files("text-classification")
    found = guess_recipe(str(finetuned("text-classification")), train, None, 0.5, sets)
    assert found.recipe.finetune.lr == 0.01
    said = [reason.partition("=")[0] for reason in found.reasons]
    training = ["rounds", "prune.scope", "prune.compensate", "mask.ratio"]
    lesson = ["distill.weight", "distill.temperature", "distill.hidden_weight"]
    assert said == ["task.kind", "data.validation_share", *training, *lesson]


def refusal(error: type[RecapError], *given: Any) -> tuple[str, str]:
    with pytest.raises(error) as caught:
        guess_recipe(*given)
    return str(caught.value), str(caught.value.hint)


def test_columns_that_nobody_can_choose_are_listed(tmp_path: Path) -> None:
    rows = [{each: f"w{n} {each}" for each in ("alpha", "beta", "gamma")} | {"kind": ["cat", "dog"][n % 2]} for n in range(12)]
    file = str(made.write(tmp_path / "three.csv", rows))
    message, hint = refusal(DataError, str(finetuned("text-classification")), file, None, 0.5)
    assert "several columns that may hold text: alpha, beta, gamma" in message
    assert hint == "name it with --set data.text=alpha, or another task: --set task.kind=NAME"
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


@pytest.mark.parametrize(
    ("columns", "chosen"),
    [
        ({"id": "a{n}", "sentence": "w{n} w3"}, "sentence"),
        ({"url": "http://x/{n}", "body": "w{n} w3"}, "body"),
        ({"title": "w{n} w1", "text": "w{n} w3"}, "text"),
    ],
)
def test_a_text_is_known_by_its_name_or_by_its_blanks(columns: dict[str, str], chosen: str, tmp_path: Path) -> None:
    rows = [
        {name: text.format(n=n) for name, text in columns.items()} | {"label": ["cat", "dog", "newt"][n % 3]} for n in range(12)
    ]
    file = made.write(tmp_path / "rows.csv", rows)
    found = guess_recipe(str(finetuned("text-classification")), str(file), None, 0.3).recipe
    assert (found.data.text, found.data.text_pair) == (chosen, None)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"architectures": None}, "config.json does not name the class of the model"),
        ({"architectures": "BertForSequenceClassification"}, "config.json does not name the class of the model"),
        ({"max_position_embeddings": "512"}, "max_position_embeddings"),
        ({"max_position_embeddings": [512]}, "max_position_embeddings"),
        ({"id2label": ["a", "b"]}, "id2label"),
        ({"model_type": "nonsense"}, "nonsense"),
        ({"model_type": 5}, "model_type"),
    ],
)
def test_an_odd_configuration_is_refused_by_what_is_wrong_with_it(config: dict[str, Any], said: str, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    shutil.copytree(finetuned("text-classification"), folder)
    values = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(values))
    message, _ = refusal(ModelError, str(folder), files("text-classification")[0], None, 0.5)
    assert said in message


def test_what_is_no_file_is_a_data_set_of_the_hub_and_the_message_says_both(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_hub(*_: Any) -> Any:
        raise DataError("the hub cannot be reached")

    monkeypatch.setattr(guess, "read_hub", no_hub)
    message, hint = refusal(DataError, str(finetuned("text-classification")), "trian", None, 0.5)
    assert message == "there is no file or folder trian, and as a data set of the hub: the hub cannot be reached"
    assert "--data train.csv" in hint
    table = pa.table({"sentence": [f"w{n} w2" for n in range(8)], "label": ["cat", "dog"] * 4})
    monkeypatch.setattr(guess, "read_hub", lambda *_: [table])
    of_hub = guess_recipe(str(finetuned("text-classification")), "stanfordnlp/data-v1.5", None, 0.5).recipe
    assert (of_hub.data.name, of_hub.data.validation_share) == ("stanfordnlp/data-v1.5", 0.1)
    with_split = guess_recipe(str(finetuned("text-classification")), "stanfordnlp/sst2", "dev", 0.5).recipe
    assert (with_split.data.validation_split, with_split.data.validation_share) == ("dev", None)


def test_a_folder_of_images_is_no_data_of_a_text_model() -> None:
    message, _ = refusal(DataError, str(finetuned("text-classification")), str(data_folder() / "train"), None, 0.5)
    assert "the task reads texts, but the folder" in message


def test_a_strangers_task_neither_breaks_the_guess_nor_is_it(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [registry.Entry("a-broken", "tasks", "other", "1", "nowhere:TASK"), *registry.entries("tasks")]
    monkeypatch.setattr(registry, "entries", lambda _: entries)
    assert guessed("text-classification").task.kind == "text-classification"


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


def test_an_export_has_no_place_in_its_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for out in (tmp_path / "state", tmp_path / "state" / "small"):
        assert main(command(tmp_path, "--out", str(out))) == 2
        assert "is in the state's folder" in capsys.readouterr().err
    assert not (tmp_path / "state").exists()


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
        (("--set", "finetune.lr=[1"), 3, "expected a YAML value"),
        (("--set", "data.label=2020-02-30"), 3, "data.label"),
        (("--set", "nonsense"), 3, "nonsense"),
        (("--set", "model.name=other"), 2, "compress has MODEL for it"),
        (("--set", "data.train=null"), 2, "compress has --data for it"),
        (("--set", "prune.rato=0.5"), 3, "did you mean prune.ratio"),
        (("--set", "distill.teacher=null"), 3, "compress has the model itself as its teacher"),
        (("--set", "distill={teacher: lora}"), 3, "compress has the model itself as its teacher"),
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
    assert main(command(tmp_path, "--dry-run", "--json")) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["recipe"]["distill"]["teacher"] == "self"
    assert told["plan"][0].startswith("small-full-000: text-classification")
    assert any(reason.startswith("data.text=sentence") for reason in told["guessed"])
    assert not (tmp_path / "state").exists()
    assert torch.is_grad_enabled()
