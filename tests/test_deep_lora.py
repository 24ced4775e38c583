"""Deep LoRA: starts, balance, the subspace theorem, frames from one gradient; against wide factors in fp64."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_models import relative
from tiny_models import OneLinear, activation_bytes, llama, logits, one_linear, perturb, saved_tensors, site, token_ids
from torch import Tensor, nn
from training_models import make_world, plain_config, silent_console

import rankwise as rw
from rankwise.checkpoint import export_lora, load_trainable_state, trainable_state
from rankwise.errors import CalibrationError, CheckpointError, ConfigError, RecipeError
from rankwise.inits import DeepFrames, Statistics, site_generator
from rankwise.sites import adapted_sites
from rankwise.storage import NF4Linear
from rankwise.updates import Site
from rankwise.updates.deep import frame

DOUBLE = torch.float64
TARGETS = ["q_proj", "k_proj", "down_proj"]
SHAPES = [(24, 24), (24, 40), (40, 24)]  # (out, in)


def batch(rows: int = 4, length: int = 9, seed: int = 1) -> dict[str, Tensor]:
    ids = token_ids(rows, length, seed)
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def low_rank(out: int, width: int, rank: int, seed: int = 0) -> Tensor:
    """(out, in) in fp64 with singular values 2, 1.5, 1 and so on down."""
    values = torch.linspace(2, 1, rank, dtype=DOUBLE) if rank > 1 else torch.ones(1, dtype=DOUBLE)
    return frame(out, rank, rng(seed)) * values @ frame(width, rank, rng(seed + 1)).T


def begin(gradient: Tensor, rank: int, seed: int = 0, tokens: int = 1000, **options: Any) -> tuple[Tensor, Tensor]:
    """(right (in, rank), left (out, rank)) of a gradient (out, in)."""
    place = Site("proj", "linear", gradient.shape[1], gradient.shape[0], rank, 1.0)
    begun = DeepFrames(**options).begin(place, None, Statistics(tokens, gradient=gradient), site_generator(seed, "proj"))
    assert begun.down is not None
    assert begun.up is not None
    return begun.down.T, begun.up


def principal(one: Tensor, other: Tensor) -> float:
    """The smallest principal cosine between two column spaces of the same dimension."""
    return float(torch.linalg.svdvals(torch.linalg.qr(one).Q.T @ torch.linalg.qr(other).Q)[-1])


def inside(vectors: Tensor, space: Tensor) -> Tensor:
    """The lengths of the projections of unit columns on a column space."""
    return (torch.linalg.qr(space).Q.T @ vectors).norm(dim=0)


def completed(right: Tensor, left: Tensor, seed: int = 0) -> Tensor:
    """An orthogonal Q (d, d) with Q right = left, arbitrary elsewhere; right, left (d, rank) orthonormal."""

    def complement(columns: Tensor, generator: torch.Generator) -> Tensor:
        draw = torch.randn(len(columns), len(columns) - columns.shape[1], generator=generator, dtype=DOUBLE)
        return torch.linalg.qr(torch.cat([columns, draw], 1)).Q[:, columns.shape[1] :]

    return left @ right.T + complement(left, rng(seed)) @ complement(right, rng(seed + 1)).T


def wide(q: Tensor, epsilon: float, seed: int = 0) -> list[Tensor]:
    """W_1, W_2, W_3 (d, d), each epsilon times an orthogonal matrix, whose product is epsilon^3 q."""
    one, two = frame(len(q), len(q), rng(seed)), frame(len(q), len(q), rng(seed + 1))
    return [epsilon * one, epsilon * two, epsilon * q @ (two @ one).T]


def null_space_frames(factors: list[Tensor], gradient: Tensor, epsilon: float, half: int) -> tuple[Tensor, Tensor]:
    """(right, left) as the official code makes them, in our orientation: the orthogonal complement of an intersection of null spaces.

    factors: W_1 (d, d) square and orthogonal times epsilon, W_2, W_3. gradient: of the loss by the product.
    """
    one, two, three = factors
    first = (three @ two).T @ gradient  # of the loss by W_1
    u, _, vt = torch.linalg.svd(first)
    outside_v, outside_u = vt.T[:, half:], one.T @ u[:, half:] / epsilon
    # the intersection of two spans: null vectors of their stacked projectors' complements
    stacked = torch.cat([torch.eye(len(one), dtype=DOUBLE) - p @ p.T for p in (outside_v, outside_u)])
    _, s, vt = torch.linalg.svd(stacked)
    right = vt[: int((s > 1e-6).sum())].T
    return right, three @ two @ one @ right / epsilon**3


# --- starts ----------------------------------------------------------------------------------------------------------------------------


def factors_of(module: Any) -> list[Tensor]:
    """W_1 to W_L of a narrow update, C_1 to C_L of a compressed one, in fp64."""
    update = module.update
    cores = [core.detach().double() for core in update.cores]
    return cores if update.choice.variant == "compressed" else [update.down.detach().double(), *cores, update.up.detach().double()]


@pytest.mark.check("deep-lora", 1)
@pytest.mark.parametrize("depth", [3, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_narrow_start_is_orthogonal_and_small(shape: tuple[int, int], depth: int) -> None:
    model = rw.adapt(OneLinear(shape[1], shape[0], dtype=torch.float32), rw.recipes.deep_lora(rank=8, depth=depth))
    factors = factors_of(site(model))
    assert [tuple(w.shape) for w in factors] == [(8, shape[1]), *[(8, 8)] * (depth - 2), (shape[0], 8)]
    for w in factors:
        gram = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
        torch.testing.assert_close(gram, 1e-6 * torch.eye(8, dtype=DOUBLE), rtol=0, atol=1e-9)
    delta = site(model).update.factors().delta().detach()  # type: ignore[union-attr]
    assert float(torch.linalg.matrix_norm(delta.double(), 2)) == pytest.approx(1e-3**depth, rel=1e-4)
    assert int((torch.linalg.svdvals(delta.double()) > 0.9 * 1e-3**depth).sum()) == 8


@pytest.mark.check("deep-lora", 1)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", [{}, {"frames": "identity"}, {"depth": 2}, {"rank": 7}])
def test_a_compressed_start_is_orthogonal_and_small(shape: tuple[int, int], options: dict[str, Any]) -> None:
    fields = {"rank": 8, "variant": "compressed"} | options
    model = Fit(torch.zeros(*shape), low_rank(*shape, 5).float())
    rw.adapt(model, rw.recipes.deep_lora(**fields), calibration=[{}])
    update: Any = site(model).update
    rank, depth = fields["rank"], fields.get("depth", 3)
    eye = torch.eye(rank)
    assert all(torch.equal(core, 1e-3 * eye) for core in update.cores)
    assert len(update.cores) == depth
    torch.testing.assert_close(update.down @ update.down.T, eye, rtol=0, atol=1e-6)
    torch.testing.assert_close(update.up.T @ update.up, eye, rtol=0, atol=1e-6)
    size = torch.linalg.matrix_norm(update.factors().delta().double(), 2)
    assert float(size) == pytest.approx(1e-3**depth, rel=1e-4)


def test_all_ways_to_start_a_variant_are_small_and_orthogonal() -> None:
    """Where the directions come from, and which factors hold epsilon, are two axes: narrow in frames, compressed without a gradient."""
    target = low_rank(20, 24, 5)
    for variant, init in (("narrow", "deep-lora"), ("compressed", "own")):
        model: Any = Fit(torch.zeros_like(target), target)
        rw.adapt(model, rw.recipes.deep_lora(rank=6, variant=variant).replace(init=init), calibration=[{}])
        update: Any = site(model).update
        outer = 1e-3 if variant == "narrow" else 1.0
        eye = torch.eye(6, dtype=DOUBLE)
        torch.testing.assert_close(update.up.T @ update.up, outer**2 * eye, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(update.down @ update.down.T, outer**2 * eye, rtol=1e-12, atol=1e-12)
        assert float(torch.linalg.matrix_norm(update.factors().delta(), 2)) == pytest.approx(1e-9, rel=1e-10)
        # and whether the frames hold the gradient's leading vectors
        v = torch.linalg.svd(target, full_matrices=False).Vh[:3].T
        held = inside(v, update.down.detach().T)
        assert bool((held > 1 - 1e-12).all()) == (init == "deep-lora")


@pytest.mark.parametrize("variant", ["narrow", "compressed"])
def test_there_is_no_scaling_unless_an_alpha_is_given_and_then_the_start_stays(variant: Any) -> None:
    sizes = {}
    for label, fields in {
        "none": {}, "rs": {"scaling": "rslora"}, "alpha": {"alpha": 20.0}, "both": {"alpha": 20.0, "scaling": "rslora"},
        "pattern": {"alpha_pattern": {"proj": 2.5}, "alpha": 1.0}, "rank": {"rank_pattern": {"proj": 2}},
    }.items():  # fmt: skip
        recipe = rw.recipes.deep_lora(**{"rank": 5, "variant": variant} | fields).replace(init="own")
        module = site(rw.adapt(OneLinear(12, 9), recipe))
        sizes[label] = module.site.scaling
        delta = module.update.factors().delta()  # type: ignore[union-attr]
        assert float(torch.linalg.matrix_norm(delta, 2)) == pytest.approx(1e-9, rel=1e-10)
    assert sizes == pytest.approx({"none": 1, "rs": 1, "alpha": 4, "both": 20 / 5**0.5, "pattern": 0.5, "rank": 1}, rel=1e-15)


@pytest.mark.parametrize("storage", ["keep", "nf4"])
@pytest.mark.parametrize("fields", [{}, {"variant": "compressed"}, {"variant": "compressed", "gamma": 0}, {"alpha": 7.0}])
def test_exact_zero_starts_at_the_base_bit_for_bit(fields: dict[str, Any], storage: str, tmp_path: Path) -> None:
    """Also where the start is so large that it would show."""
    ids = token_ids()
    for epsilon, exact in ((1e-3, True), (1.0, True), (1.0, False)):
        model = llama() if storage == "keep" else rw.unadapt(rw.adapt(llama(), rw.recipes.lora(rank=4, storage="nf4")))
        before = logits(model, ids)
        recipe = rw.recipes.deep_lora(rank=4, epsilon=epsilon, exact_zero=exact, **fields)
        rw.adapt(model, recipe, calibration=[batch()])
        assert torch.equal(logits(model, ids), before) == exact
    rw.save(perturb(model), tmp_path)
    perturbed = logits(model, ids)
    rw.unadapt(model)
    assert torch.equal(logits(model, ids), before)
    assert torch.equal(logits(rw.load(model, tmp_path), ids), perturbed)


def test_the_plan_says_how_far_the_start_is_from_the_base() -> None:
    text = " ".join(str(rw.plan(llama(), rw.recipes.deep_lora())).split())
    assert "starts at a size of 1e-09 (spectral norm) and not at zero" in text
    assert "alpha 8, scaling alpha / rank" in text
    assert "spectral norm" not in str(rw.plan(llama(), rw.recipes.deep_lora(exact_zero=True)))


# --- the mathematics -------------------------------------------------------------------------------------------------------------------


class Fit(OneLinear):
    """0.5 ||W - target||^2 for a fully observed target, as a loss of a linear layer: x is the identity, one token per input."""

    def __init__(self, weight: Tensor, target: Tensor, noise: Tensor | None = None) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
        with torch.no_grad():
            self.proj.weight.copy_(weight)
        self.register_buffer("target", target if noise is None else target + noise)

    def forward(self, labels: Tensor | None = None) -> Any:  # type: ignore[override]
        y = self.proj(torch.eye(self.proj.in_features, dtype=self.target.dtype))  # (in, out)
        return {"loss": 0.5 * (y.T - self.target).square().sum()}


def descend(model: Any, lr: float, steps: int) -> list[float]:
    """Plain gradient descent on what trains; the loss before each step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    losses = []
    for _ in range(steps):
        loss = model()["loss"]
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for p, g in zip(parameters, gradients, strict=True):
                p -= lr * g
        losses.append(float(loss.detach()))
    return losses


