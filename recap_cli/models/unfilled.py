"""Models on the meta device stay unfilled: they have no values, and what timm draws them by takes four fifths of its time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

FILLS = frozenset(
    {Tensor.uniform_, Tensor.normal_, Tensor.erfinv_, Tensor.mul_, Tensor.add_, Tensor.clamp_, Tensor.zero_, Tensor.fill_}
)


class _Unfilled(TorchFunctionMode):
    """Leaves tensors of the meta device as they are where a function would fill them in place."""

    def __torch_function__(
        self, function: Callable[..., Any], _: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function in FILLS and args[0].is_meta:
            return args[0]
        return function(*args, **(kwargs or {}))


@contextmanager
def meta_device() -> Iterator[None]:
    """Make tensors on the meta device inside, and fill none of them."""
    with torch.device("meta"), _Unfilled():
        yield
