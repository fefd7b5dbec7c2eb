"""Whether the head of a checkpoint fits the labels of the data, and how its outputs are put into their order."""

import re
from collections.abc import Sequence

import torch
from torch import nn

from recap_cli.core.adapter import Adapter, matches


def same_labels(own: Sequence[str] | None, labels: Sequence[str]) -> bool:
    """Whether a head of `own` labels may be used for these; names such as LABEL_0 say nothing and fit all."""
    if own is None or all(re.fullmatch(r"LABEL_\d+", str(name)) for name in own):
        return True
    return [_plain(name) for name in own] == [_plain(name) for name in labels]


def places_of(labels: Sequence[str], own: Sequence[str] | None) -> list[int]:
    """Where each of `labels` stands in a head of the same labels in another order; empty for any other head."""
    plain, wanted = [_plain(name) for name in own or ()], [_plain(name) for name in labels]
    if plain == wanted or len(set(plain)) < len(plain) or sorted(plain) != sorted(wanted):
        return []
    return [plain.index(name) for name in wanted]


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
    return re.sub(r"[\W_]+", " ", str(name)).strip().lower()