def imbalance(module: Any) -> list[Tensor]:
    factors = factors_of(module)
    return [after.T @ after - before @ before.T for before, after in itertools.pairwise(factors)]


@pytest.mark.check("deep-lora", 2)
@pytest.mark.parametrize("variant", ["narrow", "compressed"])
def test_gradient_descent_keeps_neighbours_balanced_to_second_order(variant: Any) -> None:
    """One step changes W_{l+1}^T W_{l+1} - W_l W_l^T by lr^2 (g_{l+1}^T g_{l+1} - g_l g_l^T) and by nothing else: the terms in lr cancel.

    Away from the start, where the loss falls fast; at half the rate the same time drifts by half as much.
    """
    target = low_rank(14, 18, 4)
    recipe = rw.recipes.deep_lora(rank=6, depth=4, epsilon=0.6, variant=variant, **({"gamma": 0} if variant == "compressed" else {}))

    def made() -> Any:
        return rw.adapt(Fit(torch.zeros_like(target), target), recipe, calibration=[{}])

    model = made()
    assert all(float(d.abs().max()) < 1e-12 for d in imbalance(site(model)))
    descend(model, 0.02, 30)
    before, lr = imbalance(site(model)), 1e-3
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = dict(zip(map(id, parameters), torch.autograd.grad(model()["loss"], parameters), strict=True))
    update: Any = site(model).update
    ordered = [*update.cores] if variant == "compressed" else [update.down, *update.cores, update.up]
    gs = [gradients[id(w)] for w in ordered]
    descend(model, lr, 1)
    for was, now, g, h in zip(before, imbalance(site(model)), gs, gs[1:], strict=False):
        expected = lr**2 * (h.T @ h - g @ g.T)
        assert float(expected.abs().max()) > 1e-9
        torch.testing.assert_close(now - was, expected, rtol=1e-6, atol=1e-14)
    drifts = []
    for lr in (8e-3, 4e-3):
        model = made()
        losses = descend(model, lr, int(2 / lr))
        assert losses[-1] < 0.7 * losses[0]
        drifts.append(max(float(d.abs().max()) for d in imbalance(site(model))))
    assert drifts[0] / drifts[1] == pytest.approx(2, rel=0.05)


