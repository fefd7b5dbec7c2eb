"""Models of semantic segmentation: what is found, and that cutting, streaming and training in part are right for each."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from recap_cli import registry
from recap_cli.core.adapter import find_axes, matches
from recap_cli.core.axes import Axis, check_axes, counts, mask_axes, shapes_of, shrink, unit_params
from recap_cli.core.blocks import block_paths
from recap_cli.core.criterion import Criterion
from recap_cli.core.importance import group_scores
from recap_cli.core.ranking import select
from recap_cli.core.streaming import streamed
from recap_cli.core.surgery import gather, indices, take
from recap_cli.errors import ModelError
from recap_cli.models import build, conformance, transformers_models
from recap_cli.models.checkpoints import LoadReport, quiet
from recap_cli.models.recomputing import enable_checkpointing
from recap_cli.rounds.layout import Layout
from recap_cli.trainable.build import make_partial
from recap_cli.trainable.neuron_order import bring_forward
from tests.segmentation import CONFIGS, LABELS, VARIANTS, segmenter, spec_of

NAMES = [*CONFIGS, *VARIANTS]
Sizes = dict[str, int]  # axis name → units


def stages(stem: str, heads: list[int], neurons: list[int]) -> Sizes:
    """The axes of one block in each stage."""
    named = [(stem.format(i), h, n) for i, (h, n) in enumerate(zip(heads, neurons, strict=True))]
    return {f"{block}.{kind}": size for block, h, n in named for kind, size in (("heads", h), ("neurons", n)) if size}


SWIN = ([2, 2, 4, 4], [16, 32, 64, 128])
EXPECTED: dict[str, Sizes] = {
    "segformer": {
        "segformer.stages.0.blocks.0.heads": 2,
        "segformer.stages.0.blocks.0.neurons": 16,
        "segformer.stages.1.blocks.0.heads": 4,
        "segformer.stages.1.blocks.0.neurons": 32,
        "segformer.stages.1.blocks.1.heads": 4,
        "segformer.stages.1.blocks.1.neurons": 32,
    },
    "dpt": stages("dpt.encoder.layer.{}", [4] * 2, [24] * 2),
    "beit": stages("beit.layers.{}", [4] * 4, [24] * 4),
    "data2vec-vision": stages("data2vec_vision.encoder.layer.{}", [4] * 4, [24] * 4),
    "upernet": stages("backbone.swin.encoder.layers.{}.blocks.0", *SWIN),
    "eomt": stages("layers.{}", [4, 0], [32, 32]),
    "mask2former": {
        **stages("model.pixel_level_module.encoder.swin.encoder.layers.{}.blocks.0", *SWIN),
        "model.pixel_level_module.decoder.encoder.layers.0.neurons": 24,
        **stages("model.transformer_module.decoder.layers.{}", [0, 0], [40, 40]),
    },
    "maskformer": {
        **stages("model.pixel_level_module.encoder.model.encoder.layers.{}.blocks.0", *SWIN),
        "model.transformer_module.decoder.layers.0.self_attn.heads": 4,
        "model.transformer_module.decoder.layers.0.encoder_attn.heads": 4,
        "model.transformer_module.decoder.layers.1.self_attn.heads": 4,
        "model.transformer_module.decoder.layers.1.encoder_attn.heads": 4,
        **stages("model.transformer_module.decoder.layers.{}", [0, 0], [40, 40]),
    },
    "oneformer": {
        **stages("model.pixel_level_module.encoder.swin.encoder.layers.{}.blocks.0", *SWIN),
        "model.pixel_level_module.decoder.encoder.layers.0.neurons": 24,
        **stages("model.transformer_module.decoder.layers.{}", [0, 0], [40, 40]),
        "model.transformer_module.decoder.query_transformer.decoder.layers.0.neurons": 40,
    },
    "beit, shared": {"beit.layers.heads": 4, **stages("beit.layers.{}", [0] * 4, [24] * 4)},
    "data2vec-vision, shared": {
        "data2vec_vision.encoder.layer.heads": 4,
        **stages("data2vec_vision.encoder.layer.{}", [0] * 4, [24] * 4),
    },
    "upernet, ConvNeXt": stages("backbone.encoder.stages.{}.layers.0", [0] * 4, [32, 32, 64, 64]),
    "eomt, SwiGLU": stages("layers.{}", [4, 0], [24, 24]),
}
WHOLE = {  # the matrices of blocks that no axis touches, by what is in their names
    "segformer": {"patch_embeddings.proj", "sequence_reduction.sequence_reduction"},
    "upernet": {"downsample.reduction"},
    "upernet, ConvNeXt": {"dwconv", "downsampling_layer"},
    "eomt": {"layers.1.attention"},
    "eomt, SwiGLU": {"layers.1.attention"},
    "mask2former": {"downsample.reduction", "self_attn", "cross_attn"},
    "maskformer": {"downsample.reduction"},
    "oneformer": {"downsample.reduction", "self_attn", "cross_attn", "multihead_attn"},
}
HEAD = {  # the first parts of the names of what a task may make new
    "segformer": {"decode_head"},
    "dpt": {"neck", "head", "auxiliary_head"},
    "beit": {"fpn", "decode_head", "auxiliary_head"},
    "data2vec-vision": {"fpn1", "fpn2", "decode_head", "auxiliary_head"},
    "upernet": {"backbone", "decode_head", "auxiliary_head"},
    "upernet, ConvNeXt": {"backbone", "decode_head", "auxiliary_head"},
    "eomt": {"class_predictor"},
    "mask2former": {"class_predictor"},
    "maskformer": {"class_predictor"},
    "oneformer": {"model", "criterion"},
}
EXPECTED_BLOCKS = {  # those with other blocks than their axes' names say
    "beit, shared": [f"beit.layers.{i}" for i in range(4)],
    "data2vec-vision, shared": [f"data2vec_vision.encoder.layer.{i}" for i in range(4)],
    "maskformer": [
        *(f"model.pixel_level_module.encoder.model.encoder.layers.{i}.blocks.0" for i in range(4)),
        *(f"model.transformer_module.decoder.layers.{i}" for i in range(2)),
    ],
}
IDLE = {  # what has no gradient in a model with zero biases
    "beit": "layers.3.",  # nothing reads the last layer
    "data2vec-vision": "layer.3.",
    "maskformer": "decoder.layers.0.self_attn.",  # it attends to zeros
}


def prepared(name: str) -> tuple[nn.Module, list[Axis], build.ModelSpec]:
    model, spec = segmenter(name)
    return model, find_axes(build.adapter_of(spec), model), spec


def loss_of(spec: build.ModelSpec, model: nn.Module) -> Tensor:
    """A mean over all that the model gives, each tensor weighted so that no symmetry hides a wrong gradient."""
    out = tree_leaves(build.forward(spec)(model, build.example_batch(spec)))
    floats = [leaf.flatten() for leaf in out if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return torch.stack([(leaf + torch.linspace(0, 0.1, len(leaf))).square().mean() for leaf in floats]).sum()


@pytest.mark.parametrize("name", NAMES)
def test_heads_and_neurons_are_found_where_they_can_be_cut(name: str) -> None:
    model, axes, _ = prepared(name)
    assert {axis.name: axis.size for axis in axes} == EXPECTED[name]
    assert check_axes(axes, shapes_of(model.named_parameters())) == []
    blocks = EXPECTED_BLOCKS.get(name) or list(dict.fromkeys(axis.rpartition(".")[0] for axis in EXPECTED[name]))
    assert sorted(block_paths(model, axes)) == sorted(blocks)


@pytest.mark.parametrize("name", NAMES)
def test_cutting_is_zeroing_in_all_outputs_and_the_controls_differ(name: str) -> None:
    model, _, spec = prepared(name)
    report = conformance.check(model, build.adapter_of(spec), spec)
    assert report.max_difference <= 1e-5
    assert report.control_difference > 1e-2
    whole = WHOLE.get(name, set())
    assert {part for part in whole if any(part in path for path in report.coverage)} == whole
    assert [path for path in report.coverage if not any(part in path for part in whole)] == []


@pytest.mark.parametrize("name", NAMES)
def test_a_head_and_embeddings_are_found_and_apart(name: str) -> None:
    model, axes, spec = prepared(name)
    adapter = build.adapter_of(spec)
    head, embeddings = build.head_names(adapter, model), build.embedding_names(adapter, model)
    assert {name.partition(".")[0] for name in head} == HEAD[name if name in HEAD else spec.model_type]
    assert all("hidden_states_norms" in name for name in head if name.startswith("backbone"))
    assert all(".class_embed." in name for name in head if name.startswith("model"))
    assert all("embeddings" in name for name in embeddings)
    assert embeddings
    assert not set(head) & set(embeddings)
    assert not {cut.param for axis in axes for cut in axis.cuts} & {*head, *embeddings}


@pytest.mark.parametrize("name", NAMES)
def test_a_pruned_model_is_put_together_from_its_tensors(name: str) -> None:
    model, axes, spec = prepared(name)
    plan, tensors = conformance.random_plan(axes), build.tensors_of(model)
    small = gather(tensors, indices(axes, plan, shapes_of(tensors)))
    made = build.assemble(spec, small, build.adapter_of(spec), counts(plan))
    assert {axis.name: axis.size for axis in find_axes(build.adapter_of(spec), made)} == counts(plan)
    assert loss_of(spec, made).isfinite()
    for module in made.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels // module.groups)
    assert check_axes(shrink(axes, plan), shapes_of(small)) == []


@pytest.mark.parametrize("name", NAMES)
def test_streamed_scores_are_those_of_the_plain_model(name: str) -> None:
    model, axes, spec = prepared(name)
    criterion = registry.load("criteria", "taylor")
    assert isinstance(criterion, Criterion)

    def losses(each: bool) -> Iterator[tuple[Tensor, float]]:
        yield loss_of(spec, model), 1.0

    plain = group_scores(model, axes, criterion, losses)
    with streamed(model, block_paths(model, axes), "cpu"):
        found = group_scores(model, axes, criterion, losses)
    reached = [axis.name for axis in axes if plain[axis.name].any()]
    for axis in axes:
        torch.testing.assert_close(found[axis.name], plain[axis.name], rtol=1e-4, atol=1e-12)
    idle = IDLE.get(spec.model_type, "nothing")
    assert [axis.name for axis in axes if axis.name not in reached and idle not in axis.name] == []


@pytest.mark.parametrize("name", NAMES)
def test_groups_of_stages_of_other_width_compete_by_importance_per_parameter(name: str) -> None:
    model, axes, _ = prepared(name)
    shapes = shapes_of(model.named_parameters())
    sizes = {axis.name: unit_params(axis, shapes) for axis in axes}
    scores = {axis.name: torch.rand(axis.size) * sizes[axis.name] for axis in axes}
    original = {axis.name: axis.size for axis in axes}
    kept = select(axes, scores, sizes, original=original, keep_share=0.5)
    for kind in {axis.kind for axis in axes}:
        of_kind = [axis for axis in axes if axis.kind == kind]
        share = sum(int(kept[a.name].sum()) * sizes[a.name] for a in of_kind) / sum(a.size * sizes[a.name] for a in of_kind)
        assert share == pytest.approx(0.5, abs=0.15)  # half a group of so few


@pytest.mark.parametrize("name", NAMES)
def test_a_model_trainable_in_part_has_the_dense_gradients_at_the_chosen_entries(name: str) -> None:
    model, _, spec = prepared(name)
    layout = Layout.of_model(build.adapter_of(spec), model)
    generator = torch.Generator().manual_seed(1)
    axes = mask_axes(layout.axes, layout.whole)
    mask = {axis.name: torch.rand(axis.size, generator=generator) < 0.4 for axis in axes}
    forward = bring_forward(model, layout.axes, mask, indices(axes, mask, layout.shapes))
    dense = copy.deepcopy(model)
    trainables = make_partial(model, forward, frozen=lambda n: n in layout.embeddings or n in layout.whole_frozen)
    loss, expected = loss_of(spec, model), loss_of(spec, dense)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()  # type: ignore[no-untyped-call]
    named = dict(dense.named_parameters())
    assert {t.name for t in trainables if forward.get(t.name)} >= {cut.param for axis in axes for cut in axis.cuts}
    assert not {t.name for t in trainables} & set(layout.whole_frozen)
    for trainable in trainables:
        grad, wanted = trainable.grad_param.grad, named[trainable.name].grad
        assert (grad is None) == (wanted is None), trainable.name
        if grad is not None and wanted is not None:
            torch.testing.assert_close(grad, take(wanted, forward.get(trainable.name, {})), rtol=1e-3, atol=1e-6)


def test_a_depthwise_convolution_is_no_part_of_a_mask() -> None:
    model, _, spec = prepared("segformer")
    layout = Layout.of_model(build.adapter_of(spec), model)
    convolutions = {name for name in layout.shapes if ".dwconv." in name}
    assert layout.whole == convolutions
    assert len(convolutions) == 2 * 3
    assert {name for name in layout.whole_trained if name.endswith("weight")} == set()  # larger than 1 % of what is pruned
    assert not {cut.param for axis in mask_axes(layout.axes, layout.whole) for cut in axis.cuts} & convolutions


def saved_bytes(spec: build.ModelSpec, model: nn.Module) -> tuple[int, dict[str, Tensor | None]]:
    """What the forward keeps for its backward, each storage once, and the gradients."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    for module in model.train().modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if getattr(module, "dropout", None) == 0.1:  # of MaskFormer's decoder, which draws by itself
            module.dropout = 0.0  # type: ignore[assignment]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(spec, model)
    total = sum(kept.values())
    loss.backward()  # type: ignore[no-untyped-call]
    return total, {name: param.grad for name, param in model.named_parameters()}


