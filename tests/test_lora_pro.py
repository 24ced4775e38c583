"""LoRA-Pro: the closed forms, Adam on the whole weight streamed over rows, the bound on the second step; against dense fp64 forms."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from method_checks import cut_and_resumed
from tiny_models import llama, logits, token_ids
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from toys import Mlp, one, only_site, stir
from training_models import make_world, plain_config, silent_console

import rankwise as rw
from rankwise.checkpoint import load_trainable_state, trainable_state
from rankwise.eightbit import dynamic_map
from rankwise.errors import CheckpointError, RecipeError, TrainingError
from rankwise.gradients import DirectSteps
from rankwise.gradients.blockwise import Coded
from rankwise.gradients.equivalent import Pair, adjusted, spectra, sylvester
from rankwise.gradients.equivalent_state import Equivalent, stream
from rankwise.gradients.lora_pro import LoraPro
from rankwise.gradients.moments import Betas, made
from rankwise.recipes import lora_fa, lora_pro
from rankwise.report import human_bytes
from rankwise.sites import adapted_sites

torch.set_num_threads(1)

MIXES = ("sylvester", "symmetric", "zero")
F64 = torch.float64


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


# --- the closed forms, written down once more: dense projectors, pseudo-inverses, X from the Kronecker form of its equation --------------


def projectors(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """(P_up (out, out), P_down (in, in))."""
    return up @ torch.linalg.pinv(up), torch.linalg.pinv(down) @ down


def projected(g: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """g - (I - P_up) g (I - P_down)."""
    left, right = projectors(up, down)
    return g - (torch.eye(len(left), dtype=F64) - left) @ g @ (torch.eye(len(right), dtype=F64) - right)


def dense_x(mix: str, g_down: Tensor, g_up: Tensor, down: Tensor, up: Tensor, s: float) -> Tensor:
    left, right = up.T @ up, down @ down.T
    eye = torch.eye(len(left), dtype=F64)
    if mix == "zero" or not up.any() or not down.any():
        return torch.zeros_like(left)
    if mix == "symmetric":
        return -0.5 / s**2 * torch.linalg.inv(left) @ up.T @ g_up @ torch.linalg.inv(right)
    c = -torch.linalg.inv(left) @ g_down @ down.T / s**2
    # rows of X stacked: (L (x) I + I (x) R) vec X = vec C
    return torch.linalg.solve(torch.kron(left, eye) + torch.kron(eye, right), c.flatten()).view_as(c)


def dense_steps(mix: str, g: Tensor, down: Tensor, up: Tensor, s: float) -> tuple[Tensor, Tensor]:
    """(h_down, h_up) for a gradient g of the whole weight."""
    g_down, g_up = s * up.T @ g, s * g @ down.T
    x = dense_x(mix, g_down, g_up, down, up, s)
    p_up, _ = projectors(up, down)
    h_down = torch.linalg.pinv(up.T @ up) @ g_down / s**2 + x @ down
    h_up = (torch.eye(len(p_up), dtype=F64) - p_up) @ g_up @ torch.linalg.pinv(down @ down.T) / s**2 - up @ x
    return h_down, h_up


def pair(
    up: Tensor, down: Tensor, s: float, g: Tensor, trained: Sequence[str] = ("down", "up"), name: str = "site"
) -> tuple[Pair, SimpleNamespace]:
    """A pair whose gradients are those that autograd would give for g."""
    update = SimpleNamespace(scaling=s, roles={role: role for role in trained})
    update.up, update.down = nn.Parameter(up), nn.Parameter(down)
    if "up" in trained:
        update.up.grad = s * g.to(up.dtype) @ down.T
    if "down" in trained:
        update.down.grad = s * up.T @ g.to(down.dtype)
    return Pair(name, update), update


def solved(pairs: Sequence[Pair], mix: Any, ridge: float = 0.0) -> list[tuple[Tensor, Tensor]]:
    with torch.no_grad():
        left, right = spectra(pairs, ridge)
        return [(steps.down, steps.up) for steps in adjusted(pairs, left, right, mix)]  # type: ignore[misc]


def problem(out: int, width: int, rank: int, s: float, seed: int) -> tuple[Tensor, Tensor, float, Tensor]:
    """(up, down, s, g)."""
    return normal(out, rank, seed=seed), normal(rank, width, seed=seed + 1), s, normal(out, width, seed=seed + 2)


PROBLEMS = [problem(14, 20, 4, 2.0, 1), problem(9, 6, 4, 0.37, 11), problem(5, 33, 4, 16 / 8**0.5, 21)]  # s of rsLoRA too


def moved(h_down: Tensor, h_up: Tensor, up: Tensor, down: Tensor, s: float) -> Tensor:
    """gt = s up h_down + s h_up down."""
    return s * up @ h_down + s * h_up @ down


@pytest.mark.check("lora-pro", 1)
@pytest.mark.parametrize("mix", [*MIXES, "random"])
def test_the_equivalent_gradient_is_the_projection(mix: str) -> None:
    """For every X, and for sites of different widths and scalings in one batch."""
    found = solved([pair(*each)[0] for each in PROBLEMS], "zero" if mix == "random" else mix)
    for index, ((h_down, h_up), (up, down, s, g)) in enumerate(zip(found, PROBLEMS, strict=True)):
        if mix == "random":
            x = 30 * normal(4, 4, seed=index)
            h_down, h_up = h_down + x @ down, h_up - up @ x
        gt = moved(h_down, h_up, up, down, s)
        torch.testing.assert_close(gt, projected(g, up, down), rtol=1e-10, atol=1e-10)
        assert (gt - g).norm() > 0.1 * g.norm()


@pytest.mark.parametrize("mix", MIXES)
def test_both_steps_equal_the_dense_formulas(mix: Any) -> None:
    for (h_down, h_up), (up, down, s, g) in zip(solved([pair(*each)[0] for each in PROBLEMS], mix), PROBLEMS, strict=True):
        want_down, want_up = dense_steps(mix, g, down, up, s)
        torch.testing.assert_close(h_down, want_down, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(h_up, want_up, rtol=1e-9, atol=1e-10)


def test_the_symmetric_x_makes_mirror_images() -> None:
    """Public copies multiply by down down^T where its inverse is needed; then this does not hold."""
    for (h_down, h_up), (up, down, s, g) in zip(solved([pair(*each)[0] for each in PROBLEMS], "symmetric"), PROBLEMS, strict=True):
        p_up, p_down = projectors(up, down)
        half_up, half_down = torch.eye(len(p_up), dtype=F64) - p_up / 2, torch.eye(len(p_down), dtype=F64) - p_down / 2
        torch.testing.assert_close(h_down, torch.linalg.inv(up.T @ up) @ up.T @ g @ half_down / s, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(h_up, half_up @ g @ down.T @ torch.linalg.inv(down @ down.T) / s, rtol=1e-9, atol=1e-10)


@pytest.mark.check("lora-pro", 2)
def test_x_solves_sylvesters_equation_and_balances_the_steps() -> None:
    pairs = [pair(*each)[0] for each in PROBLEMS]
    with torch.no_grad():
        left, right = spectra(pairs)
        target = torch.stack([normal(4, 4, seed=seed) for seed in range(3)])
        x = sylvester(left, right, target)
    for index, ((h_down, h_up), (up, down, _, _)) in enumerate(zip(solved(pairs, "sylvester"), PROBLEMS, strict=True)):
        assert (up.T @ up @ x[index] + x[index] @ down @ down.T - target[index]).abs().max() < 1e-10
        assert (h_down @ down.T - up.T @ h_up).abs().max() < 1e-10
        assert (h_down @ down.T).abs().max() > 1e-3
    for (h_down, h_up), (up, down, _, _) in zip(solved(pairs, "zero"), PROBLEMS, strict=True):
        assert (h_down @ down.T - up.T @ h_up).abs().max() > 1e-3  # only this X does


@pytest.mark.check("lora-pro", 3)
@pytest.mark.parametrize("mix", MIXES)
def test_the_first_order_decrease_is_the_square_of_the_equivalent_gradient(mix: Any) -> None:
    for (h_down, h_up), (up, down, s, g) in zip(solved([pair(*each)[0] for each in PROBLEMS], mix), PROBLEMS, strict=True):
        gt = moved(h_down, h_up, up, down, s)
        decrease = ((s * up.T @ g) * h_down).sum() + ((s * g @ down.T) * h_up).sum()
        torch.testing.assert_close(decrease, gt.square().sum(), rtol=1e-10, atol=0)
        torch.testing.assert_close((gt * g).sum(), gt.square().sum(), rtol=1e-10, atol=0)


@pytest.mark.check("lora-pro", 4)
def test_nothing_is_nearer() -> None:
    for (h_down, h_up), (up, down, s, g) in zip(solved([pair(*each)[0] for each in PROBLEMS], "sylvester"), PROBLEMS, strict=True):
        g_down, g_up = s * up.T @ g, s * g @ down.T
        best = (moved(h_down, h_up, up, down, s) - g).norm()
        raw = (h_down - g_down).square().sum() + (h_up - g_up).square().sum()
        for trial in range(50):
            size = 10.0 ** -(trial % 5)
            a, b = size * normal(*down.shape, seed=trial), size * normal(*up.shape, seed=100 + trial)
            assert (moved(h_down + a, h_up + b, up, down, s) - g).norm() >= best - 1e-12
            x = size * normal(4, 4, seed=200 + trial)
            other = (h_down + x @ down - g_down).square().sum() + (h_up - up @ x - g_up).square().sum()
            assert other > raw


@pytest.mark.check("lora-pro", 5)
@pytest.mark.parametrize("mix", MIXES)
def test_another_pair_of_the_same_product_gives_the_same_step(mix: Any) -> None:
    turn = normal(4, 4, seed=9) + 2 * torch.eye(4, dtype=F64)
    for up, down, s, g in PROBLEMS:
        other = up @ turn, torch.linalg.solve(turn, down), s, g
        (one_step,), (two_step,) = solved([pair(up, down, s, g)[0]], mix), solved([pair(*other)[0]], mix)
        torch.testing.assert_close(moved(*one_step, up, down, s), moved(*two_step, *other[:3]), rtol=1e-9, atol=1e-10)


def test_dead_directions_are_left_out_of_the_inverse() -> None:
    """Equal columns of `up`, in fp64 and as fp32 rounds them: the projector is onto what is there, and no number is huge."""
    up, down, s, g = problem(14, 20, 4, 2.0, 1)
    up[:, 3] = up[:, 2] * 3
    for dtype in (F64, torch.float32):
        (steps,) = solved([pair(up.to(dtype), down.to(dtype), s, g)[0]], "sylvester")
        rough = 1e-9 if dtype == F64 else 1e-5
        torch.testing.assert_close(moved(*steps, up, down, s), projected(g, up, down), rtol=rough, atol=rough)
        assert steps[0].abs().max() < 1e3
    (steps,) = solved([pair(torch.zeros_like(up), down, s, g)[0]], "sylvester")  # the first step of any LoRA
    assert not steps[0].any()
    torch.testing.assert_close(steps[1], g @ down.T @ torch.linalg.inv(down @ down.T) / s, rtol=1e-10, atol=1e-12)
    (steps,) = solved([pair(up, torch.zeros_like(down), s, g)[0]], "sylvester")  # and of one that starts at random-up
    assert not steps[1].any()


def test_a_ridge_is_relative() -> None:
    """1e-8 added to every Gram matrix would shrink the steps of a small `up`; a multiple of its mean does to all the same."""
    up, down, s, g = PROBLEMS[0]
    shrunk = []
    for size in (1.0, 1e-6):
        (exact,), (damped,) = solved([pair(size * up, down, s, g)[0]], "zero"), solved([pair(size * up, down, s, g)[0]], "zero", 1e-3)
        shrunk.append(damped[0] / exact[0])
    torch.testing.assert_close(shrunk[0], shrunk[1], rtol=1e-6, atol=1e-8)
    assert (shrunk[0] != 1).all()


# --- in a model ------------------------------------------------------------------------------------------------------------------------


def made_model(out: int = 14, width: int = 20, dtype: torch.dtype = F64, start: bool = True, **options: Any) -> nn.Module:
    """One layer, rank 4; `start` moves both factors away from where they begin."""
    model = rw.adapt(one(width, out, bias=False, dtype=dtype), lora_pro(**{"rank": 4, "alpha": 10.0} | options))
    return stir(model, 0.3) if start else model


def give(model: nn.Module, g: Tensor) -> None:
    """The gradients that a loss with gradient g by the weight would leave."""
    update: Any = only_site(model).update
    up, down, s = update.up.detach(), update.down.detach(), update.scaling
    for name, gradient in (("up", s * g.to(up.dtype) @ down.T), ("down", s * up.T @ g.to(up.dtype))):
        if name in update.roles:
            getattr(update, name).grad = gradient


def delta(model: nn.Module) -> Tensor:
    update: Any = only_site(model).update
    return (update.scaling * update.up @ update.down).detach().clone()


def factors(model: nn.Module) -> tuple[Tensor, Tensor]:
    update: Any = only_site(model).update
    return update.up.detach().clone(), update.down.detach().clone()


def rule(optimizer: Any) -> Equivalent:
    return optimizer.rankwise_session.running["gradient"]


class Dense:
    """Algorithm 2 of the paper with the whole weight's gradient, m, v and N there, in fp64."""

    def __init__(self, up: Tensor, down: Tensor, s: float, mix: str, lr: float, cap: float | None) -> None:
        self.up, self.down, self.s, self.mix, self.lr, self.cap = up.double(), down.double(), s, mix, lr, cap
        self.m, self.v = (torch.zeros(len(up), down.shape[1], dtype=F64) for _ in range(2))
        self.t = 0

    def step(self, g: Tensor) -> None:
        self.t += 1
        gt = projected(g.double(), self.up, self.down)
        self.m = 0.9 * self.m + 0.1 * gt
        self.v = 0.999 * self.v + 0.001 * gt**2
        n = (self.m / (1 - 0.9**self.t)) / ((self.v / (1 - 0.999**self.t)).sqrt() + 1e-8)
        h_down, h_up = dense_steps(self.mix, n, self.down, self.up, self.s)
        if self.cap is not None and (over := self.lr * h_down.norm() / (self.cap * self.down.norm())) > 1:
            h_down = h_down / over
        self.down, self.up = self.down - self.lr * h_down, self.up - self.lr * h_up


