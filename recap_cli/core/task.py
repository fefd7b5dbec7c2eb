"""What a task is: a value, not a class to inherit from.

A task says which columns an example is read from, how its labels become numbers, which head a model gets, what the loss is and
what it is averaged over, which metrics there are, and how a prediction is written down. Nothing else in RECAP knows a task.

Importing this module, and a module that makes a task of it, imports no torch: reading a recipe looks at its task.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

IGNORED = -100  # a target that has no loss, as torch and transformers have it
TEACHER = "teacher_outputs"  # of a batch: what a teacher gives for it, (examples, most rows, outputs), float32
TEACHER_STATES = "teacher_states"  # of a batch: hidden states of the teacher's blocks, (examples, sum of widths), float32
Inputs = Literal["text", "words", "image"]
Better = Literal["more", "less"]
Batch = dict[str, Any]  # the inputs of a model, and `labels`; tensors with the examples first, unless the task says otherwise
Outputs = Any  # of a model, as `Task.read` gives them


@dataclass(frozen=True)
class Metric:
    """A figure that a model is judged by.

    Attributes:
        name: as a recipe names it in `task.metric`.
        better: whether `more` or `less` of it is better.
    """

    name: str
    better: Better = "more"

    def goodness(self, value: float) -> float:
        """Return the value, negated if less is better: more goodness is better for every metric."""
        return -value if self.better == "less" else value

    def is_better(self, value: float, than: float) -> bool:
        """Whether one value is better than another. Equal values are not."""
        return self.goodness(value) > self.goodness(than)


LOSS = Metric("loss", "less")  # every task has it


@dataclass(frozen=True)
class LabelColumn:
    """A column of labels, as its source has it.

    Attributes:
        values: one per example, none missing.
        name: of the column.
        place: the column and its source, for messages.
        names: what the data set calls its whole numbers, if it says so.
        words: False if names are compared letter by letter; True if case and surrounding blanks do not count.
    """

    values: "pa.ChunkedArray"
    name: str
    place: str
    names: Sequence[str] | None = None
    words: bool = True


@dataclass(frozen=True)
class Labels:
    """What the outputs of the head mean, as learned from the training data.

    Attributes:
        names: of the outputs, in their order.
        from_dataset: True if the data set has the names: its whole numbers then are indices into them.
        words: False if names are compared letter by letter; True if case and surrounding blanks do not count.
        notes: What a user should know of them.
    """

    names: tuple[str, ...]
    from_dataset: bool = False
    words: bool = True
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Target:
    """How columns of labels become numbers. `recap_cli.api` has those that ship: one class, several, a number, tags of words.

    Attributes:
        holds: what stands in such a column, in the plural, for messages.
        learn: the labels of training columns. Raises `DataError`.
        encode: a value per example, of any data: int64 or float64, lists of one length of float64, or lists of int64. Raises
            `DataError` that names the row.
        can_be: whether a column of this type may hold it.
        is_likely: whether the values of a column look like it, among those of a type that may.
        blank: the value of an example (or word) without labels, for a head of so many outputs.
        several: True if a recipe may name several columns.
        stratified: True if each value is to have its share of the examples that are held out.
        maps: True if a label is a map: an image with a class for each pixel. Then `learn` is given the values that occur in
            the pixels, each once and sorted, and `encode` is not called. A batch has `labels` of (batch, height, width), int64,
            with `IGNORED` where nothing is counted. Where maps differ in size, `label_sizes` has the (height, width) of each,
            and the rest of it is padding.
    """

    holds: str
    learn: Callable[[Sequence[LabelColumn]], Labels]
    encode: "Callable[[Sequence[LabelColumn], Labels], pa.ChunkedArray]"
    can_be: "Callable[[pa.DataType], bool]"
    is_likely: "Callable[[pa.ChunkedArray], bool]"
    blank: Callable[[int], Any] = lambda _: 0
    several: bool = False
    stratified: bool = False
    maps: bool = False


def logits_of(output: Any) -> Any:
    """Return the `logits` of an output of transformers, or what timm gives, which are logits."""
    return getattr(output, "logits", output)


def count_examples(batch: Batch) -> "int | Tensor":
    """Return how many examples a batch has."""
    return len(batch["labels"])


def rows_of(batch: Batch, start: int, stop: int) -> Batch:
    """Return the examples `start` to `stop` of a batch whose tensors all have the examples first."""
    return {name: tensor[start:stop] for name, tensor in batch.items()}


def nothing_more(batch: Batch, wanted: Collection[str], outputs: int) -> Batch:
    """Return no inputs of a model beside those of its examples."""
    return {}


def one_row_each(batch: Batch) -> "Tensor":
    """Return 1 for each example of a batch, int64, (examples,)."""
    import torch

    return torch.ones(len(batch["labels"]), dtype=torch.int64)


@dataclass(frozen=True)
class Distillation:
    """How a student learns the outputs of a teacher (Hinton et al., 2015).

    A teacher's rows are kept from `init` on, so that the teacher itself is never there while the student trains.

    Attributes:
        rows: `rows(outputs, batch)` are the outputs at all that is counted, (rows, outputs), the rows of an example together,
            in the order of the examples.
        loss: `loss(student, teacher, temperature)` is the sum of the losses of these rows, a float32 scalar, in the unit of
            `Task.loss`. Both are (rows, outputs), float32.
        rows_of_each: `rows_of_each(batch)` is how many rows each example has, by its labels alone, int64, (examples,).
        count: `count(batch)` is of how many losses that is the sum; None for as many as `Task.count` has.
    """

    rows: "Callable[[Outputs, Batch], Tensor]"
    loss: "Callable[[Tensor, Tensor, float], Tensor]"
    rows_of_each: "Callable[[Batch], Tensor]" = one_row_each
    count: "Callable[[Batch], int | Tensor] | None" = None


@dataclass(frozen=True)
class Task:
    """What a model learns. Its entry-point name, in the group `recap.tasks`, is what a recipe writes in `task.kind`.

    `loss` and `count` are separate so that whatever averages (micro-batches, an evaluation, an importance over D_s) weighs by
    what is counted: examples, words or pixels.

    Attributes:
        title: what it does, as in "one class for each text".
        inputs: what an example is: a `text` (or a pair), a list of `words`, or an `image`.
        target: how its labels are read.
        auto_class: the class of transformers that makes its models, such as `AutoModelForSequenceClassification`.
        other_classes: others that do; of all, the first that has a model of a configuration makes it.
        loss: `loss(outputs, batch)` is the sum of the losses of all that is counted, a float32 scalar.
        metrics: what `score` gives; the first is the default of `task.metric`. The mean `loss` need not be named.
        score: `score(stream, labels)` goes once over pairs of outputs and batch, on the model's device, and gives the metrics
            by name. It keeps no more of an output than it needs: the next one may take its memory.
        predict: `predict(outputs, batch, labels)` gives the columns of a table of predictions, each with a value per example:
            `label` and `predicted` as a person writes them, `loss`, and what else there is, such as a `probability`.
        constant: `constant(targets, labels)` are loss and metrics of the best answer that is the same for every example: what
            chance has. `targets` are those of a split, a tensor or `Ragged`. Without it nothing is said of chance.
        count: how many losses the sum of a batch has.
        read: the outputs, of any structure, in what the model's forward returns.
        part: some examples of a batch, for micro-batches.
        feed: `feed(batch, wanted, outputs)` are inputs of a model that computes its own loss, made from the labels. `wanted`
            are the names that its forward has, and `outputs` is how many labels there are.
        draws: True if a loss draws random numbers. Importance and evaluation then seed them.
        by_label: the prefixes of further figures that `score` gives, one for each label: `iou` for `iou/road`.
        maps_of: for labels that are maps: `maps_of(outputs, batch)` are the predicted ones, int64, (height, width) each, of
            the size of their labels.
        distillation: how a student learns a teacher's outputs; None if it cannot.
        problem_type: as transformers' configurations call it, for its own loss.
        prompt: the task in words, for a model that reads them beside an image to know which of several to do, as OneFormer.
        timm: True if models of timm can do it too, whose head then has an output for each label.
        fewest: how many outputs a head has at least.
        extra: the extra of recap-cli that it needs, if any.
    """

    title: str
    inputs: Inputs
    target: Target
    auto_class: str
    loss: "Callable[[Outputs, Batch], Tensor]"
    metrics: Sequence[Metric]
    score: Callable[[Iterable[tuple[Outputs, Batch]], Sequence[str]], dict[str, float]]
    predict: Callable[[Outputs, Batch, Sequence[str]], dict[str, list[Any]]]
    constant: Callable[[Any, Sequence[str]], dict[str, float]] | None = None
    count: "Callable[[Batch], int | Tensor]" = count_examples
    read: Callable[[Any], Outputs] = logits_of
    part: Callable[[Batch, int, int], Batch] = rows_of
    feed: Callable[[Batch, Collection[str], int], Batch] = nothing_more
    draws: bool = False
    by_label: Sequence[str] = ()
    maps_of: "Callable[[Outputs, Batch], list[Tensor]] | None" = None
    other_classes: Sequence[str] = ()
    distillation: Distillation | None = None
    problem_type: str | None = None
    prompt: str | None = None
    timm: bool = False
    fewest: int = 2
    extra: str | None = None

    @property
    def all_metrics(self) -> tuple[Metric, ...]:
        """The metrics, and the loss."""
        return (*(metric for metric in self.metrics if metric.name != LOSS.name), LOSS)

    def figures_by_label(self, figures: Mapping[str, float]) -> dict[str, dict[str, float]]:
        """Return the figures of `score` that there is one of for each label: by prefix, then by label, in their order."""
        return {
            prefix: {name.removeprefix(f"{prefix}/"): value for name, value in figures.items() if name.startswith(f"{prefix}/")}
            for prefix in self.by_label
        }

    def metric(self, name: str) -> Metric:
        """Return the metric of a name. Raises `KeyError` if the task does not have it."""
        return {metric.name: metric for metric in self.all_metrics}[name]


@dataclass(frozen=True)
class Objective:
    """What a model is trained and scored for: a task, the labels of its data, and the metric that selects the best round."""

    task: Task
    labels: tuple[str, ...]
    metric: Metric
