"""The stages against the equations: every pico model, three rounds, by a reference that shares no code with them."""

import pytest

from tests.pico import PICO
from tests.segmentation import SEGMENTERS
from tests.stages.expected import check_training, naive_mask, naive_plan
from tests.stages.witness import indices_of, record_of
from tests.strange import STRANGE, register
from tests.tiny import TRAIN

ADAPTERS = [*sorted(PICO), *STRANGE, *SEGMENTERS]
STEPS = 7  # a round: 1.2 epochs of 40 examples in batches of 7


@pytest.fixture(autouse=True)
def _strangers(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_plan_keeps_the_groups_of_the_highest_eq_1_through_all_gradual_steps(name: str) -> None:
    record = record_of(name)
    for round in (1, 2, 3):
        assert record.plan(round) == naive_plan(record, round)
    assert len({tuple(record.plan(round)) for round in (1, 2)}) == 2  # less is pruned in the first


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_mask_lets_move_the_hidden_dimensions_of_the_highest_eq_4(name: str) -> None:
    record = record_of(name)
    for round in (1, 2, 3):
        assert record.mask(round) == naive_mask(record, round)


@pytest.mark.parametrize("name", ADAPTERS)
def test_what_trains_is_trained_as_by_torch_on_dense_gradients_and_merged_and_all_else_ages(name: str) -> None:
    check_training(record_of(name), 3, STEPS)


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_order_of_examples_runs_through_all_rounds_epoch_after_epoch(name: str) -> None:
    record = record_of(name)
    looks = [look for round in (1, 2, 3) for of in record.seen(round, "finetune").values() for look in of]
    assert len(looks) == 3 * STEPS
    seen = indices_of(looks)
    epochs = [seen[start : start + TRAIN] for start in range(0, len(seen), TRAIN)]
    assert [len(epoch) for epoch in epochs] == [TRAIN, TRAIN, TRAIN, 3 * 7]  # 21 steps: 3 epochs of 6 batches, and 3 batches
    assert all(sorted(epoch) == list(range(TRAIN)) for epoch in epochs[:3])
    assert len({tuple(epoch[:20]) for epoch in epochs}) == 4
    assert epochs[0] != sorted(epochs[0])
    assert not any(look.validation for look in looks)
