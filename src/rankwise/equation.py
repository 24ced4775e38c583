"""The one equation of the project, and the one operation that computes it.

    y = gain * ( W x  +  scaling * tail * ( up @ (core . (down @ dropout(x))) )  -  scaling * up0 @ (down0 @ dropout(x)) )  +  bias
        +  scaling * shift

A method only says what its factors are; forward, backward, merge and export follow from them here, once, for all methods.

The operation has a plain form (`reference_form`, ordinary autograd, any base layer) and a fused form made of three small autograd
functions:

    project   x -> base output (tokens, out), h = down x (tokens, rank), and for a start (down - down0) x
    combine   adds up . core . h to the base output in place
    rescale   applies the gain in fp32

Saved for the backward: x if `down` trains (or what x can be remade from, `kernels/remade.py`), h if anything behind it trains, the
pre-gain output if the gain trains; parameters by reference;
no dropout mask (it is drawn again from a seed) and no product of factors (made again, rank-sized work). A token core runs under plain
autograd between `project` and `combine`, as does a route: a number for each sample that multiplies the whole update, its start too.
`form_of` is the fixed rule that picks the form.

A start is computed as  (up - up0) (down x) + up0 ((down - down0) x),  which equals  up down x - up0 down0 x  and is exactly zero, in every
dtype, while the factors stand where they started.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rankwise.errors import RecipeError
from rankwise.kernels.dropout import Dropped, draw_seed, drop, dropped
from rankwise.kernels.gain import gain_gradient, reference_times_gain, times_gain
from rankwise.kernels.remade import Source, source_of
from rankwise.storage import Storage

if TYPE_CHECKING:
    from rankwise.sharing import SharedMember

TokenCore = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Factors:
    """The factors of one update at one site. Their product is  scaling * diag(tail) @ up @ core @ down,  (out, in)."""

    down: Tensor  # (rank, in)
    up: Tensor  # (out, rank)
    core: Tensor | None = None  # (rank,) diagonal, or (rank, rank)
    tail: Tensor | None = None  # (out,)
    scaling: float = 1.0
    shift: Tensor | None = None  # (out,), scaled and added to the output, outside of any gain

    def effective_up(self) -> Tensor:
        """scaling * diag(tail) @ up @ core, (out, rank): what stands left of `down`."""
        return _effective_up(self.up, self.core, self.tail, self.scaling)

    def delta(self) -> Tensor:
        """The dense update (out, in), in the dtype of the trained factors (a shared pool may be narrower)."""
        up = self.effective_up()
        return up @ self.down.to(up.dtype)


class Start(NamedTuple):
    """A frozen pair that is subtracted, because the method began away from zero. Scaled like the update it belongs to."""

    down: Tensor  # (rank, in), called down0 in the equation
    up: Tensor  # (out, rank), called up0; any core and tail of the start are already multiplied in


def _effective_up(up: Tensor, core: Tensor | None, tail: Tensor | None, scaling: float) -> Tensor:
    if core is not None:
        up = up * core if core.dim() == 1 else up @ core
    if tail is not None:
        up = tail[:, None] * up
    return up if scaling == 1.0 else up * scaling


def dense_update(factors: Factors | None, start: Start | None) -> Tensor | None:
    """The dense update minus its start, (out, in), in the factors' dtype; None for a site that has no factors."""
    if factors is None:
        return None
    if start is None:
        return factors.delta()
    moved = factors.effective_up() - factors.scaling * start.up
    return moved @ factors.down + factors.scaling * start.up @ (factors.down - start.down)


