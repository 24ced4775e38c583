"""Writing updates into the base weights and taking them out again."""

from typing import Any, cast

import torch
from torch import nn

from rankwise.errors import TargetError
from rankwise.record import adapted, put, thaw
from rankwise.sites import AdaptedLinear, adapted_sites, trained_modules
from rankwise.storage.nf4 import NF4Linear, NF4Storage


@torch.no_grad()
def merge(model: nn.Module, keep_base: bool = True) -> nn.Module:
    """Writes every update into the base weights: in fp32, rounded once to the base's dtype. A layer that is held in 4 bits is replaced by
    a dense one in the dtype that its weight was quantized from: rounding to 4 bits again would lose the update.

    Args:
        model: an adapted model.
        keep_base: keep the base weights on the CPU, so that `unmerge`, `disabled` and `unadapt` give them back bit for bit. False takes the
            adapters off: what returns is a plain model with merged weights, no layer of it in 4 bits.

    Raises:
        TargetError: an update depends on the token, or the base cannot be written.
    """
    record = adapted(model)
    refuse_while_disabled(model, "merge")
    sites = adapted_sites(model)
    if any(module.merged for module in sites.values()):
        raise TargetError("the model is merged already; call rankwise.unmerge(model) first")
    try:
        for module in sites.values():
            _write_in(model, module)
    except BaseException:  # all or nothing
        for module in sites.values():
            _take_out(module)
        raise
    config = getattr(model, "config", None)
    if any(module.tied for module in sites.values()) and getattr(config, "tie_word_embeddings", False):
        record.untied_config = True
        cast(Any, config).tie_word_embeddings = False
    if not keep_base:
        for name, module in sites.items():
            put(model, name, module.base_layer)
        for name, held in [(name, module) for name, module in model.named_modules() if isinstance(module, NF4Linear)]:
            put(model, name, held.storage.replaced(held, held.dense_weight()))  # layers without an adapter: one dtype throughout
        for name, trained in trained_modules(model).items():
            put(model, name, trained.trained.to(trained.dtype))
        thaw(model, record)
    return model


def _write_in(model: nn.Module, module: AdaptedLinear) -> None:
    weight, bias = module.merged_weight(), module.merged_bias()
    if not bool(torch.isfinite(weight).all()):
        raise TargetError(f"the merged weight of {module.site.name} is not finite; the adapter is broken")
    _untie(model, module)
    storage = module.storage
    if isinstance(storage, NF4Storage):  # never back into 4 bits: that would round the update away
        module.kept_layer = (module.base_layer,)
        module.base_layer = storage.replaced(module.base_layer, weight)
        if bias is not None:
            module.base_layer.bias = nn.Parameter(bias.to(module.weight.dtype), requires_grad=False)
        module.merged = True
        return
    module.kept_weight = storage.read(module.base_layer).detach().to("cpu", copy=True)
    storage.write(module.base_layer, weight)
    if bias is not None:
        module.kept_bias = (cast(nn.Parameter, module.base_layer.bias),)
        module.base_layer.bias = nn.Parameter(bias.to(module.kept_bias[0].dtype), requires_grad=False)
    module.merged = True


def _take_out(module: AdaptedLinear) -> None:
    """The reverse of `_write_in`, also where that stopped before the end."""
    if module.merged:
        swap_in(module)
    if module.tied:
        module.base_layer.weight = module.tied[0]
    module.merged, module.kept_weight, module.kept_bias, module.kept_layer, module.tied = False, None, (), (), ()


def _untie(model: nn.Module, module: AdaptedLinear) -> None:
    """Gives a tied base layer a weight of its own, so that merging leaves the other owner alone; the layer remembers the common one."""
    weight = getattr(module.base_layer, "weight", None)
    if not isinstance(weight, nn.Parameter):
        return
    if any(
        other is not module.base_layer and any(parameter is weight for parameter in other._parameters.values()) for other in model.modules()
    ):
        module.tied = (weight,)
        module.base_layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)


def refuse_while_disabled(model: nn.Module, what: str) -> None:
    """Raises TargetError inside `rankwise.disabled(model)`."""
    if not all(module.enabled for module in adapted_sites(model).values()):
        raise TargetError(
            f"{what} cannot run inside rankwise.disabled(model), which would put the weights of before back; leave the block first"
        )


@torch.no_grad()
def unmerge(model: nn.Module) -> nn.Module:
    """Takes the updates out of the base weights again: the base comes back bit for bit, from its copy."""
    record = adapted(model)
    refuse_while_disabled(model, "unmerge")
    sites = [module for module in adapted_sites(model).values() if module.merged]
    if not sites:
        raise TargetError("the model is not merged; call rankwise.merge(model) first")
    for module in sites:
        _take_out(module)
    if record.untied_config:
        record.untied_config = False
        cast(Any, model).config.tie_word_embeddings = True
    return model


def swap_in(module: AdaptedLinear) -> None:
    """The kept base weight back into the layer, or the kept layer back into its place; the merged one waits where that was."""
    if module.kept_layer:
        (kept,) = module.kept_layer
        module.kept_layer, module.base_layer = (module.base_layer,), kept.to(module.weight.device)
        return
    assert module.kept_weight is not None
    storage = module.storage
    merged = storage.read(module.base_layer).detach().to("cpu", copy=True)
    storage.write(module.base_layer, module.kept_weight.to(module.weight.device))
    module.kept_weight = merged
    if module.kept_bias:
        (bias,) = module.kept_bias
        module.kept_bias, module.base_layer.bias = (cast(nn.Parameter, module.base_layer.bias),), bias


swap_out = swap_in  # swapping twice is the identity
