"""Propulsion: each output of the frozen layer is multiplied by a trained power.

    gain = z ** degree          z (out,), starts at 1

Kowsher et al. 2024, "Propulsion: Steering LLM with Tiny Fine-Tuning", arXiv 2409.10927, section 3. The paper multiplies the layer's
output; here,
as everywhere in this project, the gain leaves the bias out, so at a layer with a bias the two differ by (gain - 1) * bias.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rankwise.equation import Factors, Start
from rankwise.errors import RecipeError
from rankwise.gains.base import Gain, GainChoice
from rankwise.storage import Storage
from rankwise.updates import Site, Slot


class PropulsionGain(Gain):
    """(1 + z) ** degree; the parameter is the distance from 1, exact in any dtype near the start."""

    z: Tensor  # (out,)

    def begin(
        self, layer: nn.Module, storage: Storage, factors: Factors | None, start: Start | None, original: Tensor | None = None
    ) -> None:
        self.put(z=torch.zeros_like(self.z))

    def forward(self, layer: nn.Module, storage: Storage, factors: Factors | None, start: Start | None) -> Tensor:
        return (1 + self.z.to(torch.promote_types(self.z.dtype, torch.float32))) ** self.choice.degree

    def saved(self) -> dict[str, Tensor]:
        # the distance from 1: adding the 1 would round its last digits away
        return {"z": self.z.detach().to(torch.promote_types(self.z.dtype, torch.float32))}

    def restore(self, **values: Tensor) -> None:
        self.put(z=values["z"])


@dataclass(frozen=True)
class Propulsion(GainChoice):
    """A trained power per output row; `degree` is the exponent (the paper's experiments use 15)."""

    name: ClassVar[str] = "propulsion"
    module: ClassVar[Any] = PropulsionGain
    degree: int = 15

    def __post_init__(self) -> None:
        if self.degree < 1:
            raise RecipeError(f"degree={self.degree} of the propulsion gain must be at least 1")

    def slots(self, site: Site) -> dict[str, Slot]:
        return {"z": Slot("gain", (site.out_features,), "propulsion")}
