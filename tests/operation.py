"""What the tests of the operation share: random terms, leaves, both forms, base layers of every kind, and the comparison."""

import torch
from reference import Terms, forward, gradients
from torch import Tensor, nn
from toys import Counted

from rankwise.equation import Factors, Start, TokenCore, drop, fused_form, operate, reference_form
from rankwise.storage import storage_of
from rankwise.storage.dense import DENSE

SEED = 1234  # of the dropout mask, where there is one
FP64 = 1e-12  # relative to the largest entry; fp64 has 2.2e-16 and the sums have up to 50 terms
ROLES = ("down", "up", "core", "tail", "gain")


def draw(width: int, out: int, rank: int, core: str, tail: bool, gain: bool, start: bool, bias: bool, seed: int = 0) -> Terms:
    """Random terms in fp64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return Terms(
        normal(out, width),
        normal(rank, width),
        normal(out, rank),
        0.7,
        {"none": None, "vector": normal(rank), "matrix": normal(rank, rank)}[core],
        normal(out) if tail else None,
        normal(out) if gain else None,
        normal(out) if bias else None,
        (normal(rank, width), normal(out, rank)) if start else None,
    )


def leaves(terms: Terms, x: Tensor, dtype: torch.dtype = torch.float64, frozen: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Name -> leaf tensor, of x and of the terms that train."""
    found = {"x": x.detach().clone().requires_grad_()}
    for name in ROLES:
        value = getattr(terms, name)
        if value is not None:
            found[name] = value.to(dtype).clone().requires_grad_(name not in frozen)
    return found


def run(
    form: str, terms: Terms, inputs: dict[str, Tensor], p: float, layer: nn.Module | None = None, token_core: TokenCore | None = None
) -> Tensor:
    """One of the two forms, or the operation over a layer, on leaf tensors."""
    factors = Factors(inputs["down"], inputs["up"], inputs.get("core"), inputs.get("tail"), terms.scaling)
    masters = inputs["down"].dtype
    start = None if terms.start is None else Start(*(t.to(masters) for t in terms.start))
    gain = inputs.get("gain")
    weight = terms.weight.to(inputs["x"].dtype)
    bias = None if terms.bias is None else terms.bias.to(inputs["x"].dtype)
    if layer is not None:
        return operate(inputs["x"], layer, storage_of(layer), factors, start, gain, p, token_core)
    if form == "fused":
        return fused_form(inputs["x"], DENSE, (weight,), bias, factors, start, gain, p, token_core)
    return reference_form(inputs["x"], lambda t: nn.functional.linear(t, weight, bias), bias, factors, start, gain, p, token_core)


def mask_of(x: Tensor, p: float) -> Tensor:
    return drop(torch.ones_like(x), p, SEED) if p else torch.ones_like(x)


def near(got: Tensor | None, want: Tensor, tolerance: float, what: str = "") -> None:
    """Largest error relative to the largest entry of what is wanted."""
    assert got is not None, what
    assert got.shape == want.shape, what
    if want.numel():
        error = (got.detach().double() - want.double()).abs().max() / want.abs().max().clamp_min(1e-30)
        assert error <= tolerance, f"{what}: {error:.2e} > {tolerance:.2e}"


def compare(form: str, terms: Terms, x: Tensor, p: float, frozen: tuple[str, ...] = (), layer: nn.Module | None = None) -> None:
    """Forward and all gradients against the closed forms, in fp64; frozen terms get none."""
    inputs = leaves(terms, x, frozen=frozen)
    before = inputs["x"].detach().clone()
    y = run(form, terms, inputs, p, layer)
    flat, mask = x.reshape(-1, x.shape[-1]), mask_of(x, p).reshape(-1, x.shape[-1])
    near(y, forward(terms, flat, mask).view(*x.shape[:-1], len(terms.weight)), FP64, "y")
    g = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(5))
    y.backward(g)
    assert torch.equal(inputs["x"], before), "x was modified"
    wanted = gradients(terms, flat, g.reshape(-1, g.shape[-1]), mask)
    for name, leaf in inputs.items():
        if name in frozen:
            assert leaf.grad is None, name
        else:
            near(leaf.grad, wanted[name].view(leaf.shape), FP64, name)


def laid_out(shape: tuple[int, ...], layout: str) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    if layout == "transposed" and len(shape) > 1:
        return torch.randn(*shape[::-1], dtype=torch.float64, generator=generator).permute(*reversed(range(len(shape))))
    if layout == "strided":
        return torch.randn(*shape[:-1], shape[-1] * 2, dtype=torch.float64, generator=generator)[..., ::2]
    if layout == "expanded" and len(shape) > 1:
        return torch.randn(*[1] * (len(shape) - 1), shape[-1], dtype=torch.float64, generator=generator).expand(shape)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def base_layer(kind: str, terms: Terms) -> nn.Module:
    """A base layer of a kind with the terms' weight and bias, frozen (but 'trained', whose weight trains)."""
    out, width = terms.weight.shape
    if kind == "conv1d":
        from transformers.pytorch_utils import Conv1D

        layer = Conv1D(out, width).double()
        layer.weight.data = terms.weight.T.contiguous()
        layer.bias.data = torch.zeros(out, dtype=torch.float64)
        if terms.bias is None:
            layer.register_parameter("bias", None)
            layer.forward = lambda x: x @ layer.weight  # Conv1D itself needs a bias
    else:
        layer = (Counted if kind == "subclass" else nn.Linear)(width, out, terms.bias is not None, dtype=torch.float64)
        layer.weight.data = terms.weight.clone()
    if terms.bias is not None:
        layer.bias.data = terms.bias.clone()
    layer.requires_grad_(kind == "trained")
    if kind == "hooked":
        layer.calls = 0
        layer.register_forward_hook(lambda module, args, y: setattr(module, "calls", module.calls + 1))
    return layer
