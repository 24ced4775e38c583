"""What runs under the galore schedule: taps that renew frames from the gradients of a backward, and the fold after every step.

A site whose frame is due at the coming step gets a tap on its output, which forms that site's G = g^T x, and no other's. The gradient that
autograd has for D may have been formed with the frame of before, so a hook at D replaces it by the one in the new frame before it is
accumulated: whatever reads `D.grad` after the backward (clipping, averaging over processes) sees the right one.
"""

import weakref
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from rankwise.errors import RecipeError, TrainingError
from rankwise.folding import fold
from rankwise.schedules.base import Change, Event, Moment, Running
from rankwise.schedules.galore import GaloreFolding
from rankwise.sites import AdaptedLinear, adapted_sites
from rankwise.subspace import project, refresh, rotate
from rankwise.taps import Facts, Sum, gradient_tap
from rankwise.updates.projected import ProjectedUpdate


class _Tap:
    """A forward hook of one site. It does nothing in copies of the model and without gradients."""

    def __init__(self, module: nn.Module | None = None, hook: Any = None) -> None:
        self.home, self.hook = None if module is None else weakref.ref(module), hook

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Any:
        if self.home is None or self.home() is not module or not torch.is_grad_enabled() or not output.requires_grad:
            return None
        if torch.compiler.is_compiling() or not cast(AdaptedLinear, module).enabled:
            return None
        return self.hook(module, args, kwargs, output)

    def __reduce__(self) -> Any:  # what a copy or a pickle of the model carries along
        return _Tap, ()


class Renewal(Sum):
    """The tap of one site for one step: takes gradients, gives the frame, and what D's gradient is in it."""

    def __init__(self, module: AdaptedLinear, choice: GaloreFolding, generator: torch.Generator, begun: bool) -> None:
        super().__init__()
        self.update = cast(ProjectedUpdate, module.update)
        self.choice, self.generator, self.begun = choice, generator, begun
        self.before = self.update.frame.clone()  # (k, rank): moments stand in it
        self.done = False
        self.low: Tensor | None = None  # D's gradient of the pass at hand
        self.total: Tensor | None = None  # G over the passes of this step, with refresh_on='step'
        self.note = ""
        tap = _Tap(module, gradient_tap(self, [Facts({})], torch.zeros(())))
        self.handles = [module.register_forward_hook(tap, with_kwargs=True), self.update.trained.register_hook(self._gradient)]

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self.handles:
            handle.remove()

    def add(self, g: Tensor, x: Tensor, weight: float = 1.0) -> None:
        """Takes g (tokens, out) and x (tokens, in) of one call of the site."""
        frame, side = self.update.frame, self.update.side
        with torch.autocast(g.device.type, enabled=False):
            g, x = g.to(frame.dtype), x.to(frame.dtype)
            if self.choice.refresh_on == "step":
                self.matrix = g.T @ x if self.matrix is None else self.matrix.addmm_(g.T, x)
                return
            if not self.done:
                gradient = g.T @ x  # (out, in); gone at the end of this call
                self._renew(gradient)
                low = project(gradient, self.update.frame, side)
            else:
                low = (g @ frame).T @ x if side == "left" else g.T @ (x @ frame)
            self.low = low if self.low is None else self.low.add_(low)

    def _gradient(self, formed: Tensor) -> Tensor | None:
        """What is accumulated into D.grad instead of `formed`, once all calls of the site in this pass are through."""
        if self.choice.refresh_on == "step":
            if self.matrix is None:
                return None
            held = self.update.trained.grad
            # a gradient that was set to zero since is one of a new step
            again = self.total is not None and held is not None and bool(held.any())
            self.total = cast(Tensor, self.total).add_(self.matrix) if again else self.matrix
            self.matrix = None
            self._renew(self.total)
            low = project(self.total, self.update.frame, self.update.side)
            if held is not None:
                held.zero_()  # the sum so far is in the frame of before
        elif self.low is None:
            return None
        else:
            low, self.low = self.low, None
        return low.to(formed.dtype)

    def _renew(self, gradient: Tensor) -> None:
        update = self.update
        made = refresh(
            gradient,
            update.frame.shape[1],
            update.side,
            self.before if self.begun else None,
            self.choice.method,
            self.generator,
            align=self.choice.align,
        )
        self.note = made.note
        frame, good = made.frame, torch.tensor(not made.note)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            # one frame for all processes, whatever their batches: that of the first
            frame, good = frame.contiguous(), good.to(frame.device)
            dist.broadcast(frame, 0)
            dist.broadcast(good, 0)
        self.done = bool(good)
        update.turn(frame)  # where there was no gradient to take it from, the frame of before


