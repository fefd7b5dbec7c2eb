"""Models that nothing here was written for, by adapters of a few lines: checks, importance, methods, devices, what is told.

Whole rounds of them by RECAP are in test_algorithm.py (against the naive reference, I2 to I9) and test_invariants.py (I5).
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForSequenceClassification

import recap_cli
from recap_cli.api import TrainContext
from recap_cli.commands.tables import say_stage
from recap_cli.core.adapter import Heads, find_axes, resize
from recap_cli.core.axes import Axis, Cut, all_units, counts, mask_axes, shapes_of
from recap_cli.core.blocks import block_paths
from recap_cli.core.importance import group_scores
from recap_cli.core.method import RoundPlan
from recap_cli.core.streaming import streamed
from recap_cli.core.surgery import cut_model, indices
from recap_cli.errors import ConformanceError, SelectionError
from recap_cli.memory import fake_step, meta_model, predict
from recap_cli.memory.fake_step import Fakes
from recap_cli.models import build, conformance
from recap_cli.models.specs import ModelSpec
from recap_cli.plugins.adapters.swin import SWIN
from recap_cli.plugins.criteria.magnitude import MAGNITUDE
from recap_cli.plugins.criteria.taylor import TAYLOR
from recap_cli.plugins.methods.lora import targets
from recap_cli.plugins.methods.movement import MOVEMENT, SCORES, attach
from recap_cli.recipe.recipe import Recipe
from recap_cli.report.report import report
from recap_cli.rounds.layout import Layout
from recap_cli.rounds.run_context import Context
from recap_cli.stages.export import export
from recap_cli.stages.finetune import finetune
from recap_cli.stages.init import init
from recap_cli.stages.mask import mask
from recap_cli.stages.prune import prune
from recap_cli.stages.run import run
from recap_cli.state.store import State
from tests.core.test_importance import losses_of
from tests.memory.test_fake_step import real
from tests.pico import LABELS, pico
from tests.strange import ADAPTERS, STRANGE, register, strange
from tests.tiny import tiny

BLOCKS = {
    "llama-grouped": ["model.layers.0", "model.layers.1"],
    "albert": ["albert.encoder.albert_layer_groups.0.albert_layers.0"],
    "t5-encoder": [f"encoder.block.{block}" for block in (0, 1, 2)],
}
SWIN_BLOCKS = [f"swin.encoder.layers.{stage}.blocks.{block}" for stage in (0, 1) for block in (0, 1)]
TABLE = "attention.relative_position_bias.relative_position_bias_table"


@pytest.fixture(autouse=True)
def _strangers(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)


@pytest.mark.parametrize("name", STRANGE)
def test_i1_cutting_is_zeroing_and_the_controls_differ(name: str) -> None:
    model, spec = strange(name)
    found = conformance.check(model, ADAPTERS[name], spec)
    assert found.max_difference <= 1e-5
    assert found.control_difference > 1e-2
    assert found.coverage == []


@pytest.mark.parametrize("name", STRANGE)
def test_i12_streamed_scores_are_the_plain_scores_of_every_block(name: str) -> None:
    model, spec = strange(name)
    layout = Layout.of_model(ADAPTERS[name], model)
    blocks = block_paths(model, layout.axes)
    assert blocks == BLOCKS[name]
    for axes in (layout.axes, mask_axes(layout.axes, layout.whole)):
        assert block_paths(model, axes) == blocks
        plain = group_scores(model, axes, TAYLOR, losses_of(model, spec, data_of(spec)))
        with streamed(model, blocks, "cpu"):
            found = group_scores(model, axes, TAYLOR, losses_of(model, spec, data_of(spec)))
        for axis in axes:
            assert float(plain[axis.name].max()) > 0
            torch.testing.assert_close(found[axis.name], plain[axis.name], rtol=1e-4, atol=1e-9)


def test_what_heads_own_has_the_width_of_its_tensor() -> None:
    grouped = find_axes(ADAPTERS["llama-grouped"], strange("llama-grouped")[0])[0]
    assert (grouped.size, {cut.param.rpartition(".")[0][-6:]: cut.width for cut in grouped.cuts}) == (
        4,
        {"q_proj": 8, "k_proj": 4, "v_proj": 4, "o_proj": 8},
    )
    stages = find_axes(SWIN, pico("swin")[0])
    assert [(axis.layer, axis.kind, axis.size) for axis in stages] == [
        (layer, kind, size * of) for layer, size in enumerate([4, 4, 8, 8]) for kind, of in (("heads", 1), ("neurons", 8))
    ]
    assert {cut.width for axis in stages for cut in axis.cuts if cut.param.endswith(TABLE)} == {1}
    (one,) = [axis for axis in find_axes(ADAPTERS["t5-encoder"], strange("t5-encoder")[0]) if axis.kind == "heads"]
    assert (one.name, one.size, len(one.cuts)) == ("encoder.block.heads", 4, 3 * 4 + 1)
    albert = find_axes(ADAPTERS["albert"], strange("albert")[0])
    assert [axis.kind for axis in albert] == ["heads", "neurons"]  # of three layers, which are one


def test_what_cannot_be_trained_in_part_is_trained_whole_while_it_is_small() -> None:
    model, _ = pico("swin")
    layout = Layout.of_model(SWIN, model)
    blocks = [f"{block}.{TABLE}" for block in SWIN_BLOCKS]
    assert (layout.whole_trained, layout.whole_frozen) == (tuple(blocks[:3]), tuple(blocks[3:]))
    sizes = [model.get_parameter(name).numel() for name in blocks]
    prunable = sum(model.get_parameter(name).numel() for name in layout.shapes)
    assert sum(sizes[:3]) <= 0.01 * prunable < sum(sizes)
    t5 = Layout.of_model(ADAPTERS["t5-encoder"], strange("t5-encoder")[0])
    assert t5.whole_trained == ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",)
    assert {cut.param for axis in mask_axes(t5.axes, t5.whole) for cut in axis.cuts}.isdisjoint(t5.whole)
    for name in ("llama-grouped", "albert"):
        assert Layout.of_model(ADAPTERS[name], strange(name)[0]).whole == frozenset()


def finetuned(recipe: Recipe, path: Path) -> State:
    state = init(recipe, path)
    for stage in (prune, mask, finetune):
        stage(state)
    return state


def test_init_lists_what_is_whole_and_a_round_trains_or_freezes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = finetuned(tiny("swin", rounds=1), tmp_path / "state")
    say_stage(next(entry for entry in state.manifest.history if entry["stage"] == "init"))
    said = capsys.readouterr().err
    context = Context(state)
    for names, text in (
        (context.layout.whole_trained, "pruned, and trained whole beside the mask"),
        (context.layout.whole_frozen, "pruned, and frozen whole where a mask freezes anything"),
    ):
        assert names
        assert "".join(f"{text}: {', '.join(names)}".split()) in "".join(said.split())
    trained = set(context.state.load_tensors("round-001/trained.safetensors"))
    assert set(context.layout.whole_trained) <= trained
    assert trained.isdisjoint(context.layout.whole_frozen)
    plan = context.plan("round-001")
    for axis in context.layout.axes:
        table = f"{axis.name.removesuffix('.heads')}.{TABLE}"
        if axis.kind == "heads" and table in trained:
            found = context.state.load_tensors("round-001/trained.safetensors")[table]
            assert found.shape[1] == int(plan[axis.name].sum()) < axis.size


def test_without_a_mask_what_is_whole_is_trained_too(tmp_path: Path) -> None:
    context = Context(finetuned(tiny("swin", rounds=1, mask={"ratio": 0.0}), tmp_path / "state"))
    assert context.layout.whole <= set(context.state.load_tensors("round-001/trained.safetensors"))


@pytest.mark.parametrize(
    ("name", "weights"),
    [("llama-grouped", "bf16"), ("swin", "fp32"), ("swin", "int8"), ("t5-encoder", "int8"), ("albert", "bf16")],
)
def test_predicted_weights_are_those_that_are_held_to_the_byte(name: str, weights: str) -> None:
    recipe, fakes = tiny(name, finetune={"weights": weights}), Fakes()
    of_recipe = meta_model.of_recipe(recipe, LABELS)
    predicted = fakes.usage(predict.prepare(of_recipe, recipe, "recap", fakes.like)[0], "cpu")
    counted = fake_step.usage(predict.prepare(of_recipe, recipe, "recap", real)[0])
    for kind in ("weights", "gradients", "optimizer"):
        assert predicted.maxima[kind] == counted.maxima[kind], kind  # type: ignore[index]


@pytest.mark.parametrize(
    ("name", "method"),
    [("t5-encoder", "movement"), ("t5-encoder", "lora-ft"), ("llama-grouped", "movement"), ("swin", "movement")],
)
def test_other_methods_take_them(name: str, method: str, tmp_path: Path) -> None:
    every = {"options": {"targets": ["query", "key", "value", "output", "up", "down"]}} if method == "lora-ft" else {}
    state = run(tiny(name, method=method, **every), tmp_path / "state")
    out = export(state, tmp_path / "out")
    model = recap_cli.load(out["path"])
    best = state.load_tensors(f"{state.manifest.best['folder']}/model.safetensors")  # type: ignore[index]
    assert all(torch.equal(best[key], param) for key, param in model.named_parameters())
    assert report(state.path, tmp_path / "page.html").exists()


def test_a_decoder_of_grouped_queries_that_is_pruned_uniformly_opens_in_its_library(tmp_path: Path) -> None:
    state = run(tiny("llama-grouped", rounds=1, prune={"ratio": 0.5, "uniform": True}), tmp_path / "state")
    facts = export(state, tmp_path / "out")
    assert facts["form"] == "stock", facts["reason"]
    config = LlamaForSequenceClassification.from_pretrained(tmp_path / "out").config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 4)


def test_lora_finds_query_key_and_value_of_every_block_of_an_axis() -> None:
    model, _ = strange("t5-encoder")
    axes = find_axes(ADAPTERS["t5-encoder"], model)
    for place, layer in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "o")):
        assert targets(model, axes, [place]) == [f"encoder.block.{n}.layer.0.SelfAttention.{layer}" for n in (0, 1, 2)]


def data_of(spec: ModelSpec) -> list[tuple[dict[str, Tensor], Tensor]]:
    return [(build.example_batch(spec, batch=2 + i, seed=i), torch.arange(2 + i) % len(LABELS)) for i in range(2)]


def some_dropped(axes: list[Axis]) -> dict[str, Tensor]:
    plan = all_units(axes)
    for number, axis in enumerate(axes):
        plan[axis.name][number % axis.size] = False
    return plan


@pytest.mark.parametrize("name", STRANGE)
def test_gates_that_are_closed_are_groups_that_are_cut(name: str) -> None:
    (gated, spec), (small, _) = strange(name), strange(name)
    axes = find_axes(ADAPTERS[name], gated)
    plan, batch, forward = some_dropped(axes), build.example_batch(spec), build.forward(spec)
    context = TrainContext(gated, axes, (), (RoundPlan(0.4),), 1e-3, MOVEMENT.options, lambda _s, _k: plan)
    attach(context).before_step(0, 1, lambda _: torch.zeros(1))
    cut_model(small, indices(axes, plan, shapes_of(small.named_parameters())))
    resize(ADAPTERS[name], small, counts(plan))
    with torch.no_grad():
        torch.testing.assert_close(forward(gated, batch), forward(small, batch), rtol=1e-4, atol=1e-5)


def test_the_gradient_of_a_score_that_several_layers_share_is_the_sum_over_all_of_them() -> None:
    model, spec = strange("t5-encoder")
    axis = next(axis for axis in find_axes(ADAPTERS["t5-encoder"], model) if axis.kind == "heads")
    attach(TrainContext(model, [axis], (), (RoundPlan(0.4),), 1e-3, MOVEMENT.options, lambda _s, _k: {}))
    build.flat_outputs(spec, model, build.example_batch(spec)).square().sum().backward()
    weights = [model.get_parameter(f"encoder.block.{n}.layer.0.SelfAttention.o.weight") for n in (0, 1, 2)]
    products = [(w * w.grad).sum(0).view(axis.size, -1).sum(1) for w in weights if w.grad is not None]
    (scores,) = [param for name, param in model.named_parameters() if name.endswith(SCORES)]
    torch.testing.assert_close(scores.grad, sum(products), rtol=1e-3, atol=1e-6)


def test_a_kind_that_no_gradient_reaches_is_named_and_never_dropped_in_silence() -> None:
    model, spec = strange("llama-grouped")
    model.add_module("spare", nn.Linear(32, 4))
    axes = [*find_axes(ADAPTERS["llama-grouped"], model), Axis("spare.experts", "experts", 2, 4, (Cut("spare.weight", 0),))]
    with pytest.raises(SelectionError, match="the criterion 'taylor' ranks no experts: the loss has no gradient") as caught:
        group_scores(model, axes, TAYLOR, losses_of(model, spec, data_of(spec)), named="taylor")
    assert "magnitude" in str(caught.value.hint)
    assert set(group_scores(model, axes, MAGNITUDE, losses_of(model, spec, data_of(spec)))) == {axis.name for axis in axes}


LIES: dict[str, tuple[str, Any, str]] = {
    "a column that is no head's": (
        "swin",
        {"extra": (("layernorm_before.weight", 0), (TABLE, 0))},
        r"relative_position_bias_table of shape \(9, 4\) has no entries for each of 4 heads along dimension 0",
    ),
    "a dimension that is not there": (
        "swin",
        {"extra": ((TABLE, 2),)},
        r"has no entries for each of 4 heads along dimension 2",
    ),
    "a table that is not there": ("swin", {"extra": ()}, r"does not run .*the first to fail alone is swin\.encoder.*heads"),
    "heads that are not shared, and are": (
        "t5-encoder",
        {"shared": False},
        r"changes the logits .*the first to fail alone is encoder\.block\.0\.heads",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_table_that_lies_about_shapes_is_refused_before_there_is_a_state(lie: str) -> None:
    name, changes, problem = LIES[lie]
    model, spec = pico(name) if name == "swin" else strange(name)
    adapter = SWIN if name == "swin" else ADAPTERS[name]
    tables = tuple(replace(t, **changes) if isinstance(t, Heads) else t for t in adapter.tables)
    with pytest.raises(ConformanceError, match=problem) as caught:
        conformance.check(model, replace(adapter, tables=tables), spec)
    assert caught.value.exit_code == 6


GROUPED = {"k": 4, "v": 4, "q": 8, "o": 8}  # the width of each of its cuts


@pytest.mark.parametrize("wrong", [{"k": 2}, {"q": 4, "o": 4}, {"v": 8}, {"k": 0}, {"k": "4"}, {"k": -4}])
def test_a_function_that_lies_about_widths_is_refused_by_name(wrong: dict[str, Any]) -> None:
    model, spec = strange("llama-grouped")
    plain = ADAPTERS["llama-grouped"]

    def axes(model: nn.Module) -> list[Axis]:
        return [
            replace(axis, cuts=tuple(replace(cut, width=(GROUPED | wrong)[cut.param.split(".")[-2][0]]) for cut in axis.cuts))
            if axis.kind == "heads"
            else axis
            for axis in find_axes(plain, model)
        ]

    with pytest.raises(ConformanceError, match="heads") as caught:
        conformance.check(model, replace(plain, axes=axes, resize=lambda *_: None), spec)
    assert caught.value.exit_code == 6
