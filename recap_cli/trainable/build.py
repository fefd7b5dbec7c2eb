"""A model made partly trainable: its layers exchanged for those that move in part, and a slot for each tensor that moves.

No moving entry is held twice where the resident weight is fp32. Where the chosen rows stand side by side, the compact parameter
is a *view* of it; `bring_forward` permutes each feedforward block (its neurons may stand in any order) so that they do. Where
they do not, it is a handle: a shape for autograd, without memory, and the optimizer reads and writes the resident's entries.
With bf16 or int8 residents the compact parameter holds the fp32 masters.

A parameter that several layers hold stays one: one resident, one compact parameter, one slot.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from recap_cli.core.adapter import is_transposed
from recap_cli.core.axes import Axis, UnitMask
from recap_cli.core.surgery import IndexMap, owner_of, put, take
from recap_cli.core.ties import Once, first_names, names_of
from recap_cli.trainable.embedding import PartialEmbedding, is_hooked, is_plain, places
from recap_cli.trainable.frozen_weights import Place, QuantizedEmbedding, place_of, quantize, rest_of
from recap_cli.trainable.linear import PartialLinear


@dataclass(frozen=True)
class Trainable:
    """One trainable tensor: what autograd fills, what the optimizer moves, and where the forward reads it.

    `grad_param` receives the gradient. `own_master` holds the fp32 values, shape as `grad_param`. It is None where they are the
    entries at `dims` of an fp32 `forward_weight`, and nowhere else. `forward_weight` is what the forward reads, where a step
    must write into it. The values, and with them the moments, may be on another device than what the forward reads.
    """

    name: str
    grad_param: nn.Parameter
    own_master: Tensor | None
    forward_weight: Tensor | None = None
    dims: dict[int, Tensor] = field(default_factory=dict)

    @property
    def master(self) -> Tensor:
        """The fp32 values, shape as `grad_param`: the tensor itself, or a copy of the resident's entries."""
        if self.own_master is not None:
            return self.own_master
        if self.forward_weight is None:
            raise ValueError(f"{self.name}: a slot has values of its own, or a resident that holds them")
        return take(self.forward_weight, self.dims)

    @property
    def device(self) -> torch.device:
        """The device of the values, where the optimizer works."""
        return self.grad_param.device if self.own_master is None else self.own_master.device

    @torch.no_grad()
    def write_back(self, master: Tensor) -> None:
        """Put moved values to where the forward reads them, if that is elsewhere."""
        if self.forward_weight is not None:
            put(self.forward_weight, master.to(self.forward_weight.dtype), self.dims)


Rows = tuple[Tensor, Place]  # which rows (or columns): on the CPU, and where the layer lives


@dataclass(frozen=True)
class _Placement:
    """Where tensors live, and in which type the forward reads them.

    `int8` says that frozen matrices are quantized, `offload` that the fp32 masters of all that moves stay on the CPU. `once`
    makes what becomes of a tensor, once for all the layers that hold it.
    """

    device: torch.device | str
    dtype: torch.dtype
    int8: bool
    offload: bool
    once: Once

    def forward_weight(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)

    def codes(self, module: nn.Module, weight: Tensor) -> bool:
        """Whether a frozen weight becomes int8 codes: of one that several layers hold, only if all of them read the same."""
        forms = {_form(*holder) for holder in self.once.holders(weight)} or {_form(module, "weight")}
        return self.int8 and len(forms) == 1 and forms != {"dense"}

    def master(self, tensor: Tensor, dims: dict[int, Tensor]) -> Tensor:
        """A copy, in fp32, of the entries at `dims`."""
        return take(tensor.detach(), dims).to("cpu" if self.offload else self.device, torch.float32, copy=True)


