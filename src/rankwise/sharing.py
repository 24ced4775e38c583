"""The projection that several sites share: `down @ x`, made once for a group that reads one input through one frozen `down`."""

import threading
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rankwise.kernels import dropout as draws
from rankwise.kernels.site import as_rows


class SharedProjection:
    """`down @ x`, made once for the sites of a group that read one input through one `down` (VeRA's q, k, v).

    One of these stands for the group; every member holds a handle of its own, from `member()`. The projection serves only the very tensor
    it was made from, unchanged, in the same thread and gradient mode, and each member once: whoever asks again begins a new forward and
    gets a new projection with a new dropout mask. x is not kept alive, and the projection goes with it: nothing stays behind when a
    member is skipped, a forward fails or a recomputation stops early. Copies and pickles are empty.
    """

    def __init__(self, members: int) -> None:
        self.members = members
        # per thread: two threads that run one model at once do not see each other's inputs
        self._made = threading.local()

    def __deepcopy__(self, memo: dict[int, object]) -> "SharedProjection":
        copied = memo[id(self)] = SharedProjection(self.members)
        return copied

    def __reduce__(self) -> tuple[object, ...]:
        return SharedProjection, (self.members,)

    def member(self) -> "SharedMember":
        """A handle for one more member."""
        return SharedMember(self)

    def project(self, member: object, x: Tensor, down: Tensor, dtype: torch.dtype, dropout: float) -> Tensor:
        """h (tokens, rank); one dropout mask for the whole group."""
        if x.is_inference() or down.is_inference():  # such tensors have no version: a change of x between two members could not be seen
            return _Down.apply(x, down, dtype, dropout, draws.draw_seed() if dropout else 0)
        key = (x._version, x.requires_grad, down.data_ptr(), down.shape, down._version, dtype, dropout, torch.is_grad_enabled())
        if dropout:
            # A checkpointed region that is run again draws its seeds again: a mask must not cross the border of a region.
            key = (*key, torch._C._autograd._top_saved_tensors_default_hooks(False))  # pyright: ignore[reportAttributeAccessIssue]
        made: _Made | None = getattr(self._made, "value", None)
        if made is None or made.x() is not x or made.key != key or member in made.taken:
            h = _Down.apply(x, down, dtype, dropout, draws.draw_seed() if dropout else 0)
            made = self._made.value = _Made(weakref.ref(x, self._forget), key, h, set())
        made.taken.add(member)
        if len(made.taken) == self.members:
            self._made.value = None
        return made.h

    def _forget(self, x: "weakref.ref[Tensor]") -> None:
        made: _Made | None = getattr(self._made, "value", None)
        if made is not None and made.x is x:
            self._made.value = None


class _Made(NamedTuple):
    x: "weakref.ref[Tensor]"
    key: tuple[object, ...]
    h: Tensor  # (tokens, rank)
    taken: set[object]  # the members that have it


class SharedMember:
    """One member's handle on the projection of its group."""

    def __init__(self, group: SharedProjection) -> None:
        self.group = group

    def project(self, x: Tensor, down: Tensor, dtype: torch.dtype, dropout: float) -> Tensor:
        """h (tokens, rank)."""
        return self.group.project(self, x, down, dtype, dropout)


class _Down(torch.autograd.Function):
    """h = drop(x) down^T, (tokens, rank), with `down` frozen: nothing of x is saved.

    `down` is kept as an attribute, not as a saved tensor: h may be used by several backwards, and by a checkpointed region that did not
    make it and must save as many tensors when it runs again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, dtype: torch.dtype, dropout: float, seed: int) -> Tensor:
        rows = as_rows(x).to(dtype)
        rows = draws.drop(rows, dropout, seed) if dropout else rows
        ctx.down = down
        ctx.dropout, ctx.seed, ctx.shape, ctx.dtype = dropout, seed, x.shape, x.dtype
        return rows @ down.to(dtype).T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        dx = None
        if ctx.needs_input_grad[0]:
            dx = grads[0] @ ctx.down.to(grads[0].dtype)
            dx = (draws.drop(dx, ctx.dropout, ctx.seed) if ctx.dropout else dx).view(ctx.shape).to(ctx.dtype)
        return dx, None, None, None, None
