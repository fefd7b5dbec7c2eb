"""The rows of the token table: only those that the data look up are held, and only those of the training data may move."""

from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recap_cli.stages.finetune as finetuning
from recap_cli import registry
from recap_cli.core.method import Method, RoundPlan, TrainContext, TrainerHook
from recap_cli.data import sources
from recap_cli.data import splits as data
from recap_cli.data.splits import Split
from recap_cli.errors import ModelError
from recap_cli.machine import accounting
from recap_cli.memory import budget, meta_model, predict
from recap_cli.memory.fake_step import Fakes, usage
from recap_cli.memory.measure import random_tensors
from recap_cli.recipe.recipe import Recipe
from recap_cli.rounds import custom_training, examples, small_model, trainer
from recap_cli.rounds import plans as planning
from recap_cli.rounds.record import MOMENTS, TRAINED, WEIGHTS
from recap_cli.rounds.run_context import Context
from recap_cli.stages.eval import evaluate
from recap_cli.stages.init import init
from recap_cli.stages.mask import mask
from recap_cli.stages.merge import merge
from recap_cli.stages.prune import prune
from recap_cli.stages.run import run
from recap_cli.state.store import State
from recap_cli.trainable import token_rows
from recap_cli.trainable.optim import Optimizer
from recap_cli.trainable.token_rows import TokenRows, used_token_rows
from tests.pico import LABELS, PICO, WORDS
from tests.segmentation import CONFIGS
from tests.tiny import is_text, one_layer, tiny

