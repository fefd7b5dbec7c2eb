"""The batches of a round, without a model."""

from collections.abc import Iterator
from math import ceil
from typing import Any

import pytest
import torch

from recap_cli.rounds import training_round
from tests.tiny import tiny


def test_what_is_flipped_is_drawn_by_the_seed_and_anew_in_each_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    def seeds_of(seed: int) -> list[int]:
        found = list[int]()

        def batches(split: Any, chosen: torch.Tensor, size: int, *, augment_seed: int, device: Any) -> Iterator[dict[str, Any]]:
            found.append(augment_seed)
            yield from [{}] * ceil(len(chosen) / size)

        monkeypatch.setattr(training_round, "batches", batches)
        steps = training_round._epochs(tiny("vit", seed=seed), range(40), 0, 10, torch.device("cpu"))  # type: ignore[arg-type]
        assert len(list(steps)) == 10  # two epochs of five
        return found

    assert len({*seeds_of(0), *seeds_of(1)}) == 4
    assert seeds_of(0) == seeds_of(0)
