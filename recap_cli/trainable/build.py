"""A model made partly trainable: its layers exchanged for those of which some entries are trainable.

No trainable entry is held twice where the weight that the forward reads is fp32. Where the chosen rows stand side by side, the
compact parameter is a *view* of that weight; `bring_forward` permutes each feedforward block, whose neurons may stand in any
order, so that they do. Where they do not, it is a proxy parameter: a shape for autograd, without memory, and the optimizer
reads and writes the weight's entries. Where the forward reads another type, the compact parameter holds the fp32 masters.

A parameter that several layers hold stays one: one weight, one compact parameter, one `Trainable`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from recap_cli.core.adapter import is_linear, is_transposed
from recap_cli.core.axes import Axis, Cut
from recap_cli.core.frozen_weight import FrozenWeight
from recap_cli.core.surgery import IndexMap, owner_of, put, take
from recap_cli.core.ties import Once, first_names, names_of
from recap_cli.trainable.activations import note_origins
from recap_cli.trainable.embedding import PartialEmbedding, is_lookup, is_plain, places
from recap_cli.trainable.frozen_weights import (
    Partition,
    Place,
    QuantizedEmbedding,
    QuantizedMatrix,
    hold,
    place_of,
    rest_of,
)
from recap_cli.trainable.full_precision import compute_in_fp32
from recap_cli.trainable.linear import PartialLinear, keep_inputs_once
from recap_cli.trainable.norms import keep_outputs
from recap_cli.trainable.placement import FP32_ON_CPU, Placement
from recap_cli.trainable.recomputed import recompute_samples


@dataclass(frozen=True)
class Trainable:
    """One trainable tensor: what autograd fills, what the optimizer updates, and where the forward reads it.

    The values, and with them the moments, may be on another device than what the forward reads.

    Attributes:
        name: of the parameter in the model as it was.
        grad_param: receives the gradient; compact, or a whole parameter.
        own_master: the fp32 values, shape as `grad_param`. None where these are the entries at `dims` of an fp32
            `forward_weight`, and nowhere else.
        forward_weight: what the forward reads, where a step must write into it.
        dims: which of its entries they are, dimension → indices; all of them if it is empty.
    """

    name: str
    grad_param: nn.Parameter
    own_master: Tensor | None
    forward_weight: Tensor | None = None
    dims: dict[int, Tensor] = field(default_factory=dict)

    @property
    def master(self) -> Tensor:
        """The fp32 values, shape as `grad_param`: the tensor itself, or a copy of the weight's entries."""
        if self.own_master is not None:
            return self.own_master
        if self.forward_weight is None:
            raise ValueError(f"{self.name}: a trainable tensor has a master, or a weight that holds its values")
        return take(self.forward_weight, self.dims)

    @property
    def device(self) -> torch.device:
        """The device of the values, where the optimizer works."""
        return self.grad_param.device if self.own_master is None else self.own_master.device

    @torch.no_grad()
    def write_back(self, master: Tensor) -> None:
        """Put updated values to where the forward reads them, if that is elsewhere."""
        if self.forward_weight is not None:
            put(self.forward_weight, master.to(self.forward_weight.dtype), self.dims)


Rows = tuple[Tensor, Place]  # which rows (or columns): on the CPU, and where the layer lives


@dataclass(frozen=True)
class _Build:
    """What the layers of one model are made from.

    `once` makes what becomes of a tensor once for all the layers that hold it.
    """

    placement: Placement
    once: Once
    index_map: IndexMap
    used_rows: Mapping[str, Tensor]

    def is_quantized(self, module: nn.Module, weight: Tensor) -> bool:
        """Whether a weight that is frozen whole is quantized: of one that several layers hold, only if all read the same."""
        weights = self.placement.weights
        forms = {_form(*holder, weights) for holder in self.once.holders(weight)} or {_form(module, "weight", weights)}
        rows, columns = weight.t().shape if is_transposed(module) else weight.shape
        return len(forms) == 1 and forms != {"dense"} and weights.holds((rows, columns))


