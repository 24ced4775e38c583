"""AdaLoRA's update: singular triplets, whose number a schedule may lower where they matter least.

    dW = scaling * P diag(lam) Q          P = up (out, rank), lam (rank, 1), Q = down (rank, in)

Zhang et al. 2023, "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", arXiv 2303.10512, section 3.1. lam starts at
zero, P and Q at random, and `schedules/adalora.py` keeps them near orthonormal. A pruned triplet is one whose lam was set to zero: it
still has a gradient, so it can come back. scaling is alpha over the rank at the start, and stays so when triplets are cut out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from rankwise.equation import Factors
from rankwise.errors import RecipeError
from rankwise.updates.base import Site, Slot, Update, UpdateChoice

PEFT_EPSILON = 1e-5  # PEFT and the official code divide alpha by rank + 1e-5


class SvdUpdate(Update):
    """scaling * up @ diag(lam) @ down."""

    down: Tensor
    lam: Tensor
    up: Tensor

    def factors(self) -> Factors:
        return Factors(self.down, self.up, core=self.lam[:, 0], scaling=self.scaling)

    def begin(self, down: Tensor | None, up: Tensor | None, moves: bool, generator: torch.Generator) -> None:
        if moves:
            assert down is not None
            assert up is not None
            left, values, right = _decomposed(up, down)
            self.put(up=left, lam=values[:, None], down=right)
            return
        down, up = (_random(tensor.shape, self.choice.start, generator) for tensor in (self.down, self.up))
        self.put(down=down, up=up, lam=torch.zeros_like(self.lam))


def _random(shape: Sequence[int], start: str, generator: torch.Generator) -> Tensor:
    gaussian = torch.randn(*shape, generator=generator, dtype=torch.float64)
    if start == "gaussian":
        return 0.02 * gaussian
    if shape[0] < shape[1]:
        return torch.linalg.qr(gaussian.T).Q.T
    return torch.linalg.qr(gaussian).Q


def _decomposed(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(P, lam, Q) with orthonormal P and Q and P diag(lam) Q = up @ down, from the two factors alone: O((out + in) rank^2), in fp64."""
    left, inner_left = torch.linalg.qr(up.double())  # (out, rank), (rank, rank)
    right, inner_right = torch.linalg.qr(down.double().T)  # (in, rank), (rank, rank)
    u, values, v = torch.linalg.svd(inner_left @ inner_right.T)
    return left @ u, values, v @ right.T


@dataclass(frozen=True)
class Svd(UpdateChoice):
    """Singular triplets: AdaLoRA.

    start: 'orthonormal' columns of P and rows of Q, or 'gaussian', N(0, 0.02^2), as the official code and PEFT; far from orthonormal, so
    that it needs the schedule's penalty.
    """

    name: ClassVar[str] = "adalora"
    module: ClassVar[Any] = SvdUpdate
    roles: ClassVar[frozenset[str]] = frozenset({"down", "core", "up"})
    own_start: ClassVar[bool] = True
    zero_role: ClassVar[str] = "core"
    absorbs_start: ClassVar[bool] = True
    peft_type: ClassVar[str | None] = "ADALORA"
    start: Literal["orthonormal", "gaussian"] = "orthonormal"

    def __post_init__(self) -> None:
        if self.start not in ("orthonormal", "gaussian"):
            raise RecipeError(f"start={self.start!r} of the adalora update is unknown; use 'orthonormal' or 'gaussian'")

    def slots(self, site: Site) -> dict[str, Slot]:
        return {
            "down": Slot("down", (site.rank, site.in_features), "lora_A"),
            "lam": Slot("core", (site.rank, 1), "lora_E"),
            "up": Slot("up", (site.out_features, site.rank), "lora_B"),
        }

    def peft_reason(self, sites: Sequence[Site]) -> str:
        if len({site.scaling for site in sites}) > 1:
            return "PEFT's AdaLoRA has one alpha and one initial rank for all sites"
        return "PEFT reads names that contain 'default' wrongly" if any("default" in site.name for site in sites) else ""

    def peft_fields(self, sites: Sequence[Site], rank: int) -> dict[str, Any]:
        longest = max(rank, *(site.rank for site in sites))
        pattern = {f"{site.name}.lora_E": [index < site.rank for index in range(longest)] for site in sites}
        return {
            "init_r": longest,
            # chosen so that what PEFT divides by gives our scaling
            "lora_alpha": sites[0].scaling * (longest + PEFT_EPSILON),
            "rank_pattern": pattern if any(site.rank != longest for site in sites) else None,
            "target_r": max(1, round(sum(site.rank for site in sites) / len(sites))),
            "total_step": 1,  # PEFT asks for one, also where nothing is trained any more
        }
