"""The frozen weights that layers are tested with, by what tests call them."""

from dataclasses import replace

import torch

from recap_cli.core.frozen_weight import FrozenWeight
from recap_cli.plugins.weights.int8 import INT8
from recap_cli.plugins.weights.nf4 import NF4
from recap_cli.plugins.weights.plain import BF16, FP32

WEIGHTS: dict[str, FrozenWeight] = {
    name: replace(weights, name=name) for name, weights in (("fp32", FP32), ("bf16", BF16), ("int8", INT8), ("nf4", NF4))
}
QUANTIZED = [name for name, weights in WEIGHTS.items() if weights.quantizes]


def weights_of(name: str, dtype: torch.dtype | None = None) -> FrozenWeight:
    """The frozen weight of a name, whose forward computes in another type if one is given."""
    return WEIGHTS[name] if dtype is None else replace(WEIGHTS[name], dtype=dtype)
