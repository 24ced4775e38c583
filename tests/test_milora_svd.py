"""MiLoRA with minor singular components, from dense decompositions in fp64."""

from typing import Any

import pytest
import torch
from test_pissa import matrix
from tiny_models import dense_weight, llama, logits, one_linear, perturb, site, token_ids
from torch import Tensor

import rankwise as rw
from rankwise.inits import MinorComponents, site_generator
from rankwise.inits.spectral import smallest_directions
from rankwise.updates import Site

SHAPES = [(24, 64), (64, 24), (32, 32)]


def begin(weight: Tensor, rank: int, alpha: float | None = None, seed: int = 0, **options: Any) -> tuple[Tensor, Tensor, float]:
    """(up, down, scaling) of a start."""
    scaling = (rank if alpha is None else alpha) / rank
    place = Site("proj", "linear", weight.shape[1], weight.shape[0], rank, scaling)
    begun = MinorComponents(**options).begin(place, weight, None, site_generator(seed, "proj"))
    assert begun.down is not None
    assert begun.up is not None
    return begun.up, begun.down, scaling


def product(*args: Any, **options: Any) -> Tensor:
    up, down, scaling = begin(*args, **options)
    return scaling * up @ down


@pytest.mark.check("milora-svd", 1, 8)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_start_is_the_trailing_part_of_the_weight(shape: tuple[int, int]) -> None:
    weight, rank, k = matrix(*shape), 5, min(shape)
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    start = product(weight, rank, 7.0)
    torch.testing.assert_close(start, (u[:, -rank:] * s[-rank:]) @ vt[-rank:], rtol=0, atol=1e-12)
    residual = weight - start
    assert (residual.T @ u[:, -rank:]).abs().max() < 1e-12
    assert (residual @ vt[-rank:].T).abs().max() < 1e-12
    assert torch.linalg.matrix_rank(residual, atol=1e-10) == k - rank


@pytest.mark.check("milora-svd", 1)
@pytest.mark.parametrize("base", ["keep", "fold"])
def test_residual_and_start_give_the_weight_back_in_the_built_model(base: str) -> None:
    weight = matrix(24, 64)
    model = rw.adapt(one_linear(weight), rw.recipes.milora_svd(rank=5, alpha=7, base=base))
    module = site(model)
    held = module.weight if base == "fold" else weight - module.site.scaling * module.offset.up @ module.offset.down  # type: ignore[union-attr]
    torch.testing.assert_close(held + module.update.factors().delta(), weight, rtol=0, atol=1e-12)  # type: ignore[union-attr]


@pytest.mark.check("milora-svd", 2, 8)
@pytest.mark.parametrize("shape", SHAPES)
def test_least_energy_of_all_selectors(shape: tuple[int, int]) -> None:
    weight, rank = matrix(*shape), 5
    s = torch.linalg.svdvals(weight)
    energy = {name: float(product(weight, rank, selector=name).square().sum()) for name in ("min", "mid", "max", "random")}
    assert energy["min"] == pytest.approx(float(s[-rank:].square().sum()), rel=1e-10)
    assert energy["max"] == pytest.approx(float(s[:rank].square().sum()), rel=1e-12)
    first = (min(shape) - rank) // 2
    assert energy["mid"] == pytest.approx(float(s[first : first + rank].square().sum()), rel=1e-12)
    assert energy["min"] < energy["mid"] < energy["max"]
    assert energy["min"] <= energy["random"] <= energy["max"]
    pissa = rw.adapt(one_linear(weight), rw.recipes.pissa(rank=rank))
    torch.testing.assert_close(
        site(pissa).update.factors().delta(),  # type: ignore[union-attr]
        product(weight, rank, selector="max"),
        rtol=0,
        atol=1e-12,
    )


@pytest.mark.check("milora-svd", 3, 8)
@pytest.mark.parametrize("shape", SHAPES)
def test_at_full_rank_every_selector_takes_all(shape: tuple[int, int]) -> None:
    weight = matrix(*shape)
    for selector in ("min", "max", "mid", "random"):
        torch.testing.assert_close(product(weight, min(shape), selector=selector), weight, rtol=0, atol=1e-11)


