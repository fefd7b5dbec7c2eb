"""Recipes: what is accepted, what is refused and in which words, and that they survive the way out and in again."""

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml
from pydantic import ValidationError

from recap_cli import registry
from recap_cli.data.map_classes import map_classes
from recap_cli.errors import RecipeError
from recap_cli.recipe import recipe
from recap_cli.recipe.recipe import Data, Finetune, Model, Prune, Recipe, Task

KINDS = ", ".join(registry.names("tasks"))  # third-party packages may add some

ROOT = Path(__file__).parents[2]
SHIPPED = [shipped.name for shipped in recipe.shipped()]
TEXT = """\
model: {name: some/model}
task: {kind: text-classification}
data: {name: some/data, text: sentence}
"""


def parsed(extra: str = "", *overrides: str) -> Recipe:
    return recipe.parse(TEXT + dedent(extra), "r.yaml", overrides)


def refused(text: str, *overrides: str) -> list[str]:
    """The problems in a recipe, one line each, with single spaces between the columns."""
    with pytest.raises(RecipeError) as caught:
        recipe.parse(dedent(text), "r.yaml", overrides)
    assert caught.value.exit_code == 3
    assert caught.value.hint is not None
    assert "`recap recipes show quickstart`" in caught.value.hint
    head, *lines = caught.value.message.split("\n")
    assert head == f"{len(lines)} problem{'s' if len(lines) > 1 else ''} in the recipe r.yaml"
    return [" ".join(line.split()) for line in lines]


def refused_beside(extra: str, *overrides: str) -> list[str]:
    """As `refused`, for lines below a recipe without a problem, which has three lines."""
    return refused(TEXT + dedent(extra), *overrides)


def test_a_recipe_has_every_default() -> None:
    got = parsed()
    assert (got.name, got.seed, got.rounds, got.patience) == ("recap", 0, 10, None)
    assert (got.prune.ratio, got.prune.steps, got.prune.criterion, got.prune.scope) == (0.333, 4, "taylor", "per-kind")
    assert (got.mask.ratio, got.mask.criterion, got.mask.train_embeddings) == (0.5, "fisher", False)
    assert (got.finetune.epochs, got.finetune.steps, got.finetune.betas) == (2.0, None, (0.9, 0.999))
    assert (got.importance.batches, got.importance.batch_size, got.importance.device) == (10, 32, "cpu")
    assert (got.head.warmup_epochs, got.evaluate.batch_size, got.data.label) == (1, 64, "label")


def test_a_faithful_recipe_may_choose_where_the_paper_has_another_mask() -> None:
    paper, chosen = parsed("faithful: true\n"), parsed("faithful: true\nmask: {ratio: 0.2, scope: per-layer}\n")
    assert (paper.mask.ratio, paper.mask.scope) == (0.5, "per-kind")
    assert (paper.prune.rank_by, paper.mask.rank_by) == ("sum", "sum")
    assert (chosen.mask.ratio, chosen.mask.scope) == (0.2, "per-layer")
    images = ["task.kind=image-classification", "data.image=image", "data.text=null"]
    assert parsed("faithful: true\n", *images).mask.ratio == 0.875


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        parsed().finetune.lr = 1.0


def test_a_section_with_all_keys_commented_out_is_its_defaults() -> None:
    assert parsed("finetune:\n  # lr: 1\n") == parsed()


@pytest.mark.parametrize(("written", "number"), [("1e-4", 1e-4), ("2E+1", 20.0), (".5e-3", 5e-4), ("1", 1.0), ("0.1", 0.1)])
def test_numbers_in_scientific_notation_are_numbers(written: str, number: float) -> None:
    for got in (parsed(f"finetune: {{lr: {written}}}"), parsed("", f"finetune.lr={written}")):
        assert got.finetune.lr == number
        assert isinstance(got.finetune.lr, float)


@pytest.mark.parametrize("written", ["1e3", "10.0E+2"])
def test_a_whole_number_in_scientific_notation_is_a_count(written: str) -> None:
    assert parsed("", f"rounds={written!r}").rounds == 1000
    assert isinstance(parsed("", "rounds=1e3").rounds, int)
    assert parsed("", "seed=0e1", "data.workers=2e0").data.workers == 2


