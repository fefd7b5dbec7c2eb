"""What is kept of a teacher: the rows of each example in each variant, and a fingerprint of the examples."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from recap_cli.core.ragged import Ragged
from recap_cli.core.task import IGNORED, TEACHER
from recap_cli.data.sampling import batches
from recap_cli.data.soft_targets import SoftTargets, fingerprint, stored_as
from recap_cli.data.split import Split

LENGTHS = torch.tensor([2, 0, 3, 1])
ROWS = torch.arange(2 * 6 * 3).view(2, 6, 3).float()  # (variants, rows, outputs), which bfloat16 holds as they are


def made() -> SoftTargets:
    return SoftTargets.of([[rows[:3].bfloat16(), rows[3:].bfloat16()] for rows in ROWS], LENGTHS)


def flippable(targets: Tensor | Ragged | None = None) -> Split:
    def fetch(indices: Tensor, variants: Tensor | None) -> dict[str, Tensor]:
        flipped = torch.zeros_like(indices) if variants is None else variants
        return {"at": indices.clone(), "flipped": flipped}

    return Split(
        "made", torch.arange(4) if targets is None else targets, fetch, content=lambda: [b"some", b"bytes"], variants=2
    )


def test_each_example_has_its_rows_in_its_variant_padded_with_nothing() -> None:
    found = made().at(torch.tensor([2, 0, 1, 3]), torch.tensor([0, 1, 1, 1]))
    assert found.shape == (4, 3, 3)
    assert found.dtype == torch.float32
    assert torch.equal(found[0], ROWS[0, 2:5])
    assert torch.equal(found[1, :2], ROWS[1, :2])
    assert torch.equal(found[3, :1], ROWS[1, 5:])
    assert not found[1, 2:].any()
    assert not found[2].any()
    assert not found[3, 1:].any()
    assert torch.equal(made().at(torch.tensor([2]), None)[0], ROWS[0, 2:5])


def test_a_file_of_them_gives_them_back() -> None:
    again = SoftTargets.from_tensors(made().to_tensors())
    assert torch.equal(again.values.float(), ROWS)
    assert again.ends.tolist() == [2, 2, 5, 6]
    assert len(again) == 4


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"values": ROWS.bfloat16()},
        {"values": ROWS, "ends": torch.tensor([2, 2, 5, 6])},
        {"values": ROWS[0].bfloat16(), "ends": torch.tensor([2, 2, 5, 6])},
        {"values": ROWS.bfloat16(), "ends": torch.tensor([2, 2, 5, 7])},
        {"values": ROWS.bfloat16(), "ends": torch.tensor([2, 1, 5, 6])},
        {"values": ROWS.bfloat16(), "ends": torch.tensor([-1, 2, 5, 6])},
        {"values": ROWS[:, :0].bfloat16(), "ends": torch.empty(0, dtype=torch.int64)},
    ],
)
def test_any_other_file_is_refused(tensors: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"it holds|its tensors have other|its examples do not have"):
        SoftTargets.from_tensors(tensors)


def test_a_batch_has_the_targets_of_the_variants_that_were_drawn_for_it() -> None:
    split = replace(flippable(torch.arange(4)), soft=made())
    seen = set()
    for batch in batches(split, torch.arange(4), 2, augment_seed=1):
        for at, flipped, rows in zip(batch["at"], batch["flipped"], batch[TEACHER], strict=True):
            seen.add(int(flipped))
            start, count = int(LENGTHS[:at].sum()), int(LENGTHS[at])
            assert torch.equal(rows[:count], ROWS[flipped, start : start + count])
    assert seen == {0, 1}
    for batch in batches(split, torch.arange(4), 4, variant=1):
        assert batch["flipped"].tolist() == [1, 1, 1, 1]
    assert all(not batch["flipped"].any() for batch in batches(split, torch.arange(4), 4))


def test_a_fingerprint_is_of_labels_and_inputs() -> None:
    plain = fingerprint(flippable())
    assert plain == fingerprint(flippable())
    assert plain != fingerprint(flippable(torch.tensor([0, 1, 3, 2])))
    assert plain != fingerprint(flippable(torch.arange(5)))
    assert plain != fingerprint(replace(flippable(), content=lambda: [b"some", b"bytez"]))
    assert plain != fingerprint(replace(flippable(), variants=1))
    rows = (Ragged.of([[1, IGNORED], [2], [3, 4], []]), Ragged.of([[1], [IGNORED, 2], [3, 4], []]))
    assert len({fingerprint(flippable(targets)) for targets in rows}) == 2


def test_single_numbers_are_kept_as_they_are() -> None:
    numbers = torch.tensor([[2013.4], [101325.0]])
    found = SoftTargets.of([[numbers.to(stored_as(1))]], torch.tensor([1, 1]))
    assert torch.equal(SoftTargets.from_tensors(found.to_tensors()).at(torch.tensor([0, 1]), None)[:, 0], numbers)
