"""GaLore as a schedule that folds: against the algorithm written out on dense weights, against the official optimizer, and its traps."""

import copy
import io
import json
import math
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from galore_models import ATTENTION, DenseGaLore, attention_loss, batch, gradients, parallel_worker, recipe, steps, weights_of
from method_checks import interrupted
from tiny_models import Attention, OneLinear, gpt2, llama, logits, one_linear, site, token_ids
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from training_models import make_world, plain_config, silent_console

import rankwise as rw
from rankwise.checkpoint import load_trainable_state, trainable_state
from rankwise.errors import RecipeError, TargetError, TrainingError
from rankwise.schedules import frames as frames_module
from rankwise.sites import adapted_sites
from rankwise.subspace import residual, state_bytes

DOUBLE = torch.float64


def pair(**options: Any) -> tuple[Any, Any, Any, DenseGaLore]:
    """(adapted model, its optimizer, a plain copy of the base, the algorithm over it), in fp64."""
    rates = {"lr": 1e-2, "weight_decay": options.pop("weight_decay", 0.0)}
    kind = options.pop("kind", torch.optim.AdamW)
    made = recipe(**options)
    model, plain = rw.adapt(llama(dtype=DOUBLE), made), llama(dtype=DOUBLE)
    optimizer = rw.optimizer(model, kind=kind, **rates)
    schedule: Any = made.schedule
    dense = DenseGaLore(
        weights_of(plain),
        made.rank,
        schedule.update_interval,
        scale=schedule.scale,
        align=schedule.align,
        projection=made.update.projection,  # type: ignore[attr-defined]
        **({} if kind is torch.optim.AdamW else {"kind": kind}),
        **rates,
    )
    return model.train(), optimizer, plain.train(), dense


def trained_weights(model: nn.Module) -> list[Tensor]:
    return [module.weight for module in adapted_sites(model).values()]


def factor(module: Any) -> nn.Parameter:
    return module.update.trained


def same(model: nn.Module, dense: DenseGaLore, atol: float = 1e-12) -> None:
    for mine, theirs in zip(trained_weights(model), dense.weights, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=atol)


