"""Inputs that a site remakes in its backward instead of keeping them.

A norm or a gated activation is cheap to compute again from tensors that its own backward keeps anyway. Whoever makes such a tensor calls
`offer`; whoever would save it takes its `source_of`, saves the source's tensors (by reference: they are alive in any case) and asks the
`Memo` for the tensor in its backward. Several takers of one tensor (q, k, v) remake it once between them.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_ATTRIBUTE = "_rankwise_source"


class Memo:
    """Remakes one tensor for all its takers and lets go of it after the last one. Holds no tensor of the forward.

    `remake` is called with the memo itself and the source's tensors.
    """

    def __init__(self, remake: Callable[..., Tensor]) -> None:
        self.remake = remake
        self.takers = 0
        self.left = 0
        self.made: Tensor | None = None
        self.aside: Tensor | None = None  # made on the way, for the backward of whoever offered the tensor

    def get(self, *tensors: Tensor) -> Tensor:
        """The tensor, from its source's tensors, once for each taker."""
        if self.made is None:
            self.made, self.left = self.remake(self, *tensors), self.takers
        made, self.left = self.made, self.left - 1
        if self.left <= 0:
            self.made = None
        return made


class Source(NamedTuple):
    """How a tensor can be remade, as long as nobody has written to it."""

    memo: Memo
    tensors: tuple[Tensor, ...]
    version: int


def offer(made: Tensor, memo: Memo, *tensors: Tensor) -> Tensor:
    """Marks `made` as equal, bit for bit, to memo.remake(memo, *tensors), whose tensors live as long as the graph; returns it."""
    setattr(made, _ATTRIBUTE, Source(memo, tuple(tensor.detach() for tensor in tensors), made._version))
    return made


def source_of(x: Tensor) -> Source | None:
    """The source of a tensor that somebody will save; counts one more taker. None where there is none or it has been written to."""
    source: Source | None = getattr(x, _ATTRIBUTE, None)
    if source is None or not torch.is_grad_enabled() or x._version != source.version:
        return None
    source.memo.takers += 1
    return source
