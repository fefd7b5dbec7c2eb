"""Which groups stay, and which are trainable: importance against a budget counted in parameters (paper, sec. 3.1.2, 3.2.1)."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, gcd, lcm
from typing import Literal

import torch
from torch import Tensor

from recap_cli.core.axes import Axis, UnitMask, kinds_of
from recap_cli.errors import SelectionError

Scope = Literal["per-kind", "global", "per-layer"]
RankBy = Literal["sum", "parameter", "layer", "size"]


@dataclass(frozen=True)
class Limits:
    """What a selection must respect, however much it keeps.

    Attributes:
        scope: who competes with whom: each kind on its own, everything in one `global` ranking, or each axis by itself
            (`per-layer`).
        rank_by: how groups of different size compete: by importance per `parameter`; by the `sum` over the group (eq. (1);
            per parameter where the scope is `global`, as a head has many times the weights of a neuron); by importance in
            relation to the mean of the `layer`; or not at all (`size`: those of each size by themselves).
        floor: the share of every axis that must stay.
        least: the number of groups of every axis that must stay (0 for a mask: a layer that is frozen whole is fine).
        uniform: True makes all axes of a kind keep the same number.
        round_to: the kept rows of every tensor are a multiple of it.
    """

    scope: Scope = "per-kind"
    rank_by: RankBy = "parameter"
    floor: float = 0.0
    least: int = 1
    uniform: bool = False
    round_to: int = 1

    def apart(self, unit_params: Mapping[str, int]) -> Mapping[str, int]:
        """The sizes by which axes are ranked apart from each other, by name; none where groups of all sizes compete."""
        return unit_params if self.rank_by == "size" else {}

    def lowest(self, axis: Axis, original: Mapping[str, int]) -> int:
        """How many units of an axis stay in any case."""
        return min(axis.size, max(self.least, ceil(self.floor * original[axis.name] - 1e-9)))


def select(
    axes: Sequence[Axis],
    scores: Mapping[str, Tensor],
    unit_params: Mapping[str, int],
    *,
    original: Mapping[str, int],
    keep_share: float,
    limits: Limits = Limits(),
) -> UnitMask:
    """The groups of highest importance that hold `keep_share` of the prunable parameters, to within half a group.

    Args:
        axes: what is selected from.
        scores: an importance per unit, by axis, shape (size,).
        unit_params: the parameters that one unit owns, by axis.
        original: the sizes before anything was cut, by axis: `keep_share` and the floor are shares of these, so a gradual
            schedule ends at exactly the sizes of its ratio.
        keep_share: the share of the prunable parameters that is kept.
        limits: what must be respected besides.

    Returns:
        For each axis name a bool tensor, shape (size,): True is kept.

    Raises:
        SelectionError: the floor forbids what the ratio asks, or a score is not finite.
    """
    _check(axes, scores, original, limits)
    chosen: UnitMask = {}
    for pool in ranked_together(axes, limits.scope, uniform=limits.uniform, sizes=limits.apart(unit_params)):
        budget = keep_share * sum(original[a.name] * unit_params[a.name] for a in pool)
        chosen |= _fill(pool, scores, unit_params, original, budget, limits)
    if limits.round_to > 1:
        for pool in ranked_together(axes, "per-kind", uniform=limits.uniform):
            lowest = {axis.name: limits.lowest(axis, original) for axis in pool}
            chosen |= _rounded(pool, scores, chosen, limits.round_to, lowest)
    return chosen


def _check(axes: Sequence[Axis], scores: Mapping[str, Tensor], original: Mapping[str, int], limits: Limits) -> None:
    for axis in axes:
        if not torch.isfinite(scores[axis.name]).all():
            raise SelectionError(
                f"the importance of {axis.name} is not finite",
                hint="check the data and the weights: a loss or a weight is infinite or not a number",
            )
        if limits.round_to > (rows := original[axis.name] * min(_row_widths(axis))):
            raise SelectionError(
                f"prune.round_to is {limits.round_to}, but {axis.name} has only {rows} rows to keep a multiple of",
                hint="lower prune.round_to; 8 is what tensor cores want",
            )
    if limits.uniform:
        for pool in ranked_together(axes, "per-kind"):
            if len(sizes := {axis.size for axis in pool}) > 1:
                raise SelectionError(
                    f"prune.uniform: the layers have different numbers of {pool[0].kind}: {sorted(sizes)}",
                    hint="set prune.uniform to false for this model",
                )


def ranked_together(
    axes: Sequence[Axis], scope: Scope, *, uniform: bool = False, sizes: Mapping[str, int] = {}
) -> list[list[Axis]]:
    """The axes whose groups compete with each other; each by itself where all are to keep the same number.

    `sizes` are by axis, and those of different size do not compete.
    """
    if scope == "per-layer" or uniform:
        return [[axis] for axis in axes]
    kinds = {axis.name: "" if scope == "global" else axis.kind for axis in axes}
    pools: dict[tuple[str, int], list[Axis]] = {}
    for kind in [""] if scope == "global" else kinds_of(axes):
        for axis in axes:
            if kinds[axis.name] == kind:
                pools.setdefault((kind, sizes.get(axis.name, 0)), []).append(axis)
    return list(pools.values())


def _comparable(pool: Sequence[Axis], scores: Mapping[str, Tensor], params: Sequence[int], limits: Limits) -> Tensor:
    """The scores of all units of a pool, (units,), as they are ranked.

    Where all units have as many parameters, these change no rank, and rounding shall not either.
    """
    each = [scores[axis.name] for axis in pool]
    if limits.rank_by == "layer":
        return torch.cat([of_axis / of_axis.abs().mean().clamp(min=1e-30) for of_axis in each])
    by_parameter = limits.scope == "global" or (limits.rank_by == "parameter" and len(set(params)) > 1)
    return torch.cat([of_axis / size if by_parameter else of_axis for of_axis, size in zip(each, params, strict=True)])


def _fill(
    pool: Sequence[Axis],
    scores: Mapping[str, Tensor],
    unit_params: Mapping[str, int],
    original: Mapping[str, int],
    budget: float,
    limits: Limits,
) -> UnitMask:
    """Drop the least important units of the pool, one after another, until what is left is nearest to the budget."""
    params = [unit_params[axis.name] for axis in pool]
    spare = [axis.size - limits.lowest(axis, original) for axis in pool]
    ranked = _comparable(pool, scores, params, limits)  # (units,)
    owner = [i for i, axis in enumerate(pool) for _ in range(axis.size)]
    unit = [u for axis in pool for u in range(axis.size)]
    goal = sum(axis.size * p for axis, p in zip(pool, params, strict=True)) - budget
    keep = [torch.ones(axis.size, dtype=torch.bool) for axis in pool]  # (axis.size,) each
    dropped = 0
    for at in torch.argsort(ranked, stable=True).tolist():
        i = owner[at]
        if spare[i] == 0:
            continue
        if dropped + params[i] / 2 > goal + 1e-6 * params[i]:
            break
        keep[i][unit[at]] = False
        spare[i] -= 1
        dropped += params[i]
    if goal - dropped > max(params):
        raise SelectionError(
            f"cannot drop {goal:,.0f} parameters from {_named(pool)}: "
            f"the floor of {limits.floor:.0%} per axis allows {dropped:,}",
            hint="lower prune.ratio or prune.floor",
        )
    return {axis.name: kept for axis, kept in zip(pool, keep, strict=True)}


def _rounded(
    pool: Sequence[Axis], scores: Mapping[str, Tensor], chosen: UnitMask, round_to: int, low: Mapping[str, int]
) -> UnitMask:
    """Keep a multiple in every axis, no less than `low`: round down, then hand out what is left by the largest remainder."""
    step = {axis.name: lcm(*(round_to // gcd(round_to, width) for width in _row_widths(axis))) for axis in pool}
    wanted = {axis.name: int(chosen[axis.name].sum()) for axis in pool}
    size = {axis.name: axis.size for axis in pool}
    lowest = {n: ceil(max(low[n], 1) / step[n]) * step[n] for n in wanted}
    kept = Counter({n: min(size[n], max(lowest[n], wanted[n] - wanted[n] % step[n])) for n in wanted})
    left = sum(wanted.values()) - kept.total()
    for name in sorted(wanted, key=lambda n: kept[n] - wanted[n]):
        if left < step[name] / 2:
            break
        if wanted[name] > kept[name] and kept[name] + step[name] <= size[name]:
            kept[name] += step[name]
            left -= step[name]
    return {axis.name: _best(scores[axis.name], kept[axis.name]) for axis in pool}


def _row_widths(axis: Axis) -> set[int]:
    """The rows or columns of matrices that a unit owns; a table that has one entry for each wide unit is no matrix to round."""
    widths = {cut.width for cut in axis.cuts}
    return widths - {1} or widths


def _best(scores: Tensor, count: int) -> Tensor:
    """The units of the `count` highest scores, both (axis.size,)."""
    keep = torch.zeros(len(scores), dtype=torch.bool)  # (axis.size,)
    keep[torch.argsort(scores, descending=True, stable=True)[:count]] = True
    return keep


def _named(pool: Sequence[Axis]) -> str:
    return pool[0].name if len(pool) == 1 else f"{len(pool)} axes ({pool[0].name} …)"
