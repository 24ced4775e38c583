"""ROSA's rounds: from time to time what was trained is folded into the weight, and a new slice of that weight becomes what trains.

    W <- W_fix + scaling * up down;    (up, down) <- the init's pair for this W;    W_fix <- W - scaling * up down

"ROSA: Random Subspace Adaptation for Efficient Fine-Tuning", arXiv 2407.07802, algorithm 1; official code rosa-paper/rosa. A round changes
W by rank 2 rank at most, and over the rounds any change can be reached. The model computes the same before and after: W_fix is what the
rounded pair leaves. The pair is written into the same parameters, its optimizer state is forgotten, the learning rate's schedule goes on.
Any init that moves the base serves (PiSSA: 'top' in every round); rank + rank numbers a row and column train, as in LoRA.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from rankwise import ledger
from rankwise.errors import RecipeError, TrainingError
from rankwise.schedules.base import Change, Event, Moment, Running, Schedule
from rankwise.updates.base import Site

ROUNDS = 10  # of a run where nothing is said: the official GLUE runs take ten passes and fold after each


@dataclass(frozen=True)
class Rounds(Schedule):
    """The rounds of a run.

    rounds: how many, of equal length; None for ten, or as many as there are steps. interval: or steps of a round; the last one takes what
        does not fill another. At least one of the two must be None.
    total_steps: steps of the run; None takes what the loop or `rankwise.optimizer(total_steps=...)` says. Not needed with an interval:
        then the run may also end with a round that has just begun, which changes nothing.
    ledger: keep what was folded as low-rank pairs on the CPU: adapter files hold these instead of base weights, and `export_lora` writes
        the exact plain LoRA. False for very many rounds.
    master: 'fp32' sums W up in an fp32 copy on the CPU, so that the roundings of a 16-bit base do not add up over the rounds.
    original: 'keep' the original weights on the CPU, or 'drop' them.
    """

    name: ClassVar[str] = "rosa"
    rewrites_base: ClassVar[bool] = True
    rounds: int | None = None
    interval: int | None = None
    total_steps: int | None = None
    ledger: bool = True
    master: Literal["none", "fp32"] = "none"
    original: Literal["keep", "drop"] = "keep"

    def __post_init__(self) -> None:
        for label in ("rounds", "interval", "total_steps"):
            value = getattr(self, label)
            if value is not None and value < 1:
                raise RecipeError(f"{label}={value} of the rosa schedule must be at least 1")
        if self.rounds is not None and self.interval is not None:
            raise RecipeError(f"rounds={self.rounds} and interval={self.interval} of the rosa schedule say the same thing; remove one")
        if self.master not in ("none", "fp32"):
            raise RecipeError(f"master={self.master!r} of the rosa schedule is unknown; use 'none' or 'fp32'")
        if self.original not in ("keep", "drop"):
            raise RecipeError(f"original={self.original!r} of the rosa schedule is unknown; use 'keep' or 'drop'")

    def bound(self, rank: int, side: int) -> int:
        return min(rank, side - 1)  # all directions at once would leave nothing to stand still

    def check(self, sites: Sequence[Site]) -> None:
        for site in sites:
            if site.rank < 1:
                raise RecipeError(f"{site.name} is {site.out_features} x {site.in_features} and has no slice to train; exclude it")

    def held(self, sites: Sequence[Site]) -> dict[str, int]:
        found: dict[str, int] = {}
        if self.master == "fp32":
            found["fp32 master (on the CPU)"] = sum(max(4, site.element) * site.in_features * site.out_features for site in sites)
        if self.ledger:
            pairs = sum(max(4, site.element) * 2 * site.rank * (site.in_features + site.out_features) for site in sites)
            found["ledger, each finished round (on the CPU)"] = pairs
        return found

    def decay(self, role: str) -> float:
        return 0.0 if role in ("down", "up") else 1.0  # the pair is a part of the pretrained weight, which decay would take away

    def starts(self, total_steps: int | None) -> frozenset[int] | None:
        """The steps after which a new round begins; None where all multiples of the interval are meant.

        Raises:
            TrainingError: the number of steps is unknown and needed, differs from `total_steps`, or is too small.
        """
        if self.total_steps is not None and total_steps is not None and self.total_steps != total_steps:
            raise TrainingError(
                f"total_steps={self.total_steps} of the rosa schedule, but the run takes {total_steps} steps; leave total_steps out"
            )
        total = self.total_steps if total_steps is None else total_steps
        if self.interval is not None:
            if total is None:
                return None
            if total < 2 * self.interval:
                raise TrainingError(
                    f"interval={self.interval} of the rosa schedule leaves no second round in a run of {total} steps; lower it, train "
                    "longer, or say rounds=1 if that is what is wanted"
                )
            return frozenset(range(self.interval, total - self.interval + 1, self.interval))
        if total is None:
            raise TrainingError(
                "the rosa schedule must know how many steps the run takes; pass total_steps=... to rankwise.optimizer or "
                "rankwise.attach, or set interval or total_steps in the recipe"
            )
        if self.rounds is not None and self.rounds > total:
            raise TrainingError(
                f"rounds={self.rounds} of the rosa schedule do not fit into a run of {total} steps; lower it or train longer"
            )
        rounds = min(ROUNDS, total) if self.rounds is None else self.rounds
        return frozenset(total * j // rounds for j in range(1, rounds))

    def begin(self, model: nn.Module) -> Running:
        from rankwise.record import adapted
        from rankwise.sites import adapted_sites

        recipe = adapted(model).recipe
        return Refactoring(self, adapted_sites(model), recipe.init, recipe.seed)


class Refactoring(Running):
    """Which round it is, and what rounding has taken so far."""

    def __init__(self, choice: Rounds, sites: Mapping[str, Any], init: Any, seed: int) -> None:
        self.choice, self.sites, self.init, self.seed = choice, dict(sites), init, seed
        # an adapter that was loaded goes on with new draws
        self.round = max((len(module.ledger) for module in self.sites.values() if module.ledger is not None), default=0)
        self.starts: frozenset[int] | None = None
        # squared norms over all sites: what rounding has taken in all rounds, and the weights at the last one
        self.lost, self.size = (torch.zeros((), dtype=torch.float64) for _ in range(2))

    def expect(self, total_steps: int | None) -> None:
        self.starts = self.choice.starts(total_steps)

    @torch.no_grad()
    def on(self, event: Event, moment: Moment) -> Change | None:
        if event != "step" or not self._begins(moment.step):
            return None
        from rankwise.folding import renew
        from rankwise.inits import site_generator

        self.round += 1
        lost, size = torch.zeros_like(self.lost), torch.zeros_like(self.size)
        for name, module in self.sites.items():  # one layer at a time: one dense weight and its decomposition
            begin = partial(self.init.again, module.site, seed=self.seed, number=self.round)
            lost += renew(module, begin, site_generator(self.seed, name, f"update {self.round}")).cpu()
            size += module.storage.read(module.base_layer).norm(dtype=torch.promote_types(module.weight.dtype, torch.float32)).cpu() ** 2
        self.lost, self.size = self.lost + lost, size
        return Change(reset=[parameter for module in self.sites.values() for parameter in module.update.parameters()])

    def _begins(self, step: int) -> bool:
        if self.starts is not None:
            return step in self.starts
        assert self.choice.interval is not None
        return step % self.choice.interval == 0

    def tensors(self) -> dict[str, Tensor]:
        found = {"round": torch.tensor(self.round), "lost": self.lost, "size": self.size}
        for name, module in self.sites.items():
            if module.ledger is not None:
                site = module.site
                folded = ledger.to_tensors(module.ledger, site.in_features, site.out_features, site.rank)
                found |= {f"{name}.{key}": tensor for key, tensor in folded.items()}
        return found

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self.round, self.lost, self.size = int(tensors["round"]), tensors["lost"], tensors["size"]
        for name, module in self.sites.items():
            if module.ledger is not None:
                module.ledger = ledger.from_tensors({key: tensors[f"{name}.{key}"] for key in ledger.shapes(0, 0, 0, 0)})

    def report(self) -> dict[str, float]:
        """`drift`: what rounding to the base's dtype has taken from the weights over the rounds, relative, as a sum of independent errors;
        0 with a master, where it does not add up."""
        drift = float((self.lost / self.size).sqrt()) if self.round and bool(self.size) else 0.0
        return {"round": float(self.round), "drift": drift}
