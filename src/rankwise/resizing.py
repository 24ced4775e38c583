"""Cutting ranks out of an adapted model while it trains: the factors, the sites' ranks and the plan; scaling stays what it was.

Which dimensions of a tensor are ranks is read off its slot's shape, so that this serves every update whose factors are its own.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from rankwise.adapting import adapted
from rankwise.errors import RecipeError
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
