"""A recipe: one choice on each axis, plus rank, scaling, targets and frozen roles; its checks, and the way to and from JSON."""

import dataclasses
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

from rankwise.errors import RecipeError, nearest
from rankwise.gains import GAINS, GainChoice, NoGain
from rankwise.gradients import GRADIENTS, GradientRule, Plain
from rankwise.inits import INITS, Init, Kaiming
from rankwise.legality import LEGALITY
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


def refusal(**fields: Any) -> RecipeError | None:
    """Why these fields make no recipe, or None where they do: what enumerates combinations asks here."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Recipe().replace(**fields)
    except RecipeError as error:
        return error
    return None
