"""GaLore as a plain optimizer: every weight trains, and Adam's moments live in a low-rank subspace of each weight's gradients.

    every T steps   P = r leading singular directions of G                        (subspace.py)
    R = P^T G,   M = b1 M + (1 - b1) R,   V = b2 V + (1 - b2) R * R               (rank, K), K the side that is not projected
    W <- W - lr scale P N,   N = (M / c1) / (sqrt(V / c2) + eps),   c_i = 1 - b_i^t;   then   W <- W - lr decay W

Zhao et al. 2024, "GaLore", arXiv 2403.03507, algorithm 2; written for the left side, the right one is its transpose. For training loops
of one's own; inside rankwise's own training GaLore is a schedule on the one equation, which never makes whole gradients.

The state holds tensors, ints and strings only, so that it loads with `torch.load(weights_only=True)`.
"""

import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rankwise.eightbit import SMALL, Quantized, dequantize, quantize
from rankwise.errors import RecipeError, TargetError, TrainingError
from rankwise.inits.base import site_generator
from rankwise.matching import find_sites, tied_names
from rankwise.recipe import targets as read_targets
from rankwise.storage.base import rounded_to
from rankwise.subspace import NOT_FINITE, back, clamped, project, refresh, rotate, side_of

# What galore-torch calls options that have other names here.
_THEIR_NAMES = {"update_proj_gap": "update_interval", "proj_type": "projection"}
_CHOICES = {"method": ("svd", "randomized", "random"), "states": ("fp32", "8bit"), "rounding": ("nearest", "stochastic")}


