"""The Checks of LoRA-FA's specification; 'plain' is version 1 of the paper, 'corrected' version 2."""

import math
from typing import Any

import pytest
import torch
from tiny_models import llama
from torch import Tensor, nn
from toys import Mlp, Qkv, one, only_site, saved_storages, stir

import rankwise as rw
from rankwise.errors import RecipeError, TargetError
from rankwise.inits import Init
from rankwise.inits.random import Kaiming, Orthonormal
from rankwise.recipes import lora, lora_fa
from rankwise.sites import adapted_sites

torch.set_num_threads(1)


def projector(down: Tensor) -> Tensor:
    """down^T (down down^T)^-1 down, (in, in), in fp64."""
    down = down.detach().double()
    return down.T @ torch.linalg.solve(down @ down.T, down)


def made(variant: str, dtype: torch.dtype = torch.float64, **fields: Any) -> nn.Module:
    """A model of one layer, rank 5; 'kaiming' rows unless told otherwise, so that the correction does something."""
    return rw.adapt(one(20, 14, bias=False, dtype=dtype), lora_fa(variant, **{"rank": 5, "init": "kaiming"} | fields))


def put_down(model: nn.Module, down: Tensor) -> nn.Module:
    only_site(model).update.put(down=down)
    return model


def batches(count: int, width: int = 20, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(9, width, generator=generator, dtype=dtype), torch.randn(9, 14, generator=generator, dtype=dtype))
        for _ in range(count)
    ]


def train(model: nn.Module, steps: int, **options: Any) -> list[Tensor]:
    """The adapted weight, update alone, after each step of a least-squares problem."""
    optimizer, site, path = rw.optimizer(model, **options), only_site(model), []
    for x, target in batches(steps):
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()
        path.append((site.site.scaling * site.update.up @ site.update.down).detach().clone())
    return path


@pytest.mark.check("lora-fa", 1)
@pytest.mark.parametrize("variant", ["plain", "corrected"])
def test_down_never_changes_and_nothing_thaws_it(variant: str) -> None:
    model = rw.adapt(Mlp(), lora_fa(variant, rank=4))
    before = {name: site.update.down.clone() for name, site in adapted_sites(model).items()}
    optimizer = rw.optimizer(model, lr=0.01, weight_decay=0.1)
    for number in range(100):
        optimizer.zero_grad()
        model(torch.randn(4, 24)).square().mean().backward()
        optimizer.step()
        if number % 20 == 0:
            with rw.disabled(model):
                model(torch.randn(1, 24))
            model.eval()
            model.train()
            model.requires_grad_(True)  # a blind thaw reaches no buffer
            for site in adapted_sites(model).values():
                site.base_layer.requires_grad_(False)
            rw.merge(model)
            rw.unmerge(model)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]} | {id(p) for p in optimizer.state}
    for name, site in adapted_sites(model).items():
        assert torch.equal(site.update.down, before[name])
        assert site.update.up.any()
        assert not isinstance(site.update.down, nn.Parameter)
        assert not site.update.down.requires_grad
        assert id(site.update.down) not in held


@pytest.mark.check("lora-fa", 2)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_only_the_projections_are_kept(p: float) -> None:
    tokens, width, rank = 64, 48, 8
    model = stir(rw.adapt(Qkv(width, width).bfloat16(), lora_fa(rank=rank, dropout=p)))
    x = torch.randn(tokens, width).bfloat16().requires_grad_()
    with saved_storages(model) as found:
        outputs = [model.q_proj(x), model.k_proj(x), model.v_proj(x)]
    assert [size for size, _ in found.values()] == 3 * [2 * tokens * rank]
    assert x.untyped_storage().data_ptr() not in found
    sum(y.float().sum() for y in outputs).backward()


@pytest.mark.check("lora-fa", 3)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradients_of_up_and_x_are_loras(p: float) -> None:
    frozen, full = made("plain", dropout=p), rw.adapt(one(20, 14, bias=False, dtype=torch.float64), lora(rank=5, dropout=p))
    stir(full)
    for name in ("down", "up"):
        only_site(frozen).update.put(**{name: getattr(only_site(full).update, name).detach()})
    ((x, g),) = batches(1)
    found = []
    for model in (frozen, full):
        torch.manual_seed(0)
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        y.backward(g)
        found.append((y.detach(), leaf.grad, only_site(model).update.up.grad))
    for left, right in zip(*found, strict=True):
        assert torch.equal(left, right)
    assert only_site(full).update.down.grad.any()