TEXTS = sorted(name for name in PICO if is_text(name))
SPECIAL = {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"}
TRAINING, VALIDATION = ("w0 w1", "w1 w2 w2", "w2 w0 w7 w7 w7", "w9 w2"), ("w0 w30", "w1 w9 w31", "w2")


def ids(*words: str) -> list[int]:
    return sorted(WORDS.index(word) for word in words)


def recipe(root: Path, name: str, embeddings: bool | str = False, **sections: Any) -> Recipe:
    """A tiny recipe whose training data have six words, and whose validation data two more; `prune.ratio` and r_f as usual."""
    for split, texts in (("train", TRAINING * 4), ("validation", VALIDATION)):
        lines = [f"{text},{LABELS[at % len(LABELS)]}" for at, text in enumerate(texts)]
        (root / f"{split}.csv").write_text("\n".join(["sentence,label", *lines, ""]))
    files = {split: str(root / f"{split}.csv") for split in ("train", "validation")}
    return tiny(name, data=files, mask={"train_embeddings": embeddings}, **sections)


def finetuned(root: Path, name: str, embeddings: bool | str, **sections: Any) -> State:
    state = init(recipe(root, name, embeddings, **{"rounds": 1, **sections}), root / "state")
    for stage in (prune, mask, finetuning.finetune):
        stage(state)
    return state


def whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hold every row from now on, as where the table is not known."""
    monkeypatch.setattr("recap_cli.rounds.training_round.used_token_rows", lambda *_: None)


def tensors_of(state: State, file: str) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.load_tensors(f"round-001/{file}").items()}


@pytest.mark.parametrize("name", TEXTS)
def test_the_rows_are_those_of_the_tokens_in_the_data(name: str, tmp_path: Path) -> None:
    context = Context(init(recipe(tmp_path, name), tmp_path / "state"))
    splits = context.splits(lambda items, label, total=None: iter(items))
    found = used_token_rows(context.model(context.full_tensors()), *splits)
    assert found is not None
    assert found.table in context.layout.embeddings
    assert found.size == len(context.full_tensors()[found.table]) == 64
    assert found.held.tolist() == ids(*SPECIAL, "w0", "w1", "w2", "w7", "w9", "w30", "w31")
    assert found.trained.tolist() == ids("[CLS]", "[SEP]", "w0", "w1", "w2", "w7", "w9")
    stored = found.to_tensors()
    assert {key.rpartition("/")[2]: tensor.dtype for key, tensor in stored.items() if "/" in key} == {
        "held": torch.int32,
        "trained": torch.int32,
    }
    again = TokenRows.from_tensors(stored)
    assert (again.table, again.size, again.held.tolist(), again.trained.tolist()) == (
        *(found.table, found.size),
        *(found.held.tolist(), found.trained.tolist()),
    )


@pytest.mark.parametrize(("name", "weights"), [*((name, "fp32") for name in TEXTS), ("bert", "bf16"), ("bert", "int8")])
def test_a_still_table_trains_and_scores_as_if_all_of_it_were_held(
    name: str, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows").mkdir(), (tmp_path / "whole").mkdir()
    settings = {"finetune": {"weights": weights}}
    rows = finetuned(tmp_path / "rows", name, False, **settings)
    whole(monkeypatch)
    all_of_it = finetuned(tmp_path / "whole", name, False, **settings)
    ours, theirs = tensors_of(rows, TRAINED), tensors_of(all_of_it, TRAINED)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert rows.load_json("round-001/metrics.json") == all_of_it.load_json("round-001/metrics.json")
    held, more = (entry_of(state, "finetune") for state in (rows, all_of_it))
    assert held["token_rows"] == {"all": 64, "held": 12, "trained": 0}
    assert "token_rows" not in more
    width = Context(rows).full_tensors()[table_of(rows)].shape[1]
    row_bytes = {"fp32": 4 * width, "bf16": 2 * width, "int8": width + 4}[weights]
    assert more["weights_bytes"] - held["weights_bytes"] == (64 - 12) * row_bytes - 4 * 64  # what says where each row stands


def entry_of(state: State, stage: str) -> dict[str, Any]:
    return next(entry for entry in reversed(state.manifest.history) if entry["stage"] == stage)


def table_of(state: State) -> str:
    found = Context(state).token_rows("round-001")
    assert found is not None
    return found.table


@pytest.mark.parametrize("name", TEXTS)
def test_rows_of_tokens_move_as_they_do_in_a_table_that_trains_whole(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokens").mkdir(), (tmp_path / "whole").mkdir()
    settings: dict[str, Any] = {"finetune": {"weight_decay": 0.0, "optimizer": "sgd", "lr": 0.5}}
    tokens = finetuned(tmp_path / "tokens", name, "tokens", **settings)
    table, rows = table_of(tokens), Context(tokens).token_rows("round-001")
    assert rows is not None
    monkeypatch.setattr(  # of all embeddings, the table alone
        small_model, "frozen_whole", lambda layout, _round_plan, param, **_: param in layout.embeddings and param != table
    )
    all_of_it = finetuned(tmp_path / "whole", name, True, **settings)
    ours, theirs = tensors_of(tokens, TRAINED), tensors_of(all_of_it, TRAINED)
    assert ours.keys() == theirs.keys()
    assert ours[table].shape[0] == len(rows.trained)
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key][rows.trained] if key == table else theirs[key], rtol=1e-4, atol=1e-5)
    before = Context(tokens).full_tensors()[table].clone()
    assert (ours[table] - before[rows.trained]).abs().amax(1).min() > 0
    facts = entry_of(tokens, "finetune")
    assert facts["token_rows"] == {"all": 64, "held": 12, "trained": 7}
    assert entry_of(all_of_it, "finetune")["token_rows"] == {"all": 64, "held": 64, "trained": 64}
    assert facts["trainable"] == entry_of(all_of_it, "finetune")["trainable"] - (64 - 7) * before.shape[1]
    assert facts["optimizer_bytes"] == 4 * facts["trainable"]  # one moment


@pytest.mark.parametrize("embeddings", [False, "tokens", True])
def test_the_small_model_scores_the_same_before_and_after_the_merge(embeddings: bool | str, tmp_path: Path) -> None:
    state = finetuned(tmp_path, "bert", embeddings)
    metrics = state.load_json("round-001/metrics.json")
    (before,) = evaluate(state, which=["small"])
    merge(state)
    (after,) = evaluate(state, which=["small"])
    for key in ("loss", "accuracy"):
        assert before[key] == after[key] == pytest.approx(metrics[key], rel=1e-5)


@pytest.mark.parametrize("name", TEXTS)
def test_a_merge_writes_the_rows_that_trained_and_leaves_every_other_bit(name: str, tmp_path: Path) -> None:
    state = finetuned(tmp_path, name, "tokens")
    context, table = Context(state), table_of(state)
    before, rows = context.full_tensors()[table].clone(), context.token_rows("round-001")
    assert rows is not None
    trained = tensors_of(state, TRAINED)[table]
    merge(state)
    after, expected = Context(state).full_tensors()[table], before.clone()
    expected[rows.trained] = trained
    assert torch.equal(after, expected)
    assert not torch.equal(after, before)
    product = state.load_tensors(f"{state.manifest.best['folder']}/{WEIGHTS}")  # type: ignore[index]
    assert torch.equal(product[table], after)  # of every row, as the product's user has other words
    stored = state.load_tensors(f"{Context(state).full}/{MOMENTS}")
    still = torch.ones(64, dtype=torch.bool).index_fill_(0, rows.trained, False)
    assert stored[f"{table}/exp_avg"][still].abs().max() == 0
    assert stored[f"{table}/exp_avg"][rows.trained].abs().max() > 0
    assert stored[f"{table}/count"].tolist() == [0 if alone else 2 for alone in still.tolist()]  # 16 texts in batches of 8


def test_a_later_round_has_the_moments_and_ages_of_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    made = trainer.Optimizer

    def spy(trainables: Any, rule: Any, **given: Any) -> Any:
        seen.append(given)
        return made(trainables, rule, **given)

    monkeypatch.setattr(trainer, "Optimizer", spy)
    state = run(recipe(tmp_path, "bert", "tokens"), tmp_path / "state")
    table, rows = table_of(state), Context(state).token_rows("round-001")
    assert rows is not None
    assert table not in seen[0]["carried"].moments
    assert seen[1]["carried"].moments[table]["exp_avg"].shape[0] == len(rows.trained)
    assert seen[1]["carried"].counts[table].tolist() == [2] * len(rows.trained)
    stored = state.load_tensors(f"{Context(state).full}/{MOMENTS}")
    assert stored[f"{table}/count"].max() == 4
    assert state.manifest.made["round_plans"][1]["embeddings"] == "tokens"


def test_rows_of_other_data_have_ages_of_their_own(tmp_path: Path) -> None:
    """The training file grows between two rounds: what comes anew is one round younger."""
    given = recipe(tmp_path, "bert", "tokens")
    state = init(given, tmp_path / "state")
    for stage in (prune, mask, finetuning.finetune, merge):
        stage(state)
    (tmp_path / "train.csv").write_text((tmp_path / "train.csv").read_text() + "w40 w41,cat\n" * 8)
    examples._SPLITS.clear()
    for stage in (prune, mask, finetuning.finetune, merge):
        stage(state)
    stored = state.load_tensors(f"{Context(state).full}/{MOMENTS}")
    ages = stored[f"{table_of(state)}/count"][ids("w0", "w30", "w40")].tolist()
    assert ages == [5, 0, 3]


def test_rounds_may_differ_in_what_of_the_table_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    each: list[bool | str] = [False, "tokens", True]
    trained: list[bool | str] = [False, False, "tokens", "tokens", True, True, False, True, "tokens", False]
    assert {*pairwise(trained)} == {*product(each, repeat=2)}  # each comes after each, and after itself
    round_plans = [RoundPlan(0.4, 0.6, share=0.1, embeddings=one) for one in trained]  # type: ignore[arg-type]
    monkeypatch.setattr(planning, "method_of", lambda _: Method("", lambda _: round_plans))
    wanted = {"w0": 0, "w40": 0}

    def look(facts: dict[str, Any]) -> None:
        if facts["stage"] != "merge":
            return
        state, of_round = State.open(tmp_path / "state"), trained[facts["round"] - 1]
        wanted["w0"] += 2 * bool(of_round)
        wanted["w40"] += 2 * (of_round is True)
        stored = state.load_tensors(f"{Context(state).full}/{MOMENTS}")
        ages = stored.get(f"{table_of(state)}/count")
        assert {word: 0 if ages is None else int(ages.expand(64)[WORDS.index(word)]) for word in wanted} == wanted

    run(recipe(tmp_path, "bert", rounds=10), tmp_path / "state", on_stage=look)
    assert wanted == {"w0": 2 * 6, "w40": 2 * 3}


def hooked(context: TrainContext) -> TrainerHook:
    """A training of a prompt that a hook adds to what the table gives, with tokens that the data may not have."""
    table = context.model.get_input_embeddings()  # type: ignore[operator]
    context.model.register_parameter("prompt", nn.Parameter(torch.zeros(table.weight.shape[1])))
    table.register_forward_hook(lambda _module, _ids, out: out + context.model.get_parameter("prompt"))
    return TrainerHook(trains=lambda name: name == "prompt", result=lambda values, small: ({}, {}))


def rare(context: TrainContext) -> TrainerHook:
    """A training of the head in which one token is exchanged for another that no text has."""
    context.model.register_forward_pre_hook(
        lambda _model, _args, given: ((), given | {"input_ids": given["input_ids"].clone().fill_(60)}), with_kwargs=True
    )
    return TrainerHook(trains=context.head.__contains__, result=lambda values, small: (dict(values), {}))


@pytest.mark.parametrize("weights", ["fp32", "int8"])
@pytest.mark.parametrize("training", [hooked, rare])
def test_a_strangers_training_may_hook_the_table_and_look_up_any_token(
    training: Any, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = Method("", lambda _: [RoundPlan(trains="training")], training=training)
    for module in (planning, custom_training):
        monkeypatch.setattr(module, "method_of", lambda _: method)
    made: list[Any] = []
    monkeypatch.setattr(
        trainer,
        "Optimizer",
        lambda trainables, *args, **given: made.append(trainables) or Optimizer(trainables, *args, **given),
    )
    state = run(recipe(tmp_path, "bert", finetune={"weights": weights}), tmp_path / "state")
    assert entry_of(state, "finetune")["token_rows"]["held"] == 64
    if training is hooked:
        (trainable,) = made[0]
        assert trainable.master.abs().max() > 0  # it has had a gradient


def test_tokens_of_a_model_without_such_a_table_are_refused_when_the_state_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_rows, "_table", lambda _: None)
    with pytest.raises(
        ModelError, match="BertForSequenceClassification has no table of tokens that is looked up and nothing else"
    ):
        init(recipe(tmp_path, "bert", "tokens"), tmp_path / "state")
    assert not (tmp_path / "state").exists()


def test_texts_are_tokenized_once_whatever_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[str] = []
    made = data.text_split

    def count(*args: Any, **given: Any) -> Any:
        counted.append(given["origin"])
        return made(*args, **given)

    monkeypatch.setattr(data, "text_split", count)
    state = run(recipe(tmp_path, "bert", rounds=1, finetune={"memory_budget": "1GiB"}), tmp_path / "state")
    meta_model.of_state(Context(state))
    assert len(counted) == 2


@pytest.mark.parametrize("method", ["full-ft", "pre-ft", "head-ft", "lora-ft", "movement"])
def test_other_methods_hold_the_whole_table_only_if_they_move_it(method: str, tmp_path: Path) -> None:
    sections: dict[str, Any] = {
        "method": method,
        "prune": {"ratio": 0.0 if method in ("full-ft", "head-ft", "lora-ft") else 0.4},
    }
    state = run(recipe(tmp_path, "bert", **sections), tmp_path / "state")
    trains = method in ("full-ft", "pre-ft", "movement")
    assert entry_of(state, "finetune")["token_rows"] == {
        "all": 64,
        "held": 64 if trains else 12,
        "trained": 64 if trains else 0,
    }


def test_there_is_no_such_table_where_the_model_uses_it_otherwise() -> None:
    class Model(nn.Module):
        def __init__(self, table: nn.Embedding, *more: nn.Module) -> None:
            super().__init__()
            self.table, self.more = table, nn.ModuleList(more)

        def get_input_embeddings(self) -> nn.Module:
            return self.table

    class Scaled(nn.Embedding):
        """As BART has it."""

    def found(model: nn.Module) -> Any:
        split = Split("", torch.zeros(1), lambda *_: {}, torch.tensor([0, 2]), torch.tensor([3]))
        return used_token_rows(model, split, split)

    known, special = torch.tensor([0, 2]), torch.tensor([3])
    for train, validation, own in ((None, known, special), (known, None, special), (known, known, None)):
        splits = [Split("", torch.zeros(1), lambda *_: {}, tokens, own) for tokens in (train, validation)]
        assert used_token_rows(Model(nn.Embedding(4, 2)), *splits) is None
    table, tied = nn.Embedding(4, 2), nn.Linear(2, 4, bias=False)
    tied.weight = table.weight
    assert found(Model(table)).held.tolist() == [0, 2, 3]
    assert found(Model(table)).trained.tolist() == [0, 2]
    assert found(Model(table, tied)) is None
    assert found(Model(table, table)) is None
    assert found(Model(Scaled(4, 2))) is None
    assert found(Model(nn.Embedding(4, 2, max_norm=1.0))) is None
    assert found(nn.Linear(2, 2)) is None


@pytest.mark.parametrize(
    ("weights", "embeddings"),  # each form with the rows of tokens, and with a table that stands still or trains whole
    [
        ("fp32", False),
        ("fp32", "tokens"),
        ("fp32", True),
        ("bf16", "tokens"),
        ("bf16", True),
        ("int8", False),
        ("int8", "tokens"),
    ],
)
def test_a_prediction_holds_the_rows_that_finetuning_holds(weights: str, embeddings: bool | str, tmp_path: Path) -> None:
    given = recipe(tmp_path, "bert", embeddings, rounds=1, model=one_layer("bert"), finetune={"weights": weights})
    model, notes = meta_model.of_recipe_with_data(given)
    assert (notes, model.token_rows is None) == ([], False)
    fakes = Fakes()
    step, held_parameters = predict.prepare(model, given, "recap", fakes.like)
    predicted = fakes.usage(step, "cpu")
    real, _ = predict.prepare(model, given, "recap", random_tensors)
    assert usage(real).maxima == predicted.maxima
    state = run(given, tmp_path / "state")
    known = accounting.held(real.model, real.optimizer, 0)
    unknown, parameters = predict.prepare(replace(model, token_rows=None), given, "recap", random_tensors)
    absent = 0 if embeddings is True else 64 - 12
    assert held_parameters == parameters - 32 * absent
    trained = {False: 0, "tokens": 7, True: 64}[embeddings]
    row_bytes = {"fp32": 4 * 32, "bf16": 2 * 32, "int8": 32 + 4}[weights]
    less = {
        False: absent * row_bytes - 4 * 64,  # without the rows, and with what says where each stands
        "tokens": {  # of 63 rows, without that of padding, 7 move, and of 64 those 12 are held
            "fp32": 52 * row_bytes,
            "bf16": 52 * row_bytes + (63 - 7) * 4 * 32,
            "int8": (1 - 5) * row_bytes + (63 - 7) * 4 * 32,
        }.get(weights, 0),
        True: 0,
    }
    found = accounting.held(unknown.model, unknown.optimizer, 0)
    assert found["weights_bytes"] - known["weights_bytes"] == less[embeddings]
    assert found["optimizer_bytes"] - known["optimizer_bytes"] == (2 * 4 * 32 * (63 - 7) if embeddings == "tokens" else 0)
    assert entry_of(state, "finetune")["token_rows"] == {"all": 64, "held": 64 - absent, "trained": trained}


def test_a_state_predicts_with_the_rows_of_its_data(tmp_path: Path) -> None:
    state = init(recipe(tmp_path, "bert", "tokens"), tmp_path / "state")
    for stage in (None, prune, mask, finetuning.finetune, merge, prune):
        if stage is not None:
            stage(state)
        found = meta_model.of_state(Context(state)).token_rows
        assert found is not None
        assert len(found.held) == 12
    (tmp_path / "train.csv").unlink()
    examples._SPLITS.clear()
    kept = meta_model.of_state(Context(state)).token_rows  # of the round before
    assert kept is not None


def test_a_prediction_for_a_state_asks_no_hub_for_its_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(sources, "read_hub", refuse)
    context = Context(init(recipe(tmp_path, "bert"), tmp_path / "state"))
    given = context.recipe.data.model_copy(update={"train": None, "validation": None, "name": "some/data"})
    context.recipe = context.recipe.model_copy(update={"data": given})
    assert meta_model.of_state(context).token_rows is None


def test_what_is_not_here_is_taken_to_be_all_of_the_table(tmp_path: Path) -> None:
    given = recipe(tmp_path, "bert")
    (tmp_path / "train.csv").unlink()
    model, notes = meta_model.of_recipe_with_data(given)
    assert model.token_rows is None
    assert any("the data are not here" in note for note in notes)
    given = recipe(tmp_path, "bert", model={"config": {**given.model.config, "tokenizer": "some/hub-name"}})  # type: ignore[dict-item]
    model, notes = meta_model.of_recipe_with_data(given)
    assert model.token_rows is None
    assert notes == ["the tokenizer is not here"]
    model, notes = meta_model.of_recipe_with_data(tiny("vit"))
    assert (model.token_rows, notes) == (None, [])


def test_a_memory_budget_knows_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[meta_model.MetaModel] = []

    def fit(model: meta_model.MetaModel, recipe: Recipe, amount: int, track: Any) -> budget.Fit:
        found.append(model)
        return budget.Fit(recipe, (), None)  # type: ignore[arg-type]

    monkeypatch.setattr(budget, "fit", fit)
    budget.solved(recipe(tmp_path, "bert", finetune={"memory_budget": "1GiB"}))
    assert found[0].token_rows is not None
    assert len(found[0].token_rows.held) == 12


def test_the_registered_text_adapters_are_all_here() -> None:
    ours = {entry.name for entry in registry.entries("adapters") if entry.distribution == "recap-cli"}
    specs = [PICO[name]() for name in PICO]
    images = {spec.model_type for spec in specs if spec.image is not None} | set(CONFIGS)
    assert {PICO[name]().model_type for name in TEXTS} == ours - images