class GaLore(Optimizer):
    """Adam in a subspace for groups that have a `rank`, plain AdamW for the others.

    Every option but `layerwise` may also stand in a parameter group.

    Args:
        params: parameters or groups; `galore_groups(model, rank)` makes them. A GaLore group holds weights of two dimensions, or more,
            which are taken as (out, everything else).
        lr, betas, eps, weight_decay: as in AdamW. The decay is decoupled and never scaled by `scale`; in a GaLore group it acts on the
            updated weight.
        rank: columns of the frame, clamped to the smaller side. None is plain AdamW.
        update_interval: steps between two refreshes of the subspace (T).
        scale: factor of the back-projected step (the paper's alpha).
        projection: 'std' projects the smaller side; 'reverse_std', 'left', 'right'.
        method: 'randomized' (warm-started), 'svd' or 'random'; see `subspace.refresh`.
        oversample, iterations: of the range finder.
        rotate: carries the moments into the new frame at a refresh. The paper leaves them in the old one.
        official: galore-torch's choices: eps is added before the bias is corrected, columns of a new frame are not aligned with the old
            ones, and plain groups decay after the step too. With method='svd' and eps=1e-6 the steps are those of its GaLoreAdamW.
        states: 'fp32' or '8bit' moments (`eightbit.py`); moments below 4096 elements stay in fp32.
        rounding: how a bf16 weight takes its step: 'nearest', or 'stochastic', which does not lose steps below 2^-9 of the weight.
        stagger: spreads the refreshes of the weights over the interval, so that no step bears them all.
        seed: of the range finder, random frames and stochastic rounding. Streams depend on the weight's place and its step alone.
        layerwise: gradients of GaLore groups are projected and freed as soon as they are made, inside the backward; `step` acts at the
            boundary only, so accumulation over micro-batches is exact. A step that refreshes a weight keeps that weight's gradient.
            Clip with `clip_grad_norm_` of this class and clear with its `zero_grad`: the model's own see only what was kept.

    Raises:
        RecipeError: an option out of range, an unknown option of galore-torch, a weight without two dimensions in a GaLore group.
        TrainingError: `layerwise` in a distributed run, whose gradients are not yet averaged when they are freed; a sharded weight in a
            GaLore group.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rank: int | None = None,
        update_interval: int = 200,
        scale: float = 0.25,
        projection: str = "std",
        method: str = "randomized",
        oversample: int = 16,
        iterations: int = 2,
        rotate: bool = False,
        official: bool = False,
        states: str = "fp32",
        rounding: str = "nearest",
        stagger: bool = False,
        seed: int = 0,
        layerwise: bool = False,
    ) -> None:
        if layerwise and torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise TrainingError("layerwise=True frees gradients before they are averaged over the processes; use layerwise=False here")
        defaults = {name: value for name, value in locals().items() if name not in ("self", "params", "layerwise", "__class__")}
        self.layerwise = layerwise
        self._pending: dict[Tensor, Tensor] = {}  # weight -> coordinates of the gradient so far, where it was freed
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("layerwise", False)  # a copy has no hooks
        self._pending = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        _check(group)
        if self.layerwise and group["rank"] is not None:
            here: weakref.ref[GaLore] = weakref.ref(self)
            index = len(self.param_groups) - 1
            for param in group["params"]:
                param.register_post_accumulate_grad_hook(_Free(here, index))

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of every parameter that has a gradient.

        A weight whose gradient is not finite when its subspace is due sits the step out, with a warning: subspace and moments stay, and
        it is tried again at the next one. At other steps gradients are not looked at, as in any optimizer of torch.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None and param not in self._pending:
                    continue
                if param.grad is not None and param.grad.is_sparse:
                    raise TrainingError("GaLore takes no sparse gradients; make the embedding with sparse=False")
                if group["rank"] is None:
                    self._plain_step(param, group)
                else:
                    self._low_rank_step(param, group)
        self._pending.clear()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._pending.clear()
        super().zero_grad(set_to_none)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up what `state_dict` gave, in its own dtypes: the base class would cast frames and 8-bit codes to the weights' dtype."""
        super().load_state_dict({**state_dict, "state": {}})
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for index, param in zip(saved, params, strict=True):
            if index in state_dict["state"]:
                entries: Mapping[str, Any] = state_dict["state"][index]
                self.state[param] = {
                    key: value.to(param.device, copy=True) if isinstance(value, Tensor) else value for key, value in entries.items()
                }

    def state_bytes(self) -> int:
        """Bytes of all tensors in the state."""
        return sum(v.numel() * v.element_size() for state in self.state.values() for v in state.values() if isinstance(v, Tensor))

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scales all gradients so that their norm together is at most `max_norm`; returns the norm before.

        Of a gradient that was freed, the coordinates count: their norm is that of its part inside the subspace.
        """
        held = [self._pending.get(param, param.grad) for group in self.param_groups for param in group["params"]]
        gradients = [gradient for gradient in held if gradient is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        for gradient in gradients:
            gradient.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0).to(gradient.device))
        return norm

    # one weight

    def _plain_step(self, param: Tensor, group: dict[str, Any]) -> None:
        state = self.state[param]
        state.setdefault("step", 0)
        gradient = _wide(param.grad)
        after = group["official"]
        lr, decay = float(group["lr"]), group["weight_decay"]
        weight = _wide(param)
        if decay and not after:
            weight.mul_(1 - lr * decay)
        first, denominator, size = _adam(state, gradient, group)
        weight.addcdiv_(first, denominator, value=-size)
        if decay and after:
            weight.mul_(1 - lr * decay)
        self._write(param, weight, group)

    def _low_rank_step(self, param: Tensor, group: dict[str, Any]) -> None:
        state = self._begun(param, group)
        low = self._pending.get(param)
        if param.grad is not None:
            gradient = _matrix(param.grad)
            if low is None and _due(state, group) and not self._refresh(param, gradient, group):
                return
            part = project(gradient, state["frame"], state["side"])
            low = part if low is None else low + part
        assert low is not None
        first, denominator, size = _adam(state, low, group)
        direction, frame = first / denominator, state["frame"]
        weight, size = _wide(param), -size * group["scale"]
        if weight.dim() == 2:  # one product, and nothing of the weight's size beside it
            weight.addmm_(*((frame, direction) if state["side"] == "left" else (direction, frame.T)), alpha=size)
        else:
            weight.add_(back(direction, frame, state["side"]).view(weight.shape), alpha=size)
        if group["weight_decay"]:
            weight.mul_(1 - float(group["lr"]) * group["weight_decay"])
        self._write(param, weight, group)

    def _begun(self, param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        state = self.state[param]
        if "side" not in state:
            projected = [p for g in self.param_groups if g["rank"] is not None for p in g["params"]]
            place = next(i for i, other in enumerate(projected) if other is param)
            offset = place * group["update_interval"] // len(projected) if group["stagger"] else 0
            out = len(param)
            side = side_of(out, param.numel() // out, group["projection"])
            state.update(step=0, place=place, offset=offset, retry=0, side=side)
        return state

    def _refresh(self, param: Tensor, gradient: Tensor, group: dict[str, Any]) -> bool:
        """A new frame, or False where the gradient was not finite."""
        state = self.state[param]
        previous = state.get("frame")
        generator = site_generator(group["seed"], str(state["place"]), f"refresh {state['step']}")
        made = refresh(
            gradient,
            group["rank"],
            state["side"],
            previous,
            group["method"],
            generator,
            group["oversample"],
            group["iterations"],
            align=not group["official"],
        )
        if made.note == NOT_FINITE:
            warnings.warn(
                f"{self._name(param)} sits this step out: its gradient is not finite, and its subspace is due; the old one stays",
                stacklevel=4,
            )
            return False
        state["retry"] = int(bool(made.note))
        state["frame"] = made.frame
        if group["rotate"] and previous is not None and "exp_avg" in state and previous is not made.frame:
            first, second = _moment(state, "exp_avg", True), _moment(state, "exp_avg_sq", False)
            _keep(state, group, *rotate(first, second, previous, made.frame, state["side"]))
        return True

    def _name(self, param: Tensor) -> str:
        for number, group in enumerate(self.param_groups):
            for place, other in enumerate(group["params"]):
                if other is param:
                    return group["param_names"][place] if "param_names" in group else f"weight {place} of group {number}"
        return "a weight"

    def _write(self, param: Tensor, weight: Tensor, group: dict[str, Any]) -> None:
        if weight is param:
            return
        generator = None
        if group["rounding"] == "stochastic":
            state = self.state[param]
            seed = site_generator(group["seed"], str(state.get("place", self._name(param))), f"rounding {state['step']}").initial_seed()
            generator = torch.Generator(param.device).manual_seed(seed)
        param.copy_(rounded_to(weight, param.dtype, generator))


class _Free:
    """The hook of one weight under `layerwise`: adds the coordinates of its gradient to those that wait, and frees the gradient."""

    def __init__(self, optimizer: weakref.ref[GaLore], group: int) -> None:
        self.optimizer, self.group = optimizer, group

    @torch.no_grad()
    def __call__(self, param: Tensor) -> None:
        optimizer = self.optimizer()
        if optimizer is None or param.grad is None:
            return
        group = optimizer.param_groups[self.group]
        state = optimizer._begun(param, group)
        if _due(state, group):
            return  # the subspace is taken from the whole gradient
        low = project(_matrix(param.grad), state["frame"], state["side"])
        pending = optimizer._pending
        pending[param] = pending[param].add_(low) if param in pending else low
        param.grad = None


def _due(state: Mapping[str, Any], group: Mapping[str, Any]) -> bool:
    return "frame" not in state or bool(state["retry"]) or (state["step"] - state["offset"]) % group["update_interval"] == 0


def _wide(tensor: Tensor | None) -> Tensor:
    """The tensor itself, or an fp32 copy of one in half precision."""
    assert tensor is not None
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _matrix(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return gradient if gradient.dim() == 2 else gradient.reshape(len(gradient), -1)


def _moment(state: Mapping[str, Any], key: str, signed: bool) -> Tensor:
    held = state[key]
    return dequantize(Quantized(held, state[f"{key}_absmax"]), signed) if held.dtype == torch.uint8 else held


def _keep(state: dict[str, Any], group: Mapping[str, Any], first: Tensor, second: Tensor) -> None:
    if group["states"] == "8bit" and first.numel() >= SMALL:
        state["exp_avg"], state["exp_avg_absmax"] = quantize(first)
        state["exp_avg_sq"], state["exp_avg_sq_absmax"] = quantize(second, signed=False, positive=True)
    else:
        state["exp_avg"], state["exp_avg_sq"] = first, second


def _adam(state: dict[str, Any], gradient: Tensor, group: Mapping[str, Any]) -> tuple[Tensor, Tensor, float]:
    """Takes a gradient into the moments. Returns (first moment, denominator, step size): the step is size * first / denominator."""
    beta1, beta2 = group["betas"]
    if "exp_avg" in state:
        first = _moment(state, "exp_avg", True).to(gradient.dtype)
        second = _moment(state, "exp_avg_sq", False).to(gradient.dtype)
    else:
        first, second = torch.zeros_like(gradient), torch.zeros_like(gradient)
    first.lerp_(gradient, 1 - beta1)
    second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    state["step"] += 1
    corrections = 1 - beta1 ** state["step"], math.sqrt(1 - beta2 ** state["step"])
    size = float(group["lr"]) / corrections[0]
    if group["official"]:
        denominator, size = second.sqrt().add_(group["eps"]), size * corrections[1]
    else:
        denominator = second.sqrt().div_(corrections[1]).add_(group["eps"])
    _keep(state, group, first, second)  # the step itself is made from what was not yet rounded to 8 bits
    return first, denominator, size


def _check(group: Mapping[str, Any]) -> None:
    for theirs, ours in _THEIR_NAMES.items():
        if theirs in group:
            raise RecipeError(f"{theirs!r} is galore-torch's name; call it {ours!r} here")
    for name, choices in _CHOICES.items():
        if group[name] not in choices:
            raise RecipeError(f"{name}={group[name]!r} is unknown; use one of {', '.join(choices)}")
    side_of(1, 1, group["projection"])
    for name in ("lr", "eps", "weight_decay", "scale"):
        if not (math.isfinite(group[name]) and group[name] >= 0):
            raise RecipeError(f"{name}={group[name]!r} must be a finite number, 0 or more")
    for beta in group["betas"]:
        if not 0 <= beta < 1:
            raise RecipeError(f"betas={group['betas']!r} must lie in [0, 1)")
    if group["update_interval"] < 1:
        raise RecipeError(f"update_interval={group['update_interval']!r} must be at least 1")
    for param in group["params"]:
        if group["rounding"] == "stochastic" and param.dtype == torch.float16:
            raise RecipeError("rounding='stochastic' is for bf16 weights; hold fp16 ones in fp32, or round to the nearest")
        if group["rank"] is not None:
            if param.dim() < 2:
                raise RecipeError(f"a weight of shape {tuple(param.shape)} has no subspace; put it into a group without a rank")
            if hasattr(param, "device_mesh"):
                raise TrainingError(
                    "a sharded weight (DTensor) has no subspace of its own; shard with FSDP only what is in a group without a rank"
                )
            clamped(group["rank"], len(param), param.numel() // len(param))


def galore_groups(model: nn.Module, rank: int, targets: Any = "all-linear", **options: Any) -> list[dict[str, Any]]:
    """Parameter groups for `GaLore`: linear weights with a rank, and everything else that trains without one.

    A weight stays plain when it is not matched, is shared with another module (a tied head), or has min(shape) <= 2 * rank, where a
    subspace saves nothing: so do LoRA's own factors.

    Args:
        model: any model.
        rank: of the GaLore group.
        targets: which linear layers, as in a recipe; every one but the output head unless said otherwise.
        **options: further entries of the GaLore group, such as scale=0.25.

    Raises:
        TargetError: no weight is left for the GaLore group, or a pattern matches nothing.
    """
    tied = tied_names(model)
    weights = {id(module._parameters.get("weight")) for module, _ in find_sites(model, read_targets(targets)).values()}
    low: list[tuple[str, nn.Parameter]] = []
    plain: list[tuple[str, nn.Parameter]] = []
    for name, param in model.named_parameters():
        if param.requires_grad:
            wanted = id(param) in weights and len(tied.get(id(param), ())) < 2 and min(param.shape) > 2 * rank
            (low if wanted else plain).append((name, param))
    if not low:
        raise TargetError(f"no weight has min(shape) > 2 * rank = {2 * rank} among those that train; lower the rank or name other targets")
    return [{"params": low, "rank": rank, **options}, *([{"params": plain, "rank": None}] if plain else [])]