@pytest.mark.check("lora-fa", 4)
@pytest.mark.parametrize("init", ["kaiming", "orthonormal"])
def test_the_corrected_step_is_the_projected_full_step(init: str) -> None:
    model = stir(made("corrected", init=init, alpha=7))
    site, ((x, g),), lr = only_site(model), batches(1), 0.1
    optimizer = rw.optimizer(model, lr=lr, kind=torch.optim.SGD)
    before = site.merged_weight()
    model(x).backward(g)
    wanted = g.T @ x @ projector(site.update.down)
    got = site.site.scaling * site.update.up.grad @ site.update.down
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    optimizer.step()
    torch.testing.assert_close(site.merged_weight() - before, -lr * wanted, rtol=1e-10, atol=1e-10)
    # and it is the best within the row space: the residual is orthogonal to it
    assert ((g.T @ x - got) @ site.update.down.T).abs().max() < 1e-10


@pytest.mark.check("lora-fa", 5)
def test_corrected_sgd_depends_on_the_row_space_alone() -> None:
    mixed = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 2 * torch.eye(5, dtype=torch.float64)
    apart = {}
    for variant in ("corrected", "plain"):
        paths = []
        for other in (False, True):
            model = made(variant)
            down = only_site(model).update.down.clone()
            paths.append(train(put_down(model, mixed @ down if other else down), 6, lr=0.05, kind=torch.optim.SGD))
        apart[variant] = max((a - b).norm() / a.norm() for a, b in zip(*paths, strict=True))
    assert apart["corrected"] < 1e-9
    assert apart["plain"] > 1e-2


@pytest.mark.check("lora-fa", 6)
@pytest.mark.parametrize("alpha", [1.0, 5.0, 40.0])
def test_orthonormal_rows_make_the_correction_free_under_adam(alpha: float) -> None:
    paths = [train(made(v, init="orthonormal", alpha=alpha), 8, lr=0.01, eps=0.0) for v in ("corrected", "plain")]
    for corrected, plain in zip(*paths, strict=True):
        assert (corrected - plain).norm() <= 1e-6 * plain.norm()
    others = [train(made(v, init="kaiming", alpha=alpha), 8, lr=0.01, eps=0.0) for v in ("corrected", "plain")]
    assert (others[0][-1] - others[1][-1]).norm() > 1e-2 * others[1][-1].norm()  # with other rows it does matter


@pytest.mark.check("lora-fa", 7)
def test_doubling_alpha_leaves_the_corrected_step_and_quadruples_the_plain_one() -> None:
    for variant, factor in (("corrected", 1.0), ("plain", 4.0)):
        small, large = (train(made(variant, alpha=alpha), 1, lr=0.05, kind=torch.optim.SGD)[0] for alpha in (5.0, 10.0))
        torch.testing.assert_close(large, factor * small, rtol=1e-9, atol=1e-12)


