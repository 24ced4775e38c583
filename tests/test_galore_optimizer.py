"""GaLore as a plain optimizer, against galore-torch, torch's optimizers and dense references; 8-bit moments against bitsandbytes."""

import copy
import io
import itertools
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from galore_torch import GaLoreAdamW
from tiny_models import gpt2, llama, token_ids
from torch import Tensor, nn

import rankwise as rw
from rankwise import eightbit
from rankwise.errors import RecipeError, TargetError, TrainingError
from rankwise.subspace import (
    ALL_ZERO,
    NOT_FINITE,
    Side,
    aligned,
    back,
    orthonormal,
    overlap,
    project,
    refresh,
    residual,
    rotate,
    side_of,
    state_bytes,
    warm,
)

torch.set_num_threads(1)
CPU = torch.device("cpu")
SHAPES = ((24, 40), (40, 24), (32, 32))
SIDES: tuple[Side, ...] = ("left", "right")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gradients(shape: tuple[int, int], count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """A stream of gradients as training gives them: a few strong directions that drift, and noise."""
    draw = generator(seed)
    left, right = torch.randn(shape[0], 6, generator=draw), torch.randn(6, shape[1], generator=draw)
    return [
        (left @ (torch.randn(6, 1, generator=draw) * right) + 0.1 * torch.randn(*shape, generator=draw)).to(dtype) for _ in range(count)
    ]


def spectrum(shape: tuple[int, int], seed: int = 0, decay: float = 1.0) -> Tensor:
    """A matrix whose singular values fall like 1 / i^decay."""
    draw, small = generator(seed), min(shape)
    left = torch.linalg.qr(torch.randn(shape[0], small, generator=draw)).Q
    right = torch.linalg.qr(torch.randn(shape[1], small, generator=draw)).Q
    return (left * torch.arange(1, small + 1).float().pow(-decay)) @ right.T


def run(optimizer: torch.optim.Optimizer, weight: nn.Parameter, stream: list[Tensor]) -> list[Tensor]:
    """The weight after each step."""
    after = []
    for gradient in stream:
        weight.grad = gradient.clone()
        optimizer.step()
        after.append(weight.detach().clone())
    return after


def one(start: Tensor, rank: int | None = 4, **options: Any) -> tuple[nn.Parameter, rw.GaLore]:
    weight = nn.Parameter(start.clone())
    return weight, rw.GaLore([{"params": [weight], "rank": rank}], **{"lr": 1e-2, "update_interval": 5, **options})


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    """Saved and loaded, as a checkpoint is: nothing is unpickled."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# the subspace


@pytest.mark.check("galore", 1)
@pytest.mark.parametrize("method", ["svd", "randomized", "random"])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
def test_frames_are_orthonormal_at_first_and_after_warm_starts(shape: tuple[int, int], side: Side, method: str) -> None:
    frame = None
    for gradient in [*gradients(shape, 3), spectrum(shape), 1e-25 * spectrum(shape), torch.ones(shape)]:  # the last has rank one
        frame = refresh(gradient, 8, side, frame, method, generator()).frame
        assert frame.shape == (shape[0] if side == "left" else shape[1], 8)
        assert frame.dtype == torch.float32
        assert (frame.T @ frame - torch.eye(8)).abs().max() < 1e-5


@pytest.mark.check("galore", 1)
def test_frames_of_other_dtypes_are_fp32_or_wider() -> None:
    gradient = gradients((24, 40), 1)[0]
    assert refresh(gradient.bfloat16(), 4, "left").frame.dtype == torch.float32
    frame = refresh(gradient.double(), 4, "left").frame
    assert frame.dtype == torch.float64
    assert (frame.T @ frame - torch.eye(4)).abs().max() < 1e-13


def test_an_orthonormal_basis_also_where_columns_are_dependent_or_of_very_different_length() -> None:
    matrix = torch.randn(40, 8, generator=generator())
    dependent, uneven, zero = matrix.clone(), matrix * torch.logspace(0, -12, 8), matrix.clone()
    dependent[:, 3], zero[:, 5] = dependent[:, 2], 0
    for case in (matrix, dependent, uneven, zero):
        basis = orthonormal(case)
        assert (basis.T @ basis - torch.eye(8)).abs().max() < 1e-5
        assert (case - basis @ (basis.T @ case)).norm() < 1e-5 * case.norm()  # the columns lie in its span
    expected = torch.linalg.qr(matrix).Q
    torch.testing.assert_close(orthonormal(matrix), expected * (expected.T @ matrix).diagonal().sign(), atol=1e-5, rtol=0)


@pytest.mark.check("galore", 3)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
def test_at_a_refresh_the_coordinates_hold_the_largest_singular_values(shape: tuple[int, int], side: Side) -> None:
    gradient = gradients(shape, 1, dtype=torch.float64)[0]
    energy = torch.linalg.svdvals(gradient)[:5].square().sum()
    for method in ("svd", "randomized"):
        low = project(gradient, refresh(gradient, 5, side, method=method, generator=generator()).frame, side)
        assert float(low.square().sum()) == pytest.approx(float(energy), rel=1e-12 if method == "svd" else 1e-6)


@pytest.mark.check("galore", 10)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("decay", [0.5, 1.0])
def test_range_finder_and_warm_iteration_are_near_the_optimum(decay: float, side: Side) -> None:
    old = spectrum((96, 160), decay=decay)
    frame = refresh(old, 16, side, generator=generator()).frame
    assert residual(old, frame, side) <= 1.01 * residual(old, refresh(old, 16, side, method="svd").frame, side)
    for share in (0.1, 0.3, 1.0):  # of a gradient that has nothing to do with the old one
        new = old + share * spectrum((96, 160), 7, decay)
        best = residual(new, refresh(new, 16, side, method="svd").frame, side)
        assert residual(new, refresh(new, 16, side, frame, generator=generator()).frame, side) <= 1.05 * best
        tall = new if side == "left" else new.T
        assert residual(new, warm(tall, frame), side) <= (1.05 if share == 0.1 else 1.25) * best  # a bare iteration
    assert residual(new, frame, side) > 1.15 * best  # the old frame would not do


@pytest.mark.check("galore", 10)
@pytest.mark.parametrize("method", ["svd", "randomized"])
@pytest.mark.parametrize("side", SIDES)
def test_a_refresh_on_the_same_gradient_with_rotated_moments_keeps_what_they_stand_for(side: Side, method: str) -> None:
    gradient = gradients((24, 40), 1)[0]
    previous = refresh(gradient, 6, side, method="svd").frame
    turned = previous @ torch.linalg.qr(torch.randn(6, 6, generator=generator(3))).Q  # another basis of the same subspace
    shape = project(gradient, previous, side).shape
    first, second = torch.randn(shape, generator=generator(1)), torch.rand(shape, generator=generator(2))
    new = refresh(gradient, 6, side, turned, method).frame
    carried, variance = rotate(first, second, turned, new, side)
    torch.testing.assert_close(back(carried, new, side), back(first, turned, side), atol=1e-5, rtol=1e-5)
    assert (variance >= 0).all()
    same = rotate(first, second, turned, turned, side)
    torch.testing.assert_close(same, (first, second), atol=1e-5, rtol=1e-5)


def test_rotated_moments_follow_an_explicit_sum() -> None:
    previous = refresh(gradients((24, 40), 1)[0].double(), 3, "left", method="svd").frame
    new = refresh(gradients((24, 40), 1, seed=1)[0].double(), 3, "left", method="svd").frame
    first, second = torch.randn(3, 40, dtype=torch.float64), torch.rand(3, 40, dtype=torch.float64)
    carried, variance = rotate(first, second, previous, new, "left")
    for i in range(3):
        turn = [float(new[:, i] @ previous[:, j]) for j in range(3)]
        torch.testing.assert_close(carried[i], sum(turn[j] * first[j] for j in range(3)))
        torch.testing.assert_close(variance[i], sum(turn[j] ** 2 * second[j] for j in range(3)))
    mirrored = rotate(first.T, second.T, previous, new, "right")
    torch.testing.assert_close(mirrored, (carried.T, variance.T))


def test_columns_never_point_away_from_their_predecessors() -> None:
    one_gradient, other = gradients((24, 40), 2)
    previous = refresh(one_gradient, 6, "left", method="svd").frame
    flipped = previous * torch.tensor([1.0, -1, 1, -1, 1, -1])
    for method in ("svd", "randomized", "random"):
        for before in (previous, flipped):
            assert ((before * refresh(other, 6, "left", before, method, generator()).frame).sum(0) >= 0).all()
    torch.testing.assert_close(aligned(previous, flipped), flipped)
    assert overlap(previous, flipped) == pytest.approx(1, abs=1e-5)


@pytest.mark.check("galore", 12)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", ["svd", "randomized", "random"])
def test_a_bad_gradient_gives_back_the_old_frame_and_says_so(method: str, bad: float) -> None:
    gradient = gradients((24, 40), 1)[0]
    previous = refresh(gradient, 4, "left").frame
    gradient[3, 5] = bad
    assert refresh(gradient, 4, "left", previous, method) == (previous, NOT_FINITE)
    assert refresh(0 * previous @ previous.T, 4, "left", previous, method) == (previous, ALL_ZERO)
    frame, note = refresh(gradient, 4, "right", None, method)
    assert note == NOT_FINITE
    assert torch.equal(frame, torch.eye(40, 4))


def test_sides() -> None:
    assert [side_of(*shape, "std") for shape in SHAPES] == ["left", "right", "right"]
    assert [side_of(*shape, "reverse_std") for shape in SHAPES] == ["right", "left", "left"]
    assert {side_of(*shape, name) for shape in SHAPES for name in ("left",)} == {"left"}
    assert {side_of(*shape, name) for shape in SHAPES for name in ("right",)} == {"right"}
    with pytest.raises(RecipeError, match=r"projection='full' is unknown; use one of std"):
        side_of(3, 4, "full")
    for wrong, match in (({"rank": 0}, "rank=0"), ({"rank": 2, "method": "qr"}, "method='qr'")):
        with pytest.raises(RecipeError, match=match):
            refresh(torch.ones(4, 5), side="left", **wrong)
    with pytest.raises(RecipeError, match="only matrices"):
        refresh(torch.ones(4, 5, 2), 2, "left")


# the optimizer against others


@pytest.mark.parametrize("projection", ["std", "left", "right"])
@pytest.mark.parametrize("shape", SHAPES)
def test_golden_every_step_of_galore_torch_over_four_refreshes(shape: tuple[int, int], projection: str) -> None:
    start, bias = torch.randn(shape), torch.randn(10)
    ours, ours_plain, theirs, theirs_plain = (nn.Parameter(tensor.clone()) for tensor in (start, bias, start, bias))
    optimizer = rw.GaLore(
        [{"params": [ours], "rank": 4, "update_interval": 5, "scale": 0.25, "projection": projection}, {"params": [ours_plain]}],
        lr=1e-2, eps=1e-6, weight_decay=0.1, method="svd", official=True,
    )  # fmt: skip
    official = GaLoreAdamW(
        [{"params": [theirs], "rank": 4, "update_proj_gap": 5, "scale": 0.25, "proj_type": projection}, {"params": [theirs_plain]}],
        lr=1e-2, eps=1e-6, weight_decay=0.1, no_deprecation_warning=True,
    )  # fmt: skip
    for gradient in gradients(shape, 18):
        for weight, plain in ((ours, ours_plain), (theirs, theirs_plain)):
            weight.grad, plain.grad = gradient.clone(), gradient.flatten()[:10].clone()
        before = theirs.detach().clone()
        optimizer.step()
        official.step()
        assert (theirs - before).abs().max() > 1e-3  # each step is a thousand times the tolerance
        torch.testing.assert_close(ours, theirs, atol=3e-6, rtol=0)
        torch.testing.assert_close(ours_plain, theirs_plain, atol=3e-6, rtol=0)


def test_the_side_is_stored_where_the_peer_infers_it_from_shapes() -> None:
    start, stream = torch.randn(24, 40), gradients((24, 40), 2)
    theirs = nn.Parameter(start.clone())
    group = {"params": [theirs], "rank": 24, "update_proj_gap": 5, "scale": 0.25, "proj_type": "reverse_std"}
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run(GaLoreAdamW([group], no_deprecation_warning=True), theirs, stream)
    ours, optimizer = one(start, rank=24, projection="reverse_std")
    run(optimizer, ours, stream)
    assert optimizer.state[ours]["side"] == "right"
    other, right = one(start, rank=24, projection="right")
    run(right, other, stream)
    assert torch.equal(ours, other)


def test_the_default_differs_from_galore_torch_only_in_where_eps_stands_and_in_signs() -> None:
    start, stream = torch.randn(24, 40), gradients((24, 40), 5)  # within the first window signs play no part
    ours, optimizer = one(start, method="svd", eps=0.0)
    theirs = nn.Parameter(start.clone())
    group = {"params": [theirs], "rank": 4, "update_proj_gap": 5, "scale": 0.25, "proj_type": "std"}
    official = GaLoreAdamW([group], lr=1e-2, eps=0.0, no_deprecation_warning=True)
    torch.testing.assert_close(run(optimizer, ours, stream)[-1], run(official, theirs, stream)[-1], atol=3e-6, rtol=0)


def test_groups_without_a_rank_are_torch_adamw_to_the_last_bit() -> None:
    start, stream = torch.randn(24, 40), gradients((24, 40), 6)
    ours, optimizer = one(start, rank=None, weight_decay=0.1)
    theirs = nn.Parameter(start.clone())
    for here, there in zip(
        run(optimizer, ours, stream),
        run(torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1, foreach=False), theirs, stream),
        strict=True,
    ):
        assert torch.equal(here, there)


@pytest.mark.check("galore", 2)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
def test_at_full_rank_projected_sgd_is_sgd(shape: tuple[int, int], side: Side) -> None:
    """The frame's side has k directions and min(out, in) of them hold the whole gradient: P P^T G = G."""
    ours = torch.randn(shape)
    theirs = nn.Parameter(ours.clone())
    sgd, frame = torch.optim.SGD([theirs], lr=0.1), None
    for gradient in gradients(shape, 4):
        frame = refresh(gradient, 999, side, frame, generator=generator()).frame  # clamped
        ours = ours - 0.1 * back(project(gradient, frame, side), frame, side)
        theirs.grad = gradient
        sgd.step()
    torch.testing.assert_close(ours, theirs.detach(), atol=4e-6, rtol=0)  # 1e-6 a step, at weights of size 4


@pytest.mark.check("galore", 4)
@pytest.mark.parametrize("shape", SHAPES)
def test_within_a_window_the_weight_moves_in_rank_directions(shape: tuple[int, int]) -> None:
    start = torch.zeros(shape, dtype=torch.float64)
    weight, optimizer = one(start, rank=3, update_interval=4)
    for step, now in enumerate(run(optimizer, weight, gradients(shape, 12, dtype=torch.float64))):
        window = step // 4
        assert torch.linalg.matrix_rank(now - start, rtol=1e-10) == min(3 * (window + 1), *shape)


@pytest.mark.check("galore", 5)
@pytest.mark.parametrize("shape", SHAPES)
def test_each_step_is_torch_adam_on_the_coordinates(shape: tuple[int, int]) -> None:
    weight, optimizer = one(torch.randn(shape, dtype=torch.float64), weight_decay=0.1, scale=0.7, eps=1e-3)
    side = side_of(*shape)
    low = nn.Parameter(torch.zeros(()))
    adam: torch.optim.Adam | None = None
    for gradient in gradients(shape, 12, dtype=torch.float64):
        before = weight.detach().clone()
        run(optimizer, weight, [gradient])
        frame = optimizer.state[weight]["frame"]
        coordinates = project(gradient, frame, side)
        if adam is None:
            low = nn.Parameter(torch.zeros_like(coordinates))
            adam = torch.optim.Adam([low], lr=1e-2, eps=1e-3)
        was = low.detach().clone()
        run(adam, low, [coordinates])
        expected = (before + 0.7 * back(low.detach() - was, frame, side)) * (1 - 1e-2 * 0.1)  # the decay knows no scale
        torch.testing.assert_close(weight.detach(), expected, atol=1e-12, rtol=0)


@pytest.mark.check("galore", 6)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_first_step(shape: tuple[int, int]) -> None:
    weight, optimizer = one(torch.zeros(shape, dtype=torch.float64), scale=0.5, eps=1e-3)
    gradient, side = gradients(shape, 1, dtype=torch.float64)[0], side_of(*shape)
    run(optimizer, weight, [gradient])
    frame = optimizer.state[weight]["frame"]
    low = project(gradient, frame, side)
    torch.testing.assert_close(weight.detach(), -1e-2 * 0.5 * back(low / (low.abs() + 1e-3), frame, side), atol=1e-12, rtol=0)


@pytest.mark.check("galore", 7)
@pytest.mark.parametrize("method", ["svd", "randomized"])
@pytest.mark.parametrize(
    ("shape", "projection", "mirror"), [((24, 40), "std", "std"), ((32, 32), "left", "right"), ((24, 40), "right", "left")]
)
def test_training_the_transpose_gives_the_transpose(shape: tuple[int, int], projection: str, mirror: str, method: str) -> None:
    start, stream = torch.randn(shape, dtype=torch.float64), gradients(shape, 12, dtype=torch.float64)
    weight, optimizer = one(start, method=method, projection=projection)
    other, mirrored = one(start.T.contiguous(), method=method, projection=mirror)
    there = run(mirrored, other, [gradient.T.contiguous() for gradient in stream])
    for a, b in zip(run(optimizer, weight, stream), there, strict=True):
        torch.testing.assert_close(a, b.T, atol=1e-10, rtol=0)


# accumulation and gradients that are freed


def layers() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 24, bias=False), nn.Tanh(), nn.Linear(24, 24)).double()


