"""Lines of the table of `benchmarks.parts`, and what its sections are told."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import ratio, spread

Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """Where and how much: the device, small shapes or those of the issue, timed rounds, steps of GaLore's period."""

    device: str
    small: bool
    repeats: int
    period: int = 200

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device)

    def linear(self, out: int, wide: int, dtype: torch.dtype = torch.float32) -> nn.Linear:
        made = nn.Linear(wide, out, bias=False, device=self.device, dtype=dtype)
        with torch.no_grad():
            made.weight.normal_(std=0.02)
        return made

    def name(self, dtype: torch.dtype) -> str:
        return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]

    def rows(
        self,
        section: str,
        what: str,
        times: Mapping[str, Sequence[float]],
        baseline: str,
        agreement: Mapping[str, float] | None = None,
        targets: Mapping[str, str] | None = None,
    ) -> Iterator[Row]:
        """One line for each contender: times, ratio to the baseline, distance of its result from the reference."""
        for name, seconds in times.items():
            yield {
                "section": section,
                "what": what,
                "contender": name,
                **spread(seconds),
                "ratio": ratio(seconds, times[baseline]),
                "difference": (agreement or {}).get(name),
                "target": (targets or {}).get(name),
            }


def compared(mine: Tensor, reference: Tensor) -> float:
    """||mine - reference|| / ||reference||."""
    wide = reference.double()
    return float(torch.linalg.vector_norm(mine.double() - wide) / torch.linalg.vector_norm(wide))


def overlap(mine: Tensor, exact: Tensor) -> float:
    """||exact^T mine||^2 / rank of two orthonormal bases (n, rank): 1 for the same subspace."""
    return float((exact.double().T @ mine.double()).square().sum() / exact.shape[1])
