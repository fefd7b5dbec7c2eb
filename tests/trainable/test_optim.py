"""The masked optimizer against torch's own on the sub-tensors, counts of different ages, and learning rates."""

from collections.abc import Callable
from math import cos, pi

import pytest
import torch
from torch import Tensor, nn

from recap_cli.memory.tracker import Tracker
from recap_cli.trainable.build import Trainable, make_partial
from recap_cli.trainable.optim import CarriedState, Optimizer, UpdateRule, adamw, learning_rate, sgd

Torch = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

RULES: dict[str, tuple[UpdateRule, Torch]] = {
    "sgd": (sgd(momentum=0.9), lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, foreach=False)),
    "plain sgd": (sgd(momentum=0.0), lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.1, foreach=False)),
    "adamw": (
        adamw(betas=(0.9, 0.99), eps=1e-8),
        lambda p: torch.optim.AdamW(p, lr=0.05, betas=(0.9, 0.99), weight_decay=0.1, foreach=False),
    ),
}


def trainable(values: Tensor, name: str = "w") -> Trainable:
    grad_param = nn.Parameter(values.clone())
    return Trainable(name, grad_param, grad_param.detach())


def gradients(shape: torch.Size, steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator) for _ in range(steps)]


@pytest.mark.parametrize("name", RULES)
def test_ten_steps_are_torchs_own_to_the_bit(name: str) -> None:
    rule, reference = RULES[name]
    start = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    ours, theirs = trainable(start), nn.Parameter(start.clone())
    optimizer, torchs = Optimizer([ours], rule, weight_decay=0.1), reference([theirs])
    optimizer.lr = 0.05
    for grad in gradients(start.shape, 10):
        ours.grad_param.grad, theirs.grad = grad.clone(), grad.clone()
        optimizer.step()
        torchs.step()
    assert torch.equal(ours.master, theirs.detach())


def test_entries_of_different_ages_each_match_an_optimizer_of_their_own_age() -> None:
    rule, reference = RULES["adamw"]
    start = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    old, new = nn.Parameter(start[:2].clone()), nn.Parameter(start[2:].clone())
    torch_old, torch_new = reference([old]), reference([new])
    for grad in gradients(old.shape, 7):
        old.grad = grad
        torch_old.step()
    state = torch_old.state[old]
    moments = {m: torch.cat([state[m], torch.zeros(2, 3)]) for m in ("exp_avg", "exp_avg_sq")}
    ours = trainable(torch.cat([old.detach(), new.detach()]))
    counts = torch.tensor([7, 7, 0, 0], dtype=torch.int32)
    optimizer = Optimizer(
        [ours], rule, carried=CarriedState(moments={"w": moments}, counts={"w": counts}, along={"w": 0}), weight_decay=0.1
    )
    optimizer.lr = 0.05
    for grad in gradients(start.shape, 10):
        ours.grad_param.grad, old.grad, new.grad = grad.clone(), grad[:2].clone(), grad[2:].clone()
        optimizer.step()
        torch_old.step()
        torch_new.step()
    torch.testing.assert_close(ours.master, torch.cat([old.detach(), new.detach()]), rtol=1e-5, atol=1e-6)
    assert optimizer.counts()["w"].tolist() == [17, 17, 10, 10]


def test_state_is_one_tensor_a_moment_and_nothing_more() -> None:
    trainables = [trainable(torch.zeros(6, 5), "a"), trainable(torch.zeros(7), "b")]
    assert Optimizer(trainables, sgd(momentum=0.9)).state_bytes() == 4 * 37
    assert Optimizer(trainables, sgd(momentum=0.0)).state_bytes() == 0
    assert Optimizer(trainables, adamw(betas=(0.9, 0.999), eps=1e-8)).state_bytes() == 2 * 4 * 37


def test_vectors_do_not_decay() -> None:
    vector = trainable(torch.ones(3))
    optimizer = Optimizer([vector], sgd(momentum=0.9), weight_decay=0.5)
    optimizer.lr = 1.0
    vector.grad_param.grad = torch.zeros(3)
    optimizer.step()
    assert torch.equal(vector.master, torch.ones(3))


