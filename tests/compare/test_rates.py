"""Each method is shown at its best rate: by the mean on the validation data, and by nothing else."""

from collections.abc import Sequence
from typing import Any

import pytest

from recap_cli.compare import rates
from recap_cli.compare.schema import Outcome, groups
from recap_cli.core.task import LOSS, Metric

ACCURACY = Metric("accuracy")


def cell(lr: float | None, seed: int, value: float | None, test: float | None = None, **given: Any) -> dict[str, Any]:
    """A cell that is done if it has a value; else it waits."""
    status = "waiting" if value is None else "done"
    tested = None if test is None else {"value": test, "examples": 7, "data": "test.csv"}
    facts = {"method": "recap", "prune_ratio": 0.333, "status": status, "rate": lr, **given}
    return Outcome(lr=lr, seed=seed, value=value, test=tested, **facts).model_dump()


def at(*values: tuple[float, float | None], **given: Any) -> list[dict[str, Any]]:
    """A cell of one seed for each rate and its value."""
    return [cell(lr, 0, value, **given) for lr, value in values]


def row_of(cells: Sequence[dict[str, Any]], metric: Metric = ACCURACY) -> dict[str, Any]:
    (row,) = groups(cells, metric)
    return row


def note_of(cells: Sequence[dict[str, Any]]) -> str | None:
    return rates.note(row_of(cells), "recap, r_p 0.333")


def test_the_rate_of_the_best_mean_over_the_seeds_is_chosen_and_the_row_is_of_its_cells_alone() -> None:
    values = {1e-4: (0.5, 0.6), 3e-4: (0.9, 0.5), 1e-3: (0.65, 0.65)}
    row = row_of([cell(lr, seed, value) for lr, mine in values.items() for seed, value in enumerate(mine)])
    assert (row["lr"], row["n"], row["of"], row["edge"]) == (3e-4, 2, 2, None)
    assert row["value"] == pytest.approx(0.7)
    assert row["deviation"] == pytest.approx(0.08**0.5)
    assert row["rates"] == [
        {"lr": lr, "value": pytest.approx(value), "n": 2} for lr, value in zip(values, (0.55, 0.7, 0.65), strict=True)
    ]
    least = row_of([cell(lr, seed, value) for lr, mine in values.items() for seed, value in enumerate(mine)], LOSS)
    assert (least["lr"], least["edge"]) == (1e-4, "lowest")


def test_held_out_data_choose_nothing() -> None:
    cells = [cell(1e-4, 0, 0.9, 0.1), cell(3e-4, 0, 0.8, 0.99), cell(1e-4, 1, 0.9, 0.3), cell(3e-4, 1, 0.8, 0.99)]
    row = row_of(cells)
    assert row["lr"] == 1e-4
    assert (row["test"], row["test_n"]) == (pytest.approx(0.2), 2)
    assert row["test_deviation"] == pytest.approx(0.02**0.5)
    assert row_of(cells[:1])["test_deviation"] is None
    assert (row_of(at((1e-4, 0.9)))["test"], row_of(at((1e-4, 0.9)))["test_n"]) == (None, 0)


def test_only_rates_with_the_most_seeds_are_chosen_among_and_ties_go_to_the_lower() -> None:
    cells = [cell(1e-4, 0, 0.5), cell(1e-4, 1, 0.5), cell(3e-4, 0, 0.9), cell(3e-4, 1, None)]
    assert row_of(cells)["lr"] == 1e-4
    cells[-1] |= {"status": "failed", "error": "the loss is not finite"}
    assert row_of(cells)["lr"] == 1e-4
    assert row_of(at((1e-3, 0.5), (1e-4, 0.5), (3e-4, 0.5)))["lr"] == 1e-4


def test_without_a_value_nothing_is_chosen_and_the_row_has_all_cells() -> None:
    row = row_of(at((1e-4, None), (3e-4, None)))
    assert (row["lr"], row["rates"], row["edge"], row["of"]) == (None, [], None, 2)
    assert note_of(at((1e-4, None), (3e-4, None))) is None


