"""Partial linear layers: compact gradients equal to the dense ones, nothing dense allocated, no input saved without need."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from recap_cli.core.axes import Axis, Cut, mask_axes, shapes_of
from recap_cli.core.surgery import IndexMap, indices, put, take
from recap_cli.models import build
from recap_cli.rounds.layout import Layout
from recap_cli.trainable.build import Trainable, make_partial, whole_parameters
from recap_cli.trainable.frozen_weights import QuantizedEmbedding, rest_of
from recap_cli.trainable.linear import PartialLinear
from recap_cli.trainable.neuron_order import bring_forward
from recap_cli.trainable.optim import Optimizer, UpdateRule, adamw, sgd
from recap_cli.trainable.placement import Placement
from tests.pico import pico
from tests.weights import QUANTIZED, WEIGHTS, weights_of

ROWS = torch.tensor([1, 4, 5, 11])


class Conv1D(nn.Module):
    """GPT-2's transposed linear layer: weight (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def model_and_index_map(form: str) -> tuple[nn.Module, IndexMap]:
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
    model, index_map = model_and_index_map(form)
    dense = copy.deepcopy(model)
    x = torch.randn(2, 3, 12 if "columns" in form else 8)
    x_dense = x.clone().requires_grad_()
    x_partial = x.clone().requires_grad_()
    trainables = make_partial(model, index_map, frozen=lambda _: False)
    assert isinstance(model[0], PartialLinear)  # type: ignore[index]
    out, expected = model(x_partial), dense(x_dense)
    torch.testing.assert_close(out, expected)
    out.sin().sum().backward()
    expected.sin().sum().backward()
    torch.testing.assert_close(x_partial.grad, x_dense.grad)
    wanted = {n: take(p.grad, index_map.get(n, {})) for n, p in dense.named_parameters() if p.grad is not None}
    assert {s.name for s in trainables} == set(wanted)
    for trainable in trainables:
        torch.testing.assert_close(trainable.grad_param.grad, wanted[trainable.name])


@pytest.mark.parametrize("form", FORMS)
def test_a_step_trains_the_chosen_entries_of_the_resident_weight_and_no_other(form: str) -> None:
    model, index_map = model_and_index_map(form)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = Optimizer(
        make_partial(model, index_map, frozen=lambda n: n == "0.bias" and n not in index_map),
        adamw(betas=(0.9, 0.999), eps=1e-8),
    )
    optimizer.lr = 0.1
    model(torch.randn(2, 12 if "columns" in form else 8)).square().sum().backward()
    optimizer.step()
    after = model[0].weight  # type: ignore[index]
    ((dim, index),) = index_map["0.weight"].items()
    moved = torch.zeros(after.shape[dim], dtype=torch.bool).index_fill(0, index, True)
    changed = (after != before["0.weight"]).any(1 - dim)
    assert torch.equal(changed, moved)
    assert torch.equal(take(after, index_map["0.weight"]), next(s.master for s in optimizer.trainables if s.name == "0.weight"))


def test_gradients_accumulate() -> None:
    model, index_map = model_and_index_map("rows")
    trainables = make_partial(model, index_map, frozen=lambda _: False)
    x, y = torch.randn(3, 8), torch.randn(3, 8)
    model(x).sum().backward()
    model(y).sum().backward()
    twice = [s.grad_param.grad.clone() for s in trainables if s.grad_param.grad is not None]
    for s in trainables:
        s.grad_param.grad = None
    model(torch.cat([x, y])).sum().backward()
    for together, apart in zip((s.grad_param.grad for s in trainables), twice, strict=True):
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
    index_map: IndexMap = {"0.weight": {0: index}, "0.bias": {0: index}, "2.weight": {1: index}}
    optimizer = Optimizer(make_partial(model, index_map, frozen=lambda _: False), adamw(betas=(0.9, 0.999), eps=1e-8))
    optimizer.lr = 0.1
    x = torch.randn(tokens, width, requires_grad=True)
    with Allocations() as seen:
        model(x).sum().backward()
        optimizer.step()
    compact = 32 * width
    assert max(seen.numels) <= compact  # a dense gradient would be 256 · 64 = 8 · compact
    assert optimizer.state_bytes() == 2 * 4 * sum(s.grad_param.numel() for s in optimizer.trainables)


