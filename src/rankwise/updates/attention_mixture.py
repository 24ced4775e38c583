"""AM-LoRA's update: one LoRA per task, mixed for each token by scores of the LoRAs' own outputs; those of earlier tasks are frozen.

    y = W x + sum_i g_i f_i,   f_i = s B_i A_i x,   f_0 = 0,   g = softmax((e_0, .., e_t) / tau),   e_i = phi(f_i D_i + c_i) + o_i

    down = [A_1; ..; A_t] (t rank, in),  up = [B_1, .., B_t] (out, t rank),  token core = g, repeated over each rank
    f_i D_i = u_i^T (s B_i^T D_i) with u = down x: a score costs rank, not out, and no f_i is ever made; D_i (out), c_i, o_i scalars

Attentional Mixture of LoRAs, 2024, arXiv 2409.19611. Its text could not be had and no code is published: the equation is read from
accounts of it, and every choice that these leave open is an option. Entry 0, the zero LoRA, lets the model abstain. o_i is not in the
paper: the guard that keeps a new, untrained LoRA from taking probability from the older ones; a schedule lifts it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from rankwise.context import attach, attaching, current
from rankwise.equation import Factors
from rankwise.errors import CheckpointError, RecipeError
from rankwise.updates.base import Site, Slot, Update, UpdateChoice


def masked_mean(values: Tensor, keepdim: bool = False) -> Tensor:
    """Mean over the tokens (batch, length, ...) that are no padding: over all of them, or with `keepdim` of each row, (batch, 1, ...)."""
    context = current()
    mask = None if context is None else context.mask
    if mask is None or values.shape[:2] != mask.shape:
        return values.mean(1, keepdim=True) if keepdim else values.mean()
    weights = mask.to(values.dtype).view(*mask.shape, *[1] * (values.dim() - 2))
    if keepdim:
        return (values * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True).clamp_min(1)
    return (values * weights).sum() / weights.sum().clamp_min(1)


_TINY = 1e-6  # added to the mean square of a feature before its root


class Selector(NamedTuple):
    """What scores the LoRAs: D (t, out) or None, c (t + 1) with the zero LoRA first (t without it), o like c."""

    directions: Tensor | None
    biases: Tensor
    offsets: Tensor


class AttentionMixtureUpdate(Update):
    """Pairs `down_i`, `up_i`, their selectors `selector_i`, `bias_i`, and the guards `offset_i`, i = 1 .. experts."""

    def __init__(self, choice: "AttentionMixture", site: Site, *rest: Any) -> None:
        super().__init__(choice, site, *rest)
        self.experts = site.experts

    def _all(self, name: str) -> list[Tensor]:
        return [cast(Tensor, getattr(self, f"{name}_{number}")) for number in range(1, self.experts + 1)]

    def factors(self) -> Factors:
        downs, ups = self._all("down"), self._all("up")
        # copies of rank-sized matrices, so that all tasks together are two products over the tokens
        down, up = (downs[0], ups[0]) if self.experts == 1 else (torch.cat(downs), torch.cat(ups, dim=1))
        core = None
        if self.choice.constant_core:
            silent = down.new_zeros(1, down.shape[0])
            scores, gates = self.weigh(silent)
            core = self._penalised(self._chosen(gates)[0], silent, scores, gates).repeat_interleave(len(downs[0]))
        return Factors(down, up, core=core, scaling=self.scaling)

    @property
    def token_core(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return None if self.choice.constant_core else self._mixed

    def _mixed(self, x: Tensor, h: Tensor) -> Tensor:
        """h (..., experts * rank) with each LoRA's ranks times its gate."""
        scores, gates = self.weigh(h)
        chosen = self._penalised(self._chosen(gates), h, scores, gates).to(h.dtype).unsqueeze(-1)  # (..., experts, 1)
        return (h.view(*h.shape[:-1], self.experts, -1) * chosen).reshape(h.shape)

    def gates(self, x: Tensor) -> Tensor:
        """The gate of each LoRA for each token, (..., experts) from x (..., in)."""
        if self.choice.constant_core:
            raise RecipeError("granularity='layer' has the same gates for all inputs; export the adapter as it is")
        _, gates = self.weigh(F.linear(x, torch.cat(self._all("down")).to(x.dtype)))
        return self._chosen(gates).expand(*x.shape[:-1], -1)

    def stand_in(self, gates: Tensor) -> Factors:
        kept = gates.nonzero()[:, 0].tolist()  # what has no weight need not be written
        downs, ups = ([self._all(name)[number] for number in kept] for name in ("down", "up"))
        if not kept:
            return Factors(self._all("down")[0][:0], self._all("up")[0][:, :0], scaling=self.scaling)
        core = gates[kept].to(downs[0]).repeat_interleave(len(downs[0]))
        return Factors(torch.cat(downs), torch.cat(ups, dim=1), core=core, scaling=self.scaling)

    def _chosen(self, gates: Tensor) -> Tensor:
        """The gates of the LoRAs, the zero one left out: (..., experts)."""
        return gates[..., 1:] if self.choice.zero else gates

    # --- scores and gates --------------------------------------------------------------------------------------------------------------

    def selector(self) -> Selector:
        """The selector as it stands."""
        directions = None if self.choice.constant_core else torch.stack(self._all("selector"))
        biases = torch.cat([*([self.bias_0] if self.choice.zero else []), *self._all("bias")])  # pyright: ignore
        return Selector(directions, biases, self._offsets())

    def _offsets(self) -> Tensor:
        zero = cast(Tensor, self.bias_1).new_zeros(1)
        offsets = [getattr(self, f"offset_{number}", zero) for number in range(1, self.experts + 1)]
        return torch.cat([zero, *offsets] if self.choice.zero else offsets)

    def weigh(self, h: Tensor, selector: Selector | None = None) -> tuple[Tensor, Tensor]:
        """(scores e, gates g), (..., experts + 1) each, entry 0 the zero LoRA (experts without it); in fp32 or wider.

        Args:
            h: down @ x, (..., experts * rank).
            selector: another one than the update's own; it may know fewer LoRAs, of which h then holds the ranks.
        """
        selector = self.selector() if selector is None else selector
        with torch.autocast(h.device.type, enabled=False):
            scores = self._scores(h.to(torch.promote_types(h.dtype, torch.float32)), selector)
            return scores, self._gated(scores)

    def _gated(self, scores: Tensor) -> Tensor:
        if self.choice.gate == "softmax":
            return torch.softmax(scores / self.choice.tau, dim=-1)
        return torch.sigmoid(scores / self.choice.tau) if self.choice.gate == "sigmoid" else torch.relu(scores)

    def _scores(self, h: Tensor, selector: Selector) -> Tensor:
        biases, offsets = selector.biases.to(h.dtype), selector.offsets.to(h.dtype)
        if selector.directions is None:
            return (self._phi(biases) + offsets).expand(*h.shape[:-1], -1)
        number = len(selector.directions)
        ups = torch.stack(self._all("up")[:number]).to(h.dtype)  # (t, out, rank)
        within = self.scaling * (ups.mT @ selector.directions.to(h.dtype).unsqueeze(-1))  # s B_i^T D_i, (t, rank, 1)
        # one product for the scores of all LoRAs, the zero one's column included: block diagonal, (t rank, t + 1)
        blocks = (within * torch.eye(number, device=h.device, dtype=h.dtype).unsqueeze(1)).reshape(h.shape[-1], number)
        blocks = F.pad(blocks, (1, 0)) if self.choice.zero else blocks
        features = h @ blocks  # f_i D_i, (..., t + 1)
        if self.choice.normalise:
            features = features / self._lengths(h, ups)
        if self.choice.granularity == "sequence_mean" and features.dim() > 2:
            features = masked_mean(features, keepdim=True)
        return self._phi(features + biases) + offsets

    def _phi(self, scores: Tensor) -> Tensor:
        return torch.tanh(scores) if self.choice.phi == "tanh" else scores

    def _lengths(self, h: Tensor, ups: Tensor) -> Tensor:
        """Root mean square of each f_i, (..., t + 1): from u_i^T (B_i^T B_i) u_i, so that no f_i is made here either."""
        parts = h.view(*h.shape[:-1], len(ups), -1).unsqueeze(-2)  # (..., t, 1, rank)
        squares = ((parts @ (ups.mT @ ups)) * parts).sum((-2, -1))  # |B_i u_i|^2, (..., t)
        lengths = (squares * (self.scaling**2 / ups.shape[1]) + _TINY).sqrt()
        return F.pad(lengths, (1, 0), value=1.0) if self.choice.zero else lengths

    # --- losses on activations ---------------------------------------------------------------------------------------------------------

    def _penalised(self, tensor: Tensor, h: Tensor, scores: Tensor, gates: Tensor) -> Tensor:
        """The tensor with the weighted penalties attached, in training: means over the sites and over the tokens that are no padding."""
        context = attaching()
        if context is None:
            return tensor
        if self.choice.penalty != "none":
            value = masked_mean(penalty(self.choice.penalty, scores, gates, self.choice.zero))
            tensor = attach(tensor, value * (self.choice.penalty_weight / context.sites), self.choice.penalty)
        if self.choice.distill and self.experts > 1:
            value = masked_mean(self._forgotten(h, scores))
            tensor = attach(tensor, value * (self.choice.distill / context.sites), "distill")
        return tensor

    def _forgotten(self, h: Tensor, scores: Tensor) -> Tensor:
        """KL(old gates | those of the earlier entries among themselves now), for the inputs at hand: (...)."""
        number = self.experts - 1
        known = number + self.choice.zero
        directions = None if self.choice.constant_core else getattr(self, f"past_selector_{number}")
        old = Selector(directions, getattr(self, f"past_bias_{number}"), self._offsets()[:known])
        with torch.no_grad():
            was = self.weigh(h.detach()[..., : number * h.shape[-1] // self.experts], old)[0] / self.choice.tau
        now = torch.log_softmax(scores[..., :known] / self.choice.tau, -1)
        return F.kl_div(now, torch.log_softmax(was, -1), reduction="none", log_target=True).sum(-1)

    # --- starts ------------------------------------------------------------------------------------------------------------------------

    def begin(self, down: Tensor | None, up: Tensor | None, moves: bool, generator: torch.Generator) -> None:
        self._start(1, down, up, generator)
        if self.choice.zero:
            self.put(bias_0=torch.zeros(1))

    def extend(self, down: Tensor | None, up: Tensor | None, generator: torch.Generator) -> None:
        before = self.selector() if self._remembers() else None  # of the tasks so far: the new slots do not count yet
        reserve = self._reserve() if self.choice.guarded else None
        self.experts += 1
        self._start(self.experts, down, up, generator)
        if reserve is not None:
            self.put(**{f"offset_{self.experts}": reserve.reshape(1)})
        if before is not None:
            past = {f"past_bias_{self.experts - 1}": before.biases}
            if before.directions is not None:
                past[f"past_selector_{self.experts - 1}"] = before.directions
            self.put(**past)

    def _remembers(self) -> bool:
        return self.choice.selector_train == "all" and self.choice.snapshots

    def _start(self, number: int, down: Tensor | None, up: Tensor | None, generator: torch.Generator) -> None:
        values = {f"down_{number}": cast(Tensor, down), f"up_{number}": cast(Tensor, up)}
        # a gate of relu(0) would have no gradient
        values[f"bias_{number}"] = torch.full((1,), 1.0 if self.choice.gate == "relu" else 0.0)
        if not self.choice.constant_core:
            width = cast(Tensor, up).shape[0]
            values[f"selector_{number}"] = self.choice.selector_std * torch.randn(width, generator=generator, dtype=torch.float64)
        self.put(**values)

    @torch.no_grad()
    def _reserve(self) -> Tensor:
        """o of the next LoRA, whose f is zero: its gate is then `guard`, at most, whatever the input (with phi = 'identity', where a score
        has no bound, the gate of an input that excites no LoRA)."""
        _, biases, offsets = self.selector()
        least = self._phi(biases)
        if self.choice.phi == "tanh" and not self.choice.constant_core:
            least = torch.cat([least[:1], torch.full_like(least[1:], -1.0)]) if self.choice.zero else torch.full_like(least, -1.0)
        rest = torch.logsumexp((least + offsets) / self.choice.tau, 0)
        return self.choice.tau * (math.log(self.choice.guard / (1 - self.choice.guard)) + rest)


def penalty(kind: str, scores: Tensor, gates: Tensor, zero: bool) -> Tensor:
    """What is small where few LoRAs act, for each token: (...) from (..., entries).

    The L1 norm of a softmax is 1 whatever its arguments, so its gradient is zero: 'gates' leaves the zero LoRA out of the sum, which is
    then 1 - g_0. 'scores': sum |e_i|; 'entropy' of g; 'concentration': 1 - sum g_i^2.
    """
    if kind == "scores":
        return scores.abs().sum(-1)
    if kind == "entropy":
        return torch.special.entr(gates).sum(-1)
    if kind == "concentration":
        return 1 - gates.square().sum(-1)
    return (gates[..., 1:] if zero else gates).sum(-1)  # no gate is below zero


@dataclass(frozen=True)
class AttentionMixture(UpdateChoice):
    """One LoRA per task and their attentional mixture: AM-LoRA.

    granularity: a gate for each 'token'; 'sequence_mean', one for each row from the mean over its tokens (not for causal models, whose
        early tokens would see later ones); 'layer', one for each site, the same for all inputs: the scores are the biases alone.
    gate: 'softmax' over all LoRAs; 'sigmoid' or 'relu', gates that need not sum to 1, so that an L1 penalty on them means something.
    tau: temperature. phi: nonlinearity of the scores. zero_entry: the zero LoRA among the entries of the softmax.
    selector_train: on a later task 'all' selectors train, or only the 'new' one, which leaves the odds among earlier LoRAs as they were.
    guard: gate of a new LoRA at its start, at most; 0 for none. selector_std: standard deviation of D_i at the start.
    normalise: divide f_i by its root mean square before it is scored.
    snapshots: keep the selector of every finished task in the adapter, so that the model after task k can be had from it.
    penalty: 'scores', 'entropy', 'concentration' or 'gates' (see `penalty`), a mean over tokens at each site, times penalty_weight.
    distill: weight of KL(the last task's gates | those gates now) on the inputs of the new task.
    """

    name: ClassVar[str] = "am-lora"
    module: ClassVar[Any] = AttentionMixtureUpdate
    roles: ClassVar[frozenset[str]] = frozenset({"down", "up", "gate"})
    grows: ClassVar[bool] = True
    granularity: Literal["token", "sequence_mean", "layer"] = "token"
    gate: Literal["softmax", "sigmoid", "relu"] = "softmax"
    tau: float = 1.0
    phi: Literal["tanh", "identity"] = "tanh"
    zero_entry: bool = True
    selector_train: Literal["all", "new"] = "all"
    guard: float = 0.01
    selector_std: float = 0.0
    normalise: bool = False
    snapshots: bool = True
    penalty: Literal["none", "scores", "entropy", "concentration", "gates"] = "none"
    penalty_weight: float = 1e-3
    distill: float = 0.0

    def __post_init__(self) -> None:
        for label, known in (
            ("granularity", ("token", "sequence_mean", "layer")),
            ("gate", ("softmax", "sigmoid", "relu")),
            ("phi", ("tanh", "identity")),
            ("selector_train", ("all", "new")),
            ("penalty", ("none", "scores", "entropy", "concentration", "gates")),
        ):
            if getattr(self, label) not in known:
                listed = ", ".join(map(repr, known))
                raise RecipeError(f"{label}={getattr(self, label)!r} of the am-lora update is unknown; use one of {listed}")
        if not 0 < self.tau < math.inf:
            raise RecipeError(f"tau={self.tau} of the am-lora update must be above 0; 1 leaves the scores as they are")
        if not 0 <= self.guard < 1:
            raise RecipeError(f"guard={self.guard} of the am-lora update must be at least 0 and below 1; it is a share, such as 0.01")
        for label in ("selector_std", "penalty_weight", "distill"):
            if not 0 <= getattr(self, label) < math.inf:
                raise RecipeError(f"{label}={getattr(self, label)} of the am-lora update must be at least 0")
        if self.penalty == "gates" and self.gate == "softmax" and not self.zero_entry:
            raise RecipeError(
                "penalty='gates' of the am-lora update without the zero LoRA is the L1 norm of a softmax, which is always 1: it has no "
                "gradient; use zero_entry=True, gate='sigmoid', or another penalty"
            )
        if self.penalty in ("entropy", "concentration") and self.gate != "softmax":
            raise RecipeError(f"penalty={self.penalty!r} of the am-lora update needs gates that sum to 1; use penalty='gates'")
        if self.distill and not (self.gate == "softmax" and self.selector_train == "all" and self.snapshots):
            raise RecipeError(
                f"distill={self.distill} of the am-lora update compares with the selectors after the last task: it needs gate='softmax', "
                "selector_train='all' and snapshots=True"
            )

    @property
    def constant_core(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Gates of a layer do not see the token, so they merge."""
        return self.granularity == "layer"

    @property
    def reads_context(self) -> bool:
        """Padding must be known for means over tokens, also those of gates (`routing.static`), and losses need their forward."""
        return not self.constant_core or self.penalty != "none" or self.distill > 0

    @property
    def whole_rows(self) -> bool:
        """A mean over a row holds its last token."""
        return self.granularity == "sequence_mean"

    @property
    def zero(self) -> bool:
        """Whether entry 0 stands: gates that do not share one sum can abstain without it."""
        return self.zero_entry and self.gate == "softmax"

    @property
    def guarded(self) -> bool:
        """Whether a new LoRA starts behind a guard: only entries of one softmax take from each other."""
        return self.guard > 0 and self.gate == "softmax"

    def slots(self, site: Site) -> dict[str, Slot]:
        rank, width, made = site.rank, site.out_features, {}
        for number in range(1, site.experts + 1):
            old = number < site.experts
            kept = old and self.selector_train == "new"
            made[f"down_{number}"] = Slot("down", (rank, site.in_features), f"lora_A.{number}.weight", old)
            made[f"up_{number}"] = Slot("up", (width, rank), f"lora_B.{number}.weight", old)
            if number == 1 and self.zero:
                made["bias_0"] = Slot("gate", (1,), "lora_selector.0.bias", site.experts > 1 and self.selector_train == "new")
            if not self.constant_core:
                made[f"selector_{number}"] = Slot("gate", (width,), f"lora_selector.{number}.weight", kept)
            made[f"bias_{number}"] = Slot("gate", (1,), f"lora_selector.{number}.bias", kept)
            if number > 1 and self.guarded:
                made[f"offset_{number}"] = Slot("gate", (1,), f"lora_selector.{number}.offset", True)
            if old and self.selector_train == "all" and self.snapshots:
                if not self.constant_core:
                    made[f"past_selector_{number}"] = Slot("gate", (number, width), f"lora_selector.after_{number}.weight", True)
                made[f"past_bias_{number}"] = Slot("gate", (number + self.zero,), f"lora_selector.after_{number}.bias", True)
        return made

    def first(self, site: Site, values: Mapping[str, Tensor], experts: int) -> dict[str, Tensor]:
        found = super().first(site, values, experts)
        if experts == site.experts or self.selector_train == "new":
            return found
        if not self.snapshots:
            raise CheckpointError(
                f"{site.name}: the selectors of all {site.experts} tasks were trained on, and those of after task {experts} were not kept "
                "(snapshots=False); use selector_train='new' or snapshots=True"
            )
        biases = values[f"past_bias_{experts}"]
        if self.zero:
            found["bias_0"], biases = biases[:1], biases[1:]
        for number in range(1, experts + 1):
            found[f"bias_{number}"] = biases[number - 1 : number]
            if not self.constant_core:
                found[f"selector_{number}"] = values[f"past_selector_{experts}"][number - 1]
        return found