def train(optimizer: rw.GaLore, model: nn.Module, steps: int, micro: int, clip: float | None = None) -> None:
    draw = generator(5)
    for _ in range(steps):
        for _ in range(micro):
            x = torch.randn(8, 24, generator=draw, dtype=torch.float64)
            ((model(x) - x.roll(1, 1)).square().mean() / micro).backward()
        if clip is not None:
            optimizer.clip_grad_norm_(clip)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.check("galore", 8)
@pytest.mark.parametrize("stagger", [False, True])
def test_gradients_freed_in_the_backward_make_the_same_steps(stagger: bool) -> None:
    models = [layers() for _ in range(3)]
    optimizers = [
        rw.GaLore(rw.galore_groups(model, 4), lr=1e-2, update_interval=4, stagger=stagger, layerwise=layerwise)
        for model, layerwise in zip(models, (False, True, False), strict=True)
    ]
    train(optimizers[0], models[0], 10, 4)
    train(optimizers[1], models[1], 10, 4)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)
    train(optimizers[2], models[2], 10, 1)  # the test can fail: other batches, other weights
    assert (models[2][0].weight - models[0][0].weight).abs().max() > 1e-3


@pytest.mark.check("galore", 8)
def test_four_micro_batches_are_one_step_and_hold_no_gradient() -> None:
    """galore-torch's per-layer training steps in every backward: four Adam steps here."""
    model = layers()
    optimizer = rw.GaLore(rw.galore_groups(model, 4), lr=1e-2, update_interval=100, layerwise=True)
    train(optimizer, model, 1, 4)
    weights = [model[0].weight, model[2].weight, model[4].weight]
    assert [optimizer.state[weight]["step"] for weight in weights] == [1, 1, 1]
    x = torch.randn(8, 24, dtype=torch.float64)
    total = torch.zeros(4, 24, dtype=torch.float64)
    frame = optimizer.state[weights[2]]["frame"]
    for _ in range(3):
        model(x).square().sum().backward()
        assert all(weight.grad is None for weight in weights)
        assert model[0].bias.grad is not None
        copy_of = copy.deepcopy(model)  # has no hooks
        copy_of.zero_grad()
        copy_of(x).square().sum().backward()
        total = total + project(copy_of[4].weight.grad, frame, "right").T
    torch.testing.assert_close(optimizer._pending[weights[2]].T, total)
    optimizer.zero_grad()
    before = weights[0].detach().clone()
    optimizer.step()  # nothing waits, so nothing happens
    assert torch.equal(before, weights[0])


