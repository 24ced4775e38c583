"""Dense references, written from the equation alone: the adapted weight is made, and every gradient is a closed form. No code of rankwise.

    y = gain * ( x W^T + drop(x) D^T ) + bias,        D = scaling * diag(tail) up core down - scaling * up0 down0

`mask` stands for dropout: drop(x) = x * mask, mask already divided by 1 - p; ones where nothing is dropped. x is (tokens, in).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Terms:
    """The terms of the equation at one layer, all in fp64."""

    weight: Tensor  # (out, in)
    down: Tensor  # (rank, in)
    up: Tensor  # (out, rank)
    scaling: float = 1.0
    core: Tensor | None = None  # (rank,) or (rank, rank)
    tail: Tensor | None = None  # (out,)
    gain: Tensor | None = None  # (out,)
    bias: Tensor | None = None  # (out,)
    start: tuple[Tensor, Tensor] | None = None  # down0 (rank, in), up0 (out, rank)

    def core_matrix(self) -> Tensor:
        """The core as a (rank, rank) matrix."""
        if self.core is None:
            return torch.eye(self.down.shape[0], dtype=self.down.dtype)
        return torch.diag(self.core) if self.core.dim() == 1 else self.core

    def tails(self) -> Tensor:
        """(out,), ones where there is no tail."""
        return torch.ones(self.weight.shape[0], dtype=self.weight.dtype) if self.tail is None else self.tail

    def gains(self) -> Tensor:
        """(out,), ones where there is no gain."""
        return torch.ones(self.weight.shape[0], dtype=self.weight.dtype) if self.gain is None else self.gain

    def update(self) -> Tensor:
        """D, (out, in)."""
        d = self.scaling * torch.diag(self.tails()) @ self.up @ self.core_matrix() @ self.down
        if self.start is not None:
            d = d - self.scaling * self.start[1] @ self.start[0]
        return d

    def adapted(self) -> Tensor:
        """The adapted weight gain * (W + D), (out, in)."""
        return torch.diag(self.gains()) @ (self.weight + self.update())


def forward(terms: Terms, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """y (tokens, out) for x (tokens, in)."""
    y = x @ terms.adapted().T if mask is None else (x @ terms.weight.T + (x * mask) @ terms.update().T) * terms.gains()
    return y if terms.bias is None else y + terms.bias


def gradients(terms: Terms, x: Tensor, g: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    """Closed-form gradients of sum(y * g): of x and of every term that is there."""
    mask = torch.ones_like(x) if mask is None else mask
    dropped, d = x * mask, terms.update()
    gz = g * terms.gains()  # (tokens, out), gradient before the gain
    gd = gz.T @ dropped  # (out, in), gradient of D
    s, core, tail = terms.scaling, terms.core_matrix(), terms.tails()
    left = torch.diag(tail) @ terms.up  # (out, rank)
    found = {
        "x": gz @ terms.weight + (gz @ d) * mask,
        "down": s * (left @ core).T @ gd,
        "up": s * torch.diag(tail) @ gd @ terms.down.T @ core.T,
    }
    if terms.core is not None:
        of_core = s * left.T @ gd @ terms.down.T
        found["core"] = of_core if terms.core.dim() == 2 else of_core.diagonal()
    if terms.tail is not None:
        found["tail"] = s * (gd * (terms.up @ core @ terms.down)).sum(1)
    if terms.gain is not None:
        found["gain"] = (g * (x @ terms.weight.T + dropped @ d.T)).sum(0)
    return found


def gated_forward(terms: Terms, x: Tensor, gates: Tensor, mask: Tensor | None = None) -> Tensor:
    """y (tokens, out) where each token has a diagonal core of its own, gates (tokens, rank): one dense weight per token."""
    dropped = x if mask is None else x * mask
    rows = []
    for token, branch, gate in zip(x, dropped, gates, strict=True):
        d = terms.scaling * torch.diag(terms.tails()) @ terms.up @ torch.diag(gate) @ terms.down
        rows.append((terms.weight @ token + d @ branch) * terms.gains())
    y = torch.stack(rows)
    return y if terms.bias is None else y + terms.bias


def dora_gradients(weight: Tensor, down: Tensor, up: Tensor, magnitude: Tensor, scaling: float, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Closed-form gradients of DoRA without dropout, norm held constant ('detached') and followed ('full'), of sum(y * g)."""
    v = weight + scaling * up @ down  # (out, in)
    c = v.norm(dim=1)
    big = g.T @ x  # (out, in), gradient of the adapted weight
    of_v = torch.diag(magnitude / c) @ big
    along = (v * big).sum(1)
    of_v_full = torch.diag(magnitude / c) @ (big - v * (along / c**2)[:, None])
    return {
        "magnitude": along / c,
        "down": scaling * up.T @ of_v,
        "up": scaling * of_v @ down.T,
        "down full": scaling * up.T @ of_v_full,
        "up full": scaling * of_v_full @ down.T,
        "weight full": of_v_full,
        "x": g @ torch.diag(magnitude / c) @ v,
    }