def test_numbers_in_a_model_config_are_numbers_too() -> None:
    text = TEXT.replace("name: some/model", "config: {model_type: bert, layer_norm_eps: 1e-12, nested: [{a: 1e3}]}")
    config = recipe.parse(text, "r.yaml").model.config
    assert config == {"model_type": "bert", "layer_norm_eps": 1e-12, "nested": [{"a": 1000.0}]}


def test_text_that_looks_like_a_number_to_the_eye_only_stays_text() -> None:
    assert parsed("name: 12e4").name == "12e4"


@pytest.mark.parametrize(
    ("line", "place", "words"),
    [
        ('rounds: "three"', "4:9 rounds", 'expected a whole number from 1 to 5000; found "three"'),
        ("rounds: true", "4:9 rounds", "expected a whole number from 1 to 5000; found true"),
        ("rounds: 2.0", "4:9 rounds", "expected a whole number from 1 to 5000; found 2.0"),
        ("rounds: 15e-1", "4:9 rounds", 'expected a whole number from 1 to 5000; found "15e-1"'),
        ("rounds: 0", "4:9 rounds", "expected a whole number from 1 to 5000; found 0"),
        ("rounds: [1]", "4:9 rounds", "expected a whole number from 1 to 5000; found [1]"),
        ("seed: -1", "4:7 seed", "expected a whole number from 0 to 4294967295; found -1"),
        ("patience: 0", "4:11 patience", "expected a whole number from 1 to 5000 or null; found 0"),
        ("method: ''", "4:9 method", 'expected text; found ""'),
        ("method: 2024", "4:9 method", "expected text; found 2024 (put it in quotes)"),
        ("method: no", "4:9 method", "expected text; found false (put it in quotes)"),
        ("method: 2024-01-01", "4:9 method", 'expected text; found "2024-01-01" (put it in quotes)'),
        ("prune: {ratio: 1.0}", "4:16 prune.ratio", "expected a number in [0, 1); found 1.0"),
        ("prune: {ratio: 33.3}", "4:16 prune.ratio", "expected a number in [0, 1); found 33.3"),
        ("prune: {ratio: -0.1}", "4:16 prune.ratio", "expected a number in [0, 1); found -0.1"),
        ("prune: {ratio: .nan}", "4:16 prune.ratio", "expected a number in [0, 1); found NaN"),
        ("prune: {ratio: true}", "4:16 prune.ratio", "expected a number in [0, 1); found true"),
        ("prune: {compensate: true}", "4:21 prune.compensate", 'expected a number > 0 or "auto" or false; found true'),
        ("prune: {compensate: 0}", "4:21 prune.compensate", 'expected a number > 0 or "auto" or false; found 0'),
        ("prune: {compensate: -1e-2}", "4:21 prune.compensate", 'expected a number > 0 or "auto" or false; found "-1e-2"'),
        ("prune: {compensate: full}", "4:21 prune.compensate", 'expected a number > 0 or "auto" or false; found "full"'),
        ("prune: {compensate: null}", "4:21 prune.compensate", 'expected a number > 0 or "auto" or false; found null'),
        ("prune: {uniform: 1}", "4:18 prune.uniform", "expected true or false; found 1"),
        ("prune: 3", "4:8 prune", "expected a section (keys with values); found 3"),
        ("mask: {train_embeddings: all}", "4:26 mask.train_embeddings", 'expected true, false or "tokens"; found "all"'),
        ("mask: {train_embeddings: 1}", "4:26 mask.train_embeddings", 'expected true, false or "tokens"; found 1'),
        ("mask: {ratio: 1}", "4:15 mask.ratio", "expected a number in [0, 1); found 1"),
        ("finetune: {lr: 0}", "4:16 finetune.lr", 'expected a number > 0 or "auto"; found 0'),
        ("finetune: {lr: .inf}", "4:16 finetune.lr", 'expected a number > 0 or "auto"; found Infinity'),
        ("finetune: {lr: 1e999}", "4:16 finetune.lr", 'expected a number > 0 or "auto"; found "1e999"'),
        ("finetune: {lr: fast}", "4:16 finetune.lr", 'expected a number > 0 or "auto"; found "fast"'),
        ("finetune: {head_lr: fast}", "4:21 finetune.head_lr", 'expected a number > 0 or "auto" or null; found "fast"'),
        ("finetune: {head_lr: 0}", "4:21 finetune.head_lr", 'expected a number > 0 or "auto" or null; found 0'),
        ("finetune: {weight_decay: -1}", "4:26 finetune.weight_decay", "expected a number >= 0; found -1"),
        ("finetune: {betas: [0.9]}", "4:19 finetune.betas", "expected a list of 2, each a number in [0, 1); found [0.9]"),
        ("finetune: {betas: [0.9, 1.0]}", "4:25 finetune.betas.1", "expected a number in [0, 1); found 1.0"),
        (
            "finetune: {optimizer: adam}",
            "4:23 finetune.optimizer",
            'expected one of adamw, sgd; found "adam"; did you mean adamw?',
        ),
        (
            "finetune: {device: gpu}",
            "4:20 finetune.device",
            'expected text such as auto, cpu, mps, cuda, cuda:1; found "gpu"',
        ),
    ],
)
def test_a_wrong_value_is_refused_with_its_place(line: str, place: str, words: str) -> None:
    assert refused_beside(line) == [f"r.yaml:{place} {words}"]


