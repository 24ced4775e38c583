"""The Checks of LoRA+'s specification."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from toys import Mlp, one, only_site, stir

import rankwise as rw
from rankwise.errors import RecipeError
from rankwise.optim import roles_of
from rankwise.recipes import RECIPES, dora, lora, lora_plus
from rankwise.sites import adapted_sites

torch.set_num_threads(1)
RATIO, LR = 16.0, 1e-3


class Classifier(nn.Module):
    """A body to adapt and a head that trains in full."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Mlp()
        self.classifier = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.body(x))


def batch(width: int = 24, seed: int = 1) -> Tensor:
    return torch.randn(12, width, generator=torch.Generator().manual_seed(seed))


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> dict[str, Tensor]:
    """One step; name -> how far each parameter moved."""
    before = trained(model)
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()
    return {name: value - before[name] for name, value in trained(model).items()}


@pytest.mark.check("lora-plus", 1)
def test_ratio_1_is_plain_adamw_bit_for_bit() -> None:
    models = []
    for recipe in (lora_plus(ratio=1, rank=4), lora(rank=4)):
        torch.manual_seed(0)
        models.append(rw.adapt(Mlp(), recipe))
    optimizers = [
        rw.optimizer(models[0], lr=LR, weight_decay=0.01),
        torch.optim.AdamW([p for p in models[1].parameters() if p.requires_grad], lr=LR, weight_decay=0.01, fused=True),
    ]
    for number in range(20):
        for model, optimizer in zip(models, optimizers, strict=True):
            step(model, optimizer, batch(seed=number))
    left, right = (trained(model) for model in models)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.check("lora-plus", 2)
@pytest.mark.parametrize("name", list(RECIPES))
@pytest.mark.parametrize("foreign", [False, True])
def test_every_trained_tensor_is_in_exactly_one_group(name: str, foreign: bool) -> None:
    fields = {} if name == "propulsion" else {"rank": 4}
    recipe = RECIPES[name](**fields, modules_to_save=["classifier"])
    if name not in ("propulsion", "lora-plus", "lora-fa", "lora-ga", "galore", "rosa"):
        recipe = recipe.replace(gradient="lora-plus")
    recipe = recipe.replace(targets="all-linear", routing="none")  # this toy has no transformer blocks
    if recipe.init.calibration is not None:  # this toy has no loss to calibrate on
        recipe = recipe.replace(init="kaiming")
    if recipe.schedule.sample is not None:  # nor to probe with
        recipe = recipe.replace(schedule="none")
    model = rw.adapt(Classifier(), recipe)
    if foreign:  # a foreign optimizer is regrouped in place
        optimizer = rw.attach(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR), total_steps=10)
    else:
        optimizer = rw.optimizer(model, lr=LR, total_steps=10)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert all(group["params"] for group in optimizer.param_groups)
    assert len({group["role"] for group in optimizer.param_groups}) == len(optimizer.param_groups)


@pytest.mark.check("lora-plus", 3)
def test_the_first_steps_move_up_by_the_ratio_times_the_rate() -> None:
    model = rw.adapt(one(24, 16), lora_plus(ratio=RATIO, rank=4))
    optimizer = rw.optimizer(model, lr=LR, eps=1e-16)
    moved = step(model, optimizer, batch())
    assert not moved["0.update.down"].any()
    assert moved["0.update.up"].abs().max().item() == pytest.approx(RATIO * LR, rel=1e-5)
    moved = step(model, optimizer, batch())
    assert 0 < moved["0.update.down"].abs().max() <= LR * 1.001
    assert RATIO * LR / 2 < moved["0.update.up"].abs().max() < RATIO * LR * 2


@pytest.mark.check("lora-plus", 4)
@pytest.mark.parametrize("kind", ["cosine", "onecycle", "warmup"])
def test_no_scheduler_destroys_the_ratio(kind: str) -> None:
    model = rw.adapt(one(24, 16), lora_plus(ratio=RATIO, rank=4))
    optimizer = rw.optimizer(model, lr=LR)
    scheduler = {
        "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 80, eta_min=LR / 3),
        "onecycle": lambda: torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3 * LR, total_steps=101),
        "warmup": lambda: torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=50),
    }[kind]()
    used: list[dict[str, float]] = []
    optimizer.register_step_pre_hook(lambda made, *_: used.append({group["role"]: group["lr"] for group in made.param_groups}))
    base = []
    for number in range(100):
        base.append(optimizer.param_groups[0]["lr"])
        step(model, optimizer, batch(seed=number))
        scheduler.step()
    assert len(set(base)) > 20  # the scheduler does act
    for rates, lr in zip(used, base, strict=True):
        assert rates["down"] == lr
        assert rates["up"] == RATIO * lr
    assert all(group["lr"] == optimizer.param_groups[0]["lr"] for group in optimizer.param_groups)


