"""The rows of the token table: only those that the data look up are held, and only those of the training data may move."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recap_cli.stages.finetune as finetuning
from recap_cli.core.adapter import Adapter
from recap_cli.recipe import Recipe
from recap_cli.runtime import models
from recap_cli.runtime.prediction import Fakes, usage
from recap_cli.stages import blueprint, budget, profile, trainable
from recap_cli.stages import context as shared
from recap_cli.stages import vocabulary as vocabularies
from recap_cli.stages.context import Context
from recap_cli.stages.eval import evaluate
from recap_cli.stages.init import init
from recap_cli.stages.mask import mask
from recap_cli.stages.measure import random_tensors
from recap_cli.stages.merge import merge
from recap_cli.stages.prune import prune
from recap_cli.stages.run import run
from recap_cli.stages.vocabulary import Vocabulary
from recap_cli.state import State
from tests.pico import LABELS, PICO, WORDS
from tests.tiny import is_text, tiny

pytestmark = pytest.mark.usefixtures("one_thread")
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
    monkeypatch.setattr(vocabularies, "of", lambda *_: None)


def tensors_of(state: State, file: str) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.load_tensors(f"round-001/{file}").items()}


@pytest.mark.parametrize("name", TEXTS)
def test_the_rows_are_those_of_the_tokens_in_the_data(name: str, tmp_path: Path) -> None:
    here = Context(init(recipe(tmp_path, name), tmp_path / "state"))
    splits = here.splits(lambda items, label, total=None: iter(items))
    found = vocabularies.of(here.model(here.full_tensors()), *splits)
    assert found is not None
    assert found.table in here.layout.embeddings
    assert found.size == len(here.full_tensors()[found.table]) == 64
    assert found.held.tolist() == ids(*SPECIAL, "w0", "w1", "w2", "w7", "w9", "w30", "w31")
    assert found.moving.tolist() == ids(*SPECIAL - {"[PAD]"}, "w0", "w1", "w2", "w7", "w9")  # a row for padding never moves
    again = Vocabulary.from_tensors(found.to_tensors())
    assert (again.table, again.size, again.held.tolist(), again.moving.tolist()) == (
        *(found.table, found.size),
        *(found.held.tolist(), found.moving.tolist()),
    )


@pytest.mark.parametrize(("name", "resident"), [*((name, "fp32") for name in TEXTS), ("bert", "bf16"), ("bert", "int8")])
def test_a_still_table_trains_and_scores_as_if_all_of_it_were_held(
    name: str, resident: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows").mkdir(), (tmp_path / "whole").mkdir()
    settings = {"finetune": {"resident": resident}}
    rows = finetuned(tmp_path / "rows", name, False, **settings)
    whole(monkeypatch)
    all_of_it = finetuned(tmp_path / "whole", name, False, **settings)
    ours, theirs = tensors_of(rows, shared.MOVED), tensors_of(all_of_it, shared.MOVED)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert rows.load_json("round-001/metrics.json") == all_of_it.load_json("round-001/metrics.json")
    held, more = (entry_of(state, "finetune") for state in (rows, all_of_it))
    assert held["token_rows"] == {"all": 64, "held": 12, "moving": 0}
    assert "token_rows" not in more
    width = Context(rows).full_tensors()[table_of(rows)].shape[1]
    row_bytes = {"fp32": 4 * width, "bf16": 2 * width, "int8": width + 4}[resident]
    assert more["weights_bytes"] - held["weights_bytes"] == (64 - 12) * row_bytes - 4 * 64  # what says where each row stands


def entry_of(state: State, stage: str) -> dict[str, Any]:
    return next(entry for entry in reversed(state.manifest.history) if entry["stage"] == stage)


def table_of(state: State) -> str:
    found = Context(state).vocabulary("round-001")
    assert found is not None
    return found.table


@pytest.mark.parametrize("name", TEXTS)
def test_rows_of_tokens_move_as_they_do_in_a_table_that_moves_whole(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokens").mkdir(), (tmp_path / "whole").mkdir()
    settings: dict[str, Any] = {"finetune": {"weight_decay": 0.0, "optimizer": "sgd", "lr": 0.5}}
    tokens = finetuned(tmp_path / "tokens", name, "tokens", **settings)
    table, rows = table_of(tokens), Context(tokens).vocabulary("round-001")
    assert rows is not None
    monkeypatch.setattr(  # of all embeddings, the table alone
        trainable, "frozen_whole", lambda layout, _turn, param, **_: param in layout.embeddings and param != table
    )
    all_of_it = finetuned(tmp_path / "whole", name, True, **settings)
    ours, theirs = tensors_of(tokens, shared.MOVED), tensors_of(all_of_it, shared.MOVED)
    assert ours.keys() == theirs.keys()
    assert ours[table].shape[0] == len(rows.moving)
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key][rows.moving] if key == table else theirs[key], rtol=1e-4, atol=1e-5)
    before = Context(tokens).full_tensors()[table].clone()
    looked_up = torch.isin(rows.moving, torch.tensor(ids("w0", "w1", "w2", "w7", "w9", "[CLS]", "[SEP]")))
    assert ((ours[table] - before[rows.moving]).abs().amax(1) > 0).tolist() == looked_up.tolist()
    facts = entry_of(tokens, "finetune")
    assert facts["token_rows"] == {"all": 64, "held": 12, "moving": 9}
    assert entry_of(all_of_it, "finetune")["token_rows"] == {"all": 64, "held": 64, "moving": 64}
    assert facts["trainable"] == entry_of(all_of_it, "finetune")["trainable"] - (64 - 9) * before.shape[1]
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
def test_a_merge_writes_the_rows_that_moved_and_leaves_every_other_bit(name: str, tmp_path: Path) -> None:
    state = finetuned(tmp_path, name, "tokens")
    here, table = Context(state), table_of(state)
    before, rows = here.full_tensors()[table].clone(), here.vocabulary("round-001")
    assert rows is not None
    moved = tensors_of(state, shared.MOVED)[table]
    merge(state)
    after, expected = Context(state).full_tensors()[table], before.clone()
    expected[rows.moving] = moved
    assert torch.equal(after, expected)
    assert not torch.equal(after, before)
    product = state.load_tensors(f"{state.manifest.best['folder']}/{shared.WEIGHTS}")  # type: ignore[index]
    assert torch.equal(product[table], after)  # of every row, as the product's user has other words
    stored = state.load_tensors(f"{Context(state).full}/{shared.MOMENTS}")
    still = torch.ones(64, dtype=torch.bool).index_fill_(0, rows.moving, False)
    assert stored[f"{table}/exp_avg"][still].abs().max() == 0
    assert stored[f"{table}/exp_avg"][rows.moving].abs().max() > 0
    assert stored[f"{table}/count"].tolist() == [0 if alone else 2 for alone in still.tolist()]  # 16 texts in batches of 8


def test_a_later_round_has_the_moments_and_ages_of_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    made = finetuning.Optimizer

    def spy(slots: Any, rule: Any, **given: Any) -> Any:
        seen.append(given)
        return made(slots, rule, **given)

    monkeypatch.setattr(finetuning, "Optimizer", spy)
    state = run(recipe(tmp_path, "bert", "tokens"), tmp_path / "state")
    table, rows = table_of(state), Context(state).vocabulary("round-001")
    assert rows is not None
    assert table not in seen[0]["moments"]
    assert seen[1]["moments"][table]["exp_avg"].shape[0] == len(rows.moving)
    assert seen[1]["counts"][table].tolist() == [2] * len(rows.moving)
    stored = state.load_tensors(f"{Context(state).full}/{shared.MOMENTS}")
    assert stored[f"{table}/count"].max() == 4
    assert state.manifest.made["turns"][1]["embeddings"] == "tokens"


def test_rows_of_other_data_have_ages_of_their_own(tmp_path: Path) -> None:
    """The training file grows between two rounds: what comes anew is one round younger."""
    given = recipe(tmp_path, "bert", "tokens")
    state = init(given, tmp_path / "state")
    for stage in (prune, mask, finetuning.finetune, merge):
        stage(state)
    (tmp_path / "train.csv").write_text((tmp_path / "train.csv").read_text() + "w40 w41,cat\n" * 8)
    shared._SPLITS.clear()
    for stage in (prune, mask, finetuning.finetune, merge):
        stage(state)
    stored = state.load_tensors(f"{Context(state).full}/{shared.MOMENTS}")
    ages = stored[f"{table_of(state)}/count"][ids("w0", "w30", "w40")].tolist()
    assert ages == [5, 0, 3]


@pytest.mark.parametrize("method", ["full-ft", "pre-ft", "head-ft", "lora-ft", "movement"])
def test_other_methods_hold_the_whole_table_only_if_they_move_it(method: str, tmp_path: Path) -> None:
    sections: dict[str, Any] = {
        "method": method,
        "prune": {"ratio": 0.0 if method in ("full-ft", "head-ft", "lora-ft") else 0.4},
    }
    state = run(recipe(tmp_path, "bert", **sections), tmp_path / "state")
    moves = method in ("full-ft", "pre-ft", "movement")
    assert entry_of(state, "finetune")["token_rows"] == {"all": 64, "held": 64 if moves else 12, "moving": 64 if moves else 0}


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
        split = finetuning.Split("", torch.zeros(1), lambda *_: {}, torch.tensor([0, 2]))
        return vocabularies.of(model, split, split)

    table, tied = nn.Embedding(4, 2), nn.Linear(2, 4, bias=False)
    tied.weight = table.weight
    assert found(Model(table)).held.tolist() == [0, 2]
    assert found(Model(table, tied)) is None
    assert found(Model(table, table)) is None
    assert found(Model(Scaled(4, 2))) is None
    assert found(Model(nn.Embedding(4, 2, max_norm=1.0))) is None
    assert found(nn.Linear(2, 2)) is None


@pytest.mark.parametrize("embeddings", [False, "tokens", True])
@pytest.mark.parametrize("resident", ["fp32", "bf16", "int8"])
def test_a_prediction_holds_the_rows_that_finetuning_holds(resident: str, embeddings: bool | str, tmp_path: Path) -> None:
    given = recipe(tmp_path, "bert", embeddings, rounds=1, finetune={"resident": resident})
    model, notes = blueprint.outline_with_data(given)
    assert (notes, model.vocabulary is None) == ([], False)
    fakes = Fakes()
    step, resident_parameters = profile.prepare(model, given, "recap", fakes.like)
    predicted = fakes.usage(step, "cpu")
    real, _ = profile.prepare(model, given, "recap", random_tensors)
    assert usage(real).maxima == predicted.maxima
    state = run(given, tmp_path / "state")
    facts = entry_of(state, "finetune")
    assert predicted.maxima["optimizer"] >= facts["optimizer_bytes"]  # in the allocator's granules
    assert abs(predicted.maxima["weights"] - facts["weights_bytes"]) < 512 * 80
    absent = 0 if embeddings is True else (64 - 12) * 32
    assert resident_parameters == profile.prepare(replace(model, vocabulary=None), given, "recap", fakes.like)[1] - absent


def test_a_state_predicts_with_the_rows_of_its_data(tmp_path: Path) -> None:
    state = init(recipe(tmp_path, "bert", "tokens"), tmp_path / "state")
    for stage in (None, prune, mask, finetuning.finetune, merge, prune):
        if stage is not None:
            stage(state)
        found = blueprint.outline_of(Context(state)).vocabulary
        assert found is not None
        assert len(found.held) == 12
    (tmp_path / "train.csv").unlink()
    shared._SPLITS.clear()
    kept = blueprint.outline_of(Context(state)).vocabulary  # of the round before
    assert kept is not None


def test_what_is_not_here_is_taken_to_be_all_of_the_table(tmp_path: Path) -> None:
    given = recipe(tmp_path, "bert")
    (tmp_path / "train.csv").unlink()
    model, notes = blueprint.outline_with_data(given)
    assert model.vocabulary is None
    assert any("the data are not here" in note for note in notes)
    given = recipe(tmp_path, "bert", model={"config": {**given.model.config, "tokenizer": "some/hub-name"}})  # type: ignore[dict-item]
    model, notes = blueprint.outline_with_data(given)
    assert model.vocabulary is None
    assert notes == ["the tokenizer is not here, so all rows of the token table are taken to be held"]
    model, notes = blueprint.outline_with_data(tiny("vit"))
    assert (model.vocabulary, notes) == (None, [])


def test_a_memory_budget_knows_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[blueprint.Outline] = []

    def fit(model: blueprint.Outline, recipe: Recipe, amount: int, track: Any) -> budget.Fit:
        found.append(model)
        return budget.Fit(recipe, (), None)  # type: ignore[arg-type]

    monkeypatch.setattr(budget, "fit", fit)
    budget.solved(recipe(tmp_path, "bert", finetune={"memory_budget": "1GiB"}))
    assert found[0].vocabulary is not None
    assert len(found[0].vocabulary.held) == 12


def test_the_registered_text_adapters_are_all_here() -> None:
    adapters: list[Adapter] = [models.adapter_of(PICO[name]()) for name in TEXTS]
    assert len(adapters) == len(TEXTS) >= 4
