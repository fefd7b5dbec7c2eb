"""The change that a compensated cut makes, against least squares of numpy on rows; and which layers read what is cut."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from recap_cli.core.compensation import RIDGES, Moments, best_change, changes, left_over, with_change
from recap_cli.core.cut_inputs import CutInputs, cut_inputs


def rows(count: int, kept: int = 6, out: int = 4, *, noise: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs that are left, not centred and of different size, and what is lost: linear in them, shifted, with noise."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(count, kept + out, generator=generator, dtype=torch.float64)
    left = draw[:, :kept] * torch.linspace(0.5, 2.0, kept, dtype=torch.float64) + 1.5
    mixing = torch.linspace(-1.0, 1.0, kept * out, dtype=torch.float64).reshape(kept, out)
    return left, left @ mixing - 0.7 + noise * draw[:, kept:]


def by_least_squares(left: Tensor, lost: Tensor, ridge: float, *, has_bias: bool) -> Tensor:
    """D by `numpy.linalg.lstsq` on the rows, with one more row for each input that is penalised; (out, kept + 1)."""
    count, kept = left.shape
    penalty = ridge * float(left.square().mean())
    k = np.concatenate([left.numpy(), np.ones((count, 1))], axis=1) / np.sqrt(count)
    more = np.concatenate([np.sqrt(penalty) * np.eye(kept), np.zeros((kept, 1))], axis=1)
    system, wanted = np.concatenate([k, more]), np.concatenate([lost.numpy() / np.sqrt(count), np.zeros((kept, lost.shape[1]))])
    if has_bias:
        return torch.from_numpy(np.linalg.lstsq(system, wanted, rcond=None)[0].T)
    found = np.linalg.lstsq(system[:, :-1], wanted, rcond=None)[0].T
    return torch.from_numpy(np.concatenate([found, np.zeros((lost.shape[1], 1))], axis=1))


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("ridge", [1e-6, 0.1, 10.0])
def test_the_change_is_that_of_least_squares_with_a_row_for_each_penalised_input(ridge: float, has_bias: bool) -> None:
    left, lost = rows(50)
    halves = Moments.of_rows(left[:20], lost[:20]), Moments.of_rows(left[20:], lost[20:])
    (found,) = changes(halves[0] + halves[1], [ridge], has_bias=has_bias)
    expected = by_least_squares(left, lost, ridge, has_bias=has_bias)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)
    k = torch.cat([left, torch.ones(50, 1)], dim=1)
    assert left_over(halves[0] + halves[1], found) == pytest.approx(float((lost - k @ expected.T).square().sum()))


def test_inputs_that_are_linear_in_those_left_are_given_back_exactly() -> None:
    left, lost = rows(40, noise=0.0)
    found = best_change(
        (Moments.of_rows(left[:20], lost[:20]), Moments.of_rows(left[20:], lost[20:])), [1e-9], has_bias=True, may_be_none=True
    )
    torch.testing.assert_close(left @ found.entries[:, :-1].T + found.entries[:, -1], lost, rtol=1e-6, atol=1e-6)
    assert found.balance.left_share < 1e-9


def test_a_ridge_without_end_leaves_the_mean_of_what_is_lost_in_the_bias() -> None:
    left, lost = rows(40)
    (found,) = changes(Moments.of_rows(left, lost), [1e300], has_bias=True)
    assert float(found[:, :-1].abs().max()) < 1e-200
    torch.testing.assert_close(found[:, -1], lost.mean(0))


def halves_of(left: Tensor, lost: Tensor) -> tuple[Moments, Moments]:
    middle = len(left) // 2
    return Moments.of_rows(left[:middle], lost[:middle]), Moments.of_rows(left[middle:], lost[middle:])


def test_the_ridge_is_the_one_that_leaves_least_where_it_was_not_fitted() -> None:
    left, lost = rows(24, kept=10, noise=3.0)
    middle, left_of = 12, dict.fromkeys(RIDGES, 0.0)
    for ridge in RIDGES:
        for fitted, judged in ((slice(middle), slice(middle, None)), (slice(middle, None), slice(middle))):
            change = by_least_squares(left[fitted], lost[fitted], ridge, has_bias=True)
            left_of[ridge] += float((lost[judged] - left[judged] @ change[:, :-1].T - change[:, -1]).square().sum())
    best = min(RIDGES, key=left_of.__getitem__)
    found = best_change(halves_of(left, lost), RIDGES, has_bias=True, may_be_none=True)
    assert RIDGES[0] < best < RIDGES[-1]
    assert found.ridge == best
    assert found.balance.left_share == pytest.approx(left_of[best] / float(lost.square().sum()))
    torch.testing.assert_close(found.entries, by_least_squares(left, lost, best, has_bias=True))
    clean = best_change(halves_of(*rows(24, kept=10, noise=0.0)), RIDGES, has_bias=True, may_be_none=True)
    assert clean.ridge == RIDGES[0]


def test_where_every_ridge_does_harm_there_is_no_change_unless_the_recipe_names_the_ridge() -> None:
    generator = torch.Generator().manual_seed(3)
    left, lost = (torch.randn(16, width, generator=generator, dtype=torch.float64) for width in (12, 3))
    halves = halves_of(left, lost)
    found = best_change(halves, [0.001, 0.01], has_bias=False, may_be_none=True)
    assert (found.ridge, found.balance.left_share, float(found.entries.abs().max())) == (None, 1.0, 0.0)
    named = best_change(halves, [0.001], has_bias=False, may_be_none=False)
    assert named.ridge == 0.001
    assert named.balance.left_share > 1.0
    torch.testing.assert_close(named.entries, by_least_squares(left, lost, 0.001, has_bias=False))


def test_dead_inputs_and_no_rows_give_no_change_and_no_nan() -> None:
    left, lost = rows(20)
    dead = best_change(halves_of(left * 0, lost), [0.1], has_bias=True, may_be_none=False)
    assert torch.equal(dead.entries[:, :-1], torch.zeros(4, 6, dtype=torch.float64))
    torch.testing.assert_close(dead.entries[:, -1], lost.mean(0))
    nothing = best_change(halves_of(left, lost * 0), [0.1], has_bias=True, may_be_none=False)
    assert (nothing.ridge, nothing.balance.lost, nothing.balance.left_share, float(nothing.entries.abs().max())) == (
        None,
        0.0,
        0.0,
        0.0,
    )
    never = best_change((Moments.none(6, 4), Moments.none(6, 4)), RIDGES, has_bias=True, may_be_none=True)
    assert (never.ridge, never.balance.left_share, float(never.entries.abs().max())) == (
        None,
        1.0,
        0.0,
    )  # a layer that is not called
    alone = Moments.of_rows(left, lost), Moments.none(6, 4)
    assert best_change(alone, RIDGES, has_bias=True, may_be_none=True).ridge is None


def test_a_direction_in_which_the_inputs_do_not_vary_gets_the_least_norm() -> None:
    left, lost = rows(40, noise=0.0)
    twice = torch.cat([left, left], dim=1)
    (found,) = changes(Moments.of_rows(twice, lost), [1e-12], has_bias=True)
    torch.testing.assert_close(found[:, :6], found[:, 6:12], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(twice @ found[:, :-1].T + found[:, -1], lost, rtol=1e-5, atol=1e-5)


class Several(nn.Module):
    """Layers that hold one weight, or share it with an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.transposed, self.bare = nn.Linear(6, 4), Conv1D(4, 6), nn.Linear(6, 4, bias=False)
        self.first, self.second = nn.Linear(6, 4), nn.Linear(6, 4)
        self.second.weight = self.first.weight
        self.third, self.fourth = nn.Linear(6, 4), nn.Linear(6, 4)
        self.fourth.weight, self.fourth.bias = self.third.weight, self.third.bias
        self.table, self.out = nn.Embedding(4, 6), nn.Linear(6, 4)
        self.out.weight = self.table.weight
        self.normal = nn.LayerNorm(6)


