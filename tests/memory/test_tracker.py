"""The tracker against counts made by hand: small steps whose every tensor is known, in multiples of 512 bytes."""

import gc
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules import module as modules
from torch.utils.checkpoint import checkpoint

from recap_cli.memory.tracker import Tracker, Usage

SCALAR = 512  # what a number costs
WEIGHT = 256 * 256 * 4  # of `linear`
ROWS = 64
HIDDEN = ROWS * 256 * 4  # a batch of 64 vectors of 256
LARGE = 2 * WEIGHT  # entries of what makes the peak wherever it is made


def linear() -> nn.Linear:
    return nn.Linear(256, 256, bias=False)


def tracked(model: nn.Module, x: Tensor, run: Callable[[], None]) -> Usage:
    """What `run` holds, where the weights of `model` and `x` are known before."""
    tracker = Tracker(model)
    tracker.know(model.named_parameters(), "weights")
    tracker.know({"x": x}, "other")
    with tracker.watch([(name, param) for name, param in model.named_parameters() if param.requires_grad]):
        run()
    return tracker.usage()


def kinds(usage: Usage) -> dict[str, int]:
    return {kind: count for kind, count in usage.maxima.items() if count}


def test_weights_are_what_is_known_and_activations_what_a_forward_leaves() -> None:
    model, x, kept = linear(), torch.randn(ROWS, 256), []
    usage = tracked(model, x, lambda: kept.append(model(x)))
    assert kinds(usage) == {"weights": WEIGHT, "activations": HIDDEN, "other": HIDDEN}
    assert usage.peak_bytes == WEIGHT + 2 * HIDDEN
    assert usage.sum_of_maxima_bytes == WEIGHT + HIDDEN
    assert usage.by_module == {"": {"weights": WEIGHT, "activations": HIDDEN, "other": HIDDEN}}


def test_every_kind_of_a_training_step() -> None:
    model, x = nn.Sequential(linear(), nn.ReLU()), torch.randn(ROWS, 256)
    weight = model.get_parameter("0.weight")
    momentum = torch.zeros_like(weight)
    tracker = Tracker(model)
    tracker.know(model.named_parameters(), "weights")
    tracker.know([("0.weight", momentum)], "optimizer")
    with tracker.watch(model.named_parameters()):
        loss = model(x).sum()
        forward = tracker.usage()
        loss.backward()
        backward = tracker.usage()
        with torch.no_grad():
            momentum.mul_(0.9).add_(weight.grad)
            weight.sub_(momentum * 0.1)
    usage = tracker.usage()
    both = 2 * HIDDEN  # of the linear layer and of ReLU, at the moment when ReLU has made its own
    assert kinds(forward) == {"weights": WEIGHT, "optimizer": WEIGHT, "activations": both}
    # in the backward: the loss and its gradient, 1; the gradient of ReLU's input; the weight's
    assert backward.peak_bytes == 2 * WEIGHT + 2 * SCALAR + HIDDEN + WEIGHT
    assert backward.maxima["gradients"] == WEIGHT
    # in the step: the loss, and one temporary of the weight's size
    assert usage.at_peak == {
        "weights": WEIGHT,
        "gradients": WEIGHT,
        "optimizer": WEIGHT,
        "activations": SCALAR,
        "temporary": WEIGHT,
        "other": 0,
    }
    assert usage.peak_bytes == 4 * WEIGHT + SCALAR
    assert usage.maxima["activations"] == both
    assert usage.sum_of_maxima_bytes == 3 * WEIGHT + both


def test_fake_tensors_are_counted_as_real_ones_are() -> None:
    def step() -> Usage:
        model, x = nn.Sequential(linear(), nn.GELU(), nn.Dropout(0.1), linear()), torch.zeros(ROWS, 256)
        return tracked(model, x, lambda: model(x).square().mean().backward())

    with FakeTensorMode():
        fake = step()
    assert fake == step()


def test_a_frozen_parameter_has_no_gradient_and_its_layer_saves_no_input() -> None:
    usages = []
    for frozen in (False, True):
        model, x = nn.Sequential(linear(), linear(), linear()), torch.randn(ROWS, 256)
        model[1].weight.requires_grad_(not frozen)
        usages.append(tracked(model, x, lambda: model(x).sum().backward()))  # noqa: B023
    dense, part = usages
    assert (dense.maxima["gradients"], part.maxima["gradients"]) == (3 * WEIGHT, 2 * WEIGHT)
    assert dense.maxima["weights"] == part.maxima["weights"] == 3 * WEIGHT
    assert (dense.maxima["activations"], part.maxima["activations"]) == (3 * HIDDEN + SCALAR, 2 * HIDDEN + SCALAR)


