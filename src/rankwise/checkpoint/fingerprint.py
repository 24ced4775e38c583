"""A fingerprint of the base, so that an adapter is not loaded onto another one."""

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

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
        weight = getattr(modules[site.name], "weight", None)
        if isinstance(weight, Tensor) and weight.is_floating_point() and not weight.is_meta:
            flat = weight.detach().reshape(-1)
            positions = torch.linspace(0, flat.numel() - 1, min(_SAMPLES, flat.numel()), dtype=torch.float64).long()
            sample = flat[positions.to(flat.device)].to("cpu", torch.bfloat16)
            digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
