"""The full model on a small device: the weights of one block at a time travel there, and stay on the CPU otherwise.

A block's forward runs on copies that are dropped when it ends. Its backward copies them once more, recomputes the block, and
hands the gradients of its weights to autograd *on the CPU*. What the device holds is one block (weights, gradients,
activations), the input of every block, and whatever stands outside the blocks: last norm, head. Rows of embeddings are looked
up on the CPU.

Why not a library: the offload hooks of accelerate let each forward run on fresh copies, which the graph would keep until its
backward, and which would get the gradients in the place of the parameters (accelerate issue 3770). FSDP2 with
`CPUOffloadPolicy` needs a process group, and turns the parameters into DTensors for good, which pruning could not cut.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from enum import Enum
from types import BuiltinFunctionType, FunctionType, NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from recap_cli.errors import ModelError

STATELESS = (
    *(NoneType, bool, int, float, complex, str, bytes, range, slice, type, Enum),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size, FunctionType, BuiltinFunctionType),
)
ON_THE_CPU = "compute importance on the CPU, where a block runs once: --set importance.device=cpu"
Run = Callable[[Sequence[Tensor], Sequence[Tensor]], Any]  # (tensors among the arguments, weights on the device) → output


@contextmanager
def streamed(model: nn.Module, blocks: Sequence[str], device: torch.device | str) -> Iterator[None]:
    """Inside, `model` takes and gives tensors on `device`, and the weights of each of `blocks` are there only while it runs.

    Afterwards all is as it was, the same tensors in the same place, and values that were trained, or statistics that were
    estimated, outside the blocks have come back. On CUDA the CPU adds up (or scores) gradients of one block while the device
    makes those of the next. A block may take and give tensors in tuples, lists and dicts.

    Args:
        model: on the CPU.
        blocks: paths of modules, none inside another; what is outside them is moved. With none the whole model is moved.
        device: where the model runs.

    Raises:
        ValueError: a block that is called is in training mode. It is run twice, and with dropout the two would differ.
        ModelError: an argument of a block carries state from one run to the next: an object such as a cache of keys and
            values, or a list, dict or tensor of floats that the block changes. Another tensor, such as a mask, it may change.
    """
    inside = {path: model.get_submodule(path) for path in blocks}
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    with ExitStack() as stack:
        for table in tables if blocks else ():
            stack.callback(_set_forward, table, table.__dict__.get("forward"))
            _set_forward(table, _looking_up(table, torch.device(device)))
        for tensor in _outside(model, [*inside.values(), *tables] if blocks else []):
            stack.callback(_put_back, tensor, tensor.data)
            tensor.data = tensor.data.to(device, copy=True)
        for path, block in inside.items():
            stack.callback(_set_forward, block, block.__dict__.get("forward"))
            _set_forward(block, _streaming(path, block, torch.device(device)))
        yield


def _outside(model: nn.Module, blocks: Sequence[nn.Module]) -> list[Tensor]:
    """The parameters and buffers of the modules that are in no block, each once; also one that a block shares."""
    within = {module for block in blocks for module in block.modules()}
    owners = [module for module in model.modules() if module not in within]
    tensors = [t for module in owners for t in (*module.parameters(recurse=False), *module.buffers(recurse=False))]
    return list({id(tensor): tensor for tensor in tensors}.values())


def _put_back(tensor: Tensor, original: Tensor) -> None:
    """Let `tensor` be `original` again, with the values that it has got meanwhile, and a parameter's gradient."""
    streamed_data, tensor.data = tensor.data, original
    original.copy_(streamed_data)  # of a buffer too: the statistics of a batch norm may have been estimated
    if isinstance(tensor, nn.Parameter):
        tensor.grad = None if tensor.grad is None else tensor.grad.to(original.device)


def _set_forward(block: nn.Module, forward: Callable[..., Any] | None) -> None:
    """Give one block a forward of its own, or (None) that of its class."""
    if forward is None:
        del block.forward
    else:
        block.forward = forward


def _looking_up(table: nn.Embedding, device: torch.device) -> Callable[[Tensor], Tensor]:
    plain = table.forward
    return lambda ids: plain(ids.to(table.weight.device)).to(device)  # (…) → (…, width)