def test_clipping_sees_what_was_freed() -> None:
    model = layers()
    optimizer = rw.GaLore(rw.galore_groups(model, 4), lr=1e-2, layerwise=True)
    train(optimizer, model, 1, 1)
    model(torch.ones(3, 24, dtype=torch.float64)).square().sum().backward()
    held = [*optimizer._pending.values(), *(p.grad for p in model.parameters() if p.grad is not None)]
    norm = math.sqrt(sum(float(tensor.square().sum()) for tensor in held))
    assert len(held) == 5
    assert float(optimizer.clip_grad_norm_(norm / 2)) == pytest.approx(norm)
    assert math.sqrt(sum(float(tensor.square().sum()) for tensor in held)) == pytest.approx(norm / 2, rel=1e-5)


def test_layerwise_is_refused_in_a_distributed_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(TrainingError, match="layerwise=True frees gradients before they are averaged"):
        rw.GaLore(rw.galore_groups(layers(), 4), layerwise=True)


def test_sharded_weights_are_refused() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        sharded = nn.Parameter(torch.distributed.tensor.distribute_tensor(torch.ones(24, 40), mesh))
        rw.GaLore([{"params": [sharded]}])
        with pytest.raises(TrainingError, match="a sharded weight"):
            rw.GaLore([{"params": [sharded], "rank": 4}])
    finally:
        torch.distributed.destroy_process_group()


