"""Dense storage whose 16-bit weight is multiplied in fp32: for processors on which fp32 products are the faster ones.

    y = round( x W^T + bias ),      dx = round( g W )          x, W, g, y, dx in 16 bits, the products and their sums in fp32

A product of two 16-bit numbers is exact in fp32, and a 16-bit kernel adds up in fp32 too: this is the same function as the layer's own up
to the order of its sums, and it never needs more than a piece of the weight in fp32. Many processors have no instruction for 16-bit
products (then torch's are 5 to 12 times as slow as fp32) or a slow one.
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankwise.kernels.site import Base, as_they_stand
from rankwise.storage.dense import DENSE, Dense
from rankwise.storage.nf4 import NF4Linear
from rankwise.storage.widening import NARROW, widens
from rankwise.storage.workspace import dense

_PIECE = 2**22  # elements of the weight that are wide at once


def _pieces(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(rows, those rows of the weight in fp32), one piece after another in one buffer."""
    step = max(_PIECE // weight.shape[1], 1)
    for start in range(0, weight.shape[0], step):
        part = weight[start : start + step]
        with dense(part, (part.shape[0], part.shape[1]), torch.float32, lambda out, part=part: out.view(part.shape).copy_(part)) as wide:
            yield slice(start, start + step), wide


def _is_wide(x: Tensor, weight: Tensor) -> bool:
    """Whether a site has widened x; under autocast an fp32 x is one that is to be narrowed."""
    return x.dtype == torch.float32 != weight.dtype and not torch.is_autocast_enabled(x.device.type)


class Wide(Dense):
    """nn.Linear's weight in 16 bits, (out, in), multiplied in fp32. An x or g that is wide already gives a wide result."""

    def wider(self, x: Tensor, *weights: Tensor) -> torch.dtype | None:
        return torch.float32 if x.dtype == weights[0].dtype and widens(x) else None

    def product(self, x: Tensor, bias: Tensor | None, *weights: Tensor) -> Tensor:
        (weight,) = weights
        narrow = self.wider(x, weight) is not None
        if not narrow and not _is_wide(x, weight):
            return F.linear(x, weight, bias)
        rows = x.reshape(-1, x.shape[-1]).float()
        y = rows.new_empty(rows.shape[0], weight.shape[0])
        with as_they_stand():
            for part, wide in _pieces(weight):
                torch.mm(rows, wide.T, out=y[:, part])
        if bias is not None:
            y += bias
        return (y.to(x.dtype) if narrow else y).view(*x.shape[:-1], y.shape[-1])

    def product_t(self, g: Tensor, *weights: Tensor) -> Tensor:
        (weight,) = weights
        narrow = self.wider(g, weight) is not None
        if not narrow and not _is_wide(g, weight):
            return g @ weight.to(g.dtype)
        rows = g.reshape(-1, g.shape[-1]).float()
        dx = None
        with as_they_stand():
            for part, wide in _pieces(weight):
                dx = rows[:, part] @ wide if dx is None else dx.addmm_(rows[:, part], wide)
        dx = cast(Tensor, dx)
        return (dx.to(g.dtype) if narrow else dx).view(*g.shape[:-1], dx.shape[-1])


WIDE = Wide()


class WideLinear(nn.Linear):
    """An nn.Linear with a frozen 16-bit weight whose products on a CPU are computed in fp32 and rounded once."""

    def forward(self, input: Tensor) -> Tensor:
        x = input
        frozen = not self.weight.requires_grad and (self.bias is None or not self.bias.requires_grad)
        if not frozen or torch.compiler.is_compiling() or WIDE.wider(x, self.weight) is None:
            return super().forward(x)
        return Base.apply(x, self.bias, WIDE, False, self.weight)


def fp32_products(model: nn.Module) -> nn.Module:
    """From now on the model's frozen linear layers in 16 or 4 bits are multiplied in fp32 on a CPU; returns the model.

    Worth it where `fp32_products_pay()`: there a step in bf16 is faster than with torch's own 16-bit products, and the weights still take
    16 bits. Each result is rounded once: the layers compute the same function up to the order of their sums, so results differ by
    roundings from those of the model as it was. Everything that is promised of an adapter over its base holds for the model as it
    is then. Nothing changes on a GPU, under the compiler, for fewer than 32 rows at a time (decoding) or for a layer that trains.
    `native_products` takes it back.

    Args:
        model: any model, adapted or not.
    """
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.dtype in NARROW:
            module.__class__ = WideLinear
        elif type(module) is NF4Linear:
            module.storage = replace(module.storage, wide=True)
    return model


def native_products(model: nn.Module) -> nn.Module:
    """The layers' own products again; returns the model."""
    for module in model.modules():
        if type(module) is WideLinear:
            module.__class__ = nn.Linear  # pyright: ignore[reportAttributeAccessIssue]
        elif type(module) is NF4Linear:
            module.storage = replace(module.storage, wide=False)
    return model


@cache
def fp32_products_pay(dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether this CPU multiplies in fp32 at least a fifth faster than in a 16-bit dtype: some products are timed, once a process.

    What counts is the processor's own time on one thread, so that other work on the machine does not decide.
    """
    x, weight = torch.ones(256, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
    best, threads = [float("inf"), float("inf")], torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(8):
            for place, storage in enumerate((DENSE, WIDE)):
                begin = time.thread_time()
                storage.product(x, None, weight)
                best[place] = min(best[place], time.thread_time() - begin)
    finally:
        torch.set_num_threads(threads)
    return best[1] * 1.2 < best[0]
