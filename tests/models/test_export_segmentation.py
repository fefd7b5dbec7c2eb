"""Exported models of semantic segmentation, opened again: the same outputs, the same pixels, and maps of an image's size."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor, nn

import recap_cli
from recap_cli.core.adapter import find_axes
from recap_cli.core.axes import UnitMask, counts, shapes_of
from recap_cli.core.surgery import gather, indices
from recap_cli.core.task import Batch
from recap_cli.models import build, conformance, export
from recap_cli.models.build import ModelSpec
from recap_cli.models.preprocessing import preprocessor_json
from recap_cli.models.specs import INTERPOLATIONS, image_facts
from recap_cli.progress import silent
from recap_cli.rounds.examples import make_splits, read_raw
from recap_cli.tasks.calls import task_named
from tests.segmentation import CONFIGS, SIDE, segmenter
from tests.tiny import data_folder, tiny

STOCK = ("dpt", "beit", "data2vec-vision", "eomt")  # whose configurations say how many neurons there are


def exported(name: str, out: Path, plan: UnitMask | None = None, **how: Any) -> tuple[dict[str, Any], ModelSpec, nn.Module]:
    """What is said of an exported pico model, its spec, and the small model."""
    model, spec = segmenter(name)
    adapter, full = build.adapter_of(spec), build.tensors_of(model)
    axes = find_axes(adapter, model)
    kept = conformance.random_plan(axes) if plan is None else plan
    small = gather(full, indices(axes, kept, shapes_of(full)))
    facts = export.export(export.Product(spec, None, adapter, small, axes, kept), out, **how)
    return facts, spec, build.assemble(spec, small, adapter, counts(kept))


def outputs(spec: ModelSpec, model: nn.Module) -> Tensor:
    with torch.no_grad():
        return build.flat_outputs(spec, model, build.example_batch(spec))


def assert_alike(found: Tensor, wanted: Tensor) -> None:
    """To the rounding of kernels, which depends on where tensors lie in memory: 2e-7 of the largest has been seen."""
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_pruned_model_is_loaded_with_the_same_outputs(name: str, tmp_path: Path) -> None:
    facts, spec, small = exported(name, tmp_path / "out")
    assert facts["form"] == "ragged"
    assert_alike(outputs(spec, recap_cli.load(tmp_path / "out")), outputs(spec, small))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_dense_model_and_its_processor_are_opened_by_transformers_alone(name: str, tmp_path: Path) -> None:
    facts, spec, small = exported(name, tmp_path / "out", dense=True)
    assert facts["form"] == "dense"
    model = getattr(transformers, spec.auto_class).from_pretrained(tmp_path / "out").eval()
    assert_alike(outputs(spec, model), outputs(spec, small))
    processor: Any = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    batch = first_of_validation(name, spec)
    height, width = batch["labels"].shape[1:]
    image = Image.open(data_folder() / "maps" / "validation" / "images" / "0.png")
    assert image.size == (width, height) != (SIDE, SIDE)
    inputs = processor(image, return_tensors="pt")
    assert_a_shade(inputs["pixel_values"], batch["pixel_values"], std=0.5)
    told = {key: torch.tensor([row]) for key, row in spec.forward.items()}
    with torch.no_grad():
        found = model(inputs["pixel_values"], **told)
    for key in found.keys() & {"logits", "class_queries_logits", "masks_queries_logits"}:
        found[key] = 3 * torch.randn(found[key].shape, generator=torch.Generator().manual_seed(0))  # so that all classes occur
    (labels,) = processor.post_process_semantic_segmentation(found, target_sizes=[(height, width)])
    task = task_named("semantic-segmentation")
    assert task.maps_of is not None
    (ours,) = task.maps_of(task.read(found), batch)
    assert labels.shape == ours.shape == (height, width)
    alike = 0.85 if name == "mask2former" else 0.999  # that of Mask2Former goes by way of masks of 384 × 384
    assert float((labels == ours).float().mean()) > alike


def first_of_validation(name: str, spec: ModelSpec) -> Batch:
    recipe = tiny(name)
    _, validation = make_splits(recipe, spec, None, silent, read_raw(recipe))
    return validation.batch(torch.tensor([0]))


def assert_a_shade(found: Tensor, wanted: Tensor, std: float) -> None:
    """Pixels differ by no more than a shade of grey, which another way to resize may make."""
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max()) * std * 255 < 1.01


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_processor_makes_squares_of_any_size(name: str, interpolation: str, tmp_path: Path) -> None:
    mean, std, side = [0.4, 0.5, 0.6], 0.25, 40
    image = image_facts(side, 3, mean, [std] * 3, interpolation)
    (tmp_path / "preprocessor_config.json").write_text(preprocessor_json(image, name))
    pixels = np.random.default_rng(0).integers(0, 256, (24, 56, 3), dtype=np.uint8)
    resized = Image.fromarray(pixels).resize((side, side), INTERPOLATIONS.index(interpolation))
    wanted = (torch.from_numpy(np.array(resized)) / 255 - torch.tensor(mean)) / std  # (height, width, channels)
    processor: Any = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    assert_a_shade(processor(pixels, return_tensors="pt")["pixel_values"], wanted.movedim(2, 0)[None], std)


@pytest.mark.parametrize("name", CONFIGS)
def test_where_all_layers_are_alike_the_library_opens_what_its_configuration_can_say(name: str, tmp_path: Path) -> None:
    model, spec = segmenter(name)
    axes = find_axes(build.adapter_of(spec), model)
    plan = {axis.name: torch.arange(axis.size) < (axis.size if axis.kind == "heads" else axis.size // 2) for axis in axes}
    facts, spec, small = exported(name, tmp_path / "out", plan)
    assert facts["form"] == ("stock" if name in STOCK else "ragged"), facts["reason"]
    if name in STOCK:
        stock, info = getattr(transformers, spec.auto_class).from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not any(info.values())
        assert_alike(outputs(spec, stock.eval()), outputs(spec, small))
