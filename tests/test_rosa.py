"""ROSA: random slices of the weight, rounds, the ledger; against the equations, dense decompositions and exact least squares."""

import copy
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_models import relative
from method_checks import cut_and_resumed
from tiny_models import dense_weight, gpt2, llama, logits, one_linear, perturb, site, token_ids
from torch import Tensor, nn
from training_models import make_world, plain_config

import rankwise as rw
from rankwise.checkpoint import export_lora, load_trainable_state, trainable_state
from rankwise.errors import CheckpointError, RecipeError, TargetError, TrainingError
from rankwise.folding import renew
from rankwise.inits import Beginning, Slice, site_generator
from rankwise.inits.rosa import left_vectors, positions
from rankwise.ledger import recompressed
from rankwise.schedules import Moment, Rounds
from rankwise.sites import adapted_sites
from rankwise.updates import Site

SHAPES = [(24, 40), (40, 24), (32, 32)]
SINGULAR = ["subset", "block", "top", "bottom"]
MODES = [*SINGULAR, "proj_left", "proj_right"]
RANK = 4
TARGETS = ["q_proj", "k_proj", "down_proj"]


def matrix(out: int, width: int, decay: float = 0.6, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """(out, in) with singular values i^-decay."""
    generator = torch.Generator().manual_seed(seed)
    k = min(out, width)
    u = torch.linalg.qr(torch.randn(out, k, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(width, k, generator=generator, dtype=torch.float64)).Q
    return ((u * torch.arange(1, k + 1, dtype=torch.float64) ** -decay) @ v.T).to(dtype)


def made(weight: Tensor, **fields: Any) -> tuple[Any, Any]:
    """(model of one layer under ROSA, its optimizer): a round every second step unless said otherwise."""
    options = {"rank": RANK, "targets": "proj"} | ({} if "rounds" in fields else {"interval": 2}) | fields
    lr = options.pop("lr", 1e-2)
    total = options.pop("total", None)
    model = rw.adapt(one_linear(weight), rw.recipes.rosa(**options))
    return model, rw.optimizer(model, lr=lr, total_steps=total)


def running(optimizer: Any) -> Any:
    return optimizer.rankwise_session.running["schedule"]


def new_round(optimizer: Any) -> Any:
    """What happens at the end of a round, without a step."""
    return running(optimizer).on("step", Moment(2, optimizer))


def pair(model: Any) -> tuple[Tensor, Tensor]:
    update: Any = site(model).update
    return update.down.detach(), update.up.detach()


def steps(model: Any, optimizer: Any, first: int, last: int, seed: int = 50) -> list[float]:
    """Steps first + 1 to last on random regression, each on its own batch; losses."""
    losses = []
    module = site(model)
    for step in range(first + 1, last + 1):
        generator = torch.Generator().manual_seed(seed + step)
        x = torch.randn(16, module.in_features, generator=generator).to(module.weight.dtype)
        y = torch.randn(16, module.out_features, generator=generator).to(module.weight.dtype)
        optimizer.zero_grad()
        loss = (model(x) - y).float().square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


# --- one round -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.check("rosa", 1)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("mode", MODES)
def test_a_round_changes_nothing_of_the_function(mode: str, dtype: torch.dtype, tolerance: float, shape: tuple[int, int]) -> None:
    """For every mode, factorization, balance and scaling; at the start, and after training has moved the factors."""
    weight = matrix(*shape, dtype=dtype)
    x = torch.randn(20, shape[1], generator=torch.Generator().manual_seed(3)).to(dtype)
    for factorization, balance, alpha in (("svd", "paper", RANK), ("gram", "sqrt", 10.0)):
        model, optimizer = made(weight, mode=mode, factorization=factorization, balance=balance, alpha=alpha)
        base = x @ weight.T
        assert float((model(x) - base).detach().norm() / base.norm()) < tolerance
        for _ in range(3):
            perturb(model)
            down, up = (t.clone() for t in pair(model))
            trained, before = dense_weight(site(model)), model(x).detach()
            assert relative(before, base) > 3e-3
            new_round(optimizer)
            assert float((model(x).detach() - before).norm() / before.norm()) < tolerance
            held, (new_down, new_up) = dense_weight(site(model)), pair(model)
            assert float((held - trained).norm() / trained.norm()) < tolerance
            if dtype != torch.bfloat16 and mode in ("subset", "block", "proj_left", "proj_right"):
                assert relative(new_up @ new_down, up @ down) > 1e-2  # another slice
    with torch.no_grad():
        site(model).update.up.zero_()  # type: ignore[union-attr, operator]
        assert relative(model(x), before) > 1e-2  # the slice does stand in the branch


@pytest.mark.check("rosa", 2)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("factorization", ["svd", "gram"])
@pytest.mark.parametrize("mode", SINGULAR)
def test_slices_are_singular_triplets_and_the_rest_is_free_of_them(mode: str, factorization: str, shape: tuple[int, int]) -> None:
    model, optimizer = made(matrix(*shape), mode=mode, factorization=factorization)
    perturb(model)
    trained = dense_weight(site(model))
    new_round(optimizer)
    (down, up), fixed = (t.double() for t in pair(model)), site(model).weight.detach().double()
    u, s, vt = torch.linalg.svd(trained, full_matrices=False)
    index = positions(mode, min(shape), RANK, site_generator(0, "proj", "round 1"))
    torch.testing.assert_close(up.T @ up, torch.eye(RANK, dtype=torch.float64), rtol=0, atol=1e-5)
    torch.testing.assert_close(down @ down.T, torch.diag(s[index] ** 2), rtol=0, atol=1e-5)
    torch.testing.assert_close(up @ down, (u[:, index] * s[index]) @ vt[index], rtol=0, atol=2e-5)
    assert (up.T @ fixed).abs().max() < 1e-5
    assert (fixed @ vt[index].T).abs().max() < 2e-5
    assert torch.linalg.matrix_rank(fixed, atol=1e-4) == min(shape) - RANK


@pytest.mark.check("rosa", 3)
@pytest.mark.parametrize("shape", SHAPES)
def test_projections_are_random_frames(shape: tuple[int, int]) -> None:
    for mode in ("proj_right", "proj_left"):
        model, optimizer = made(matrix(*shape), mode=mode)
        perturb(model)
        trained = dense_weight(site(model))
        new_round(optimizer)
        (down, up), fixed = (t.double() for t in pair(model)), site(model).weight.detach().double()
        if mode == "proj_left":
            down, up, fixed, trained = up.T, down.T, fixed.T, trained.T
        torch.testing.assert_close(down @ down.T, torch.eye(RANK, dtype=torch.float64), rtol=0, atol=1e-6)
        assert (fixed @ down.T).abs().max() < 1e-6
        torch.testing.assert_close(up, trained @ down.T, rtol=0, atol=1e-6)


def test_a_scaling_is_divided_out_and_sqrt_balances() -> None:
    weight = matrix(24, 40, dtype=torch.float64)
    place = Site("proj", "linear", 40, 24, RANK, 2.5)
    for mode in MODES:
        both = []
        for balance in ("paper", "sqrt"):
            begun = Slice(mode=mode, balance=balance).begin(place, weight, None, site_generator(0, "proj"))  # type: ignore[arg-type]
            assert begun.down is not None
            assert begun.up is not None
            both.append(2.5 * begun.up @ begun.down)
            rest = weight - both[-1]
            frame = torch.linalg.qr(begun.down.T if mode == "proj_right" else begun.up).Q
            assert (rest @ frame if mode == "proj_right" else frame.T @ rest).abs().max() < 1e-13
        torch.testing.assert_close(both[0], both[1], rtol=0, atol=1e-13)
        torch.testing.assert_close(begun.up.norm(dim=0), begun.down.norm(dim=1), rtol=1e-12, atol=0)


def test_directions_that_the_gram_matrix_loses_are_left_to_the_svd() -> None:
    """Also where W has a null space on the narrow side: the frame stays orthonormal and the rest keeps the function."""
    for shape in ((40, 24), (24, 40)):
        weight = matrix(*shape, decay=1.0)
        u, s, vt = torch.linalg.svd(weight.double(), full_matrices=False)
        s[-6:] = 0
        weight = ((u * s) @ vt).float()
        up = left_vectors(weight, torch.arange(20, 24), "gram").double()
        torch.testing.assert_close(up.T @ up, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-5)
        assert (up.T @ weight.double()).abs().max() < 1e-5
        model, optimizer = made(weight, mode="bottom", factorization="gram")
        assert any("4 directions of length zero start at down = 0" in note for note in model.rankwise.notes)
        assert steps(model, optimizer, 0, 1)
        assert pair(model)[0].abs().max() > 0  # and they learn all the same
    # in fp64, where squaring would lose them, never by the Gram matrix
    thin = matrix(24, 40, decay=6.0, dtype=torch.float64)
    exact = torch.linalg.svd(thin, full_matrices=False).U[:, -3:]
    assert (left_vectors(thin, torch.arange(21, 24), "gram").T @ exact).abs().diagonal().min() > 1 - 1e-6


# --- which directions ------------------------------------------------------------------------------------------------------------------


@pytest.mark.check("rosa", 6)
@pytest.mark.parametrize(("count", "rank"), [(24, 4), (10, 7), (9, 8)])
def test_every_direction_is_drawn_as_often_as_it_should(count: int, rank: int) -> None:
    draws = 2000
    for mode in ("subset", "block"):
        seen = torch.zeros(count)
        for number in range(draws):
            index = positions(mode, count, rank, site_generator(1, "proj", f"round {number}"))
            assert len(set(index.tolist())) == rank
            assert index.min() >= 0
            seen[index] += 1
        assert bool((seen > 0).all())  # the official code never draws the last direction
        if mode == "subset":
            share = rank / count
            sigma = (share * (1 - share) / draws) ** 0.5
            assert (seen / draws - share).abs().max() < 3 * sigma
        else:  # a block that covers direction i starts at one of so many places
            starts = torch.tensor([min(i, count - rank) - max(0, i - rank + 1) + 1 for i in range(count)])
            share = starts / (count - rank + 1)
            assert ((seen / draws - share).abs() <= 3.5 * (share * (1 - share) / draws).sqrt() + 1e-9).all()


@pytest.mark.check("rosa", 6)
@pytest.mark.parametrize("mode", ["subset", "block"])
def test_covering_takes_every_direction_before_any_comes_again(mode: Any) -> None:
    """Read off the pairs themselves, on a weight that stays: 10 directions in slices of 4, so three rounds a cycle."""
    weight = torch.diag(torch.arange(10, 0, -1, dtype=torch.float64))
    place = Site("proj", "linear", 10, 10, 4, 1.0)
    choice = Slice(mode=mode, covering=True)
    taken = []
    for number in range(9):
        begun = choice.again(place, weight, 0, number)
        assert begun.up is not None
        taken.append(frozenset(begun.up.abs().argmax(0).tolist()))
    first = choice.begin(place, weight, None, site_generator(0, "proj"))
    assert first.up is not None
    assert frozenset(first.up.abs().argmax(0).tolist()) == taken[0]  # the start is the first of them
    for cycle in (taken[:3], taken[3:6], taken[6:]):
        assert frozenset().union(*cycle) == set(range(10))
        if mode == "subset":
            assert not cycle[0] & cycle[1]
            assert len(cycle[2] - cycle[0] - cycle[1]) == 2
    assert taken[:3] != taken[3:6]


@pytest.mark.check("rosa", 9)
@pytest.mark.parametrize("mode", ["subset", "block", "proj_left", "proj_right"])
def test_draws_depend_on_the_seed_the_site_and_the_round_alone(mode: str) -> None:
    """Two ranks, whose global streams differ, draw the same directions in every round; so does a run that adapts one site only. Another
    seed of the recipe draws others."""

    def rounds(global_seed: int, targets: list[str], seed: int = 0) -> dict[str, list[Tensor]]:
        torch.manual_seed(global_seed)
        model = rw.adapt(llama(), rw.recipes.rosa(rank=RANK, mode=mode, interval=1, targets=targets, seed=seed))  # type: ignore[arg-type]
        torch.manual_seed(global_seed)
        optimizer = rw.optimizer(model, lr=0.0)
        found: dict[str, list[Tensor]] = {name: [] for name in adapted_sites(model)}
        for _ in range(3):
            torch.rand(global_seed)
            model(input_ids=token_ids(), labels=token_ids()).loss.backward()
            state = torch.get_rng_state()
            optimizer.step()
            assert torch.equal(torch.get_rng_state(), state)  # the global stream is not touched either
            for name, module in adapted_sites(model).items():
                found[name].append(module.update.up.detach().clone())  # type: ignore[union-attr, operator]
        return found

    one, two, other = rounds(1, TARGETS), rounds(2, TARGETS), rounds(1, TARGETS, seed=1)
    alone = rounds(3, ["layers.1.mlp.down_proj"])
    for name, draws in one.items():
        assert all(torch.equal(a, b) for a, b in zip(draws, two[name], strict=True))
        assert not any(torch.equal(a, b) for a, b in zip(draws, other[name], strict=True))
        assert not torch.equal(draws[0], draws[1])
        if name in alone:
            assert all(torch.equal(a, b) for a, b in zip(draws, alone[name], strict=True))
    assert len(alone) == 1


# --- many rounds -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.check("rosa", 4)
@pytest.mark.parametrize("mode", ["subset", "proj_right"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_ranks_add_up_and_the_ledger_is_the_change(mode: str, dtype: torch.dtype) -> None:
    weight = matrix(40, 48, dtype=dtype)
    model, optimizer = made(weight, mode=mode, interval=5, alpha=7.0)
    boundaries = [dense_weight(site(model))]
    for number in range(3):
        steps(model, optimizer, 5 * number, 5 * number + 4)
        running(optimizer).starts = frozenset()  # the last step of the round, looked at before the next begins
        steps(model, optimizer, 5 * number + 4, 5 * number + 5)
        boundaries.append(dense_weight(site(model)))
        running(optimizer).starts = frozenset({1})
        running(optimizer).on("step", Moment(1, optimizer))
        running(optimizer).starts = None
    exact = dtype is torch.float64
    for before, after in itertools.pairwise(boundaries):
        if exact:
            assert torch.linalg.matrix_rank(after - before, atol=1e-10) == 2 * RANK
    ledger = site(model).ledger
    assert ledger is not None
    assert len(ledger) == 3
    for number in (1, 2, 3):
        change = boundaries[number] - weight.double()
        if exact:
            assert torch.linalg.matrix_rank(change, atol=1e-10) == 2 * RANK * number
        pairs = [each.pair(site(model).site.scaling) for each in ledger[:number]]
        assert sum(len(down) for down, _ in pairs) == 2 * RANK * number
        total = sum((up.double() @ down.double() for down, up in pairs), torch.zeros(()))
        torch.testing.assert_close(total, change, rtol=0, atol=1e-13 if exact else 1e-5)
        assert change.abs().max() > 1e-2


@pytest.mark.check("rosa", 5)
def test_least_squares_reaches_the_target_in_as_many_rounds_as_it_has_ranks() -> None:
    """W* - W0 of rank 3r; `up` is solved exactly in every round. With `down` in the row space of the residual three rounds are enough, and
    two are not; LoRA of rank r cannot get below the best change of rank r; with ROSA's own draws the loss falls in every round."""
    rank, width, out = 2, 16, 12
    generator = torch.Generator().manual_seed(4)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight, x = random(out, width), random(40, width)
    target = weight + random(out, 3 * rank) @ random(3 * rank, width)
    y = x @ target.T

    def fit(model: Any) -> float:
        module = site(model)
        down, _ = pair(model)
        rest = y - x @ module.weight.detach().T
        solved = torch.linalg.lstsq(x @ down.T, rest).solution.T  # (out, rank)
        module.update.put(up=solved)  # type: ignore[union-attr]
        return float((model(x) - y).square().sum().detach())

    def residual_rows(current: Tensor) -> Beginning:
        down = torch.linalg.svd(target - current).Vh[:rank]
        return Beginning(down, current @ down.T)

    floor = float(torch.linalg.svdvals(x @ (target - weight).T)[rank:].square().sum())  # LoRA's: no change of rank r does better
    model, _ = made(weight, rank=rank)
    losses = []
    for number in range(3):
        renew(site(model), residual_rows, site_generator(0, "proj", str(number)))
        losses.append(fit(model))
    assert losses[0] > losses[1] > 1e-2 * floor
    assert losses[0] >= floor * (1 - 1e-12)
    assert losses[2] < 1e-20 * floor
    torch.testing.assert_close(dense_weight(site(model)), target, rtol=0, atol=1e-12)

    model, optimizer = made(weight, rank=rank, mode="proj_right")
    losses = [fit(model)]
    for _ in range(60):
        new_round(optimizer)
        losses.append(fit(model))
    assert all(after < before for before, after in itertools.pairwise(losses))
    assert losses[-1] < 1e-2 * floor


@pytest.mark.check("rosa", 7)
@pytest.mark.parametrize("fused", [True, False])
def test_a_round_forgets_the_moments_and_nothing_else(fused: bool) -> None:
    model = rw.adapt(one_linear(matrix(24, 40)), rw.recipes.rosa(rank=RANK, interval=3, targets="proj"))
    optimizer: Any = rw.optimizer(model, lr=1e-2, fused=fused)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 10)
    parameters = {name: (p, p.data_ptr()) for name, p in model.named_parameters() if p.requires_grad}
    buffers, modules = [id(b) for b in model.buffers()], [id(m) for m in model.modules()]
    for step in range(1, 8):
        steps(model, optimizer, step - 1, step)
        schedule.step()
        assert all(group["lr"] == 1e-2 * (1 - step / 10) for group in optimizer.param_groups)
        for p, _ in parameters.values():
            if step % 3 == 0:
                assert p not in optimizer.state  # no moments, no step
            else:
                assert float(optimizer.state[p]["step"]) == step % 3
            if step % 3 == 1:  # the first step of a round: moments of this one gradient
                assert p.grad is not None
                torch.testing.assert_close(optimizer.state[p]["exp_avg"], 0.1 * p.grad, rtol=1e-5, atol=1e-9)
                torch.testing.assert_close(optimizer.state[p]["exp_avg_sq"], 1e-3 * p.grad.square(), rtol=1e-4, atol=1e-12)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    now = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, (p, address) in parameters.items():
        assert now[name] is p
        assert p.data_ptr() == address
        assert any(p is other for other in held)
    assert [id(b) for b in model.buffers()] == buffers
    assert [id(m) for m in model.modules()] == modules


def test_weight_decay_leaves_the_slice_alone() -> None:
    """It is a part of the pretrained weight."""
    model, optimizer = made(matrix(24, 40), interval=1, lr=0.0)
    for group in optimizer.param_groups:
        group["weight_decay"], group["lr"] = 0.5, 1e-2
    before = [t.clone() for t in pair(model)]
    optimizer.zero_grad()
    (model(torch.zeros(2, 40)) * 0).sum().backward()  # gradients of zero: only decay could move anything
    running(optimizer).starts = frozenset()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, pair(model), strict=True))


@pytest.mark.check("rosa", 10)
def test_fifty_rounds_in_bf16() -> None:
    """At lr 0 a master stays what it was to the last bit; without one roundings add up like a random walk, which is reported."""
    weight = matrix(48, 64, dtype=torch.bfloat16)
    model, optimizer = made(weight, interval=1, lr=0.0, master="fp32")
    steps(model, optimizer, 0, 50)
    assert running(optimizer).round == 50
    module = site(model)
    assert module.master is not None
    assert torch.equal(module.master, weight.float())
    assert running(optimizer).report()["drift"] == 0
    # what the layer holds is one rounding away from the master less the slice, as in the first round
    assert module.offset is not None
    left = module.master - module.offset.up @ module.offset.down
    assert torch.equal(module.weight, left.to(torch.bfloat16))

    drifts = []
    for count in (1, 50):
        model, optimizer = made(weight, interval=1, lr=0.0)
        steps(model, optimizer, 0, count)
        assert site(model).master is None
        actual = float((dense_weight(site(model)) - weight.double()).norm() / weight.double().norm())
        reported = running(optimizer).report()["drift"]
        assert 0.5 < reported / actual < 2  # the start's own rounding is not in it
        drifts.append(actual)
    assert 0 < drifts[0] < drifts[1] < 2**-9 * 50**0.5  # half a step of bf16 in each round, at random
    # an fp32 base does not drift by what it is reported for
    model, optimizer = made(weight.float(), interval=1, lr=0.0)
    steps(model, optimizer, 0, 50)
    assert relative(dense_weight(site(model)), weight.double()) < 1e-6


def test_a_master_also_holds_what_training_adds() -> None:
    """With small steps most of what a round adds is below half a step of bf16: a master keeps it, and sums up what an fp32 base does."""
    weight = matrix(24, 40, dtype=torch.bfloat16)
    model, optimizer = made(weight, interval=1, lr=1e-4, master="fp32")
    steps(model, optimizer, 0, 20)
    module = site(model)
    assert module.master is not None
    assert module.ledger is not None
    total = sum((up.double() @ down.double() for down, up in (each.pair(1.0) for each in module.ledger)), torch.zeros(()))
    torch.testing.assert_close(module.master.double(), weight.double() + total, rtol=0, atol=1e-6)
    assert total.abs().max() > 1e-4


# --- when rounds begin -----------------------------------------------------------------------------------------------------------------


def test_rounds_share_the_run_and_the_last_one_is_whole() -> None:
    assert Rounds().starts(100) == frozenset(range(10, 100, 10))
    assert Rounds().starts(5) == frozenset({1, 2, 3, 4})
    assert Rounds().starts(1) == frozenset()
    assert Rounds(rounds=3).starts(20) == frozenset({6, 13})
    assert Rounds(rounds=1).starts(20) == frozenset()
    assert Rounds(interval=10).starts(40) == frozenset({10, 20, 30})  # none at the very end
    assert Rounds(interval=10).starts(45) == frozenset({10, 20, 30})  # 15 steps rather than 10 and 5
    assert Rounds(interval=10).starts(None) is None
    assert Rounds(interval=10, total_steps=20).starts(None) == frozenset({10})
    model, optimizer = made(matrix(24, 40), rounds=3, total=7)
    seen = []
    for step in range(7):
        steps(model, optimizer, step, step + 1)
        seen.append(int(running(optimizer).report()["round"]))
    assert seen == [0, 1, 1, 2, 2, 2, 2]


BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"rounds": 0}, "rounds=0 of the rosa schedule must be at least 1"),
    ({"interval": -1}, "interval=-1 of the rosa schedule must be at least 1"),
    ({"rounds": 2, "interval": 3}, "say the same thing; remove one"),
    ({"master": "bf16"}, "master='bf16' of the rosa schedule is unknown; use 'none' or 'fp32'"),
    ({"original": "move"}, "original='move' of the rosa schedule is unknown"),
    ({"mode": "middle"}, "mode='middle' of the rosa init is unknown; use one of subset, block"),
    ({"factorization": "qr"}, "factorization='qr' of the rosa init is unknown"),
    ({"balance": "unit"}, "balance='unit' of the rosa init is unknown"),
    ({"mode": "top", "covering": True}, "covering=True with mode='top': no positions are drawn there"),
    ({"base": "keep"}, "schedule=rosa cannot be combined with base=keep"),
    ({"gradient": "lora-plus"}, "schedule=rosa cannot be combined with gradient=lora-plus"),
    ({"init": "lora-ga"}, "schedule=rosa cannot be combined with an init that needs calibration"),
    ({"init": "kaiming"}, "base=fold cannot be combined with an init that does not move the base"),
    ({"gain": "dora"}, "a schedule that rewrites the base cannot be combined with a gain"),
    ({"storage": "nf4"}, "a schedule that rewrites the base cannot be combined with a quantized storage"),
    ({"dropout": 0.1}, "base=fold cannot be combined with dropout"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=lambda value: "" if isinstance(value, str) else "-".join(value))
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        rw.recipes.rosa(**options)


