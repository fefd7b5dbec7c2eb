"""Which groups stay, and which may move: importance against a budget counted in parameters (paper, sec. 3.1.2, 3.2.1)."""

from collections import Counter
from collections.abc import Mapping, Sequence
from math import ceil, gcd
from typing import Literal

import torch
from torch import Tensor

from recap_cli.core.axes import Axis, UnitMask, kinds_of
from recap_cli.errors import SelectionError

Scope = Literal["per-kind", "global", "per-layer"]


def select(
    axes: Sequence[Axis],
    scores: Mapping[str, Tensor],
    unit_params: Mapping[str, int],
    *,
    original: Mapping[str, int],
    keep_share: float,
    scope: Scope = "per-kind",
    floor: float = 0.0,
    least: int = 1,
    uniform: bool = False,
    round_to: int = 1,
) -> UnitMask:
    """The groups of highest importance that hold `keep_share` of the prunable parameters, to within half a group.

    `scores` has one importance per unit of each axis, shape (size,); `unit_params` the parameters one unit owns; `original` the
    sizes before anything was cut, which `keep_share` and `floor` are shares of (so a gradual schedule ends at exactly the sizes
    of its ratio). `scope` says who competes with whom: each kind on its own, everything in one `global` ranking (by importance
    *per parameter*), or each axis by itself (`per-layer`). `floor` is the share of every axis that must stay, `least` a number
    of groups (0 for a mask: a layer of which nothing moves is fine). `uniform` makes all axes of a kind keep the same number;
    `round_to` makes the kept rows of every tensor a multiple.

    Raises `SelectionError` if the floor forbids what the ratio asks, or if a score is not finite.
    """
    _check(axes, scores, original, uniform, round_to)
    chosen: UnitMask = {}
    for pool in ranked_together(axes, scope, uniform=uniform):
        share = keep_share * sum(original[a.name] * unit_params[a.name] for a in pool)
        per_param = scope == "global"
        chosen |= _fill(pool, scores, unit_params, original, budget=share, floor=floor, least=least, per_param=per_param)
    if round_to > 1:
        for pool in ranked_together(axes, "per-kind", uniform=uniform):
            chosen |= _rounded(pool, scores, chosen, round_to, {a.name: _floor(a, original, floor, least) for a in pool})
    return chosen


def _check(
    axes: Sequence[Axis], scores: Mapping[str, Tensor], original: Mapping[str, int], uniform: bool, round_to: int
) -> None:
    for axis in axes:
        if not torch.isfinite(scores[axis.name]).all():
            raise SelectionError(
                f"the importance of {axis.name} is not finite",
                hint="check the data and the weights: a loss or a weight is infinite or not a number",
            )
        if round_to > (rows := original[axis.name] * max(cut.width for cut in axis.cuts)):
            raise SelectionError(
                f"prune.round_to is {round_to}, but {axis.name} has only {rows} rows to keep a multiple of",
                hint="lower prune.round_to; 8 is what tensor cores want",
            )
    if uniform:
        for pool in ranked_together(axes, "per-kind"):
            if len(sizes := {axis.size for axis in pool}) > 1:
                raise SelectionError(
                    f"prune.uniform: the layers have different numbers of {pool[0].kind}: {sorted(sizes)}",
                    hint="set prune.uniform to false for this model",
                )


def ranked_together(axes: Sequence[Axis], scope: Scope, *, uniform: bool = False) -> list[list[Axis]]:
    """The axes whose groups compete with each other; each by itself where all are to keep the same number."""
    if scope == "per-layer" or uniform:
        return [[axis] for axis in axes]
    if scope == "global":
        return [list(axes)]
    return [[axis for axis in axes if axis.kind == kind] for kind in kinds_of(axes)]


def _fill(
    pool: Sequence[Axis],
    scores: Mapping[str, Tensor],
    unit_params: Mapping[str, int],
    original: Mapping[str, int],
    *,
    budget: float,
    floor: float,
    least: int,
    per_param: bool,
) -> UnitMask:
    """Drop the least important units of the pool, one after another, until what is left is nearest to the budget."""
    params = [unit_params[axis.name] for axis in pool]
    spare = [axis.size - _floor(axis, original, floor, least) for axis in pool]
    ranked = torch.cat([scores[a.name] / (p if per_param else 1) for a, p in zip(pool, params, strict=True)])
    owner = [i for i, axis in enumerate(pool) for _ in range(axis.size)]
    unit = [u for axis in pool for u in range(axis.size)]
    goal = sum(axis.size * p for axis, p in zip(pool, params, strict=True)) - budget
    keep = [torch.ones(axis.size, dtype=torch.bool) for axis in pool]
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
            f"cannot drop {goal:,.0f} parameters from {_named(pool)}: the floor of {floor:.0%} per axis allows {dropped:,}",
            hint="lower prune.ratio or prune.floor",
        )
    return {axis.name: kept for axis, kept in zip(pool, keep, strict=True)}


def _floor(axis: Axis, original: Mapping[str, int], floor: float, least: int) -> int:
    """How many units of an axis stay in any case."""
    return min(axis.size, max(least, ceil(floor * original[axis.name] - 1e-9)))


def _rounded(
    pool: Sequence[Axis], scores: Mapping[str, Tensor], chosen: UnitMask, round_to: int, low: Mapping[str, int]
) -> UnitMask:
    """Keep a multiple in every axis, no less than `low`: round down, then hand out what is left by the largest remainder."""
    step = {axis.name: round_to // gcd(round_to, max(cut.width for cut in axis.cuts)) for axis in pool}
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


def _best(scores: Tensor, count: int) -> Tensor:
    keep = torch.zeros(len(scores), dtype=torch.bool)
    keep[torch.argsort(scores, descending=True, stable=True)[:count]] = True
    return keep


def _named(pool: Sequence[Axis]) -> str:
    return pool[0].name if len(pool) == 1 else f"{len(pool)} axes ({pool[0].name} …)"
