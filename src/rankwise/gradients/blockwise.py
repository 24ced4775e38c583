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


@lru_cache(maxsize=8)
def code_table(signed: bool) -> Tensor:
    """Code of the nearest level for each of the 65,536 bf16 numbers, by its bits. Looking up is many times faster than searching, and
    rounding to bf16 first moves a number by a 256th at most, less than a third of the distance between two levels.

    Without a sign, what is not zero never gets the code of zero: it may be what is divided by.
    """
    levels = dynamic_levels(signed)
    numbers = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float().nan_to_num(0.0)
    codes = torch.bucketize(numbers.clamp(-1, 1), (levels[1:] + levels[:-1]) / 2)
    if not signed:
        codes = torch.where(numbers > 0, codes.clamp_min(1), codes)
    return codes.to(torch.uint8)


class Coded:
    """A matrix in 8 bits."""

    def __init__(self, rows: int, width: int, device: torch.device, signed: bool) -> None:
        levels = dynamic_levels(signed)
        self.levels, self.table = levels.to(device), code_table(signed).to(device)
        self.codes = torch.full((rows, width), int((levels == 0).nonzero()), device=device, dtype=torch.uint8)
        self.scales = torch.zeros(rows, -(-width // BLOCK), device=device)

    def read(self, rows: slice) -> Tensor:
        """Some rows, (rows, width) fp32."""
        codes = self.codes[rows]
        found = self.levels.index_select(0, codes.flatten().int()).view(codes.shape)
        return found.mul_(self._spread(self.scales[rows]))

    def write(self, rows: slice, values: Tensor) -> None:
        """Replaces some rows."""
        padding = self.scales.shape[1] * BLOCK - values.shape[1]
        blocks = torch.nn.functional.pad(values, (0, padding)) if padding else values
        scales = blocks.view(len(values), -1, BLOCK).abs().amax(2)  # (rows, blocks)
        self.scales[rows] = scales
        ratios = (values / self._spread(torch.where(scales > 0, scales, 1.0))).to(torch.bfloat16)
        bits = ratios.view(torch.int16).int().bitwise_and_(0xFFFF)
        self.codes[rows] = self.table.index_select(0, bits.flatten()).view(bits.shape)

    def _spread(self, scales: Tensor) -> Tensor:
        """One number per element, (rows, width)."""
        return scales[:, :, None].expand(-1, -1, BLOCK).reshape(len(scales), -1)[:, : self.codes.shape[1]]

    def tensors(self) -> dict[str, Tensor]:
        """What must be kept."""
        return {"codes": self.codes, "scales": self.scales}


def coded_bytes(rows: int, width: int) -> int:
    """Bytes of a matrix in 8 bits."""
    return rows * width + 4 * rows * -(-width // BLOCK)
