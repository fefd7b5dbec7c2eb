"""What compress guesses of a model that segments: one with queries has no hidden states that are learned."""

from pathlib import Path

import pytest

from recap_cli.models.checkpoints import quiet
from recap_cli.rounds.guessed_recipe import guess_recipe
from tests.segmentation import segmenter


@pytest.mark.parametrize(("name", "weight"), [("segformer", 10.0), ("mask2former", 0.0)])
def test_hidden_states_are_left_out_for_a_model_with_queries_and_it_is_said(name: str, weight: float, tmp_path: Path) -> None:
    model, _ = segmenter(name)
    with quiet():
        model.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    (tmp_path / "data").mkdir()
    found = guess_recipe(str(tmp_path / "model"), str(tmp_path / "data"), str(tmp_path / "data"), 0.5)
    assert (found.recipe.task.kind, found.recipe.distill.hidden_weight) == ("semantic-segmentation", weight)
    said = [reason for reason in found.reasons if reason.startswith("distill.hidden_weight=")]
    assert len(said) == 1
    assert ("queries" in said[0]) == (weight == 0)
