"""Tasks by their name, their functions run so that every failure, and every result that cannot be, is a `PluginError`."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

from recap_cli import registry
from recap_cli.core.task import Batch, LabelColumn, Labels, Outputs, Target, Task
from recap_cli.errors import PluginError
from recap_cli.untrusted.code import guarded

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

HINT = "repair the task, see docs/plugins/task.md, or choose another with --set task.kind=NAME"
DEFAULTS = Task.__module__
P = ParamSpec("P")
R = TypeVar("R")


def task_named(kind: str) -> Task:
    """Return the task that a recipe names, guarded.

    Raises:
        PluginError: There is none, or it cannot be loaded.
    """
    return guarding(cast(Task, registry.load("tasks", kind)), kind)


def known(kind: str) -> bool:
    """Whether there is a task of this name. Nothing is loaded."""
    return kind in registry.names("tasks")


def guarding(task: Task, name: str) -> Task:
    """Return a task whose functions raise `PluginError` if they fail, or give something else than they should."""
    who = f"the task {name!r}"
    safe = _Guard(who)
    return replace(
        task,
        target=_guarded_target(task.target, safe),
        loss=_loss(safe(task.loss), who),
        count=safe(task.count),
        read=safe(task.read),
        part=safe(task.part),
        score=_score(task, who),
        predict=_predict(safe(task.predict), who),
        constant=None if task.constant is None else safe(task.constant),
    )


class _Guard:
    """Makes functions of one plugin raise nothing but errors of RECAP."""

    def __init__(self, who: str) -> None:
        self.who = who

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        if function.__module__ == DEFAULTS:
            return function  # ours, and called in each step

        @wraps(function)
        def safe(*args: P.args, **kwargs: P.kwargs) -> R:
            with guarded(f"{self.who} failed", HINT):
                return function(*args, **kwargs)

        return safe


def _guarded_target(target: Target, safe: _Guard) -> Target:
    plain_learn, plain_encode = safe(target.learn), safe(target.encode)

    def learn(columns: Sequence[LabelColumn]) -> Labels:
        labels = plain_learn(columns)
        if not isinstance(labels, Labels) or not labels.names or not all(isinstance(name, str) for name in labels.names):
            raise PluginError(f"{safe.who} learned no labels: {labels!r:.80}", hint=HINT)
        return labels

    def encode(columns: Sequence[LabelColumn], labels: Labels) -> "pa.ChunkedArray":
        values = plain_encode(columns, labels)
        rows = len(columns[0].values)
        if len(values) != rows or values.null_count:
            raise PluginError(f"{safe.who} made {len(values)} targets of {rows} rows, {values.null_count} missing", hint=HINT)
        return values

    return replace(
        target,
        learn=learn,
        encode=encode,
        can_be=safe(target.can_be),
        is_likely=safe(target.is_likely),
        blank=safe(target.blank),
    )


def _loss(plain: "Callable[[Outputs, Batch], Tensor]", who: str) -> "Callable[[Outputs, Batch], Tensor]":
    def loss(outputs: Outputs, batch: Batch) -> "Tensor":
        from torch import Tensor

        total = plain(outputs, batch)
        if not isinstance(total, Tensor) or total.ndim or not total.is_floating_point():
            found = f"{total.dtype} of shape {tuple(total.shape)}" if isinstance(total, Tensor) else type(total).__name__
            raise PluginError(f"{who} gave a loss that is no number: {found}", hint=HINT)
        return total

    return loss


def _score(task: Task, who: str) -> Callable[[Iterable[tuple[Outputs, Batch]], Sequence[str]], dict[str, float]]:
    def score(stream: Iterable[tuple[Outputs, Batch]], labels: Sequence[str]) -> dict[str, float]:
        failed: list[BaseException] = []  # of the model or the data, not of the task

        def passed_on() -> Iterator[tuple[Outputs, Batch]]:
            try:
                yield from stream
            except BaseException as error:
                failed.append(error)
                raise

        try:
            with guarded(f"{who} failed", HINT):
                found = task.score(passed_on(), labels)
        except PluginError:
            if failed:
                raise failed[0]  # noqa: B904  (it is not the plugin's)
            raise
        lacking = [m.name for m in task.metrics if m.name != "loss" and not isinstance(found.get(m.name), float | int)]
        if lacking:
            raise PluginError(f"{who} gave no {' and no '.join(lacking)}", hint=HINT)
        return {name: float(value) for name, value in found.items()}

    return score


def _predict(
    plain: Callable[[Outputs, Batch, Sequence[str]], dict[str, list[Any]]], who: str
) -> Callable[[Outputs, Batch, Sequence[str]], dict[str, list[Any]]]:
    def predict(outputs: Outputs, batch: Batch, labels: Sequence[str]) -> dict[str, list[Any]]:
        columns = plain(outputs, batch, labels)
        lengths = {name: len(values) for name, values in columns.items()}
        if not {"label", "predicted", "loss"} <= columns.keys() or set(lengths.values()) != {len(batch["labels"])}:
            raise PluginError(f"{who} gave predictions of {_said(lengths)} for {len(batch['labels'])} examples", hint=HINT)
        return columns

    return predict


def _said(lengths: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({length})" for name, length in lengths.items()) or "no columns"
