"""The products of one site, fused: autograd functions that keep the least and make the rest again.

    whole     x -> W x + bias + effective_up (down drop(x)), the start subtracted: the usual site, in one function
    project   x -> W x + bias,  h = down drop(x),  and for a start  (down - down0) drop(x)
    combine   adds effective_up h
    base      x -> W x + bias
    rescale   y -> gain * (y - bias) + bias, in fp32

with  effective_up = scaling * diag(tail) up core.  `project` and `combine` stand apart where something happens to h between them: a token
core, a route, a projection that several sites share.

Kept for the backward: x if `down` trains (or what x can be remade from, `remade.py`), h if anything behind it trains, the pre-gain output
if the gain trains; parameters by reference; no dropout mask (it is drawn again from a seed, or its few positions are kept) and no product
of factors (made again, rank-sized work). Where `up` is frozen and only what scales its rows trains, at a rank at which a third product
over the tokens costs more than memory does, up h is kept too.

A storage may multiply in a wider dtype than x has: then x and the gradient are widened once for all products of the site, and y and dx
rounded once.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rankwise.kernels.dropout import Dropped
from rankwise.kernels.gain import gain_gradient, times_gain
from rankwise.kernels.remade import Source

if TYPE_CHECKING:
    from rankwise.storage import Storage

_KEEPS_PRODUCT_FROM = 64  # the rank from which up h is kept where it spares a product


def as_rows(x: Tensor) -> Tensor:
    """x (..., width) as a matrix (rows, width)."""
    return x.reshape(-1, x.shape[-1])


def effective_up(up: Tensor, core: Tensor | None, tail: Tensor | None, scaling: float) -> Tensor:
    """scaling * diag(tail) @ up @ core, (out, rank)."""
    if core is not None:
        up = up * core if core.dim() == 1 else up @ core
    if tail is not None:
        up = tail[:, None] * up
    return up if scaling == 1.0 else up * scaling


class Right(NamedTuple):
    """What reads x."""

    down: Tensor  # (rank, in)
    start: Tensor | None = None  # (rank, in), the frozen `down` that is subtracted


class Left(NamedTuple):
    """What writes y. `start` is the frozen `up` that is subtracted, (out, rank), scaled like the update."""

    up: Tensor  # (out, rank)
    core: Tensor | None = None  # (rank,) or (rank, rank)
    tail: Tensor | None = None  # (out,)
    start: Tensor | None = None
    scaling: float = 1.0

    def pair(self) -> tuple[Tensor, Tensor | None]:
        """What h and `moved` are multiplied by, (out, rank) each, over `scaling`:  diag(tail) up core - up0  and  up0."""
        effective = effective_up(self.up, self.core, self.tail, 1.0)
        return effective if self.start is None else effective - self.start, self.start


class Needs(NamedTuple):
    """Which of them has a gradient."""

    up: bool
    core: bool
    tail: bool


class Frozen(NamedTuple):
    """What a site reads and has no gradient of."""

    storage: "Storage"
    weights: tuple[Tensor, ...]
    bias: Tensor | None  # (out,)
    start_down: Tensor | None
    start_up: Tensor | None
    scaling: float
    mask: Dropped | None  # what falls out of x
    source: Source | None  # what x can be remade from


_NOTHING = nullcontext()


def as_they_stand(wide: bool = True) -> AbstractContextManager[object]:
    """Within the block products on a CPU are taken of the numbers as they stand, under autocast too."""
    return torch.autocast("cpu", enabled=False) if wide and torch.is_autocast_enabled("cpu") else _NOTHING


def _backward(method: Callable[..., Any]) -> Callable[..., Any]:
    """A backward that is no function of its own, and computes as its forward did wherever it is called."""

    def run(ctx: Any, *grads: Any) -> Any:
        with as_they_stand():
            return method(ctx, *grads)

    return once_differentiable(run)


def _widened(x: Tensor, wide: torch.dtype | None) -> Tensor:
    return x if wide is None or x.dtype == wide else x.to(wide)


def _projected(rows: Tensor, right: Right) -> tuple[Tensor, Tensor | None]:
    """h and `moved`, (tokens, rank), of rows (tokens, in)."""
    h = rows @ right.down.to(rows.dtype).T
    return h, None if right.start is None else rows @ (right.down - right.start).to(rows.dtype).T


def _with_projected(dx: Tensor | None, gh: Tensor, gm: Tensor | None, right: Right, mask: Dropped | None) -> Tensor:
    """dx + drop(gh down + gm (down - down0)), (tokens, in), into dx where there is one."""
    # gh down + gm (down - down0) = (gh + gm) down - gm down0
    branch = _add_product(dx if mask is None else None, gh if gm is None else gh + gm, right.down, 1.0)
    if gm is not None and right.start is not None:
        branch = _add_product(branch, gm, right.start, -1.0)
    if mask is None:
        return branch
    branch = mask.of(branch)
    return branch if dx is None else dx.add_(branch)


def _add_product(target: Tensor | None, left: Tensor, right: Tensor, factor: float) -> Tensor:
    right = right.to(left.dtype)
    if target is None:
        return left @ right if factor == 1.0 else (left @ right).mul_(factor)
    return target.addmm_(left, right, alpha=factor)


def keeps_product(rank: int, up: bool, tail: bool) -> bool:
    """Whether a site without a start keeps up h, (tokens, out), given whether `up` and `tail` train."""
    return tail and not up and rank >= _KEEPS_PRODUCT_FROM


def _keeps_product(left: Left, needs: Needs) -> bool:
    apart = left.start is None and (left.core is None or left.core.dim() == 1)
    return apart and keeps_product(left.up.shape[1], needs.up, needs.tail)


def _add_update(flat: Tensor, h: Tensor, moved: Tensor | None, left: Left, keep: bool) -> Tensor | None:
    """flat (tokens, out) += the update of h, in place; up core h, (tokens, out), if it is to be kept."""
    if keep and left.tail is not None:
        product = (h if left.core is None else (h * left.core).to(h.dtype)) @ left.up.to(h.dtype).T
        flat.addcmul_(product, (left.tail * left.scaling).to(flat.dtype))
        return product
    effective, start = left.pair()
    if start is not None and moved is not None:
        flat.addmm_(moved, start.to(flat.dtype).T, alpha=left.scaling)
    flat.addmm_(h, effective.to(flat.dtype).T, alpha=left.scaling)
    return None


def _times(made: Tensor, scaling: float) -> Tensor:
    return made if scaling == 1.0 else made.mul_(scaling)


class _Slopes(NamedTuple):
    h: Tensor | None = None
    moved: Tensor | None = None
    up: Tensor | None = None
    core: Tensor | None = None
    tail: Tensor | None = None


def _update_slopes(g: Tensor, h: Tensor | None, kept: Tensor | None, left: Left, needs: Needs, behind: bool, moved: bool) -> _Slopes:
    """The gradients of what `_add_update` reads, for g (tokens, out); h is None where nothing needs it.

    Args:
        kept: what `_add_update` kept.
        behind: whether h itself has a gradient.
        moved: whether `moved` has one.
    """
    masters = torch.promote_types(left.up.dtype, torch.float32)
    apart = not needs.up and left.core is not None and left.start is None and (kept is not None or not needs.tail)
    gh = gm = d_up = d_core = d_tail = None
    if apart and left.core is not None and needs.core and h is not None:
        # `up` is frozen: the core's gradient is rank-sized work on what reaches it
        reached = g @ effective_up(left.up, None, left.tail, left.scaling).to(g.dtype)  # (tokens, rank)
        if left.core.dim() == 1:
            d_core = gain_gradient(h, reached, left.core)
            gh = (reached * left.core).to(g.dtype) if behind else None
        else:
            d_core = (reached.T @ h.to(g.dtype)).to(left.core.dtype)
            gh = reached @ left.core.to(g.dtype) if behind else None
    elif behind:
        effective, start = left.pair()
        gh = _times(g @ effective.to(g.dtype), left.scaling)  # (tokens, rank)
        gm = _times(g @ start.to(g.dtype), left.scaling) if moved and start is not None else None
    if kept is not None and left.tail is not None:
        d_tail = gain_gradient(kept, g, left.tail).mul_(left.scaling)
    if h is not None and (needs.up or (needs.tail and kept is None) or (needs.core and not apart)):
        # one product over the tokens serves up, core and tail: the gradient of effective_up, over `scaling`
        k = (g.T @ h.to(g.dtype)).to(masters) * left.scaling  # (out, rank)
        rowed = k if left.tail is None else k * left.tail[:, None]
        core = left.core
        if needs.up:
            d_up = (rowed if core is None else rowed * core if core.dim() == 1 else rowed @ core.T).to(left.up.dtype)
        if core is not None and needs.core and d_core is None:
            d_core = (left.up * rowed).sum(0) if core.dim() == 1 else left.up.T.to(rowed.dtype) @ rowed
        if left.tail is not None and needs.tail and d_tail is None:
            d_tail = (k * effective_up(left.up, core, None, 1.0)).sum(1)
    return _Slopes(gh, gm, d_up, d_core, d_tail)


def _own(y: Tensor, dtype: torch.dtype | None) -> Tensor:
    """y rounded, and no view made in here: the caller may write to it."""
    y = y if dtype is None else y.to(dtype)
    return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y


class _Rows:
    """How the rows that `down` reads come about again in the backward. On it only numbers stay: the tensors are saved by the context."""

    def __init__(self, x: Tensor, mask: Dropped | None, source: Source | None) -> None:
        self.drawn = None if mask is None else (mask.numel, mask.p, mask.seed, mask.device)
        self.memo = None if source is None else source.memo
        self.shape, self.dtype = x.shape, x.dtype

    @staticmethod
    def kept(x: Tensor, mask: Dropped | None, source: Source | None, trained: bool) -> tuple[Tensor | None, ...]:
        """What to save: x, the positions that fell out (where x is not kept they are drawn again), what x is remade from."""
        fallen = mask.fallen if mask is not None and trained else None
        return x if trained and source is None else None, fallen, *(() if source is None else source.tensors)

    def mask(self, fallen: Tensor | None) -> Dropped | None:
        return None if self.drawn is None else Dropped(*self.drawn, fallen=fallen)

    def again(self, dtype: torch.dtype, mask: Dropped | None, x: Tensor | None, tensors: list[Tensor]) -> Tensor:
        """drop(x), (tokens, in)."""
        made = x if self.memo is None else self.memo.get(*tensors)
        assert made is not None
        rows = as_rows(made).to(dtype)
        return rows if mask is None else mask.of(rows)


class Whole(torch.autograd.Function):
    """y (..., out) of a site whose core is constant."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        down: Tensor,
        up: Tensor,
        core: Tensor | None,
        tail: Tensor | None,
        frozen: Frozen,
    ) -> Tensor:
        storage, weights, bias, start_down, start_up, scaling, mask, source = frozen
        _, trained, *needs, _ = ctx.needs_input_grad
        ctx.needs, left, ctx.wide = Needs(*needs), Left(up, core, tail, start_up, scaling), storage.wider(x, *weights)
        with as_they_stand(ctx.wide is not None):
            wide = _widened(x, ctx.wide)
            y = storage.product(wide, bias, *weights)
            rows = as_rows(wide).to(y.dtype)  # (tokens, in); a cast only under autocast, where x itself is what stays
            rows = rows if mask is None else mask.of(rows)
            h, moved = _projected(rows, Right(down, start_down))
            product = _add_update(y.view(-1, y.shape[-1]), h, moved, left, _keeps_product(left, ctx.needs))
        ctx.storage, ctx.scaling, ctx.weights = storage, scaling, len(weights)
        ctx.rows = _Rows(x, mask, source)
        again = _Rows.kept(x, mask, source, trained)
        ctx.save_for_backward(h if any(needs) else None, product, down, up, core, tail, start_down, start_up, *weights, *again)
        return _own(y, None if ctx.wide is None else x.dtype)

    @staticmethod
    @_backward
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        h, product, down, up, core, tail, start_down, start_up, *saved = ctx.saved_tensors
        weights, (x, fallen, *tensors) = saved[: ctx.weights], saved[ctx.weights :]
        needs_x, trained, *_ = ctx.needs_input_grad
        gy = _widened(grads[0], ctx.wide)
        g = as_rows(gy)  # (tokens, out)
        left, right = Left(up, core, tail, start_up, ctx.scaling), Right(down, start_down)
        slopes = _update_slopes(g, h, product, left, ctx.needs, needs_x or trained, start_down is not None)
        mask, dx, d_down = ctx.rows.mask(fallen), None, None
        if trained and slopes.h is not None:
            total = slopes.h if slopes.moved is None else slopes.h + slopes.moved  # both are products with `down`
            d_down = (total.T @ ctx.rows.again(g.dtype, mask, x, tensors)).to(down.dtype)  # (rank, in)
        if needs_x and slopes.h is not None:
            dx = as_rows(ctx.storage.product_t(gy, *weights))  # (tokens, in)
            dx = _with_projected(dx, slopes.h, slopes.moved, right, mask)
            dx = dx.to(ctx.rows.dtype).view(ctx.rows.shape)
        return dx, d_down, slopes.up, slopes.core, slopes.tail, None


