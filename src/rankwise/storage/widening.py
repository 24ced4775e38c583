"""When products with a weight of 16 bits or fewer are computed in fp32, for the storages that are told to."""

import torch
from torch import Tensor

NARROW = (torch.bfloat16, torch.float16)
_FROM_ROWS = 32  # below it, widening the weight costs more than the product


def widens(x: Tensor) -> bool:
    """Whether the products of x (or a gradient) with a 16-bit weight are computed in fp32."""
    rows = x.numel() // max(x.shape[-1], 1)
    return x.device.type == "cpu" and x.dtype in NARROW and rows >= _FROM_ROWS
