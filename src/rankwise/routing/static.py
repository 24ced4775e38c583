"""A mixture held still: constant gates in place of those that depend on the input, and how far off they are.

    gbar = E G,   error = E ||G - gbar||        over the valid tokens of some batches (over samples, for gates at blocks)

With constant gates every update is one pair, so the adapter can be exported as a plain LoRA: lossy, exact only where the gates are constant
anyway.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.context import required
from rankwise.errors import TargetError
from rankwise.sites import AdaptedLinear, adapted_sites


@dataclass(frozen=True)
class Mixture:
    """gates: site name -> its constant gates, (experts,), or (1,) where a gate at its block weighs the whole update. errors: site name ->
    E ||G - gbar|| over what was measured; empty where nothing was."""

    gates: dict[str, Tensor]
    errors: dict[str, float]


def uniform_mixture(model: nn.Module) -> Mixture:
    """Every expert at the same weight, 1 / experts; gates at blocks fully open. Needs no data."""
    sites = _mixed(model)
    return Mixture({name: torch.full((module.site.experts,), 1 / module.site.experts) for name, module in sites.items()}, {})


def one_expert(model: nn.Module, expert: int) -> Mixture:
    """One expert alone at full weight, the others at zero: of AM-LoRA the LoRA of one task, counted from 0. Needs no data.

    Raises:
        TargetError: there is no such expert.
    """
    sites = _mixed(model)
    least = min(module.site.experts for module in sites.values())
    if not 0 <= expert < least:
        raise TargetError(f"expert={expert}: the sites have {least} experts, numbered 0 to {least - 1}")
    return Mixture({name: torch.eye(module.site.experts)[expert] for name, module in sites.items()}, {})


@torch.no_grad()
def mean_mixture(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> Mixture:
    """The mean gates over some batches, and the mean distance from them.

    Args:
        model: an adapted model, in evaluation mode for the measurement.
        batches: dicts as the model takes them, read twice. Batches of one kind of sample give the mixture of that kind.

    Raises:
        TargetError: no update of the model depends on its input, or there is no batch.
    """
    sites, batches = _mixed(model), list(batches)
    if not batches:
        raise TargetError("no batches to measure the gates on; give some rows, or take uniform_mixture(model)")
    sums = {name: (torch.zeros(module.site.experts), 0) for name, module in sites.items()}
    _observe(model, sites, batches, lambda name, seen: sums.update({name: (sums[name][0] + seen.sum(0), sums[name][1] + len(seen))}))
    gates = {name: total / max(1, count) for name, (total, count) in sums.items()}
    errors = dict.fromkeys(sites, 0.0)
    _observe(model, sites, batches, lambda name, seen: errors.update({name: errors[name] + float((seen - gates[name]).norm(dim=1).sum())}))
    return Mixture(gates, {name: error / max(1, sums[name][1]) for name, error in errors.items()})


def _mixed(model: nn.Module) -> dict[str, AdaptedLinear]:
    sites = {name: module for name, module in adapted_sites(model).items() if module.depends_on_input}
    if not sites:
        raise TargetError("no update of this model depends on its input, so there are no gates to hold still; export it as it is")
    return sites


@dataclass(eq=False)
class _Observer:
    module: AdaptedLinear
    tell: Any

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        context = required("a mean of gates")
        if self.module.place is not None:
            block, column = self.module.place
            seen = context.routes[block][:, column, None]  # (samples, 1)
        else:
            assert self.module.update is not None
            seen = self.module.update.gates(args[0]).flatten(0, -2)  # (tokens, experts)
            if context.mask is not None and len(seen) == context.mask.numel():
                seen = seen[context.mask.reshape(-1)]
        self.tell(self.module.site.name, seen.float().cpu())


def _observe(model: nn.Module, sites: Mapping[str, AdaptedLinear], batches: list[Mapping[str, Any]], tell: Any) -> None:
    handles = [module.register_forward_pre_hook(_Observer(module, tell)) for module in sites.values()]
    mode = model.training
    try:
        model.eval()
        for batch in batches:
            model(**batch)
    finally:
        model.train(mode)
        for handle in handles:
            handle.remove()
