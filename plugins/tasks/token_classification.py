"""A tag for each word of a text, such as the names in it: cross entropy, F1 of the entities, accuracy of the words."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import log
from typing import TYPE_CHECKING, Any

from recap_cli.api import (
    IGNORED,
    Batch,
    DataError,
    Distillation,
    LabelColumn,
    Labels,
    Metric,
    Target,
    Task,
    label_numbers,
    read_labels,
    soft_cross_entropy,
)

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

    from recap_cli.api import Ragged

BILOU = {"L": "E", "U": "S"}  # the marks that IOBES calls otherwise
OUTSIDE = "O"  # the tag of a word that belongs to no entity
CHOOSE = "choose the column of the tags with --set data.label=NAME"


def may_be_tags(kind: "pa.DataType") -> bool:
    """Whether a column of this type may hold the tags of words: a list for each text, or a text of tags with blanks between."""
    from pyarrow import types

    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_string(kind) or types.is_large_string(kind))


def are_tags(column: "pa.ChunkedArray") -> bool:
    """Whether the first tags of a column repeat, as tags do and words do not."""
    import pyarrow.compute as pc

    tags = pc.list_flatten(split(column.slice(0, 200)))
    return len(tags.unique()) <= max(2, len(tags) / 4)


def split(values: "pa.ChunkedArray") -> "pa.ChunkedArray":
    """Return a list for each text; a text is split at its blanks."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        return pc.utf8_split_whitespace(pc.utf8_trim_whitespace(values))
    return values


def flat(column: LabelColumn) -> "tuple[pa.ChunkedArray, Any]":
    """Return the tags of all texts, one after another, and the row of each, from 0."""
    import numpy as np
    import pyarrow.compute as pc

    lists = split(column.values)
    tags = pc.list_flatten(lists)
    rows = np.repeat(np.arange(len(lists)), pc.list_value_length(lists).to_numpy().astype(np.int64))
    if (index := pc.index(tags.is_null(), True).as_py()) >= 0:
        raise DataError(f"{column.place} lacks a tag in row {rows[index] + 1}", hint="correct the row, or remove it")
    return tags, rows


def learn(columns: Sequence[LabelColumn]) -> Labels:
    """Return the tags of a column. That none of them is `O`, as where they are numbers without names, is noted."""
    (column,) = columns
    tags, _ = flat(column)
    if len(tags) == 0:
        raise DataError(f"{column.place} holds no tags", hint=CHOOSE)
    found = read_labels(tags, column.names, column.place, words=False)
    if OUTSIDE in found.names:
        return found
    note = f"{column.place} has no tag {OUTSIDE!r}, so that every word counts for f1, precision and recall"
    return replace(found, notes=(*found.notes, note))


def encode(columns: Sequence[LabelColumn], labels: Labels) -> "pa.ChunkedArray":
    """Return the numbers of each example's tags, a list of int64."""
    import pyarrow as pa
    import pyarrow.compute as pc

    (column,) = columns
    tags, rows = flat(column)
    numbers = label_numbers(tags, labels, column.names, column.place, row_of=lambda index: int(rows[index]))
    lengths = pc.list_value_length(split(column.values)).to_pylist()
    ends = [0]
    for length in lengths:
        ends.append(ends[-1] + length)
    return pa.chunked_array([pa.ListArray.from_arrays(pa.array(ends, pa.int32()), numbers.combine_chunks())])


def loss(logits: "Tensor", batch: Batch) -> "Tensor":
    """Return the sum of the cross entropies of the words, a float32 scalar, for `logits` (batch, tokens, labels)."""
    import torch.nn.functional as F

    return F.cross_entropy(logits.float().flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED, reduction="sum")


def count(batch: Batch) -> "Tensor":
    """Return how many words of a batch have a tag: each has it at its first token."""
    return (batch["labels"] != IGNORED).sum()


def score(stream: Iterable[tuple["Tensor", Batch]], labels: Sequence[str]) -> dict[str, float]:
    """Return the metrics of the most probable tags of words, each read at the word's first token."""
    predicted: list[list[str]] = []
    targets: list[list[str]] = []
    for logits, batch in stream:
        for found, wanted in _words(logits, batch):
            predicted.append([labels[number] for number in found])
            targets.append([labels[number] for number in wanted])
    return metrics_of(predicted, targets, labels)


