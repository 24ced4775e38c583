"""A matrix in 8 bits that is read and written by rows (`eightbit.py`): no block reaches past a row, so that rows may be cut anywhere.

x (rows, width)  ->  codes (rows, width) uint8 and scales (rows, ceil(width / 256)) fp32
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rankwise.eightbit import BLOCK, Quantized, dequantize, dynamic_map, quantize


class Coded:
    """A matrix in 8 bits, zero at first. Without a sign, what is not zero never becomes zero: it may be what is divided by."""

    def __init__(self, rows: int, width: int, device: torch.device, signed: bool) -> None:
        zero = int((dynamic_map(device, signed) == 0).nonzero())
        self.signed, self.padding = signed, -width % BLOCK
        self.codes = torch.full((rows, width), zero, device=device, dtype=torch.uint8)
        self.scales = torch.zeros(rows, -(-width // BLOCK), device=device)

    def read(self, rows: slice) -> Tensor:
        """Some rows, (rows, width) fp32."""
        codes = F.pad(self.codes[rows], (0, self.padding))
        return dequantize(Quantized(codes, self.scales[rows].flatten()), self.signed)[:, : self.codes.shape[1]]

    def write(self, rows: slice, values: Tensor) -> None:
        """Replaces some rows."""
        held = quantize(F.pad(values, (0, self.padding)), self.signed, positive=not self.signed)
        self.codes[rows] = held.codes[:, : self.codes.shape[1]]
        self.scales[rows] = held.absmax.view(len(values), -1)

    def tensors(self) -> dict[str, Tensor]:
        """What must be kept."""
        return {"codes": self.codes, "scales": self.scales}


def coded_bytes(rows: int, width: int) -> int:
    """Bytes of a matrix in 8 bits."""
    return rows * width + 4 * rows * -(-width // BLOCK)
