"""A streamed model gives the same logits and scores, holds one block at a time, and is left as it was; on every pico model."""

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from recap_cli import registry
from recap_cli.core.adapter import find_axes
from recap_cli.core.axes import Axis, Cut
from recap_cli.core.blocks import block_paths
from recap_cli.core.criterion import Criterion
from recap_cli.core.importance import group_scores
from recap_cli.core.streaming import streamed
from recap_cli.errors import ModelError
from recap_cli.models import build
from tests.core.test_importance import losses_of, prepared
from tests.decoders import ADAPTERS, decoder
from tests.pico import LABELS, PICO, logits_for


class Block(nn.Module):
    """Takes and gives nested tensors, shares a weight with itself, has one it does not use, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.idle = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.register_buffer("shift", torch.ones(4))

    def forward(self, pair: tuple[Tensor, Tensor], *, scale: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        x = self.second(torch.tanh(self.first(pair[0] + pair[1]))) * scale["by"] + self.shift
        return x, {"count": scale["count"], "sum": x.sum(-1), "whole": x.detach().long()}


class Toy(nn.Module):
    """Two blocks, of which the second has its bias in common with the head that stands outside."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, 4)
        self.blocks[1].first.bias = self.head.bias  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            y, more = block((x, x.square()), scale={"by": x, "count": 3})
            x = y + more["sum"][:, None] * more["count"] / 9
        return self.head(x)


def toy() -> Toy:
    torch.manual_seed(0)
    return Toy().eval()


TOY_BLOCKS = ["blocks.0", "blocks.1"]


def state_of(model: nn.Module) -> dict[str, tuple[int, int, str, Tensor]]:
    """Of every tensor: which object and which memory it is, its device, and its bits."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: (id(t), t.data_ptr(), t.device.type, t.detach().clone()) for name, t in named}


def assert_as_before(model: nn.Module, before: dict[str, tuple[int, int, str, Tensor]]) -> None:
    after = state_of(model)
    assert all(after[name][:3] == before[name][:3] and torch.equal(after[name][3], before[name][3]) for name in before)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("name", sorted(PICO))
def test_scores_and_logits_are_those_of_the_plain_model_and_nothing_is_left_behind(name: str) -> None:
    model, axes, data, spec = prepared(name)
    blocks, forward, before = block_paths(model, axes), logits_for(spec), state_of(model)
    assert len(blocks) == (4 if name == "swin" else 2)
    for criterion in (registry.load("criteria", "taylor"), registry.load("criteria", "fisher")):
        assert isinstance(criterion, Criterion)
        for batches in (data[:1], data):
            plain = group_scores(model, axes, criterion, losses_of(model, spec, batches))
            with streamed(model, blocks, "cpu"):
                found = group_scores(model, axes, criterion, losses_of(model, spec, batches))
            for axis in axes:
                torch.testing.assert_close(found[axis.name], plain[axis.name], rtol=1e-5, atol=0)
    logits = forward(model, data[0][0])
    with streamed(model, blocks, "cpu"):
        torch.testing.assert_close(forward(model, data[0][0]), logits, rtol=1e-5, atol=1e-7)  # copies lie at other addresses
        with torch.inference_mode():
            torch.testing.assert_close(forward(model, data[0][0]), logits, rtol=1e-5, atol=1e-7)
    assert_as_before(model, before)


def test_an_exception_inside_leaves_the_model_as_it_was() -> None:
    model, axes, data, spec = prepared("bert")
    before = state_of(model)

    def stopped(each: bool) -> Iterator[tuple[Tensor, float]]:
        yield from losses_of(model, spec, data[:1])(each)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), streamed(model, block_paths(model, axes), "cpu"):
        group_scores(model, axes, Criterion("mean", lambda weight, grad: grad.square()), stopped)
    assert_as_before(model, before)
    assert all(param.grad is None for param in model.parameters())


def test_a_forward_that_the_block_had_for_itself_is_run_and_given_back() -> None:
    model = toy()
    block, calls = model.blocks[0], []
    own = block.forward = lambda *args, **kwargs: (calls.append(args), Block.forward(block, *args, **kwargs))[1]  # type: ignore
    with streamed(model, TOY_BLOCKS, "cpu"):
        model(torch.ones(2, 4))
        assert len(calls) == 1
        assert block.forward is not own
    assert block.forward is own


def test_with_one_batch_no_two_blocks_hold_gradients_at_once() -> None:
    model, axes, data, spec = prepared("vit")
    held: list[set[str]] = []

    def score(weight: Tensor, grad: Tensor) -> Tensor:
        assert grad.device.type == "cpu"
        held.append({name.split(".")[2] for name, p in model.named_parameters() if p.grad is not None})
        return grad.square()

    with streamed(model, block_paths(model, axes), "cpu"):
        group_scores(model, axes, Criterion("mean", score), losses_of(model, spec, data[:1]))
    assert {len(layers) for layers in held} == {1}
    assert held[0] == {"1"}
    assert held[-1] == {"0"}


class Counting(nn.Module):
    """Writes into its buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)  # type: ignore[operator]
        return self.layer(x)