def test_a_value_that_is_no_plain_data_is_refused_in_a_model_config() -> None:
    text = TEXT.replace("name: some/model", "config: {model_type: bert, list: [1, {day: 2024-01-01}]}")
    words = 'expected text, a number, true, false, null or a list of such; found "2024-01-01" (put it in quotes)'
    assert refused(text) == [f"r.yaml:1:52 model.config.list.1.day {words}"]


@pytest.mark.parametrize(
    ("line", "place", "words"),
    [
        ("prune: {ratoi: 0.1}", "4:9 prune.ratoi", "did you mean prune.ratio?"),
        ("fintune: {lr: 1}", "4:1 fintune", "did you mean finetune?"),
        ("lr: 1e-4", "4:1 lr", "did you mean head.lr or finetune.lr?"),
        ("prune: {rounds: 3}", "4:9 prune.rounds", "did you mean rounds?"),
        ("epoch: 3", "4:1 epoch", "did you mean finetune.epochs?"),
        ("mask: {xyz: 3}", "4:8 mask.xyz", "known keys: ratio, criterion, scope, rank_by, random, train_embeddings"),
        ("finetune.lr: 3", "4:1 finetune.lr", "write `finetune:` and, indented below it, `lr:`"),
    ],
)
def test_an_unknown_key_is_refused_with_a_suggestion(line: str, place: str, words: str) -> None:
    assert refused_beside(line) == [f"r.yaml:{place} unknown key; {words}"]


def test_missing_sections_and_keys_are_named() -> None:
    section = "expected a section (keys with values); found nothing"
    assert refused("rounds: 3\ntask:\n  metric: f1\n") == [
        f"r.yaml:1:1 data {section}",
        f"r.yaml:1:1 model {section}",
        f"r.yaml:2:1 task.kind expected one of {KINDS}; found nothing",
    ]


def test_doubled_keys_are_refused_at_every_depth() -> None:
    again = "expected each key once; found it again after line"
    assert refused_beside("rounds: 3\nprune:\n  ratio: 0.1\n  ratio: 0.2\nrounds: 3\n") == [
        f"r.yaml:7:3 prune.ratio {again} 6",
        f"r.yaml:8:1 rounds {again} 4",
    ]


def test_keys_that_are_no_text_are_refused() -> None:
    assert refused_beside("1: 2\non: 3\n") == [
        "r.yaml:4:1 1 expected text as a key; found 1 (put it in quotes)",
        "r.yaml:5:1 on expected text as a key; found on (put it in quotes)",
    ]


