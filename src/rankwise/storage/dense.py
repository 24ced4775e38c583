"""Storages without quantization: nn.Linear, GPT-2's Conv1D, nn.Embedding, and any other layer that can only be called."""

from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankwise.errors import TargetError
from rankwise.storage.base import Storage


class Dense(Storage):
    """nn.Linear: the weight is (out, in)."""

    def tensors(self, layer: nn.Module) -> tuple[Tensor, ...]:
        return (cast(Tensor, layer.weight),)

    def bias(self, layer: nn.Module) -> Tensor | None:
        return cast("Tensor | None", getattr(layer, "bias", None))

    def product(self, x: Tensor, bias: Tensor | None, *weights: Tensor) -> Tensor:
        return F.linear(x, weights[0], bias)

    def product_t(self, g: Tensor, *weights: Tensor) -> Tensor:
        return g @ weights[0].to(g.dtype)

    def read(self, layer: nn.Module) -> Tensor:
        return cast(Tensor, layer.weight).detach()

    @torch.no_grad()
    def write(self, layer: nn.Module, weight: Tensor) -> None:
        cast(Tensor, layer.weight).copy_(weight)


class ConvOneD(Dense):
    """GPT-2's Conv1D: the weight is (in, out); transposed here and nowhere else."""

    def product(self, x: Tensor, bias: Tensor | None, *weights: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = rows @ weights[0] if bias is None else torch.addmm(bias, rows, weights[0])  # as the layer itself does
        return y.view(*x.shape[:-1], y.shape[-1])

    def product_t(self, g: Tensor, *weights: Tensor) -> Tensor:
        return g @ weights[0].to(g.dtype).T

    def read(self, layer: nn.Module) -> Tensor:
        return cast(Tensor, layer.weight).detach().T

    @torch.no_grad()
    def write(self, layer: nn.Module, weight: Tensor) -> None:
        cast(Tensor, layer.weight).copy_(weight.T)


class Opaque(Storage):
    """Any layer that maps (..., in) to (..., out) linearly: it is called, never looked into.

    Covers layers with hooks, subclasses, tensor subclasses and trainable base weights. The operation takes the reference form.
    """

    fused: ClassVar[bool] = False

    def tensors(self, layer: nn.Module) -> tuple[Tensor, ...]:
        return ()

    def bias(self, layer: nn.Module) -> Tensor | None:
        return cast("Tensor | None", getattr(layer, "bias", None))

    def product(self, x: Tensor, bias: Tensor | None, *weights: Tensor) -> Tensor:
        raise NotImplementedError("an opaque layer has no product of its own; call the layer")

    def product_t(self, g: Tensor, *weights: Tensor) -> Tensor:
        raise NotImplementedError("an opaque layer has no transposed product; autograd goes through the layer")

    def _plain_weight(self, layer: nn.Module) -> Tensor | None:
        """The weight (out, in) where the layer computes as nn.Linear or Conv1D does and only has hooks or trains; else None."""
        weight = getattr(layer, "weight", None)
        if not (isinstance(weight, Tensor) and weight.is_floating_point()):
            return None
        if is_conv1d(layer):
            return weight.detach().T
        return weight.detach() if type(layer).forward is nn.Linear.forward else None

    def linear(self, layer: nn.Module, x: Tensor) -> Tensor:
        weight = self._plain_weight(layer)
        if weight is not None:
            return F.linear(x.to(weight.dtype), weight)
        y, bias = layer(x), self.bias(layer)
        return y if bias is None else y - bias.to(y.dtype)

    @torch.no_grad()
    def read(self, layer: nn.Module) -> Tensor:
        weight = self._plain_weight(layer)
        if weight is not None:
            return weight
        probe = next(layer.parameters(), weight)
        dtype = probe.dtype if isinstance(probe, Tensor) and probe.is_floating_point() else torch.get_default_dtype()
        device = probe.device if isinstance(probe, Tensor) else None
        identity = torch.eye(cast(int, layer.in_features), dtype=dtype, device=device)  # (in, in)
        return self.linear(layer, identity).T  # (out, in)

    @torch.no_grad()
    def write(self, layer: nn.Module, weight: Tensor) -> None:
        self.live(layer).copy_(weight)

    def live(self, layer: nn.Module) -> Tensor:
        target = self._plain_weight(layer)
        if target is None:
            raise TargetError(
                f"{type(layer).__name__} keeps its weight in a form that cannot be written; merge into a dense copy of the base"
            )
        return target


class Embedding(Opaque):
    """nn.Embedding as a linear layer on one-hot rows: in = vocabulary, out = width, x = token ids of any shape."""

    def bias(self, layer: nn.Module) -> Tensor | None:
        return None

    def read(self, layer: nn.Module) -> Tensor:
        return cast(Tensor, layer.weight).detach().T

    def live(self, layer: nn.Module) -> Tensor:
        return self.read(layer)


DENSE, CONV1D, OPAQUE, EMBEDDING = Dense(), ConvOneD(), Opaque(), Embedding()


def is_conv1d(layer: nn.Module) -> bool:
    """GPT-2's Conv1D, recognised without importing transformers."""
    return type(layer).__name__ == "Conv1D" and type(layer).__module__.startswith("transformers.")
