"""Recipes and overrides that would hang, write elsewhere or say nothing: each is refused at once, with its place."""

import os
from pathlib import Path
from time import monotonic

import pytest
import yaml

from recap_cli.cli import main
from recap_cli.errors import RecipeError
from recap_cli.recipe import recipe
from recap_cli.recipe.bounds import DEEPEST, MOST_CHARACTERS, check_size
from tests.recipe.test_recipe import TEXT, parsed, refused, refused_beside

HANG_SECONDS = 120.0  # what is tried here took for ever; now well below a second each, on an idle machine
ALIASES = "".join(f"  a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10))
BOMBS = {
    "aliases": f"options:\n  a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n{ALIASES}",
    "aliases of a text": f"options:\n  a: &a {'x' * 1000}\n  b: [{', '.join(['*a'] * 100)}]\n",
    "merged aliases": "options:\n  a0: &a0 {x: 1, y: 2}\n"
    + "".join(f"  a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 8)),
    "brackets": "options: " + "[" * 100_000,
    "dashes": "options:\n  " + "- " * 100_000,
    "levels through aliases": "options:\n  a0: &a0 [[[[[[[[[[x]]]]]]]]]]\n"
    + "".join(f"  a{i}: &a{i} [[[[[[[[[[*a{i - 1}]]]]]]]]]]\n" for i in range(1, 9)),
    "values": "options: [" + "1," * 11_000 + "]",
    "a long text": f"name: {'x' * 200_000}",
    "a long file": "# nothing\n" * 60_000,
    "a number": f"seed: {'9' * 4000}",
    "a number of base 16": f"seed: 0x{'f' * 4000}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_in_a_line(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "bomb.yaml"
    file.write_text(BOMBS[name] if name.startswith("a long file") else TEXT + BOMBS[name], encoding="utf-8")
    started = monotonic()
    assert main(["run", str(file), "--dry-run"]) == RecipeError.exit_code
    assert monotonic() - started < HANG_SECONDS
    shown = capsys.readouterr().err
    assert f"{file}" in shown
    words = (
        "it holds more than 10,000 values",
        "nested too deeply",
        "is larger than 512 KiB",
        "a number of 4,00",
        "expected YAML",
    )
    assert any(word in shown for word in words)
    assert len(shown) < 1000


def test_thousands_of_unknown_keys_are_not_all_explained() -> None:
    started = monotonic()
    with pytest.raises(RecipeError) as caught:
        recipe.parse(TEXT + "".join(f"k{i}: 1\n" for i in range(4000)), "r.yaml")
    assert monotonic() - started < HANG_SECONDS
    head, *lines = caught.value.message.splitlines()
    assert head == "more than 50 problems in the recipe r.yaml"
    assert len(lines) == 50
    assert lines[0].split()[:4] == ["r.yaml:4:1", "k0", "unknown", "key;"]


def test_a_recipe_that_never_ends_is_not_read_to_its_end() -> None:
    with pytest.raises(RecipeError, match="cannot read the recipe /dev/zero: it is larger than 512 KiB"):
        recipe.read("/dev/zero")


@pytest.mark.timeout(120)  # it would be waited for
def test_a_named_pipe_is_no_recipe_and_the_pipe_of_a_shell_is_one(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "r.yaml")
    with pytest.raises(RecipeError, match=r"r\.yaml: it is a pipe, not a file"):
        recipe.read(str(tmp_path / "r.yaml"))
    reading, writing = os.pipe()
    os.write(writing, TEXT.encode())
    os.close(writing)
    assert recipe.read(f"/dev/fd/{reading}") == recipe.parse(TEXT, "r.yaml")
    os.close(reading)


def test_what_is_as_large_as_it_may_be_is_read_and_its_filled_form_too() -> None:
    count = MOST_CHARACTERS // 8 - 200
    text = f"{TEXT}options: {{list: [{', '.join(['abcdefg'] * count)}]}}\n"
    with pytest.raises(RecipeError, match="10,000 values"):
        recipe.parse(text.replace("abcdefg", "a"), "r.yaml", ["options.more=[" + "1," * 9000 + "1, 1" * 1000 + "]"])
    made = recipe.parse(text, "r.yaml")
    assert recipe.parse(recipe.dump(made), "filled") == made
    nested = "[" * (DEEPEST - 2) + "]" * (DEEPEST - 2)
    made = parsed(f"options: {{deep: {nested}}}\n")
    assert recipe.parse(recipe.dump(made), "filled") == made


def test_an_alias_is_counted_each_time_and_a_shared_section_is_not_too_much() -> None:
    check_size("a: &a {b: 1}\nc: *a\nd: [*a, *a]\n")
    with pytest.raises(yaml.MarkedYAMLError, match="10,000 values"):
        check_size("a: &a [" + "1," * 3000 + "]\nb: [*a, *a, *a]\n")


# Overrides that say nothing


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.train=", "data.train expected a value after the `=`; found nothing (write null for null)"),
        ("data.train= ", "data.train expected a value after the `=`; found nothing (write null for null)"),
        ("prune=", "prune expected a value after the `=`; found nothing (write null for null)"),
        ("patience=", "patience expected a value after the `=`; found nothing (write null for null)"),
        ("data.train=#a.csv", "data.train expected a value after the `=`; found #a.csv, which YAML reads as nothing"),
        ("data.train=&x", "data.train expected a value after the `=`; found &x, which YAML reads as nothing"),
        ("data.train=a.csv #b", "data.train expected a value and no more; found #b after it, a comment in YAML"),
        ("data.train=~", "data.train expected a value; found null, so data.builtin of quickstart.yaml would be used"),
        ("data.name=null", "data.name expected a value; found null, so data.builtin of quickstart.yaml would be used"),
        ("model.name=NULL", "model.name expected a value; found null, so model.config of quickstart.yaml would be used"),
        ("prune=~", "prune expected keys with values; found null, which would drop all of prune"),
    ],
)
def test_an_override_that_says_nothing_is_refused(override: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe.read("quickstart", [override])
    _, line = caught.value.message.splitlines()
    assert " ".join(line.split()).startswith(" ".join(f"--set {override} {words}".split()))


def test_null_is_a_value_where_it_means_something_and_another_source_is_named() -> None:
    assert parsed("patience: 3\n", "patience=null").patience is None
    assert parsed("", "finetune.steps=3", "finetune.epochs=~").finetune.epochs is None
    images = ["data.builtin=null", "data.train=folder", "data.validation_share=0.1", "data.image=image"]
    assert recipe.read("quickstart", images).data.train == "folder"
    assert recipe.read("quickstart", ["data.train=null", "data.builtin=digits"]).data.builtin == "digits"
    assert parsed("", "data.text='#a'").data.text == "#a"


# Names


@pytest.mark.parametrize(
    "name",
    [
        *("../../x", "/abs/x", "a/b", "a\\b", "..", ".", " ", " a", "a\t", "-x", "~", "~x"),
        *("a\nb", "\x1b[31mred", "a\u2028b", "x" * 201, "é" * 101),
    ],
)
def test_a_name_is_one_plain_part_of_a_path(name: str) -> None:
    line = refused_beside("", f"name={yaml.safe_dump(name, default_style=chr(34)).strip()}")[0]
    assert " name expected text that can name a folder: no / or \\, no control characters" in line


@pytest.mark.parametrize("name", ["a", "vit_base-2.1", "my run", ".hidden", "模型", "é" * 100, "a:b", "..."])
def test_a_plain_name_is_taken(name: str) -> None:
    assert parsed("", f"name={yaml.safe_dump(name, default_style=chr(34)).strip()}").name == name


def test_a_name_that_leaves_the_folder_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    for command in ("run", "compare"):
        assert main([command, "quickstart", "--set", "name=../../../escaped"]) == RecipeError.exit_code
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "b"]


# What the line of a shell may hold


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("\udcff=1", "- expected text; found a byte or half a character that is no text ('\\udcff')"),
        ("data.train=\udcff.csv", "data.train expected text; found a byte or half a character"),
        ('data.train="a\\0b"', "data.train expected a YAML value: it holds the character NUL"),
        ('name="\\ud800"', "name expected a YAML value: it holds a byte or half a character"),
        ("a." * 2000 + "a=1", f"{'a.' * 28}a... expected at most 50 levels of keys; found 2001"),
        ("seed=12:30:45", "seed expected a number in digits; found 12:30:45, which YAML reads in base 60"),
        ("rounds=1:30", "rounds expected a number in digits; found 1:30, which YAML reads in base 60"),
        ("options.a=[0.9, 1:30.5]", "options.a.1 expected a number in digits; found 1:30.5"),
        ("finetune.memory_budget=٢GB", "finetune.memory_budget expected text such as 2GiB, 1500MB, 0.5GB or null"),
        (f"finetune.memory_budget={'9' * 400}GB", "finetune.memory_budget expected text such as 2GiB"),
        ("finetune.device=cuda:99999999999999", "finetune.device expected text such as auto, cpu, mps, cuda, cuda:1"),
        ("importance.device=cuda:٢", "importance.device expected text such as auto, cpu, mps, cuda, cuda:1"),
        ("rounds=10000000", "rounds expected a whole number from 1 to 5000; found 10000000"),
        ("rounds=1e308", 'rounds expected a whole number from 1 to 5000; found "1e308"'),
        ("prune.steps=1000000", "prune.steps expected a whole number from 1 to 1000; found 1000000"),
        ("finetune.steps=1e20", 'finetune.steps expected a whole number from 1 to 1000000000 or null; found "1e20"'),
        ("finetune.epochs=1e308", 'finetune.epochs expected a number in (0, 100000] or null; found "1e308"'),
        ("finetune.batch_size=1e20", 'finetune.batch_size expected a whole number from 1 to 1000000; found "1e20"'),
        ("evaluate.batch_size=1e20", 'evaluate.batch_size expected a whole number from 1 to 1000000; found "1e20"'),
        ("importance.batch_size=1e20", 'importance.batch_size expected a whole number from 1 to 1000000; found "1e20"'),
        ("data.workers=1000000", "data.workers expected a whole number from 0 to 1024; found 1000000"),
        ("finetune.eps=1e300", "finetune.eps expected at most 3.4e+38, beyond which float32 overflows; found 1e+300"),
        ("finetune.eps=1e-300", "finetune.eps expected at least 1.2e-38, below which it is 0 in float32; found 1e-300"),
        ("data.train=/", "data.train expected a file or a folder; found /, all of the file system"),
        ("data.train=/..//.", "data.train expected a file or a folder; found /..//., all of the file system"),
        ("data.image_size=32", "data.image_size expected null, for text-classification; found 32"),
        ("data.image=img", "data.image expected null, for text-classification; found img"),
        ("data.augment=flip", "data.augment expected none, for text-classification; found flip"),
    ],
)
def test_an_override_beyond_all_sense_is_refused_with_its_key(override: str, words: str) -> None:
    (line,) = refused_beside("", override)
    shown = override if len(override) <= 60 else f"{override[:57]}..."
    assert line.startswith(f"--set {shown} {words}")


