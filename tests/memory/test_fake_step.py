"""Predictions against the same count over a real step on the CPU, and that count against the allocator's own."""

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from recap_cli import registry
from recap_cli.errors import ModelError
from recap_cli.machine import accounting
from recap_cli.memory import fake_step, meta_model, predict
from recap_cli.memory.fake_cuda import Answers, cuda_kernels
from recap_cli.memory.fake_step import Fakes, Step
from recap_cli.memory.tracker import GRANULE_BYTES, KINDS, Kind, Tracker, Usage
from recap_cli.models import build, create, spec_from_config
from recap_cli.models.build import ModelSpec
from recap_cli.recipe.recipe import Recipe
from recap_cli.rounds.frozen_weights import frozen_weight_of
from recap_cli.trainable.frozen_weights import QuantizedMatrix
from recap_cli.training.loop import Steps, train
from tests import segmentation
from tests.pico import LABELS, PICO, pico, source_for
from tests.tiny import is_text, model_section, one_layer, tiny

HF = {"hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 384}
LARGER: dict[str, dict[str, Any]] = {  # where 512 bytes are little
    "bert": {"model_type": "bert", **HF, "vocab_size": 400, "max_position_embeddings": 64},
    "vit": {"model_type": "vit", **HF, "image_size": 48, "patch_size": 8},
}
NEAR = 0.01
HELD: tuple[Kind, ...] = ("weights", "gradients", "optimizer")
METHODS = ("full", "head", "lora", "pre-ft", "post-ft", "movement", "recap")


def recipe_of(name: str, larger: bool = False, **sections: Any) -> Recipe:
    """Of a model of one layer: what is counted of it is counted of any number of them, in as many times the time."""
    tokenizer = {"tokenizer": model_section(name)["config"]["tokenizer"]} if is_text(name) else {}
    model = {"model": {"config": {**LARGER[name], **tokenizer}}} if larger else {"model": one_layer(name)}
    length = {"data": {"max_length": 40}} if is_text(name) else {}
    return tiny(name, **model, **length, **sections)


def real(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of these shapes with memory: small random numbers, zeros for what counts, ones for variances and norms."""
    generator = torch.Generator().manual_seed(0)

    def made(name: str, tensor: Tensor) -> Tensor:
        if name.endswith("running_var") or (name.endswith("weight") and tensor.ndim == 1):
            return torch.ones(tensor.shape, dtype=tensor.dtype)
        if not tensor.is_floating_point():
            return torch.zeros(tensor.shape, dtype=tensor.dtype)
        return 0.05 * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)

    return {name: made(name, tensor) for name, tensor in tensors.items()}


def real_step(recipe: Recipe, method: str) -> Step:
    return predict.prepare(meta_model.of_recipe(recipe, LABELS), recipe, method, real)[0]


class Case(NamedTuple):
    method: str
    name: str
    finetune: Mapping[str, Any] = MappingProxyType({})
    larger: bool = False

    def __str__(self) -> str:
        return " ".join([self.method, self.name, *(f"{key}={value}" for key, value in self.finetune.items())])


CASES = [  # one of each thing that a step can have; the peaks of more are held against the allocator's own record, below
    Case("recap", "bert", {"weights": "int8"}, larger=True),
    Case("recap", "dinov2", {"weights": "bf16", "checkpointing": True, "micro_batch_size": 4}),
    Case("full", "vit", {"fused_backward": True, "optimizer": "sgd"}, larger=True),
    Case("movement", "timm-vit"),
]


def assert_near(predicted: Usage, counted: Usage) -> None:
    peak = counted.peak_bytes
    assert predicted.peak_bytes == pytest.approx(peak, rel=NEAR)
    for kind in KINDS:
        for ours, theirs in ((predicted.maxima, counted.maxima), (predicted.at_peak, counted.at_peak)):
            assert ours[kind] == pytest.approx(theirs[kind], rel=NEAR, abs=NEAR * peak), kind


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_is_predicted_within_one_percent(case: Case) -> None:
    recipe = recipe_of(case.name, case.larger, finetune=dict(case.finetune))
    fakes = Fakes()
    step, weights = predict.prepare(meta_model.of_recipe(recipe, LABELS), recipe, case.method, fakes.like)
    assert weights > 0
    predicted = fakes.usage(step, "cpu")
    counted = fake_step.usage(real_step(recipe, case.method))
    assert_near(predicted, counted)
    assert counted.maxima["gradients"] > 0


@pytest.mark.parametrize(
    ("name", "weights"),
    [*((name, "fp32") for name in segmentation.CONFIGS), ("segformer", "bf16"), ("mask2former", "bf16")],
)
def test_a_step_on_label_maps_is_predicted_within_one_percent(name: str, weights: str) -> None:
    recipe, fakes = tiny(name, finetune={"weights": weights}), Fakes()
    of_recipe = meta_model.of_recipe(recipe, segmentation.LABELS)
    predicted = fakes.usage(predict.prepare(of_recipe, recipe, "recap", fakes.like)[0], "cpu")
    step = predict.prepare(of_recipe, recipe, "recap", real)[0]  # after a step on fakes: it has left none in the model's caches
    step.batch["labels"][:] = torch.arange(segmentation.SIDE) % len(segmentation.LABELS)  # a prediction has every class in each
    assert_near(predicted, fake_step.usage(step))


@pytest.mark.parametrize("name", ["oneformer", "maskformer"])
def test_a_prediction_is_the_same_after_a_step_whose_positions_the_model_keeps(name: str) -> None:
    recipe = tiny(name)
    of_recipe, found = meta_model.of_recipe(recipe, segmentation.LABELS), list[Usage]()
    for _ in range(2):
        fakes = Fakes()
        found.append(fakes.usage(predict.prepare(of_recipe, recipe, "recap", fakes.like)[0], "cpu"))
        fake_step.usage(predict.prepare(of_recipe, recipe, "recap", real)[0])
    assert found[0] == found[1]


@pytest.mark.parametrize("method", ["full", "recap", "lora"])
@pytest.mark.parametrize("weights", registry.names("weights"))
def test_weights_and_optimizer_state_are_those_that_finetuning_reports(method: str, weights: str) -> None:
    recipe = recipe_of("bert", larger=True, finetune={"weights": weights})
    step = real_step(recipe, method)
    known = accounting.held(step.model, step.optimizer, 0)
    counted = fake_step.usage(step)
    tensors = [
        *step.model.parameters(),
        *step.model.buffers(),
        *(trainable.grad_param for trainable in step.optimizer.trainables),
    ]
    rounding = GRANULE_BYTES * 2 * len(tensors)
    assert 0 <= counted.maxima["weights"] - known["weights_bytes"] < rounding
    assert 0 <= counted.maxima["optimizer"] - known["optimizer_bytes"] < rounding
    assert counted.maxima["other"] >= sum(tensor.nbytes for tensor in step.batch.values())


@pytest.mark.parametrize(
    ("weights", "name", "method"),  # each two of them occur together; of nf4 with LoRA, which is QLoRA, every model
    [
        (weights, name, method)
        for at, weights in enumerate(registry.names("weights"))
        for place, name in enumerate(["bert", "dinov2", "timm-vit-packed-glu"])
        for number, method in enumerate(["recap", "lora"])
        if (at + place + number) % 2 or (weights, method) == ("nf4", "lora")
    ],
)
def test_what_is_predicted_of_weights_and_state_is_held_to_the_byte(weights: str, name: str, method: str) -> None:
    recipe, fakes = recipe_of(name, finetune={"weights": weights}), Fakes()
    of_recipe = meta_model.of_recipe(recipe, LABELS)
    predicted = fakes.usage(predict.prepare(of_recipe, recipe, method, fakes.like)[0], "cpu").maxima
    step = real_step(recipe, method)
    assert standing_bytes(step) == predicted["weights"] + predicted["optimizer"] + batch_bytes(step)
    counted = fake_step.usage(step).maxima
    assert {kind: predicted[kind] for kind in HELD} == {kind: counted[kind] for kind in HELD}
    matrices = [module for module in step.model.modules() if isinstance(module, QuantizedMatrix)]
    assert bool(matrices) == frozen_weight_of(weights).quantizes
    for matrix in matrices:
        assert sum(part.nbytes for part in matrix.parts.values()) == matrix.weights.nbytes(matrix.shape)  # type: ignore[misc]


@pytest.mark.parametrize(("method", "name", "weights"), [("recap", "vit", "int8"), ("full", "bert", "fp32")])
def test_scoring_is_predicted_within_one_percent(method: str, name: str, weights: str) -> None:
    recipe = recipe_of(name, larger=True, finetune={"weights": weights}, evaluate={"batch_size": 32})
    of_recipe = meta_model.of_recipe(recipe, LABELS)
    predicted = predict.evaluation_bytes(of_recipe, recipe, method, kernels="cpu")
    batch = real(predict.batch_of(of_recipe.spec, recipe, 32))
    assert predicted == pytest.approx(fake_step.evaluation_bytes(real_step(recipe, method), batch), rel=NEAR)


def test_a_prediction_trains_nothing_and_takes_no_memory_for_weights() -> None:
    recipe = recipe_of("vit", larger=True)
    of_recipe = meta_model.of_recipe(recipe, LABELS)
    assert all(tensor.is_meta for tensor in of_recipe.tensors.values())
    first = predict.predict(of_recipe, recipe, "recap")
    again = predict.predict(of_recipe, recipe, "recap")
    assert first.to_json() == again.to_json()
    assert first.total == sum(param.numel() for param in build.on_meta(of_recipe.spec).parameters())
    assert first.trainable < first.weights < first.total
    assert all(tensor.is_meta for tensor in of_recipe.tensors.values())


def test_methods_stand_in_the_order_that_the_paper_gives_them() -> None:
    recipe = recipe_of("vit", larger=True)
    of_recipe = meta_model.of_recipe(recipe, LABELS)
    peak = {method: predict.predict(of_recipe, recipe, method).usage.peak_bytes for method in METHODS}
    assert peak["head"] < peak["recap"] < peak["pre-ft"] < peak["full"]
    assert peak["head"] < peak["lora"] < peak["full"]


def allocations(run: Callable[[], object], file: Path) -> list[tuple[str, int]]:
    """What the allocator of the CPU handed out (and took back: less than 0 bytes) while `run` ran, by address, in order."""
    with torch_profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    seen.export_chrome_trace(str(file))
    events = [event for event in json.loads(file.read_text())["traceEvents"] if event["name"] == "[memory]"]
    return [(e["args"]["Addr"], e["args"]["Bytes"]) for e in sorted(events, key=lambda e: e["args"]["Ev Idx"])]


def allocators_peaks(events: list[tuple[str, int]]) -> tuple[int, int]:
    """The most that was handed out at one time, and the same with every piece rounded up as the tracker does."""
    live: dict[str, int] = {}
    exact = rounded = most_exact = most_rounded = 0
    for address, count in events:
        size = live.pop(address, 0) if count < 0 else live.setdefault(address, count)
        sign = 1 if count > 0 else -1
        exact += sign * size
        rounded += sign * -(-size // GRANULE_BYTES) * GRANULE_BYTES
        most_exact, most_rounded = max(most_exact, exact), max(most_rounded, rounded)
    return most_exact, most_rounded


def finetuning_step(step: Step, recipe: Recipe) -> None:
    """One step as `finetune` takes it, by the recipe's own settings."""
    tune = recipe.finetune
    how = {
        "micro_batch_size": tune.micro_batch_size,
        "max_grad_norm": tune.max_grad_norm,
        "fused_backward": tune.fused_backward,
    }
    train(step.forward, step.task, step.optimizer, [step.batch], steps=Steps(rate=lambda _: 1e-6, **how))


def standing_bytes(step: Step) -> int:
    """What is there before a step, each piece rounded up: weights, masters, moments and the batch, by their own sizes."""
    trainables, moments = step.optimizer.trainables, step.optimizer.moments
    tensors = [*step.model.parameters(), *step.model.buffers(), *step.batch.values()]
    tensors += [trainable.own_master for trainable in trainables if trainable.own_master is not None]
    tensors += [moment for trainable in trainables for moment in moments[trainable.name].values()]
    sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(-(-size // GRANULE_BYTES) * GRANULE_BYTES for size in sizes.values())


def batch_bytes(step: Step) -> int:
    """The batch, each tensor rounded up."""
    return sum(-(-tensor.nbytes // GRANULE_BYTES) * GRANULE_BYTES for tensor in step.batch.values())


@pytest.mark.parametrize(
    ("method", "name", "finetune", "bound"),
    [
        ("full", "vit", {}, 1e-4),
        ("full", "bert", {"max_grad_norm": 1.0}, 1e-4),
        ("pre-ft", "vit", {"fused_backward": True}, 1e-3),  # the rest is what a norm's backward on the CPU needs within
        ("recap", "bert", {"fused_backward": True}, 1e-4),
        ("recap", "vit", {"micro_batch_size": 4}, 1e-4),
        ("recap", "vit", {"checkpointing": True}, 0.01),  # the rest is what attention on the CPU needs within
        ("lora", "vit", {}, 1e-3),
        ("head", "bert", {}, 1e-4),
        ("recap", "vit", {"weights": "int8"}, 0.1),  # and operations on mixed types: on the CPU, they convert their inputs
        ("recap", "bert", {"weights": "bf16"}, 0.05),  # likewise: a norm divides by an fp32 deviation
        ("recap", "bert", {"weights": "nf4"}, 0.1),  # likewise
    ],
)
def test_a_prediction_is_what_the_allocator_hands_out_in_a_real_step(
    method: str, name: str, finetune: dict[str, Any], bound: float, tmp_path: Path
) -> None:
    recipe, fakes = recipe_of(name, larger=True, finetune=finetune), Fakes()
    step, _ = predict.prepare(meta_model.of_recipe(recipe, LABELS), recipe, method, fakes.like)
    real_one = real_step(recipe, method)
    predicted = fakes.usage(step, "cpu").peak_bytes - standing_bytes(real_one)
    exact, rounded = allocators_peaks(allocations(lambda: finetuning_step(real_one, recipe), tmp_path / "trace.json"))
    assert predicted == pytest.approx(rounded, rel=bound)
    assert predicted == pytest.approx(exact, rel=bound + 0.01)


def kept_activations(run: Callable[..., Tensor], *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> int:
    """Bytes that are held for the backward of one function, its result included, with the kernels of CUDA."""
    fakes, tracker, kept = Fakes(), Tracker(), []
    with fakes.mode:
        inputs = [torch.empty(shape, dtype=dtype, requires_grad=True) for shape in shapes]
        tracker.know({str(i): tensor for i, tensor in enumerate(inputs)}, "other")
        with cuda_kernels(), tracker.watch([]):
            kept.append(run(*inputs))
            held = tracker._now["activations"]
    return held


BATCH, HEADS, TOKENS, HEAD_DIM = 2, 4, 200, 32
ATTENTION = (BATCH, HEADS, TOKENS, HEAD_DIM)
PROBABILITIES = BATCH * HEADS * TOKENS * TOKENS  # entries that plain attention would save


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", ["none", "bool", "number"])
def test_attention_saves_a_number_per_row_and_no_probabilities(dropout: float, dtype: torch.dtype, mask: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shape = (BATCH, 1, TOKENS, TOKENS)
        bias = {"bool": torch.ones(shape, dtype=torch.bool), "number": torch.zeros(shape, dtype=dtype)}.get(mask)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)

    held = kept_activations(attend, ATTENTION, ATTENTION, ATTENTION, dtype=dtype)
    entry = dtype.itemsize
    out = BATCH * HEADS * TOKENS * HEAD_DIM * entry
    padded = 0 if mask == "none" else BATCH * TOKENS * 208 * entry  # one mask for all heads, its rows in whole 16s
    least = out + padded + BATCH * HEADS * TOKENS * 4  # the number per row
    assert least <= held <= least + BATCH * HEADS * 24 * 4 + 6 * GRANULE_BYTES  # its rows in whole 32s; seeds
    assert held < PROBABILITIES * entry


@pytest.mark.parametrize("name", ["bert", "timm-vit"])
def test_a_models_attention_saves_no_probabilities_on_cuda(name: str) -> None:
    recipe = recipe_of(name)
    of_recipe = meta_model.of_recipe(recipe, LABELS)
    usages = {}
    for kernels in ("cuda", "cpu"):
        fakes = Fakes()
        usages[kernels] = fakes.usage(predict.prepare(of_recipe, recipe, "full", fakes.like)[0], kernels).maxima
    assert usages["cuda"]["weights"] == usages["cpu"]["weights"]
    assert usages["cuda"]["gradients"] == usages["cpu"]["gradients"]
    more = usages["cuda"]["activations"] - usages["cpu"]["activations"]
    layers, batch, heads, tokens, hidden = 1, 8, 4, 40, 32
    if name == "bert":  # the one with dropout
        probabilities = layers * batch * heads * tokens * tokens * 4
        masks = (1 + 2 * layers) * batch * tokens * hidden * 3  # a byte an entry, not four
        assert -more > probabilities + 0.9 * masks
    else:
        assert 0 <= more <= layers * batch * heads * 32 * 4  # a number per row, of whole 32s


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_saves_a_byte_an_entry(dtype: torch.dtype) -> None:
    count = 64 * 512
    assert kept_activations(lambda x: F.dropout(x, 0.1), (64, 512), dtype=dtype) == count * (dtype.itemsize + 1)
    assert kept_activations(nn.Dropout(0.1), (64, 512), dtype=dtype) == count * (dtype.itemsize + 1)
    assert kept_activations(lambda x: F.dropout(x, 0.1, training=False) * 1, (64, 512), dtype=dtype) == count * dtype.itemsize


@pytest.mark.parametrize("shape", [(2, 4, 10, 20), (2, 4, 10, 8), (2, 4, 10, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_has_the_shapes_of_the_plain_one_there_and_back(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    fakes = Fakes()
    with fakes.mode:
        query = torch.empty(shape, dtype=dtype, requires_grad=True)
        key = torch.empty((2, 2, *shape[2:]), dtype=dtype, requires_grad=True)
        with cuda_kernels():
            out = F.scaled_dot_product_attention(query, key, key, enable_gqa=True, is_causal=True, dropout_p=0.1)
            assert (out.shape, out.dtype) == (shape, dtype)
            out.sum().backward()
        assert query.grad is not None
        assert key.grad is not None
        assert (query.grad.shape, key.grad.shape) == (query.shape, key.shape)


def test_the_librarys_own_functions_come_back_whatever_happens() -> None:
    own_master = F.scaled_dot_product_attention, F.dropout
    with cuda_kernels():
        assert F.scaled_dot_product_attention is not own_master[0]
        assert F.dropout is not own_master[1]
    assert (F.scaled_dot_product_attention, F.dropout) == own_master

    def fails(_: dict[str, Tensor]) -> Tensor:
        raise RuntimeError("no forward")

    recipe, fakes = recipe_of("vit"), Fakes()
    step, _ = predict.prepare(meta_model.of_recipe(recipe, LABELS), recipe, "head", fakes.like)
    with pytest.raises(RuntimeError, match="no forward"):
        fakes.usage(Step(step.model, step.optimizer, fails, step.task, step.batch))
    assert (F.scaled_dot_product_attention, F.dropout) == own_master
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    assert torch.zeros(3).tolist() == [0, 0, 0]  # real again


def test_importance_holds_a_block_and_not_the_model() -> None:
    held, weights = {}, {}
    for layers in (2, 5):
        config = {**LARGER["vit"], "num_hidden_layers": layers}
        recipe = tiny("vit", model={"config": config}, importance={"batch_size": 4}, finetune={"batch_size": 4})
        of_recipe = meta_model.of_recipe(recipe, LABELS)
        held[layers] = predict.importance_bytes(of_recipe, recipe)
        weights[layers] = sum(tensor.nbytes for tensor in of_recipe.tensors.values())
    per_block = (weights[5] - weights[2]) / 3
    inputs = 4 * 37 * 128 * 4  # of one block
    assert per_block < held[2]  # its weights, and the gradients of some
    assert inputs <= (held[5] - held[2]) / 3 <= 1.5 * inputs < per_block / 4


@pytest.mark.parametrize("name", PICO)
def test_lora_has_adapters_of_rank_eight_on_query_and_value(name: str) -> None:
    recipe = recipe_of(name)
    of_recipe = meta_model.of_recipe(recipe, LABELS)
    step, weights = predict.prepare(of_recipe, recipe, "lora", Fakes().like)
    trainables = {trainable.name: trainable.grad_param for trainable in step.optimizer.trainables}
    adapters = {trainable for trainable in trainables if ".lora_" in trainable}
    assert set(trainables) - adapters == set(of_recipe.layout.head)
    width = 16 if name == "swin" else 32  # in the first stage
    assert sum(trainables[trainable].numel() for trainable in adapters) == 2 * 8 * (width + width)  # fused or apart
    assert weights == sum(param.numel() for param in build.on_meta(of_recipe.spec).parameters())


def test_a_fake_number_is_one_and_what_is_asked_for_is_true() -> None:
    fakes = Fakes()
    with fakes.mode, Answers():
        assert bool(torch.zeros(3).isfinite().all())
        assert (torch.zeros(3).sum().item(), torch.zeros(3, dtype=torch.int64).sum().item()) == (1.0, 1)
        assert [found.shape for found in torch.where(torch.zeros(2, 3) > 0)] == [(6,), (6,)]


def test_texts_are_predicted_with_the_mask_that_padding_makes() -> None:
    masked = {}
    for size in (1, 2):
        recipe = recipe_of("bert", finetune={"batch_size": size})
        batch = predict.batch_of(meta_model.of_recipe(recipe, LABELS).spec, recipe, size)
        assert batch["input_ids"].shape == (size, 40)
        masked[size] = "attention_mask" in batch
    assert masked == {1: False, 2: True}


def described(pico_name: str, **arguments: Any) -> ModelSpec:
    section = model_section(pico_name)
    kind = "text-classification" if is_text(pico_name) else "image-classification"
    given = {"kind": kind, "config": section["config"], "label_names": LABELS, **arguments}
    return spec_from_config.spec_of(source_for(library=section.get("library", "transformers"), **given))


def shapes(model: nn.Module) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in build.tensors_of(model).items()}


def facts(spec: ModelSpec) -> tuple[Any, ...]:
    return spec.library, spec.model_type, spec.num_labels, spec.label_names, spec.task_kind, spec.image


@pytest.mark.parametrize("name", PICO)
def test_an_meta_model_is_that_of_the_model_that_would_be_made(name: str) -> None:
    spec = described(name)
    model, made = pico(name)
    assert shapes(build.on_meta(spec)) == shapes(model)
    assert facts(spec)[:5] == facts(made)[:5]
    section = model_section(name)
    source = source_for(spec.task_kind, section.get("library", "transformers"), config=section["config"], label_names=LABELS)
    created = create.create_model(source)
    assert shapes(build.on_meta(spec)) == shapes(created.model)
    assert facts(spec) == facts(created.spec)
    assert {k: v for k, v in spec.config.items() if k != "architectures"} == {
        k: v for k, v in created.spec.config.items() if k != "architectures"
    }


@pytest.mark.parametrize("name", PICO)
def test_a_folder_needs_no_weights_to_be_outlined(name: str, tmp_path: Path) -> None:
    model, spec = pico(name)
    for file in ("config.json", "preprocessor_config.json"):
        if content := build.describe(spec, None).get(file):
            (tmp_path / file).write_text(str(content))
    of_recipe = described(name, name=str(tmp_path), config=None)
    assert shapes(build.on_meta(of_recipe)) == shapes(model)
    assert facts(of_recipe) == facts(spec)
    (tmp_path / "model.safetensors").write_bytes(random.Random(0).randbytes(100))  # would be an error, if it were read
    assert described(name, name=str(tmp_path), config=None) == of_recipe


@pytest.mark.parametrize("name", ["vit", "dinov2", "timm-vit"])
def test_another_image_size_and_other_labels_are_outlined_as_they_are_created(name: str) -> None:
    given = {"image_size": 32, "label_names": ["a", "b", "c", "d"]}
    section, spec = model_section(name), described(name, **given)
    source = source_for("image-classification", section.get("library", "transformers"), config=section["config"], **given)
    created = create.create_model(source)
    assert shapes(build.on_meta(spec)) == shapes(created.model)
    assert facts(spec) == facts(created.spec)
    assert spec.image is not None
    assert (spec.image["size"], spec.num_labels) == (32, 4)


def test_without_labels_the_head_is_that_of_the_configuration() -> None:
    assert described("bert", label_names=()).num_labels == 2  # what transformers takes
    six = {"model_type": "vit", "id2label": {str(i): f"class {i}" for i in range(6)}}
    assert described("vit", config=six, label_names=()).label_names == [f"class {i}" for i in range(6)]
    assert described("timm-vit", label_names=()).num_labels == 1000


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("vit", {"config": None}, "exactly one of model.name and model.config"),
        ("vit", {"name": "x"}, "exactly one of model.name and model.config"),
        ("vit", {"config": {}}, "names no model_type"),
        ("vit", {"config": {"model_type": "vit", "hiden_size": 32}}, "no configuration key 'hiden_size'"),
        ("vit", {"config": {"model_type": "vit", "hidden_size": "wide"}}, "no configuration of a vit"),
        ("vit", {"config": {"model_type": "vit", "hidden_act": "gelo"}}, "hidden_act of this vit is 'gelo'"),
        ("vit", {"config": {"model_type": "vit", "image_size": [16, 32]}}, "not square ones"),
        ("vit", {"kind": "text-classification"}, "no vit for text-classification"),
        ("vit", {"name": "/nowhere/model", "config": None}, "there is no folder /nowhere/model"),
        ("timm-vit", {"kind": "text-classification"}, "timm has no models for text-classification"),
        ("timm-vit", {"config": {}}, "names no timm architecture"),
        ("timm-vit", {"config": {"architecture": "vit_tny_patch16_224"}}, "no architecture 'vit_tny_patch16_224'"),
        ("timm-vit", {"config": {"architecture": "vit_tiny_patch16_224", "depht": 1}}, "depht"),
        ("timm-vit", {"config": {"architecture": "vit_tiny_patch16_224", "num_heads": 0}}, "timm cannot build"),
    ],
)
def test_what_does_not_fit_is_refused_in_an_meta_model_too(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        described(name, **arguments)


@pytest.mark.parametrize("name", ["vit", "timm-vit"])
def test_an_image_that_holds_no_patch_is_refused_before_a_step_is_predicted(name: str) -> None:
    with pytest.raises(ModelError, match="images of 4 pixels hold no patch of 8"):
        meta_model.of_recipe(tiny(name, data={"image_size": 4}), LABELS)


def test_a_model_type_without_an_adapter_is_named_with_the_recipe() -> None:
    config = {"architecture": "resnet18"}
    recipe = tiny("timm-vit", model={"library": "timm", "config": config})
    with pytest.raises(ModelError, match="'timm-resnet' is unknown"):
        meta_model.of_recipe(recipe.model_copy(update={"model": recipe.model.model_copy(update={"config": config})}))


def test_what_an_offloaded_optimizer_makes_in_main_memory_is_not_on_the_device() -> None:
    peaks = {}
    for optimizer in ("sgd", "adamw"):  # AdamW makes a denominator of a slot's size, SGD nothing
        settings = {"optimizer": optimizer, "offload": True, "fused_backward": True, "checkpointing": True, "weight_decay": 0.0}
        recipe = recipe_of("bert", finetune=settings)
        found = predict.predict(meta_model.of_recipe(recipe, LABELS), recipe, "full")
        peaks[optimizer] = (found.usage.maxima["optimizer"], found.usage.peak_bytes)
    assert peaks["sgd"] == peaks["adamw"]
    assert peaks["sgd"][0] == 0
