"""The running state of LoRA-Pro: replaces gradients when those of a step are final. The equations stand in `lora_pro.py`.

The whole weight's gradient, its projection and Adam's N are only ever there as a tile of rows: a step of the weight (out, in) is
`stream` over blocks of its rows, each with its rows of m, v, `up` and h_up. Ranks that hold different rows add their g_down and put their
rows of g_up together; the rest is the same on all of them.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rankwise.errors import CheckpointError, TrainingError
from rankwise.gradients.equivalent import Pair, Steps, adjusted, spectra, wide
from rankwise.gradients.moments import Betas, Moments, made
from rankwise.schedules.base import Change, Event, Moment, Running, all_finite

if TYPE_CHECKING:
    from rankwise.gradients.lora_pro import LoraPro

# Of one tile, where no number of rows is given: what fits a CPU's cache, or keeps a GPU busy.
TILE_BYTES = {"cpu": 2**20}
TILE_BYTES_ELSEWHERE = 64 * 2**20

_many: Any = torch  # its functions over lists of tensors are not in its stubs


class Equivalent(Running):
    """The pairs of one model, their moments where Adam works on the weight, and what the last step did."""

    def __init__(self, choice: "LoraPro", sites: Mapping[str, Any]) -> None:
        self.choice = choice
        self.betas = Betas(choice.beta1, choice.beta2, choice.eps)
        pairs: dict[int, Pair] = {}  # an update that several sites use counts once: its gradients are the sums over them
        for name, module in sites.items():
            if module.update is not None and not {"down", "up"}.isdisjoint(module.update.roles):
                pairs.setdefault(id(module.update), Pair(name, module.update))
        self.pairs = {pair.name: pair for pair in pairs.values()}
        self.moments: dict[str, Moments] = {}
        self.steps: dict[str, int] = {}
        self.skipped = False
        self.bounded: list[Tensor] = []

    @torch.no_grad()
    def on(self, event: Event, moment: Moment) -> Change | None:
        if event != "backward":
            return None
        live = [pair for pair in self.pairs.values() if pair.gradients and pair.down.shape[0]]  # a schedule may leave rank 0
        self.bounded, self.skipped = [], False
        if not live:
            return None
        rates = _rates(moment.optimizer)
        if not all_finite([gradient for pair in live for gradient in pair.gradients.values()]):
            self.skipped = True
            if self.choice.direct:  # a raw gradient is no step: this one is left out
                _many._foreach_zero_([gradient for pair in live for gradient in pair.gradients.values()])
            return None
        for group in _alike(live):
            left, right = spectra(group, self.choice.ridge)
            if self.choice.adam_space == "weight":
                for steps in adjusted(group, left, right, "zero"):
                    self._normalize(steps)
            for steps in adjusted(group, left, right, self.choice.x):
                self._put(steps, rates)
        return None

    def _normalize(self, steps: Steps) -> None:
        """Replaces the gradients of a pair by those of N, Adam's step of the whole weight."""
        pair = steps.pair
        up, down = pair.up, pair.down
        if pair.name not in self.moments:
            self.moments[pair.name] = self._begin(pair)
            self.steps[pair.name] = 0
        self.steps[pair.name] += 1
        h_down, h_up = (None if step is None else step.to(up.dtype) for step in (steps.down, steps.up))
        g_down, g_up = stream(
            up, down, h_up, h_down, pair.scaling, self.moments[pair.name], self.betas, self.steps[pair.name], self.choice.tile
        )
        for name, gradient in (("down", g_down), ("up", g_up)):
            if gradient is not None:
                pair.gradients[name].copy_(gradient)

    def _begin(self, pair: Pair) -> Moments:
        return made(
            self.choice.states, pair.up.shape[0], pair.down.shape[1], pair.up.device, torch.promote_types(pair.up.dtype, torch.float32)
        )

    def _put(self, steps: Steps, rates: Mapping[int, float]) -> None:
        """Writes the adjusted steps over the gradients, the step of the larger factor bounded."""
        pair = steps.pair
        lrs = {rates.get(id(getattr(pair.update, name))) for name in pair.trained}
        if len(lrs) > 1:
            raise TrainingError(
                f"`down` and `up` of {pair.name} have different learning rates, but gradient='lora-pro' makes steps that belong together; "
                "give both one rate"
            )
        h_down, h_up = steps.down, steps.up
        lr = lrs.pop()
        if self.choice.cap is not None and lr and h_down is not None and h_up is not None:
            kind = h_down.dtype
            sizes = torch.stack([torch.linalg.vector_norm(factor, dtype=kind) for factor in (pair.down, pair.up)])
            lengths = lr * torch.stack([torch.linalg.vector_norm(h) for h in (h_down, h_up)])
            # one of the two is enough: what a step does beyond first order is the product of both
            over = (lengths > self.choice.cap * sizes) & torch.stack([sizes[0] >= sizes[1], sizes[1] > sizes[0]])
            factors = torch.where(over, self.choice.cap * sizes / lengths, 1.0)
            h_down, h_up = h_down * factors[0], h_up * factors[1]
            self.bounded.append(over.any())
        for name, step in (("down", h_down), ("up", h_up)):
            if step is not None:
                pair.gradients[name].copy_(step)

    # --- state -------------------------------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        found = {}
        for name, moments in self.moments.items():
            found[f"step/{name}"] = torch.tensor(self.steps[name])
            found |= {f"{label}/{name}": tensor for label, tensor in moments.tensors().items()}
        return found

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self.moments, self.steps = {}, {}
        given: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            label, _, name = key.partition("/")
            given.setdefault(name, {})[label] = tensor
        for name, mine in given.items():
            if name not in self.pairs or self.choice.adam_space != "weight":
                raise CheckpointError(
                    f"the state holds moments of {name}, which this recipe does not keep; resume with the run's own recipe"
                )
            moments = self._begin(self.pairs[name])
            for label, tensor in moments.tensors().items():
                if label not in mine or mine[label].shape != tensor.shape or mine[label].dtype != tensor.dtype:
                    raise CheckpointError(f"moments of {name} have another form in the state; resume with the run's own recipe and base")
            moments.restore(mine)
            self.moments[name], self.steps[name] = moments, int(mine["step"])

    def report(self) -> dict[str, float]:
        return {"bounded": float(sum(bool(over) for over in self.bounded)), "skipped": float(self.skipped)}


