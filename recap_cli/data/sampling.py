"""The order of examples: pure functions of (seed, round, stage), so that a resumed run sees the same examples."""

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from recap_cli.core.task import Batch
from recap_cli.data.split import Split


def seed_for(seed: int, round: int, stage: str) -> int:
    """Return a seed in [0, 2⁶³) for one use of randomness, the same in every process and on every machine.

    Unlike `seed + round`, seeds of different (seed, round, stage) are unrelated.
    """
    digest = blake2b(f"{seed}/{round}/{stage}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator_for(seed: int, round: int, stage: str) -> torch.Generator:
    """Return a separate CPU generator for one use of randomness. torch's global generator does not change."""
    return torch.Generator().manual_seed(seed_for(seed, round, stage))


@contextmanager
def seeded(seed: int, device: torch.device | str) -> Iterator[None]:
    """Inside, torch's global generators begin at a seed; afterwards those of the CPU and of the device go on as before."""
    place = torch.device(device)
    with torch.random.fork_rng(
        [] if place.type == "cpu" else [place], device_type=place.type if place.type != "cpu" else "cuda"
    ):
        torch.manual_seed(seed)
        yield


def order(count: int, *, seed: int, round: int, epoch: int) -> Tensor:
    """Return the order of the examples in one epoch: a permutation of 0 … count − 1, shape (count,), int64."""
    return torch.randperm(count, generator=generator_for(seed, round, f"order of epoch {epoch}"))


def sample(count: int, size: int, *, seed: int, round: int, stage: str) -> Tensor:
    """Return D_s, the small random sample on which importance is estimated.

    Returns:
        Indices without repetition, int64, shape (size,), or (count,) if there are fewer examples.
    """
    return torch.randperm(count, generator=generator_for(seed, round, f"sample for {stage}"))[:size]


def batches(
    split: Split,
    indices: Tensor,
    batch_size: int,
    *,
    augment_seed: int | None = None,
    variant: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[Batch]:
    """Yield the examples at `indices`, in that order, in batches on `device`. The last batch may be smaller.

    Args:
        split: The examples.
        indices: Which of them, int64.
        batch_size: Examples per batch.
        augment_seed: Draw the variant of each example with this seed. Which ones are flipped does not depend on `batch_size`.
        variant: That of all, without a seed.
        device: Where the batches are put.

    Raises:
        DataError: An image cannot be decoded.
    """
    generator = None if augment_seed is None else torch.Generator().manual_seed(augment_seed)
    for chosen in torch.split(indices, batch_size):
        drawn = split.draw_variants(len(chosen), generator)
        batch = split.batch(chosen, torch.full_like(chosen, variant) if variant else drawn)
        yield tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, batch)
