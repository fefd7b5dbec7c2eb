"""A class for each pixel: loss and figures beside transformers', torchmetrics' and naive ones, and what models are fed."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from torchmetrics.classification import MulticlassJaccardIndex
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    SegformerConfig,
    SegformerForSemanticSegmentation,
)

from recap_cli.core.label_maps import LabelMaps, padded
from recap_cli.core.task import IGNORED, TEACHER, LabelColumn
from recap_cli.errors import DataError, PluginError
from recap_cli.plugins.tasks import semantic_segmentation as segmentation
from recap_cli.plugins.tasks.semantic_segmentation import SEMANTIC_SEGMENTATION, Queries
from recap_cli.tasks.calls import task_named
from recap_cli.tasks.losses import Lesson, mean_loss, training_loss

NAMES = ("road", "tree", "sky", "sea", "pole")  # nothing is a sea or a pole
SIZES = [(12, 9), (7, 16), (8, 8)]  # of maps: (height, width)


def drawn(sizes: list[tuple[int, int]], seed: int = 0) -> dict[str, Any]:
    """A batch of images of 8 × 8 pixels and of maps of three classes, a tenth of their pixels ignored."""
    generator = torch.Generator().manual_seed(seed)
    maps = []
    for size in sizes:
        one = torch.randint(0, 3, size, generator=generator)
        maps.append(one.masked_fill(torch.rand(size, generator=generator) < 0.1, IGNORED))
    return {"pixel_values": torch.randn(len(sizes), 3, 8, 8, generator=generator), **padded(maps)}


def logits(count: int = 3, seed: int = 1, size: tuple[int, int] = (4, 4)) -> torch.Tensor:
    found = torch.randn(count, len(NAMES), *size, generator=torch.Generator().manual_seed(seed))
    found[:, 4] -= 100.0  # nobody predicts a pole
    return found


def queries(count: int = 3, loss: torch.Tensor | None = None) -> Queries:
    generator = torch.Generator().manual_seed(2)
    classes, masks = (
        torch.randn(count, 6, len(NAMES) + 1, generator=generator),
        torch.randn(count, 6, 4, 4, generator=generator),
    )
    return Queries(loss, classes, masks)


def true_maps(batch: dict[str, Any]) -> list[torch.Tensor]:
    return [one[:height, :width] for one, (height, width) in zip(batch["labels"], batch["label_sizes"].tolist(), strict=True)]


def naive_maps(outputs: torch.Tensor, batch: dict[str, Any]) -> list[torch.Tensor]:
    """The predicted classes: each image alone, its scores interpolated to the size of its map."""
    return [
        F.interpolate(one[None], size=tuple(wanted.shape), mode="bilinear", align_corners=False)[0].argmax(0)
        for one, wanted in zip(outputs, true_maps(batch), strict=True)
    ]


@pytest.mark.parametrize("has_gradient", [True, False], ids=["trained", "scored"])
def test_the_loss_is_that_of_segformer_itself(has_gradient: bool) -> None:
    config = SegformerConfig(num_labels=len(NAMES), semantic_loss_ignore_index=IGNORED)
    batch = drawn([(8, 8)] * 3)
    outputs = logits(size=(2, 2)).requires_grad_(has_gradient)
    upsampled = F.interpolate(outputs, size=(8, 8), mode="bilinear", align_corners=False)
    wanted = F.cross_entropy(upsampled, batch["labels"], ignore_index=config.semantic_loss_ignore_index)
    mean, count = mean_loss(SEMANTIC_SEGMENTATION, outputs, batch)
    assert int(count) == int((batch["labels"] != IGNORED).sum())
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean, wanted)
    if has_gradient:
        (found,) = torch.autograd.grad(mean, outputs, retain_graph=True)
        torch.testing.assert_close(found, torch.autograd.grad(wanted, outputs)[0])


def test_the_loss_is_the_one_that_a_model_of_transformers_computes() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 16]}
    sizes |= {"num_attention_heads": [2, 4], "mlp_ratios": [2, 2], "decoder_hidden_size": 16, "strides": [4, 2]}
    config = SegformerConfig(**sizes, patch_sizes=[7, 3], num_labels=5, semantic_loss_ignore_index=IGNORED)
    model = SegformerForSemanticSegmentation(config).eval()
    batch = drawn([(32, 32)] * 2)
    outputs = model(pixel_values=torch.randn(2, 3, 32, 32), labels=batch["labels"])
    mean, _ = mean_loss(SEMANTIC_SEGMENTATION, segmentation.read(outputs), batch)
    torch.testing.assert_close(mean, outputs.loss)


def test_the_loss_of_maps_of_several_sizes_is_the_sum_of_each_alone() -> None:
    batch, outputs = drawn(SIZES), logits()
    wanted = sum(
        F.cross_entropy(
            F.interpolate(one[None], size=tuple(label.shape), mode="bilinear", align_corners=False),
            label[None],
            reduction="sum",
        )
        for one, label in zip(outputs, true_maps(batch), strict=True)
    )
    torch.testing.assert_close(segmentation.loss(outputs, batch), wanted)
    torch.testing.assert_close(segmentation.loss(outputs.requires_grad_(), batch), wanted)


def test_of_a_model_with_its_own_loss_the_mean_is_that_loss() -> None:
    batch = drawn(SIZES)
    mean, count = mean_loss(SEMANTIC_SEGMENTATION, queries(loss=torch.tensor(1.5)), batch)
    assert (float(mean), int(count)) == (1.5, sum(int((one != IGNORED).sum()) for one in true_maps(batch)))
    with pytest.raises(PluginError, match="a model with queries gave no loss"):
        segmentation.loss(queries(), batch)


def test_what_a_model_gives_is_read_as_logits_or_as_queries() -> None:
    class Output:
        logits = torch.ones(1)

    assert segmentation.read(Output()) is Output.logits
    Output.class_queries_logits, Output.masks_queries_logits, Output.loss = torch.ones(2), torch.ones(3), torch.ones(())  # type: ignore[attr-defined]
    found = segmentation.read(Output())
    assert [len(found.classes), len(found.masks), float(found.loss)] == [2, 3, 1.0]


def naive_figures(predicted: list[torch.Tensor], wanted: list[torch.Tensor]) -> dict[str, float]:
    """Counted pixel by pixel."""
    both, either, true, right, found = ([0] * len(NAMES) for _ in range(5))
    for guess, label in zip(predicted, wanted, strict=True):
        for one, other in zip(guess.flatten().tolist(), label.flatten().tolist(), strict=True):
            if other == IGNORED:
                continue
            true[other] += 1
            found[one] += 1
            both[one] += one == other
    either = [true[i] + found[i] - both[i] for i in range(len(NAMES))]
    right = sum(both)
    iou = {f"iou/{name}": both[i] / either[i] for i, name in enumerate(NAMES) if either[i]}
    accuracy = [both[i] / true[i] for i in range(len(NAMES)) if true[i]]
    return {
        "miou": float(np.mean(list(iou.values()))),
        "pixel_accuracy": right / sum(true),
        "mean_accuracy": float(np.mean(accuracy)),
        **iou,
    }


def stream(seeds: range = range(3)) -> list[tuple[torch.Tensor, dict[str, Any]]]:
    return [(logits(seed=seed), drawn(SIZES, seed)) for seed in seeds]


def test_the_figures_are_those_of_a_naive_count() -> None:
    seen = stream()
    found = task_named("semantic-segmentation").score(seen, NAMES)
    predicted = [one for outputs, batch in seen for one in naive_maps(outputs, batch)]
    wanted = naive_figures(predicted, [one for _, batch in seen for one in true_maps(batch)])
    assert found == pytest.approx(wanted)
    assert "iou/sea" in found, "predicted, and never there"
    assert "iou/pole" not in found, "neither predicted nor there"


def test_miou_is_that_of_torchmetrics_where_classes_occur() -> None:
    seen = stream()
    found = segmentation.score(seen, NAMES)
    each = MulticlassJaccardIndex(len(NAMES), average=None, ignore_index=IGNORED)
    mean = MulticlassJaccardIndex(len(NAMES), average="macro", ignore_index=IGNORED)
    for outputs, batch in seen:
        for predicted, wanted in zip(naive_maps(outputs, batch), true_maps(batch), strict=True):
            each.update(predicted[None], wanted[None])
            mean.update(predicted[None], wanted[None])
    for name, value in zip(NAMES, each.compute().tolist(), strict=True):
        assert found.get(f"iou/{name}", 0.0) == pytest.approx(value)
    assert found["miou"] == pytest.approx(float(mean.compute()))


def test_of_queries_the_maps_are_those_of_maskformer() -> None:
    """Cheng et al., 2021, sec. 3.4: the sum over queries of the probability of the class times that of the mask."""
    batch, outputs = drawn(SIZES), queries()
    for i, (found, label) in enumerate(zip(segmentation.maps_of(outputs, batch), true_maps(batch), strict=True)):
        probabilities = outputs.classes[i].softmax(-1)
        scores = torch.zeros(len(NAMES), 4, 4)
        for query in range(6):
            for number in range(len(NAMES)):
                scores[number] += probabilities[query, number] * outputs.masks[i, query].sigmoid()
        wanted = F.interpolate(scores[None], size=tuple(label.shape), mode="bilinear", align_corners=False)[0].argmax(0)
        assert torch.equal(found, wanted)


def test_padding_counts_for_nothing() -> None:
    batch, outputs = drawn(SIZES), logits()
    more = {**batch, "labels": F.pad(batch["labels"], (0, 5, 0, 7), value=2)}
    assert segmentation.score([(outputs, more)], NAMES) == segmentation.score([(outputs, batch)], NAMES)
    torch.testing.assert_close(segmentation.loss(outputs, more), segmentation.loss(outputs, batch))
    assert segmentation.predict(outputs, more, NAMES) == segmentation.predict(outputs, batch, NAMES)


def test_a_part_of_a_batch_keeps_the_sizes_of_its_maps() -> None:
    task, batch, outputs = task_named("semantic-segmentation"), drawn(SIZES), logits()
    parts = [task.part(batch, 0, 2), task.part(batch, 2, 3)]
    assert [part["label_sizes"].tolist() for part in parts] == [[[12, 9], [7, 16]], [[8, 8]]]
    assert sum(int(task.count(part)) for part in parts) == int(task.count(batch))
    losses = [task.loss(outputs[at], part) for at, part in zip((slice(0, 2), slice(2, 3)), parts, strict=True)]
    torch.testing.assert_close(sum(losses), task.loss(outputs, batch))


def targets(batch: dict[str, Any]) -> LabelMaps:
    """The maps of a batch as those of a split."""

    def read(indices: torch.Tensor, _: torch.Tensor | None) -> dict[str, Any]:
        return {name: batch[name][indices] for name in ("labels", "label_sizes")}

    return LabelMaps(len(batch["labels"]), read, tuple)


def constant_logits(number: int, count: int = 3) -> torch.Tensor:
    return F.one_hot(torch.full((count, 2, 2), number), len(NAMES)).permute(0, 3, 1, 2).float()


def test_chance_is_the_best_of_all_answers_that_are_the_same_for_every_pixel() -> None:
    batch = drawn(SIZES)
    batch["labels"][:, :2][batch["labels"][:, :2] == 0] = 1  # one class is the most frequent
    found = task_named("semantic-segmentation").constant(targets(batch), NAMES)  # type: ignore[misc]
    answers = [segmentation.score([(constant_logits(number), batch)], NAMES) for number in range(len(NAMES))]
    for name in ("miou", "pixel_accuracy", "mean_accuracy"):
        assert found[name] == pytest.approx(max(answer[name] for answer in answers)), name
    shares = torch.bincount(batch["labels"][batch["labels"] != IGNORED], minlength=len(NAMES)).double()
    best = (shares / shares.sum()).clamp(min=1e-300).log()[None, :, None, None].expand(3, -1, 2, 2).float()
    mean, _ = mean_loss(SEMANTIC_SEGMENTATION, best, batch)
    assert found["loss"] == pytest.approx(float(mean), rel=1e-5)


def test_predictions_name_the_classes_of_each_image_the_most_frequent_first() -> None:
    maps = [torch.tensor([[1, 1, 0], [2, 2, 2]]), torch.full((2, 2), IGNORED)]
    batch = {"pixel_values": torch.zeros(2, 3, 8, 8), **padded(maps)}
    task = task_named("semantic-segmentation")
    found = task.predict(constant_logits(2, 2), batch, NAMES)
    assert found["label"] == ["sky, tree, road", ""]
    assert found["predicted"] == ["sky", "sky"]
    assert found["miou"] == [pytest.approx(1 / 6), None]  # nothing is counted in the second
    assert found["pixel_accuracy"] == [pytest.approx(0.5), None]
    loss = F.cross_entropy(constant_logits(2, 1)[..., :1, :1].expand(1, -1, 2, 3), maps[0][None])
    assert found["loss"] == pytest.approx([float(loss), 0.0])


def test_the_figures_of_predictions_of_one_image_are_its_own() -> None:
    batch, outputs = drawn(SIZES), logits()
    rows = segmentation.predict(outputs, batch, NAMES)
    for i in range(3):
        part = task_named("semantic-segmentation").part(batch, i, i + 1)
        figures = segmentation.score([(outputs[i : i + 1], part)], NAMES)
        mean, _ = mean_loss(SEMANTIC_SEGMENTATION, outputs[i : i + 1], part)
        found = [rows[name][i] for name in ("miou", "pixel_accuracy", "loss")]
        assert found == pytest.approx([figures["miou"], figures["pixel_accuracy"], float(mean)])
    assert all(np.isfinite(segmentation.predict(queries(), batch, NAMES)["loss"]))


def test_a_model_is_fed_the_mask_of_each_class_that_an_image_shows() -> None:
    maps = [torch.tensor([[0, 2], [2, IGNORED]]), torch.full((2, 2), 3)]
    batch = {"pixel_values": torch.zeros(2, 3, 2, 2), **padded(maps)}
    found = task_named("semantic-segmentation").feed(batch, {"pixel_values", "mask_labels", "class_labels"}, len(NAMES))
    assert [one.tolist() for one in found["class_labels"]] == [[0, 2], [3]]
    assert [one.tolist() for one in found["mask_labels"]] == [[[[1, 0], [0, 0]], [[0, 1], [1, 0]]], [[[1, 1], [1, 1]]]]
    assert {one.dtype for one in found["mask_labels"]} == {torch.float32}
    assert {one.dtype for one in found["class_labels"]} == {torch.int64}
    assert segmentation.feed(batch, {"pixel_values", "labels"}, len(NAMES)) == {}


def test_masks_have_the_size_of_the_images_whatever_that_of_the_maps_and_their_padding() -> None:
    batch = drawn(SIZES)
    found = segmentation.feed(batch, {"mask_labels"}, len(NAMES))
    for i, label in enumerate(true_maps(batch)):
        rows, columns = (((torch.arange(8) + 0.5) * (side / 8)).long() for side in label.shape)
        at_image = label[rows][:, columns]
        assert found["class_labels"][i].tolist() == sorted(set(at_image.flatten().tolist()) - {IGNORED})
        for number, mask in zip(found["class_labels"][i].tolist(), found["mask_labels"][i], strict=True):
            assert torch.equal(mask, (at_image == number).float())


@pytest.fixture(scope="module")
def mask2former() -> Mask2FormerForUniversalSegmentation:
    torch.set_num_threads(1)
    backbone: dict[str, Any] = {"model_type": "swin", "image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1] * 4}
    backbone |= {"num_heads": [2, 2, 4, 4], "window_size": 2, "out_features": [f"stage{i}" for i in range(1, 5)]}
    sizes: dict[str, Any] = {"feature_size": 32, "mask_feature_size": 16, "hidden_dim": 32, "encoder_feedforward_dim": 24}
    sizes |= {"encoder_layers": 1, "dim_feedforward": 40, "decoder_layers": 3, "num_attention_heads": 4, "num_queries": 4}
    config = Mask2FormerConfig(**sizes, backbone_config=backbone, train_num_points=8, num_labels=len(NAMES))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Mask2FormerForUniversalSegmentation(config).train()


@pytest.mark.parametrize("ignored", [[], [1], [0, 1]], ids=["none", "one", "both"])
def test_mask2former_learns_from_images_whose_pixels_are_all_ignored(
    ignored: list[int], mask2former: Mask2FormerForUniversalSegmentation
) -> None:
    """Its queries learn there that they see no object; transformers divides by one mask at least."""
    maps = [torch.arange(1024).view(32, 32) // 400 for _ in range(2)]
    for i in ignored:
        maps[i] = torch.full((32, 32), IGNORED)
    batch = {"pixel_values": torch.zeros(2, 3, 32, 32), **padded(maps)}
    fed = segmentation.feed(batch, {"mask_labels", "class_labels"}, len(NAMES))
    assert [len(one) for one in fed["mask_labels"]] == [0 if i in ignored else 3 for i in range(2)]
    mask2former.zero_grad()
    outputs = segmentation.read(mask2former(pixel_values=batch["pixel_values"], **fed))
    mean, count = mean_loss(SEMANTIC_SEGMENTATION, outputs, batch)
    mean.backward()
    gradients = [one.grad for one in mask2former.parameters() if one.grad is not None]
    assert all(bool(one.isfinite().all()) for one in gradients)
    assert bool(torch.stack([one.any() for one in gradients]).any()) == (int(count) > 0)
    assert mean.isfinite()


def test_a_student_learns_a_row_for_every_fourth_pixel_of_a_row_and_a_column() -> None:
    batch = drawn([(10, 16)] * 2)
    distillation = task_named("semantic-segmentation").distillation
    assert distillation is not None
    outputs = logits(2)
    rows = distillation.rows(outputs, batch)
    wanted = F.interpolate(outputs, size=(3, 4), mode="bilinear", align_corners=False)
    assert torch.equal(rows, torch.stack([wanted[i, :, y, x] for i in range(2) for y in range(3) for x in range(4)]))
    assert distillation.rows_of_each(batch).tolist() == [12, 12]
    of_queries = distillation.rows(queries(2), batch)
    assert of_queries.shape == rows.shape
    assert bool(of_queries.isfinite().all())


def test_the_loss_of_a_teacher_is_as_large_as_that_of_the_pixels_its_rows_stand_for() -> None:
    distillation = SEMANTIC_SEGMENTATION.distillation
    assert distillation is not None
    student, teacher = torch.randn(2, 6, len(NAMES), generator=torch.Generator().manual_seed(0))
    distance = F.kl_div((student / 2).log_softmax(-1), (teacher / 2).softmax(-1), reduction="sum") * 2**2
    torch.testing.assert_close(distillation.loss(student, teacher, 2.0), 16 * distance)


@pytest.mark.parametrize(
    ("kind", "can_be"),
    [
        (pa.binary(), True),
        (pa.large_binary(), True),
        (pa.string(), True),
        (pa.large_string(), True),
        (pa.struct([("bytes", pa.binary()), ("path", pa.string())]), True),
        (pa.int64(), False),
        (pa.list_(pa.int64()), False),
    ],
    ids=str,
)
def test_columns_of_paths_and_of_images_may_be_maps(kind: pa.DataType, can_be: bool) -> None:
    assert segmentation.may_be_maps(kind) is can_be


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()], ids=str)
def test_paths_of_images_with_loss_do_not_look_like_maps(kind: pa.DataType) -> None:
    assert segmentation.are_maps(pa.chunked_array([["a.png", "b.TIF"]], kind))
    assert not segmentation.are_maps(pa.chunked_array([["a.png", "b.jpg"]], kind))


def test_classes_without_names_are_called_by_their_values() -> None:
    column = LabelColumn(pa.chunked_array([[0, 9, 10]]), "label", "column 'label' of x")
    assert segmentation.learn([column]).names == ("0", "9", "10")
    one = LabelColumn(pa.chunked_array([[9]]), "label", "column 'label' of x")
    with pytest.raises(DataError, match=r"the maps of column 'label' of x have no value but 9"):
        segmentation.learn([one])


def test_figures_of_each_label_outlive_the_guard_and_others_do_not() -> None:
    found = task_named("semantic-segmentation").score(stream(range(1)), NAMES)
    assert {"miou", "pixel_accuracy", "mean_accuracy", "iou/road"} <= found.keys()
    assert all(type(value) is float for value in found.values())
    assert not any(name.startswith("iou/") and name.removeprefix("iou/") not in NAMES for name in found)


def test_where_nothing_is_counted_every_figure_is_0() -> None:
    batch = {"pixel_values": torch.zeros(1, 3, 8, 8), **padded([torch.full((4, 4), IGNORED)])}
    assert segmentation.score([(logits(1), batch)], NAMES) == {"miou": 0.0, "pixel_accuracy": 0.0, "mean_accuracy": 0.0}
    mean, count = mean_loss(SEMANTIC_SEGMENTATION, logits(1), batch)
    assert (float(mean), int(count)) == (0.0, 0)


@pytest.mark.parametrize("ignored", [0, 40, 63])
def test_a_teachers_loss_is_a_mean_over_all_pixels_however_many_are_labelled(ignored: int) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(1, 3, 2, 2), torch.randn(1, 4, 3)  # a row for each sixteen pixels
    labels = torch.zeros(1, 8, 8, dtype=torch.int64)
    labels.view(-1)[:ignored] = IGNORED
    batch = {"pixel_values": torch.zeros(1, 3, 8, 8), "labels": labels, TEACHER: teacher}
    found, _ = training_loss(SEMANTIC_SEGMENTATION, student, batch, Lesson(1.0, 1.0))
    rows = student.permute(0, 2, 3, 1).reshape(4, 3)
    assert float(found) == pytest.approx(float(F.kl_div(rows.log_softmax(1), teacher[0].softmax(1), reduction="batchmean")))