def make_partial(
    model: nn.Module,
    index_map: IndexMap,
    *,
    frozen: Callable[[str], bool],
    used_rows: Mapping[str, Tensor] | None = None,
    placement: Placement = FP32_ON_CPU,
    lean: bool = True,
) -> list[Trainable]:
    """Rebuild `model` in place so that just the entries at `index_map`, and what it does not name, are trainable.

    Everything goes to its place a layer at a time; buffers keep their type, and the masters are fp32. The model must not be
    moved afterwards: compact parameters may be views of the weights that the forward reads. What cannot compute in another
    type than fp32 still does not (`full_precision`).

    Args:
        model: on the CPU, in fp32.
        index_map: the trainable entries of parameters that are trainable in part. One of which it selects nothing is frozen.
        frozen: whether a parameter is frozen whole; one of several names is, only if this says so of all of them.
        used_rows: the rows of embeddings, sorted ids, that the model will ever look up. Unless such a table is trainable whole,
            or has another name too, the other rows are not held.
        placement: where everything goes, and in which form.
        lean: whether what two layers keep of one tensor is kept once (`norms`, `activations`), which rounds otherwise in the
            last bits. False leaves every operation to torch.

    Returns:
        A record for each trainable tensor, named as in the model before: a parameter of several names by its first.

    Raises:
        TypeError: a parameter would be trainable in part, but is no linear layer's, and no plain embedding's by rows, or is not
            held by such layers alone.
        ValueError: a row would be trainable, and is never looked up.
    """
    build, trainables = _Build(placement, Once(model), index_map, used_rows or {}), dict[str, Trainable]()
    called, first = names_of(model), first_names(model)
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
    exchanged: dict[nn.Module, nn.Module] = {}
    for module, (path, *others) in paths.items():
        attributes = [attribute for attribute, _ in module.named_parameters(recurse=False, remove_duplicate=False)]
        names = {attribute: first[f"{path}.{attribute}" if path else attribute] for attribute in attributes}
        trained = {a for a, n in names.items() if not all(map(frozen, called[n])) and not _nothing(index_map.get(n))}
        made, layer_trainables = _made(module, names, trained, build)
        trainables |= {trainable.name: trainable for trainable in layer_trainables}
        for place in (path, *others) if made is not None else ():
            owner, attribute = owner_of(model, place)
            setattr(owner, attribute, made)
            exchanged[module] = cast(nn.Module, made)
    _exchange_in_lists(model, exchanged)
    for module in model.modules():
        if isinstance(module, PartialLinear | PartialEmbedding | QuantizedEmbedding | QuantizedMatrix):
            continue  # made where it lives, and its parameter may be a view of its weight
        for attribute, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            setattr(module, attribute, build.once.make(buffer, "a buffer", partial(buffer.to, placement.device)))
    if placement.dtype != torch.float32:
        compute_in_fp32(model)
    if lean:
        keep_outputs(model)
        note_origins(model)
        keep_inputs_once(model)
    recompute_samples(model)
    return list(trainables.values())


def _exchange_in_lists(model: nn.Module, exchanged: Mapping[nn.Module, nn.Module]) -> None:
    """Exchange layers in plain lists too, by which some modules call them: prediction heads of MaskFormer and its relatives."""
    for held in (value for module in model.modules() for value in vars(module).values() if isinstance(value, list)):
        held[:] = [exchanged.get(one, one) if isinstance(one, nn.Module) else one for one in held]


