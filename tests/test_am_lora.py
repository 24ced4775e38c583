"""AM-LoRA: the mixture against a loop over dense LoRAs, growth over tasks, and every Check of its spec."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import OneLinear, dense_weight, llama, logits, perturb, site, token_ids
from torch import Tensor, nn

import rankwise as rw
from rankwise.checkpoint import load_trainable_state, trainable_state
from rankwise.checkpoint.portable import export_lora
from rankwise.equation import form_of
from rankwise.errors import CheckpointError, RecipeError, TargetError, TrainingError
from rankwise.recipe import Recipe
from rankwise.routing.static import mean_mixture, one_expert
from rankwise.sites import adapted_sites
from rankwise.updates.attention_mixture import penalty

TARGETS = ["q_proj", "down_proj"]
EXACT: dict[str, float] = {"rtol": 1e-10, "atol": 1e-12}
WIDE = {"rank": 3, "targets": ["proj"], "sparsity": "none"}


def small(tasks: int = 3, stirred: bool = True, **options: Any) -> tuple[Any, Any]:
    """(model of one linear layer 10 -> 6 in fp64 with the LoRAs of some tasks, its optimizer); every number moved unless told otherwise."""
    model = rw.adapt(OneLinear(10, 6), rw.recipes.am_lora(**WIDE | options))
    optimizer = rw.optimizer(model, lr=1e-2)
    for task in range(tasks):
        if task:
            rw.next_task(model, optimizer)
        if stirred:
            perturb(model, seed=task, size=0.5)
    return model, optimizer


def rows(count: int = 4, length: int = 5, seed: int = 3) -> Tensor:
    return torch.randn(count, length, 10, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loop(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """(y, g) written out, one LoRA after another with its dense output: the equation of the spec, for every option."""
    update, choice = site(model).update, site(model).update.choice
    base = model.proj.base_layer
    features = [update.scaling * x @ down.T @ up.T for down, up in zip(update._all("down"), update._all("up"), strict=True)]
    nothing = [torch.tanh(update.bias_0) if choice.phi == "tanh" else update.bias_0] if choice.zero else []
    scores = [score.expand(x.shape[:-1]) for score in nothing]
    for number, feature in enumerate(features, 1):
        seen = feature
        if choice.normalise:
            seen = seen / (seen.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        if choice.granularity == "sequence_mean":
            seen = seen.mean(-2, keepdim=True).expand_as(seen)
        score = getattr(update, f"bias_{number}").expand(x.shape[:-1])
        if choice.granularity != "layer":
            score = score + seen @ getattr(update, f"selector_{number}")
        score = torch.tanh(score) if choice.phi == "tanh" else score
        scores.append(score + getattr(update, f"offset_{number}", 0.0))
    stacked = torch.stack(scores, -1)
    if choice.gate == "softmax":
        gates = torch.softmax(stacked / choice.tau, -1)
    else:
        gates = torch.sigmoid(stacked / choice.tau) if choice.gate == "sigmoid" else torch.relu(stacked)
    y = x @ base.weight.T + base.bias
    for number, feature in enumerate(features):
        y = y + gates[..., number + choice.zero, None] * feature
    return y, gates


def gates_of(model: Any, x: Tensor) -> Tensor:
    update = site(model).update
    return update.weigh(x @ update.factors().down.T)[1]


# --- the equation ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.check("am-lora", 1)
def test_one_task_without_the_zero_lora_is_plain_lora() -> None:
    """Bit for bit, from the start through training: the gate is exactly 1, and the selector never gets a gradient but zero."""
    ids = token_ids()
    models = [
        rw.adapt(llama(), recipe.replace(rank=4, alpha=8.0, targets=TARGETS))
        for recipe in (rw.recipes.lora(), rw.recipes.am_lora(zero_entry=False, sparsity="none"))
    ]
    optimizers = [rw.optimizer(model, lr=1e-2) for model in models]
    for _ in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    plain, mixed = models
    assert torch.equal(logits(plain, ids), logits(mixed, ids))
    assert not torch.equal(logits(plain, ids), logits(llama(), ids))
    assert not any(module.update.selector_1.any() for module in adapted_sites(mixed).values())  # pyright: ignore


@pytest.mark.check("am-lora", 2)
@pytest.mark.parametrize("options", [{}, {"gate": "sigmoid"}, {"normalise": True}, {"granularity": "layer"}], ids=str)
def test_with_all_up_at_zero_it_is_the_base_whatever_the_selector(options: Any) -> None:
    model, _ = small(3, **options)
    with torch.no_grad():
        for up in site(model).update._all("up"):  # pyright: ignore
            up.zero_()
    base = OneLinear(10, 6)
    assert torch.equal(model(rows()), base(rows()))


@pytest.mark.check("am-lora", 3)
def test_gates_sum_to_one_and_only_differences_of_scores_count() -> None:
    model, _ = small(3, phi="identity", tau=0.7)
    update: Any = site(model).update
    gates = gates_of(model, rows())
    assert gates.shape == (4, 5, 4)
    torch.testing.assert_close(gates.sum(-1), torch.ones(4, 5, dtype=torch.float64), **EXACT)
    before = model(rows())
    with torch.no_grad():
        for number in range(4):
            getattr(update, f"bias_{number}").add_(2.5)
    torch.testing.assert_close(model(rows()), before, **EXACT)
    # with tanh around the biases too: a constant beside it moves nothing
    model, _ = small(3)
    update = site(model).update
    h = rows() @ update.factors().down.T
    selector = update.selector()
    moved = selector._replace(offsets=selector.offsets + 2.5)
    torch.testing.assert_close(update.weigh(h, moved)[1], update.weigh(h)[1], **EXACT)


VARIANTS: list[dict[str, Any]] = [
    {},
    {"zero_entry": False, "tau": 0.5},
    {"phi": "identity", "normalise": True},
    {"granularity": "sequence_mean"},
    {"granularity": "layer"},
    {"gate": "sigmoid"},
    {"gate": "relu"},
    {"selector_train": "new"},
]


@pytest.mark.check("am-lora", 6)
@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("form", ["fused", "reference"])
def test_the_stack_equals_the_loop_forward_and_backward(options: dict[str, Any], form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two products over the tokens instead of one pair per task; the check asks for 1e-6, fp64 gives 1e-10."""
    if form == "reference":
        monkeypatch.setattr("rankwise.equation.form_of", lambda storage, x: "reference")
    model, _ = small(3, **options)
    assert form_of(site(model).storage, rows()) == "fused"  # of a plain layer, where nothing is patched here
    trained = [p for p in model.parameters() if p.requires_grad]
    x, seed = rows().requires_grad_(), torch.randn(4, 5, 6, dtype=torch.float64)
    results = []
    for y in (model(x), loop(model, x)[0]):
        results.append((y.detach(), *torch.autograd.grad((y * seed).sum(), [x, *trained])))
    for mine, theirs in zip(*results, strict=True):
        assert theirs.any()
        torch.testing.assert_close(mine, theirs, **EXACT)


