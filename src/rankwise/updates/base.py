"""Update axis: what the factors are. A choice (frozen dataclass) says which tensors an update owns; its module maps them to Factors."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from rankwise.equation import Factors
from rankwise.errors import RecipeError

Role = Literal["down", "up", "core", "tail", "gain", "gate", "activation", "other"]


@dataclass(frozen=True, slots=True)
class Site:
    """One linear layer that a recipe adapts: shapes and numbers, no tensor."""

    name: str  # dotted module path
    kind: str  # linear, conv1d, embedding or opaque
    in_features: int
    out_features: int
    rank: int  # 0 for a site without factors
    scaling: float
    alpha: float = 0.0
    group: str = ""  # sites with the same non-empty group read the same input
    pattern: str = ""  # the target pattern that matched
    has_bias: bool = False
    weight_bytes: int = 0
    element: int = 4  # bytes of one number of the base; adapters take at least 4
    experts: int = 1  # pairs of this rank that stand stacked at the site
    owner: str = ""  # name of the site whose update this one uses; empty for a site with an update of its own

    @property
    def width(self) -> int:
        """Size of h = down @ x: all ranks of all experts."""
        return self.rank * self.experts


@dataclass(frozen=True, slots=True)
class Slot:
    """One tensor of an update or gain at one site: its role, its shape and its name in adapter files."""

    role: Role
    shape: tuple[int, ...]
    key: str
    frozen: bool = False  # never trains at this site, whatever the recipe freezes

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    def trains(self, frozen: Collection[str]) -> bool:
        """Whether the tensor is a parameter, given the frozen roles of the recipe."""
        return not self.frozen and self.role not in frozen


class Part(nn.Module):
    """Abstract: a module that holds the tensors of its slots, the frozen ones as buffers, so that nothing can thaw them."""

    def __init__(self, slots: Mapping[str, Slot], frozen: frozenset[str], device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.slots = dict(slots)
        for name, slot in slots.items():
            tensor = torch.zeros(slot.shape, device=device, dtype=dtype)
            if not slot.trains(frozen):
                self.register_buffer(name, tensor)
            else:
                self.register_parameter(name, nn.Parameter(tensor))

    @property
    def roles(self) -> dict[str, Role]:
        """Parameter name -> role, of the tensors that train."""
        return {name: slot.role for name, slot in self.slots.items() if name in self._parameters}

    @torch.no_grad()
    def put(self, **values: Tensor) -> None:
        """Copies values into slots by name."""
        for name, value in values.items():
            getattr(self, name).copy_(value)


class Update(Part, ABC):
    """Abstract: an update at one site. Final subclasses say what the factors are."""

    def __init__(
        self, choice: Any, site: Site, frozen: frozenset[str], device: torch.device, dtype: torch.dtype, shared: nn.Module | None
    ) -> None:
        super().__init__(choice.slots(site), frozen, device, dtype)
        self.choice = choice
        self.scaling = site.scaling
        if shared is not None:
            raise RecipeError(f"{type(self).__name__} takes no shared tensors")

    @abstractmethod
    def factors(self) -> Factors:
        """The factors as they stand now; never sees x."""

    @abstractmethod
    def begin(self, down: Tensor | None, up: Tensor | None, moves: bool, generator: torch.Generator) -> None:
        """Takes the starting pair (rank, in), (out, rank); with `moves`, the product of the factors must equal up @ down."""

    def extend(self, down: Tensor | None, up: Tensor | None, generator: torch.Generator) -> None:
        """Takes the starting pair of one expert more: `resizing.grow` has just added its slots, which hold zeros."""
        raise RecipeError(f"update={self.choice.name!r} holds a fixed number of experts")

    def gates(self, x: Tensor) -> Tensor:
        """The weight of each expert for each token, (..., experts) from x (..., in); only of updates that have experts.

        Raises:
            RecipeError: it has none.
        """
        raise RecipeError(f"update={self.choice.name!r} has no gates")

    def stand_in(self, gates: Tensor) -> Factors:
        """Constant factors that do for every token what these gates (experts,) would.

        Raises:
            RecipeError: the update has no gates.
        """
        raise RecipeError(f"update={self.choice.name!r} has no gates that could be held constant")

    #: (x, h) -> core . h for cores that depend on the token; None where the core is constant
    token_core: Any = None


class UpdateChoice(ABC):
    """Abstract: one value of the update axis. Final subclasses are frozen dataclasses of options."""

    name: ClassVar[str]
    module: ClassVar[type[Update] | None]
    #: roles that this update can train
    roles: ClassVar[frozenset[str]]
    #: whether the update brings its own starting values, so that an init has no say
    own_start: ClassVar[bool] = False
    #: the role that stands at zero in this start, so that nothing moves while it is frozen; empty where none does
    zero_role: ClassVar[str] = ""
    #: whether sites may use one update together: not where they draw on one pool already, or there is no pair
    shareable: ClassVar[bool] = True
    #: whether it can take the pair of an init that moves the base all the same
    absorbs_start: ClassVar[bool] = False
    #: PEFT's type whose files the slots fill, None where PEFT has no such method
    peft_type: ClassVar[str | None] = None
    #: roles that this update never trains
    frozen: ClassVar[frozenset[str]] = frozenset()
    #: whether alpha / rank applies
    scaled: ClassVar[bool] = True
    #: whether the scaling is 1 where no alpha is given, instead of that of alpha = 2 rank
    unit_scaling: ClassVar[bool] = False
    #: whether it can take the frames of an init that gives directions without sizes (`Init.gives_frames`)
    takes_frames: ClassVar[bool] = False
    #: whether a rank larger than a side is redundant, so refused
    rank_bounded: ClassVar[bool] = True
    #: whether sites of one group share `down` (and so `down @ x`)
    shares_down: ClassVar[bool] = False
    #: pairs that stand stacked at each site; the number to begin with where it grows
    experts: int = 1
    #: whether a site may gain experts while it trains; `slots` of a site with more experts then are those of fewer, and further ones
    grows: ClassVar[bool] = False
    #: whether the core is the same for all tokens
    constant_core: ClassVar[bool] = True

    @property
    def moves_base(self) -> bool:
        """Whether the update's own start is not zero and must be subtracted."""
        return False

    @property
    def start_size(self) -> float:
        """Spectral norm of an own start that is not zero and is not subtracted; 0 where the start is the base exactly."""
        return 0.0

    @property
    def reads_context(self) -> bool:
        """Whether it reads facts of the batch (`rankwise.context`) or attaches losses to the graph."""
        return False

    @property
    def whole_rows(self) -> bool:
        """Whether what it does to a token depends on those behind it, so that no model that generates can have it."""
        return False

    def missing_fact(self) -> str:
        """Why training must know the type of every sample; empty where it need not."""
        return ""

    def check_types(self, types: Sequence[int]) -> None:
        """Raises RecipeError where the types of the training rows do not fit."""
        return

    @abstractmethod
    def slots(self, site: Site) -> dict[str, Slot]:
        """The tensors that one site owns."""

    def first(self, site: Site, values: Mapping[str, Tensor], experts: int) -> dict[str, Tensor]:
        """Slot name -> tensor of the first experts of a site, from those of all; for an update that grows."""
        return {name: values[name] for name in self.slots(replace(site, experts=experts))}

    def width_at(self, site: Site) -> int:
        """The size of h = down @ x at a site, where it is not the rank of all experts."""
        return site.width

    def trained_factors(self, site: Site, frozen: Collection[str]) -> frozenset[str]:
        """Which factors of the equation have a gradient at a site, given the frozen roles of the recipe: what forecasts count by. An update
        whose tensors are not the factors themselves says so here."""
        here = {slot.role for slot in self.slots(site).values() if slot.frozen}
        return self.roles.difference(frozen, here)

    def rank_at(self, rank: int, width_out: int, width_in: int) -> int:
        """The rank of a site of these widths where a recipe asks for `rank`: an update whose rank is bounded may lower it."""
        return rank

    def peft_reason(self, sites: Sequence[Site]) -> str:
        """Why a file of `peft_type` cannot hold these sites; empty where it can."""
        return ""

    def peft_fields(self, sites: Sequence[Site], rank: int) -> dict[str, Any]:
        """The fields of PEFT's adapter_config.json that are this update's own; `rank` is the recipe's."""
        return {}

    def shared(self, sites: Sequence[Site], device: torch.device, dtype: torch.dtype) -> nn.Module | None:
        """Tensors that all sites share, made once for the model; None where there are none."""
        return None

    def shared_numbers(self, sites: Sequence[Site]) -> int:
        """How many frozen numbers `shared` holds."""
        return 0
