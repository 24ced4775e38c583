"""MoSLoRA: a learned mixer between the factors."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_pissa import matrix
from tiny_models import OneLinear, dense_weight, llama, logits, one_linear, perturb, site, token_ids
from torch import Tensor, nn

import rankwise as rw
from rankwise.errors import RecipeError
from rankwise.inits import site_generator
from rankwise.sites import adapted_sites
from rankwise.updates.mixer import starting_mixer

IDS = token_ids()
MIXERS = ["orthogonal", "kaiming", "identity", "butterfly"]


def train(model: Any, steps: int, lr: float = 1e-2) -> list[float]:
    optimizer = rw.optimizer(model, lr=lr)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.check("moslora", 1)
def test_a_frozen_identity_is_lora() -> None:
    mixed = rw.adapt(llama(), rw.recipes.moslora(rank=4, mixer="identity", frozen={"core"}))
    plain = rw.adapt(llama(), rw.recipes.lora(rank=4))

    def pairs() -> list[tuple[Tensor, Tensor]]:
        both = zip(adapted_sites(mixed).values(), adapted_sites(plain).values(), strict=True)
        return [(getattr(m.update, name), getattr(p.update, name)) for m, p in both for name in ("down", "up")]

    assert len(pairs()) == 2 * 14
    assert all(torch.equal(mine, other) for mine, other in pairs())
    for model in (mixed, plain):
        perturb_pairs(model)
        model(input_ids=IDS, labels=IDS).loss.backward()
    for mine, other in pairs():
        assert mine.grad is not None
        assert mine.grad.any()
        assert torch.equal(mine.grad, other.grad)  # type: ignore[arg-type]
    for model in (mixed, plain):
        model.zero_grad()
    assert train(mixed, 4) == train(plain, 4)
    assert all(torch.equal(mine, other) for mine, other in pairs())
    assert torch.equal(logits(mixed, IDS), logits(plain, IDS))
    assert torch.equal(site(mixed, "model.layers.0.mlp.up_proj").update.mixer, torch.eye(4))  # type: ignore[union-attr]


def perturb_pairs(model: nn.Module) -> None:
    """The same change to `down` and `up` of every site, whatever else it has."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for module in adapted_sites(model).values():
            for name in ("down", "up"):
                tensor = getattr(module.update, name)
                tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)


@pytest.mark.check("moslora", 2)
@pytest.mark.parametrize("mixer", MIXERS)
def test_starts_at_the_base_for_every_mixer(mixer: Any) -> None:
    before = logits(llama(), IDS)
    model = rw.adapt(llama(), rw.recipes.moslora(rank=4, mixer=mixer))
    assert torch.equal(logits(model, IDS), before)
    with torch.no_grad():
        for module in adapted_sites(model).values():
            module.update.mixer.normal_()  # type: ignore[union-attr, operator]
    assert torch.equal(logits(model, IDS), before)


@pytest.mark.check("moslora", 3)
def test_a_frozen_butterfly_mixes_two_halves() -> None:
    model = perturb(rw.adapt(OneLinear(20, 16), rw.recipes.moslora(rank=6, mixer="butterfly", alpha=9)), size=1.0)
    update: Any = site(model).update
    assert "mixer" not in dict(update.named_parameters())
    halves = (update.up[:, :3] + update.up[:, 3:]) @ (update.down[:3] + update.down[3:])
    delta = update.factors().delta()
    torch.testing.assert_close(delta, 9 / 6 * halves, rtol=0, atol=1e-13)
    assert torch.linalg.matrix_rank(delta, atol=1e-10) == 3
    with pytest.raises(RecipeError, match=r"needs an even rank, and rank is 5; use rank=6"):
        rw.adapt(OneLinear(20, 16), rw.recipes.moslora(rank=5, mixer="butterfly"))