def descend_wide(factors: list[Tensor], target: Tensor, lr: float, steps: int) -> tuple[list[Tensor], list[float]]:
    """Gradient descent on the factors of a product, written out."""
    one, two, three = factors
    losses = []
    for _ in range(steps):
        residual = three @ two @ one - target
        losses.append(0.5 * float(residual.square().sum()))
        one, two, three = (
            one - lr * (three @ two).T @ residual,
            two - lr * three.T @ residual @ one.T,
            three - lr * residual @ (two @ one).T,
        )
    return [one, two, three], losses


@pytest.mark.check("deep-lora", 3)
@pytest.mark.parametrize("epsilon", [1e-3, 0.1])
def test_wide_gradient_descent_stays_in_the_frames(epsilon: float) -> None:
    """(W_1(t) - c(t) W_1(0)) (1 - right right^T) = 0 for a target of rank h, in the frames that our init makes of the first gradient.

    The init draws a Q of its own; the wide factors here are those of that Q. n = 40, r = 6. The spec measured 2e-15.
    """
    target = low_rank(40, 40, 3)
    right, left = begin(-target, 6)
    q = completed(right, left)
    start = wide(q, epsilon)
    outside = torch.eye(40, dtype=DOUBLE) - right @ right.T
    # the gradient at the wide start is not quite that at zero: epsilon^3 q - target. Its frames are the same
    u, _, vt = torch.linalg.svd(epsilon**3 * q - target)
    assert principal(torch.cat([vt[:3].T, q.T @ u[:, :3]], 1), right) > 1 - 1e-12
    for steps in (300, 300 if epsilon == 0.1 else 7000):
        (one, _, _), losses = descend_wide(start, target, 0.2, steps)
        kept, original = one @ outside, start[0] @ outside
        c = float((kept * original).sum() / original.square().sum())
        assert float((kept - c * original).norm() / one.norm()) < 1e-13  # of the size of the rounding of W_1
    assert losses[-1] < 1e-3 * losses[0]  # it has long left its start
    # and any other frames will not do
    other = frame(40, 6, rng(9))
    outside = torch.eye(40, dtype=DOUBLE) - other @ other.T
    kept, original = one @ outside, start[0] @ outside
    c = float((kept * original).sum() / original.square().sum())
    assert float((kept - c * original).norm() / original.norm()) > 0.1


