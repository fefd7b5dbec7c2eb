"""What an importance criterion is: a value, not a class to inherit from."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from recap_cli.core.axes import Axis

Needs = Literal["none", "mean", "each"]


@dataclass(frozen=True)
class Criterion:
    """How much a weight counts. Give `score`, or `score_groups` for a criterion that cannot be said entry by entry.

    Attributes:
        needs: which gradient it is given: `none` (`grad` is then zero), `mean` over D_s, or that of `each` example (scores are
            averaged).
        score: `score(weight, grad)` returns a non-negative tensor of the weight's shape; the core sums it over each group.
        score_groups: `score_groups(model, axes, losses)` is the other way, by activations for instance: see `GroupScores`.
    """

    needs: Needs = "mean"
    score: Callable[[Tensor, Tensor], Tensor] | None = None
    score_groups: "GroupScores | None" = None

    def __post_init__(self) -> None:
        if (self.score is None) == (self.score_groups is None):
            raise ValueError("a criterion gives exactly one of score and score_groups")
        if self.needs not in ("none", "mean", "each"):
            raise ValueError(f"a criterion needs a gradient of kind none, mean or each, not {self.needs!r}")


# losses(each) runs the model over D_s: it yields (loss of one batch, the batch's share of D_s), or one example at a time.
Losses = Callable[[bool], Iterator[tuple[Tensor, float]]]
# (model, axes, losses) → axis name → importance, shape (axis.size,); hooks set on the modules see every activation of D_s.
GroupScores = Callable[[nn.Module, Sequence[Axis], Losses], dict[str, Tensor]]