def test_runs_that_do_not_fit_are_refused() -> None:
    for choice, total, message in (
        (Rounds(), None, "must know how many steps the run takes"),
        (Rounds(rounds=9), 8, "rounds=9 of the rosa schedule do not fit into a run of 8 steps"),
        (Rounds(interval=5), 9, "interval=5 of the rosa schedule leaves no second round in a run of 9 steps"),
        (Rounds(total_steps=5), 6, "total_steps=5 of the rosa schedule, but the run takes 6 steps"),
    ):
        with pytest.raises(TrainingError, match=message):
            choice.starts(total)
    with pytest.raises(TrainingError, match="must know how many steps"):
        rw.optimizer(rw.adapt(llama(), rw.recipes.rosa(rank=RANK)))


def test_what_cannot_be_rewritten_is_refused() -> None:
    with pytest.raises(TargetError, match="shares its weight with"):
        rw.plan(llama(tie_word_embeddings=True), rw.recipes.rosa(rank=RANK, targets=["lm_head"]))
    with pytest.raises(TargetError, match="is an embedding, which schedule='rosa' cannot write into"):
        rw.plan(llama(), rw.recipes.rosa(rank=RANK, targets=["embed_tokens"]))
    held = rw.unadapt(rw.adapt(llama(), rw.recipes.qlora(rank=RANK)))
    with pytest.raises(TargetError, match="held in nf4 already"):
        rw.plan(held, rw.recipes.rosa(rank=RANK))
    with pytest.raises(RecipeError, match="proj is 1 x 12 and has no slice to train; exclude it"):
        rw.plan(one_linear(torch.randn(1, 12)), rw.recipes.rosa(rank=RANK))


