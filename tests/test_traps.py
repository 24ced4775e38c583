"""The traps of the design, each silent, each as a test (2 and 3 are about routing; 2's core, a token core under checkpointing with two
forwards before a backward, is in test_modes.py)."""

import copy
import gc
import io
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from toys import Mlp, Qkv, one, only_site, stir

import rankwise as rw
from rankwise.errors import RecipeError
from rankwise.gains import Dora
from rankwise.recipe import Recipe
from rankwise.recipes import RECIPES
from rankwise.sites import AdaptedLinear, adapted_sites
from rankwise.updates import LowRank

torch.set_num_threads(1)
EXACT_STARTS = ("lora", "rslora", "lora-plus", "lora-fa", "dora", "pissa", "milora-svd", "olora", "moslora", "vera", "propulsion")


def made(name: str, model: nn.Module, **fields: object) -> nn.Module:
    return rw.adapt(model, RECIPES[name](**({} if name == "propulsion" else {"rank": 4}) | fields))


# --- 1: stale caches -------------------------------------------------------------------------------------------------------------------


def dense_output(site: AdaptedLinear, x: Tensor) -> Tensor:
    """y from the site's raw parameters, nothing that the package keeps: lora and dora."""
    layer, update = site.base_layer, site.update
    v = (layer.weight + site.site.scaling * update.up @ update.down).double()
    if site.gain is not None:
        v = v * ((site.gain.magnitude0 + site.gain.magnitude).double() / v.norm(dim=1))[:, None]
    return linear(x.double(), v, layer.bias.double())


def fused_adamw(model: nn.Module, x: Tensor) -> None:
    _step(model, x, rw.optimizer(model, lr=0.05, fused=True))


def adamw_8bit(model: nn.Module, x: Tensor) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    optimizer = rw.optimizer(model, lr=0.05, kind=bitsandbytes.optim.AdamW8bit, min_8bit_size=16)
    _step(model, x, optimizer)
    assert any(state["state1"].dtype == torch.uint8 for state in optimizer.state.values())


