"""What is said of a run that came to nothing: below what its warmed-up head had, or at chance."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from recap_cli.commands.comparison_tables import print_results
from recap_cli.commands.tables import print_summary, say_stage
from recap_cli.compare import cell, schema
from recap_cli.core.task import Metric, Objective
from recap_cli.data.split import Split
from recap_cli.plugins.tasks.classification import constant as chance_of
from recap_cli.plugins.tasks.classification import metrics_of
from recap_cli.report.report import report
from recap_cli.rounds import training_round
from recap_cli.rounds.status import summary
from recap_cli.rounds.verdict import warning
from recap_cli.stages import eval as evaluation
from recap_cli.stages.init import init
from recap_cli.stages.run import run
from recap_cli.state.store import State
from recap_cli.tasks.calls import task_named
from recap_cli.training.evaluation import Pass, evaluate
from tests.pico import LABELS
from tests.tiny import tiny

TASK = task_named("text-classification")
METRICS = [metric.name for metric in TASK.all_metrics]

CELL: dict[str, Any] = {
    "method": "recap",
    "prune_ratio": 0.5,
    "mask_ratio": 0.5,
    "settings": {},
    "state": "cells/a",
    "memory": None,
    "product": None,
}


def says(value: float, metric: str = "accuracy") -> Callable[..., dict[str, float]]:
    return lambda *_, **__: {"loss": 0.3, "accuracy": 0.6, "f1": 0.6, "matthews": 0.6} | {metric: value}


def ended(path: Path, monkeypatch: pytest.MonkeyPatch, warm: float, last: float, metric: str = "accuracy") -> State:
    """A finished run of one round with these validation figures before and after it; chance is a third."""
    monkeypatch.setattr(import_module("recap_cli.rounds.warm_up"), "evaluate", says(warm, metric))
    monkeypatch.setattr(training_round, "evaluate", says(last, metric))
    return run(tiny("vit", rounds=1, task={"metric": metric}), path)


def chance(labels: torch.Tensor, count: int) -> dict[str, float]:
    """What the task says of the best answer that is the same for every example."""
    return chance_of(labels, [f"label {i}" for i in range(count)])


def always(shares: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], torch.Tensor]:
    """A model that gives every example these probabilities."""
    return lambda batch: shares.float().clamp_min(1e-30).log().expand(len(batch["labels"]), -1)


@pytest.mark.parametrize(
    ("labels", "count"),
    [
        ([0, 1, 1, 1, 0], 2),
        ([0, 0, 0, 1], 2),
        ([2, 0, 1, 2, 2, 3, 3], 4),
        ([1, 1, 1], 2),
        ([0, 2, 2], 3),  # 1 is not there: F1 is a mean over the labels that are
        ([4, 4, 0], 7),
        ([2, 2], 3),
    ],
)
def test_chance_is_the_best_of_all_answers_that_are_the_same_for_every_example(labels: list[int], count: int) -> None:
    true = torch.tensor(labels)
    found = chance(true, count)
    same = [metrics_of(torch.full_like(true, label), true, count) for label in range(count)]
    for metric in ("accuracy", "f1", "matthews"):
        assert found[metric] == max(one[metric] for one in same), metric
    shares = torch.bincount(true, minlength=count) / len(true)
    assert found["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(shares.log().expand(len(true), -1), true)))


@pytest.mark.parametrize("count", [2, 3])
def test_a_model_of_one_answer_is_no_better_than_chance_whatever_the_number_of_examples(count: int) -> None:
    silent = []
    for size in range(20, 400):
        labels = (torch.arange(size) % 4).clamp(max=count - 1)
        best = int(torch.bincount(labels, minlength=count).argmax())
        level = chance(labels, count)
        answers = metrics_of(torch.full_like(labels, best), labels, count)
        silent += [
            (size, name)
            for name, value in answers.items()
            if warning(Metric(name), value, warm_up=None, chance=level[name]) is None
        ]
    assert silent == []


@pytest.mark.parametrize("size", [20, 33, 61, 127, 300])
@pytest.mark.parametrize("metric", METRICS)
def test_an_evaluation_of_a_model_that_knows_the_shares_of_the_labels_alone_is_at_chance(metric: Any, size: int) -> None:
    labels = (torch.arange(size) % 5).clamp(max=2)
    split = Split("made", labels, lambda indices, _: {"inputs": indices})
    objective = Objective(TASK, tuple(LABELS), TASK.metric(metric))
    found = evaluate(always(torch.bincount(labels) / size), split, objective, how=Pass(batch_size=7))
    said = warning(objective.metric, found[metric], warm_up=None, chance=chance(labels, 3)[metric])
    assert said is not None
    assert "is no better than chance" in said


@pytest.mark.parametrize("metric", METRICS)
def test_a_run_whose_product_gives_one_answer_is_said_to_be_no_better_than_chance(
    metric: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judge(_: Any, split: Split, objective: Objective, how: Pass) -> dict[str, float]:
        return evaluate(always(torch.bincount(split.targets, minlength=3) / len(split)), split, objective, how)

    monkeypatch.setattr(training_round, "evaluate", judge)
    recipe = tiny("vit", rounds=1, task={"metric": metric}, head={"warmup_epochs": 0}, finetune={"steps": 1})
    assert "is no better than chance" in str(summary(run(recipe, tmp_path / "state"))["warning"])


def test_init_notes_what_the_full_model_is_worth_with_its_head_warmed_up(tmp_path: Path) -> None:
    state = init(tiny("vit", task={"metric": "f1"}), tmp_path / "state")
    (row,) = evaluation.evaluate(state, which=["full"])
    assert state.manifest.made["warmed_up"] == {name: row[name] for name in ("loss", "accuracy", "f1", "matthews")}
    assert state.manifest.made["chance"]["accuracy"] == pytest.approx(1 / 3)
    assert state.manifest.made["metric"] == "f1"


def test_without_a_warm_up_nothing_is_measured_and_chance_is_known(tmp_path: Path) -> None:
    state = init(tiny("vit", head={"warmup_epochs": 0}), tmp_path / "state")
    found = summary(state)
    assert found["warm_up"] is None
    assert found["chance"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("metric", "value", "warm_up", "level", "said"),
    [
        ("accuracy", 0.5, 0.6, 0.3, "0.5000 is worse than what the warmed-up head had before the first round (0.6000)"),
        ("accuracy", 0.3, 0.6, 0.3, "0.3000 is no better than chance"),
        ("accuracy", 0.6, 0.6, 0.3, None),
        ("accuracy", 0.4, None, 0.3, None),
        ("loss", 0.5, 0.6, 0.7, None),
        ("loss", 0.65, 0.6, 0.7, "0.6500 is worse than"),
        ("loss", 0.7, 0.6, 0.7, "0.7000 is no better than chance"),
        ("loss", 0.699, None, 0.7, None),
        ("matthews", 0.0, -0.1, 0.0, "0.0000 is no better than chance"),
        ("matthews", 1e-9, None, 0.0, None),
        ("f1", 0.25000002, None, 0.25, "0.2500 is no better than chance"),  # as far as float32 tells
        ("f1", 0.2501, None, 0.25, None),
        ("loss", -2.00001, None, -2.0, "-2.0000 is no better than chance"),
        ("loss", -2.1, None, -2.0, None),
    ],
)
def test_a_product_is_measured_against_chance_and_against_the_warmed_up_head(
    metric: str, value: float, warm_up: float | None, level: float, said: str | None
) -> None:
    found = warning(TASK.metric(metric), value, warm_up=warm_up, chance=level)
    assert (found is None) == (said is None)
    assert found is None or (f"{metric} {said}" in found and "--set finetune.lr=" in found)


@pytest.mark.parametrize(
    ("warm", "last", "said"),
    [(0.9, 0.5, "worse than what the warmed-up head had"), (0.2, 1 / 3, "no better than chance"), (0.5, 0.9, None)],
)
def test_run_status_and_the_report_say_when_a_run_came_to_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    warm: float,
    last: float,
    said: str | None,
) -> None:
    state = ended(tmp_path / "state", monkeypatch, warm, last)
    found = summary(state)
    print_summary(found, is_result=True)
    say_stage(state.manifest.made)
    shown = capsys.readouterr()
    page = report(state.path).read_text(encoding="utf-8")
    assert f"0 warm-up {warm:.4f}" in " ".join(shown.out.split())
    assert f"head warmed up: accuracy {warm:.4f} (chance 0.3333)" in shown.err
    assert "0 (warm-up)" in page
    if said is None:
        assert found["warning"] is None
        assert "warning" not in shown.out
        assert "finetune.lr=…" not in page
    else:
        assert f"warning: accuracy {last:.4f} is {said}" in shown.out
        assert f"accuracy {last:.4f} is {said}" in page


def test_a_run_that_is_not_over_is_not_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_round, "evaluate", says(0.0))

    class Stopped(Exception):
        pass

    def stop(facts: dict[str, Any]) -> None:
        if facts["stage"] == "merge":
            raise Stopped

    with pytest.raises(Stopped):
        run(tiny("vit", rounds=2, prune={"ramp": 1}), tmp_path / "state", on_stage=stop)
    found = summary(State.open(tmp_path / "state"))
    assert found["best"]["value"] == 0.0
    assert found["warning"] is None


def test_a_comparison_says_which_of_its_runs_came_to_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = cell.figures(ended(tmp_path / "bad", monkeypatch, 0.9, 0.5).path)
    good = cell.figures(ended(tmp_path / "good", monkeypatch, 0.7, 0.9).path)
    found = [schema.Outcome(**{**CELL, **one, "seed": seed}).model_dump() for seed, one in ((3, bad), (4, good))]
    (row,) = schema.groups(found, Metric("accuracy"))
    assert row["warm_up"] == pytest.approx(0.8)
    assert row["chance"] == pytest.approx(1 / 3)
    print_results({"cells": found, "metric": "accuracy", "better": "more", "recipe": "x", "notes": []}, tmp_path)
    shown = capsys.readouterr().out
    assert "before round 1: accuracy of the warmed-up head 0.8000, of chance 0.3333" in shown
    assert "warning: recap 0.5 0.5, seed 3: accuracy 0.5000 is worse than what the warmed-up head had" in shown
    (row,) = schema.groups([found[1]], Metric("accuracy"))
    assert row["warning"] is None
