"""Storage axis: how the frozen weight of a site is held. Only this axis touches base weights.

A storage is a stateless object. Shapes: x (..., in), bias (out,), g (..., out), weights as the layer holds them; `read` gives (out, in).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from rankwise.errors import RecipeError


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

    def wider(self, x: Tensor, *weights: Tensor) -> torch.dtype | None:
        """The dtype in which the products with x, or with a gradient like x, are computed; None for x's own (or autocast's)."""
        return None

    def linear(self, layer: nn.Module, x: Tensor) -> Tensor:
        """x W^T without bias in the weight's dtype, differentiable in x: for small matrices such as `down` (rank, in) -> (rank, out)."""
        weights = self.tensors(layer)
        return self.product(x.to(weights[0].dtype), None, *weights)

    @abstractmethod
    def read(self, layer: nn.Module) -> Tensor:
        """The weight as a dense (out, in) tensor, possibly a view: do not write to it."""

    @abstractmethod
    def write(self, layer: nn.Module, weight: Tensor) -> None:
        """Replaces the weight by a dense (out, in) tensor, rounded once to the layer's dtype, in place."""

    @torch.no_grad()
    def add(self, layer: nn.Module, left: Tensor, right: Tensor, keep: float = 1.0, generator: torch.Generator | None = None) -> None:
        """W <- keep * W + left @ right in place, for left (out, k) and right (k, in) in fp32 or wider.

        A narrower weight is computed in fp32 and rounded once: to nearest, or with a generator stochastically, so that an update below
        half a step of the weight's dtype still acts on average.
        """
        weight = self.live(layer)  # (out, in)
        if weight.dtype == left.dtype:
            weight.addmm_(left, right, beta=keep)
        else:
            weight.copy_(rounded_to(torch.addmm(weight.to(left.dtype), left, right, beta=keep), weight.dtype, generator))

    def live(self, layer: nn.Module) -> Tensor:
        """The weight itself as an (out, in) view that may be written to in place.

        Raises:
            TargetError: the layer holds its weight in a form that has no such view.
        """
        return self.read(layer)


def rounded_to(values: Tensor, dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
    """fp32 values in a narrower dtype: to nearest, or with a generator up or down at random so that the mean is exact (bf16).

    Raises:
        RecipeError: stochastic rounding to another dtype than bf16.
    """
    if generator is None:
        return values.to(dtype)
    if dtype != torch.bfloat16 or values.dtype != torch.float32:
        raise RecipeError(f"rounding='stochastic' serves bf16 weights, and this one is {dtype}; use rounding='nearest'")
    # bf16 is the upper half of fp32: adding 16 random bits below it carries with the probability of the part that is cut off
    bits = values.view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, generator=generator, dtype=torch.int32, device=generator.device).to(bits.device)
    return (bits + noise).bitwise_and_(-(1 << 16)).view(torch.float32).to(dtype)


class StorageChoice(ABC):
    """Abstract: one value of the storage axis. Final subclasses are frozen dataclasses of options.

    A choice that quantizes replaces linear layers before anything is adapted; `hold` makes one of them.
    """

    name: ClassVar[str]
    #: the linear layers of the base are replaced by another form
    quantizes: ClassVar[bool] = False
    #: rounds of taking a start from the weight and quantizing what is left (base='fold')
    iterations: int = 1
    #: names of layers that stay as loaded
    keep: tuple[str, ...] = ()

    @abstractmethod
    def hold(self, layer: nn.Module, weight: Tensor, dtype: torch.dtype) -> nn.Module:
        """A layer in this form.

        Args:
            layer: the base layer, for all but its weight.
            weight: dense (out, in), possibly wider than the layer's own.
            dtype: of the layer's own weight.
        """

    @abstractmethod
    def rounded(self, weight: Tensor) -> Tensor:
        """What a dense weight becomes by being held so, dense again, in its own dtype."""

    @abstractmethod
    def bytes_of(self, numel: int, element: int) -> int:
        """Bytes of a weight of so many elements, `element` bytes each when dense."""


@dataclass(frozen=True)
class Keep(StorageChoice):
    """Storage choice: the base weight stays as the model was loaded (dense, or whatever the vendor's layer holds)."""

    name: ClassVar[str] = "keep"

    def hold(self, layer: nn.Module, weight: Tensor, dtype: torch.dtype) -> nn.Module:
        from rankwise.storage import storage_of

        storage_of(layer).write(layer, weight)
        return layer

    def rounded(self, weight: Tensor) -> Tensor:
        return weight

    def bytes_of(self, numel: int, element: int) -> int:
        return numel * element