# the state

VARIANTS: dict[str, dict[str, Any]] = {
    "svd": {"method": "svd"},
    "randomized": {"method": "randomized", "rotate": True},
    "random": {"method": "random", "stagger": True},
    "8bit": {"states": "8bit", "rank": 24},
    "bf16": {"rounding": "stochastic"},
}


@pytest.mark.check("galore", 9)
@pytest.mark.parametrize("name", VARIANTS)
def test_saved_in_the_middle_of_a_window_the_next_steps_are_the_same_bits(name: str) -> None:
    shape = (64, 192)
    options = {"rank": 4, "update_interval": 4, "lr": 1e-2, "weight_decay": 0.01, **VARIANTS[name]}
    rank, dtype = options.pop("rank"), torch.bfloat16 if name == "bf16" else torch.float32
    stream = gradients(shape, 12, dtype=dtype)

    def begin(weight: Tensor, bias: Tensor) -> tuple[nn.ParameterList, rw.GaLore]:
        params = nn.ParameterList([weight.clone(), weight.clone(), bias.clone()])
        return params, rw.GaLore([{"params": params[:2], "rank": rank}, {"params": params[2:]}], **options)

    def go(params: nn.ParameterList, optimizer: rw.GaLore, part: list[Tensor]) -> None:
        for gradient in part:
            params[0].grad, params[1].grad, params[2].grad = gradient, gradient.flip(0), gradient[:, 0]
            optimizer.step()

    params, optimizer = begin(torch.randn(shape).to(dtype), torch.randn(64).to(dtype))
    go(params, optimizer, stream[:6])
    saved = through_a_file(optimizer.state_dict())
    other, resumed = begin(*(p.detach() for p in params[1:]))
    with torch.no_grad():
        other[0].copy_(params[0])
    resumed.load_state_dict(saved)
    for param, twin in zip(params, other, strict=True):
        for key, value in optimizer.state[param].items():
            twin_value = resumed.state[twin][key]
            assert type(value) is type(twin_value)
            assert not isinstance(value, Tensor) or (value.dtype == twin_value.dtype and torch.equal(value, twin_value)), key
            assert isinstance(value, Tensor | int | str)
    for position in range(6, 12):  # the next three steps and beyond the refresh
        go(params, optimizer, stream[position : position + 1])
        go(other, resumed, stream[position : position + 1])
        assert all(torch.equal(a, b) for a, b in zip(params, other, strict=True))