@pytest.mark.check("deep-lora", 6)
@pytest.mark.parametrize("frames", ["random", "identity"])
def test_compressed_with_frozen_frames_tracks_wide_gradient_descent(frames: Any) -> None:
    """Through the adapted model, its calibration and plain autograd; the gap is what the wide form keeps outside of the frames."""
    n, rank, epsilon, lr, steps = 30, 6, 0.1, 0.1, 500
    target, weight = low_rank(n, n, 3), torch.randn(n, n, generator=rng(7), dtype=DOUBLE)
    model: Any = Fit(weight, weight + target)
    recipe = rw.recipes.deep_lora(rank=rank, variant="compressed", frames=frames, gamma=0, epsilon=epsilon)
    rw.adapt(model, recipe, calibration=[{}])
    update: Any = site(model).update
    right, left = update.down.T.clone(), update.up.clone()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {f"proj.update.core{i}" for i in (1, 2, 3)}
    losses = descend(model, lr, steps)
    start = wide(completed(right, left), epsilon)
    factors, expected = descend_wide(start, target, lr, steps)
    gaps = torch.tensor(expected, dtype=DOUBLE) - torch.tensor(losses, dtype=DOUBLE)
    bound = 0.5 * epsilon**6 * (n - rank)
    assert float(gaps[0]) == pytest.approx(bound, rel=1e-8)  # the whole untouched part, at the start
    assert bool((gaps <= bound * (1 + 1e-8)).all())
    assert bool((gaps >= -1e-12).all())
    # what the target does not use of the frames is left at epsilon^3 or below
    assert losses[-1] < 0.5 * epsilon**6 * (rank - 3) < 1e-5 * losses[0]
    inside_frames = left @ left.T @ (factors[2] @ factors[1] @ factors[0]) @ right @ right.T
    torch.testing.assert_close(update.factors().delta().detach(), inside_frames, rtol=0, atol=1e-10)


def test_frozen_frames_do_not_fit_what_they_did_not_see_and_slow_ones_do() -> None:
    """With a part of the target unseen at the first gradient the frames must move: gamma above 0."""
    first, second = low_rank(20, 20, 2), low_rank(20, 20, 2, seed=5)
    ends = {}
    for gamma in (0, 0.3):
        model: Any = Fit(torch.zeros_like(first), first)
        rw.adapt(model, rw.recipes.deep_lora(rank=8, variant="compressed", gamma=gamma, epsilon=0.3), calibration=[{}])
        model.target.copy_(second)
        optimizer = rw.optimizer(model, lr=1e-2)
        for _ in range(400):
            loss = model()["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        ends[gamma] = float(loss.detach()) / float(0.5 * second.square().sum())
    assert ends[0] > 0.3
    assert ends[0.3] < 0.01


@pytest.mark.check("deep-lora", 9)
def test_doubling_the_rank_changes_the_learned_rank_by_nothing() -> None:
    """A target of rank 3 under noise of full rank: LoRA's learned rank is whatever it is given, that of depth 3 is the target's."""
    target = 2 * low_rank(20, 24, 3)
    noise = 0.02 * torch.randn(20, 24, generator=rng(3), dtype=DOUBLE)

    def learned(recipe: Any, steps: int) -> tuple[int, float]:
        model: Any = Fit(torch.zeros_like(target), target, noise)
        rw.adapt(model, recipe)
        losses = descend(model, 0.05, steps)
        assert losses[-1] < 0.02 * losses[0]
        values = torch.linalg.svdvals(site(model).merged_weight())
        return int((values > 1e-3 * values[0]).sum()), losses[-1]

    assert [learned(rw.recipes.deep_lora(rank=rank, epsilon=0.03), 1000)[0] for rank in (4, 8, 16)] == [3, 3, 3]
    assert [learned(rw.recipes.lora(rank=rank, alpha=rank, init="orthonormal"), 600)[0] for rank in (4, 8, 16)] == [4, 8, 16]


# --- the frames ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.check("deep-lora", 4)
@pytest.mark.parametrize("frames", ["random", "identity"])
@pytest.mark.parametrize("seed", range(5))
def test_the_shortcut_is_the_null_space_construction(frames: Any, seed: int) -> None:
    """Square: wide factors whose product is the Q of our frames, fed to the official algorithm, give our frames back."""
    gradient = torch.randn(16, 16, generator=rng(seed), dtype=DOUBLE)
    right, left = begin(gradient, 6, seed, frames=frames)
    q = completed(right, left) if frames == "random" else torch.eye(16, dtype=DOUBLE)
    theirs = null_space_frames(wide(q, 1e-3), gradient, 1e-3, 3)
    assert theirs[0].shape == theirs[1].shape == (16, 6)
    assert principal(theirs[0], right) > 1 - 1e-10
    assert principal(theirs[1], left) > 1 - 1e-10
    torch.testing.assert_close(q @ right, left, rtol=0, atol=1e-12)  # one pair, column by column
    assert principal(begin(gradient, 6, seed + 100, frames=frames)[0], right) < 0.99 or frames == "identity"


@pytest.mark.check("deep-lora", 4)
@pytest.mark.parametrize("shape", [(16, 12), (12, 16), (16, 14)])
def test_the_official_form_of_other_shapes_is_the_null_space_construction(shape: tuple[int, int]) -> None:
    """The official code then works from the larger side, and the frame on the smaller one is Q^T times the other: shorter than 1."""
    gradient = torch.randn(*shape, generator=rng(3), dtype=DOUBLE)
    right, left = begin(gradient, 6, repo_exact=True)
    (large, small), transposed = ((left, right), gradient.T) if shape[0] > shape[1] else ((right, left), gradient)
    n, m = len(small), len(large)
    lengths = torch.linalg.svdvals(small)
    assert float(lengths[0]) <= 1 + 1e-12
    assert int((lengths > 1 - 1e-12).sum()) >= 3
    assert float(lengths[-1]) < 1 - 1e-3
    # a (n, m) with orthonormal rows that sends `large` to `small`: it exists, and the official algorithm finds both frames from it
    values, vectors = torch.linalg.eigh(torch.eye(n, dtype=DOUBLE) - small @ small.T)
    rest = torch.linalg.qr(torch.cat([large, torch.randn(m, m - 6, generator=rng(), dtype=DOUBLE)], 1)).Q[:, 6:]
    missing = (vectors * values.clamp_min(0).sqrt()).flip(1)[:, : m - 6]
    rows = small @ large.T + missing @ rest[:, : missing.shape[1]].T
    torch.testing.assert_close(rows @ rows.T, torch.eye(n, dtype=DOUBLE), rtol=0, atol=1e-10)
    one, two = frame(m, m, rng(1)), frame(m, m, rng(2))
    theirs = null_space_frames([1e-3 * one, 1e-3 * two, 1e-3 * rows @ (two @ one).T], transposed, 1e-3, 3)
    assert principal(theirs[0], large) > 1 - 1e-10
    torch.testing.assert_close(theirs[1] @ theirs[1].T, small @ small.T, rtol=0, atol=1e-8)  # their basis is another one
    # identity: the first rows of the larger one
    right, left = begin(gradient, 6, repo_exact=True, frames="identity")
    assert torch.equal(*((right, left[:n]) if shape[0] > shape[1] else (left, right[:n])))


@pytest.mark.check("deep-lora", 5)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 2, 5, 8, 24])
@pytest.mark.parametrize("options", [{}, {"frames": "identity"}, {"repo_exact": True}, {"frames": "identity", "repo_exact": True}])
def test_the_frames_hold_the_leading_singular_vectors(shape: tuple[int, int], rank: int, options: dict[str, Any]) -> None:
    gradient = torch.randn(*shape, generator=rng(1), dtype=DOUBLE)
    right, left = begin(gradient, rank, **options)
    u, _, vt = torch.linalg.svd(gradient, full_matrices=False)
    taller = shape[0] >= shape[1]
    v_half, u_half = (rank + 1) // 2, rank // 2
    assert bool((inside(vt[:v_half].T, right) > 1 - 1e-8).all())
    if u_half:
        assert bool((inside(u[:, :u_half], left) > 1 - 1e-8).all())
    eye = torch.eye(rank, dtype=DOUBLE)
    for space, orthonormal in ((right, not taller), (left, taller)):
        if orthonormal or "repo_exact" not in options or shape[0] == shape[1]:
            torch.testing.assert_close(space.T @ space, eye, rtol=0, atol=1e-12)
        else:
            assert float(torch.linalg.matrix_norm(space, 2)) < 1 + 1e-12


