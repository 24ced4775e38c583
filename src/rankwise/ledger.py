"""What was folded into a base weight, round by round, as low-rank pairs: with the original weight it gives the trained one back.

    W = W0 + scaling * sum over rounds of (up_end down_end - up_start down_start)

Each finished round is a pair of at most twice the rank, so that after j rounds the whole change is a plain LoRA of rank 2 rank j.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rankwise.equation import Factors, Start, stacked


class Round(NamedTuple):
    """A finished round of one site, on the CPU, without the scaling: the pair where it ended and the one where it began."""

    end: Start
    start: Start

    def pair(self, scaling: float) -> tuple[Tensor, Tensor]:
        """(down, up) of shapes (2 rank, in), (out, 2 rank) whose product is what the round has changed."""
        return stacked(Factors(self.end.down, self.end.up, scaling=scaling), self.start)


def shapes(count: int, width_in: int, width_out: int, rank: int) -> dict[str, tuple[int, ...]]:
    """Key -> shape of a ledger of so many rounds in a file: per round the end, then the start."""
    return {"ledger_down": (count, 2, rank, width_in), "ledger_up": (count, 2, width_out, rank)}


def to_tensors(rounds: Sequence[Round], width_in: int, width_out: int, rank: int) -> dict[str, Tensor]:
    """Key -> tensor, as `shapes` says."""
    made: dict[str, Tensor] = {}
    for key, shape in shapes(len(rounds), width_in, width_out, rank).items():
        side = key.removeprefix("ledger_")
        parts = [getattr(pair, side) for each in rounds for pair in each]
        made[key] = torch.stack(parts).view(shape) if parts else torch.zeros(shape)
    return made


def from_tensors(tensors: Mapping[str, Tensor]) -> list[Round]:
    """The rounds that `to_tensors` wrote."""
    pairs = zip(tensors["ledger_down"], tensors["ledger_up"], strict=True)
    return [Round(*(Start(down[i].clone(), up[i].clone()) for i in range(2))) for down, up in pairs]


def recompressed(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The same product from as few ranks as it has, at most min(out, in): two QRs and the SVD of the small core, in fp64.

    Args:
        down: (k, in). up: (out, k), its scaling multiplied in.

    Returns:
        (down, up) in the dtype they came in, with equal shares of the singular values.
    """
    left, inner_left = torch.linalg.qr(up.double())  # (out, m), (m, k)
    right, inner_right = torch.linalg.qr(down.double().T)  # (in, n), (n, k)
    u, values, v = torch.linalg.svd(inner_left @ inner_right.T, full_matrices=False)
    # below this nothing is left but the rounding of what came in
    kept = max(1, int((values > torch.finfo(up.dtype).eps * values[0]).sum()))
    root = values[:kept].sqrt()
    return (root[:, None] * (v[:kept] @ right.T)).to(down.dtype), ((left @ u[:, :kept]) * root).to(up.dtype)
