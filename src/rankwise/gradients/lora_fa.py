"""LoRA-FA's correction: the gradient of `up` is replaced so that the step of W is the best one within the frozen row space.

    g_up = (1 / scaling^2) d_up (down down^T)^-1          so that   scaling * g_up @ down = G down^T (down down^T)^-1 down

Zhang et al., "LoRA-FA", arXiv 2308.03303 version 2 (version 1 is plain: freeze `down`, change nothing else). `down` never changes, so its
Gram
matrix is factored once, in fp32, with a ridge relative to its trace. The map is linear: it is applied to each incoming gradient, so that
accumulation adds corrected gradients and clipping sees them.
"""

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
        factors = site.update.factors()
        down = factors.down.detach().to(torch.promote_types(factors.down.dtype, torch.float32))
        gram = down @ down.T  # (rank, rank)
        gram.diagonal().add_(self.ridge * gram.diagonal().mean())
        factor, info = torch.linalg.cholesky_ex(gram)
        if info.item():
            raise RecipeError(
                f"the rows of `down` at {site.site.name} are dependent (rank {site.site.rank}); lower the rank or set a ridge"
            )
        scale = 1 / factors.scaling**2

        def correct(gradient: Tensor) -> Tensor:
            solved = torch.cholesky_solve(gradient.to(factor).T, factor).T  # (out, rank)
            return (solved * scale).to(gradient.dtype)

        return correct
