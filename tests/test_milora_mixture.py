"""MiLoRA, the mixture: prompts routed once, at training, at prefill and through generation; the activation's own level of learning."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from method_checks import cut_and_resumed
from test_routing import gradients, near
from tiny_models import llama, logits, perturb, token_ids
from torch import Tensor, nn
from training_models import make_world, plain_config, silent_console

import rankwise as rw
from rankwise.checkpoint import load_trainable_state, trainable_state
from rankwise.checkpoint.portable import export_lora
from rankwise.context import BatchContext, Meter, under
from rankwise.errors import ConfigError, RecipeError, TrainingError
from rankwise.optim import roles_of
from rankwise.routing.cache import ROUTES, keep_routes
from rankwise.routing.gating import gates_of
from rankwise.routing.prompt_gate import GELU_DENOMINATOR, GELU_NUMERATOR, PromptGate, load_balance, rational
from rankwise.routing.static import Mixture, mean_mixture, uniform_mixture
from rankwise.sites import adapted_sites

torch.set_num_threads(1)

IDS = token_ids(rows=3, length=8)
LABELS = IDS.clone()
LABELS[0, :3] = LABELS[1, :5] = LABELS[2, :2] = -100
MASK = torch.ones_like(IDS)


@torch.no_grad()
def stirred(model: Any, router: float = 3.0) -> Any:
    """LoRAs and gates away from their start, so that prompts are routed differently."""
    perturb(model, size=1.0)
    generator = torch.Generator().manual_seed(7)
    for gate in gates_of(model).values():
        gate.put(router=router * torch.randn(gate.router.shape, generator=generator) / gate.router.shape[1] ** 0.5)
        if "query" in gate.slots:
            gate.put(query=0.3 * torch.randn(gate.query.shape, generator=generator))
    return model


def mixture(moved: bool = True, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    recipe = rw.recipes.milora_mixture(**{"rank": 4, "theta_mode": "joint"} | options)
    model = rw.adapt(llama(dtype=dtype), recipe)
    return stirred(model) if moved else model


def routes(model: Any, **call: Any) -> Tensor:
    """c (blocks, batch, layers) of a forward, read off the cache that it filled."""
    with torch.no_grad():
        kept = getattr(model(**call, use_cache=True).past_key_values, ROUTES)
    return torch.stack(list(kept.values()))


# --- the gate --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.check("milora-mixture", 1)
@pytest.mark.parametrize("gate", ["ste", "hard", "prob_renorm", "prob"])
def test_with_all_layers_on_it_is_lora(gate: str) -> None:
    """Bit for bit with 'ste' and 'hard'; the two others weigh the layers, so they are not. The gradients of the LoRAs are LoRA's where the
    gates have none of their own, which 'ste' sends through the hidden states of the prompt to the blocks before."""
    mixed = mixture(k=7, gate=gate, balance=0.0)
    plain = rw.adapt(llama(), rw.recipes.lora(rank=4, alpha=8.0))
    for mine, other in zip(adapted_sites(mixed).values(), adapted_sites(plain).values(), strict=True):
        other.update.put(down=mine.update.down, up=mine.update.up)  # type: ignore[union-attr]
    assert torch.equal(logits(mixed, IDS), logits(plain, IDS)) == (gate in ("ste", "hard"))
    for model in (mixed, plain):
        model.train()(input_ids=IDS, labels=LABELS).loss.backward()
    found, wanted = gradients(mixed), gradients(plain)
    assert all(torch.equal(found[name], want) for name, want in wanted.items()) == (gate == "hard")


@pytest.mark.check("milora-mixture", 2)
def test_loras_of_zero_are_the_base_whatever_is_routed() -> None:
    for router in (0.1, 10.0):
        model = mixture(moved=False)
        before = logits(llama(), IDS)
        for gate in gates_of(model).values():
            gate.put(router=router * torch.randn(gate.router.shape, generator=torch.Generator().manual_seed(1)))
        assert torch.equal(logits(model, IDS), before)


def test_exactly_k_layers_are_on_and_ties_go_to_the_first() -> None:
    c = routes(mixture(k=3, gate="hard"), input_ids=IDS)
    assert c.shape == (2, 3, 7)
    assert torch.equal(c.sum(-1), torch.full((2, 3), 3.0))
    assert len({tuple(row.tolist()) for row in c.flatten(0, 1)}) > 1  # prompts and blocks differ
    (gate, *_) = gates_of(mixture(k=2, gate="hard")).values()
    assert torch.equal(gate.weights(torch.full((1, 7), 1 / 7)), torch.tensor([[1.0, 1, 0, 0, 0, 0, 0]]))  # type: ignore[operator]


@pytest.mark.parametrize("gate", ["ste", "prob", "prob_renorm", "hard"])
def test_weights_of_each_kind(gate: Any) -> None:
    (module, *_) = gates_of(mixture(k=2, gate=gate)).values()
    p = torch.tensor([[0.1, 0.4, 0.05, 0.3, 0.05, 0.06, 0.04]], requires_grad=True)
    c = module.weights(p)  # type: ignore[operator]
    values = {"ste": (1.0, 1.0), "hard": (1.0, 1.0), "prob": (0.4, 0.3), "prob_renorm": (2 * 0.4 / 0.7, 2 * 0.3 / 0.7)}[gate]
    wanted = torch.zeros(1, 7)
    wanted[0, 1], wanted[0, 3] = values
    torch.testing.assert_close(c, wanted)
    assert c.requires_grad == (gate != "hard")


@pytest.mark.check("milora-mixture", 5)
def test_a_query_of_zero_pools_the_mean_and_places_play_no_part() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 6, 32, generator=generator)
    prompt = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 0, 1, 1]]).bool()
    order = torch.randperm(6, generator=generator)
    mean = torch.stack([hidden[row, prompt[row]].mean(0) for row in range(2)])
    for pooler in ("self-attention", "average", "max", "last"):
        (gate, *_) = gates_of(mixture(moved=False, pooler=pooler)).values()
        assert isinstance(gate, PromptGate)
        pooled = gate.pool(hidden, prompt)
        if pooler in ("self-attention", "average"):
            torch.testing.assert_close(pooled, mean, rtol=1e-5, atol=1e-6)
        if pooler == "last":
            assert torch.equal(pooled, hidden[[0, 1], [3, 5]])
            continue
        if pooler == "self-attention":
            gate.put(query=torch.randn(32, generator=generator))
            pooled = gate.pool(hidden, prompt)
            for row in range(2):
                tokens = hidden[row, prompt[row]]
                torch.testing.assert_close(pooled[row], (tokens @ gate.query).softmax(0) @ tokens, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gate.pool(hidden[:, order], prompt[:, order]), pooled, rtol=1e-5, atol=1e-5)
        changed = hidden.masked_fill(~prompt[..., None], 1e4)  # what is no prompt is not looked at
        assert torch.equal(gate.pool(changed, prompt), pooled)
    (gate, *_) = gates_of(mixture(moved=False, skip_first=True)).values()
    assert torch.equal(gate._counted(prompt), torch.tensor([[0, 1, 1, 1, 0, 0], [0, 0, 1, 0, 1, 1]]).bool())  # type: ignore[operator]
    assert torch.equal(gate._counted(prompt[:, :2]), torch.tensor([[0, 1], [0, 1]]).bool())  # type: ignore[operator]


@pytest.mark.check("milora-mixture", 6)
def test_the_load_balance_loss() -> None:
    n = 4
    even = (torch.full((n, n), 1 / n, dtype=torch.float64) + 1e-9 * torch.eye(n)).requires_grad_()
    assert float(load_balance(even)) == pytest.approx(1, abs=1e-8)
    assert float(load_balance(torch.eye(n)[:1].expand(5, n))) == n
    p = torch.rand(6, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).softmax(-1).requires_grad_()
    load_balance(p).backward()
    f = torch.bincount(p.argmax(1), minlength=n) / 6  # a constant: the gradient is n f_i / prompts
    torch.testing.assert_close(p.grad, (n * f / 6).expand(6, n).double())


@pytest.mark.check("milora-mixture", 7)
def test_the_activation_is_near_gelu_and_finite() -> None:
    a, b = torch.tensor(GELU_NUMERATOR).requires_grad_(), torch.tensor(GELU_DENOMINATOR).requires_grad_()
    x = torch.linspace(-5, 5, 10001)
    assert (rational(x, a, b) - nn.functional.gelu(x)).abs().max() < 3.1e-3
    for point, value in ((10.0, 10.2), (-10.0, 0.2), (50.0, 50.6), (-50.0, 0.55)):
        assert float(rational(torch.tensor(point), a, b).detach()) == pytest.approx(value, abs=0.05)
    wide = rational(torch.tensor([1e3, -1e3]), a, b)
    assert wide.dtype == torch.float32
    assert wide.isfinite().all()
    powers = torch.stack([x.double() ** j for j in range(7)])
    literal = (torch.tensor(GELU_NUMERATOR).double() @ powers) / (1 + (torch.tensor(GELU_DENOMINATOR).double() @ powers[1:6]).abs())
    torch.testing.assert_close(rational(x, a, b).double(), literal, rtol=1e-4, atol=1e-5)
    rational(torch.randn(50, generator=torch.Generator().manual_seed(0)), a, b).square().sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    assert (a.grad != 0).all()
    assert (b.grad != 0).all()
    # at the kink: no gradient, and no 0 / 0
    zero = torch.zeros(3, requires_grad=True)
    rational(zero, a.detach(), b.detach()).sum().backward()
    torch.testing.assert_close(zero.grad, torch.full((3,), GELU_NUMERATOR[1]))


@pytest.mark.check("milora-mixture", 8)
def test_straight_through_gives_the_router_a_gradient_and_hard_does_not() -> None:
    found = {}
    for gate in ("ste", "hard"):
        model = mixture(gate=gate, balance=0.0).train()
        loss = model(input_ids=IDS, labels=LABELS).loss
        loss.backward()
        found[gate] = float(loss.detach()), [one.router.grad for one in gates_of(model).values()]
    assert found["ste"][0] == found["hard"][0]  # the value depends on which layers are on, not on how probable they are
    assert all(grad is not None and grad.abs().max() > 1e-6 for grad in found["ste"][1])
    assert all(grad is None or not grad.any() for grad in found["hard"][1])
    model = mixture(gate="hard").train()
    model(input_ids=IDS, labels=LABELS).loss.backward()
    assert all(one.router.grad.any() for one in gates_of(model).values())  # from the balance loss alone


def test_the_balance_loss_is_a_mean_over_blocks_and_checkpointing_keeps_it() -> None:
    model = mixture(balance=0.5).train()
    seen: list[Tensor] = []
    for gate in gates_of(model).values():
        inner = gate.probabilities  # type: ignore[union-attr]
        gate.probabilities = lambda hidden, prompt, inner=inner: seen.append(inner(hidden, prompt)) or seen[-1]
    model(input_ids=IDS, labels=LABELS).loss.backward()
    said = model.rankwise.meter.take()["load"]
    assert said == pytest.approx(0.5 * sum(float(load_balance(p.detach())) for p in seen) / 2, rel=1e-6)
    wanted = gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model(input_ids=IDS, labels=LABELS).loss.backward()
    near(gradients(model), wanted, 1e-6)
    assert model.rankwise.meter.take()["load"] == said


def test_a_bf16_base_is_gated_in_fp32_and_survives_massive_activations() -> None:
    model = mixture(dtype=torch.bfloat16)
    (gate, *_) = gates_of(model).values()
    assert gate.router.dtype == torch.float32
    hidden = torch.randn(2, 5, 32).bfloat16()
    hidden[:, 0, 3] = 3e3
    for norm in (True, False):
        (gate, *_) = gates_of(mixture(dtype=torch.bfloat16, router_norm=norm)).values()
        with under(BatchContext("prefill", Meter(), 2, 5)):
            c = gate(hidden, BatchContext("prefill", Meter(), 2, 5))
        assert c.dtype == torch.float32
        assert c.isfinite().all()
    assert logits(model, IDS).isfinite().all()


# --- who is looked at ------------------------------------------------------------------------------------------------------------------


def test_training_looks_at_prompt_tokens_only() -> None:
    """Changing an answer never changes c; changing a prompt may."""
    model = mixture(gate="prob").train()
    taken: list[Tensor] = []
    model.model.layers[0].rankwise_gate.register_forward_hook(lambda module, args, c: taken.append(c.detach()))
    answer, prompt = IDS.clone(), IDS.clone()
    answer[0, 4], prompt[0, 1] = (IDS[0, 4] + 1) % 67, (IDS[0, 1] + 1) % 67
    for ids in (IDS, answer, prompt):
        model(input_ids=ids, labels=LABELS)
    model(input_ids=IDS, prompt_mask=(LABELS == -100).long())
    plain, other, differs, given = taken
    assert torch.equal(plain, other)
    assert torch.equal(plain, given)
    assert not torch.equal(plain[0], differs[0])


@pytest.mark.check("milora-mixture", 4)
def test_padding_on_either_side_and_order_change_no_route() -> None:
    model = mixture(gate="prob")
    lengths = (3, 5, 8)
    alone = torch.cat([routes(model, input_ids=IDS[row : row + 1, :length]) for row, length in enumerate(lengths)], 1)
    for side in ("left", "right"):
        ids, mask = torch.full_like(IDS, 9), torch.zeros_like(IDS)
        for row, length in enumerate(lengths):
            at = slice(8 - length, 8) if side == "left" else slice(0, length)
            ids[row, at], mask[row, at] = IDS[row, :length], 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        batch = routes(model, input_ids=ids, attention_mask=mask, position_ids=positions)
        torch.testing.assert_close(batch, alone, rtol=1e-4, atol=1e-5)
        order = torch.tensor([2, 0, 1])
        turned = routes(model, input_ids=ids[order], attention_mask=mask[order], position_ids=positions[order])
        torch.testing.assert_close(turned, batch[:, order], rtol=1e-5, atol=1e-6)


def test_where_the_prompt_is_unknown_it_is_said() -> None:
    model = mixture().train()
    with pytest.raises(TrainingError, match="must know where the prompts end"):
        model(input_ids=IDS)
    with pytest.raises(TrainingError, match="row 0 of the batch has no prompt token"):
        model(input_ids=IDS, labels=IDS)
    model.eval()
    with pytest.raises(TrainingError, match="use_cache=False without prompt_mask"):
        model(input_ids=IDS, use_cache=False)
    with pytest.raises(TrainingError, match="use_cache=False without prompt_mask"):
        model.generate(IDS, attention_mask=MASK, max_new_tokens=2, do_sample=False, use_cache=False, pad_token_id=0)
    assert model(input_ids=IDS, prompt_mask=LABELS == -100, use_cache=False).logits.isfinite().all()
    with pytest.raises(TrainingError, match="do not belong together"):
        model(input_ids=IDS, prompt_mask=torch.ones(3, 5))


# --- generation ------------------------------------------------------------------------------------------------------------------------


def greedy(model: Any, ids: Tensor, mask: Tensor, tokens: int) -> Tensor:
    """What must be generated: full forwards of everything so far, routed by the prompt alone."""
    prompt = mask.clone()
    for _ in range(tokens):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            out = model(input_ids=ids, attention_mask=mask, position_ids=positions, prompt_mask=prompt, use_cache=False).logits
        ids = torch.cat([ids, out[:, -1:].argmax(-1)], 1)
        mask, prompt = (nn.functional.pad(one, (0, 1), value=value) for one, value in ((mask, 1), (prompt, 0)))
    return ids


def padded(side: str = "left") -> tuple[Tensor, Tensor]:
    ids, mask = IDS.clone(), MASK.clone()
    for row, length in enumerate((4, 8, 6)):
        at = slice(0, 8 - length) if side == "left" else slice(length, 8)
        ids[row, at], mask[row, at] = 0, 0
    return ids, mask


OPTIONS = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.mark.check("milora-mixture", 3)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_follows_the_route_of_the_prompt(cache: str) -> None:
    """Token by token what full forwards give whose routes are frozen from the prompt; a batch padded on the left."""
    model = mixture(gate="prob")
    ids, mask = padded()
    made = model.generate(
        ids, attention_mask=mask, cache_implementation=None if cache == "dynamic" else cache, disable_compile=True, **OPTIONS
    )
    assert torch.equal(made, greedy(model, ids, mask, 5))
    # and the route matters: with another one, other tokens come
    for gate in gates_of(model).values():
        gate.put(router=-gate.router)
    assert not torch.equal(model.generate(ids, attention_mask=mask, **OPTIONS), made)


@pytest.mark.check("milora-mixture", 3)
def test_generated_tokens_never_change_a_route() -> None:
    model = mixture(gate="prob")
    with torch.no_grad():
        cache = model(input_ids=IDS, use_cache=True).past_key_values
        routed = {name: c.clone() for name, c in cache.rankwise_routes.items()}
        other = copy.deepcopy(cache)
        full = model(input_ids=torch.cat([IDS, IDS[:, :2]], 1), prompt_mask=torch.cat([MASK, 0 * MASK[:, :2]], 1), use_cache=False).logits
        for step in range(2):
            out = model(input_ids=IDS[:, step : step + 1], past_key_values=cache, use_cache=True).logits
            torch.testing.assert_close(out[:, 0], full[:, 8 + step], rtol=1e-4, atol=1e-4)
        model(input_ids=(IDS[:, :1] + 1) % 67, past_key_values=other)
    for kept in (cache, other):
        assert all(torch.equal(kept.rankwise_routes[name], c) for name, c in routed.items())


def test_right_padding_generates_as_full_forwards_do() -> None:
    model = mixture(gate="prob")
    ids, mask = padded("right")
    made = model.generate(ids, attention_mask=mask, **OPTIONS)
    c = routes(model, input_ids=ids, attention_mask=mask)
    alone = torch.cat([routes(model, input_ids=IDS[row : row + 1, :length]) for row, length in enumerate((4, 8, 6))], 1)
    torch.testing.assert_close(c, alone, rtol=1e-4, atol=1e-5)
    assert torch.equal(made[1], greedy(model, ids[1:2], mask[1:2], 5)[0])


def test_beams_share_the_route_of_their_prompt() -> None:
    model = mixture(gate="prob")
    ids, mask = padded()
    made = model.generate(ids, attention_mask=mask, num_beams=3, length_penalty=0.0, **OPTIONS)
    for row in range(3):
        alone = model.generate(ids[row : row + 1], attention_mask=mask[row : row + 1], num_beams=3, length_penalty=0.0, **OPTIONS)
        assert torch.equal(made[row], alone[0])
    one = model.generate(ids, attention_mask=mask, num_beams=1, **OPTIONS)
    assert torch.equal(one, greedy(model, ids, mask, 5))


def test_routes_move_with_the_rows_of_the_cache() -> None:
    model = mixture(gate="prob")
    with torch.no_grad():
        cache = model(input_ids=IDS, use_cache=True).past_key_values
        before = {name: c.clone() for name, c in cache.rankwise_routes.items()}
        full = model(input_ids=torch.cat([IDS, IDS[:, :1]], 1), prompt_mask=torch.cat([MASK, 0 * MASK[:, :1]], 1), use_cache=False).logits
        cache.reorder_cache(torch.tensor([2, 0, 1]))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 2, 5]))
        order = torch.tensor([2, 0, 1])
        for name, c in cache.rankwise_routes.items():
            assert torch.equal(c, before[name][order])
        out = model(input_ids=IDS[order, :1], past_key_values=cache).logits
    torch.testing.assert_close(out[:, 0], full[order, 8], rtol=1e-4, atol=1e-4)
    assert type(cache).__name__ == "DynamicCache"


def test_more_than_one_token_on_a_routed_cache_is_refused_unless_asked_for() -> None:
    """Trap 3: chunked prefill, a second turn and assisted decoding look like decoding."""
    from transformers import DynamicCache

    model = mixture(gate="prob")
    with torch.no_grad():
        cache = model(input_ids=IDS, use_cache=True).past_key_values
        with pytest.raises(TrainingError, match="3 new tokens on a cache whose prompt was routed already"):
            model(input_ids=IDS[:, :3], past_key_values=cache)
        with pytest.raises(TrainingError, match="new tokens on a cache"):
            model.generate(IDS, attention_mask=MASK, prefill_chunk_size=4, **OPTIONS)
        mine = keep_routes(DynamicCache())
        model(input_ids=IDS, past_key_values=mine)
        out = model(input_ids=IDS[:, :3], past_key_values=mine).logits
        full = model(input_ids=torch.cat([IDS, IDS[:, :3]], 1), prompt_mask=torch.cat([MASK, 0 * MASK[:, :3]], 1), use_cache=False).logits
        torch.testing.assert_close(out, full[:, 8:], rtol=1e-4, atol=1e-4)
        with rw.disabled(model):
            plain = model(input_ids=IDS, use_cache=True).past_key_values
            model(input_ids=IDS[:, :1], past_key_values=plain)
        with pytest.raises(TrainingError, match="filled by another model or while the adapter was off"):
            model(input_ids=IDS[:, :1], past_key_values=plain)
        with pytest.raises(TrainingError, match="routes of 3 sequences and the call has 1"):
            model(input_ids=IDS[:1, :1], past_key_values=model(input_ids=IDS, use_cache=True).past_key_values)


# --- two levels ------------------------------------------------------------------------------------------------------------------------


def validation_batches() -> list[dict[str, Tensor]]:
    made = []
    for seed in (21, 22, 23):
        ids = token_ids(rows=2, length=6, seed=seed)
        made.append({"input_ids": ids, "labels": torch.cat([torch.full_like(ids[:, :3], -100), ids[:, 3:]], 1)})
    return made


def theta(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, (role, p) in roles_of(model).items() if role == "activation"}


def omega(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, (role, p) in roles_of(model).items() if role != "activation"}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[bool]:
    return [not torch.equal(after[name], value) for name, value in before.items()]


@pytest.mark.check("milora-mixture", 9)
def test_each_level_learns_from_its_own_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mixture(theta_mode="bilevel", theta_lr=1e-3).train()
    optimizer = rw.optimizer(model, lr=1e-2, validation=validation_batches(), weight_decay=0.1)
    running = optimizer.rankwise_session.running["routing"]  # type: ignore[attr-defined]
    assert {group["role"] for group in optimizer.param_groups} == {"down", "up", "gate", "activation"}
    at_first = theta(model), omega(model)
    model(input_ids=IDS, labels=LABELS).loss.backward()
    assert all(model.get_parameter(name).grad is None for name in theta(model))
    with monkeypatch.context() as patch:  # the training step alone
        patch.setattr(running, "on", lambda event, moment: None)
        optimizer.step()
    assert not any(moved(at_first[0], theta(model)))
    assert all(moved(at_first[1], omega(model)))
    between = omega(model)
    from rankwise.schedules import Moment

    running.on("step", Moment(1, optimizer))  # the validation step alone
    assert not any(moved(between, omega(model)))
    assert all(moved(at_first[0], theta(model)))
    assert all(model.get_parameter(name).grad is None for name in theta(model))
    assert running.report()["validation_loss"] > 0


def test_joint_and_frozen_activations() -> None:
    model = mixture(theta_mode="joint").train()
    optimizer = rw.optimizer(model, lr=1e-2)
    before = theta(model)
    assert len(before) == 4
    model(input_ids=IDS, labels=LABELS).loss.backward()
    optimizer.step()
    assert all(moved(before, theta(model)))
    model = mixture(theta_mode="frozen-gelu").train()
    assert theta(model) == {}
    (gate, *_) = gates_of(model).values()
    torch.testing.assert_close(gate.numerator, torch.tensor(GELU_NUMERATOR))
    with pytest.raises(TrainingError, match="theta_mode='bilevel' takes a step on validation rows"):
        rw.optimizer(mixture(theta_mode="bilevel"))
    model = mixture(theta_mode="bilevel")
    bare = rw.optimizer(model, validation=[])
    with pytest.raises(TrainingError, match="validation gave no batch"):
        bare.step()


@pytest.mark.parametrize("at", [1, 4])
def test_both_levels_resume_bit_for_bit(at: int) -> None:
    def begun() -> tuple[Any, Any]:
        model = mixture(theta_mode="bilevel", theta_lr=1e-2, dropout=0.1).train()
        return model, rw.optimizer(model, lr=1e-2, validation=validation_batches())

    def steps(model: Any, optimizer: Any, first: int, last: int) -> None:
        for step in range(first, last):
            torch.manual_seed(step)
            model(input_ids=IDS.roll(step, 1), labels=LABELS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    whole, stepping = begun()
    steps(whole, stepping, 0, 6)
    model, optimizer = begun()
    steps(model, optimizer, 0, at)
    session: Any = optimizer.rankwise_session
    kept = json.loads(json.dumps(session.state())), trainable_state(model), session.tensors(), copy.deepcopy(optimizer.state_dict())
    again, resumed = begun()
    session = resumed.rankwise_session
    session.restore(kept[0])
    load_trainable_state(again, kept[1])
    session.restore_tensors(kept[2])
    resumed.load_state_dict(kept[3])
    steps(again, resumed, at, 6)
    for name, value in trainable_state(whole).items():
        assert torch.equal(trainable_state(again)[name], value), name


# --- plan, files, export ---------------------------------------------------------------------------------------------------------------


@pytest.mark.check("milora-mixture", 10)
def test_counts_of_the_paper() -> None:
    """LLaMA-2-7B at rank 32; the paper's 80.9 M leaves the poolers out."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32))
    plan = rw.plan(model, rw.recipes.milora_mixture())
    assert plan.trained_parameters == 81_002_880 == 79_953_920 + 917_504 + 131_072 + 384
    assert rw.plan(model, rw.recipes.milora_mixture(pooler="average")).trained_parameters == 80_871_808