class Linear:
    """One site whose gradient is given: the loss is sum(y * c), so that G = c^T x."""

    def __init__(
        self, width_out: int, width_in: int, dtype: torch.dtype = DOUBLE, lr: float = 0.1, kind: Any = None, **options: Any
    ) -> None:
        weight = torch.randn(width_out, width_in, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
        self.model: Any = rw.adapt(one_linear(weight.to(dtype)), recipe(**{"targets": "proj", "rank": 3} | options))
        self.optimizer = rw.optimizer(self.model, lr=lr, **({} if kind is None else {"kind": kind}))
        self.module: Any = site(self.model)
        self.start = self.module.weight.clone()

    def backward(self, gradient: Tensor) -> None:
        """G = gradient, by c = identity."""
        y = self.model(gradient)
        (y * torch.eye(len(gradient), dtype=y.dtype)).sum().backward()

    def step(self, gradient: Tensor) -> Tensor:
        """The change of the weight."""
        before = self.module.weight.clone()
        self.optimizer.zero_grad()
        self.backward(gradient)
        self.optimizer.step()
        return self.module.weight - before


def gaussian(*shape: int, seed: int = 1, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).to(dtype)


# --- the Checks of the specification ---------------------------------------------------------------------------------------------------

SHAPES = [(6, 11), (11, 6), (8, 8)]


@pytest.mark.check("galore", 1)
@pytest.mark.parametrize("projection", ["std", "reverse_std", "left", "right"])
@pytest.mark.parametrize("method", ["svd", "randomized", "random"])
@pytest.mark.parametrize("shape", SHAPES)
def test_frames_are_orthonormal_on_every_side(shape: tuple[int, int], method: str, projection: str) -> None:
    case = Linear(*shape, dtype=torch.float32, method=method, projection=projection, update_interval=1)
    for seed in range(3):  # the first frame, and two that begin from the one before
        before = case.module.update.frame.clone()
        case.step(gaussian(*shape, seed=seed, dtype=torch.float32))
        frame = case.module.update.frame
        assert (frame.T @ frame - torch.eye(3)).abs().max() < 1e-5
        assert (frame - before).abs().max() > 0.01
    left = {"std": shape[0] < shape[1], "reverse_std": shape[0] >= shape[1], "left": True, "right": False}[projection]
    assert case.module.update.side == ("left" if left else "right")
    assert frame.shape == (shape[0] if left else shape[1], 3)
    assert factor(case.module).shape == ((3, shape[1]) if left else (shape[0], 3))


@pytest.mark.check("galore", 2)
def test_at_full_rank_sgd_is_sgd() -> None:
    model, optimizer, plain, _ = pair(rank=100, scale=1.0, kind=torch.optim.SGD)
    sgd = torch.optim.SGD(weights_of(plain), lr=1e-2)
    for step in range(6):
        for each, stepping in ((model, optimizer), (plain, sgd)):
            gradients(each, step)
            stepping.step()
            stepping.zero_grad()
    for mine, theirs in zip(trained_weights(model), weights_of(plain), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-13)
    assert {module.site.rank for module in adapted_sites(model).values()} == {32, 16}


@pytest.mark.check("galore", 3)
@pytest.mark.parametrize("projection", ["std", "reverse_std"])
def test_at_a_refresh_the_coordinates_hold_the_leading_singular_values(projection: str) -> None:
    model, optimizer, plain, _ = pair(projection=projection)
    for step in range(4):  # due at 0 and 3
        gradients(model, step)
        if step in (0, 3):
            for module, weight in zip(adapted_sites(model).values(), weights_of(plain), strict=True):
                with torch.no_grad():
                    weight.copy_(module.weight)
            plain.zero_grad()
            gradients(plain, step)
            for module, weight in zip(adapted_sites(model).values(), weights_of(plain), strict=True):
                leading = torch.linalg.svdvals(weight.grad)[:4]
                low = factor(module).grad
                assert low is not None
                torch.testing.assert_close(low.square().sum(), leading.square().sum(), rtol=1e-12, atol=0)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.check("galore", 4)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_window_moves_the_weight_by_a_matrix_of_rank_r(shape: tuple[int, int]) -> None:
    case = Linear(*shape, rank=2, update_interval=4)

    def moved() -> int:
        return int(torch.linalg.matrix_rank(case.module.weight - case.start, rtol=1e-10))

    for step in range(12):
        case.step(gaussian(*shape, seed=step))
        windows = step // 4 + 1
        assert moved() <= 2 * windows
        if step % 4 == 3:
            assert moved() == min(2 * windows, *shape)


@pytest.mark.check("galore", 5)
@pytest.mark.parametrize("projection", ["std", "reverse_std", "left", "right"])
def test_every_step_is_that_of_adam_on_the_projected_gradient(projection: str) -> None:
    """Learning rate, eps, bias correction, a decay that is not scaled, and moments that outlive a refresh, on a model."""
    model, optimizer, plain, dense = pair(projection=projection, weight_decay=0.1)
    for step in range(8):
        gradients(model, step)
        gradients(plain, step)
        optimizer.step()
        dense.step()
        optimizer.zero_grad()
        same(model, dense)
    torch.testing.assert_close(logits(model, token_ids()), logits(plain, token_ids()), rtol=0, atol=1e-11)


@pytest.mark.check("galore", 6)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_first_step_is_the_sign_of_the_coordinates_softened_by_eps(shape: tuple[int, int]) -> None:
    gradient = gaussian(*shape)
    case = Linear(*shape, lr=0.01)
    case.optimizer.param_groups[0]["eps"] = 0.3
    change = case.step(gradient)
    u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
    if shape[0] < shape[1]:
        r = u[:, :3].T @ gradient
        wanted = u[:, :3] @ (r / (r.abs() + 0.3))
    else:
        r = gradient @ vh[:3].T
        wanted = (r / (r.abs() + 0.3)) @ vh[:3]
    torch.testing.assert_close(change, -0.01 * 0.5 * wanted, rtol=0, atol=1e-14)


@pytest.mark.check("galore", 7)
@pytest.mark.parametrize("shape", [(6, 11), (11, 6), (8, 8)])
def test_training_the_transpose_gives_the_transpose(shape: tuple[int, int]) -> None:
    """A square weight projects the right side either way, so there the two sides are asked for."""
    sides = ("left", "right") if shape[0] == shape[1] else ("std", "std")
    one = Linear(*shape, projection=sides[0], update_interval=2)
    other = Linear(shape[1], shape[0], projection=sides[1], update_interval=2)
    other.module.storage.write(other.module.base_layer, one.start.T)
    for step in range(5):
        gradient = gaussian(*shape, seed=step)
        one.step(gradient)
        other.step(gradient.T.contiguous())
        assert one.module.update.side != other.module.update.side
        torch.testing.assert_close(one.module.weight, other.module.weight.T, rtol=0, atol=1e-12)


@pytest.mark.check("galore", 8)
def test_accumulated_steps_are_those_of_the_summed_gradient() -> None:
    """refresh_on='step', as the official code: the frame is that of the sum; and no full gradient was needed to say so (the algorithm
    written out holds them all and takes the same steps)."""
    model, optimizer, plain, dense = pair(refresh_on="step")
    for step in range(5):
        gradients(model, *range(4 * step, 4 * step + 4), weight=0.25)
        gradients(plain, *range(4 * step, 4 * step + 4), weight=0.25)
        for module, weight in zip(adapted_sites(model).values(), dense.weights, strict=True):
            torch.testing.assert_close(factor(module).grad, dense.projected(weight), rtol=0, atol=1e-13)
        optimizer.step()
        dense.step()
        optimizer.zero_grad(set_to_none=False)
        same(model, dense)


@pytest.mark.check("galore", 9)
@pytest.mark.parametrize("at", [2, 3, 4])  # before, at and after a refresh
def test_a_run_saved_in_the_middle_of_a_window_goes_on_bit_for_bit(at: int) -> None:
    options = {"method": "randomized", "stagger": True, "rotate": True}

    def begun() -> tuple[Any, Any]:
        model = rw.adapt(llama(), recipe(**options))
        return model, rw.optimizer(model, lr=1e-2)

    model, optimizer = begun()
    steps(model, optimizer, 0, at)
    file = io.BytesIO()
    session = optimizer.rankwise_session
    state = {"session": session.tensors(), "optimizer": optimizer.state_dict(), "model": trainable_state(model), "text": session.state()}
    torch.save(state, file)
    steps(model, optimizer, at, at + 3)
    file.seek(0)
    kept = torch.load(file, weights_only=True)  # the official state holds a Python object, which this refuses
    again, resumed = begun()
    resumed.rankwise_session.restore(json.loads(json.dumps(kept["text"])))
    load_trainable_state(again, kept["model"])
    resumed.rankwise_session.restore_tensors(kept["session"])
    resumed.load_state_dict(kept["optimizer"])
    steps(again, resumed, at, at + 3)
    for name, value in trainable_state(model).items():
        assert torch.equal(trainable_state(again)[name], value), name
    for key, value in session.tensors().items():
        assert torch.equal(resumed.rankwise_session.tensors()[key], value), key


@pytest.mark.check("galore", 10)
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_a_warm_frame_is_nearly_optimal_and_rotated_moments_stay_where_they_are(shape: tuple[int, int]) -> None:
    """A gradient that drifts slowly, with singular values that fall as those of real ones do."""
    u, v = torch.linalg.qr(gaussian(24, 24))[0], torch.linalg.qr(gaussian(40, 24, seed=2))[0]

    def gradient(step: int) -> Tensor:
        drift = 0.02 * step * gaussian(24, 40, seed=3) / 40
        made = (u * 0.7 ** torch.arange(24, dtype=DOUBLE)) @ v.T + drift
        return made if shape == (24, 40) else made.T.contiguous()

    case = Linear(*shape, method="randomized", update_interval=1, rank=6)
    for step in range(5):
        case.step(gradient(step))
        best = torch.linalg.svdvals(gradient(step))[6:].norm() / gradient(step).norm()
        assert residual(gradient(step), case.module.update.frame, case.module.update.side) < 1.05 * best

    case = Linear(*shape, method="svd", update_interval=3, rank=6, rotate=True)
    for _ in range(3):
        case.step(gradient(0))

    def moment() -> Tensor:
        state, update = case.optimizer.state[factor(case.module)], case.module.update
        return update.frame @ state["exp_avg"] if update.side == "left" else state["exp_avg"] @ update.frame.T

    # another basis of the same subspace, so that the refresh on the same gradient has something to turn
    turn = torch.linalg.qr(gaussian(6, 6, seed=4))[0]
    state, update = case.optimizer.state[factor(case.module)], case.module.update
    state["exp_avg"].copy_(turn.T @ state["exp_avg"] if update.side == "left" else state["exp_avg"] @ turn)
    update.turn(update.frame @ turn)
    case.optimizer.rankwise_session.running["schedule"]._arm()  # type: ignore[attr-defined]
    before, frame, seen = moment(), update.frame.clone(), []
    case.optimizer.register_step_pre_hook(lambda *_: seen.append((moment(), bool((state["exp_avg_sq"] >= 0).all()))))
    case.step(gradient(0))
    assert (update.frame - frame).abs().max() > 0.1
    torch.testing.assert_close(seen[0][0], before, rtol=0, atol=1e-5 * float(before.abs().max()))
    assert seen[0][1]


@pytest.mark.check("galore", 11)
@pytest.mark.parametrize("projection", ["std", "reverse_std"])
def test_the_state_takes_the_bytes_of_the_formula(projection: str) -> None:
    made = recipe(projection=projection)
    model: Any = rw.adapt(llama(), made)
    optimizer = rw.optimizer(model)
    steps(model, optimizer, 0, 1)
    frames = moments = 0
    for module in adapted_sites(model).values():
        update = module.update
        state = optimizer.state[factor(module)]
        mine = update.frame.numel() * 4  # type: ignore[union-attr, operator]
        both = sum(state[key].numel() * state[key].element_size() for key in ("exp_avg", "exp_avg_sq"))
        assert mine + both == state_bytes(module.out_features, module.in_features, 4, update.side)  # type: ignore[union-attr, arg-type]
        frames, moments = frames + mine, moments + both
    memory = model.rankwise.plan.memory
    assert memory["AdamW moments"] == moments
    assert memory["adapters"] == frames + moments // 2  # and D itself
    assert memory["gradients"] == moments // 2


@pytest.mark.check("galore", 12)
@pytest.mark.parametrize("refresh_on", ["first-batch", "step"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_gradient_that_is_no_number_leaves_the_frame_alone(shape: tuple[int, int], refresh_on: str) -> None:
    case = Linear(*shape, update_interval=2, refresh_on=refresh_on)
    for seed in range(2):
        case.step(gaussian(*shape, seed=seed))
    frame = case.module.update.frame.clone()
    for broken in (math.nan, math.inf):
        gradient = gaussian(*shape, seed=2)
        gradient[1, 2] = broken
        case.optimizer.zero_grad()
        case.backward(gradient)
        assert torch.equal(case.module.update.frame, frame)
        assert not bool(torch.isfinite(factor(case.module).grad).all())  # type: ignore[arg-type]  # whoever looks at the norm sees it
    case.optimizer.zero_grad()
    case.backward(gaussian(*shape, seed=3))  # the step was not taken, so the frame is still due
    assert (case.module.update.frame - frame).abs().max() > 0.01
    assert bool(torch.isfinite(factor(case.module).grad).all())  # type: ignore[arg-type]


@pytest.mark.check("galore", 11)
def test_moments_in_8_bits_take_the_bytes_of_the_formula_and_resume_bit_for_bit() -> None:
    """An option of every recipe (`states`), not of this method: the optimizer steps on D as on any tensor."""

    def begun() -> tuple[Any, Any]:
        model = rw.adapt(llama(hidden_size=64, intermediate_size=160, num_hidden_layers=1), recipe(rank=32, states="8bit"))
        return model, rw.optimizer(model, lr=2e-3)

    model, optimizer = begun()
    steps(model, optimizer, 0, 4)
    held = 0
    for module in adapted_sites(model).values():
        state = optimizer.state[factor(module)]
        mine = sum(value.numel() * value.element_size() for key, value in state.items() if key.startswith("exp_avg"))
        update: Any = module.update
        assert update.frame.numel() * 4 + mine == state_bytes(module.out_features, module.in_features, 32, update.side, "8bit")
        held += mine
    assert held == model.rankwise.plan.memory["AdamW moments"]
    # two of seven tensors have fewer than 4096 elements, and stay in fp32
    assert held < 0.5 * rw.plan(llama(hidden_size=64, intermediate_size=160, num_hidden_layers=1), recipe(rank=32)).memory["AdamW moments"]

    again, resumed = begun()
    resumed.rankwise_session.restore(optimizer.rankwise_session.state())
    load_trainable_state(again, trainable_state(model))
    resumed.rankwise_session.restore_tensors(optimizer.rankwise_session.tensors())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, stepping in ((model, optimizer), (again, resumed)):
        steps(each, stepping, 4, 7)
    for mine, theirs in zip(trained_weights(model), trained_weights(again), strict=True):
        assert torch.equal(mine, theirs)


def test_moments_in_8_bits_step_as_on_a_tensor_fed_the_coordinates() -> None:
    """At a rank below that of the gradients (16 tokens), whose frames are unique; of four moments two are large enough for 8 bits."""
    shape: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 640, "num_hidden_layers": 1, "dtype": DOUBLE}
    model: Any = rw.adapt(llama(**shape), recipe(rank=8, states="8bit")).train()
    optimizer, plain, other = rw.optimizer(model, lr=2e-3), llama(**shape).train(), llama(**shape).train()
    dense = DenseGaLore(weights_of(plain), 8, 3, lr=2e-3, scale=0.5, kind=rw.GaLore, states="8bit")
    exact = DenseGaLore(weights_of(other), 8, 3, lr=2e-3, scale=0.5)
    for step in range(5):
        for each, stepping in ((model, optimizer), (plain, dense), (other, exact)):
            gradients(each, step)
            stepping.step()
        optimizer.zero_grad()
        same(model, dense)
    away = [float((mine - full).abs().max()) for mine, full in zip(trained_weights(model), exact.weights, strict=True)]
    assert max(away) > 1e-5


def test_moments_in_blocks_cannot_be_rotated() -> None:
    model = rw.adapt(llama(hidden_size=64, intermediate_size=160, num_hidden_layers=1), recipe(rank=32, states="8bit", rotate=True))
    with pytest.raises(TrainingError, match="use rotate=False"):
        steps(model, rw.optimizer(model), 0, 4)


# --- the official optimizer ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 3])
def test_steps_are_those_of_galore_torch(accumulate: int) -> None:
    """Over three refresh periods. The official AdamW adds eps to sqrt(V) before the bias correction and torch's after it, so ours gets
    eps / sqrt(1 - beta2^t) at step t; its decomposition is in fp32 whatever the gradient, so weights are fp32."""
    official = pytest.importorskip("galore_torch")
    model = rw.adapt(llama(), recipe(align=False, refresh_on="step", update_interval=3)).train()
    optimizer = rw.optimizer(model, lr=1e-2, weight_decay=0.1)
    plain = llama().train()
    group = {"rank": 4, "update_proj_gap": 3, "scale": 0.5, "proj_type": "std"}
    theirs = official.GaLoreAdamW(
        [{"params": weights_of(plain), **group}], lr=1e-2, weight_decay=0.1, eps=1e-6, no_deprecation_warning=True
    )
    start = [weight.clone() for weight in trained_weights(model)]
    for step in range(9):
        numbers = range(accumulate * step, accumulate * (step + 1))
        gradients(model, *numbers)
        gradients(plain, *numbers)
        for mine in optimizer.param_groups:
            mine["eps"] = 1e-6 / math.sqrt(1 - 0.999 ** (step + 1))
        optimizer.step()
        theirs.step()
        optimizer.zero_grad()
        theirs.zero_grad()
        for mine, other, was in zip(trained_weights(model), weights_of(plain), start, strict=True):
            assert (mine - other).norm() < 1e-4 * (other - was).norm()


def test_from_the_first_batch_alone_the_frame_deviates_from_galore_torch_as_stated() -> None:
    """Under accumulation the default takes the frame from the first batch of the step, and every gradient of the step in that frame."""
    model, _, plain, dense = pair()
    gradients(plain, 0)
    first = [dense.frame(weight) for weight in dense.weights]
    gradients(plain, 1, 2)
    gradients(model, 0, 1, 2)
    whole = [dense.frame(weight) for weight in dense.weights]
    for module, weight, one, summed in zip(adapted_sites(model).values(), dense.weights, first, whole, strict=True):
        frame, side = module.update.frame, module.update.side  # type: ignore[union-attr]
        turned = frame * torch.where((frame * one).sum(0) < 0, -1.0, 1.0)  # type: ignore[operator]
        torch.testing.assert_close(turned, one, rtol=0, atol=1e-9)
        assert (summed @ summed.T - one @ one.T).norm() > 0.1
        wanted = frame.T @ weight.grad if side == "left" else weight.grad @ frame  # type: ignore[operator, union-attr]
        torch.testing.assert_close(factor(module).grad, wanted, rtol=0, atol=1e-13)


# --- every way to a gradient -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refresh_on", ["first-batch", "step"])
def test_clipping_reads_the_gradient_in_the_new_frame(refresh_on: str) -> None:
    model, optimizer, plain, dense = pair(refresh_on=refresh_on)
    for step in range(5):
        gradients(model, step)
        gradients(plain, step)
        norm = torch.stack([dense.projected(weight).norm() for weight in dense.weights]).norm()
        mine = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 0.1)
        torch.testing.assert_close(mine, norm.detach(), rtol=1e-12, atol=0)
        optimizer.step()
        dense.step(clip=float(0.1 / (norm + 1e-6)))
        optimizer.zero_grad()
        same(model, dense)


@pytest.mark.parametrize("refresh_on", ["first-batch", "step"])
def test_two_forwards_before_one_backward(refresh_on: str) -> None:
    """As preference training does: both were made with the frame of before."""
    model, optimizer, plain, dense = pair(refresh_on=refresh_on)
    for step in range(4):
        for each in (model, plain):
            (each(**batch(2 * step)).loss - 0.3 * each(**batch(2 * step + 1)).loss).backward()
        for module, weight in zip(adapted_sites(model).values(), dense.weights, strict=True):
            frame, side = module.update.frame, module.update.side  # type: ignore[union-attr]
            wanted = frame.T @ weight.grad if side == "left" else weight.grad @ frame  # type: ignore[operator, union-attr]
            torch.testing.assert_close(factor(module).grad, wanted, rtol=0, atol=1e-13)
        if refresh_on == "step":
            optimizer.step()
            dense.step()
            same(model, dense)
        optimizer.zero_grad()
        plain.zero_grad()


@pytest.mark.parametrize("refresh_on", ["first-batch", "step"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_take_the_same_steps(reentrant: bool, refresh_on: str) -> None:
    model, optimizer, plain, dense = pair(refresh_on=refresh_on)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for step in range(5):
        gradients(model, step)
        gradients(plain, step)
        optimizer.step()
        dense.step()
        optimizer.zero_grad()
        same(model, dense)


@pytest.mark.slow  # two processes of their own
def test_two_processes_share_one_frame_and_average_in_it(tmp_path: Path) -> None:
    """DistributedDataParallel on two batches: R is what is averaged, in the frame that the first process found."""
    torch.multiprocessing.spawn(parallel_worker, (str(tmp_path / "meet"), str(tmp_path)), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for name, value in one.items():
        assert torch.equal(other[name], value), name
    plain = Attention()
    (0.5 * (attention_loss(plain, 0) + attention_loss(plain, 1))).backward()
    for name, module in adapted_sites(rw.adapt(Attention(), recipe(targets=ATTENTION))).items():
        weight = plain.get_submodule(name).weight
        frame, left = one[f"frame.{name}"], module.update.side == "left"  # type: ignore[union-attr]
        mean = frame.T @ weight.grad if left else weight.grad @ frame  # type: ignore[operator]
        torch.testing.assert_close(one[f"grad.{name}"], mean, rtol=0, atol=1e-13)
        assert (one[f"weight.{name}"] - weight).abs().max() > 1e-4


def test_conv1d_layers_are_read_as_out_by_in() -> None:
    model, plain = rw.adapt(gpt2(), rw.recipes.galore(rank=4, targets=["c_attn", "c_proj", "c_fc"])), gpt2()
    optimizer = rw.optimizer(model)
    gradients(model, 0)
    gradients(plain, 0)
    before = [weight.clone() for weight in trained_weights(model)]
    for name, module in adapted_sites(model).items():
        full = plain.get_submodule(name).weight.grad.T
        frame, side = module.update.frame, module.update.side  # type: ignore[union-attr]
        wanted = frame.T @ full if side == "left" else full @ frame  # type: ignore[operator]
        torch.testing.assert_close(factor(module).grad, wanted, rtol=1e-4, atol=1e-6)
        assert residual(full, frame, side) < 1  # type: ignore[arg-type]
    optimizer.step()
    assert all(bool((now != was).any()) for now, was in zip(trained_weights(model), before, strict=True))


def test_a_gradient_of_zero_at_the_start_is_tried_again() -> None:
    case = Linear(6, 11, update_interval=100)
    frame = case.module.update.frame.clone()
    assert not case.step(torch.zeros(6, 11, dtype=DOUBLE)).any()
    assert torch.equal(case.module.update.frame, frame)
    assert case.optimizer.rankwise_session.report() == {"schedule_renewed": 0.0}  # type: ignore[attr-defined]
    gradient = gaussian(6, 11)
    case.step(gradient)
    assert residual(gradient, case.module.update.frame, "left") < 1.001 * float(torch.linalg.svdvals(gradient)[3:].norm() / gradient.norm())
    assert case.optimizer.rankwise_session.report() == {"schedule_renewed": 1.0}  # type: ignore[attr-defined]
    frame = case.module.update.frame.clone()
    case.step(gaussian(6, 11, seed=2))
    assert torch.equal(case.module.update.frame, frame)


def test_a_scaled_gradient_is_refused() -> None:
    case = Linear(6, 11)
    case.backward(gaussian(6, 11))
    case.optimizer.grad_scale = torch.tensor(65536.0)  # type: ignore[attr-defined]
    with pytest.raises(TrainingError, match="unscale_"):
        case.optimizer.step()


def test_a_forward_that_no_tap_saw_is_an_error() -> None:
    model = rw.adapt(one_linear(gaussian(6, 11)), recipe(targets="proj"))
    loss = model(gaussian(5, 11)).sum()
    optimizer = rw.optimizer(model)
    loss.backward()
    with pytest.raises(TrainingError, match="the frame of proj is due, but no gradient came past it"):
        optimizer.step()


# --- memory, arithmetic and the plan ---------------------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Notes the shapes of all results, and counts which of some shapes are alive, whoever holds them."""

    def __init__(self, shapes: set[tuple[int, ...]], own: set[int]) -> None:
        super().__init__()
        self.shapes, self.own = shapes, own
        self.made: list[tuple[int, ...]] = []
        self.found: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.made.append(tuple(out.shape))
            storage = out.untyped_storage()
            if tuple(out.shape) in self.shapes and storage.data_ptr() not in self.own:
                self.found[storage.data_ptr()] = StorageWeakRef(storage)
        return out

    def alive(self) -> int:
        return sum(not reference.expired() for reference in self.found.values())


@pytest.mark.parametrize("refresh_on", ["first-batch", "step"])
def test_full_gradients_are_never_held_together(refresh_on: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted where it is worst, when all 8 sites are due: one at a time, and as stated all of them with refresh_on='step'."""
    model = rw.adapt(llama(), recipe(refresh_on=refresh_on)).train()
    optimizer = rw.optimizer(model)
    shapes = {tuple(weight.shape) for weight in trained_weights(model)}
    watch = Watch(shapes, {weight.untyped_storage().data_ptr() for weight in model.parameters()})
    inner, seen = frames_module.refresh, []

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(watch.alive())
        return inner(*args, **kwargs)

    monkeypatch.setattr(frames_module, "refresh", watched)
    for step in range(4):
        with watch:
            gradients(model, step)
        optimizer.step()
        optimizer.zero_grad()
    assert seen == ([1] * 16 if refresh_on == "first-batch" else [*range(1, 9), *range(1, 9)])


def test_between_refreshes_no_result_has_the_shape_of_a_weight() -> None:
    case = Linear(12, 20, update_interval=50)
    for step in range(2):
        case.optimizer.zero_grad()
        with Watch(set(), set()) as watch:
            y = case.model(gaussian(7, 20, seed=step))
            (y * gaussian(7, 12, seed=9)).sum().backward()
        assert ((12, 20) in watch.made) is (step == 0)
        case.optimizer.step()


def test_staggered_refreshes_fall_on_one_site_at_a_time() -> None:
    model = rw.adapt(llama(), recipe(stagger=True, update_interval=8))  # 8 sites
    optimizer = rw.optimizer(model)
    renewed: list[float] = []
    frames = [module.update.frame.clone() for module in adapted_sites(model).values()]  # type: ignore[union-attr, operator]
    moved: list[list[int]] = []

    def look(step: int) -> None:
        renewed.append(optimizer.rankwise_session.report()["schedule_renewed"])  # type: ignore[attr-defined]
        now = [module.update.frame for module in adapted_sites(model).values()]  # type: ignore[union-attr]
        moved.append([index for index, (one, other) in enumerate(zip(now, frames, strict=True)) if not torch.equal(one, other)])  # type: ignore[arg-type]
        frames[:] = [frame.clone() for frame in now]  # type: ignore[operator]

    steps(model, optimizer, 0, 17, look)
    assert renewed == [8] + [1] * 16
    assert moved == [list(range(8)), *([index] for index in (1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 0))]


def test_the_plan_counts_what_galore_saves() -> None:
    """Wide layers at a rank that is small beside them: arithmetic near 4 N a token where full training takes 6 N, h kept and not x."""
    model = llama(hidden_size=256, intermediate_size=512, num_hidden_layers=1, num_key_value_heads=4)
    plan = rw.plan(model, rw.recipes.galore(rank=8))
    size = sum(site.in_features * site.out_features for site in plan.sites)
    flops = plan.flops_per_token
    assert flops["frozen base"] == 4 * size
    assert flops["branch"] == sum(site.rank * (6 * site.in_features + 4 * site.out_features) for site in plan.sites if left(site)) + sum(
        site.rank * (4 * site.in_features + 6 * site.out_features) for site in plan.sites if not left(site)
    )
    assert sum(flops.values()) < 4.3 * size
    # down_proj alone is wider than tall: its input is kept, and at the six others h
    assert plan.saved_bytes_per_token(1) == 512 + 8 * 6
    text = str(plan)
    assert "writes into the base weights" in text
    assert plan.adapter_parameters == sum(8 * max(site.in_features, site.out_features) for site in plan.sites)


def left(site: Any) -> bool:
    return site.out_features < site.in_features


def test_a_rank_above_a_side_is_lowered_and_the_plan_says_so() -> None:
    plan = rw.plan(llama(), recipe(rank=24))
    assert {site.name.rpartition(".")[2]: site.rank for site in plan.sites} == {
        "q_proj": 24, "k_proj": 16, "gate_proj": 24, "down_proj": 24,
    }  # fmt: skip
    notes = "\n".join(plan.notes)
    assert "rank 24 is above the smaller side of 2 sites, which take that side: model.layers.0.self_attn.k_proj (16)" in notes
    assert "more than half of the smaller side at 8 sites" in notes
    assert "the biases of 4 adapted layers" in notes
    assert not any("smaller side" in note for note in rw.plan(llama(), recipe(rank=8)).notes)


# --- precision, copies, sessions, files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ["auto", "stochastic", "nearest"])
def test_small_steps_on_bf16_weights(rounding: str) -> None:
    """Steps of a fiftieth of a bf16 step: lost when rounded to nearest. Moments and frames stay fp32."""
    model = rw.adapt(one_linear(torch.ones(64, 64, dtype=torch.bfloat16)), recipe(rank=64, scale=1.0, rounding=rounding, targets="proj"))
    optimizer = rw.optimizer(model, lr=2.0**-7 / 50)
    module: Any = site(model)
    for _ in range(10):
        y = model(torch.eye(64, dtype=torch.bfloat16))
        (-y.float().sum() - 63 * y.float().diagonal().sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert {value.dtype for value in (module.update.frame, optimizer.state[factor(module)]["exp_avg"])} == {torch.float32}
    moved = (module.weight.float() - 1).abs().sum()
    assert bool(moved == 0) is (rounding == "nearest")


def test_stochastic_rounding_is_refused_for_fp16() -> None:
    model = rw.adapt(one_linear(torch.ones(8, 8, dtype=torch.float16)), recipe(rounding="stochastic", targets="proj"))
    with pytest.raises(RecipeError, match="use rounding='nearest'"):
        rw.optimizer(model)


def test_copies_and_pickles_of_a_model_carry_no_tap() -> None:
    """Taken while every site is due: the copy computes, and the original's frames do not move with it."""
    model = rw.adapt(llama(), recipe())
    optimizer = rw.optimizer(model)
    frames = [module.update.frame.clone() for module in adapted_sites(model).values()]  # type: ignore[union-attr, operator]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        gradients(other, 0)
        assert all(factor(module).grad is not None for module in adapted_sites(other).values())
        for now, was in zip(adapted_sites(model).values(), frames, strict=True):
            assert torch.equal(now.update.frame, was)  # type: ignore[union-attr, arg-type]
        assert torch.equal(logits(other, token_ids()), logits(model, token_ids()))
    gradients(model, 0)
    optimizer.step()
    assert optimizer.rankwise_session.report()["schedule_renewed"] == 8  # type: ignore[attr-defined]


def test_a_second_optimizer_takes_the_place_of_the_first() -> None:
    one, other = rw.adapt(llama(), recipe()), rw.adapt(llama(), recipe())
    first = rw.optimizer(one, lr=1e-2)
    again, single = rw.optimizer(one, lr=1e-2), rw.optimizer(other, lr=1e-2)
    assert all(len(module._forward_hooks) == 1 for module in adapted_sites(one).values())
    steps(one, again, 0, 4)
    steps(other, single, 0, 4)
    assert first is not again
    for mine, theirs in zip(trained_weights(one), trained_weights(other), strict=True):
        assert torch.equal(mine, theirs)
    again.rankwise_session.close()  # type: ignore[attr-defined]
    assert not any(module._forward_hooks for module in adapted_sites(one).values())


def test_evaluation_between_steps_changes_nothing() -> None:
    results = []
    for looks in (False, True):
        model = rw.adapt(llama(), recipe(update_interval=1))
        optimizer = rw.optimizer(model, lr=1e-2)

        def look(step: int, model: Any = model, looks: bool = looks) -> None:
            if looks:
                logits(model, token_ids())
                with rw.disabled(model):
                    assert torch.equal(logits(model, token_ids()), logits(llama(), token_ids()))

        look(0)
        steps(model, optimizer, 0, 4, look)
        results.append(logits(model, token_ids()))
    assert torch.equal(*results)


def test_a_site_that_a_step_does_not_use_is_left_alone() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.both = OneLinear(8, 8), OneLinear(8, 8), False

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) + (self.two(x) if self.both else 0)

    model: Any = rw.adapt(Two(), recipe(targets="proj", update_interval=100))
    optimizer = rw.optimizer(model, lr=0.1, weight_decay=0.1)
    sites = adapted_sites(model)
    start = {name: module.weight.clone() for name, module in sites.items()}
    for step in range(3):
        model.both = step == 2
        model(gaussian(5, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert not torch.equal(sites["one.proj"].weight, start["one.proj"])
        assert torch.equal(sites["two.proj"].weight, start["two.proj"]) is (step < 2)
    frame = sites["two.proj"].update.frame  # type: ignore[union-attr]
    assert not torch.equal(frame, torch.eye(8, 4, dtype=DOUBLE))  # type: ignore[arg-type]  # its first gradient gave the frame, late


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"update_interval": 0}, "update_interval=0"),
        ({"scale": 0.0}, "scale=0.0"),
        ({"method": "qr"}, "method='qr'"),
        ({"projection": "full"}, "projection='full'"),
        ({"refresh_on": "epoch"}, "refresh_on='epoch'"),
        ({"rounding": "down"}, "rounding='down'"),
        ({"original": "lose"}, "original='lose'"),
        ({"scale": 0.5, "alpha": 2.0}, "say the same thing twice"),
        ({"alpha_pattern": {"q_proj": 1.0}}, "one scale for all sites"),
        ({"init": "pissa"}, "use init='own'"),
        ({"gain": "dora"}, "a gain"),
        ({"storage": "nf4"}, "a quantized storage"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(**options)


def test_alpha_is_the_papers() -> None:
    assert rw.recipes.galore(alpha=2.0).schedule == rw.recipes.galore(scale=2.0).schedule
    assert rw.recipes.galore().schedule.scale == 0.25  # type: ignore[attr-defined]
    assert rw.Recipe.from_dict(rw.recipes.galore(rotate=True).to_dict()) == rw.recipes.galore(rotate=True)


def test_saved_weights_load_and_merge(tmp_path: Path) -> None:
    model = rw.adapt(llama(), recipe())
    steps(model, rw.optimizer(model, lr=1e-2), 0, 5)
    model.eval()
    after = logits(model, token_ids())
    rw.save(model, tmp_path)
    again = rw.load(llama(), tmp_path)
    assert torch.equal(logits(again, token_ids()), after)
    with rw.disabled(again):
        assert torch.equal(logits(again, token_ids()), logits(llama(), token_ids()))
    plain = rw.merge(again, keep_base=False)
    assert not adapted_sites(plain)
    assert torch.equal(logits(plain, token_ids()), after)  # D is zero, so merging adds nothing


# --- from the command line -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def test_a_run_from_yaml_resumes_bit_for_bit_in_the_middle_of_a_window(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rankwise.training.run import train

    def config(name: str) -> dict[str, Any]:
        method = {"name": "galore", "update_interval": 3, "scale": 0.5}
        plain = plain_config(world, "completion", tmp_path / name, method=method)
        plain["train"] |= {"steps": 7, "save_every": 1, "accumulate": 2, "weight_decay": 0.01}
        return plain

    whole = train(config("whole"), console=silent_console())
    resumed = interrupted(config("cut"), monkeypatch, 3, 5)
    for name in ("metrics.jsonl", "results.json", "adapter/adapter_model.safetensors", "adapter/rankwise.json"):
        assert (whole.run / name).read_bytes() == (resumed.run / name).read_bytes(), name
    metrics = [json.loads(line) for line in (whole.run / "metrics.jsonl").read_text().splitlines()]
    renewed = [line["schedule_renewed"] for line in metrics if "loss" in line]
    assert renewed[0] == 14
    assert sum(renewed[1:4]) == sum(renewed[4:7]) == 14
    assert whole.after["task"]["loss"] < whole.before["task"]["loss"]


def test_pretraining_from_scratch_trains_everything_resumes_and_becomes_a_model(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a folder that holds no weights at all, with tied embeddings, which stay tied."""
    from rankwise.training.models import load_model
    from rankwise.training.run import train
    from rankwise.training.use import evaluate, merge, open_adapter

    folder = tmp_path / "configuration"
    shutil.copytree(world / "llama", folder)
    (folder / "model.safetensors").unlink()
    shape = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(shape))

    def config(name: str) -> dict[str, Any]:
        plain = plain_config(world, "text", tmp_path / name, method={"name": "galore", "update_interval": 3}, model=str(folder))
        plain["data"] = {"train": str(world / "general.jsonl"), "eval": str(world / "general.jsonl")}
        plain["train"] |= {"from_scratch": True, "steps": 7, "save_every": 1, "accumulate": 1, "loss_on": "all", "lr": 2e-2}
        return plain

    whole = train(config("whole"), console=silent_console())
    resumed = interrupted(config("cut"), monkeypatch, 3, 5)
    for name in ("metrics.jsonl", "results.json", "adapter/adapter_model.safetensors", "adapter/rankwise.json"):
        assert (whole.run / name).read_bytes() == (resumed.run / name).read_bytes(), name
    assert whole.after["task"]["loss"] < 0.9 * whole.before["task"]["loss"]

    opened = open_adapter(whole.adapter)
    start = load_model(str(folder), "text", seed=0, from_scratch=True).model
    assert opened.model.lm_head.weight is opened.model.model.embed_tokens.weight
    for name, parameter in start.named_parameters():
        site = adapted_sites(opened.model).get(name.removesuffix(".weight"))
        now = dict(opened.model.named_parameters()).get(name.replace(".weight", ".base_layer.weight")) if site is None else site.weight
        assert now is not None
        assert not torch.equal(now, parameter), name  # everything moved
    base, scores = evaluate(opened)
    assert base == {}
    assert scores["task"]["loss"] == pytest.approx(whole.after["task"]["loss"], rel=1e-6)
    # one copy of each weight
    held = sum(p.numel() for p in opened.model.parameters()) - sum(factor(m).numel() for m in adapted_sites(opened.model).values())
    assert held == sum(p.numel() for p in start.parameters())

    moved = shutil.copytree(whole.adapter, tmp_path / "elsewhere")  # without its run it still knows that it came from scratch
    done = merge(moved, tmp_path / "model")
    assert done["difference"] < 1e-5
    ids = token_ids()
    plain = load_model(str(tmp_path / "model"), "text").model
    torch.testing.assert_close(logits(plain, ids), logits(opened.model, ids), rtol=1e-5, atol=1e-5)


def test_from_scratch_needs_a_method_that_trains_the_weights(world: Path, tmp_path: Path) -> None:
    from rankwise.errors import ConfigError
    from rankwise.training.config import make_config, resolve

    plain = plain_config(world, "text", tmp_path, method="lora", train={"from_scratch": True})
    with pytest.raises(ConfigError, match="use method: galore"):
        make_config(plain)
    plain["method"] = "galore"
    assert resolve(make_config(plain)).schedule.original == "drop"
    plain["method"] = {"name": "galore", "original": "keep"}
    assert resolve(make_config(plain)).schedule.original == "keep"


def test_modules_in_full_have_no_second_copy_where_originals_are_dropped() -> None:
    ids = token_ids()
    for original in ("drop", "keep"):
        made = recipe(original=original, modules_to_save=["lm_head", "model.norm"])
        model: Any = rw.adapt(llama(dtype=torch.bfloat16), made)
        start = logits(llama(dtype=torch.bfloat16), ids)
        torch.testing.assert_close(logits(model, ids), start, rtol=2e-2, atol=2e-2)
        shared = model.lm_head.trained is model.lm_head.base_layer
        assert shared is (original == "drop")
        numbers = sum(site.rank * (site.in_features + site.out_features) for site in model.rankwise.plan.sites)
        full = 67 * 32 + 32  # fp32 masters: beside the bf16 ones, or in their place
        assert model.rankwise.plan.memory["adapters"] == 4 * numbers + (2 if shared else 4) * full
        assert model.lm_head.trained.weight.dtype == torch.float32
        assert logits(model, ids).dtype == torch.bfloat16
        steps(model, rw.optimizer(model, lr=1e-2), 0, 2)
        after = logits(model.eval(), ids)
        assert (after - start).abs().max() > 0.05
        if original == "keep":
            assert torch.equal(logits(rw.unadapt(model), ids), start)
        else:
            with pytest.raises(TargetError, match="original='drop'"), rw.disabled(model):
                pass
            plain: Any = rw.merge(model, keep_base=False)
            assert plain.lm_head.weight.dtype == torch.bfloat16
            torch.testing.assert_close(logits(plain, ids), after, rtol=5e-2, atol=5e-2)
