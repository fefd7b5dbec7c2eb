"""Frozen matrices as a plugin holds them, made dense again one layer at a time (paper, end of sec. 3: int8).

Only frozen entries are ever quantized. Trainable ones stay in fp32, and no merge reads a code: the full model loses nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recap_cli.core.frozen_weight import FrozenWeight, Shape, quantized

Place = slice | Tensor  # indices along one dimension: a slice where they stand side by side


@dataclass(frozen=True)
class Partition:
    """Which entries of a linear layer's weight, (out, in), are trainable.

    Attributes:
        dim: the dimension of (out, in) along which they are chosen: 0 for rows, 1 for columns.
        trainable: their indices along it; None where all entries are frozen.
        frozen: the indices of the others; None where the frozen weight is dense, and nothing needs them.
        transposed: True for a layer that keeps its weight as (in, out), as GPT-2's Conv1D does.
    """

    dim: int = 0
    trainable: Place | None = None
    frozen: Place | None = None
    transposed: bool = False


class QuantizedMatrix(nn.Module):
    """A frozen matrix, (out, in), whose parts are the buffers of this module.

    Several layers may hold one: that of a weight that is tied.
    """

    def __init__(self, weights: FrozenWeight, parts: Mapping[str, Tensor], shape: Shape) -> None:
        super().__init__()
        self.weights, self.shape = weights, shape
        self._names = tuple(parts)
        for name, part in parts.items():
            self.register_buffer(f"part_{name}", part)  # so that none takes the place of a module's own attribute

    @property
    def parts(self) -> dict[str, Tensor]:
        """As the plugin gave them, by name."""
        return {name: getattr(self, f"part_{name}") for name in self._names}

    @property
    def device(self) -> torch.device:
        """Where the parts are."""
        return next(self.buffers()).device

    def write(self, out: Tensor) -> None:
        """Write the matrix into `out`, (out, in), of any strides."""
        self.weights.dense(self.parts, out)  # type: ignore[misc]

    def dense(self, dtype: torch.dtype, *, transposed: bool = False) -> Tensor:
        """The matrix, (out, in); with `transposed` the transpose of what is contiguous."""
        rows, columns = self.shape
        out = torch.empty((columns, rows) if transposed else self.shape, dtype=dtype, device=self.device)
        out = out.t() if transposed else out  # (out, in)
        self.write(out)
        return out

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:  # (…) → (…, in)
        """The rows of `ids`."""
        out = torch.empty(ids.numel(), self.shape[1], dtype=dtype, device=self.device)  # (count, in)
        self.weights.rows(self.parts, ids.reshape(-1), out)  # type: ignore[misc]
        return out.view(*ids.shape, self.shape[1])  # (…, in)

    def extra_repr(self) -> str:
        return f"{self.weights.name}, {tuple(self.shape)}"


def hold(weights: FrozenWeight, name: str, matrix: Tensor, device: torch.device | str) -> QuantizedMatrix:
    """A frozen matrix, fp32, (out, in), as it lies on a device.

    Args:
        weights: one that quantizes.
        name: of the parameter, for the message.
        matrix: on the CPU.
        device: where the parts go.

    Raises:
        PluginError: the plugin fails, or gives what is not as it says.
    """
    parts = {part: tensor.to(device) for part, tensor in quantized(weights, name, matrix).items()}
    return QuantizedMatrix(weights, parts, (matrix.shape[0], matrix.shape[1]))


@torch.no_grad()
def dense_weight(
    matrix: QuantizedMatrix, part: Tensor | None = None, partition: Partition = Partition(), *, dtype: torch.dtype
) -> Tensor:
    """The dense weight of a layer, made of its quantized entries and its fp32 masters.

    Args:
        matrix: the frozen entries: (frozen, in) for `partition.dim` 0, (out, frozen) for 1.
        part: fp32, the trainable entries, (rows, in) or (out, columns); without them the matrix is the whole weight.
        partition: where these stand.
        dtype: the type of the result.

    Returns:
        The weight, (out, in).
    """
    dim, place, rest = partition.dim, partition.trainable, partition.frozen
    if part is None or place is None or rest is None:
        return matrix.dense(dtype, transposed=partition.transposed)
    shape = list(matrix.shape)
    shape[dim] += part.shape[dim]
    dense = torch.empty(shape, dtype=dtype, device=matrix.device)  # (out, in)
    if isinstance(place, slice):
        _narrow(dense, dim, place).copy_(part)
    else:
        dense.index_copy_(dim, place, part.to(dtype))
    if isinstance(rest, slice):
        matrix.write(_narrow(dense, dim, rest))
    else:
        dense.index_copy_(dim, rest, matrix.dense(dtype))
    return dense


def place_of(index: Tensor, device: torch.device | str) -> Place:
    """Sorted indices as a slice where they stand side by side (or are none), else on the device."""
    if len(index) == 0:
        return slice(0, 0)
    first, last = int(index[0]), int(index[-1])
    return slice(first, last + 1) if last - first + 1 == len(index) else index.to(device)


def rest_of(index: Tensor, length: int) -> Tensor:
    """The indices below `length` that `index` does not name."""
    return torch.ones(length, dtype=torch.bool).index_fill_(0, index, False).nonzero().flatten()  # (length − chosen,)


class QuantizedEmbedding(nn.Module):
    """A frozen embedding whose table is a quantized matrix: ids (…) → vectors (…, width) of `dtype`."""

    def __init__(self, matrix: QuantizedMatrix, dtype: torch.dtype) -> None:
        super().__init__()
        self.matrix, self.dtype = matrix, dtype

    @property
    def weight(self) -> Tensor:
        """The dense table, (ids, width), made anew: for models that read it as a whole, as those with queries do."""
        return self.matrix.dense(self.dtype)

    def forward(self, ids: Tensor) -> Tensor:  # (…) → (…, width)
        return self.matrix.rows(ids, self.dtype)


def _narrow(dense: Tensor, dim: int, place: slice) -> Tensor:
    """The view of a weight at a slice along one dimension."""
    return dense.narrow(dim, place.start, place.stop - place.start)  # (rows, in) or (out, columns)