@pytest.mark.check("lora-pro", 7)
@pytest.mark.parametrize("tile", [1, 3, 7, 14, 1000, None])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_streamed_tiles_equal_the_dense_algorithm(tile: int | None, dtype: torch.dtype) -> None:
    model = made_model(dtype=dtype, adam_space="weight", tile=tile)
    optimizer = rw.optimizer(model, lr=1e-2)
    update: Any = only_site(model).update
    dense = Dense(*factors(model), update.scaling, "sylvester", 1e-2, 0.1)
    for step in range(5):
        g = normal(14, 20, seed=step)
        give(model, g)
        optimizer.step()
        dense.step(g)
    close = {"rtol": 1e-10, "atol": 1e-11} if dtype == F64 else {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(delta(model).double(), dense.s * dense.up @ dense.down, **close)
    torch.testing.assert_close(update.up.detach().double(), dense.up, **close)
    moments: Any = rule(optimizer).moments["0"]
    torch.testing.assert_close(moments.m.double(), dense.m, **close)
    torch.testing.assert_close(moments.v.double(), dense.v, **close)


@pytest.mark.check("lora-pro", 7)
@pytest.mark.parametrize("states", ["fp32", "8bit", "factored"])
def test_the_tile_is_no_part_of_the_result(states: Any) -> None:
    """m and v to the last bit (to rounding where the products of tiles round otherwise), the gradients to rounding."""
    up, down, _, _ = (t.float() if isinstance(t, Tensor) else t for t in problem(50, 300, 4, 2.0, 3))
    found = []
    for tile in (1, 7, 50):
        moments = made(states, 50, 300, up.device, torch.float32)
        for t in (1, 2):
            h_up, h_down = normal(50, 4, seed=t).float(), normal(4, 300, seed=10 + t).float()
            results = stream(up, down, h_up, h_down, 2.0, moments, Betas(0.9, 0.999, 1e-8), t, tile)
        found.append(results)
    for other in found[1:]:
        for mine, theirs in zip(found[0], other, strict=True):
            assert mine is not None
            # in 8 bits a number on the edge between two levels may fall to either side
            assert (mine - theirs).norm() < (2e-6 if states == "fp32" else 2e-3) * mine.norm()


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("init", ["kaiming", "random-up", "pissa"])
def test_weight_space_from_every_start_equals_the_dense_algorithm(mix: str, init: str) -> None:
    """With real gradients of a real loss, from the start on: B = 0, A = 0, neither."""
    model = made_model(start=False, adam_space="weight", x=mix, init=init, cap=None)
    site = only_site(model)
    update: Any = site.update
    optimizer = rw.optimizer(model, lr=1e-3)
    x, y, weight = normal(30, 20, seed=1), normal(30, 14, seed=2), site.merged_weight() - delta(model)
    dense = Dense(*factors(model), update.scaling, mix, 1e-3, None)
    for _ in range(4):
        optimizer.zero_grad()
        (model(x) - y).square().sum().backward()
        optimizer.step()
        total = weight + dense.s * dense.up @ dense.down
        dense.step(2 * (x @ total.T - y).T @ x)
    torch.testing.assert_close(delta(model), dense.s * dense.up @ dense.down, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("mix", MIXES)
def test_factor_space_is_adamw_on_the_adjusted_gradients(mix: str) -> None:
    model = made_model(x=mix)
    optimizer = rw.optimizer(model, lr=1e-2)
    assert type(optimizer) is torch.optim.AdamW
    s: float = only_site(model).site.scaling
    up, down = (nn.Parameter(t) for t in factors(model))
    other = torch.optim.AdamW([up, down], lr=1e-2, weight_decay=0.0)
    for step in range(4):
        g = normal(14, 20, seed=step)
        give(model, g)
        optimizer.step()
        down.grad, up.grad = dense_steps(mix, g, down.detach(), up.detach(), s)
        other.step()
    torch.testing.assert_close(delta(model), (s * up @ down).detach(), rtol=1e-8, atol=1e-9)
    assert not rule(optimizer).tensors()


@pytest.mark.check("lora-pro", 6)
@pytest.mark.parametrize("frozen", ["down", "up"])
def test_a_frozen_square_factor_makes_it_adamw_of_the_weight(frozen: str) -> None:
    """The frozen factor is square and invertible, so the map is linear and the projection is the identity: equal at every step."""
    shape = {"out": 9, "width": 5} if frozen == "down" else {"out": 5, "width": 9}
    init = "kaiming" if frozen == "down" else "random-up"
    model = made_model(**shape, start=False, adam_space="weight", rank=5, frozen={frozen}, init=init)
    weight = nn.Parameter(only_site(model).merged_weight())
    optimizer, other = rw.optimizer(model, lr=1e-2), torch.optim.AdamW([weight], lr=1e-2, weight_decay=0.0)
    x, y = normal(30, shape["width"], seed=1), normal(30, shape["out"], seed=2)
    for _ in range(20):
        for steppable, loss in ((optimizer, lambda: (model(x) - y).square().mean()), (other, lambda: (x @ weight.T - y).square().mean())):
            steppable.zero_grad()
            loss().backward()
            steppable.step()
    torch.testing.assert_close(only_site(model).merged_weight(), weight.detach(), rtol=1e-8, atol=1e-9)
    assert delta(model).abs().max() > 0.05


@pytest.mark.check("lora-pro", 6)
@pytest.mark.parametrize(("out", "width"), [(9, 5), (5, 9)])
def test_full_rank_makes_it_adamw_of_the_weight_to_first_order(out: int, width: int) -> None:
    beyond = []
    for lr in (1e-3, 1e-4):
        model = made_model(out=out, width=width, adam_space="weight", rank=5, cap=None)
        optimizer, s = rw.optimizer(model, lr=lr), only_site(model).site.scaling
        weight = nn.Parameter(delta(model))
        other = torch.optim.AdamW([weight], lr=lr, weight_decay=0.0)
        up, down = factors(model)
        g = normal(out, width, seed=7)
        torch.testing.assert_close(projected(g, up, down), g, rtol=1e-9, atol=1e-9)
        give(model, g)
        weight.grad = g
        before = weight.detach().clone()
        optimizer.step()
        other.step()
        d_up, d_down = (now - was for now, was in zip(factors(model), (up, down), strict=True))
        torch.testing.assert_close(s * (up @ d_down + d_up @ down), weight.detach() - before, rtol=1e-7, atol=1e-12)
        beyond.append(delta(model) - weight.detach())
        torch.testing.assert_close(beyond[-1], s * d_up @ d_down, rtol=1e-4, atol=1e-12)
    assert beyond[0].norm() / beyond[1].norm() == pytest.approx(100, rel=1e-3)


@pytest.mark.check("lora-pro", 8)
@pytest.mark.parametrize("size", [1.0, 1e-5])
def test_the_first_step_from_zero(size: float) -> None:
    """h_down = 0; W moves by -lr N P_down, with |N| = 1: bias correction begins at t = 1. The official code counts its first step as the
    second one, so that the largest |N| is 0.744. Nor does the size of the raw gradient matter, which the official code lets clipping of the
    raw gradients bring back into the normalized step."""
    model = made_model(start=False, adam_space="weight", eps=1e-30)
    optimizer = rw.optimizer(model, lr=1e-3)
    _, down = factors(model)
    g = size * normal(14, 20, seed=3)
    give(model, g)
    nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    _, p_down = projectors(torch.zeros(14, 4, dtype=F64), down)
    n = (g @ p_down).sign()
    torch.testing.assert_close(delta(model), -1e-3 * n @ p_down, rtol=1e-9, atol=1e-13)
    assert torch.equal(factors(model)[1], down)
    moments: Any = rule(optimizer).moments["0"]
    ratio = (moments.m / (1 - 0.9)) / (moments.v / (1 - 0.999)).sqrt()
    torch.testing.assert_close(ratio, n, rtol=1e-9, atol=0)


@pytest.mark.check("lora-pro", 9)
@pytest.mark.parametrize("space", ["factor", "weight"])
def test_scaling_moved_from_down_to_s_changes_nothing(space: str) -> None:
    """(s, down) -> (c s, down / c), with c of rsLoRA's s among them; plain gradient steps in factor space."""
    c = 5.66 / 2.5
    firsts, seconds = [], []
    for factor in (1.0, c):
        moves = []
        for start in (False, True):
            model = made_model(start=start, adam_space=space, alpha=10.0 * factor, cap=None)
            update: Any = only_site(model).update
            update.put(down=update.down.detach() / factor)
            up, down = factors(model)
            optimizer = rw.optimizer(model, lr=1e-4, kind=torch.optim.SGD)
            give(model, normal(14, 20, seed=3))
            optimizer.step()
            d_up, d_down = (now - was for now, was in zip(factors(model), (up, down), strict=True))
            moves.append(update.scaling * (up @ d_down + d_up @ down))
            if not start:
                assert not d_down.any()  # then the whole step is of first order
                torch.testing.assert_close(delta(model), moves[0], rtol=1e-12, atol=0)
        firsts.append(moves[0])
        seconds.append(moves[1])
    torch.testing.assert_close(firsts[0], firsts[1], rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(seconds[0], seconds[1], rtol=1e-6, atol=1e-11)
    assert seconds[0].abs().max() > 1e-6


def test_rslora_and_ranks_by_pattern_take_the_scaling_of_each_site() -> None:
    """The official code writes s = 16 / 8 into its formulas."""
    fields: dict[str, Any] = {
        "rank": 8,
        "alpha": 16.0,
        "scaling": "rslora",
        "rank_pattern": {"second": 3},
        "alpha_pattern": {"second": 5.0},
        "cap": None,
    }
    model = stir(rw.adapt(Mlp().double(), lora_pro(**fields)), 0.3)
    optimizer, x = rw.optimizer(model, lr=1.0, kind=torch.optim.SGD), normal(40, 24, seed=1)
    dense = [nn.Parameter(site.merged_weight()) for site in adapted_sites(model).values()]
    biases = [site.bias for site in adapted_sites(model).values()]
    nn.functional.linear(torch.tanh(nn.functional.linear(x, dense[0], biases[0])), dense[1], biases[1]).square().sum().backward()
    model(x).square().sum().backward()
    optimizer.rankwise_session.fire("backward", optimizer)  # type: ignore[attr-defined]
    scalings = []
    for site, weight in zip(adapted_sites(model).values(), dense, strict=True):
        update: Any = site.update
        up, down = update.up.detach(), update.down.detach()
        assert weight.grad is not None
        scalings.append(site.site.scaling)
        gt = moved(update.down.grad, update.up.grad, up, down, site.site.scaling)
        want = projected(weight.grad, up, down)
        torch.testing.assert_close(gt, want, rtol=1e-8, atol=1e-8)
    assert scalings == [pytest.approx(16 / 8**0.5), pytest.approx(5 / 3**0.5)]


# --- the bound on the second step ------------------------------------------------------------------------------------------------------


def growth(steps: int, lr: float, **options: Any) -> list[float]:
    """||d down|| / ||down|| of each step of a least-squares problem from up = 0."""
    model = made_model(40, 30, start=False, adam_space="weight", **options)
    optimizer, found = rw.optimizer(model, lr=lr), []
    x, y = normal(60, 30, seed=1), normal(60, 40, seed=2)
    for _ in range(steps):
        before = factors(model)[1]
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        found.append(float((factors(model)[1] - before).norm() / before.norm()))
    return found


def test_the_second_step_is_bounded_whatever_the_rate_is() -> None:
    free = [growth(2, lr, cap=None)[1] for lr in (2e-4, 2e-6)]
    assert free[0] > 0.2
    assert free[0] == pytest.approx(free[1], rel=0.05)  # of order one, however small lr is
    for lr in (2e-4, 2e-6):
        steps = growth(12, lr)
        assert steps[0] == 0
        assert steps[1] == pytest.approx(0.1, rel=1e-9)
        assert max(steps) < 0.1 + 1e-9
        assert steps[-1] < 0.09  # and soon nothing is bounded any more
        assert growth(2, lr, cap=0.02)[1] == pytest.approx(0.02, rel=1e-9)


def test_the_other_factor_is_the_bounded_one_where_it_starts_at_random() -> None:
    model = made_model(start=False, adam_space="weight", init="random-up")
    optimizer = rw.optimizer(model, lr=1e-4)
    before = factors(model)
    for step in range(2):
        before = factors(model)
        give(model, normal(14, 20, seed=step))
        optimizer.step()
    grown = [(now - was).norm() / was.norm() for now, was in zip(factors(model), before, strict=True)]
    assert grown[0] == pytest.approx(0.1, rel=1e-6)
    assert grown[1] > 0.1  # `down` came from zero one step ago
    assert optimizer.rankwise_session.report() == {"gradient_bounded": 1.0, "gradient_skipped": 0.0}  # type: ignore[attr-defined]


@pytest.mark.parametrize("mix", MIXES)
def test_a_bounded_step_still_decreases_the_loss(mix: Any) -> None:
    """Both halves of the decrease are at least zero for each of the three X, so that either may be shortened."""
    for (h_down, h_up), (up, down, s, g) in zip(solved([pair(*each)[0] for each in PROBLEMS], mix), PROBLEMS, strict=True):
        assert ((s * up.T @ g) * h_down).sum() > 0
        assert ((s * g @ down.T) * h_up).sum() > 0


# --- memory ----------------------------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns, and whether one is (side, side)."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side, self.most, self.square = side, 0, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in known:  # views and writes in place allocate nothing
                self.most = max(self.most, leaf.numel())
            if isinstance(leaf, Tensor):
                self.square |= tuple(leaf.shape) == (self.side, self.side)
        return out


@pytest.mark.check("lora-pro", 11)
@pytest.mark.parametrize("states", ["fp32", "8bit", "factored"])
@pytest.mark.parametrize("space", ["factor", "weight"])
def test_nothing_as_large_as_a_projector_or_the_weight_is_made(space: str, states: str) -> None:
    out, width, rank, tile = 600, 257, 4, 8
    model = made_model(out, width, torch.float32, adam_space=space, states=states, tile=tile)
    optimizer = rw.optimizer(model, lr=1e-3, fused=False)
    give(model, normal(out, width))
    optimizer.step()  # makes the moments
    give(model, normal(out, width))
    with Largest(out) as seen:
        optimizer.step()
    assert not seen.square
    # a tile in blocks of 256 is padded to 512 columns; else rank-sized matrices, twice the rank where products are joined
    assert seen.most <= max(2 * rank * max(out, width), tile * 512)
    with Largest(out) as seen:  # the guard sees what the official code makes
        _ = torch.eye(out) - model[0].update.up.detach() @ model[0].update.up.detach().T  # type: ignore[union-attr, index]
    assert seen.square
    assert seen.most == out * out


@pytest.mark.parametrize("states", ["fp32", "8bit", "factored"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64])
def test_the_plan_counts_the_moments(states: str, dtype: torch.dtype) -> None:
    base, ids = llama(dtype=dtype), token_ids()
    recipe = lora_pro(rank=4, adam_space="weight", states=states, targets=["q_proj", "down_proj"], modules_to_save=["lm_head"])
    plan = rw.plan(base, recipe)
    model = rw.adapt(base, recipe)
    optimizer = rw.optimizer(model)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    kept = {key: tensor for key, tensor in rule(optimizer).tensors().items() if not key.startswith("step/")}
    assert plan.memory["state of the method"] == sum(tensor.nbytes for tensor in kept.values())
    own = [t for state in optimizer.state.values() for key, t in state.items() if key in ("exp_avg", "exp_avg_sq")]
    assert plan.memory["AdamW moments"] == sum(t.nbytes for t in own) > 0
    assert "state of the method" not in rw.plan(llama(), lora_pro(rank=4)).memory
    assert f"state of the method {human_bytes(plan.memory['state of the method'])}" in " ".join(str(plan).split())


def test_the_plan_counts_adaloras_averages() -> None:
    recipe = rw.recipes.adalora(target_rank=2, init_rank=4, tinit=2, targets=["q_proj", "down_proj"])
    model, ids = llama(), token_ids()
    plan = rw.plan(model, recipe)
    optimizer: Any = rw.optimizer(rw.adapt(model, recipe), total_steps=9)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    averages = [t for key, t in optimizer.rankwise_session.tensors().items() if "average/" in key or "uncertainty/" in key]
    assert plan.memory["state of the method"] == sum(t.nbytes for t in averages) > 0


# --- 8 bits ----------------------------------------------------------------------------------------------------------------------------


def test_levels_are_those_of_bitsandbytes() -> None:
    functional: Any = pytest.importorskip("bitsandbytes.functional")
    for signed in (True, False):
        assert torch.equal(dynamic_map(torch.device("cpu"), signed), functional.create_dynamic_map(signed=signed))


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_the_nearest_levels_of_each_block(signed: bool) -> None:
    values = normal(3, 600, seed=4).float() * torch.tensor([[1.0], [1e-6], [0.0]])
    values = values if signed else values.abs()
    values[0, :300] = 0
    coded = Coded(5, 600, values.device, signed)
    coded.write(slice(1, 4), values)
    assert not coded.read(slice(0, 1)).any()
    levels = dynamic_map(torch.device("cpu"), signed).double()
    for row, wanted in enumerate(values.double(), 1):
        for first in range(0, 600, 256):
            part = wanted[first : first + 256]
            scale = part.abs().max()
            found, ratios = coded.read(slice(row, row + 1))[0, first : first + 256].double(), part / scale if scale else part
            distances = (ratios[:, None] - (levels if signed else levels[1:])).abs().amin(1)
            distances = torch.where(ratios == 0, 0.0, distances)  # without a sign only zero itself has the code of zero
            assert ((found / scale if scale else found) - ratios).abs().sub(distances).le(1e-6 * ratios.abs() + 1e-9).all()
            assert bool((distances > 0).any()) == bool(scale)
    tiny = torch.full((1, 600), 1e-12)
    tiny[0, 0] = 1.0
    coded.write(slice(0, 1), tiny)
    assert bool(coded.read(slice(0, 1))[0, 1]) is not signed  # what is divided by never becomes zero


@pytest.mark.parametrize(("states", "apart"), [("8bit", 0.05), ("factored", 0.5)])
def test_compressed_moments_stay_near_the_full_ones(states: Any, apart: float) -> None:
    """Of gradients like those of training: a fixed part and noise. A factored second moment is another method, so only of its kind."""
    shape, betas = (40, 600), Betas(0.9, 0.999, 1e-8)
    full, small = (made(kind, *shape, torch.device("cpu"), torch.float32) for kind in ("fp32", states))
    left, right = normal(40, 6, seed=1), normal(6, 600, seed=2)
    for t in range(1, 31):
        mine, theirs = left + 0.5 * normal(40, 6, seed=100 + t), right + 0.5 * normal(6, 600, seed=200 + t)
        g = (mine @ theirs).float()
        small.begin(mine.float(), theirs.float(), betas)
        exact, rough = full.step(slice(None), g.clone(), betas, t), small.step(slice(None), g.clone(), betas, t)
    assert (exact - rough).norm() < apart * exact.norm()
    assert not torch.equal(exact, rough)
    assert rough.abs().max() < 3 * exact.abs().max()  # no zero was divided by


def test_factored_moments_are_adafactors() -> None:
    moments: Any = made("factored", 7, 9, torch.device("cpu"), torch.float32)
    rows, columns = torch.zeros(7), torch.zeros(9)
    for t in range(1, 4):
        left, right = normal(7, 4, seed=t).float(), normal(4, 9, seed=10 + t).float()
        squares = (left @ right).square()
        rows, columns = 0.999 * rows + 0.001 * squares.mean(1), 0.999 * columns + 0.001 * squares.mean(0)
        moments.begin(left, right, Betas(0.0, 0.999, 1e-8))
        n = moments.step(slice(None), left @ right, Betas(0.0, 0.999, 1e-8), t)
        v = torch.outer(rows, columns) / rows.mean() / (1 - 0.999**t)
        torch.testing.assert_close(n, (left @ right) / (v.sqrt() + 1e-8), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rows.mean(), columns.mean(), rtol=1e-5, atol=0)


# --- resuming, ranks -------------------------------------------------------------------------------------------------------------------

SPACES = [("factor", "fp32"), ("weight", "fp32"), ("weight", "8bit"), ("weight", "factored")]


def run(model: nn.Module, optimizer: Any, first: int, last: int) -> None:
    for step in range(first, last):
        optimizer.zero_grad()
        model(normal(12, 24, seed=step, dtype=torch.float32)).square().mean().backward()
        optimizer.step()


@pytest.mark.check("lora-pro", 10)
@pytest.mark.parametrize(("space", "states"), SPACES)
@pytest.mark.parametrize("at", [1, 2, 5])
def test_a_plain_loop_resumes_bit_for_bit(space: str, states: str, at: int) -> None:
    """The official code keeps m, v and the count as attributes of another library's optimizer: a resumed run begins them anew, unsaid."""

    def begun() -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        model = rw.adapt(Mlp(), lora_pro(rank=4, adam_space=space, states=states).replace(gain="dora"))
        return model, rw.optimizer(model, lr=1e-2, weight_decay=0.1)

    (whole, stepping), (model, optimizer) = begun(), begun()
    run(whole, stepping, 0, 8)
    run(model, optimizer, 0, at)
    session = optimizer.rankwise_session
    kept = json.loads(json.dumps(session.state())), trainable_state(model), session.tensors(), copy.deepcopy(optimizer.state_dict())
    assert bool(kept[2]) is (space == "weight")
    again, resumed = begun()
    resumed.rankwise_session.restore(kept[0])
    load_trainable_state(again, kept[1])
    resumed.rankwise_session.restore_tensors(kept[2])
    resumed.load_state_dict(kept[3])
    run(again, resumed, at, 8)
    for name, value in trainable_state(whole).items():
        assert torch.equal(trainable_state(again)[name], value), name
    for name, tensor in stepping.rankwise_session.tensors().items():
        assert torch.equal(resumed.rankwise_session.tensors()[name], tensor), name


def test_a_state_of_another_form_is_refused() -> None:
    def optimizer(**options: Any) -> Any:
        model = rw.adapt(Mlp(), lora_pro(rank=4, **options))
        made = rw.optimizer(model, lr=1e-2)
        run(model, made, 0, 1)
        return made

    tensors = optimizer(adam_space="weight").rankwise_session.tensors()
    with pytest.raises(CheckpointError, match="moments of first have another form in the state"):
        optimizer(adam_space="weight", states="8bit").rankwise_session.restore_tensors(tensors)
    with pytest.raises(CheckpointError, match="holds moments of first, which this recipe does not keep"):
        optimizer().rankwise_session.restore_tensors(tensors)


@pytest.mark.check("lora-pro", 10)
@pytest.mark.parametrize("states", ["fp32", "8bit"])
def test_two_ranks_that_hold_rows_make_the_steps_of_one(states: Any) -> None:
    """Each rank has its rows of m, v, up and h_up; g_down is summed over the ranks, g_up put together. To the last bit where one process
    takes the same rows at once: what differs otherwise is the order of a sum."""
    out, width, s, betas = 20, 300, 2.0, Betas(0.9, 0.999, 1e-8)
    up, down, _, _ = (t.float() if isinstance(t, Tensor) else t for t in problem(out, width, 4, s, 3))
    halves = (slice(0, 10), slice(10, 20))
    single = made(states, out, width, up.device, torch.float32)
    ranks = [made(states, 10, width, up.device, torch.float32) for _ in halves]
    one_up, one_down, many_up, many_down = up, down, up, down
    for t in (1, 2, 3):
        g = normal(out, width, seed=t).float()
        (h_down, h_up), (other_down, other_up) = (
            [step.float() for step in solved([pair(u, d, s, g)[0]], "zero")[0]] for u, d in ((one_up, one_down), (many_up, many_down))
        )
        whole = stream(one_up, one_down, h_up, h_down, s, single, betas, t, tile=10)
        parts = [
            stream(many_up[rows], many_down, other_up[rows], other_down, s, moments, betas, t)
            for rows, moments in zip(halves, ranks, strict=True)
        ]
        assert parts[0][0] is not None
        assert whole[0] is not None
        summed, joined = parts[0][0] + parts[1][0], torch.cat([part[1] for part in parts])  # all-reduce, all-gather
        assert torch.equal(summed, whole[0])
        assert torch.equal(joined, whole[1])
        stepped = []
        for u, d, (g_down, g_up) in ((one_up, one_down, whole), (many_up, many_down, (summed, joined))):
            each, update = pair(u, d, s, g)
            update.down.grad, update.up.grad = g_down.float(), g_up
            (steps,) = solved([each], "sylvester")
            stepped.append((u - 1e-2 * steps[1].float(), d - 1e-2 * steps[0].float()))
        (one_up, one_down), (many_up, many_down) = stepped
    assert torch.equal(one_up, many_up)
    assert torch.equal(one_down, many_down)
    for name, tensor in single.tensors().items():
        assert torch.equal(torch.cat([moments.tensors()[name] for moments in ranks]), tensor)


# --- steps, decay, odd gradients -------------------------------------------------------------------------------------------------------


def test_pairs_are_told_by_their_site_never_by_position() -> None:
    """The official code takes gradients to alternate A, B in one flat list; ours may come in any order and any groups."""
    found = []
    for order in (1, -1):
        torch.manual_seed(0)
        model = stir(rw.adapt(Mlp(), lora_pro(rank=4)))
        trained = [p for p in model.parameters() if p.requires_grad][::order]
        optimizer = rw.attach(model, torch.optim.AdamW([{"params": trained[:3]}, {"params": trained[3:]}], lr=1e-2, weight_decay=0.0))
        run(model, optimizer, 0, 4)
        found.append(trainable_state(model))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_an_update_that_several_sites_use_counts_once() -> None:
    update = only_site(made_model()).update
    sites = {name: SimpleNamespace(update=update) for name in ("a", "b")}
    assert list(Equivalent(LoraPro(), sites).pairs) == ["a"]


def test_steps_are_taken_as_they_are_and_the_head_is_trained_by_adamw() -> None:
    torch.manual_seed(0)
    model = rw.adapt(Mlp(), lora_pro(rank=4, adam_space="weight", targets=["first"], modules_to_save=["second"]))
    optimizer = rw.optimizer(model, lr=1e-2)
    assert isinstance(optimizer, DirectSteps)
    head: Any = model.second
    mine = [nn.Parameter(p.detach().clone()) for p in head.trained.parameters()]
    other = torch.optim.AdamW(mine, lr=1e-2, weight_decay=0.0)
    update: Any = adapted_sites(model)["first"].update
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, 1.0, 3)
    for step in range(3):
        run(model, optimizer, step, step + 1)
        for p, theirs in zip(head.trained.parameters(), mine, strict=True):
            theirs.grad = p.grad.clone()
        other.param_groups[0]["lr"] = 1e-2 * (0.5 + 0.5 * step / 3)
        other.step()
        schedule.step()
    for p, theirs in zip(head.trained.parameters(), mine, strict=True):
        torch.testing.assert_close(p, theirs, rtol=1e-6, atol=1e-7)
    assert set(optimizer.state) == set(head.trained.parameters())
    before, lr = update.up.detach().clone(), optimizer.param_groups[0]["lr"]
    run(model, optimizer, 3, 4)
    torch.testing.assert_close(update.up, before - lr * update.up.grad, rtol=1e-6, atol=1e-9)
    assert optimizer.step(lambda: torch.tensor(3.0)) == 3.0


def test_an_optimizer_that_would_normalize_again_is_refused() -> None:
    model = rw.adapt(Mlp(), lora_pro(rank=4, adam_space="weight"))
    plain = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    message = (
        r"gradient='lora-pro' makes finished steps of the gradients of down, up, which AdamW would change once more.*rankwise.optimizer"
    )
    with pytest.raises(TrainingError, match=message):
        rw.attach(model, plain)
    other = rw.adapt(Mlp(), lora_pro(rank=4))  # in factor space any optimizer will do
    rw.attach(other, torch.optim.AdamW([p for p in other.parameters() if p.requires_grad]))
    rw.optimizer(model, kind=torch.optim.SGD)


def test_two_rates_at_one_site_are_refused() -> None:
    model = rw.adapt(Mlp(), lora_pro(rank=4))
    optimizer: Any = rw.optimizer(model, lr=1e-2)
    next(group for group in optimizer.param_groups if group["role"] == "up")["lr"] = 0.16
    with pytest.raises(TrainingError, match="`down` and `up` of first have different learning rates"):
        run(model, optimizer, 0, 1)


@pytest.mark.parametrize("space", ["factor", "weight"])
def test_decay_shrinks_the_product_and_never_the_base(space: str) -> None:
    """The original code multiplies the frozen base by 1 - lr * decay as well."""
    for decay, shrunk in (("adapter", 1 - 1e-2 * 0.1), ("none", 1.0)):
        model = made_model(adam_space=space, decay=decay)
        optimizer: Any = rw.optimizer(model, lr=1e-2, weight_decay=0.1)
        before, base = delta(model), only_site(model).base_layer.weight.clone()
        give(model, torch.zeros(14, 20, dtype=F64))
        optimizer.step()
        torch.testing.assert_close(delta(model), shrunk * before, rtol=1e-6, atol=0)  # the square of half the decay is 2.5e-7
        assert torch.equal(only_site(model).base_layer.weight, base)
        assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("space", ["factor", "weight"])
def test_gradients_that_are_not_finite_are_left_out(space: str, value: float) -> None:
    torch.manual_seed(0)
    model = rw.adapt(Mlp(), lora_pro(rank=4, adam_space=space))
    optimizer: Any = rw.optimizer(model, lr=1e-2)
    run(model, optimizer, 0, 3)
    before, kept = trainable_state(model), {name: t.clone() for name, t in optimizer.rankwise_session.tensors().items()}
    optimizer.zero_grad()
    model(normal(12, 24, dtype=torch.float32)).square().mean().backward()
    update: Any = adapted_sites(model)["first"].update
    update.up.grad[0, 0] = value
    raw = adapted_sites(model)["second"].update.up.grad.clone()  # type: ignore[union-attr]
    optimizer.step()
    assert optimizer.rankwise_session.report()["gradient_skipped"] == 1
    assert all(torch.equal(t, kept[name]) for name, t in optimizer.rankwise_session.tensors().items())
    if space == "factor":
        assert torch.equal(adapted_sites(model)["second"].update.up.grad, raw)  # type: ignore[union-attr]
        return
    assert all(torch.equal(t, before[name]) for name, t in trainable_state(model).items())
    run(model, optimizer, 3, 4)
    assert all(not torch.equal(t, before[name]) for name, t in trainable_state(model).items())


def test_a_site_that_a_step_does_not_use_counts_no_step() -> None:
    torch.manual_seed(0)
    model = rw.adapt(Mlp(), lora_pro(rank=4, adam_space="weight"))
    optimizer = rw.optimizer(model, lr=1e-2)
    run(model, optimizer, 0, 1)
    optimizer.zero_grad()
    model.first(torch.randn(3, 24)).square().mean().backward()
    optimizer.step()
    assert rule(optimizer).steps == {"first": 2, "second": 1}


def test_frozen_down_is_lora_fas_correction() -> None:
    found = []
    for recipe in (lora_pro(rank=4, frozen={"down"}, init="kaiming"), lora_fa("corrected", rank=4, init="kaiming")):
        torch.manual_seed(0)
        model = rw.adapt(Mlp(), recipe)
        run(model, rw.optimizer(model, lr=1e-1, kind=torch.optim.SGD), 0, 5)
        found.append(trainable_state(model))
    assert set(found[0]) == {"first.update.up", "second.update.up"}
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("gain", ["dora", "propulsion"])
def test_beside_a_gain_the_direction_weight_is_what_moves(gain: str) -> None:
    model = stir(rw.adapt(one(20, 14, False, F64), lora_pro(rank=4, cap=None).replace(gain=gain)), 0.3)
    site, x, y = only_site(model), normal(9, 20, seed=1), normal(9, 14, seed=2)
    update: Any = site.update
    optimizer: Any = rw.optimizer(model, lr=1e-2)
    (model(x) - y).square().sum().backward()
    part: Any = site.gain
    direction = nn.Parameter(site.base_layer.weight.detach() + delta(model))
    rows = (part.magnitude0 + part.magnitude) / direction.norm(dim=1).detach() if gain == "dora" else (1 + part.z) ** part.choice.degree
    (x @ (rows.detach()[:, None] * direction).T - y).square().sum().backward()
    up, down = factors(model)
    optimizer.rankwise_session.fire("backward", optimizer)
    assert direction.grad is not None
    gt = moved(update.down.grad, update.up.grad, up, down, site.site.scaling)
    torch.testing.assert_close(gt, projected(direction.grad, up, down), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("space", ["factor", "weight"])
def test_an_embedding_whose_factors_have_swapped_parts(space: str) -> None:
    """`down` (rank, vocabulary) starts at zero, `up` at random: the same algebra, and `up` is what is bounded."""

    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(11, 8, dtype=F64)

        def forward(self, ids: Tensor) -> Tensor:
            return self.words(ids)

    torch.manual_seed(0)
    ids, y = torch.tensor([0, 3, 3, 7]), normal(4, 8, seed=1)
    model = rw.adapt(Bag(), lora_pro(rank=4, adam_space=space, targets=["words"], cap=None))
    update: Any = adapted_sites(model)["words"].update
    optimizer: Any = rw.optimizer(model, lr=1e-2)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = (model(ids) - y).square().sum()
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
    assert losses == sorted(losses, reverse=True)
    optimizer.zero_grad()
    (model(ids) - y).square().sum().backward()
    g = torch.zeros(8, 11, dtype=F64).index_add_(1, ids, 2 * (model(ids) - y).detach().T)
    up, down, s = update.up.detach().clone(), update.down.detach().clone(), update.scaling
    torch.testing.assert_close(update.down.grad, s * up.T @ g, rtol=1e-9, atol=1e-9)
    if space == "factor":
        optimizer.rankwise_session.fire("backward", optimizer)
        torch.testing.assert_close(moved(update.down.grad, update.up.grad, up, down, s), projected(g, up, down), rtol=1e-6, atol=1e-6)


def test_accumulated_gradients_are_adjusted_once_and_clipping_sees_the_raw_ones() -> None:
    states = []
    for parts in (1, 3):
        torch.manual_seed(0)
        model = stir(rw.adapt(Mlp(), lora_pro(rank=4, adam_space="weight")))
        optimizer = rw.optimizer(model, lr=1e-2)
        for step in range(3):
            optimizer.zero_grad()
            for x in normal(12, 24, seed=step, dtype=torch.float32).chunk(parts):
                (model(x).square().mean() / parts).backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1e9)
            raw = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
            assert float(norm) == pytest.approx(float(raw), rel=1e-5)
            optimizer.step()
        states.append(trainable_state(model))
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-4, atol=1e-6)


# --- recipes, files, runs --------------------------------------------------------------------------------------------------------------


def test_bad_options_are_refused() -> None:
    for options, message in (
        ({"adam_space": "both"}, "adam_space='both' of lora-pro is unknown; use one of 'factor', 'weight'"),
        ({"x": "symmetry"}, "x='symmetry'"),
        ({"decay": "base"}, "weight_decay='base'"),
        ({"states": "4bit"}, "states='4bit'"),
        ({"cap": 0.0}, "cap=0.0 of lora-pro must be above 0"),
        ({"ridge": -1.0}, "ridge=-1.0"),
        ({"eps": 0.0}, "eps=0.0"),
        ({"beta2": 1.0}, "beta2=1.0"),
        ({"tile": 0}, "tile=0"),
    ):
        with pytest.raises(RecipeError, match=message):
            lora_pro(**options)
    assert lora_pro(paper_exact=True).gradient == LoraPro(cap=None)
    assert lora_pro(adam_space="weight").lr < lora_pro().lr
    assert rw.Recipe.from_dict(lora_pro(adam_space="weight", states="8bit").to_dict()) == lora_pro(adam_space="weight", states="8bit")


def test_what_is_saved_is_a_plain_lora_and_merges(tmp_path: Path) -> None:
    ids, model = token_ids(), rw.adapt(llama(), lora_pro(rank=4, adam_space="weight", targets=["q_proj", "down_proj"]))
    optimizer = rw.optimizer(model, lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    expected = logits(model, ids)
    rw.save(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert torch.equal(logits(rw.load(llama(), tmp_path), ids), expected)
    rw.merge(model)
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(rw.unadapt(model), ids), logits(llama(), ids))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.check("lora-pro", 10)
@pytest.mark.parametrize("method", [{"adam_space": "weight", "states": "8bit"}, {"init": "pissa"}])
def test_a_run_from_yaml_resumes_bit_for_bit(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: dict[str, Any]) -> None:

    def config(name: str) -> dict[str, Any]:
        plain = plain_config(world, "completion", tmp_path / name, method={"name": "lora-pro"} | method, targets=["q_proj", "down_proj"])
        plain["train"] |= {"steps": 5, "save_every": 1, "weight_decay": 0.01, "lr": 5e-3, "warmup": 2}
        return plain

    whole = cut_and_resumed(config, monkeypatch, *((2, 4) if "adam_space" in method else (3,)))
    assert whole.after["task"]["loss"] < whole.before["task"]["loss"]


def test_a_classifier_trains_in_weight_space_beside_its_head(world: Path, tmp_path: Path) -> None:
    from rankwise.training.run import train

    method = {"name": "lora-pro", "adam_space": "weight", "states": "factored"}
    result = train(plain_config(world, "classification", tmp_path, method=method, targets=["query", "value"]), console=silent_console())
    assert result.after["task"]["loss"] < result.before["task"]["loss"]