def saved_by(model: nn.Module, x: Tensor) -> list[torch.Size]:
    sizes: list[torch.Size] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x).sum()
    return sizes


def test_columns_save_only_their_part_of_the_input() -> None:
    model, index_map = model_and_index_map("columns")
    make_partial(model, index_map, frozen=lambda _: False)
    sizes = saved_by(model, torch.randn(5, 12, requires_grad=True))
    assert torch.Size([5, 4]) in sizes
    assert torch.Size([5, 12]) not in sizes


def test_columns_side_by_side_do_not_keep_the_rest_of_the_input_alive() -> None:
    model = nn.Sequential(nn.Linear(12, 8))
    make_partial(model, {"0.weight": {1: torch.arange(2, 6)}}, frozen=lambda _: False)
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.randn(100, 12, requires_grad=True))
    assert 100 * 4 * 4 in kept
    assert 100 * 12 * 4 not in kept


def test_a_layer_of_which_nothing_trains_saves_no_input() -> None:
    model, _ = model_and_index_map("rows")
    nothing = torch.tensor([], dtype=torch.int64)
    trainables = make_partial(model, {"0.weight": {0: nothing}, "0.bias": {0: nothing}}, frozen=lambda _: False)
    assert trainables == []
    assert torch.Size([5, 8]) not in saved_by(model, torch.randn(5, 8, requires_grad=True))


def feedforward() -> tuple[nn.Module, list[Axis], dict[str, Tensor], IndexMap]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
    axes = [Axis("n", "neurons", 0, 12, (Cut("0.weight", 0), Cut("0.bias", 0), Cut("2.weight", 1)))]
    mask = {"n": torch.zeros(12, dtype=torch.bool).index_fill(0, ROWS, True)}
    return model, axes, mask, {"0.weight": {0: ROWS}, "0.bias": {0: ROWS}, "2.weight": {1: ROWS}}


def test_bringing_neurons_forward_changes_no_function_and_makes_views() -> None:
    model, axes, mask, index_map = feedforward()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    x = torch.randn(4, 8)
    expected = model(x)
    forward = bring_forward(model, axes, mask, index_map)
    torch.testing.assert_close(model(x), expected)
    trainables = make_partial(model, forward, frozen=lambda _: False)
    weights: list[Trainable] = [s for s in trainables if s.name in index_map]
    for s in weights:
        assert s.forward_weight is None  # nothing to write back: what the forward reads is
        layer, _, kind = s.name.partition(".")
        assert s.master.untyped_storage().data_ptr() == getattr(model[int(layer)], kind).untyped_storage().data_ptr()
        assert torch.equal(s.master, take(before[s.name], index_map[s.name]))


