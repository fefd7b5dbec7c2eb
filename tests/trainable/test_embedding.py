"""Partial embeddings: the rows that are looked up, and the gradients of those that move, against dense ones."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recap_cli.trainable.build import Trainable, make_partial
from recap_cli.trainable.embedding import PartialEmbedding
from recap_cli.trainable.optim import Optimizer, adamw
from recap_cli.trainable.placement import Placement
from tests.weights import QUANTIZED, WEIGHTS

TOKEN_ROWS, WIDTH = 40, 8
HELD = torch.tensor([0, 3, 4, 9, 17, 18, 30, 39])
MOVING = torch.tensor([3, 9, 18, 39])


class Words(nn.Module):
    """A table of tokens and a layer over the sum of a text's vectors."""

    def __init__(self, padding_idx: int | None = None) -> None:
        super().__init__()
        self.table = nn.Embedding(TOKEN_ROWS, WIDTH, padding_idx=padding_idx)
        self.top = nn.Linear(WIDTH, 3)

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.table(ids)
        logits: Tensor = self.top(hidden.to(self.top.weight.dtype).mean(1))
        return logits.float()


def words(padding_idx: int | None = None) -> Words:
    torch.manual_seed(0)
    return Words(padding_idx)


def texts(count: int = 4, ids: Tensor = HELD) -> Tensor:
    drawn = torch.randint(0, len(ids), (count, 6), generator=torch.Generator().manual_seed(1))
    return ids[drawn]  # (texts, tokens)


def partial(
    model: Words, trained: Tensor | None = MOVING, held: Tensor = HELD, name: str = "fp32", **settings: Any
) -> list[Trainable]:
    where = {} if trained is None else {"table.weight": {0: trained}}
    return make_partial(
        model,
        where,
        frozen=lambda n: trained is None and n == "table.weight",
        used_rows={"table.weight": held},
        placement=Placement(weights=WEIGHTS[name], **settings),
    )