class Project(torch.autograd.Function):
    """x (..., in) -> W x + bias (..., out), h, and `moved` or None, (tokens, rank) each; all of them as the storage multiplies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, frozen: Frozen) -> tuple[Tensor, Tensor, Tensor | None]:
        storage, weights, bias, start_down, _, _, mask, source = frozen
        kind = storage.wider(x, *weights)
        with as_they_stand(kind is not None):
            wide = _widened(x, kind)
            y = storage.product(wide, bias, *weights)
            rows = as_rows(wide).to(y.dtype)
            h, moved = _projected(rows if mask is None else mask.of(rows), Right(down, start_down))
        ctx.storage, ctx.weights, ctx.rows = storage, len(weights), _Rows(x, mask, source)
        ctx.save_for_backward(down, start_down, *weights, *_Rows.kept(x, mask, source, ctx.needs_input_grad[1]))
        ctx.set_materialize_grads(False)
        return _own(y, None), h, moved  # `combine` writes into y

    @staticmethod
    @_backward
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gy, gh, gm = grads
        down, start_down, *saved = ctx.saved_tensors
        weights, (x, fallen, *tensors) = saved[: ctx.weights], saved[ctx.weights :]
        dx = d_down = None
        if gm is not None and gh is None:
            gh = torch.zeros_like(gm)
        mask = ctx.rows.mask(fallen)
        if ctx.needs_input_grad[1] and gh is not None:
            total = gh if gm is None else gh + gm
            d_down = (total.T @ ctx.rows.again(total.dtype, mask, x, tensors)).to(down.dtype)
        if ctx.needs_input_grad[0]:
            dx = None if gy is None else as_rows(ctx.storage.product_t(gy, *weights))
            dx = dx if gh is None else _with_projected(dx, gh, gm, Right(down, start_down), mask)
            dx = None if dx is None else dx.to(ctx.rows.dtype).view(ctx.rows.shape)
        return dx, d_down, None


class Combine(torch.autograd.Function):
    """y (..., out) + effective_up h, and with a start  y + (effective_up - s up0) h + s up0 moved;  in place, or rounded to `dtype`."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        h: Tensor,
        moved: Tensor | None,
        up: Tensor,
        core: Tensor | None,
        tail: Tensor | None,
        start_up: Tensor | None,
        scaling: float,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.needs, ctx.scaling, ctx.moved, ctx.wide = Needs(*ctx.needs_input_grad[3:6]), scaling, moved is not None, y.dtype
        left = Left(up, core, tail, start_up, scaling)
        product = _add_update(y.view(-1, y.shape[-1]), h, moved, left, _keeps_product(left, ctx.needs))
        ctx.save_for_backward(h if any(ctx.needs) else None, product, up, core, tail, start_up)
        if y.dtype != dtype:
            return y.to(dtype)
        ctx.mark_dirty(y)
        return y

    @staticmethod
    @_backward
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        h, product, up, core, tail, start_up = ctx.saved_tensors
        gy = _widened(grads[0], ctx.wide)
        left = Left(up, core, tail, start_up, ctx.scaling)
        needs_h, needs_moved = ctx.needs_input_grad[1:3]
        slopes = _update_slopes(as_rows(gy), h, product, left, ctx.needs, needs_h, ctx.moved and needs_moved)
        return gy, *slopes, None, None, None