class Frames(Running):
    """The frames of all sites, their clock, and the folds."""

    def __init__(self, choice: GaloreFolding, model: nn.Module) -> None:
        self.choice = choice
        self.sites = adapted_sites(model)
        record = cast(Any, model).rankwise
        self.generator = torch.Generator().manual_seed(record.recipe.seed)
        self.noise: dict[str, torch.Generator] = {}  # of stochastic rounding, on the weights' own devices
        for name, module in self.sites.items():
            dtype, device = module.weight.dtype, module.weight.device
            if choice.rounding == "stochastic" and dtype == torch.float16:
                raise RecipeError(f"rounding='stochastic' serves bf16 weights, and that of {name} is {dtype}; use rounding='nearest'")
            if choice.rounding != "nearest" and dtype == torch.bfloat16:
                self.noise.setdefault(str(device), torch.Generator(device).manual_seed(record.recipe.seed))
        self.step = 0
        self.begun = dict.fromkeys(self.sites, False)  # whether a gradient has ever given the frame
        self.late = dict.fromkeys(self.sites, False)  # whether a refresh found no gradient to take the frame from
        self.open: dict[str, Renewal] = {}
        self.renewed = 0
        self._arm()

    def _arm(self) -> None:
        """Puts taps on the sites that are due at the coming step, and takes off all others."""
        self.close()
        for index, (name, module) in enumerate(self.sites.items()):
            if self.late[name] or not self.begun[name] or self.choice.due(self.step, index, len(self.sites)):
                self.open[name] = Renewal(module, self.choice, self.generator, self.begun[name])

    def close(self) -> None:
        for renewal in self.open.values():
            renewal.remove()
        self.open = {}

    def on(self, event: Event, moment: Moment) -> Change | None:
        if event == "backward":
            self._renewed(moment.optimizer)
        if event == "step":
            self._fold(moment.optimizer)
            self.step += 1
            self._arm()
        return None

    def _renewed(self, optimizer: Optimizer) -> None:
        self.renewed = 0
        for name, renewal in self.open.items():
            gradient = renewal.update.trained.grad
            if gradient is not None and not renewal.tokens:
                raise TrainingError(
                    f"the frame of {name} is due, but no gradient came past it: its forward ran under torch.compile, or before the "
                    "optimizer was made; make the optimizer first, and do not compile with schedule='galore'"
                )
            self.late[name] = not renewal.done
            if renewal.done:
                self.renewed += 1
                if self.choice.rotate and self.begun[name]:
                    _rotate(optimizer, renewal)
                self.begun[name] = True

    @torch.no_grad()
    def _fold(self, optimizer: Optimizer) -> None:
        groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
        for module in self.sites.values():
            trained = cast(ProjectedUpdate, module.update).trained
            if trained.grad is None:
                continue  # the optimizer took no step here
            group = groups[id(trained)]
            keep = 1.0 - float(group["lr"]) * group.get("weight_decay", 0.0)
            # the decay is taken after the step, from the whole weight, as the official code does
            fold(module, self.choice.scale * keep, keep, self.noise.get(str(module.weight.device)))
            trained.zero_()

    def tensors(self) -> dict[str, Tensor]:
        flags = {"begun": self.begun, "late": self.late}
        return {
            "step": torch.tensor(self.step),
            "generator": self.generator.get_state(),
            **{name: torch.tensor(list(values.values())) for name, values in flags.items()},
            **{f"noise.{device}": generator.get_state() for device, generator in self.noise.items()},
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self.step = int(tensors["step"])
        self.generator.set_state(tensors["generator"])
        self.begun, self.late = (dict(zip(self.sites, tensors[name].tolist(), strict=True)) for name in ("begun", "late"))
        for device, generator in self.noise.items():
            generator.set_state(tensors[f"noise.{device}"])
        self._arm()

    def report(self) -> dict[str, float]:
        return {"renewed": float(self.renewed)}


def _rotate(optimizer: Optimizer, renewal: Renewal) -> None:
    """Carries the moments of D from the frame of before into the new one."""
    trained, new, side = renewal.update.trained, renewal.update.frame, renewal.update.side
    state = optimizer.state.get(trained, {})
    first = [name for name in ("exp_avg", "momentum_buffer") if isinstance(state.get(name), Tensor)]
    blocks = [name for name, value in state.items() if isinstance(value, Tensor) and value.numel() > 1 and value.shape != trained.shape]
    if blocks:
        raise TrainingError(f"rotate=True cannot turn the optimizer's {blocks[0]}, which is not held as D is; use rotate=False")
    for name in first:
        second = state.get("exp_avg_sq", torch.zeros_like(state[name]))
        one, other = rotate(state[name], second, renewal.before, new, side)
        state[name].copy_(one)
        if "exp_avg_sq" in state:
            state["exp_avg_sq"].copy_(other)
