"""GaLore's update: one trained factor, in the coordinates of a frozen frame that a schedule takes from the gradient.

    out < in    dW = P D        up = P (out, rank) frozen,      down = D (rank, in) trained       the left side is projected
    else        dW = D Q^T      down = Q^T (rank, in) frozen,   up = D (out, rank) trained        the right side is projected

Zhao et al. 2024, "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", arXiv 2403.03507, section 3. D starts at zero and
`schedules/galore.py` folds it into the weight after every step and sets it to zero again, so that D's gradient is exactly P^T G (or G Q)
for the gradient G of the weight, without G ever being formed. There is no scaling: what is folded is scaled instead. At a right side only
h = down x is kept for the backward.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from rankwise.equation import Factors
from rankwise.subspace import Side, clamped, side_of
from rankwise.updates.base import Site, Slot, Update, UpdateChoice


class ProjectedUpdate(Update):
    """up @ down, one of them a frozen frame."""

    down: Tensor
    up: Tensor

    @property
    def side(self) -> Side:
        """Which side the frame stands on."""
        return "left" if self.slots["up"].frozen else "right"

    @property
    def trained(self) -> nn.Parameter:
        """D: (rank, in) at a left site, (out, rank) at a right one."""
        return self.down if self.side == "left" else self.up  # type: ignore[return-value]

    @property
    def frame(self) -> Tensor:
        """P with orthonormal columns: (out, rank) at a left site, (in, rank) at a right one; a view."""
        return self.up if self.side == "left" else self.down.T

    def turn(self, frame: Tensor) -> None:
        """Takes another frame, also between a forward and its backward, which must then not be told that a saved tensor changed."""
        self.frame.data.copy_(frame)

    def factors(self) -> Factors:
        return Factors(self.down, self.up)

    def begin(self, down: Tensor | None, up: Tensor | None, moves: bool, generator: torch.Generator) -> None:
        # any orthonormal columns will do until the first gradient gives the frame
        eye = torch.eye(*self.frame.shape, dtype=self.frame.dtype)
        self.put(**({"up": eye} if self.side == "left" else {"down": eye.T}))


@dataclass(frozen=True)
class Projected(UpdateChoice):
    """A trained factor in a frozen frame: GaLore.

    projection: 'std' projects the smaller side, so that the state is smallest; 'reverse_std' the other; 'left', 'right' always that one.
        'right' has the smallest activations, and under row-sharded weights it needs no traffic.
    """

    name: ClassVar[str] = "galore"
    module: ClassVar[Any] = ProjectedUpdate
    roles: ClassVar[frozenset[str]] = frozenset({"down", "up"})
    own_start: ClassVar[bool] = True
    scaled: ClassVar[bool] = False
    projection: Literal["std", "reverse_std", "left", "right"] = "std"

    def __post_init__(self) -> None:
        side_of(1, 1, self.projection)

    def rank_at(self, rank: int, width_out: int, width_in: int) -> int:
        return clamped(rank, width_out, width_in)

    def slots(self, site: Site) -> dict[str, Slot]:
        left = side_of(site.out_features, site.in_features, self.projection) == "left"
        return {
            "down": Slot("down", (site.rank, site.in_features), "galore_down", frozen=not left),
            "up": Slot("up", (site.out_features, site.rank), "galore_up", frozen=left),
        }