def test_all_problems_come_at_once_in_the_order_of_the_file() -> None:
    text = """\
        rounds: "three"
        model:
          nme: some/model
        task:
          kind: text-classification
          metric: acuracy
        data:
          name: some/data
          builtin: digits
        prune:
          ratio: 1.0
          floor: 0.9
        finetune:
          max_grad_norm: 1.0
          fused_backward: true
          lr: 1e-4
          lr: 2e-4
        """
    one = "expected exactly one of data.name, data.builtin, data.train; found data.name and data.builtin"
    assert refused(text, "nonsense", "finetune.batch_size=2.5") == [
        'r.yaml:1:9 rounds expected a whole number from 1 to 5000; found "three"',
        "r.yaml:3:3 model.nme unknown key; did you mean model.name?",
        'r.yaml:5:3 task.kind expected "image-classification", as data.builtin is digits; found "text-classification"',
        "r.yaml:6:3 task.metric expected one of accuracy, f1, matthews, loss, for text-classification; found acuracy; "
        "did you mean accuracy?",
        f"r.yaml:8:3 data.name {one}",
        "r.yaml:11:10 prune.ratio expected a number in [0, 1); found 1.0",
        "r.yaml:14:3 finetune.max_grad_norm expected null with finetune.fused_backward, "
        "which never holds all gradients at once; found 1",
        "r.yaml:17:3 finetune.lr expected each key once; found it again after line 16",
        "--set nonsense nonsense expected section.key=value; found nonsense",
        "--set finetune.batch_size=2.5 finetune.batch_size expected a whole number from 1 to 1000000; found 2.5",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "r.yaml:1:1 (yaml) expected keys with values, such as `rounds: 10`; found nothing"),
        ("# nothing\n", "r.yaml:1:1 (yaml) expected keys with values, such as `rounds: 10`; found nothing"),
        ("- 1\n- 2\n", "r.yaml:1:1 (yaml) expected keys with values, such as `rounds: 10`; found a list"),
        ("quickstart", "r.yaml:1:1 (yaml) expected keys with values, such as `rounds: 10`; found a single value"),
        ("a: b: c", "r.yaml:1:5 (yaml) expected YAML: mapping values are not allowed here"),
        ("a:\n\t- 1", "r.yaml:2:1 (yaml) expected YAML: while scanning for the next token, found character '\\t'"),
        ("a: 1\n---\nb: 2\n", "r.yaml:2:1 (yaml) expected YAML: expected a single document in the stream, but found another"),
        ("a: &x [*x]", "r.yaml:1:4 (yaml) expected YAML: an alias is inside its own anchor"),
        ("a: 2024-13-45", "r.yaml:1:1 (yaml) expected YAML: month must be in 1..12"),
        ("a: !!bool z", "r.yaml:1:4 (yaml) expected YAML: the tag tag:yaml.org,2002:bool; only plain values are allowed"),
        ("a: !!python/object:os.x {}", "r.yaml:1:4 (yaml) expected YAML: the tag tag:yaml.org,2002:python/object:os.x"),
        ("a: b\0", "r.yaml:1:1 (yaml) expected YAML: unacceptable character #x0000"),
        ("[" * 600 + "]" * 600, "r.yaml:1:51 (yaml) expected YAML: it is nested too deeply (more than 50 levels)"),
    ],
)
def test_what_is_no_yaml_mapping_is_refused(text: str, words: str) -> None:
    (line,) = refused(text)
    assert line.startswith(words)


