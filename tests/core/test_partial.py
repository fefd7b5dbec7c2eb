"""Partial linear layers: compact gradients equal to the dense ones, nothing dense allocated, no input saved without need."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from recap_cli.core.groups import Axis, Cut
from recap_cli.core.optim import Optimizer, adamw
from recap_cli.core.partial import PartialLinear, Slot, bring_forward, make_partial
from recap_cli.core.surgery import Where, take

ROWS = torch.tensor([1, 4, 5, 11])


class Conv1D(nn.Module):
    """GPT-2's transposed linear layer: weight (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def model_and_where(form: str) -> tuple[nn.Module, Where]:
    torch.manual_seed(0)
    if form == "transposed rows":
        return nn.Sequential(Conv1D(12, 8)), {"0.weight": {1: ROWS}, "0.bias": {0: ROWS}}
    if form == "transposed columns":
        return nn.Sequential(Conv1D(8, 12)), {"0.weight": {0: ROWS}}
    if form == "rows":
        return nn.Sequential(nn.Linear(8, 12)), {"0.weight": {0: ROWS}, "0.bias": {0: ROWS}}
    if form == "side by side":
        return nn.Sequential(nn.Linear(8, 12)), {"0.weight": {0: torch.arange(3, 7)}, "0.bias": {0: torch.arange(3, 7)}}
    return nn.Sequential(nn.Linear(12, 8)), {"0.weight": {1: ROWS}}


FORMS = ["rows", "columns", "side by side", "transposed rows", "transposed columns"]


@pytest.mark.parametrize("form", FORMS)
def test_compact_gradients_are_the_dense_ones_at_those_entries(form: str) -> None:
    model, where = model_and_where(form)
    dense = copy.deepcopy(model)
    x = torch.randn(2, 3, 12 if "columns" in form else 8)
    x_dense = x.clone().requires_grad_()
    x_partial = x.clone().requires_grad_()
    slots = make_partial(model, where, frozen=lambda _: False)
    assert isinstance(model[0], PartialLinear)  # type: ignore[index]
    out, expected = model(x_partial), dense(x_dense)
    torch.testing.assert_close(out, expected)
    out.sin().sum().backward()
    expected.sin().sum().backward()
    torch.testing.assert_close(x_partial.grad, x_dense.grad)
    wanted = {n: take(p.grad, where.get(n, {})) for n, p in dense.named_parameters() if p.grad is not None}
    assert {s.name for s in slots} == set(wanted)
    for slot in slots:
        torch.testing.assert_close(slot.leaf.grad, wanted[slot.name])


@pytest.mark.parametrize("form", FORMS)
def test_a_step_moves_the_chosen_entries_of_the_resident_weight_and_no_other(form: str) -> None:
    model, where = model_and_where(form)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = Optimizer(
        make_partial(model, where, frozen=lambda n: n == "0.bias" and n not in where), adamw(betas=(0.9, 0.999), eps=1e-8)
    )
    optimizer.lr = 0.1
    model(torch.randn(2, 12 if "columns" in form else 8)).square().sum().backward()
    optimizer.step()
    after = model[0].weight  # type: ignore[index]
    ((dim, index),) = where["0.weight"].items()
    moved = torch.zeros(after.shape[dim], dtype=torch.bool).index_fill(0, index, True)
    changed = (after != before["0.weight"]).any(1 - dim)
    assert torch.equal(changed, moved)
    assert torch.equal(take(after, where["0.weight"]), next(s.master for s in optimizer.slots if s.name == "0.weight"))


def test_gradients_accumulate() -> None:
    model, where = model_and_where("rows")
    slots = make_partial(model, where, frozen=lambda _: False)
    x, y = torch.randn(3, 8), torch.randn(3, 8)
    model(x).sum().backward()
    model(y).sum().backward()
    twice = [s.leaf.grad.clone() for s in slots if s.leaf.grad is not None]
    for s in slots:
        s.leaf.grad = None
    model(torch.cat([x, y])).sum().backward()
    for together, apart in zip((s.leaf.grad for s in slots), twice, strict=True):
        torch.testing.assert_close(together, apart)


class Allocations(TorchDispatchMode):
    """Sees every result of every operation, and notes the sizes that are not views."""

    def __init__(self) -> None:
        super().__init__()
        self.numels: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            known = {a.untyped_storage().data_ptr() for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)}
            self.numels += [
                t.numel() for t in tree_leaves(out) if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in known
            ]
        return out


