"""The product of a gated MLP, act(gate) * up (Shazeer, arXiv 2002.05202), keeping gate and up alone.

Plain autograd keeps act(gate) too, and a site behind it keeps the product: 8 bytes an element in bf16; here 4. Values and gradients are
those of plain autograd, bit for bit.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rankwise.kernels.remade import Memo, offer

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) * up, (..., width); activation is one of `ACTIVATIONS`."""
    memo = Memo(_REMAKES[activation])
    return offer(_Gated.apply(gate, up, activation, memo), memo, gate, up)


def reference_gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """The same in plain autograd."""
    return _act(gate, activation) * up


def _act(gate: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return F.silu(gate)
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")


def _remake(activation: str) -> Callable[[Memo, Tensor, Tensor], Tensor]:
    def product(memo: Memo, gate: Tensor, up: Tensor) -> Tensor:
        memo.aside = _act(gate, activation)  # `_Gated` comes next and needs it too
        return memo.aside * up

    return product


_REMAKES = {activation: _remake(activation) for activation in ACTIVATIONS}


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str, memo: Memo) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation, ctx.memo = activation, memo
        return reference_gated(gate, up, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gate, up = ctx.saved_tensors
        (dy,) = grads
        d_gate = d_up = None
        act, ctx.memo.aside = ctx.memo.aside, None
        if ctx.needs_input_grad[1]:
            d_up = dy * (_act(gate, ctx.activation) if act is None else act)
        if ctx.needs_input_grad[0]:
            slope = dy * up
            if ctx.activation == "silu":
                d_gate = torch.ops.aten.silu_backward(slope, gate)
            else:
                d_gate = torch.ops.aten.gelu_backward(slope, gate, approximate="tanh" if ctx.activation == "gelu_tanh" else "none")
        return d_gate, d_up, None, None