@pytest.mark.check("am-lora", 7)
def test_the_score_from_h_is_the_score_of_the_output() -> None:
    model, _ = small(3, phi="identity", guard=0.0)
    update: Any = site(model).update
    h = rows() @ update.factors().down.T
    scores = update.weigh(h)[0]
    for number in range(1, 4):
        feature = update.scaling * h[..., 3 * number - 3 : 3 * number] @ getattr(update, f"up_{number}").T  # (4, 5, out)
        wanted = feature @ getattr(update, f"selector_{number}") + getattr(update, f"bias_{number}")
        torch.testing.assert_close(scores[..., number], wanted, **EXACT)


@pytest.mark.check("am-lora", 11)
def test_the_order_of_tasks_does_not_matter() -> None:
    model, _ = small(3)
    other, _ = small(3, stirred=False)
    update, mixed = site(model).update, site(other).update
    order = {1: 3, 2: 1, 3: 2}
    values = {"bias_0": update.bias_0}  # pyright: ignore
    for number, place in order.items():
        values |= {f"{name}_{place}": getattr(update, f"{name}_{number}") for name in ("down", "up", "selector", "bias")}
    mixed.put(**values, offset_2=update.offset_3, offset_3=torch.zeros(1))  # pyright: ignore
    with torch.no_grad():  # the guard of what is first now has no slot: it stands beside the bias inside the loop's reach
        update.offset_2.zero_()  # pyright: ignore
    torch.testing.assert_close(other(rows()), model(rows()), **EXACT)
    assert not torch.allclose(other(rows()), OneLinear(10, 6)(rows()))


