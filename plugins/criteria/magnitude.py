"""Magnitude importance: the squared weight, which needs no data."""

from torch import Tensor

from recap_cli.api import Criterion


def score(weight: Tensor, grad: Tensor) -> Tensor:
    """Return θ², entry by entry."""
    return weight.square()


MAGNITUDE = Criterion(score=score, needs="none")
