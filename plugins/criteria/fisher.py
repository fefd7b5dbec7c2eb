"""Fisher importance: how much the prediction depends on the weight (paper, eq. 4)."""

from torch import Tensor

from recap_cli.api import Criterion


def score(weight: Tensor, grad: Tensor) -> Tensor:
    """Return (∂log p/∂θ)², entry by entry."""
    return grad.square()


FISHER = Criterion(score=score, needs="mean")
# The empirical Fisher: the mean of squares, not the square of the mean.
FISHER_PER_EXAMPLE = Criterion(score=score, needs="each")