def _made(
    module: nn.Module, names: dict[str, str], trained: set[str], build: _Build
) -> tuple[nn.Module | None, list[Trainable]]:
    """What takes the place of a module, if anything does (else it is changed in place), and what of it is trainable.

    Args:
        module: a layer of the model.
        names: of its parameters, by attribute.
        trained: the attributes that are trainable, whole or in part.
        build: what layers are made from.
    """
    partly = {a for a in trained if build.index_map.get(names[a])}
    trainables: list[Trainable] = []
    made: nn.Module | None = None
    if is_linear(module) and (
        "weight" in partly or ("weight" not in trained and build.is_quantized(module, module.get_parameter("weight")))
    ):
        made, trainables = _partial_layer(module, names, trained, build)
    elif (
        is_plain(module)
        and not build.once.holders(module.get_parameter("weight"))
        and (set(build.index_map[names["weight"]]) == {0} if partly else names["weight"] in build.used_rows and not trained)
    ):
        made, trainables = _partial_embedding(module, names["weight"], build, is_trained=bool(trained))
    elif partly:
        raise TypeError(f"{names[min(partly)]} would be trainable in part, but {type(module).__name__} is no linear layer")
    elif is_lookup(module) and not trained and build.is_quantized(module, module.get_parameter("weight")):
        made = _quantized_embedding(module, names["weight"], build)
    else:
        for attribute, name in names.items():
            trainables += _dense(module, attribute, name, build, is_trained=attribute in trained)
    return None if made is None else made.train(module.training), trainables


def whole_parameters(model: nn.Module, axes: Iterable[Axis]) -> list[str]:
    """The parameters that `axes` cut and that cannot be trainable in part.

    Trainable in part are matrices of linear layers; biases of those whose rows are cut as the bias is; and rows of a plain
    embedding that nothing else holds. A parameter that several layers hold must be the same in each of them.
    """
    once, name_of = Once(model), {id(param): name for name, param in model.named_parameters()}
    cuts: dict[str, set[tuple[str, Cut]]] = {}
    for axis in axes:
        for cut in axis.cuts:
            cuts.setdefault(cut.param, set()).add((axis.name, replace(cut, param="")))

    def in_part(name: str) -> bool:
        held = once.holders(model.get_parameter(name)) or [owner_of(model, name)]
        forms = {(attribute, is_transposed(module)) for module, attribute in held}
        if len(forms) > 1 or not all(is_linear(module) for module, _ in held):
            return len(held) == 1 and is_plain(held[0][0]) and {cut.dim for _, cut in cuts[name]} == {0}
        ((attribute, transposed),) = forms
        weights = {name_of[id(module.get_parameter("weight"))] for module, _ in held}
        rows = {(axis, replace(cut, dim=1 if transposed else 0)) for axis, cut in cuts[name]}
        return attribute == "weight" or (
            attribute == "bias" and all(cuts.get(weight) == rows and in_part(weight) for weight in weights)
        )

    return [name for name in cuts if not in_part(name)]


def _partial_layer(
    layer: nn.Module, names: dict[str, str], trained: set[str], build: _Build
) -> tuple[PartialLinear, list[Trainable]]:
    """The partial layer in place of `layer`, and what of its weight and bias is trainable; the weight may be frozen whole."""
    placement, once, index_map = build.placement, build.once, build.index_map
    name, param, transposed = names["weight"], layer.get_parameter("weight"), is_transposed(layer)
    weight = param.detach()
    dim, index = next(iter(index_map[name].items())) if "weight" in trained else (0, torch.empty(0, dtype=torch.int64))
    out_dim = 1 - dim if transposed else dim
    place = place_of(index, placement.device)
    bias, bias_part, trainables = _bias(layer, names, trained, build, (index, place) if out_dim == 0 else None)
    trainable: Trainable | None
    forward_weight: Tensor | QuantizedMatrix
    if placement.weights.holds(_frozen_shape(weight, dim, index, transposed)):
        form = f"codes of {'columns' if transposed else 'rows'}"
        trainable, forward_weight = once.make(
            param, form, lambda: _quantized(name, weight, {dim: index}, transposed, placement)
        )
        rest = place_of(rest_of(index, weight.shape[dim]), placement.device) if trainable else None
    else:
        trainable, forward_weight = once.make(
            param, "partly trained", lambda: _compact(name, weight, dim, (index, place), placement)
        )
        rest = None
    partition = Partition(out_dim, place if trainable else None, rest, transposed)
    part = trainable.grad_param if trainable else None
    made = PartialLinear(forward_weight, part, bias, bias_part, partition)
    return made, [trainable, *trainables] if trainable else trainables


