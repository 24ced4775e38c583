"""Root mean square norms with a frozen weight that keep their input and one number a token (Zhang and Sennrich, arXiv 1910.07467).

    y = weight * x / sqrt(mean(x^2) + eps)

Two roundings are in use: Llama's rounds the normalized input to the input's dtype before the weight; Gemma's multiplies by (1 + weight) in
fp32 and rounds once. Forward values are those of the layers themselves, bit for bit. Plain autograd keeps the input again in fp32 (6
bytes an element in bf16 with the output; here 2).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rankwise.kernels.remade import Memo, offer


def normed(x: Tensor, weight: Tensor, eps: float, one_plus: bool) -> Tensor:
    """y (..., width) for x (..., width) and weight (width,); `one_plus` is Gemma's form."""
    y, rstd = _Norm.apply(x, weight, eps, one_plus)
    return offer(y, Memo(_remade_gemma if one_plus else _remade_llama), x, rstd, weight)


def reference_normed(x: Tensor, weight: Tensor, eps: float, one_plus: bool) -> Tensor:
    """The same in plain autograd."""
    wide = x.float()
    return (_gemma if one_plus else _llama)(x, torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps), weight)


def _llama(x: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    return weight * (x.float() * rstd).to(x.dtype)


def _gemma(x: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    return ((x.float() * rstd) * (1.0 + weight.float())).type_as(x)


def _remade_llama(memo: Memo, *tensors: Tensor) -> Tensor:
    return _llama(*tensors)


def _remade_gemma(memo: Memo, *tensors: Tensor) -> Tensor:
    return _gemma(*tensors)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, one_plus: bool) -> tuple[Tensor, Tensor]:
        rstd = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)  # (..., 1) fp32
        ctx.save_for_backward(x, rstd, weight)
        ctx.one_plus = one_plus
        ctx.mark_non_differentiable(rstd)
        return (_gemma if one_plus else _llama)(x, rstd, weight), rstd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, rstd, weight = ctx.saved_tensors
        # dx = rstd * (g - xhat * mean(g * xhat))  for  g = dy * weight  and  xhat = x * rstd
        scale = 1.0 + weight.float() if ctx.one_plus else weight.float()
        g = (grads[0] * scale).float()  # as the layers, which compute in fp32 whatever they are given
        xhat = x.float() * rstd
        along = torch.linalg.vecdot(g, xhat).unsqueeze(-1) * (-1.0 / x.shape[-1])
        return g.addcmul_(xhat, along).mul_(rstd).to(x.dtype), None, None, None