def stream(
    up: Tensor,
    down: Tensor,
    h_up: Tensor | None,
    h_down: Tensor | None,
    scaling: float,
    moments: Moments,
    betas: Betas,
    t: int,
    tile: int | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """One step of Adam on a block of rows of the equivalent gradient, and the gradients of the factors that belong to its N.

    Args:
        up, h_up: their rows of this block, (rows, rank). down, h_down: (rank, in), whole. A step that is None is zero, its factor frozen.
        scaling: s.
        moments: of these rows.
        t: the number of this step, from 1.
        tile: rows at once.

    Returns:
        (s up^T N (rank, in), summed over these rows in the wide type; s N down^T (rows, rank)), None for a frozen factor.
    """
    rows, width = up.shape[0], down.shape[1]
    if tile is None:
        tile = max(1, TILE_BYTES.get(up.device.type, TILE_BYTES_ELSEWHERE) // (width * up.element_size()))
    left, right = equivalent(up, down, h_up, h_down, scaling)
    moments.begin(left, right, betas)
    g_down = None if h_down is None else torch.zeros(down.shape, dtype=wide(down.device), device=down.device)
    g_up = None if h_up is None else torch.empty_like(up)
    for first in range(0, rows, tile):
        mine = slice(first, min(first + tile, rows))
        n = moments.step(mine, left[mine] @ right, betas, t)  # (tile, in)
        if g_down is not None:
            g_down.add_(up[mine].T @ n, alpha=scaling)
        if g_up is not None:
            g_up[mine] = (n @ down.T).mul_(scaling)
    return g_down, g_up


def equivalent(up: Tensor, down: Tensor, h_up: Tensor | None, h_down: Tensor | None, scaling: float) -> tuple[Tensor, Tensor]:
    """gt = s (up h_down + h_up down) as a product of (out, k) and (k, in), k at most twice the rank."""
    pairs = [(up, h_down), (h_up, down)]
    known = [(left * scaling, right) for left, right in pairs if left is not None and right is not None]
    return torch.cat([left for left, _ in known], 1), torch.cat([right for _, right in known])


def _rates(optimizer: Optimizer) -> dict[int, float]:
    return {id(parameter): float(group["lr"]) for group in optimizer.param_groups for parameter in group["params"]}


def _alike(pairs: Sequence[Pair]) -> Iterator[list[Pair]]:
    """Pairs of one rank, device, type and set of trained factors, together."""
    groups: dict[tuple[Any, ...], list[Pair]] = {}
    for pair in pairs:
        up = pair.up
        groups.setdefault((up.shape[1], up.device, up.dtype, pair.trained), []).append(pair)
    yield from groups.values()


def running(choice: "LoraPro", model: nn.Module) -> Equivalent:
    """The state of a choice over an adapted model."""
    from rankwise.sites import adapted_sites

    return Equivalent(choice, adapted_sites(model))
