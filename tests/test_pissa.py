"""PiSSA: principal singular components, from a dense decomposition in fp64."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import dense_weight, llama, logits, one_linear, perturb, site, token_ids
from torch import Tensor, nn

import rankwise as rw
from rankwise.equation import stacked
from rankwise.errors import RecipeError
from rankwise.inits import Pissa, site_generator
from rankwise.inits.spectral import largest_directions
from rankwise.sites import adapted_sites
from rankwise.updates import Site

SHAPES = [(24, 40), (40, 24), (32, 32)]


def matrix(out: int, width: int, decay: float = 0.6, seed: int = 0) -> Tensor:
    """(out, in) in fp64 with singular values i^-decay."""
    generator = torch.Generator().manual_seed(seed)
    k = min(out, width)
    u = torch.linalg.qr(torch.randn(out, k, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(width, k, generator=generator, dtype=torch.float64)).Q
    return (u * torch.arange(1, k + 1, dtype=torch.float64) ** -decay) @ v.T


def begin(weight: Tensor, rank: int, alpha: float | None = None, **options: Any) -> tuple[Tensor, Tensor, float]:
    """(up, down, scaling) of a start."""
    scaling = (rank if alpha is None else alpha) / rank
    place = Site("proj", "linear", weight.shape[1], weight.shape[0], rank, scaling)
    begun = Pissa(**options).begin(place, weight, None, site_generator(0, "proj"))
    assert begun.down is not None
    assert begun.up is not None
    return begun.up, begun.down, scaling


@pytest.mark.check("pissa", 1)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_start_is_the_leading_part_of_the_weight(shape: tuple[int, int]) -> None:
    weight, rank = matrix(*shape), 5
    up, down, scaling = begin(weight, rank, alpha=7.0)
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(scaling * up @ down, (u[:, :rank] * s[:rank]) @ vt[:rank], rtol=0, atol=1e-12)
    residual = weight - scaling * up @ down
    assert (residual.T @ up).abs().max() < 1e-12
    assert (down @ residual.T).abs().max() < 1e-12
    assert torch.linalg.matrix_rank(residual, atol=1e-10) == min(shape) - rank


@pytest.mark.check("pissa", 1)
@pytest.mark.parametrize("base", ["keep", "fold"])
def test_residual_and_start_give_the_weight_back_in_the_built_model(base: str) -> None:
    weight = matrix(24, 40)
    model = rw.adapt(one_linear(weight), rw.recipes.pissa(rank=5, alpha=7, base=base))
    module = site(model)
    factors = module.update.factors()  # type: ignore[union-attr]
    held = module.weight if base == "fold" else weight - module.site.scaling * module.offset.up @ module.offset.down  # type: ignore[union-attr]
    torch.testing.assert_close(held + factors.delta(), weight, rtol=0, atol=1e-12)
    assert torch.equal(module.weight, weight) == (base == "keep")
    x = torch.randn(3, 40, dtype=torch.float64)
    torch.testing.assert_close(model(x), x @ weight.T, rtol=0, atol=1e-12)


@pytest.mark.check("pissa", 2)
@pytest.mark.parametrize("shape", SHAPES)
def test_energy_and_balance(shape: tuple[int, int]) -> None:
    weight, rank = matrix(*shape), 6
    s = torch.linalg.svdvals(weight)[:rank]
    products = []
    for alpha in (6.0, 12.0, 5.0):
        up, down, scaling = begin(weight, rank, alpha)
        products.append(scaling * up @ down)
        torch.testing.assert_close(products[-1].square().sum(), s.square().sum(), rtol=1e-12, atol=0)
        torch.testing.assert_close(up.T @ up, torch.diag(s / scaling), rtol=0, atol=1e-12)
        torch.testing.assert_close(down @ down.T, torch.diag(s / scaling), rtol=0, atol=1e-12)
    torch.testing.assert_close(products[0], products[1], rtol=0, atol=1e-13)
    torch.testing.assert_close(products[0], products[2], rtol=0, atol=1e-13)
    unit, down, scaling = begin(weight, rank, 5.0, balance="unit")
    torch.testing.assert_close(unit.T @ unit, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(scaling * unit @ down, products[0], rtol=0, atol=1e-12)


@pytest.mark.check("pissa", 3)
@pytest.mark.parametrize("svd", ["exact", "randomized"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_start_is_a_projection_of_the_weight(shape: tuple[int, int], svd: Any) -> None:
    weight, rank = matrix(*shape), 5
    up, down, scaling = begin(weight, rank, 7.0, svd=svd, oversample=1, iterations=0)
    u = torch.linalg.qr(up).Q  # spans what `up` spans
    torch.testing.assert_close(scaling * up @ down, u @ u.T @ weight, rtol=0, atol=1e-11)
    residual = weight - scaling * up @ down
    if svd == "randomized":  # its own U, not the best one: but still nothing of the function is lost
        best = torch.linalg.svdvals(weight)[rank:].square().sum()
        assert residual.square().sum() > 1.01 * best
    model = rw.adapt(one_linear(weight), rw.recipes.pissa(rank=rank, alpha=7, svd=svd, oversample=1, iterations=0, base="fold"))
    x = torch.randn(3, shape[1], dtype=torch.float64)
    torch.testing.assert_close(model(x), x @ weight.T, rtol=0, atol=1e-12)


@pytest.mark.check("pissa", 4)
def test_same_seed_gives_the_same_factors_whatever_the_global_state() -> None:
    def factors(seed: int, run_seed: int = 0) -> list[Tensor]:
        model, torch_seed = llama(), seed
        torch.manual_seed(torch_seed)
        if seed % 2:
            torch.rand(7)
        rw.adapt(model, rw.recipes.pissa(rank=4, svd="randomized", oversample=1, iterations=0, seed=run_seed))
        return [p.detach() for p in model.parameters() if p.requires_grad]

    first, second, other = factors(1), factors(2), factors(1, run_seed=1)
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    assert not all(torch.equal(one, two) for one, two in zip(first, other, strict=True))
    # one site's draw depends on no other site
    alone = rw.adapt(llama(), rw.recipes.pissa(rank=4, svd="randomized", oversample=1, iterations=0, targets=["layers.1.mlp.up_proj"]))
    among = rw.adapt(llama(), rw.recipes.pissa(rank=4, svd="randomized", oversample=1, iterations=0))
    name = "model.layers.1.mlp.up_proj"
    assert torch.equal(site(alone, name).update.up, site(among, name).update.up)  # type: ignore[union-attr]


SCRIPT = """
import hashlib, sys, torch
torch.set_num_threads(1)
torch.manual_seed(int(sys.argv[1]))
import rankwise as rw
weight = torch.linspace(-1, 1, 24 * 40).sin().reshape(24, 40) + torch.eye(24, 40)
model = torch.nn.Sequential(torch.nn.Linear(40, 24))
with torch.no_grad():
    model[0].weight.copy_(weight)