def test_saved_loaded_disabled_and_not_merged(tmp_path: Path) -> None:
    for storage in ("keep", "nf4"):
        model = rw.adapt(llama(), rw.recipes.milora_mixture(rank=4, storage=storage))
        before = logits(model, IDS)
        stirred(model)
        wanted = logits(model, IDS)
        assert (wanted - before).abs().max() > 1e-2
        rw.save(model, tmp_path / storage)
        again = rw.load(llama(), tmp_path / storage)
        assert torch.equal(logits(again, IDS), wanted)
        with rw.disabled(model):
            assert torch.equal(logits(model, IDS), before)
        with pytest.raises(rw.RankwiseError, match="cannot be merged: its update depends on the prompt"):
            rw.merge(model)
        assert torch.equal(logits(rw.unadapt(model), IDS), before)


def test_a_static_choice_is_a_plain_lora(tmp_path: Path) -> None:
    """Exact where all layers are on; layers that are off leave nothing to write."""
    model = mixture(k=7)
    export_lora(model, tmp_path / "all", mixture=uniform_mixture(model))
    assert (logits(rw.load(llama(), tmp_path / "all"), IDS) - logits(model, IDS)).abs().max() < 2e-5
    some = mixture(k=3, gate="hard")
    held = mean_mixture(some, [{"input_ids": IDS}])
    c = routes(some, input_ids=IDS)
    for index, block in enumerate(some.rankwise.plan.blocks):
        for column, name in enumerate(block.sites):
            torch.testing.assert_close(held.gates[name], c[index, :, column].mean()[None])
            spread = (c[index, :, column] - c[index, :, column].mean()).abs().mean()
            assert held.errors[name] == pytest.approx(float(spread), abs=1e-6)
    one = Mixture({name: (gates > 0.5).float() for name, gates in held.gates.items()}, {})
    export_lora(some, tmp_path / "some", mixture=one)
    on = [name for name, gates in one.gates.items() if gates.any()]
    assert set(adapted_sites(rw.load(llama(), tmp_path / "some"))) == set(on) != set(one.gates)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k=0 must be at least 1"),
        ({"balance": -1.0}, "balance=-1.0 .* must be at least 0"),
        ({"gate": "soft"}, "gate='soft' .* is unknown; use 'ste', 'prob', 'prob_renorm', 'hard'"),
        ({"pooler": "first"}, "pooler='first' .* is unknown"),
        ({"theta_mode": "none"}, "theta_mode='none' .* is unknown"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        rw.recipes.milora_mixture(**options)


def test_more_layers_than_a_block_has_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"k=3 .*, but model.layers.0 has 2 adapted layers"):
        rw.plan(llama(), rw.recipes.milora_mixture(rank=4, targets=["q_proj", "v_proj"]))