@pytest.mark.parametrize("name", ["segformer", "upernet", "mask2former", "maskformer", "oneformer"])
def test_what_refuses_to_recompute_as_a_whole_recomputes_its_backbone(name: str) -> None:
    model, spec = segmenter(name)
    plain_bytes, plain = saved_bytes(spec, model)
    model, _ = segmenter(name)
    enable_checkpointing(model)
    recomputed_bytes, gradients = saved_bytes(spec, model)
    assert recomputed_bytes < 0.8 * plain_bytes
    for param, grad in plain.items():
        torch.testing.assert_close(gradients[param], grad, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["mask2former", "oneformer", "eomt", "upernet, ConvNeXt"])
def test_blocks_that_no_switch_reaches_are_recomputed_one_by_one(name: str) -> None:
    model, spec = segmenter(name)
    plain_bytes, plain = saved_bytes(spec, model)
    by_library, _ = segmenter(name)
    if name in ("mask2former", "oneformer"):
        enable_checkpointing(by_library)
    library_bytes, _ = saved_bytes(spec, by_library)
    model, _ = segmenter(name)
    enable_checkpointing(model, lambda: block_paths(model, find_axes(build.adapter_of(spec), model)))
    recomputed_bytes, gradients = saved_bytes(spec, model)
    assert recomputed_bytes < 0.95 * min(library_bytes, plain_bytes)
    for param, grad in plain.items():
        torch.testing.assert_close(gradients[param], grad, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["eomt", "upernet, ConvNeXt"])