class TwoBlocks(nn.Module):
    """Two feedforward blocks, the neurons of which are rows of one matrix, one block's after the other's."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.first, self.second = nn.Linear(8, 12), nn.Linear(6, 8), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:  # (…, 8) → (…, 8)
        one, two = self.up(x).relu().chunk(2, -1)
        return self.first(one) + self.second(two)


def test_neurons_of_two_blocks_in_one_matrix_are_brought_forward_each_in_its_own() -> None:
    torch.manual_seed(0)
    model, x = TwoBlocks(), torch.randn(4, 8)
    axes = [
        Axis(
            f"{down}.neurons",
            "neurons",
            0,
            6,
            (Cut("up.weight", 0, 1, start), Cut("up.bias", 0, 1, start), Cut(f"{down}.weight", 1)),
        )
        for down, start in (("first", 0), ("second", 6))
    ]
    mask = {axis.name: torch.tensor([False, True, False, True, True, False]).roll(i) for i, axis in enumerate(axes)}
    before, expected = {name: param.detach().clone() for name, param in model.named_parameters()}, model(x)
    index_map = indices(axes, mask, shapes_of(before))
    forward = bring_forward(model, axes, mask, index_map)
    torch.testing.assert_close(model(x), expected)
    assert forward["up.weight"][0].tolist() == [0, 1, 2, 6, 7, 8]
    for name, param in model.named_parameters():
        if name in index_map:
            assert torch.equal(take(param.detach(), forward[name]), take(before[name], index_map[name])), name


@pytest.mark.parametrize("form", ["whole", "coupled otherwise"])
def test_neurons_that_a_mask_does_not_follow_stay_in_their_order(form: str) -> None:
    model = nn.Sequential(nn.Linear(8, 12), nn.PReLU(12), nn.Linear(12, 8))
    word = "down" if form != "whole" else ""
    cuts = (Cut("0.weight", 0), Cut("0.bias", 0), Cut("1.weight", 0), Cut("2.weight", 1, couple=word))
    axes = [Axis("n", "neurons", 0, 12, cuts)]
    whole = whole_parameters(model, axes)
    assert whole == ["1.weight"]
    fine = mask_axes(axes, whole)
    mask = {axis.name: torch.zeros(12, dtype=torch.bool).index_fill(0, ROWS, True) for axis in fine}
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    index_map = indices(fine, mask, shapes_of(before))
    assert bring_forward(model, axes, mask, index_map) == index_map
    assert all(torch.equal(param, before[name]) for name, param in model.named_parameters())


class Subclass(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def axis_of(*cuts: Cut) -> list[Axis]:
    return [Axis("a", "neurons", 0, 4, cuts)]


@pytest.mark.parametrize(
    ("model", "cuts", "whole"),
    [
        (nn.Linear(4, 4), (Cut("weight", 0), Cut("bias", 0)), []),
        (nn.Linear(4, 4), (Cut("weight", 1),), []),
        (Conv1D(4, 4), (Cut("weight", 1), Cut("bias", 0)), []),
        (Conv1D(4, 4), (Cut("weight", 0), Cut("bias", 0)), ["bias"]),
        (nn.Linear(4, 4), (Cut("bias", 0),), ["bias"]),
        (nn.Linear(4, 4), (Cut("weight", 1), Cut("bias", 0)), ["bias"]),
        (nn.Linear(4, 8), (Cut("weight", 0), Cut("bias", 0, 1, 4)), ["bias"]),
        (nn.Linear(4, 4), (Cut("weight", 0), Cut("bias", 0, couple="apart")), ["bias"]),
        (nn.Embedding(4, 4), (Cut("weight", 0),), []),
        (nn.Embedding(4, 4), (Cut("weight", 1),), ["weight"]),
        (nn.LayerNorm(4), (Cut("weight", 0), Cut("bias", 0)), ["weight", "bias"]),
        (nn.Conv2d(4, 4, 1), (Cut("weight", 0), Cut("bias", 0)), ["weight", "bias"]),
        (nn.MultiheadAttention(4, 1), (Cut("in_proj_weight", 0),), ["in_proj_weight"]),
        (nn.MultiheadAttention(4, 1), (Cut("out_proj.weight", 1),), ["out_proj.weight"]),
        (Subclass(4, 4), (Cut("weight", 0), Cut("bias", 0)), ["weight", "bias"]),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_in_part_is_known_and_nothing_else_is_refused(
    model: nn.Module, cuts: tuple[Cut, ...], whole: list[str]
) -> None:
    owner = nn.ModuleDict({"m": model})
    axes = axis_of(*(replace(cut, param=f"m.{cut.param}") for cut in cuts))
    assert whole_parameters(owner, axes) == [f"m.{name}" for name in whole]
    fine = mask_axes(axes, [f"m.{name}" for name in whole])
    mask = {axis.name: torch.tensor([True, False, False, True]) for axis in fine}
    index_map = indices(fine, mask, shapes_of(owner.named_parameters()))
    trainables = make_partial(owner, index_map, frozen=lambda name: name.removeprefix("m.") in whole)
    assert {trainable.name for trainable in trainables if trainable.name in index_map} == set(index_map)


def test_bf16_weights_are_trained_by_fp32_masters() -> None:
    model, _, _, index_map = feedforward()
    full = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = Optimizer(
        make_partial(model, index_map, placement=Placement(weights=WEIGHTS["bf16"]), frozen=lambda _: False),
        adamw(betas=(0.9, 0.999), eps=1e-8),
    )
    optimizer.lr = 1e-6  # below what bf16 can tell apart at these weights
    for _ in range(3):
        model(torch.randn(4, 8, dtype=torch.bfloat16)).float().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for trainable in optimizer.trainables:
        start = take(full[trainable.name], index_map.get(trainable.name, {}))
        assert trainable.master.dtype == torch.float32
        assert not torch.equal(trainable.master, start)  # moved in fp32, by less than a bf16 step
        torch.testing.assert_close(trainable.master, start, rtol=0, atol=1e-5)
        assert trainable.forward_weight is not None
        assert torch.equal(take(trainable.forward_weight, trainable.dims), trainable.master.bfloat16())


def test_what_is_no_linear_layer_cannot_move_in_part() -> None:
    model = nn.Sequential(nn.Conv2d(3, 12, 1))
    with pytest.raises(TypeError, match=r"0\.weight would be trainable in part, but Conv2d"):
        make_partial(model, {"0.weight": {0: ROWS}}, frozen=lambda _: False)


def dequantized(weight: Tensor, dims: dict[int, Tensor], dtype: torch.dtype, *, name: str, transposed: bool = False) -> Tensor:
    """A copy of `weight` whose entries at `dims` are exact, and all others what their code says, before `dtype` rounds both."""
    dense = weight.detach().clone()
    rest = {dim: rest_of(index, weight.shape[dim]) for dim, index in dims.items()}
    still = take(dense, rest)
    upright = still.t() if transposed else still
    near, weights = torch.empty(upright.shape), WEIGHTS[name]
    weights.dense(weights.quantize(upright), near)  # type: ignore[misc]
    put(dense, near.t() if transposed else near, rest)
    return dense.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("form", FORMS)
def test_quantized_weights_compute_what_the_dequantized_weight_does(form: str, name: str, dtype: torch.dtype) -> None:
    model, index_map = model_and_index_map(form)
    transposed = form.startswith("transposed")
    full = {name: param.detach().clone() for name, param in model.named_parameters()}
    weight = dequantized(full["0.weight"], index_map["0.weight"], dtype, name=name, transposed=transposed).requires_grad_()
    bias = full["0.bias"].to(dtype).requires_grad_()
    placement = Placement(weights=weights_of(name, dtype))
    trainables = make_partial(model, index_map, placement=placement, frozen=lambda _: False)
    assert model[0].matrix.weights.name == name  # type: ignore[index]
    x = torch.randn(2, 3, 12 if "columns" in form else 8).to(dtype)
    x_partial, x_dense = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = model(x_partial), F.linear(x_dense, weight.t() if transposed else weight, bias)
    torch.testing.assert_close(out, expected)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)  # scoring makes the same weight
    out.float().sin().sum().backward()
    expected.float().sin().sum().backward()
    torch.testing.assert_close(x_partial.grad, x_dense.grad)
    wanted = {"0.weight": weight.grad, "0.bias": bias.grad}
    assert {trainable.name for trainable in trainables} == set(wanted)
    for trainable in trainables:
        gradient = wanted[trainable.name]
        assert gradient is not None
        assert trainable.grad_param.grad is not None
        assert (trainable.grad_param.grad.dtype, trainable.grad_param.grad.shape) == (torch.float32, trainable.grad_param.shape)
        torch.testing.assert_close(trainable.grad_param.grad.to(dtype), take(gradient, index_map.get(trainable.name, {})))


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("form", FORMS)
def test_a_step_of_quantized_weights_trains_the_masters_and_no_code(form: str, name: str) -> None:
    model, index_map = model_and_index_map(form)
    transposed = form.startswith("transposed")
    full = {name: param.detach().clone() for name, param in model.named_parameters()}
    optimizer = Optimizer(
        make_partial(model, index_map, placement=Placement(weights=WEIGHTS[name]), frozen=lambda _: False), sgd(momentum=0.9)
    )
    optimizer.lr = 0.1
    parts = {part: tensor.clone() for part, tensor in model[0].matrix.parts.items()}  # type: ignore[index]
    x = torch.randn(2, 12 if "columns" in form else 8).bfloat16()
    model(x).float().square().sum().backward()
    optimizer.step()
    moved = next(trainable.master for trainable in optimizer.trainables if trainable.name == "0.weight")
    assert not torch.equal(moved, take(full["0.weight"], index_map["0.weight"]))
    assert all(torch.equal(tensor, parts[part]) for part, tensor in model[0].matrix.parts.items())  # type: ignore[index]
    after = full["0.weight"].clone()
    put(after, moved, index_map["0.weight"])
    weight = dequantized(after, index_map["0.weight"], torch.bfloat16, name=name, transposed=transposed)
    bias = model[0].bias  # type: ignore[index]
    torch.testing.assert_close(model(x), F.linear(x, weight.t() if transposed else weight, bias))


@pytest.mark.parametrize("name", QUANTIZED)
def test_frozen_layers_and_embeddings_are_quantized_and_what_trains_whole_is_not(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 12), Conv1D(12, 12), nn.LayerNorm(12), nn.Linear(12, 3))
    full = {name: param.detach().clone() for name, param in model.named_parameters()}
    still = {"0.weight", "1.weight", "1.bias", "2.weight"}
    trainables = make_partial(model, {}, placement=Placement(weights=WEIGHTS[name]), frozen=lambda n: n in still)
    embedding, linear, transposed, norm, head = model
    assert isinstance(embedding, QuantizedEmbedding)
    assert isinstance(linear, PartialLinear)
    assert isinstance(transposed, PartialLinear)
    matrices = [module.matrix for module in (embedding, linear, transposed)]
    assert [matrix.shape for matrix in matrices if matrix is not None] == [(20, 8), (12, 8), (12, 12)]
    assert linear.bias is not None
    assert (linear.part, linear.bias.dtype, norm.weight.dtype, head.weight.dtype) == (None, *(torch.bfloat16,) * 3)
    assert {trainable.name for trainable in trainables} == set(full) - still
    assert all(torch.equal(trainable.master, full[trainable.name]) for trainable in trainables)
    ids = torch.randint(0, 20, (2, 5), generator=torch.Generator().manual_seed(1))
    none = {0: torch.tensor([], dtype=torch.int64)}
    whole = {n: dequantized(full[n], none, torch.bfloat16, name=name) for n in ("0.weight", "1.weight")}
    whole["2.weight"] = dequantized(full["2.weight"].t(), none, torch.bfloat16, name=name)
    short = {n: param.bfloat16() for n, param in full.items()} | whole
    hidden = F.linear(F.embedding(ids, short["0.weight"]), short["1.weight"], short["1.bias"])
    hidden = F.layer_norm(F.linear(hidden, short["2.weight"], short["2.bias"]), (12,), short["3.weight"], short["3.bias"])
    torch.testing.assert_close(model(ids), F.linear(hidden, short["4.weight"], short["4.bias"]))


class Scaled(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return 8 * super().forward(ids)


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("table", [Scaled(20, 8), nn.Embedding(20, 8, max_norm=0.5)], ids=["scaled", "renormed"])
def test_a_frozen_table_that_does_more_than_look_up_stays_as_it_is(name: str, table: nn.Embedding) -> None:
    model, ids = nn.Sequential(copy.deepcopy(table)), torch.arange(20)
    wanted = copy.deepcopy(table)(ids).detach()
    assert make_partial(model, {}, placement=Placement(weights=WEIGHTS[name]), frozen=lambda _: True) == []
    torch.testing.assert_close(model(ids).float(), wanted, rtol=1e-2, atol=1e-2)


class Queries(nn.Module):
    """Calls a layer by a plain list, and reads a table as a whole: so do models with queries in transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(20, 8), nn.Linear(8, 12)
        self.layers = [self.layer, nn.Identity()]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x + self.table.weight.mean()


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_layer_in_a_list_is_exchanged_there_and_a_table_is_read_as_a_whole(name: str) -> None:
    torch.manual_seed(0)
    model, x = Queries(), torch.randn(3, 8)
    wanted = model(x).detach()
    make_partial(model, {}, placement=Placement(weights=weights_of(name, torch.float32)), frozen=lambda _: True)
    assert model.layers[0] is model.layer
    assert all(param.ndim == 1 for param in model.parameters())
    found = model(x)
    assert not found.requires_grad
    torch.testing.assert_close(found, wanted, rtol=0.2, atol=0.2)