def test_a_rank_that_would_take_all_of_a_weight_is_lowered_and_said() -> None:
    plan = rw.plan(llama(), rw.recipes.rosa(rank=20, targets=["q_proj", "k_proj"]))
    assert {site.name.rpartition(".")[2]: site.rank for site in plan.sites} == {"q_proj": 20, "k_proj": 15}
    assert all(site.scaling == 1.0 for site in plan.sites)
    assert "model.layers.0.self_attn.k_proj takes rank 15 instead of 20: schedule='rosa' leaves no more there" in plan.notes
    model = rw.adapt(llama(), plan.recipe)
    assert relative(logits(model, token_ids()), logits(llama(), token_ids())) < 1e-5


def test_a_weight_that_is_no_number_stops_the_run() -> None:
    model, optimizer = made(matrix(24, 40))
    with torch.no_grad():
        pair(model)[1].fill_(float("inf"))
    with pytest.raises(TrainingError, match="the trained weight of proj is not finite; go back to an earlier checkpoint"):
        new_round(optimizer)


def test_a_merged_or_disabled_model_takes_no_round() -> None:
    model, optimizer = made(matrix(24, 40))
    with rw.disabled(model), pytest.raises(RecipeError, match="merged or switched off"):
        new_round(optimizer)
    rw.merge(model)
    with pytest.raises(RecipeError, match="merged or switched off"):
        new_round(optimizer)


