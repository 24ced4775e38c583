"""Finding the layers that a recipe targets: which modules can be adapted, what a pattern names, which of them read one input."""

import re
from typing import cast

import torch
from torch import Tensor, nn

from rankwise.errors import TargetError, nearest
from rankwise.patterns import PatternError, expression
from rankwise.recipe import Targets
from rankwise.sites import AdaptedLinear
from rankwise.storage import NF4Linear, WideLinear
from rankwise.storage.dense import is_conv1d

# Siblings that read one input: names of modules under one parent, in the families this project knows.
SHARED_INPUT: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("q_lin", "k_lin", "v_lin"),
    ("gate_proj", "up_proj"),
    ("wi_0", "wi_1"),
    ("w1", "w3"),
)
# In cross-attention the query reads the decoder, key and value read the encoder.
_CROSS = re.compile(r"cross|encdec|encoder_attn", re.IGNORECASE)


def kind_of(module: nn.Module) -> str | None:
    """'linear', 'conv1d', 'embedding', 'opaque' (called, never looked into), or None for what cannot be adapted."""
    if type(module) in (nn.Linear, NF4Linear, WideLinear):
        return "linear"
    if is_conv1d(module):
        return "conv1d"
    if type(module) is nn.Embedding:
        return "embedding"
    widths = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if all(isinstance(width, int) for width in widths) and not isinstance(module, nn.Bilinear):
        return "opaque"
    return None


def widths_of(module: nn.Module) -> tuple[int, int]:
    """(in, out) of an adaptable module."""
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if is_conv1d(module):
        rows, columns = cast(Tensor, module.weight).shape
        return rows, columns
    return cast(int, module.in_features), cast(int, module.out_features)


def placement(layer: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and floating-point dtype of a base layer; fp32 where the layer holds no floating-point tensor."""
    if isinstance(layer, NF4Linear):
        return layer.codes.device, layer.storage.recorded
    tensors = [*layer.parameters(), *layer.buffers()]
    device = tensors[0].device if tensors else torch.device("cpu")
    dtype = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)
    return device, dtype


def layer_number(name: str) -> int | None:
    """The first number in a module path: the layer's index in every family this project knows."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def block_of(name: str) -> str:
    """The path of the transformer block that a module lies in: up to the first number; empty where there is none."""
    parts = name.split(".")
    return next((".".join(parts[: index + 1]) for index, part in enumerate(parts) if part.isdigit() and index + 1 < len(parts)), "")


def layer_range(text: str) -> set[int]:
    """'0-3,8' -> {0, 1, 2, 3, 8}."""
    numbers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?", part)
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise TargetError(f"layers={text!r}: {part.strip()!r} is no layer or range; write for example '0-3,8'")
        numbers.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return numbers


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern (a name, a dotted suffix, or 're:' and an expression for the whole path) matches a module path."""
    if pattern.startswith("re:"):
        try:
            return expression(pattern[3:]).fullmatch(name) is not None
        except PatternError as error:
            raise TargetError(f"target {pattern[:200]!r}: {error}") from None
    return name == pattern or name.endswith("." + pattern)


def find_sites(model: nn.Module, targets: Targets, apart: tuple[str, ...] = ()) -> dict[str, tuple[nn.Module, str]]:
    """Module path -> (module, pattern) of what the targets name, in the model's order.

    Args:
        targets: what to include, exclude and in which layers.
        apart: names of modules that train in full; they are no sites, nor is what lies inside them.

    Raises:
        TargetError: a pattern matches nothing (near misses are named), or names something that cannot be adapted.
    """
    modules = dict(model.named_modules())
    if any(isinstance(module, AdaptedLinear) for module in modules.values()):
        raise TargetError("the model is adapted already; take the adapters off with rankwise.unadapt(model) first")
    layers = None if targets.layers is None else layer_range(targets.layers)
    head = output_head(model)
    found: dict[str, tuple[nn.Module, str]] = {}
    counts = dict.fromkeys(targets.include, 0)
    for pattern in targets.include:
        for name, module in modules.items():
            if any(matches(part, name) or any(matches(part, name[:end]) for end in _dots(name)) for part in apart):
                continue
            kind = kind_of(module)
            if pattern == "all-linear":
                hit = kind in ("linear", "conv1d", "opaque") and module is not head and not inside_attention(modules, name)
            else:
                hit = bool(name) and matches(pattern, name)
                if hit and kind is None:
                    if pattern.startswith("re:"):
                        continue  # an expression may well cover containers
                    raise TargetError(
                        f"target {pattern!r} matches {name}, a {type(module).__name__}, which is no linear layer; "
                        f"{_instead(model, modules, name)}"
                    )
                if hit and inside_attention(modules, name):
                    raise TargetError(
                        f"target {pattern!r} matches {name}, whose weight torch's MultiheadAttention reads past any replacement: "
                        "an adapter there would do nothing; leave it out"
                    )
            if not hit:
                continue
            counts[pattern] += 1
            if layers is not None and layer_number(name) not in layers:
                continue
            if not any(matches(excluded, name) for excluded in targets.exclude):
                found.setdefault(name, (module, pattern))
    for pattern, count in counts.items():
        if count == 0:
            if named := [name for name in stacked_weights(model) if matches(pattern, name)]:
                raise TargetError(f"target {pattern!r} matches {named[0]}, {_STACKED}; leave it out")
            raise TargetError(f"target {pattern!r} matches nothing{_near_misses(pattern, modules)}")
    for pattern in targets.exclude:
        if not any(matches(pattern, name) for name in modules):
            raise TargetError(f"targets.exclude: {pattern!r} matches nothing{_near_misses(pattern, modules)}")
    if not found:
        rest = f"layers={targets.layers!r} and " if targets.layers else ""
        raise TargetError(
            f"no site is left: {rest}exclude={list(targets.exclude)} take out all that include={list(targets.include)} matches"
        )
    return {name: found[name] for name in modules if name in found}


def _dots(name: str) -> list[int]:
    return [index for index, character in enumerate(name) if character == "."]


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that gives a language model's logits, or None."""
    getter = getattr(model, "get_output_embeddings", None)
    return cast("nn.Module | None", getter()) if callable(getter) else None


def inside_attention(modules: dict[str, nn.Module], name: str) -> bool:
    """Whether a module belongs to a MultiheadAttention, which reads its weight past any replacement."""
    return isinstance(modules.get(name.rpartition(".")[0]), nn.MultiheadAttention)


def _linear_names(modules: dict[str, nn.Module]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name, module in modules.items() if name and kind_of(module)})


