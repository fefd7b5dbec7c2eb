"""Predictions of whole recipes and states: a state's own plan and mask, grids, blocks, and what an outline is made of."""

from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from recap_cli.core.axes import counts
from recap_cli.core.method import RoundPlan
from recap_cli.data.sampling import batches
from recap_cli.errors import ConformanceError, ModelError, RecipeError
from recap_cli.memory import fake_step, meta_model, predict
from recap_cli.memory.fake_step import Fakes, Step
from recap_cli.memory.predict import Prediction
from recap_cli.memory.tracker import KINDS, Kind, Usage
from recap_cli.recipe import recipe as recipes
from recap_cli.rounds.run_context import Context
from recap_cli.rounds.settings import recipe_of
from recap_cli.rounds.small_model import SmallModel, in_dtype, placement_of
from recap_cli.rounds.trainer import make_trainer
from recap_cli.stages.init import init
from recap_cli.stages.mask import mask
from recap_cli.stages.prune import prune
from recap_cli.stages.run import run
from recap_cli.state.store import State
from tests.pico import LABELS, logits_for
from tests.tiny import tiny

NEAR = 0.01
SETTINGS: list[dict[str, Any]] = [
    {},
    {"checkpointing": True, "fused_backward": True, "weights": "bf16"},
    {"micro_batch_size": 2, "offload": True, "weights": "int8"},
]


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> State:
    """A state whose `mask` is done, whose layers have lost different shares."""
    state = init(tiny("vit", prune={"scope": "global"}, mask={"scope": "global"}), tmp_path_factory.mktemp("state") / "vit")
    for stage in (prune, mask):
        stage(state)
    return state


def step_of(state: State, settings: dict[str, Any]) -> Step:
    """The step that `finetune` would take in a state, with its weights and data."""
    context = Context(state)
    context.recipe = recipes.changed(context.recipe, {f"finetune.{key}": value for key, value in settings.items()})
    tune, plan = context.recipe.finetune, context.plan("round-001")
    model = context.model(context.small("round-001", plan), counts(plan))
    small = SmallModel(model, context.layout, context.round_plans[0], plan, context.mask("round-001", plan))
    optimizer = make_trainer(context, 1, small, torch.device("cpu")).optimizer
    call = logits_for(context.spec)
    forward = in_dtype(lambda inputs: call(model, inputs), placement_of(tune).dtype)
    batch = next(
        iter(batches(context.splits(lambda items, *_: iter(items))[0], torch.arange(8), 8, device=torch.device("cpu")))
    )
    task = context.objective.task
    return Step(model.train(), optimizer, forward, task, batch, tune.micro_batch_size, tune.fused_backward, tune.offload)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: ",".join(settings) or "plain")
def test_a_prediction_for_a_state_is_the_step_that_finetune_takes_there(settings: dict[str, Any], masked: State) -> None:
    recipe = recipe_of(masked, [f"finetune.{key}={str(value).lower()}" for key, value in settings.items()])
    model = meta_model.of_state(Context(masked))
    assert model.plan is not None
    assert model.mask is not None
    predicted = predict.predict(model, recipe, "recap", kernels="cpu")
    step = step_of(masked, settings)
    assert predicted.trainable == sum(trainable.grad_param.numel() for trainable in step.optimizer.trainables)
    real = fake_step.usage(step)
    assert predicted.usage.peak_bytes == pytest.approx(real.peak_bytes, rel=NEAR)
    kinds: tuple[Kind, ...] = ("weights", "gradients", "optimizer")
    for kind in kinds:
        assert predicted.usage.maxima[kind] == pytest.approx(real.maxima[kind], rel=NEAR)


def test_a_state_without_a_plan_is_predicted_as_its_recipe(masked: State, tmp_path: Path) -> None:
    recipe = tiny("vit")
    state = init(recipe, tmp_path / "state")
    first = meta_model.of_state(Context(state))
    assert (first.plan, first.mask) == (None, None)
    even = predict.predict(meta_model.of_recipe(recipe, LABELS), recipe, "recap")
    assert predict.predict(first, recipe, "recap") == even
    prune(state)
    second = meta_model.of_state(Context(state))
    assert second.plan is not None
    assert second.mask is None


@pytest.mark.parametrize(
    ("name", "settings"), [("vit", {}), ("bert", {"fused_backward": True, "checkpointing": True})], ids=["plain", "lean"]
)
def test_three_micro_batches_stand_for_all(name: str, settings: dict[str, Any]) -> None:
    recipe = tiny(name, finetune={"batch_size": 10, "micro_batch_size": 2, **settings})
    model, fakes = meta_model.of_recipe(recipe, LABELS), Fakes()
    predicted = predict.predict(model, recipe, "recap").usage
    whole = fakes.usage(predict.prepare(model, recipe, "recap", fakes.like)[0])
    assert (predicted.at_peak, predicted.maxima) == (whole.at_peak, whole.maxima)
    assert sum(predicted.by_module[""].values()) == sum(whole.by_module[""].values())


