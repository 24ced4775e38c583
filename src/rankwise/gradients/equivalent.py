"""The algebra of LoRA-Pro: the steps of two factors that together come nearest to a step of the whole weight.

    g = dL/dW (out, in) is never made; known are g_down = s up^T g and g_up = s g down^T.  Of all pairs (h_down, h_up) those with

        h_down = s^-2 (up^T up)^-1 g_down + X down
        h_up   = s^-2 (I - P_up) g_up (down down^T)^-1 - up X            P_up = up (up^T up)^-1 up^T, never made

    bring  gt = s (up h_down + h_up down)  nearest to g: its projection  g - (I - P_up) g (I - P_down)  on the tangent space, for any X.

Wang et al. 2024, "LoRA-Pro: Are Low-Rank Adapters Properly Optimized?", arXiv 2407.18242, theorems 2.1 and 2.3. With K = g_down down^T
(rank, rank), X is 'zero'; 'symmetric', -1/2 s^-2 (up^T up)^-1 K (down down^T)^-1, which makes mirror images of the two formulas; or
'sylvester', the solution of  (up^T up) X + X (down down^T) = -s^-2 (up^T up)^-1 K,  which comes nearest to the raw gradients and balances
the two steps: h_down down^T = up^T h_up.

One eigendecomposition of each Gram matrix serves the inverses and X, batched over all sites of one rank. An inverse leaves out
directions that are zero or lost in the factors' rounding: at up = 0, h_down = 0 and X = 0 need no case of their own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Mix = Literal["sylvester", "symmetric", "zero"]


@dataclass(frozen=True, slots=True)
class Pair:
    """One update made of a pair, and the name of the first site that uses it. Reads its tensors anew: a schedule may replace them."""

    name: str
    update: Any

    @property
    def down(self) -> Tensor:
        """(rank, in)."""
        return self.update.down.detach()

    @property
    def up(self) -> Tensor:
        """(out, rank)."""
        return self.update.up.detach()

    @property
    def scaling(self) -> float:
        """s."""
        return float(self.update.scaling)

    @property
    def trained(self) -> tuple[str, ...]:
        """Which of 'down' and 'up' train."""
        return tuple(name for name in ("down", "up") if name in self.update.roles)

    @property
    def gradients(self) -> dict[str, Tensor]:
        """'down', 'up' -> its gradient, of those that train; empty where this step gave none."""
        found = {name: getattr(self.update, name).grad for name in self.trained}
        return {} if any(gradient is None for gradient in found.values()) else found


class Steps(NamedTuple):
    """What replaces the gradients of a pair, in the wide type; None for a frozen factor."""

    pair: Pair
    down: Tensor | None  # h_down (rank, in)
    up: Tensor | None  # h_up (out, rank)


class Spectrum(NamedTuple):
    """Eigenvalues (n, rank) of n Gram matrices, their inverses (zero for a direction that is left out), eigenvectors (n, rank, rank)."""

    values: Tensor
    inverses: Tensor
    vectors: Tensor

    def inverse(self) -> Tensor:
        """(n, rank, rank), symmetric."""
        return (self.vectors * self.inverses[:, None, :]) @ self.vectors.mT


def wide(device: torch.device) -> torch.dtype:
    """The type of rank-sized work: fp64, or fp32 on a device that has no fp64."""
    return torch.float32 if device.type == "mps" else torch.float64


def spectrum(grams: Tensor, rounding: float, ridge: float = 0.0) -> Spectrum:
    """Eigendecompositions of Gram matrices (n, rank, rank).

    Args:
        grams: symmetric, in the wide type.
        rounding: relative rounding of the factors; what is smaller in a factor than eight times that is noise and is left out.
        ridge: added to the eigenvalues that stay, as a multiple of their mean.
    """
    values, vectors = torch.linalg.eigh(grams)  # ascending
    rank = grams.shape[-1]
    cutoff = max((8 * rounding) ** 2, 4 * rank * torch.finfo(grams.dtype).eps)
    keep = values > cutoff * values[:, -1:]
    values = torch.where(keep, values + ridge * values.mean(1, keepdim=True), 0.0)
    return Spectrum(values, torch.where(keep, torch.where(keep, values, 1.0).reciprocal(), 0.0), vectors)


def spectra(pairs: Sequence[Pair], ridge: float = 0.0) -> tuple[Spectrum, Spectrum]:
    """Spectra of up^T up and of down down^T of pairs of one rank on one device."""
    kind = wide(pairs[0].up.device)
    rounding = torch.finfo(pairs[0].up.dtype).eps
    ups, downs = (pair.up.to(kind) for pair in pairs), (pair.down.to(kind) for pair in pairs)
    left = torch.stack([up.T @ up for up in ups])
    right = torch.stack([down @ down.T for down in downs])
    return spectrum(left, rounding, ridge), spectrum(right, rounding, ridge)


def sylvester(left: Spectrum, right: Spectrum, target: Tensor) -> Tensor:
    """The X of  L X + X R = target,  (n, rank, rank) each; zero in directions that both spectra leave out."""
    sums = left.values[:, :, None] + right.values[:, None, :]
    rotated = left.vectors.mT @ target @ right.vectors
    return left.vectors @ torch.where(sums > 0, rotated / torch.where(sums > 0, sums, 1.0), 0.0) @ right.vectors.mT


def adjusted(pairs: Sequence[Pair], left: Spectrum, right: Spectrum, mix: Mix) -> Iterator[Steps]:
    """h_down and h_up of pairs of one rank, of which the same factors train, made from their gradients one pair after another."""
    kind = wide(pairs[0].up.device)
    squares = torch.tensor([pair.scaling**-2 for pair in pairs], dtype=kind, device=pairs[0].up.device)[:, None, None]
    left_inverse, right_inverse = left.inverse(), right.inverse()
    of_down, of_up = squares * left_inverse, squares * right_inverse
    if pairs[0].trained == ("down", "up"):
        # s up^T g down^T, once from either gradient: equal but for rounding
        cores = torch.stack([pair.gradients["down"].to(kind) @ pair.down.to(kind).T for pair in pairs])
        others = torch.stack([pair.up.to(kind).T @ pair.gradients["up"].to(kind) for pair in pairs])
        x = torch.zeros_like(cores)
        if mix == "symmetric":
            x = -0.5 * of_down @ cores @ right_inverse
        elif mix == "sylvester":
            x = sylvester(left, right, -of_down @ cores)
        shared = left_inverse @ others @ of_up + x  # h_up = g_up s^-2 (down down^T)^-1 - up shared
        for index, pair in enumerate(pairs):
            g_down, g_up = pair.gradients["down"].to(kind), pair.gradients["up"].to(kind)
            h_down = of_down[index] @ g_down + x[index] @ pair.down.to(kind)
            h_up = g_up @ of_up[index] - pair.up.to(kind) @ shared[index]
            yield Steps(pair, h_down, h_up)
        return
    for index, pair in enumerate(pairs):  # beside a frozen factor the other one takes all of its projection
        h_down = of_down[index] @ pair.gradients["down"].to(kind) if "down" in pair.trained else None
        h_up = pair.gradients["up"].to(kind) @ of_up[index] if "up" in pair.trained else None
        yield Steps(pair, h_down, h_up)
