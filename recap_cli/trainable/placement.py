"""Where the tensors of a model live while it is trained, and in which type the forward reads them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from recap_cli.core.surgery import take


@dataclass(frozen=True)
class Placement:
    """A device, and the form that weights have on it.

    Attributes:
        device: where the forward runs.
        dtype: the type of the weights that the forward reads; trainable entries have fp32 masters besides, if it is another.
        int8: True makes frozen matrices int8 codes, dense in `dtype` only while one layer is read.
        offload: True keeps the fp32 masters of all trainable entries on the CPU.
    """

    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32
    int8: bool = False
    offload: bool = False

    def forward_weight(self, tensor: Tensor) -> Tensor:
        """A tensor as the forward reads it: on the device, in `dtype` if it holds floating-point numbers."""
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)

    def master(self, tensor: Tensor, dims: Mapping[int, Tensor]) -> Tensor:
        """A copy, in fp32, of the entries at `dims` (dimension → indices), where the optimizer works."""
        return take(tensor.detach(), dims).to("cpu" if self.offload else self.device, torch.float32, copy=True)


FP32_ON_CPU = Placement()
