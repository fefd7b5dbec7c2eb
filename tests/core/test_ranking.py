"""Selection: budgets in parameters, scopes, floors, sizes of the gradual schedule."""

import pytest
import torch

from recap_cli.core.axes import Axis, Cut
from recap_cli.core.ranking import Limits, RankBy, Scope, ranked_together, select
from recap_cli.errors import SelectionError


def axis(name: str, size: int, kind: str = "neurons", width: int = 1) -> Axis:
    return Axis(name, kind, 0, size, (Cut(f"{name}.weight", 0, width),))


def rising(*axes: Axis) -> dict[str, torch.Tensor]:
    start, scores = 0, {}
    for a in axes:
        scores[a.name] = torch.arange(start, start + a.size, dtype=torch.float32)
        start += a.size
    return scores


def sizes(axes: list[Axis]) -> dict[str, int]:
    return {a.name: a.size for a in axes}


def test_the_least_important_go_first() -> None:
    a = axis("a", 4)
    kept = select([a], {"a": torch.tensor([3.0, 1.0, 2.0, 0.0])}, {"a": 7}, original={"a": 4}, keep_share=0.5)
    assert kept["a"].tolist() == [True, False, True, False]


@pytest.mark.parametrize(("heads", "ratio", "left"), [(12, 0.33, 8), (12, 0.333, 8), (16, 0.333, 11), (3, 0.333, 2)])
def test_the_gradual_schedule_counts_from_the_original_sizes(heads: int, ratio: float, left: int) -> None:
    # Torch-Pruning, counting from what is left, leaves 4 of 12 heads at 33 % in 4 steps.
    size = heads
    for step in range(1, 5):
        a = axis("a", size, "heads", 64)
        kept = select(
            [a], rising(a), {"a": 100}, limits=Limits(floor=0.15), original={"a": heads}, keep_share=(1 - ratio) ** (step / 4)
        )
        size = int(kept["a"].sum())
    assert size == left


@pytest.mark.parametrize("scope", ["per-kind", "global", "per-layer"])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.333, 0.5, 0.77])
def test_the_budget_is_met_within_one_group(scope: Scope, ratio: float) -> None:
    axes = [axis("h0", 12, "heads", 64), axis("n0", 96), axis("h1", 12, "heads", 64), axis("n1", 96)]
    params = {"h0": 196, "n0": 15, "h1": 196, "n1": 15}
    generator = torch.Generator().manual_seed(1)
    scores = {a.name: torch.rand(a.size, generator=generator) for a in axes}
    kept = select(axes, scores, params, limits=Limits(scope=scope, floor=0.15), original=sizes(axes), keep_share=1 - ratio)
    total = sum(a.size * params[a.name] for a in axes)
    left = sum(int(kept[a.name].sum()) * params[a.name] for a in axes)
    pools = {"per-kind": 2, "global": 1, "per-layer": 4}[scope]
    assert abs(left - (1 - ratio) * total) <= pools * 196 / 2 + 1


def test_per_kind_ranks_heads_against_heads_only() -> None:
    axes = [axis("h", 4, "heads"), axis("n", 4)]
    scores = {"h": torch.tensor([9.0, 8.0, 7.0, 6.0]), "n": torch.tensor([0.1, 0.2, 0.3, 0.4])}
    kept = select(axes, scores, {"h": 10, "n": 10}, original=sizes(axes), keep_share=0.5)
    assert int(kept["h"].sum()) == int(kept["n"].sum()) == 2


def test_groups_of_a_third_kind_are_ranked_with_their_own() -> None:
    axes = [axis("e", 4, "experts"), axis("n", 4), axis("h", 4, "heads"), axis("f", 4, "experts")]
    assert [[a.name for a in pool] for pool in ranked_together(axes, "per-kind")] == [["h"], ["n"], ["e", "f"]]
    kept = select(
        axes, rising(*axes), {a.name: 10 for a in axes}, limits=Limits(floor=0.25), original=sizes(axes), keep_share=0.5
    )
    assert {name: int(chosen.sum()) for name, chosen in kept.items()} == {"h": 2, "n": 2, "e": 1, "f": 3}


def test_global_ranks_by_importance_per_parameter() -> None:
    axes = [axis("h", 2, "heads"), axis("n", 20)]
    scores = {"h": torch.tensor([50.0, 4.0]), "n": torch.full((20,), 1.0)}  # 0.5 and 0.04 a parameter against 0.1
    kept = select(axes, scores, {"h": 100, "n": 10}, limits=Limits(scope="global"), original=sizes(axes), keep_share=0.75)
    assert kept["h"].tolist() == [True, False]
    assert kept["n"].all()