@pytest.mark.check("lora-plus", 5)
def test_magnitudes_and_heads_keep_the_base_rate() -> None:
    model = rw.adapt(Classifier(), dora(rank=4, gradient={"name": "lora-plus", "ratio": RATIO}, modules_to_save=["classifier"]))
    moved = step(model, rw.optimizer(model, lr=LR, eps=1e-16), batch())
    for name, distance in moved.items():
        wanted = RATIO * LR if name.endswith(".up") else 0.0 if name.endswith(".down") else LR
        assert distance.abs().max().item() == pytest.approx(wanted, rel=1e-4), name
    roles = {name: role for name, (role, _) in roles_of(model).items()}
    assert roles["classifier.trained.weight"] == roles["classifier.trained.bias"] == "other"
    assert roles["body.first.gain.magnitude"] == "gain"


@pytest.mark.check("lora-plus", 6)
@pytest.mark.parametrize("scaled", [True, False])
def test_weight_decay_shrinks_both_factors_alike_unless_told_otherwise(scaled: bool) -> None:
    model = stir(rw.adapt(one(24, 16), lora_plus(ratio=RATIO, scale_weight_decay=scaled, rank=4)))
    optimizer = rw.optimizer(model, lr=LR, weight_decay=0.5)
    before = trained(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    factors = {name.rpartition(".")[2]: (value.norm() / before[name].norm()).item() for name, value in trained(model).items()}
    assert factors["down"] == pytest.approx(1 - LR * 0.5, abs=1e-6)
    assert factors["up"] == pytest.approx(1 - (1 if scaled else RATIO) * LR * 0.5, abs=1e-6)
    assert all(group["weight_decay"] == 0.5 for group in optimizer.param_groups)  # a checkpoint sees the base value


@pytest.mark.check("lora-plus", 7)
def test_a_resumed_run_takes_the_ratio_from_the_recipe_and_the_moments_from_the_file() -> None:
    model = rw.adapt(one(24, 16), lora_plus(ratio=RATIO, rank=4))
    optimizer = rw.optimizer(model, lr=LR)
    for number in range(3):
        step(model, optimizer, batch(seed=number))
    state, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    moved = {}
    for ratio in (RATIO, 4.0):
        resumed = rw.adapt(one(24, 16), lora_plus(ratio=ratio, rank=4))
        resumed.load_state_dict(weights)
        again = rw.optimizer(resumed, lr=LR)
        again.load_state_dict(copy.deepcopy(state))  # loading shares tensors
        for group in again.param_groups:
            for parameter in group["params"]:
                assert again.state[parameter]["step"] == 3
                assert again.state[parameter]["exp_avg"].any()
        moved[ratio] = step(resumed, again, batch(seed=3))
    torch.testing.assert_close(moved[RATIO]["0.update.up"], moved[4.0]["0.update.up"] * 4, rtol=1e-3, atol=1e-7)
    assert torch.equal(moved[RATIO]["0.update.down"], moved[4.0]["0.update.down"])
    continued = step(model, optimizer, batch(seed=3))
    assert all(torch.equal(continued[name], moved[RATIO][name]) for name in continued)


@pytest.mark.check("lora-plus", 8)
def test_the_groups_equal_pefts_partition() -> None:
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_loraplus_optimizer

    theirs = get_peft_model(Mlp(), LoraConfig(r=4, target_modules=["first", "second"]))
    made = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=LR, loraplus_lr_ratio=RATIO)
    names = {id(p): name for name, p in theirs.named_parameters()}
    wanted = {}
    for group in made.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)].removeprefix("base_model.model.").replace(".default.weight", "")
            wanted[name.replace("lora_A", "update.down").replace("lora_B", "update.up")] = group["lr"]
    ours = rw.adapt(Mlp(), lora_plus(ratio=RATIO, rank=4))
    optimizer = rw.optimizer(ours, lr=LR)
    names, got = {id(p): name for name, p in ours.named_parameters()}, {}
    optimizer.register_step_pre_hook(
        lambda made, *_: got.update({names[id(p)]: group["lr"] for group in made.param_groups for p in group["params"]})
    )
    step(ours, optimizer, batch())
    assert got == wanted
    assert len(got) == 4