def test_the_peers_state_does_not_load_and_ours_survives_copies() -> None:
    weight = nn.Parameter(torch.randn(24, 40))
    group = {"params": [weight], "rank": 4, "update_proj_gap": 5, "scale": 0.25, "proj_type": "std"}
    official = GaLoreAdamW([group], no_deprecation_warning=True)
    stream = gradients((24, 40), 4)
    run(official, weight, stream[:2])
    with pytest.raises(Exception, match=r"weights_only|Unsupported"):
        through_a_file(official.state_dict())
    ours, optimizer = one(torch.randn(24, 40))
    run(optimizer, ours, stream[:2])
    twin, again = copy.deepcopy((ours, optimizer))
    assert torch.equal(run(optimizer, ours, stream[2:])[-1], run(again, twin, stream[2:])[-1])


@pytest.mark.check("galore", 11)
@pytest.mark.parametrize("states", ["fp32", "8bit"])
@pytest.mark.parametrize("projection", ["std", "reverse_std"])
@pytest.mark.parametrize("shape", [(64, 192), (192, 64), (64, 64)])
def test_the_state_takes_the_bytes_of_the_formula(shape: tuple[int, int], projection: str, states: str) -> None:
    for rank in (4, 30, 99):  # below and above 4096 elements, and clamped
        weight, optimizer = one(torch.randn(shape), rank=rank, projection=projection, states=states)
        run(optimizer, weight, gradients(shape, 2))
        side = side_of(*shape, projection)
        assert optimizer.state_bytes() == state_bytes(*shape, rank, side, states)
        k, other = shape if side == "left" else shape[::-1]
        r = min(rank, *shape)
        eight = states == "8bit" and r * other >= 4096
        assert optimizer.state_bytes() == 4 * k * r + 2 * (r * other + 4 * math.ceil(r * other / 256) if eight else 4 * r * other)