def test_the_floor_holds_in_every_axis() -> None:
    axes = [axis("a", 20), axis("b", 20)]
    kept = select(axes, rising(*axes), {"a": 1, "b": 1}, limits=Limits(floor=0.15), original=sizes(axes), keep_share=0.5)
    assert int(kept["a"].sum()) == 3  # without a floor all of a would go
    assert int(kept["a"].sum() + kept["b"].sum()) == 20


def test_a_mask_may_leave_a_layer_without_any_group() -> None:
    axes = [axis("a", 10), axis("b", 10)]
    kept = select(axes, rising(*axes), {"a": 1, "b": 1}, limits=Limits(least=0), original=sizes(axes), keep_share=0.5)
    assert not kept["a"].any()
    assert kept["b"].all()


def test_a_ratio_that_the_floor_forbids_is_refused() -> None:
    a = axis("a", 10)
    with pytest.raises(SelectionError, match="parameters from a: the floor of 50%"):
        select([a], rising(a), {"a": 1}, limits=Limits(floor=0.5), original={"a": 10}, keep_share=0.2)
    b = axis("b", 10)
    with pytest.raises(SelectionError, match=r"parameters from 2 axes \(a …\): the floor"):
        select([a, b], rising(a, b), {"a": 1, "b": 1}, limits=Limits(floor=0.5), original=sizes([a, b]), keep_share=0.2)


def test_uniform_leaves_every_layer_alike() -> None:
    axes = [axis(f"h{i}", 12, "heads", 64) for i in range(4)]
    kept = select(
        axes, rising(*axes), dict.fromkeys(sizes(axes), 5), limits=Limits(uniform=True), original=sizes(axes), keep_share=0.667
    )
    assert {int(k.sum()) for k in kept.values()} == {8}


def test_uniform_wants_layers_that_were_alike() -> None:
    axes = [axis("a", 12, "heads", 64), axis("b", 8, "heads", 64)]
    with pytest.raises(SelectionError, match=r"the layers have different numbers of heads: \[8, 12\]"):
        select(
            axes,
            rising(*axes),
            dict.fromkeys(sizes(axes), 5),
            limits=Limits(uniform=True),
            original=sizes(axes),
            keep_share=0.5,
        )


def test_in_one_ranking_groups_compete_per_parameter_whatever_the_rule_says() -> None:
    axes, scores = [axis("small", 4), axis("large", 4)], {"small": torch.full((4,), 2.0), "large": torch.full((4,), 4.0)}
    limits = Limits(scope="global", rank_by="sum", least=0)
    kept = select(axes, scores, UNEQUAL, limits=limits, original=sizes(axes), keep_share=160 / 200)
    assert {name: int(keep.sum()) for name, keep in kept.items()} == {"small": 4, "large": 3}  # 0.2 and 0.1 a parameter


def test_what_is_left_goes_to_no_layer_that_wanted_a_multiple() -> None:
    axes = [axis("a", 8), axis("b", 11)]
    scores = {"a": torch.tensor([9.0, 9, 9, 9, 0, 0, 0, 0]), "b": torch.full((11,), 9.0)}
    limits = Limits(round_to=4)
    kept = select(axes, scores, dict.fromkeys(scores, 1), limits=limits, original=sizes(axes), keep_share=15 / 19)
    assert {name: int(keep.sum()) for name, keep in kept.items()} == {"a": 4, "b": 8}  # b has no room for 12


def test_round_to_makes_multiples_and_keeps_the_total() -> None:
    axes = [axis(f"n{i}", 96) for i in range(3)]
    generator = torch.Generator().manual_seed(0)
    scores = {a.name: torch.rand(96, generator=generator) for a in axes}
    kept = select(axes, scores, dict.fromkeys(scores, 3), limits=Limits(round_to=8), original=sizes(axes), keep_share=0.6)
    numbers = [int(k.sum()) for k in kept.values()]
    assert all(n % 8 == 0 for n in numbers)
    assert abs(sum(numbers) - 0.6 * 288) <= 8


def test_rounding_does_not_go_below_the_floor() -> None:
    a = axis("a", 20)
    kept = select([a], rising(a), {"a": 1}, limits=Limits(floor=0.5, round_to=8), original={"a": 20}, keep_share=0.5)
    assert int(kept["a"].sum()) == 16  # the floor is 10, and 8 would be below it


def test_a_multiple_larger_than_a_layer_is_refused() -> None:
    a = axis("a", 20)
    with pytest.raises(SelectionError, match="round_to is 32, but a has only 20 rows"):
        select([a], rising(a), {"a": 1}, limits=Limits(round_to=32), original={"a": 20}, keep_share=0.5)