def test_nothing_of_a_quantized_layer_that_is_still_asks_for_a_gradient() -> None:
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 4))
    make_partial(
        model, {}, placement=Placement(weights=weights_of("int8", torch.float32)), frozen=lambda name: name.startswith("0")
    )
    assert not model[0](torch.randn(3, 8)).requires_grad
    assert saved_by(model[:1], torch.randn(3, 8)) == []


@pytest.mark.parametrize("name", ["bert", "timm-vit", "distilbert", "dinov2-swiglu"])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_masters_are_the_full_models_values_before_training(name: str, weights: str) -> None:
    model, spec = pico(name)
    layout = Layout.of_model(build.adapter_of(spec), model)
    full = {n: p.detach().clone() for n, p in model.named_parameters()}
    axes = mask_axes(layout.axes)
    generator = torch.Generator().manual_seed(1)
    chosen = {axis.name: torch.rand(axis.size, generator=generator) < 0.3 for axis in axes}
    index_map = indices(axes, chosen, shapes_of(full))
    placement = Placement(weights=WEIGHTS[weights])
    trainables = make_partial(model, index_map, placement=placement, frozen=lambda n: n in layout.embeddings)
    assert {trainable.name for trainable in trainables} == set(full) - set(layout.embeddings)
    for trainable in trainables:
        assert trainable.master.dtype == torch.float32
        assert torch.equal(trainable.master, take(full[trainable.name], index_map.get(trainable.name, {})))
    assert any(isinstance(module, QuantizedEmbedding) for module in model.modules()) == (
        weights in QUANTIZED and spec.image is None
    )


