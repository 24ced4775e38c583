"""The frozen layers between the sites, made to keep less for the backward: norms and gated MLPs of the families this project knows.

A layer takes part if its class computes what a form here computes, bit for bit: that is tried once on a few random rows, never guessed from
a name alone. Its forward is then replaced on the instance; nothing else changes, and in evaluation, under the compiler, without gradients
or with a weight that trains the layer's own forward runs. What the output head and the loss keep is in `fused_loss.py`.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from rankwise.kernels.gated import ACTIVATIONS, gated
from rankwise.kernels.norm import normed, reference_normed

_MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(eq=False)
class Lean:
    """A forward that stands on a layer's instance; copies and pickles of the model keep it with the layer that it belongs to."""

    module: nn.Module
    form: str

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        plain = args or kwargs or torch.compiler.is_compiling() or not torch.is_grad_enabled() or not x.requires_grad
        if plain or not x.is_floating_point():
            return type(self.module).forward(cast(Any, self.module), x, *args, **kwargs)
        return _FORMS[self.form](self.module, x)


def _norm(one_plus: bool) -> Callable[[Any, Tensor], Tensor]:
    def forward(module: Any, x: Tensor) -> Tensor:
        if module.weight.requires_grad or x.dtype is torch.float64:  # in fp64, where references are made, nothing is rearranged
            return type(module).forward(module, x)
        return normed(x, module.weight, _eps(module), one_plus)

    return forward


def _gated(activation: str) -> Callable[[Any, Tensor], Tensor]:
    def forward(module: Any, x: Tensor) -> Tensor:
        gate, up = module.gate_proj(x), module.up_proj(x)
        return module.down_proj(gated(gate, up, activation))

    return forward


_FORMS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "llama_norm": _norm(one_plus=False),
    "gemma_norm": _norm(one_plus=True),
    **{activation: _gated(activation) for activation in ACTIVATIONS},
}


def install(model: nn.Module) -> None:
    """Gives every layer of a base that a form fits its lean forward. Call before anything is adapted."""
    known: dict[object, str | None] = {}
    for module in model.modules():
        if "forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks:
            continue
        key = _kind(module)
        if key is None:
            continue
        if key not in known:
            known[key] = _form_of(module)
        form = known[key]
        if form is not None:
            module.__dict__["forward"] = Lean(module, form)


def uninstall(model: nn.Module) -> None:
    """The layers' own forwards again."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), Lean):
            del module.__dict__["forward"]


def _eps(module: Any) -> float:
    return module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps


def _kind(module: nn.Module) -> object | None:
    """What decides whether a form fits: modules of one kind are tried once. None for what no form can fit."""
    weight = module._parameters.get("weight")
    if weight is not None:
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        norm = weight.dim() == 1 and isinstance(eps, float) and not isinstance(module, nn.LayerNorm) and not weight.is_meta
        return (type(module), eps, weight.dtype) if norm and len(module._parameters) == 1 and not module._modules else None
    if not all(name in module._modules for name in _MLP) or not hasattr(module, "act_fn"):
        return None
    return type(module), _activation(module.act_fn)


def _activation(act: Any) -> str | None:
    """Which activation a module or function is, by what it makes of some numbers."""
    x = torch.linspace(-4, 4, 33)
    candidates = {"silu": nn.SiLU(), "gelu": nn.GELU(), "gelu_tanh": nn.GELU(approximate="tanh")}
    return next((name for name, plain in candidates.items() if torch.equal(act(x), plain(x))), None)


@torch.no_grad()
def _form_of(module: Any) -> str | None:
    """The form whose values are the layer's own, to the bit; None if there is none."""
    if "weight" not in module._parameters:
        activation = _activation(module.act_fn)
        return activation if activation is not None and _is_plain_mlp(module) else None
    generator = torch.Generator().manual_seed(0)
    tried = copy.deepcopy(module)  # with a weight that nothing else can be mistaken for
    weight = tried.weight = nn.Parameter(torch.randn(module.weight.shape, generator=generator).to(module.weight), requires_grad=False)
    found = ["llama_norm", "gemma_norm"]
    for dtype in (weight.dtype, torch.float32, torch.bfloat16):
        x = torch.randn(5, weight.numel(), generator=generator).to(weight.device, dtype)
        own = type(module).forward(tried, x)
        for form in tuple(found):
            formed = reference_normed(x, weight, _eps(module), one_plus=form == "gemma_norm")
            if formed.dtype != own.dtype or not torch.equal(formed, own):
                found.remove(form)
    return found[0] if found else None


def _is_plain_mlp(module: Any) -> bool:
    """Whether the class computes down(act(gate(x)) * up(x)) and nothing else: its forward runs on a stand-in with simple layers."""

    class Plain:
        act_fn = module.act_fn
        gate_proj = staticmethod(lambda x: 2 * x + 1)
        up_proj = staticmethod(lambda x: 3 - x)
        down_proj = staticmethod(lambda x: x * x + 5)

    x = torch.linspace(-2, 2, 9)
    try:
        own = type(module).forward(cast(Any, Plain()), x)
    except Exception:  # it reads something else of itself: another kind of layer
        return False
    plain = Plain.down_proj(Plain.act_fn(Plain.gate_proj(x)) * Plain.up_proj(x))
    return isinstance(own, Tensor) and torch.equal(own, plain)