@pytest.mark.check("milora-svd", 4)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_projector_of_the_gram_matrix_is_that_of_the_decomposition(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, rank = matrix(*shape).to(dtype), 6
    u = smallest_directions(weight, rank)
    assert u.dtype == dtype
    exact = torch.linalg.svd(weight.double(), full_matrices=False)
    assert exact.S[-rank - 1] - exact.S[-rank] > 1e-3  # the gap
    expected = exact.U[:, -rank:] @ exact.U[:, -rank:].T
    assert (u.double() @ u.double().T - expected).abs().max() < 1e-6
    assert (u.T @ u - torch.eye(rank, dtype=dtype)).abs().max() < 1e-5


def with_zeros(shape: tuple[int, int], dead: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A weight whose `dead` smallest singular values are zero."""
    u, s, vt = torch.linalg.svd(matrix(*shape), full_matrices=False)
    s[-dead:] = 0
    return ((u * s) @ vt).to(dtype)


@pytest.mark.check("milora-svd", 5)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("dead", "rank"), [(3, 5), (6, 4), (5, 5)])
@pytest.mark.parametrize("shape", SHAPES)
def test_dead_directions_are_replaced_and_train(shape: tuple[int, int], dead: int, rank: int, dtype: torch.dtype) -> None:
    weight = with_zeros(shape, dead, dtype)
    model = rw.adapt(one_linear(weight), rw.recipes.milora_svd(rank=rank))
    update: Any = site(model).update
    replaced = min(dead, rank)
    assert int((update.down == 0).all(1).sum()) == replaced
    torch.testing.assert_close(update.up[:, (update.down == 0).all(1)].norm(dim=0), torch.ones(replaced, dtype=dtype), rtol=1e-5, atol=1e-5)
    assert any(f"{replaced} directions of length zero" in note for note in model.rankwise.notes)  # type: ignore[union-attr]
    # still the least energy: the dead directions must not take in what belongs to the others
    s = torch.linalg.svdvals(weight.double())
    energy = update.factors().delta().double().square().sum()
    torch.testing.assert_close(energy, s[-rank:].square().sum(), rtol=1e-4, atol=1e-12 if dtype == torch.float64 else 1e-9)
    x = torch.randn(6, shape[1], dtype=dtype)
    expected = x @ weight.T
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        (model(x) - 1).square().sum().backward()
        assert (update.down.grad.norm(dim=1) > 1e-4).all()
        optimizer.step()
    assert torch.isfinite(update.up).all()
    assert (update.down.norm(dim=1) > 0).all()


@pytest.mark.check("milora-svd", 5)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("how", ["doubled columns", "pruned rows and columns", "all zero"])
def test_weights_that_are_exactly_deficient(how: str, shape: tuple[int, int]) -> None:
    weight, k, rank = matrix(*shape).float(), min(shape), 6
    if how == "doubled columns":
        weight = torch.cat([weight[:, : k // 2], weight[:, : k // 2], torch.zeros(shape[0], shape[1] - 2 * (k // 2))], dim=1)
    elif how == "pruned rows and columns":
        weight[:, k - 4 :] = 0
        weight[k - 4 :] = 0
    else:
        weight.zero_()
    up, down, scaling = begin(weight, rank)
    assert torch.isfinite(up).all()
    assert (up.norm(dim=0) > 0).all()
    s = torch.linalg.svdvals(weight.double())[-rank:]
    torch.testing.assert_close((scaling * up @ down).double().norm(), s.norm(), rtol=1e-4, atol=1e-6)


@pytest.mark.check("milora-svd", 6)
@pytest.mark.parametrize("base", ["keep", "fold"])
def test_alpha_does_not_change_the_function_at_the_start(base: str) -> None:
    weight = matrix(24, 64)
    x = torch.randn(3, 64, dtype=torch.float64)
    for alpha in (1, 5, 64):
        assert (product(weight, 5, alpha) - product(weight, 5)).abs().max() < 1e-13
        model = rw.adapt(one_linear(weight), rw.recipes.milora_svd(rank=5, alpha=alpha, base=base))
        torch.testing.assert_close(model(x), x @ weight.T, rtol=0, atol=1e-12)


@pytest.mark.check("milora-svd", 7)
def test_bf16_fold_is_off_by_rounding_and_keep_by_nothing() -> None:
    weight = matrix(64, 64).bfloat16()
    x = torch.randn(20, 64).bfloat16()
    expected = torch.nn.functional.linear(x, weight)
    kept = rw.adapt(one_linear(weight), rw.recipes.milora_svd(rank=8))
    assert torch.equal(kept(x), expected)
    folded = rw.adapt(one_linear(weight), rw.recipes.milora_svd(rank=8, base="fold"))
    module = site(folded)
    effective = module.weight.double() + module.update.factors().delta().double()  # type: ignore[union-attr]
    difference = (effective - weight.double()).norm()
    assert 0 < difference <= 2**-8 * weight.double().norm()  # bf16 rounds to within half of 2^-7 of each element
    # one rounding only: as close as rounding the exact residual is
    residual = weight.double() - module.update.factors().delta().double()  # type: ignore[union-attr]
    assert (module.weight != residual.bfloat16()).float().mean() < 2e-3


@pytest.mark.check("milora-svd", 9)
def test_the_stacked_pair_on_the_pristine_weight_is_the_trained_model() -> None:
    weight = matrix(24, 64)
    model = perturb(rw.adapt(one_linear(weight), rw.recipes.milora_svd(rank=5, alpha=7)), size=1.0)
    module = site(model)
    factors, offset = module.update.factors(), module.offset  # type: ignore[union-attr]
    plain = rw.adapt(one_linear(weight), rw.recipes.lora(rank=10, alpha=14))
    site(plain).update.put(  # type: ignore[union-attr]
        down=torch.cat([factors.down, offset.down]),  # type: ignore[union-attr]
        up=torch.cat([factors.up, -offset.up], dim=1),  # type: ignore[union-attr]
    )
    x = torch.randn(3, 64, dtype=torch.float64)
    torch.testing.assert_close(plain(x), model(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(model(x), x @ dense_weight(module).T, rtol=0, atol=1e-12)
    assert (model(x) - x @ weight.T).abs().max() > 1e-3


@pytest.mark.check("milora-svd", 10)
def test_the_random_selector_is_seeded() -> None:
    weight = matrix(24, 64)
    torch.manual_seed(1)
    one = begin(weight, 5, selector="random")[0]
    torch.manual_seed(2)
    assert torch.equal(one, begin(weight, 5, selector="random")[0])
    others = [begin(weight, 5, seed=seed, selector="random")[0] for seed in range(1, 5)]
    assert not any(torch.equal(one, other) for other in others)
    # five whole singular directions, ascending in index
    u = torch.linalg.svd(weight, full_matrices=False).U
    overlap = (u.T @ (one / one.norm(dim=0))).abs()  # (k, 5)
    torch.testing.assert_close(overlap.max(0).values, torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-10)
    assert overlap.argmax(0).diff().min() > 0


def test_unit_balance_keeps_the_product_and_makes_up_orthonormal() -> None:
    weight = matrix(24, 64)
    up, down, scaling = begin(weight, 5, 7.0, balance="unit")
    torch.testing.assert_close(up.T @ up, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(scaling * up @ down, product(weight, 5), rtol=0, atol=1e-12)


def test_trains_on_a_model() -> None:
    model, ids = llama(), token_ids()
    before = logits(model, ids)
    rw.adapt(model, rw.recipes.milora_svd(rank=4, dropout=0.05, lr=1e-2))
    assert torch.equal(logits(model, ids), before)
    optimizer = rw.optimizer(model)
    losses = []
    for _ in range(5):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
