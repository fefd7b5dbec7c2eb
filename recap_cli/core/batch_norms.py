"""Batch norms: their statistics stay what they are while a model is trained, and are estimated once where the norm is new.

A mean over a batch would change with the batch's size, with micro-batches, and with what is pruned; of one image it may be
none at all. Frozen statistics are what detection and segmentation with small batches use (He et al., 2017, sec. 3.1).
"""

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def train_mode(model: nn.Module, on: bool = True) -> nn.Module:
    """Return a model in training mode (or evaluation mode), its batch norms in evaluation mode, with their statistics."""
    model.train(on)
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            module.eval()
    return model


def new_norms(model: nn.Module, new: Collection[str]) -> list[_BatchNorm]:
    """Return the batch norms with statistics whose weight is among the names of `new` parameters."""
    return [
        module
        for path, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats and f"{path}.weight" in new
    ]


def estimate_statistics(norms: Iterable[_BatchNorm], forward: Callable[[Any], Any], batches: Iterable[Any]) -> None:
    """Give batch norms the mean and the variance of what reaches them in `batches`, each batch counting alike.

    A norm that gets what another one has normalised gets it as the batch's own statistics make it.
    """
    found = list(norms)
    momenta = [norm.momentum for norm in found]
    for norm in found:
        norm.reset_running_stats()
        norm.momentum = None  # the mean of all batches
        norm.train()
    try:
        with torch.no_grad():
            for batch in batches:
                forward(batch)
    finally:
        for norm, momentum in zip(found, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()
