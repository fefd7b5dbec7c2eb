"""The axis of learning rates: what its cells are, what it refuses, and how a comparison grows along it."""

import json
from pathlib import Path
from typing import Any

import pytest

from recap_cli.compare import cell as cells
from recap_cli.compare import rate_axis, rates, runner, store
from recap_cli.compare.schema import groups, metric_of
from recap_cli.errors import StateError, UsageError
from recap_cli.recipe import recipe as recipes
from tests.compare.test_runner import plan, stored
from tests.tiny import tiny


def rows_of(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["method"]: row for row in groups(results["cells"], metric_of(results))}


@pytest.fixture
def by_rate(quick: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """By what its name has, the validation value of each cell that runs."""
    values: dict[str, float] = {}
    figures = cells.figures

    def made(path: Path) -> dict[str, Any]:
        return figures(path) | {"value": next((value for key, value in values.items() if key in path.name), 0.5)}

    monkeypatch.setattr(cells, "figures", made)
    return values


def test_each_cell_has_a_rate_of_its_methods_list_or_of_the_general_one(recipe: str) -> None:
    made = plan(recipe, lrs={None: [0.001, 0.0003], "full-ft": [2.0]}, ratios=[0.2], seeds=[0, 1])
    assert [cell.name for cell in made.cells] == [
        f"{name}-s{seed}"
        for seed in (0, 1)
        for name in ("full-ft-lr2", "recap-rp0.2-rf0.6-lr0.001", "recap-rp0.2-rf0.6-lr0.0003")
    ]
    assert [cell.lr for cell in made.cells[:3]] == [2.0, 0.001, 0.0003]
    assert [cell.recipe.finetune.lr for cell in made.cells[:3] if cell.recipe] == [2.0, 0.001, 0.0003]
    assert made.cells[1].settings == {"method": "recap", "prune.ratio": 0.2, "mask.ratio": 0.6, "seed": 0, "finetune.lr": 0.001}
    assert made.grid.lrs == {"full-ft": (2.0,), "recap": (0.001, 0.0003)}


def test_without_a_general_list_the_others_stay_at_the_rate_of_the_recipe(recipe: str) -> None:
    full, recap = plan(recipe, "finetune.lr=0.05", lrs={"recap": [0.001]}).cells
    assert (full.name, full.lr, full.rate) == ("full-ft-s0", None, 0.05)
    assert (recap.name, recap.lr, recap.rate) == ("recap-rp0.4-rf0.6-lr0.001-s0", 0.001, 0.001)
    assert full.settings == {"method": "full-ft", "seed": 0}


def test_a_method_that_trains_the_head_alone_has_the_heads_rate_varied(recipe: str) -> None:
    (head,) = plan(recipe, "finetune.head_lr=0.5", methods=["head-ft"], lrs={None: [0.02]}).cells
    assert head.recipe is not None
    assert (head.recipe.finetune.head_lr, head.recipe.finetune.lr, head.rate) == (0.02, 0.01, 0.02)
    assert head.settings == {"method": "head-ft", "seed": 0, "finetune.head_lr": 0.02}
    (own,) = plan(recipe, "finetune.head_lr=0.5", methods=["head-ft"]).cells
    assert own.rate == 0.5
    (recap,) = plan(recipe, "finetune.head_lr=0.5", methods=["recap"], lrs={None: [0.02]}).cells
    assert recap.recipe is not None
    assert (recap.recipe.finetune.head_lr, recap.recipe.finetune.lr) == (0.5, 0.02)
    faithful = recipes.changed(recipes.read(recipe), {"method": "head-ft"}).model_copy(update={"faithful": True})
    assert rate_axis.key_of(faithful) == "finetune.lr"  # it has no rate of the head


@pytest.mark.parametrize(
    ("overrides", "lrs", "problem"),
    [
        (["finetune.lr=0.1"], {None: [0.1]}, "--set finetune.lr=0.1: the grid varies finetune.lr"),
        (["recap:finetune.lr=0.1"], {None: [0.1]}, "the grid varies finetune.lr"),
        (["recap:finetune.lr=0.1"], {"recap": [0.1]}, "the grid varies finetune.lr"),
        (["finetune.lr=0.1"], {"recap": [0.1], "head-ft": [0.1]}, "the grid varies finetune.lr"),
        (["head-ft:finetune.head_lr=0.1"], {None: [0.1]}, "the grid varies finetune.head_lr"),
        (["head-ft:finetune.lr=0.1"], {None: [0.1]}, "the grid varies finetune.lr"),
        ([], {"recp": [0.1]}, "--lrs recp:0.1: there is no method recp; compared are head-ft, recap"),
        ([], {"": [0.1]}, "there is no method ''"),
    ],
)
def test_a_rate_that_is_set_twice_and_an_unknown_method_are_refused(
    recipe: str, overrides: list[str], lrs: Any, problem: str
) -> None:
    with pytest.raises(UsageError) as caught:
        plan(recipe, *overrides, methods=["head-ft", "recap"], lrs=lrs)
    assert problem in caught.value.message
    assert "--lrs" in str(caught.value.hint)


def test_what_may_be_set_beside_rates_is_what_they_do_not_set(recipe: str) -> None:
    head, recap = plan(recipe, "recap:finetune.head_lr=0.1", methods=["head-ft", "recap"], lrs={"head-ft": [0.3]}).cells
    assert (head.rate, recap.rate) == (0.3, 0.01)
    plan(recipe, "recap:finetune.lr=0.1", methods=["head-ft", "recap"], lrs={"head-ft": [0.3]})


def test_lists_of_methods_that_are_not_compared_are_noted(recipe: str) -> None:
    assert plan(recipe, lrs={"lora-ft": [0.001, 1e-5]}).notes == (
        "--lrs lora-ft:0.001,1e-05: lora-ft is not compared, so it has no effect",
    )
    own = {"full-ft": [0.1], "recap": [0.1]}
    assert plan(recipe, lrs={None: [0.2], **own}).notes == (
        "--lrs 0.2: every method that is compared has rates of its own, so it has no effect",
    )
    assert plan(recipe, lrs={None: [0.2], "recap": [0.1]}).notes == ()


def test_a_later_run_with_more_rates_runs_only_these_and_the_note_of_the_edge_is_gone(
    recipe: str, quick: list[str], by_rate: dict[str, float]
) -> None:
    by_rate |= {"lr0.1-": 0.6, "lr0.2-": 0.7, "lr0.4-": 0.65}
    results = runner.compare(plan(recipe, methods=["recap"], lrs={None: [0.1, 0.2]}), Path("out"))
    assert results["grid"]["lrs"] == [0.1, 0.2]
    row = rows_of(results)["recap"]
    assert (row["lr"], row["value"], row["edge"]) == (0.2, 0.7, "highest")
    assert "add --lrs recap:0.4" in str(rates.note(row, "recap"))
    results = runner.compare(plan(recipe, methods=["recap"], lrs={None: [0.1, 0.2], "recap": [0.4]}), Path("out"))
    assert quick == [f"recap-rp0.4-rf0.6-lr{lr}-s0" for lr in (0.1, 0.2, 0.4)]
    row = rows_of(results)["recap"]
    assert (row["lr"], row["value"], rates.note(row, "recap")) == (0.2, 0.7, None)
    assert [rate["value"] for rate in row["rates"]] == [0.6, 0.7, 0.65]
    assert recipes.read("out/recipes/recap-rp0.4-rf0.6-lr0.4-s0.yaml").finetune.lr == 0.4
    table = Path("out/results.csv").read_text(encoding="utf-8").splitlines()
    assert table[0].split(",")[:6] == ["method", "prune_ratio", "mask_ratio", "lr", "rate", "seed"]
    assert [line.split(",")[3] for line in table[1:]] == ["0.1", "0.2", "0.4"]


def without_rates(out: Path) -> None:
    """Make results what older versions have written."""
    found = stored(out)
    for record in found["cells"]:
        for key in ("lr", "rate", "test"):
            del record[key]
    (out / "results.json").write_text(json.dumps(found), encoding="utf-8")


def test_results_of_older_versions_are_continued_and_their_rate_is_one_of_those_that_were_tried(
    recipe: str, quick: list[str], by_rate: dict[str, float]
) -> None:
    by_rate |= {"lr0.1-": 0.1, "lr0.001-": 0.2}
    runner.compare(plan(recipe), Path("out"))
    without_rates(Path("out"))
    results = runner.compare(plan(recipe), Path("out"))
    assert quick == ["full-ft-s0", "recap-rp0.4-rf0.6-s0"]  # nothing ran again
    assert "lrs" not in results["grid"]
    assert not rates.are_varied(results["cells"])
    without_rates(Path("out"))
    results = runner.compare(plan(recipe, lrs={"recap": [0.1, 0.001]}), Path("out"))
    assert quick[2:] == ["recap-rp0.4-rf0.6-lr0.1-s0", "recap-rp0.4-rf0.6-lr0.001-s0"]
    rows = rows_of(results)
    assert [rate["lr"] for rate in rows["recap"]["rates"]] == [0.001, 0.01, 0.1]
    assert (rows["recap"]["lr"], rows["recap"]["value"], rows["recap"]["edge"]) == (0.01, 0.5, None)
    assert (rows["full-ft"]["lr"], len(rows["full-ft"]["rates"])) == (0.01, 1)


def test_a_rate_that_was_set_for_a_method_is_no_other_setting_and_anything_else_is(recipe: str, quick: list[str]) -> None:
    runner.compare(plan(recipe, "recap:finetune.lr=0.3", methods=["recap"]), Path("out"))
    without_rates(Path("out"))
    results = runner.compare(plan(recipe, methods=["recap"], lrs={None: [0.1]}), Path("out"))
    assert [rate["lr"] for rate in rows_of(results)["recap"]["rates"]] == [0.1, 0.3]
    with pytest.raises(StateError, match=r"cells of recap with other settings: finetune\.lr"):
        runner.describe(plan(recipe, "recap:finetune.lr=0.4", methods=["recap"]), Path("out"))
    with pytest.raises(StateError, match=r"cells of recap with other settings: finetune\.head_lr"):
        runner.describe(plan(recipe, "recap:finetune.head_lr=0.1", methods=["recap"], lrs={None: [0.1]}), Path("out"))


def test_a_rate_beyond_what_results_can_say_does_not_spoil_them(recipe: str) -> None:
    made = plan(recipe, "finetune.lr=1e30", methods=["recap"])
    store.write(Path("."), store.merged(None, made, {"versions": {}, "machine": {}}) | {"created": "2026"})
    assert stored(Path())["cells"][0]["rate"] is None


def test_the_rate_of_auto_is_not_known_before_the_model() -> None:
    recipe = recipes.changed(tiny("vit"), {"finetune.lr": "auto"})
    assert rate_axis.rate_of(recipe, rate_axis.LR) is None
    assert rate_axis.rate_of(recipe, rate_axis.HEAD_LR) is None
    assert rate_axis.rate_of(recipes.changed(recipe, {"finetune.head_lr": 0.02}), rate_axis.HEAD_LR) == 0.02
    assert rate_axis.rate_of(tiny("vit", finetune={"lr": 0.03}), rate_axis.HEAD_LR) == 0.03
