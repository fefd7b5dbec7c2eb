"""Whole rounds of a model whose parameters transformers ties: one step, one place in the state, one in the product."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertForSequenceClassification

import recap_cli
from recap_cli.core.ties import first_names, names_of
from recap_cli.data.sampling import batches, order, seed_for
from recap_cli.errors import PluginError
from recap_cli.memory import fake_step, meta_model, predict
from recap_cli.memory.fake_step import Fakes
from recap_cli.recipe.recipe import Recipe
from recap_cli.rounds.record import MOMENTS, TRAINED, WEIGHTS
from recap_cli.rounds.run_context import Context
from recap_cli.stages.export import export
from recap_cli.stages.finetune import finetune
from recap_cli.stages.init import init
from recap_cli.stages.mask import mask
from recap_cli.stages.prune import prune
from recap_cli.stages.run import run
from tests.memory.test_fake_step import real
from tests.pico import LABELS, logits_for
from tests.tiny import model_section, tiny

TYPES, HEAD = "bert.embeddings.token_type_embeddings.weight", "classifier.weight"  # a table is the head's output layer, too
ATTENTION = "bert.encoder.layer.0.attention.self"
TIES = {HEAD: TYPES, f"{ATTENTION}.key.weight": f"{ATTENTION}.query.weight", f"{ATTENTION}.key.bias": f"{ATTENTION}.query.bias"}


@pytest.fixture(autouse=True)
def _tied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BertForSequenceClassification, "_tied_weights_keys", TIES)


def recipe(**sections: Any) -> Recipe:
    model = model_section("bert")
    return tiny("bert", model={"config": {**model["config"], "type_vocab_size": 3}}, **sections)  # a row for each label


def ties_of(model: nn.Module) -> dict[str, str]:
    return {name: first for name, first in first_names(model).items() if name != first}


def test_i11_full_finetuning_of_a_tied_model_is_that_of_torch_to_the_bit(tmp_path: Path) -> None:
    everything: dict[str, Any] = {"prune": {"ratio": 0.0}, "mask": {"ratio": 0.0, "train_embeddings": True}}
    state = init(recipe(rounds=2, finetune={"weight_decay": 0.0}, **everything), tmp_path / "state")
    context = Context(state)
    model = context.model({n: t.clone() for n, t in context.full_tensors().items()})
    assert ties_of(model) == TIES
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, foreach=False, weight_decay=0.0)
    split, _ = context.splits(lambda items, label, total=None: iter(items))
    forward = logits_for(context.spec)
    model.train()
    for round in (1, 2):
        torch.manual_seed(seed_for(context.recipe.seed, round, "finetune"))
        for step, batch in enumerate(batches(split, order(len(split), seed=context.recipe.seed, round=1, epoch=round - 1), 8)):
            optimizer.param_groups[0]["lr"] = context.recipe.finetune.lr * (1 - ((round - 1) * 5 + step) / 10)
            nn.functional.cross_entropy(forward(model, batch).float(), batch["labels"]).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    end = Context(run(context.recipe, tmp_path / "state"))
    ours = end.full_tensors()
    assert all(torch.equal(ours[n], p.detach()) for n, p in model.named_parameters())
    assert TIES.keys().isdisjoint(ours)
    moments = end.state.load_tensors(f"{end.full}/{MOMENTS}")
    assert {key.rpartition("/")[0] for key in moments} == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
def test_rounds_of_a_tied_model_keep_the_tie_from_the_mask_to_the_export(weights: str, tmp_path: Path) -> None:
    state = init(recipe(rounds=1, finetune={"weights": weights, "lr": 0.01}), tmp_path / "state")
    before = Context(state).full_tensors()
    prune(state)
    mask(state)
    finetune(state)
    context = Context(state)
    assert {TYPES, HEAD} <= set(context.layout.head)
    assert {TYPES, HEAD}.isdisjoint(context.layout.embeddings)  # frozen by one name, the head's by the other: it moves
    trained = context.state.load_tensors(f"round-001/{TRAINED}")
    assert TIES.keys().isdisjoint(trained)
    assert {TYPES, *TIES.values()} <= trained.keys()
    end = Context(run(context.recipe, tmp_path / "state"))
    after = end.full_tensors()
    assert not torch.equal(after[TYPES], before[TYPES])
    assert 0 < int((after[TIES[f"{ATTENTION}.key.weight"]] != before[TIES[f"{ATTENTION}.key.weight"]]).any(1).sum()) < 32
    for dense in (False, True):
        facts = export(end.state, tmp_path / f"out-{dense}", dense=dense)
        loaded = recap_cli.load(facts["path"])
        assert ties_of(loaded) == TIES
        assert (facts["form"] == "dense") == dense
    best = end.state.load_tensors(f"best-001/{WEIGHTS}")
    small = recap_cli.load(tmp_path / "out-False")
    assert all(torch.equal(best[name], param) for name, param in small.named_parameters())


def test_an_unpruned_tied_model_is_stock_and_opens_tied(tmp_path: Path) -> None:
    state = run(recipe(rounds=1, prune={"ratio": 0.0}), tmp_path / "state")
    facts = export(state, tmp_path / "out")
    assert facts["form"] == "stock", facts["reason"]
    opened = BertForSequenceClassification.from_pretrained(tmp_path / "out")
    assert ties_of(opened) == TIES


def test_what_is_frozen_by_all_of_its_names_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    positions = "bert.embeddings.position_embeddings.weight"
    words = "bert.embeddings.word_embeddings.weight"
    monkeypatch.setattr(BertForSequenceClassification, "_tied_weights_keys", {positions: words})
    model = model_section("bert")["config"]
    same = {"config": {**model, "max_position_embeddings": model["vocab_size"]}}
    state = init(tiny("bert", rounds=1, model=same), tmp_path / "state")
    first = Context(state).full_tensors()
    assert words in first
    assert positions not in first
    end = Context(run(Context(state).recipe, tmp_path / "state"))
    assert {words, positions} <= set(end.layout.embeddings)
    assert torch.equal(end.full_tensors()[words], first[words])


def held_by(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def test_its_bytes_are_counted_once(tmp_path: Path) -> None:
    state = init(recipe(rounds=1, prune={"ratio": 0.0}, mask={"ratio": 0.0, "train_embeddings": True}), tmp_path / "state")
    prune(state)
    mask(state)
    entry = finetune(state)
    tensors = Context(state).full_tensors()
    weights = held_by({name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()})
    model = Context(state).model(tensors)
    assert entry["gradients_bytes"] == weights == 4 * sum(param.numel() for param in model.parameters())
    assert entry["optimizer_bytes"] == 2 * weights
    assert entry["weights_bytes"] == held_by(tensors)
    assert entry["trainable"] == sum(param.numel() for param in model.parameters())
    assert len(names_of(model)) == len(list(model.named_parameters(remove_duplicate=False))) - len(TIES)


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8", "nf4"])
def test_predicted_weights_are_those_that_are_held_to_the_byte(weights: str) -> None:
    wanted, fakes = recipe(finetune={"weights": weights}), Fakes()
    of_recipe = meta_model.of_recipe(wanted, LABELS)
    predicted = fakes.usage(predict.prepare(of_recipe, wanted, "recap", fakes.like)[0], "cpu")
    counted = fake_step.usage(predict.prepare(of_recipe, wanted, "recap", real)[0])
    for kind in ("weights", "gradients", "optimizer"):
        assert predicted.maxima[kind] == counted.maxima[kind], kind  # type: ignore[index]


@pytest.mark.parametrize("targets", [["query", "value"], ["key"]])
def test_lora_names_what_is_one_parameter(tmp_path: Path, targets: list[str]) -> None:
    tied = f"{ATTENTION}.query.weight and {ATTENTION}.key.weight are one parameter"
    with pytest.raises(PluginError, match=tied):
        run(recipe(method="lora-ft", options={"targets": targets}), tmp_path / "state")


def test_lora_goes_beside_what_is_not_tied(tmp_path: Path) -> None:
    chosen = recipe(method="lora-ft", rounds=1, options={"targets": ["output"]})
    start = Context(init(chosen, tmp_path / "first")).full_tensors()
    end = Context(run(chosen, tmp_path / "state")).full_tensors()
    trained = {name for name, tensor in end.items() if not torch.equal(tensor, start[name])}
    layers = {f"bert.encoder.layer.{layer}.attention.output.dense.weight" for layer in (0, 1)}
    assert layers <= trained
    assert f"{ATTENTION}.query.weight" not in trained
