"""DoRA models that several test files use."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from toys import one, stir

import rankwise as rw
from rankwise.recipes import dora
from rankwise.sites import AdaptedLinear, adapted_sites


def made(dtype: torch.dtype = torch.float64, width: int = 20, out: int = 14, **fields: Any) -> nn.Module:
    """One layer, stirred, rank 4."""
    return stir(rw.adapt(one(width, out, dtype=dtype), dora(**{"rank": 4} | fields)))


def adapted_weight(site: AdaptedLinear) -> Tensor:
    """V = W + update - start, (out, in), materialised in fp64."""
    v = site.base_layer.weight.detach().double()
    factors = site.update.factors()
    v = v + (factors.effective_up().double() @ factors.down.double()).detach()
    if site.offset is not None and not site.folded:
        v = v - site.site.scaling * site.offset.up.double() @ site.offset.down.double()
    return v


def peft_twin(model: nn.Module, plain: nn.Module, dropout: float = 0.0) -> nn.Module:
    """PEFT's DoRA over a copy of the same base, with the factors and magnitudes of ours."""
    from peft import LoraConfig, get_peft_model

    site = next(iter(adapted_sites(model).values())).site
    names = list(adapted_sites(model))
    config = LoraConfig(r=site.rank, lora_alpha=site.alpha, target_modules=names, use_dora=True, lora_dropout=dropout)
    theirs = get_peft_model(copy.deepcopy(plain), config)
    for name, mine in adapted_sites(model).items():
        layer = theirs.get_submodule(f"base_model.model.{name}")
        with torch.no_grad():
            layer.lora_A.default.weight.copy_(mine.update.down)
            layer.lora_B.default.weight.copy_(mine.update.up)
            layer.lora_magnitude_vector.default.weight.copy_(mine.gain.saved()["magnitude"])
    return theirs
