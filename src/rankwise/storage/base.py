"""Storage axis: how the frozen weight of a site is held. Only this axis touches base weights.

A storage is a stateless object. Shapes: x (..., in), bias (out,), g (..., out), weights as the layer holds them; `read` gives (out, in).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn


class Storage(ABC):
    """How one kind of base layer is asked for its products, and how its weight is read and written."""

    #: whether the operation may run its hand-written backward on `product` and `product_t`
    fused: ClassVar[bool] = True

    @abstractmethod
    def tensors(self, layer: nn.Module) -> tuple[Tensor, ...]:
        """The frozen tensors that `product` and `product_t` need; saved by reference for the backward."""

    @abstractmethod
    def bias(self, layer: nn.Module) -> Tensor | None:
        """The bias (out,), or None."""

    @abstractmethod
    def product(self, x: Tensor, bias: Tensor | None, *weights: Tensor) -> Tensor:
        """x W^T + bias, (..., out), bit-equal to the layer's own forward."""

    @abstractmethod
    def product_t(self, g: Tensor, *weights: Tensor) -> Tensor:
        """g W, (..., in), in g's dtype."""

    def linear(self, layer: nn.Module, x: Tensor) -> Tensor:
        """x W^T without bias, differentiable in x: for small matrices such as `down` (rank, in) -> (rank, out)."""
        return self.product(x, None, *self.tensors(layer))

    @abstractmethod
    def read(self, layer: nn.Module) -> Tensor:
        """The weight as a dense (out, in) tensor, possibly a view: do not write to it."""

    @abstractmethod
    def write(self, layer: nn.Module, weight: Tensor) -> None:
        """Replaces the weight by a dense (out, in) tensor, rounded once to the layer's dtype, in place."""


@dataclass(frozen=True)
class Keep:
    """Storage choice: the base weight stays as the model was loaded (dense, or whatever the vendor's layer holds)."""

    name: ClassVar[str] = "keep"
