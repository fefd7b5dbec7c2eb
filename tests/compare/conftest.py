"""Comparisons for tests: a recipe, and quick processes that copy finished states in the place of runs."""

import sys
from pathlib import Path

import pytest

from recap_cli.compare import cell as cells
from recap_cli.compare import runner
from recap_cli.recipe import recipe as recipes
from recap_cli.stages.run import run
from tests.tiny import tiny


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A recipe of one round as `tiny.yaml`, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(recipes.dump(tiny("vit", rounds=1)), encoding="utf-8")
    return "tiny.yaml"


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished state by method."""
    root = tmp_path_factory.mktemp("made")
    return {
        method: run(recipes.changed(tiny("vit", rounds=1), {"method": method}), root / method).path
        for method in ("full-ft", "recap")
    }


@pytest.fixture
def commands(made: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Has copies of finished states made in the place of runs, by quick processes; lists the cells that were run.

    A cell whose recipe has the seed 13 fails.
    """
    names: list[str] = []

    def command(recipe: Path, state: Path) -> list[str]:
        names.append(recipe.stem)
        asked = recipes.read(str(recipe))
        if asked.seed == 13:
            return [sys.executable, "-S", "-c", "import sys; sys.exit('error: the disk is full\\nhint: make room')"]
        copy = "import shutil, sys; shutil.copytree(sys.argv[1], sys.argv[2])"
        return [sys.executable, "-S", "-c", copy, str(made[asked.method]), str(state)]

    monkeypatch.setattr(cells, "command", command)
    return names


@pytest.fixture
def quick(commands: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The same, without predictions, latencies and pictures."""
    monkeypatch.setattr(cells, "predicted", lambda _: {"activations_bytes": 1, "peak_bytes": 2})
    monkeypatch.setattr(cells, "measured_product", lambda _: {"bytes": 1, "latency_seconds": 0.1, "latency_batch": 1})
    monkeypatch.setattr(runner.plots, "draw", lambda *_, **__: [])
    return commands