@pytest.mark.check("galore", 12)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_gradient_at_a_refresh_leaves_subspace_moments_and_weight_as_they_were(bad: float) -> None:
    weight, optimizer = one(torch.randn(24, 40))
    stream = gradients((24, 40), 8)
    run(optimizer, weight, stream[:5])
    frame, moment, value = optimizer.state[weight]["frame"], optimizer.state[weight]["exp_avg"].clone(), weight.detach().clone()
    broken = stream[5].clone()
    broken[0, 0] = bad
    with pytest.warns(UserWarning, match="weight 0 of group 0 sits this step out: its gradient is not finite"):
        run(optimizer, weight, [broken])
    state = optimizer.state[weight]
    assert state["frame"] is frame
    assert torch.equal(state["exp_avg"], moment)
    assert torch.equal(weight, value)
    run(optimizer, weight, stream[5:6])  # tried again at once
    assert optimizer.state[weight]["frame"] is not frame
    assert weight.isfinite().all()
    group = {"params": [nn.Parameter(value)], "rank": 4, "update_proj_gap": 5, "scale": 0.25, "proj_type": "std"}
    official = GaLoreAdamW([group], no_deprecation_warning=True)
    if math.isnan(bad):  # the official code ends the run, or goes on with weights that are no numbers
        with pytest.raises(RuntimeError, match=r"svd"):
            run(official, group["params"][0], [broken])
    else:
        assert run(official, group["params"][0], [broken])[-1].isnan().any()


def test_a_gradient_that_is_zero_at_first_gets_its_subspace_as_soon_as_there_is_one() -> None:
    weight, optimizer = one(torch.zeros(24, 40), update_interval=100, method="svd")
    stream = gradients((24, 40), 1)
    run(optimizer, weight, [torch.zeros(24, 40)])
    assert not weight.any()
    assert torch.equal(optimizer.state[weight]["frame"], torch.eye(24, 4))
    run(optimizer, weight, stream)
    torch.testing.assert_close(optimizer.state[weight]["frame"].abs(), refresh(stream[0], 4, "left", method="svd").frame.abs())


def test_rotation_happens_at_refreshes_and_only_there() -> None:
    stream = gradients((24, 40), 3, dtype=torch.float64)
    weight, optimizer = one(torch.zeros(24, 40, dtype=torch.float64), update_interval=2, rotate=True, method="svd")
    run(optimizer, weight, stream[:2])
    before = {key: value.clone() for key, value in optimizer.state[weight].items() if isinstance(value, Tensor)}
    run(optimizer, weight, stream[2:])
    state = optimizer.state[weight]
    first, second = rotate(before["exp_avg"], before["exp_avg_sq"], before["frame"], state["frame"], "left")
    low = project(stream[2], state["frame"], "left")
    torch.testing.assert_close(state["exp_avg"], 0.9 * first + 0.1 * low)
    torch.testing.assert_close(state["exp_avg_sq"], 0.999 * second + 0.001 * low.square())