def test_a_fused_backward_holds_one_gradient_at_a_time() -> None:
    model, x = nn.Sequential(linear(), linear(), linear()), torch.randn(ROWS, 256)

    def run() -> None:
        for param in model.parameters():
            param.register_post_accumulate_grad_hook(lambda leaf: setattr(leaf, "grad", None))
        model(x).sum().backward()

    assert tracked(model, x, run).maxima["gradients"] == WEIGHT


def test_micro_batches_keep_one_gradient_and_make_another_to_add() -> None:
    model, x, held = linear(), torch.randn(ROWS, 256), []

    def run() -> None:
        for part in x.split(16):
            model(part).sum().backward()
        held.append(torch.empty(LARGE))

    usage = tracked(model, x, run)
    assert usage.maxima["gradients"] == WEIGHT
    assert WEIGHT <= usage.maxima["temporary"] <= WEIGHT + HIDDEN // 4
    assert usage.maxima["activations"] == 4 * LARGE
    assert usage.peak_bytes == WEIGHT + HIDDEN + WEIGHT + 4 * LARGE  # weights, x, gradient; no temporary is left


def activations(run: Callable[[], object]) -> int:
    tracker = Tracker()
    with tracker:
        kept = run()
    del kept
    return tracker.usage().maxima["activations"]


def test_views_and_what_is_done_in_place_are_not_counted_twice() -> None:
    def run() -> list[Tensor]:
        x = torch.empty(1000)
        views = [x[3:], x.view(10, 100).t(), x.expand(5, 1000), x.detach(), x[::2]]
        x.mul_(2).add_(1).clamp_(min=0)
        torch.add(x, 1, out=x)
        return views

    assert activations(run) == 4096


def test_a_view_keeps_all_of_its_storage() -> None:
    def run() -> list[Tensor]:
        kept = [torch.empty(1000)[:1]]
        return [*kept, torch.empty(1000)]

    assert activations(run) == 2 * 4096


def test_what_only_autograd_remembers_is_still_held() -> None:
    x = torch.randn(ROWS, 256, requires_grad=True)

    def run() -> list[Tensor]:
        loss = x.exp().sum()  # exp saves its result, which no variable names
        gc.collect()
        return [loss, torch.empty(WEIGHT, dtype=torch.uint8)]

    assert activations(run) == HIDDEN + SCALAR + WEIGHT


def test_memory_that_is_used_again_is_counted_at_its_own_size_and_kind() -> None:
    tracker, keys, addresses = Tracker(), [], []
    with tracker:
        for round in range(50):
            made = torch.empty(128 * (1 + round % 3))
            keys.append(made.untyped_storage()._cdata)
            addresses.append(made.data_ptr())
            del made
            with torch.no_grad():
                torch.empty(128 * 5)
    assert len(set(addresses)) < len(addresses)  # the allocator gave some of them again
    assert len(set(keys)) < len(keys)
    usage = tracker.usage()
    assert (usage.maxima["activations"], usage.maxima["temporary"]) == (3 * 512, 5 * 512)
    assert usage.peak_bytes == 5 * 512


def test_sizes_are_rounded_up_to_what_the_allocator_hands_out() -> None:
    assert activations(lambda: torch.empty(1)) == 512
    assert activations(lambda: torch.empty(128)) == 512
    assert activations(lambda: torch.empty(129)) == 1024
    assert activations(lambda: torch.empty(0)) == 0


def test_what_lies_on_the_host_is_never_counted_but_what_is_made_of_it_is() -> None:
    tracker = Tracker()
    host = [torch.ones(1000), torch.ones(3000)]
    tracker.ignore(host)
    with tracker:
        tracker.know({"x": host[0]}, "weights")
        view = host[0][:10].mul_(2)
        made = host[1] + 1
    usage = tracker.usage()
    assert kinds(usage) == {"activations": 12288}
    assert (len(view), len(made)) == (10, 3000)


def test_a_host_tensor_that_is_gone_leaves_no_mark_at_its_address() -> None:
    tracker = Tracker()
    with tracker:
        for _ in range(50):
            host = torch.ones(1000)
            tracker.ignore([host])
            del host
            device = torch.ones(2000)
            del device
        kept = [torch.empty(128) for _ in range(20)]
    assert tracker.usage().maxima["activations"] >= len(kept) * 512
    assert tracker._host == {}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = linear(), nn.Sequential(nn.Tanh(), linear())

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) * 2


