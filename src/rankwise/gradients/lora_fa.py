"""LoRA-FA's correction: the gradient of `up` is replaced so that the step of W is the best one within the frozen row space.

    g_up = (1 / scaling^2) d_up (down down^T)^-1          so that   scaling * g_up @ down = G down^T (down down^T)^-1 down

Zhang et al., "LoRA-FA", arXiv 2308.03303 version 2 (version 1 is plain: freeze `down`, change nothing else). `down` never changes, so its
Gram
matrix is factored once, in fp32, with a ridge relative to its trace. The map is linear: it is applied to each incoming gradient, so that
accumulation adds corrected gradients and clipping sees them.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from rankwise.errors import RecipeError
from rankwise.gradients.base import GradientRule


@dataclass(frozen=True)
class LoraFa(GradientRule):
    """The corrected gradient of LoRA-FA version 2.

    ridge: added to the Gram matrix as a multiple of its mean diagonal; 0 is exact. PEFT adds an absolute 1e-8.
    """

    name: ClassVar[str] = "lora-fa"
    ridge: float = 0.0

    def transform(self, site: Any, role: str) -> Callable[[Tensor], Tensor] | None:
        if role != "up":
            return None
        gram = _Gram(site, self.ridge)
        gram.factor()  # dependent rows are refused before the first step

        def correct(gradient: Tensor) -> Tensor:
            factor = gram.factor()
            solved = torch.cholesky_solve(gradient.to(factor.dtype).T, factor).T  # (out, rank)
            return (solved / gram.update.scaling**2).to(gradient.dtype)

        return correct


class _Gram:
    """The Cholesky factor of down down^T + ridge (rank, rank) of one site, made once and again when `down` was loaded or moved."""

    def __init__(self, site: Any, ridge: float) -> None:
        self.name, self.ridge = site.site.name, ridge
        self.update = weakref.proxy(site.update)  # a hook on its parameter must not keep it alive
        self._made_from: tuple[object, ...] = ()
        self._factor: Tensor | None = None

    @torch.no_grad()
    def factor(self) -> Tensor:
        down = self.update.down
        # `down` is a buffer that no optimizer and no all-gather touches: loading (which counts versions) and moving are all there is
        made_from = (down.data_ptr(), down.device, down.dtype, down._version)
        if self._factor is not None and self._made_from == made_from:
            return self._factor
        wide = down.to(torch.promote_types(down.dtype, torch.float32))
        gram = wide @ wide.T  # (rank, rank)
        gram.diagonal().add_(self.ridge * gram.diagonal().mean())
        factor, info = torch.linalg.cholesky_ex(gram)
        # rounding may leave a dependent row a pivot of its own size: no digit of such a solution would be right
        smallest = torch.finfo(wide.dtype).eps * len(gram) * gram.diagonal().max()
        if info.item() or factor.diagonal().min().square() <= smallest:
            raise RecipeError(f"the rows of `down` at {self.name} are dependent (rank {len(down)}); lower the rank or set a ridge")
        self._factor, self._made_from = factor, made_from
        return factor
