"""Holding the base in another form before anything is adapted: which linear layers a storage choice replaces, and their replacement.

The layers of the whole model are replaced, not only the adapted ones: memory is the purpose. The output head, embeddings, modules that
train in full, weights that two modules share and layers whose weight is read past the layer stay as they were loaded.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from rankwise.errors import TargetError, nearest
from rankwise.matching import inside_attention, kind_of, matches, output_head, placement, shared_module_paths, tied_names
from rankwise.recipe import Recipe
from rankwise.storage import NF4Linear, storage_of
from rankwise.storage.bnb_layout import as_nf4, is_bitsandbytes_4bit


def layers_to_hold(model: nn.Module, recipe: Recipe, apart: Iterable[str] = ()) -> tuple[list[str], list[str]]:
    """(names of the linear layers that `prepare` replaces, notes on those that stay).

    Args:
        model: the base.
        recipe: its storage choice says which form and what to keep.
        apart: names of modules that train in full.

    Raises:
        TargetError: a name to keep that matches nothing.
    """
    if not recipe.storage.quantizes:
        return [], []
    modules, head = dict(model.named_modules()), output_head(model)
    tied, shared, apart = tied_names(model), shared_module_paths(model), tuple(apart)
    for pattern in recipe.storage.keep:
        if not any(matches(pattern, name) for name in modules):
            last = sorted({name.rpartition(".")[2] for name in modules if name})
            raise TargetError(f"storage.keep: {pattern!r} matches nothing{nearest(pattern, last)}")
    held: list[str] = []
    left: dict[str, str] = {}
    for name, module in modules.items():
        if is_bitsandbytes_4bit(module):
            held.append(name)
            continue
        if kind_of(module) not in ("linear", "conv1d", "opaque") or isinstance(module, NF4Linear):
            continue
        if module is head or any(name == other or name.startswith(other + ".") for other in apart):
            continue
        weight = getattr(module, "weight", None)
        if any(matches(pattern, name) for pattern in recipe.storage.keep):
            left[name] = "as asked"
        elif inside_attention(modules, name):
            left[name] = "its weight is read past it"
        elif id(weight) in tied or id(module) in shared:
            left[name] = "it is shared with another module"
        elif kind_of(module) == "opaque" or not _plain(module, weight):
            left[name] = f"a {type(module).__name__} that cannot be looked into"
        else:
            held.append(name)
    return held, [f"{name} stays as loaded: {reason}" for name, reason in left.items()]


def _plain(module: nn.Module, weight: object) -> bool:
    """Whether a linear layer holds an ordinary weight and nothing hangs on it."""
    hooked = "forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks
    return (
        type(weight) is nn.Parameter and weight.is_floating_point() and not (hooked or module._backward_hooks or module._backward_pre_hooks)
    )


def dense_bytes(module: nn.Module) -> int:
    """Bytes of a linear layer's weight as it stands."""
    if isinstance(module, NF4Linear):
        return sum(tensor.nbytes for tensor in module.held() if tensor is not None)
    weight = getattr(module, "weight", None)
    return weight.numel() * weight.element_size() if isinstance(weight, Tensor) else 0


def needs_dense(recipe: Recipe) -> bool:
    """Whether the adapted layers must stay dense until their adapter is made: a residual is quantized, or lengths of the original kept."""
    return recipe.storage.quantizes and (recipe.base == "fold" or recipe.gain.needs_original)


@torch.no_grad()
def prepare(model: nn.Module, recipe: Recipe, held: Iterable[str], sites: Iterable[str]) -> None:
    """Replaces the layers `held` in place, one after another, so that the dense and the quantized base never stand side by side.

    Those among `sites` wait where the recipe needs their dense weight: the adapter's making replaces them.
    """
    late = set(sites) if needs_dense(recipe) else set()
    for name in held:
        if name in late:
            continue
        parent, _, last = name.rpartition(".")
        layer = model.get_submodule(name)
        setattr(model.get_submodule(parent), last, held_layer(layer, recipe))


def held_layer(layer: nn.Module, recipe: Recipe) -> nn.Module:
    """One linear layer in the recipe's form; a 4-bit layer of bitsandbytes keeps its codes."""
    if is_bitsandbytes_4bit(layer):
        return as_nf4(layer)
    return recipe.storage.hold(layer, storage_of(layer).read(layer), placement(layer)[1])