def test_the_plan_says_what_is_kept_where() -> None:
    plan = rw.plan(llama(), rw.recipes.rosa(rank=RANK, master="fp32", targets=TARGETS))
    numbers = sum(s.in_features * s.out_features for s in plan.sites)
    assert plan.memory["original weights (on the CPU)"] == plan.memory["fp32 master (on the CPU)"] == 4 * numbers
    pairs = sum(2 * RANK * (s.in_features + s.out_features) for s in plan.sites)
    assert plan.memory["ledger, each finished round (on the CPU)"] == 4 * pairs
    assert any("an adapter file holds what it has folded into them" in note for note in plan.notes)
    plain = rw.plan(llama(), rw.recipes.rosa(rank=RANK, ledger=False, original="drop", targets=TARGETS))
    assert not [label for label in plain.memory if "CPU" in label]


# --- models ----------------------------------------------------------------------------------------------------------------------------


def trained(count: int = 7, dtype: torch.dtype = torch.float32, base: Callable[[], Any] | None = None, **fields: Any) -> Any:
    """A Llama after steps with a round after every second one, in the middle of a round."""
    model = llama(dtype=dtype) if base is None else base()
    rw.adapt(model, rw.recipes.rosa(**{"rank": RANK, "interval": 2, "targets": TARGETS} | fields))
    optimizer = rw.optimizer(model, lr=5e-3)
    losses = training(model, optimizer, 0, count)
    assert losses[-1] < losses[0]
    return model