@pytest.mark.check("moslora", 4)
@pytest.mark.parametrize("mixer", ["orthogonal", "kaiming"])
def test_export_as_plain_lora_in_stock_peft(mixer: Any) -> None:
    """A' = M A, B' = B: the same rank and alpha, and PEFT's own layer computes the same."""
    targets = ["q_proj", "v_proj", "down_proj"]
    ours = perturb(rw.adapt(llama(), rw.recipes.moslora(rank=4, alpha=6, mixer=mixer, targets=targets)))
    theirs = get_peft_model(llama(), LoraConfig(r=4, lora_alpha=6, target_modules=targets)).eval()
    with torch.no_grad():
        for name, module in adapted_sites(ours).items():
            layer = theirs.base_model.model.get_submodule(name)
            update: Any = module.update
            layer.lora_A["default"].weight.copy_(update.mixer @ update.down)
            layer.lora_B["default"].weight.copy_(update.up)
            assert torch.linalg.matrix_rank(update.factors().delta()) == 4
    base, exported = logits(llama(), IDS), logits(theirs, IDS)
    assert (exported - base).abs().max() > 0.1
    assert (logits(ours, IDS) - exported).abs().max() < 1e-6 * exported.abs().max()


@pytest.mark.check("moslora", 5)
def test_finite_differences_in_fp64() -> None:
    model = perturb(rw.adapt(OneLinear(7, 6), rw.recipes.moslora(rank=3, alpha=4)), size=1.0)
    module = site(model)
    update: Any = module.update
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)

    def forward(x: Tensor, down: Tensor, mixer: Tensor, up: Tensor) -> Tensor:
        return torch.func.functional_call(model, {"proj.update.down": down, "proj.update.mixer": mixer, "proj.update.up": up}, (x,))

    leaves = (x, update.down, update.mixer, update.up)
    assert torch.autograd.gradcheck(forward, leaves, eps=1e-6, atol=1e-8, rtol=1e-6)
    # and the closed forms of the specification
    g = torch.randn(5, 6, dtype=torch.float64)
    model(x).backward(g)
    down, mixer, up = (t.detach() for t in leaves[1:])
    h, s = x.detach() @ down.T, 4 / 3
    torch.testing.assert_close(update.up.grad, s * g.T @ (h @ mixer.T), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(update.mixer.grad, s * (g @ up).T @ h, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(update.down.grad, s * mixer.T @ up.T @ g.T @ x.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.check("moslora", 5)
def test_the_first_adam_step_moves_only_up() -> None:
    model = rw.adapt(llama(), rw.recipes.moslora(rank=4))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    train(model, 1)
    moved = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad and not torch.equal(p, before[name])}
    assert moved == {"up"}
    train(model, 1)
    moved = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad and not torch.equal(p, before[name])}
    assert moved == {"down", "mixer", "up"}


@pytest.mark.check("moslora", 6)
def test_a_mixer_of_zeros_is_rejected_because_it_would_never_train() -> None:
    for make in (
        lambda: rw.recipes.lora().replace(update={"name": "moslora", "mixer": "zeros"}),
        lambda: starting_mixer("zeros", 4, torch.Generator()),
    ):
        with pytest.raises(RecipeError, match=r"mixer='zeros'"):
            make()
    model = rw.adapt(llama(), rw.recipes.moslora(rank=4))
    with torch.no_grad():
        for module in adapted_sites(model).values():
            module.update.mixer.zero_()  # type: ignore[union-attr, operator]
    losses = train(model, 10)
    assert losses == [losses[0]] * 10


@pytest.mark.check("moslora", 7)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_fused_form_is_lora_with_the_mixed_factor(dropout: float) -> None:
    """Forward and gradients against plain autograd over A_eff = M A and the chain rule, fp32."""
    mixed = rw.adapt(OneLinear(48, 40, dtype=torch.float32), rw.recipes.moslora(rank=8, dropout=dropout))
    perturb(mixed, size=1.0)
    update: Any = site(mixed).update
    plain = rw.adapt(OneLinear(48, 40, dtype=torch.float32), rw.recipes.lora(rank=8, dropout=dropout))
    site(plain).update.put(down=update.mixer @ update.down, up=update.up)  # type: ignore[union-attr]
    x, g = torch.randn(30, 48), torch.randn(30, 40)
    outputs = []
    for model in (mixed.train(), plain.train()):
        torch.manual_seed(3)  # the same dropout mask
        outputs.append(model(x))
        outputs[-1].backward(g)

    def close(one: Tensor, two: Tensor) -> bool:
        return bool((one - two).norm() <= 1e-5 * two.norm())

    other: Any = site(plain).update
    assert close(*outputs)
    assert close(update.up.grad, other.up.grad)
    assert close(update.mixer.grad, other.down.grad @ update.down.T)
    assert close(update.down.grad, update.mixer.T @ other.down.grad)


@pytest.mark.check("moslora", 8)
@pytest.mark.parametrize("rank", [1, 7, 64])
def test_how_the_mixer_starts(rank: int) -> None:
    generator = site_generator(0, "proj")
    kaiming = starting_mixer("kaiming", rank, generator)
    assert kaiming.abs().max() <= rank**-0.5
    if rank == 64:
        assert float(kaiming.std()) == pytest.approx((3 * rank) ** -0.5, rel=0.05)
    orthogonal = starting_mixer("orthogonal", rank, generator)
    assert (orthogonal @ orthogonal.T - torch.eye(rank)).abs().max() < 1e-6
    assert torch.equal(starting_mixer("identity", rank, generator), torch.eye(rank))
    assert torch.equal(starting_mixer("kaiming", rank, site_generator(0, "proj")), kaiming)


@pytest.mark.check("moslora", 9)
def test_parameter_count() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    assert rw.plan(OneLinear(20, 16), rw.recipes.moslora(rank=6)).trained_parameters == 6 * 36 + 36
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=64, intermediate_size=14336, num_key_value_heads=8))
    five = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    mixed, plain = (rw.plan(model, make(rank=16, targets=five)).trained_parameters for make in (rw.recipes.moslora, rw.recipes.lora))
    assert mixed - plain == 40_960


