"""A parameter of several names is one: one tensor, one slot, one step, wherever it goes (I11)."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recap_cli.core.adapter import Adapter, find_axes
from recap_cli.core.axes import Axis, Cut, check_axes, shapes_of
from recap_cli.core.streaming import streamed
from recap_cli.core.surgery import IndexMap, cut_model, indices, put, take
from recap_cli.core.ties import Once, names_of
from recap_cli.machine.accounting import storage_bytes
from recap_cli.plugins.tasks.classification import TEXT_CLASSIFICATION
from recap_cli.trainable.build import Trainable, make_partial, whole_parameters
from recap_cli.trainable.frozen_weights import QuantizedEmbedding
from recap_cli.trainable.linear import PartialLinear
from recap_cli.trainable.optim import Optimizer, adamw, sgd
from recap_cli.trainable.placement import Placement
from recap_cli.training.loop import Steps, train
from tests.trainable.test_build import Conv1D
from tests.weights import QUANTIZED, WEIGHTS

WORDS, WIDTH = 12, 8
TABLE, UP = ["table.weight", "out.weight"], ["blocks.0.up.weight", "blocks.1.up.weight"]
ROWS = torch.tensor([1, 2, 5])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 6), nn.Linear(6, WIDTH)
        self.register_buffer("scale", torch.tensor([1 / 3]))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(torch.tanh(self.up(x))) * self.scale.to(x.dtype)
        return out


class Tied(nn.Module):
    """A table tied to the output layer, and two blocks that share one matrix, its bias and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS, bias=False)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.out.weight = self.table.weight
        first, second = self.blocks
        second.up.weight, second.up.bias, second.scale = first.up.weight, first.up.bias, first.scale

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.out(x)
        return out


def tied() -> Tied:
    torch.manual_seed(0)
    return Tied()


def batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, WORDS, (6,), generator=generator) for _ in range(5)]
    return [{"ids": one, "labels": one.roll(1)} for one in ids]


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.float(), labels)


INDEX_MAPS: dict[str, IndexMap] = {
    "whole": {},
    "rows": {UP[0]: {0: ROWS}, "blocks.0.up.bias": {0: ROWS}},
    "rows side by side": {UP[0]: {0: torch.arange(2, 5)}, "blocks.0.up.bias": {0: torch.arange(2, 5)}},
    "columns": {UP[0]: {1: ROWS}},
}


