"""RandLoRA: a sum of frozen random pairs of small rank, as many as make it full rank, of which only scales train.

    dW = scaling * sum_j large_j diag(lambda_j) small diag(gamma_j),   j = 1 .. n = ceil(min(in, out) / rank)

    small (rank, min(in, out)), large (max(in, out), n, rank): frozen, slices of a pool that all sites share, of standard deviation 1
    lambda (rank, n) starts at zero, gamma (n, min(in, out)) at 1 / its longer side.    Where out < in, dW is the transpose of this sum.

In the one equation all n pairs stand side by side: down (n rank, in) and up (out, n rank), one of them a part of the pool, the other
`small` times gamma; core = lambda. A larger rank has fewer trained numbers.

Albert et al. 2025, "RandLoRA: Full-rank Parameter-Efficient Fine-Tuning of Large Models", arXiv 2502.00987, section 4. Pool, order and
start are PEFT's: equal seeds give equal values.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rankwise.equation import Factors
from rankwise.errors import RecipeError
from rankwise.updates.base import Part, Site, Slot, Update, UpdateChoice
from rankwise.updates.pool import SharedPool


def sides(sites: Sequence[Site]) -> tuple[int, int]:
    """(smaller, larger) side of the pool that serves these sites."""
    width_in, width_out = max(site.in_features for site in sites), max(site.out_features for site in sites)
    return min(width_in, width_out), max(width_in, width_out)


def bases(site: Site) -> int:
    """n, how many pairs make a site full rank."""
    return -(-min(site.in_features, site.out_features) // site.rank)


def draw_bases(rank: int, smaller: int, larger: int, seed: int) -> tuple[Tensor, Tensor]:
    """(small (rank, smaller), large (larger, n, rank)) on the CPU, in fp32.

    Drawn in bf16, as PEFT draws them where the machine has that: equal bit for bit. (Elsewhere PEFT draws in fp16, so its files that leave
    the bases out mean something else there.)
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return nn.init.kaiming_uniform_(torch.empty(shape, dtype=torch.bfloat16), a=math.sqrt(5), generator=generator)

    small = uniform(rank, 1, smaller)
    large = torch.cat([uniform(larger, 1, rank) for _ in range(-(-smaller // rank))], dim=1)
    return (small / small.std())[:, 0].float(), (large / large.std()).float()


class Bases(SharedPool):
    """The shared frozen bases, one pair for each rank."""

    def __init__(self, sites: Sequence[Site], seed: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.ranks, self.sides, self.seed = sorted({site.rank for site in sites}), sides(sites), seed
        self.fill(device, dtype)

    def draw(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for rank in self.ranks:
            found[f"small_{rank}"], found[f"large_{rank}"] = draw_bases(rank, *self.sides, self.seed)
        return found


class RandLoraUpdate(Update):
    """The sum over j, its pairs side by side."""

    scale: Tensor  # lambda
    gamma: Tensor

    def __init__(
        self, choice: Any, site: Site, frozen: frozenset[str], device: torch.device, dtype: torch.dtype, shared: nn.Module | None
    ) -> None:
        Part.__init__(self, choice.slots(site), frozen, device, dtype)
        self.choice, self.scaling, self.rank = choice, site.scaling, site.rank
        self.widths = (site.in_features, site.out_features)
        # held as an unregistered reference: the pool has one registered owner in the model
        object.__setattr__(self, "pool", shared)
        self.pool: Bases

    def factors(self) -> Factors:
        width_in, width_out = self.widths
        count, smaller = self.gamma.shape
        small = getattr(self.pool, f"small_{self.rank}")[:, :smaller]  # (rank, smaller)
        trained = (small[:, None] * self.gamma).flatten(0, 1)  # (rank n, smaller): position k n + j, as lambda's
        frozen = getattr(self.pool, f"large_{self.rank}")[: max(width_in, width_out), :count].flatten(1)  # (larger, n rank)
        down, up = (trained, frozen) if width_in <= width_out else (frozen.T, trained.T)
        return Factors(down, up, core=self.scale.flatten(), scaling=self.scaling)

    def begin(self, down: Tensor | None, up: Tensor | None, moves: bool, generator: torch.Generator) -> None:
        self.put(scale=torch.zeros_like(self.scale), gamma=torch.full_like(self.gamma, 1 / max(self.gamma.shape)))


@dataclass(frozen=True)
class RandLora(UpdateChoice):
    """Trained scales on shared frozen random pairs that add up to full rank. seed: of the pool (PEFT's `projection_prng_key`)."""

    name: ClassVar[str] = "randlora"
    module: ClassVar[Any] = RandLoraUpdate
    roles: ClassVar[frozenset[str]] = frozenset({"core"})
    own_start: ClassVar[bool] = True
    zero_role: ClassVar[str] = "core"
    shareable: ClassVar[bool] = False
    frozen: ClassVar[frozenset[str]] = frozenset({"down", "up"})
    seed: int = 0

    def __post_init__(self) -> None:
        if not -(2**63) <= self.seed < 2**64:
            raise RecipeError(f"seed={self.seed} of the pool must have at most 64 bits")

    def slots(self, site: Site) -> dict[str, Slot]:
        return {
            "scale": Slot("core", (site.rank, bases(site)), "randlora_lambda"),
            "gamma": Slot("core", (bases(site), min(site.in_features, site.out_features)), "randlora_gamma"),
        }

    def width_at(self, site: Site) -> int:
        return bases(site) * site.rank

    def trained_factors(self, site: Site, frozen: Collection[str]) -> frozenset[str]:
        if "core" in frozen:
            return frozenset()
        return frozenset({"core", "down" if site.in_features <= site.out_features else "up"})  # gamma stands in one of the two

    def shared(self, sites: Sequence[Site], device: torch.device, dtype: torch.dtype) -> nn.Module:
        return Bases(sites, self.seed, device, dtype)

    def shared_numbers(self, sites: Sequence[Site]) -> int:
        smaller, larger = sides(sites)
        return sum(rank * smaller + larger * -(-smaller // rank) * rank for rank in {site.rank for site in sites})
