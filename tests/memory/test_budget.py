"""Budgets: what the solver chooses, in how few predictions, what it says, and that `init` and `run` keep to it."""

import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from recap_cli.core.method import RoundPlan
from recap_cli.errors import BudgetError, StateError
from recap_cli.memory import budget, meta_model
from recap_cli.memory import predict as profile
from recap_cli.memory.budget import WORKSPACE_BYTES, Fit, as_solved, fit, savings
from recap_cli.memory.predict import Prediction
from recap_cli.memory.tracker import Usage
from recap_cli.recipe import recipe as recipes
from recap_cli.recipe.recipe import Recipe
from recap_cli.rounds.run_context import Context
from recap_cli.rounds.settings import EXECUTION, recipe_of
from recap_cli.stages.init import init
from recap_cli.stages.mask import mask
from recap_cli.stages.prune import prune
from recap_cli.stages.run import run
from recap_cli.state.store import State
from tests.pico import LABELS
from tests.tiny import one_layer, tiny

MB = 10**6
Peak = Callable[[Recipe], float]


def straight(recipe: Recipe) -> float:
    """The peak, in MB, of a made-up model: weights, what moves with its state, and the activations of a micro-batch."""
    tune = recipe.finetune
    kept, each = 1 - recipe.prune.ratio, {"fp32": 4, "bf16": 2, "int8": 1, "nf4": 0.5}[tune.weights]
    trained = 100 * kept * (1 - recipe.mask.ratio)
    state = 0 if tune.offload else 3 * trained
    gradients = trained if not tune.fused_backward or tune.micro_batch_size not in (None, tune.batch_size) else 0.1 * trained
    activations = 2 * (tune.micro_batch_size or tune.batch_size) * each * (0.3 if tune.checkpointing else 1) * kept
    return float(25 * each * kept + state + gradients + activations)


def bent(recipe: Recipe) -> float:
    """The same, with a peak that is far from straight in what moves and in the micro-batch."""
    parts: float = (recipe.finetune.micro_batch_size or 32) ** 1.7 / 4
    return float(straight(recipe) + 40 * (1 - recipe.mask.ratio) ** 0.2 + parts)


def flat_first(recipe: Recipe) -> float:
    """The fused backward helps only once the activations are few."""
    tune = recipe.finetune
    activations = 200 * (0.2 if tune.checkpointing else 1)
    return 100 + max(activations, 100 if not tune.fused_backward else 10)


def quickly_changed(recipe: Recipe, values: dict[str, Any]) -> Recipe:
    """As `recipes.changed`, without the YAML between."""
    whole = recipe.model_dump()
    for key, value in values.items():
        section, name = key.split(".")
        whole[section][name] = value
    return Recipe.model_validate(whole)


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> Callable[[Peak], list[Recipe]]:
    """Puts a formula in the place of predictions; returns the list of the recipes that were asked for."""

    def put(peak: Peak, scoring: Peak = lambda recipe: recipe.evaluate.batch_size) -> list[Recipe]:
        asked: list[Recipe] = []

        def predict(model: Any, recipe: Recipe, method: str) -> Prediction:
            assert method == "recap"
            asked.append(recipe)
            usage = Usage({"weights": int(peak(recipe) * MB)}, {"weights": int(peak(recipe) * MB)})
            planned = (RoundPlan(recipe.prune.ratio, recipe.mask.ratio),)
            return Prediction("recap", recipe, planned, usage, int(scoring(recipe) * MB), 0, 0, 0, recipe.finetune.batch_size)

        monkeypatch.setattr(recipes, "changed", quickly_changed)
        monkeypatch.setattr(budget, "predict", predict)
        monkeypatch.setattr(budget, "evaluation_bytes", lambda model, recipe, method: int(scoring(recipe) * MB))
        return asked

    return put


NO_MODEL: Any = None
LARGE = tiny("vit", prune={"ratio": 0.2}, mask={"ratio": 0.5}, finetune={"batch_size": 32})
RANK = {rung.key: rank for rank, rung in enumerate(budget.LADDER)}


def fitted(megabytes: float, recipe: Recipe = LARGE, **settings: Any) -> Fit:
    return fit(NO_MODEL, recipe, int(megabytes * MB) + WORKSPACE_BYTES, **settings)


def values(found: Fit) -> dict[str, Any]:
    return {change.key: change.after for change in found.changes}


