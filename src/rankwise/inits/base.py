"""Init axis: where do the factors start? A choice is a pure function (site, weight, statistics, generator) -> a starting pair."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from rankwise.updates import Site


class Beginning(NamedTuple):
    """The starting pair of one site, without `scaling` applied: the update begins at scaling * up @ down."""

    down: Tensor | None  # (rank, in)
    up: Tensor | None  # (out, rank)
    notes: tuple[str, ...] = ()  # what the user should know, such as replaced dead directions
    weights: Tensor | None = None  # (rank,), descending: what each rank is worth, for an init that distributes ranks


def stacked_beginnings(begun: Sequence[Beginning]) -> Beginning:
    """The pairs of the experts of one site, side by side: down (experts * rank, in), up (out, experts * rank)."""
    if len(begun) == 1 or begun[0].down is None or begun[0].up is None:
        return begun[0]
    down, up = zip(*((one.down, one.up) for one in begun), strict=True)
    notes = tuple(note for one in begun for note in one.notes)
    return Beginning(torch.cat([t for t in down if t is not None]), torch.cat([t for t in up if t is not None], dim=1), notes)


@dataclass(frozen=True)
class Calibration:
    """What an init asks of calibration before it can begin.

    kind: 'gradient' of the loss by the weight; 'gradient-sketch', the same through thin products alone; 'covariance' of the input.
    rows: how many rows of the training data `rankwise train` gives.
    width: columns of the sketch, as a multiple of the rank.
    by_sample: covariance of inputs divided by each row's largest value, summed and divided by the rows (CorDA's official code).
    direct: W C may be gathered from the outputs, where that is smaller than C; False where the outputs' rounding would matter.
    labelled: covariance over tokens whose label is not -100, where labels are as long as the rows.
    """

    kind: Literal["gradient", "gradient-sketch", "covariance"]
    rows: int
    width: int = 8
    by_sample: bool = False
    direct: bool = True
    labelled: bool = False


@dataclass(frozen=True)
class Statistics:
    """What calibration gathered for one site; fp32, fp64 over an fp64 base. Only what the init asked for is there.

    tokens: tokens that reached the site, padding left out.
    gradient: (out, in), weighted by the tokens that have a loss; with a `basis`, its coordinates basis^T G, (width, in).
    basis: (out, width), orthonormal: G is basis @ gradient, as far as the sketch reaches.
    covariance: (in, in), x x^T summed and divided by `divisor`, not centred.
    product: (out, in), W @ covariance, gathered directly where that is smaller than the covariance.
    energy: the trace of the covariance.
    mean: (in,), of the inputs.
    """

    tokens: int
    gradient: Tensor | None = None
    basis: Tensor | None = None
    covariance: Tensor | None = None
    product: Tensor | None = None
    energy: float = 0.0
    mean: Tensor | None = None


class Init(ABC):
    """Abstract: one value of the init axis. Final subclasses are frozen dataclasses of options."""

    name: ClassVar[str]
    #: the pair's product is not zero, so a start must be subtracted (base='keep') or folded into the base (base='fold')
    moves_base: ClassVar[bool] = False
    #: the pair's product is not zero and stays: training begins one step away from the base, and nothing is subtracted
    steps: ClassVar[bool] = False
    #: the factor that starts at zero, 'down' or 'up'; empty where none does
    zero_role: ClassVar[str] = ""
    #: the frozen weight must be read
    needs_weight: ClassVar[bool] = False
    #: the init makes no pair, because the update brings its own values
    own: ClassVar[bool] = False
    #: the pair is directions without a size, orthonormal rows and columns: for updates that say themselves how large they start
    gives_frames: ClassVar[bool] = False

    @property
    def calibration(self) -> Calibration | None:
        """The statistics that this init needs; None where the weight and a generator are enough."""
        return None

    @property
    def nonzero(self) -> bool:
        """Whether the pair's product is not zero, so that an update must keep it."""
        return self.moves_base or self.steps

    @property
    def distributes(self) -> bool:
        """Whether `distribute` decides the ranks of the sites."""
        return False

    def candidates(self, rank: int) -> int:
        """How many ranks `begin` is asked for at a site that the recipe gives `rank`; sides of the site bound it."""
        return rank

    def distribute(self, sites: Sequence[Site], begun: "Mapping[str, Beginning]") -> dict[str, int]:
        """Site name -> its rank, at most the candidates that began there; 0 for a site that gets no adapter."""
        return {site.name: site.rank for site in sites}

    def distributed_alpha(self, site: Site, rank: int) -> float:
        """The alpha of a site whose rank was changed to `rank`."""
        return site.alpha

    def settled(self) -> "Init":
        """The same init with the ranks decided: what the recipe of an adapted model has."""
        return self

    def notes(self, sites: Sequence[Site]) -> list[str]:
        """What a plan should say of these sites."""
        return []

    @abstractmethod
    def begin(self, site: Site, weight: Tensor | None, statistics: Statistics | None, generator: torch.Generator) -> Beginning:
        """The starting pair.

        Args:
            site: shapes, rank and scaling.
            weight: the dense frozen weight (out, in), only where `needs_weight`.
            statistics: what calibration gathered for this site, where `calibration` asks for it; not to be kept.
            generator: a CPU generator of the site's own, seeded from the run's seed and the site's name.
        """

    def again(self, site: Site, weight: Tensor, seed: int, number: int) -> Beginning:
        """The pair of a later round, for schedules that fold what was trained into the weight and begin anew.

        Args:
            site: shapes, rank and scaling.
            weight: the weight as trained so far, dense (out, in).
            seed: of the run.
            number: of the round, counted from 0 for the start; each has a random stream of its own.
        """
        return self.begin(site, weight, None, site_generator(seed, site.name, f"round {number}"))


def site_generator(seed: int, name: str, purpose: str = "init") -> torch.Generator:
    """A CPU generator that depends on the seed and the site's name only: not on order, device or the global state."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