def test_degenerate_gradients_are_filled_with_random_directions() -> None:
    """A gradient of rank 1 (a regression on one output), and a symmetric one, where V_h and U_h are the same vectors."""
    thin = low_rank(20, 24, 1)
    place = Site("proj", "linear", 24, 20, 6, 1.0)
    begun = DeepFrames().begin(place, None, Statistics(99, gradient=thin), site_generator(0, "proj"))
    assert begun.notes == ("the calibration gradient has rank 1, so 2 of 3 directions on each side are random",)
    symmetric = torch.diag(torch.arange(20, 0, -1, dtype=DOUBLE))
    for gradient, vectors in ((thin, 1), (symmetric, 3), (symmetric[:, :18], 3), (symmetric.float(), 3)):
        u, _, vt = torch.linalg.svd(gradient.double(), full_matrices=False)
        for options in ({}, {"frames": "identity"}):
            right, left = begin(gradient, 6, **options)
            for space in (right, left):
                torch.testing.assert_close(space.T @ space, torch.eye(6, dtype=DOUBLE), rtol=0, atol=1e-12)
            assert bool((inside(vt[:vectors].T, right) > 1 - 1e-6).all())
            assert bool((inside(u[:, :vectors], left) > 1 - 1e-6).all())


@pytest.mark.parametrize("estimate", ["full", "sketch"])
def test_the_frames_come_from_the_models_own_gradient(estimate: Any) -> None:
    model, b = llama(dtype=DOUBLE), batch(6, 12)
    trained = llama(dtype=DOUBLE).requires_grad_(True)
    trained(**b).loss.backward()
    recipe = rw.recipes.deep_lora(rank=4, variant="compressed", estimate=estimate, targets=TARGETS)
    rw.adapt(model, recipe, calibration=[b])
    for name, module in adapted_sites(model).items():
        u, _, vt = torch.linalg.svd(trained.get_submodule(name).weight.grad)
        update: Any = module.update
        least = 1 - 1e-6 if estimate == "full" else 0.99
        assert bool((inside(vt[:2].T, update.down.detach().T) > least).all())
        assert bool((inside(u[:, :2], update.up.detach()) > least).all())