def test_scores_and_gates_are_fp32_under_autocast_and_over_a_bf16_base() -> None:
    model: Any = rw.adapt(OneLinear(10, 6, dtype=torch.bfloat16), rw.recipes.am_lora(**WIDE))
    perturb(model)
    update = site(model).update
    x = rows().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        scores, gates = update.weigh(x @ update.factors().down.T.bfloat16())  # pyright: ignore
        model(x).sum().backward()
    assert scores.dtype == gates.dtype == torch.float32
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


# --- a new task ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.check("am-lora", 4)
@pytest.mark.parametrize("options", [{}, {"selector_train": "new"}, {"zero_entry": False, "tau": 0.5}, {"granularity": "layer"}], ids=str)
def test_a_guarded_task_leaves_the_old_behaviour_to_one_percent(options: Any) -> None:
    model, optimizer = small(2, **options)
    base, x = OneLinear(10, 6)(rows()), rows()
    before = model(x)
    rw.next_task(model, optimizer)
    effect = (before - base).norm(dim=-1)
    change = (model(x) - before).norm(dim=-1)
    assert (change <= 0.01 * (1 + 1e-9) * effect).all()  # a gate of a layer has it exactly
    assert (change > 1e-4 * effect).all()  # the new entry is there, and can be learned
    gates = gates_of(model, x)[..., -1]
    torch.testing.assert_close(change / effect, gates.expand_as(effect), rtol=1e-8, atol=1e-12)


@pytest.mark.check("am-lora", 4)
def test_without_the_guard_a_task_takes_its_equal_share() -> None:
    """Selectors at zero: each of n + 1 entries has 1 / (n + 1), the zero LoRA counted, so the update shrinks by (n + 1) / (n + 2)."""
    model, optimizer = small(2, stirred=False, guard=0.0)
    with torch.no_grad():
        for up in site(model).update._all("up"):  # pyright: ignore
            up.normal_()
    base, x = OneLinear(10, 6)(rows()), rows()
    effect = model(x) - base
    rw.next_task(model, optimizer)
    torch.testing.assert_close(gates_of(model, x), torch.full((4, 5, 4), 0.25, dtype=torch.float64), **EXACT)
    torch.testing.assert_close(model(x) - base, effect * 3 / 4, **EXACT)


