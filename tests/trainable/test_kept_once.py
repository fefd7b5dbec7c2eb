"""What two layers keep of one tensor for the backward pass is kept once, and the gradients are torch's on the plain layers."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers.activations
from torch import Tensor, nn

from recap_cli.trainable import activations, norms
from recap_cli.trainable.activations import note_origins
from recap_cli.trainable.build import make_partial
from recap_cli.trainable.linear import keep_inputs_once
from recap_cli.trainable.norms import keep_outputs
from recap_cli.trainable.recomputed import recompute, recompute_samples

BATCH, TOKENS, WIDTH, NEURONS, TRAINABLE = 3, 7, 16, 24, 9


def kept_bytes(run: Callable[[], Tensor], *held: Tensor) -> int:
    """Bytes of the storages that the backward of `run` keeps, each counted once, without those of the tensors `held`."""
    known = {tensor.untyped_storage().data_ptr() for tensor in held}
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = run()
    assert out.requires_grad
    return sum(count for place, count in storages.items() if place not in known)


def gradients(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Of the input and of all trainable parameters, for a loss in which every output has its own weight."""
    x = x.detach().requires_grad_()
    out = module(x)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    params = [param for param in module.parameters() if param.requires_grad]
    return list(torch.autograd.grad((out * weights).sum(), [x, *params]))


def input_of(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype) + 3