def test_anchors_and_merge_keys_work_and_overrides_do_not_leak_through_them() -> None:
    got = parsed("prune: &shared {criterion: random, scope: global}\nmask: *shared\n", "mask.scope=per-layer")
    assert (got.prune.scope, got.mask.scope, got.mask.criterion) == ("global", "per-layer", "random")
    merged = parsed("prune: &shared {scope: global}\nmask: {<<: *shared, ratio: 0.5}\n")
    assert (merged.mask.scope, merged.mask.ratio) == ("global", 0.5)
    (line,) = refused_beside("prune: &shared {steps: 2}\nmask: {<<: *shared, ratio: 0.5}\n")
    assert line.startswith("r.yaml:5:1 mask.steps unknown key; did you mean prune.steps or finetune.steps?")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            ["model.name=null"],
            "--set model.name=null model.name expected exactly one of model.name, model.config; found none of them",
        ),
        (
            ["model.name=a", "model.config={model_type: vit}"],
            "--set model.config={model_type: vit} model.name expected exactly one of model.name, model.config; "
            "found model.name and model.config",
        ),
        (
            ["data.name=null"],
            "--set data.name=null data.name expected exactly one of data.name, data.builtin, data.train; found none of them",
        ),
        (["data.text=null"], "--set data.text=null data.text expected the text column, for text-classification; found none"),
        (
            ["task.kind=image-classification", "data.text=null"],
            "--set task.kind=image-classification data.image expected the image column, for image-classification; found none",
        ),
        (
            ["data.builtin=digits"],
            '--set data.builtin=digits task.kind expected "image-classification", as data.builtin is digits; '
            'found "text-classification"',
        ),
        (
            ["data.validation=v.csv"],
            "--set data.validation=v.csv data.validation expected only beside data.train; found without it",
        ),
        (
            ["data.train=t.csv", "data.subset=cola"],
            "--set data.subset=cola data.subset expected only beside data.name; found without it",
        ),
        (
            ["data.train=t.csv", "data.validation=v.csv", "data.validation_share=0.1"],
            "--set data.validation_share=0.1 data.validation_share expected only without data.validation; found both",
        ),
        (
            ["model.config={hidden_size: 3}"],
            "--set model.config={hidden_size: 3} model.config expected a key `model_type` in it, for library transformers; "
            "found none",
        ),
        (
            ["model.config={model_type: vit}", "model.library=timm"],
            "--set model.library=timm model.config expected a key `architecture` in it, for library timm; found none",
        ),
        (
            ["finetune.micro_batch_size=5"],
            "--set finetune.micro_batch_size=5 finetune.micro_batch_size expected a divisor of finetune.batch_size (32); "
            "found 5",
        ),
        (
            ["finetune.micro_batch_size=64"],
            "--set finetune.micro_batch_size=64 finetune.micro_batch_size expected a divisor of finetune.batch_size (32); "
            "found 64",
        ),
        (
            ["finetune.max_grad_norm=1", "finetune.fused_backward=true"],
            "--set finetune.fused_backward=true finetune.max_grad_norm expected null with finetune.fused_backward, "
            "which never holds all gradients at once; found 1",
        ),
        (
            ["finetune.epochs=null"],
            "--set finetune.epochs=null finetune.epochs expected a number, or one in finetune.steps; found null in both",
        ),
        (
            ["head.lr=1e38"],
            "--set head.lr=1e38 head.lr expected at most 3.4e+37, beyond which float32 overflows; found 1e+38",
        ),
        (
            ["finetune.lr=1e38"],
            "--set finetune.lr=1e38 finetune.lr expected at most 3.4e+37, beyond which float32 overflows; found 1e+38",
        ),
        (
            ["finetune.lr=3e35", "head.lr=3e37", "finetune.betas=[0.999, 0.999]"],
            "r.yaml:1:1 finetune.head_lr expected at most 3.4e+35, beyond which float32 overflows; found 3e+36",
        ),
        (
            ["finetune.weight_decay=1e39"],
            "--set finetune.weight_decay=1e39 finetune.weight_decay expected at most 3.4e+38, beyond which float32 overflows; "
            "found 1e+39",
        ),
        (
            ["prune.ratio=0.9", "prune.floor=0.2"],
            "--set prune.floor=0.2 prune.ratio expected at most 0.8, as prune.floor keeps 0.2 of each layer; found 0.9",
        ),
    ],
)
def test_keys_at_odds_are_refused(changes: list[str], words: str) -> None:
    assert refused_beside("", *changes) == [words]


def test_rows_of_tokens_are_for_texts() -> None:
    images = ["task.kind=image-classification", "data.image=image", "data.text=null"]
    (line,) = refused_beside("mask: {train_embeddings: tokens}\n", *images)
    place = "--set task.kind=image-classification mask.train_embeddings"  # the override is what does not go with the line
    assert line == f"{place} expected true or false, as images have no tokens; found tokens"
    assert parsed("mask: {train_embeddings: tokens}\n").mask.train_embeddings == "tokens"


def test_a_conflict_is_placed_at_the_key_to_change() -> None:
    (line,) = refused_beside("prune:\n  floor: 0.5\n  ratio: 0.6\n")
    assert line == "r.yaml:6:3 prune.ratio expected at most 0.5, as prune.floor keeps 0.5 of each layer; found 0.6"


def test_a_conflict_with_a_key_that_has_a_problem_itself_is_not_reported() -> None:
    assert refused("model: {nme: a}\ntask: {kind: text-classification}\ndata: {name: a, txt: b}\n") == [
        "r.yaml:1:9 model.nme unknown key; did you mean model.name?",
        "r.yaml:3:17 data.txt unknown key; did you mean data.text?",
    ]


def test_what_is_at_the_edge_of_a_conflict_is_accepted() -> None:
    assert parsed("prune: {ratio: 0.85, floor: 0.15}").prune.ratio == 0.85
    assert parsed("finetune: {batch_size: 32, micro_batch_size: 32}").finetune.micro_batch_size == 32
    assert parsed("finetune: {epochs: null, steps: 5}").finetune.steps == 5
    for metric in ("accuracy", "f1", "matthews"):
        assert parsed("", f"task.metric={metric}").task.metric == metric
        assert recipe.read("quickstart", [f"task.metric={metric}"]).task.metric == metric


