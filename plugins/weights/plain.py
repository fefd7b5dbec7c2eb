"""Weights as numbers of one type: fp32, and bf16, whose trainable entries have fp32 masters."""

import torch

from recap_cli.api import FrozenWeight

FP32 = FrozenWeight(dtype=torch.float32)
BF16 = FrozenWeight(dtype=torch.bfloat16)
