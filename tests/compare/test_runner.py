"""Comparisons: grids become cells, cells run in processes of their own, and the results hold whatever happens to one."""

import csv
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from recap_cli.compare import cell as cells
from recap_cli.compare import grid, processes, runner, store
from recap_cli.compare.schema import Outcome, groups
from recap_cli.core.task import Metric
from recap_cli.errors import PluginError, RecipeError, StateError, StateLockedError, UsageError
from recap_cli.recipe import recipe as recipes
from recap_cli.state.lock import locked
from tests.limits import HANG_SECONDS

ACCURACY = Metric("accuracy")


def plan(recipe: str, *overrides: str, **given: Any) -> grid.Plan:
    return grid.plan(recipe, overrides, grid.Grid(**{"methods": ["full-ft", "recap"], "seeds": [0], **given}))


def stored(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "results.json").read_text(encoding="utf-8"))
    return found


# The grid


def test_a_method_has_the_ratios_that_mean_something_to_it_and_one_seed_comes_after_another(recipe: str) -> None:
    made = plan(recipe, methods=["full-ft", "pre-ft", "recap"], ratios=[0.2, 0.4], mask_ratios=[0.5], seeds=[0, 3])
    assert [cell.name for cell in made.cells] == [
        f"{name}-s{seed}"
        for seed in (0, 3)
        for name in ("full-ft", "pre-ft-rp0.2", "pre-ft-rp0.4", "recap-rp0.2-rf0.5", "recap-rp0.4-rf0.5")
    ]
    last = made.cells[-1]
    assert last.recipe is not None
    assert (last.recipe.method, last.recipe.seed, last.recipe.prune.ratio, last.recipe.mask.ratio) == ("recap", 3, 0.4, 0.5)
    assert last.settings == {"method": "recap", "prune.ratio": 0.4, "mask.ratio": 0.5, "seed": 3}
    assert made.grid == grid.Grid(("full-ft", "pre-ft", "recap"), (0.2, 0.4), (0.5,), (0, 3))


def test_without_lists_all_methods_are_compared_at_the_ratios_of_the_recipe_with_three_seeds(recipe: str) -> None:
    made = grid.plan(recipe)
    assert made.grid.methods[: len(grid.ORDER)] == grid.ORDER
    assert (made.grid.ratios, made.grid.mask_ratios, made.grid.seeds) == ((0.4,), (0.6,), (0, 1, 2))


def test_a_strangers_method_comes_after_ours_and_may_be_called_anything() -> None:
    assert sorted(["a/b", "recap", "full-ft"], key=grid.place) == ["full-ft", "recap", "a/b"]
    assert grid.Cell("a/b", None, None, 1, {}, None).name == "a%2Fb-s1"


def test_ratios_that_do_not_fit_make_one_cell_impossible_and_no_other(recipe: str) -> None:
    impossible, possible = plan(recipe, methods=["recap"], ratios=[0.9, 0.3]).cells
    assert impossible.recipe is None
    assert impossible.error == "prune.ratio expected at most 0.85, as prune.floor keeps 0.15 of each layer; found 0.9"
    assert possible.recipe is not None


def test_an_override_for_a_method_is_for_no_other_and_part_of_its_settings(recipe: str) -> None:
    full, recap = plan(recipe, "finetune.lr=0.02", "recap:prune.floor=0.25").cells
    assert full.recipe is not None
    assert recap.recipe is not None
    assert (full.recipe.prune.floor, recap.recipe.prune.floor) == (0.15, 0.25)
    assert full.recipe.finetune.lr == recap.recipe.finetune.lr == 0.02
    assert recap.settings["prune.floor"] == 0.25
    assert "prune.floor" not in full.settings


def test_options_belong_to_the_recipes_own_method(recipe: str) -> None:
    made = plan(recipe, "recap:prune.steps=1", "lora-ft:options.rank=4", methods=["lora-ft", "recap"])
    assert [cell.recipe.options for cell in made.cells if cell.recipe] == [{"rank": 4}, {}]


