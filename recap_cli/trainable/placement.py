"""Where the tensors of a model live while it is trained, and in which form the forward reads them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from recap_cli.core.frozen_weight import FrozenWeight
from recap_cli.core.surgery import take

FP32 = FrozenWeight(name="fp32")


@dataclass(frozen=True)
class Placement:
    """A device, and the form that weights have on it.

    Attributes:
        device: where the forward runs.
        weights: how frozen weights are held; a quantized matrix is dense only while one layer is read. Trainable entries have
            fp32 masters besides, if the forward computes in another type.
        offload: True keeps the fp32 masters of all trainable entries on the CPU.
    """

    device: torch.device | str = "cpu"
    weights: FrozenWeight = FP32
    offload: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights that the forward reads."""
        return self.weights.dtype

    def forward_weight(self, tensor: Tensor) -> Tensor:
        """A tensor as the forward reads it: on the device, in `dtype` if it holds floating-point numbers."""
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)

    def master(self, tensor: Tensor, dims: Mapping[int, Tensor]) -> Tensor:
        """A copy, in fp32, of the entries at `dims` (dimension → indices), where the optimizer works."""
        return take(tensor.detach(), dims).to("cpu" if self.offload else self.device, torch.float32, copy=True)


FP32_ON_CPU = Placement()