def test_a_linear_rate_rises_and_falls_to_zero() -> None:
    rates = [learning_rate(s, steps=10, peak=1.0, schedule="linear", warmup_ratio=0.2) for s in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[-1] == pytest.approx(1 / 8)
    assert learning_rate(9, steps=10, peak=2.0, schedule="constant", warmup_ratio=0.0) == 2.0
    cosine = [learning_rate(s, steps=8, peak=2.0, schedule="cosine", warmup_ratio=0.0) for s in range(8)]
    assert cosine[0] == 2.0
    assert cosine[4] == pytest.approx(1.0)
    assert cosine == sorted(cosine, reverse=True)
    assert cosine[7] == pytest.approx(1 - cos(pi / 8))


COUNTS = {
    "new": None,
    "of one age": torch.full((64,), 3, dtype=torch.int32),
    "of many ages": torch.arange(64, dtype=torch.int32),
}
TRAINABLE_BYTES = 64 * 32 * 4


def temporary_bytes(optimizer: Optimizer) -> int:
    """The most that one step holds beside what there was before, apart from numbers of a row or a column."""
    optimizer.lr = 0.05
    tracker = Tracker()
    for ours in optimizer.trainables:
        ours.grad_param.grad = torch.ones(ours.grad_param.shape)
        known = [ours.grad_param, ours.grad_param.grad, *optimizer.moments[ours.name].values()]
        known += [tensor for tensor in (ours.own_master, ours.forward_weight) if tensor is not None]
        tracker.know([(ours.name, tensor) for tensor in known], "other")
    with torch.no_grad(), tracker:
        optimizer.step()
    return tracker.usage().maxima["temporary"]


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("ages", COUNTS)
@pytest.mark.parametrize("name", RULES)
def test_a_step_makes_at_most_one_tensor_of_a_trainables_size(name: str, ages: str, decay: float) -> None:
    counts = COUNTS[ages]
    known = {} if counts is None else {"w": counts}
    optimizer = Optimizer(
        [trainable(torch.randn(64, 32))], RULES[name][0], carried=CarriedState(counts=known, along={"w": 0}), weight_decay=decay
    )
    per_row = 8 * 512  # what counts become on the way to a rate per row; not of the tensor's size, which is 16 times 512
    assert temporary_bytes(optimizer) <= (TRAINABLE_BYTES if name == "adamw" else 0) + per_row


@pytest.mark.parametrize("name", RULES)
def test_entries_without_a_copy_of_their_own_cost_a_step_one_more(name: str) -> None:
    rows = torch.arange(0, 128, 2)
    trainables = make_partial(nn.Sequential(nn.Linear(32, 128, bias=False)), {"0.weight": {0: rows}}, frozen=lambda _: False)
    own_master = TRAINABLE_BYTES if name == "adamw" else 0
    assert temporary_bytes(Optimizer(trainables, RULES[name][0], weight_decay=0.1)) == own_master + TRAINABLE_BYTES


@pytest.mark.parametrize("name", RULES)
def test_steps_one_slot_after_another_hold_the_tensors_of_one(name: str) -> None:
    trainables = [trainable(torch.randn(64, 32), letter) for letter in "abc"]
    assert temporary_bytes(Optimizer(trainables, RULES[name][0], weight_decay=0.1)) == (
        TRAINABLE_BYTES if name == "adamw" else 0
    )


def test_moments_that_are_given_are_copied_and_kept_in_float32() -> None:
    param = nn.Parameter(torch.ones(3))
    given = {"m": torch.full((3,), 0.5, dtype=torch.float64), "v": torch.full((3,), 0.25)}
    names = list(adamw(betas=(0.9, 0.999), eps=1e-8).idle_decay)
    moments = dict(zip(names, given.values(), strict=True))
    trainable = Trainable("w", param, param.detach())
    optimizer = Optimizer(
        [trainable],
        adamw(betas=(0.9, 0.999), eps=1e-8),
        carried=CarriedState(moments={"w": moments}, counts={"w": torch.tensor([3.0])}),
    )
    optimizer.lr = 0.1
    param.grad = torch.ones(3)
    optimizer.step()
    assert [moment.tolist() for moment in given.values()] == [[0.5] * 3, [0.25] * 3]
    assert all(moment.dtype == torch.float32 for moment in optimizer.moments["w"].values())
