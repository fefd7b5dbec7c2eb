"""`recap compare` as it is typed: what it prints, what it refuses and how.

Its runs are calls here: `tests/test_kill.py` has one in a process of its own, `tests/compare/test_runner.py` other processes.
"""

import json
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recap_cli.cli import INTERRUPTED, main
from recap_cli.compare import cell, processes
from recap_cli.errors import ComparisonError, DataError, PluginError, RecipeError, StateError, UsageError
from recap_cli.recipe import recipe as recipes
from tests.calls import here
from tests.tiny import data_folder, tiny

Answer = tuple[int, str, str]
SMALL = "tiny.yaml --methods full-ft,recap --seeds 0 --out out"


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[str], Answer]:
    """Runs `recap compare WORDS` beside a recipe `tiny.yaml`; returns exit code, stdout and stderr."""
    for name in ("RECAP_TRACEBACK", "FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(recipes.dump(tiny("vit", rounds=1)), encoding="utf-8")

    def run(line: str) -> Answer:
        code = main(["compare", *shlex.split(line)])
        return code, *capsys.readouterr()

    return run


def fails(_recipe: Path, _state: Path) -> list[str]:
    return [sys.executable, "-S", "-c", "import sys; sys.exit('error: no room left\\nhint: make room')"]


def found_share() -> float:
    """The share of full finetuning's memory that the one cell in `out` that is done has held."""
    found = json.loads(Path("out/results.json").read_text(encoding="utf-8"))
    return float(found["cells"][0]["memory"]["held_share"])


def test_a_comparison_runs_its_cells_and_then_has_nothing_left_to_do(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "run", here)
    grid = "--methods recap --ratios 0.3,0.9 --seeds 0 --out out --lrs 0.01 --set finetune.steps=2"
    code, out, err = ask(f"tiny.yaml {grid}")
    assert code == ComparisonError.exit_code
    lines = [line.split() for line in out.splitlines()]
    assert any(line[:4] == ["method", "r_p", "r_f", "lr"] for line in lines)
    assert "tiny-vit: means over the seeds, each at its best rate on the validation data" in out
    (row,) = [line for line in lines if line[:4] == ["recap", "0.3", "0.6", "0.01"] and "1" in line]
    assert row[4].startswith("0.")
    assert any(line[:4] == ["recap", "0.9", "0.6", "0"] and line[4:6] == ["of", "1"] for line in lines)
    assert row[-1] == "ms"
    assert len(row[-2].replace(".", "").lstrip("0")) >= 3
    (held,) = [line for line in lines if line[:3] == ["recap", "0.3", "0.6"] and line[-1] == "MB" and "%" in " ".join(line)]
    assert f"{found_share():.1%}" in held
    for shown in ("Memory of finetuning", "of full", "Not done", "impossible", "prune.floor keeps 0.15"):
        assert shown in out
    name = "recap-rp0.3-rf0.6-lr0.01-s0"
    for shown in ("2 cells in out", f"{name}: 0.", "cells: 0 of 1", "1 of 2 cells are not done: 1 impossible"):
        assert shown in err
    found = json.loads(Path("out/results.json").read_text(encoding="utf-8"))
    assert found["command"] == f"recap compare tiny.yaml {grid}"
    assert "recap, r_p 0.3, r_f 0.6: one rate was tried, 0.01; another may be better: add --lrs recap:0.0033,0.03" in out
    done = found["cells"][0]
    assert (done["status"], done["steps"]) == ("done", 2)
    assert (Path("out") / done["state"] / "state.yaml").exists()
    assert "round 1 merge" in Path(f"out/logs/{name}.log").read_text(encoding="utf-8")
    assert Path("out/metric-prune-ratio.png").stat().st_size > 1000

    monkeypatch.setattr(cell, "command", lambda *_: pytest.fail("the cell is done"))
    grid = grid.replace("0.3,0.9", "0.3")
    code, out, _ = ask(f"tiny.yaml {grid} --json")
    assert code == 0
    assert json.loads(out)["cells"][0] == done
    assert [(row["lr"], row["n"]) for row in json.loads(out)["groups"] if row["n"]] == [(0.01, 1)]

    shutil.copytree(data_folder() / "validation", "held")
    code, out, err = ask(f"tiny.yaml {grid} --test held")
    assert code == 0
    assert "accuracy, held out" in " ".join(out.split())
    assert "held out: held, 18 examples; nothing was chosen by them" in out
    assert "every finished cell is scored on held, by which nothing is chosen" in err
    found = json.loads(Path("out/results.json").read_text(encoding="utf-8"))
    assert found["cells"][0]["test"]["value"] == pytest.approx(done["value"])  # as these are the same images
    assert found["command"].endswith("--lrs 0.01 --test held --set finetune.steps=2")


def test_a_failed_cell_is_shown_with_its_error_and_how_to_go_on(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cell, "command", fails)
    code, out, err = ask(f"{SMALL} --set 'recap:finetune.lr=0.02' --jobs 2")
    assert code == ComparisonError.exit_code
    assert "full-ft-s0: failed: no room left" in err
    assert out.count("no room left") == 2
    assert "error: 2 of 2 cells are not done: 2 failed" in err
    assert "hint: see the logs in out/logs; `recap compare tiny.yaml --methods full-ft,recap --seeds 0 --jobs 2" in err


def test_a_dry_run_lists_the_cells_and_writes_nothing(ask: Any) -> None:
    code, out, err = ask("tiny.yaml --methods pre-ft,recap --ratios 0.2,0.9 --seeds 4 --dry-run")
    assert code == 0
    cells_of = [line.split()[0] for line in out.splitlines() if "-s4" in line]
    assert cells_of == ["pre-ft-rp0.2-s4", "pre-ft-rp0.9-s4", "recap-rp0.2-rf0.6-s4", "recap-rp0.9-rf0.6-s4"]
    assert out.count("impossible: prune.ratio") == 2
    assert "2 of 4 cells would run in runs/compare-tiny-vit, 2 are impossible; nothing was written" in err
    assert [path.name for path in Path().iterdir()] == ["tiny.yaml"]
    code, out, _ = ask(f"{SMALL} --dry-run --json")
    assert [record["status"] for record in json.loads(out)] == ["waiting", "waiting"]


@pytest.mark.parametrize(
    ("line", "kind", "problem"),
    [
        ("tiny.yaml --methods full-ft,,recap", UsageError, "--methods full-ft,,recap: expected names of methods"),
        ("tiny.yaml --methods recap,recap", UsageError, "--methods recap,recap: recap occurs twice"),
        ("tiny.yaml --methods recp", PluginError, "there is no method named 'recp'; there are: full-ft, head-ft"),
        ("tiny.yaml --ratios 0.2,1", UsageError, "--ratios 0.2,1: expected shares from 0 to below 1"),
        ("tiny.yaml --ratios 0.2,0.20", UsageError, "--ratios 0.2,0.20: 0.2 occurs twice"),
        ("tiny.yaml --mask-ratios a", UsageError, "--mask-ratios a: expected shares"),
        ("tiny.yaml --ratios nan", UsageError, "--ratios nan: expected shares"),
        ("tiny.yaml --seeds 0,-1", UsageError, "--seeds 0,-1: expected whole numbers from 0"),
        ("tiny.yaml --seeds 1,1", UsageError, "--seeds 1,1: 1 occurs twice"),
        ("tiny.yaml --seeds ''", UsageError, "--seeds '': expected whole numbers from 0"),
        ("tiny.yaml --lrs ''", UsageError, "--lrs '': expected positive numbers of at most a million, each once"),
        ("tiny.yaml --lrs 0.1,-1", UsageError, "--lrs 0.1,-1: expected positive numbers"),
        ("tiny.yaml --lrs 0", UsageError, "--lrs 0: expected positive numbers"),
        ("tiny.yaml --lrs nan", UsageError, "--lrs nan: expected positive numbers"),
        ("tiny.yaml --lrs inf", UsageError, "--lrs inf: expected positive numbers"),
        ("tiny.yaml --lrs 1e-3,0.001", UsageError, "--lrs 1e-3,0.001: 0.001 occurs twice"),
        ("tiny.yaml --lrs 1e-3 --lrs 2e-3,1e-3", UsageError, "--lrs 1e-3,2e-3,1e-3: 0.001 occurs twice"),
        ("tiny.yaml --dry-run --lrs 0.1,0.1000000000000001", UsageError, "0.1 occurs twice"),  # cells have one name
        ("tiny.yaml --lrs recap:", UsageError, "--lrs recap:'': expected positive numbers"),
        ("tiny.yaml --lrs recap:0.1,x", UsageError, "--lrs recap:0.1,x: expected positive numbers"),
        ("tiny.yaml --lrs recp:0.1", UsageError, "--lrs recp:0.1: there is no method recp; compared are full-ft"),
        ("tiny.yaml --lrs 0.1 --set finetune.lr=1", UsageError, "--set finetune.lr=1: the grid varies finetune.lr"),
        ("tiny.yaml --dry-run --test missing.csv", DataError, "there is no file or folder missing.csv"),
        ("tiny.yaml --dry-run --test-split test", DataError, "the recipe's data are no data set of the hub"),
        ("tiny.yaml --set seed=1", UsageError, "--set seed=1: the grid varies seed"),
        ("tiny.yaml --set finetune.lrr=1", RecipeError, "finetune.lrr"),
        ("tiny.yaml --out tiny.yaml --methods recap --seeds 0", StateError, "tiny.yaml: is a file, not a folder"),
        ("other.yaml", RecipeError, "no recipe other.yaml"),
    ],
)
def test_what_makes_no_sense_is_refused_with_a_hint(ask: Any, line: str, kind: Any, problem: str) -> None:
    code, out, err = ask(line)
    assert code == kind.exit_code
    assert problem in err
    assert "hint: " in err
    assert out == ""
    assert [path.name for path in Path().iterdir()] == ["tiny.yaml"]


def test_a_dry_run_says_the_rates_of_the_cells(ask: Any) -> None:
    line = "tiny.yaml --methods head-ft,recap --seeds 4 --lrs 1e-3,2e-3 --lrs recap:0.5 --lrs recap:0.25 --dry-run"
    code, out, _ = ask(line)
    assert code == 0
    cells_of = [line.split()[0] for line in out.splitlines() if "-s4" in line]
    assert cells_of == [
        f"{name}-s4" for name in ("head-ft-lr0.001", "head-ft-lr0.002", "recap-rp0.4-rf0.6-lr0.5", "recap-rp0.4-rf0.6-lr0.25")
    ]
    assert [record["lr"] for record in json.loads(ask(f"{line} --json")[1])] == [0.001, 0.002, 0.5, 0.25]


def test_what_has_no_effect_is_noted(ask: Any) -> None:
    code, _, err = ask("tiny.yaml --methods full-ft --ratios 0.2 --seeds 4 --set lora-ft:finetune.lr=0.1 --dry-run")
    assert code == 0
    assert "note: --ratios 0.2: none of the methods full-ft prunes by a ratio, so it has no effect" in err
    assert "note: --set lora-ft:finetune.lr=0.1: lora-ft is not compared, so it has no effect" in err


def test_a_near_name_is_offered(ask: Any) -> None:
    assert "hint: did you mean recap?" in ask("tiny.yaml --methods recp")[2]


def test_ctrl_c_says_how_to_go_on(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(processes, "run", interrupted)
    code, _, err = ask(SMALL)
    assert code == INTERRUPTED
    assert f"hint: continue with `recap compare {SMALL}`" in err
    assert [record["status"] for record in json.loads(Path("out/results.json").read_text())["cells"]] == ["waiting"] * 2
