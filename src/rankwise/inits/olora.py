"""OLoRA: the start is the leading part of the weight's QR decomposition.

    W = Q R:      up = Q[:, :r] / scaling,   down = R[:r]

Buyukakyuz 2024, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", arXiv 2406.01775, algorithm 1. The scaling is divided
out so that
scaling * up @ down = Q_r Q_r^T W for every alpha (the paper and PEFT subtract `scaling` times the pair instead; at scaling 1 the two
agree).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rankwise.inits.base import Beginning, Init, Statistics
from rankwise.inits.spectral import _check_rank
from rankwise.updates import Site


@dataclass(frozen=True)
class OLora(Init):
    """The first r columns of Q and rows of R."""

    name: ClassVar[str] = "olora"
    moves_base: ClassVar[bool] = True
    needs_weight: ClassVar[bool] = True

    def begin(self, site: Site, weight: Tensor | None, statistics: Statistics | None, generator: torch.Generator) -> Beginning:
        assert weight is not None
        _check_rank(site)
        weight = weight if weight.dtype == torch.float64 else weight.float()
        q, r = torch.linalg.qr(weight)  # (out, k), (k, in)
        return Beginning(r[: site.rank], q[:, : site.rank] / site.scaling)
