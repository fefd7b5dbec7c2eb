"""Whether the head of a checkpoint fits the task and the labels of the data, and how its outputs are reordered."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from recap_cli.core.adapter import Adapter, matches
from recap_cli.tasks.labels import finder, key_of


@dataclass(frozen=True)
class SaidHead:
    """What the configuration of a checkpoint says of its head.

    Attributes:
        labels: The names of its outputs, in order; None if it has none.
        architectures: The classes of the model that was saved; anything, as a stranger's file has it.
        problem_type: The kind of its loss, as transformers calls it, likewise.
    """

    labels: Sequence[str] | None
    architectures: Any = None
    problem_type: Any = None

    def other_task(self, model: nn.Module, problem_type: str | None) -> str | None:
        """Return what the head was for, if that is another task than the model's; None if it is not, or is not said.

        Heads of several classes have weights of the same names and shapes: one class for a text, and one for each word.
        """
        saved, problems = self.architectures, (self.problem_type, problem_type)
        if isinstance(saved, list) and saved and type(model).__name__ not in saved:
            return ", ".join(map(str, saved))
        return str(self.problem_type) if None not in problems and len(set(map(str, problems))) > 1 else None


def places_of(labels: Sequence[str], head_labels: Sequence[str] | None) -> list[int] | None:
    """Return the output of the head for each label of the data.

    Args:
        labels: The labels of the data.
        head_labels: Those of the head, in order. Names such as LABEL_0 mean nothing, and fit all labels.

    Returns:
        None if the head has other labels, or if a label may be two of them.
    """
    if head_labels is None or all(re.fullmatch(r"LABEL_\d+", name) for name in head_labels):
        return list(range(len(labels)))
    if len(labels) == len(head_labels) == 1:
        return [0]  # a number, which is named for its column
    find = finder(head_labels, _plain)
    places = [place for label in labels if (place := find(label)) is not None]
    return places if sorted(places) == list(range(len(head_labels))) == list(range(len(labels))) else None


def reorder_output(model: nn.Module, adapter: Adapter, places: Sequence[int]) -> bool:
    """Reorder the outputs of the head. Return False, and do nothing, if a layer before the outputs has the same width.

    A predictor of queries' classes has one output more, the last, for no object.
    """
    outputs = list(outputs_of(model, adapter, len(places)).values())
    if any(param.dim() > 1 and param.shape[1] == len(places) for param in outputs):
        return False
    with torch.no_grad():
        for param in outputs:
            param[: len(places)] = param[list(places)]
    return True


def outputs_of(model: nn.Module, adapter: Adapter, labels: int) -> dict[str, nn.Parameter]:
    """Return the parameters of the head with an output for each label, by name; or with one more where none has just these."""
    head = {name: param for name, param in model.named_parameters() if matches(name, adapter.head)}
    exact = {name: param for name, param in head.items() if param.shape[0] == labels}
    return exact or {name: param for name, param in head.items() if param.shape[0] == labels + 1}


def _plain(name: str) -> str:
    """Return a name without the marks between its words. Other marks stay: `C` and `C++` are different labels."""
    return key_of(re.sub(r"(?<=[^\W_])(-|[\s_,.]+)(?=[^\W_])", " ", name))