def shifted(weight: Tensor, pair: Start, scaling: float, sign: float) -> Tensor:
    """W + sign * scaling * up @ down, dense (out, in), in fp32 (fp64 for an fp64 weight); the weight is not touched."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return wide + sign * scaling * (pair.up.to(wide.dtype) @ pair.down.to(wide.dtype))


def stacked(factors: Factors, start: Start | None) -> tuple[Tensor, Tensor]:
    """(down, up) of shapes (k, in), (out, k) whose product is the whole update, start subtracted; k is rank or 2 rank."""
    up = factors.effective_up()
    if start is None:
        return factors.down, up
    start_up = factors.scaling * start.up
    return torch.cat([factors.down, factors.down - start.down]), torch.cat([up - start_up, start_up], dim=1)


# --- the fused form --------------------------------------------------------------------------------------------------------------------


def as_rows(x: Tensor) -> Tensor:
    """x (..., width) as a matrix (rows, width)."""
    return x.reshape(-1, x.shape[-1])


class _Project(torch.autograd.Function):
    """x (..., in) -> y = x W^T + bias (..., out), h = drop(x) down^T (tokens, rank), moved = drop(x) (down - down0)^T or None."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        down: Tensor,
        start_down: Tensor | None,
        bias: Tensor | None,
        storage: Storage,
        mask: Dropped | None,
        source: Source | None,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        y = storage.product(x, bias, *weights)
        rows = as_rows(x).to(y.dtype)  # (tokens, in); a cast only under autocast, where x itself is what stays
        if mask is not None:
            rows = mask.of(rows)
        h = rows @ down.to(y.dtype).T  # (tokens, rank)
        moved = None if start_down is None else rows @ (down - start_down).to(y.dtype).T
        ctx.storage, ctx.weights = storage, len(weights)
        # of mask and source only numbers stay on ctx: their tensors are saved, so that checkpointing can let go of them
        ctx.drawn, fallen = (None, None) if mask is None else ((mask.numel, mask.p, mask.seed, mask.device), mask.fallen)
        ctx.memo, kept = (None, ()) if source is None else (source.memo, source.tensors)
        fallen = fallen if ctx.needs_input_grad[1] else None  # where x itself is not kept, the mask is drawn again
        ctx.save_for_backward(x if ctx.needs_input_grad[1] and source is None else None, down, start_down, fallen, *weights, *kept)
        ctx.shape, ctx.dtype = x.shape, x.dtype
        ctx.set_materialize_grads(False)
        # `combine` writes into y: it must not count as a view made in here
        return torch.ops.aten._unsafe_view(y, y.shape), h, moved

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gy, gh, gm = grads
        x, down, start_down, fallen, *saved = ctx.saved_tensors
        weights, kept = saved[: ctx.weights], saved[ctx.weights :]
        dx = d_down = None
        # gradient of h plus that of `moved`: both are products with `down`
        total = gh if gm is None else gm if gh is None else gh + gm
        mask = None if ctx.drawn is None else Dropped(*ctx.drawn, fallen=fallen)
        if ctx.needs_input_grad[1] and total is not None:
            rows = as_rows(x if ctx.memo is None else ctx.memo.get(*kept)).to(total.dtype)
            rows = rows if mask is None else mask.of(rows)
            d_down = (total.T @ rows).to(down.dtype)  # (rank, in)
        if ctx.needs_input_grad[0]:
            if gy is not None:
                dx = ctx.storage.product_t(gy, *weights)
                dx = dx.reshape(-1, dx.shape[-1])  # (tokens, in)
            branch = None if mask is not None or dx is None else dx  # where the branch's share is added, in place
            if total is not None:
                # gh down + gm (down - down0) = (gh + gm) down - gm down0
                branch = _add_product(branch, total, down, 1.0)
                if gm is not None:
                    branch = _add_product(branch, gm, start_down, -1.0)
                if mask is not None:
                    branch = mask.of(branch)
                    dx = branch if dx is None else dx.add_(branch)
                else:
                    dx = branch
            if dx is not None:
                dx = dx.view(ctx.shape).to(ctx.dtype)
        return (dx, d_down, *([None] * (len(ctx.needs_input_grad) - 2)))


def _add_product(target: Tensor | None, left: Tensor, right: Tensor, factor: float) -> Tensor:
    right = right.to(left.dtype)
    if target is None:
        return left @ right if factor == 1.0 else (left @ right).mul_(factor)
    return target.addmm_(left, right, alpha=factor)


