"""A compensated cut through the stages: against least squares on the rows of every layer, and what a merge makes of it."""

import shutil
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from recap_cli.commands import tables
from recap_cli.core.axes import counts
from recap_cli.core.blocks import block_paths
from recap_cli.core.compensation import RIDGES
from recap_cli.core.rows import rows_of
from recap_cli.core.streaming import streamed
from recap_cli.core.surgery import compose_index_maps, gather, indices, put, take
from recap_cli.data.sampling import sample
from recap_cli.errors import SelectionError
from recap_cli.recipe.recipe import Recipe
from recap_cli.rounds import compensation
from recap_cli.rounds.record import COMPENSATION, SMALL, TRAINED, WEIGHTS
from recap_cli.rounds.run_context import Context
from recap_cli.rounds.small_model import trainable_entries
from recap_cli.rounds.status import describe, summary
from recap_cli.stages.eval import evaluate
from recap_cli.stages.export import export
from recap_cli.stages.finetune import finetune
from recap_cli.stages.init import init
from recap_cli.stages.mask import mask
from recap_cli.stages.merge import merge
from recap_cli.stages.prune import prune
from recap_cli.stages.run import run
from recap_cli.state.store import State
from tests import decoders, strange
from tests.pico import logits_for
from tests.stages.least_squares import naive_cut
from tests.stages.test_invariants import STEPWISE, run_with_stops, stored_files
from tests.stages.witness import groups_of
from tests.tiny import data_folder, tiny

RIDGE = 0.1
MODELS = ("bert", "timm-vit-packed-glu", "gpt2", *strange.STRANGE)
MERGED = ("bert", "gpt2")


@pytest.fixture(autouse=True)
def _strangers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(strange.REGISTERED, "gpt2", decoders.ADAPTERS["gpt2"])
    strange.register(monkeypatch)


def compensated(name: str, compensate: Any = RIDGE, **sections: Any) -> Recipe:
    """A recipe of two rounds of which the second keeps the plan, of steps that are few."""
    plain: dict[str, Any] = {"head": {"warmup_epochs": 0}, "finetune": {"steps": 2}}
    plain["prune"] = {"compensate": compensate, **sections.pop("prune", {})}
    if name == "gpt2":
        model = {"config": {"model_type": name, **decoders.SIZES[name], "tokenizer": str(data_folder() / "tokenizer")}}
        return tiny("bert", model=model, **{**plain, **sections})
    return tiny(name, **{**plain, **sections})


@dataclass(frozen=True)
class Rounds:
    """A finished run, and a copy of its state after each stage."""

    root: Path

    def at(self, round: int, stage: str) -> Context:
        return Context(State.open(self.root / f"{round}-{stage}"))


@cache
def first_cut(name: str, compensate: Any = RIDGE, steps: int = 2) -> Context:
    """The state after its first prune, of so many gradual steps."""
    state = init(compensated(name, compensate, prune={"steps": steps}), Path(mkdtemp(prefix=f"recap-cut-{name}-")) / "state")
    prune(state)
    return Context(state)


@cache
def rounds_of(name: str) -> Rounds:
    root = Path(mkdtemp(prefix=f"recap-compensated-{name}-"))

    def copy_state(facts: dict[str, Any]) -> None:
        shutil.copytree(root / "state", root / f"{facts['round']}-{facts['stage']}")

    run(compensated(name), root / "state", on_stage=copy_state)
    return Rounds(root)


