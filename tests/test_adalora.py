"""AdaLoRA: triplets, importance, budget, real ranks; against the equations and against PEFT's allocator."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoint_models import relative
from method_checks import cut_and_resumed
from tiny_models import llama, logits, perturb, token_ids
from torch import Tensor, nn
from training_models import make_world, plain_config

import rankwise as rw
from rankwise.checkpoint import export_lora, load_trainable_state, trainable_state
from rankwise.errors import CheckpointError, RecipeError, TrainingError
from rankwise.resizing import resize
from rankwise.schedules import AdaLoraBudget
from rankwise.schedules.adalora import Phases
from rankwise.schedules.allocator import distances
from rankwise.sites import adapted_sites

TARGETS = ["q_proj", "k_proj", "down_proj"]
FIELDS: dict[str, Any] = {"targets": TARGETS, "start": "orthonormal"}


class Toy(nn.Module):
    """Two layers; called with y it gives an object with a loss, as PEFT's regulariser wants it."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(12, 16, dtype=dtype)
        self.second = nn.Linear(16, 8, dtype=dtype)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        out = self.second(torch.tanh(self.first(x)))
        return out if y is None else SimpleNamespace(loss=(out - y).square().mean(), out=out)


def batch(step: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(16, 12, generator=generator).to(dtype), torch.randn(16, 8, generator=generator).to(dtype)


def toy(total: int | None = 30, dtype: torch.dtype = torch.float32, lr: float = 2e-2, **fields: Any) -> tuple[Any, Any]:
    model = rw.adapt(Toy(dtype), rw.recipes.adalora(**{"target_rank": 2, "init_rank": 4, "start": "orthonormal"} | fields))
    return model, rw.optimizer(model, lr=lr, total_steps=total)


def steps(model: Any, optimizer: Any, first: int, last: int) -> None:
    """Steps first + 1 to last, each on its own batch."""
    for step in range(first + 1, last + 1):
        optimizer.zero_grad()
        model(*batch(step)).loss.backward()
        optimizer.step()


def running(optimizer: Any) -> Any:
    return optimizer.rankwise_session.running["schedule"]


def lams(model: Any) -> dict[str, Tensor]:
    return {name: module.update.lam.detach()[:, 0].clone() for name, module in adapted_sites(model).items()}  # type: ignore[union-attr]


def alive(model: Any) -> int:
    return sum(int(lam.count_nonzero()) for lam in lams(model).values())


# --- the update ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.check("adalora", 1)
@pytest.mark.parametrize("start", ["gaussian", "orthonormal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_start_is_the_base_and_the_update_is_dense(start: str, dtype: torch.dtype) -> None:
    model = Toy(dtype)
    x = batch(0, dtype)[0]
    before = model(x)
    rw.adapt(model, rw.recipes.adalora(target_rank=2, init_rank=4, start=start, alpha=10))
    assert torch.equal(model(x), before)
    perturb(model)
    dense = copy.deepcopy(Toy(dtype))
    for name, module in adapted_sites(model).items():
        update: Any = module.update
        delta = 2.5 * update.up @ torch.diag(update.lam[:, 0]) @ update.down
        getattr(dense, name).weight.data += delta.detach()
        assert delta.abs().max() > (1e-6 if start == "gaussian" else 1e-3)
    tolerance = 1e-6 if dtype is torch.float32 else 1e-14
    torch.testing.assert_close(model(x), dense(x), rtol=tolerance, atol=tolerance)
    assert (model(x) - before).abs().max() > 10 * tolerance


def test_starts_are_those_of_code_and_paper() -> None:
    model = rw.adapt(nn.Sequential(nn.Linear(400, 300)), rw.recipes.adalora(init_rank=20, target_rank=10))
    update: Any = adapted_sites(model)["0"].update
    assert not update.lam.any()
    for matrix in (update.up, update.down):
        assert float(matrix.detach().std()) == pytest.approx(0.02, rel=0.05)
    model = rw.adapt(nn.Sequential(nn.Linear(40, 30)), rw.recipes.adalora(init_rank=8, target_rank=4, start="orthonormal"))
    update = adapted_sites(model)["0"].update
    torch.testing.assert_close(update.up.T @ update.up, torch.eye(8), rtol=0, atol=1e-6)
    torch.testing.assert_close(update.down @ update.down.T, torch.eye(8), rtol=0, atol=1e-6)


def test_a_pissa_start_becomes_triplets_of_the_weight() -> None:
    model = Toy()
    weight, x = model.first.weight.detach().clone(), batch(0)[0]
    before = model(x)
    rw.adapt(model, rw.recipes.pissa(rank=4, alpha=4).replace(update="adalora"))
    update: Any = adapted_sites(model)["first"].update
    torch.testing.assert_close(update.lam[:, 0], torch.linalg.svdvals(weight)[:4], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(update.up.T @ update.up, torch.eye(4), rtol=0, atol=1e-5)
    assert torch.equal(model(x), before)


# --- the budget ------------------------------------------------------------------------------------------------------------------------


def official(step: int, total: int, tinit: int, tfinal: int, first: int, last: int) -> int:
    """The formula of the official code, written down once more, in integers and one cube."""
    if step <= tinit:
        return first
    if step > total - tfinal:
        return last
    return int(last + (first - last) * (1 - (step - tinit) / (total - tfinal - tinit)) ** 3)


@pytest.mark.check("adalora", 2)
@pytest.mark.parametrize(
    ("total", "tinit", "tfinal", "first", "last"),
    [(6700, 800, 3500, 864, 576), (85900, 8000, 50000, 144, 72), (30, 0, 0, 24, 16), (100, 10, 20, 7, 7), (5, 1, 2, 13, 3)],
)
def test_the_budget_falls_from_end_to_end(total: int, tinit: int, tfinal: int, first: int, last: int) -> None:
    phases = Phases(total, tinit, tfinal, 1)
    budgets = [phases.budget(step, first, last) for step in range(total + 5)]
    assert budgets == [official(step, total, tinit, tfinal, first, last) for step in range(total + 5)]
    assert budgets[tinit] == first
    assert budgets[total - tfinal] == last
    assert all(type(budget) is int and last <= budget <= first for budget in budgets)
    assert budgets == sorted(budgets, reverse=True)


@pytest.mark.check("adalora", 2)
def test_the_printed_equation_is_a_misprint() -> None:
    """Equation 12 as printed is not b0 at tinit nor bT at the end; the code's form is."""
    total, tinit, tfinal, first, last = 6700, 800, 3500, 864, 576

    def printed(step: int) -> int:
        return round(last + (first - last) * (1 - (step - tinit - tfinal) / (total - tinit - tfinal)) ** 3)

    assert (printed(tinit), printed(total - tfinal)) == (4855, 1469)


def test_phases_come_from_the_run() -> None:
    choice = AdaLoraBudget(4)
    assert choice.phases(7000) == Phases(7000, 700, 3500, 10)
    assert choice.phases(5) == Phases(5, 1, 2, 1)
    for total in range(1, 40):  # never without a step for pruning
        phases = choice.phases(total)
        assert 0 <= phases.tinit < total - phases.tfinal
    assert AdaLoraBudget(4, tinit=3, tfinal=2, interval=4).phases(10) == Phases(10, 3, 2, 4)
    with pytest.raises(TrainingError, match="tinit=3 and tfinal=7 of the adalora schedule leave no step for pruning in a run of 10 steps"):
        AdaLoraBudget(4, tinit=3, tfinal=7).phases(10)
    with pytest.raises(TrainingError, match="total_steps=20 of the adalora schedule, but the run takes 10"):
        AdaLoraBudget(4, total_steps=20).phases(10)


def test_unknown_length_and_impossible_ranks_are_refused() -> None:
    with pytest.raises(TrainingError, match=r"pass total_steps=... to rankwise.optimizer"):
        toy(total=None)
    model, optimizer = toy(total=None, total_steps=12)
    assert running(optimizer).phases.total == 12
    model = rw.adapt(Toy(), rw.recipes.adalora(init_rank=4, tinit=9))
    plain = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(TrainingError, match="leave no step"):
        rw.attach(model, plain, total_steps=9)
    rw.attach(model, plain, total_steps=90)
    with pytest.raises(RecipeError, match="target_rank=5 of the adalora schedule is above the mean rank at the start, 4"):
        rw.plan(Toy(), rw.recipes.adalora(target_rank=5, init_rank=4))
    for options, message in (({"gamma": -1.0}, "gamma=-1"), ({"beta1": 1.0}, "beta1=1"), ({"interval": 0}, "interval=0")):
        with pytest.raises(RecipeError, match=message):
            rw.recipes.adalora(**options)
    with pytest.raises(RecipeError, match="init_rank=6 and rank=5 say the same thing twice"):
        rw.recipes.adalora(init_rank=6, rank=5)


@pytest.mark.check("adalora", 3)
@pytest.mark.parametrize("compact", [True, False])
def test_exactly_the_budget_is_not_zero_after_each_mask(compact: bool) -> None:
    model, optimizer = toy(tinit=4, tfinal=8, interval=3, compact=compact)
    for step in range(1, 31):
        steps(model, optimizer, step - 1, step)
        expected = official(step, 30, 4, 8, 8, 4)
        if step >= 22 or (step > 4 and step % 3 == 0):
            assert alive(model) == expected, step
        else:
            assert alive(model) == 8, step  # vectors stay, so lam grows again between masks
        assert optimizer.rankwise_session.report()["schedule_budget"] == expected
    assert alive(model) == 4


@pytest.mark.check("adalora", 3)
def test_ties_do_not_prune_too_many() -> None:
    model, optimizer = toy(tinit=0, tfinal=0, total=4)
    for module in adapted_sites(model).values():
        module.update.lam.data.fill_(1.0)  # type: ignore[union-attr]
    allocator = running(optimizer)
    allocator.budget = 5  # every score is zero, so all eight are tied
    with torch.no_grad():
        allocator._prune()
    assert [lam.tolist() for lam in lams(model).values()] == [[1, 1, 1, 1], [1, 0, 0, 0]]


@pytest.mark.check("adalora", 3)
def test_init_equal_to_target_prunes_nothing() -> None:
    model, optimizer = toy(total=6, target_rank=4, tinit=0, tfinal=2)
    plain = rw.adapt(Toy(), rw.recipes.adalora(target_rank=4, init_rank=4, start="orthonormal", gamma=0).replace(schedule="none"))
    other = rw.optimizer(plain, lr=2e-2)
    running(optimizer).choice = AdaLoraBudget(4, gamma=0)
    steps(model, optimizer, 0, 6)
    steps(plain, other, 0, 6)
    assert alive(model) == 8
    assert all(torch.equal(one, two) for one, two in zip(lams(model).values(), lams(plain).values(), strict=True))


def test_a_skipped_last_step_does_not_skip_the_end() -> None:
    model, optimizer = toy(tinit=2, tfinal=10, total=30)
    steps(model, optimizer, 0, 18)
    optimizer.rankwise_session.steps = 24  # as if a foreign loop had counted past T - tfinal
    steps(model, optimizer, 18, 19)
    assert alive(model) == sum(module.site.rank for module in adapted_sites(model).values()) == 4


# --- importance ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.check("adalora", 4)
@pytest.mark.parametrize("order", ["after", "before"])
def test_two_steps_of_the_averages_by_hand(order: str) -> None:
    model = rw.adapt(nn.Sequential(nn.Linear(2, 3, bias=False)), rw.recipes.adalora(init_rank=2, target_rank=1, sensitivity=order, gamma=0))
    # plain gradient descent, so that the new weights are known: w - 0.5 g
    optimizer = rw.optimizer(model, lr=0.5, kind=torch.optim.SGD, total_steps=10)
    update: Any = adapted_sites(model)["0"].update
    generator = torch.Generator().manual_seed(1)
    averages = {name: torch.zeros_like(p) for name, p in update.named_parameters()}
    uncertainties = {name: torch.zeros_like(p) for name, p in update.named_parameters()}
    b1 = b2 = 0.85
    for _ in range(2):
        for name, p in update.named_parameters():
            p.grad = torch.randn(p.shape, generator=generator)
            new = p.detach() - 0.5 * p.grad if order == "after" else p.detach()
            sensitivity = (new * p.grad).abs()  # equation 8
            averages[name] = b1 * averages[name] + (1 - b1) * sensitivity  # equation 9
            uncertainties[name] = b2 * uncertainties[name] + (1 - b2) * (sensitivity - averages[name]).abs()  # equation 10, the new average
        running(optimizer).phases = Phases(10, 9, 0, 1)  # no pruning yet
        optimizer.step()
    s = {name: averages[name] * uncertainties[name] for name in averages}  # equation 11
    by_hand = torch.stack([s["lam"][i, 0] + s["up"][:, i].sum() / 3 + s["down"][i].sum() / 2 for i in range(2)])  # equation 7
    torch.testing.assert_close(running(optimizer).scores()["0"], by_hand, rtol=1e-5, atol=0)
    assert (by_hand > 0).all()


def test_gradients_that_are_not_finite_leave_the_averages_alone() -> None:
    model, optimizer = toy(tinit=20, total=30, tfinal=2)
    steps(model, optimizer, 0, 3)
    before = {name: average.clone() for name, average in running(optimizer).averages.items()}
    next(p for p in model.parameters() if p.requires_grad).grad[0, 0] = float("nan")
    running(optimizer)._sense()
    assert all(torch.equal(average, before[name]) for name, average in running(optimizer).averages.items())


@pytest.mark.check("adalora", 6)
def test_a_pruned_triplet_can_come_back() -> None:
    model, optimizer = toy(tinit=1, tfinal=4, interval=5, gamma=0)
    update: Any = adapted_sites(model)["first"].update
    steps(model, optimizer, 0, 4)
    pruned = 2
    for store in (running(optimizer).averages, running(optimizer).uncertainties):
        for slot, index in (("lam", pruned), ("down", pruned), ("up", (slice(None), pruned))):
            store[f"first.{slot}"][index] = 0.0  # nothing has spoken for this triplet so far
    steps(model, optimizer, 4, 5)
    assert update.lam[pruned] == 0
    for step in range(6, 11):
        optimizer.zero_grad()
        model(*batch(step)).loss.backward()
        update.lam.grad[pruned] += 50.0  # from now on the loss wants it
        optimizer.step()
        if step == 6:
            assert update.lam[pruned] != 0  # the next step has no mask
    assert update.lam[pruned] != 0  # and at the mask of step 10 it is among the best
    assert alive(model) == official(10, 30, 1, 4, 8, 4) < 8


# --- against PEFT ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.check("adalora", 5)
@pytest.mark.parametrize("gamma", [0.0, 0.3])
def test_thirty_steps_equal_peft(gamma: float) -> None:
    """The same start, batches and optimizer: the same masks at every step and the same lam, penalty included."""
    peft: Any = pytest.importorskip("peft")
    config = peft.AdaLoraConfig(
        init_r=4,
        target_r=2,
        tinit=5,
        tfinal=8,
        deltaT=3,
        total_step=30,
        orth_reg_weight=gamma,
        lora_alpha=8,
        target_modules=["first", "second"],
    )
    theirs = peft.get_peft_model(Toy(), config)
    # PEFT divides by rank + 1e-5
    recipe = rw.recipes.adalora(
        init_rank=4, target_rank=2, tinit=5, tfinal=8, interval=3, gamma=gamma, alpha=8 * 4 / (4 + 1e-5), compact=False
    )
    mine = rw.adapt(Toy(), recipe)
    parameters = dict(theirs.named_parameters())
    for name, module in adapted_sites(mine).items():
        for slot, key in (("down", "lora_A"), ("lam", "lora_E"), ("up", "lora_B")):
            module.update.put(**{slot: parameters[f"base_model.model.{name}.{key}.default"].detach()})  # type: ignore[union-attr]
    optimizer: Any = rw.optimizer(mine, lr=2e-2, total_steps=30, fused=False)
    other = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=2e-2, weight_decay=0.0)
    masked = 0
    for step in range(1, 31):
        for model, steppable in ((mine, optimizer), (theirs.base_model, other)):
            steppable.zero_grad()
            model(*batch(step)).loss.backward()  # PEFT adds its penalty to a loss that its own forward returns
            steppable.step()
        theirs.base_model.update_and_allocate(step)
        for name, lam in lams(mine).items():
            expected = parameters[f"base_model.model.{name}.lora_E.default"].detach()[:, 0]
            assert torch.equal(lam == 0, expected == 0), step
            torch.testing.assert_close(lam, expected, rtol=1e-5, atol=1e-5)
            masked += int((lam == 0).sum())
    assert alive(mine) == 4
    assert masked > 30


@pytest.mark.check("adalora", 5)
def test_peft_crashes_where_there_is_nothing_to_prune() -> None:
    """Why the comparison has a budget below the start: with init_r = target_r PEFT asks for the 0th smallest score."""
    peft: Any = pytest.importorskip("peft")
    theirs = peft.get_peft_model(Toy(), peft.AdaLoraConfig(init_r=4, target_r=4, tinit=0, tfinal=0, total_step=5, target_modules=["first"]))
    theirs.base_model(*batch(1)).loss.backward()
    with pytest.raises((RuntimeError, IndexError)):
        theirs.base_model.update_and_allocate(1)
    model, optimizer = toy(total=5, target_rank=4, tinit=0, tfinal=0)
    steps(model, optimizer, 0, 5)
    assert alive(model) == 8


# --- the penalty -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.check("adalora", 7)
@pytest.mark.parametrize("form", ["fro_mean", "fro2_sum"])
def test_the_penalty_and_its_gradient_equal_the_formulas(form: str) -> None:
    model, optimizer = toy(dtype=torch.float64, start="gaussian", gamma=0.3, orthogonality=form)
    perturb(model, size=2.0)
    updates: list[Any] = [module.update for module in adapted_sites(model).values()]
    grams = [gram for update in updates for gram in (update.up.T @ update.up, update.down @ update.down.T)]
    norms = torch.stack([torch.linalg.matrix_norm(gram - torch.eye(4, dtype=torch.float64)) for gram in grams])
    penalty = 0.3 * (norms.mean() if form == "fro_mean" else norms.square().sum())
    trained = [p for update in updates for p in (update.up, update.down)]
    expected = torch.autograd.grad(penalty, trained)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.zeros_like(p)
    optimizer.rankwise_session.fire("backward", optimizer)
    for p, gradient in zip(trained, expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-12, atol=1e-14)
        assert gradient.abs().max() > 1e-3
    assert all(not update.lam.grad.any() for update in updates)
    assert optimizer.rankwise_session.report()["schedule_penalty"] == pytest.approx(penalty.item(), rel=1e-12)


@pytest.mark.check("adalora", 7)
@pytest.mark.parametrize("form", ["fro_mean", "fro2_sum"])
def test_orthonormal_matrices_have_no_penalty(form: str) -> None:
    exact = torch.eye(6, 3)[None]
    value, factor = distances(exact.mT @ exact, form)
    assert not value.any()
    assert not (exact @ factor).any()  # and no 0 / 0
    value, factor = distances(1.21 * exact.mT @ exact, form)
    assert value.any()
    assert (exact @ factor).any()


def test_averages_over_large_numbers_and_none_that_are_not_finite() -> None:
    """A step is left out by the numbers of its gradients, not by a sum of squares that overflows."""
    model, optimizer = toy()
    steps(model, optimizer, 0, 1)
    sense = running(optimizer)
    before = {name: tensor.clone() for name, tensor in sense.averages.items()}
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, 1e25)
    sense._sense()
    for name, parameter in sense._trained().items():
        torch.testing.assert_close(sense.averages[name], 0.85 * before[name] + 0.15 * (parameter * 1e25).abs(), rtol=1e-5, atol=0)
    before = {name: tensor.clone() for name, tensor in sense.averages.items()}
    next(iter(sense._trained().values())).grad.view(-1)[0] = float("nan")
    sense._sense()
    assert all(torch.equal(tensor, before[name]) for name, tensor in sense.averages.items())


@pytest.mark.check("adalora", 7)
def test_no_loss_contains_the_penalty() -> None:
    model, optimizer = toy(gamma=0.5, start="gaussian")
    x, y = batch(1)
    expected = (Toy()(x) - y).square().mean()
    optimizer.zero_grad()
    loss = model(x, y).loss
    assert torch.equal(loss, expected)
    loss.backward()
    optimizer.step()
    model.eval()
    assert optimizer.rankwise_session.report()["schedule_penalty"] > 0.1
    merged = rw.merge(copy.deepcopy(model))
    torch.testing.assert_close(model(x, y).loss, merged(x, y).loss, rtol=1e-5, atol=1e-6)


def test_weight_decay_leaves_the_vectors_alone() -> None:
    model = rw.adapt(Toy(), rw.recipes.adalora(init_rank=4, target_rank=2))
    optimizer: Any = rw.optimizer(model, lr=1e-2, weight_decay=0.1, total_steps=10)
    seen: dict[str, float] = {}
    optimizer.register_step_pre_hook(lambda made, *_: seen.update({group["role"]: group["weight_decay"] for group in made.param_groups}))
    steps(model, optimizer, 0, 1)
    assert seen == {"down": 0.0, "core": 0.1, "up": 0.0}


# --- scale, ranks, files ---------------------------------------------------------------------------------------------------------------


def trained(dtype: torch.dtype = torch.float32, total: int = 12, **fields: Any) -> Any:
    """A tiny Llama after a whole run."""
    ids = token_ids()
    model = rw.adapt(llama(dtype=dtype), rw.recipes.adalora(**{"target_rank": 2, "init_rank": 4, "alpha": 10.0} | FIELDS | fields))
    optimizer = rw.optimizer(model, lr=2e-2, total_steps=total)
    for _ in range(total):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.check("adalora", 8)
@pytest.mark.parametrize("compact", [True, False])
def test_the_scale_is_a_constant(tmp_path: Path, compact: bool) -> None:
    model = trained(torch.bfloat16, compact=compact)
    assert {module.site.scaling for module in adapted_sites(model).values()} == {2.5}
    assert all(module.update.factors().scaling == 2.5 for module in adapted_sites(model).values())  # type: ignore[union-attr]
    if compact:
        assert {module.site.rank for module in adapted_sites(model).values()} != {4}
    rw.save(model, tmp_path)
    again = rw.load(llama(dtype=torch.bfloat16), tmp_path)
    assert torch.equal(logits(model, token_ids()), logits(again, token_ids()))
    assert not torch.equal(logits(model, token_ids()), logits(llama(dtype=torch.bfloat16), token_ids()))


@pytest.mark.check("adalora", 9)
@pytest.mark.parametrize("kept", [[0, 1, 3], [2], []])
def test_cutting_ranks_drops_nothing_but_zeros(kept: list[int]) -> None:
    """The Check asks for equal bits. Where sums are exact they are; in fp32 a matrix product over fewer columns may add in another order
    (rank 1 even runs another routine), so that no implementation could promise them: there rounding is all that differs (below)."""
    generator = torch.Generator().manual_seed(2)

    def short(*shape: int) -> Tensor:  # numbers of a few bits: every product and sum of this test is exact
        return torch.randint(-8, 9, shape, generator=generator).double() / 8

    model = rw.adapt(nn.Sequential(nn.Linear(10, 6, dtype=torch.float64)), rw.recipes.adalora(init_rank=4, target_rank=2))
    site: Any = adapted_sites(model)["0"]
    site.base_layer.weight.data, site.base_layer.bias.data = short(6, 10), short(6)
    lam = short(4, 1) + 2
    lam[[index for index in range(4) if index not in kept]] = 0
    site.update.put(down=short(4, 10), up=short(6, 4), lam=lam)
    x, before = short(5, 10), site.update.factors().delta()
    expected = model(x)
    cuts = resize(model, {"0": torch.tensor(kept, dtype=torch.int64)})
    assert torch.equal(model(x), expected)
    assert torch.equal(site.update.factors().delta(), before)
    assert len(cuts) == 3
    assert site.site.rank == len(kept)
    assert sum(p.numel() for p in site.update.parameters()) == len(kept) * 17 == rw.summary(model)[0].parameters


@pytest.mark.check("adalora", 9)
def test_cutting_ranks_changes_no_output_and_training_goes_on() -> None:
    masked, masking = toy(tinit=2, tfinal=10, total=20, compact=False)
    cut, cutting = toy(tinit=2, tfinal=10, total=20)
    steps(masked, masking, 0, 9)
    steps(cut, cutting, 0, 9)
    moments = {name: copy.deepcopy(masking.state[p]) for name, p in masked.named_parameters() if p.requires_grad}
    assert all(torch.equal(p, dict(cut.named_parameters())[name]) for name, p in masked.named_parameters())
    steps(masked, masking, 9, 10)
    steps(cut, cutting, 9, 10)  # here it is cut
    ranks = {name: module.site.rank for name, module in adapted_sites(cut).items()}
    assert sum(ranks.values()) == 4
    assert ranks == {name: int((lam != 0).sum()) for name, lam in lams(masked).items()}
    x = batch(0)[0]
    torch.testing.assert_close(cut(x), masked(x), rtol=1e-6, atol=1e-6)
    # exactly the parameters that the ranks say, in model, optimizer, plan and summary
    count = sum(ranks[name] * (m.in_features + m.out_features + 1) for name, m in adapted_sites(cut).items())
    live = [p for p in cut.parameters() if p.requires_grad]
    assert count == sum(p.numel() for p in live) == cut.rankwise.plan.trained_parameters == sum(row.parameters for row in rw.summary(cut))
    assert {id(p) for p in live} == {id(p) for group in cutting.param_groups for p in group["params"]} == {id(p) for p in cutting.state}
    # moments are those of the kept triplets
    for name, module in adapted_sites(masked).items():
        kept = lams(masked)[name].nonzero()[:, 0]
        for slot, dim in (("down", 0), ("lam", 0), ("up", 1)):
            full, part = masking.state[getattr(module.update, slot)], cutting.state[getattr(adapted_sites(cut)[name].update, slot)]
            for moment in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(full[moment].index_select(dim, kept), part[moment])
            assert full["step"] == part["step"] == 10
            assert not torch.equal(part["exp_avg"], moments[f"{name}.update.{slot}"]["exp_avg"].index_select(dim, kept))
    before = trainable_state(cut)
    steps(cut, cutting, 10, 20)
    assert all(not torch.equal(value, before[name]) for name, value in trainable_state(cut).items() if value.numel())


@pytest.mark.check("adalora", 9)
def test_training_after_the_cut_equals_training_under_the_mask() -> None:
    """With the same penalty: pruned rows of the masked form have a penalty and Gram entries of their own, so gamma is 0 here."""
    masked, masking = toy(tinit=2, tfinal=10, total=20, compact=False, gamma=0)
    cut, cutting = toy(tinit=2, tfinal=10, total=20, gamma=0)
    steps(masked, masking, 0, 20)
    steps(cut, cutting, 0, 20)
    torch.testing.assert_close(cut(batch(0)[0]), masked(batch(0)[0]), rtol=1e-5, atol=1e-6)
    for name, lam in lams(cut).items():
        torch.testing.assert_close(lam, lams(masked)[name][lams(masked)[name] != 0], rtol=1e-5, atol=1e-6)


def test_a_site_may_end_without_any_triplet(tmp_path: Path) -> None:
    model, optimizer = toy(total=8, target_rank=1, tinit=1, tfinal=4)
    steps(model, optimizer, 0, 3)
    for store in (running(optimizer).averages, running(optimizer).uncertainties):
        for name in store:
            store[name].fill_(1.0 if name.startswith("second") else 0.0)
    steps(model, optimizer, 3, 8)
    assert {name: module.site.rank for name, module in adapted_sites(model).items()} == {"first": 0, "second": 2}
    optimizer.rankwise_session.check_alive()
    x = batch(0)[0]
    rw.save(model, tmp_path / "a")
    again = rw.load(Toy(), tmp_path / "a")
    assert torch.equal(again(x), model(x))
    fresh = rw.optimizer(again, total_steps=8)  # nothing is left to prune, and the empty site is not taken for a dead one
    steps(again, fresh, 0, 8)
    assert {name: module.site.rank for name, module in adapted_sites(again).items()} == {"first": 0, "second": 2}
    fresh.rankwise_session.check_alive()  # type: ignore[attr-defined]
    peft: Any = pytest.importorskip("peft")
    for folder in (tmp_path / "a", export_lora(model, tmp_path / "lora")):
        assert relative(peft.PeftModel.from_pretrained(Toy(), folder)(x), model(x)) < 1e-5


@pytest.mark.check("adalora", 10)
@pytest.mark.parametrize("state", ["before", "inside", "after", "masked", "patterns"])
def test_peft_loads_what_is_saved_and_what_is_exported(tmp_path: Path, state: str) -> None:
    """Before, inside and after pruning: PEFT's AdaLoRA from `save`, PEFT's LoRA of mixed ranks from the export, ours from both."""
    peft: Any = pytest.importorskip("peft")
    fields: dict[str, Any] = {"before": {"tinit": 11, "tfinal": 0}, "inside": {"tinit": 1, "tfinal": 0}, "masked": {"compact": False}}.get(
        state, {}
    )
    if state in ("before", "inside"):
        fields["total_steps"] = 14  # two steps are never taken, so nothing is final
    if state == "patterns":
        fields = {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 7.5}}  # one scaling, two initial ranks
    model = _unfinished(**fields) if "total_steps" in fields else trained(**fields)
    expected, ids = logits(model, token_ids()), token_ids()
    ranks = {module.site.rank for module in adapted_sites(model).values()}
    assert ranks == {4} if state in ("before", "inside", "masked") else len(ranks) > 1
    saved, exported = rw.save(model, tmp_path / "saved"), export_lora(model, tmp_path / "lora")
    assert json.loads((saved / "adapter_config.json").read_text())["peft_type"] == "ADALORA"
    for folder in (saved, exported):
        theirs = peft.PeftModel.from_pretrained(llama(), folder).eval()
        assert relative(logits(theirs, ids), expected) < 1e-5
        assert relative(logits(llama(), ids), expected) > 1e-3
        # and it survives PEFT's own save and merge
        theirs.save_pretrained(tmp_path / "again")
        again = peft.PeftModel.from_pretrained(llama(), tmp_path / "again").eval()
        assert relative(logits(again, ids), expected) < 1e-5
        assert relative(logits(theirs.merge_and_unload(), ids), expected) < 1e-4
    assert torch.equal(logits(rw.load(llama(), saved), ids), expected)
    assert relative(logits(rw.load(llama(), exported), ids), expected) < 1e-5


def _unfinished(total_steps: int, **fields: Any) -> Any:
    ids = token_ids()
    model = rw.adapt(llama(), rw.recipes.adalora(**{"target_rank": 2, "init_rank": 4, "alpha": 10.0} | FIELDS | fields))
    optimizer = rw.optimizer(model, lr=2e-2, total_steps=total_steps)
    for _ in range(total_steps - 2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_what_peft_cannot_hold_is_refused_by_peft(tmp_path: Path) -> None:
    peft: Any = pytest.importorskip("peft")
    for label, fields in (("gain", {"gain": "dora"}), ("alphas", {"alpha_pattern": {"q_proj": 3.0}})):
        model = trained(**fields)
        rw.save(model, tmp_path / label)
        assert json.loads((tmp_path / label / "adapter_config.json").read_text())["peft_type"] == "RANKWISE"
        with pytest.raises((ValueError, KeyError, TypeError)):
            peft.PeftModel.from_pretrained(llama(), tmp_path / label)
        assert torch.equal(logits(rw.load(llama(), tmp_path / label), token_ids()), logits(model, token_ids()))
    with pytest.raises(CheckpointError, match="a gain over base and branch, which a plain LoRA cannot hold"):
        export_lora(trained(gain="dora"), tmp_path / "no")
    with pytest.raises(CheckpointError, match="holds an adapter of rankwise"):
        export_lora(trained(), tmp_path / "gain")


def test_a_saved_rank_must_be_one_that_pruning_can_leave(tmp_path: Path) -> None:
    rw.save(trained(), tmp_path)
    about = json.loads((tmp_path / "rankwise.json").read_text())
    name = next(iter(about["sites"]))
    about["sites"][name]["rank"] = 9
    (tmp_path / "rankwise.json").write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match=f"{name}: rank=9 in the adapter, 4 by its recipe"):
        rw.load(llama(), tmp_path)


def test_merging_after_the_cut_gives_the_same_model() -> None:
    model = trained()
    expected = logits(model, token_ids())
    rw.merge(model)
    torch.testing.assert_close(logits(model, token_ids()), expected, rtol=1e-4, atol=1e-4)
    rw.unadapt(model)
    assert torch.equal(logits(model, token_ids()), logits(llama(), token_ids()))


# --- resuming --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [(), ("down",)])
@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("at", [2, 5, 9, 10, 11, 15])  # before, inside, just before, at and after the last pruning
def test_a_plain_loop_resumes_bit_for_bit(at: int, compact: bool, frozen: tuple[str, ...]) -> None:
    """A frozen factor is cut with the others, so what is left of it belongs to the state."""
    fields = {"tinit": 3, "tfinal": 6, "total": 16, "interval": 2, "compact": compact, "frozen": frozen}
    whole, stepping = toy(**fields)
    steps(whole, stepping, 0, 16)
    model, optimizer = toy(**fields)
    steps(model, optimizer, 0, at)
    session: Any = optimizer.rankwise_session
    kept = json.loads(json.dumps(session.state())), trainable_state(model), session.tensors(), copy.deepcopy(optimizer.state_dict())
    again, resumed = toy(**fields)
    session = resumed.rankwise_session
    session.restore(kept[0])
    load_trainable_state(again, kept[1])
    session.restore_tensors(kept[2])
    resumed.load_state_dict(kept[3])
    steps(again, resumed, at, 16)
    for name, value in trainable_state(whole).items():
        assert torch.equal(trainable_state(again)[name], value), name
    assert {n: m.site for n, m in adapted_sites(again).items()} == {n: m.site for n, m in adapted_sites(whole).items()}
    assert resumed.rankwise_session.report() == stepping.rankwise_session.report()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def test_a_run_from_yaml_prunes_and_resumes_bit_for_bit(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped before, inside and after pruning, one run after another, it ends as the run that was never stopped."""

    def config(name: str) -> dict[str, Any]:
        method = {"name": "adalora", "target_rank": 2, "start": "orthonormal", "tinit": 2, "tfinal": 1}
        plain = plain_config(world, "completion", tmp_path / name, method=method, targets=["q_proj", "v_proj", "down_proj"], dropout=0.1)
        del plain["rank"]
        plain["train"] |= {"steps": 8, "save_every": 1, "accumulate": 1}
        return plain

    # the checkpoints are those of steps 1, 3 and 5, after which averages decide, and 7 (the cut)
    whole = cut_and_resumed(config, monkeypatch, 2, 4, 6, 8)
    metrics = [json.loads(line) for line in (whole.run / "metrics.jsonl").read_text().splitlines()]
    budgets = [line["schedule_budget"] for line in metrics if "loss" in line]
    assert budgets == [official(step, 8, 2, 1, 18, 12) for step in range(1, 9)]
    assert all(line["schedule_penalty"] > 0 for line in metrics[1:8] if "loss" in line)
    ranks = [site["rank"] for site in json.loads((whole.adapter / "rankwise.json").read_text())["sites"].values()]
    assert sum(ranks) == 12
    assert whole.after["task"]["loss"] < whole.before["task"]["loss"]
