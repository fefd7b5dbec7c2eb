"""I1 on every pico model, and adapters that are wrong in every way we could think of, each distinguished from a right one."""

from dataclasses import replace
from importlib.metadata import entry_points

import pytest
import torch
from torch import nn

from recap_cli.core.adapter import Adapter, find_axes
from recap_cli.core.axes import Axis, Cut
from recap_cli.errors import ConformanceError, ModelError, PluginError
from recap_cli.models import build, conformance, create
from recap_cli.plugins.adapters.bert import BERT
from recap_cli.plugins.adapters.timm_vit import FUSED, TIMM_VIT
from recap_cli.plugins.adapters.vit import DINOV2, VIT
from tests.pico import PICO, pico, source_for
from tests.segmentation import CONFIGS


def ours() -> list[str]:
    return sorted(point.name for point in entry_points(group="recap.adapters") if point.dist and point.dist.name == "recap-cli")


@pytest.mark.parametrize("name", ours())
def test_every_adapter_of_ours_has_a_pico_model(name):
    assert name in {make().model_type for make in PICO.values()} | set(CONFIGS)


@pytest.mark.parametrize("name", PICO)
def test_cutting_is_zeroing_and_the_controls_differ(name):
    model, spec = pico(name)
    report = conformance.check(model, build.adapter_of(spec), spec)
    assert report.max_difference <= 1e-5
    assert report.control_difference > 1e-2
    assert report.coverage == (["swin.encoder.layers.0.downsample.reduction"] if name == "swin" else [])
    assert [axis.kind for axis in report.axes] == ["heads", "neurons"] * (4 if name == "swin" else 2)
    assert [line.partition(":")[0] for line in report.found] == ["heads", "neurons"]


def test_the_model_and_the_random_numbers_are_left_as_they_were():
    model, spec = pico("deit")
    before, state = {name: t.clone() for name, t in build.tensors_of(model).items()}, torch.get_rng_state()
    conformance.check(model.train(), build.adapter_of(spec), spec)
    assert all(torch.equal(t, before[name]) for name, t in build.tensors_of(model).items())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


def test_a_random_plan_keeps_and_drops_of_every_axis():
    axes = [Axis(f"a{size}", "heads", 0, size, ()) for size in (1, 2, 3, 12, 500)]
    plan = conformance.random_plan(axes)
    assert plan["a1"].tolist() == [True]
    for axis in axes[1:]:
        assert 0 < int(plan[axis.name].sum()) < axis.size
    assert 150 < int(plan["a500"].sum()) < 350


def made(library: str, **config: object) -> create.Created:
    return create.create_model(source_for("image-classification", library, config=config, label_names=["a", "b"]))


