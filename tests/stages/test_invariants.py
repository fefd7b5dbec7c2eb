"""I2 to I9 of the design, on whole rounds, over every registered adapter."""

import copy
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recap_cli import registry
from recap_cli.core.axes import chosen_params, counts, mask_axes, prunable_params, shapes_of, shrink, unit_params
from recap_cli.core.surgery import compose_index_maps, gather, indices, scatter, take
from recap_cli.core.task import IGNORED, Batch
from recap_cli.data.sampling import batches, order, seed_for
from recap_cli.recipe.recipe import Recipe
from recap_cli.rounds import trainer
from recap_cli.rounds.recipe_model import forward_of
from recap_cli.rounds.record import MASK, MOMENTS, SMALL, TRAINED, WEIGHTS
from recap_cli.rounds.run_context import Context
from recap_cli.rounds.small_model import frozen_whole, trainable_entries
from recap_cli.stages.finetune import finetune
from recap_cli.stages.init import init
from recap_cli.stages.mask import mask
from recap_cli.stages.merge import merge
from recap_cli.stages.prune import prune
from recap_cli.stages.run import run
from recap_cli.state.store import State
from recap_cli.tasks.losses import mean_loss
from recap_cli.trainable.build import make_partial
from recap_cli.trainable.moments import COUNT
from recap_cli.trainable.neuron_order import bring_forward
from tests.pico import PICO, logits_for
from tests.segmentation import CONFIGS, SEGMENTERS, TYPICAL
from tests.stages import naive
from tests.strange import STRANGE, register
from tests.tiny import tiny

STEPWISE = {"prune": prune, "mask": mask, "finetune": finetune, "merge": merge}


@pytest.fixture(autouse=True)
def _strangers(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)


@dataclass(frozen=True)
class Rounds:
    """A finished run, and a copy of its state after each stage."""

    root: Path

    def at(self, round: int, stage: str) -> Context:
        return Context(State.open(self.root / f"{round}-{stage}"))

    @property
    def end(self) -> Context:
        return Context(State.open(self.root / "state"))


@cache
def rounds_of(name: str) -> Rounds:
    root = Path(mkdtemp(prefix=f"recap-{name}-"))

    def copy_state(facts: dict[str, Any]) -> None:
        shutil.copytree(root / "state", root / f"{facts['round']}-{facts['stage']}")

    run(tiny(name), root / "state", on_stage=copy_state)
    return Rounds(root)


@pytest.fixture(params=[*sorted(PICO), *STRANGE, *TYPICAL])
def rounds(request: pytest.FixtureRequest) -> Rounds:
    return rounds_of(request.param)


@pytest.fixture(params=[*sorted(PICO), *STRANGE, *SEGMENTERS])
def all_rounds(request: pytest.FixtureRequest) -> Rounds:
    return rounds_of(request.param)


def chosen_in(context: Context, folder: str) -> dict[str, Tensor]:
    return {name: c.bool() for name, c in context.state.load_tensors(f"{folder}/{MASK}").items()}


def loss_of(context: Context, model: nn.Module, batch: Batch) -> Tensor:
    """The mean loss of a batch; where it draws random numbers they are the same every time."""
    torch.manual_seed(0)
    return mean_loss(context.objective.task, forward_of(context.spec, model)(batch), batch)[0]


def stored_files(root: Path) -> dict[str, bytes]:
    """Every tensor file of a state, and what it decided: all that must be equal where two runs are."""
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*.safetensors"))}


def test_every_registered_adapter_has_a_pico_model() -> None:
    types = {PICO[name]().model_type for name in PICO} | set(CONFIGS)
    assert {entry.name for entry in registry.entries("adapters") if entry.distribution == "recap-cli"} == types


def test_i2_compact_gradients_are_the_dense_gradients_at_those_entries(all_rounds: Rounds) -> None:
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


def test_i3_a_merge_writes_what_trained_and_leaves_every_other_bit(all_rounds: Rounds) -> None:
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


