"""The operation under autocast, checkpointing, copies and the compiler; what it keeps for the backward; what it leaves alone."""

import copy
import io
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from toys import Counted, Mlp, Qkv, one, only_site, saved_bytes, saved_storages, stir

import rankwise as rw
from rankwise.recipe import Recipe
from rankwise.recipes import RECIPES
from rankwise.updates import LowRank
from rankwise.updates.lowrank import LowRankUpdate

torch.set_num_threads(1)


class GatedUpdate(LowRankUpdate):
    """For tests: a pair whose ranks are gated per token, by the call's own x."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.router = nn.Parameter(torch.randn(self.down.shape, generator=torch.Generator().manual_seed(2)))

    def token_core(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.sigmoid(x.float() @ self.router.T).to(h.dtype) * h


@dataclass(frozen=True)
class Gated(LowRank):
    name: ClassVar[str] = "gated"
    module: ClassVar[Any] = GatedUpdate
    constant_core: ClassVar[bool] = False


def recipe_of(name: str, **fields: Any) -> Recipe:
    """A recipe of rank 4 on every linear layer; 'gated' has a token core."""
    if name == "gated":
        return Recipe(update=Gated(), rank=4, **fields)
    return RECIPES[name](rank=4, **fields)


def made(name: str, model: nn.Module | None = None, **fields: Any) -> nn.Module:
    """An adapted small model, away from its start."""
    torch.manual_seed(0)
    model = Mlp() if model is None else model
    return stir(rw.adapt(model, recipe_of(name, **fields)))


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Name -> gradient, which is then cleared."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and bool(left) and all(torch.equal(left[name], right[name]) for name in left)


NAMES = ("lora", "dora", "vera", "moslora", "pissa", "lora-fa", "propulsion", "gated")


@pytest.mark.parametrize("name", NAMES)
def test_autocast_runs_in_bf16_and_stays_near_fp32(name: str) -> None:
    model = made(name)
    x = torch.randn(3, 10, 24, generator=torch.Generator().manual_seed(1))
    g = torch.randn(3, 10, 16, generator=torch.Generator().manual_seed(2))
    exact = model(x)
    exact.backward(g)
    wanted = gradients_of(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    y.backward(g.bfloat16())
    got = gradients_of(model)
    # two layers, each with a few roundings of 2^-8
    assert (y.float() - exact).abs().max() <= 4 * 2**-8 * exact.abs().max()
    for key, want in wanted.items():
        assert got[key].dtype == torch.float32
        assert (got[key] - want).norm() <= 4 * 2**-8 * want.norm(), key


@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_with_dropout_and_two_forwards_before_a_backward(name: str) -> None:
    """Same random stream, same numbers: the recomputed mask, gate and norm are those of the forward, bit for bit."""
    fields = {} if name == "propulsion" else {"dropout": 0.3}
    model = made(name, **fields)
    first, second = (torch.randn(2, 6, 24, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(3)
        outputs = [
            checkpoint(model, x.clone().requires_grad_(), use_reentrant=False) if checkpointed else model(x.clone().requires_grad_())
            for x in (first, second)
        ]
        sum((y * (n + 1)).square().mean() for n, y in enumerate(outputs)).backward()
        found.append(gradients_of(model) | {"y0": outputs[0].detach(), "y1": outputs[1].detach()})
    assert same(*found)
    if fields:
        torch.manual_seed(4)
        assert not torch.equal(model(first), found[0]["y0"])  # dropout does act


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_pickles_are_whole_and_apart(name: str) -> None:
    model = made(name, dropout=0.0 if name == "propulsion" else 0.2)
    x = torch.randn(5, 24)
    model(x).square().mean().backward()  # copies after a backward, with gradients about
    model.zero_grad(set_to_none=True)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    copies = [copy.deepcopy(model), torch.load(stream, weights_only=False)]
    model.eval()
    wanted = model(x)
    for other in copies:
        other.eval()
        assert torch.equal(other(x), wanted)
        stir(other, seed=9)
        assert not torch.equal(other(x), wanted)  # its own parameters act
        assert torch.equal(model(x), wanted)  # and only its own
        other(x).square().mean().backward()
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["lora", "dora", "vera", "moslora", "pissa"])
def test_compiles_as_one_graph(name: str, backend: str) -> None:
    torch._dynamo.reset()
    model = made(name)
    x = torch.randn(3, 5, 24)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for mode in (True, False):
        model.train(mode)
        wanted = model(x)
        wanted.square().mean().backward()
        eager = gradients_of(model)
        got = compiled(x)
        got.square().mean().backward()
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
        graph = gradients_of(model)
        assert graph.keys() == eager.keys()
        for key, want in eager.items():
            assert (graph[key] - want).abs().max() <= 1e-5 * want.abs().max(), key
    # a changed factor is seen by the compiled model, in evaluation too
    with torch.no_grad():
        before = compiled(x)
        stir(model, seed=4)
        assert not torch.equal(compiled(x), before)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-6)


def test_compiles_with_dropout() -> None:
    torch._dynamo.reset()
    model = made("lora", dropout=0.5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 24)
    assert not torch.equal(compiled(x), compiled(x))
    model.eval()
    assert torch.equal(compiled(x), compiled(x))


# --- what is kept ----------------------------------------------------------------------------------------------------------------------

TOKENS, WIDTH, RANK = 48, 32, 4
KEPT = {  # elements per token that one group of three layers (q, k, v; 32 -> 32) may keep
    "lora": WIDTH + 3 * RANK,
    "dora": WIDTH + 3 * RANK + 3 * WIDTH,
    "moslora": WIDTH + 3 * RANK,
    "pissa": WIDTH + 3 * RANK,
    "lora-fa": 3 * RANK,
    "vera": RANK,
    "propulsion": 3 * WIDTH,
}


@pytest.mark.parametrize(("name", "p"), [(name, p) for name in KEPT for p in (0.0, 0.3) if not (name == "propulsion" and p)])
def test_saved_bytes_are_what_the_plan_says_and_no_more(name: str, p: float) -> None:
    model = made(name, Qkv(WIDTH, WIDTH).bfloat16(), dropout=p)
    x = torch.randn(TOKENS, WIDTH).bfloat16().requires_grad_()  # a block's input: its gradient is wanted
    modules = [model.q_proj, model.k_proj, model.v_proj]
    got = saved_bytes(model, lambda: [module(x) for module in modules])
    constants = gain_constants(model)  # gain, norm, magnitude: vectors of out, in fp32
    assert constants <= (3 * 6 * WIDTH * 4 if name in ("dora", "propulsion") else 0)
    assert got - constants == KEPT[name] * TOKENS * 2
    assert model.rankwise.plan.saved_bytes_per_token() == KEPT[name] * 2


def gain_constants(model: nn.Module) -> int:
    """Bytes kept that do not grow with the tokens: measured at zero tokens."""
    empty = torch.zeros(0, WIDTH).bfloat16().requires_grad_()
    return saved_bytes(model, lambda: [module(empty) for module in (model.q_proj, model.k_proj, model.v_proj)])


def test_x_is_not_kept_alive_where_down_is_frozen() -> None:
    model = made("lora-fa", one(WIDTH, WIDTH), dropout=0.3)
    x = torch.randn(TOKENS, WIDTH, requires_grad=True)
    with saved_storages(model) as found:
        y = model(x)
    assert x.untyped_storage().data_ptr() not in found
    assert y.untyped_storage().data_ptr() not in found


# --- aliasing --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_x_is_left_alone_and_the_output_is_the_callers(name: str) -> None:
    """x has another reader, and the caller writes into the output: neither reaches a tensor kept for the backward."""
    model = made(name, one(24, 24))
    x = torch.randn(7, 24, requires_grad=True)
    before = x.detach().clone()
    (model(x) + torch.exp(x)).square().sum().backward()
    wanted, of_x = gradients_of(model), x.grad.clone()
    x.grad = None
    y = model(x)
    y += torch.exp(x)  # in place, into the operation's output
    y.square_().sum().backward()
    assert torch.equal(x, before)
    got = gradients_of(model)
    for key, want in (wanted | {"x": of_x}).items():
        torch.testing.assert_close((got | {"x": x.grad})[key], want, rtol=1e-5, atol=1e-5, msg=key)


def test_one_output_gradient_shared_by_two_readers_is_not_written_into() -> None:
    model = made("lora", one(24, 24, bias=False))
    x = torch.randn(7, 24, requires_grad=True)
    y = model(x)
    g = torch.randn(7, 24)
    kept = g.clone()
    y.backward(g, retain_graph=True)
    once = x.grad.clone()
    y.backward(g)
    assert torch.equal(g, kept)
    assert torch.equal(x.grad, once + once)


def test_an_opaque_base_is_called_once_per_forward_and_its_output_is_not_written_into() -> None:
    class Remembering(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.last = super().forward(x)
            return self.last

    x = torch.randn(6, 24)
    model = rw.adapt(nn.Sequential(Remembering(24, 16)), recipe_of("lora"))
    stir(model)
    y = model(x)
    base = only_site(model).base_layer
    assert torch.equal(base.last, nn.functional.linear(x, base.weight, base.bias))
    assert not torch.equal(y, base.last)
    counted = stir(rw.adapt(nn.Sequential(Counted(24, 16)), recipe_of("lora", dropout=0.1)))
    counted(x)
    assert only_site(counted).base_layer.calls == 1