def storage_bytes(tensors: list[Tensor]) -> int:
    """Bytes of the storages of these tensors, each counted once however many views there are."""
    found = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(found.values())


def held(model: nn.Module, trainables: list[Trainable]) -> list[Tensor]:
    return [
        *model.parameters(),
        *model.buffers(),
        *(trainable.own_master for trainable in trainables if trainable.own_master is not None),
    ]


@pytest.mark.parametrize("form", FORMS)
def test_scattered_entries_in_fp32_are_held_once(form: str) -> None:
    model, index_map = model_and_index_map(form)
    dense_bytes = storage_bytes(list(model.parameters()))
    trainables = make_partial(model, index_map, frozen=lambda _: False)
    index_bytes = storage_bytes([buffer for buffer in model.buffers() if buffer.dtype == torch.int64])
    proxies = [trainable.grad_param for trainable in trainables if trainable.own_master is None]
    assert len(proxies) == (0 if form == "side by side" else len(index_map))
    assert all(proxy.untyped_storage().nbytes() == 4 for proxy in proxies)
    assert index_bytes == (0 if form == "side by side" else ROWS.nbytes)
    assert storage_bytes(held(model, trainables)) == dense_bytes + index_bytes + 4 * len(proxies)


@pytest.mark.parametrize(
    ("name", "forward_weight"),
    [  # the whole in bf16; or codes, scales and where the frozen rows belong
        ("bf16", 2 * 128 * 64),
        ("int8", 96 * 64 + 4 * 96 + 8 * 96),
        ("nf4", 96 * 64 // 2 + 96 + 4 + 4 + 8 * 96),
    ],
)
def test_short_weights_cost_their_own_size_and_the_masters(name: str, forward_weight: int) -> None:
    model = nn.Sequential(nn.Linear(64, 128, bias=False))
    index = torch.arange(0, 128, 4)
    placement = Placement(weights=WEIGHTS[name])
    trainables = make_partial(model, {"0.weight": {0: index}}, placement=placement, frozen=lambda _: False)
    assert storage_bytes(held(model, trainables)) == forward_weight + 4 * 32 * 64 + 8 * 32


@pytest.mark.parametrize("form", ["rows", "columns", "transposed rows", "transposed columns"])
def test_gradients_of_proxies_accumulate_and_are_clipped_as_dense_ones(form: str) -> None:
    model, index_map = model_and_index_map(form)
    dense = copy.deepcopy(model)
    batches = [torch.randn(3, 12 if "columns" in form else 8) for _ in range(2)]
    trainables = make_partial(model, index_map, frozen=lambda _: False)
    for x in batches:
        model(x).square().sum().backward()
        dense(x).square().sum().backward()
    wanted = [take(param.grad, index_map.get(name, {})) for name, param in dense.named_parameters() if param.grad is not None]
    norm = torch.stack([gradient.norm() for gradient in wanted]).norm()
    clipped = nn.utils.clip_grad_norm_([trainable.grad_param for trainable in trainables], 0.5)
    torch.testing.assert_close(clipped, norm)
    for trainable, gradient in zip(trainables, wanted, strict=True):
        torch.testing.assert_close(trainable.grad_param.grad, gradient * (0.5 / norm))


RULES: dict[str, UpdateRule] = {
    "sgd": sgd(momentum=0.9),
    "plain sgd": sgd(momentum=0.0),
    "adamw": adamw(betas=(0.9, 0.99), eps=1e-8),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("form", ["rows", "columns", "transposed rows", "transposed columns"])
def test_steps_with_proxies_are_those_with_a_compact_copy_to_the_bit(form: str, rule: str) -> None:
    model, index_map = model_and_index_map(form)
    full = {name: param.detach().clone() for name, param in model.named_parameters()}
    trainables = make_partial(model, index_map, frozen=lambda _: False)
    copies = []
    for trainable in trainables:
        grad_param = nn.Parameter(take(full[trainable.name], index_map.get(trainable.name, {})).clone())
        copies.append(Trainable(trainable.name, grad_param, grad_param.detach()))
    optimizers = [Optimizer(tensors, RULES[rule], weight_decay=0.1) for tensors in (trainables, copies)]
    for optimizer in optimizers:
        optimizer.lr = 0.05
    for _ in range(4):
        model(torch.randn(3, 12 if "columns" in form else 8)).square().sum().backward()
        for ours, theirs in zip(trainables, copies, strict=True):
            assert ours.grad_param.grad is not None
            theirs.grad_param.grad = ours.grad_param.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for ours, theirs in zip(trainables, copies, strict=True):
        assert torch.equal(ours.master, theirs.master)
        put(full[ours.name], theirs.master, index_map.get(ours.name, {}))
    assert torch.equal(model[0].weight, full["0.weight"])  # type: ignore[index]
    assert torch.equal(model[0].bias, full["0.bias"])  # type: ignore[index]


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("form", FORMS)
def test_offloaded_masters_take_the_same_steps_to_the_bit(form: str, name: str) -> None:
    x = torch.randn(3, 2, 12 if "columns" in form else 8, dtype=WEIGHTS[name].dtype)
    moved = {}
    for offload in (False, True):
        model, index_map = model_and_index_map(form)
        placement = Placement(weights=WEIGHTS[name], offload=offload)
        trainables = make_partial(model, index_map, placement=placement, frozen=lambda _: False)
        optimizer = Optimizer(trainables, adamw(betas=(0.9, 0.999), eps=1e-8))
        optimizer.lr = 0.01
        for part in x:
            model(part).float().square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        moved[offload] = {trainable.name: trainable.master for trainable in trainables} | {"out": model(x[0]).detach()}
    for param, tensor in moved[False].items():
        assert torch.equal(moved[True][param], tensor), param


@pytest.mark.parametrize(
    ("name", "fp32_parts"), [("bf16", []), ("int8", ["scale"]), ("nf4", ["largest", "mean"])], ids=["bf16", "int8", "nf4"]
)
@pytest.mark.parametrize("form", FORMS)
def test_what_is_offloaded_is_not_on_the_device(form: str, name: str, fp32_parts: list[str]) -> None:
    model, index_map = model_and_index_map(form)
    trainables = make_partial(
        model,
        index_map,
        placement=Placement(device="meta", weights=WEIGHTS[name], offload=True),
        frozen=lambda _: False,
    )
    optimizer = Optimizer(trainables, adamw(betas=(0.9, 0.999), eps=1e-8))
    for trainable in trainables:
        assert trainable.own_master is not None
        assert (trainable.device.type, trainable.own_master.dtype) == ("cpu", torch.float32)
        assert trainable.grad_param.device.type == "meta"
        assert all(moment.device.type == "cpu" for moment in optimizer.moments[trainable.name].values())
    named = dict([*model.named_parameters(), *model.named_buffers()])
    fp32 = {n for n, t in named.items() if t.dtype == torch.float32}
    proxies = {n for n in fp32 if named[n].untyped_storage().nbytes() <= 4 and named[n].numel() > 1}
    assert fp32 - proxies == {f"0.matrix.part_{part}" for part in fp32_parts}


@pytest.mark.parametrize(
    ("form", "name", "still", "said"),
    [
        ("rows", "fp32", False, "float32, 4 rows trainable"),
        ("columns", "fp32", False, "float32, 4 columns trainable"),
        ("transposed rows", "int8", False, "int8, 4 rows trainable"),
        ("rows", "nf4", True, "nf4, frozen"),
    ],
)
def test_a_layer_says_what_of_it_trains_and_its_indices_are_no_part_of_a_checkpoint(
    form: str, name: str, still: bool, said: str
) -> None:
    model, index_map = model_and_index_map(form)
    make_partial(model, {} if still else index_map, placement=Placement(weights=WEIGHTS[name]), frozen=lambda _: still)
    assert model[0].extra_repr() == said  # type: ignore[index]
    assert not {"0.place", "0.rest"} & set(model.state_dict())


def test_a_bias_does_not_move_in_part_beside_columns() -> None:
    model, index_map = model_and_index_map("columns")
    with pytest.raises(TypeError, match=r"0\.bias would be trainable at other rows than 0\.weight"):
        make_partial(model, {**index_map, "0.bias": {0: ROWS}}, frozen=lambda _: False)


@pytest.mark.parametrize("offload", [False, True])
def test_masters_have_memory_of_their_own_and_whole_numbers_keep_their_type(offload: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 12), nn.LayerNorm(12))
    model.register_parameter("steps", nn.Parameter(torch.arange(3), requires_grad=False))
    before = {param.untyped_storage().data_ptr() for param in model.parameters()}
    dtype = torch.float32 if offload else torch.bfloat16
    trainables = make_partial(
        model, {}, placement=Placement(weights=weights_of("fp32", dtype), offload=offload), frozen=lambda name: name == "steps"
    )
    masters = {
        trainable.own_master.untyped_storage().data_ptr() for trainable in trainables if trainable.own_master is not None
    }
    assert len(masters) == 4
    assert not masters & (before | {param.untyped_storage().data_ptr() for param in model.parameters()})
    assert model.get_parameter("steps").dtype == torch.int64
