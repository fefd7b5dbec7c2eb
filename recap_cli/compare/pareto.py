"""The Pareto front of memory and metric: the points that no other point beats in one without losing in the other."""

from collections.abc import Sequence

from recap_cli.core.task import Metric


def front(points: Sequence[tuple[float, float]], metric: Metric) -> list[int]:
    """Return the indices of the points (cost, metric) on the front, by rising cost. Of equal points the first counts."""
    indices: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -metric.goodness(points[i][1]))):
        if not indices or metric.is_better(points[index][1], points[indices[-1]][1]):
            indices.append(index)
    return indices
