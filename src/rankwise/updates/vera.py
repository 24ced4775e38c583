"""VeRA: all sites share one frozen random pair; two small vectors per site train.

    dW = diag(b) @ up @ diag(d) @ down          down (rank, in), d (rank,), up (out, rank), b (out,)

Kopiczko et al. 2023, "VeRA: Vector-based Random Matrix Adaptation", arXiv 2310.11454, section 3. `down` and `up` are slices of a pool
that is
drawn from a seed, uniform in +-sqrt(6 / fan_in); d starts at `d_initial`, b at zero. There is no alpha / rank: d_initial is the scale.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from rankwise.equation import Factors
from rankwise.errors import RecipeError
from rankwise.updates.base import Part, Site, Slot, Update, UpdateChoice
from rankwise.updates.pool import SharedPool


class Pool(SharedPool):
    """The shared frozen pairs."""

    def __init__(self, sites: Sequence[Site], choice: "Vera", device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.shapes = pool_shapes(sites, choice.sharing)
        self.seed = choice.seed
        self.fill(device, dtype)

    def draw(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for shape in sorted(set(self.shapes.values())):
            suffix = "_".join(map(str, shape))
            found[f"down_{suffix}"], found[f"up_{suffix}"] = draw_pair(*shape, self.seed)
        return found

    def pair(self, rank: int, width_in: int, width_out: int) -> tuple[Tensor, Tensor]:
        """(down (rank, in), up (out, rank)) of one site: views of the pool."""
        suffix = "_".join(map(str, self.shapes[rank, width_in, width_out]))
        return getattr(self, f"down_{suffix}")[:, :width_in], getattr(self, f"up_{suffix}")[:width_out]


def pool_shapes(sites: Sequence[Site], sharing: str) -> dict[tuple[int, int, int], tuple[int, int, int]]:
    """(rank, in, out) of a site -> (rank, in, out) of the pair that it cuts its slices from."""
    shapes = {(site.rank, site.in_features, site.out_features) for site in sites}
    if sharing == "per-shape":
        return {shape: shape for shape in shapes}
    largest = {
        rank: (rank, max(s[1] for s in shapes if s[0] == rank), max(s[2] for s in shapes if s[0] == rank))
        for rank in {s[0] for s in shapes}
    }
    return {shape: largest[shape[0]] for shape in shapes}


def draw_pair(rank: int, width_in: int, width_out: int, seed: int) -> tuple[Tensor, Tensor]:
    """(down (rank, width_in), up (width_out, rank)) on the CPU, in the order in which PEFT draws them: equal bit for bit."""
    generator = torch.Generator().manual_seed(seed)
    down = torch.empty(rank, width_in).uniform_(-math.sqrt(6 / width_in), math.sqrt(6 / width_in), generator=generator)
    up = torch.empty(width_out, rank).uniform_(-math.sqrt(6 / rank), math.sqrt(6 / rank), generator=generator)
    return down, up


class VeraUpdate(Update):
    """diag(b) @ up @ diag(d) @ down, with down and up cut out of the pool."""

    d: Tensor
    b: Tensor

    def __init__(
        self, choice: Any, site: Site, frozen: frozenset[str], device: torch.device, dtype: torch.dtype, shared: nn.Module | None
    ) -> None:
        Part.__init__(self, choice.slots(site), frozen, device, dtype)
        self.choice = choice
        self.scaling = site.scaling
        # held as an unregistered reference: the pool has one registered owner in the model (see adapt.py)
        object.__setattr__(self, "pool", shared)
        self.pool: Pool
        self.shape = (site.rank, site.in_features, site.out_features)

    def factors(self) -> Factors:
        down, up = self.pool.pair(*self.shape)
        return Factors(down, up, core=self.d, tail=self.b, scaling=self.scaling)

    def begin(self, down: Tensor | None, up: Tensor | None, moves: bool, generator: torch.Generator) -> None:
        self.put(d=torch.full_like(self.d, self.choice.d_initial), b=torch.zeros_like(self.b))


@dataclass(frozen=True)
class Vera(UpdateChoice):
    """Trained vectors on a frozen random pair shared by all sites.

    d_initial: where d starts (paper: 0.1; 1.0 is bad, table 6c).
    seed: seed of the pool (PEFT's `projection_prng_key`).
    sharing: 'max-slice', one pair at the largest sides, each site takes its leading part (PEFT's rule), or 'per-shape'.
    """

    name: ClassVar[str] = "vera"
    module: ClassVar[Any] = VeraUpdate
    roles: ClassVar[frozenset[str]] = frozenset({"core", "tail"})
    own_start: ClassVar[bool] = True
    zero_role: ClassVar[str] = "tail"
    shareable: ClassVar[bool] = False
    frozen: ClassVar[frozenset[str]] = frozenset({"down", "up"})
    scaled: ClassVar[bool] = False
    rank_bounded: ClassVar[bool] = False
    shares_down: ClassVar[bool] = True
    peft_type: ClassVar[str | None] = "VERA"
    d_initial: float = 0.1
    seed: int = 0
    sharing: Literal["max-slice", "per-shape"] = "max-slice"

    def __post_init__(self) -> None:
        if not -(2**63) <= self.seed < 2**64:
            raise RecipeError(f"seed={self.seed} of the pool must have at most 64 bits")

    def slots(self, site: Site) -> dict[str, Slot]:
        return {
            "d": Slot("core", (site.rank,), "vera_lambda_d"),
            "b": Slot("tail", (site.out_features,), "vera_lambda_b"),
        }

    def peft_reason(self, sites: Sequence[Site]) -> str:
        if self.sharing != "max-slice":
            return "PEFT's VeRA cuts all sites out of one pair (sharing='max-slice')"
        return "PEFT's VeRA has one rank for all sites" if len({site.rank for site in sites}) > 1 else ""

    def peft_fields(self, sites: Sequence[Site], rank: int) -> dict[str, Any]:
        return {"r": sites[0].rank, "d_initial": self.d_initial, "projection_prng_key": self.seed}

    def shared(self, sites: Sequence[Site], device: torch.device, dtype: torch.dtype) -> nn.Module:
        return Pool(sites, self, device, dtype)

    def shared_numbers(self, sites: Sequence[Site]) -> int:
        return sum(rank * (width_in + width_out) for rank, width_in, width_out in set(pool_shapes(sites, self.sharing).values()))