rw.adapt(model, rw.recipes.pissa(rank=4, svd="randomized", oversample=1, iterations=1))
digest = hashlib.sha256()
for parameter in (model[0].update.down, model[0].update.up):
    digest.update(parameter.detach().numpy().tobytes())
print(digest.hexdigest())
"""


@pytest.mark.check("pissa", 4)
def test_same_seed_gives_the_same_factors_in_two_processes() -> None:
    runs = [subprocess.Popen([sys.executable, "-c", SCRIPT, seed], stdout=subprocess.PIPE, text=True) for seed in ("1", "2")]
    first, second = (run.communicate()[0].strip() for run in runs)
    assert len(first) == 64
    assert first == second


@pytest.mark.parametrize("shape", SHAPES)
def test_signs_are_fixed(shape: tuple[int, int]) -> None:
    up, _, _ = begin(matrix(*shape), 5)
    largest = up.gather(0, up.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()
    flipped, _, _ = begin(-matrix(*shape), 5)  # its left vectors have the other sign, or the right ones: `up` is the same
    torch.testing.assert_close(flipped, up, rtol=0, atol=1e-12)


@pytest.mark.check("pissa", 5)
@pytest.mark.parametrize("base", ["keep", "fold"])
def test_trained_then_merged_unmerged_disabled(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The part of the Check that needs no file; nothing after `adapt` decomposes a matrix again."""
    model, ids = llama(), token_ids()
    before = logits(model, ids)
    rw.adapt(model, rw.recipes.pissa(rank=4, base=base, lr=5e-3))

    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("a decomposition after adapt")

    for name in ("svd", "eigh", "qr", "svdvals"):
        monkeypatch.setattr(torch.linalg, name, forbidden)
    optimizer = rw.optimizer(model)
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = logits(model, ids)
    assert (trained - before).abs().max() > 0.01
    rw.merge(model)
    torch.testing.assert_close(logits(model, ids), trained, rtol=1e-4, atol=1e-4)
    rw.unmerge(model)
    assert torch.equal(logits(model, ids), trained)
    with rw.disabled(model):
        off = logits(model, ids)
    rw.unadapt(model)
    for base_again in (off, logits(model, ids)):
        if base == "keep":
            assert torch.equal(base_again, before)
        else:
            torch.testing.assert_close(base_again, before, rtol=1e-5, atol=1e-5)