def test_text_is_nothing_for_a_task_of_images() -> None:
    with pytest.raises(RecipeError, match=r"data\.text +expected null, for image-classification; found x"):
        recipe.read("quickstart", ["data.text=x"])


def test_a_text_that_looks_like_a_time_is_taken_in_quotes() -> None:
    assert parsed("", "data.label='12:30:45'").data.label == "12:30:45"
    assert refused(TEXT + "seed: 1:30\n") == [
        "r.yaml:4:7 seed expected a number in digits; found 1:30, which YAML reads in base 60 (put text in quotes)"
    ]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("num_hidden_layers=1000000", "num_hidden_layers expected at most 1,000; found 1,000,000"),
        ("vocab_size=1000000000000", "vocab_size expected at most 100,000,000; found 1,000,000,000,000"),
        ("num_labels=1000000000", "num_labels expected at most 1,000,000; found 1,000,000,000"),
        ("text_config={hidden_size: 10000000}", "text_config.hidden_size expected at most 1,000,000; found 10,000,000"),
        ("depths=[2, 2000]", "depths expected at most 1,000; found 2,000"),
        ("torch_dtype=float16", "torch_dtype expected float32, the type of the full model"),
        ("dtype=nope", "dtype expected float32, the type of the full model"),
    ],
)
def test_a_model_that_no_machine_builds_is_refused_before_it_is_built(override: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe.read("quickstart", [f"model.config.{override}"])
    assert f" model.config.{words}" in " ".join(caught.value.message.split())
    assert recipe.read("quickstart", ["model.config.dtype=float32"]).model.config
