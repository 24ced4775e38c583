"""Random starts whose product is zero: one factor is drawn, the other is zero.

    kaiming        down ~ U(-1/sqrt(in), 1/sqrt(in)), up = 0      LoRA's official code and PEFT
    gaussian       down ~ N(0, 1/rank^2), up = 0                  PEFT's option of that name
    orthonormal    rows of down orthonormal times sqrt(1/3)       same norm as kaiming, equal conditioning: LoRA-FA's default here
    random-up      down = 0, up ~ U(-1/sqrt(rank), 1/sqrt(rank))  what the official LoRA+ experiments ran

At an embedding the gathered factor is the zero one: down = 0, up ~ N(0, 1), as in LoRA's official code.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rankwise.errors import RecipeError
from rankwise.inits.base import Beginning, Init, Statistics
from rankwise.updates import Site


def _uniform(shape: tuple[int, int], bound: float, generator: torch.Generator) -> Tensor:
    return (torch.rand(shape, generator=generator) * 2 - 1) * bound


def _zero_up(site: Site, down: Tensor) -> Beginning:
    return Beginning(down, torch.zeros(site.out_features, site.rank))


def _embedding(site: Site, generator: torch.Generator) -> Beginning:
    return Beginning(torch.zeros(site.rank, site.in_features), torch.randn(site.out_features, site.rank, generator=generator))


@dataclass(frozen=True)
class Kaiming(Init):
    """down uniform in +-1/sqrt(in), up zero."""

    name: ClassVar[str] = "kaiming"
    zero_role: ClassVar[str] = "up"

    def begin(self, site: Site, weight: Tensor | None, statistics: Statistics | None, generator: torch.Generator) -> Beginning:
        if site.kind == "embedding":
            return _embedding(site, generator)
        return _zero_up(site, _uniform((site.rank, site.in_features), 1 / math.sqrt(site.in_features), generator))


@dataclass(frozen=True)
class Gaussian(Init):
    """down normal with standard deviation 1/rank, up zero."""

    name: ClassVar[str] = "gaussian"
    zero_role: ClassVar[str] = "up"

    def begin(self, site: Site, weight: Tensor | None, statistics: Statistics | None, generator: torch.Generator) -> Beginning:
        if site.kind == "embedding":
            return _embedding(site, generator)
        return _zero_up(site, torch.randn(site.rank, site.in_features, generator=generator) / site.rank)


@dataclass(frozen=True)
class Orthonormal(Init):
    """Rows of down orthonormal, times sqrt(1/3); up zero. Needs rank <= in."""

    name: ClassVar[str] = "orthonormal"
    zero_role: ClassVar[str] = "up"

    def begin(self, site: Site, weight: Tensor | None, statistics: Statistics | None, generator: torch.Generator) -> Beginning:
        if site.kind == "embedding":
            return _embedding(site, generator)
        if site.rank > site.in_features:
            raise RecipeError(f"init='orthonormal' needs rank <= in, and {site.name} has rank={site.rank}, in={site.in_features}")
        gaussian = torch.randn(site.in_features, site.rank, generator=generator, dtype=torch.float64)
        return _zero_up(site, torch.linalg.qr(gaussian).Q.T.float() * math.sqrt(1 / 3))


@dataclass(frozen=True)
class RandomUp(Init):
    """down zero, up uniform in +-1/sqrt(rank): the mirror image of LoRA's start."""

    name: ClassVar[str] = "random-up"
    zero_role: ClassVar[str] = "down"

    def begin(self, site: Site, weight: Tensor | None, statistics: Statistics | None, generator: torch.Generator) -> Beginning:
        up = _uniform((site.out_features, site.rank), 1 / math.sqrt(site.rank), generator)
        return Beginning(torch.zeros(site.rank, site.in_features), up)
