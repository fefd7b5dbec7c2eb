"""The size of a model's images: its own, that of its preprocessing, or the recipe's."""

from typing import Any

import pytest

from recap_cli.errors import ModelError
from recap_cli.models import transformers_models
from recap_cli.models.preprocessing import ANY_SIZE, has_own_size, square_size


def config(model_type: str, **values: Any) -> Any:
    return transformers_models.configure({"model_type": model_type, **values})


def test_a_leftover_size_of_a_model_for_any_size_means_nothing() -> None:
    old = config("segformer", image_size=224)
    assert not has_own_size(old)
    assert square_size(old, {"size": {"height": 512, "width": 512}}) == 512
    assert square_size(old, {"size": 640}) == 640
    assert square_size(old, {}) == 224  # no better is known
    assert square_size(config("segformer"), {}) == ANY_SIZE


def test_a_model_of_one_size_has_that_and_the_recipe_decides_for_the_others() -> None:
    assert has_own_size(config("dpt"))
    assert square_size(config("dpt", image_size=384), {"size": 512}, 96) == 384  # it is resampled later
    assert square_size(config("segformer"), {"size": {"height": 512, "width": 1024}}, 96) == 96


@pytest.mark.parametrize(
    "size", [{"height": 512, "width": 1024}, [[1]], {"shortest_edge": -5}, {"shortest_edge": 10**9}, True, {"height": {}}]
)
def test_a_size_that_is_none_is_refused(size: Any) -> None:
    with pytest.raises(ModelError, match="not square ones"):
        square_size(config("segformer"), {"size": size})


@pytest.mark.parametrize(
    "inner", [{"model_type": "timm_backbone", "backbone": "hf-hub:org/name"}, {"use_pretrained_backbone": True}]
)
def test_a_backbone_inside_a_configuration_is_never_downloaded(inner: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="one to download, or of timm"):
        config("mask2former", backbone_config={"model_type": "swin", **inner})
