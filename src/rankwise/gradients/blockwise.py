"""Numbers in 8 bits: each row of a matrix in blocks of 256, each block by its largest magnitude, on a map that is finest near zero.

    x (rows, width)  ->  codes (rows, width) uint8 and scales (rows, ceil(width / 256)):     x ~ level(code) * scale

Dettmers et al. 2021, "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861, section 2. The levels are those of the dynamic
data type, equal to bitsandbytes' number by number. Blocks never reach past a row, so that rows may be cut anywhere.
"""

from functools import lru_cache

import torch
from torch import Tensor

BLOCK = 256


@lru_cache(maxsize=8)
def dynamic_levels(signed: bool) -> Tensor:
    """The 256 levels, ascending, from -1 (or 0) to 1: seven decades, of which each holds twice as many levels as the one below it."""
    found = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1 if signed else 2 ** (decade + 1) + 1)
        middles = 10.0 ** (decade - 6) * (edges[:-1] + edges[1:]) / 2
        found += middles.tolist()
        if signed:
            found += (-middles).tolist()
    return torch.tensor(sorted(found))


class Coded:
    """A matrix in 8 bits."""

    def __init__(self, rows: int, width: int, device: torch.device, signed: bool) -> None:
        self.levels = dynamic_levels(signed).to(device)
        self.middles = (self.levels[1:] + self.levels[:-1]) / 2
        self.zero = int((self.levels == 0).nonzero())
        self.signed = signed
        self.codes = torch.full((rows, width), self.zero, device=device, dtype=torch.uint8)
        self.scales = torch.zeros(rows, -(-width // BLOCK), device=device)

    def read(self, rows: slice) -> Tensor:
        """Some rows, (rows, width) fp32."""
        codes = self.codes[rows]
        return self.levels[codes.int()].mul_(self._spread(self.scales[rows]))

    def write(self, rows: slice, values: Tensor) -> None:
        """Replaces some rows. Without a sign, what is not zero never becomes zero: it may be what is divided by."""
        width, padding = values.shape[1], self.scales.shape[1] * BLOCK - values.shape[1]
        blocks = torch.nn.functional.pad(values, (0, padding)).view(len(values), -1, BLOCK)
        scales = blocks.abs().amax(2)  # (rows, blocks)
        self.scales[rows] = scales
        ratios = values / self._spread(torch.where(scales > 0, scales, 1.0))
        codes = torch.bucketize(ratios, self.middles.to(ratios.dtype), out_int32=True)
        if not self.signed:
            codes = torch.where(values > 0, codes.clamp_min(self.zero + 1), codes)
        self.codes[rows] = codes.to(torch.uint8)[:, :width]

    def _spread(self, scales: Tensor) -> Tensor:
        """One number per element, (rows, width)."""
        return scales.repeat_interleave(BLOCK, 1)[:, : self.codes.shape[1]]

    def tensors(self) -> dict[str, Tensor]:
        """What must be kept."""
        return {"codes": self.codes, "scales": self.scales}


def coded_bytes(rows: int, width: int) -> int:
    """Bytes of a matrix in 8 bits."""
    return rows * width + 4 * rows * -(-width // BLOCK)
