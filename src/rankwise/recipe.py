"""A recipe: one choice on each axis, plus rank, scaling, targets and frozen roles. Legality, and the way to and from JSON."""

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

from rankwise.errors import RecipeError, nearest
from rankwise.gains import GAINS, GainChoice, NoGain
from rankwise.gradients import GRADIENTS, GradientRule, Plain
from rankwise.inits import INITS, Init, Kaiming
from rankwise.routing import ROUTINGS, Everywhere, RoutingChoice
from rankwise.schedules import SCHEDULES, Constant, Schedule
from rankwise.storage import STORAGES, Keep, StorageChoice
from rankwise.updates import UPDATES, LowRank, UpdateChoice

AXES: dict[str, Mapping[str, type[Any]]] = {
    "update": UPDATES,
    "gain": GAINS,
    "init": INITS,
    "gradient": GRADIENTS,
    "schedule": SCHEDULES,
    "storage": STORAGES,
    "routing": ROUTINGS,
}


# What a choice given as an object must be; names in files are looked up in AXES alone, never imported.
_KINDS: dict[str, type[Any]] = {
    "update": UpdateChoice,
    "gain": GainChoice,
    "init": Init,
    "gradient": GradientRule,
    "schedule": Schedule,
    "storage": StorageChoice,
    "routing": RoutingChoice,
}


@dataclass(frozen=True)
class Targets:
    """Which modules are adapted.

    include: patterns; each must match something. 'all-linear' (every linear layer but the output head), a name or a dotted suffix
        ('q_proj', 'mlp.up_proj'), or a regular expression after 're:' that must match the whole module path.
    exclude: patterns taken out again.
    layers: a range over the first number in the module path, such as '0-3,8'; None means all.
    """

    include: tuple[str, ...] = ("all-linear",)
    exclude: tuple[str, ...] = ()
    layers: str | None = None


@dataclass(frozen=True)
class Recipe:
    """One low-rank method: a choice on each of the seven axes and the numbers that go with it. Immutable; `replace` makes variants.

    rank: inner size of the factors. alpha: numerator of the scaling, None for twice the rank (a scaling of 1 for Deep LoRA).
    scaling: 'lora' for alpha / rank, 'rslora' for alpha / sqrt(rank).
    dropout: probability on the branch's input, in training.
    base: for starts that are not zero: 'keep' subtracts the frozen start in the forward and leaves the base untouched, 'fold' writes the
        residual into the base.
    frozen: roles that do not train, on top of those that the update itself never trains.
    rank_pattern, alpha_pattern: target pattern -> value for the sites it matches; the last match wins.
    states: how AdamW's moments are held: 'fp32' (as the adapters are), or '8bit', blockwise codes, for tensors of 4096 elements and more.
    modules_to_save: names of modules that train in full beside the adapters, such as a classification head.
    lr, lr_bracket: the recipe's own learning rate for AdamW and the range worth searching.
    """

    name: str = "lora"
    update: UpdateChoice = LowRank()
    gain: GainChoice = NoGain()
    init: Init = Kaiming()
    gradient: GradientRule = Plain()
    schedule: Schedule = Constant()
    storage: StorageChoice = Keep()
    routing: RoutingChoice = Everywhere()
    rank: int = 16
    alpha: float | None = None
    scaling: Literal["lora", "rslora"] = "lora"
    dropout: float = 0.0
    base: Literal["keep", "fold"] = "keep"
    frozen: frozenset[str] = frozenset()
    targets: Targets = Targets()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    states: Literal["fp32", "8bit"] = "fp32"
    seed: int = 0
    lr: float = 2e-4
    lr_bracket: tuple[float, float] = (5e-5, 2e-3)

    def __post_init__(self) -> None:
        check(self)

    @property
    def reads_context(self) -> bool:
        """Whether facts of the batch must reach the adapters, so that the model gets hooks at its root."""
        return self.update.reads_context or self.routing.module is not None

    @property
    def frozen_roles(self) -> frozenset[str]:
        """All roles that do not train."""
        return self.frozen | self.update.frozen

    @property
    def moves_base(self) -> bool:
        """Whether a start that is not zero is subtracted (base='keep') or folded into the base: the init's, or the update's own."""
        return self.init.moves_base or self.update.moves_base

    def alpha_of(self, rank: int) -> float:
        """Alpha of a site of this rank, patterns aside: the given one, else twice the recipe's rank, or what makes the scaling 1."""
        if self.alpha is not None:
            return self.alpha
        if self.update.unit_scaling:
            return float(rank) if self.scaling == "lora" else math.sqrt(rank)
        return 2.0 * self.rank

    @property
    def mergeable(self) -> bool:
        """Whether one weight can hold what the adapters do: not where it depends on the token or the prompt."""
        return self.update.constant_core and self.routing.module is None

    def scaling_of(self, rank: int, alpha: float) -> float:
        """The number that multiplies the update."""
        if not self.update.scaled or rank == 0:
            return 1.0
        return alpha / (rank if self.scaling == "lora" else math.sqrt(rank))

    def replace(self, **changes: Any) -> "Recipe":
        """A copy with some fields changed. An axis takes a choice, its name, or a dict {name, option: value}; `name` follows the
        changes."""
        changes = {key: _coerce(key, value) for key, value in changes.items()}
        made = dataclasses.replace(self, **changes)
        return made

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, complete: `from_dict` gives an equal recipe."""
        plain: dict[str, Any] = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if item.name in AXES:
                plain[item.name] = {"name": value.name, **{key: _plain(option) for key, option in dataclasses.asdict(value).items()}}
            elif isinstance(value, Targets):
                plain[item.name] = {"include": list(value.include), "exclude": list(value.exclude), "layers": value.layers}
            elif isinstance(value, frozenset):
                plain[item.name] = sorted(value)
            elif isinstance(value, tuple):
                plain[item.name] = list(value)
            else:
                plain[item.name] = dict(value) if isinstance(value, Mapping) else value
        return plain

    @staticmethod
    def from_dict(plain: Mapping[str, Any]) -> "Recipe":
        """The recipe of `to_dict`. Unknown fields, axes' values and options are refused, never imported."""
        known = {item.name for item in dataclasses.fields(Recipe)}
        for key in plain:
            if key not in known:
                raise RecipeError(f"unknown recipe field {key!r}{nearest(key, known)}")
        return Recipe(**{key: _coerce(key, value) for key, value in plain.items()})