@pytest.mark.parametrize("peak", [straight, bent, flat_first])
def test_a_fit_never_exceeds_its_budget_and_takes_few_predictions(peak: Peak, made_up: Callable[..., list[Recipe]]) -> None:
    asked = made_up(peak)
    for megabytes in range(40, 700, 13):
        asked.clear()
        try:
            found = fitted(megabytes)
        except BudgetError:
            assert len(asked) <= 16
            continue
        assert found.prediction.usage.peak_bytes <= megabytes * MB
        assert found.prediction.evaluation_bytes <= megabytes * MB
        assert found.prediction.usage.peak_bytes == int(peak(found.recipe) * MB)
        assert found.recipe == recipes.changed(LARGE, values(found))
        assert found.recipe.finetune.batch_size == 32
        assert len(asked) <= 24, megabytes  # of 7 rungs, two of which have some 150 values
        assert len(asked) == 1 or found.changes


@pytest.mark.parametrize("peak", [straight, bent, flat_first])
def test_a_larger_budget_reaches_for_nothing_dearer(peak: Peak, made_up: Callable[..., list[Recipe]]) -> None:
    made_up(peak)
    before: dict[str, Any] | None = None
    for megabytes in range(40, 700, 13):
        try:
            now = values(fitted(megabytes))
        except BudgetError:
            assert before is None, "less was enough"
            continue
        if before is not None:
            assert max((RANK.get(key, 0) for key in now), default=0) <= max((RANK.get(key, 0) for key in before), default=0)
            for key in ("mask.ratio", "prune.ratio"):
                assert now.get(key, 0) <= before.get(key, 0)
            if now.get("finetune.offload") == before.get("finetune.offload"):
                assert now.get(budget.MICRO, 32) >= before.get(budget.MICRO, 32)
        before = now


@pytest.mark.parametrize("peak", [straight, bent])
def test_a_graded_setting_trains_no_further_than_it_must(peak: Peak, made_up: Callable[..., list[Recipe]]) -> None:
    made_up(peak)
    seen = set()
    for megabytes in range(45, 500, 7):
        try:
            found = fitted(megabytes)
        except BudgetError:
            continue
        last = next((change for change in reversed(found.changes) if change.key != budget.SCORING), None)
        if last is not None and last.key in (budget.MICRO, "mask.ratio", "prune.ratio"):
            seen.add(last.key)
            rung = budget.LADDER[RANK[last.key]]
            tried = [last.before, *rung.values(recipes.changed(found.recipe, {last.key: last.before}))]
            milder = recipes.changed(found.recipe, {last.key: tried[tried.index(last.after) - 1]})
            assert peak(milder) > megabytes
    assert seen >= {budget.MICRO, "mask.ratio"}


def test_what_fits_is_left_as_it_is(made_up: Callable[..., list[Recipe]]) -> None:
    asked = made_up(straight)
    found = fitted(10**6)
    assert (found.recipe, found.changes, len(asked)) == (LARGE, (), 1)


def test_what_costs_nothing_is_tried_again_where_it_did_not_help_at_first(made_up: Callable[..., list[Recipe]]) -> None:
    made_up(flat_first)
    assert values(fitted(200)) == {"finetune.checkpointing": True}
    assert values(fitted(150)) == {"finetune.checkpointing": True, "finetune.fused_backward": True}


def test_micro_batches_are_as_large_again_as_offloading_lets_them(made_up: Callable[..., list[Recipe]]) -> None:
    made_up(straight)
    edge = next(megabytes for megabytes in range(200, 40, -4) if "finetune.offload" in values(fitted(megabytes)))
    found = fitted(edge)
    assert found.recipe.finetune.micro_batch_size is None
    assert found.changes[-1].before_bytes > found.changes[-1].after_bytes == found.prediction.usage.peak_bytes


def test_each_change_says_what_it_was_worth(made_up: Callable[..., list[Recipe]]) -> None:
    made_up(straight)
    for megabytes in (60, 90, 120, 200):
        changes = [change for change in fitted(megabytes).changes if change.key != budget.SCORING]
        recipe, peaks = LARGE, [int(straight(LARGE) * MB)]
        for change in changes:
            recipe = recipes.changed(recipe, {change.key: change.after})
            peaks.append(int(straight(recipe) * MB))
        assert [(c.before_bytes, c.after_bytes) for c in changes] == list(pairwise(peaks))