def training(model: Any, optimizer: Any, first: int, last: int) -> list[float]:
    losses = []
    model.train()
    for step in range(first, last):
        ids = token_ids(seed=20 + step % 2)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


COMPOSED: dict[str, dict[str, Any]] = {
    "PiSSA's start": {"init": "pissa"},
    "MiLoRA's start": {"init": "milora-svd"},
    "OLoRA's start": {"init": "olora"},
    "triplets": {"update": "adalora"},
    "a mixer": {"update": "moslora"},
    "up alone": {"frozen": {"down"}},
    "down alone": {"frozen": {"up"}},
    "corrected up": {"frozen": {"down"}, "gradient": "lora-fa"},
    "another scaling": {"alpha": 10.0, "init": {"name": "rosa", "balance": "sqrt", "mode": "proj_left"}},
}


@pytest.mark.parametrize("name", COMPOSED)
def test_other_starts_updates_and_rules_take_rounds_alike(name: str, tmp_path: Path) -> None:
    ids = token_ids()
    recipe = rw.recipes.rosa(rank=RANK, interval=2, targets=TARGETS).replace(**COMPOSED[name])
    model = rw.adapt(llama(), recipe)
    base, start = logits(llama(), ids), logits(model, ids)
    assert relative(start, base) < 2e-5
    optimizer: Any = rw.optimizer(model, lr=2e-3)
    training(model, optimizer, 0, 3)
    frozen = {key: b.clone() for key, b in model.named_buffers() if ".update." in key}
    before = logits(model, ids)
    assert relative(before, base) > 1e-3
    running(optimizer).on("step", Moment(2, optimizer))
    assert relative(logits(model, ids), before) < 2e-5
    assert all(not torch.equal(b, frozen[key]) for key, b in model.named_buffers() if key in frozen)  # a frozen factor is drawn again too
    training(model, optimizer, 3, 5)
    after = logits(model, ids)
    rw.save(model, tmp_path / "own")
    assert torch.equal(logits(rw.load(llama(), tmp_path / "own"), ids), after)
    export_lora(model, tmp_path / "plain")
    assert relative(logits(rw.load(llama(), tmp_path / "plain"), ids), after) < 2e-5
    rw.unadapt(model)
    assert torch.equal(logits(model, ids), base)