def _plain(option: Any) -> Any:
    return list(option) if isinstance(option, tuple) else option


def _coerce(key: str, value: Any) -> Any:
    """JSON and shorthand values into the field's own type."""
    if key in AXES:
        return choice(key, value)
    if key == "targets":
        return targets(value)
    if key == "frozen":
        return value if isinstance(value, frozenset) else frozenset(_listed(key, value))
    if key in ("modules_to_save", "lr_bracket"):
        return tuple(_listed(key, value))
    return value


def _listed(key: str, value: Any) -> list[Any]:
    if not isinstance(value, list | tuple | set | frozenset):
        raise RecipeError(f"{key}={value!r} must be a list")
    if key != "lr_bracket" and (odd := [item for item in value if not isinstance(item, str)]):
        raise RecipeError(f"{key} holds {odd[0]!r}; give names as text")
    return list(value)


def targets(value: Any) -> Targets:
    """Targets from a Targets, a pattern, a list of patterns or a dict {include, exclude, layers}."""
    if isinstance(value, Targets):
        return value
    if isinstance(value, str):
        return Targets((value,))
    if isinstance(value, Mapping):
        known = {"include", "exclude", "layers"}
        for key in value:
            if key not in known:
                raise RecipeError(f"unknown key {key!r} under targets{nearest(str(key), known)}; use include, exclude, layers")

        layers = value.get("layers")
        if layers is not None and not isinstance(layers, str | int):
            raise RecipeError(f"targets.layers={layers!r} must be a range such as '0-3,8'")
        include = _patterns("targets.include", value.get("include", ("all-linear",)))
        return Targets(include, _patterns("targets.exclude", value.get("exclude", ())), None if layers is None else str(layers))
    return Targets(_patterns("targets", value))


def _patterns(where: str, given: Any) -> tuple[str, ...]:
    if isinstance(given, str):
        return (given,)
    if not isinstance(given, list | tuple | set | frozenset) or not all(isinstance(each, str) for each in given):
        raise RecipeError(f"{where}={given!r} must be a pattern or a list of patterns, such as ['q_proj', 'v_proj']")
    return tuple(given)


def choice(axis: str, value: Any) -> Any:
    """One value of an axis, from a choice, a name or a dict {name, option: value}."""
    known = AXES[axis]
    if isinstance(value, _KINDS[axis]):
        return value
    options: dict[str, Any] = {}
    if isinstance(value, Mapping):
        options = {str(key): option for key, option in value.items()}
        value = options.pop("name", None)
    if not isinstance(value, str) or value not in known:
        raise RecipeError(f"{axis}={value!r} is unknown; use one of {', '.join(map(repr, known))}{nearest(str(value), known)}")
    return build_choice(known[value], options, f"{axis}={value!r}")