def test_what_a_block_writes_into_its_buffers_is_dropped() -> None:
    model = nn.Sequential(Counting()).eval()
    with streamed(model, ["0"], "cpu"):
        model(torch.ones(1, 2))
    assert float(model[0].calls) == 0.0  # type: ignore[arg-type]


class Copies(TorchDispatchMode):
    """Which copies of the blocks' weights are alive whenever another one is made."""

    def __init__(self, model: nn.Module, blocks: list[str]) -> None:
        super().__init__()
        self.block_of = {p.data_ptr(): path for path in blocks for p in model.get_submodule(path).parameters()}
        self.alive: weakref.WeakKeyDictionary[Tensor, str] = weakref.WeakKeyDictionary()
        self.seen: list[tuple[frozenset[str], int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and (block := self.block_of.get(args[0].data_ptr())):
            self.alive[out] = block
            self.seen.append((frozenset(self.alive.values()), len(self.alive)))
        return out


def test_no_more_than_one_block_is_on_the_device_at_any_moment() -> None:
    model, axes, data, spec = prepared("timm-vit")
    blocks = block_paths(model, axes)
    criterion = registry.load("criteria", "taylor")
    assert isinstance(criterion, Criterion)
    with streamed(model, blocks, "cpu"), Copies(model, blocks) as copies:
        group_scores(model, axes, criterion, losses_of(model, spec, data))
    whole = len(list(model.get_submodule(blocks[0]).parameters()))
    assert {len(layers) for layers, _ in copies.seen} == {1}
    assert max(count for _, count in copies.seen) == whole
    assert len(copies.seen) == whole * len(blocks) * 2 * len(data)  # fetched in the forward and in the backward, no more
    assert not copies.alive


THERE = "lazy"  # a device that needs no driver where tensors are fake: shapes and devices are checked, nothing is computed


def put_there(model: nn.Module, blocks: list[str], mode: FakeTensorMode) -> None:
    """Make every tensor of `model` fake. Those outside `blocks` are on the device at once, for fake ones cannot move there."""
    for path, module in model.named_modules():
        device = "cpu" if any(f"{path}.".startswith(f"{block}.") for block in blocks) else THERE
        for tensors in (module._parameters, module._buffers):
            for key, tensor in tensors.items():
                if tensor is not None:
                    fake = mode.from_tensor(tensor).detach().to(device)
                    tensors[key] = nn.Parameter(fake) if isinstance(tensor, nn.Parameter) else fake


@pytest.mark.parametrize("name", ["bert", "distilbert", "vit", "dinov2-swiglu", "timm-vit"])
def test_weights_go_to_another_device_and_their_gradients_come_back(name: str) -> None:
    model, axes, data, spec = prepared(name)
    blocks = block_paths(model, axes)
    with FakeTensorMode() as mode:
        put_there(model, blocks, mode)
        inputs = {key: mode.from_tensor(tensor).to(THERE) for key, tensor in data[0][0].items()}
        with streamed(model, blocks, THERE):
            for _ in range(2):  # the second is added to the first
                logits = logits_for(spec)(model, inputs)
                logits.sum().backward()
    assert logits.device.type == THERE
    trained = {key: param for key, param in model.named_parameters() if param.grad is not None}
    for key, param in trained.items():
        index_map = "cpu" if any(key.startswith(f"{block}.") for block in blocks) else THERE
        assert param.device.type == param.grad.device.type == index_map  # type: ignore[union-attr]
    assert {cut.param for axis in axes for cut in axis.cuts} <= trained.keys()


def test_buffers_go_to_another_device() -> None:
    model = toy()
    with FakeTensorMode() as mode:
        put_there(model, TOY_BLOCKS, mode)
        with streamed(model, TOY_BLOCKS, THERE):
            model(torch.ones(2, 4, device=THERE)).sum().backward()
        assert model.blocks[0].shift.device.type == "cpu"


def test_the_input_of_a_block_is_freed_by_its_backward() -> None:
    model, kept = toy(), []
    model.blocks[1].register_forward_pre_hook(lambda block, args: kept.append(weakref.ref(args[0][0])))
    with streamed(model, TOY_BLOCKS, "cpu"):
        loss = model(torch.ones(2, 4)).sum()
        assert [ref() is None for ref in kept] == [False]
        loss.backward()
        assert [ref() is None for ref in kept] == [True]


def test_nested_arguments_shared_weights_and_unused_ones_get_the_plain_gradients() -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    plain, model = toy(), toy()
    before = state_of(model)
    entry, streamed_entry = x.clone().requires_grad_(), x.clone().requires_grad_()
    wanted = plain(entry)
    wanted.square().sum().backward()
    with streamed(model, TOY_BLOCKS, "cpu"):
        found = model(streamed_entry)
        found.square().sum().backward()
    assert torch.equal(found, wanted)
    torch.testing.assert_close(streamed_entry.grad, entry.grad)
    for (name, param), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (param.grad is None) == (other.grad is None) == ("idle" in name)
        torch.testing.assert_close(param.grad, other.grad)
    assert_as_before(model, before)


def test_what_is_frozen_gets_no_gradient_and_its_block_still_passes_one_on() -> None:
    model = toy()
    model.blocks[1].requires_grad_(False)
    with streamed(model, TOY_BLOCKS, "cpu"):
        model(torch.ones(2, 4)).sum().backward()
    assert {name.split(".")[1] for name, p in model.blocks.named_parameters("blocks") if p.grad is not None} == {"0"}


def test_what_is_trained_outside_the_blocks_comes_back_to_the_same_tensors() -> None:
    plain, model = toy(), toy()
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    before = state_of(model)

    def train(one: Toy) -> Tensor:
        for _ in range(3):
            one.zero_grad()
            one(x).square().sum().backward()
            with torch.no_grad():
                one.head.weight.sub_(one.head.weight.grad, alpha=0.1)
        return one.head.weight

    with streamed(model, TOY_BLOCKS, "cpu"):
        assert train(model).data_ptr() != before["head.weight"][1]
    torch.testing.assert_close(model.head.weight, train(plain), rtol=1e-5, atol=1e-6)
    after = state_of(model)
    assert all(after[name][:3] == before[name][:3] for name in before)
    assert [name for name in before if not torch.equal(after[name][3], before[name][3])] == ["head.weight"]


def test_without_blocks_the_whole_model_trains_and_comes_back() -> None:
    model = toy()
    before, x = state_of(model), torch.ones(2, 4)
    wanted = model(x)
    with streamed(model, [], "cpu"):
        assert all(t.data_ptr() != before[name][1] for name, t in model.named_parameters())
        assert torch.equal(model(x), wanted)
    assert_as_before(model, before)


def test_a_block_that_drops_at_random_is_refused() -> None:
    model = toy()
    model.blocks[1].idle.train()
    before = state_of(model)
    with streamed(model, TOY_BLOCKS, "cpu"), pytest.raises(ValueError, match="a streamed Block must be in evaluation mode"):
        model(torch.ones(2, 4))
    assert_as_before(model, before)


@pytest.mark.parametrize("name", sorted(ADAPTERS))
def test_a_decoder_with_a_cache_scores_streamed_what_it_scores_unstreamed(name: str) -> None:
    model, spec = decoder(name)
    axes = find_axes(ADAPTERS[name], model)
    data = [(build.example_batch(spec, batch=3, seed=i), torch.arange(3) % len(LABELS)) for i in range(2)]
    criterion = registry.load("criteria", "taylor")
    assert isinstance(criterion, Criterion)
    plain = group_scores(model, axes, criterion, losses_of(model, spec, data))
    with streamed(model, block_paths(model, axes), "cpu"):
        found = group_scores(model, axes, criterion, losses_of(model, spec, data))
    for axis in axes:
        torch.testing.assert_close(found[axis.name], plain[axis.name], rtol=1e-5, atol=0)
    assert not model.config.use_cache


@pytest.mark.parametrize(("name", "block"), [("gpt2", r"transformer\.h\.0 \(GPT2Bl"), ("llama", r"model\.layers\.0 \(LlamaD")])
def test_a_cache_is_refused_by_the_names_of_block_and_argument(name: str, block: str) -> None:
    model, spec = decoder(name)
    axes, batch = find_axes(ADAPTERS[name], model), build.example_batch(spec)
    with (
        streamed(model, block_paths(model, axes), "cpu"),
        pytest.raises(ModelError, match=f"{block}.*its argument cache holds a DynamicCache") as caught,
    ):
        model(**batch, use_cache=True)
    assert "importance.device=cpu" in str(caught.value.hint)


class Changing(nn.Module):
    """Changes what it is given, in the way that `how` says, or not at all."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layer, self.how = nn.Linear(4, 4), how

    def forward(self, x: Tensor, seen: list[Any], *, notes: dict[str, Any]) -> Tensor:
        out = self.layer(x)
        if self.how == "seen":
            seen.append(out)
        if self.how == "notes":
            notes["last"]["out"] = out
        if self.how == "another tensor in notes":
            notes["sum"] = out.sum().detach()
        if self.how == "x":
            x.add_(1)
        if self.how == "a view of x":
            x[:, 0].mul_(2)
        if self.how == "a tensor in notes":
            notes["sum"].add_(out.sum().detach())
        return out


class Around(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.block = Changing(how)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x * 1, [None], notes={"last": {}, "sum": torch.zeros(())})


@pytest.mark.parametrize(
    ("how", "argument"),
    [
        ("seen", "seen"),
        ("notes", "notes"),
        ("x", "x"),
        ("a view of x", "x"),
        ("a tensor in notes", "notes"),
        ("another tensor in notes", "notes"),
    ],
)
def test_an_argument_that_a_block_changes_is_refused(how: str, argument: str) -> None:
    model = Around(how).eval()
    wanted = rf"block \(Changing\) cannot be streamed to a device: its argument {argument} is changed"
    with streamed(model, ["block"], "cpu"), pytest.raises(ModelError, match=wanted) as caught:
        model(torch.ones(2, 4))
    assert caught.value.hint == "compute importance on the CPU, where a block runs once: --set importance.device=cpu"
    assert not any("forward" in vars(module) for module in model.modules())


class Registered:
    """A cache that torch knows how to take apart, as it knows transformers' own."""

    def __init__(self, keys: list[Tensor]) -> None:
        self.keys = keys


pytree.register_pytree_node(Registered, lambda cache: (cache.keys, None), lambda keys, _: Registered(list(keys)))


def test_a_cache_that_torch_can_take_apart_is_refused_as_any_other() -> None:
    model = Around("not at all").eval()
    with streamed(model, ["block"], "cpu"), pytest.raises(ModelError, match="argument seen holds a Registered"):
        model.block(torch.ones(2, 4), Registered([torch.ones(1)]), notes={})


class Writing(nn.Module):
    """A block that adds up how often it runs, and hides the other half of its outputs each time."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, runs: Tensor, shown: Tensor) -> Tensor:
        runs += 1
        shown ^= True
        return self.layer(x) * shown.float() * runs.float()


def test_what_a_block_writes_into_a_mask_is_seen_after_its_forward_and_not_twice() -> None:
    found: list[list[Tensor]] = []
    for streams in (False, True):
        torch.manual_seed(0)
        model = nn.ModuleList([Writing(), Writing()]).eval()
        x, runs, shown = torch.ones(2, 4, requires_grad=True), torch.ones((), dtype=torch.int64), torch.arange(4) % 2 == 0
        with streamed(model, ["0", "1"] if streams else [], "cpu"):
            out = model[1](model[0](x, runs, shown), runs, shown)
            out.sum().backward(retain_graph=True)
            out.sum().backward()
        grads = [param.grad for param in model.parameters()]
        found.append([out.detach(), runs, shown, x.grad, *grads])  # type: ignore[list-item]
    assert int(found[0][1]) == 3
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain)


def test_arguments_that_a_block_leaves_alone_are_streamed() -> None:
    model = Around("not at all").eval()
    wanted = model(torch.ones(2, 4))
    with streamed(model, ["block"], "cpu"):
        assert torch.equal(model(torch.ones(2, 4)), wanted)


def axis_of(name: str, *params: str) -> Axis:
    return Axis(name, "heads", 0, 1, tuple(Cut(param, 0) for param in params))


def test_blocks_are_named_once_and_the_outermost_holds_the_inner() -> None:
    axes = [
        axis_of("blocks.1.first.heads", "blocks.1.first.weight"),
        axis_of("blocks.0.heads", "blocks.0.first.weight"),
        axis_of("blocks.0.neurons", "blocks.0.second.bias"),
        axis_of("blocks.1.neurons", "blocks.1.second.bias"),
    ]
    assert block_paths(toy(), axes) == TOY_BLOCKS
    assert block_paths(toy(), axes[:1]) == ["blocks.1.first"]


NO_BLOCKS = [
    ("first layer", "blocks.0.first.weight"),  # a name of no form
    ("blocks.7.heads", "blocks.0.first.weight"),  # no such module
    ("blocks.heads", "blocks.0.first.weight"),  # a list, which no forward runs
    ("blocks.1.heads", "blocks.0.first.weight"),  # cut elsewhere
    (".heads", "blocks.0.first.weight"),  # the model itself
]


@pytest.mark.parametrize(("name", "param"), NO_BLOCKS)
def test_names_that_say_no_block_leave_it_to_what_is_cut(name: str, param: str) -> None:
    axes = [axis_of("blocks.1.heads", "blocks.1.first.weight"), axis_of(name, param, "blocks.0.second.bias")]
    assert block_paths(toy(), axes) == ["blocks.1", "blocks.0"]


class Nested(nn.Module):
    """Stages of blocks, of which each has its feedforward in a list, as Swin and timm have them."""

    def __init__(self) -> None:
        super().__init__()
        block = lambda: nn.ModuleDict({"attention": nn.Linear(4, 4), "mlp": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))})  # noqa: E731
        self.stages = nn.ModuleList([nn.Sequential(Called(block()), Called(block())) for _ in range(2)])
        self.experts = nn.ModuleDict({"a": nn.Linear(4, 4)})


class Called(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_the_smallest_entry_that_holds_every_cut_of_an_axis_is_its_block() -> None:
    up, down, query = ("stages.1.0.inner.mlp.0.weight", "stages.1.0.inner.mlp.1.weight", "stages.1.0.inner.attention.weight")
    model = Nested()
    assert block_paths(model, [axis_of("the second feedforward", up, down)]) == ["stages.1.0.inner.mlp"]
    assert block_paths(model, [axis_of("x", up, down), axis_of("y", query, down)]) == ["stages.1.0"]
    assert block_paths(model, [axis_of("both", down, "stages.1.1.inner.mlp.0.weight")]) == ["stages.1"]
    assert block_paths(model, [axis_of("an expert", "experts.a.weight")]) == ["experts.a"]


def test_the_blocks_of_an_axis_of_several_blocks_are_those_of_its_cuts() -> None:
    axes = [
        axis_of("blocks.0.neurons", "blocks.0.first.weight"),
        axis_of("mine", "blocks.1.second.bias", "blocks.0.first.bias"),
    ]
    assert block_paths(toy(), axes) == ["blocks.0", "blocks.1"]


def test_a_cut_outside_of_all_lists_is_in_no_block() -> None:
    axes = [axis_of("blocks.0.heads", "blocks.0.first.weight"), axis_of("mine", "head.weight", "blocks.1.second.bias")]
    assert block_paths(toy(), axes) == ["blocks.0", "blocks.1"]


@pytest.mark.parametrize("params", [("head.weight",), ("head.weight", "head.bias")])
def test_an_axis_that_no_entry_holds_is_an_error_and_never_the_whole_model(params: tuple[str, ...]) -> None:
    with pytest.raises(LookupError, match=rf"the axis 'mine' is no module's.*{params[0]}"):
        block_paths(toy(), [axis_of("blocks.0.heads", "blocks.0.first.weight"), axis_of("mine", *params)])