def test_gradients_that_are_clipped_are_not_fused(made_up: Callable[..., list[Recipe]]) -> None:
    made_up(straight)
    found = fitted(100, recipes.changed(LARGE, {"finetune.max_grad_norm": 1.0}))
    assert "finetune.fused_backward" not in values(found)
    assert values(found)


def test_scoring_is_cut_until_it_fits_too_and_refused_where_it_cannot(made_up: Callable[..., list[Recipe]]) -> None:
    made_up(lambda _: 20, lambda recipe: 15 + recipe.evaluate.batch_size)
    assert values(fitted(25)) == {"evaluate.batch_size": 8}
    made_up(lambda _: 20, lambda recipe: 30 + recipe.evaluate.batch_size)
    with pytest.raises(BudgetError) as caught:
        fitted(25)
    assert f"the least is {31 + WORKSPACE_BYTES / MB + 0.05:.1f}MB" in caught.value.message


def test_importance_goes_back_to_the_cpu_where_the_device_has_no_room(
    made_up: Callable[..., list[Recipe]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up(lambda _: 20, lambda _: 20)
    monkeypatch.setattr(budget, "importance_bytes", lambda *_: 50 * MB)
    recipe = recipes.changed(LARGE, {"importance.device": "cuda"})
    assert values(fitted(30, recipe)) == {"importance.device": "cpu"}
    assert fitted(30, recipe).recipe.importance.device == "cpu"
    assert values(fitted(60, recipe)) == {}
    assert values(fitted(30)) == {}


@pytest.mark.parametrize("peak", [straight, bent])
def test_the_least_that_is_named_fits_and_less_does_not(peak: Peak, made_up: Callable[..., list[Recipe]]) -> None:
    made_up(peak, lambda _: 1)
    with pytest.raises(BudgetError) as caught:
        fit(NO_MODEL, LARGE, MB)
    message, hint = caught.value.message, str(caught.value.hint)
    assert message.startswith("nothing fits in 1.0MB: the least is ")
    for said in ("finetune.fused_backward=true", "finetune.micro_batch_size=1", "prune.ratio=0.75", "for cuBLAS"):
        assert said in message
    least = hint.split()[3]
    assert f"the least is {least}," in message
    assert hint.startswith(f"a budget of {least} fits")
    fit(NO_MODEL, LARGE, recipes.bytes_of(least))
    with pytest.raises(BudgetError):
        fit(NO_MODEL, LARGE, recipes.bytes_of(least) - 2 * 10**5)
    quantized = re.findall(r"; with --set finetune\.weights=(\w+), which is not chosen here, one of (\S+?MB)", hint)
    assert [name for name, _ in quantized] == ["int8", "nf4"]
    for name, enough in quantized:
        fit(NO_MODEL, recipes.changed(LARGE, {"finetune.weights": name}), recipes.bytes_of(enough))


def test_only_what_may_change_is_changed(made_up: Callable[..., list[Recipe]]) -> None:
    made_up(straight)
    with pytest.raises(BudgetError, match="nothing fits") as caught:
        fitted(10, may_change=EXECUTION.__contains__)
    assert "mask.ratio=" not in caught.value.message
    assert "a new state may have another mask.ratio and prune.ratio, too" in str(caught.value.hint)
    assert set(values(fitted(150, may_change=EXECUTION.__contains__))) <= set(EXECUTION)


# On real predictions


def budget_between(recipe: Recipe, share: float) -> int:
    """A budget between nothing beside cuBLAS's workspace and what the recipe takes as it is."""
    peak = profile.predict(meta_model.of_recipe(recipe, LABELS), recipe, "recap").usage.peak_bytes
    return int(share * peak) + WORKSPACE_BYTES


def test_init_solves_a_budget_and_run_goes_on_with_it(tmp_path: Path) -> None:
    plain = tiny("vit", rounds=1, model=one_layer("vit"), prune={"steps": 1}, finetune={"steps": 1}, evaluate={"batch_size": 8})
    amount = f"{budget_between(plain, 0.95)}B"
    recipe = recipes.changed(plain, {"finetune.memory_budget": amount})
    state = init(recipe, tmp_path / "state")
    told = state.manifest.history[0]
    changes = {change["key"]: change["after"] for change in told["budget"]["changes"]}
    assert told["budget"]["memory_budget"] == amount
    assert changes
    assert recipe_of(state) == recipes.changed(recipe, changes)
    assert len([note for note in told["notes"] if note.startswith(f"for the memory budget of {amount}: ")]) == len(changes)
    assert as_solved(recipe, state) == recipe_of(state)
    assert run(recipe, tmp_path / "state").manifest.changes == []
    assert run(recipe_of(state), tmp_path / "state").manifest.changes == []
    with pytest.raises(StateError, match=r"finetune\.memory_budget.* differ"):
        run(recipes.changed(recipe, {"finetune.memory_budget": "3GB"}), tmp_path / "state")
    with pytest.raises(StateError, match=r"finetune\.lr differ"):
        run(recipes.changed(recipe, {"finetune.lr": 0.5}), tmp_path / "state")
    with pytest.raises(StateError, match=r"finetune\.memory_budget"):
        run(plain, tmp_path / "state")


def test_a_budget_that_nothing_fits_makes_no_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fit(*_: Any, **__: Any) -> Fit:
        raise BudgetError("nothing fits")

    monkeypatch.setattr(budget, "fit", fit)
    with pytest.raises(BudgetError, match="nothing fits"):
        init(tiny("vit", finetune={"memory_budget": "1MB"}), tmp_path / "state")
    assert not (tmp_path / "state").exists()


def test_a_large_budget_is_noted(tmp_path: Path) -> None:
    state = init(tiny("vit", finetune={"memory_budget": "2 GiB"}), tmp_path / "state")
    assert state.manifest.history[0]["notes"][0] == "fits the memory budget of 2 GiB as it is"


def test_the_head_of_a_budget_has_the_labels_of_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def fit(model: meta_model.MetaModel, recipe: Recipe, amount: int, track: Any) -> Fit:
        seen.append(model)
        return Fit(recipe, (), NO_MODEL)

    monkeypatch.setattr(budget, "fit", fit)
    budget.solved(tiny("vit", finetune={"memory_budget": "1GB"}))
    assert seen[0].spec.num_labels == len(LABELS)


def test_savings_are_those_of_each_setting_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = ("finetune.micro_batch_size", "mask.ratio")
    monkeypatch.setattr(budget, "LADDER", [rung for rung in budget.LADDER if rung.key in chosen])
    state = init(tiny("vit", rounds=1, model=one_layer("vit")), tmp_path / "state")
    for stage in (prune, mask):
        stage(state)
    context = Context(state)
    found = dict(savings(context))
    model = meta_model.of_state(context)
    now = profile.predict(model, context.recipe, "recap").usage.peak_bytes
    assert "finetune.weights=int8" in found
    for unit_mask in ("finetune.weights=int8", "finetune.weights=nf4", "finetune.micro_batch_size=4"):
        recipe = recipe_of(state, [unit_mask])
        assert found.get(unit_mask, 0) == max(0, now - profile.predict(model, recipe, "recap").usage.peak_bytes)
    assert all(count > 0 for count in found.values())
    assert any(unit_mask.startswith("mask.ratio=0.") for unit_mask in found)


def test_all_rungs_go_together() -> None:
    plain = tiny("vit", model=one_layer("vit"))
    recipe = recipes.changed(plain, {rung.key: rung.values(plain)[-1] for rung in budget.LADDER})
    model = meta_model.of_recipe(recipe, LABELS)
    for method in ("head", "recap"):
        assert profile.predict(model, recipe, method).peak_bytes > 0


def test_a_state_knows_which_budget_it_was_made_with(tmp_path: Path) -> None:
    state = init(tiny("vit"), tmp_path / "state")
    recipe = tiny("vit", finetune={"memory_budget": "1GB"})
    assert as_solved(recipe, state) == recipe
    assert State.open(tmp_path / "state").manifest.history[0].get("budget") is None


def test_what_a_user_sets_beside_a_budget_is_not_solved_once_more(tmp_path: Path) -> None:
    plain = tiny("vit", rounds=1, model=one_layer("vit"), prune={"steps": 1}, finetune={"steps": 1}, evaluate={"batch_size": 8})
    recipe = recipes.changed(plain, {"finetune.memory_budget": f"{budget_between(plain, 0.95)}B"})
    state = init(recipe, tmp_path / "state")
    first = state.manifest.history[0]["budget"]["changes"][0]
    said = recipes.changed(recipe, {first["key"]: first["before"]})
    state = run(said, tmp_path / "state", overridden={first["key"]})
    assert [dict(change["after"]) for change in state.manifest.changes] == [{first["key"]: first["before"]}]
    again = run(recipe_of(state), tmp_path / "state", overridden=None)  # as `recap run --state` does: the state's own recipe
    assert len(again.manifest.changes) == 1
