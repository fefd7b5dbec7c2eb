"""The stages against the equations, and I2 to I4 and I7 to I9 of the design: three rounds of every pico model, run once.

The equations are checked by a reference that shares no code with the stages.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recap_cli.core.axes import chosen_params, counts, mask_axes, prunable_params, shapes_of, shrink, unit_params
from recap_cli.core.surgery import compose_index_maps, gather, indices, scatter, take
from recap_cli.core.task import Batch
from recap_cli.data.sampling import batches
from recap_cli.rounds import trainer
from recap_cli.rounds.recipe_model import forward_of
from recap_cli.rounds.record import MASK, MOMENTS, SMALL, TRAINED, WEIGHTS
from recap_cli.rounds.run_context import Context
from recap_cli.rounds.small_model import frozen_whole, trainable_entries
from recap_cli.stages.finetune import finetune
from recap_cli.stages.run import run
from recap_cli.state.store import State
from recap_cli.tasks.losses import mean_loss
from recap_cli.trainable.build import make_partial
from recap_cli.trainable.moments import COUNT
from recap_cli.trainable.neuron_order import bring_forward
from tests.pico import PICO
from tests.segmentation import SEGMENTERS, TYPICAL
from tests.stages.expected import check_training, naive_mask, naive_plan
from tests.stages.test_invariants import stored_files
from tests.stages.witness import Record, indices_of, record_of
from tests.strange import STRANGE, register
from tests.tiny import TRAIN

ADAPTERS = [*sorted(PICO), *STRANGE, *SEGMENTERS]
STEPS = 7  # a round: 1.2 epochs of 40 examples in batches of 7


@pytest.fixture(autouse=True)
def _strangers(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_plan_keeps_the_groups_of_the_highest_eq_1_through_all_gradual_steps(name: str) -> None:
    record = record_of(name)
    for round in (1, 2, 3):
        assert record.plan(round) == naive_plan(record, round)
    assert len({tuple(record.plan(round)) for round in (1, 2)}) == 2  # less is pruned in the first


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_mask_lets_move_the_hidden_dimensions_of_the_highest_eq_4(name: str) -> None:
    record = record_of(name)
    for round in (1, 2, 3):
        assert record.mask(round) == naive_mask(record, round)


@pytest.mark.parametrize("name", ADAPTERS)
def test_what_trains_is_trained_as_by_torch_on_dense_gradients_and_merged_and_all_else_ages(name: str) -> None:
    check_training(record_of(name), 3, STEPS)


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_order_of_examples_runs_through_all_rounds_epoch_after_epoch(name: str) -> None:
    record = record_of(name)
    looks = [look for round in (1, 2, 3) for of in record.seen(round, "finetune").values() for look in of]
    assert len(looks) == 3 * STEPS
    seen = indices_of(looks)
    epochs = [seen[start : start + TRAIN] for start in range(0, len(seen), TRAIN)]
    assert [len(epoch) for epoch in epochs] == [TRAIN, TRAIN, TRAIN, 3 * 7]  # 21 steps: 3 epochs of 6 batches, and 3 batches
    assert all(sorted(epoch) == list(range(TRAIN)) for epoch in epochs[:3])
    assert len({tuple(epoch[:20]) for epoch in epochs}) == 4
    assert epochs[0] != sorted(epochs[0])
    assert not any(look.validation for look in looks)


def test_what_a_mask_lets_move_is_counted_layer_by_layer() -> None:
    context = record_of("vit").at(2, "mask")
    chosen = chosen_in(context, str(context.state.manifest.small))
    counted = {kind: [int(chosen[f"vit.layers.{n}.{kind}"].sum()) for n in range(2)] for kind in ("heads", "neurons")}
    assert context.state.manifest.history[-1]["trainable_dimensions"] == counted
    assert all(count > 0 for layers in counted.values() for count in layers)


@pytest.fixture(params=[*sorted(PICO), *STRANGE, *TYPICAL])
def rounds(request: pytest.FixtureRequest) -> Record:
    return record_of(request.param)


@pytest.fixture(params=ADAPTERS)
def all_rounds(request: pytest.FixtureRequest) -> Record:
    return record_of(request.param)


def chosen_in(context: Context, folder: str) -> dict[str, Tensor]:
    return {name: c.bool() for name, c in context.state.load_tensors(f"{folder}/{MASK}").items()}


def loss_of(context: Context, model: nn.Module, batch: Batch) -> Tensor:
    """The mean loss of a batch; where it draws random numbers they are the same every time."""
    torch.manual_seed(0)
    return mean_loss(context.objective.task, forward_of(context.spec, model)(batch), batch)[0]


def test_i2_compact_gradients_are_the_dense_gradients_at_those_entries(all_rounds: Record) -> None:
    context = all_rounds.at(2, "mask")
    folder = str(context.state.manifest.small)
    plan, chosen = context.plan(folder), chosen_in(context, folder)
    small = context.state.load_tensors(f"{folder}/{SMALL}")
    index_map = trainable_entries(context.layout, plan, chosen, small)
    split, _ = context.splits(lambda items, label, total=None: iter(items))
    (batch,) = batches(split, torch.arange(6), 6)
    dense, partial = (context.model({n: t.clone() for n, t in small.items()}, counts(plan)) for _ in range(2))
    loss = loss_of(context, dense, batch)
    loss.backward()
    forward = bring_forward(partial, shrink(context.layout.axes, plan), chosen, index_map)
    trainables = make_partial(partial, forward, frozen=lambda n: frozen_whole(context.layout, context.round_plans[0], n))
    loss_of(context, partial, batch).backward()
    wanted = dict(dense.named_parameters())
    for trainable in trainables:
        if (grad := wanted[trainable.name].grad) is not None:
            there, near = take(grad, index_map.get(trainable.name, {})), 1e-6 * max(1.0, float(loss.detach()))
            torch.testing.assert_close(trainable.grad_param.grad, there, rtol=2e-3, atol=near)
    assert {trainable.name for trainable in trainables}.isdisjoint(context.layout.embeddings)


def test_i3_a_merge_writes_what_trained_and_leaves_every_other_bit(all_rounds: Record) -> None:
    before, after = all_rounds.at(2, "finetune"), all_rounds.at(2, "merge")
    folder = str(before.state.manifest.small)
    old, new = before.full_tensors(), after.full_tensors()
    trained = before.state.load_tensors(f"{folder}/{TRAINED}")
    plan = before.plan(folder)
    kept = indices(before.layout.axes, plan, shapes_of(old))
    small = before.state.load_tensors(f"{folder}/{SMALL}")
    index_map = compose_index_maps(kept, trainable_entries(before.layout, plan, chosen_in(before, folder), small))
    assert trained
    for name in old:
        inside = torch.zeros(old[name].shape, dtype=torch.bool)
        if name in trained:
            scatter({name: inside}, {name: torch.ones(trained[name].shape, dtype=torch.bool)}, index_map)
            assert torch.equal(take(new[name], index_map.get(name, {})), trained[name])
        assert torch.equal(old[name][~inside], new[name][~inside])
    changed = sum(int((old[n] != new[n]).sum()) for n in trained)
    assert changed > 0.5 * sum(t.numel() for t in trained.values())


def test_i4_scatter_is_the_inverse_of_gather_and_two_plans_compose(rounds: Record) -> None:
    context = rounds.at(1, "prune")
    full = context.full_tensors()
    plan = context.plan(str(context.state.manifest.small))
    index_map = indices(context.layout.axes, plan, shapes_of(full))
    small = gather(full, index_map)
    again = {name: tensor.clone() for name, tensor in full.items()}
    scatter(again, small, index_map)
    assert all(torch.equal(again[name], full[name]) for name in full)
    axes = shrink(context.layout.axes, plan)
    inner = {axis.name: torch.arange(axis.size) % 2 == 0 for axis in axes}
    inside = indices(axes, inner, shapes_of(small))
    twice, at_once = gather(small, inside), gather(full, compose_index_maps(index_map, inside))
    assert all(torch.equal(twice[name], at_once[name]) for name in full)


def test_i7_a_round_stage_by_stage_after_others_is_that_of_run(all_rounds: Record, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def after_two(facts: dict[str, Any]) -> None:
        if (facts["round"], facts["stage"]) == (2, "merge"):
            raise Stop

    shutil.copytree(all_rounds.folder(1, "merge"), tmp_path / "state")
    with pytest.raises(Stop):
        run(all_rounds.recipe, tmp_path / "state", on_stage=after_two)
    assert stored_files(tmp_path / "state") == stored_files(all_rounds.folder(2, "merge"))


@pytest.mark.parametrize("round", [1, 2])
def test_i8_optimizer_state_is_two_moments_a_trainable_entry_and_nothing_more(rounds: Record, round: int) -> None:
    context = rounds.at(round, "finetune")
    entry = context.state.manifest.history[-1]
    folder = str(context.state.manifest.small)
    trained = context.state.load_tensors(f"{folder}/{TRAINED}")
    trainable = sum(t.numel() for t in trained.values())
    assert entry["trainable"] == trainable
    assert entry["optimizer_bytes"] == 2 * 4 * trainable
    moments = context.state.load_tensors(f"{folder}/{MOMENTS}")
    idle = {name for name in trained if not moments[f"{name}/{COUNT}"].any()}  # no gradient reaches them
    assert bool(idle) == (context.spec.model_type == "mask2former")
    assert entry["gradients_bytes"] == 4 * (trainable - sum(trained[name].numel() for name in idle))
    assert sum(t.numel() for name, t in moments.items() if not name.endswith(COUNT)) == 2 * trainable


def test_i9_what_is_pruned_and_what_trains_is_within_one_group_of_the_budget(rounds: Record) -> None:
    context = rounds.at(2, "mask")
    recipe, axes, shapes = context.recipe, context.layout.axes, shapes_of(context.full_tensors())
    folder = str(context.state.manifest.small)
    plan, chosen = context.plan(folder), chosen_in(context, folder)
    small_axes = mask_axes(shrink(axes, plan), context.layout.whole)
    for kind in ("heads", "neurons"):
        pool = [axis for axis in axes if axis.kind == kind]
        budget = (1 - recipe.prune.ratio) * prunable_params(pool, shapes)
        assert abs(chosen_params(pool, shapes, plan) - budget) <= max(unit_params(a, shapes) for a in pool)
        fine = [axis for axis in small_axes if axis.kind == kind]
        assert recipe.mask.scope == "per-layer"
        for axis in fine:  # each is ranked by itself, and within half a unit of its share
            assert abs(int(chosen[axis.name].sum()) - (1 - recipe.mask.ratio) * axis.size) <= 0.5 + 1e-6


def test_the_small_model_is_the_full_one_at_its_plan_after_a_merge(rounds: Record) -> None:
    context = Context(State.open(rounds.root / "state"))
    best = context.state.manifest.best
    assert best is not None
    assert best["round"] in (2, 3)  # the first holds more than they do
    plan = context.plan(best["folder"])
    tensors = context.state.load_tensors(f"{best['folder']}/{WEIGHTS}")
    full = rounds.full(best["round"])
    expected = gather(full, indices(context.layout.axes, plan, shapes_of(full)))
    assert all(torch.equal(expected[name], tensors[name]) for name in expected)


def test_weights_held_are_the_small_model_and_the_scattered_entries_of_attention(rounds: Record) -> None:
    context = rounds.at(2, "finetune")
    entry, folder = context.state.manifest.history[-1], str(context.state.manifest.small)
    small = context.state.load_tensors(f"{folder}/{SMALL}")
    trained = context.state.load_tensors(f"{folder}/{TRAINED}")
    one_matrix = {cut.param for axis in context.layout.axes for cut in axis.cuts if axis.kind == "heads"}
    packed = [
        axis for axis in context.layout.axes if axis.kind == "neurons" and len({c.param for c in axis.cuts}) < len(axis.cuts)
    ]
    one_matrix |= {cut.param for axis in packed for cut in axis.cuts}  # gate and value: two stretches of one matrix
    copies = sum(t.nbytes for name, t in trained.items() if name in one_matrix)
    places = entry["weights_bytes"] - sum(t.nbytes for t in small.values()) - copies
    assert places <= 8 * sum(small[n].shape[0] + small[n].shape[-1] for n in one_matrix) + 8 * len(trained)  # int64 indices
    neurons = sum(t.nbytes for name, t in trained.items() if name in context.layout.along and name not in one_matrix)
    assert packed or neurons > 0  # these are views of the residents, and cost nothing


def test_the_second_round_starts_from_the_moments_and_ages_of_the_first(
    rounds: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    class Stop(Exception):
        pass

    def spy(trainables: Any, rule: Any, **given: Any) -> None:
        seen.update(given, trainables=trainables)
        raise Stop

    context = rounds.at(2, "mask")
    folder = str(context.state.manifest.small)
    plan, chosen = context.plan(folder), chosen_in(context, folder)
    small = context.state.load_tensors(f"{folder}/{SMALL}")
    index_map = compose_index_maps(
        indices(context.layout.axes, plan, context.layout.shapes), trainable_entries(context.layout, plan, chosen, small)
    )
    stored = context.state.load_tensors(f"{context.full}/{MOMENTS}")
    monkeypatch.setattr(trainer, "Optimizer", spy)
    with pytest.raises(Stop):
        finetune(context.state)
    ages: set[int] = set()
    for trainable in seen["trainables"]:
        dims = index_map.get(trainable.name, {})
        if f"{trainable.name}/exp_avg" in stored:
            for moment in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(
                    seen["carried"].moments[trainable.name][moment], take(stored[f"{trainable.name}/{moment}"], dims)
                )
            ages |= set(seen["carried"].counts[trainable.name].tolist())
        for dim in dims:
            assert seen["carried"].along[trainable.name] == dim
    assert ages in ({0, STEPS}, {STEPS})  # what moves now has moved for the steps of round 1, or (in most models some) never