class Base(torch.autograd.Function):
    """y = x W^T + bias over a frozen base, saving nothing but references to W; `wide`: as the storage multiplies, not rounded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, storage: "Storage", wide: bool, *weights: Tensor) -> Tensor:
        kind = storage.wider(x, *weights)
        with as_they_stand(kind is not None):
            y = storage.product(_widened(x, kind) if wide else x, bias, *weights)
        ctx.storage, ctx.dtype = storage, x.dtype
        ctx.save_for_backward(*weights)
        return _own(y, None)

    @staticmethod
    @_backward
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        dx = ctx.storage.product_t(grads[0], *ctx.saved_tensors).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        return (dx, *([None] * (len(ctx.needs_input_grad) - 1)))


class Rescale(torch.autograd.Function):
    """y0 -> gain * (y0 - bias) + bias, in fp32: bit-exact at gain 1. y0 is the biased output, (..., out)."""

    @staticmethod
    def forward(ctx: Any, y0: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(y0 if ctx.needs_input_grad[1] else None, gain, bias)
        return _own(times_gain(as_rows(y0), gain, bias).view(y0.shape), None)

    @staticmethod
    @_backward
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        y0, gain, bias = ctx.saved_tensors
        gy = as_rows(grads[0])
        d_y0 = times_gain(gy, gain).view(grads[0].shape) if ctx.needs_input_grad[0] else None
        return d_y0, None if y0 is None else gain_gradient(as_rows(y0), gy, gain, bias), None