def make_partial(
    model: nn.Module,
    index_map: IndexMap,
    *,
    frozen: Callable[[str], bool],
    used_rows: Mapping[str, Tensor] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    int8: bool = False,
    offload: bool = False,
) -> list[Trainable]:
    """Rebuild `model` in place so that just the entries at `index_map` (and every parameter that it does not name) may move.

    `used_rows` names the rows of embeddings, sorted, that the model will ever look up; unless such a table moves whole, or has
    another name too, the others are not held.

    Returns one slot for each trainable tensor, named as in the model before: a parameter of several names by its first, and it
    is frozen only if `frozen` says so of all of them. Those of which `index_map` selects nothing are frozen whole. Everything
    goes to `device`, and the parameters that the forward reads to `dtype`, a layer at a time; buffers keep their type, and the
    masters are fp32. With `int8` the frozen entries of linear layers and embeddings become codes, made dense in
    `dtype` where they are read. With `offload` the masters stay on the CPU, and the device holds what the forward reads and no
    more. The model must not be moved afterwards: compact parameters may be views of their residents.

    Raises `TypeError` for a parameter that would move in part but is no linear layer's, and no plain embedding's by rows, or is
    not held by such layers alone; `ValueError` for a row that would move and is never looked up.
    """
    placement, trainables = _Placement(device, dtype, int8, offload, Once(model)), dict[str, Trainable]()
    used_rows, called, first = used_rows or {}, names_of(model), first_names(model)
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
    for module, (path, *others) in paths.items():
        attributes = [attribute for attribute, _ in module.named_parameters(recurse=False, remove_duplicate=False)]
        names = {attribute: first[f"{path}.{attribute}" if path else attribute] for attribute in attributes}
        trained = {a for a, n in names.items() if not all(map(frozen, called[n])) and not _nothing(index_map.get(n))}
        made, layer_trainables = _made(module, names, index_map, trained, used_rows, placement)
        trainables |= {trainable.name: trainable for trainable in layer_trainables}
        for place in (path, *others) if made is not None else ():
            owner, attribute = owner_of(model, place)
            setattr(owner, attribute, made)
    for module in model.modules():
        if isinstance(module, PartialLinear | PartialEmbedding | QuantizedEmbedding):
            continue  # made where it lives, and its parameter may be a view of its weight
        for attribute, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            setattr(module, attribute, placement.once.make(buffer, "a buffer", partial(buffer.to, device)))
    return list(trainables.values())


def _made(
    module: nn.Module,
    names: dict[str, str],
    index_map: IndexMap,
    trained: set[str],
    used_rows: Mapping[str, Tensor],
    placement: _Placement,
) -> tuple[nn.Module | None, list[Trainable]]:
    """What takes the place of a module, if anything does (else it is changed in place), and the slots of its parameters."""
    partly = {a for a in trained if index_map.get(names[a])}
    trainables: list[Trainable] = []
    made: nn.Module | None = None
    if _is_linear(module) and (
        "weight" in partly or ("weight" not in trained and placement.codes(module, module.get_parameter("weight")))
    ):
        made, trainables = _partial_layer(module, names, index_map, trained, placement)
    elif (
        is_plain(module)
        and not placement.once.holders(module.get_parameter("weight"))
        and (set(index_map[names["weight"]]) == {0} if partly else names["weight"] in used_rows and not trained)
    ):
        made, trainables = _partial_embedding(module, names["weight"], index_map, used_rows, placement, trained=bool(trained))
    elif partly:
        raise TypeError(f"{names[min(partly)]} would move in part, but {type(module).__name__} is no linear layer")
    elif isinstance(module, nn.Embedding) and not trained and placement.codes(module, module.weight):
        weight, none = module.weight, torch.empty(0, dtype=torch.int64)
        quantized = partial(_quantized, names["weight"], weight.detach(), 0, none, False, placement)
        _, codes, scale = placement.once.make(weight, "codes of rows", quantized)
        made = QuantizedEmbedding(codes, scale, placement.dtype)
    else:
        for attribute, name in names.items():
            trainables += _dense(module, attribute, name, trained=attribute in trained, placement=placement)
    return None if made is None else made.train(module.training), trainables


def tied_otherwise(model: nn.Module, params: Iterable[str]) -> list[str]:
    """Those of `params` that are tied to something else than the same matrix or bias of another linear layer of the same form,
    so that they cannot move in part.
    """
    once, called = Once(model), names_of(model)

    def wrong(name: str) -> bool:
        held = once.holders(model.get_parameter(name))
        kinds = {(attribute, is_transposed(module)) for module, attribute in held}
        return len(kinds) > 1 or any(attribute not in ("weight", "bias") or not _is_linear(m) for m, attribute in held)

    return [" and ".join(called[name]) for name in dict.fromkeys(params) if wrong(name)]