# --- the change, against least squares ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_each_gradual_step_scores_what_the_one_before_has_absorbed_and_absorbs_by_least_squares(name: str) -> None:
    context = first_cut(name)
    plan, full = context.plan("round-001"), context.full_tensors()
    index_map = indices(context.layout.axes, plan, context.layout.shapes)
    naive, cut = naive_cut(context, RIDGE), gather(full, index_map)
    assert [*map(bool, naive.steps)] == [True] * context.recipe.prune.steps
    assert groups_of(plan) == naive.alive
    small, change = (context.state.load_tensors(f"round-001/{file}") for file in (SMALL, COMPENSATION))
    weights = {weight: of for step in naive.steps for weight, of in step.items()}
    biases = {weight.removesuffix("weight") + "bias" for weight, of in weights.items() if of.has_bias}
    assert len(weights) >= 2
    assert change.keys() == weights.keys() | biases
    for key, tensor in change.items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(small[key], take(naive.weights[key], index_map.get(key, {})), rtol=1e-3, atol=1e-5)
        assert torch.equal(small[key], cut[key] + tensor)
    assert all(torch.equal(small[key], tensor) for key, tensor in cut.items() if key not in change)


@pytest.mark.parametrize("name", ["bert", "swin"])
def test_what_is_left_is_stated_as_it_is_on_the_batches_that_were_not_fitted(name: str) -> None:
    context = first_cut(name)
    facts = context.state.manifest.history[-1]["compensated"]
    steps = naive_cut(context, RIDGE).steps
    for weight, share in facts["left_shares"].items():
        of = [step[weight] for step in steps if weight in step]
        left, lost = sum(one.left_over(RIDGE) for one in of), sum(float((one.lost**2).sum()) for one in of)
        assert share == pytest.approx(left / lost, rel=1e-3)
    assert facts["given_back_share"] == pytest.approx(1 - np.mean(list(facts["left_shares"].values())))
    assert facts["ridges"] == dict.fromkeys(facts["left_shares"], RIDGE)


def test_auto_takes_a_ridge_of_the_list_for_each_matrix_that_leaves_no_more_than_a_fixed_one() -> None:
    fixed, auto = (first_cut("bert", of, steps=1).state.manifest.history[-1]["compensated"] for of in (RIDGE, "auto"))
    assert fixed["left_shares"].keys() == auto["left_shares"].keys()
    assert set(auto["ridges"].values()) <= {*RIDGES, None}
    assert len(set(auto["ridges"].values())) > 1
    assert all(share <= fixed["left_shares"][name] for name, share in auto["left_shares"].items())


def test_tokens_that_the_attention_mask_leaves_out_do_not_count() -> None:
    inputs, tokens = torch.arange(12.0).reshape(2, 3, 2), torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert rows_of(inputs, tokens).tolist() == [[0, 1], [2, 3], [6, 7]]
    assert len(rows_of(inputs, None)) == 6
    assert len(rows_of(inputs[:, :2], tokens)) == 4  # another form: every row counts
    assert len(rows_of(inputs[..., 0], tokens)) == 2  # features of an example, as many as there are tokens
    heads = inputs[..., None, :].expand(2, 3, 4, 2)
    assert rows_of(heads, tokens).shape == (12, 2)


# --- what a merge writes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MERGED)
@pytest.mark.parametrize("round", [1, 2])
def test_a_merge_writes_what_was_trained_less_the_change_and_leaves_every_other_bit(name: str, round: int) -> None:
    before, after = rounds_of(name).at(round, "finetune"), rounds_of(name).at(round, "merge")
    folder = f"round-{round:03d}"
    plan, old, new = before.plan(folder), before.full_tensors(), after.full_tensors()
    trained, change = (before.state.load_tensors(f"{folder}/{file}") for file in (TRAINED, COMPENSATION))
    small = before.small(folder, plan)
    in_small = trainable_entries(before.layout, plan, before.mask(folder, plan), small, before.rows(folder))
    in_full = compose_index_maps(indices(before.layout.axes, plan, before.layout.shapes), in_small)
    assert change.keys() & trained.keys()
    for key, values in trained.items():
        wanted = values - take(change[key], in_small.get(key, {})) if key in change else values
        assert torch.equal(take(new[key], in_full.get(key, {})), wanted)
    for key, tensor in old.items():
        inside = torch.zeros(tensor.shape, dtype=torch.bool)
        if key in trained:
            put(inside, torch.ones(trained[key].shape, dtype=torch.bool), in_full.get(key, {}))
        assert torch.equal(tensor[~inside], new[key][~inside]), key
    assert any(not torch.equal(old[key], new[key]) for key in change)


