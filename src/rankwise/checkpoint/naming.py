"""Names of modules: what a base calls them beneath its adapters, and the shortest patterns that pick some of them and no others."""

import re
from collections.abc import Collection, Mapping
from typing import TypeVar

from torch import nn

from rankwise.routing import BlockGate
from rankwise.sites import AdaptedLinear, TrainedModule

Value = TypeVar("Value", int, float)


def plain_name(name: str) -> str:
    """A qualified name without what torch.compile puts around modules."""
    return name.replace("_orig_mod.", "")


def base_names(model: nn.Module) -> list[str]:
    """The names of all modules as the base has them, whether or not the model is adapted."""
    names: list[str] = []
    wrapped: list[str] = []
    for full, module in model.named_modules():
        name = plain_name(full).removesuffix("_orig_mod").rstrip(".")
        if isinstance(module, BlockGate):
            continue
        if isinstance(module, AdaptedLinear | TrainedModule):
            wrapped.append(name + ".")
            names.append(name)
            continue
        around = next((prefix for prefix in wrapped if name.startswith(prefix)), None)
        if around is None:
            names.append(name)
        elif name.startswith(around + "base_layer."):
            names.append(around + name.removeprefix(around + "base_layer."))
    return [name for name in dict.fromkeys(names) if name]


def picks(suffix: str, name: str) -> bool:
    """Whether a dotted suffix (or a whole name) picks a module: PEFT's rule and this project's for a plain pattern."""
    return name == suffix or name.endswith("." + suffix)


def shortest(chosen: Collection[str], among: Collection[str]) -> list[str] | None:
    """The shortest dotted suffixes that pick the chosen names among all and no others; None where even whole names pick others."""
    wanted = set(chosen)
    others = [name for name in among if name not in wanted]
    found: dict[str, None] = {}
    for name in chosen:
        parts = name.split(".")
        for length in range(1, len(parts) + 1):
            suffix = ".".join(parts[-length:])
            if suffix in found:
                break
            if not any(picks(suffix, other) for other in others):
                found[suffix] = None
                break
        else:
            return None
    return sorted(found)


def grouped(values: Mapping[str, Value], default: Value) -> list[tuple[list[str] | None, list[str], Value]]:
    """(shortest suffixes or None, names, value) for each value that is not the default."""
    found = []
    for value in dict.fromkeys(values.values()):
        names = [name for name, mine in values.items() if mine == value]
        if value != default:
            found.append((shortest(names, values), names, value))
    return found


def own_patterns(values: Mapping[str, Value], default: Value) -> dict[str, Value]:
    """A rank_pattern or alpha_pattern of a Recipe: pattern -> value for the names whose value is not the default."""
    patterns: dict[str, Value] = {}
    for suffixes, names, value in grouped(values, default):
        patterns.update(dict.fromkeys(exact_names(names) if suffixes is None else suffixes, value))
    return patterns


def peft_patterns(values: Mapping[str, Value], default: Value) -> dict[str, Value]:
    """The same as PEFT reads it: each key is a regular expression for the end of a name."""
    patterns: dict[str, Value] = {}
    for suffixes, names, value in grouped(values, default):
        keys = ["^" + re.escape(name) for name in names] if suffixes is None else [re.escape(suffix) for suffix in suffixes]
        patterns.update(dict.fromkeys(keys, value))
    return patterns


def exact_names(names: Collection[str]) -> list[str]:
    """Patterns of this project that match these names and nothing else."""
    return ["re:" + re.escape(name) for name in names]
