"""Linear layers of which only some entries may move: no gradient and no optimizer state for the rest, ever.

The forward is one matrix product on one resident weight, as in a dense layer. What may move is a *compact* parameter that
holds only those rows (query, key, value, fc1) or columns (output matrix, fc2); the backward computes its gradient directly at
that size, from `grad_out[:, rows]ᵀ @ x` or `grad_outᵀ @ x[:, cols]`, and saves of `x` no more than that product needs. S2FT
(2412.06289) has the published relative of the idea; it cannot accumulate gradients, and masks by heads and channels only.

Where the chosen rows stand side by side and the resident weight is fp32, the compact parameter is a *view* of it: no second
copy, and nothing to write back. `bring_forward` permutes each feedforward block (its neurons may stand in any order) so that
they do.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from recap_cli.core.adapter import is_transposed
from recap_cli.core.groups import Axis, Choice
from recap_cli.core.surgery import Where, owner_of, put, take

Place = slice | Tensor  # indices along one dimension: a slice where they stand side by side


@dataclass(frozen=True)
class Slot:
    """One trainable tensor: what autograd fills, what the optimizer moves, and where the forward reads it.

    `leaf` receives the gradient; `master` holds the fp32 values, shape as `leaf`; `resident` is the (possibly bf16) tensor
    that the forward uses, of which the master is the entries at `dims`. With fp32 residents the three may share their memory.
    """

    name: str
    leaf: nn.Parameter
    master: Tensor
    resident: Tensor
    dims: dict[int, Tensor]

    @torch.no_grad()
    def write_back(self) -> None:
        """Copy the master into the resident tensor, unless they are the same memory."""
        if self.master.untyped_storage().data_ptr() != self.resident.untyped_storage().data_ptr():
            put(self.resident, self.master.to(self.resident.dtype), self.dims)


class PartialLinear(nn.Module):
    """A linear layer whose `weight` is resident and frozen but for the entries at `place` along `dim` of (out, in).

    `x` is (…, in), the result (…, out). `part` has shape (rows, in) for dim 0 and (out, columns) for dim 1, in fp32 or the
    resident dtype; a transposed layer (GPT-2's Conv1D) keeps weight and part as (in, out). Build it with `make_partial`.
    """

    weight: Tensor
    bias: Tensor | None
    place: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        part: nn.Parameter,
        bias: Tensor | None,
        bias_part: nn.Parameter | None,
        *,
        dim: int,
        place: Place,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        self.dim, self.transposed = dim, transposed
        self.span = place if isinstance(place, slice) else None
        self.register_buffer("place", place if isinstance(place, Tensor) else None, persistent=False)
        self.register_buffer("weight", weight)
        self.part, self.bias_part = part, bias_part
        if isinstance(bias, nn.Parameter):
            self.register_parameter("bias", bias)
        else:
            self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:  # (…, in) → (…, out)
        if not torch.is_grad_enabled():
            return F.linear(x, self.weight.t() if self.transposed else self.weight, self.bias)
        place = self.span if self.place is None else self.place
        weight, part = (self.weight.t(), self.part.t()) if self.transposed else (self.weight, self.part)
        # A bias of which only the chosen rows move is read from its resident buffer; its gradient goes to `bias_part`.
        out: Tensor = _Partial.apply(x, part, self.bias_part, weight, self.bias, self.dim, place)
        return out

    def extra_repr(self) -> str:
        rows, columns = self.weight.t().shape if self.transposed else self.weight.shape
        moving = self.part.shape[1 - self.dim if self.transposed else self.dim]
        return f"in={columns}, out={rows}, {moving} {('rows', 'columns')[self.dim]} move"


class _Partial(torch.autograd.Function):
    """`x @ weightᵀ + bias` with gradients for x, for the chosen rows or columns of the weight, and for its bias."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, part: Tensor, bias_part: Tensor | None, weight: Tensor, bias: Tensor | None, dim: int, place: Place
    ) -> Tensor:
        saved = (x if dim == 0 else _at(x, place, keep=False)) if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(saved, weight if ctx.needs_input_grad[0] else None)
        ctx.dim, ctx.place, ctx.part_dtype = dim, place, part.dtype
        ctx.bias_dtype = None if bias_part is None else bias_part.dtype
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        _, needs_part, needs_rows, _, needs_bias, _, _ = ctx.needs_input_grad
        flat = grad_out.reshape(-1, grad_out.shape[-1])  # (tokens, out)
        grad_x = grad_out @ weight if weight is not None else None
        rows = _at(flat, ctx.place, keep=True) if ctx.dim == 0 and (needs_part or needs_rows) else flat
        grad_part = (rows.t() @ x.reshape(-1, x.shape[-1])).to(ctx.part_dtype) if needs_part else None
        grad_rows = rows.sum(0).to(ctx.bias_dtype) if needs_rows else None
        grad_bias = flat.sum(0) if needs_bias else None
        return grad_x, grad_part, grad_rows, None, grad_bias, None, None