@pytest.mark.parametrize("name", MERGED)
def test_the_product_is_the_small_model_as_it_was_trained(name: str) -> None:
    best = rounds_of(name).at(2, "merge").state.manifest.best
    assert best is not None
    before, after = (rounds_of(name).at(best["round"], stage) for stage in ("finetune", "merge"))
    folder = f"round-{best['round']:03d}"
    plan = before.plan(folder)
    small, trained = before.small(folder, plan), before.state.load_tensors(f"{folder}/{TRAINED}")
    in_small = trainable_entries(before.layout, plan, before.mask(folder, plan), small, before.rows(folder))
    product = after.state.load_tensors(f"{best['folder']}/{WEIGHTS}")
    for key, values in trained.items():
        assert torch.equal(take(product[key], in_small.get(key, {})), values)
        grid = [in_small.get(key, {}).get(dim, torch.arange(size)) for dim, size in enumerate(small[key].shape)]
        small[key][np.ix_(*grid)] = values
    assert product.keys() == small.keys()
    assert all(torch.equal(product[key], tensor) for key, tensor in small.items())
    (trained_row,) = evaluate(before.state, which=["small"])
    (best_row, small_row) = evaluate(after.state, which=["best", "small"])
    figures = before.metrics(folder)
    assert trained_row["loss"] == best_row["loss"] == pytest.approx(figures["loss"], rel=1e-6)
    assert small_row["loss"] == pytest.approx(figures["loss"], rel=1e-4)  # the full model, with the change once more


def test_a_round_that_keeps_the_plan_keeps_the_change() -> None:
    rounds = rounds_of("bert")
    first, second = rounds.at(1, "merge"), rounds.at(2, "prune")
    assert [second.round_plans[at].plan for at in (0, 1)] == ["importance", "same"]
    change, kept = (of.state.load_tensors(f"round-00{n}/{COMPENSATION}") for n, of in ((1, first), (2, second)))
    assert change.keys() == kept.keys()
    assert all(torch.equal(kept[key], tensor) for key, tensor in change.items())
    assert f"round-001/{COMPENSATION}" not in second.state.manifest.files
    assert not (second.state.path / f"round-001/{COMPENSATION}").exists()
    plan, full = second.plan("round-002"), second.full_tensors()
    cut = gather(full, indices(second.layout.axes, plan, second.layout.shapes))
    small = second.state.load_tensors(f"round-002/{SMALL}")
    assert all(torch.equal(small[key], cut[key] + tensor) for key, tensor in change.items())
    facts = [entry["compensated"] for entry in second.state.manifest.history if entry["stage"] == "prune"]
    assert facts[0] == facts[1]


def test_a_round_with_a_plan_of_its_own_computes_another_change_and_drops_the_one_before(tmp_path: Path) -> None:
    state = run(compensated("vit", "auto", prune={"hold_plan": 0.0}), tmp_path / "state")
    first, second = (entry["compensated"] for entry in state.manifest.history if entry["stage"] == "prune")
    assert first != second
    assert [rel for rel in state.manifest.files if rel.endswith(COMPENSATION)] == [f"round-002/{COMPENSATION}"]


def test_where_nothing_is_pruned_nothing_changes_to_the_bit(tmp_path: Path) -> None:
    runs = [compensated("vit", of, rounds=1, prune={"ratio": 0.0}) for of in ("auto", False)]
    found, plain = (run(recipe, tmp_path / str(at)) for at, recipe in enumerate(runs))
    assert stored_files(found.path) == stored_files(plain.path)
    assert [entry["compensated"] for entry in found.manifest.history if entry["stage"] == "prune"] == [None]
    assert not any("compensated" in entry for entry in plain.manifest.history)


