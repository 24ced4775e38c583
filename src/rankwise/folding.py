"""Folding: what the factors of a site hold is written into its base weight while training goes on (GaLore after every step, ROSA every
round). The one place where a schedule touches a base weight, and it asks the storage to.

    fold     W <- keep * W + scale * (update - start)
    renew    W <- W_fix + update,  a new start from that W,  W_fix <- W - start          for a start that is folded into the base
    replay   the same roundings of W again, from the ledger of a file
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from rankwise.equation import Factors, Start, dense_update, shifted, stacked
from rankwise.errors import RecipeError, TrainingError
from rankwise.inits import Beginning
from rankwise.ledger import Round
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
    factors = _factors(module)
    down, up = stacked(factors, None if module.offset is None else module.offset.start())
    module.storage.add(module.base_layer, up if scale == 1.0 else up * scale, down.to(up.dtype), keep, generator)
    module.written = True


@torch.no_grad()
def renew(module: AdaptedLinear, begin: Callable[[Tensor], Beginning], generator: torch.Generator) -> Tensor:
    """Folds the update of a site into its base weight and begins anew from there, in the same parameters and buffers. The model computes
    what it did before, to rounding.

    With a master the weight is summed up there, so that roundings of the base do not add up over the rounds; with a ledger the finished
    round is written down. One dense weight at a time is held in fp32 (fp64 for an fp64 base).

    Args:
        module: a site with `base: fold`; not merged, not switched off.
        begin: W, dense (out, in), to the new starting pair.
        generator: for an update that draws numbers of its own when it takes a pair.

    Returns:
        The square of the norm of what rounding has taken from W for good, a scalar; zero with a master.

    Raises:
        RecipeError: as `fold`. TrainingError: the trained weight is not finite.
    """
    factors, scaling = _factors(module), module.site.scaling
    update, offset, layer = module.update, module.offset, module.base_layer
    assert update is not None
    if offset is None or not module.folded:
        raise RecipeError(f"{module.site.name} has no start that is folded into its base; use base='fold' with an init that moves the base")
    finished = Round(_as_start(factors), Start(offset.down.clone(), offset.up.clone()))
    if module.master is None:
        weight = shifted(module.storage.read(layer), finished.end, scaling, 1.0)
    else:
        weight = _summed(module.master, finished, scaling)
    if not bool(torch.isfinite(weight).all()):
        raise TrainingError(f"the trained weight of {module.site.name} is not finite; go back to an earlier checkpoint and lower lr")
    begun = begin(weight)
    # in the layer's own precision, so that what is taken out of a 16-bit weight is what its forward adds
    kept = module.storage.read(layer).dtype
    down, up = (None if t is None else t.to(weight.device, kept).to(offset.up.dtype) for t in (begun.down, begun.up))
    update.begin(down, up, True, generator)
    offset.load_state_dict(_as_start(update.factors())._asdict())
    wanted = shifted(weight, offset.start(), scaling, -1.0)
    module.storage.write(layer, wanted)
    module.written = True
    if module.ledger is not None:
        module.ledger.append(Round(*(Start(*(t.detach().to("cpu", copy=True) for t in pair)) for pair in finished)))
    if module.master is not None:
        return torch.zeros((), dtype=wanted.dtype)
    return (module.storage.read(layer).to(wanted.dtype) - wanted).square().sum()


@torch.no_grad()
def replay(module: AdaptedLinear) -> None:
    """Takes a base layer from its original weight to what it was after the rounds of the site's ledger: the same operations in the same
    order, so bit for bit on the same device with the same software, and to fp32 rounding (1e-6 of the weight) elsewhere."""
    rounds, offset, layer, scaling = module.ledger, module.offset, module.base_layer, module.site.scaling
    assert rounds is not None
    assert offset is not None
    rounds = [Round(*(Start(*(t.to(offset.up.device) for t in pair)) for pair in each)) for each in rounds]
    storage = module.storage
    if module.master is not None:
        for each in rounds:
            _summed(module.master, each, scaling)
        storage.write(layer, shifted(module.master.to(offset.up.device), offset.start(), scaling, -1.0))
        return
    starts = [*(each.start for each in rounds), offset.start()]
    storage.write(layer, shifted(storage.read(layer), starts[0], scaling, -1.0))
    for each, start in zip(rounds, starts[1:], strict=True):
        storage.write(layer, shifted(shifted(storage.read(layer), each.end, scaling, 1.0), start, scaling, -1.0))


def _factors(module: AdaptedLinear) -> Factors:
    if module.update is None or module.merged or not module.enabled:
        raise RecipeError(f"{module.site.name} cannot be folded: it has no factors, or is merged or switched off; step outside of that")
    return module.update.factors()


def _as_start(factors: Factors) -> Start:
    """A copy of the pair as it stands, core and tail multiplied in, without the scaling."""
    return Start(factors.down.detach().clone(), replace(factors, scaling=1.0).effective_up().detach().clone())


def _summed(master: Tensor, finished: Round, scaling: float) -> Tensor:
    """Adds to the master what a round has changed, which is exactly nothing where nothing moved; returns it beside the factors."""
    changed = dense_update(Factors(finished.end.down, finished.end.up, scaling=scaling), finished.start)
    assert changed is not None
    weight = master.to(changed.device) + changed.to(master.dtype)
    master.copy_(weight)
    return weight