def bring_forward(model: nn.Module, axes: Iterable[Axis], mask: UnitMask, index_map: IndexMap) -> IndexMap:
    """Permute the neurons of each feedforward block, in place, so that those that move come first; return where they are now.

    The block computes the same function (its neurons have no order), and the chosen ones keep their order among themselves, so
    a compact tensor means the same entries before and after. `index_map` is for the model as it was.
    """
    moved: IndexMap = dict(index_map)
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
            moved[name] = {dim: torch.isin(whole, index_map[name][dim]).nonzero().flatten()}
    return moved


def _partial_layer(
    layer: nn.Module, names: dict[str, str], index_map: IndexMap, trained: set[str], placement: _Placement
) -> tuple[PartialLinear, list[Trainable]]:
    """The partial layer in place of `layer`, with the slots of its weight and bias; of the weight, nothing may move either."""
    name, param, transposed = names["weight"], layer.get_parameter("weight"), is_transposed(layer)
    weight = param.detach()
    dim, index = next(iter(index_map[name].items())) if "weight" in trained else (0, torch.empty(0, dtype=torch.int64))
    out_dim = 1 - dim if transposed else dim
    place = place_of(index, placement.device)
    bias, bias_part, trainables = _bias(layer, names, index_map, trained, placement, (index, place) if out_dim == 0 else None)
    if placement.int8:
        form = f"codes of {'columns' if transposed else 'rows'}"
        trainable, codes, scale = placement.once.make(
            param, form, lambda: _quantized(name, weight, dim, index, transposed, placement)
        )
        rest = place_of(rest_of(index, weight.shape[dim]), placement.device) if trainable else None
        forward_weight = codes
    else:
        trainable, forward_weight = placement.once.make(
            param, "partly trained", lambda: _compact(name, weight, dim, (index, place), placement)
        )
        scale, rest = None, None
    made = PartialLinear(
        forward_weight,
        trainable.grad_param if trainable else None,
        bias,
        bias_part,
        dim=out_dim,
        place=place if trainable else None,
        transposed=transposed,
        scale=scale,
        rest=rest,
    )
    return made, [trainable, *trainables] if trainable else trainables


def _partial_embedding(
    module: nn.Module, name: str, index_map: IndexMap, used_rows: Mapping[str, Tensor], placement: _Placement, *, trained: bool
) -> tuple[PartialEmbedding, list[Trainable]]:
    """The table of the rows that are looked up, those that move before the others, and the slot of these."""
    weight = module.get_parameter("weight").detach()
    held = used_rows.get(name, torch.arange(len(weight)))
    trained_rows = index_map[name][0] if trained else held[:0]
    frozen_rows = held[~torch.isin(held, trained_rows)]
    if len(frozen_rows) + len(trained_rows) != len(held):
        raise ValueError(f"{name}: a row would move that is never looked up")
    place = places(len(weight), torch.cat([trained_rows, frozen_rows])).to(placement.device)
    if placement.int8:
        codes, scale = (t.to(placement.device) for t in quantize(take(weight, {0: frozen_rows})))
        trainables = [_mastered(name, take(weight, {0: trained_rows}), placement)] if trained else []
        return PartialEmbedding(
            codes, trainables[0].grad_param if trained else None, place, dtype=placement.dtype, scale=scale
        ), trainables
    rows = take(weight, {0: torch.cat([trained_rows, frozen_rows])})
    if not trained:
        return PartialEmbedding(placement.forward_weight(rows), None, place, dtype=placement.dtype), []
    trainable, forward_weight = _compact(
        name, rows, 0, (torch.arange(len(trained_rows)), slice(0, len(trained_rows))), placement
    )
    return PartialEmbedding(forward_weight, trainable.grad_param, place, dtype=placement.dtype), [trainable]


def _bias(
    layer: nn.Module, names: dict[str, str], index_map: IndexMap, trained: set[str], placement: _Placement, rows: Rows | None
) -> tuple[Tensor | None, nn.Parameter | None, list[Trainable]]:
    """The resident bias, the part of it that moves where that are just the `rows` of the weight, and the slot if it moves."""
    if getattr(layer, "bias", None) is None:
        return None, None, []
    name = names["bias"]
    if "bias" in trained and index_map.get(name):
        if rows is None or not torch.equal(index_map[name][0], rows[0]):
            raise TypeError(f"{name} would move at other rows than {names['weight']}")
        bias, at = layer.get_parameter("bias"), rows
        trainable, forward_weight = placement.once.make(bias, "partly trained", lambda: _compact(name, bias, 0, at, placement))
        return forward_weight, trainable.grad_param, [trainable]
    trainables = _dense(layer, "bias", name, trained="bias" in trained, placement=placement)
    return layer.get_parameter("bias"), None, list(trainables)


