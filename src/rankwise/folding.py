"""Folding: what the factors of a site hold is written into its base weight while training goes on (GaLore after every step, ROSA every
round). The one place where a schedule touches a base weight, and it asks the storage to.

    W <- keep * W + scale * (update - start)
"""

import torch

from rankwise.equation import stacked
from rankwise.errors import RecipeError
from rankwise.sites import AdaptedLinear


@torch.no_grad()
def fold(module: AdaptedLinear, scale: float = 1.0, keep: float = 1.0, generator: torch.Generator | None = None) -> None:
    """Writes the update of a site into its base weight. The factors are left as they are: what they become is the schedule's to say.

    Args:
        module: a site whose recipe has a schedule that rewrites the base; not merged, not switched off.
        scale: multiplies what is added.
        keep: multiplies the weight before: 1 - lr * decay for decoupled decay of the whole weight.
        generator: rounds a bf16 weight stochastically; None rounds to nearest.

    Raises:
        RecipeError: the site has no factors, or it is merged or switched off, so that its base weight is not its own.
    """
    if module.update is None or module.merged or not module.enabled:
        raise RecipeError(f"{module.site.name} cannot be folded: it has no factors, or is merged or switched off; step outside of that")
    factors = module.update.factors()
    down, up = stacked(factors, None if module.offset is None else module.offset.start())
    module.storage.add(module.base_layer, up if scale == 1.0 else up * scale, down.to(up.dtype), keep, generator)
    module.written = True