def a_norm(*, affine: bool = True, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.LayerNorm:
    norm = nn.LayerNorm(WIDTH, elementwise_affine=affine, bias=bias)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for param in norm.parameters():
            param.copy_(torch.randn(param.shape, generator=generator))
    return norm.to(dtype)


def lean(model: nn.Module) -> nn.Module:
    keep_outputs(model)
    note_origins(model)
    return model


@pytest.mark.parametrize(("affine", "bias"), [(True, True), (True, False), (False, False)])
def test_a_norm_has_the_gradients_of_torchs(affine: bool, bias: bool) -> None:
    x = input_of(BATCH, TOKENS, WIDTH)
    plain, ours = a_norm(affine=affine, bias=bias), lean(a_norm(affine=affine, bias=bias))
    assert torch.equal(ours(x), plain(x))
    for found, expected in zip(gradients(ours, x), gradients(plain, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_norm_in_bf16_is_as_near_to_fp32_as_torchs() -> None:
    x = input_of(64, WIDTH, dtype=torch.bfloat16)
    exact = gradients(a_norm(dtype=torch.bfloat16).float(), x.float())
    for found, plain, expected in zip(
        gradients(lean(a_norm(dtype=torch.bfloat16)), x), gradients(a_norm(dtype=torch.bfloat16), x), exact, strict=True
    ):
        assert (found.float() - expected).norm() <= 2 * (plain.float() - expected).norm() + 1e-3 * expected.norm()


def test_a_feature_that_the_output_does_not_tell_is_kept_besides() -> None:
    def norm() -> nn.LayerNorm:
        made = a_norm()
        with torch.no_grad():
            made.weight[2], made.bias[2] = 0.0, 1.0
            made.weight[5], made.bias[5] = 1e-4, 5.0
        return made

    x = input_of(BATCH, TOKENS, WIDTH)
    for found, expected in zip(gradients(lean(norm()), x), gradients(norm(), x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_weight_that_becomes_zero_in_training_gives_finite_gradients() -> None:
    norm = lean(a_norm())
    with torch.no_grad():
        norm.get_parameter("weight")[4] = 0.0
    assert all(gradient.isfinite().all() for gradient in gradients(norm, input_of(BATCH, TOKENS, WIDTH)))


def test_a_norm_and_the_layer_after_it_keep_one_tensor() -> None:
    unit = BATCH * TOKENS * WIDTH * 4
    for ours in (False, True):
        norm, layer = a_norm(), nn.Linear(WIDTH, 8)
        model = nn.Sequential(norm, layer)
        if ours:
            lean(model)
        x = input_of(BATCH, TOKENS, WIDTH).requires_grad_()
        kept = kept_bytes(lambda model=model, x=x: model(x), *model.parameters())  # type: ignore[misc]
        numbers = BATCH * TOKENS * 4  # one for each row
        assert kept == (unit + numbers if ours else 2 * unit + 2 * numbers)


class Other(nn.LayerNorm):
    """A norm that does something else with what it normalises."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_other_norms_stay_as_they_are() -> None:
    far = a_norm()
    with torch.no_grad():
        far.weight[: WIDTH // 2] = 0.0
    for norm in (far, Other(WIDTH), nn.LayerNorm((TOKENS, WIDTH)), nn.BatchNorm1d(WIDTH), nn.GroupNorm(2, WIDTH)):
        assert "forward" not in vars(lean(norm))


def test_norms_of_timm_are_known() -> None:
    import timm.layers

    assert "forward" in vars(lean(timm.layers.LayerNorm(WIDTH)))
    assert "forward" not in vars(lean(timm.layers.LayerNorm2d(WIDTH)))


def named(name: str) -> nn.Module:
    owner = transformers.activations if hasattr(transformers.activations, name) else nn
    if name == "ClippedGELUActivation":
        return transformers.activations.ClippedGELUActivation(-1.0, 3.0)
    made: nn.Module = getattr(owner, name)()
    return made


def activation_of(words: str) -> nn.Module:
    return nn.SiLU(inplace=True) if words == "SiLU in place" else named(words)


@pytest.mark.parametrize("name", sorted(activations.KEEP_INPUT | activations.KEEP_OUTPUT))
def test_activation_functions_keep_what_is_said_of_them_and_work_entry_by_entry(name: str) -> None:
    module, x, seen = named(name), input_of(BATCH, NEURONS).requires_grad_(), set[int]()

    def note(tensor: Tensor) -> Tensor:
        seen.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = module(x)
    kept = x if name in activations.KEEP_INPUT else out
    assert kept.untyped_storage().data_ptr() in seen
    columns = torch.tensor([0, 5, 17])
    torch.testing.assert_close(module(x[:, columns]), out[:, columns])


def test_no_function_that_keeps_its_input_and_works_entry_by_entry_is_forgotten() -> None:
    others = {"Hardshrink", "Hardsigmoid", "Hardtanh", "Softshrink", "Softsign", "Tanhshrink"}  # in no feedforward block
    found = set()
    for name, kind in vars(torch.nn.modules.activation).items():
        own = isinstance(kind, type) and issubclass(kind, nn.Module) and kind.__module__ == activations.LIBRARIES[0]
        if not own or name == "Softmax2d":  # of images
            continue
        try:
            module = kind()
        except TypeError:  # of those that need a size
            continue
        x, seen = input_of(BATCH, NEURONS).requires_grad_(), set[int]()

        def note(tensor: Tensor, seen: set[int] = seen) -> Tensor:
            seen.add(tensor.untyped_storage().data_ptr())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # softmax asks for its dimension
            out = module(x)
            alone = module(x[:, [0, 5]])
        each = not list(module.parameters()) and out.shape == x.shape and torch.allclose(alone, out[:, [0, 5]])
        if each and x.untyped_storage().data_ptr() in seen and name != "RReLU":  # whose slopes are drawn
            found.add(name)
    assert found - others == {name for name in activations.KEEP_INPUT if hasattr(nn, name)}


class Block(nn.Module):
    """A feedforward block with `between` after its activation function."""

    def __init__(self, activation: nn.Module, between: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.up, self.activation, self.down = nn.Linear(WIDTH, NEURONS), activation, nn.Linear(NEURONS, WIDTH)
        self.between = between
        with torch.no_grad():
            for param in self.parameters():
                param.copy_(0.3 * torch.randn(param.shape, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.between(self.activation(self.up(x))))
        return out


def columns_trainable(block: Block, columns: Sequence[int], *, is_lean: bool = True) -> Block:
    make_partial(block, {"down.weight": {1: torch.tensor(columns)}}, frozen=lambda name: name != "down.weight", lean=is_lean)
    return block


def added_in_place(x: Tensor) -> Tensor:
    return x.mul_(1.5)


@pytest.mark.parametrize("columns", [range(TRAINABLE), [1, 4, 5, 11, 20]], ids=["side by side", "scattered"])
@pytest.mark.parametrize(
    ("activation", "between", "copies"),
    [
        ("GELU", None, False),
        ("QuickGELUActivation", None, False),
        ("ReLU", None, False),
        ("GELU", torch.neg, True),
        ("SiLU in place", None, True),  # its input is written to
        ("LeakyReLU", added_in_place, True),  # its own backward reads its input, so its output may be written to
    ],
)
def test_the_trainable_columns_are_made_again_of_what_is_kept_anyway(
    activation: str, between: Callable[[Tensor], Tensor] | None, copies: bool, columns: Sequence[int]
) -> None:
    x = input_of(BATCH, TOKENS, WIDTH)

    def block(*, is_lean: bool) -> Block:
        return columns_trainable(Block(activation_of(activation), between or (lambda x: x)), columns, is_lean=is_lean)

    ours, plain = block(is_lean=True), block(is_lean=False)
    for found, expected in zip(gradients(ours, x), gradients(plain, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    held = [*ours.parameters(), *ours.buffers(), *plain.parameters(), *plain.buffers()]
    mine, theirs = (kept_bytes(lambda one=one: one(x.requires_grad_()), *held, x) for one in (ours, plain))  # type: ignore[misc]
    assert theirs - mine == (0 if copies else BATCH * TOKENS * len(columns) * 4)


@pytest.mark.parametrize("activation", ["GELU", "ReLU"])
def test_a_layer_that_is_trained_whole_keeps_no_input_that_can_be_made_again(activation: str) -> None:
    x, found = input_of(BATCH, TOKENS, WIDTH), []
    for is_lean in (True, False):
        block = Block(named(activation))
        make_partial(block, {}, frozen=lambda name: name.startswith("up"), lean=is_lean)
        grads = gradients(block, x)
        found.append((grads, kept_bytes(lambda block=block: block(x.requires_grad_()), *block.parameters(), x)))  # type: ignore[misc]
    for mine, theirs in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert found[1][1] - found[0][1] == (BATCH * TOKENS * NEURONS * 4 if activation == "GELU" else 0)


def test_without_gradients_nothing_is_noted() -> None:
    block = columns_trainable(Block(nn.GELU()), range(TRAINABLE))
    with torch.no_grad():
        assert not hasattr(block.activation(block.up(input_of(2, WIDTH))), activations.ORIGIN)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.out(attended.transpose(1, 2).reshape(x.shape))
        return out


def test_the_output_of_attention_is_kept_once() -> None:
    x = input_of(BATCH, TOKENS, WIDTH)
    found = []
    for ours in (True, False):
        torch.manual_seed(0)
        model = Attention()
        columns = {"out.weight": {1: torch.arange(0, WIDTH, 2)}}
        make_partial(model, columns, frozen=lambda name: name != "out.weight", lean=True)
        if not ours:  # a copy that nobody else keeps
            model.out.register_forward_pre_hook(lambda _, args: (args[0].clone(),))
        held = [*model.parameters(), *model.buffers()]
        found.append((gradients(model, x), kept_bytes(lambda model=model: model(x.requires_grad_()), *held, x)))  # type: ignore[misc]
    (ours_gradients, ours_bytes), (plain_gradients, plain_bytes) = found
    for mine, theirs in zip(ours_gradients, plain_gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert plain_bytes - ours_bytes == BATCH * TOKENS * WIDTH // 2 * 4


class Regions(nn.Module):
    """An attention whose projections are recomputed, and a feedforward block in two regions, one within the other."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.block = Attention(), Block(nn.GELU())
        self.inner = self.block.down

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block(self.attention(x))
        return out


def test_across_the_border_of_a_recomputed_region_nothing_is_known_to_be_kept() -> None:
    x, found = input_of(BATCH, TOKENS, WIDTH), []
    for regions in (False, True):
        torch.manual_seed(0)
        model = Regions()
        index_map = {"block.down.weight": {1: torch.arange(4)}, "attention.out.weight": {1: torch.arange(4)}}
        make_partial(model, index_map, frozen=lambda name: not name.endswith(("down.weight", "out.weight")))
        if regions:
            recompute(model.block.down)
            recompute(model.block)
        found.append(gradients(model, x))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)

    class Core(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            q = x.unflatten(-1, (2, -1)).transpose(1, 2)
            attended: Tensor = nn.functional.scaled_dot_product_attention(q, q, q)
            return attended.transpose(1, 2).reshape(x.shape)

    bytes_of = []
    for again in (False, True):
        core, out = Core(), nn.Linear(WIDTH, WIDTH, bias=False)
        if again:
            recompute(core)
        model = nn.Sequential(core, out)
        make_partial(model, {"1.weight": {1: torch.arange(0, WIDTH, 4)}}, frozen=lambda _: False)
        held = [*model.parameters(), *model.buffers()]
        bytes_of.append(kept_bytes(lambda model=model: model(x.requires_grad_()), *held, x))  # type: ignore[misc]
    assert bytes_of[1] == BATCH * TOKENS * WIDTH // 4 * 4  # of the output of the region, the trainable columns


def test_norms_and_layers_take_their_input_by_name() -> None:
    norm, layer, activation = lean(a_norm()), nn.Linear(WIDTH, 4), nn.GELU()
    keep_inputs_once(layer)
    note_origins(activation)
    x = input_of(2, WIDTH).requires_grad_()
    assert torch.equal(norm(input=x), a_norm()(x))
    assert torch.equal(layer(input=activation(input=x)), layer(activation(x)))


def test_samples_of_deformable_attention_are_made_again() -> None:
    from transformers.models.mask2former import modeling_mask2former as library

    def made() -> nn.Module:
        torch.manual_seed(0)
        module: nn.Module = library.Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention(32, 2, 2, 3)
        return module

    places = torch.rand(1, 20, 2, 2, generator=torch.Generator().manual_seed(5))
    x = input_of(1, 20, 32).requires_grad_()
    results: list[Any] = []
    for ours in (False, True):
        module = made()
        if ours:
            recompute_samples(module)

        def run(module: nn.Module = module) -> Tensor:
            out: Tensor = module(
                x,
                encoder_hidden_states=x,
                reference_points=places,
                spatial_shapes_list=[(4, 4), (2, 2)],
                level_start_index=None,
            )[0]
            return out

        grads = torch.autograd.grad(run().square().sum(), [x, *module.parameters()])
        results.append((grads, kept_bytes(run, *module.parameters(), x, places)))
    for mine, theirs in zip(results[1][0], results[0][0], strict=True):
        assert torch.equal(mine, theirs)
    assert results[1][1] == 0 < results[0][1]


def test_a_bias_may_be_so_many_times_its_weight() -> None:
    for dtype, times in ((torch.float32, 64.0), (torch.bfloat16, 1.0)):
        norm = a_norm().to(dtype)
        with torch.no_grad():
            norm.weight.fill_(1.0)
            norm.bias.fill_(0.9 * times)
        assert norms._far(norm) is None
        with torch.no_grad():
            norm.bias[3] = 1.1 * times
            norm.weight[5] = 0.02  # and its bias is small too
            norm.bias[5] = 0.0
        faint = [5] if dtype == torch.bfloat16 else []
        assert norms._far(norm).tolist() == [3, *faint]  # type: ignore[union-attr]