def test_what_is_given_back_is_said_by_prune_by_status_and_before_a_run() -> None:
    found = rounds_of("bert").at(1, "prune").state
    facts, (row,) = found.manifest.history[-1], summary(found)["rounds"]
    assert row["given_back_share"] == (share := facts["compensated"]["given_back_share"])
    assert tables.STAGE_TEXTS["prune"](facts).endswith(f"; compensated: {share:.1%} of what the cut took is given back")
    columns, cells = tables._training(summary(found))
    assert (columns[-1], cells[-1][-1]) == ("given back", f"{share:.1%}")
    assert {len(line) for line in cells} == {len(columns)}
    assert sum(", compensated; " in line for line in describe(compensated("bert"))) == 2
    assert not any("compensated" in line for line in describe(compensated("bert", False)))


def test_one_example_is_a_half_without_another(tmp_path: Path) -> None:
    state = init(compensated("vit", "auto", importance={"batches": 1, "batch_size": 1}), tmp_path / "state")
    facts = prune(state)["compensated"]
    assert set(facts["left_shares"].values()) == {1.0}  # there is nothing that a fit could be judged on


def test_inputs_that_are_not_finite_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = init(compensated("vit"), tmp_path / "state")
    monkeypatch.setattr(compensation, "rows_of", lambda inputs, mask: rows_of(inputs, mask) * float("inf"))
    with pytest.raises(SelectionError, match=r"vit\.layers\.0\..*: the sums over its inputs in D_s are not finite") as caught:
        prune(state)
    assert "prune.compensate=false" in str(caught.value.hint)
    assert State.open(state.path).next_stage() == "prune"


# --- however it is run ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), [("0-init", "1-merge"), ("1-merge", "2-merge")])
def test_a_round_stage_by_stage_is_that_of_run(before: str, after: str, tmp_path: Path) -> None:
    root = rounds_of("gpt2").root
    shutil.copytree(root / before, tmp_path / "state")
    for stage in STEPWISE.values():
        stage(State.open(tmp_path / "state"))
    assert stored_files(tmp_path / "state") == stored_files(root / after)


def test_stopped_in_every_stage_and_resumed_is_uninterrupted(tmp_path: Path) -> None:
    expected, path = stored_files(rounds_of("bert").root / "state"), tmp_path / "state"
    seen = run_with_stops(compensated("bert"), path)
    assert {(0, "compensation, step 2 of 2"), (0, "compensation, step 2 of 2, matrix by matrix")} <= seen
    assert stored_files(path) == expected


