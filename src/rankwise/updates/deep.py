"""Deep LoRA: the update is a product of small orthogonal factors, whose depth makes it learn few directions.

    narrow       dW = scaling * W_L ... W_2 W_1                  down = W_1 (rank, in), core = W_{L-1} ... W_2, up = W_L (out, rank)
    compressed   dW = scaling * left (C_L ... C_1) right^T       down = right^T (rank, in), core = C_L ... C_1, up = left (out, rank)

Yaras et al. 2024, "Compressible Dynamics in Deep Overparameterized Low-Rank Learning & Adaptation", arXiv 2406.04112, sections 3 and 4.
Every W starts as epsilon times a matrix with orthonormal rows or columns; in the compressed form every C (rank, rank) starts as epsilon
times the identity, between two orthonormal frames. So dW starts at epsilon^L, neighbours start balanced, W_{l+1}^T W_{l+1} = W_l W_l^T,
and gradient descent grows only the directions of the gradient. There is no alpha / rank; where an alpha is given, epsilon shrinks with it.
"""

from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from rankwise.equation import Factors
from rankwise.errors import RecipeError
from rankwise.updates.base import Site, Slot, Update, UpdateChoice


class DeepUpdate(Update):
    """scaling * up @ (core_k @ ... @ core_1) @ down."""

    down: Tensor
    up: Tensor

    @property
    def cores(self) -> list[Tensor]:
        """The inner factors, (rank, rank) each, the one next to `down` first."""
        return [getattr(self, name) for name, slot in self.slots.items() if slot.role == "core"]

    def factors(self) -> Factors:
        # entries of a product of small factors lie near the end of fp16 and lose digits in bf16: formed in fp32 whatever is cast around
        with torch.autocast(self.down.device.type, enabled=False):
            wide = [core.to(torch.promote_types(core.dtype, torch.float32)) for core in self.cores]
            core = reduce(lambda inner, outer: outer @ inner, wide)  # (rank, rank)
        return Factors(self.down, self.up, core=core, scaling=self.scaling)

    def begin(self, down: Tensor | None, up: Tensor | None, moves: bool, generator: torch.Generator) -> None:
        choice: Deep = self.choice
        epsilon = choice.epsilon * self.scaling ** (-1 / choice.depth)  # scaling * epsilon^depth stays what it is without an alpha
        rank = len(self.down)
        eye = torch.eye(rank, dtype=torch.float64)
        cores = [eye] * len(self.cores)
        if down is None or up is None:
            down, up = frame(self.down.shape[1], rank, generator).T, frame(self.up.shape[0], rank, generator)
            if choice.variant == "narrow":
                cores = [frame(rank, rank, generator) for _ in cores]
        outer = epsilon if choice.variant == "narrow" else 1.0
        names = [name for name, slot in self.slots.items() if slot.role == "core"]
        self.put(down=outer * down, up=outer * up, **{name: epsilon * core for name, core in zip(names, cores, strict=True)})


def frame(size: int, count: int, generator: torch.Generator) -> Tensor:
    """(size, count), count <= size: orthonormal columns, uniform over all such, fp64 on the CPU."""
    q, r = torch.linalg.qr(torch.randn(size, count, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


@dataclass(frozen=True)
class Deep(UpdateChoice):
    """A product of `depth` small factors: Deep LoRA.

    variant: 'narrow', what the published scripts ran: the two outer factors are two of the `depth` ones; 'compressed', the paper's method:
        all `depth` factors stand between two frames of unit size.
    depth: L, how many factors start at `epsilon`: at least 3, or 2 if compressed.
    epsilon: the size of each. The update starts at epsilon^depth.
    exact_zero: subtracts this start, for a start that is the base bit for bit; costs a frozen pair.
    """

    name: ClassVar[str] = "deep-lora"
    module: ClassVar[Any] = DeepUpdate
    roles: ClassVar[frozenset[str]] = frozenset({"down", "core", "up"})
    own_start: ClassVar[bool] = True
    takes_frames: ClassVar[bool] = True
    unit_scaling: ClassVar[bool] = True
    variant: Literal["narrow", "compressed"] = "narrow"
    depth: int = 3
    epsilon: float = 1e-3
    exact_zero: bool = False

    def __post_init__(self) -> None:
        if self.variant not in ("narrow", "compressed"):
            raise RecipeError(f"variant={self.variant!r} of the deep-lora update is unknown; use 'narrow' or 'compressed'")
        least = 3 if self.variant == "narrow" else 2
        if not (isinstance(self.depth, int) and self.depth >= least):
            raise RecipeError(
                f"depth={self.depth!r} with variant={self.variant!r} must be a whole number of at least {least}; fewer factors are plain "
                "LoRA: use update='lora'"
            )
        if not 0 < self.epsilon <= 1:
            raise RecipeError(f"epsilon={self.epsilon!r} must be above 0, where nothing would ever move, and at most 1; the paper has 1e-3")

    @property
    def moves_base(self) -> bool:
        return self.exact_zero

    @property
    def start_size(self) -> float:
        return 0.0 if self.exact_zero else self.epsilon**self.depth

    def slots(self, site: Site) -> dict[str, Slot]:
        inner = self.depth - 2 if self.variant == "narrow" else self.depth
        return {
            "down": Slot("down", (site.rank, site.in_features), "lora_A.weight"),
            **{f"core{number}": Slot("core", (site.rank, site.rank), f"lora_core.{number}.weight") for number in range(1, inner + 1)},
            "up": Slot("up", (site.out_features, site.rank), "lora_B.weight"),
        }
