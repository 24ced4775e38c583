"""The one equation of the project, and the one operation that computes it.

    y = gain * ( W x  +  scaling * tail * ( up @ (core . (down @ dropout(x))) )  -  scaling * up0 @ (down0 @ dropout(x)) )  +  bias
        +  scaling * shift

A method only says what its factors are; forward, backward, merge and export follow from them here, once, for all methods.

The operation has a plain form (`reference_form`, ordinary autograd, any base layer) and a fused form (the functions of `kernels/site.py`).
A token core runs under plain autograd between `project` and `combine`, as does a route: a number for each sample that multiplies the whole
update, its start too. `form_of` is the fixed rule that picks the form.

A start is computed as  (up - up0) (down x) + up0 ((down - down0) x),  which equals  up down x - up0 down0 x  and is exactly zero, in every
dtype, while the factors stand where they started.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankwise.errors import RecipeError
from rankwise.kernels.dropout import draw_seed, drop, dropped
from rankwise.kernels.gain import reference_times_gain
from rankwise.kernels.remade import source_of
from rankwise.kernels.site import Base, Combine, Frozen, Project, Rescale, Whole, as_rows, effective_up
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
        return effective_up(self.up, self.core, self.tail, self.scaling)

    def delta(self) -> Tensor:
        """The dense update (out, in), in the dtype of the trained factors (a shared pool may be narrower)."""
        up = self.effective_up()
        return up @ self.down.to(up.dtype)


class Start(NamedTuple):
    """A frozen pair that is subtracted, because the method began away from zero. Scaled like the update it belongs to."""

    down: Tensor  # (rank, in), called down0 in the equation
    up: Tensor  # (out, rank), called up0; any core and tail of the start are already multiplied in


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
        y = Base.apply(x, bias, storage, False, *weights)
    elif shared is not None:
        y = Base.apply(x, bias, storage, True, *weights)
        h = _routed(shared.project(x, factors.down, y.dtype, dropout), x, route)
        y = Combine.apply(y, h, None, factors.up, factors.core, factors.tail, None, factors.scaling, _rounded(storage, x, y, weights))
    else:
        mask = dropped(x, dropout, factors.down) if dropout else None
        source = source_of(x) if factors.down.requires_grad else None
        start_down, start_up = (None, None) if start is None else start
        core, scaling = factors.core, factors.scaling
        frozen = Frozen(storage, weights, bias, start_down, start_up, scaling, mask, source)
        if token_core is None and route is None:
            y = Whole.apply(x, factors.down, factors.up, core, factors.tail, frozen)
        else:
            y, h, moved = Project.apply(x, factors.down, frozen)
            h, moved = _routed(h, x, route), None if moved is None else _routed(moved, x, route)
            if token_core is not None:
                h, core = as_rows(token_core(x, h.view(*x.shape[:-1], -1))).to(y.dtype), None
            y = Combine.apply(y, h, moved, factors.up, core, factors.tail, start_up, scaling, _rounded(storage, x, y, weights))
    return y if gain is None else Rescale.apply(y, gain, bias)


def _rounded(storage: Storage, x: Tensor, y: Tensor, weights: tuple[Tensor, ...]) -> torch.dtype:
    """The dtype of the site's output, where y is what the storage's product gave."""
    return y.dtype if storage.wider(x, *weights) is None else x.dtype


def _routed(h: Tensor, x: Tensor, route: Tensor | None) -> Tensor:
    """h (tokens, rank) of x (..., in), each row times its sample's number in `route`, which has as many dimensions as x."""
    return h if route is None else (h.view(*x.shape[:-1], -1) * route.to(h.dtype)).view_as(h)


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
            h, up = token_core(x, h), effective_up(factors.up, None, factors.tail, factors.scaling)
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
