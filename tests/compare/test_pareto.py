"""The Pareto front."""

import random

from recap_cli.compare.pareto import front
from recap_cli.core.task import LOSS, Metric

ACCURACY = Metric("accuracy")


def test_the_front_is_what_nothing_beats() -> None:
    points = [(3.0, 0.9), (1.0, 0.8), (2.0, 0.7), (1.0, 0.6), (4.0, 0.9), (5.0, 0.95)]
    assert front(points, ACCURACY) == [1, 0, 5]
    assert front([], ACCURACY) == []


def test_of_a_loss_the_lower_one_is_on_the_front() -> None:
    assert front([(1.0, 0.8), (2.0, 0.9), (2.0, 0.5), (3.0, 0.6), (4.0, 0.1)], LOSS) == [0, 2, 4]


def test_of_many_points_it_is_those_that_no_other_beats_in_both() -> None:
    dice = random.Random(0)
    points = [(dice.randrange(20) * 1.0, dice.randrange(20) * 1.0) for _ in range(60)]
    beaten = {p for p in points for q in points if q != p and q[0] <= p[0] and q[1] >= p[1]}
    assert [points[at] for at in front(points, ACCURACY)] == sorted(set(points) - beaten)