@lru_cache(maxsize=128)
def _validator(kind: type[Any]) -> Any:
    """What checks the options of a choice; making it takes longer than all checks with it."""
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def build_choice(kind: type[Any], options: Mapping[str, Any], where: str) -> Any:
    """A frozen dataclass from options, each checked against its declared type."""
    declared = {item.name: item for item in dataclasses.fields(kind)}
    for key in options:
        if key not in declared:
            takes = ", ".join(declared) or "no options"
            raise RecipeError(f"{where} has no option {key!r}{nearest(key, declared)} (it takes {takes})")
    from pydantic import ValidationError

    try:
        return _validator(kind).validate_python(dict(options))
    except ValidationError as error:
        first = error.errors()[0]
        option = ".".join(map(str, first["loc"])) or "an option"
        raise RecipeError(f"{where}: {option}={first.get('input')!r} is not valid: {first['msg']}") from None


# --- legality: each forbidden pair once, with its reason -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Forbidden:
    """A forbidden pair of recipe properties and why. `first` and `second` are what a table prints."""

    first: str
    second: str
    reason: str
    applies: Callable[[Recipe], bool]


def _is(axis: str, *names: str) -> Callable[[Recipe], bool]:
    return lambda recipe: getattr(recipe, axis).name in names


def _both(left: Callable[[Recipe], bool], right: Callable[[Recipe], bool]) -> Callable[[Recipe], bool]:
    return lambda recipe: left(recipe) and right(recipe)


def _moves(recipe: Recipe) -> bool:
    return recipe.init.moves_base


def _token_core(recipe: Recipe) -> bool:
    return not recipe.update.constant_core


def _experts(recipe: Recipe) -> bool:
    return recipe.update.name == "loramoe"


def _gated(recipe: Recipe) -> bool:
    return recipe.routing.module is not None


def _rewrites(recipe: Recipe) -> bool:
    return recipe.schedule.rewrites_base


def _frozen(*roles: str) -> Callable[[Recipe], bool]:
    return lambda recipe: set(roles) <= recipe.frozen_roles