def test_a_model_of_which_no_part_can_recompute_is_an_error(name: str) -> None:
    model, _ = segmenter(name)
    with pytest.raises(ModelError, match="cannot recompute its activations") as caught:
        enable_checkpointing(model)
    assert caught.value.hint == "--set finetune.checkpointing=false"


def test_shared_heads_are_cut_alike_and_the_shared_table_with_them() -> None:
    _, (heads, *_), _ = prepared("beit, shared")
    assert [cut.dim for cut in heads.cuts if cut.param.endswith("shared_position_bias.relative_position_bias_table")] == [1]
    assert (heads.name, heads.size) == ("beit.layers.heads", 4)


def loaded(model: nn.Module, name: str, labels: list[str], folder: Path) -> LoadReport:
    """What is reported when the segmenter of a name is loaded, for these labels, from another model's checkpoint."""
    spec = spec_of(name)
    config = transformers_models.configure(spec.config)
    transformers_models.set_labels(config, labels, None)
    with quiet():
        model.save_pretrained(folder)  # type: ignore[operator]
    return transformers_models.from_folder(folder, spec, config)[1]


@pytest.mark.parametrize("name", CONFIGS)
def test_for_other_labels_only_the_head_is_new(name: str, tmp_path: Path) -> None:
    model, spec = segmenter(name)
    report = loaded(model, name, ["one", "two"], tmp_path)
    assert report.mismatched
    assert [n for n in report.missing | report.mismatched if not matches(n, build.adapter_of(spec).head)] == []