def test_what_is_held_is_told_by_the_module_that_made_it() -> None:
    model, x = nn.ModuleDict({"block": Block(), "head": linear()}), torch.randn(ROWS, 256)
    for param in model["block"].parameters():
        param.requires_grad_(False)
    kept = []

    def run() -> None:
        hidden = model["block"](x)
        kept.append((model["head"](hidden), hidden, torch.empty(LARGE)))

    usage = tracked(model, x, run)
    assert usage.by_module == {
        "block.first": {"weights": WEIGHT},
        "block.second.1": {"weights": WEIGHT},
        "block": {"activations": HIDDEN},  # the product with 2, which is the block's own
        "head": {"weights": WEIGHT, "activations": HIDDEN},
        "": {"activations": 4 * LARGE, "other": HIDDEN},  # nobody's
    }
    assert sum(sum(held.values()) for held in usage.by_module.values()) == usage.peak_bytes


def test_gradients_belong_to_the_module_of_their_parameter() -> None:
    model, x = nn.Sequential(linear(), linear()), torch.randn(ROWS, 256)

    def run() -> None:
        model(x).sum().backward()
        torch.empty(LARGE)

    by_module = tracked(model, x, run).by_module
    assert [by_module[path]["gradients"] for path in ("0", "1")] == [WEIGHT, WEIGHT]


def test_a_module_that_is_no_part_of_the_model_counts_for_the_one_that_calls_it() -> None:
    stranger = linear()

    class Calls(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return stranger(x)

    model, x = nn.Sequential(Calls()), torch.randn(ROWS, 256)
    kept = []
    usage = tracked(model, x, lambda: kept.append(model(x)))
    assert usage.by_module["0"] == {"activations": HIDDEN + WEIGHT}  # its weight too is first seen there


def hooks_of(model: nn.Module) -> int:
    count = len(modules._global_forward_hooks) + len(modules._global_forward_pre_hooks)
    return count + sum(len(param._post_accumulate_grad_hooks or ()) for param in model.parameters())


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("no forward")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_a_forward_leaves_no_hook_behind(error: type[BaseException]) -> None:
    class Raises(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise error

    model = nn.Sequential(linear(), Raises())
    before = hooks_of(model)
    with pytest.raises(error):
        tracked(model, torch.zeros(ROWS, 256), lambda: model(torch.zeros(ROWS, 256)))
    assert hooks_of(model) == before
    torch.zeros(3)
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_after_an_error_that_was_caught_no_module_is_taken_to_run() -> None:
    model, x, kept = nn.Sequential(linear(), nn.Sequential(Fails())), torch.randn(ROWS, 256), []

    def run() -> None:
        with pytest.raises(ValueError, match="no forward"):
            model(x)
        kept.append(torch.empty(LARGE))

    usage = tracked(model, x, run)
    assert usage.by_module[""] == {"activations": 4 * LARGE, "other": HIDDEN}


def test_what_a_checkpoint_computes_again_are_activations_of_its_module() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(linear(), nn.Tanh(), linear(), nn.Tanh())

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.body, x, use_reentrant=False)

    model, x = nn.Sequential(Checkpointed(), Checkpointed()), torch.randn(ROWS, 256)
    plain = nn.Sequential(*(block.body for block in model))
    with_all = tracked(plain, x, lambda: plain(x).sum().backward())
    model.zero_grad()
    usage = tracked(model, x, lambda: model(x).sum().backward())
    assert with_all.maxima["activations"] == 5 * HIDDEN  # of each Tanh, and at the last one of the layer before it
    # Going back, the loss and its gradient; the second block's input; both of its Tanh, and the layer before the last again.
    assert usage.maxima["activations"] == 4 * HIDDEN + 2 * SCALAR
    assert usage.maxima["gradients"] == with_all.maxima["gradients"] == 4 * WEIGHT
    assert usage.maxima["temporary"] == with_all.maxima["temporary"]


def test_scoring_counts_what_is_alive_and_nothing_more() -> None:
    model, x = nn.Sequential(*(linear() for _ in range(6))), torch.randn(ROWS, 256)

    def run() -> None:
        with torch.no_grad():
            F.softmax(model(x), -1)

    assert tracked(model, x, run).maxima["activations"] == 2 * HIDDEN
