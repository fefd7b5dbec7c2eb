"""Orders, samples and seeds that their arguments alone decide."""

import torch

from recap_cli.data.sampling import batches, order, sample, seed_for, seeded
from recap_cli.data.splits import Split


def counting_split(count: int) -> Split:
    return Split("numbers", torch.arange(count) % 2, lambda indices, generator: {"inputs": indices.clone()})


def test_seeds_are_the_same_everywhere_and_differ_by_each_argument() -> None:
    assert seed_for(0, 3, "prune") == 5668229476761284686  # blake2b of "0/3/prune", 8 bytes, big endian, halved
    seeds = {seed_for(seed, round, stage) for seed in range(5) for round in range(5) for stage in ("prune", "mask")}
    assert len(seeds) == 50
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_an_order_is_a_permutation_that_its_arguments_decide() -> None:
    first = order(100, seed=0, round=1, epoch=0)
    assert first.dtype == torch.int64
    assert first.sort().values.tolist() == list(range(100))
    torch.rand(3)  # the global generator has no say
    assert torch.equal(first, order(100, seed=0, round=1, epoch=0))
    for other in (
        order(100, seed=1, round=1, epoch=0),
        order(100, seed=0, round=2, epoch=0),
        order(100, seed=0, round=1, epoch=1),
    ):
        assert not torch.equal(first, other)


def test_no_order_touches_the_global_generator() -> None:
    before = torch.get_rng_state()
    order(10, seed=0, round=0, epoch=0)
    sample(10, 5, seed=0, round=0, stage="prune")
    assert torch.equal(before, torch.get_rng_state())


def test_a_sample_repeats_nothing() -> None:
    chosen = sample(50, 20, seed=0, round=0, stage="prune")
    assert len(set(chosen.tolist())) == 20
    assert not torch.equal(chosen, sample(50, 20, seed=0, round=0, stage="mask"))


def test_a_sample_of_more_than_there_is_has_all() -> None:
    assert sample(5, 20, seed=0, round=0, stage="prune").sort().values.tolist() == [0, 1, 2, 3, 4]


def test_batches_keep_the_order_and_the_rest() -> None:
    chosen = order(10, seed=0, round=0, epoch=0)
    got = list(batches(counting_split(10), chosen, 4))
    assert [len(batch["labels"]) for batch in got] == [4, 4, 2]
    assert torch.equal(torch.cat([batch["inputs"] for batch in got]), chosen)
    assert torch.equal(torch.cat([batch["labels"] for batch in got]), chosen % 2)


def test_a_seeded_block_draws_the_same_numbers_and_leaves_the_others_as_they_would_be() -> None:
    torch.manual_seed(5)
    wanted = torch.rand(4)
    torch.manual_seed(5)
    before = torch.rand(2)
    drawn = []
    for _ in range(2):
        with seeded(7, "cpu"):
            drawn.append(torch.rand(3))
    assert torch.equal(*drawn)
    assert torch.equal(torch.cat([before, torch.rand(2)]), wanted)