@pytest.mark.parametrize(
    ("name", "auto"),
    [
        ("segformer", "AutoModel"),
        ("segformer", "AutoModelForImageClassification"),
        ("dpt", "AutoModel"),
        ("dpt", "AutoModelForDepthEstimation"),
        ("beit", "AutoModelForImageClassification"),
        ("data2vec-vision", "AutoModelForImageClassification"),
        ("mask2former", "AutoModel"),
        ("oneformer", "AutoModel"),
    ],
)
def test_what_a_checkpoint_of_less_or_of_another_task_lacks_is_the_head(name: str, auto: str, tmp_path: Path) -> None:
    spec = spec_of(name)
    with torch.random.fork_rng(devices=[]):
        model = getattr(transformers, auto).from_config(transformers_models.configure(spec.config))
    report = loaded(model, name, LABELS, tmp_path)
    assert report.missing
    assert [n for n in report.missing | report.mismatched if not matches(n, build.adapter_of(spec).head)] == []


@pytest.mark.parametrize("name", ["segformer", "beit", "data2vec-vision"])
def test_the_classifiers_of_these_model_types_are_pruned_too(name: str) -> None:
    spec = replace(spec_of(name), task_kind="image-classification", auto_class="AutoModelForImageClassification")
    with torch.random.fork_rng(devices=[]):
        model = transformers_models.build(spec)
    adapter = build.adapter_of(spec)
    assert conformance.check(model, adapter, spec).max_difference <= 1e-5
    assert {n.partition(".")[0] for n in build.head_names(adapter, model) if ".pooler." not in n} == {"classifier"}


@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_is_left_as_it_was_given(name: str) -> None:
    spec = spec_of(name)
    before = spec.to_json()
    transformers_models.configure(spec.config)
    assert spec.to_json() == before


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model_type": "upernet", "backbone": "org/name"}, "would download a backbone"),
        ({"model_type": "mask2former", "use_pretrained_backbone": True}, "would download a backbone"),
        ({"model_type": "mask2former", "backbone_config": {"model_type": "swin", "depths": [0]}}, "depths of this swin is 0"),
        ({"model_type": "segformer", "sr_ratios": [0, 1, 1, 1]}, "sr_ratios of this segformer is 0"),
        ({"model_type": "mask2former", "num_queries": 10**9}, "num_queries of this mask2former is 1,000,000,000"),
    ],
)
def test_a_configuration_is_refused_by_its_key_also_in_that_of_a_backbone(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        transformers_models.configure(values)