def test_i4_scatter_is_the_inverse_of_gather_and_two_plans_compose(rounds: Rounds) -> None:
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


@pytest.mark.parametrize("name", ["bert", "vit", "timm-vit"])
def test_i7_stage_by_stage_is_run(name: str, tmp_path: Path) -> None:
    rounds, recipe = rounds_of(name), tiny(name)
    state = init(recipe, tmp_path / "state")
    for _ in range(recipe.rounds):
        for stage in STEPWISE.values():
            stage(State.open(tmp_path / "state"))
    assert stored_files(state.path) == stored_files(rounds.root / "state")


def test_i7_a_round_stage_by_stage_after_others_is_that_of_run(all_rounds: Rounds, tmp_path: Path) -> None:
    shutil.copytree(all_rounds.root / "1-merge", tmp_path / "state")
    for stage in STEPWISE.values():
        stage(State.open(tmp_path / "state"))
    assert stored_files(tmp_path / "state") == stored_files(all_rounds.root / "state")


@pytest.mark.parametrize("round", [1, 2])
def test_i8_optimizer_state_is_two_moments_a_trainable_entry_and_nothing_more(rounds: Rounds, round: int) -> None:
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


def test_i9_what_is_pruned_and_what_trains_is_within_one_group_of_the_budget(rounds: Rounds) -> None:
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


def test_the_small_model_is_the_full_one_at_its_plan_after_a_merge(rounds: Rounds) -> None:
    context = rounds.at(1, "merge")
    best = context.state.manifest.best
    assert best is not None
    assert best["round"] == 1
    plan = context.plan(best["folder"])
    tensors = context.state.load_tensors(f"{best['folder']}/{WEIGHTS}")
    full = context.full_tensors()
    expected = gather(full, indices(context.layout.axes, plan, shapes_of(full)))
    assert all(torch.equal(expected[name], tensors[name]) for name in expected)


def test_weights_held_are_the_small_model_and_the_scattered_entries_of_attention(rounds: Rounds) -> None:
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


def plain_loss(context: Context, model: nn.Module) -> Callable[[Batch], Tensor]:
    """The loss as a plain loop in training has it: torch's mean over all examples, or pixels of a class; or the model's own.

    A mean over pixels is torch's sum by their number, which is its mean but for the last bit.
    """
    naive.train_mode(model)
    forward, cross_entropy = forward_of(context.spec, model), torch.nn.functional.cross_entropy

    def loss(batch: Batch) -> Tensor:
        outputs, labels = forward(batch), batch["labels"]
        if labels.ndim == 1:
            return cross_entropy(outputs.float(), labels)
        counted = (labels != IGNORED).sum()
        if not isinstance(outputs, Tensor):
            return outputs.loss * counted / counted
        scores = torch.nn.functional.interpolate(outputs, labels.shape[1:], mode="bilinear")
        return cross_entropy(scores, labels, reduction="sum") / counted

    return loss


