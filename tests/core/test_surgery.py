"""Gather and scatter on one tensor, and what a cut layer says of itself."""

import itertools

import pytest
import torch
from torch import nn

from recap_cli.core.surgery import cut_model, gather, put, scatter, take
from tests.trainable.test_build import Conv1D

DIMS = {0: torch.tensor([0, 2, 3]), 1: torch.tensor([1, 4]), 2: torch.tensor([0])}


@pytest.mark.parametrize("chosen", [c for n in range(4) for c in itertools.combinations(range(3), n)], ids=str)
def test_put_is_the_inverse_of_take_and_leaves_every_other_entry(chosen: tuple[int, ...]) -> None:
    full = torch.arange(60.0).reshape(4, 5, 3)
    dims = {dim: DIMS[dim] for dim in chosen}
    small = take(full, dims)
    assert list(small.shape) == [len(dims[d]) if d in dims else size for d, size in enumerate(full.shape)]
    written = full.clone()
    put(written, small + 100, dims)
    inside = torch.zeros(full.shape, dtype=torch.bool)
    for place in itertools.product(*(dims.get(d, torch.arange(size)).tolist() for d, size in enumerate(full.shape))):
        inside[place] = True
    assert torch.equal(written[inside], full[inside] + 100)
    assert torch.equal(written[~inside], full[~inside])
    assert torch.equal(take(written, dims), small + 100)


def test_tensors_that_are_not_named_are_whole_and_values_take_the_type_of_the_full_ones() -> None:
    full = {"a": torch.zeros(4), "b": torch.zeros(2, 3)}
    index_map = {"b": {1: torch.tensor([2])}}
    small = gather(full, index_map)
    assert {name: tuple(tensor.shape) for name, tensor in small.items()} == {"a": (4,), "b": (2, 1)}
    scatter(full, {"a": torch.ones(4), "b": torch.ones(2, 1, dtype=torch.bfloat16)}, index_map)
    assert full["a"].tolist() == [1, 1, 1, 1]
    assert full["b"].tolist() == [[0, 0, 1], [0, 0, 1]]
    assert full["b"].dtype == torch.float32


def test_a_cut_layer_states_its_sizes_and_keeps_what_asks_for_a_gradient() -> None:
    model = nn.ModuleDict({"linear": nn.Linear(6, 4), "conv": Conv1D(4, 6)})
    model["linear"].weight.requires_grad_(False)
    rows, columns = torch.tensor([0, 2]), torch.tensor([1, 3, 5])
    cut_model(model, {"linear.weight": {1: columns}, "conv.weight": {1: rows}, "conv.bias": {0: rows}})
    assert (model["linear"].in_features, model["linear"].out_features) == (3, 4)
    assert (model["conv"].nx, model["conv"].nf) == (6, 2)
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
