"""What a frozen weight is: the form in which the device holds what is not trained. A value, not a class to inherit from.

Frozen entries take this form while a round trains, and no merge reads it: the full model loses nothing. What a plugin gives is
compared with what it says, for a small matrix when it is loaded, and for every matrix that it quantizes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from recap_cli.errors import PluginError
from recap_cli.untrusted.code import guarded

Shape = tuple[int, int]  # (out, in)
Parts = Mapping[str, Tensor]
HINT = "choose another with --set finetune.weights=NAME, or repair the plugin; see docs/plugins/weights.md"
LONG = 2**20  # columns of a row; whatever a block is, they are a whole number of blocks
SAMPLES: tuple[Shape, ...] = ((8, 64), (5, 50), (1, 1), (0, 16))  # of a plugin that is loaded: with and without whole blocks
ROWS_NEAR = 1e-2  # of a row's norm: it may be rounded otherwise than in the whole matrix


@dataclass(frozen=True)
class FrozenWeight:
    """How the device holds what is frozen, and the type that the forward computes in.

    A plain one holds everything in `dtype`. One that quantizes gives `quantize`, `dense` and `nbytes`: linear layers, and
    embeddings if it gives `rows`, then hold parts in place of their frozen matrix. All else is of `dtype`.

    Attributes:
        dtype: of the weights that the forward reads.
        quantize: `quantize(matrix)` takes a frozen matrix, fp32, (out, in), of any strides and with no rows at all perhaps.
            It gives the tensors that the device holds, by name. Their shapes follow from the matrix's shape alone.
        dense: `dense(parts, out)` writes the matrix into `out`, (out, in), of any strides, on the device of the parts. It runs
            in each forward and backward of a layer, so what it allocates counts.
        rows: `rows(parts, ids, out)` writes the rows of `ids`, int64, (count,), into `out`, (count, in). Without it embeddings
            stay dense.
        nbytes: `nbytes((out, in))` is the number of bytes of all parts of such a matrix.
        accepts: `accepts((out, in))` is None, or why it cannot hold such a matrix, which then stays dense.
        name: what recipes call it. Set where it is loaded.
    """

    dtype: torch.dtype = torch.float32
    quantize: Callable[[Tensor], Parts] | None = None
    dense: Callable[[Parts, Tensor], None] | None = None
    rows: Callable[[Parts, Tensor, Tensor], None] | None = None
    nbytes: Callable[[Shape], int] | None = None
    accepts: Callable[[Shape], str | None] | None = None
    name: str = ""

    def __post_init__(self) -> None:
        given = {self.quantize is not None, self.dense is not None, self.nbytes is not None}
        if len(given) > 1 or (not self.quantizes and (self.rows is not None or self.accepts is not None)):
            raise ValueError("a frozen weight gives all of quantize, dense and nbytes, or is plain and gives none")
        if not self.dtype.is_floating_point:
            raise ValueError(f"a frozen weight computes in a floating-point type, not in {self.dtype}")

    @property
    def quantizes(self) -> bool:
        """Whether matrices are held as parts."""
        return self.quantize is not None

    @property
    def entry_bytes(self) -> float:
        """The bytes of one more entry of a long row: those of its code, with its share of what its block has."""
        if self.nbytes is None:
            return float(self.dtype.itemsize)
        return (self.nbytes((1, 2 * LONG)) - self.nbytes((1, LONG))) / LONG

    def holds(self, shape: Shape) -> bool:
        """Whether a matrix of this shape is held as parts."""
        if not self.quantizes or self.accepts is None:
            return self.quantizes
        with guarded(f"the frozen weight {self.name!r} failed in accepts({shape})", HINT):
            reason = self.accepts(shape)
            if reason is not None and not isinstance(reason, str):
                raise TypeError(f"expected None, or why not; found {type(reason).__name__}")
        return reason is None


def quantized(weights: FrozenWeight, what: str, matrix: Tensor, *, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The parts of a frozen matrix, (out, in), as the plugin gives them, compared with what it says of them.

    Args:
        weights: one that quantizes.
        what: the name of the weight, for the message.
        matrix: fp32. The values of a tensor subclass, such as the fake ones of a prediction, are not looked at.
        dtype: in which `dense` is tried; in fp32 that is quickest.

    Raises:
        PluginError: it fails, or parts, bytes or values are not what they should be.
    """
    who, shape = f"the frozen weight {weights.name!r}", (matrix.shape[0], matrix.shape[1])
    with guarded(f"{who} failed for {what} {shape}", HINT), torch.no_grad():
        given = weights.quantize(matrix)  # type: ignore[misc]
        said = weights.nbytes(shape)  # type: ignore[misc]
        problem = _wrong_parts(given, matrix) or _wrong_bytes(given, said)
        if problem is None and type(matrix) is Tensor and matrix.device.type != "meta":
            problem = _wrong_values(weights, given, matrix, dtype)
    if problem is not None:
        raise PluginError(f"{who}, for {what} {shape}: {problem}", hint=HINT)
    return dict(given)


