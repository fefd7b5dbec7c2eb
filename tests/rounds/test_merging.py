"""Which round's small model is the product."""

from math import nan

import pytest

from recap_cli.core.task import Metric
from recap_cli.rounds.merging import _rank


@pytest.mark.parametrize("better", ["more", "less"])
def test_a_round_whose_metric_is_no_number_is_worse_than_any_other(better: str) -> None:
    metric = Metric("x", better)  # type: ignore[arg-type]
    odd, plain = ({"x": value, "loss": loss} for value, loss in ((nan, 0.1), (-1e9 if better == "more" else 1e9, 0.5)))
    assert _rank(odd, metric) < _rank(plain, metric)
    assert not _rank(plain, metric) < _rank(odd, metric)
