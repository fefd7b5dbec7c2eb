"""Tasks by their name, their functions run so that every failure, and every result that cannot be, is a `PluginError`."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import wraps
from numbers import Real
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast, get_args

from recap_cli import registry
from recap_cli.core.task import (
    LOSS,
    Batch,
    Better,
    Distillation,
    Inputs,
    LabelColumn,
    Labels,
    Metric,
    Outputs,
    Target,
    Task,
)
from recap_cli.errors import PluginError
from recap_cli.untrusted.code import guarded

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

HINT = "repair the task, see docs/plugins/task.md, or choose another with --set task.kind=NAME"
LISTS = ", lists of one length of double, or lists of int64"
DEFAULTS = Task.__module__
RESERVED = {"model", "round", "parameters", "seconds", "data", "examples", "stage"}  # that rows of tables have beside metrics
RECORDS = (  # that a task holds, with their functions
    ("target", Target, ("learn", "encode", "can_be", "is_likely", "blank")),
    ("distillation", Distillation, ("rows", "loss", "rows_of_each")),
)
NEEDED = ("target",)
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
    """Return a task whose functions raise `PluginError` if they fail, or give something else than they should.

    Raises:
        PluginError: A field of the record is not what it should be.
    """
    who = f"the task {name!r}"
    if problem := _problem(task):
        raise PluginError(f"{who} {problem}", hint="see Task in docs/plugins/task.md")
    safe = _Guard(who)
    return replace(
        task,
        target=_guarded_target(task.target, safe),
        loss=_loss(safe(task.loss), who),
        count=safe.checked(task.count, "a count that is no number", _is_count),
        read=safe(task.read),
        part=safe.checked(task.part, "no part of a batch", lambda part: isinstance(part, dict) and "labels" in part),
        feed=safe.checked(task.feed, "inputs that are no dict", lambda found: isinstance(found, dict)),
        maps_of=None if task.maps_of is None else safe(task.maps_of),
        score=_score(task, who),
        predict=_predict(safe(task.predict), who),
        constant=None if task.constant is None else _constant(task, safe),
        distillation=None if task.distillation is None else _distillation(task.distillation, safe),
    )


def _problem(task: Task) -> str | None:
    """What is wrong with the fields of a task, or None."""
    functions = {"loss": task.loss, "score": task.score, "predict": task.predict, "count": task.count, "read": task.read}
    functions |= {"part": task.part, "feed": task.feed} | ({} if task.constant is None else {"constant": task.constant})
    functions |= {} if task.maps_of is None else {"maps_of": task.maps_of}
    for name, kind, parts in RECORDS:
        if (record := getattr(task, name)) is None and name not in NEEDED:
            continue
        if not isinstance(record, kind):
            return f"has a {name} of type {type(record).__name__}, not {kind.__name__}"
        functions |= {f"{name}.{each}": getattr(record, each) for each in parts}
    if odd := [name for name, function in functions.items() if not callable(function)]:
        return f"has no function as {', '.join(odd)}"
    if task.inputs not in get_args(Inputs):
        return f"has inputs={task.inputs!r}, which is none of {', '.join(get_args(Inputs))}"
    return _odd_values(task)


def _odd_values(task: Task) -> str | None:
    """What is wrong with a prompt or with metrics, or None."""
    if not isinstance(task.prompt, str | None):
        return f"has a prompt of type {type(task.prompt).__name__}, not str"
    if not all(isinstance(metric, Metric) and metric.better in get_args(Better) for metric in task.metrics):
        return "has metrics that are no Metric, or better neither by more nor by less"
    names = [metric.name for metric in task.metrics]
    if odd := [str(name) for name in names if not isinstance(name, str) or name in RESERVED or names.count(name) > 1]:
        return f"has metrics of the names {', '.join(odd)}; expected different texts, and none of {', '.join(sorted(RESERVED))}"
    return None


def _is_count(found: Any) -> bool:
    from torch import Tensor

    return isinstance(found, int) or (isinstance(found, Tensor) and found.ndim == 0)


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

    def checked(self, function: Callable[P, R], what: str, fits: Callable[[Any], bool]) -> Callable[P, R]:
        """Refuse a result that does not fit, which the message calls `what`."""
        safe = self(function)

        @wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            found = safe(*args, **kwargs)
            if not fits(found):
                raise PluginError(f"{self.who} gave {what}: {found!r:.80}", hint=HINT)
            return found

        return checked


def _guarded_target(target: Target, safe: _Guard) -> Target:
    plain_learn, plain_encode = safe(target.learn), safe(target.encode)

    def learn(columns: Sequence[LabelColumn]) -> Labels:
        labels = plain_learn(columns)
        if not isinstance(labels, Labels) or not labels.names or not all(isinstance(name, str) for name in labels.names):
            raise PluginError(f"{safe.who} learned no labels: {labels!r:.80}", hint=HINT)
        return labels

    def encode(columns: Sequence[LabelColumn], labels: Labels) -> "pa.ChunkedArray":
        values = plain_encode(columns, labels)
        if problem := _odd_targets(values, len(columns[0].values), stratified=target.stratified):
            raise PluginError(f"{safe.who} {problem}", hint=HINT)
        return values

    return replace(
        target,
        learn=learn,
        encode=encode,
        can_be=safe(target.can_be),
        is_likely=safe(target.is_likely),
        blank=safe(target.blank),
    )


def _odd_targets(values: Any, rows: int, *, stratified: bool) -> str | None:
    """What is wrong with encoded targets, or None."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not isinstance(values, pa.Array | pa.ChunkedArray):
        return f"made targets of type {type(values).__name__}, not arrays of pyarrow"
    kinds = [pa.int64()] if stratified else [pa.int64(), pa.float64()]
    is_set = pa.types.is_fixed_size_list(values.type) and values.type.value_type == pa.float64()
    is_row = pa.types.is_list(values.type) and values.type.value_type == pa.int64()
    if values.type not in kinds and (stratified or not (is_set or is_row)):
        return f"made targets of type {values.type}; expected {' or '.join(map(str, kinds))}{'' if stratified else LISTS}"
    missing = values.null_count + (pc.list_flatten(values).null_count if is_set or is_row else 0)
    return f"made {len(values)} targets of {rows} rows, {missing} missing" if len(values) != rows or missing else None


