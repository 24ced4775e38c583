"""Taps behind base layers: they see input, output and the output's gradient, and add products of them up, without touching a weight."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rankwise.storage import storage_of


class Sum:
    """One matrix being summed over tokens, and what goes with it.

    left: (out, k), `right`: (in, k): thin matrices that g or x is multiplied by first, so that only thin products are ever formed.
    """

    def __init__(self, left: Tensor | None = None, right: Tensor | None = None) -> None:
        self.left, self.right = left, right
        self.matrix: Tensor | None = None
        self.tokens = 0
        self.energy = 0.0  # sum of squared inputs
        self.total: Tensor | None = None  # sum of inputs, (in,)

    def add(self, g: Tensor, x: Tensor, weight: float = 1.0) -> None:
        """Adds weight * g^T x for rows g (tokens, out), x (tokens, in): in fp32, fp64 for fp64."""
        wide = torch.promote_types(x.dtype, torch.float32)
        x, g = x.to(wide), g.to(wide)
        x = x if self.right is None else x @ self.right.to(x)
        g = g if self.left is None else g @ self.left.to(g)
        if self.matrix is None:
            self.matrix = torch.zeros(g.shape[1], x.shape[1], dtype=wide, device=x.device)
        self.matrix.addmm_(g.T, x, alpha=weight)


class Facts:
    """What taps must know of the batch at hand."""

    def __init__(self, batch: Mapping[str, Any], weight: float = 1.0, labelled: bool = False) -> None:
        mask, labels = batch.get("attention_mask"), batch.get("labels")
        self.mask = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None  # (batch, length)
        if labelled and isinstance(labels, Tensor) and labels.dim() == 2 and not labels.is_floating_point():
            if self.mask is None:
                self.mask = labels != -100
            elif self.mask.shape == labels.shape:
                self.mask = self.mask & (labels != -100)
        self.weight = weight

    def keep(self, x: Tensor) -> Tensor | None:
        """Which tokens of x (..., in) are no padding, (tokens,); None for all, or where x is not laid out as the mask is."""
        if self.mask is None:
            return None
        flat = x.dim() == 2 and x.shape[0] == self.mask.numel() and self.mask.shape[1] > 1
        return self.mask.flatten().to(x.device) if flat or x.shape[:-1] == self.mask.shape else None


class _Tap(torch.autograd.Function):
    """The identity on a site's output, whose backward adds g^T x. `anchor` makes the graph begin here, below nothing that trains."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, anchor: Tensor, into: Sum, facts: Facts) -> Tensor:
        ctx.save_for_backward(x)
        ctx.into, ctx.facts = into, facts
        # no view, in autograd's eyes: what follows may write into it
        return torch.ops.aten._unsafe_view(y, y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (g,) = grads
        (x,) = ctx.saved_tensors
        keep = ctx.facts.keep(x)
        # padding may well carry a gradient (a mean over all positions), so it is counted out but not left out
        ctx.into.tokens += x.numel() // x.shape[-1] if keep is None else int(keep.sum())
        ctx.into.add(g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1]), ctx.facts.weight)
        return g, None, None, None, None


def gradient_tap(into: Sum, facts: "list[Facts]", anchor: Tensor) -> Any:
    """A forward hook that sums g^T x. `facts` holds one item, of the batch at hand."""

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        return _Tap.apply(output, first_input(args, kwargs).detach(), anchor, into, facts[0])  # type: ignore[return-value]

    return hook


def input_tap(into: Sum, facts: "list[Facts]", direct: bool, by_sample: bool) -> Any:
    """A forward hook that sums x^T x over tokens that are no padding; with `direct` the product W x x^T, from the bias-free output.

    by_sample: each row of the batch is divided by the size of its largest value first (the largest, not the largest in size).
    """

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        x = first_input(args, kwargs)
        keep = facts[0].keep(x)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if by_sample:
            seen = x if keep is None else x.masked_fill(~keep.view(x.shape[:-1])[..., None], -torch.inf)
            x = x / seen.flatten(1).amax(1).abs().view(-1, *[1] * (x.dim() - 1))
        x = x.reshape(-1, x.shape[-1])
        left = x
        if direct:
            bias = storage_of(module).bias(module)
            left = output.to(x.dtype).reshape(-1, output.shape[-1])
            left = left if bias is None else left - bias.to(left.dtype)
        if keep is not None:
            x, left = x[keep], left[keep]
        into.tokens += x.shape[0]
        into.energy += float(x.square().sum())
        into.total = x.sum(0) if into.total is None else into.total + x.sum(0)
        into.add(left, x)

    return hook


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """What a layer was called with."""
    return args[0] if args else next(iter(kwargs.values()))