def test_rates_that_float32_just_holds_are_accepted() -> None:
    assert parsed("", "head.lr=3e37", "finetune.lr=3e37").head.lr == 3e37
    assert parsed("", "finetune.lr=1e38", "finetune.optimizer=sgd").finetune.lr == 1e38


def test_recipes_made_in_python_are_checked_too() -> None:
    task, data = Task(kind="text-classification"), Data(name="d", text="t")
    assert Recipe(model=Model(name="m"), task=task, data=data).rounds == 10
    with pytest.raises(ValidationError, match=r"prune\.ratio: expected at most 0\.5"):
        Recipe(model=Model(name="m"), task=task, data=data, prune=Prune(ratio=0.6, floor=0.5))
    with pytest.raises(ValidationError, match="valid integer"):
        Finetune(batch_size=True)


def test_overrides_win_and_may_set_what_the_file_lacks() -> None:
    got = parsed("rounds: 3\nfinetune:\n", "rounds=5", "finetune.lr = 2e-5", "prune={ratio: 0.5, steps: 1}", "rounds=6")
    assert (got.rounds, got.finetune.lr, got.prune.ratio, got.prune.steps) == (6, 2e-5, 0.5, 1)


def test_a_recipe_that_was_parsed_before_is_another_object_all_through_and_takes_no_second_reading(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = dedent("""\
        model: {config: {model_type: bert, extra: {deep: [1]}}}
        task: {kind: text-classification}
        data: {name: some/data, text: sentence}
        """)
    first = recipe.parse(text, "r.yaml", ["seed=3"])
    monkeypatch.setattr(recipe, "load", lambda *_: pytest.fail("read again"))
    again = recipe.parse(text, "r.yaml", ["seed=3"])
    assert again == first
    assert recipe.digest(again) == recipe.digest(first)
    assert first.model.config is not None
    first.model.config["extra"]["deep"].append(2)
    assert again.model.config == {"model_type": "bert", "extra": {"deep": [1]}}
    assert recipe.parse(text, "r.yaml", ["seed=3"]) == again
    monkeypatch.undo()
    assert recipe.parse(text, "r.yaml", ["seed=4"]).seed == 4


def test_an_override_is_split_at_the_first_equals_sign() -> None:
    assert parsed("", "data.train=runs/a=b.csv").data.train == "runs/a=b.csv"
    assert recipe.read("quickstart", ["model.config.hidden_size=32"]).model.config == {
        **(recipe.read("quickstart").model.config or {}),
        "hidden_size": 32,
    }


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("prune.ratio", "prune.ratio expected section.key=value; found prune.ratio"),
        ("=3", "- expected section.key=value; found =3"),
        ("prune..ratio=3", "prune..ratio expected section.key=value; found prune..ratio=3"),
        ("prune.ratoi=0.1", "prune.ratoi unknown key; did you mean prune.ratio?"),
        ("PRUNE.RATIO=0.1", "PRUNE unknown key; did you mean prune?"),
        ("prune.RATIO=0.1", "prune.RATIO unknown key; did you mean prune.ratio?"),
        ("fintune.lr=1", "fintune unknown key; did you mean finetune?"),
        ("rounds.x=3", "rounds.x expected rounds to be a section; found a value"),
        ("rounds=[1", "rounds expected a YAML value: while parsing a flow sequence, expected ',' or ']'"),
        ("rounds=!!int z", "rounds expected a YAML value: the tag tag:yaml.org,2002:int; only plain values are allowed"),
        ("mask={ratio: 0.1, ratio: 0.2}", "mask.ratio expected each key once; found it again after line 1"),
        ("finetune.lr=fast", 'finetune.lr expected a number > 0 or "auto"; found "fast"'),
        ("task.kind=null", f"task.kind expected one of {KINDS}; found null"),
    ],
)
def test_a_bad_override_is_named_instead_of_a_line(override: str, words: str) -> None:
    (line,) = refused_beside("rounds: 3\n", override)
    assert line.startswith(f"--set {override} {words}")


def test_a_long_override_is_cut_in_messages() -> None:
    (line,) = refused_beside("", f"prune.ratio={'9' * 80}")
    assert line.startswith(f"--set prune.ratio={'9' * 45}... prune.ratio expected a number in [0, 1); found {'9' * 57}...")