@pytest.mark.parametrize("name", ["gpt2", "albert"])
def test_streamed_blocks_find_the_same_change(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, entered = first_cut(name).state.load_tensors(f"round-001/{SMALL}"), list[list[str]]()

    def on_cpu(model: nn.Module, axes: Any, device: torch.device, adapter: str) -> Any:
        entered.append(block_paths(model, axes))
        return streamed(model, entered[-1], device)

    monkeypatch.setattr("recap_cli.rounds.compensation.on_device", on_cpu)
    state = init(compensated(name), tmp_path / "state")
    prune(state)
    found = state.load_tensors(f"round-001/{SMALL}")
    assert [len(blocks) for blocks in entered] == [1 if name == "albert" else 2] * 2  # gradual steps
    assert all(torch.equal(found[key], tensor) for key, tensor in plain.items())


def test_fewer_examples_at_a_time_judge_on_the_same_halves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an accelerator takes them: no divisor of the batches that alternate."""
    plain, draw = first_cut("bert", "auto").state.manifest.history[-1]["compensated"], compensation.draw_sample
    monkeypatch.setattr(compensation, "draw_sample", lambda *given: replace(draw(*given), batch_size=3))
    state = init(compensated("bert", "auto"), tmp_path / "state")
    prune(state)
    found = state.manifest.history[-1]["compensated"]
    assert found["ridges"] == plain["ridges"]
    assert found["left_shares"] == pytest.approx(plain["left_shares"], rel=1e-4)


@pytest.mark.parametrize("weights", ["bf16", "nf4"])
def test_weights_of_another_type_are_merged_less_the_change(weights: str, tmp_path: Path) -> None:
    state = init(compensated("vit", rounds=1, finetune={"steps": 2, "weights": weights}), tmp_path / "state")
    prune(state), mask(state), finetune(state)
    before, plan = Context(state), Context(state).plan("round-001")
    trained, change = (state.load_tensors(f"round-001/{file}") for file in (TRAINED, COMPENSATION))
    in_small = trainable_entries(before.layout, plan, before.mask("round-001", plan), before.small("round-001", plan))
    in_full = compose_index_maps(indices(before.layout.axes, plan, before.layout.shapes), in_small)
    merge(state)
    full = Context(state).full_tensors()
    for key in change.keys() & trained.keys():
        wanted = trained[key] - take(change[key], in_small.get(key, {}))
        assert torch.equal(take(full[key], in_full.get(key, {})), wanted)


def test_right_after_the_cut_of_a_trained_model_the_loss_is_lower_with_compensation(tmp_path: Path) -> None:
    sections: dict[str, Any] = {"method": "post-ft", "finetune": {"steps": 20}, "prune": {"ratio": 0.5}}
    state = init(compensated("vit", "auto", **sections), tmp_path / "state")
    for stage in (*STEPWISE.values(), prune):
        stage(state)
    context = Context(state)
    (split, _), plan = context.splits(lambda items, label, total=None: iter(items)), context.plan("round-002")
    batch = split.batch(sample(len(split), 16, seed=context.recipe.seed, round=2, stage="compensate 2"))
    full, small = context.full_tensors(), context.small("round-002", plan)
    cut = gather(full, indices(context.layout.axes, plan, context.layout.shapes))

    def loss_of(tensors: dict[str, Tensor], sizes: dict[str, int]) -> float:
        with torch.no_grad():
            logits = logits_for(context.spec)(context.model(tensors, sizes), batch)
        return float(nn.functional.cross_entropy(logits, batch["labels"]))

    before, after, plain = loss_of(full, {}), loss_of(small, counts(plan)), loss_of(cut, counts(plan))
    assert before < plain
    assert after < (before + plain) / 2


def test_a_plan_that_was_learned_with_its_groups_closed_has_nothing_to_give_back(tmp_path: Path) -> None:
    state = run(compensated("bert", "auto", method="movement", rounds=3), tmp_path / "state")
    context = Context(state)
    pruned = [entry for entry in state.manifest.history if entry["stage"] == "prune"]
    assert pruned[-1]["plan"] == "learned"
    assert pruned[-1]["compensated"] is None
    assert not context.compensation(str(state.manifest.small), context.plan(str(state.manifest.small)))
    assert export(state, tmp_path / "product")


def test_moments_that_are_too_many_are_taken_in_several_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together, apart = (first_cut("bert", "auto"), init(compensated("bert", "auto"), tmp_path / "state"))
    passes = []
    plain = compensation._moments
    monkeypatch.setattr(compensation, "_moments", lambda *given: passes.append(len(given[2])) or plain(*given))
    monkeypatch.setattr(compensation, "MOST_BYTES", 1)
    prune(apart)
    assert passes == [1] * len(passes)
    assert len(passes) > 1
    plan = together.plan("round-001")
    ours = Context(State.open(apart.path)).compensation("round-001", plan)
    assert all(torch.equal(ours[name], tensor) for name, tensor in together.compensation("round-001", plan).items())


def test_a_part_holds_no_more_than_the_most_bytes_and_each_matrix_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 2) for _ in range(5)))
    cuts: list[Any] = [type("Cut", (), {"weight": f"{at}.weight", "kept": torch.arange(3)})() for at in range(5)]
    monkeypatch.setattr(compensation, "_outputs", lambda *_: 2)
    each = 2 * 8 * (4 * 4 + 2 * 4)  # fp64, of both halves
    monkeypatch.setattr(compensation, "MOST_BYTES", 2 * each)
    parts = list(compensation._in_parts(model, cuts))
    assert [[cut.weight for cut in part] for part in parts] == [
        ["0.weight", "1.weight"],
        ["2.weight", "3.weight"],
        ["4.weight"],
    ]
