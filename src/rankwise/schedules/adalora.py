"""AdaLoRA's budget: singular triplets compete over the whole model, and the least important ones are pruned.

    I = |w dL/dw|,   avg <- b1 avg + (1 - b1) I,   unc <- b2 unc + (1 - b2) |I - avg|,   s = avg * unc        for every entry w
    score of triplet i = s(lam_i) + mean_j s(P_ji) + mean_j s(Q_ij)
    budget(t) = b0                                                      t <= tinit
                bT + (b0 - bT) (1 - (t - tinit) / (T - tfinal - tinit))^3    until T - tfinal, then bT

Zhang et al. 2023, "AdaLoRA", arXiv 2303.10512, equations 4 to 12 (equation 12 as the official code has it: the printed one does not meet
its own ends). After a step whose number is a multiple of `interval`, lam of all but the best budget(t) triplets is set to zero; they may
come back until T - tfinal, where the rest is cut out for good. P^T P and Q Q^T are pulled towards the identity by a penalty, whose
gradient is added in closed form when the gradients of a step are final (after clipping, if the loop clips), so no loss contains it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from rankwise.errors import RecipeError, TrainingError
from rankwise.schedules.base import Change, Event, Moment, Running, Schedule
from rankwise.updates.base import Site

_many: Any = torch  # its functions over lists of tensors are not in its stubs


@dataclass(frozen=True)
class Phases:
    """The resolved numbers of a run: total steps, tinit, tfinal, interval."""

    total: int
    tinit: int
    tfinal: int
    interval: int

    def budget(self, step: int, first: int, last: int) -> int:
        """How many triplets may be non-zero after `step` (counted from 1), from `first` down to `last`."""
        if step <= self.tinit:
            return first
        if step >= self.total - self.tfinal:
            return last
        rest = 1 - (step - self.tinit) / (self.total - self.tfinal - self.tinit)
        return int(last + (first - last) * rest**3)


@dataclass(frozen=True)
class AdaLoraBudget(Schedule):
    """The budget of AdaLoRA.

    target_rank: mean rank at the end. The initial rank is the recipe's.
    tinit, tfinal: steps before the first and after the last pruning; None for a tenth and half of the run, about the paper's shares.
    interval: steps between two prunings; None for a 700th of the run. In between pruned triplets may grow again.
    total_steps: steps of the run; None takes what the loop or `rankwise.optimizer(total_steps=...)` says.
    beta1, beta2: smoothing of sensitivity and of its uncertainty.
    gamma: weight of the orthogonality penalty. orthogonality: 'fro_mean', the mean of the Frobenius norms over all P and Q (official code,
        PEFT), or 'fro2_sum', the sum of their squares (paper, equation 4).
    sensitivity: 'after' the step, |new w * gradient| (official code, PEFT), or 'before' it (paper, algorithm 1).
    compact: cut pruned triplets out when the last phase begins; False keeps them and sets them to zero after every step.
    """

    name: ClassVar[str] = "adalora"
    changes_ranks: ClassVar[bool] = True
    target_rank: int = 8
    tinit: int | None = None
    tfinal: int | None = None
    interval: int | None = None
    total_steps: int | None = None
    beta1: float = 0.85
    beta2: float = 0.85
    gamma: float = 0.1
    orthogonality: Literal["fro_mean", "fro2_sum"] = "fro_mean"
    sensitivity: Literal["after", "before"] = "after"
    compact: bool = True

    def __post_init__(self) -> None:
        for label, least in (("target_rank", 1), ("tinit", 0), ("tfinal", 0), ("interval", 1), ("total_steps", 1)):
            value = getattr(self, label)
            if value is not None and value < least:
                raise RecipeError(f"{label}={value} of the adalora schedule must be at least {least}")
        for label in ("beta1", "beta2"):
            if not 0 < getattr(self, label) < 1:
                raise RecipeError(f"{label}={getattr(self, label)} of the adalora schedule must lie between 0 and 1; the paper takes 0.85")
        if not 0 <= self.gamma < float("inf"):
            raise RecipeError(f"gamma={self.gamma} of the adalora schedule must be at least 0; the paper takes 0.1")
        if self.orthogonality not in ("fro_mean", "fro2_sum"):
            raise RecipeError(f"orthogonality={self.orthogonality!r} of the adalora schedule is unknown; use 'fro_mean' or 'fro2_sum'")
        if self.sensitivity not in ("after", "before"):
            raise RecipeError(f"sensitivity={self.sensitivity!r} of the adalora schedule is unknown; use 'after' or 'before'")

    def check(self, sites: Sequence[Site]) -> None:
        ranks = sum(site.rank for site in sites)
        if self.target_rank * len(sites) > ranks:
            raise RecipeError(
                f"target_rank={self.target_rank} of the adalora schedule is above the mean rank at the start, {ranks / len(sites):g}; "
                "lower it, or raise rank (AdaLoRA's init_rank)"
            )

    def decay(self, role: str) -> float:
        return 0.0 if role in ("down", "up") else 1.0  # decay pulls P and Q away from orthonormal

    def phases(self, total_steps: int | None) -> Phases:
        """The numbers of a run of so many steps.

        Raises:
            TrainingError: the number of steps is unknown, differs from `total_steps`, or leaves no step for pruning.
        """
        if self.total_steps is not None and total_steps is not None and self.total_steps != total_steps:
            raise TrainingError(
                f"total_steps={self.total_steps} of the adalora schedule, but the run takes {total_steps} steps; leave total_steps out"
            )
        total = self.total_steps if total_steps is None else total_steps
        if total is None:
            raise TrainingError(
                "the adalora schedule must know how many steps the run takes; pass total_steps=... to rankwise.optimizer or "
                "rankwise.attach, or set total_steps in the recipe"
            )
        tfinal = total // 2 if self.tfinal is None else self.tfinal
        tinit = max(0, min(max(1, total // 10), total - tfinal - 1)) if self.tinit is None else self.tinit
        if tinit >= total - tfinal:
            raise TrainingError(
                f"tinit={tinit} and tfinal={tfinal} of the adalora schedule leave no step for pruning in a run of {total} steps; lower "
                "them or train longer"
            )
        return Phases(total, tinit, tfinal, max(1, total // 700) if self.interval is None else self.interval)

    def begin(self, model: nn.Module) -> Running:
        from rankwise.sites import adapted_sites

        return _Allocator(self, adapted_sites(model))


class _Allocator(Running):
    """Averages over one run, the current mask, and where in the schedule it stands."""

    def __init__(self, choice: AdaLoraBudget, sites: Mapping[str, Any]) -> None:
        self.choice, self.sites = choice, dict(sites)
        self.first = sum(module.site.rank for module in self.sites.values())
        # an adapter that was cut already has nothing left to prune
        self.last = min(self.first, choice.target_rank * len(self.sites))
        self.phases: Phases | None = None
        self.averages: dict[str, Tensor] = {}
        self.uncertainties: dict[str, Tensor] = {}
        self.masks: dict[str, Tensor] = {}  # of the last phase where nothing is cut: site -> (rank, 1)
        self.final = False
        self.penalty: Tensor | float = 0.0
        self.budget = self.first

    def expect(self, total_steps: int | None) -> None:
        self.phases = self.choice.phases(total_steps)

    @torch.no_grad()
    def on(self, event: Event, moment: Moment) -> Change | None:
        if event == "backward":
            self._orthogonalise()
            if self.choice.sensitivity == "before" and not self.final:
                self._sense()
        if event != "step":
            return None
        assert self.phases is not None
        if self.final:
            for name, mask in self.masks.items():
                self.sites[name].update.lam.masked_fill_(~mask, 0.0)
            return None
        if self.choice.sensitivity == "after":
            self._sense()
        self.budget = self.phases.budget(moment.step, self.first, self.last)
        if moment.step >= self.phases.total - self.phases.tfinal:  # not ==: a step that is skipped must not skip the end
            return self._finish(self._prune())
        if moment.step > self.phases.tinit and moment.step % self.phases.interval == 0:
            self._prune()
        return None

    def _trained(self) -> dict[str, nn.Parameter]:
        return {
            f"{name}.{slot}": parameter
            for name, module in self.sites.items()
            for slot, parameter in module.update.named_parameters()
            if parameter.requires_grad and parameter.numel()
        }

    # --- the penalty -------------------------------------------------------------------------------------------------------------------

    def _orthogonalise(self) -> None:
        """Adds the penalty's gradient to those of P and Q: batched over equal shapes, one product for the Gram matrices and one back."""
        if self.choice.gamma == 0:
            return
        updates = [module.update for module in self.sites.values()]
        matrices = [(part, side) for part in updates for side in ("up", "down") if isinstance(getattr(part, side), nn.Parameter)]
        shapes: dict[tuple[Any, ...], list[tuple[nn.Parameter, bool]]] = {}
        for part, side in matrices:
            matrix = getattr(part, side)
            shapes.setdefault((matrix.shape, side, matrix.device, matrix.dtype), []).append((matrix, side == "down"))
        total: Tensor | float = 0.0
        for group in shapes.values():
            tall = torch.stack([matrix.T if wide else matrix for matrix, wide in group])  # (n, width, rank)
            values, gradients = orthogonality(tall, self.choice.orthogonality)
            scale = self.choice.gamma if self.choice.orthogonality == "fro2_sum" else self.choice.gamma / len(matrices)
            for (matrix, wide), gradient in zip(group, gradients, strict=True):
                if matrix.grad is not None:  # a site that this step did not use stays where it is
                    matrix.grad.add_(gradient.T if wide else gradient, alpha=scale)
            total = total + scale * values.sum().cpu()
        self.penalty = total

    # --- scores ------------------------------------------------------------------------------------------------------------------------

    def _sense(self) -> None:
        """One step of both averages, for every entry, in fp32. A step whose gradients are not finite leaves them alone."""
        trained = {name: p for name, p in self._trained().items() if p.grad is not None}
        for name, parameter in trained.items():
            if name not in self.averages:
                wide = torch.promote_types(parameter.dtype, torch.float32)
                self.averages[name], self.uncertainties[name] = (torch.zeros_like(parameter, dtype=wide) for _ in range(2))
        if not trained:
            return
        averages = [self.averages[name] for name in trained]
        uncertainties = [self.uncertainties[name] for name in trained]
        weights = [p.detach().to(a.dtype) for p, a in zip(trained.values(), averages, strict=True)]
        gradients = [p.grad.to(a.dtype) for p, a in zip(trained.values(), averages, strict=True) if p.grad is not None]
        now = _many._foreach_abs(_many._foreach_mul(weights, gradients))
        norms = _many._foreach_norm(now, float("inf"))
        if not bool(torch.isfinite(torch.stack([norm.to(norms[0].device) for norm in norms])).all()):
            return
        _many._foreach_mul_(averages, self.choice.beta1)
        _many._foreach_add_(averages, now, alpha=1 - self.choice.beta1)
        _many._foreach_mul_(uncertainties, self.choice.beta2)
        distance = _many._foreach_abs(_many._foreach_sub(now, averages))
        _many._foreach_add_(uncertainties, distance, alpha=1 - self.choice.beta2)

    def scores(self) -> dict[str, Tensor]:
        """Site -> importance of its triplets, (rank,), in fp32 or wider."""
        found: dict[str, Tensor] = {}
        for name, module in self.sites.items():
            lam = module.update.lam
            score = torch.zeros(len(lam), device=lam.device, dtype=torch.promote_types(lam.dtype, torch.float32))
            for slot, dim in (("lam", 1), ("up", 0), ("down", 1)):
                key = f"{name}.{slot}"
                if key in self.averages:
                    score = score + (self.averages[key] * self.uncertainties[key]).mean(dim)
            found[name] = score
        return found

    def _prune(self) -> dict[str, Tensor]:
        """Sets lam of all but the best triplets to zero; equal scores are broken by position, so that the budget is met exactly.

        Returns:
            Site -> which triplets are kept, (rank,) bool.
        """
        scores = self.scores()
        device = next(iter(scores.values())).device
        flat = torch.cat([score.to(device) for score in scores.values()])
        kept = torch.zeros_like(flat, dtype=torch.bool)
        kept[torch.sort(flat, descending=True, stable=True).indices[: self.budget]] = True
        parts = kept.split([len(score) for score in scores.values()])
        masks = {name: part.to(score.device) for (name, score), part in zip(scores.items(), parts, strict=True)}
        for name, mask in masks.items():
            self.sites[name].update.lam.masked_fill_(~mask[:, None], 0.0)
        return masks

    def _finish(self, masks: Mapping[str, Tensor]) -> Change | None:
        self.final = True
        self.averages, self.uncertainties = {}, {}
        if not self.choice.compact:
            self.masks = {name: mask[:, None] for name, mask in masks.items()}
            return None
        return Change(ranks={name: mask.nonzero()[:, 0] for name, mask in masks.items() if not bool(mask.all())})

    # --- state -------------------------------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        found = {"final": torch.tensor(self.final)}
        for label, tensors in (("average", self.averages), ("uncertainty", self.uncertainties), ("mask", self.masks)):
            found |= {f"{label}/{name}": tensor for name, tensor in tensors.items()}
        return found

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self.final = bool(tensors["final"])
        self.budget = self.last if self.final else self.budget
        found: dict[str, dict[str, Tensor]] = {"average": {}, "uncertainty": {}, "mask": {}}
        for key, tensor in tensors.items():
            label, _, name = key.partition("/")
            if name:
                module = self.sites[name if label == "mask" else name.rpartition(".")[0]]
                found[label][name] = tensor.to(module.update.lam.device, copy=True)
        self.averages, self.uncertainties, self.masks = found["average"], found["uncertainty"], found["mask"]

    def report(self) -> dict[str, float]:
        return {"penalty": float(self.penalty), "budget": float(self.budget)}


def orthogonality(tall: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """Distance of the columns from orthonormal, and its gradient, in closed form.

    Args:
        tall: (n, width, rank), n matrices M.
        form: 'fro_mean' for ||M^T M - I||, 'fro2_sum' for its square.

    Returns:
        (values (n,), gradients (n, width, rank)); where the value is zero the gradient is zero.
    """
    off = tall.mT @ tall - torch.eye(tall.shape[-1], device=tall.device, dtype=tall.dtype)  # (n, rank, rank)
    if form == "fro2_sum":
        return off.square().sum((1, 2)), 4 * (tall @ off)
    norm = off.square().sum((1, 2)).sqrt()  # (n,)
    tiny = torch.finfo(norm.dtype).tiny
    return norm, 2 * (tall @ (off / norm.clamp_min(tiny)[:, None, None]))
