"""What scoring a segmentation holds hangs on the size of the label maps, which may be larger than the images of the model."""

from dataclasses import replace

import torch

from recap_cli.memory import measure, meta_model
from recap_cli.memory.fake_step import evaluation_bytes
from recap_cli.memory.predict import evaluation_bytes as predicted_bytes
from recap_cli.memory.predict import prepare
from tests.tiny import tiny

SIZE = (300, 400)


def test_the_predicted_peak_of_scoring_is_that_of_real_maps_of_their_size() -> None:
    recipe = tiny("segformer", evaluate={"batch_size": 3})
    model, _ = meta_model.of_recipe_with_data(recipe)
    assert model.map_size is not None
    large = replace(model, map_size=SIZE)
    found = predicted_bytes(large, recipe, "full-ft", kernels="cpu")
    assert found > 2 * predicted_bytes(replace(model, map_size=None), recipe, "full-ft", kernels="cpu")
    step, _ = prepare(large, recipe, "full-ft", measure.random_tensors)
    side = (model.spec.image or {})["size"]
    batch = {"pixel_values": torch.zeros(3, 3, side, side), "labels": torch.zeros(3, *SIZE, dtype=torch.int64)}
    real = evaluation_bytes(step, batch)
    assert abs(found - real) < 0.1 * real


def test_of_a_model_with_queries_the_scores_at_the_size_of_a_map_are_counted() -> None:
    recipe = tiny("mask2former", evaluate={"batch_size": 3})
    model, _ = meta_model.of_recipe_with_data(recipe)
    height, width = 1200, 1600
    labels_bytes, scores_bytes = 3 * height * width * 8, model.spec.num_labels * height * width * 4  # of all, and of one image
    found = predicted_bytes(replace(model, map_size=(height, width)), recipe, "full-ft", kernels="cpu")
    assert found > labels_bytes + scores_bytes
