"""`finetune.lr: auto` and `distill.teacher_lr: auto`: the rate of the method, less for a wide model, and where it is used."""

from pathlib import Path
from typing import Any

import pytest

from recap_cli.core.method import RoundPlan
from recap_cli.errors import RecipeError
from recap_cli.models import build
from recap_cli.recipe import recipe as recipes
from recap_cli.rounds.layout import Layout
from recap_cli.rounds.plans import method_of_name
from recap_cli.rounds.rates import WIDTH, peak_lr, width_of
from recap_cli.rounds.run_context import Context
from recap_cli.rounds.status import describe
from recap_cli.stages.run import run
from tests.pico import PICO, pico
from tests.tiny import tiny


def layout_of(name: str) -> Layout:
    model, spec = pico(name)
    return Layout.of_model(build.adapter_of(spec), model)


@pytest.mark.parametrize("name", sorted(PICO))
def test_the_width_of_a_model_is_its_hidden_size(name: str) -> None:
    assert width_of(layout_of(name)) == 32


def test_auto_is_the_rate_of_the_method_and_less_for_a_wide_model(monkeypatch: pytest.MonkeyPatch) -> None:
    layout, plan, teacher = layout_of("vit"), RoundPlan(), RoundPlan(trains="teacher")
    for method in ("recap", "full-ft", "lora-ft", "head-ft"):
        recipe = recipes.changed(tiny("vit"), {"method": method, "finetune.lr": "auto"})
        assert peak_lr(recipe, layout, plan) == method_of_name(method).lr
        assert peak_lr(recipes.changed(recipe, {"finetune.lr": 0.03}), layout, plan) == 0.03
    taught = tiny("vit", distill={"teacher": "lora"}, finetune={"lr": 0.03})
    assert peak_lr(taught, layout, teacher) == method_of_name("lora-ft").lr
    assert peak_lr(recipes.changed(taught, {"distill.teacher": "full"}), layout, teacher) == method_of_name("full-ft").lr
    assert peak_lr(recipes.changed(taught, {"distill.teacher_lr": 0.02}), layout, teacher) == 0.02
    assert peak_lr(taught, layout, plan) == 0.03
    wide = recipes.changed(taught, {"finetune.lr": "auto"})
    monkeypatch.setattr("recap_cli.rounds.rates.width_of", lambda _: 2 * WIDTH)
    assert peak_lr(wide, layout, plan) == method_of_name("recap").lr / 2
    assert peak_lr(wide, layout, teacher) == method_of_name("lora-ft").lr / 2


def test_a_run_takes_it_notes_it_and_is_the_run_at_that_rate(tmp_path: Path) -> None:
    found: dict[Any, Any] = {}
    for lr in ("auto", method_of_name("recap").lr):
        state = run(recipes.changed(tiny("vit", rounds=1), {"finetune.lr": lr}), tmp_path / str(lr))
        noted = [entry["lr"] for entry in state.manifest.history if entry["stage"] == "finetune"]
        assert noted == [method_of_name("recap").lr]
        found[lr] = Context(state).full_weights()
    auto, said = found.values()
    assert all(auto[name].equal(said[name]) for name in auto)


def test_a_dry_run_says_what_auto_is_and_sgd_has_none() -> None:
    recipe = recipes.changed(tiny("vit"), {"finetune.lr": "auto"})
    assert any("with adamw at 0.0004 (auto: less where the model is wider than 384)" in line for line in describe(recipe))
    with pytest.raises(RecipeError, match="expected a number with sgd; found auto"):
        recipes.changed(recipe, {"finetune.optimizer": "sgd"})
    with pytest.raises(RecipeError, match=r"finetune\.lr"):
        tiny("vit", finetune={"lr": "fast"})
