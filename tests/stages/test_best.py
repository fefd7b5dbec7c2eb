"""Which round is the product: the one with the best metric, whichever way the metric goes, and what a tie goes to."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from recap_cli.recipe.recipe import Recipe
from recap_cli.rounds import training_round
from recap_cli.rounds.status import finished, summary
from recap_cli.stages.run import run
from recap_cli.state.store import State
from tests.tiny import tiny


def scripted(monkeypatch: pytest.MonkeyPatch, figures: Sequence[tuple[float, float]], metric: str = "accuracy") -> None:
    """Let round after round have these validation figures: the metric and the loss."""
    left = iter(figures)

    def evaluate(*_: Any, **__: Any) -> dict[str, float]:
        value, loss = next(left)
        return {"loss": loss, "accuracy": 0.5, "f1": 0.5, "matthews": 0.5} | {metric: value}

    monkeypatch.setattr(training_round, "evaluate", evaluate)


def quick(rounds: int, **sections: Any) -> Recipe:
    """A recipe of which no figure counts; without a ramp each round may be the product."""
    least: dict[str, Any] = {"finetune": {"steps": 1, "batch_size": 8}, "importance": {"batches": 1, "batch_size": 8}}
    return tiny("vit", rounds=rounds, prune={"ramp": 1, "steps": 1}, head={"warmup_epochs": 0}, **least, **sections)


def run_of(path: Path, rounds: int, **sections: Any) -> State:
    return run(quick(rounds, **sections), path)


@pytest.mark.parametrize(
    ("metric", "figures", "best"),
    [
        ("accuracy", [(0.6, 0.9), (0.6, 0.7), (0.5, 0.1)], 2),  # a tie goes to the lower loss, a lower loss alone to nobody
        ("accuracy", [(0.6, 0.7), (0.6, 0.9), (0.6, 0.8)], 1),
        ("accuracy", [(0.6, 0.7), (0.6, 0.7), (0.5, 0.7)], 2),  # alike in both: the later round
        ("matthews", [(-0.1, 0.7), (0.2, 0.9), (0.1, 0.7)], 2),
        ("loss", [(0.9, 0.9), (0.4, 0.4), (0.7, 0.7)], 2),
        ("loss", [(0.4, 0.4), (0.9, 0.9), (0.4, 0.4)], 3),
    ],
)
def test_the_product_is_the_round_with_the_best_metric(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metric: str, figures: list[tuple[float, float]], best: int
) -> None:
    scripted(monkeypatch, figures, metric)
    state = run_of(tmp_path / "state", len(figures), task={"metric": metric})
    noted = state.manifest.best
    assert noted is not None
    assert noted == {"round": best, "metric": metric, "value": figures[best - 1][0], "loss": figures[best - 1][1]} | {
        "folder": f"best-{best:03d}"
    }
    plan = state.load_tensors(f"{noted['folder']}/plan.safetensors")
    assert all(torch.equal(plan[name], kept) for name, kept in state.load_tensors(f"round-{best:03d}/plan.safetensors").items())
    assert [row["best"] for row in summary(state)["rounds"]] == [number == best for number in range(1, len(figures) + 1)]


@pytest.mark.parametrize(
    ("metric", "figures", "ends_after"),
    [
        ("accuracy", [(0.6, 0.9), (0.6, 0.7), (0.6, 0.5), (0.9, 0.1)], 3),  # ties move the best round, and are no improvement
        ("accuracy", [(0.6, 0.9), (0.5, 0.9), (0.7, 0.9), (0.7, 0.9)], 4),
        ("loss", [(0.9, 0.9), (0.8, 0.8), (0.7, 0.7), (0.6, 0.6)], 4),
        ("loss", [(0.4, 0.4), (0.5, 0.5), (0.6, 0.6), (0.1, 0.1)], 3),
    ],
)
def test_patience_counts_rounds_without_a_better_metric(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metric: str, figures: list[tuple[float, float]], ends_after: int
) -> None:
    scripted(monkeypatch, figures, metric)
    recipe = quick(4, patience=2, task={"metric": metric})
    state = run(recipe, tmp_path / "state")
    assert state.manifest.round == ends_after
    assert (f"{metric} has not improved for 2 rounds" in (finished(recipe, state.manifest) or "")) == (ends_after < 4)