def test_a_model_larger_than_the_machine_is_predicted_without_its_memory() -> None:
    huge = {"hidden_size": 8192, "intermediate_size": 32768, "num_attention_heads": 64}
    recipe = tiny("vit", model={"config": {**(tiny("vit").model.config or {}), **huge}})
    before = psutil.Process().memory_info().rss
    found = predict.predict(meta_model.of_recipe(recipe, LABELS), recipe, "full")
    assert psutil.Process().memory_info().rss - before < 200e6
    assert found.total > 1.6e9
    assert found.usage.peak_bytes > 16 * found.total


def test_grids_have_a_row_for_each_setting_that_means_something(monkeypatch: pytest.MonkeyPatch) -> None:
    usage, recipe = Usage({}, {}), tiny("vit", finetune={"micro_batch_size": 4})
    monkeypatch.setattr(
        predict, "predict", lambda _, recipe, method: Prediction(method, recipe, (RoundPlan(),), usage, 0, 0, 0, 0, 1)
    )
    rows = predict.grid(meta_model.of_recipe(recipe, LABELS), recipe, ["full", "recap"], [2, 6], [0.0, 0.4])
    settings = [(row.recipe.finetune.batch_size, row.recipe.prune.ratio if row.method == "recap" else 0.0) for row in rows]
    assert [(row.method, *setting) for row, setting in zip(rows, settings, strict=True)] == [
        ("full", 2, 0.0),
        ("full", 6, 0.0),
        ("recap", 2, 0.0),
        ("recap", 2, 0.4),
        ("recap", 6, 0.0),
        ("recap", 6, 0.4),
    ]
    assert {row.recipe.finetune.micro_batch_size for row in rows} == {None}
    with pytest.raises(RecipeError, match=r"prune\.floor"):
        predict.grid(meta_model.of_recipe(recipe, LABELS), recipe, ["recap"], [], [0.9])


def test_a_grid_of_ratios_leaves_a_states_own_plan_out(masked: State) -> None:
    recipe, model = recipe_of(masked), meta_model.of_state(Context(masked))
    (own,) = predict.grid(model, recipe, ["recap"])
    (even,) = predict.grid(model, recipe, ["recap"], [], [recipe.prune.ratio])
    assert own.trainable != even.trainable
    assert even == predict.predict(meta_model.of_recipe(recipe, LABELS), recipe, "recap")


@pytest.mark.parametrize("name", ["vit", "bert", "distilbert", "timm-vit"])
def test_blocks_stand_in_their_order_and_make_up_the_peak(name: str) -> None:
    recipe = tiny(name)
    model = meta_model.of_recipe(recipe, LABELS)
    found = predict.predict(model, recipe, "recap")
    blocks = predict.by_block(model, found.usage)
    names = list(blocks)
    inner = [place for place, block in enumerate(names) if block.endswith((".0", ".1"))]
    assert inner == list(range(inner[0], inner[0] + 2))
    assert names[-1] == "outside"
    assert sum(sum(kinds.values()) for kinds in blocks.values()) == found.usage.peak_bytes
    assert {kind: sum(kinds[kind] for kinds in blocks.values()) for kind in KINDS} == found.usage.at_peak


def test_a_model_without_layers_is_refused() -> None:
    recipe = tiny("vit", model={"config": {**(tiny("vit").model.config or {}), "num_hidden_layers": 0}})
    with pytest.raises(ConformanceError, match="'vit' does not describe this model") as caught:
        meta_model.of_recipe(recipe, LABELS)
    assert "number of layers" in str(caught.value.hint)


def test_a_model_type_without_an_adapter_is_refused() -> None:
    with pytest.raises(ModelError, match="swinv2"):
        meta_model.of_recipe(tiny("vit", model={"config": {"model_type": "swinv2"}}), LABELS)


def test_labels_come_from_data_that_are_here(tmp_path: Path) -> None:
    assert meta_model.labels_of(tiny("vit")) == (LABELS, [])
    names, notes = meta_model.labels_of(tiny("vit", data={"train": str(tmp_path / "none")}))
    assert (names, len(notes)) == ([], 1)
    assert "the data are not here" in notes[0]
    (tmp_path / "empty").mkdir()
    names, notes = meta_model.labels_of(tiny("vit", data={"train": str(tmp_path / "empty")}))
    assert names == []
    assert notes[0].startswith("the data cannot be read")


def test_a_state_in_its_last_round_is_predicted_by_the_round_that_held_most(tmp_path: Path) -> None:
    one = {"steps": 1, "fused_backward": True, "batch_size": 1}  # no part of it is smaller
    recipe = tiny("vit", rounds=4, importance={"batches": 1}, finetune=one)
    state = run(recipe, tmp_path / "state")
    of_state = predict.predict(meta_model.of_state(Context(state)), recipe, "recap")
    of_recipe = predict.predict(meta_model.of_recipe(recipe, LABELS), recipe, "recap")
    assert (
        of_state.round_plans[0] == of_recipe.round_plans[0] == Context(state).round_plans[0]
    )  # pruned least, and so with most activations
    assert of_state.peak_bytes == of_recipe.peak_bytes