@pytest.mark.check("moslora", 10)
def test_disabling_merging_and_taking_off_cover_the_mixer() -> None:
    model = llama()
    before, names = logits(model, IDS), set(model.state_dict())
    rw.adapt(model, rw.recipes.moslora(rank=4))
    train(model, 3)
    on = logits(model, IDS)
    mixers = [p for name, p in model.named_parameters() if name.endswith("mixer")]
    assert len(mixers) == 14
    assert all(p.requires_grad for p in mixers)
    with rw.disabled(model):
        assert torch.equal(logits(model, IDS), before)
        assert all(p.requires_grad for p in mixers)
    dense = {name: dense_weight(module) for name, module in adapted_sites(model).items()}
    rw.merge(model)
    for name, module in adapted_sites(model).items():
        torch.testing.assert_close(module.weight.double(), dense[name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits(model, IDS), on, rtol=1e-4, atol=1e-5)
    rw.unadapt(model)
    assert set(model.state_dict()) == names
    assert torch.equal(logits(model, IDS), before)


@pytest.mark.check("moslora", 11)
@pytest.mark.parametrize("base", ["keep", "fold"])
@pytest.mark.parametrize("mixer", ["orthogonal", "identity"])
def test_on_a_pissa_start_the_mixer_is_absorbed(mixer: str, base: str) -> None:
    weight = matrix(24, 40)
    plain = rw.adapt(one_linear(weight), rw.recipes.pissa(rank=5, alpha=7, base=base))
    mixed = rw.adapt(one_linear(weight), rw.recipes.pissa(rank=5, alpha=7, base=base).replace(update={"name": "moslora", "mixer": mixer}))
    one, two = site(plain).update, site(mixed).update
    torch.testing.assert_close(two.factors().delta(), one.factors().delta(), rtol=0, atol=1e-6)  # type: ignore[union-attr]
    assert torch.equal(two.down, one.down)  # type: ignore[union-attr, arg-type]
    x = torch.randn(3, 40, dtype=torch.float64)
    if base == "keep":
        assert torch.equal(mixed(x), nn.functional.linear(x, weight))
    else:
        torch.testing.assert_close(mixed(x), x @ weight.T, rtol=0, atol=1e-12)
    with pytest.raises(RecipeError, match="the mixer must be absorbed by the pair without loss"):
        rw.recipes.pissa(rank=5).replace(update={"name": "moslora", "mixer": "kaiming"})


def test_learning_rates_by_role() -> None:
    """LoRA+ raises the rate of `up` alone; the mixer goes with `down`."""
    recipe = rw.recipes.moslora(rank=4).replace(gradient="lora-plus")
    model = rw.adapt(llama(), recipe)
    optimizer = rw.optimizer(model, lr=1e-3)
    assert {group["role"] for group in optimizer.param_groups} == {"down", "core", "up"}
    assert [recipe.gradient.rate(role) for role in ("down", "core", "up")] == [1.0, 1.0, 16.0]