def test_the_base_comes_back_bit_for_bit_before_and_after_rounds() -> None:
    ids, untouched = token_ids(), llama()
    base, weights = logits(untouched, ids), {name: p.clone() for name, p in untouched.named_parameters()}
    model = rw.adapt(llama(), rw.recipes.rosa(rank=RANK, interval=2, targets=TARGETS))
    with rw.disabled(model):
        assert torch.equal(logits(model, ids), base)  # the slice is out of the weight already
    training(model, rw.optimizer(model, lr=5e-3), 0, 5)
    after = logits(model, ids)
    with rw.disabled(model):
        assert torch.equal(logits(model, ids), base)
    assert torch.equal(logits(model, ids), after)
    assert torch.equal(rw.reference(model)(input_ids=ids).logits, base)
    rw.merge(model)
    torch.testing.assert_close(logits(model, ids), after, rtol=1e-4, atol=1e-4)
    rw.unmerge(model)
    assert torch.equal(logits(model, ids), after)
    rw.unadapt(model)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    dropped = trained(original="drop")
    with pytest.raises(TargetError, match="original='drop'"):
        rw.unadapt(dropped)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fields", [{}, {"ledger": False}, {"master": "fp32"}, {"master": "fp32", "ledger": False}], ids=str)
def test_files_hold_the_ledger_or_the_weights_and_load_bit_for_bit(tmp_path: Path, fields: dict[str, Any], dtype: torch.dtype) -> None:
    from safetensors.torch import load_file

    ids, model = token_ids(), trained(dtype=dtype, **fields)
    on = logits(model, ids)
    rw.save(model, tmp_path / "plain")
    with rw.disabled(model):
        rw.save(model, tmp_path / "disabled")
    rw.merge(model)
    rw.save(model, tmp_path / "merged")
    rw.unmerge(model)
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("plain", "disabled", "merged")]
    assert files[0] == files[1] == files[2]
    tensors = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    kinds = {key.rpartition(".")[2] for key in tensors}
    assert ("base_weight" in kinds, "ledger_up" in kinds) == ((False, True) if fields.get("ledger", True) else (True, False))
    again = rw.load(llama(dtype=dtype), tmp_path / "plain")
    assert torch.equal(logits(again, ids), on)
    mine, theirs = adapted_sites(model), adapted_sites(again)
    for name, module in theirs.items():
        assert torch.equal(module.weight, mine[name].weight)
        if fields == {"master": "fp32"}:
            assert module.master is not None
            assert torch.equal(module.master, mine[name].master)  # type: ignore[arg-type]
    with rw.disabled(again):
        assert torch.equal(logits(again, ids), logits(llama(dtype=dtype), ids))
    # it can be trained on, and saved again
    training(again, rw.optimizer(again, lr=5e-3), 0, 3)
    rw.save(again, tmp_path / "again")
    assert torch.equal(logits(rw.load(llama(dtype=dtype), tmp_path / "again"), ids), logits(again, ids))


