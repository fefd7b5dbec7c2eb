"""The full model on a small device: the weights of one block at a time travel there, and stay on the CPU otherwise.

A block's forward runs on copies that are dropped when it ends. Its backward copies them once more, recomputes the block, and
hands the gradients of its weights to autograd *on the CPU*. What the device holds is one block (weights, gradients,
activations), the input of every block, and whatever stands outside the blocks: last norm, head. Rows of embeddings are looked
up on the CPU.

Why not a library: the offload hooks of accelerate let each forward run on fresh copies, which the graph would keep until its
backward, and which would get the gradients in the place of the parameters (accelerate issue 3770). FSDP2 with
`CPUOffloadPolicy` needs a process group, and turns the parameters into DTensors for good, which pruning could not cut.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

Run = Callable[[Sequence[Tensor], Sequence[Tensor]], Any]  # (tensors among the arguments, weights on the device) → output


@contextmanager
def streamed(model: nn.Module, blocks: Sequence[str], device: torch.device | str) -> Iterator[None]:
    """Inside, `model` takes and gives tensors on `device`, and the weights of each of `blocks` are there only while it runs.

    `blocks` are paths of modules, none inside another; what is outside them is moved. Afterwards all is as it was, the same
    tensors in the same place, and values that were trained outside the blocks have come back. With no blocks the whole model
    is moved. On CUDA the CPU adds up (or scores) gradients of one block while the device makes those of the next.

    A block may take and give tensors in tuples, lists and dicts. It is run twice, so it must be in evaluation mode: with
    dropout the two would differ, and its call raises `ValueError`.
    """
    inside = [model.get_submodule(path) for path in blocks]
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    with ExitStack() as stack:
        for table in tables if blocks else ():
            stack.callback(_set_forward, table, table.__dict__.get("forward"))
            _set_forward(table, _looking_up(table, torch.device(device)))
        for tensor in _outside(model, [*inside, *tables] if blocks else []):
            stack.callback(_put_back, tensor, tensor.data)
            tensor.data = tensor.data.to(device, copy=True)
        for block in inside:
            stack.callback(_set_forward, block, block.__dict__.get("forward"))
            _set_forward(block, _streaming(block, torch.device(device)))
        yield


def _outside(model: nn.Module, blocks: Sequence[nn.Module]) -> list[Tensor]:
    """The parameters and buffers of the modules that are in no block, each once; also one that a block shares."""
    within = {module for block in blocks for module in block.modules()}
    owners = [module for module in model.modules() if module not in within]
    tensors = [t for module in owners for t in (*module.parameters(recurse=False), *module.buffers(recurse=False))]
    return list({id(tensor): tensor for tensor in tensors}.values())


def _put_back(tensor: Tensor, home: Tensor) -> None:
    """Let `tensor` be `home` again, with the values and the gradient that a parameter has got meanwhile."""
    moved, tensor.data = tensor.data, home
    if isinstance(tensor, nn.Parameter):
        home.copy_(moved)
        tensor.grad = None if tensor.grad is None else tensor.grad.to(home.device)


def _set_forward(block: nn.Module, forward: Callable[..., Any] | None) -> None:
    """Give one block a forward of its own, or (None) that of its class."""
    if forward is None:
        del block.forward
    else:
        block.forward = forward


def _looking_up(table: nn.Embedding, device: torch.device) -> Callable[[Tensor], Tensor]:
    plain = table.forward
    return lambda ids: plain(ids.to(table.weight.device)).to(device)


class _Plain(nn.Module):
    """A block with the forward that it had, so that `functional_call` can run it with other weights."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.run = block, block.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)


def _streaming(block: nn.Module, device: torch.device) -> Callable[..., Any]:
    plain = _Plain(block)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if any(module.training for module in block.modules()):
            raise ValueError(f"a streamed {type(block).__name__} must be in evaluation mode, for its backward runs it again")
        params = dict(plain.named_parameters())
        leaves, form = tree_flatten((args, kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]  # tensors would keep their graph alive

        def run(inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> Any:
            filled = list(others)
            for i, tensor in zip(places, inputs, strict=True):
                filled[i] = tensor
            buffers = {name: buffer.to(device, copy=True) for name, buffer in plain.named_buffers()}
            again_args, again_kwargs = tree_unflatten(filled, form)
            return functional_call(plain, buffers | dict(zip(params, weights, strict=True)), again_args, again_kwargs)

        out_form, *out = _Streamed.apply(run, device, len(places), *(leaves[i] for i in places), *params.values())
        return tree_unflatten(out, out_form)

    return forward


class _Streamed(torch.autograd.Function):
    """A block as one node of the graph: its inputs are kept, its weights are fetched in the forward and in the backward."""

    @staticmethod
    def forward(ctx: Any, run: Run, device: torch.device, count: int, *tensors: Tensor) -> tuple[Any, ...]:
        ctx.run, ctx.device, ctx.count = run, device, count
        ctx.save_for_backward(*tensors)  # the weights among them are on the CPU
        ctx.set_materialize_grads(False)
        out, form = tree_flatten(run(tensors[:count], [param.to(device, copy=True) for param in tensors[count:]]))
        return form, *out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: None, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors, needed = ctx.saved_tensors, ctx.needs_input_grad[3:]
        copies = [
            (tensor.detach() if i < ctx.count else tensor.detach().to(ctx.device, copy=True)).requires_grad_(need)
            for i, (tensor, need) in enumerate(zip(tensors, needed, strict=True))
        ]
        with torch.enable_grad():
            out = tree_leaves(ctx.run(copies[: ctx.count], copies[ctx.count :]))
        reached = [(o, grad) for o, grad in zip(out, grads, strict=True) if grad is not None and o.requires_grad]
        wanted = [copy for copy in copies if copy.requires_grad]
        found = torch.autograd.grad([o for o, _ in reached], wanted, [grad for _, grad in reached], allow_unused=True)
        made = iter(found)
        grads_of = [next(made) if need else None for need in needed]
        home = (None if grad is None else grad.to(tensor.device) for grad, tensor in zip(grads_of, tensors, strict=True))
        return None, None, None, *home
