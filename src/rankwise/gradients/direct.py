"""An optimizer for rules whose gradients are steps already: roles that a rule calls direct move by them, the others as usual.

    p <- (1 - lr * weight_decay) p - lr * gradient          for each p of a direct role

Direct roles have no state here, so that a rule which keeps moments of its own (LoRA-Pro in weight space) is not normalized twice.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer


class DirectSteps(Optimizer):
    """Any optimizer for most groups, plain steps for those of direct roles.

    Args:
        groups: parameter groups with a 'role' each.
        kind: makes the optimizer of the other groups; takes groups, lr and weight_decay.
        direct: roles whose gradients are steps.
        lr, weight_decay, **options: passed on to it.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        kind: Callable[..., Optimizer],
        direct: frozenset[str],
        lr: float,
        weight_decay: float,
        **options: Any,
    ) -> None:
        self.direct = direct
        self.inner = kind(groups, lr=lr, weight_decay=weight_decay, **options)  # never called from outside: it has no hooks
        super().__init__(self.inner.param_groups, self.inner.defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of all groups."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # groups and state are this optimizer's: loading a state or regrouping replaces them
        self.inner.param_groups = [group for group in self.param_groups if group.get("role") not in self.direct]
        self.inner.state = self.state
        if self.inner.param_groups:
            self.inner.step()
        for group in self.param_groups:
            if group.get("role") in self.direct:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.mul_(1 - float(group["lr"]) * group["weight_decay"]).sub_(group["lr"] * parameter.grad)
        return loss