TINY = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "num_hidden_layers": 2, "patch_size": 8}
TIMM = {"architecture": "vit_tiny_patch16_224", "img_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 4}


@pytest.mark.parametrize(
    ("created", "problem"),
    [
        (("transformers", {"model_type": "vit", **TINY, "image_size": 1}), r"does not run at images of 1 × 1 pixels \("),
        (("timm", {**TIMM, "img_size": 1}), r"does not run at images of 1 × 1 pixels \("),
        (("transformers", {"model_type": "vit", **TINY, "num_hidden_layers": 0}), r"no layers \(num_hidden_layers is 0\)"),
        (("timm", {**TIMM, "depth": 0}), r"no layers \(depth is 0\)"),
    ],
)
def test_a_model_that_does_not_run_by_itself_is_not_the_adapters_fault(created, problem):
    library, config = created
    model, spec = made(library, **config)[:2]
    with pytest.raises(ModelError, match=problem) as caught:
        conformance.check(model, build.adapter_of(spec), spec)
    assert caught.value.exit_code == 5
    assert caught.value.hint


def refused(match: str, adapter: Adapter, name: str) -> str:
    model, spec = pico(name)
    with pytest.raises(ConformanceError, match=match) as caught:
        conformance.check(model, adapter, spec)
    assert caught.value.exit_code == 6
    assert spec.model_type in caught.value.message
    return caught.value.message


def without(adapter: Adapter, dropped: str) -> Adapter:
    """The adapter with the cuts of one parameter forgotten."""

    def axes(model: nn.Module) -> list[Axis]:
        return [replace(a, cuts=tuple(c for c in a.cuts if not c.param.endswith(dropped))) for a in find_axes(adapter, model)]

    return replace(adapter, axes=axes, resize=lambda model, sizes: None)


@pytest.mark.parametrize("dropped", ["q_proj.weight", "q_proj.bias", "o_proj.weight", "fc1.bias"])
def test_a_forgotten_cut_is_found_and_its_axis_named(dropped):
    kind = "neurons" if dropped.startswith("fc") else "heads"
    refused(
        rf"does not run .*; the first to fail alone is vit\.layers\.0\.{kind} \(.*weight along dimension 0",
        without(VIT, dropped),
        "vit",
    )


def shifted(model: nn.Module) -> list[Axis]:
    """The heads in the fused matrix as if key came before query by half a head: everything fits, and everything is wrong."""
    return [
        replace(axis, size=axis.size * 2, cuts=tuple(replace(cut, width=cut.width // 2) for cut in axis.cuts))
        if axis.kind == "heads"
        else axis
        for axis in find_axes(TIMM_VIT, model)
    ]


def test_heads_of_the_wrong_width_are_found():
    refused("heads", replace(TIMM_VIT, axes=shifted, resize=lambda *_: None), "timm-vit")


def test_rows_and_columns_that_do_not_belong_together_are_found():
    other = {"vit.layers.1.neurons": 0, "vit.layers.0.neurons": 1}  # the rows of one layer, the columns of the other

    def swapped(axis: Axis) -> Axis:
        return replace(axis, cuts=(*axis.cuts[:2], Cut(f"vit.layers.{other[axis.name]}.mlp.fc2.weight", 1)))

    def axes(model: nn.Module) -> list[Axis]:
        return [swapped(axis) if axis.name in other else axis for axis in find_axes(VIT, model)]

    refused(r"does not run|changes the logits", replace(VIT, axes=axes), "vit")


def test_counts_that_are_not_made_true_are_found():
    tables = (replace(FUSED, width=()), *TIMM_VIT.tables[1:])
    message = refused("with groups cut out, it does not run", replace(TIMM_VIT, tables=tables), "timm-vit")
    assert "the first to fail alone is blocks.0.heads" in message


def test_an_axis_without_a_part_in_the_output_is_found_by_the_controls():
    def axes(model: nn.Module) -> list[Axis]:
        return [Axis("mask", "heads", 0, 4, (Cut("dinov2.embeddings.mask_token", 1, 8),))]

    refused("they do not affect the output", replace(DINOV2, axes=axes, embeddings=()), "dinov2")


def test_cuts_that_do_not_fit_are_listed():
    def axes(model: nn.Module) -> list[Axis]:
        return [Axis("a", "heads", 0, 5, (Cut("classifier.weight", 1, 8), Cut("nowhere.weight", 0, 8)))]

    refused(
        r"a: classifier\.weight has 32 entries .* wants 0…40; a: there is no parameter nowhere\.weight",
        replace(VIT, axes=axes),
        "vit",
    )


def test_the_head_and_the_embeddings_are_not_to_be_pruned():
    refused("is pruned, but belongs to the head or the embeddings", replace(VIT, embeddings=("*.mlp.*",)), "vit")
    refused(r"no parameter is named like its head \(score\.\*\)", replace(VIT, head=("score.*",)), "vit")


def test_a_table_for_another_model_says_what_it_looked_for():
    refused(r"no heads found: no module is named like \*\*encoder\.layer\.\*", BERT, "vit")


def test_matrices_that_no_axis_touches_are_reported():
    model, _ = pico("bert")
    axes = find_axes(BERT, model)
    model.bert.encoder.layer[1].add_module(
        "crossattention", nn.ModuleDict({"query": nn.Linear(32, 32), "norm": nn.LayerNorm(32)})
    )
    assert conformance.coverage(model, axes) == ["bert.encoder.layer.1.crossattention.query"]
    without_neurons = [axis for axis in axes if axis.kind == "heads"]
    assert "bert.encoder.layer.0.output.dense" in conformance.coverage(model, without_neurons)
    assert "bert.pooler.dense" not in conformance.coverage(model, without_neurons)


def test_a_block_of_another_kind_among_the_others_is_reported():
    model, spec = pico("timm-vit")
    model.blocks[1].mlp = nn.Linear(32, 32)
    report = conformance.check(model, TIMM_VIT, spec)
    assert report.coverage == ["blocks.1.mlp"]
    assert len(report.axes) == 3


def touching(model: nn.Module, sizes: dict[str, int]) -> None:
    with torch.no_grad():
        model.get_parameter("vit.layernorm.weight").mul_(2)


def leaving(*_: object) -> list[Axis]:
    raise SystemExit(4)


def not_known(model: nn.Module) -> list[Axis]:
    raise LookupError("no blocks here")


@pytest.mark.parametrize(
    ("functions", "kind", "problem"),
    [
        ({"resize": touching}, PluginError, "the adapter 'vit' has written to vit.layernorm.weight"),
        ({"resize": leaving}, PluginError, "the adapter 'vit' failed: SystemExit: 4"),
        ({"resize": lambda *_: 1 / 0}, PluginError, "the adapter 'vit' failed: ZeroDivisionError"),
        ({"axes": leaving}, PluginError, "the adapter 'vit' failed: SystemExit: 4"),
        ({"axes": not_known}, ConformanceError, "the adapter 'vit' does not describe this ViT.*: no blocks here"),
    ],
)
def test_the_functions_of_an_adapter_can_fail_in_no_way_of_their_own(monkeypatch, functions, kind, problem):
    model, spec = pico("vit")
    monkeypatch.setattr(build.registry, "load", lambda *_: replace(VIT, **functions))
    with pytest.raises(kind, match=problem):
        conformance.check(model, build.adapter_of(spec), spec)