class _Combine(torch.autograd.Function):
    """y += h effective_up^T, in place; with a start  y += h (effective_up - s up0)^T + moved (s up0)^T."""

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
    ) -> Tensor:
        effective = _effective_up(up, core, tail, scaling)  # (out, rank), rank-sized work in the masters' dtype
        flat = y.view(-1, y.shape[-1])
        if start_up is not None and moved is not None:
            start = start_up * scaling
            effective = effective - start
            flat.addmm_(moved, start.to(y.dtype).T)
        flat.addmm_(h, effective.to(y.dtype).T)
        ctx.mark_dirty(y)
        ctx.scaling = scaling
        behind = any(ctx.needs_input_grad[3:6])
        ctx.save_for_backward(h if behind else None, up, core, tail, start_up)
        ctx.with_start = moved is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gy,) = grads
        h, up, core, tail, start_up = ctx.saved_tensors
        g = as_rows(gy)  # (tokens, out)
        gh = gm = d_up = d_core = d_tail = None
        if ctx.needs_input_grad[1]:
            effective = _effective_up(up, core, tail, ctx.scaling)
            if ctx.with_start:
                start = start_up * ctx.scaling
                effective = effective - start
                gm = g @ start.to(g.dtype) if ctx.needs_input_grad[2] else None
            gh = g @ effective.to(g.dtype)  # (tokens, rank)
        if h is not None:
            # one GEMM over the tokens serves up, core and tail: the gradient of effective_up, over `scaling`
            masters = torch.promote_types(up.dtype, torch.float32)
            k = (g.T @ h.to(g.dtype)).to(masters) * ctx.scaling  # (out, rank)
            rowed = k if tail is None else k * tail[:, None]
            if ctx.needs_input_grad[3]:
                d_up = (rowed if core is None else rowed * core if core.dim() == 1 else rowed @ core.T).to(up.dtype)
            if core is not None and ctx.needs_input_grad[4]:
                d_core = (up * rowed).sum(0) if core.dim() == 1 else up.T @ rowed
            if tail is not None and ctx.needs_input_grad[5]:
                d_tail = (k * _effective_up(up, core, None, 1.0)).sum(1)
        return gy, gh, gm, d_up, d_core, d_tail, None, None


