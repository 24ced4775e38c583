"""Adam's two averages of a matrix that comes in tiles of rows, and the normalized tile they give. Nothing here depends on the tiles' size.

    m <- b1 m + (1 - b1) g      v <- b2 v + (1 - b2) g^2      N = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

Kingma and Ba 2014, "Adam: A Method for Stochastic Optimization", arXiv 1412.6980, algorithm 1; t counts from 1. All shapes are
(rows, in). 'fp32' keeps both as they are; '8bit' keeps codes of m and of sqrt(v), whose range is half that of v; 'factored' keeps codes of
m, and of v the means over its rows and columns (Shazeer and Stern 2018, "Adafactor", arXiv 1804.04235, section 3), which the factors of
g = left @ right give without g.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rankwise.gradients.blockwise import Coded, coded_bytes

States = Literal["fp32", "8bit", "factored"]


class Betas(NamedTuple):
    """Decay of both averages, and what is added to the root."""

    first: float
    second: float
    eps: float


class Moments(ABC):
    """Abstract: both averages of one matrix."""

    def begin(self, left: Tensor, right: Tensor, betas: Betas) -> None:
        """Called once before the tiles of a step, with factors of the whole gradient: left (rows, k), right (k, in)."""
        return

    @abstractmethod
    def step(self, rows: slice, gradient: Tensor, betas: Betas, t: int) -> Tensor:
        """Takes the gradient of some rows, which it may overwrite, and returns N of these rows."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """All there is to keep, by name: the tensors themselves."""

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes up copies of what `tensors` gave."""
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])


class Full(Moments):
    """Both averages in the type of the gradient."""

    def __init__(self, rows: int, width: int, device: torch.device, dtype: torch.dtype) -> None:
        self.m, self.v = (torch.zeros(rows, width, device=device, dtype=dtype) for _ in range(2))

    def step(self, rows: slice, gradient: Tensor, betas: Betas, t: int) -> Tensor:
        m, v = self.m[rows], self.v[rows]
        m.lerp_(gradient, 1 - betas.first)
        v.mul_(betas.second).addcmul_(gradient, gradient, value=1 - betas.second)
        return normalized(m, v, betas, t, out=gradient)

    def tensors(self) -> dict[str, Tensor]:
        return {"m": self.m, "v": self.v}


class EightBit(Moments):
    """Codes of m and of sqrt(v). N is made from what they were before rounding."""

    def __init__(self, rows: int, width: int, device: torch.device) -> None:
        self.m, self.root = Coded(rows, width, device, signed=True), Coded(rows, width, device, signed=False)

    def step(self, rows: slice, gradient: Tensor, betas: Betas, t: int) -> Tensor:
        m = self.m.read(rows).to(gradient.dtype).lerp_(gradient, 1 - betas.first)
        v = self.root.read(rows).to(gradient.dtype).square_().mul_(betas.second)
        v.addcmul_(gradient, gradient, value=1 - betas.second)
        self.m.write(rows, m)
        self.root.write(rows, v.sqrt())
        return normalized(m, v, betas, t, out=gradient)

    def tensors(self) -> dict[str, Tensor]:
        parts = {"m": self.m, "root": self.root}
        return {f"{label}_{name}": tensor for label, part in parts.items() for name, tensor in part.tensors().items()}


class Factored(Moments):
    """Codes of m; v is the outer product of its row means (rows,) and column means (in,) over its mean."""

    def __init__(self, rows: int, width: int, device: torch.device) -> None:
        self.m = Coded(rows, width, device, signed=True)
        self.rows, self.columns = torch.zeros(rows, device=device), torch.zeros(width, device=device)

    def begin(self, left: Tensor, right: Tensor, betas: Betas) -> None:
        of_rows = ((left @ (right @ right.T)) * left).sum(1).clamp_min_(0) / right.shape[1]  # rounding may leave less than zero
        of_columns = ((left.T @ left @ right) * right).sum(0).clamp_min_(0) / left.shape[0]
        self.rows.lerp_(of_rows.to(self.rows.dtype), 1 - betas.second)
        self.columns.lerp_(of_columns.to(self.columns.dtype), 1 - betas.second)

    def step(self, rows: slice, gradient: Tensor, betas: Betas, t: int) -> Tensor:
        m = self.m.read(rows).to(gradient.dtype).lerp_(gradient, 1 - betas.first)
        self.m.write(rows, m)
        mean = self.rows.mean()
        v = (self.rows[rows, None] / torch.where(mean > 0, mean, 1.0)) * self.columns
        return normalized(m, v.to(m.dtype), betas, t, out=gradient)

    def tensors(self) -> dict[str, Tensor]:
        return {"m_codes": self.m.codes, "m_scales": self.m.scales, "v_rows": self.rows, "v_columns": self.columns}


def normalized(m: Tensor, v: Tensor, betas: Betas, t: int, out: Tensor) -> Tensor:
    """N, written into `out`."""
    torch.div(v, 1 - betas.second**t, out=out).sqrt_().add_(betas.eps)
    return torch.div(m, out, out=out).div_(1 - betas.first**t)


def made(states: States, rows: int, width: int, device: torch.device, dtype: torch.dtype) -> Moments:
    """Zero averages of a matrix (rows, width)."""
    if states == "fp32":
        return Full(rows, width, device, dtype)
    return EightBit(rows, width, device) if states == "8bit" else Factored(rows, width, device)


def bytes_of(states: States, rows: int, width: int, element: int) -> int:
    """Bytes of both averages of a matrix (rows, width), in numbers of `element` bytes where they are not compressed."""
    if states == "fp32":
        return 2 * rows * width * element
    return coded_bytes(rows, width) + (coded_bytes(rows, width) if states == "8bit" else 4 * (rows + width))
