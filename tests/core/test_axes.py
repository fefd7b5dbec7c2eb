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
    dimensions_per_layer,
    in_mask_units,
    mask_axes,
    prunable_params,
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


def test_a_unit_of_the_mask_has_one_row_of_each_tensor() -> None:
    (fine,) = mask_axes([HEADS])
    assert (fine.name, fine.size) == ("block.heads", 12)
    assert [(c.width, c.offset) for c in fine.cuts] == [(1, 0), (1, 12), (1, 24), (1, 0)]
    assert prunable_params([fine], SHAPES) == prunable_params([HEADS], SHAPES)


GROUPED = Axis(  # two groups: of two query heads of width 4, a key and a value
    "block.heads",
    "heads",
    0,
    2,
    (Cut("q.weight", 0, 8), Cut("k.weight", 0, 4, 0, "kv"), Cut("v.weight", 0, 4, 0, "kv"), Cut("o.weight", 1, 8)),
)


def test_cuts_of_another_width_or_word_have_units_of_their_own() -> None:
    own, kv = mask_axes([GROUPED])
    assert [(a.name, a.size, [c.param[0] for c in a.cuts]) for a in (own, kv)] == [
        ("block.heads", 16, ["q", "o"]),
        ("block.heads/kv", 8, ["k", "v"]),
    ]
    unnamed = Axis("a", "heads", 0, 2, (Cut("x", 0, 4), Cut("y", 0, 1), Cut("z", 1, 4)))
    assert [(a.name, a.size) for a in mask_axes([unnamed])] == [("a", 8), ("a/1-wide", 2)]
    apart = Axis("a", "heads", 0, 2, (Cut("x", 0, 4, couple="x"), Cut("z", 1, 4, couple="z")))
    assert [(a.name, a.size) for a in mask_axes([apart])] == [("a/x", 8), ("a/z", 8)]


def test_what_is_whole_has_no_units() -> None:
    axis = Axis("a", "heads", 0, 2, (Cut("table", 1, 1), Cut("x", 0, 4), Cut("z", 1, 4)))
    found = [(fine.name, fine.size, [cut.param for cut in fine.cuts]) for fine in mask_axes([axis], {"table"})]
    assert found == [("a", 8, ["x", "z"])]
    assert mask_axes([axis], {"table", "x", "z"}) == []


def test_a_plan_in_units_of_the_mask_has_the_dimensions_of_the_groups_that_stay() -> None:
    found = in_mask_units([GROUPED], {"block.heads": torch.tensor([False, True])})
    assert {name: chosen.tolist() for name, chosen in found.items()} == {
        "block.heads": [False] * 8 + [True] * 8,
        "block.heads/kv": [False] * 4 + [True] * 4,
    }
    assert found.keys() == {axis.name for axis in mask_axes([GROUPED])}
    assert in_mask_units([GROUPED], {"block.heads": torch.tensor([True, True])}, {"k.weight", "v.weight"}).keys() == {
        "block.heads"
    }


def test_dimensions_are_told_by_kind_and_word() -> None:
    axes = mask_axes([GROUPED, Axis("block.neurons", "neurons", 0, 3, (Cut("up", 0),))])
    sizes = {axis.name: axis.size for axis in axes}
    assert dimensions_per_layer(axes, sizes) == {"heads": [16], "heads/kv": [8], "neurons": [3]}


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
        (Axis("a", "heads", 0, 0, (Cut("out.weight", 0),)), "a: it has no units, or no cuts"),
        (Axis("a", "heads", 0, 2, ()), "a: it has no units, or no cuts"),
        (Axis("a", "heads", 0, 2.0, (Cut("out.weight", 0),)), "a: it has no units, or no cuts"),  # type: ignore[arg-type]
        (Axis("a", "heads", 0, 2, (Cut("out.weight", 0, 0),)), "out.weight has width 0 and offset 0"),
        (Axis("a", "heads", 0, 2, (Cut("out.weight", 0, 1, -1),)), "out.weight has width 1 and offset -1"),
        (
            Axis("a", "heads", 0, 2, (Cut("out.weight", 0, 4, couple="x"), Cut("qkv.weight", 0, 2, couple="x"))),
            r"a: the cuts of 'x' have widths [2, 4], and share no hidden dimension",
        ),
    ],
)
def test_what_does_not_fit_is_named(axis: Axis, problem: str) -> None:
    assert any(problem in found for found in check_axes([axis], SHAPES))


def test_the_name_of_an_axis_is_no_other_axis_of_the_mask() -> None:
    axes = [GROUPED, Axis("block.heads/kv", "heads", 0, 1, (Cut("z", 0),))]
    shapes = {"q.weight": (16, 4), "k.weight": (8, 4), "v.weight": (8, 4), "o.weight": (4, 16), "z": (2,)}
    assert check_axes(axes[:1], shapes) == []
    assert check_axes(axes, shapes) == ["two axes are named block.heads/kv"]


def test_what_fits_has_no_problems() -> None:
    assert check_axes([HEADS], SHAPES) == []
