"""LoRA: the update is one trained pair.

    dW = scaling * up @ down          down (rank, in), up (out, rank)

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, section 4.1. At an embedding the roles of the
two factors are swapped by the init: `down` (rank, vocabulary) is gathered and starts at zero.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from rankwise.equation import Factors
from rankwise.updates.base import Site, Slot, Update, UpdateChoice


def lora_slots(site: Site) -> dict[str, Slot]:
    """The pair, with the key names of PEFT's files."""
    down, up = ("lora_embedding_A", "lora_embedding_B") if site.kind == "embedding" else ("lora_A.weight", "lora_B.weight")
    return {
        "down": Slot("down", (site.rank, site.in_features), down),
        "up": Slot("up", (site.out_features, site.rank), up),
    }


class LowRankUpdate(Update):
    """scaling * up @ down."""

    down: Tensor
    up: Tensor

    def factors(self) -> Factors:
        return Factors(self.down, self.up, scaling=self.scaling)

    def begin(self, down: Tensor | None, up: Tensor | None, moves: bool, generator: torch.Generator) -> None:
        self.put(down=cast(Tensor, down), up=cast(Tensor, up))


@dataclass(frozen=True)
class LowRank(UpdateChoice):
    """One pair of factors: LoRA."""

    name: ClassVar[str] = "lora"
    module: ClassVar[Any] = LowRankUpdate
    roles: ClassVar[frozenset[str]] = frozenset({"down", "up"})
    peft_type: ClassVar[str | None] = "LORA"

    def slots(self, site: Site) -> dict[str, Slot]:
        return lora_slots(site)
