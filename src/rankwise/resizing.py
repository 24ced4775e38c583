"""An adapted model that changes its size while it trains: ranks are cut out, experts come in; factors, sites and plan follow.

Which dimensions of a tensor are ranks, and which tensors a further expert brings, is read off the slots, so that this serves every
update whose factors are its own. The scaling stays what it was.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from rankwise.errors import RecipeError
from rankwise.inits import site_generator
from rankwise.recipe import Recipe
from rankwise.record import adapted
from rankwise.schedules import Sliced
from rankwise.sites import AdaptedLinear, adapted_sites


@torch.no_grad()
def resize(model: nn.Module, kept: Mapping[str, Tensor]) -> list[Sliced]:
    """Keeps the named ranks of some sites and drops the others for good.

    Args:
        model: an adapted model.
        kept: site name -> positions of the ranks that stay, (new rank,), ascending; none at all is a site of rank 0.

    Returns:
        The parameters that were replaced, so that an optimizer can follow.

    Raises:
        RecipeError: a site with a start that is subtracted, which would have to be cut with its factors.
    """
    record, sites = adapted(model), adapted_sites(model)
    for name in kept:
        if sites[name].update is None or sites[name].offset is not None:
            raise RecipeError(f"{name} has no factors or a start of its own, so its rank cannot change; use an init that begins at zero")
    cuts = [cut for name, index in kept.items() for cut in _cut(sites[name], index)]
    record.plan = record.plan.resized({name: sites[name].site.rank for name in kept})
    return cuts


def _cut(module: AdaptedLinear, index: Tensor) -> list[Sliced]:
    update, site = module.update, module.site
    assert update is not None
    index = index.to(module.weight.device)
    wider = update.choice.slots(replace(site, rank=site.rank + 1))
    cuts = []
    for name, slot in update.slots.items():
        for dim, (size, other) in enumerate(zip(slot.shape, wider[name].shape, strict=True)):
            if size == other:
                continue
            was = getattr(update, name)
            now = was.detach().index_select(dim, index).contiguous()
            if isinstance(was, nn.Parameter):
                now = nn.Parameter(now, requires_grad=was.requires_grad)
                cuts.append(Sliced(was, now, index, dim))
            setattr(update, name, now)
    module.site = replace(site, rank=index.numel())
    update.slots = update.choice.slots(module.site)
    return cuts


@torch.no_grad()
def grow(model: nn.Module, names: Sequence[str]) -> None:
    """Gives some sites one expert more, beside those they have: its tensors start as the recipe's init says, with the update's own rest.

    Tensors that the slots of the larger site call frozen become buffers; those that go on training stay the same parameters.

    Args:
        model: an adapted model.
        names: the sites.

    Raises:
        RecipeError: the update holds a fixed number of experts.
    """
    record, sites = adapted(model), adapted_sites(model)
    choice = record.recipe.update
    if not choice.grows:
        raise RecipeError(f"update={choice.name!r} holds a fixed number of experts, so a site cannot gain one; use update='am-lora'")
    for name in names:
        _extend(sites[name], record.recipe)
    record.plan = record.plan.grown({name: sites[name].site.experts for name in names})


def _extend(module: AdaptedLinear, recipe: Recipe) -> None:
    update, site = module.update, replace(module.site, experts=module.site.experts + 1)
    assert update is not None
    like = next(tensor for tensor in (*update.parameters(), *update.buffers()))
    slots = recipe.update.slots(site)
    for name, slot in slots.items():
        old = getattr(update, name, None)
        trains = slot.trains(recipe.frozen_roles)
        if isinstance(old, nn.Parameter) and not trains:
            delattr(update, name)
            update.register_buffer(name, old.detach())
        elif old is None and trains:
            update.register_parameter(name, nn.Parameter(like.new_zeros(slot.shape)))
        elif old is None:
            update.register_buffer(name, like.new_zeros(slot.shape))
    generator = site_generator(recipe.seed, site.name, f"expert {site.experts}")
    weight = module.storage.read(module.base_layer) if recipe.init.needs_weight else None
    down, up, *_ = recipe.init.begin(site, weight, None, generator)
    module.site, update.slots = site, slots
    down, up = (None if tensor is None else tensor.to(like) for tensor in (down, up))
    update.extend(down, up, generator)
