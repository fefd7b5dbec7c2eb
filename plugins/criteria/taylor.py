"""First-order Taylor importance: how much the loss would change if the weight were zero (paper, eq. 1)."""

from torch import Tensor

from recap_cli.api import Criterion


def score(weight: Tensor, grad: Tensor) -> Tensor:
    """Return (∂L/∂θ · θ)², entry by entry, for the mean derivative over D_s."""
    return (weight * grad).square()


TAYLOR = Criterion(score=score, needs="mean")