def check(weights: FrozenWeight) -> None:
    """Try one that quantizes on small matrices: what it cannot do shows before any data are read.

    Raises `PluginError` as `quantized` does.
    """
    generator = torch.Generator().manual_seed(0)
    for shape in SAMPLES:
        if weights.holds(shape):
            quantized(weights, "a matrix of", torch.randn(shape, generator=generator), dtype=weights.dtype)
    with guarded(f"the frozen weight {weights.name!r} failed in nbytes", HINT):
        if weights.entry_bytes <= 0:
            raise ValueError("a longer row has no more bytes")


def _wrong_parts(parts: Parts, matrix: Tensor) -> str | None:
    """What of the parts is no tensor as it should be, or None."""
    if not isinstance(parts, Mapping) or len(parts) == 0:
        return f"quantize gives tensors by name, not {type(parts).__name__ if not isinstance(parts, Mapping) else 'none'}"
    for name, part in parts.items():
        if not isinstance(name, str) or not name.isidentifier():
            return f"the name {name!r} of a part is no identifier"
        if not isinstance(part, Tensor):
            return f"its part {name} is of type {type(part).__name__}, not Tensor"
        if part.device != matrix.device:
            return f"its part {name} is on {part.device}, and the matrix on {matrix.device}"
        if part.requires_grad:
            return f"its part {name} requires a gradient"
    return None


def _wrong_bytes(parts: Parts, said: int) -> str | None:
    """How the bytes that are held differ from those that `nbytes` says, or None."""
    if isinstance(said, bool) or not isinstance(said, int):
        return f"nbytes gives a whole number, not {said!r}"
    found = sum(part.nbytes for part in parts.values())
    if found != said:
        return f"its parts have {found:,} bytes, and nbytes says {said:,}"
    own = [part for part in parts.values() if type(part) is Tensor and part.device.type != "meta"]
    held = sum({part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in own}.values())
    if len(own) == len(parts) and held > said:
        return f"its parts are views of {held:,} bytes, and nbytes says {said:,}"
    return None


def _wrong_values(weights: FrozenWeight, parts: Parts, matrix: Tensor, dtype: torch.dtype) -> str | None:
    """How the matrix that comes back from the parts cannot be the one that went in, or None."""
    out = torch.full(matrix.shape, torch.nan, dtype=dtype)  # (out, in); what is not written to is seen
    weights.dense(parts, out)  # type: ignore[misc]
    ids = torch.tensor([len(matrix) - 1, 0, len(matrix) // 2] if len(matrix) else [], dtype=torch.int64)
    some = out[ids].float()  # (3, in)
    error, size = out.sub_(matrix).norm(dtype=torch.float32), matrix.norm()
    if not bool(size.isfinite()):
        return None  # a weight that is not finite is none of the plugin's doing, and the loss will say so
    if not bool(error.isfinite()):
        return "dense leaves entries that are not finite"
    if error > size:
        return f"what dense gives is farther from the weight than zeros are: by {float(error):.3g}, of {float(size):.3g}"
    if weights.rows is None:
        return None
    found = torch.full(some.shape, torch.nan, dtype=dtype)  # (3, in)
    weights.rows(parts, ids, found)
    near = (found.float() - some).norm() <= ROWS_NEAR * some.norm()
    return None if bool(near) else "rows gives other values than dense"
