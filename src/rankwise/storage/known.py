"""Which storage serves a layer."""

from torch import Tensor, nn

from rankwise.storage.base import Storage
from rankwise.storage.dense import CONV1D, DENSE, EMBEDDING, OPAQUE, is_conv1d
from rankwise.storage.nf4 import NF4Linear
from rankwise.storage.wide import WIDE, WideLinear

_PLAIN: dict[type[nn.Module], Storage] = {nn.Linear: DENSE, WideLinear: WIDE}


def storage_of(layer: nn.Module) -> Storage:
    """The storage that serves a base layer as it stands now; decided anew at each forward, so that late hooks are seen."""
    if isinstance(layer, nn.Embedding):
        return EMBEDDING
    quantized = type(layer) is NF4Linear
    known = layer.storage if quantized else _PLAIN.get(type(layer)) or (CONV1D if is_conv1d(layer) else OPAQUE)
    if known is OPAQUE or "forward" in layer.__dict__ or layer._forward_hooks or layer._forward_pre_hooks:
        return OPAQUE
    if layer._backward_hooks or layer._backward_pre_hooks:
        return OPAQUE
    for parameter in (layer.bias,) if quantized else (layer.weight, layer.bias):
        # a tensor subclass (quantized, sharded) may not support the in-place products; a trained weight needs its own gradient
        if parameter is not None and (type(parameter) not in (nn.Parameter, Tensor) or parameter.requires_grad):
            return OPAQUE
    return known
