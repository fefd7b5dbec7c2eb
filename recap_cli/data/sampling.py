"""Which examples come when: pure functions of (seed, round, stage), so that a resumed run sees what the first one saw."""

from collections.abc import Iterator
from hashlib import blake2b

import torch
from torch import Tensor

from recap_cli.data.splits import Split


def seed_for(seed: int, round: int, stage: str) -> int:
    """A seed in [0, 2⁶³) for one use of randomness, the same in every process and on every machine.

    Seeds of different (seed, round, stage) have nothing to do with each other, unlike `seed + round`.
    """
    digest = blake2b(f"{seed}/{round}/{stage}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator_for(seed: int, round: int, stage: str) -> torch.Generator:
    """A CPU generator of its own for one use of randomness; torch's global one is not touched."""
    return torch.Generator().manual_seed(seed_for(seed, round, stage))


def order(count: int, *, seed: int, round: int, epoch: int) -> Tensor:
    """The order in which one epoch sees its examples: a permutation of 0 … count − 1, shape (count,), int64."""
    return torch.randperm(count, generator=generator_for(seed, round, f"order of epoch {epoch}"))


def sample(count: int, size: int, *, seed: int, round: int, stage: str) -> Tensor:
    """D_s, the tiny random sample on which importance is estimated: indices without repetition, int64.

    Shape (size,), or (count,) if there are no more than `size` examples.
    """
    return torch.randperm(count, generator=generator_for(seed, round, f"sample for {stage}"))[:size]


def batches(
    split: Split,
    indices: Tensor,
    batch_size: int,
    *,
    augment_seed: int | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[dict[str, Tensor]]:
    """The examples at `indices`, in that order, `batch_size` at a time (the last batch may be smaller), on `device`.

    Images are augmented only if an `augment_seed` is given; which of them are flipped does not depend on `batch_size`.

    Raises `DataError` if an image cannot be decoded.
    """
    generator = None if augment_seed is None else torch.Generator().manual_seed(augment_seed)
    for chosen in torch.split(indices, batch_size):
        batch = split.batch(chosen, generator=generator)
        yield {name: tensor.to(device) for name, tensor in batch.items()}