def test_a_broken_ledger_is_refused(tmp_path: Path) -> None:
    rw.save(trained(), tmp_path)
    about = json.loads((tmp_path / "rankwise.json").read_text())
    name = next(iter(about["sites"]))
    assert about["sites"][name]["rounds"] == 3
    for rounds in (2, None):
        about["sites"][name]["rounds"] = rounds
        (tmp_path / "rankwise.json").write_text(json.dumps(about))
        with pytest.raises(CheckpointError, match=rf"{name}.ledger_\w+ has shape \(3, 2, .*this base needs \({rounds or 0}, 2"):
            rw.load(llama(), tmp_path)


@pytest.mark.parametrize("base", [llama, gpt2])
def test_peft_loads_the_exported_ledger_with_equal_logits(tmp_path: Path, base: Callable[[], Any]) -> None:
    peft: Any = pytest.importorskip("peft")
    ids = token_ids()
    targets = TARGETS if base is llama else ["attn.c_attn", "c_fc"]
    model = trained(base=base, targets=targets, alpha=10.0)
    expected = logits(model, ids)
    assert relative(logits(base(), ids), expected) > 1e-2
    ranks = {}
    for name, options in (("whole", {}), ("short", {"recompress": True})):
        export_lora(model, tmp_path / name, **options)
        theirs = peft.PeftModel.from_pretrained(base(), str(tmp_path / name)).eval()
        assert relative(logits(theirs, ids), expected) < 1e-5
        ours = rw.load(base(), tmp_path / name)
        assert relative(logits(ours, ids), expected) < 1e-5
        ranks[name] = {s.name.rpartition(".")[2]: s.rank for s in ours.rankwise.plan.sites}
    sides = {s.name.rpartition(".")[2]: min(s.in_features, s.out_features) for s in model.rankwise.plan.sites}
    for name, side in sides.items():
        # three finished rounds and the one at hand: 2 r each, unless that is more than the weight has
        assert ranks["whole"][name] == min(2 * RANK * 4, side)
        assert ranks["short"][name] <= ranks["whole"][name]
    rw.save(model, tmp_path / "own")
    with pytest.raises(Exception, match="RANKWISE"):
        peft.PeftModel.from_pretrained(base(), str(tmp_path / "own"))


