"""MoSLoRA: a learned mixer stands between the factors.

    dW = scaling * up @ mixer @ down          down (rank, in), mixer (rank, rank), up (out, rank)

Wu et al. 2024, "Mixture-of-Subspaces in Low-Rank Adaptation", arXiv 2406.11909, section 3. The mixer does not depend on the input. Its
rank stays that of LoRA; what changes is the path of the optimizer.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor

from rankwise.equation import Factors
from rankwise.errors import RecipeError
from rankwise.updates.base import Site, Slot, Update, UpdateChoice
from rankwise.updates.lowrank import lora_slots


class MixerUpdate(Update):
    """scaling * up @ mixer @ down."""

    down: Tensor
    up: Tensor
    mixer: Tensor

    def factors(self) -> Factors:
        return Factors(self.down, self.up, core=self.mixer, scaling=self.scaling)

    def begin(self, down: Tensor | None, up: Tensor | None, moves: bool, generator: torch.Generator) -> None:
        mixer = starting_mixer(self.choice.mixer, self.mixer.shape[0], generator)
        up = cast(Tensor, up)
        if moves:
            # (up Q^T) Q down = up down: an orthogonal mixer is absorbed without changing the product (legality keeps others out)
            up = up @ mixer.to(up).T
        self.put(down=cast(Tensor, down), up=up, mixer=mixer)


def starting_mixer(kind: str, rank: int, generator: torch.Generator) -> Tensor:
    """(rank, rank) on the CPU. 'kaiming' is the paper's choice; 'orthogonal' keeps LoRA's scale; 'butterfly' is section 2.2's fixed mix."""
    if kind == "orthogonal":
        q, r = torch.linalg.qr(torch.randn(rank, rank, generator=generator, dtype=torch.float64))
        return (q * r.diagonal().sign()).float()
    if kind == "kaiming":
        return (torch.rand(rank, rank, generator=generator) * 2 - 1) / math.sqrt(rank)
    if kind == "identity":
        return torch.eye(rank)
    if kind == "butterfly":
        if rank % 2:
            raise RecipeError(f"mixer='butterfly' needs an even rank, and rank is {rank}; use rank={rank + 1}")
        return torch.eye(rank // 2).repeat(2, 2)
    raise RecipeError(f"mixer={kind!r} is unknown; use 'orthogonal', 'kaiming', 'identity' or 'butterfly' (zeros would never train)")


@dataclass(frozen=True)
class Mixer(UpdateChoice):
    """A pair with a (rank, rank) mixer between: MoSLoRA. `mixer` is how the mixer starts."""

    name: ClassVar[str] = "moslora"
    module: ClassVar[Any] = MixerUpdate
    roles: ClassVar[frozenset[str]] = frozenset({"down", "core", "up"})
    mixer: Literal["orthogonal", "kaiming", "identity", "butterfly"] = "orthogonal"

    def slots(self, site: Site) -> dict[str, Slot]:
        return lora_slots(site) | {"mixer": Slot("core", (site.rank, site.rank), "lora_mixer.weight")}