@pytest.mark.parametrize("given", ["options.embeddings=false", "options = {embeddings: false}"])
def test_options_that_no_cell_would_have_are_refused(given: str, recipe: str) -> None:
    with pytest.raises(UsageError, match="options of recap, the method of the recipe, which is not compared") as caught:
        plan(recipe, given, methods=["post-ft", "pre-ft"])
    typed = shlex.split(str(caught.value.hint).partition("--set ")[2])
    assert typed == [f"post-ft:{given}"]
    (cell,) = plan(recipe, *typed, methods=["post-ft"]).cells
    assert cell.recipe is not None
    assert cell.recipe.options == {"embeddings": False}


@pytest.mark.parametrize(
    ("overrides", "given", "kind", "problem"),
    [
        (["seed=3"], {}, UsageError, "the grid varies seed"),
        (["method=recap"], {}, UsageError, "the grid varies method"),
        (["prune.ratio=0.1"], {"ratios": [0.2]}, UsageError, "the grid varies prune.ratio"),
        (["recap:mask.ratio=0.1"], {}, UsageError, "the grid varies mask.ratio"),
        (["pre-tf:finetune.lr=1"], {}, UsageError, "there is no method pre-tf; compared are full-ft, recap"),
        ([":finetune.lr=1"], {}, UsageError, "there is no method ''; compared are full-ft, recap"),
        (["pre-ft:finetune.lrr=1"], {}, RecipeError, "finetune.lrr"),  # a slip, though pre-ft is not compared
        (["pre-ft:prune.ratio=0.1"], {}, UsageError, "the grid varies prune.ratio"),
        ([], {"methods": ["recp"]}, PluginError, "there is no method named 'recp'; there are: full-ft"),
        (["recap:finetune.lrr=1"], {}, RecipeError, "finetune.lrr"),
        (["recap:prune.criterion=tailor"], {}, PluginError, "tailor"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_runs(
    recipe: str, overrides: list[str], given: dict[str, Any], kind: type[Exception], problem: str
) -> None:
    with pytest.raises(kind) as caught:
        plan(recipe, *overrides, **given)
    assert problem in str(caught.value)
    assert not Path("runs").exists()


def test_what_has_no_effect_on_a_smaller_grid_is_noted_and_not_refused(recipe: str) -> None:
    made = plan(recipe, "lora-ft:finetune.lr=0.002", "recap:finetune.lr=0.02", ratios=[0.2], methods=["recap"])
    assert made.notes == ("--set lora-ft:finetune.lr=0.002: lora-ft is not compared, so it has no effect",)
    assert [cell.recipe.finetune.lr for cell in made.cells if cell.recipe] == [0.02]
    made = plan(recipe, methods=["full-ft", "lora-ft"], ratios=[0.2, 0.5], mask_ratios=[0.3])
    assert made.notes == (
        "--ratios 0.2,0.5: none of the methods full-ft, lora-ft prunes by a ratio, so it has no effect",
        "--mask-ratios 0.3: none of the methods full-ft, lora-ft freezes by a ratio, so it has no effect",
    )
    assert [cell.name for cell in made.cells] == ["full-ft-s0", "lora-ft-s0"]
    assert plan(recipe, methods=["pre-ft"], ratios=[0.2], mask_ratios=[0.3]).notes == (
        "--mask-ratios 0.3: none of the methods pre-ft freezes by a ratio, so it has no effect",
    )
    assert plan(recipe, ratios=[0.2], mask_ratios=[0.3]).notes == ()


def test_the_command_of_a_comparison_that_grew_goes_on(recipe: str, quick: list[str]) -> None:
    runner.compare(plan(recipe, "full-ft:finetune.lr=0.02", seeds=[1]), Path("out"))
    results = runner.compare(plan(recipe, "full-ft:finetune.lr=0.02", methods=["recap"], seeds=[0]), Path("out"))
    assert quick == ["full-ft-s1", "recap-rp0.4-rf0.6-s1", "recap-rp0.4-rf0.6-s0"]
    assert {record["status"] for record in results["cells"]} == {"done"}
    (full,) = (record for record in results["cells"] if record["method"] == "full-ft")
    assert full["settings"]["finetune.lr"] == 0.02


# Processes


def script(name: str, code: str, folder: Path) -> processes.Process:
    return processes.Process(name, [sys.executable, "-S", "-c", code], folder / f"{name}.log")


def test_so_many_run_at_a_time_and_each_has_its_share_of_the_cores(tmp_path: Path) -> None:
    line = "open('lines', 'a').write({} + '\\n')"
    code = f"import os, time; os.chdir({str(tmp_path)!r}); {line.format(repr('+'))}; time.sleep(0.2); {line.format(repr('-'))}"
    ended = list(processes.run([script(str(number), code, tmp_path) for number in range(5)], jobs=2))
    assert sorted(ended) == [(str(number), None) for number in range(5)]
    running = [sum(1 if mark == "+" else -1 for mark in "".join(lines)) for lines in _heads(tmp_path / "lines")]
    assert max(running) == 2
    share = str(max(1, processes.cores() // 2))
    assert processes.surroundings(2, {"FORCE_COLOR": "1"}) == {"OMP_NUM_THREADS": share, "RECAP_CORES_DIVIDED": "1"}
    assert processes.surroundings(2, {"OMP_NUM_THREADS": "7"}) == {"OMP_NUM_THREADS": "7"}
    assert processes.surroundings(1, {}) == {}


def _heads(path: Path) -> list[list[str]]:
    marks = path.read_text().split()
    return [marks[: count + 1] for count in range(len(marks))]


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        (
            "import sys; sys.exit('noise\\nerror: 2 problems\\n  here\\n  there\\nhint: mend them')",
            "2 problems\n  here\n  there",
        ),
        ("import sys; sys.exit('Traceback\\nBoom: it broke')", "it ended with 1: Boom: it broke"),
        ("import sys; sys.exit(3)", "it ended with 3: no output"),
        ("import os; os.kill(os.getpid(), 9)", "its process was ended by SIGKILL, as the system does if memory runs out"),
    ],
)
def test_a_command_that_fails_says_why(code: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "x.log").write_text("error: of the run before\n")
    assert list(processes.run([script("x", code, tmp_path)], jobs=1)) == [("x", problem)]
    assert (tmp_path / "x.log").read_text().startswith("error: of the run before\n")


def wait_for(path: Path) -> int:
    """The number that another process writes into the file."""
    deadline = time.monotonic() + HANG_SECONDS
    while not (path.exists() and path.read_text().endswith("\n")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return int(path.read_text())


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


SLEEPER = "import os, time; open({!r}, 'w').write(f'{{os.getpid()}}\\n'); time.sleep(3600)"


def test_closed_early_it_ends_what_runs(tmp_path: Path) -> None:
    sleeper = script("sleeper", SLEEPER.format(str(tmp_path / "pid")), tmp_path)
    quick = script("quick", f"import os, time\nwhile not os.path.exists({str(tmp_path / 'pid')!r}): time.sleep(0.02)", tmp_path)
    with closing(processes.run([sleeper, quick], jobs=2)) as ended:
        assert next(ended) == ("quick", None)
    assert not is_alive(wait_for(tmp_path / "pid"))


def test_asked_to_end_by_a_signal_it_ends_what_runs(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from recap_cli.compare.processes import Process, run\n"
        "list(run([Process('x', [sys.executable, '-S', '-c', sys.argv[1]], Path(sys.argv[2]))], jobs=1))"
    )
    command = [sys.executable, "-c", code, SLEEPER.format(str(tmp_path / "pid")), str(tmp_path / "log")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as parent:
        pid = wait_for(tmp_path / "pid")
        parent.terminate()
        assert "KeyboardInterrupt" in parent.communicate(timeout=HANG_SECONDS)[1]
    assert not is_alive(pid)


# Results


def test_the_results_are_whole_after_every_cell(recipe: str, commands: list[str]) -> None:
    seen = []

    def look(record: dict[str, Any]) -> None:
        found = stored(Path("out"))
        seen.append([one["status"] for one in found["cells"]])
        assert record in found["cells"]

    results = runner.compare(plan(recipe), Path("out"), command="recap compare tiny.yaml", on_cell=look)
    assert seen == [["done", "waiting"], ["done", "done"]]
    assert commands == ["full-ft-s0", "recap-rp0.4-rf0.6-s0"]
    assert stored(Path("out")) == results
    assert (results["schema"], results["kind"], results["recipe"]) == (1, "comparison", "tiny-vit")
    assert results["grid"] == {"methods": ["full-ft", "recap"], "ratios": [0.4], "mask_ratios": [0.6], "seeds": [0]}
    assert results["machine"]["cores"] >= 1
    assert results["versions"].keys() >= {"recap", "python", "torch"}
    full, recap = results["cells"]
    assert tuple(recap) == tuple(Outcome.model_fields)
    assert full["steps"] == recap["steps"] == results["total_steps"] == 5
    assert recap["per_round"] == [recap["last"]] == [recap["value"]]
    assert recap["product_round"] == 1
    assert all(seconds >= 0 for seconds in recap["seconds"].values())
    for kind in ("weights_bytes", "gradients_bytes", "optimizer_bytes", "peak_bytes"):
        assert 0 < recap["memory"][kind] < full["memory"][kind]
    assert recap["memory"]["activations_bytes"] > 0
    assert recap["memory"]["device_peak_bytes"] is None
    for record in (full, recap):
        held = sum(record["memory"][f"{kind}_bytes"] for kind in ("weights", "gradients", "optimizer"))
        assert record["memory"]["full_held_bytes"] == 16 * record["parameters"]["full"]  # weights, gradients, two moments
        assert record["memory"]["held_share"] == held / record["memory"]["full_held_bytes"]
    assert 0 < recap["memory"]["held_share"] < full["memory"]["held_share"] <= 1
    assert full["parameters"]["full"] == full["parameters"]["product"] > recap["parameters"]["product"]
    assert full["product"]["bytes"] > recap["product"]["bytes"] > 0
    assert recap["product"]["latency_batch"] == 18
    assert recap["product"]["latency_on"] == "cpu, 1 thread"
    assert recap["product"]["latency_seconds"] > 0
    assert results["pictures"] == ["metric-prune-ratio.png", "metric-memory.png", "memory-time.png"]
    assert all(Path("out", name).stat().st_size > 1000 for name in results["pictures"])
    assert recipes.read("out/recipes/recap-rp0.4-rf0.6-s0.yaml").method == "recap"
    rows = list(csv.DictReader(Path("out/results.csv").read_text(encoding="utf-8").splitlines()))
    assert [row["method"] for row in rows] == ["full-ft", "recap"]
    assert [row["prune_ratio"] for row in rows] == ["", "0.4"]
    assert float(rows[1]["memory.peak_bytes"]) == recap["memory"]["peak_bytes"]
    assert float(rows[1]["memory.held_share"]) == recap["memory"]["held_share"]
    assert float(rows[1]["product.latency_ms"]) == pytest.approx(1e3 * recap["product"]["latency_seconds"], rel=1e-5)
    assert "product.latency_seconds" not in rows[1]


def test_a_larger_grid_adds_cells_and_runs_only_those(recipe: str, quick: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    runner.compare(plan(recipe, seeds=[1]), Path("out"))
    measured: list[str] = []
    monkeypatch.setattr(cells, "measured_product", lambda path: measured.append(path.name) or {})
    runner.compare(plan(recipe, seeds=[1]), Path("out"))
    assert len(quick) == 2
    results = runner.compare(plan(recipe, methods=["full-ft"], seeds=[0]), Path("out"))
    assert quick[2:] == measured == ["full-ft-s0"]
    assert results["grid"]["methods"] == ["full-ft", "recap"]
    assert [(record["method"], record["seed"]) for record in results["cells"]] == [("full-ft", 0), ("full-ft", 1), ("recap", 1)]
    assert results["notes"] == []


def test_cells_that_fail_or_are_impossible_stand_in_the_results_and_are_tried_again(
    recipe: str, quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner.plots, "draw", lambda *_, **__: 1 / 0)
    asked = plan(recipe, methods=["recap"], ratios=[0.4, 0.9], seeds=[13, 0])
    results = runner.compare(asked, Path("out"), jobs=2)
    found = {record["state"]: (record["status"], record["error"]) for record in results["cells"]}
    assert found["cells/recap-rp0.4-rf0.6-s0"] == ("done", None)
    assert found["cells/recap-rp0.4-rf0.6-s13"] == ("failed", "the disk is full")
    assert found["cells/recap-rp0.9-rf0.6-s0"][0] == "impossible"
    assert len(runner.failures(results["cells"], asked)) == 3
    assert results["notes"] == ["no pictures were drawn: ZeroDivisionError: division by zero"]
    runner.compare(asked, Path("out"))
    assert [name for name in quick if name.endswith("s13")] == ["recap-rp0.4-rf0.6-s13"] * 2


def test_stopped_it_keeps_what_is_done_and_a_finished_state_needs_no_process(
    recipe: str, quick: list[str], made: dict[str, Path]
) -> None:
    def stop(items: Any, label: str, total: int | None = None) -> Iterator[Any]:
        yield next(iter(items))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.compare(plan(recipe), Path("out"), track=stop)
    assert [record["status"] for record in stored(Path("out"))["cells"]] == ["done", "waiting"]
    shutil.copytree(made["recap"], "out/cells/recap-rp0.4-rf0.6-s0")  # done just before its parent was killed
    quick.clear()
    results = runner.compare(plan(recipe), Path("out"))
    assert [record["status"] for record in results["cells"]] == ["done", "done"]
    assert quick == []


def test_figures_that_cannot_be_had_are_noted_and_the_cell_counts(
    recipe: str, quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("predicted", "measured_product"):
        monkeypatch.setattr(cells, name, lambda _: 1 / 0)
    results = runner.compare(plan(recipe, methods=["full-ft"]), Path("out"))
    (record,) = results["cells"]
    assert record["status"] == "done"
    assert record["memory"]["peak_bytes"] is None
    assert len(results["notes"]) == 2
    assert all("full-ft-s0" in note and "ZeroDivisionError" in note for note in results["notes"])


def test_two_comparisons_do_not_share_a_folder(recipe: str) -> None:
    Path("out").mkdir()
    with locked(Path("out"), "compare"), pytest.raises(StateLockedError):
        runner.compare(plan(recipe), Path("out"))


def begun(recipe: str, *overrides: str) -> grid.Plan:
    """A comparison that has begun, as results on disk."""
    made = plan(recipe, *overrides)
    Path("out").mkdir()
    store.write(Path("out"), store.merged(None, made, {"versions": {}, "machine": {}}))
    return made


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["finetune.lr=0.5", "name=other"], "name, finetune.lr"),
        (["model.config.hidden_size=16"], "model.config.hidden_size"),
    ],
)
def test_a_folder_keeps_to_its_recipe_and_the_message_says_what_differs(
    recipe: str, overrides: list[str], problem: str
) -> None:
    begun(recipe)
    with pytest.raises(StateError, match="differs from this one in") as caught:
        runner.describe(plan(recipe, *overrides), Path("out"))
    assert str(caught.value).endswith(problem)
    assert "--out out-2" in str(caught.value.hint)


def test_the_recipes_own_method_ratios_and_seed_are_not_what_a_folder_keeps_to(recipe: str) -> None:
    begun(recipe)
    assert len(runner.describe(plan(recipe, "prune.ratio=0.1", seeds=[5]), Path("out"))) == 2
    own = recipes.changed(recipes.read(recipe), {"seed": 9, "method": "full-ft", "mask.ratio": 0.1})
    Path("tiny.yaml").write_text(recipes.dump(own), encoding="utf-8")
    assert len(runner.describe(plan(recipe), Path("out"))) == 2


def test_a_method_keeps_to_its_settings_unless_its_cells_may_still_change(recipe: str) -> None:
    begun(recipe, "recap:prune.floor=0.2")
    other = plan(recipe, "recap:prune.floor=0.3")
    runner.describe(other, Path("out"))  # nothing has run
    found = stored(Path("out"))
    found["cells"][1]["status"] = "done"
    Path("out/results.json").write_text(json.dumps(found), encoding="utf-8")
    with pytest.raises(StateError, match=r"cells of recap with other settings: prune\.floor"):
        runner.describe(other, Path("out"))


def _file(out: Path) -> None:
    out.write_text("x")


def _state(out: Path) -> None:
    out.mkdir()
    (out / "state.yaml").write_text("schema: 1")


def _results(text: str | bytes) -> Callable[[Path], None]:
    def write(out: Path) -> None:
        out.mkdir()
        (out / "results.json").write_bytes(text if isinstance(text, bytes) else text.encode())

    return write


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (_file, "is a file, not a folder"),
        (_state, "is a state, not a comparison"),
        (lambda out: (out / "sub").mkdir(parents=True), "is not empty, and no comparison"),
        (_results("{"), "is no JSON"),
        (_results(b"\xff"), "is no text"),
        (_results('{"kind": "other"}'), "is no result of `recap compare`"),
        (_results('{"kind": "comparison", "schema": 9, "cells": []}'), "has schema 9"),
        (_results('{"kind": "comparison", "schema": 1, "cells": [{"method": "x"}]}'), "metric is not what it should be"),
        (_results('{"kind": "comparison", "schema": 1, "metric": "f1"}'), "better is not what it should be: found nothing"),
    ],
)
def test_a_folder_that_is_something_else_is_left_alone(recipe: str, make: Callable[[Path], Any], problem: str) -> None:
    make(Path("out"))
    before = sorted(Path().rglob("*"))
    with pytest.raises(StateError, match=problem) as caught:
        runner.compare(plan(recipe), Path("out"))
    assert "--out" in str(caught.value.hint)
    assert sorted(Path().rglob("*")) == before


def test_damaged_results_are_refused_and_may_be_trained_away(recipe: str) -> None:
    made = begun(recipe)
    found = stored(Path("out"))
    del found["cells"][0]["state"]
    Path("out/results.json").write_text(json.dumps(found))
    with pytest.raises(StateError, match=r"cells\[0\] has no state to continue"):
        runner.compare(made, Path("out"))
    found = stored(Path("out"))
    found["cells"][0] |= {"state": "cells/full-ft-s0", "seed": "0"}
    Path("out/results.json").write_text(json.dumps(found))
    with pytest.raises(StateError, match=r"cells\[0\]\.seed is not what it should be: found '0'") as caught:
        runner.compare(made, Path("out"))
    assert "move the file away" not in str(caught.value.hint)  # as no cell has begun
    Path("out/cells").mkdir()
    with pytest.raises(StateError) as caught:
        runner.compare(made, Path("out"))
    assert "move the file away" in str(caught.value.hint)


def test_groups_are_means_and_deviations_over_the_seeds_that_are_done(recipe: str) -> None:
    records = store.merged(None, plan(recipe, methods=["recap"], seeds=[0, 1, 2]), {})["cells"]
    for record, value in zip(records, (0.8, 0.9), strict=False):
        record |= {"status": "done", "value": value, "steps": 10, "product": {"bytes": 4, "latency_seconds": value}}
    records[2] |= {"status": "failed", "error": "it broke"}
    (group,) = groups(records, ACCURACY)
    assert (group["n"], group["of"], group["steps"]) == (2, 3, 10)
    assert group["value"] == pytest.approx(0.85)
    assert group["deviation"] == pytest.approx(math.sqrt(0.005))
    assert group["product"] == {"bytes": 4, "latency_seconds": pytest.approx(0.85), "latency_batch": None}
    assert group["memory"]["peak_bytes"] is None


def test_numbers_that_json_cannot_say_are_none() -> None:
    assert store.finite({"a": [1, float("nan"), {"b": float("inf")}], "c": "x"}) == {"a": [1, None, {"b": None}], "c": "x"}
