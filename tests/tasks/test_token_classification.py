"""A tag for each word: sub-words aligned, seqeval by hand on words, losses weighed by words, all forms of files, wrong tags."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from pyarrow import parquet
from seqeval import metrics
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForTokenClassification, AutoTokenizer

from recap_cli.cli import main
from recap_cli.core.ragged import Ragged
from recap_cli.core.task import IGNORED
from recap_cli.data.splits import TextInputs, make_split
from recap_cli.errors import DataError, MissingExtraError
from recap_cli.models.create import tokenizer_of
from recap_cli.plugins.tasks.token_classification import TOKEN_CLASSIFICATION, constant, metrics_of
from recap_cli.progress import silent
from recap_cli.recipe import recipe as recipes
from recap_cli.rounds.examples import read_raw
from recap_cli.rounds.run_context import Context
from recap_cli.rounds.scoring import OtherData, PredictionFile
from recap_cli.stages.eval import evaluate
from recap_cli.stages.export import export
from recap_cli.stages.init import init
from recap_cli.stages.run import run
from recap_cli.state.store import State
from recap_cli.tasks.calls import task_named
from recap_cli.tasks.losses import mean_loss
from tests.pico import source_for
from tests.tasks import made

KIND = "token-classification"
ROWS = made.rows(KIND, made.VALIDATION, 1)


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> State:
    """Of a run whose rate is high enough that some names are found."""
    torch.set_num_threads(1)
    recipe = made.recipe(KIND, data={"max_length": 40}, finetune={"lr": 0.03, "epochs": 3}, mask={"train_embeddings": True})
    return run(recipe, tmp_path_factory.mktemp("tags") / "state")


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_tag_of_a_word_stands_at_its_first_token(side: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(made.write_pieces(tmp_path / "pieces", side=side))
    assert tokenizer.padding_side == side
    raw = read_raw(made.recipe(KIND))
    split = make_split(raw.train, TextInputs(tokenizer, 40, words=True), origin="x")
    batch = split.batch(torch.tensor([3, 0, 7]))
    assert batch["labels"].shape == batch["input_ids"].shape
    assert len({int(row.sum()) for row in batch["attention_mask"]}) > 1, "some are padded"
    for row, index in enumerate((3, 0, 7)):
        at = batch["labels"][row] != IGNORED
        example = raw.train[index]
        assert batch["labels"][row][at].tolist() == example["label"]
        first = tokenizer.convert_ids_to_tokens(batch["input_ids"][row][at].tolist())
        assert [piece[:1] for piece in first] == ["w"] * len(example["text"])
        rest = tokenizer.convert_ids_to_tokens(batch["input_ids"][row][~at].tolist())
        assert all(piece.startswith(("##", "[")) for piece in rest)
        assert any(piece.startswith("##") for piece in rest), "words are split"


def test_words_have_the_tokens_that_they_have_in_a_text(tmp_path: Path) -> None:
    vocabulary = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(ByteLevel.alphabet()), "ab", "Ġab"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(vocabulary)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\nĠ ab\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "RobertaTokenizer"}))
    source = source_for(KIND, config={"model_type": "roberta", "tokenizer": str(tmp_path)})
    tokenizer = tokenizer_of(source, 512)
    assert tokenizer(["ab", "ab"], is_split_into_words=True).tokens() == ["<s>", "Ġab", "Ġab", "</s>"]
    tokenizer.save_pretrained(tmp_path / "again")  # as a state, and an export, have it
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert again(["ab", "ab"], is_split_into_words=True).tokens() == ["<s>", "Ġab", "Ġab", "</s>"]
    texts = tokenizer_of(replace(source, task=task_named("text-classification")), 512)
    assert texts("ab ab").tokens() == ["<s>", "ab", "Ġab", "</s>"]


def tags_word_by_word(folder: Path, examples: list[dict[str, Any]]) -> list[list[str]]:
    """What a plain model of transformers says of each word, one text at a time: the tag of its first token."""
    model, tokenizer = AutoModelForTokenClassification.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    found = []
    for example in examples:
        tokens = tokenizer(example["words"], is_split_into_words=True, return_tensors="pt")
        with torch.no_grad():
            best = model(**tokens).logits[0].argmax(-1)  # (tokens,)
        places = tokens.word_ids(0)
        found.append([model.config.id2label[int(best[places.index(word)])] for word in range(len(example["words"]))])
    return found


def test_the_figures_are_those_of_seqeval_on_what_the_exported_model_says_of_each_word(state: State, tmp_path: Path) -> None:
    (row,) = evaluate(state, which=["best"], predictions=PredictionFile(tmp_path / "p.parquet"))
    facts = export(state, tmp_path / "dense", dense=True)
    found, wanted = tags_word_by_word(Path(facts["path"]), ROWS), [example["tags"] for example in ROWS]
    assert row["f1"] == pytest.approx(metrics.f1_score(wanted, found, zero_division=0))
    assert 0 < row["f1"] < 1, "some names are found, so that the figure can tell"
    assert row["precision"] == pytest.approx(metrics.precision_score(wanted, found, zero_division=0))
    assert row["recall"] == pytest.approx(metrics.recall_score(wanted, found, zero_division=0))
    assert row["accuracy"] == pytest.approx(metrics.accuracy_score(wanted, found))
    table = parquet.read_table(tmp_path / "p.parquet").to_pydict()
    assert [text.split() for text in table["predicted"]] == found
    assert [text.split() for text in table["label"]] == wanted
    words = [len(example["words"]) for example in ROWS]
    assert row["loss"] == pytest.approx(
        sum(loss * n for loss, n in zip(table["loss"], words, strict=True)) / sum(words), rel=1e-4
    )


def test_a_loss_weighs_each_word_alike_however_the_examples_are_batched(state: State) -> None:
    context = Context(state)
    split, task = context.splits(silent)[1], context.objective.task
    torch.manual_seed(0)
    batch = split.batch(torch.arange(6))
    logits = torch.randn(*batch["labels"].shape, 4)
    whole, count = mean_loss(task, logits, batch)
    parts = [(logits[start:stop], task.part(batch, start, stop)) for start, stop in ((0, 1), (1, 6))]
    means = [mean_loss(task, *part) for part in parts]
    assert float(count) == sum(float(n) for _, n in means) == sum(len(example["words"]) for example in ROWS[:6])
    assert float(whole) == pytest.approx(sum(float(mean) * float(n) for mean, n in means) / float(count), rel=1e-5)
    plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    assert float(whole) == pytest.approx(float(plain), rel=1e-5)


def test_chance_is_the_best_tag_for_all_words(state: State) -> None:
    wanted, chance = [example["tags"] for example in ROWS], state.manifest.made["chance"]
    answers = [[[tag] * len(text) for text in wanted] for tag in made.TAGS]
    assert chance["f1"] == pytest.approx(max(metrics.f1_score(wanted, answer, zero_division=0) for answer in answers))
    assert chance["accuracy"] == pytest.approx(max(metrics.accuracy_score(wanted, answer) for answer in answers))


def test_chance_is_found_by_a_tag_that_begins_an_entity_where_those_inside_are_more_frequent() -> None:
    texts = [["O"] * 4 + ["B-a", *["I-a"] * 3, "B-b", *["I-b"] * 4], ["B-d", "O", "B-d"]]
    tags = ("O", "B-a", "I-a", "I-b", "B-d", "B-b")
    answers = [[[tag] * len(text) for text in texts] for tag in tags]
    best = max(metrics.f1_score(texts, answer, zero_division=0) for answer in answers)
    assert best > 0
    assert constant(Ragged.of([tags.index(tag) for tag in text] for text in texts), tags)["f1"] == pytest.approx(best)


def test_tags_without_a_prefix_mark_words_and_are_never_joined() -> None:
    found = metrics_of([["NOUN", "NOUN", "VERB", "O"]], [["NOUN", "VERB", "VERB", "O"]])
    assert (found["precision"], found["recall"], found["accuracy"]) == pytest.approx((2 / 3, 2 / 3, 3 / 4))


def test_numbers_have_the_names_that_the_file_brings_along(tmp_path: Path) -> None:
    examples = made.rows(KIND, 12)
    features = datasets.Features(
        {
            "words": datasets.Sequence(datasets.Value("string")),
            "tags": datasets.Sequence(datasets.ClassLabel(names=list(made.TAGS))),
        }
    )
    columns = {
        "words": [example["words"] for example in examples],
        "tags": [[made.TAGS.index(tag) for tag in example["tags"]] for example in examples],
    }
    table = datasets.Dataset.from_dict(columns, features=features).data.table
    parquet.write_table(table.replace_schema_metadata(features.arrow_schema.metadata), tmp_path / "named.parquet")
    raw = read_raw(made.recipe(KIND, data={"train": str(tmp_path / "named.parquet")}))
    assert raw.label_names == list(made.TAGS)
    assert raw.train["label"][:] == columns["tags"]
    assert raw.train["text"][:] == columns["words"]


def test_texts_with_blanks_are_the_same_words_as_lists(tmp_path: Path) -> None:
    examples = made.rows(KIND, 12)
    blanks = [{name: " ".join(values) for name, values in example.items()} for example in examples]
    file, other = made.write(tmp_path / "blanks.csv", blanks), made.write(tmp_path / "lists.parquet", examples)
    first, second = (read_raw(made.recipe(KIND, data={"train": str(path)})) for path in (file, other))
    assert first.label_names == second.label_names
    assert first.train["text"][:] == second.train["text"][:] == [example["words"] for example in examples]
    assert first.train["label"][:] == second.train["label"][:]


def test_words_that_are_cut_off_are_counted_in_a_note_and_not_scored(tmp_path: Path) -> None:
    raw = read_raw(made.recipe(KIND))
    tokenizer = AutoTokenizer.from_pretrained(made.folder() / "pieces")
    split = make_split(raw.validation, TextInputs(tokenizer, 8, words=True), origin="short")
    kept = int(TOKEN_CLASSIFICATION.count(split.batch(torch.arange(len(split)))))
    lost = sum(len(example["words"]) for example in ROWS) - kept
    assert lost > 0
    assert split.notes == (f"short: {lost:,} words are beyond data.max_length (8 tokens), or make no token; none is scored",)
    with pytest.raises(DataError, match=r"^no word of short makes a token within data.max_length \(2 tokens\)"):
        make_split(raw.validation, TextInputs(tokenizer, 2, words=True), origin="short")


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_texts_without_tags_are_given_one_for_each_word(suffix: str, state: State, tmp_path: Path) -> None:
    words = [example["words"] for example in made.rows(KIND, 5, 7)]
    rows = [{"words": " ".join(each) if suffix == "csv" else each} for each in words]
    file = made.write(tmp_path / f"new.{suffix}", rows)
    out = PredictionFile(tmp_path / f"p.{suffix}")
    (row,) = evaluate(state, which=["best"], other=OtherData(file), predictions=out)
    assert "f1" not in row
    found = datasets.Dataset.from_csv if suffix == "csv" else None
    assert found is None or out.path.read_text().count("\n") == 6
    if suffix == "parquet":
        table = parquet.read_table(out.path).to_pydict()
        assert [len(text.split()) for text in table["predicted"]] == [len(each) for each in words]
        assert table["label"] == table["loss"] == [None] * 5


def test_tags_that_are_numbers_without_names_are_noted(tmp_path: Path) -> None:
    examples = [{**row, "tags": [made.TAGS.index(tag) for tag in row["tags"]]} for row in made.rows(KIND, 12)]
    file = str(made.write(tmp_path / "numbers.jsonl", examples))
    raw = read_raw(made.recipe(KIND, data={"train": file, "validation": file}))
    assert any(note.endswith("has no tag 'O', so that every word counts for f1, precision and recall") for note in raw.notes)
    assert not read_raw(made.recipe(KIND)).notes


Change = Callable[[dict[str, Any]], dict[str, Any]]
WRONG: dict[str, tuple[Change, str]] = {  # what is changed in the seventh row, and what is said
    "a tag too many": (lambda row: {"tags": [*row["tags"], "O"]}, "row 7 of odd.jsonl has"),
    "a tag too few": (lambda row: {"tags": row["tags"][1:]}, "row 7 of odd.jsonl has"),
    "a missing tag": (lambda row: {"tags": [None, *row["tags"][1:]]}, "column 'tags' of odd.jsonl lacks a tag in row 7"),
    "an empty word": (lambda row: {"words": ["", *row["words"][1:]]}, "row 7 of odd.jsonl has a word that is empty"),
    "a blank word": (lambda row: {"words": [" ", *row["words"][1:]]}, "row 7 of odd.jsonl has a word that is empty"),
    "a missing word": (lambda row: {"words": [None, *row["words"][1:]]}, "row 7 of odd.jsonl has a word that is empty"),
    "an empty tag": (lambda row: {"tags": ["", *row["tags"][1:]]}, "column 'tags' of odd.jsonl holds a label that is empty"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_row_whose_words_and_tags_do_not_fit_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change, said = WRONG[name]
    monkeypatch.chdir(tmp_path)
    examples = made.rows(KIND, 12)
    examples[6] |= change(examples[6])
    made.write(Path("odd.jsonl"), examples)
    with pytest.raises(DataError) as caught:
        init(made.recipe(KIND, data={"train": "odd.jsonl"}), tmp_path / "state")
    assert said in caught.value.message
    assert caught.value.hint
    assert not (tmp_path / "state").exists()


def test_a_tag_that_the_training_data_lack_is_named_with_its_row(tmp_path: Path) -> None:
    examples = made.rows(KIND, 12)
    examples[4]["tags"][0] = "B-zebu"
    file = made.write(tmp_path / "odd.jsonl", examples)
    with pytest.raises(DataError, match=r"holds 'B-zebu' in row 5, but the labels are B-ant, B-bee, I-ant, O"):
        init(made.recipe(KIND, data={"validation": str(file)}), tmp_path / "state")


def test_without_its_extra_the_command_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    Path("recipe.yaml").write_text(recipes.dump(made.recipe(KIND)), encoding="utf-8")
    monkeypatch.setattr("recap_cli.extras.find_spec", lambda name: None if name == "seqeval" else name)
    for line in ("run recipe.yaml --state s", "run recipe.yaml --dry-run", "init recipe.yaml --state s"):
        assert main(line.split()) == MissingExtraError.exit_code, line
        err = capsys.readouterr().err
        assert "seqeval is not installed: the extra tokens (metrics of the task token-classification) needs it" in err
        assert "hint: pip install 'recap-cli[tokens]'" in err
        assert not Path("s").exists()
