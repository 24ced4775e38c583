"""The Checks of LoRA's specification (rsLoRA included)."""

import math
from pathlib import Path

import pytest
import torch
from method_checks import comes_back_from_its_file, resumes_bit_for_bit, trained_a_little
from reference import Terms, forward, gradients
from safetensors.torch import load_file
from tiny_models import gpt2, llama, logits, token_ids
from torch import Tensor, nn
from torch.nn.functional import embedding, linear
from toys import Mlp, Qkv, one, only_site, saved_storages, stir
from training_models import make_world

import rankwise as rw
from rankwise.errors import TargetError
from rankwise.recipes import lora, rslora
from rankwise.sites import AdaptedLinear, adapted_sites

torch.set_num_threads(1)


def terms_of(site: AdaptedLinear) -> Terms:
    """The site's tensors in fp64."""
    layer, update = site.base_layer, site.update
    bias = None if layer.bias is None else layer.bias.detach().double()
    weight, down, up = (t.detach().double() for t in (layer.weight, update.down, update.up))
    return Terms(weight, down, up, site.site.scaling, bias=bias)


@pytest.mark.check("lora", 1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_start_is_the_base_and_the_first_step_moves_up_alone(dtype: torch.dtype) -> None:
    base = one(48, 40, dtype=dtype)
    x = torch.randn(5, 7, 48).to(dtype)
    wanted = base(x)
    model = rw.adapt(base, lora(rank=8))
    assert torch.equal(model(x), wanted)
    update = only_site(model).update
    down, lr, eps = update.down.detach().clone(), 1e-3, 1e-8
    optimizer = rw.optimizer(model, lr=lr, eps=eps)
    y = model(x)
    y.backward(torch.randn_like(y))
    assert not update.down.grad.any()
    size = update.up.grad.abs().double()
    assert (size > 0).any()
    optimizer.step()
    assert torch.equal(update.down, down)
    # one step of Adam: lr * g / (|g| + eps)
    torch.testing.assert_close(update.up.detach().abs().double(), lr * size / (size + eps), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("init", "role", "bound"), [("kaiming", "down", 400**-0.5), ("random-up", "up", 16**-0.5), ("gaussian", "down", None)]
)
def test_how_wide_the_random_factor_is_drawn(init: str, role: str, bound: float | None) -> None:
    drawn = getattr(only_site(rw.adapt(one(400, 400), lora(rank=16, init=init))).update, role).detach().double()
    wanted = 1 / 16 if bound is None else bound / math.sqrt(3)  # PEFT's gaussian; a uniform distribution
    # 6400 numbers: five standard errors of the standard deviation of normal ones, of which uniform ones have fewer
    assert drawn.std().item() == pytest.approx(wanted, rel=5 / math.sqrt(2 * drawn.numel()))
    assert abs(drawn.mean().item()) < 5 * wanted / math.sqrt(drawn.numel())
    if bound is not None:
        assert bound * 0.99 < drawn.abs().max().item() <= bound


def test_each_site_draws_from_a_stream_of_its_own() -> None:
    def starts(**fields: object) -> dict[str, Tensor]:
        torch.manual_seed(int(torch.randint(1 << 30, ())))  # the global state is nobody's business
        return {name: site.update.down.detach().clone() for name, site in adapted_sites(rw.adapt(Qkv(), lora(rank=4, **fields))).items()}

    every = starts()
    assert len(every) > 1
    downs = list(every.values())
    assert all(not torch.equal(a, b) for i, a in enumerate(downs) for b in downs[:i] if a.shape == b.shape)
    last = list(every)[-1]
    assert torch.equal(starts(targets=[last])[last], every[last])  # whatever else is adapted
    assert not torch.equal(starts(seed=1)[last], every[last])


@pytest.mark.check("lora", 2)
@pytest.mark.parametrize("shape", [(48,), (0, 48), (11, 48), (3, 5, 48), (2, 0, 48)])
def test_the_output_is_that_of_the_dense_weight(shape: tuple[int, ...]) -> None:
    model = stir(rw.adapt(one(48, 40, dtype=torch.float64), lora(rank=8, alpha=12)), size=1.0)
    site, x = only_site(model), torch.randn(shape, dtype=torch.float64)
    layer, update = site.base_layer, site.update
    assert site.site.scaling == 12 / 8
    wanted = linear(x, layer.weight + 12 / 8 * update.up @ update.down, layer.bias)
    torch.testing.assert_close(model(x), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.check("lora", 3)
def test_gradients_are_the_closed_forms_and_those_of_the_naive_formula() -> None:
    model = stir(rw.adapt(one(20, 14, dtype=torch.float64), lora(rank=4)))
    site = only_site(model)
    x, g = torch.randn(9, 20, dtype=torch.float64, requires_grad=True), torch.randn(9, 14, dtype=torch.float64)
    model(x).backward(g)
    got = {"x": x.grad, "down": site.update.down.grad, "up": site.update.up.grad}
    closed = gradients(terms_of(site), x.detach(), g)
    leaves = {"x": x.detach().clone(), "down": site.update.down.detach().clone(), "up": site.update.up.detach().clone()}
    for leaf in leaves.values():
        leaf.requires_grad_()
    layer = site.base_layer
    y = linear(leaves["x"], layer.weight, layer.bias) + site.site.scaling * linear(linear(leaves["x"], leaves["down"]), leaves["up"])
    y.backward(g)
    for name, value in got.items():
        assert (value - closed[name]).abs().max() < 1e-12
        assert (value - leaves[name].grad).abs().max() < 1e-12


@pytest.mark.check("lora", 4)
@pytest.mark.parametrize("scaling", ["lora", "rslora"])
def test_forward_and_gradients_equal_pefts_for_the_same_factors(scaling: str) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    theirs = get_peft_model(Mlp(), LoraConfig(r=4, lora_alpha=10, target_modules=["first", "second"], use_rslora=scaling == "rslora"))
    torch.manual_seed(0)
    ours = stir(rw.adapt(Mlp(), lora(rank=4, alpha=10, scaling=scaling)))
    pairs = []
    for name, site in adapted_sites(ours).items():
        layer = theirs.get_submodule(f"base_model.model.{name}")
        pairs += [(site.update.down, layer.lora_A.default.weight), (site.update.up, layer.lora_B.default.weight)]
    with torch.no_grad():
        for mine, other in pairs:
            other.copy_(mine)
    x = torch.randn(3, 6, 24)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    g = torch.randn(3, 6, 16)
    outputs = [model(t) for model, t in zip((ours, theirs), inputs, strict=True)]
    for y in outputs:
        y.backward(g)
    torch.testing.assert_close(*outputs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-5, atol=1e-6)
    for mine, other in pairs:
        scale = other.grad.abs().max()
        torch.testing.assert_close(mine.grad / scale, other.grad / scale, rtol=0, atol=1e-6)


@pytest.mark.check("lora", 5)
def test_scaling_by_rank_or_by_its_square_root() -> None:
    def delta(recipe) -> Tensor:
        site = only_site(stir(rw.adapt(one(32, 24), recipe), size=1.0))
        return site.merged_weight() - site.base_layer.weight

    torch.testing.assert_close(delta(lora(rank=16, alpha=32)), 2 * delta(lora(rank=16, alpha=16)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(delta(rslora(rank=16, alpha=8)), 4 * delta(lora(rank=16, alpha=8)), rtol=1e-6, atol=1e-6)
    patterned = rw.plan(Mlp(), rslora(rank=4, alpha=8, rank_pattern={"second": 9}, alpha_pattern={"second": 6}))
    assert [site.scaling for site in patterned.sites] == [8 / 2, 6 / 3]
    assert rw.plan(Mlp(), lora(rank=4)).sites[0].scaling == 2.0


@pytest.mark.check("lora", 6)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_three_layers_over_one_input_keep_it_once(p: float) -> None:
    tokens, width, rank = 64, 48, 8
    model = stir(rw.adapt(Qkv(width, width).bfloat16(), lora(rank=rank, dropout=p)))
    x = torch.randn(tokens, width).bfloat16().requires_grad_()
    with saved_storages(model) as found:
        outputs = [model.q_proj(x), model.k_proj(x), model.v_proj(x)]
    drawn = [key for key, (_, tensor) in found.items() if tensor.dtype == torch.int32]  # one draw of dropout for all three
    assert len(drawn) == bool(p)
    assert all(found.pop(key)[0] < 4 * 1.5 * p * tokens * width for key in drawn)
    assert sum(size for size, _ in found.values()) == 2 * tokens * width + 3 * 2 * tokens * rank
    assert all(tensor.dtype == torch.bfloat16 for _, tensor in found.values())
    sum(y.float().sum() for y in outputs).backward()


@pytest.mark.check("lora", 7)
def test_the_gauge_is_free() -> None:
    model = stir(rw.adapt(one(32, 24, dtype=torch.float64), lora(rank=6)))
    update, x = only_site(model).update, torch.randn(7, 32, dtype=torch.float64)
    before = model(x).detach()
    mixed = torch.randn(6, 6, dtype=torch.float64) + 3 * torch.eye(6, dtype=torch.float64)
    with torch.no_grad():
        update.put(down=torch.linalg.solve(mixed, update.down.detach()), up=update.up.detach() @ mixed)
    torch.testing.assert_close(model(x), before, rtol=1e-10, atol=1e-10)
    with torch.no_grad():  # the test can fail: one half of the gauge is no gauge
        update.put(up=update.up.detach() @ mixed)
    assert (model(x) - before).abs().max() > 1e-2


@pytest.mark.check("lora", 8)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_gives_the_same_function_and_unmerging_the_same_bits(dtype: torch.dtype) -> None:
    model = stir(rw.adapt(one(40, 32, dtype=dtype), lora(rank=4)))
    site, x = only_site(model), torch.randn(6, 40).to(dtype)
    weight = site.base_layer.weight.detach().clone()
    dense = weight.double() + site.site.scaling * (site.update.up.double() @ site.update.down.double()).detach()
    wanted = model(x).detach()
    rw.merge(model)
    assert not torch.equal(site.base_layer.weight, weight)
    # in fp32, then one rounding: within half a unit in the last place of the dtype
    ulp = {torch.float32: 2**-23, torch.bfloat16: 2**-8}[dtype]
    assert ((site.base_layer.weight.double() - dense).abs() <= ulp * dense.abs() + 1e-7).all()
    tolerance = 1e-5 if dtype == torch.float32 else 3 * 2**-8
    torch.testing.assert_close(model(x), wanted, rtol=tolerance, atol=tolerance)
    with rw.disabled(model):
        assert torch.equal(site.base_layer.weight, weight)
    rw.unmerge(model)
    assert torch.equal(site.base_layer.weight, weight)
    assert torch.equal(model(x), wanted)


@pytest.mark.check("lora", 9)
def test_dropout_acts_on_the_branch_in_training_and_is_unbiased() -> None:
    model = stir(rw.adapt(one(16, 12), lora(rank=4, dropout=0.4)), size=0.5)
    site, x = only_site(model), torch.randn(3, 16)
    model.eval()
    evaluated = model(x).detach()
    torch.testing.assert_close(evaluated.double(), forward(terms_of(site), x.double()), rtol=1e-5, atol=1e-5)
    model.train()
    with torch.no_grad():
        draws = torch.stack([model(x) for _ in range(3000)])
    deviation = draws.std(0) / math.sqrt(len(draws))
    assert (deviation > 0).all()
    assert ((draws.mean(0) - evaluated).abs() < 5 * deviation).all()  # 36 entries, five standard errors
    # the base branch is not dropped: without an update, nothing is
    with torch.no_grad():
        site.update.put(up=torch.zeros_like(site.update.up))
        assert torch.equal(model(x), site.base_layer(x))


class Tokens(nn.Module):
    """An embedding and a layer over it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))


@pytest.mark.check("lora", 10)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_embedding_starts_as_the_base_and_only_gathered_columns_of_down_learn(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    base = Tokens().to(dtype)
    ids = torch.tensor([[3, 7, 7], [0, 29, 3]])
    wanted = base(ids)
    model = rw.adapt(base, lora(rank=4, targets=["embed"]))
    site = only_site(model)
    assert site.update.down.shape == (4, 30)
    assert not site.update.down.any()
    assert site.update.up.any()
    assert torch.equal(model(ids), wanted)
    optimizer = rw.optimizer(model, lr=0.1)
    model(ids).float().square().sum().backward()
    moved = site.update.down.grad.abs().sum(0) > 0
    assert moved.nonzero().flatten().tolist() == [0, 3, 7, 29]
    assert not site.update.up.grad.any()  # down is zero, so up waits
    optimizer.step()
    got = model.embed(ids)
    dense = site.base_layer.weight + (site.site.scaling * site.update.up @ site.update.down).T
    torch.testing.assert_close(got, embedding(ids, dense).to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)
    assert not torch.equal(got, site.base_layer(ids))
    rw.merge(model)
    torch.testing.assert_close(model.embed(ids), got, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)
    rw.unadapt(model)
    assert torch.equal(model(ids), wanted)


def test_an_embedding_refuses_dropout() -> None:
    with pytest.raises(TargetError, match="dropout=0"):
        rw.adapt(Tokens(), lora(rank=4, targets=["embed"], dropout=0.1))


def test_a_first_step_for_down_comes_second() -> None:
    """dA = 0 only on step 1: `down` moves from step 2."""
    model = rw.adapt(one(16, 12), lora(rank=4))
    update, optimizer, x = only_site(model).update, rw.optimizer(model, lr=1e-2), torch.randn(8, 16)
    start = update.down.detach().clone()
    for moved in (False, True):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(update.down, start) is not moved


def test_a_bias_beside_the_pair_trains_from_yaml_and_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world(tmp_path / "world")
    whole = resumes_bit_for_bit(world, tmp_path, monkeypatch, {"name": "lora", "bias": True}, train={"lr": 1e-2})
    assert any(name.endswith("lora_B.bias") for name in load_file(whole.run / "adapter" / "adapter_model.safetensors"))


def test_a_bias_beside_the_pair_comes_back_from_its_file(tmp_path: Path) -> None:
    """Over a base whose layers have a bias of their own, which merging needs."""
    batch = {"input_ids": token_ids(), "labels": token_ids()}
    comes_back_from_its_file(trained_a_little(rw.adapt(gpt2(), lora(bias=True, rank=2, targets="all-linear")), batch), gpt2, tmp_path)


@pytest.mark.parametrize("storage", ["keep", "nf4"])
def test_a_bias_beside_the_pair_adds_its_scaled_vector(storage: str) -> None:
    """Whatever holds the base: with the pair at zero the output moves by scaling * shift, whose gradient is the sum over tokens."""
    model = rw.adapt(llama(), lora(bias=True, rank=2, alpha=6, targets=["gate_proj"], storage=storage))
    module = next(iter(adapted_sites(model).values()))
    shift = module.update.shift
    x = torch.randn(3, 5, module.site.in_features)
    before = module(x).detach()
    with torch.no_grad():
        shift.copy_(torch.randn(shift.shape))
    y = module(x)
    torch.testing.assert_close(y.detach(), before + 3 * shift.detach(), rtol=1e-5, atol=1e-5)
    g = torch.randn(y.shape)
    y.backward(g)
    torch.testing.assert_close(shift.grad, 3 * g.sum((0, 1)))
    assert not torch.equal(logits(model, token_ids()), logits(llama(), token_ids()))
