"""LoRA: the update is one trained pair.

    dW = scaling * up @ down          down (rank, in), up (out, rank);  with `bias` also  y += scaling * shift,  shift (out,)

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, section 4.1. At an embedding the roles of the
two factors are swapped by the init: `down` (rank, vocabulary) is gathered and starts at zero.
"""

from collections.abc import Sequence
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
        return Factors(self.down, self.up, scaling=self.scaling, shift=getattr(self, "shift", None))

    def begin(self, down: Tensor | None, up: Tensor | None, moves: bool, generator: torch.Generator) -> None:
        self.put(down=cast(Tensor, down), up=cast(Tensor, up))


@dataclass(frozen=True)
class LowRank(UpdateChoice):
    """One pair of factors: LoRA.

    bias: a trained vector beside the pair, which starts at zero and is added to the layer's output (PEFT's lora_bias). Not at embeddings.
    """

    name: ClassVar[str] = "lora"
    module: ClassVar[Any] = LowRankUpdate
    roles: ClassVar[frozenset[str]] = frozenset({"down", "up"})
    peft_type: ClassVar[str | None] = "LORA"
    bias: bool = False

    def slots(self, site: Site) -> dict[str, Slot]:
        with_shift = self.bias and site.kind != "embedding"
        return lora_slots(site) | ({"shift": Slot("other", (site.out_features,), "lora_B.bias")} if with_shift else {})

    def peft_reason(self, sites: Sequence[Site]) -> str:
        if self.bias and any(site.kind == "embedding" for site in sites):
            return "PEFT takes no lora_bias where an embedding is adapted"
        return ""

    def peft_fields(self, sites: Sequence[Site], rank: int) -> dict[str, Any]:
        return {"lora_bias": self.bias}