def test_heads_of_64_rows_are_multiples_of_8_already() -> None:
    a = axis("h", 12, "heads", 64)
    kept = select([a], rising(a), {"h": 1}, limits=Limits(round_to=8), original={"h": 12}, keep_share=5 / 12)
    assert int(kept["h"].sum()) == 5


def test_every_matrix_of_a_unit_has_a_multiple_and_a_table_of_one_column_need_not() -> None:
    cuts = (Cut("q.weight", 0, 8), Cut("k.weight", 0, 4), Cut("table", 1, 1))
    a = Axis("a", "heads", 0, 6, cuts)
    kept = select([a], rising(a), {"a": 1}, limits=Limits(round_to=8), original={"a": 6}, keep_share=0.5)
    assert int(kept["a"].sum()) == 4  # 3 are wanted, and 2 of 4 rows each are a multiple of the keys
    with pytest.raises(SelectionError, match="round_to is 32, but a has only 24 rows"):
        select([a], rising(a), {"a": 1}, limits=Limits(round_to=32), original={"a": 6}, keep_share=0.5)


UNEQUAL = {"small": 10, "large": 40}  # parameters of a unit in a narrow and in a wide stage


@pytest.mark.parametrize(
    ("rank_by", "kept"),
    [("sum", {"small": 1, "large": 4}), ("parameter", {"small": 4, "large": 3}), ("layer", {"small": 2, "large": 3}),
     ("size", {"small": 3, "large": 3})],
)  # fmt: skip
def test_groups_of_different_size_compete_as_the_rule_says(rank_by: RankBy, kept: dict[str, int]) -> None:
    axes = [axis("small", 4), axis("large", 5)]
    scores = {"small": torch.tensor([12.0, 13, 19, 53]), "large": torch.tensor([9.0, 28, 38, 83, 89])}
    found = select(axes, scores, UNEQUAL, limits=Limits(rank_by=rank_by, least=0), original=sizes(axes), keep_share=160 / 240)
    assert {name: int(chosen.sum()) for name, chosen in found.items()} == kept


@pytest.mark.parametrize("rank_by", ["parameter", "sum"])
def test_groups_of_one_size_are_ranked_by_their_sums_to_the_last_bit(rank_by: RankBy) -> None:
    close = 1.75 + torch.arange(4) * 2**-23  # which a division by three would make equal
    assert len((close / 3).unique()) < 4
    axes = [axis("a", 4), axis("b", 4)]
    scores = {"a": close.flip(0), "b": close - 0.5}
    found = select(axes, scores, {"a": 3, "b": 3}, limits=Limits(rank_by=rank_by), original=sizes(axes), keep_share=0.25)
    assert found["a"].tolist() == [True, False, False, False]


def test_an_importance_that_is_not_a_number_is_refused() -> None:
    a = axis("a", 2)
    with pytest.raises(SelectionError, match="importance of a is not finite"):
        select([a], {"a": torch.tensor([1.0, float("nan")])}, {"a": 1}, original={"a": 2}, keep_share=0.5)


def test_where_one_unit_is_a_multiple_one_may_be_left() -> None:
    a = Axis("a", "heads", 0, 4, (Cut("a.weight", 0, 8),))
    kept = select([a], rising(a), {"a": 1}, limits=Limits(round_to=8), original={"a": 4}, keep_share=0.25)
    assert kept["a"].tolist() == [False, False, False, True]


def test_what_rounding_leaves_goes_to_the_largest_remainder() -> None:
    axes = [axis("a", 8), axis("b", 8)]
    scores = {"a": torch.tensor([9.0, 8, 7, 6, 5, 0, 0, 0]), "b": torch.tensor([9.0, 8, 7, 6, 5, 4, 3, 0])}
    kept = select(axes, scores, dict.fromkeys(scores, 1), limits=Limits(round_to=4), original=sizes(axes), keep_share=12 / 16)
    assert {name: int(keep.sum()) for name, keep in kept.items()} == {"a": 4, "b": 8}


def test_less_than_half_a_multiple_is_not_handed_out() -> None:
    axes = [axis("a", 16), axis("b", 16)]
    scores = {name: torch.arange(16.0).flip(0) + (name == "b") / 2 for name in "ab"}
    kept = select(axes, scores, dict.fromkeys(scores, 1), limits=Limits(round_to=8), original=sizes(axes), keep_share=19 / 32)
    assert {name: int(keep.sum()) for name, keep in kept.items()} == {"a": 8, "b": 8}
