"""Axes, cuts and choices: sizes, fine groups, what shrinks, what composes, what does not fit."""

import pytest
import torch

from recap_cli.core.axes import (
    Axis,
    Cut,
    all_units,
    check_axes,
    chosen_params,
    compose,
    counts,
    prunable_params,
    refine,
    shrink,
    unit_params,
)

HEADS = Axis(
    "block.heads",
    "heads",
    0,
    3,
    (Cut("qkv.weight", 0, 4, 0), Cut("qkv.weight", 0, 4, 12), Cut("qkv.weight", 0, 4, 24), Cut("out.weight", 1, 4)),
)
SHAPES = {"qkv.weight": (36, 10), "out.weight": (10, 12)}


def test_a_unit_owns_its_slice_of_every_cut() -> None:
    assert unit_params(HEADS, SHAPES) == 3 * 4 * 10 + 4 * 10
    assert prunable_params([HEADS], SHAPES) == 3 * 160


def test_fine_groups_have_one_row_of_each_tensor() -> None:
    fine = refine(HEADS)
    assert fine.size == 12
    assert [(c.width, c.offset) for c in fine.cuts] == [(1, 0), (1, 12), (1, 24), (1, 0)]
    assert prunable_params([fine], SHAPES) == prunable_params([HEADS], SHAPES)


def test_cuts_of_different_widths_have_no_fine_groups() -> None:
    axis = Axis("a", "heads", 0, 2, (Cut("x", 0, 4), Cut("y", 0, 1)))
    with pytest.raises(ValueError, match=r"widths \[1, 4\]"):
        refine(axis)


def test_shrinking_a_fused_matrix_trains_the_sections_up() -> None:
    (small,) = shrink([HEADS], {"block.heads": torch.tensor([True, False, True])})
    assert small.size == 2
    assert [c.offset for c in small.cuts] == [0, 8, 16, 0]


def test_two_plans_compose_to_one_over_the_full_model() -> None:
    outer = {"a": torch.tensor([True, False, True, True])}
    inner = {"a": torch.tensor([False, True, True])}
    assert compose(outer, inner)["a"].tolist() == [False, False, True, True]


def test_everything_chooses_every_parameter() -> None:
    unit_mask = all_units([HEADS])
    assert counts(unit_mask) == {"block.heads": 3}
    assert chosen_params([HEADS], SHAPES, unit_mask) == prunable_params([HEADS], SHAPES)


@pytest.mark.parametrize(
    ("axis", "problem"),
    [
        (Axis("a", "heads", 0, 2, (Cut("gone", 0, 4),)), "no parameter gone"),
        (Axis("a", "heads", 0, 4, (Cut("out.weight", 1, 4),)), "has 12 entries along dimension 1, the axis wants 0…16"),
        (Axis("a", "heads", 0, 2, (Cut("out.weight", 2, 4),)), "has no dimension 2"),
        (Axis("a", "heads", 0, 2, (Cut("qkv.weight", 0, 4), Cut("qkv.weight", 0, 4, 4))), "both own entries of qkv.weight"),
        (Axis("a", "heads", 0, 2, (Cut("out.weight", 0), Cut("out.weight", 1))), "cut along two dimensions"),
    ],
)
def test_what_does_not_fit_is_named(axis: Axis, problem: str) -> None:
    assert any(problem in found for found in check_axes([axis], SHAPES))


def test_what_fits_has_no_problems() -> None:
    assert check_axes([HEADS], SHAPES) == []