@pytest.mark.parametrize(
    ("values", "note"),
    [
        (
            [(1e-4, 0.1), (3e-4, 0.2), (9e-4, 0.3)],
            "its best rate 0.0009 is the highest of 3 that were tried; a higher one may be better: add --lrs recap:0.0027",
        ),
        (
            [(1e-4, 0.3), (2e-4, 0.2), (9e-4, 0.1)],
            "its best rate 0.0001 is the lowest of 3 that were tried; a lower one may be better: add --lrs recap:5e-05",
        ),
        ([(1e-4, 0.1), (3e-4, 0.2), (9e-4, 0.1)], None),
        ([(1e-4, 0.1), (3e-4, 0.2), (9e-4, None)], "its best rate 0.0003 is the highest of 2 that were tried"),  # one waits
        ([(3e-4, 0.2)], "one rate was tried, 0.0003; another may be better: add --lrs recap:0.0001,0.0009"),
        ([(1.0, 0.1), (1.001, 0.2)], "its best rate 1.001 is the highest of 2 that were tried; a higher one may be better"),
    ],
)
def test_a_best_rate_at_an_edge_is_said_with_the_next_one_to_try(values: list[tuple[float, float]], note: str | None) -> None:
    found = note_of(at(*values))
    assert found is None if note is None else str(found).startswith(f"recap, r_p 0.333: {note}")


def test_the_next_rate_lies_beyond_those_that_were_tried_however_close_they_are() -> None:
    for lrs in ((1.0, 1.001), (1e-4, 3e-4), (1e-4, 1e-3), (0.001, 0.00101)):
        said = str(note_of(at((lrs[0], 0.1), (lrs[1], 0.2))))
        assert float(said.rpartition("--lrs recap:")[2]) > lrs[1]
        said = str(note_of(at((lrs[0], 0.2), (lrs[1], 0.1))))
        assert 0 < float(said.rpartition("--lrs recap:")[2]) < lrs[0]
    assert "--lrs" not in str(note_of(at((1e-320, 0.2), (1.0, 0.1))))  # the next is no number above 0


def test_a_rate_that_failed_was_tried() -> None:
    cells = [*at((1e-4, 0.1), (3e-4, 0.2)), cell(1e-3, 0, None, status="failed", error="the loss is not finite")]
    assert row_of(cells)["edge"] is None
    assert row_of(cells)["rates"][-1] == {"lr": 1e-3, "value": None, "n": 0}


def test_cells_of_older_versions_are_one_row_whatever_of_their_rate_is_known() -> None:
    old = [{key: value for key, value in cell(None, seed, 0.5).items() if key not in ("lr", "rate", "test")} for seed in (0, 1)]
    row = row_of([*old, cell(None, 2, 0.8, rate=3e-4)])
    assert (row["n"], row["lr"], row["value"]) == (3, 3e-4, pytest.approx(0.6))
    assert (row_of(old)["lr"], row_of(old)["edge"]) == (None, None)
    assert row_of([*old, cell(1e-4, 0, 0.4), cell(1e-4, 1, 0.4)])["lr"] is None  # the recipe's, whatever it is
    assert not rates.are_varied(old)


def test_the_recipes_own_rate_competes_and_a_cell_that_ran_twice_counts_once() -> None:
    own = [cell(None, seed, 0.8, rate=3e-4) for seed in (0, 1)]
    tried = [cell(lr, seed, 0.5) for lr in (1e-4, 1e-3) for seed in (0, 1)]
    row = row_of([*own, *tried])
    assert (row["lr"], row["n"], row["edge"], len(row["rates"])) == (3e-4, 2, None, 3)
    again = [cell(3e-4, 0, 0.6), cell(3e-4, 1, None)]  # one is done, the other waits
    row = row_of([*own, *again])
    assert (row["n"], row["of"], row["value"]) == (2, 2, pytest.approx(0.7))