def test_an_override_takes_the_place_of_its_alternatives() -> None:
    local = recipe.read("bert_base_cola", ["model.name=weights", "data.train=t.csv", "data.validation=v.csv"])
    assert (local.data.name, local.data.subset, local.data.train, local.data.text) == (None, None, "t.csv", "sentence")
    named = recipe.read("quickstart", ["model.name=some/vit", "data.name=some/data", "data.image=img"])
    assert (named.model.config, named.data.builtin) == (None, None)
    config = recipe.read("vit_base_cifar100", ["model.config.model_type=vit"])
    assert (config.model.name, config.model.config) == (None, {"model_type": "vit"})


def test_read_takes_a_path(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("\ufeff" + TEXT, encoding="utf-8")
    assert recipe.read(str(file)) == parsed()
    file.write_text("rounds: x", encoding="utf-8")
    with pytest.raises(RecipeError, match=f"{file}:1:9  rounds "):
        recipe.read(str(file))


@pytest.mark.parametrize(
    ("source", "hint"),
    [
        ("quikstart", "Did you mean quickstart? `recap recipes ls` lists the shipped recipes."),
        ("elsewhere/bert_base_cola.yaml", "Did you mean bert_base_cola? `recap recipes ls` lists the shipped recipes."),
        ("zzz", "`recap recipes ls` lists the shipped recipes."),
    ],
)
def test_an_unknown_recipe_names_those_like_it(source: str, hint: str) -> None:
    for ask in (recipe.read, recipe.shipped_text):
        with pytest.raises(RecipeError) as caught:
            ask(source)
        assert caught.value.message == f"no recipe {source}: there is no such file, and no shipped recipe of that name"
        assert caught.value.hint == hint


def test_a_recipe_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=f"cannot read the recipe {tmp_path}: Is a directory"):
        recipe.read(str(tmp_path))
    (tmp_path / "latin.yaml").write_bytes("name: é".encode("latin-1"))
    with pytest.raises(RecipeError, match=r"latin\.yaml: it is not UTF-8 text"):
        recipe.read(str(tmp_path / "latin.yaml"))


@pytest.mark.parametrize("name", SHIPPED)
def test_what_is_dumped_reads_back_equal(name: str) -> None:
    before = recipe.read(name, ["finetune.epochs=3", "finetune.eps=1e-8", "name=12e4", "data.label=é"])
    text = recipe.dump(before)
    after = recipe.parse(text, "dump")
    assert after == before
    assert recipe.dump(after) == text
    assert recipe.digest(after) == recipe.digest(before)
    assert yaml.safe_load(text)["finetune"]["momentum"] == 0.9  # a default that no file says


def test_the_digest_counts_values_only() -> None:
    digest = recipe.digest(parsed())
    assert len(digest) == 64
    assert recipe.digest(parsed("# a comment\nrounds: 10\nfinetune: {lr: 0.0001, epochs: 2}\n")) == digest
    assert recipe.digest(parsed("rounds: 11\n")) != digest


def test_differences_are_dotted_keys() -> None:
    a = recipe.read("quickstart")
    b = recipe.read("quickstart", ["model.config.hidden_size=32", "prune.ratio=0.5", "name=other"])
    assert recipe.differences(a, a) == []
    assert recipe.differences(a, b) == ["name", "model.config.hidden_size", "prune.ratio"]


def test_the_json_schema_accepts_shipped_recipes_and_refuses_typos() -> None:
    schema = recipe.json_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    for name in SHIPPED:
        validator.validate(yaml.safe_load(recipe.dump(recipe.read(name))))
    assert not validator.is_valid({**yaml.safe_load(TEXT), "prune": {"ratoi": 0.1}})
    assert not validator.is_valid({**yaml.safe_load(TEXT), "prune": {"ratio": 1.0}})