def _partial_embedding(
    module: nn.Module, name: str, build: _Build, *, is_trained: bool
) -> tuple[PartialEmbedding, list[Trainable]]:
    """The table of the rows that are looked up, the trainable ones before the others, and the record of these."""
    placement = build.placement
    weight = module.get_parameter("weight").detach()  # (ids, width)
    held = build.used_rows.get(name, torch.arange(len(weight)))  # (held,)
    trained_rows = build.index_map[name][0] if is_trained else held[:0]  # (trainable,)
    frozen_rows = held[~torch.isin(held, trained_rows)]  # (frozen,)
    if len(frozen_rows) + len(trained_rows) != len(held):
        raise ValueError(f"{name}: a row would be trainable that is never looked up")
    place = places(len(weight), torch.cat([trained_rows, frozen_rows])).to(placement.device)  # (ids,)
    if placement.weights.rows is not None and placement.weights.holds((len(frozen_rows), weight.shape[1])):
        matrix = hold(placement.weights, name, take(weight, {0: frozen_rows}), placement.device)  # (frozen, width)
        trainables = [_mastered(name, take(weight, {0: trained_rows}), placement)] if is_trained else []
        return PartialEmbedding(
            matrix, trainables[0].grad_param if is_trained else None, place, dtype=placement.dtype
        ), trainables
    rows = take(weight, {0: torch.cat([trained_rows, frozen_rows])})  # (held, width)
    if not is_trained:
        return PartialEmbedding(placement.forward_weight(rows), None, place, dtype=placement.dtype), []
    first_rows = torch.arange(len(trained_rows)), slice(0, len(trained_rows))
    trainable, forward_weight = _compact(name, rows, 0, first_rows, placement)
    return PartialEmbedding(forward_weight, trainable.grad_param, place, dtype=placement.dtype), [trainable]


def _quantized_embedding(module: nn.Module, name: str, build: _Build) -> QuantizedEmbedding:
    """The frozen table, as codes of its rows."""
    weight, none = module.get_parameter("weight"), torch.empty(0, dtype=torch.int64)
    quantized = partial(_quantized, name, weight.detach(), {0: none}, False, build.placement)
    _, matrix = build.once.make(weight, "codes of rows", quantized)
    return QuantizedEmbedding(matrix, build.placement.dtype)


def _bias(
    layer: nn.Module, names: dict[str, str], trained: set[str], build: _Build, rows: Rows | None
) -> tuple[Tensor | None, nn.Parameter | None, list[Trainable]]:
    """The bias that the forward reads, its trainable part where that is just the `rows` of the weight, and the record of it."""
    if getattr(layer, "bias", None) is None:
        return None, None, []
    name = names["bias"]
    if "bias" in trained and build.index_map.get(name):
        if rows is None or not torch.equal(build.index_map[name][0], rows[0]):
            raise TypeError(f"{name} would be trainable at other rows than {names['weight']}")
        bias, at = layer.get_parameter("bias"), rows
        trainable, forward_weight = build.once.make(
            bias, "partly trained", lambda: _compact(name, bias, 0, at, build.placement)
        )
        return forward_weight, trainable.grad_param, [trainable]
    trainables = _dense(layer, "bias", name, build, is_trained="bias" in trained)
    return layer.get_parameter("bias"), None, list(trainables)


