"""What a cut takes from the output of a linear layer, given back by the inputs that are left: ridge regression on moments.

A layer `x ↦ W x + b` whose inputs are pruned loses `y = W_gone x_gone`. Of `k = [x_kept, 1]` the change

    D = E[y kᵀ] (E[k kᵀ] + ridge · m · diag(1, …, 1, 0))⁻¹        m: the mean of the diagonal of E[x_kept x_keptᵀ]

makes the linear function of k that is nearest to y: `W_kept += D[:, :-1]`, `b += D[:, -1]`. Without a bias there is no 1. It is
not penalised: with a large ridge only the mean of y is left, which FLAP (2312.11983) adds to the bias. Relatives are the least
squares of Kwon et al. (2204.09656) and of SlimGPT (2412.18110).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # that `best_change` is to choose from
NO_DATA = torch.finfo(torch.float32).eps  # of the largest variance; in a direction of less there is nothing but rounding


@dataclass(frozen=True)
class Moments:
    """Sums over rows, float64 on the CPU.

    Attributes:
        kk: Σ k kᵀ of what is left, (kept + 1, kept + 1). Its last entry is the number of rows.
        yk: Σ y kᵀ, y being what is lost, (out, kept + 1).
        yy: Σ |y|², a scalar.
    """

    kk: Tensor
    yk: Tensor
    yy: Tensor

    @classmethod
    def none(cls, kept: int, out: int) -> "Moments":
        """The moments of no rows."""
        zeros = [torch.zeros(shape, dtype=torch.float64) for shape in ((kept + 1, kept + 1), (out, kept + 1), ())]
        return cls(*zeros)

    @classmethod
    def of_rows(cls, left: Tensor, lost: Tensor) -> "Moments":
        """The moments of rows, on any device and in the precision that they have.

        Args:
            left: x_kept, (rows, kept).
            lost: y, (rows, out).
        """
        k = torch.cat([left, left.new_ones(len(left), 1)], dim=1)  # (rows, kept + 1)
        sums = (k.T @ k, lost.T @ k, lost.square().sum())
        return cls(*(found.cpu().double() for found in sums))

    @property
    def rows(self) -> int:
        return int(self.kk[-1, -1])

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.kk + other.kk, self.yk + other.yk, self.yy + other.yy)

    @property
    def is_finite(self) -> bool:
        return all(bool(found.isfinite().all()) for found in (self.kk, self.yk, self.yy))


@dataclass(frozen=True)
class Balance:
    """What a layer loses by a cut, and how much of it a change does not give back.

    Attributes:
        rows: how many were seen; 0: the layer was never called.
        lost: Σ |y|² over them.
        left: what of it is left on rows that the fit has not seen.
    """

    rows: int = 0
    lost: float = 0.0
    left: float = 0.0

    @property
    def left_share(self) -> float:
        """What of Σ |y|² is left: 0 where nothing is lost, 1 where nothing was seen."""
        if self.rows == 0:
            return 1.0
        return self.left / self.lost if self.lost else 0.0

    def __add__(self, other: "Balance") -> "Balance":
        return Balance(self.rows + other.rows, self.lost + other.lost, self.left + other.left)


@dataclass(frozen=True)
class Change:
    """What a layer absorbs.

    Attributes:
        entries: D, float64, (out, kept + 1); the last column is of the bias.
        ridge: what it was fitted with; None where no change was better, or nothing was lost, and D is 0.
        balance: what was lost, and what is left of it.
    """

    entries: Tensor
    ridge: float | None
    balance: Balance


def changes(moments: Moments, ridges: Sequence[float], *, has_bias: bool) -> Iterator[Tensor]:
    """D for each ridge, float64, (out, kept + 1). Without a bias its last column is 0.

    The best shift, which is not penalised, makes the means agree; the rest is a regression of centred y on centred x_kept. One
    eigendecomposition serves all ridges. A direction without data and without a ridge gets 0.
    """
    rows = max(moments.rows, 1)
    kk, yk = moments.kk[:-1, :-1] / rows, moments.yk[:, :-1] / rows  # (kept, kept), (out, kept)
    mean_x, mean_y = moments.kk[:-1, -1] / rows, moments.yk[:, -1] / rows  # (kept,), (out,)
    penalty = kk.diagonal().mean()
    if has_bias:
        kk, yk = kk - torch.outer(mean_x, mean_x), yk - torch.outer(mean_y, mean_x)
    variances, directions = torch.linalg.eigh(kk)  # (kept,), (kept, kept)
    variances, along = variances.clamp(min=0.0), yk @ directions  # (out, kept)
    least = NO_DATA * variances.amax() if len(variances) else 0.0
    for ridge in ridges:
        damped = variances + ridge * penalty
        inverse = torch.where(damped > least, 1.0 / damped, 0.0)
        weight = (along * inverse) @ directions.T  # (out, kept)
        bias = mean_y - weight @ mean_x if has_bias else torch.zeros_like(mean_y)  # (out,)
        yield torch.cat([weight, bias[:, None]], dim=1)


def left_over(moments: Moments, entries: Tensor) -> float:
    """Σ |y − D k|² over the rows of the moments."""
    of_rows = moments.yy - 2.0 * (entries * moments.yk).sum() + ((entries @ moments.kk) * entries).sum()
    return max(0.0, float(of_rows))


def best_change(halves: tuple[Moments, Moments], ridges: Sequence[float], *, has_bias: bool, may_be_none: bool) -> Change:
    """The change with the ridge that leaves least where it was not fitted, fitted on all rows.

    Args:
        halves: the moments of two halves of the rows. What is fitted on one is judged on the other, both ways.
        ridges: to choose from.
        has_bias: whether the layer has a bias, which can absorb a shift.
        may_be_none: take no change where that leaves less than every ridge does.
    """
    first, second = halves
    both, lost = first + second, float(first.yy + second.yy)
    nothing = torch.zeros_like(both.yk)
    if lost == 0.0:
        return Change(nothing, None, Balance(both.rows))
    left = [0.0] * len(ridges)
    for fitted, judged in ((first, second), (second, first)):
        for at, entries in enumerate(changes(fitted, ridges, has_bias=has_bias)):
            left[at] += left_over(judged, entries)
    best = min(range(len(ridges)), key=left.__getitem__)
    if may_be_none and left[best] >= lost:
        return Change(nothing, None, Balance(both.rows, lost, left=lost))
    (entries,) = changes(both, ridges[best : best + 1], has_bias=has_bias)
    return Change(entries, ridges[best], Balance(both.rows, lost, left[best]))


def with_change(tensors: Mapping[str, Tensor], change: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, those that have a change with it; the others are not copied."""
    return {name: tensor + change[name] if name in change else tensor for name, tensor in tensors.items()}
