"""Moments between rounds, eq. (5): written back where entries moved, aged once everywhere else, counts untouched by age."""

import torch

from recap_cli.trainable.moments import put_moments, take_moments


def test_a_round_writes_back_what_trained_and_ages_the_rest() -> None:
    stored = {"w/m": torch.ones(4, 3), "w/count": torch.tensor([5, 5, 0, 0], dtype=torch.int32)}
    index_map = {"w": {0: torch.tensor([1, 2])}}
    tuned = {"w/m": torch.full((2, 3), 7.0), "w/count": torch.tensor([8, 3], dtype=torch.int32)}
    after = put_moments(stored, tuned, index_map, shapes={"w": (4, 3)}, along={"w": 0}, idle_decay={"m": 0.9})
    assert torch.equal(after["w/m"][:, 0], torch.tensor([0.9, 7.0, 7.0, 0.9]))
    assert after["w/count"].tolist() == [5, 8, 3, 0]


def test_a_first_round_makes_full_tensors_from_zero() -> None:
    index_map = {"w": {1: torch.tensor([0, 2])}}
    after = put_moments(
        {},
        {
            "w/m": torch.ones(2, 2),
            "b/m": torch.ones(2),
            "w/count": torch.tensor([4], dtype=torch.int32),
            "b/count": torch.tensor([4], dtype=torch.int32),
        },
        index_map,
        shapes={"w": (2, 3), "b": (2,)},
        along={"w": 1},
        idle_decay={"m": 0.9},
    )
    assert after["w/m"].tolist() == [[1, 0, 1], [1, 0, 1]]
    assert after["w/count"].tolist() == [4, 0, 4]
    assert after["b/count"].tolist() == [4]


def test_a_round_that_a_parameter_sits_out_ages_it() -> None:
    after = put_moments({"w/m": torch.ones(2)}, {}, {}, shapes={"w": (2,)}, along={}, idle_decay={"m": 0.5})
    assert after["w/m"].tolist() == [0.5, 0.5]


def test_taking_is_the_inverse_of_putting() -> None:
    index_map = {"w": {1: torch.tensor([0, 2])}}
    tuned = {"w/m": torch.randn(2, 2), "w/count": torch.tensor([4, 6], dtype=torch.int32)}
    stored = put_moments({}, tuned, index_map, shapes={"w": (2, 3)}, along={"w": 1}, idle_decay={"m": 1.0})
    moments, back = take_moments(stored, index_map)
    assert torch.equal(moments["w"]["m"], tuned["w/m"])
    assert back["w"].tolist() == [4, 6]