@pytest.mark.parametrize("contiguous", [True, False])
def test_no_dense_gradient_or_weight_is_ever_allocated(contiguous: bool) -> None:
    torch.manual_seed(0)
    width, hidden, tokens = 64, 256, 2
    index = torch.arange(32) if contiguous else torch.arange(0, 256, 8)
    model = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
    where: Where = {"0.weight": {0: index}, "0.bias": {0: index}, "2.weight": {1: index}}
    optimizer = Optimizer(make_partial(model, where, frozen=lambda _: False), adamw(betas=(0.9, 0.999), eps=1e-8))
    optimizer.lr = 0.1
    x = torch.randn(tokens, width, requires_grad=True)
    with Allocations() as seen:
        model(x).sum().backward()
        optimizer.step()
    compact = 32 * width
    assert max(seen.numels) <= compact  # a dense gradient would be 256 · 64 = 8 · compact
    assert optimizer.state_bytes() == 2 * 4 * sum(s.leaf.numel() for s in optimizer.slots)


def saved_by(model: nn.Module, x: Tensor) -> list[torch.Size]:
    sizes: list[torch.Size] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x).sum()
    return sizes


def test_columns_save_only_their_part_of_the_input() -> None:
    model, where = model_and_where("columns")
    make_partial(model, where, frozen=lambda _: False)
    sizes = saved_by(model, torch.randn(5, 12, requires_grad=True))
    assert torch.Size([5, 4]) in sizes
    assert torch.Size([5, 12]) not in sizes


def test_a_layer_of_which_nothing_moves_saves_no_input() -> None:
    model, _ = model_and_where("rows")
    nothing = torch.tensor([], dtype=torch.int64)
    slots = make_partial(model, {"0.weight": {0: nothing}, "0.bias": {0: nothing}}, frozen=lambda _: False)
    assert slots == []
    assert torch.Size([5, 8]) not in saved_by(model, torch.randn(5, 8, requires_grad=True))


def feedforward() -> tuple[nn.Module, list[Axis], dict[str, Tensor], Where]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
    axes = [Axis("n", "neurons", 0, 12, (Cut("0.weight", 0), Cut("0.bias", 0), Cut("2.weight", 1)))]
    mask = {"n": torch.zeros(12, dtype=torch.bool).index_fill(0, ROWS, True)}
    return model, axes, mask, {"0.weight": {0: ROWS}, "0.bias": {0: ROWS}, "2.weight": {1: ROWS}}


def test_bringing_neurons_forward_changes_no_function_and_makes_views() -> None:
    model, axes, mask, where = feedforward()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    x = torch.randn(4, 8)
    expected = model(x)
    forward = bring_forward(model, axes, mask, where)
    torch.testing.assert_close(model(x), expected)
    slots = make_partial(model, forward, frozen=lambda _: False)
    weights: list[Slot] = [s for s in slots if s.name in where]
    assert all(s.master.untyped_storage().data_ptr() == s.resident.untyped_storage().data_ptr() for s in weights)
    for s in weights:
        assert torch.equal(s.master, take(before[s.name], where[s.name]))


def test_bf16_residents_are_moved_by_fp32_masters() -> None:
    model, _, _, where = feedforward()
    full = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = Optimizer(
        make_partial(model, where, frozen=lambda _: False, dtype=torch.bfloat16), adamw(betas=(0.9, 0.999), eps=1e-8)
    )
    optimizer.lr = 1e-6  # below what bf16 can tell apart at these weights
    for _ in range(3):
        model(torch.randn(4, 8, dtype=torch.bfloat16)).float().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for slot in optimizer.slots:
        start = take(full[slot.name], where.get(slot.name, {}))
        assert slot.master.dtype == torch.float32
        assert not torch.equal(slot.master, start)  # moved in fp32, by less than a bf16 step
        torch.testing.assert_close(slot.master, start, rtol=0, atol=1e-5)
        assert torch.equal(take(slot.resident, slot.dims), slot.master.bfloat16())


def test_what_is_no_linear_layer_cannot_move_in_part() -> None:
    model = nn.Sequential(nn.Conv2d(3, 12, 1))
    with pytest.raises(TypeError, match=r"0\.weight would move in part, but Conv2d"):
        make_partial(model, {"0.weight": {0: ROWS}}, frozen=lambda _: False)
