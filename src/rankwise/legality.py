"""Which choices cannot be combined: each forbidden pair once, with its reason.

Where a row can be said by what a choice declares about itself (`own_start`, `moves_base`, `zero_role`, `constant_core`, `calibration`,
...) it is, so that a new value of an axis finds its rows already here. A row that names one choice is there for that choice alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rankwise.inits import INITS
from rankwise.updates import UPDATES

if TYPE_CHECKING:
    from rankwise.recipe import Recipe

Rule = Callable[["Recipe"], bool]


@dataclass(frozen=True)
class Forbidden:
    """A forbidden pair of recipe properties and why. `first` and `second` are what a table prints."""

    first: str
    second: str
    reason: str
    applies: Rule


def _is(axis: str, *names: str) -> Rule:
    return lambda recipe: getattr(recipe, axis).name in names


def _both(left: Rule, right: Rule) -> Rule:
    return lambda recipe: left(recipe) and right(recipe)


def _moves(recipe: "Recipe") -> bool:
    return recipe.init.moves_base


def _nonzero(recipe: "Recipe") -> bool:
    return recipe.init.nonzero


def _named(known: Mapping[str, Any], declares: Callable[[Any], bool]) -> str:
    """The names of the choices that declare something, as a row's text holds them."""
    return ", ".join(name for name, choice in known.items() if declares(choice))


def _token_core(recipe: "Recipe") -> bool:
    return not recipe.update.constant_core


def _experts(recipe: "Recipe") -> bool:
    return recipe.update.name == "loramoe"


def _gated(recipe: "Recipe") -> bool:
    return recipe.routing.module is not None


def _rewrites(recipe: "Recipe") -> bool:
    return recipe.schedule.rewrites_base


def _frozen(*roles: str) -> Rule:
    return lambda recipe: set(roles) <= recipe.frozen_roles