@pytest.mark.check("pissa", 6)
def test_the_stacked_pair_on_the_pristine_weight_is_the_trained_model() -> None:
    """The algebra of the export: [A; A0] and [B, -B0] as one plain pair of rank 2r."""
    weight = matrix(24, 40)
    model = perturb(rw.adapt(one_linear(weight), rw.recipes.pissa(rank=5, alpha=7)))
    module = site(model)
    factors, offset = module.update.factors(), module.offset  # type: ignore[union-attr]
    down = torch.cat([factors.down, offset.down])  # type: ignore[union-attr]
    up = torch.cat([factors.up, -offset.up], dim=1)  # type: ignore[union-attr]
    plain = rw.adapt(one_linear(weight), rw.recipes.lora(rank=10, alpha=14))  # alpha doubled, so that the scaling is the same
    assert site(plain).site.scaling == module.site.scaling
    site(plain).update.put(down=down, up=up)  # type: ignore[union-attr]
    x = torch.randn(3, 40, dtype=torch.float64)
    torch.testing.assert_close(plain(x), model(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(model(x), x @ dense_weight(module).T, rtol=0, atol=1e-12)
    ours_down, ours_up = stacked(factors, module.subtracted())
    torch.testing.assert_close(ours_up @ ours_down, factors.scaling * up @ down, rtol=0, atol=1e-12)


@pytest.mark.check("pissa", 7)
def test_the_residual_has_a_smaller_range_than_the_weight() -> None:
    """Why the method helps quantization, without a quantizer: what is left to hold in 4 bits is smaller, in every norm of the paper."""
    weight = matrix(128, 128)
    up, down, scaling = begin(weight, 16)
    residual = weight - scaling * up @ down

    def absmax_error(value: Tensor) -> float:  # symmetric 4-bit rounding in blocks of 64
        blocks = value.reshape(-1, 64)
        step = blocks.abs().amax(1, keepdim=True) / 7
        return float(torch.linalg.matrix_norm((blocks - (blocks / step).round() * step).reshape(value.shape), "nuc"))

    assert absmax_error(residual) < 0.85 * absmax_error(weight)


@pytest.mark.check("pissa", 8)
@pytest.mark.parametrize("base", ["keep", "fold"])
def test_first_gradients(base: str) -> None:
    weight = matrix(24, 40)
    model = rw.adapt(one_linear(weight), rw.recipes.pissa(rank=5, alpha=7, base=base))
    update: Any = site(model).update
    x, g = torch.randn(6, 40, dtype=torch.float64), torch.randn(6, 24, dtype=torch.float64)
    model(x).backward(g)
    s = 7 / 5
    torch.testing.assert_close(update.up.grad, s * g.T @ (x @ update.down.detach().T), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(update.down.grad, s * update.up.detach().T @ g.T @ x, rtol=1e-12, atol=1e-12)
    assert update.up.grad.abs().min() > 0
    assert update.down.grad.abs().min() > 0
    lora = rw.adapt(one_linear(weight), rw.recipes.lora(rank=5))
    lora(x).backward(g)
    assert not site(lora).update.down.grad.any()  # type: ignore[union-attr]


@pytest.mark.check("pissa", 9)
@pytest.mark.parametrize("shape", [(512, 512), (256, 700), (700, 256)])
def test_the_fast_path_captures_the_energy(shape: tuple[int, int]) -> None:
    weight, rank = matrix(*shape).float(), 32
    u = largest_directions(weight, rank, "randomized", site_generator(0, "proj"), rank, 2)
    best = torch.linalg.svdvals(weight)[:rank].square().sum()
    assert (u.T @ weight).square().sum() >= 0.999 * best
    torch.testing.assert_close(u.T @ u, torch.eye(rank), rtol=0, atol=1e-5)
    exactly = largest_directions(weight, rank, "randomized", site_generator(0, "proj"), 0, 0)
    assert (exactly.T @ weight).square().sum() < 0.999 * best  # without oversampling and iterations it would not


def slow_spectrum(out: int, wide: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Singular values falling like i^-0.2, slower than those of trained weights."""
    generator, small = torch.Generator().manual_seed(4), min(out, wide)
    left, right = (torch.linalg.qr(torch.randn(side, small, generator=generator).to(dtype)).Q for side in (out, wide))
    return (left * torch.arange(1, small + 1).to(dtype) ** -0.2) @ right.T


@pytest.mark.parametrize("shape", [(600, 600), (530, 901), (901, 530)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_krylov_space_finds_the_subspace_where_power_iterations_do_not(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, rank = slow_spectrum(*shape, dtype), 16
    best = torch.linalg.svd(weight).U[:, :rank]
    u = largest_directions(weight, rank, "randomized", site_generator(0, "proj"))
    torch.testing.assert_close(u.T @ u, torch.eye(rank, dtype=dtype), rtol=0, atol=1e-5)
    assert (best.T @ u).square().sum() >= 0.999 * rank

    q = torch.linalg.qr(weight @ torch.randn(shape[1], 2 * rank, generator=site_generator(0, "proj")).to(weight)).Q
    for _ in range(4):
        q = torch.linalg.qr(weight @ torch.linalg.qr(weight.T @ q).Q).Q
    power = q @ torch.linalg.svd(q.T @ weight).U[:, :rank]
    assert (best.T @ power).square().sum() < 0.99 * rank


def test_the_krylov_space_of_a_weight_of_low_rank() -> None:
    generator = torch.Generator().manual_seed(5)
    left, right = torch.randn(700, 5, generator=generator), torch.randn(5, 640, generator=generator)
    u = largest_directions(left @ right, 8, "randomized", site_generator(0, "proj"))
    torch.testing.assert_close(u.T @ u, torch.eye(8), rtol=0, atol=1e-5)
    torch.testing.assert_close(u[:, :5] @ (u[:, :5].T @ left), left, rtol=0, atol=1e-3)
    zero = largest_directions(torch.zeros(700, 640), 8, "randomized", site_generator(0, "proj"))
    torch.testing.assert_close(zero.T @ zero, torch.eye(8), rtol=0, atol=1e-5)


def test_auto_is_exact_for_small_weights_and_where_the_rank_leaves_no_room() -> None:
    for shape, rank in (((20, 1024), 4), ((512, 700), 16), ((520, 520), 130)):
        weight, generator = slow_spectrum(*shape), site_generator(0, "proj")
        state = generator.get_state()
        assert torch.equal(largest_directions(weight, rank, "auto", generator), largest_directions(weight, rank, "exact", generator))
        assert torch.equal(generator.get_state(), state)
    generator = site_generator(0, "proj")
    found = largest_directions(slow_spectrum(520, 600), 16, "auto", generator)
    assert torch.equal(found, largest_directions(slow_spectrum(520, 600), 16, "randomized", site_generator(0, "proj")))


@pytest.mark.parametrize("alpha", [4, 10])
def test_exact_start_is_pefts(alpha: int) -> None:
    """PEFT folds; its product and ours are the same matrix, and so is the residual. (Its signs are arbitrary.)"""
    targets = ["q_proj", "k_proj", "down_proj"]
    theirs = get_peft_model(llama(), LoraConfig(r=4, lora_alpha=alpha, init_lora_weights="pissa", target_modules=targets))
    ours = rw.adapt(llama(), rw.recipes.pissa(rank=4, alpha=alpha, targets=targets, base="fold"))
    for name, module in adapted_sites(ours).items():
        layer = theirs.base_model.model.get_submodule(name)
        factors = module.update.factors()  # type: ignore[union-attr]
        product = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        torch.testing.assert_close(factors.delta(), product, rtol=0, atol=2e-6)
        torch.testing.assert_close(module.weight, layer.base_layer.weight, rtol=0, atol=2e-6)
    ids = token_ids()
    torch.testing.assert_close(logits(ours, ids), logits(theirs.eval(), ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scaling", ["lora", "rslora"])
@pytest.mark.parametrize("alpha", [3, 4, 10])
def test_the_kept_base_starts_bit_for_bit_whatever_the_scaling(alpha: int, scaling: str) -> None:
    """Also where the scaling is no power of two, in fp32 and bf16, fused and as the reference form."""
    for dtype in (torch.float32, torch.bfloat16):
        weight = matrix(24, 40).to(dtype)
        for recipe in (rw.recipes.pissa(rank=7, alpha=alpha, scaling=scaling), rw.recipes.olora(rank=7, alpha=alpha, scaling=scaling)):
            for changed in (recipe, recipe.replace(update="moslora"), recipe.replace(gain="dora")):
                model = rw.adapt(one_linear(weight), changed)
                x = torch.randn(5, 40).to(dtype)
                expected = nn.functional.linear(x, weight)
                assert torch.equal(model(x), expected)
                handle = model.proj.base_layer.register_forward_hook(lambda *_: None)  # type: ignore[union-attr]
                assert torch.equal(model(x), expected)
                handle.remove()


def test_the_default_scaling_is_one_at_any_rank() -> None:
    assert rw.recipes.pissa(rank=5).scaling_of(5, rw.recipes.pissa(rank=5).alpha or 0) == 1.0
    assert rw.recipes.pissa().alpha == rw.recipes.pissa().rank


def test_rank_above_a_side_and_bad_options_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"rank=25 at proj is larger than its smaller side 24"):
        rw.adapt(one_linear(matrix(24, 40)), rw.recipes.pissa(rank=25))
    with pytest.raises(RecipeError, match="svd"):
        rw.recipes.lora().replace(init={"name": "pissa", "svd": "fast"})
    with pytest.raises(RecipeError, match="dropout would drop a part of the pretrained function"):
        rw.recipes.pissa(base="fold", dropout=0.1)


def test_a_weight_of_lower_rank_than_asked_for() -> None:
    """Directions of length zero start at down = 0, train, and are reported."""
    weight = matrix(24, 40)[:, :3] @ torch.randn(3, 40, dtype=torch.float64)  # rank 3
    model = rw.adapt(one_linear(weight), rw.recipes.pissa(rank=5))
    update: Any = site(model).update
    assert torch.isfinite(update.up).all()
    assert torch.isfinite(update.down).all()
    assert any("2 directions of length zero" in note for note in model.rankwise.notes)  # type: ignore[union-attr]
    x = torch.randn(6, 40, dtype=torch.float64)
    torch.testing.assert_close(model(x), x @ weight.T, rtol=0, atol=1e-11)
    model(x).square().sum().backward()
    model(x).backward(torch.randn(6, 24, dtype=torch.float64))
    assert (update.down.grad.norm(dim=1) > 1e-3).all()