def stepped_by_torch(
    index_map: IndexMap, make: Callable[[Any], torch.optim.Optimizer], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tied model after five steps of torch's own optimizer on fp32 masters; entries that do not move have no gradient."""
    model = tied()
    masters = {name: param.detach().clone().requires_grad_() for name, param in model.named_parameters()}
    params = dict(model.to(dtype).named_parameters())
    optimizer = make(list(masters.values()))
    for batch in batches():
        loss(model(batch["ids"]), batch["labels"]).backward()
        for name, param in params.items():
            grad, kept = param.grad.float(), index_map.get(name, {})  # type: ignore[union-attr]
            masters[name].grad = torch.zeros_like(grad)
            put(masters[name].grad, take(grad, kept), kept)
        optimizer.step()
        with torch.no_grad():
            for name, param in params.items():
                param.copy_(masters[name])
                param.grad = None
    return {name: take(master.detach(), index_map.get(name, {})) for name, master in masters.items()}


def stepped(index_map: IndexMap, rule: Any, *, fused: bool = False, **forms: Any) -> list[Trainable]:
    model = tied()
    trainables = make_partial(model, index_map, frozen=lambda _: False, placement=Placement(**forms))
    optimizer = Optimizer(trainables, rule)
    assert sum(len(moments) for moments in optimizer.moments.values()) == len(rule.idle_decay) * len(trainables)
    call = lambda batch: model(batch["ids"])  # noqa: E731
    train(call, TEXT_CLASSIFICATION, optimizer, batches(), steps=Steps(rate=lambda _: 0.05, fused_backward=fused))
    return trainables


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("form", INDEX_MAPS)
def test_i11_a_tied_parameter_steps_once_as_torchs_own_optimizer_steps_it(form: str, offload: bool, fused: bool) -> None:
    index_map = INDEX_MAPS[form]
    wanted = stepped_by_torch(index_map, lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0, foreach=False), torch.float32)
    trainables = stepped(index_map, adamw(betas=(0.9, 0.999), eps=1e-8), fused=fused, offload=offload)
    assert [trainable.name for trainable in trainables] == list(wanted)
    for trainable in trainables:
        torch.testing.assert_close(trainable.master, wanted[trainable.name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["bf16", "int8"])
@pytest.mark.parametrize("form", INDEX_MAPS)
def test_i11_holds_with_weights_in_bf16_and_int8(form: str, name: str) -> None:
    index_map = INDEX_MAPS[form]
    wanted = stepped_by_torch(index_map, lambda p: torch.optim.SGD(p, lr=0.05), torch.bfloat16)
    trainables = stepped(index_map, sgd(momentum=0.0), weights=WEIGHTS[name])
    start = dict(tied().named_parameters())
    assert [trainable.name for trainable in trainables] == list(wanted)
    for trainable in trainables:
        before = take(start[trainable.name].detach(), index_map.get(trainable.name, {}))
        way, difference = (wanted[trainable.name] - before).norm(), (trainable.master - wanted[trainable.name]).norm()
        assert float(difference) < 0.05 * float(way), (
            trainable.name
        )  # a use that is left out of the gradient is about half of it


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("form", INDEX_MAPS)
def test_it_is_held_once_on_every_device(form: str, name: str, device: str) -> None:
    model = tied()
    make_partial(model, INDEX_MAPS[form], placement=Placement(device, WEIGHTS[name]), frozen=lambda _: False)
    first, second = (block.up for block in model.blocks)
    assert model.table.weight is model.out.weight
    if form == "whole":
        assert first.weight is second.weight
    else:
        assert isinstance(first, PartialLinear)
        assert first.part is second.part
        assert first.weight is second.weight
        assert first.matrix is second.matrix
        assert first.bias_part is second.bias_part
    assert first.bias is second.bias
    assert model.blocks[0].scale is model.blocks[1].scale


@pytest.mark.parametrize(("names", "trains"), [([], True), (TABLE[:1], True), (TABLE[1:], True), (TABLE, False)])
def test_it_is_frozen_only_if_all_of_its_names_are(names: list[str], trains: bool) -> None:
    trainables = make_partial(tied(), {}, frozen=lambda name: name in names)
    assert [trainable.name for trainable in trainables].count("table.weight") == trains
    assert "out.weight" not in [trainable.name for trainable in trainables]


@pytest.mark.parametrize("name", QUANTIZED)
def test_frozen_and_quantized_it_has_one_set_of_parts(name: str) -> None:
    model, ids = tied(), torch.arange(WORDS)
    wanted = model(ids).detach()
    make_partial(model, {}, placement=Placement(weights=WEIGHTS[name]), frozen=lambda _: True)
    assert isinstance(model.table, QuantizedEmbedding)
    assert isinstance(model.out, PartialLinear)
    assert model.table.matrix is model.out.matrix
    assert float((model(ids) - wanted).norm() / wanted.norm()) < {"int8": 0.05, "nf4": 0.3}[name]
    shapes = [(WORDS, WIDTH), (6, WIDTH), (WIDTH, 6), (WIDTH, 6)]  # of the table, of both ups, of each down
    held = sum(WEIGHTS[name].nbytes(shape) for shape in shapes) + 2 * (6 + 2 * WIDTH) + 4  # type: ignore[misc]  # biases, buffer
    assert storage_bytes([*model.parameters(), *model.buffers()]) == held


class Other(nn.Module):
    """Reads a matrix as no linear layer does."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


@pytest.mark.parametrize("order", ["first", "last"])
def test_what_not_all_of_its_layers_can_read_as_codes_is_held_dense_in_all(order: str) -> None:
    layer = nn.Linear(4, 4)
    other = Other(layer.weight)
    model = nn.Sequential(*([layer, other] if order == "first" else [other, layer]))
    make_partial(model, {}, placement=Placement(weights=WEIGHTS["int8"]), frozen=lambda _: True)
    assert model[0].weight is model[1].weight
    assert model[0].weight.dtype == torch.bfloat16


@pytest.mark.parametrize("other", ["table", "layer", "transposed"])
def test_of_what_other_layers_read_otherwise_no_part_is_trainable(other: str) -> None:
    layer, transposed = nn.Linear(4, 4), Conv1D(4, 4)
    table = nn.Embedding(4, 4)
    held: dict[str, Any] = {"table": table, "layer": Other(layer.weight), "transposed": transposed}
    held[other].weight = layer.weight
    model = nn.Sequential(layer, held[other])
    axes = [Axis("rows", "neurons", 0, 4, (Cut("0.weight", 0), Cut("0.bias", 0)))]
    assert whole_parameters(model, axes) == ["0.weight", "0.bias"]  # the bias is trainable with its rows only
    held[other].weight = nn.Parameter(torch.zeros(4, 4))
    assert whole_parameters(model, axes) == []
    held[other].weight = layer.weight
    with pytest.raises(TypeError, match="would"):
        make_partial(
            model,
            {"0.weight": {0: torch.tensor([1])}},
            placement=Placement(weights=WEIGHTS["int8"]),
            frozen=lambda _: False,
        )


def test_rows_that_are_looked_up_are_not_all_that_is_held_of_a_tied_table() -> None:
    model, ids = tied(), torch.tensor([0, 3])
    wanted = model(ids)
    make_partial(model, {}, frozen=lambda _: True, used_rows={"table.weight": ids})
    assert torch.equal(model(ids), wanted)
    assert model.table.weight is model.out.weight


def test_a_module_of_two_names_is_replaced_under_both() -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    dense, x = copy.deepcopy(model), torch.randn(3, 4)
    (weight, bias) = make_partial(model, {"0.weight": {0: torch.tensor([0, 2])}}, frozen=lambda _: False)
    assert model[0] is model[2]
    model(x).sum().backward()
    dense(x).sum().backward()
    torch.testing.assert_close(weight.grad_param.grad, dense[0].weight.grad[[0, 2]])
    torch.testing.assert_close(bias.grad_param.grad, dense[0].bias.grad)


def neurons(*params: str) -> Axis:
    return Axis("blocks.neurons", "neurons", 0, 6, tuple(Cut(name, int("down" in name)) for name in params))


CUT = [f"blocks.{i}.{name}" for i in range(2) for name in ("up.weight", "up.bias", "down.weight")]


@pytest.mark.parametrize("params", [CUT, CUT[2:], [*CUT[3:], CUT[2]]])
def test_pruned_through_any_of_its_names_it_stays_one(params: list[str]) -> None:
    model, ids = tied(), torch.arange(WORDS)
    (axis,) = find_axes(Adapter((), (), (), axes=lambda _: [neurons(*params)]), model)
    assert {cut.param for cut in axis.cuts} == {*CUT[:3], CUT[5]}
    assert len(axis.cuts) == 4
    shapes = shapes_of(model.named_parameters())
    assert check_axes([axis], shapes) == []
    keep = torch.tensor([True, False, True, True, False, True])
    with torch.no_grad():
        for block in model.blocks:
            block.down.weight[:, ~keep] = 0
    wanted, before = model(ids), names_of(model)
    cut_model(model, indices([axis], {axis.name: keep}, shapes))
    torch.testing.assert_close(model(ids), wanted)
    assert names_of(model) == before
    assert [(block.up.out_features, block.down.in_features) for block in model.blocks] == [(4, 4), (4, 4)]


def test_two_axes_that_cut_one_parameter_by_its_two_names_are_told() -> None:
    model = tied()
    axes = [Axis(f"blocks.{i}.neurons", "neurons", i, 6, (Cut(UP[i], 0), Cut(f"blocks.{i}.down.weight", 1))) for i in range(2)]
    found = find_axes(Adapter((), (), (), axes=lambda _: axes), model)
    assert check_axes(found, shapes_of(model.named_parameters())) == [
        f"blocks.0.neurons and blocks.1.neurons both own entries of {UP[0]} along dimension 0"
    ]


def test_streamed_it_has_one_gradient_and_comes_back_as_one() -> None:
    plain, model = tied().eval(), tied().eval()
    before, batch = names_of(model), batches()[0]
    loss(plain(batch["ids"]), batch["labels"]).backward()
    with streamed(model, ["blocks.0", "blocks.1"], "cpu"):
        loss(model(batch["ids"]), batch["labels"]).backward()
    for (name, param), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(param.grad, other.grad, msg=name)
    assert names_of(model) == before


@pytest.mark.parametrize("name", WEIGHTS)
def test_buffers_keep_their_type(name: str) -> None:
    model = tied()
    model.register_buffer("round_plans", 1.0 / 10_000 ** (torch.arange(0, 64, 2) / 64))
    round_plans = model.round_plans.clone()
    make_partial(model, {}, placement=Placement(weights=WEIGHTS[name]), frozen=lambda _: True)
    assert torch.equal(model.round_plans, round_plans)  # in bf16 RoPE would be 1.8 rad off at position 4,095
    assert model.blocks[0].scale.dtype == torch.float32


def test_a_tied_parameter_that_would_be_two_things_is_named_by_those_that_hold_it() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(4, 3), "head": nn.Linear(3, 4, bias=False)})
    model["head"].weight = model["table"].weight
    once = Once(model)
    assert once.make(model["head"].weight, "frozen", lambda: 1) == once.make(model["table"].weight, "frozen", lambda: 2) == 1
    with pytest.raises(
        TypeError, match=r"tied \(Embedding\.weight and Linear\.weight\) would be frozen in one and codes in the"
    ):
        once.make(model["table"].weight, "codes", lambda: 3)