LEGALITY: tuple[Forbidden, ...] = (
    Forbidden(
        "update=none", "gain=none", "nothing would train; choose an update or a gain", _both(_is("update", "none"), _is("gain", "none"))
    ),
    Forbidden(
        f"an update with a start of its own ({_named(UPDATES, lambda choice: choice.own_start)})",
        "an init that it cannot take",
        "the update brings the values at which its method starts, and there is no pair for an init to fill (adalora takes one that moves "
        "the base, deep-lora the frames of init='deep-lora'); use init='own'",
        lambda recipe: (
            recipe.update.own_start
            and not recipe.init.own
            and not (recipe.update.absorbs_start and _moves(recipe))
            and not (recipe.update.takes_frames and recipe.init.gives_frames)
        ),
    ),
    Forbidden(
        f"an update made of a pair ({_named(UPDATES, lambda choice: not choice.own_start)})",
        "init=own",
        "the pair needs a start; use init='kaiming' or another",
        lambda recipe: recipe.init.own and not recipe.update.own_start,
    ),
    Forbidden(
        "update=moslora with a mixer that is not orthogonal",
        "an init whose pair is not zero",
        "the mixer must be absorbed by the pair without loss; use mixer='orthogonal' or 'identity'",
        _both(lambda recipe: getattr(recipe.update, "mixer", "orthogonal") not in ("orthogonal", "identity"), _nonzero),
    ),
    Forbidden(
        "gradient=lora-fa",
        "update other than lora",
        "the correction is the closed form for one pair without a core; use update='lora'",
        _both(_is("gradient", "lora-fa"), lambda recipe: recipe.update.name != "lora"),
    ),
    Forbidden(
        "gradient=lora-fa",
        "down trained",
        "the correction holds for a `down` that never changes; add frozen={'down'}",
        _both(_is("gradient", "lora-fa"), lambda recipe: recipe.update.name == "lora" and "down" not in recipe.frozen_roles),
    ),
    Forbidden(
        "gradient=lora-fa",
        "up frozen",
        "only `up` has a corrected gradient, and it would not train; remove 'up' from frozen",
        _both(_is("gradient", "lora-fa"), _frozen("up")),
    ),
    Forbidden(
        "gradient=lora-plus",
        "update=none",
        "there is no output-side factor whose rate could differ; use gradient='plain'",
        _both(_is("gradient", "lora-plus"), _is("update", "none")),
    ),
    Forbidden(
        "schedule=adalora",
        "update other than adalora",
        "the budget counts singular triplets; use update='adalora' with init='own'",
        _both(_is("schedule", "adalora"), lambda recipe: recipe.update.name != "adalora"),
    ),
    Forbidden(
        "schedule=adalora",
        "an init that moves the base",
        "a triplet that is pruned would take its part of the pretrained weight with it; use init='own', or schedule='none'",
        _both(_is("schedule", "adalora"), _moves),
    ),
    Forbidden(
        "init=own with an update that starts with a role at zero",
        "that role frozen",
        "it would stay at zero, and with it the whole update "
        f"({', '.join(f'{name}: {choice.zero_role!r}' for name, choice in UPDATES.items() if choice.zero_role)}); unfreeze it",
        lambda recipe: recipe.init.own and recipe.update.zero_role in recipe.frozen_roles,
    ),
    Forbidden(
        "init=lora-ga",
        "gradient=lora-plus",
        "the start makes the first step follow the gradient, which two learning rates would bend away again; use gradient='plain'",
        _both(_is("init", "lora-ga"), _is("gradient", "lora-plus")),
    ),
    Forbidden(
        "base=fold",
        "an init that does not move the base",
        "the start is zero, so there is nothing to fold; use base='keep'",
        lambda recipe: recipe.base == "fold" and not _moves(recipe),
    ),
    Forbidden(
        "base=fold",
        "dropout",
        "dropout would drop a part of the pretrained function, which stands in the branch; use dropout=0 or base='keep'",
        lambda recipe: recipe.base == "fold" and recipe.dropout > 0,
    ),
    Forbidden(
        f"an init with down = 0 ({_named(INITS, lambda init: init.zero_role == 'down')})",
        "down frozen",
        "`down` starts at zero and would stay there; use init='orthonormal' or 'kaiming'",
        lambda recipe: recipe.init.zero_role == "down" and "down" in recipe.frozen_roles,
    ),
    Forbidden(
        f"an init with up = 0 ({_named(INITS, lambda init: init.zero_role == 'up')})",
        "up frozen",
        "`up` starts at zero and would stay there; use init='random-up' or an init that moves the base",
        lambda recipe: recipe.init.zero_role == "up" and "up" in recipe.frozen_roles,
    ),
    Forbidden(
        "an update whose core depends on the token",
        "gain=dora",
        "the row norm would differ from token to token, and one norm per token is a dense weight per token; use gain='none'",
        _both(_token_core, _is("gain", "dora")),
    ),
    Forbidden(
        "an update whose core depends on the token",
        "an init that moves the base, with base=keep",
        "a frozen start can only be subtracted where the core is constant; use base='fold' or init='kaiming'",
        _both(_token_core, lambda recipe: _moves(recipe) and recipe.base == "keep"),
    ),
    Forbidden(
        "all roles of the update frozen",
        "gain=none",
        "nothing would train; unfreeze a role or choose a gain",
        lambda recipe: recipe.gain.name == "none" and recipe.update.name != "none" and not recipe.update.roles - recipe.frozen_roles,
    ),
    Forbidden(
        "storage with iterations above 1",
        "base=keep",
        "only what is left of a folded start is quantized again; use base='fold' with an init that moves the base, or iterations=1",
        lambda recipe: recipe.storage.iterations > 1 and recipe.base == "keep",
    ),
    Forbidden(
        "storage with iterations above 1",
        "an init that needs calibration",
        "its statistics are those of the weight before it was quantized, once; use iterations=1",
        lambda recipe: recipe.storage.iterations > 1 and recipe.base == "fold" and recipe.init.calibration is not None,
    ),
    Forbidden(
        "init=deep-lora",
        f"an update made of a pair ({_named(UPDATES, lambda choice: not choice.own_start)})",
        "it gives directions without a size, which would start as a large update; use update='deep-lora', or init='lora-ga'",
        lambda recipe: recipe.init.gives_frames and not recipe.update.own_start,
    ),
    Forbidden(
        "gradient=lora-pro",
        "update other than lora",
        "the equivalent gradient is the closed form for one pair without a core; use update='lora'",
        _both(_is("gradient", "lora-pro"), lambda recipe: recipe.update.name != "lora"),
    ),
    Forbidden(
        "gradient=lora-pro",
        "down and up frozen",
        "their gradients are what is adjusted, and neither would train; unfreeze one, or use gradient='plain'",
        _both(_is("gradient", "lora-pro"), _frozen("down", "up")),
    ),
    Forbidden(
        "a schedule that rewrites the base",
        "a gain",
        "the gain stands over base and branch, so what the factors learn is not what the weight would have to take up; use gain='none'",
        lambda recipe: recipe.schedule.rewrites_base and recipe.gain.name != "none",
    ),
    Forbidden(
        "a schedule that rewrites the base",
        "a quantized storage",
        "every write would round all of the weight to its levels again, and small changes would be lost; use storage='keep'",
        lambda recipe: recipe.schedule.rewrites_base and recipe.storage.quantizes,
    ),
    Forbidden(
        "a schedule that rewrites the base",
        "an update whose core depends on the token",
        "what the factors do differs from token to token, and one weight cannot take that up; use a constant core",
        _both(_token_core, lambda recipe: recipe.schedule.rewrites_base),
    ),
    Forbidden(
        "schedule=rosa",
        "base=keep",
        "what trains is a slice of the weight, which is taken out of it; use base='fold' with an init that moves the base",
        _both(_is("schedule", "rosa"), lambda recipe: recipe.base == "keep"),
    ),
    Forbidden(
        "schedule=rosa",
        "an init that needs calibration",
        "every round makes a start from the weight alone, when the calibration data are gone; use init='rosa', 'pissa' or 'milora-svd'",
        _both(_is("schedule", "rosa"), lambda recipe: recipe.init.calibration is not None),
    ),
    Forbidden(
        "schedule=rosa",
        "gradient=lora-plus",
        "a faster `up` is meant for a start at up = 0, and here both factors start as parts of the weight; use gradient='plain'",
        _both(_is("schedule", "rosa"), _is("gradient", "lora-plus")),
    ),
    Forbidden(
        "schedule=lora-drop",
        f"an update without a pair of its own ({_named(UPDATES, lambda choice: not choice.shareable)})",
        "sites share the pair of an update, and there is none, or all share one already; use update='lora' or another",
        _both(_is("schedule", "lora-drop"), lambda recipe: not recipe.update.shareable),
    ),
    Forbidden(
        "schedule=lora-drop",
        "an update whose core depends on the token",
        "the output's energy follows from rank-sized sums only where the core is constant; use update='lora' or another",
        _both(_is("schedule", "lora-drop"), _token_core),
    ),
    Forbidden(
        "update=am-lora",
        "an init that moves the base",
        "every task begins a pair of its own, and each later one would start from another base; use init='kaiming'",
        _both(_is("update", "am-lora"), _moves),
    ),
    Forbidden(
        "schedule=task-growth",
        "update other than am-lora",
        "only AM-LoRA's sites can gain an expert; use update='am-lora', or schedule='none' to train one update on all tasks",
        _both(_is("schedule", "task-growth"), lambda recipe: recipe.update.name != "am-lora"),
    ),
    Forbidden(
        "an update with experts",
        "an init whose pair is not zero",
        "gates weigh the experts anew for each token, so their sum is never the start that was taken out; use init='kaiming'",
        _both(_experts, _nonzero),
    ),
    Forbidden(
        "a routing with gates",
        "a gain",
        "a gain scales base and update alike, so a closed gate would not leave the base (the paper's MiDoRA does not fit); use gain='none'",
        _both(_gated, lambda recipe: recipe.gain.name != "none"),
    ),
    Forbidden(
        "a routing with gates",
        "base=fold",
        "the base would lack its start wherever a gate is closed; use base='keep'",
        _both(_gated, lambda recipe: recipe.base == "fold"),
    ),
    Forbidden(
        "a schedule that rewrites the base",
        "a routing with gates",
        "what is written acts on every token, whatever the gates say; use routing='none'",
        _both(_gated, lambda recipe: recipe.schedule.rewrites_base),
    ),
    Forbidden(
        "a schedule that rewrites the base",
        "dropout",
        "what is folded is the whole update, and not what was trained; use dropout=0",
        _both(_rewrites, lambda recipe: recipe.dropout > 0),
    ),
    Forbidden(
        "schedule=galore",
        "update other than galore",
        "steps are folded out of the frame that this update holds; use update='galore' with init='own'",
        _both(_is("schedule", "galore"), lambda recipe: recipe.update.name != "galore"),
    ),
    Forbidden(
        "update=galore",
        "schedule other than galore",
        "the frame comes from the gradients that this schedule taps; use schedule='galore'",
        _both(_is("update", "galore"), lambda recipe: recipe.schedule.name != "galore"),
    ),
    Forbidden(
        "update=galore",
        "frozen roles",
        "which factor is the frozen frame follows from the shape of each site; leave frozen out",
        _both(_is("update", "galore"), lambda recipe: bool(recipe.frozen)),
    ),
    Forbidden(
        "update=galore",
        "gradient other than plain",
        "which side trains follows from the shape of each site, so rules for one role would treat layers differently; use gradient='plain'",
        _both(_is("update", "galore"), lambda recipe: recipe.gradient.name != "plain"),
    ),
    Forbidden(
        "schedule=lora-drop",
        "an init that distributes the ranks",
        "sites can share one update only where they have one rank; use rho=1, or schedule='none'",
        _both(_is("schedule", "lora-drop"), lambda recipe: recipe.init.distributes),
    ),
    Forbidden(
        "update=am-lora",
        "an init that needs calibration",
        "every task begins a pair of its own, when the calibration data are gone; use init='kaiming'",
        _both(_is("update", "am-lora"), lambda recipe: recipe.init.calibration is not None),
    ),
)
