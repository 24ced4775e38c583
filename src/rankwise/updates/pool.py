"""Frozen tensors that all sites of a model share: drawn from a seed, so that a file need not hold them, or taken from a file."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class SharedPool(nn.Module, ABC):
    """Abstract: the shared tensors as buffers, not parameters: never trained, decayed or saved with the model's state.

    What `UpdateChoice.shared` returns. A subclass sets what `draw` needs, then calls `fill`.
    """

    drawn = True  # from the seed, so that a file need not hold the projections

    @abstractmethod
    def draw(self) -> dict[str, Tensor]:
        """Buffer name -> tensor in fp32 on the CPU, from the seed alone."""

    def fill(self, device: torch.device, dtype: torch.dtype) -> None:
        """Registers what `draw` gives."""
        for name, tensor in self.draw().items():
            self.register_buffer(name, tensor.to(device, dtype), persistent=False)

    @torch.no_grad()
    def take(self, **projections: Tensor) -> None:
        """Replaces drawn projections by given ones, by buffer name: an adapter whose file brings its own."""
        for name, projection in projections.items():
            buffer = getattr(self, name)
            given = projection.to(buffer)
            if not torch.equal(buffer, given):
                buffer.copy_(given)
                self.drawn = False

    def projections(self) -> dict[str, Tensor]:
        """Buffer name -> projection on the CPU, in fp32 whatever the base's dtype; drawn again from the seed where it came from there."""
        return self.draw() if self.drawn else {name: buffer.float().cpu() for name, buffer in self.named_buffers()}