def test_every_key_has_a_description_of_one_line() -> None:
    def nodes(schema: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
        models = [schema, *(node for node in schema["$defs"].values() if "properties" in node)]
        return [item for model in models for item in model["properties"].items() if "$ref" not in item[1]]

    for name, node in nodes(recipe.json_schema()):
        assert node["description"].endswith("."), name
        assert "\n" not in node["description"], name


def test_the_reference_page_is_what_the_script_writes() -> None:
    reference = runpy.run_path(str(ROOT / "scripts" / "recipe_reference.py"))["reference"]()
    written = (ROOT / "docs" / "reference" / "recipe.md").read_text(encoding="utf-8")
    assert written == reference, "run `python scripts/recipe_reference.py`"
    assert "| `prune.ratio` | a number in [0, 1) | `0.333` | Share of the prunable parameters to prune. | `r_p` |" in written


def test_the_shipped_recipes_are_all_there() -> None:
    texts = [f"bert_base_{task}" for task in ("cola", "go_emotions", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wikiann")]
    baselines = [f"vit_base_cifar100_{method}_ft" for method in ("full", "head", "lora")]
    baselines += [f"vit_base_cifar100_{method}" for method in ("movement", "post_ft", "pre_ft")]
    vision = ["vit_base_cifar100", *baselines, "vit_base_tinyimagenet", "vit_large_cifar100"]
    maps = [f"mask2former_swin_{size}_{data}" for size in ("base", "large") for data in ("cityscapes", "kitti")]
    assert [*texts, "camvid_mask2former", "camvid_segformer", *maps, "quickstart", *vision] == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_opens_with_what_it_is(name: str) -> None:
    comment = [line for line in recipe.shipped_text(name).split("\n\n")[0].split("\n") if line.startswith("#")]
    fields = {line[2:].partition(":")[0]: line.partition(":")[2].strip() for line in comment if ":  " in line}
    assert fields["Command"] == f"recap run {name}"
    assert fields["Reproduces"]
    for figure in ("Metric", "Memory", "Time"):
        assert "measured" in fields[figure]  # "as measured" with a figure, or "not yet measured"
    title = dict(recipe.shipped())[name]
    assert comment[0] == f"# {title}"
    assert recipe.read(name).name == name


@pytest.mark.parametrize("name", [name for name in SHIPPED if name.startswith("mask2former")])
def test_a_recipe_of_mask2former_has_the_ratios_of_the_paper_and_the_classes_of_cityscapes(name: str) -> None:
    got = recipe.read(name)
    assert (got.prune.ratio, got.mask.ratio, got.rounds, got.prune.steps) == (0.333, 0.875, 10, 4)
    assert got.finetune.optimizer == "sgd"
    assert (got.model.name or "").startswith(f"facebook/mask2former-swin-{name.split('_')[2]}-")
    classes = map_classes(got.data.model_dump())
    assert (len(classes.names), classes.names[0], classes.ids[0], classes.ids[-1]) == (19, "road", 7, 33)
    assert sorted([*classes.ids, *classes.ignored]) == [*range(34), 255]


@pytest.mark.parametrize("name", [name for name in SHIPPED if name.startswith(("bert", "vit"))])
def test_a_shipped_recipe_has_the_settings_of_the_paper(name: str) -> None:
    got = recipe.read(name)
    text = name.startswith("bert")
    assert (got.prune.ratio, got.mask.ratio, got.finetune.lr) == ((0.5, 0.5, 2e-5) if text else (0.333, 0.875, 1e-4))
    assert (got.rounds, got.prune.steps, got.finetune.epochs, got.finetune.batch_size) == (10, 4, 2, 32)
    assert (got.finetune.schedule, got.prune.criterion, got.mask.criterion) == ("linear", "taylor", "fisher")
    metrics = {"cola": "matthews", "mrpc": "f1", "stsb": "pearson", "go_emotions": "f1", "wikiann": "f1"}
    assert got.task.metric == metrics.get(name.removeprefix("bert_base_"), "accuracy")


def test_quickstart_needs_no_download() -> None:
    got = recipe.read("quickstart")
    assert (got.model.name, got.data.name, got.data.builtin) == (None, None, "digits")
    assert got.model.config is not None
    assert got.model.config["model_type"] == "vit"


def test_importing_the_recipe_brings_in_nothing_heavy() -> None:
    code = "import sys, recap_cli.recipe.recipe as r; r.shipped(); r.read('quickstart'); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    heavy = {"torch", "numpy", "transformers", "timm", "datasets", "sklearn", "rich", "typer"}
    assert not heavy & set(loaded)


@pytest.mark.parametrize("typed", ["1", "yes", "12:30", "#x", "a #b", "2024-01-01"])
def test_an_override_that_yaml_does_not_read_as_text_is_told_as_it_may_be_typed(typed: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe.read("bert_base_cola", [f"data.text={typed}"])
    found = re.search(r"\(as text: --set (.*)\)", caught.value.message)
    assert found
    assert recipe.read("bert_base_cola", shlex.split(found[1])).data.text == typed
