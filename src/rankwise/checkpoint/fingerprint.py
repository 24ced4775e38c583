"""A fingerprint of the base, so that an adapter is not loaded onto another one."""

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from rankwise.planning import Plan
from rankwise.preparing import held_layer, needs_dense
from rankwise.recipe import Recipe
from rankwise.storage.bnb_layout import as_nf4, is_bitsandbytes_4bit
from rankwise.updates import Site

_SAMPLES = 256


@torch.no_grad()
def base_fingerprint(modules: Mapping[str, nn.Module], sites: Sequence[Site]) -> str:
    """A SHA-256 over the sites' names, shapes and 256 evenly spaced elements of each weight, rounded to bf16.

    Rounding makes the fingerprint the same for one base loaded in fp32 and in bf16; sampling keeps it cheap for a base of any size. A
    weight
    on `meta`, or one held in a form without a plain floating-point tensor, counts with its shape alone.
    """
    digest = hashlib.sha256()
    for site in sorted(sites, key=lambda site: site.name):
        digest.update(f"{site.name} {site.out_features} {site.in_features}\n".encode())
        weight = _weight(modules[site.name])
        if isinstance(weight, Tensor) and weight.is_floating_point() and not weight.is_meta:
            flat = weight.detach().reshape(-1)
            positions = torch.linspace(0, flat.numel() - 1, min(_SAMPLES, flat.numel()), dtype=torch.float64).long()
            sample = flat[positions.to(flat.device)].to("cpu", torch.bfloat16)
            digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _weight(module: nn.Module) -> object:
    return getattr(as_nf4(module) if is_bitsandbytes_4bit(module) else module, "weight", None)


def held_fingerprint(modules: Mapping[str, nn.Module], made: Plan) -> str | None:
    """The fingerprint of a prepared base: that of the quantized weights. None where the storage leaves weights as they are, and where the
    base of a folded start is not yet what it will be."""
    if not made.recipe.storage.quantizes or needs_dense(made.recipe):
        return None
    return base_fingerprint(modules, made.sites)


def forecast_fingerprint(modules: Mapping[str, nn.Module], made: Plan) -> str | None:
    """What `held_fingerprint` will be of a base that is not prepared yet: its sites are quantized one by one, and dropped."""
    if not made.recipe.storage.quantizes or needs_dense(made.recipe):
        return None
    held = {name: _Late(modules[name], made.recipe) for name in made.held}
    return base_fingerprint({**modules, **held}, made.sites)


class _Late(nn.Module):
    """Stands in for a layer whose quantized weight is made when it is asked for."""

    def __init__(self, layer: nn.Module, recipe: Recipe) -> None:
        super().__init__()
        self.make = lambda: held_layer(layer, recipe).weight

    @property
    def weight(self) -> object:
        """The quantized weight, dense again."""
        return self.make()