def test_only_weights_that_linear_layers_alone_hold_are_compensated() -> None:
    model, kept = Several(), torch.tensor([0, 2, 5])
    weights = ("plain", "bare", "first", "third", "table")
    index_map = {f"{name}.weight": {1: kept} for name in weights} | {"transposed.weight": {0: kept}, "normal.weight": {0: kept}}
    found = {cut.weight: cut for cut in cut_inputs(model, index_map)}
    assert {name: (cut.bias, cut.layers, cut.dim) for name, cut in found.items()} == {
        "plain.weight": ("plain.bias", ("plain",), 1),
        "transposed.weight": ("transposed.bias", ("transposed",), 0),
        "bare.weight": (None, ("bare",), 1),
        "first.weight": (None, ("first", "second"), 1),  # two biases, and one shift could not be right for both
        "third.weight": ("third.bias", ("third", "fourth"), 1),
    }
    rows_only = {"plain.weight": {0: kept}, "transposed.weight": {1: kept}}
    assert cut_inputs(model, rows_only) == []
    (cut_bias,) = cut_inputs(model, {"plain.weight": {1: kept}, "plain.bias": {0: kept}})
    assert cut_bias.bias is None


@pytest.mark.parametrize("layer", [nn.Linear(6, 4), Conv1D(4, 6)], ids=["linear", "conv1d"])
def test_what_is_left_and_what_is_lost_add_up_to_the_output(layer: nn.Module) -> None:
    kept, inputs = torch.tensor([0, 2, 5]), torch.randn(7, 6)
    (cut,) = cut_inputs(layer_in(layer), {"layer.weight": {1 if isinstance(layer, nn.Linear) else 0: kept}})
    weight = layer.get_parameter("weight").detach()
    left, lost = cut.split(inputs, weight)
    matrix = weight if isinstance(layer, nn.Linear) else weight.T
    torch.testing.assert_close(left @ matrix[:, kept].T + lost, inputs @ matrix.T)
    change = cut.named(torch.arange(16.0, dtype=torch.float64).reshape(4, 4))
    small = with_change({"layer.weight": weight.index_select(cut.dim, kept), "layer.bias": torch.zeros(4)}, change)
    assert {tensor.dtype for tensor in small.values()} == {torch.float32}
    assert torch.equal(small["layer.bias"], torch.tensor([3.0, 7.0, 11.0, 15.0]))
    first = small["layer.weight"] - weight.index_select(cut.dim, kept)
    torch.testing.assert_close(first if cut.dim == 1 else first.T, torch.arange(16.0).reshape(4, 4)[:, :3])


def layer_in(layer: nn.Module) -> nn.Module:
    return nn.ModuleDict({"layer": layer})


def test_without_a_bias_the_weight_alone_changes() -> None:
    cut = CutInputs("w", None, ("",), 1, torch.tensor([0]))
    assert cut.named(torch.ones(3, 2)).keys() == {"w"}