def test_recompression_finds_the_rank_and_keeps_the_product() -> None:
    generator = torch.Generator().manual_seed(0)
    for out, width in ((20, 30), (30, 20), (6, 50)):
        down, up = torch.randn(5, width, generator=generator), torch.randn(out, 5, generator=generator)
        mixed = torch.randn(5, 16, generator=generator)
        wide = mixed.T @ down  # (16, in), rank 5
        left = up @ torch.linalg.pinv(mixed.T)  # (out, 16): left @ wide = up @ down
        shorter_down, shorter_up = recompressed(wide, left)
        assert len(shorter_down) == shorter_up.shape[1] <= 7
        torch.testing.assert_close(shorter_up @ shorter_down, up @ down, rtol=0, atol=2e-5)
    zero_down, zero_up = recompressed(torch.zeros(4, 8), torch.zeros(6, 4))
    assert not (zero_up @ zero_down).any()


def test_without_a_ledger_there_is_nothing_to_export_and_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no ledger says what was folded into it; merge the adapter instead"):
        export_lora(trained(ledger=False), tmp_path)


def test_every_family_has_sites_by_default() -> None:
    """The official filter ('attention' in the name) finds none in GPT-2 or Llama; a pattern that finds none is an error here."""
    for base, count in ((llama, 14), (gpt2, 8)):
        model = rw.adapt(base(), rw.recipes.rosa(rank=RANK))
        assert len(adapted_sites(model)) == count
        assert relative(logits(model, token_ids()), logits(base(), token_ids())) < 1e-5
    with pytest.raises(TargetError, match="attention"):
        rw.plan(llama(), rw.recipes.rosa(rank=RANK, targets=["attention"]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_decomposed_in_fp32(dtype: torch.dtype) -> None:
    """Where the official code calls an SVD that half precision lacks."""
    weight = matrix(24, 40, dtype=dtype)
    for factorization in ("svd", "gram"):
        model, _ = made(weight, factorization=factorization)
        down, up = pair(model)
        assert down.dtype == up.dtype == torch.float32  # masters, at values that the base's dtype has
        assert torch.equal(up, up.to(dtype).float())
        torch.testing.assert_close(up.T @ up, torch.eye(RANK), rtol=0, atol=1e-2)
        assert float((dense_weight(site(model)) - weight.double()).norm() / weight.double().norm()) < 4e-3


# --- resuming --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.check("rosa", 8)
@pytest.mark.parametrize("fields", [{}, {"ledger": False}, {"master": "fp32", "covering": True}], ids=str)
@pytest.mark.parametrize("at", [1, 3, 5, 6])  # before any round; just before one (the third step begins it); inside; just after one
def test_a_plain_loop_resumes_bit_for_bit(at: int, fields: dict[str, Any]) -> None:
    def begun() -> tuple[Any, Any]:
        return made(matrix(24, 40, dtype=torch.bfloat16), rounds=4, total=12, **fields)

    whole, stepping = begun()
    losses = steps(whole, stepping, 0, 12)
    model, optimizer = begun()
    assert steps(model, optimizer, 0, at) == losses[:at]
    session: Any = optimizer.rankwise_session
    kept = json.loads(json.dumps(session.state())), trainable_state(model), session.tensors(), copy.deepcopy(optimizer.state_dict())
    torch.manual_seed(99)
    again, resumed = begun()
    session = resumed.rankwise_session
    session.restore(kept[0])
    load_trainable_state(again, kept[1])
    session.restore_tensors(kept[2])
    resumed.load_state_dict(kept[3])
    assert steps(again, resumed, at, 12) == losses[at:]
    wanted, found = trainable_state(whole), trainable_state(again)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())  # the drawn frames among them
    assert session.report() == stepping.rankwise_session.report()
    for one, two in zip(site(whole).ledger or [], site(again).ledger or [], strict=True):
        assert all(torch.equal(a, b) for left, right in zip(one, two, strict=True) for a, b in zip(left, right, strict=True))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.check("rosa", 8)
def test_a_run_from_yaml_takes_rounds_and_resumes_bit_for_bit(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped just before a round, inside one and just after one, it ends as the run that was never stopped."""
    from rankwise.training.use import open_adapter

    def config(name: str) -> dict[str, Any]:
        method = {"name": "rosa", "rounds": 3, "covering": True}
        plain = plain_config(world, "completion", tmp_path / name, method=method, targets=["q_proj", "v_proj", "down_proj"])
        plain["train"] |= {"steps": 9, "save_every": 1, "accumulate": 1}
        return plain

    # the checkpoints are those of steps 2 (just before a round), 3 (just after one) and 8 (inside one)
    whole = cut_and_resumed(config, monkeypatch, 3, 4, 9)
    metrics = [json.loads(line) for line in (whole.run / "metrics.jsonl").read_text().splitlines()]
    assert [line["schedule_round"] for line in metrics if "loss" in line] == [0, 0, 1, 1, 1, 2, 2, 2, 2]
    rates = [line["lr"] for line in metrics if "loss" in line]
    assert rates == pytest.approx([1e-2 * (9 - step) / 9 for step in range(9)])  # one straight line over all rounds
    assert whole.after["task"]["loss"] < whole.before["task"]["loss"]
    opened = open_adapter(whole.run.root)
    assert all(len(module.ledger or []) == 2 for module in adapted_sites(opened.model).values())
    assert isinstance(opened.model, nn.Module)