def metrics_of(predicted: list[list[str]], targets: list[list[str]], labels: Sequence[str]) -> dict[str, float]:
    """Return the metrics of predicted and true tags, text by text.

    F1, precision and recall are of whole entities, as CoNLL has them. Tags such as B-PER and I-PER mark entities of several
    words; E and S (or, in BILOU, L and U) are read too. Where not all `labels` are of this form, each word whose tag is not O
    is an entity.
    """
    from seqeval import metrics

    pairs = [(found, wanted) for row in zip(predicted, targets, strict=True) for found, wanted in zip(*row, strict=True)]
    marks = all(tag[1:2] == "-" for tag in labels if tag != OUTSIDE)
    predicted, targets = ([[_as_seqeval(tag, marks) for tag in text] for text in texts] for texts in (predicted, targets))
    return {
        "f1": float(metrics.f1_score(targets, predicted, zero_division=0)),
        "precision": float(metrics.precision_score(targets, predicted, zero_division=0)),
        "recall": float(metrics.recall_score(targets, predicted, zero_division=0)),
        "accuracy": sum(found == wanted for found, wanted in pairs) / max(1, len(pairs)),
    }


def _as_seqeval(tag: str, marks: bool) -> str:
    """Return a tag as seqeval reads it: the marks of BILOU as those of IOBES, and a tag without a mark as one word alone."""
    if tag == OUTSIDE or marks:
        return f"{BILOU.get(tag[0], tag[0])}{tag[1:]}"
    return f"B-{tag}"


def constant(targets: "Ragged", labels: Sequence[str]) -> dict[str, float]:
    """Return the figures of the best tag for all words, each metric's own.

    Tried are the most frequent tags, and of those that begin an entity, as a tag inside of one finds none of a single word.
    """
    texts = [[labels[number] for number in targets.row(i).tolist() if number != IGNORED] for i in range(len(targets))]
    counts = Counter(tag for text in texts for tag in text)
    total = counts.total()
    ranked = [tag for tag, _ in counts.most_common()]
    tried = {*ranked[:3], *[tag for tag in ranked if tag.startswith("B-")][:3]}
    found = [metrics_of([[tag] * len(text) for text in texts], texts, labels) for tag in tried]
    best = {name: max(one[name] for one in found) for name in found[0]}
    return {"loss": -sum(n / total * log(n / total) for n in counts.values()), **best}


def predict(logits: "Tensor", batch: Batch, labels: Sequence[str]) -> dict[str, list[Any]]:
    """Return for each text its tags and the predicted ones, with blanks between, and the mean loss of its words."""
    import torch.nn.functional as F

    losses = F.cross_entropy(logits.float().transpose(1, 2), batch["labels"], ignore_index=IGNORED, reduction="none")
    words = (batch["labels"] != IGNORED).sum(1).clamp(min=1)  # (batch,)
    pairs = list(_words(logits, batch))
    return {
        "label": [" ".join(labels[number] for number in wanted) for _, wanted in pairs],
        "predicted": [" ".join(labels[number] for number in found) for found, _ in pairs],
        "loss": (losses.sum(1) / words).tolist(),
    }


def _words(logits: "Tensor", batch: Batch) -> Iterable[tuple[list[int], list[int]]]:
    """Yield the predicted and the true numbers of the words of each text."""
    best, targets = logits.argmax(dim=-1).cpu(), batch["labels"].cpu()  # (batch, tokens) each
    for found, wanted in zip(best, targets, strict=True):
        at = wanted != IGNORED  # (tokens,)
        yield found[at].tolist(), wanted[at].tolist()


def rows(logits: "Tensor", batch: Batch) -> "Tensor":
    """Return what a teacher teaches: the logits of the words, each at the word's first token, (words, labels)."""
    return logits[batch["labels"] != IGNORED]


def rows_of_each(batch: Batch) -> "Tensor":
    """Return how many words of each text have a tag, (batch,)."""
    return (batch["labels"] != IGNORED).sum(1)


TAGS = Target("tags of words", learn, encode, can_be=may_be_tags, is_likely=are_tags)

TOKEN_CLASSIFICATION = Task(
    title="a tag for each word of a text",
    inputs="words",
    target=TAGS,
    auto_class="AutoModelForTokenClassification",
    loss=loss,
    count=count,
    metrics=(Metric("f1"), Metric("precision"), Metric("recall"), Metric("accuracy")),
    score=score,
    constant=constant,
    predict=predict,
    distillation=Distillation(rows, soft_cross_entropy, rows_of_each),
    extra="tokens",
)
