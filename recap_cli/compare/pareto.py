"""The Pareto front of memory and metric: what no other beats in one without losing in the other."""

from collections.abc import Sequence

from recap_cli.tasks.task import goodness, is_better


def front(points: Sequence[tuple[float, float]], metric: str) -> list[int]:
    """Which of the points (cost, value of the metric) are on the front, by rising cost; of points that are the same, the
    first.
    """
    found: list[int] = []
    for at in sorted(range(len(points)), key=lambda i: (points[i][0], -goodness(metric, points[i][1]))):
        if not found or is_better(metric, points[at][1], points[found[-1]][1]):
            found.append(at)
    return found
