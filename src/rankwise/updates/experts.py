"""LoRAMoE: several pairs at each site, weighed for every token by a router, and a loss that balances them by kind of sample.

    G(x) = softmax(router x)                                                router (experts, in), in fp32 behind the product
    dy   = scaling * sum_i G_i up_i down_i x  =  scaling * up @ ((G repeated over each rank) * (down @ x))
    Q_im = sum over the tokens of sample m of G_i,   Z_im = Q_im (1 + delta if the kinds of i and m agree, else 1 - delta)
    loss = beta * var(Z) / (mean(Z)^2 + 1e-10)                              unbiased variance over all experts and samples

Dou et al. 2023, "LoRAMoE", arXiv 2312.09979, section 3.2; the loss as the official code has it, which the authors confirmed. All experts
act on every token. down (experts * rank, in) and up (out, experts * rank) hold the pairs side by side: two products, no loop.

What the loss pulls to: Z constant, so Q proportional to 1 / (1 +- delta). A sample's own kind of experts gets the share (1 - delta) / 2,
the smaller one. The paper reads it the other way; it only renames the groups. direction='aligned' swaps the two weights.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rankwise.context import attach, attaching
from rankwise.equation import Factors
from rankwise.errors import RecipeError, TrainingError
from rankwise.updates.base import Site, Slot, UpdateChoice
from rankwise.updates.lowrank import LowRankUpdate


class ExpertsUpdate(LowRankUpdate):
    """scaling * up @ (gates * (down @ x))."""

    router: Tensor

    def begin(self, down: Tensor | None, up: Tensor | None, moves: bool, generator: torch.Generator) -> None:
        super().begin(down, up, moves, generator)
        bound = 1 / math.sqrt(self.router.shape[1])  # what kaiming_uniform(a=sqrt 5) gives
        self.put(router=(torch.rand(self.router.shape, generator=generator) * 2 - 1) * bound)

    def gates(self, x: Tensor) -> Tensor:
        # the product in x's dtype, so that the backward keeps x itself and no copy of it in fp32
        return F.linear(x, self.router.to(x.dtype)).to(torch.promote_types(x.dtype, torch.float32)).softmax(-1)  # (..., experts)

    def token_core(self, x: Tensor, h: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        gates = self.gates(x)
        h = (h.unflatten(-1, (gates.shape[-1], -1)) * gates.to(h.dtype)[..., None]).flatten(-2)
        context = attaching() if self.choice.beta else None
        if context is None or (self.choice.delta and context.types is None):
            return h  # evaluation, or samples of unknown kind: they balance nothing
        loss = self.choice.balance(*_samples(gates, context), context.types)
        weight = self.choice.beta / (context.sites if self.choice.aggregate == "mean" else 1)
        return attach(h, weight * loss, "balance")

    def stand_in(self, gates: Tensor) -> Factors:
        core = gates.to(self.down.dtype).repeat_interleave(self.down.shape[0] // len(gates))  # (experts * rank,)
        return Factors(self.down, self.up, core=core, scaling=self.scaling)


def _samples(gates: Tensor, context: Any) -> tuple[Tensor, Tensor | None]:
    """(gates (samples, tokens, experts), mask (samples, tokens) or None) of an input in any shape that the batch explains."""
    batch, length, mask = context.batch, context.length, context.mask
    rows = gates.flatten(0, -2)
    if gates.dim() >= 2 and gates.shape[0] == batch and len(rows) == batch:
        return gates.reshape(batch, 1, -1), None  # one vector a sample, such as a pooled one
    if batch is None or len(rows) != batch * (length or 1):
        raise TrainingError(
            f"the balance loss met an input of {len(rows)} tokens in a batch of {batch} samples of {length}: it cannot tell which tokens "
            "belong to which sample; take that site out with targets.exclude, or set beta=0"
        )
    return rows.view(batch, length or 1, -1), mask


@dataclass(frozen=True)
class Experts(UpdateChoice):
    """Pairs under a token router: LoRAMoE.

    experts: pairs at each site, each of the recipe's rank.
    delta: how much the kinds differ in the loss, at least 0 and below 1. beta: weight of the loss; 0 switches it off.
    expert_types: the kind of each expert; empty for the paper's, 1 for the first half and 0 for the rest.
    direction: 'paper', or 'aligned', which gives a sample's own kind of experts the larger share.
    q_reduce: 'mean_valid', the mean over tokens that are no padding; or 'sum' over all tokens, as the official code, where the loss
        depends on the lengths of the samples.
    aggregate: 'sum' of the losses of all sites (official code), or their 'mean'.
    """

    name: ClassVar[str] = "loramoe"
    module: ClassVar[Any] = ExpertsUpdate
    roles: ClassVar[frozenset[str]] = frozenset({"down", "up", "gate"})
    constant_core: ClassVar[bool] = False
    experts: int = 6
    delta: float = 0.1
    beta: float = 0.1
    expert_types: tuple[int, ...] = ()
    direction: Literal["paper", "aligned"] = "paper"
    q_reduce: Literal["mean_valid", "sum"] = "mean_valid"
    aggregate: Literal["sum", "mean"] = "sum"

    def __post_init__(self) -> None:
        if not 1 <= self.experts <= 256:
            raise RecipeError(f"experts={self.experts} must lie between 1 and 256; the paper takes 6")
        if not 0 <= self.delta < 1:
            raise RecipeError(
                f"delta={self.delta} must be at least 0 and below 1, where the other kind would count nothing; the paper takes 0.1"
            )
        if not 0 <= self.beta < math.inf:
            raise RecipeError(f"beta={self.beta} must be at least 0; the paper takes 0.1, and 0 switches the balance loss off")
        if self.expert_types and len(self.expert_types) != self.experts:
            raise RecipeError(f"expert_types names {len(self.expert_types)} kinds for experts={self.experts}; give one for each expert")
        for label, known in (("direction", ("paper", "aligned")), ("q_reduce", ("mean_valid", "sum")), ("aggregate", ("sum", "mean"))):
            if getattr(self, label) not in known:
                raise RecipeError(f"{label}={getattr(self, label)!r} is unknown; use {' or '.join(map(repr, known))}")

    @property
    def kinds(self) -> tuple[int, ...]:
        """The kind of each expert."""
        half = self.experts // 2
        return self.expert_types or (1,) * half + (0,) * (self.experts - half)

    @property
    def reads_context(self) -> bool:
        return self.beta > 0

    def missing_fact(self) -> str:
        if not (self.beta and self.delta):
            return ""
        return (
            f"the balance loss of update={self.name!r} compares the kind of each row with those of the experts; name the column that holds "
            f"it ({' or '.join(map(str, sorted(set(self.kinds))))}), or set delta=0 to balance without kinds, or beta=0 to train without "
            "the loss"
        )

    def check_types(self, types: Sequence[int]) -> None:
        if unknown := sorted(set(types) - set(self.kinds)):
            raise RecipeError(
                f"data.types holds the kind {unknown[0]}, which no expert has: expert_types is {list(self.kinds)}; name every kind there"
            )

    def slots(self, site: Site) -> dict[str, Slot]:
        return {
            "down": Slot("down", (site.width, site.in_features), "lora_A.weight"),
            "up": Slot("up", (site.out_features, site.width), "lora_B.weight"),
            "router": Slot("gate", (site.experts, site.in_features), "lora_route.weight"),
        }

    def balance(self, gates: Tensor, mask: Tensor | None, types: Tensor | None) -> Tensor:
        """The loss of one site, without beta, from gates (samples, tokens, experts); a scalar, 0 at a single number."""
        if self.q_reduce == "sum" or mask is None:
            q = gates.sum(1) if self.q_reduce == "sum" else gates.mean(1)  # (samples, experts)
        else:
            valid = mask.to(gates.dtype)[..., None]
            q = (gates * valid).sum(1) / valid.sum(1).clamp(min=1)
        if self.delta and types is not None:
            mine = torch.tensor(self.kinds, device=q.device)[None] == types.to(q.device)[:, None]
            sign = (mine.to(q.dtype) * 2 - 1) * (self.delta if self.direction == "paper" else -self.delta)
            q = q * (1 + sign)
        if q.numel() < 2:
            return q.sum() * 0
        return q.var() / (q.mean() ** 2 + 1e-10)