@pytest.mark.check("deep-lora", 10)
@pytest.mark.parametrize("options", [{}, {"frames": "identity"}, {"svd": "randomized"}, {"estimate": "sketch"}, {"repo_exact": True}])
def test_another_global_seed_gives_the_same_frames(options: dict[str, Any]) -> None:
    """Two ranks of one run have the recipe's seed and the calibration rows in common, and nothing else random."""
    starts = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = llama()
        torch.manual_seed(seed)
        recipe = rw.recipes.deep_lora(rank=4, variant="compressed", targets=TARGETS, **options)
        rw.adapt(model, recipe, calibration=[batch()])
        starts.append([p.detach() for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(one, other) for one, other in zip(*starts, strict=True))
    other = rw.adapt(llama(), recipe.replace(seed=3), calibration=[batch()])
    same = [torch.equal(p, q) for p, q in zip(starts[0], [p.detach() for p in other.parameters() if p.requires_grad], strict=True)]
    # the cores are epsilon times the identity whatever the seed
    assert sum(same) == 6 * 5 if options.get("frames") == "identity" and not options.get("svd") else sum(same) == 6 * 3
    torch.manual_seed(1)
    narrow = [rw.adapt(llama(), rw.recipes.deep_lora(rank=4, targets=TARGETS)) for _ in range(2)]
    assert all(torch.equal(p, q) for p, q in zip(narrow[0].parameters(), narrow[1].parameters(), strict=True))


# --- counts, memory, rates -------------------------------------------------------------------------------------------------------------


@pytest.mark.check("deep-lora", 8)
def test_parameter_counts_are_the_formulas() -> None:
    m, n, r = 20, 24, 6

    def count(**fields: Any) -> tuple[int, int]:
        recipe = rw.recipes.deep_lora(rank=r, **fields).replace(init="own")
        model = one_linear(torch.randn(m, n))
        plan = rw.plan(model, recipe)
        rw.adapt(model, recipe)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == plan.trained_parameters
        return plan.trained_parameters, plan.frozen_adapter_numbers

    assert count() == (r * (m + n) + r**2, 0)
    assert count(depth=5) == (r * (m + n) + 3 * r**2, 0)
    assert count(variant="compressed") == (r * (m + n) + 3 * r**2, 0)
    assert count(variant="compressed", gamma=0) == (3 * r**2, r * (m + n))
    assert count(exact_zero=True) == (r * (m + n) + r**2, r * (m + n))


@pytest.mark.check("deep-lora", 8)
@pytest.mark.parametrize("exact", [False, True])
def test_frozen_frames_get_no_gradient_and_keep_no_input(exact: bool) -> None:
    """What is kept per token is h = down x, rank numbers; and never anything of the weight's size (the official code's dense update)."""
    kept = {}
    for gamma in (0, 1e-2):
        model = one_linear(torch.randn(48, 32))
        recipe = rw.recipes.deep_lora(rank=4, variant="compressed", gamma=gamma, exact_zero=exact).replace(init="own")
        rw.adapt(model, recipe)
        x = torch.randn(100, 32)
        with saved_tensors() as sizes:
            y = model(x)
        core_products = 4 * 4 * 4 * 2  # C_2 C_1 and C_3 (C_2 C_1)
        kept[gamma] = activation_bytes(sizes, model) - 4 * 100 * 4
        assert kept[gamma] - (4 * 100 * 32 if gamma else 0) == core_products
        assert rw.plan(one_linear(torch.randn(48, 32)), recipe).saved_bytes_per_token(4) == 4 * (4 + (32 if gamma else 0))
        y.square().sum().backward()
        update: Any = site(model).update
        assert all(core.grad is not None and bool(core.grad.any()) for core in update.cores)
        assert isinstance(update.down, nn.Parameter) == isinstance(update.up, nn.Parameter) == bool(gamma)
        assert update.down.requires_grad == update.up.requires_grad == bool(gamma)
        assert (update.down.grad is None) == (not gamma)
    with pytest.raises(RecipeError, match="all roles of the update frozen"):
        rw.recipes.deep_lora(variant="compressed", gamma=0, frozen={"down", "up", "core"})


def test_the_frames_move_at_gamma_times_the_rate() -> None:
    model = rw.adapt(one_linear(torch.randn(20, 24)), rw.recipes.deep_lora(rank=4, variant="compressed", gamma=0.05).replace(init="own"))
    optimizer = rw.optimizer(model, lr=1e-2, eps=1e-20)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for step in range(2):
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        model(torch.randn(50, 24)).square().sum().backward()
        optimizer.step()
        moved = {name.rpartition(".")[2]: float((p - before[name]).abs().max()) for name, p in model.named_parameters() if p.requires_grad}
        if step == 0:  # the first step of Adam is the rate itself
            assert moved == pytest.approx({"core1": 1e-2, "core2": 1e-2, "core3": 1e-2, "down": 5e-4, "up": 5e-4}, rel=1e-3)
        scheduler.step()
        optimizer.zero_grad()
        assert {group["lr"] for group in optimizer.param_groups} == {1e-2 * 0.5 ** (step + 1)}


def test_role_rates_serve_any_recipe_and_refuse_zero() -> None:
    recipe = rw.recipes.lora(rank=2, gradient={"name": "role-rates", "down": 0.5, "other": 3.0})
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    rw.adapt(model, recipe.replace(targets=["0"], modules_to_save=["1"]))
    optimizer = rw.optimizer(model, lr=1e-2)
    seen: dict[str, float] = {}
    optimizer.register_step_pre_hook(lambda made, *_: seen.update({group["role"]: group["lr"] for group in made.param_groups}))
    model(torch.randn(4, 6)).square().sum().backward()
    optimizer.step()
    assert seen == pytest.approx({"down": 5e-3, "up": 1e-2, "other": 3e-2})
    for rate in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(RecipeError, match=r"up=.* of role-rates must be above 0; to hold a role still, freeze it: frozen=\{'up'\}"):
            rw.recipes.lora(gradient={"name": "role-rates", "up": rate})


def test_products_of_small_factors_are_formed_in_fp32() -> None:
    """Also under autocast, and where the parameters were cast: entries of 1e-9 keep their digits."""
    model = perturb(rw.adapt(OneLinear(24, 20, dtype=torch.float32), rw.recipes.deep_lora(rank=6, depth=5)))
    update: Any = site(model).update
    exact = update.core3.double() @ update.core2.double() @ update.core1.double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        core = update.factors().core
    assert core.dtype == torch.float32
    assert relative(core.double(), exact) < 1e-6
    rounded = [p.data.copy_(p.bfloat16()).double() for p in (update.core1, update.core2, update.core3)]
    model.bfloat16()
    core = update.factors().core
    assert core.dtype == torch.float32
    assert relative(core.double(), rounded[2] @ rounded[1] @ rounded[0]) < 1e-6


def test_the_peers_start_is_not_ours() -> None:
    """A fork of PEFT starts the last factor at zero and the inner one at the identity, and divides alpha by rank^2: only the last factor
    then has a gradient, of the size of G. Here each factor has one, all of the same size, epsilon^2 G."""
    target = low_rank(20, 20, 3)
    model: Any = rw.adapt(Fit(torch.zeros_like(target), target), rw.recipes.deep_lora(rank=20))
    model()["loss"].backward()
    update: Any = site(model).update
    sizes = [float(p.grad.norm()) for p in (update.down, *update.cores, update.up)]
    assert sizes == pytest.approx([1e-6 * float(target.norm())] * 3, rel=1e-6)  # at full rank nothing is projected away


# --- files, merging, quantized bases ---------------------------------------------------------------------------------------------------


@pytest.mark.check("deep-lora", 7)
@pytest.mark.parametrize("fields", [{}, {"variant": "compressed"}, {"exact_zero": True}, {"alpha": 12.0, "depth": 4}])
def test_the_exported_lora_reproduces_the_forward(fields: dict[str, Any], tmp_path: Path) -> None:
    peft: Any = pytest.importorskip("peft")
    model, ids = llama(dtype=DOUBLE), token_ids()
    before = logits(model, ids)
    rw.adapt(model, rw.recipes.deep_lora(rank=4, epsilon=0.4, **fields), calibration=[batch()])
    on = logits(perturb(model), ids)
    assert relative(on, before) > 1e-2
    export_lora(model, tmp_path / "lora")
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", *([8, 8] if fields.get("exact_zero") else [4, 4]))
    theirs = peft.PeftModel.from_pretrained(llama(dtype=DOUBLE), tmp_path / "lora", autocast_adapter_dtype=False).eval()
    assert relative(logits(theirs, ids), on) < 1e-6
    ours = rw.load(llama(dtype=DOUBLE), tmp_path / "lora")
    assert relative(logits(ours, ids), on) < 1e-6
    # merged, unmerged, taken off
    rw.merge(model)
    assert relative(logits(model, ids), on) < 1e-6
    with rw.disabled(model):
        assert torch.equal(logits(model, ids), before)
    rw.unmerge(model)
    assert torch.equal(logits(model, ids), on)
    rw.save(model, tmp_path / "own")
    assert torch.equal(logits(rw.load(llama(dtype=DOUBLE), tmp_path / "own"), ids), on)
    with pytest.raises((ValueError, KeyError)):  # PEFT has no such type and says so, instead of reading lora_A and lora_B
        peft.PeftModel.from_pretrained(llama(dtype=DOUBLE), tmp_path / "own")
    rw.unadapt(model)
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("made", ["before", "on"])
def test_an_nf4_base_is_calibrated_and_kept(made: str) -> None:
    quantized = rw.unadapt(rw.adapt(llama(), rw.recipes.lora(rank=4, storage="nf4")))
    expected = logits(quantized, token_ids())
    recipe = rw.recipes.deep_lora(rank=4, variant="compressed", gamma=0)
    if made == "before":
        model = rw.adapt(llama(), recipe.replace(storage="nf4"), calibration=[batch()])
    else:
        model = rw.adapt(quantized, recipe, calibration=[batch()])
    torch.testing.assert_close(logits(model, token_ids()), expected, rtol=0, atol=1e-6)
    with rw.disabled(model):
        assert torch.equal(logits(model, token_ids()), expected)
    assert all(isinstance(module.base_layer, NF4Linear) for module in adapted_sites(model).values())
    optimizer = rw.optimizer(model)
    losses = []
    for _ in range(8):
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 1e-3
    optimizer.rankwise_session.check_alive()  # type: ignore[attr-defined]


# --- bad input -------------------------------------------------------------------------------------------------------------------------


def test_bad_input_is_refused_with_the_remedy() -> None:
    deep = rw.recipes.deep_lora
    cases: list[tuple[Any, type[Exception], str]] = [
        (lambda: deep(depth=2), RecipeError, "depth=2 with variant='narrow' must be a whole number of at least 3.*use update='lora'"),
        (lambda: deep(depth=1, variant="compressed"), RecipeError, "depth=1 with variant='compressed' .* at least 2"),
        (lambda: deep(epsilon=0.0), RecipeError, "epsilon=0.0 must be above 0"),
        (lambda: deep(epsilon=float("nan")), RecipeError, "epsilon=nan must be above 0"),
        (lambda: deep(variant="wide"), RecipeError, "variant='wide' of the deep-lora update is unknown; use 'narrow' or 'compressed'"),
        (lambda: deep(gamma=0.1), RecipeError, "gamma=0.1 belongs to variant='compressed', and variant is 'narrow'"),
        (lambda: deep(frames="identity"), RecipeError, "frames='identity' belongs to variant='compressed'"),
        (lambda: deep(gamma=-1, variant="compressed"), RecipeError, "gamma=-1 must lie between 0 .frozen frames. and 1"),
        (lambda: deep(init="pissa"), RecipeError, "there is no pair for an init to fill .*deep-lora the frames of init='deep-lora'"),
        (lambda: rw.recipes.lora(init="deep-lora"), RecipeError, "directions without a size.*init='lora-ga'"),
        (lambda: deep(base="fold"), RecipeError, "base=fold cannot be combined"),
        (lambda: rw.plan(llama(), deep(targets=["embed_tokens"])), rw.errors.TargetError, "embedding, which takes plain LoRA"),
        (lambda: rw.adapt(llama(), deep(variant="compressed")), CalibrationError, "calibration is missing"),
        (
            lambda: rw.adapt(llama(), deep(rank=16, variant="compressed"), calibration=[batch(1, 5)]),
            CalibrationError,
            "saw 5 calibration tokens, and 8 directions.*calibration_rows",
        ),
        (lambda: begin(torch.zeros(8, 8), 4), CalibrationError, "the gradient at proj is zero"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()


def test_a_file_of_another_depth_is_refused(tmp_path: Path) -> None:
    rw.save(rw.adapt(llama(), rw.recipes.deep_lora(rank=4, targets=TARGETS)), tmp_path)
    about = json.loads((tmp_path / "rankwise.json").read_text())
    about["recipe"]["update"]["depth"] = 4
    (tmp_path / "rankwise.json").write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match=r"lacks 6 tensors, such as .*lora_core\.2\.weight"):
        rw.load(llama(), tmp_path)


# --- runs ------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


class Stopped(Exception):
    """Stands for whatever ends a process."""


@pytest.mark.parametrize(
    ("method", "task"),
    [
        ({"epsilon": 0.05}, "completion"),
        ({"variant": "compressed", "epsilon": 0.1, "calibration_rows": 6}, "classification"),
        ({"variant": "compressed", "epsilon": 0.1, "gamma": 0, "exact_zero": True, "storage": "nf4"}, "completion"),
    ],
)
def test_a_run_from_yaml_resumes_bit_for_bit(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: dict[str, Any], task: str
) -> None:
    from rankwise.training.run import train
    from rankwise.training.trainers import RankwiseTrainer

    targets = ["query", "value"] if task == "classification" else ["q_proj", "v_proj", "down_proj"]

    def config(name: str) -> dict[str, Any]:
        plain = plain_config(world, task, tmp_path / name, method={"name": "deep-lora", **method}, targets=targets, dropout=0.1)
        plain["train"] |= {"steps": 5, "save_every": 1, "accumulate": 1}
        return plain

    whole = train(config("whole"), console=silent_console())
    inner = RankwiseTrainer.training_step

    def stopped(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step + 1 == 3:
            raise Stopped
        return inner(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(RankwiseTrainer, "training_step", stopped)
        with pytest.raises(Stopped):
            train(config("cut"), console=silent_console())
    with monkeypatch.context() as patch:
        patch.setattr("rankwise.adapting.beginnings", None)  # a resumed run makes no start from data again
        resumed = train(config("cut"), console=silent_console())
    for name in ("metrics.jsonl", "results.json", "adapter/adapter_model.safetensors", "adapter/rankwise.json"):
        assert (whole.run / name).read_bytes() == (resumed.run / name).read_bytes(), name
    assert whole.after["task"]["loss"] < whole.before["task"]["loss"]


def test_options_that_do_not_fit_are_refused_from_yaml(world: Path, tmp_path: Path) -> None:
    from rankwise.training.config import make_config, resolve

    with pytest.raises(RecipeError, match=r"gamma=0\.5 belongs to variant='compressed'"):
        resolve(make_config(plain_config(world, "completion", tmp_path, method={"name": "deep-lora", "gamma": 0.5})))
    with pytest.raises(ConfigError, match="method 'deep-lora' has no option 'gama'; did you mean 'gamma'"):
        resolve(make_config(plain_config(world, "completion", tmp_path, method={"name": "deep-lora", "gama": 0.5})))


def test_a_plain_loop_resumes_bit_for_bit() -> None:
    def made() -> tuple[Any, Any]:
        model = rw.adapt(llama(), rw.recipes.deep_lora(rank=4, variant="compressed", targets=TARGETS), calibration=[batch()])
        return model, rw.optimizer(model)

    def steps(model: Any, optimizer: Any, first: int, last: int) -> None:
        for step in range(first, last):
            model(**batch(seed=step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    whole, stepping = made()
    steps(whole, stepping, 0, 6)
    model, optimizer = made()
    steps(model, optimizer, 0, 3)
    kept = trainable_state(model), optimizer.state_dict()
    again, resumed = made()
    load_trainable_state(again, kept[0])
    resumed.load_state_dict(kept[1])
    steps(again, resumed, 3, 6)
    assert all(torch.equal(value, trainable_state(again)[name]) for name, value in trainable_state(whole).items())