def _compact(name: str, tensor: Tensor, dim: int, rows: Rows, placement: _Placement) -> tuple[Trainable, Tensor]:
    """The slot of the entries at `rows` along `dim`, and the resident tensor that they are part of."""
    index, place = rows
    forward_weight = placement.forward_weight(tensor.detach())
    dims = {} if isinstance(place, slice) else {dim: place}
    entries = forward_weight.narrow(dim, place.start, len(index)) if isinstance(place, slice) else forward_weight
    if placement.dtype == torch.float32 and not placement.offload:
        if isinstance(place, slice):
            grad_param = nn.Parameter(entries)
            return Trainable(name, grad_param, grad_param.detach()), forward_weight
        return Trainable(name, _proxy(forward_weight, dim, len(index)), None, entries, dims), forward_weight
    own_master = placement.master(tensor, {dim: index})
    grad_param = _proxy(forward_weight, dim, len(index)) if placement.offload else nn.Parameter(own_master)
    return Trainable(name, grad_param, own_master, entries, dims), forward_weight


def _proxy(forward_weight: Tensor, dim: int, length: int) -> nn.Parameter:
    """A parameter that has a shape, for a gradient in fp32, and no memory."""
    shape = [length if d == dim else size for d, size in enumerate(forward_weight.shape)]
    return nn.Parameter(forward_weight.new_empty((), dtype=torch.float32).expand(shape))


def _quantized(
    name: str, weight: Tensor, dim: int, index: Tensor, transposed: bool, placement: _Placement
) -> tuple[Trainable | None, Tensor, Tensor]:
    """The slot of what moves, if anything does, and the codes, (out, in), and scales of what does not."""
    frozen_rows = take(weight, {dim: rest_of(index, weight.shape[dim])})
    codes, scale = (t.to(placement.device) for t in quantize(frozen_rows.t() if transposed else frozen_rows))
    if len(index) == 0:
        return None, codes, scale
    return _mastered(name, take(weight, {dim: index}), placement), codes, scale


def _mastered(name: str, values: Tensor, placement: _Placement, dtype: torch.dtype = torch.float32) -> Trainable:
    """The slot of a tensor that moves whole: of `dtype`, or with `offload` of the type that the forward reads."""
    dtype = placement.dtype if placement.offload else dtype
    grad_param = nn.Parameter(values.to(placement.device, dtype))
    if dtype == torch.float32 and not placement.offload:
        return Trainable(name, grad_param, grad_param.detach())
    grad_param.grad_dtype = torch.float32  # as compact gradients: micro-batches are not summed up in bf16
    return Trainable(name, grad_param, placement.master(values, {}), grad_param.detach())


def _dense(module: nn.Module, attribute: str, name: str, *, trained: bool, placement: _Placement) -> Sequence[Trainable]:
    """Move one whole parameter to where it lives; its slot if it may move."""
    param = getattr(module, attribute)
    if not trained:
        frozen = placement.once.make(
            param, "frozen", lambda: nn.Parameter(placement.forward_weight(param.detach()), requires_grad=False)
        )
        setattr(module, attribute, frozen)
        return []
    trainable = placement.once.make(param, "trained", lambda: _mastered(name, param.detach(), placement, dtype=placement.dtype))
    setattr(module, attribute, trainable.grad_param)
    return [trainable]


def _form(module: nn.Module, attribute: str) -> str:
    """How a layer reads a frozen tensor: as rows that have a scale each, as columns, or dense."""
    if attribute == "weight" and isinstance(module, nn.Embedding):
        return "dense" if is_hooked(module) else "rows"
    return ("columns" if is_transposed(module) else "rows") if attribute == "weight" and _is_linear(module) else "dense"


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_transposed(module)


def _nothing(dims: dict[int, Tensor] | None) -> bool:
    return any(len(index) == 0 for index in (dims or {}).values())