def as_held(weight: Tensor, trained: Tensor, name: str) -> Tensor:
    """The table that the forward reads: frozen rows as codes have them, moving ones in the type of the forward."""
    weights, short = WEIGHTS[name], weight.to(WEIGHTS[name].dtype)
    if name in QUANTIZED:
        frozen = HELD[~torch.isin(HELD, trained)]
        dense = torch.empty(len(frozen), WIDTH, dtype=weights.dtype)
        weights.dense(weights.quantize(weight[frozen]), dense)  # type: ignore[misc]
        short[frozen] = dense
    return short


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("trained", [None, MOVING, HELD], ids=["none", "some", "all"])
def test_every_row_that_is_held_is_looked_up_as_in_the_whole_table(name: str, trained: Tensor | None) -> None:
    model = words()
    whole = as_held(model.table.weight.detach().clone(), HELD[:0] if trained is None else trained, name)
    partial(model, trained, name=name)
    moving_rows = 0 if trained is None else len(trained)
    assert model.table.extra_repr() == f"{len(HELD)} of {TOKEN_ROWS} rows, {moving_rows} trainable"
    assert isinstance(model.table, PartialEmbedding)
    ids = texts()
    torch.testing.assert_close(model.table(ids), F.embedding(ids, whole), rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(model.table(ids), F.embedding(ids, whole), rtol=0, atol=0)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("trained", [MOVING, HELD], ids=["some", "all"])
def test_the_gradient_is_the_dense_one_at_the_rows_that_move(name: str, trained: Tensor) -> None:
    model = words()
    dense = copy.deepcopy(model).to(WEIGHTS[name].dtype)
    with torch.no_grad():
        dense.table.weight.copy_(as_held(model.table.weight.detach(), trained, name))
    trainables = partial(model, trained, name=name)
    for one in (model, dense):
        for ids in (texts(), texts(3).flip(1)):
            F.cross_entropy(one(ids), torch.arange(len(ids)) % 3).backward()
    (trainable,) = (trainable for trainable in trainables if trainable.name == "table.weight")
    assert trainable.grad_param.grad is not None
    assert trainable.grad_param.grad.dtype == torch.float32
    assert dense.table.weight.grad is not None
    wanted = dense.table.weight.grad[trained].float()
    close = {"rtol": 1e-5, "atol": 1e-8} if name == "fp32" else {"rtol": 2e-2, "atol": 1e-4}  # the dense sums in bf16
    torch.testing.assert_close(trainable.grad_param.grad, wanted, **close)
    assert wanted.abs().sum() > 0


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("name", WEIGHTS)
def test_steps_move_these_rows_alone_and_the_forward_reads_them(name: str, offload: bool) -> None:
    model = words()
    before = model.table.weight.detach().clone()
    trainables = partial(model, name=name, offload=offload)
    (trainable,) = (trainable for trainable in trainables if trainable.name == "table.weight")
    assert torch.equal(trainable.master, before[MOVING])
    optimizer = Optimizer(trainables, adamw(betas=(0.9, 0.999), eps=1e-8), weight_decay=0.1)
    optimizer.lr = 0.05
    for _ in range(3):
        F.cross_entropy(model(texts()), torch.arange(4) % 3).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = before.clone()
    after[MOVING] = trainable.master
    assert (after[MOVING] - before[MOVING]).abs().min() > 0
    torch.testing.assert_close(model.table(HELD), as_held(after, MOVING, name)[HELD], rtol=0, atol=0)
    assert {moment.shape for moment in optimizer.moments["table.weight"].values()} == {(len(MOVING), WIDTH)}


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("offload", [False, True])
def test_rows_that_are_not_looked_up_are_not_held(name: str, offload: bool) -> None:
    model = words()
    trainables = partial(model, name=name, offload=offload)
    table = model.table
    tensors = [*table.parameters(), *table.buffers()]
    if not offload:
        tensors += [
            trainable.own_master
            for trainable in trainables
            if trainable.name == "table.weight" and trainable.own_master is not None
        ]
    held_bytes = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
    rows, trained, ids = len(HELD), len(MOVING), 4 * TOKEN_ROWS
    wanted = {
        ("fp32", False): 4 * WIDTH * rows,
        ("fp32", True): 4 * WIDTH * rows + 4,  # and a handle
        ("bf16", False): 2 * WIDTH * rows + 4 * WIDTH * trained,
        ("bf16", True): 2 * WIDTH * rows + 4,
        ("int8", False): (WIDTH + 4) * (rows - trained) + 4 * WIDTH * trained,
        ("int8", True): (WIDTH + 4) * (rows - trained) + 2 * WIDTH * trained,
        ("nf4", False): WIDTH * (rows - trained) // 2 + 1 + 4 + 4 + 4 * WIDTH * trained,  # less than a block
        ("nf4", True): WIDTH * (rows - trained) // 2 + 1 + 4 + 4 + 2 * WIDTH * trained,
    }
    assert held_bytes == wanted[name, offload] + ids
    assert isinstance(table, PartialEmbedding)
    assert table.absent == (TOKEN_ROWS - rows) * WIDTH
    assert table.extra_repr() == f"{rows} of {TOKEN_ROWS} rows, {trained} trainable"


def test_nothing_of_a_table_that_is_still_asks_for_a_gradient() -> None:
    model = words()
    trainables = partial(model, None)
    assert not model.table(texts()).requires_grad
    assert {trainable.name for trainable in trainables} == {"top.weight", "top.bias"}


def test_the_forward_saves_no_more_than_where_the_rows_stand() -> None:
    model = words()
    partial(model)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model.table(texts())
    assert [(t.dtype, t.shape) for t in saved] == [(torch.int64, (4, 6))]


def test_an_id_that_is_not_held_is_no_other_row() -> None:
    model = words()
    partial(model)
    with pytest.raises(IndexError):
        model.table(torch.tensor([[1]]))


def test_what_cannot_be_held_in_part_is_refused() -> None:
    with pytest.raises(ValueError, match=r"table.weight: a row would be trainable that is never looked up"):
        partial(words(), torch.tensor([1, 3]))
    with pytest.raises(TypeError, match=r"table.weight would be trainable in part, but Embedding is no linear layer"):
        make_partial(words(), {"table.weight": {1: torch.tensor([0])}}, frozen=lambda _: False)
    scaled = words()
    scaled.table.max_norm = 1.0  # changes the rows that it looks up
    with pytest.raises(TypeError, match=r"would be trainable in part"):
        partial(scaled)
    partial(scaled, None)
    assert isinstance(scaled.table, nn.Embedding)
    assert scaled.table.weight.shape == (TOKEN_ROWS, WIDTH)


def test_a_table_that_trains_whole_is_held_whole() -> None:
    model = words()
    trainables = make_partial(model, {}, frozen=lambda _: False, used_rows={"table.weight": HELD})
    assert isinstance(model.table, nn.Embedding)
    assert {trainable.name: tuple(trainable.grad_param.shape) for trainable in trainables}["table.weight"] == (
        TOKEN_ROWS,
        WIDTH,
    )