LEGALITY: tuple[Forbidden, ...] = (
    Forbidden(
        "update=none", "gain=none", "nothing would train; choose an update or a gain", _both(_is("update", "none"), _is("gain", "none"))
    ),
    Forbidden(
        "an update with a start of its own (vera, adalora, deep-lora, galore, none)",
        "an init that it cannot take",
        "VeRA's vectors have a fixed start and its pair is the shared pool, AdaLoRA's triplets start at singular values of zero or with "
        "an init that moves the base, Deep LoRA's bias to low rank comes from factors that start small, balanced and orthogonal "
        "(init='own' or 'deep-lora'), GaLore's factor starts at zero, and a gain alone has nothing to start; use init='own'",
        lambda recipe: (
            recipe.update.own_start
            and not recipe.init.own
            and not (recipe.update.absorbs_start and _moves(recipe))
            and not (recipe.update.takes_frames and recipe.init.gives_frames)
        ),
    ),
    Forbidden(
        "an update made of a pair (lora, moslora)",
        "init=own",
        "the pair needs a start; use init='kaiming' or another",
        lambda recipe: recipe.init.own and not recipe.update.own_start,
    ),
    Forbidden(
        "update=moslora with a mixer that is not orthogonal",
        "an init that moves the base",
        "the mixer must be absorbed by the pair without loss; use mixer='orthogonal' or 'identity'",
        _both(lambda recipe: getattr(recipe.update, "mixer", "orthogonal") not in ("orthogonal", "identity"), _moves),
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
        "update=adalora with init=own",
        "core frozen",
        "the singular values start at zero and would stay there; unfreeze 'core' or use an init that moves the base",
        _both(lambda recipe: recipe.update.name == "adalora" and recipe.init.own, _frozen("core")),
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
        "init=random-up",
        "down frozen",
        "`down` starts at zero and would stay there; use init='orthonormal' or 'kaiming'",
        _both(_is("init", "random-up"), _frozen("down")),
    ),
    Forbidden(
        "an init with up = 0",
        "up frozen",
        "`up` starts at zero and would stay there; use init='random-up' or an init that moves the base",
        _both(_is("init", "kaiming", "gaussian", "orthonormal"), _frozen("up")),
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
        "an update made of a pair (lora, moslora)",
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
        "update=none or vera",
        "sites share the pair of an update, and there is none, or all share one already; use update='lora' or another",
        _both(_is("schedule", "lora-drop"), _is("update", "none", "vera")),
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
        "an init that moves the base",
        "gates weigh the experts anew for each token, so their sum is never the start that was taken out; use init='kaiming'",
        _both(_experts, _moves),
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
)


ROLES = frozenset({"down", "up", "core", "tail", "gate"})


_LARGEST_RANK = 1 << 20  # above the width of any layer; products of larger ones would leave 64 bits


def _check_types(recipe: Recipe) -> None:
    """What a file may say wrongly: the fields that no annotation checks at run time."""
    for label in ("rank_pattern", "alpha_pattern"):
        patterns: Any = getattr(recipe, label)
        if not isinstance(patterns, Mapping) or not all(isinstance(pattern, str) for pattern in patterns):
            raise RecipeError(f"{label}={patterns!r} must map target patterns to numbers")
    bracket: Any = recipe.lr_bracket
    if not (isinstance(bracket, tuple) and len(bracket) == 2):
        raise RecipeError(f"lr_bracket={bracket!r} must be two numbers")
    numbers: dict[str, Any] = {"dropout": recipe.dropout, "lr": recipe.lr, "lr_bracket[0]": bracket[0], "lr_bracket[1]": bracket[1]}
    numbers |= {"alpha": recipe.alpha} if recipe.alpha is not None else {}
    numbers |= {f"alpha_pattern[{pattern!r}]": value for pattern, value in recipe.alpha_pattern.items()}
    for label, value in numbers.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not -1e30 < value < 1e30:
            raise RecipeError(f"{label}={value!r} must be a finite number of ordinary size")
    if not isinstance(recipe.name, str):
        raise RecipeError(f"name={recipe.name!r} must be text")
    if not isinstance(recipe.seed, int) or isinstance(recipe.seed, bool) or not -(2**63) <= recipe.seed < 2**63:
        raise RecipeError(f"seed={recipe.seed!r} must be a whole number of at most 63 bits")
    for label, rank in [("rank", recipe.rank), *((f"rank_pattern[{key!r}]", value) for key, value in recipe.rank_pattern.items())]:
        if isinstance(rank, int) and rank > _LARGEST_RANK:
            raise RecipeError(f"{label}={rank} is above {_LARGEST_RANK}; lower it")


def check(recipe: Recipe) -> None:
    """Raises RecipeError for values of the wrong type, numbers out of range and every forbidden pair; warns where a pair is legal but
    pointless."""
    _check_types(recipe)
    if not (isinstance(recipe.rank, int) and not isinstance(recipe.rank, bool) and recipe.rank >= 1):
        raise RecipeError(f"rank={recipe.rank!r} must be a whole number of at least 1")
    for pattern, rank in recipe.rank_pattern.items():
        if not (isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1):
            raise RecipeError(f"rank_pattern[{pattern!r}]={rank!r} must be a whole number of at least 1")
    for label, alpha in [("alpha", recipe.alpha), *((f"alpha_pattern[{key!r}]", value) for key, value in recipe.alpha_pattern.items())]:
        if alpha is not None and not alpha > 0:
            raise RecipeError(f"{label}={alpha!r} must be above 0")
    if not 0 <= recipe.dropout < 1:
        raise RecipeError(f"dropout={recipe.dropout!r} must be at least 0 and below 1")
    if recipe.scaling not in ("lora", "rslora"):
        raise RecipeError(f"scaling={recipe.scaling!r} is unknown; use 'lora' (alpha / rank) or 'rslora' (alpha / sqrt(rank))")
    if recipe.states not in ("fp32", "8bit"):
        raise RecipeError(f"states={recipe.states!r} is unknown; use 'fp32' or '8bit'")
    if recipe.base not in ("keep", "fold"):
        raise RecipeError(f"base={recipe.base!r} is unknown; use 'keep' or 'fold'")
    if unknown := recipe.frozen - ROLES:
        raise RecipeError(f"frozen={sorted(unknown)} are no roles; use {', '.join(sorted(ROLES))}")
    for row in LEGALITY:
        if row.applies(recipe):
            raise RecipeError(f"{row.first} cannot be combined with {row.second}: {row.reason}")
    if recipe.gradient.name == "lora-plus" and "down" in recipe.frozen_roles and recipe.update.name == "lora":
        warnings.warn("lora-plus with a frozen `down` only multiplies the learning rate of `up`; raise lr instead", stacklevel=3)
