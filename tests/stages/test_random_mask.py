"""The share of a mask that is drawn at random, and a criterion's name where its scores are refused: the stage's own wiring."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from recap_cli.core.axes import Axis, Cut
from recap_cli.core.criterion import Criterion
from recap_cli.core.ranking import Limits, select
from recap_cli.errors import PluginError
from recap_cli.rounds import importance
from recap_cli.rounds.masking import choose_fine_units
from recap_cli.stages.finetune import finetune
from recap_cli.stages.init import init
from recap_cli.stages.mask import mask
from recap_cli.stages.merge import merge
from recap_cli.stages.prune import prune
from recap_cli.state.store import State
from tests.tiny import tiny

SIZES = {"a": 10, "b": 400}
PARAMS = {"a": 30, "b": 3}  # of a unit: `b` alone could fill what may move
AXES = [Axis(name, kind, 0, SIZES[name], (Cut(f"{name}.weight", 0),)) for name, kind in (("a", "heads"), ("b", "neurons"))]
SHAPES = {f"{name}.weight": (SIZES[name], PARAMS[name]) for name in "ab"}
SCORES = {name: torch.rand(SIZES[name], generator=torch.Generator().manual_seed(1)) * PARAMS[name] for name in "ab"}


def drawn(scope: str, *, seed: int = 0, round: int = 1) -> dict[str, list[bool]]:
    recipe = tiny("vit", seed=seed, mask={"random": 0.5, "scope": scope})
    return {name: chosen.tolist() for name, chosen in choose_fine_units(recipe, AXES, SHAPES, SCORES, 0.5, round).items()}


@pytest.mark.parametrize("scope", ["global", "per-kind", "per-layer"])
def test_the_best_are_among_what_is_drawn(scope: str) -> None:
    original = {axis.name: axis.size for axis in AXES}
    best = select(AXES, SCORES, PARAMS, limits=Limits(scope=scope, least=0), original=original, keep_share=0.25)  # type: ignore[arg-type]
    found = drawn(scope)
    for name, kept in best.items():
        assert not (kept & ~torch.tensor(found[name])).any()
    held = sum(PARAMS[name] * sum(chosen) for name, chosen in found.items())
    assert held == pytest.approx(0.5 * sum(SIZES[name] * PARAMS[name] for name in "ab"), abs=30)


def test_what_is_drawn_is_that_of_the_seed_and_of_the_round() -> None:
    assert drawn("per-kind") == drawn("per-kind")
    assert drawn("per-kind", seed=1) != drawn("per-kind") != drawn("per-kind", round=2)


@pytest.mark.parametrize(("stage", "name"), [("prune", "magnitude"), ("mask", "fisher")])
def test_a_criterion_whose_scores_are_refused_is_named(
    stage: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def negative(weight: Tensor, grad: Tensor) -> Tensor:
        return -weight.square()

    recipe = tiny("vit", prune={"criterion": "magnitude", "ratio": 0.4 if stage == "prune" else 0.0})
    state = init(recipe, tmp_path / "state")
    monkeypatch.setattr(importance, "load_criterion", lambda _: Criterion("none", negative))
    if stage == "mask":
        prune(state)
    with pytest.raises(PluginError, match=f"the criterion '{name}' gave scores below zero"):
        (prune if stage == "prune" else mask)(state)


def test_a_criterion_that_draws_draws_anew_in_each_round(tmp_path: Path) -> None:
    recipe = tiny("vit", prune={"ratio": 0.0, "ramp": 1.0}, mask={"criterion": "random"}, finetune={"steps": 2})
    state, masks = init(recipe, tmp_path / "state"), []
    for number in (1, 2):
        for stage in (prune, mask, finetune):
            stage(State.open(state.path))
        masks.append(State.open(state.path).load_tensors(f"round-00{number}/mask.safetensors"))
        merge(State.open(state.path))
    assert any(not torch.equal(masks[0][name], masks[1][name]) for name in masks[0])