def _at(x: Tensor, place: Place, *, keep: bool) -> Tensor:
    """The features of `x` at `place`; a copy unless `keep` says that `x` lives on anyway."""
    if isinstance(place, slice):
        part = x[..., place]
        return part if keep else part.contiguous()
    return x.index_select(-1, place)


def make_partial(
    model: nn.Module,
    where: Where,
    *,
    frozen: Callable[[str], bool],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[Slot]:
    """Rebuild `model` in place so that just the entries at `where` (and every parameter that it does not name) may move.

    Returns one slot for each trainable tensor, named as in the model before. Parameters that `frozen` names, and those of which
    `where` selects nothing, are frozen whole. Everything is moved to `device`, and what the forward reads to `dtype`, a layer
    at a time; the masters are fp32. The model must not be moved afterwards: compact parameters may be views of their residents.

    Raises `TypeError` for a parameter that would move in part but is no linear layer's.
    """
    slots: list[Slot] = []
    for path, module in list(model.named_modules()):
        names = {
            attribute: f"{path}.{attribute}" if path else attribute for attribute, _ in module.named_parameters(recurse=False)
        }
        partly = {a for a, n in names.items() if _partly(where.get(n)) and not frozen(n)}
        if "weight" in partly and _is_linear(module):
            made, layer_slots = _partial_layer(module, names, where, frozen=frozen, device=device, dtype=dtype)
            owner, attribute = owner_of(model, path)
            setattr(owner, attribute, made)
            slots += layer_slots
            continue
        if partly:
            raise TypeError(f"{names[min(partly)]} would move in part, but {type(module).__name__} is no linear layer")
        for attribute, name in names.items():
            moves = not frozen(name) and not _nothing(where.get(name))
            slots += _dense(module, attribute, name, moves=moves, device=device, dtype=dtype)
    for module in model.modules():
        if isinstance(module, PartialLinear):
            continue  # made where it lives, and its parameter may be a view of its weight
        for attribute, buffer in module.named_buffers(recurse=False):
            setattr(module, attribute, _resident(buffer, device, dtype))
    return slots


def bring_forward(model: nn.Module, axes: Iterable[Axis], mask: Choice, where: Where) -> Where:
    """Permute the neurons of each feedforward block, in place, so that those that move come first; return where they are now.

    The block computes the same function (its neurons have no order), and the chosen ones keep their order among themselves, so
    a compact tensor means the same entries before and after. `where` is for the model as it was.
    """
    moved: Where = dict(where)
    params = dict(model.named_parameters())
    for axis in axes:
        chosen = mask[axis.name]
        if axis.kind != "neurons" or chosen.all() or not chosen.any():
            continue
        order = torch.cat([chosen.nonzero().flatten(), (~chosen).nonzero().flatten()])
        for name, dim in {(cut.param, cut.dim) for cut in axis.cuts}:
            param = params[name]
            whole = torch.arange(param.shape[dim])
            for cut in axis.cuts:
                if cut.param == name:  # several where one matrix holds gate and value
                    whole[cut.offset : cut.offset + axis.size] = order + cut.offset
            with torch.no_grad():
                param.copy_(param.index_select(dim, whole))
            moved[name] = {dim: torch.isin(whole, where[name][dim]).nonzero().flatten()}
    return moved


def _partial_layer(
    layer: nn.Module,
    names: dict[str, str],
    where: Where,
    *,
    frozen: Callable[[str], bool],
    device: torch.device | str,
    dtype: torch.dtype,
) -> tuple[PartialLinear, list[Slot]]:
    """The partial layer in place of `layer`, with the slots of its weight and bias."""
    ((dim, index),) = where[names["weight"]].items()
    transposed = is_transposed(layer)
    slot = _compact(names["weight"], layer.get_parameter("weight"), dim, index, device, dtype)
    out_dim = 1 - dim if transposed else dim
    bias: Tensor | None = getattr(layer, "bias", None)
    bias_part, slots = None, [slot]
    if bias is not None:
        dims = where.get(names["bias"], {})
        if _partly(dims) and not frozen(names["bias"]):
            if out_dim != 0 or not torch.equal(dims[0], index):
                raise TypeError(f"{names['bias']} would move at other rows than {names['weight']}")
            bias_slot = _compact(names["bias"], bias, 0, index, device, dtype)
            bias, bias_part = bias_slot.resident, bias_slot.leaf
            slots.append(bias_slot)
        else:
            moves = not frozen(names["bias"]) and not _nothing(dims)
            slots += _dense(layer, "bias", names["bias"], moves=moves, device=device, dtype=dtype)
            bias = layer.get_parameter("bias")
    place = _place(index, device)
    made = PartialLinear(slot.resident, slot.leaf, bias, bias_part, dim=out_dim, place=place, transposed=transposed)
    return made.train(layer.training), slots


def _compact(name: str, tensor: Tensor, dim: int, index: Tensor, device: torch.device | str, dtype: torch.dtype) -> Slot:
    resident = _resident(tensor.detach(), device, dtype)
    place = _place(index, device)
    if isinstance(place, slice) and dtype == torch.float32:
        leaf = nn.Parameter(resident.narrow(dim, place.start, place.stop - place.start))
    else:
        leaf = nn.Parameter(take(tensor.detach(), {dim: index}).to(device, torch.float32))
    return Slot(name, leaf, leaf.detach(), resident, {dim: index if isinstance(place, slice) else place})


def _dense(
    module: nn.Module, attribute: str, name: str, *, moves: bool, device: torch.device | str, dtype: torch.dtype
) -> Sequence[Slot]:
    """Move one whole parameter to where it lives; its slot if it may move."""
    param = getattr(module, attribute)
    leaf = nn.Parameter(_resident(param.detach(), device, dtype), requires_grad=moves)
    setattr(module, attribute, leaf)
    if not moves:
        return []
    if leaf.dtype == torch.float32:
        return [Slot(name, leaf, leaf.detach(), leaf.detach(), {})]
    leaf.grad_dtype = torch.float32  # as compact gradients: micro-batches are not summed up in bf16
    master = param.detach().to(device, torch.float32)
    return [Slot(name, leaf, master, leaf.detach(), {})]


def _resident(tensor: Tensor, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    return tensor.to(device, dtype if tensor.is_floating_point() else None)


def _place(index: Tensor, device: torch.device | str) -> Place:
    first, last = int(index[0]), int(index[-1])
    return slice(first, last + 1) if last - first + 1 == len(index) else index.to(device)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_transposed(module)


def _partly(dims: dict[int, Tensor] | None) -> bool:
    return bool(dims) and not _nothing(dims)


def _nothing(dims: dict[int, Tensor] | None) -> bool:
    return any(len(index) == 0 for index in (dims or {}).values())
