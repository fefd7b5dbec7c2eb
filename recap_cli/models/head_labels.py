"""Whether the head of a checkpoint fits the labels of the data, and how its outputs are put into their order."""

import re
from collections.abc import Sequence

import torch
from torch import nn

from recap_cli.core.adapter import Adapter, matches
from recap_cli.data.labels import finder, key_of


def places_of(labels: Sequence[str], own: Sequence[str] | None) -> list[int] | None:
    """Where each of `labels` stands in a head of `own`; None where these are others, or one of them may be two.

    Names such as LABEL_0 say nothing, and fit all.
    """
    if own is None or all(re.fullmatch(r"LABEL_\d+", name) for name in own):
        return list(range(len(labels)))
    find = finder(own, _plain)
    places = [place for label in labels if (place := find(label)) is not None]
    return places if sorted(places) == list(range(len(own))) == list(range(len(labels))) else None


def reorder_output(model: nn.Module, adapter: Adapter, places: Sequence[int]) -> bool:
    """Give the outputs of the head another order; False, and nothing is done, if a layer before them is as wide."""
    head = [param for name, param in model.named_parameters() if matches(name, adapter.head)]
    outputs = [param for param in head if param.shape[0] == len(places)]
    if any(param.dim() > 1 and param.shape[1] == len(places) for param in outputs):
        return False
    with torch.no_grad():
        for param in outputs:
            param.copy_(param[list(places)])
    return True


def _plain(name: str) -> str:
    """A name without the marks between its words. Others stay: `+` and `-`, `C` and `C++` are different labels."""
    return key_of(re.sub(r"(?<=[^\W_])(-|[\s_,.]+)(?=[^\W_])", " ", name))