def _step(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> None:
    before = next(p for p in model.parameters() if p.requires_grad)._version
    model(x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    # the trap itself: these optimizers do not count versions (should one begin to, this test would prove less)
    assert next(p for p in model.parameters() if p.requires_grad)._version == before


def data_write(model: nn.Module, x: Tensor) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn(parameter.shape))


def data_swap(model: nn.Module, x: Tensor) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data + 0.1 * torch.randn(parameter.shape)


def load(model: nn.Module, x: Tensor) -> None:
    model.load_state_dict(stir(copy.deepcopy(model), seed=7).state_dict())


def copied(model: nn.Module, x: Tensor) -> None:
    """A copy carries no cache along: it takes the factors of another model and must follow them."""
    other = copy.deepcopy(model)
    data_write(other, x)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        mine.data = theirs.data


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("change", [fused_adamw, adamw_8bit, data_write, data_swap, load, copied])
@pytest.mark.parametrize("name", ["lora", "dora"])
@pytest.mark.check("dora", 7)
def test_1_every_change_of_the_factors_reaches_the_next_forward(name: str, change: Callable, training: bool) -> None:
    model = stir(made(name, one(32, 24)))
    x = torch.randn(6, 32)
    model.train(training)
    with torch.no_grad():
        first = model(x)
        assert torch.equal(model(x), first)  # whatever is kept is kept now
    change(model, x)
    with torch.no_grad():
        second = model(x)
    assert (second - first).abs().max() > 1e-3
    torch.testing.assert_close(second.double(), dense_output(only_site(model), x), rtol=1e-5, atol=1e-5)
    model.train(not training)
    with torch.no_grad():
        torch.testing.assert_close(model(x).double(), dense_output(only_site(model), x), rtol=1e-5, atol=1e-5)


def test_1_the_kept_norm_does_not_outlive_a_switch_of_modes_nor_follow_a_copy() -> None:
    model = stir(made("dora", one(16, 16))).eval()
    gain = only_site(model).gain
    with torch.no_grad():
        model(torch.randn(2, 16))
    assert gain._evaluated is not None
    assert only_site(copy.deepcopy(model)).gain._evaluated is None
    model.train()
    assert gain._evaluated is None


def test_1_lora_fa_follows_a_loaded_down_and_corrects_once() -> None:
    """The Gram matrix is constant until `down` is loaded; a second optimizer does not correct the corrected gradient."""
    model = rw.adapt(one(16, 12), RECIPES["lora-fa"](variant="corrected", rank=4, init="kaiming"))
    rw.optimizer(model)
    rw.optimizer(model)
    x, g = torch.randn(9, 16), torch.randn(9, 12)
    site = only_site(model)
    for _ in range(2):
        model.zero_grad()
        model(x).backward(g)
        down, s = site.update.down.double(), site.site.scaling
        wanted = (g.double().T @ x.double()) @ down.T @ torch.linalg.inv(down @ down.T) / s
        torch.testing.assert_close(site.update.up.grad.double(), wanted, rtol=1e-4, atol=1e-5)
        state = model.state_dict()
        state["0.update.down"] = torch.randn(4, 16)
        model.load_state_dict(state)


# --- 4 to 6: precision of magnitudes, slices, shared tensors ---------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "slot", "options"), [("dora", "magnitude", {}), ("propulsion", "z", {"degree": 1})])
def test_4_a_cast_of_the_parameters_to_bf16_keeps_the_digits_of_the_gain(name: str, slot: str, options: dict[str, int]) -> None:
    """A gain of about 1 in bf16 has steps of 2^-8; what is cast here is its distance from the start, which keeps 8 digits of its own."""
    model = stir(made(name, one(64, 48), **options), size=1e-4)
    site, gain = only_site(model), only_site(model).gain
    factors = None if site.update is None else site.update.factors()

    def acting() -> Tensor:
        value = gain(site.base_layer, site.storage, factors, None).detach()
        assert value.dtype == torch.float32
        return value.double()

    exact, delta = acting(), getattr(gain, slot).detach().double()
    length = gain.norm(site.base_layer, site.storage, factors, None).detach().double() if name == "dora" else 1.0
    for parameter in model.parameters():  # what FSDP2's mixed precision does: parameters, not buffers
        parameter.data = parameter.data.bfloat16()
    assert getattr(gain, slot).dtype == torch.bfloat16
    assert ((acting() - exact).abs() <= 2**-8 * delta.abs() / length + 2**-22).all()
    assert ((exact.bfloat16().double() - exact).abs() > 2**-12).any()  # the gain itself would have lost them
    if name == "dora":  # a file gets the sum, in full
        assert gain.saved()[slot].dtype == torch.float32
    assert torch.isfinite(model(torch.randn(3, 64).bfloat16())).all()


@pytest.mark.parametrize("base", ["keep", "fold"])
@pytest.mark.parametrize("name", ["pissa", "milora-svd", "olora"])
def test_5_no_factor_keeps_a_decomposition_alive(name: str, base: str) -> None:
    site = only_site(made(name, one(48, 40), base=base))
    tensors = [*site.offset.buffers(), *site.update.parameters()]
    assert len(tensors) == 4
    for tensor in tensors:
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 4


def test_6_what_sites_share_has_one_registered_owner() -> None:
    model = made("vera", Qkv(), rank=64)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for other in (model, copy.deepcopy(model), torch.load(stream, weights_only=False)):
        listed = [id(t) for _, t in (*other.named_parameters(remove_duplicate=False), *other.named_buffers(remove_duplicate=False))]
        assert len(listed) == len(set(listed))
        pools = {id(site.update.pool) for site in adapted_sites(other).values()}
        registered = [module for module in other.modules() if type(module).__name__ == "Pool"]
        assert pools == {id(registered[0])}
        assert len(registered) == 1
    storages = [{t.untyped_storage().data_ptr() for t in m.buffers()} for m in (model, copy.deepcopy(model))]
    assert storages[0].isdisjoint(storages[1])


def test_6_a_shared_projection_serves_each_member_once_per_input() -> None:
    """The same x again, without the other members in between, is a new forward: its own graph and its own dropout mask."""
    model = stir(made("vera", Qkv(), rank=8, dropout=0.5))
    x = torch.randn(4, 32, requires_grad=True)
    outputs = []
    for _ in range(2):
        outputs.append(model.q_proj(x))
        outputs[-1].square().sum().backward()
    assert not torch.equal(*outputs)
    model(x)
    assert model.q_proj.shared.group._made.value is None  # nothing is held once all members came
    assert model.q_proj.shared.group is model.k_proj.shared.group


# --- 7 and 8 ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*EXACT_STARTS, "corrected lora-fa"])
def test_7_models_with_an_optimizer_copy_and_pickle_at_any_moment(name: str) -> None:
    corrected = name == "corrected lora-fa"
    model = made("lora-fa", Mlp(), variant="corrected") if corrected else made(name, Mlp())
    optimizer = rw.optimizer(model, lr=0.01)
    x = torch.randn(4, 24)
    for moment in ("fresh", "forward", "backward", "step"):
        if moment == "forward":
            model(x[:, None].expand(4, 1, 24))
            loss = model(x).square().sum()
        elif moment == "backward":
            loss.backward()
        elif moment == "step":
            optimizer.step()
        stream = io.BytesIO()
        torch.save(model, stream)
        stream.seek(0)
        for other in (copy.deepcopy(model), torch.load(stream, weights_only=False)):
            assert torch.equal(other(x), model(x))
            again = rw.optimizer(other, lr=0.01)
            other.zero_grad()
            other(x).square().sum().backward()
            again.step()
            assert not torch.equal(other(x), model(x))


def test_7_hooks_do_not_keep_a_model_alive() -> None:
    model = made("lora-fa", Mlp(), variant="corrected")
    optimizer = rw.optimizer(model)
    model(torch.randn(4, 24)).sum().backward()
    optimizer.step()
    gone = weakref.ref(model)
    del model, optimizer
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", EXACT_STARTS)
def test_8_the_base_sees_x_in_its_own_shape_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    base = Mlp(96, 160, 80).to(dtype)
    model = made(name, copy.deepcopy(base))
    for shape in ((96,), (1, 96), (37, 96), (3, 5, 96), (1, 1, 96), (2, 3, 4, 96), (0, 96)):
        x = torch.randn(shape).to(dtype)
        assert torch.equal(model(x), base(x)), shape
        with rw.disabled(model):
            assert torch.equal(model(x), base(x)), shape


# --- 9: what is not expressible is refused ---------------------------------------------------------------------------------------------


class TokenCore(LowRank):
    """Stands for the mixtures, whose cores depend on the token."""

    constant_core = False


@pytest.mark.check("dora", 9)
def test_9_forms_that_the_equation_does_not_have_are_refused_with_the_reason() -> None:
    with pytest.raises(RecipeError, match="second product with the base weight"):
        Dora(dropout="paper")
    with pytest.raises(RecipeError, match="second product with the base weight"):
        RECIPES["lora"](gain={"name": "dora", "dropout": "paper"})
    with pytest.raises(RecipeError, match="scales x"):
        Dora(axis="in")
    with pytest.raises(RecipeError, match="token to token"):
        Recipe(update=TokenCore(), gain=Dora())
    with pytest.raises(RecipeError, match="core is constant"):
        Recipe(update=TokenCore()).replace(init="pissa")
    Recipe(update=TokenCore())  # alone it is legal


def test_9_propulsion_over_a_bias_is_said_in_the_plan() -> None:
    recipe = RECIPES["propulsion"]()
    assert any("bias" in note for note in rw.plan(Mlp(bias=True), recipe).notes)
    assert not any("bias" in note for note in rw.plan(Mlp(bias=False), recipe).notes)
    model = stir(rw.adapt(one(8, 6), recipe))
    layer, gain = only_site(model).base_layer, only_site(model).gain
    x = torch.randn(3, 8)
    torch.testing.assert_close(model(x), linear(x, layer.weight) * (1 + gain.z) ** 15 + layer.bias)