def _compact(name: str, tensor: Tensor, dim: int, rows: Rows, placement: Placement) -> tuple[Trainable, Tensor]:
    """The record of the entries at `rows` along `dim`, and the tensor that the forward reads, of which they are part."""
    index, place = rows
    forward_weight = placement.forward_weight(tensor.detach())  # (out, in), or (out,) for a bias
    dims = {} if isinstance(place, slice) else {dim: place}
    entries = forward_weight.narrow(dim, place.start, len(index)) if isinstance(place, slice) else forward_weight
    if placement.dtype == torch.float32 and not placement.offload:
        if isinstance(place, slice):
            grad_param = nn.Parameter(entries)  # (rows, in) or (out, columns), a view
            return Trainable(name, grad_param, grad_param.detach()), forward_weight
        return Trainable(name, _proxy(forward_weight, dim, len(index)), None, entries, dims), forward_weight
    own_master = placement.master(tensor, {dim: index})  # (rows, in) or (out, columns)
    grad_param = _proxy(forward_weight, dim, len(index)) if placement.offload else nn.Parameter(own_master)
    return Trainable(name, grad_param, own_master, entries, dims), forward_weight


def _proxy(forward_weight: Tensor, dim: int, length: int) -> nn.Parameter:
    """A parameter that has a shape, for a gradient in fp32, and no memory."""
    shape = [length if d == dim else size for d, size in enumerate(forward_weight.shape)]
    return nn.Parameter(forward_weight.new_empty((), dtype=torch.float32).expand(shape))  # (rows, in) or (out, columns)


def _quantized(
    name: str, weight: Tensor, dims: dict[int, Tensor], transposed: bool, placement: Placement
) -> tuple[Trainable | None, QuantizedMatrix]:
    """The record of what is trainable, the entries at `dims`, if there are any; and the matrix of what is frozen."""
    ((dim, index),) = dims.items()
    frozen = take(weight, {dim: rest_of(index, weight.shape[dim])})  # without the entries at `index` along `dim`
    matrix = hold(placement.weights, name, frozen.t() if transposed else frozen, placement.device)  # (out, in)
    return _mastered(name, take(weight, dims), placement) if len(index) > 0 else None, matrix


def _frozen_shape(weight: Tensor, dim: int, index: Tensor, transposed: bool) -> tuple[int, int]:
    """(out, in) of what is left of a weight without the entries at `index` along `dim`."""
    first, second = (size - len(index) if d == dim else size for d, size in enumerate(weight.shape))
    return (second, first) if transposed else (first, second)


def _mastered(name: str, values: Tensor, placement: Placement, dtype: torch.dtype = torch.float32) -> Trainable:
    """The record of a tensor that is trainable whole: of `dtype`, or with `offload` of the type that the forward reads."""
    dtype = placement.dtype if placement.offload else dtype
    grad_param = nn.Parameter(values.to(placement.device, dtype))
    if dtype == torch.float32 and not placement.offload:
        return Trainable(name, grad_param, grad_param.detach())
    grad_param.grad_dtype = torch.float32  # as compact gradients: micro-batches are not summed up in bf16
    return Trainable(name, grad_param, placement.master(values, {}), grad_param.detach())


def _dense(module: nn.Module, attribute: str, name: str, build: _Build, *, is_trained: bool) -> Sequence[Trainable]:
    """Move one whole parameter to where it lives; its record if it is trainable."""
    param, placement = getattr(module, attribute), build.placement
    if not is_trained:
        frozen = build.once.make(
            param, "frozen", lambda: nn.Parameter(placement.forward_weight(param.detach()), requires_grad=False)
        )
        setattr(module, attribute, frozen)
        return []
    trainable = build.once.make(param, "trained", lambda: _mastered(name, param.detach(), placement, dtype=placement.dtype))
    setattr(module, attribute, trainable.grad_param)
    return [trainable]


def _form(module: nn.Module, attribute: str, weights: FrozenWeight) -> str:
    """How a layer reads a frozen tensor: as a matrix of its rows, of its columns, or dense."""
    if attribute == "weight" and isinstance(module, nn.Embedding):
        return "rows" if is_lookup(module) and weights.rows is not None else "dense"
    return ("columns" if is_transposed(module) else "rows") if attribute == "weight" and is_linear(module) else "dense"


def _nothing(dims: dict[int, Tensor] | None) -> bool:
    return any(len(index) == 0 for index in (dims or {}).values())