@pytest.mark.parametrize("name", [*sorted(PICO), *STRANGE, *TYPICAL])
def test_i5_both_ratios_zero_in_one_round_is_plain_finetuning_to_the_bit(name: str, tmp_path: Path) -> None:
    recipe = tiny(
        name, rounds=1, prune={"ratio": 0.0}, mask={"ratio": 0.0, "train_embeddings": True}, finetune={"weight_decay": 0.1}
    )
    state = init(recipe, tmp_path / "state")
    context = Context(state)
    model = context.model({n: t.clone() for n, t in context.full_tensors().items()})
    params = list(model.parameters())
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, foreach=False)
    split, _ = context.splits(lambda items, label, total=None: iter(items))
    steps = 5  # one epoch of 40 in batches of 8
    loss_of = plain_loss(context, model)
    torch.manual_seed(seed_for(recipe.seed, 1, "finetune"))
    for step, batch in enumerate(batches(split, order(len(split), seed=recipe.seed, round=1, epoch=0), 8)):
        for group in optimizer.param_groups:
            group["lr"] = recipe.finetune.lr * (1 - step / steps)
        loss_of(batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    end = Context(run(recipe, tmp_path / "state"))
    ours = end.full_tensors()
    assert all(torch.equal(ours[n], p.detach()) for n, p in model.named_parameters())


def test_two_rounds_in_which_everything_trains_are_one_torch_optimizer(tmp_path: Path) -> None:
    sections: dict[str, Any] = {"prune": {"ratio": 0.0}, "mask": {"ratio": 0.0, "train_embeddings": True}}
    state = init(tiny("vit", finetune={"weight_decay": 0.0}, **sections), tmp_path / "state")
    context = Context(state)
    model = context.model({n: t.clone() for n, t in context.full_tensors().items()})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, foreach=False, weight_decay=0.0)
    split, _ = context.splits(lambda items, label, total=None: iter(items))
    forward = logits_for(context.spec)
    model.train()
    for round in (1, 2):
        torch.manual_seed(seed_for(context.recipe.seed, round, "finetune"))
        for step, batch in enumerate(batches(split, order(len(split), seed=context.recipe.seed, round=1, epoch=round - 1), 8)):
            optimizer.param_groups[0]["lr"] = context.recipe.finetune.lr * (1 - ((round - 1) * 5 + step) / 10)
            torch.nn.functional.cross_entropy(forward(model, batch).float(), batch["labels"]).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    ours = Context(run(context.recipe, tmp_path / "state")).full_tensors()
    assert all(torch.equal(ours[n], p.detach()) for n, p in model.named_parameters())


def test_the_second_round_starts_from_the_moments_and_ages_of_the_first(
    rounds: Rounds, monkeypatch: pytest.MonkeyPatch
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
    assert ages in ({0, 5}, {5})  # what moves now has moved for the five steps of round 1, or (in most models some) never


class StopHere(KeyboardInterrupt):
    """What Ctrl-C does, at a chosen moment."""


def run_with_stops(recipe: Recipe, path: Path) -> set[tuple[int, str]]:
    """Run a recipe to its end, stopped once in every loop of every round; the round and the label of each stop."""
    seen: set[tuple[int, str]] = set()

    def stop_once(items: Any, label: str, total: int | None = None) -> Any:
        for i, item in enumerate(items):
            moment = (State.open(path).manifest.round, label) if (path / "state.yaml").exists() else (0, label)
            if i == 1 and moment not in seen:
                seen.add(moment)
                raise StopHere
            yield item

    for _ in range(60):
        try:
            run(recipe, path, track=stop_once)
            break
        except StopHere:
            continue
    return seen


@pytest.mark.parametrize("name", ["bert", "timm-vit", "segformer"])
def test_i6_stopped_in_every_stage_and_resumed_is_uninterrupted(name: str, tmp_path: Path) -> None:
    seen = run_with_stops(tiny(name), tmp_path / "state")
    assert len(seen) >= 7  # init, the importances and the finetuning of both rounds were each stopped once
    assert stored_files(tmp_path / "state") == stored_files(rounds_of(name).root / "state")


def test_runs_from_the_same_seed_are_equal_and_from_another_are_not(tmp_path: Path) -> None:
    expected = stored_files(rounds_of("vit").root / "state")
    run(tiny("vit"), tmp_path / "same")
    run(tiny("vit", seed=1), tmp_path / "other")
    assert stored_files(tmp_path / "same") == expected
    assert stored_files(tmp_path / "other") != expected


def test_a_deep_copy_is_not_needed_to_read_a_state_twice(tmp_path: Path) -> None:
    context = rounds_of("vit").at(1, "merge")
    first = copy.deepcopy(context.full_tensors())
    for tensor in context.full_tensors().values():
        tensor.zero_()
    assert all(torch.equal(a, b) for a, b in zip(first.values(), context.full_tensors().values(), strict=True))