class _Plain(nn.Module):
    """A block with the forward that it had, so that `functional_call` can run it with other weights."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.run = block, block.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)


class _Call:
    """What a block is called with, taken apart; to be put together again, with other tensors, for each of its runs."""

    def __init__(self, block: str, parameters: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._block, self._parameters = block, parameters
        for name, value in self._named(args, kwargs):
            self._refuse_objects(name, value)
        leaves, self._form = tree_flatten((args, kwargs))
        self._places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self._others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]  # tensors would keep their graph alive

    def run(self, function: Callable[[tuple[Any, ...], dict[str, Any]], Any], tensors: Sequence[Tensor]) -> Any:
        """The function's result with these tensors in their places.

        Raises:
            ModelError: it changed what it was given, other than tensors that hold no floats: the caller has copies of these.
        """
        leaves = list(self._others)
        for i, tensor in zip(self._places, tensors, strict=True):
            leaves[i] = tensor
        args, kwargs = tree_unflatten(leaves, self._form)
        before = {name: _snapshot(value) for name, value in self._named(args, kwargs)}
        out = function(args, kwargs)
        for name, value in self._named(args, kwargs):
            if _snapshot(value) != before[name]:
                raise self._refusal(name, "is changed by the block, which runs once more in the backward")
        return out

    def _refuse_objects(self, name: str, value: Any) -> None:
        for leaf in tree_leaves(value, is_leaf=lambda part: not isinstance(part, (tuple, list, dict))):
            if not isinstance(leaf, (Tensor, *STATELESS)):
                kind = type(leaf).__name__
                raise self._refusal(name, f"holds a {kind}, which may carry state from one run of the block to the next")

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        for i, value in enumerate(args):
            yield self._parameters[i] if i < len(self._parameters) else f"number {i + 1}", value
        yield from kwargs.items()

    def _refusal(self, name: str, why: str) -> ModelError:
        return ModelError(f"{self._block} cannot be streamed to a device: its argument {name} {why}", hint=ON_THE_CPU)


def _positional(forward: Callable[..., Any]) -> list[str]:
    """The names that a forward has for what it is given by position, as far as it says them."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in inspect.signature(forward).parameters.values() if p.kind in kinds]


def _snapshot(value: Any) -> tuple[TreeSpec, list[tuple[int, int]]]:
    """What shows that a value was changed in place: the form of its lists and dicts, what stands in them, and the versions of
    its tensors of floats.
    """
    leaves, form = tree_flatten(value)
    has_version = (isinstance(leaf, Tensor) and not leaf.is_inference() and _has_floats(leaf) for leaf in leaves)
    return form, [(id(leaf), leaf._version if has else 0) for leaf, has in zip(leaves, has_version, strict=True)]


def _has_floats(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _own(tensor: Tensor) -> Tensor:
    """A copy of a mask, of ids or the like for one run of a block, which may change it, as OneFormer's decoder layers do."""
    return tensor if _has_floats(tensor) or torch.is_inference_mode_enabled() else tensor.clone()


def _as_it_was(tensor: Tensor, given: Tensor, version: int) -> Tensor:
    """The tensor, or if the block has changed its copy `given`, a copy from before; the caller then sees the change."""
    if given is tensor or given._version == version:
        return tensor
    before = tensor.clone()
    tensor.copy_(given)
    return before


def _streaming(path: str, block: nn.Module, device: torch.device) -> Callable[..., Any]:
    plain, named = _Plain(block), f"{path} ({type(block).__name__})"
    parameters = _positional(plain.run)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if any(module.training for module in block.modules()):
            raise ValueError(f"a streamed {type(block).__name__} must be in evaluation mode, for its backward runs it again")
        params = dict(plain.named_parameters())
        call = _Call(named, parameters, args, kwargs)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]

        def run(tensors: Sequence[Tensor], weights: Sequence[Tensor]) -> Any:
            buffers = {name: buffer.to(device, copy=True) for name, buffer in plain.named_buffers()}
            held = buffers | dict(zip(params, weights, strict=True))
            return call.run(lambda args, kwargs: functional_call(plain, held, args, kwargs), tensors)

        out_form, *out = _Streamed.apply(run, device, len(inputs), *inputs, *params.values())
        return tree_unflatten(out, out_form)

    return forward


class _Streamed(torch.autograd.Function):
    """A block as one node of the graph: its inputs are kept, its weights are fetched in the forward and in the backward.

    Inputs without floats are copied for each run. What a block writes into one is there for the caller after the forward.
    """

    @staticmethod
    def forward(ctx: Any, run: Run, device: torch.device, count: int, *tensors: Tensor) -> tuple[Any, ...]:
        ctx.run, ctx.device, ctx.count = run, device, count
        ctx.set_materialize_grads(False)
        given = [_own(tensor) for tensor in tensors[:count]]
        versions = [0 if tensor.is_inference() else tensor._version for tensor in given]
        out, form = tree_flatten(run(given, [param.to(device, copy=True) for param in tensors[count:]]))
        kept = map(_as_it_was, tensors, given, versions)
        ctx.save_for_backward(*kept, *tensors[count:])  # the weights among them are on the CPU
        return form, *out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: None, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors, needed = ctx.saved_tensors, ctx.needs_input_grad[3:]
        copies = [
            (_own(tensor.detach()) if i < ctx.count else tensor.detach().to(ctx.device, copy=True)).requires_grad_(need)
            for i, (tensor, need) in enumerate(zip(tensors, needed, strict=True))
        ]
        with torch.enable_grad():
            out = tree_leaves(ctx.run(copies[: ctx.count], copies[ctx.count :]))
        reached = [(o, grad) for o, grad in zip(out, grads, strict=True) if grad is not None and o.requires_grad]
        wanted = [copy for copy in copies if copy.requires_grad]
        found = torch.autograd.grad([o for o, _ in reached], wanted, [grad for _, grad in reached], allow_unused=True)
        made = iter(found)
        grads_of = [next(made) if need else None for need in needed]
        placed = (None if grad is None else grad.to(tensor.device) for grad, tensor in zip(grads_of, tensors, strict=True))
        return None, None, None, *placed