def test_the_guard_is_lifted_step_by_step_and_then_the_paper_is_left() -> None:
    model, optimizer = small(2, release=4, sparsity="none")
    update: Any = site(model).update
    start = float(update.offset_2)
    assert start < -4
    seen = []
    for _ in range(6):
        model(rows()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(float(update.offset_2))
    assert seen == pytest.approx([0.75 * start, 0.5 * start, 0.25 * start, 0.0, 0.0, 0.0])


@pytest.mark.check("am-lora", 5)
def test_with_new_selectors_alone_the_odds_among_old_tasks_stay() -> None:
    model, optimizer = small(2, selector_train="new", sparsity="selector", sparsity_weight=0.1)
    rw.next_task(model, optimizer)
    before = gates_of(model, rows())
    update: Any = site(model).update
    for _ in range(30):
        model(rows(seed=8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = gates_of(model, rows())
    assert (after[..., 3] - before[..., 3]).abs().max() > 0.05
    assert update.selector_3.any()
    torch.testing.assert_close(after[..., :3] / after[..., :1], before[..., :3] / before[..., :1], **EXACT)
    # under 'all' they drift
    model, optimizer = small(2)
    rw.next_task(model, optimizer)
    before = gates_of(model, rows())
    for _ in range(30):
        model(rows(seed=8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = gates_of(model, rows())
    assert (after[..., :3] / after[..., :1] - before[..., :3] / before[..., :1]).abs().max() > 1e-2


@pytest.mark.check("am-lora", 9)
@pytest.mark.parametrize("policy", ["all", "new"])
def test_frozen_tasks_have_neither_gradient_nor_optimizer_state(policy: Any) -> None:
    """Trained on task n: r (in + out), and the selectors n (out + 1) + 1, or out + 1 of the new one alone (and c_0 on the first task).
    Held: n r (in + out) + n (out + 1) + 1 as the spec counts, and n - 1 guards; under 'all' the selectors after each task."""
    model, optimizer = small(1, selector_train=policy)
    update: Any = site(model).update
    for task in range(1, 5):
        if task > 1:
            old = [copy.deepcopy(update._all(name)) for name in ("down", "up")]
            rw.next_task(model, optimizer)
        trained = dict(update.named_parameters())
        selectors = task * (6 + 1) + 1 if policy == "all" else 6 + 1 + (task == 1)
        assert sum(p.numel() for p in trained.values()) == 3 * (10 + 6) + selectors
        assert sum(p.numel() for p in trained.values()) == model.rankwise.plan.trained_parameters
        held = [*update.parameters(), *(tensor for name, tensor in update.named_buffers() if not name.startswith("past"))]
        assert sum(tensor.numel() for tensor in held) == task * 3 * (10 + 6) + task * (6 + 1) + 1 + task - 1
        past = sum(tensor.numel() for name, tensor in update.named_buffers() if name.startswith("past"))
        assert past == (sum(k * (6 + 1) + 1 for k in range(1, task)) if policy == "all" else 0)
        for _ in range(2):
            model(rows()).square().sum().backward()
            assert all(tensor.grad is None for tensor in update.buffers())
            optimizer.step()
            optimizer.zero_grad()
        assert {id(p) for p in optimizer.state} == {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert {id(p) for p in optimizer.state} == {id(p) for p in trained.values()}
        if task > 1:
            for name, kept in zip(("down", "up"), old, strict=True):  # pyright: ignore
                assert all(torch.equal(was, now) for was, now in zip(kept, update._all(name)[:-1], strict=True))
            assert int(optimizer.state[getattr(update, f"up_{task}")]["step"]) == 2
            if policy == "all":
                assert int(optimizer.state[update.selector_1]["step"]) == 2 * task  # a selector that continues keeps its moments


def test_new_parameters_join_the_groups_of_their_roles() -> None:
    model: Any = rw.adapt(llama(), rw.recipes.am_lora(rank=2, targets=TARGETS).replace(gradient="lora-plus"))
    optimizer: Any = rw.optimizer(model, lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    rw.next_task(model, optimizer)
    built = rw.adapt(llama(), rw.recipes.am_lora(rank=2, targets=TARGETS).replace(gradient="lora-plus"))
    fresh: Any = rw.optimizer(built, lr=1e-3)
    rw.next_task(built, fresh)
    named = {id(p): name for name, p in model.named_parameters()}
    assert [group["role"] for group in optimizer.param_groups] == ["down", "up", "gate"]
    for group in optimizer.param_groups:
        names = [named[id(p)] for p in group["params"]]
        assert names == [name for name, p in model.named_parameters() if any(p is other for other in group["params"])]
        wanted = {"down": "update.down_2", "up": "update.up_2", "gate": "update."}[group["role"]]
        assert all(wanted in name for name in names)
    ids = token_ids()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    scheduler.step()
    assert all(group["lr"] == 5e-4 for group in optimizer.param_groups)


def test_a_grown_model_has_the_plan_of_its_size() -> None:
    model, optimizer = small(3)
    plan, module = model.rankwise.plan, site(model)
    assert module.site.experts == plan.sites[0].experts == 3
    assert module.site.width == 9
    assert plan.frozen_adapter_numbers == sum(tensor.numel() for tensor in module.update.buffers())  # pyright: ignore
    assert sum(row.parameters for row in rw.summary(model)) == plan.trained_parameters
    with pytest.raises(TrainingError, match="next_task needs the optimizer of this model"):
        rw.next_task(small(1)[0], optimizer)


def test_tasks_mean_nothing_to_other_recipes() -> None:
    model = rw.adapt(llama(), rw.recipes.lora(rank=2))
    optimizer = rw.optimizer(model, lr=1e-3)
    before = list(model.parameters())
    rw.next_task(model, optimizer)
    assert all(one is other for one, other in zip(before, model.parameters(), strict=True))


# --- losses ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.check("am-lora", 8)
def test_the_l1_norm_of_a_softmax_teaches_nothing() -> None:
    """|g|_1 over all entries has a gradient of exactly zero in exact arithmetic (below rounding here); the offered readings have one."""
    model, _ = small(3)
    update: Any = site(model).update
    h = rows() @ update.factors().down.T.detach()
    scores, gates = update.weigh(h)
    directions = update._all("selector")
    (literal, *_) = torch.autograd.grad(gates.abs().sum(), directions, retain_graph=True)
    assert literal.abs().max() < 1e-14
    for kind in ("scores", "gates", "entropy", "concentration"):
        for gradient in torch.autograd.grad(penalty(kind, scores, gates, True).mean(), directions, retain_graph=True):
            assert gradient.abs().max() > 1e-5, kind
    torch.testing.assert_close(penalty("gates", scores, gates, True), 1 - gates[..., 0], **EXACT)
    torch.testing.assert_close(penalty("concentration", scores, gates, True), 1 - gates.square().sum(-1), **EXACT)
    with pytest.raises(RecipeError, match="L1 norm of a softmax, which is always 1"):
        rw.recipes.am_lora(sparsity="gates", zero_entry=False)


@pytest.mark.check("am-lora", 8)
def test_the_penalty_of_the_selectors_is_added_when_gradients_are_final() -> None:
    """Mode (a): lambda sign(D), exactly, on top of the gradient of the loss."""
    seen: dict[str, Any] = {}
    for weight in (0.0, 0.25):
        model, optimizer = small(2, sparsity="selector", sparsity_weight=weight)
        optimizer.register_step_pre_hook(lambda made, *_, weight=weight, model=model: seen.update({weight: _selector_gradients(model)}))
        model(rows()).square().sum().backward()
        signs = [parameter.sign() for parameter in site(model).update._all("selector")]  # pyright: ignore
        optimizer.step()
    report = optimizer.rankwise_session.report()  # pyright: ignore
    assert set(report) == {"schedule_penalty"}
    for plain, penalised, sign in zip(seen[0.0], seen[0.25], signs, strict=True):  # pyright: ignore
        torch.testing.assert_close(penalised - plain, 0.25 * sign, **EXACT)


def _selector_gradients(model: Any) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in site(model).update._all("selector")]  # type: ignore[union-attr]


LOSSES: list[dict[str, Any]] = [{"sparsity": kind} for kind in ("scores", "entropy", "concentration", "gates")] + [{"distill": 1.0}]


@pytest.mark.parametrize("options", LOSSES, ids=str)
def test_losses_on_activations_are_attached_to_the_graph(options: Any) -> None:
    """The gradient is that of loss + weight * mean penalty, in training; evaluation knows no penalty."""
    model, _ = small(3, sparsity_weight=0.5, **options)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    model(rows()).square().sum().backward()
    mine = [p.grad.clone() for p in trained]  # type: ignore[union-attr]
    update: Any = site(model).update
    h = rows() @ update.factors().down.T
    scores, gates = update.weigh(h)
    if "distill" in options:
        was = torch.softmax(update.weigh(h[..., :6].detach(), _old(update))[0], -1)
        now = torch.softmax(scores[..., :3], -1)
        extra = (was * (was / now).log()).sum(-1).mean()
    else:
        extra = 0.5 * penalty(options["sparsity"], scores, gates, True).mean()
    wanted = torch.autograd.grad(loop(model, rows())[0].square().sum() + extra, trained)
    without = torch.autograd.grad(loop(model, rows())[0].square().sum(), trained)
    for gradient, whole in zip(mine, wanted, strict=True):
        torch.testing.assert_close(gradient, whole, **EXACT)
    assert any(not torch.allclose(one, other) for one, other in zip(without, wanted, strict=True))


def _old(update: Any) -> Any:
    from rankwise.updates.attention_mixture import Selector

    return Selector(update.past_selector_2, update.past_bias_2, update._offsets()[:3])


def test_the_orthogonality_penalty_is_that_of_o_lora() -> None:
    model, optimizer = small(3, orthogonality=0.3)
    update: Any = site(model).update
    seen: list[Tensor] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(update.down_3.grad.clone()))
    model(rows()).square().sum().backward()
    plain = update.down_3.grad.clone()
    down = update.down_3.detach().clone().requires_grad_()
    loss = 0.3 * sum((down @ getattr(update, f"down_{number}").T).square().sum() for number in (1, 2))
    (wanted,) = torch.autograd.grad(loss, down)  # pyright: ignore
    optimizer.step()
    torch.testing.assert_close(seen[0] - plain, wanted, **EXACT)


# --- files, merging, resuming ----------------------------------------------------------------------------------------------------------


def sequence(tasks: int, steps: int = 2, model: Any = None, optimizer: Any = None, first: int = 0, **options: Any) -> tuple[Any, Any]:
    """A llama trained on one batch per task."""
    if model is None:
        model = rw.adapt(llama(), rw.recipes.am_lora(**{"rank": 2, "targets": TARGETS} | options))
        optimizer = rw.optimizer(model, lr=1e-2)
    for task in range(first, tasks):
        if task:
            rw.next_task(model, optimizer)
        advance(model, optimizer, task, steps)
    return model, optimizer


def advance(model: Any, optimizer: Any, task: int, steps: int) -> None:
    ids = token_ids(seed=task + 1)
    model.train()
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.mark.parametrize("options", [{}, {"selector_train": "new"}, {"granularity": "layer"}, {"gate": "sigmoid"}], ids=str)
def test_a_sequence_saves_and_loads_bit_for_bit(options: Any, tmp_path: Path) -> None:
    model, _ = sequence(3, **options)
    rw.save(model, tmp_path)
    about = json.loads((tmp_path / "rankwise.json").read_text())
    assert {entry["experts"] for entry in about["sites"].values()} == {3}
    assert about["peft_type"] == "RANKWISE"
    again = rw.load(llama(), tmp_path)
    assert torch.equal(logits(again, token_ids()), logits(model, token_ids()))
    assert not torch.equal(logits(again, token_ids()), logits(llama(), token_ids()))
    rw.unadapt(again)
    assert torch.equal(logits(again, token_ids()), logits(llama(), token_ids()))


@pytest.mark.parametrize("policy", ["all", "new"])
def test_the_first_tasks_of_a_file_are_the_model_after_them(policy: Any, tmp_path: Path) -> None:
    kept, model, optimizer = [], None, None
    for task in range(3):
        model, optimizer = sequence(task + 1, model=model, optimizer=optimizer, first=task, selector_train=policy)
        kept.append(logits(model, token_ids()))
    rw.save(model, tmp_path)  # pyright: ignore
    for tasks, wanted in enumerate(kept, 1):
        loaded = rw.load(llama(), tmp_path, tasks=tasks)
        assert torch.equal(logits(loaded, token_ids()), wanted)
        assert all(module.site.experts == tasks for module in adapted_sites(loaded).values())
    for tasks in (0, 4):
        with pytest.raises(CheckpointError, match=f"tasks={tasks}: the adapter in .* holds the LoRAs of 3 tasks"):
            rw.load(llama(), tmp_path, tasks=tasks)
    model, _ = sequence(2, snapshots=False)
    rw.save(model, tmp_path / "none")
    with pytest.raises(CheckpointError, match="those of after task 1 were not kept"):
        rw.load(llama(), tmp_path / "none", tasks=1)


def test_a_file_with_another_number_of_tasks_than_it_says_is_refused(tmp_path: Path) -> None:
    model, _ = sequence(2)
    rw.save(model, tmp_path)
    about = json.loads((tmp_path / "rankwise.json").read_text())
    name = next(iter(about["sites"]))
    about["sites"][name]["experts"] = "two"
    (tmp_path / "rankwise.json").write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match=f"{name}: experts='two' in the adapter, 1 by its recipe"):
        rw.load(llama(), tmp_path)
    about["sites"][name]["experts"] = 3
    (tmp_path / "rankwise.json").write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match=r"lacks .* tensors, such as"):
        rw.load(llama(), tmp_path)


def test_merging_is_refused_where_gates_see_the_token_and_exact_where_they_do_not() -> None:
    model, _ = sequence(2)
    before = logits(model, token_ids())
    with pytest.raises(TargetError, match="cannot be merged: its update depends on the token"):
        rw.merge(model)
    assert torch.equal(logits(model, token_ids()), before)
    model, _ = sequence(2, granularity="layer")
    before = logits(model, token_ids())
    dense = {name: dense_weight(module) for name, module in adapted_sites(model).items()}
    rw.merge(model)
    for name, module in adapted_sites(model).items():
        torch.testing.assert_close(module.weight.double(), dense[name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits(model, token_ids()), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("policy", ["all", "new"])
@pytest.mark.parametrize(
    "at", [(0, 1), (1, 0), (2, 2)], ids=str
)  # (task, step): inside the first, at the begin of the second, inside the third
def test_a_plain_loop_resumes_bit_for_bit_in_the_middle_of_a_sequence(at: tuple[int, int], policy: Any) -> None:
    options = {"selector_train": policy, "release": 3, "distill": 0.1 if policy == "all" else 0.0}
    whole, stepping = sequence(3, steps=4, **options)
    task, step = at
    model, optimizer = sequence(task, steps=4, **options) if task else (None, None)
    model, optimizer = sequence(task + 1, step, model, optimizer, first=task, **options)
    session: Any = optimizer.rankwise_session
    kept = json.loads(json.dumps(session.state())), trainable_state(model), session.tensors(), copy.deepcopy(optimizer.state_dict())
    again = rw.adapt(llama(), rw.recipes.am_lora(rank=2, targets=TARGETS, **options))
    resumed: Any = rw.optimizer(again, lr=1e-2)
    resumed.rankwise_session.restore(kept[0])
    load_trainable_state(again, kept[1])
    resumed.rankwise_session.restore_tensors(kept[2])
    resumed.load_state_dict(kept[3])
    advance(again, resumed, task, 4 - step)
    sequence(3, 4, again, resumed, first=task + 1)
    state, wanted = trainable_state(again), trainable_state(whole)
    assert state.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(state[name], value), name
    assert torch.equal(logits(again, token_ids()), logits(whole, token_ids()))
    assert resumed.rankwise_session.report() == stepping.rankwise_session.report()


@pytest.mark.check("am-lora", 10)
def test_a_mixture_held_still_is_exact_where_its_gates_are_constant(tmp_path: Path) -> None:
    """D = 0: every token has the gates of the biases. Their mean is they, and the plain LoRA of rank t r computes what the model does.
    With selectors that see the token it is near, and the distance of the gates says how near."""
    model, _ = sequence(3)
    batches = [{"input_ids": token_ids(seed=seed)} for seed in range(2)]
    near = mean_mixture(model, batches)
    assert all(0 < error < 0.5 for error in near.errors.values())
    with torch.no_grad():
        for module in adapted_sites(model).values():
            for selector in module.update._all("selector"):  # pyright: ignore
                selector.zero_()
    mixture = mean_mixture(model, batches)
    assert all(error < 1e-6 for error in mixture.errors.values())
    before = logits(model, token_ids())
    export_lora(model, tmp_path / "plain", mixture=mixture)
    plain = rw.load(llama(), tmp_path / "plain")
    assert {module.site.rank for module in adapted_sites(plain).values()} == {6}
    torch.testing.assert_close(logits(plain, token_ids()), before, rtol=1e-5, atol=1e-5)
    assert (logits(llama(), token_ids()) - before).abs().max() > 1e-2
    with pytest.raises(CheckpointError, match="the update depends on the token, which a plain LoRA cannot hold"):
        export_lora(model, tmp_path / "no")


def test_the_lora_of_one_task_alone_is_a_plain_lora(tmp_path: Path) -> None:
    model, _ = sequence(3)
    export_lora(model, tmp_path, mixture=one_expert(model, 1))
    alone = rw.load(llama(), tmp_path)
    for name, module in adapted_sites(alone).items():
        update: Any = adapted_sites(model)[name].update
        assert module.site.rank == 2
        wanted = update.scaling * update.up_2 @ update.down_2
        torch.testing.assert_close(module.update.factors().delta(), wanted, rtol=1e-6, atol=1e-8)  # pyright: ignore
    with pytest.raises(TargetError, match="expert=3: the sites have 3 experts, numbered 0 to 2"):
        one_expert(model, 3)


# --- losses and padding ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"sparsity": "gates"}, {"granularity": "sequence_mean"}], ids=str)
def test_padding_enters_no_mean(options: Any) -> None:
    """The gradients of a row do not depend on how far it is padded, nor with what."""
    from checkpoint_models import base

    found = []
    for padding in (0, 3):
        model = rw.adapt(base("bert"), rw.recipes.am_lora(**{"rank": 2, "targets": ["query"], "sparsity_weight": 5.0} | options))
        perturb(model)
        model.training = True  # of the root alone: losses are attached, and nothing is dropped
        ids = torch.cat([token_ids(rows=2, length=4) % 64, torch.full((2, padding), 9)], dim=1)
        mask = torch.tensor([[1] * 4 + [0] * padding] * 2)
        model(input_ids=ids, attention_mask=mask, labels=torch.tensor([0, 1])).loss.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, padded in zip(*found, strict=True):
        torch.testing.assert_close(padded, plain, rtol=1e-4, atol=1e-6)


def test_a_model_that_writes_cannot_take_a_mean_over_the_row() -> None:
    with pytest.raises(RecipeError, match="this model writes token after token"):
        rw.adapt(llama(), rw.recipes.am_lora(granularity="sequence_mean"))


# --- bad input -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"tau": 0.0}, "tau=0.0 of the am-lora update must be above 0"),
        ({"guard": 1.0}, "guard=1.0 of the am-lora update must be at least 0 and below 1"),
        ({"selector_std": -1.0}, "selector_std=-1.0"),
        ({"sparsity_weight": float("nan"), "sparsity": "scores"}, "penalty_weight=nan"),
        ({"sparsity_weight": -1.0}, "-1.0"),
        ({"release": 0}, "release=0 of the task-growth schedule must be at least 1 step"),
        ({"orthogonality": -1.0}, "orthogonality=-1.0"),
        ({"gate": "sigmoid", "sparsity": "entropy"}, "needs gates that sum to 1"),
        ({"distill": 0.1, "selector_train": "new"}, "needs gate='softmax', selector_train='all'"),
        ({"granularity": "word"}, "granularity='word' of the am-lora update is unknown"),
        ({"init": "pissa", "base": "fold"}, "each later one would start from another base"),
        ({"gain": "dora"}, "the row norm would differ from token to token"),
    ],
)
def test_what_cannot_be_is_refused(options: Any, wanted: str) -> None:
    with pytest.raises(RecipeError) as caught:
        rw.recipes.am_lora(**options)
    assert wanted in str(caught.value)


def test_a_schedule_of_tasks_needs_an_update_that_grows() -> None:
    with pytest.raises(RecipeError, match="only AM-LoRA's sites can gain an expert"):
        Recipe().replace(schedule="task-growth")
    from rankwise.resizing import grow

    model = rw.adapt(llama(), rw.recipes.lora(rank=2, targets=TARGETS))
    with pytest.raises(RecipeError, match="update='lora' holds a fixed number of experts"):
        grow(model, list(adapted_sites(model)))


def test_a_copied_model_goes_its_own_way() -> None:
    model, optimizer = sequence(2)
    twin = copy.deepcopy(model)
    before = logits(twin, token_ids())
    sequence(3, model=model, optimizer=optimizer, first=2)
    assert torch.equal(logits(twin, token_ids()), before)
    assert isinstance(twin, nn.Module)
    assert all(module.site.experts == 2 for module in adapted_sites(twin).values())
