"""A task that fails, or gives something else than it should, is named with what it gave; what is not its fault is not."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from recap_cli import registry
from recap_cli.core.task import Batch, LabelColumn, Labels, Metric, Target, Task
from recap_cli.errors import DataError, PluginError
from recap_cli.plugins.tasks.classification import TEXT_CLASSIFICATION
from recap_cli.tasks.calls import guarding, known, task_named

LABELS = ("a", "b")
COLUMN = LabelColumn(pa.chunked_array([["a", "b", "a"]]), "kind", "column 'kind' of x.csv")
LOGITS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.0]])
BATCH: Batch = {"labels": torch.tensor([0, 1, 1])}


def stream() -> Iterator[tuple[Any, Batch]]:
    yield LOGITS, BATCH
    yield LOGITS, BATCH


CALLS: dict[str, Callable[[Task], Any]] = {
    "loss": lambda task: task.loss(LOGITS, BATCH),
    "count": lambda task: task.count(BATCH),
    "read": lambda task: task.read(LOGITS),
    "part": lambda task: task.part(BATCH, 0, 2),
    "score": lambda task: task.score(stream(), LABELS),
    "predict": lambda task: task.predict(LOGITS, BATCH, LABELS),
    "constant": lambda task: task.constant and task.constant(BATCH["labels"], LABELS),
    "target.learn": lambda task: task.target.learn([COLUMN]),
    "target.encode": lambda task: task.target.encode([COLUMN], Labels(LABELS)),
    "target.can_be": lambda task: task.target.can_be(pa.string()),
    "target.is_likely": lambda task: task.target.is_likely(COLUMN.values),
    "target.blank": lambda task: task.target.blank(2),
}


def with_function(name: str, function: Any, **target: Any) -> Task:
    """Text classification with one of its functions replaced."""
    if name.startswith("target."):
        changed = replace(TEXT_CLASSIFICATION.target, **{name.removeprefix("target."): function}, **target)
        return guarding(replace(TEXT_CLASSIFICATION, target=changed), "odd")
    return guarding(replace(TEXT_CLASSIFICATION, **{name: function}), "odd")


@pytest.mark.parametrize("name", CALLS)
def test_whatever_a_function_raises_is_an_error_of_the_plugin_that_names_the_task(name: str) -> None:
    def fail(*_: Any) -> Any:
        raise KeyError("deep\nin it")

    with pytest.raises(PluginError, match="the task 'odd' failed: KeyError") as caught:
        CALLS[name](with_function(name, fail))
    assert "docs/plugins/task.md" in str(caught.value.hint)
    assert "--set task.kind=NAME" in str(caught.value.hint)


@pytest.mark.parametrize("name", CALLS)
def test_every_function_of_a_task_that_ships_passes(name: str) -> None:
    plain, safe = CALLS[name](TEXT_CLASSIFICATION), CALLS[name](guarding(TEXT_CLASSIFICATION, "x"))
    assert str(plain) == str(safe)


@pytest.mark.parametrize("name", ["target.learn", "target.encode"])
def test_what_a_task_says_of_the_data_stays_what_it_was(name: str) -> None:
    def refuse(*_: Any) -> Any:
        raise DataError("row 3 is odd", hint="mend it")

    with pytest.raises(DataError, match="row 3 is odd"):
        CALLS[name](with_function(name, refuse))


SCORES = {"accuracy": 0.5, "f1": 0.5, "matthews": 0.0}
CONSTANT = {"loss": 0.6, **SCORES}
COLUMNS = {"label": ["a"] * 3, "predicted": ["a"] * 3, "loss": [0.0] * 3}


def scoring(found: Any) -> Callable[..., Any]:
    return lambda pairs, _: [list(pairs), found][1]


@pytest.mark.parametrize(
    ("name", "function", "said"),
    [
        ("loss", lambda *_: 0.5, "gave a loss that is no number: float"),
        ("loss", lambda *_: torch.zeros(3), r"gave a loss that is no number: torch\.float32 of shape \(3,\)"),
        ("loss", lambda *_: torch.tensor(3), r"gave a loss that is no number: torch\.int64 of shape \(\)"),
        ("count", lambda _: None, "gave a count that is no number: None"),
        ("count", lambda _: torch.ones(3), "gave a count that is no number"),
        ("count", lambda _: np.int64(3), "gave a count that is no number: np.int64"),
        ("part", lambda *_: None, "gave no part of a batch: None"),
        ("part", lambda *_: {"x": 1}, "gave no part of a batch"),
        ("score", scoring(None), "gave no accuracy and no f1 and no matthews"),
        ("score", scoring({**SCORES, "f1": None}), "gave no f1"),
        ("score", scoring({"accuracy": 1.0}), "gave no f1 and no matthews"),
        ("score", lambda *_: SCORES, "has not scored all examples"),
        ("score", lambda pairs, _: [next(iter(pairs)), SCORES][1], "has not scored all examples"),
        ("predict", lambda *_: [1, 2, 3], "gave predictions of type list, not columns"),
        ("predict", lambda *_: {}, "gave predictions of no columns for 3 examples"),
        (
            "predict",
            lambda *_: {**COLUMNS, "loss": [0.0]},
            r"gave .* of label \(3\), predicted \(3\), loss \(1\) for 3 examples",
        ),
        ("predict", lambda *_: {"label": ["a"] * 3, "predicted": ["b"] * 3}, "gave predictions of"),
        ("constant", lambda *_: None, "gave, of a constant answer, no loss and no accuracy and no f1 and no matthews"),
        ("constant", lambda *_: SCORES, "gave, of a constant answer, no loss"),
        ("target.learn", lambda _: ["a", "b"], r"learned no labels: \['a', 'b'\]"),
        ("target.learn", lambda _: Labels(()), "learned no labels"),
        ("target.learn", lambda _: Labels((1, 2)), "learned no labels"),  # type: ignore[arg-type]
        ("target.encode", lambda *_: [0, 1, 0], "made targets of type list, not arrays of pyarrow"),
        ("target.encode", lambda *_: pa.array([0, 1]), "made 2 targets of 3 rows, 0 missing"),
        ("target.encode", lambda *_: pa.array([0, None, 1]), "made 3 targets of 3 rows, 1 missing"),
        ("target.encode", lambda *_: pa.array(["a", "b", "a"]), "made targets of type string; expected int64"),
        ("target.encode", lambda *_: pa.array([0.5, 1, 2]), "made targets of type double; expected int64"),
    ],
)
def test_a_task_that_gives_something_else_is_named_with_what_it_gave(name: str, function: Any, said: str) -> None:
    with pytest.raises(PluginError, match=f"the task 'odd' {said}") as caught:
        CALLS[name](with_function(name, function))
    assert caught.value.hint


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (pa.array([0.5, 1, 2]), None),
        (pa.array([[1.0, 0.0]] * 3, pa.list_(pa.float64(), 2)), None),
        (pa.array([[0], [], [1, 2]]), None),
        (pa.array([[0], [None], [1]]), "3 targets of 3 rows, 1 missing"),
        (
            pa.array([[0.5], [], [1, 2]]),
            "targets of type list<.*double>; expected int64 or double, lists of one length",
        ),
        (pa.array([[1, 0]] * 3, pa.list_(pa.int64(), 2)), "targets of type fixed_size_list<.*int64>"),
    ],
)
def test_targets_that_are_not_stratified_may_be_numbers_and_lists(made: pa.Array, said: str | None) -> None:
    task = with_function("target.encode", lambda *_: made, stratified=False)
    if said is None:
        assert CALLS["target.encode"](task) is made
    else:
        with pytest.raises(PluginError, match=f"the task 'odd' made {said}"):
            CALLS["target.encode"](task)


@pytest.mark.parametrize("error", [DataError("the image in row 2 cannot be decoded"), ValueError("a model's"), MemoryError()])
def test_an_error_of_the_model_or_the_data_within_a_score_stays_what_it_was(error: Exception) -> None:
    def broken() -> Iterator[tuple[Any, Batch]]:
        yield LOGITS, BATCH
        raise error

    def hides(pairs: Iterable[tuple[Any, Batch]], _: Any) -> dict[str, float]:
        try:
            return scoring(SCORES)(pairs, _)  # type: ignore[no-any-return]
        except Exception:  # noqa: BLE001  (as a hurried plugin does)
            return SCORES

    for function in (TEXT_CLASSIFICATION.score, hides):
        with pytest.raises(type(error)) as caught:
            with_function("score", function).score(broken(), LABELS)
        assert caught.value is error


def test_only_the_metrics_that_a_task_names_are_kept() -> None:
    task = with_function("score", scoring({"more": 1.0, **SCORES}))
    assert task.score(stream(), LABELS) == SCORES


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"target": None}, "has a target of type NoneType, not Target"),
        ({"loss": None, "read": 5}, "has no function as loss, read"),
        ({"constant": 5}, "has no function as constant"),
        ({"target": replace(TEXT_CLASSIFICATION.target, learn=None)}, r"has no function as target\.learn"),
        ({"inputs": "sound"}, "has inputs='sound', which is none of text, words, image"),
        ({"metrics": ("accuracy",)}, "has metrics that are no Metric"),
        ({"metrics": (Metric("f1", "higher"),)}, "has metrics that are no Metric"),  # type: ignore[arg-type]
    ],
)
def test_a_record_whose_fields_are_odd_is_refused_as_it_is_loaded(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(PluginError, match=f"the task 'odd' {said}"):
        guarding(replace(TEXT_CLASSIFICATION, **changes), "odd")


def test_tasks_are_known_by_their_entry_points() -> None:
    assert known("text-classification")
    assert not known("text-clasification")
    with pytest.raises(PluginError, match="there is no task named 'text-clasification'") as caught:
        task_named("text-clasification")
    assert "did you mean text-classification" in str(caught.value.hint)


@pytest.mark.parametrize("kind", [each.name for each in registry.entries("tasks") if each.distribution == registry.OURS])
def test_every_task_that_ships_is_a_record_in_order(kind: str) -> None:
    task = task_named(kind)
    assert isinstance(task.target, Target)
    assert task.all_metrics[-1].name == "loss"
    assert len({metric.name for metric in task.all_metrics}) == len(task.all_metrics)
    assert task.metric("loss").better == "less"
    assert task.timm <= (task.inputs == "image")