class _Rescale(torch.autograd.Function):
    """y0 -> gain * (y0 - bias) + bias, in fp32: bit-exact at gain 1. y0 is the biased output, (..., out)."""

    @staticmethod
    def forward(ctx: Any, y0: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(y0 if ctx.needs_input_grad[1] else None, gain, bias)
        made = times_gain(as_rows(y0), gain, bias)
        return torch.ops.aten._unsafe_view(made, y0.shape)  # the caller may write to it: no view made in here

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        y0, gain, bias = ctx.saved_tensors
        gy = as_rows(grads[0])
        d_y0 = times_gain(gy, gain).view(grads[0].shape) if ctx.needs_input_grad[0] else None
        return d_y0, None if y0 is None else gain_gradient(as_rows(y0), gy, gain, bias), None


# --- the two forms and the rule that picks one -----------------------------------------------------------------------------------------


def form_of(storage: Storage, x: Tensor) -> str:
    """'fused' or 'reference'. Fused: a storage with products of its own, eager mode, a floating-point x.

    Under the compiler the plain form is the fast one: the compiler sees every operation, fuses them and chooses what to keep.
    """
    if not storage.fused or not x.is_floating_point() or torch.compiler.is_compiling():
        return "reference"
    return "fused"


def fused_form(
    x: Tensor,
    storage: Storage,
    weights: tuple[Tensor, ...],
    bias: Tensor | None,
    factors: Factors | None,
    start: Start | None,
    gain: Tensor | None,
    dropout: float = 0.0,
    token_core: TokenCore | None = None,
    shared: "SharedMember | None" = None,
    route: Tensor | None = None,
) -> Tensor:
    """y (..., out) for x (..., in), over a frozen base known by its storage. Same value and gradients as `reference_form`."""
    if factors is None:
        y = _Base.apply(x, bias, storage, *weights)
    elif shared is not None:
        y = _Base.apply(x, bias, storage, *weights)
        h = _routed(shared.project(x, factors.down, y.dtype, dropout), x, route)
        y = _Combine.apply(y, h, None, factors.up, factors.core, factors.tail, None, factors.scaling)
    else:
        mask = dropped(x, dropout, factors.down) if dropout else None
        start_down = None if start is None else start.down
        source = source_of(x) if factors.down.requires_grad else None
        y, h, moved = _Project.apply(x, factors.down, start_down, bias, storage, mask, source, *weights)
        core = factors.core
        h, moved = _routed(h, x, route), None if moved is None else _routed(moved, x, route)
        if token_core is not None:
            h, core = as_rows(token_core(x, h.view(*x.shape[:-1], -1))), None
        start_up = None if start is None else start.up
        y = _Combine.apply(y, h, moved, factors.up, core, factors.tail, start_up, factors.scaling)
    return y if gain is None else _Rescale.apply(y, gain, bias)


def _routed(h: Tensor, x: Tensor, route: Tensor | None) -> Tensor:
    """h (tokens, rank) of x (..., in), each row times its sample's number in `route`, which has as many dimensions as x."""
    return h if route is None else (h.view(*x.shape[:-1], -1) * route.to(h.dtype)).view_as(h)


class _Base(torch.autograd.Function):
    """y = x W^T + bias over a frozen base, saving nothing but references to W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, storage: Storage, *weights: Tensor) -> Tensor:
        y = storage.product(x, bias, *weights)
        ctx.storage, ctx.dtype = storage, x.dtype
        ctx.save_for_backward(*weights)
        return torch.ops.aten._unsafe_view(y, y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        dx = ctx.storage.product_t(grads[0], *ctx.saved_tensors).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        return (dx, *([None] * (len(ctx.needs_input_grad) - 1)))


def reference_form(
    x: Tensor,
    base: Callable[[Tensor], Tensor],
    bias: Tensor | None,
    factors: Factors | None,
    start: Start | None,
    gain: Tensor | None,
    dropout: float = 0.0,
    token_core: TokenCore | None = None,
    route: Tensor | None = None,
) -> Tensor:
    """The same function in plain autograd, over any base layer: called once, branch added. x may be token ids (an embedding)."""
    y = base(x)
    if factors is not None:
        if x.is_floating_point():
            rows = x.to(y.dtype)
            if dropout:
                rows = F.dropout(rows, dropout) if torch.compiler.is_compiling() else drop(rows, dropout, draw_seed())
        else:
            rows = x
        h = _times(rows, factors.down, y.dtype)  # (..., rank)
        h = h if route is None else h * route.to(h.dtype)
        if token_core is None:
            up = factors.effective_up()
        else:
            h, up = token_core(x, h), _effective_up(factors.up, None, factors.tail, factors.scaling)
        if start is not None:
            start_up = factors.scaling * start.up
            up = up - start_up
            moved = _times(rows, factors.down - start.down, y.dtype)
            y = y + F.linear(moved if route is None else moved * route.to(moved.dtype), start_up.to(y.dtype))
        y = y + F.linear(h.to(y.dtype), up.to(y.dtype))
    return y if gain is None else reference_times_gain(y, gain, bias)


def _times(x: Tensor, matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """x matrix^T (..., rank) for x (..., in), or for token ids, whose one-hot rows gather columns of the matrix (rank, vocabulary)."""
    return F.linear(x, matrix.to(dtype)) if x.is_floating_point() else F.embedding(x, matrix.T).to(dtype)


def operate(
    x: Tensor,
    layer: nn.Module,
    storage: Storage,
    factors: Factors | None,
    start: Start | None = None,
    gain: Tensor | None = None,
    dropout: float = 0.0,
    token_core: TokenCore | None = None,
    shared: "SharedMember | None" = None,
    route: Tensor | None = None,
) -> Tensor:
    """The operation: y (..., out) for x (..., in), or for token ids at an embedding.

    Args:
        x: input (..., in).
        layer: the base layer, called as it is when its storage has no products of its own.
        storage: how that layer holds its weight.
        factors: the update; None for a gain alone.
        start: the frozen pair to subtract; needs a constant core.
        gain: (out,) fp32, over base and branch, bias left out.
        dropout: probability on the branch's input, in training only (the caller passes 0 otherwise).
        token_core: (x, h) -> core . h for cores that depend on the token; h is (..., rank).
        shared: the site's handle on the projection shared by its group, whose members have the same frozen `down`.
        route: what multiplies the whole update (its start too), one number a sample, (batch, 1, ...) with as many dimensions as x.

    Raises:
        RecipeError: a token core together with a start or a constant core.
    """
    if token_core is not None and factors is not None and (start is not None or factors.core is not None):
        raise RecipeError(
            "token_core with a start or a constant core: `down @ x` is no longer what stands before `up`, so neither can be applied; "
            "fold the start into the base (base='fold') and put the constant core into the token core"
        )
    bias = storage.bias(layer)
    if form_of(storage, x) == "fused":
        y = fused_form(x, storage, storage.tensors(layer), bias, factors, start, gain, dropout, token_core, shared, route)
    else:
        y = reference_form(x, layer, bias, factors, start, gain, dropout, token_core, route)
    if factors is None or factors.shift is None:
        return y
    shift = factors.scaling * factors.shift
    return y + (shift if route is None else route.to(shift.dtype) * shift).to(y.dtype)