@pytest.mark.check("lora-fa", 8)
@pytest.mark.parametrize("scaling", ["lora", "rslora"])
def test_corrected_adamw_equals_pefts_optimizer(scaling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import peft.optimizers.lorafa as theirs_module
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_lorafa_optimizer

    monkeypatch.setattr(theirs_module, "is_bf16_available", lambda: False)  # it would round the correction to bf16
    rank, alpha, lr = 5, 8, 1e-2
    model = made("corrected", torch.float32, alpha=alpha, scaling=scaling)
    update = only_site(model).update
    mean = (update.down @ update.down.T).diagonal().mean().item()
    # theirs adds 1e-8 to the Gram matrix; a rule is frozen, so the ridge that equals it is a new recipe
    model = made("corrected", torch.float32, alpha=alpha, scaling=scaling, gradient={"name": "lora-fa", "ridge": 1e-8 / mean})
    update = only_site(model).update
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"], use_rslora=scaling == "rslora")
    theirs = get_peft_model(one(20, 14, bias=False), config)
    layer = theirs.get_submodule("base_model.model.0")
    with torch.no_grad():
        layer.lora_A.default.weight.copy_(update.down)
    # eps=0: theirs adds it before the bias correction, torch after
    other = create_lorafa_optimizer(theirs, r=rank, lora_alpha=alpha, lr=lr)
    for group in other.param_groups:
        group["eps"] = 0.0
    ours = rw.optimizer(model, lr=lr, eps=0.0)
    for x, target in batches(3, dtype=torch.float32):
        for each, optimizer in ((model, ours), (theirs, other)):
            optimizer.zero_grad()
            (each(x) - target).square().mean().backward()
            optimizer.step()
        torch.testing.assert_close(update.up, layer.lora_B.default.weight, rtol=1e-5, atol=1e-5 * lr)
    assert torch.equal(update.down, layer.lora_A.default.weight)


@pytest.mark.check("lora-fa", 8)
def test_plain_adamw_equals_pefts_lora_with_frozen_a() -> None:
    from peft import LoraConfig, get_peft_model

    model = made("plain", torch.float32)
    update = only_site(model).update
    theirs = get_peft_model(one(20, 14, bias=False), LoraConfig(r=5, lora_alpha=10, target_modules=["0"]))
    layer = theirs.get_submodule("base_model.model.0")
    with torch.no_grad():
        layer.lora_A.default.weight.copy_(update.down)
    layer.lora_A.default.weight.requires_grad_(False)
    other = torch.optim.AdamW([layer.lora_B.default.weight], lr=1e-2, weight_decay=0.0)
    ours = rw.optimizer(model, lr=1e-2)
    for x, target in batches(3, dtype=torch.float32):
        for each, optimizer in ((model, ours), (theirs, other)):
            optimizer.zero_grad()
            (each(x) - target).square().mean().backward()
            optimizer.step()
        torch.testing.assert_close(update.up, layer.lora_B.default.weight, rtol=1e-5, atol=1e-7)


@pytest.mark.check("lora-fa", 9)
@pytest.mark.parametrize("variant", ["plain", "corrected"])
def test_the_update_stays_in_the_row_space_of_down(variant: str) -> None:
    model = made(variant)
    site, start = only_site(model), only_site(model).merged_weight()
    train(model, 30, lr=0.02)
    moved = site.merged_weight() - start
    outside = moved @ (torch.eye(20, dtype=torch.float64) - projector(site.update.down))
    assert outside.norm() < 1e-6 * moved.norm()
    assert moved.norm() > 0.1


@pytest.mark.check("lora-fa", 10)
@pytest.mark.parametrize("init", [Kaiming(), Orthonormal()])
def test_down_is_made_again_from_its_seed_bit_for_bit(init: Init) -> None:
    """Drawn on the CPU from the recipe's seed and the site's name: neither the model, the order of sites nor the global stream matter."""
    downs = {}
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(noise)
        model = rw.adapt(Mlp(), lora_fa(rank=4, seed=seed, init=init, targets=["first", "second"] if noise == 1 else ["second"]))
        downs[seed, noise] = adapted_sites(model)["second"].update.down
    assert torch.equal(downs[0, 1], downs[0, 2])
    assert not torch.equal(downs[0, 1], downs[1, 1])


def test_the_default_rows_are_orthonormal_with_kaimings_norm() -> None:
    down = only_site(rw.adapt(one(64, 32), lora_fa(rank=8))).update.down.double()
    torch.testing.assert_close(down @ down.T, torch.eye(8, dtype=torch.float64) / 3, rtol=0, atol=1e-6)
    kaiming = only_site(rw.adapt(one(64, 32), lora_fa(rank=8, init="kaiming"))).update.down
    assert kaiming.norm() == pytest.approx(math.sqrt(8 / 3), rel=0.1)


def test_clipping_and_accumulation_see_the_corrected_gradient() -> None:
    model = stir(made("corrected"))
    rw.optimizer(model)
    up, data = only_site(model).update.up, batches(2)
    parts = []
    for x, g in data:
        up.grad = None
        model(x).backward(g)
        parts.append(up.grad.clone())
    up.grad = None
    for x, g in data:
        model(x).backward(g)
    torch.testing.assert_close(up.grad, parts[0] + parts[1])
    nn.utils.clip_grad_norm_([up], 1e-3)
    assert up.grad.norm().item() == pytest.approx(1e-3, rel=1e-4)


def test_dependent_rows_are_refused_before_the_first_step() -> None:
    model = made("corrected")
    down = only_site(model).update.down.clone()
    down[1] = 2 * down[0]
    put_down(model, down)
    with pytest.raises(RecipeError, match=r"dependent .rank 5."):
        rw.optimizer(model)
    with pytest.raises(RecipeError, match="smaller side"):
        rw.plan(one(4, 14), lora_fa("corrected", rank=5))


@pytest.mark.parametrize("variant", ["plain", "corrected"])
def test_an_embedding_is_refused_because_its_down_starts_at_zero(variant: Any) -> None:
    """PEFT's optimizer leaves such an adapter without any effect and says nothing."""
    with pytest.raises(TargetError, match="embed_tokens is an embedding"):
        rw.adapt(llama(), rw.recipes.lora_fa(rank=4, variant=variant, targets=["embed_tokens"]))