# --- rankwise train --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def test_a_run_from_yaml_resumes_bit_for_bit_and_generates(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rankwise.training.use import generate, open_adapter

    def config(name: str) -> dict[str, Any]:
        method = {"name": "milora-mixture", "theta_lr": 1e-3, "k": 2}
        plain = plain_config(world, "completion", tmp_path / name, method=method)
        plain["data"]["general"] = str(world / "general.jsonl")
        return plain

    whole = cut_and_resumed(config, monkeypatch, 4)
    lines = [json.loads(line) for line in (whole.run / "metrics.jsonl").read_text().splitlines()]
    assert all(line["routing_load"] > 0 and line["routing_validation_loss"] > 0 for line in lines)
    assert whole.after["task"]["loss"] < whole.before["task"]["loss"]
    assert generate(open_adapter(whole.run.root), "say 3", 4)["adapter"] is not None


def test_two_levels_without_evaluation_rows_are_refused(world: Path, tmp_path: Path) -> None:
    from rankwise.training.run import train

    plain = plain_config(world, "completion", tmp_path / "run", method={"name": "milora-mixture"})
    plain["data"] = str(world / "rows.jsonl")
    with pytest.raises(ConfigError, match=r"data\.eval is missing"):
        train(plain, console=silent_console())


def test_a_classifier_reads_its_whole_text(world: Path, tmp_path: Path) -> None:
    from rankwise.training.run import train

    method = {"name": "milora-mixture", "theta_mode": "joint"}
    plain = plain_config(world, "classification", tmp_path / "run", method=method, targets={"include": ["re:.*encoder.*"]})
    plain["train"] |= {"steps": 2, "checkpointing": True}
    done = train(plain, console=silent_console())
    assert done.steps == 2
