"""The pages that are written from benchmarks/results: they are those of the figures, and hold like against like."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a script of benchmarks/."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def quality(load: Any) -> ModuleType:
    page: ModuleType = load("quality_page")
    return page


@pytest.mark.parametrize(
    ("script", "page"),
    [
        ("quality_page", "quality.md"),
        ("tables", "benchmarks.md"),
        ("memory_page", "memory.md"),
        ("segmentation_page", "segmentation.md"),
    ],
)
def test_a_page_is_what_its_script_makes_of_the_results(script: str, page: str, load: Any) -> None:
    assert (ROOT / "benchmarks" / "pages" / page).read_text(encoding="utf-8") == load(script).page()


def cells(variant: str, last: list[float], mask_ratio: float | None = None) -> list[dict[str, Any]]:
    """A cell for each seed."""
    memory = {"weights_bytes": 8, "gradients_bytes": 0, "optimizer_bytes": 8}
    common = {"variant": variant, "mask_ratio": mask_ratio, "prune_ratio": 0.5, "status": "done", "memory": memory}
    return [{**common, "seed": seed, "last": v, "value": v, "parameters": {"full": 2}} for seed, v in enumerate(last)]


def test_the_best_of_a_method_is_that_of_its_rates_and_ties_go_to_it_as_it_comes(quality: ModuleType) -> None:
    usual, twice = cells("pre-ft", [0.5, 0.6, 0.7]), cells("pre-ft@2", [0.6, 0.7, 0.8])
    same, lucky = cells("pre-ft+same-rate@2", [0.7, 0.7, 0.7000001]), cells("pre-ft@4", [0.9, 0.9])
    assert quality.best_of([*usual, *same, *twice, *lucky, *cells("recap", [1.0, 1.0, 1.0], 0.5)], "pre-ft") == twice
    assert quality.best_of(lucky, "pre-ft") == []  # two seeds are too few
    ours, like = cells("recap", [0.5, 0.6, 0.7], 0.5), cells("late-settled", [0.5, 0.6, 0.7], 0.5)
    assert quality.best_of([*like, *ours], "recap") == ours


def test_the_best_of_a_method_may_have_the_settings_that_any_of_them_may_have(quality: ModuleType) -> None:
    plain, longer = cells("recap", [0.5, 0.5, 0.5], 0.0), cells("global-prune+late-settled@2", [0.6, 0.6, 0.6], 0.0)
    drawn, theirs = cells("random-mask", [0.9, 0.9, 0.9], 0.0), cells("post-ft+still-embeddings+global-prune", [0.8, 0.8, 0.8])
    assert quality.best_of([*plain, *longer, *drawn, *theirs], "recap") == longer
    assert quality.best_of([*plain, *longer, *drawn, *theirs], "post-ft") == theirs
    assert quality.rates_of("global-prune+late-settled@2", 1e-4) == "0.0002, one ranking, longer ramp"


def test_differences_are_seed_by_seed(quality: ModuleType) -> None:
    ours, theirs = cells("recap", [0.50, 0.60, 0.70]), cells("pre-ft", [0.49, 0.58, 0.67])
    assert quality.against(ours, list(reversed(theirs))) == "+2.0 ± 0.6"  # 1, 2 and 3 points: s.d. 1, s.e. 1 / √3
    assert quality.against(ours, theirs[:1]) == ""


def test_a_row_is_held_against_recap_with_the_defaults_that_it_was_run_with(quality: ModuleType) -> None:
    new, old = cells("recap", [0.5, 0.5], 0.5), cells("earlier", [0.4, 0.4], 0.5)
    others = [*cells("recap", [0.6, 0.6], 0.2), *cells("settled+earlier", [0.3, 0.3], 0.5), *cells("pre-ft", [0.2, 0.2])]
    others += cells("pre-ft+same-rate@2", [0.1, 0.1])
    found = {(row[0], row[1]): row[5] for row in quality.rows([*new, *old, *others], ("recap", 0.5))}
    assert found["**RECAP**", "50%"] == found["RECAP, earlier defaults", "50%"] == ""
    assert found["RECAP", "20%"] == "+10.0 ± 0.0"
    assert found["RECAP without the ramp, earlier defaults", "50%"] == "-10.0 ± 0.0 (e)"
    assert found["pre-ft: prune, then finetune all that is left", ""] == "-30.0 ± 0.0"
    name = "pre-ft: prune, then finetune all that is left, the head at the rate of the rest, rate × 2"
    assert found[name, ""] == "-30.0 ± 0.0 (e)"
    rated = {
        (row[0], row[1]): row[5] for row in quality.rows([*new, *old, *cells("recap@4", [0.6, 0.6], 0.0)], ("recap@4", 0.0))
    }
    assert rated["RECAP", "50%"] == "+10.0 ± 0.0 (e)"  # at the rate that was usual then


def test_a_variant_is_held_against_recap_at_its_own_rate_and_mask_ratio(quality: ModuleType) -> None:
    ours = [*cells("recap@4", [0.9, 0.9], 0.0), *cells("recap@4", [0.8, 0.8], 0.5)]
    others = [*cells("random-mask@4", [0.7, 0.7], 0.5), *cells("pre-ft@4", [0.6, 0.6]), *cells("settled@2", [0.5, 0.5], 0.5)]
    found = {row[0]: row[5] for row in quality.rows([*ours, *others], ("recap@4", 0.0))}
    assert found["RECAP, mask at random, rate × 4"] == "-10.0 ± 0.0 (s)"
    assert found["pre-ft: prune, then finetune all that is left, rate × 4"] == "-30.0 ± 0.0"
    assert found["RECAP without the ramp, rate × 2"] == "-40.0 ± 0.0"  # RECAP was not run at that rate


def test_in_short_a_text_that_nothing_was_tuned_on_keeps_the_rate_of_another(quality: ModuleType) -> None:
    mine = [*cells("recap@4", [0.5, 0.5, 0.5], 0.0), *cells("recap@2", [0.6, 0.6, 0.6], 0.0)]
    mine += [*cells("pre-ft@2", [0.4, 0.4, 0.4, 0.4]), *cells("post-ft@2", [0.7, 0.7, 0.7])]
    lines = {task: quality.in_short({task: {"cells": mine, "lr": 1e-4}}).splitlines()[-1] for task in ("sst2", "mrpc")}
    found = {task: [part.strip() for part in line.strip("|").split("|")] for task, line in lines.items()}
    assert found["sst2"][:5] == ["sst2", "50.0%", "0%", "3 to 4", "60.0 ± 0.0 (0.0002)"]
    assert found["mrpc"][:5] == ["mrpc", "50.0%", "0%", "3 to 4", "50.0 ± 0.0 (0.0004)"]
    assert found["mrpc"][7:9] == ["+10.0 ± 0.0", "-20.0 ± 0.0"]


def test_held_out_each_is_at_the_rate_that_its_validation_data_chose(quality: ModuleType) -> None:
    mine = [*cells("recap@4", [0.5, 0.5, 0.5], 0.0), *cells("recap@2", [0.6, 0.6, 0.6], 0.0)]
    mine += [*cells("pre-ft@2", [0.4, 0.4, 0.4]), *cells("pre-ft@4", [0.3, 0.3, 0.3]), *cells("post-ft@2", [0.7, 0.7, 0.7])]
    scores = {"recap@4": 0.9, "recap@2": 0.1, "pre-ft@2": 0.2, "pre-ft@4": 1.0, "post-ft@2": 0.3}
    scored = [{**cell, "f1": scores[cell["variant"]], "examples": 7} for cell in mine]
    common = {
        "versions": {},
        "environment": {},
        "command": "x",
        "date": "today",
        "machine": {"cores": 2, "cpu": "", "ram_gib": 8},
    }
    held = {"mrpc": {"metric": "f1", "cells": scored, "held_out": "others", **common}}
    page = quality.held_out({"mrpc": {"cells": mine, "lr": 1e-4}}, held)
    found = [[part.strip() for part in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| mrpc")]
    assert [row[3:8] for row in found] == [
        ["3", "7", "90.0 ± 0.0 (0.0004)", "20.0 ± 0.0 (0.0002)", "30.0 ± 0.0 (0.0002)"],  # RECAP at the rate of another task
        ["3", "7", "10.0 ± 0.0 (0.0002)", "20.0 ± 0.0 (0.0002)", "30.0 ± 0.0 (0.0002)"],
    ]
    assert found[1][8:] == ["-10.0 ± 0.0", "-20.0 ± 0.0"]
    held["mrpc"]["cells"] = scored[:6]
    assert quality.held_out({"mrpc": {"cells": mine, "lr": 1e-4}}, held) == ""  # nothing to hold RECAP against


def test_what_a_variant_sets_reaches_the_cells_that_run(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, plans = load("quality"), list[Any]()
    base = {"name": "x", "model": {"config": {"model_type": "vit"}}, "task": {"kind": "image-classification"}}
    monkeypatch.setattr(runner, "recipe_of", lambda _: {**base, "data": {"builtin": "digits", "image": "image"}})
    monkeypatch.setattr(runner, "compare", lambda plan, *_, **__: plans.append(plan) or {"cells": []})
    for variant, values in runner.VARIANTS.items():
        if values.get("mask.train_embeddings") == "tokens":
            continue  # of texts
        name = f"post-ft+{variant}" if variant == "still-embeddings" else variant
        runner.measure("cifar100", name, [0.333], [0.5], [0], 1, tmp_path)
        (cell,) = plans[-1].cells
        assert cell.recipe is not None, (variant, cell.error)
        found = cell.recipe.model_dump(mode="json")
        for key, value in values.items():
            section, _, rest = key.partition(".")
            assert (found[section][rest] if rest else found[section]) == value, key


def test_what_is_held_out_has_nothing_of_what_was_seen(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = load("held_out")

    class Rows(dict[str, list[Any]]):
        def select(self, kept: list[int]) -> "Rows":
            return Rows({name: [values[at] for at in kept] for name, values in self.items()})

    class Raw:
        def __init__(self, train: Rows, validation: Rows) -> None:
            self.train, self.validation = train, validation

    images = Rows(row=list(range(20)))
    phrases = Rows(text=["a b c d", "b c d e", "x a b", "a b", "f g h", "e d c b a"])

    def raw(_: str, data: dict[str, Any], seed: int = 0) -> Raw:
        seen = Raw(Rows(text=[["a b c d"], ["f g h i"]][seed % 2]), Rows(row=[seed, 2 * seed + 1]))
        return Raw(phrases, images) if data else seen

    monkeypatch.setattr(scorer, "raw_of", raw)
    assert scorer.examples("cifar100", 0)["row"] == [6, 8, 10, *range(12, 20)]  # 0 to 5, and 1, 3, 5, 7, 9, 11 were looked at
    assert scorer.examples("sst2", 0)["text"] == ["x a b", "f g h", "e d c b a"]  # too short says nothing
    assert scorer.examples("sst2", 1)["text"] == ["a b c d", "b c d e", "x a b", "e d c b a"]
    monkeypatch.setattr(scorer, "MOST", 3)
    drawn = scorer.examples("cifar100", 0)["row"]
    assert len(drawn) == 3
    assert drawn == scorer.examples("cifar100", 4)["row"] == sorted(drawn)


def test_all_machines_of_a_result_are_named(load: Any) -> None:
    one, other = ({"cores": 2, "cpu": cpu, "ram_gib": 8} for cpu in ("this", "that"))
    common = {"versions": {}, "environment": {}, "command": "python x.py", "date": "today", "machine": one}
    assert "2 cores of this, 8 GiB; " in load("tables").ran_on(common)
    assert "2 cores of this, 8 GiB or 2 cores of that, 8 GiB; " in load("tables").ran_on({**common, "machines": [one, other]})


def test_every_variant_has_words(quality: ModuleType, load: Any) -> None:
    runner = load("quality")
    for variant in (*runner.VARIANTS, *runner.METHODS):
        assert quality.said(f"{variant}@2").endswith("rate × 2")
    assert set(quality.SAID) == {*runner.VARIANTS, *runner.METHODS}
    assert set(quality.MAIN) == set(quality.TASKS) == set(runner.TASKS)