@pytest.mark.check("lora-plus", 9)
def test_the_reverse_start_moves_down_first() -> None:
    base = one(24, 16)
    wanted = base(batch())
    model = rw.adapt(base, lora_plus(ratio=RATIO, start="up", rank=4))
    assert torch.equal(model(batch()), wanted)
    assert only_site(model).update.up.any()
    moved = step(model, rw.optimizer(model, lr=LR, eps=1e-16), batch())
    assert not moved["0.update.up"].any()
    assert moved["0.update.down"].abs().max().item() == pytest.approx(LR, rel=1e-5)


# --- 10: width ------------------------------------------------------------------------------------------------------------------------


def student_loss(width: int, ratio: float, rate: float, steps: int, seed: int = 0) -> float:
    """Mean loss over the last 20 steps of a linear student of rank 4 on a teacher of rank 2, whose inputs have 5 degrees of freedom
    spread over `width` features of size one (so that a step of `down` moves `down x` by width * rate, as in the paper's section 4)."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(5, width, generator=generator) / math.sqrt(5)
    teacher = torch.randn(5, 2, generator=generator) @ torch.randn(2, 8, generator=generator) / math.sqrt(10)
    model = nn.Sequential(nn.Linear(width, 8, bias=False))
    nn.init.zeros_(model[0].weight)
    rw.adapt(model, lora_plus(ratio=ratio, rank=4, alpha=4, seed=seed))
    optimizer, tail = rw.optimizer(model, lr=rate), []
    for _ in range(steps):
        z = torch.randn(64, 5, generator=generator)
        optimizer.zero_grad()
        loss = (model(z @ spread) - z @ teacher).square().mean()
        loss.backward()
        optimizer.step()
        tail.append(loss.item())
    return min(sum(tail[-20:]) / 20, 10.0)


def losses(width: int, rates: list[float], steps: int, seeds: range) -> dict[float, float]:
    """Ratio -> geometric mean over seeds of the loss, at the best of the rates."""

    def mean(ratio: float, rate: float) -> float:
        return math.exp(sum(math.log(student_loss(width, ratio, rate, steps, seed)) for seed in seeds) / len(seeds))

    return {ratio: min(mean(ratio, rate) for rate in rates) for ratio in (4.0**power for power in range(7))}


@pytest.mark.check("lora-plus", 10)
@pytest.mark.parametrize(
    ("widths", "seeds"),
    [((16, 64, 256), range(1)), pytest.param((256, 1024, 4096), range(3), marks=pytest.mark.slow)],
    ids=["small", "full"],
)
def test_the_best_ratio_grows_with_the_width(widths: tuple[int, ...], seeds: range) -> None:
    """The rate of `down` goes as 1/width, which is what keeps its features of size one; the ratio is searched on a grid of powers of 4."""
    found = [losses(width, [0.1 / width], 200, seeds) for width in widths]
    best = [min(loss, key=lambda ratio, loss=loss: loss[ratio]) for loss in found]
    assert best[0] < best[-1]
    assert best == sorted(best)
    behind = [loss[1.0] / min(loss.values()) for loss in found]
    assert behind == sorted(behind)
    assert [loss[1.0] for loss in found] == sorted(loss[1.0] for loss in found)
    assert found[-1][1.0] > 100 * found[0][1.0] if widths[0] == 16 else found[-1][1.0] > 4 * found[0][1.0]


@pytest.mark.slow
@pytest.mark.check("lora-plus", 10)
def test_with_a_free_rate_a_linear_student_at_ratio_1_is_not_left_behind() -> None:
    """The Check's second half needs the rate held: with the best rate for each ratio a linear student makes up for a slow `up` by a larger
    `down` (their product is all that counts), and at no width is ratio 1 worse than the best ratio by as much as a factor of 2."""
    rates = [10 ** (-power / 2) for power in range(3, 11)]
    for width in (64, 256, 1024):
        found = losses(width, rates, 20, range(3))
        assert 1 <= found[1.0] / min(found.values()) < 2


def test_a_ratio_below_1_is_refused_and_a_frozen_down_is_warned_of() -> None:
    with pytest.raises(RecipeError, match=r"ratio=0\.5"):
        lora_plus(ratio=0.5)
    with pytest.warns(UserWarning, match="only multiplies the learning rate"):
        lora_plus(frozen={"down"})
    assert len(adapted_sites(rw.adapt(Mlp(), lora_plus(rank=4)))) == 2