def _constant(task: Task, safe: _Guard) -> Callable[[Any, Sequence[str]], dict[str, float]]:
    plain = safe(cast(Any, task.constant))

    def constant(targets: Any, labels: Sequence[str]) -> dict[str, float]:
        return _numbers(plain(targets, labels), (LOSS, *task.all_metrics[:-1]), f"{safe.who} gave, of a constant answer,")

    return constant


def _numbers(found: Any, metrics: Iterable[Metric], who_gave: str) -> dict[str, float]:
    """Return the values of metrics as numbers of Python. Raises `PluginError` if one is lacking."""
    values, wanted = found if isinstance(found, dict) else {}, [metric.name for metric in metrics]
    if lacking := [name for name in wanted if not isinstance(values.get(name), Real)]:
        raise PluginError(f"{who_gave} no {' and no '.join(lacking)}", hint=HINT)
    return {name: float(values[name]) for name in wanted}


def _loss(plain: "Callable[[Outputs, Batch], Tensor]", who: str) -> "Callable[[Outputs, Batch], Tensor]":
    def loss(outputs: Outputs, batch: Batch) -> "Tensor":
        from torch import Tensor

        total = plain(outputs, batch)
        if not isinstance(total, Tensor) or total.ndim or not total.is_floating_point():
            found = f"{total.dtype} of shape {tuple(total.shape)}" if isinstance(total, Tensor) else type(total).__name__
            raise PluginError(f"{who} gave a loss that is no number: {found}", hint=HINT)
        return total

    return loss


def _distillation(plain: Distillation, safe: _Guard) -> Distillation:
    def is_table(found: Any) -> bool:
        from torch import Tensor

        return isinstance(found, Tensor) and found.ndim == 2 and found.is_floating_point()

    def is_number(found: Any) -> bool:
        from torch import Tensor

        return isinstance(found, Tensor) and found.ndim == 0 and found.is_floating_point()

    def are_counts(found: Any) -> bool:
        from torch import Tensor

        return isinstance(found, Tensor) and found.ndim == 1 and not found.is_floating_point()

    return Distillation(
        safe.checked(plain.rows, "rows for a teacher that are no table of numbers", is_table),
        safe.checked(plain.loss, "a loss of a teacher's outputs that is no number", is_number),
        safe.checked(plain.rows_of_each, "no number of rows for each example", are_counts),
        None if plain.count is None else safe.checked(plain.count, "a count that is no number", _is_count),
    )


def _score(task: Task, who: str) -> Callable[[Iterable[tuple[Outputs, Batch]], Sequence[str]], dict[str, float]]:
    def score(stream: Iterable[tuple[Outputs, Batch]], labels: Sequence[str]) -> dict[str, float]:
        failed: list[BaseException] = []  # of the model or the data, not of the task
        ended = False

        def passed_on() -> Iterator[tuple[Outputs, Batch]]:
            nonlocal ended
            try:
                yield from stream
                ended = True
            except GeneratorExit:
                raise
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
        if failed:  # the task has hidden it
            raise failed[0]
        values = _numbers(found, (metric for metric in task.metrics if metric.name != LOSS.name), f"{who} gave")
        places = {f"{prefix}/{label}" for prefix in task.by_label for label in labels}
        values |= {name: float(value) for name, value in found.items() if name in places and isinstance(value, Real)}
        if not ended:
            raise PluginError(f"{who} has not scored all examples", hint=HINT)
        return values

    return score


def _predict(
    plain: Callable[[Outputs, Batch, Sequence[str]], dict[str, list[Any]]], who: str
) -> Callable[[Outputs, Batch, Sequence[str]], dict[str, list[Any]]]:
    def predict(outputs: Outputs, batch: Batch, labels: Sequence[str]) -> dict[str, list[Any]]:
        columns = plain(outputs, batch, labels)
        if not isinstance(columns, dict):
            raise PluginError(f"{who} gave predictions of type {type(columns).__name__}, not columns", hint=HINT)
        lengths = {name: len(values) for name, values in columns.items()}
        if not {"label", "predicted", "loss"} <= columns.keys() or set(lengths.values()) != {len(batch["labels"])}:
            raise PluginError(f"{who} gave predictions of {_said(lengths)} for {len(batch['labels'])} examples", hint=HINT)
        return columns

    return predict


def _said(lengths: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({length})" for name, length in lengths.items()) or "no columns"