_STACKED = (
    "which holds the matrices of several experts in one tensor and is no linear layer: no adapter can act there (modules_to_save trains "
    "the module around it in full)"
)


def stacked_weights(model: nn.Module) -> dict[str, Tensor]:
    """Path -> parameter (experts, ., .) of what holds several matrices in one tensor, as mixtures of experts do: no linear layer, no site.

    Shapes say it, in any model: three sides, each longer than one (position embeddings have a side of one), outside of modules that are
    known to hold such a tensor for another reason (convolutions, bilinear layers).
    """
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Bilinear | nn.modules.conv._ConvNd) or kind_of(module):
            continue
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.dim() == 3 and min(parameter.shape) > 1:
                found[f"{name}.{key}" if name else key] = parameter
    return found


def _instead(model: nn.Module, modules: dict[str, nn.Module], name: str) -> str:
    """What to do about a target that is no linear layer."""
    inside = sorted({path.rpartition(".")[2] for path, module in modules.items() if path.startswith(name + ".") and kind_of(module)})
    if inside:
        return f"name the linear layers inside it: {', '.join(inside)}"
    if stacked := [path for path in stacked_weights(model) if path.startswith(name + ".")]:
        return f"it holds {stacked[0]}, {_STACKED}; leave it out"
    return "there is none inside it either; leave it out, or train it in full with modules_to_save"


def _near_misses(pattern: str, modules: dict[str, nn.Module]) -> str:
    names = _linear_names(modules)
    last = pattern.removeprefix("re:").rpartition(".")[2]
    clause = nearest(last, names) or nearest(pattern, names)
    return f"{clause or '.'} The model's linear layers are named: {', '.join(names) or 'none'}"


def group_of(name: str) -> str:
    """An identifier shared by the siblings that read the same input, or an empty string."""
    parent, _, last = name.rpartition(".")
    for members in SHARED_INPUT:
        if last in members:
            if members[0] in ("q_proj", "query", "q", "q_lin") and _CROSS.search(parent) and last == members[0]:
                return ""
            return f"{parent}:{'/'.join(members)}"
    return ""


def tied_names(model: nn.Module) -> dict[int, list[str]]:
    """id of each parameter that stands under several module paths -> these paths."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    return {key: names for key, names in owners.items() if len(names) > 1}


def shared_module_paths(model: nn.Module) -> dict[int, list[str]]:
    """id of each module object that stands under several paths -> these paths."""
    paths: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(name)
    return {key: names for key, names in paths.items() if len(names) > 1}
