"""Random importance: the baseline that every criterion must beat."""

import torch
from torch import Tensor

from recap_cli.api import Criterion


def score(weight: Tensor, grad: Tensor) -> Tensor:
    """Return uniform numbers in [0, 1), entry by entry, from torch's global generator."""
    return torch.rand_like(weight)


RANDOM = Criterion(score=score, needs="none")