def test_staggered_refreshes_never_meet() -> None:
    weights = [nn.Parameter(torch.randn(24, 40)) for _ in range(4)]
    optimizer = rw.GaLore([{"params": weights, "rank": 4}], update_interval=8, stagger=True)
    refreshed = []
    for gradient in gradients((24, 40), 24):
        for weight in weights:
            weight.grad = gradient
        before = [optimizer.state[weight].get("frame") for weight in weights]
        optimizer.step()
        refreshed.append([i for i, weight in enumerate(weights) if optimizer.state[weight]["frame"] is not before[i]])
    assert refreshed[0] == [0, 1, 2, 3]
    assert refreshed[2:] == [[i // 2 % 4] if i % 2 == 0 else [] for i in range(2, 24)]
    assert refreshed[1] == []


# 8-bit moments


@pytest.mark.parametrize("signed", [True, False])
def test_golden_levels_codes_and_scales_of_bitsandbytes(signed: bool) -> None:
    """Codes are compared with bitsandbytes' search over all levels. Its CPU kernel looks numbers up in 65,536 bins instead, which is off
    by a level or more near the small ones; its CUDA kernel searches."""
    levels = eightbit.dynamic_map(CPU, signed)
    assert torch.equal(levels, bnb.functional.create_dynamic_map(signed=signed))
    values = torch.randn(300, 37, generator=generator()) * torch.logspace(-5, 0, 300)[:, None]  # 43 blocks and a shorter one
    values[20:40] = 0
    values = values if signed else values.square()
    held = eightbit.quantize(values, signed)
    codes, absmax = torch.ops.bitsandbytes.quantize_blockwise.default(values.double(), levels, 256)
    assert torch.equal(held.codes[~(values == 0)], codes[~(values == 0)])
    assert torch.equal(held.absmax, absmax)
    theirs = bnb.functional.dequantize_blockwise(held.codes, absmax=held.absmax, code=levels, blocksize=256)
    assert torch.equal(eightbit.dequantize(held, signed), theirs)
    assert not eightbit.dequantize(held, signed)[20:40].any()


@pytest.mark.parametrize("signed", [True, False])
def test_every_code_is_the_nearest_level(signed: bool) -> None:
    values = torch.rand(5000, generator=generator()) if not signed else torch.randn(5000, generator=generator())
    held, levels = eightbit.quantize(values, signed), eightbit.dynamic_map(CPU, signed)
    scaled = values / held.absmax.repeat_interleave(256)[:5000]
    best = (scaled[:, None] - levels).abs().amin(1)
    torch.testing.assert_close((scaled - levels[held.codes.int()]).abs(), best, atol=1e-7, rtol=0)
    assert held.codes.numel() + 4 * held.absmax.numel() == eightbit.bytes_of(5000) == 5000 + 4 * 20
    assert eightbit.bytes_of(4095) == 4 * 4095


def test_a_second_moment_in_8_bits_never_becomes_zero_beside_a_first_one_that_is_not() -> None:
    """One gradient a thousandth of the others': as bitsandbytes rounds, its second moment is lost and its next step is m / eps."""
    second = torch.ones(4096)
    second[7] = 1e-7
    assert eightbit.dequantize(eightbit.quantize(second, False), False)[7] == 0
    assert eightbit.dequantize(eightbit.quantize(second, False, positive=True), False)[7] > 1e-7
    zero = torch.zeros(4096)
    assert not eightbit.dequantize(eightbit.quantize(zero, False, positive=True), False).any()
    weight, optimizer = one(torch.zeros(4096), rank=None, lr=1.0, states="8bit")
    big, small = torch.ones(4096), torch.ones(4096)
    big[7] = small[7] = 1e-4
    small[7] = 0
    steps = run(optimizer, weight, [big, small, small])
    assert max(float((b - a).abs().max()) for a, b in itertools.pairwise(steps)) < 1.5


def test_8_bit_steps_stay_near_those_in_fp32() -> None:
    shape = (64, 192)
    stream = gradients(shape, 20)
    whole, eight = (one(torch.zeros(shape), rank=24, states=states) for states in ("fp32", "8bit"))
    a, b = (run(optimizer, weight, stream)[-1] for weight, optimizer in (whole, eight))
    assert eight[1].state[eight[0]]["exp_avg"].dtype == torch.uint8
    assert (a - b).norm() < 0.05 * a.norm()
    assert not torch.equal(a, b)


# dtypes and shapes


def test_half_precision_weights_keep_fp32_state_and_take_steps_that_rounding_to_the_nearest_would_lose() -> None:
    start, stream = torch.ones(64, 96, dtype=torch.bfloat16), gradients((64, 96), 50, dtype=torch.bfloat16)
    ends = {}
    for rounding in ("nearest", "stochastic"):
        weight, optimizer = one(start, lr=1e-4, rounding=rounding, update_interval=200)
        ends[rounding] = run(optimizer, weight, stream)[-1].float()
        assert {optimizer.state[weight][key].dtype for key in ("frame", "exp_avg", "exp_avg_sq")} == {torch.float32}
    exact, optimizer = one(start.float(), lr=1e-4, update_interval=200)
    move = run(optimizer, exact, [gradient.float() for gradient in stream])[-1] - 1
    assert torch.equal(ends["nearest"], torch.ones(64, 96))
    got = ends["stochastic"] - 1
    assert float((got * move).sum() / move.square().sum()) == pytest.approx(1, abs=0.25)


def test_a_convolution_is_a_matrix_of_its_filters() -> None:
    start, stream = torch.randn(24, 5, 2, 4), gradients((24, 40), 7)
    weight, optimizer = one(start.to(memory_format=torch.channels_last))
    flat, other = one(start.view(24, 40))
    shaped = run(optimizer, weight, [gradient.view(24, 5, 2, 4) for gradient in stream])
    torch.testing.assert_close(shaped[-1].reshape(24, 40), run(other, flat, stream)[-1], atol=1e-6, rtol=0)


def test_a_closure_and_a_scheduler() -> None:
    weight, optimizer = one(torch.ones(24, 40))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    losses = []

    def closure() -> float:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return float(loss.detach())

    for _ in range(3):
        losses.append(optimizer.step(closure))
        scheduler.step()
    assert losses[0] == 960
    assert losses[0] > losses[1] > losses[2]
    assert optimizer.param_groups[0]["lr"] == 0.125e-2


# models


def names_of(group: dict[str, Any]) -> set[str]:
    return {name for name, _ in group["params"]}


def test_groups_of_a_model() -> None:
    low, plain = rw.galore_groups(llama(), 7, scale=0.5)
    assert (low["rank"], low["scale"]) == (7, 0.5)
    # key and value are 16 wide: more than twice the rank
    parts = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert len(low["params"]) == 14
    assert all(name.endswith(".weight") and name.split(".")[-2] in parts for name in names_of(low))
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"} < names_of(plain)
    assert not any("k_proj" in name for name in names_of(rw.galore_groups(llama(), 8)[0]))  # min(shape) <= 2 * rank
    assert names_of(rw.galore_groups(llama(), 4, targets=["down_proj"])[0]) == {f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)}
    conv = rw.galore_groups(gpt2(), 4)
    assert {name.split(".", 3)[-1] for name in names_of(conv[0])} == {
        "attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight",
    }  # fmt: skip
    tied = nn.Sequential(nn.Embedding(40, 24), nn.Linear(24, 24), nn.Linear(24, 40))
    tied[2].weight = tied[0].weight
    assert names_of(rw.galore_groups(tied, 4)[0]) == {"1.weight"}
    frozen = llama().requires_grad_(False)
    with pytest.raises(TargetError, match=r"no weight has min\(shape\) > 2 \* rank = 8"):
        rw.galore_groups(frozen, 4)
    with pytest.raises(TargetError, match="rank = 128"):
        rw.galore_groups(llama(), 64)


@pytest.mark.parametrize("options", [{}, {"layerwise": True, "states": "8bit", "stagger": True}], ids=["plain", "layerwise"])
def test_a_model_learns(options: dict[str, Any]) -> None:
    model, ids = llama().train(), token_ids(4, 12)
    optimizer = rw.GaLore(rw.galore_groups(model, 4, scale=1.0), lr=1e-2, update_interval=5, **options)
    losses = []
    for _ in range(25):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    adam = sum(8 * p.numel() for p in model.parameters())
    assert optimizer.state_bytes() < 0.8 * adam


def test_a_warning_names_the_weight() -> None:
    model = layers()
    optimizer = rw.GaLore(rw.galore_groups(model, 4))
    for param in model.parameters():
        param.grad = torch.full_like(param, math.nan)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    assert [str(entry.message).split()[0] for entry in caught] == ["0.weight", "2.weight", "4.weight"]


BAD: list[tuple[str, Callable[[nn.Parameter], Any]]] = [
    (
        "'update_proj_gap' is galore-torch's name; call it 'update_interval' here",
        lambda w: [{"params": [w], "rank": 2, "update_proj_gap": 5}],
    ),
    ("'proj_type' is galore-torch's name", lambda w: [{"params": [w], "rank": 2, "proj_type": "std"}]),
    ("projection='both' is unknown", lambda w: [{"params": [w], "rank": 2, "projection": "both"}]),
    ("method='full' is unknown; use one of svd, randomized, random", lambda w: [{"params": [w], "method": "full"}]),
    ("states='4bit' is unknown", lambda w: [{"params": [w], "states": "4bit"}]),
    ("rounding='up' is unknown", lambda w: [{"params": [w], "rounding": "up"}]),
    ("rank=0 is too small", lambda w: [{"params": [w], "rank": 0}]),
    ("update_interval=0 must be at least 1", lambda w: [{"params": [w], "rank": 2, "update_interval": 0}]),
    ("lr=-1.0 must be a finite number", lambda w: [{"params": [w], "lr": -1.0}]),
    ("scale=nan must be a finite number", lambda w: [{"params": [w], "scale": math.nan}]),
    (r"betas=\(0.9, 1.0\) must lie in", lambda w: [{"params": [w], "betas": (0.9, 1.0)}]),
    (r"a weight of shape \(3,\) has no subspace", lambda w: [{"params": [nn.Parameter(torch.ones(3))], "rank": 2}]),
    ("rounding='stochastic' is for bf16", lambda w: [{"params": [nn.Parameter(w.detach().half())], "rounding": "stochastic"}]),
]


@pytest.mark.parametrize(("match", "groups"), BAD)
def test_bad_options_are_refused(match: str, groups: Callable[[nn.Parameter], Any]) -> None:
    with pytest.raises(RecipeError, match=match):
        rw.GaLore(groups(nn.Parameter(torch.ones(4, 6))))


def test_sparse_gradients_are_refused() -> None:
    table = nn.Embedding(40, 24, sparse=True)
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(TrainingError, match="no sparse gradients"):
        rw.GaLore([{"params": table.parameters(), "rank": 2}]).step()


@pytest.mark.parametrize("number", [0, 1])
def test_what_the_page_shows_runs(number: int) -> None:
    page = Path(__file__).parent.parent / "docs" / "galore-optimizer.md"
    scripts = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)
    assert len(scripts) == 2
    model, ids = llama(hidden_size=64), token_ids(4, 9)
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    exec(compile(scripts[number], str(page), "exec"), {"model": model, "batch": {"input_ids": ids, "labels": ids}})
    assert not torch.equal(before, model.model.layers[0].mlp.up_proj.weight)


def test_accelerate_takes_it_as_it_takes_any_optimizer() -> None:
    from accelerate import Accelerator

    model, ids = llama(dtype=torch.bfloat16), token_ids(4, 9)
    optimizer = rw.GaLore(rw.galore_groups(model, 4), states="8bit")
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    prepared, wrapped = accelerator.prepare(model, optimizer)
    weight = model.model.layers[0].mlp.up_proj.weight
    for _ in range(4):
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(input_ids=ids, labels=ids).loss)
            wrapped.step()
            wrapped.zero_grad()
    wrapped.load_state_dict(through_a_file(wrapped.state_dict()))
    assert (optimizer.state[weight]["step"], optimizer.state[weight]["frame"].dtype) == (2, torch.float32)
