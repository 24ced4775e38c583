"""The running state of AdaLoRA's budget: importance, pruning, the orthogonality penalty. The equations stand in `adalora.py`."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rankwise.schedules.base import Change, Event, Moment, Running, all_finite

if TYPE_CHECKING:
    from rankwise.schedules.adalora import AdaLoraBudget, Phases

_many: Any = torch  # its functions over lists of tensors are not in its stubs


class Allocator(Running):
    """Averages over one run, the current mask, and where in the schedule it stands."""

    def __init__(self, choice: "AdaLoraBudget", sites: Mapping[str, Any]) -> None:
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
        """Adds the penalty's gradient to those of P and Q: one product for each Gram matrix, and one that is added where it belongs."""
        if self.choice.gamma == 0:
            return
        updates = [module.update for module in self.sites.values()]
        matrices = [(matrix, side == "down") for part in updates for side in ("up", "down") if _is_parameter(matrix := getattr(part, side))]
        alike: dict[tuple[Any, ...], list[tuple[nn.Parameter, bool]]] = {}
        for matrix, wide in matrices:
            alike.setdefault((matrix.shape[0 if wide else 1], matrix.device, matrix.dtype), []).append((matrix, wide))
        scale = self.choice.gamma if self.choice.orthogonality == "fro2_sum" else self.choice.gamma / len(matrices)
        total: Tensor | float = 0.0
        for group in alike.values():
            grams = torch.stack([matrix @ matrix.T if wide else matrix.T @ matrix for matrix, wide in group])  # (n, rank, rank)
            values, factors = distances(grams, self.choice.orthogonality)
            for (matrix, wide), factor in zip(group, factors, strict=True):
                if matrix.grad is not None:  # a site that this step did not use stays where it is
                    matrix.grad.addmm_(*((factor, matrix) if wide else (matrix, factor)), alpha=scale)
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
        if not all_finite(gradients):
            return
        # on a CPU one tensor after another, so that it stays in the cache from its first operation to its last
        count = len(gradients)
        size = 1 if averages[0].device.type == "cpu" else count
        for first in range(0, count, size):
            part = slice(first, first + size)
            now = _many._foreach_mul(weights[part], gradients[part])
            _many._foreach_abs_(now)
            _many._foreach_lerp_(averages[part], now, 1 - self.choice.beta1)
            _many._foreach_sub_(now, averages[part])
            _many._foreach_abs_(now)
            _many._foreach_lerp_(uncertainties[part], now, 1 - self.choice.beta2)

    def scores(self) -> dict[str, Tensor]:
        """Site -> importance of its triplets, (rank,), in fp32 or wider."""
        found: dict[str, Tensor] = {}
        for name, module in self.sites.items():
            lam = module.update.lam
            parts = [
                (self.averages[key] * self.uncertainties[key]).mean(dim)
                for slot, dim in (("lam", 1), ("up", 0), ("down", 1))
                if (key := f"{name}.{slot}") in self.averages
            ]
            wide = torch.promote_types(lam.dtype, torch.float32)
            found[name] = sum(parts[1:], parts[0]) if parts else torch.zeros(len(lam), device=lam.device, dtype=wide)
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


def _is_parameter(tensor: Any) -> bool:
    return isinstance(tensor, nn.Parameter)


def distances(grams: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """Distance of the columns of matrices M (width, rank) from orthonormal, and its gradient, in closed form.

    Args:
        grams: (n, rank, rank), M^T M of n matrices.
        form: 'fro_mean' for ||M^T M - I||, 'fro2_sum' for its square.

    Returns:
        (values (n,), F (n, rank, rank)): the gradient is M F. Where the value is zero, so is F.
    """
    off = grams - torch.eye(grams.shape[-1], device=grams.device, dtype=grams.dtype)
    if form == "fro2_sum":
        return off.square().sum((1, 2)), 4 * off
    norm = off.square().sum((1, 2)).sqrt()  # (n,)
    return norm, 2 * (off / norm.clamp_min(torch.finfo(norm.dtype).tiny)[:, None, None])
