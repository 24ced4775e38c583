"""VeRA: trained vectors over a frozen random pair, and the projection that the sites of a group share."""

import copy
import gc
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch
from peft import VeraConfig, get_peft_model
from tiny_models import Attention, activation_bytes, dense_weight, llama, logits, one_linear, perturb, saved_tensors, site, token_ids
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rankwise as rw
from rankwise import sharing
from rankwise.sites import adapted_sites
from rankwise.updates.vera import draw_pair


def attention(rank: int = 6, seed: int = 0, move: bool = True, **fields: Any) -> Attention:
    model = Attention(seed=seed)
    rw.adapt(model, rw.recipes.vera(rank=rank, **fields))
    return perturb(model, size=1.0) if move else model  # type: ignore[return-value]


def dense_attention(model: Attention, x: Tensor) -> Tensor:
    """The same without rankwise: one dense weight per site."""
    x = model.norm(x)
    weights = {name: dense_weight(module) for name, module in adapted_sites(model).items()}
    return torch.cat([nn.functional.linear(x, weights[name], getattr(model, name).bias) for name in weights if name != model.skip], dim=-1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Records the shape of x at each GEMM with `down`."""
    seen: list[tuple[int, ...]] = []
    plain = sharing._Down.forward

    def counted(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        seen.append(tuple(x.shape))
        return plain(ctx, x, *rest)

    monkeypatch.setattr(sharing._Down, "forward", staticmethod(counted))
    return seen


def vectors(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.check("vera", 1)
def test_starts_at_the_base_and_moves_only_b_in_the_first_step() -> None:
    base, model = llama(), rw.adapt(llama(), rw.recipes.vera(rank=8))
    ids = token_ids()
    assert torch.equal(logits(model, ids), logits(base, ids))
    before = {name: p.detach().clone() for name, p in vectors(model).items()}
    optimizer = rw.optimizer(model, lr=4e-3, weight_decay=0.0)
    model(input_ids=ids, labels=ids).loss.backward()
    gradients = {name: p.grad.clone() for name, p in vectors(model).items() if p.grad is not None}
    optimizer.step()
    assert {name.rpartition(".")[2] for name in before} == {"b", "d"}
    for name, parameter in vectors(model).items():
        change = parameter.detach() - before[name]
        if name.endswith(".d"):
            assert not change.any()
        else:
            moved = gradients[name].abs() > 1e-6  # where AdamW's epsilon is small against the gradient
            assert moved.any()
            assert torch.allclose(change[moved], -4e-3 * gradients[name][moved].sign(), rtol=2e-2)


@pytest.mark.check("vera", 2)
@pytest.mark.parametrize("sharing", ["max-slice", "per-shape"])
def test_equals_the_dense_form_with_closed_form_gradients(sharing: str) -> None:
    model = attention(sharing=sharing)
    x = torch.randn(3, 5, 16, dtype=torch.float64, requires_grad=True)
    y, expected = model(x), dense_attention(model, x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    g = torch.randn_like(y)
    (dx,) = torch.autograd.grad(expected, x, g)
    y.backward(g)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, dx, rtol=1e-12, atol=1e-12)
    rows, offset = model.norm(x).detach().reshape(-1, 16), 0
    for module in adapted_sites(model).values():
        factors = module.update.factors()  # type: ignore[union-attr]
        down, up, d, b = (t.detach() for t in (factors.down, factors.up, factors.core, factors.tail))
        part = g.reshape(-1, 32)[:, offset : offset + len(b)]
        offset += len(b)
        k = part.T @ (rows @ down.T)  # (out, rank): one GEMM over the tokens for both vectors
        torch.testing.assert_close(module.update.b.grad, (k * up * d).sum(1), rtol=1e-12, atol=1e-12)  # type: ignore[union-attr]
        torch.testing.assert_close(module.update.d.grad, (b[:, None] * up * k).sum(0), rtol=1e-12, atol=1e-12)  # type: ignore[union-attr]
        assert module.update.b.grad.any()  # type: ignore[union-attr]
        assert module.update.d.grad.any()  # type: ignore[union-attr]


def peft_twin(rank: int, key: int = 0, **fields: Any) -> tuple[Any, Any]:
    """PEFT's VeRA and ours over one base, with the same vectors away from their start."""
    targets = ["q_proj", "v_proj", "down_proj"]
    theirs = get_peft_model(llama(), VeraConfig(r=rank, target_modules=targets, projection_prng_key=key, **fields)).eval()
    ours = rw.adapt(llama(), rw.recipes.vera(rank=rank, pool_seed=key, targets=targets))
    perturb(ours, size=1.0)
    with torch.no_grad():
        for name, module in adapted_sites(ours).items():
            layer = theirs.base_model.model.get_submodule(name)
            layer.vera_lambda_d["default"].copy_(module.update.d)  # type: ignore[union-attr]
            layer.vera_lambda_b["default"].copy_(module.update.b)  # type: ignore[union-attr]
    return theirs, ours


@pytest.mark.check("vera", 3)
@pytest.mark.parametrize(("rank", "key"), [(1, 0), (6, 0), (100, 3)])
def test_pool_is_pefts_bit_for_bit(rank: int, key: int) -> None:
    theirs, ours = peft_twin(rank, key)
    down, up = theirs.base_model.vera_A["default"], theirs.base_model.vera_B["default"]
    assert (down.shape, up.shape) == ((rank, 48), (32, rank))
    for module in adapted_sites(ours).values():
        factors = module.update.factors()  # type: ignore[union-attr]
        assert torch.equal(factors.down, down[:, : module.in_features])
        assert torch.equal(factors.up, up[: module.out_features])


@pytest.mark.check("vera", 3)
def test_forward_and_gradients_are_pefts() -> None:
    theirs, ours = peft_twin(6)
    ids = token_ids()
    torch.testing.assert_close(logits(ours, ids), logits(theirs, ids), rtol=1e-5, atol=1e-5)
    ours(input_ids=ids, labels=ids).loss.backward()
    theirs(input_ids=ids, labels=ids).loss.backward()
    for name, module in adapted_sites(ours).items():
        layer = theirs.base_model.model.get_submodule(name)
        for mine, other in ((module.update.d, layer.vera_lambda_d), (module.update.b, layer.vera_lambda_b)):  # type: ignore[union-attr]
            assert mine.grad is not None
            assert mine.grad.any()
            torch.testing.assert_close(mine.grad, other["default"].grad, rtol=1e-4, atol=1e-6)


@pytest.mark.check("vera", 4)
def test_pool_is_kaiming_uniform() -> None:
    down, up = draw_pair(256, 1024, 768, seed=0)
    for matrix, fan_in in ((down, 1024), (up, 256)):
        bound = (6 / fan_in) ** 0.5
        assert 0.999 * bound < matrix.abs().max() <= bound
        assert float(matrix.var()) == pytest.approx(2 / fan_in, rel=0.02)
        assert abs(float(matrix.mean())) < 0.01 * bound


@pytest.mark.check("vera", 5)
def test_one_pool_for_the_model() -> None:
    base, rank = llama(), 24
    size = sum(t.nbytes for t in [*base.parameters(), *base.buffers()])
    model = rw.adapt(base, rw.recipes.vera(rank=rank))
    sites = adapted_sites(model).values()
    factors = [module.update.factors() for module in sites]  # type: ignore[union-attr]
    assert len({f.down.data_ptr() for f in factors}) == 1
    assert len({f.up.data_ptr() for f in factors}) == 1
    grown = sum(t.nbytes for t in [*model.parameters(), *model.buffers()]) - size
    trained = sum(p.nbytes for p in vectors(model).values())
    assert grown - trained == 4 * rank * (48 + 48)
    assert not any("pool" in name for name in [*dict(model.named_parameters()), *model.state_dict()])


def test_pool_of_a_bf16_base_is_bf16() -> None:
    """Two bytes a number: the largest thing the method adds."""
    model = rw.adapt(llama(dtype=torch.bfloat16), rw.recipes.vera(rank=24))
    buffers = {name: buffer for name, buffer in model.named_buffers() if "pool" in name}
    assert sum(buffer.nbytes for buffer in buffers.values()) == 2 * 24 * (48 + 48)
    assert all(p.dtype == torch.float32 for p in vectors(model).values())


# --- one projection for a group --------------------------------------------------------------------------------------------------------


@pytest.mark.check("vera", 6)
def test_a_group_saves_one_projection_and_runs_one_gemm(calls: list[tuple[int, ...]]) -> None:
    rank, tokens = 6, 10
    model = rw.adapt(Attention(dtype=torch.float32).to(torch.bfloat16), rw.recipes.vera(rank=rank))
    x = torch.randn(2, 5, 16, dtype=torch.bfloat16)
    model.norm.to(torch.bfloat16)
    normed = model.norm(x)
    with saved_tensors() as sizes:
        y = sum(module(normed).float().sum() for module in adapted_sites(model).values())
    assert activation_bytes(sizes, model) == 2 * tokens * rank
    assert len(calls) == 1
    y.backward()  # type: ignore[union-attr]


@pytest.mark.check("vera", 6)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_gemm_count_in_a_whole_model(calls: list[tuple[int, ...]], checkpointed: bool) -> None:
    """Per block: one for q, k, v and one for gate and up (o and down stand alone); under checkpointing once more in the recomputation."""
    model = rw.adapt(llama(), rw.recipes.vera(rank=6)).train()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    plain = perturb(rw.adapt(llama(), rw.recipes.vera(rank=6)), size=1.0)
    perturb(model, size=1.0)
    ids = token_ids()
    plain(input_ids=ids, labels=ids).loss.backward()
    calls.clear()
    model(input_ids=ids, labels=ids).loss.backward()
    assert len(calls) == 2 * 2 * (1 + checkpointed)
    for mine, other in zip(vectors(model).values(), vectors(plain).values(), strict=True):
        assert mine.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-5, atol=1e-7)
    calls.clear()
    logits(model.eval(), ids)
    assert len(calls) == 2 * 2


@pytest.mark.check("vera", 6)
def test_two_checkpointed_forwards_before_a_backward() -> None:
    model, twin = attention(), attention()
    first, second = (torch.randn(4, 16, dtype=torch.float64, requires_grad=True) for _ in range(2))
    (checkpoint(model, first, use_reentrant=False).square().sum() + checkpoint(model, second, use_reentrant=False).cos().sum()).backward()
    (dense_like(twin, first).square().sum() + dense_like(twin, second).cos().sum()).backward()
    for mine, other in zip(vectors(model).values(), vectors(twin).values(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-11, atol=1e-11)


def dense_like(model: Attention, x: Tensor) -> Tensor:
    """The model in plain autograd, every member with a projection of its own."""
    x = model.norm(x)
    rows = []
    for module in adapted_sites(model).values():
        factors = module.update.factors()  # type: ignore[union-attr]
        weight = module.base_layer.weight + factors.delta()
        rows.append(nn.functional.linear(x, weight, module.bias))
    return torch.cat(rows, dim=-1)


@pytest.mark.check("vera", 6)
@pytest.mark.parametrize("skip", ["q_proj", "k_proj", "v_proj"])
def test_a_skipped_member_leaves_nothing_behind(skip: str) -> None:
    model = attention()
    model.skip = skip
    x = torch.randn(4, 16, dtype=torch.float64)
    for _ in range(2):  # the same tensor object twice
        torch.testing.assert_close(model(x), dense_attention(model, x), rtol=1e-12, atol=1e-12)
        model(x).sum().backward()
    model.skip = ""
    torch.testing.assert_close(model(x), dense_attention(model, x), rtol=1e-12, atol=1e-12)


def test_a_member_skipped_in_every_forward_over_one_leaf() -> None:
    """Without a norm before it the very same tensor object comes back: the second forward needs a projection of its own."""
    model = attention()
    x = torch.randn(4, 16, dtype=torch.float64, requires_grad=True)
    for _ in range(3):
        (model.q_proj(x).sum() + model.k_proj(x).sum()).backward()
    model.q_proj(x).sum().backward()
    model.k_proj(x).sum().backward()  # after the graph of q has been used up
    model.v_proj(x).sum().backward()
    assert x.grad is not None
    expected = 4 * (dense_weight(site(model, "q_proj")).sum(0) + dense_weight(site(model, "k_proj")).sum(0))
    expected = expected + dense_weight(site(model, "v_proj")).sum(0)
    torch.testing.assert_close(x.grad, expected.expand_as(x), rtol=1e-11, atol=1e-11)


@pytest.mark.check("vera", 6)
def test_two_models_interleaved(calls: list[tuple[int, ...]]) -> None:
    one, two = attention(), attention()
    perturb(two, seed=11, size=1.0)
    x = torch.randn(4, 16, dtype=torch.float64)
    got = {}
    for name in ("q_proj", "k_proj", "v_proj"):
        got[1, name], got[2, name] = getattr(one, name)(x), getattr(two, name)(x)
    assert len(calls) == 2
    for number, model in ((1, one), (2, two)):
        for name, module in adapted_sites(model).items():
            expected = nn.functional.linear(x, dense_weight(module), module.bias)
            torch.testing.assert_close(got[number, name], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.check("vera", 6)
def test_after_an_exception_in_the_middle_of_a_forward() -> None:
    model = attention()
    x = torch.randn(4, 16, dtype=torch.float64)

    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle")

    handle = model.k_proj.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        model(x)
    with pytest.raises(RuntimeError, match="in the middle"):
        torch.cat([model.q_proj(x), model.k_proj(x)])
    handle.remove()
    x.mul_(2)
    for name, module in adapted_sites(model).items():
        expected = nn.functional.linear(x, dense_weight(module), module.bias)
        torch.testing.assert_close(getattr(model, name)(x), expected, rtol=1e-12, atol=1e-12)


def test_x_changed_in_place_between_two_members() -> None:
    model = attention()
    x = torch.randn(4, 16, dtype=torch.float64)
    with torch.no_grad():
        first = model.q_proj(x)
        x.mul_(3)
        second = model.k_proj(x)
        x.sub_(1)
        third = model.v_proj(x)
    for name, y, seen in (("q_proj", first, (x + 1) / 3), ("k_proj", second, x + 1), ("v_proj", third, x)):
        module = site(model, name)
        torch.testing.assert_close(y, nn.functional.linear(seen, dense_weight(module), module.bias), rtol=1e-11, atol=1e-11)


def test_x_changed_in_place_in_inference_mode() -> None:
    """Such tensors have no version counter."""
    model = attention()
    with torch.inference_mode():
        x = torch.randn(4, 16, dtype=torch.float64)
        model.q_proj(x)
        x.mul_(3)
        module = site(model, "k_proj")
        torch.testing.assert_close(model.k_proj(x), nn.functional.linear(x, dense_weight(module), module.bias), rtol=1e-12, atol=1e-12)


def test_a_freed_x_whose_address_is_used_again() -> None:
    model = attention()
    module = site(model, "k_proj")
    addresses = []
    with torch.no_grad():
        for step in range(100):
            x = torch.full((4, 16), float(step), dtype=torch.float64)
            addresses.append(id(x))
            if step % 2 == 0:
                model.q_proj(x)
            else:
                torch.testing.assert_close(
                    model.k_proj(x), nn.functional.linear(x, dense_weight(module), module.bias), rtol=1e-12, atol=1e-12
                )
            del x
    assert len(set(addresses)) < 100  # or the test would show nothing


def test_the_projection_goes_with_x() -> None:
    """A skipped member must not keep activations, or the graph behind them, alive until the next forward."""
    model = attention()
    x = torch.randn(4, 16, dtype=torch.float64, requires_grad=True)
    hidden = model.norm(x)
    alive = weakref.ref(hidden)
    y = model.q_proj(hidden)
    group = model.q_proj.shared.group
    assert group._made.value is not None
    del hidden, y
    gc.collect()
    assert alive() is None
    assert group._made.value is None
    model(x)
    assert group._made.value is None  # every member has taken it


def test_checkpointing_that_stops_early_leaves_nothing() -> None:
    model = attention()
    x = torch.randn(4, 16, dtype=torch.float64, requires_grad=True)
    checkpoint(model, x, use_reentrant=False).sum().backward()
    gc.collect()
    assert model.q_proj.shared.group._made.value is None


def test_gradient_mode_and_requires_grad_switched_between_members() -> None:
    model = attention()
    x = torch.randn(4, 16, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        model.q_proj(x)
    model.k_proj(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, dense_weight(site(model, "k_proj")).sum(0).expand_as(x), rtol=1e-12, atol=1e-12)
    late = torch.randn(4, 16, dtype=torch.float64)
    model.q_proj(late)
    late.requires_grad_()
    model.k_proj(late).sum().backward()
    assert late.grad is not None
    torch.testing.assert_close(late.grad, dense_weight(site(model, "k_proj")).sum(0).expand_as(x), rtol=1e-12, atol=1e-12)


def test_dtype_switched_between_members() -> None:
    model = rw.adapt(Attention(dtype=torch.float32), rw.recipes.vera(rank=6))
    perturb(model, size=1.0)
    x = torch.randn(4, 16)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert model.q_proj(x).dtype == torch.bfloat16
        y = model.k_proj(x)
    assert y.dtype == torch.float32
    module = site(model, "k_proj")
    torch.testing.assert_close(y, nn.functional.linear(x, dense_weight(module).float(), module.bias), rtol=1e-5, atol=1e-6)


def test_threads_do_not_see_each_others_projection() -> None:
    model = attention()
    wrong: list[str] = []
    barrier = threading.Barrier(2, timeout=60)

    def run(seed: int) -> None:
        x = torch.randn(4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():  # a mode of the thread
            for _ in range(20):
                barrier.wait()
                for name, module in adapted_sites(model).items():
                    y = getattr(model, name)(x)
                    barrier.wait()
                    if not torch.allclose(y, nn.functional.linear(x, dense_weight(module), module.bias), rtol=1e-12, atol=1e-12):
                        wrong.append(name)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def branch(model: Attention, x: Tensor, name: str) -> Tensor:
    """What the branch adds at one site."""
    return (getattr(model, name)(x) - getattr(model, name).base_layer(x)).detach()


def test_one_dropout_mask_for_a_group_and_a_new_one_for_each_forward() -> None:
    model = attention(dropout=0.5, rank=16).train()
    x = torch.randn(4, 16, dtype=torch.float64)

    def branches() -> dict[str, Tensor]:
        got = {name: branch(model, x, name) / site(model, name).update.b for name in ("k_proj", "v_proj")}  # type: ignore[union-attr]
        model.q_proj(x)
        return {name: value.detach() for name, value in got.items()}

    with torch.no_grad():  # equal vectors at k and v: equal branches exactly where the masks are equal
        site(model, "v_proj").update.d.copy_(site(model, "k_proj").update.d)  # type: ignore[union-attr]
    first, second = branches(), branches()
    torch.testing.assert_close(first["k_proj"], first["v_proj"], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(second["k_proj"], second["v_proj"], rtol=1e-11, atol=1e-12)
    assert not torch.allclose(first["k_proj"], second["k_proj"])
    # a member that is skipped every time does not freeze the mask of the others
    masks = [branch(model, x, "k_proj") for _ in range(3)]
    assert not torch.allclose(masks[0], masks[1])
    assert not torch.allclose(masks[1], masks[2])


@pytest.mark.parametrize("apart", [False, True])
def test_dropout_under_checkpointing(apart: bool) -> None:
    """The recomputation draws the same mask, also where every member is a region of its own."""
    gradients = []
    for use in (False, True):
        model = attention(dropout=0.5).train()
        x = torch.randn(4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
        torch.manual_seed(7)
        if not apart:
            y = checkpoint(model, x, use_reentrant=False) if use else model(x)
        else:  # separate masks in both cases: each call gets a tensor of its own, or a region of its own
            parts = [getattr(model, name) for name in ("q_proj", "k_proj", "v_proj")]
            y = torch.cat([checkpoint(part, x, use_reentrant=False) if use else part(x.view_as(x)) for part in parts], dim=-1)
        y.square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in vectors(model).values())])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=1e-12, atol=1e-12)


def test_a_member_inside_and_another_outside_a_checkpointed_region() -> None:
    """The recomputation must save as many tensors as the forward did, whoever made the projection."""
    for inside, outside in (("q_proj", "k_proj"), ("k_proj", "q_proj")):
        model = attention()
        x = torch.randn(4, 16, dtype=torch.float64, requires_grad=True)
        y = getattr(model, outside)(x).sum()
        y = y + checkpoint(getattr(model, inside), x, use_reentrant=False).sum() + model.v_proj(x).sum()
        y.backward()
        assert x.grad is not None
        expected = sum(dense_weight(module).sum(0) for module in adapted_sites(model).values())
        torch.testing.assert_close(x.grad, expected.expand_as(x), rtol=1e-11, atol=1e-11)  # type: ignore[union-attr]


def test_copies_share_within_themselves_only(calls: list[tuple[int, ...]]) -> None:
    model = attention()
    x = torch.randn(4, 16, dtype=torch.float64)
    model.q_proj(x)  # leaves a projection behind that nobody has finished taking
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        groups = {id(getattr(other, name).shared.group) for name in ("q_proj", "k_proj", "v_proj")}
        assert len(groups) == 1
        assert groups != {id(model.q_proj.shared.group)}
        calls.clear()
        perturb(other, seed=23, size=1.0)
        torch.testing.assert_close(other(x), dense_attention(other, x), rtol=1e-12, atol=1e-12)
        assert len(calls) == 1


def test_members_of_different_rank_do_not_share() -> None:
    model = attention(rank_pattern={"k_proj": 3})
    x = torch.randn(4, 16, dtype=torch.float64)
    torch.testing.assert_close(model(x), dense_attention(model, x), rtol=1e-12, atol=1e-12)


# --- counts, conversion, seed ----------------------------------------------------------------------------------------------------------


@pytest.mark.check("vera", 7)
def test_paper_counts() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaModel

    with torch.device("meta"):
        roberta = RobertaModel(RobertaConfig(vocab_size=100))
        seven = LlamaForCausalLM(LlamaConfig(vocab_size=100))
        thirteen = LlamaForCausalLM(
            LlamaConfig(vocab_size=100, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40)
        )
    assert rw.plan(roberta, rw.recipes.vera(rank=1024, targets=["query", "value"])).trained_parameters == 43_008
    assert rw.plan(seven, rw.recipes.vera(rank=1024)).trained_parameters == 1_589_248
    assert rw.plan(thirteen, rw.recipes.vera(rank=1024)).trained_parameters == 2_416_640


@pytest.mark.check("vera", 8)
def test_conversion_to_lora_and_merge() -> None:
    model = attention()
    x = torch.randn(4, 16, dtype=torch.float64)
    y = model(x)
    for name, module in adapted_sites(model).items():
        factors = module.update.factors()  # type: ignore[union-attr]
        assert factors.scaling == 1.0
        down, up = factors.core[:, None] * factors.down, factors.tail[:, None] * factors.up  # type: ignore[index]
        plain = one_linear(module.base_layer.weight.detach(), module.bias)
        rw.adapt(plain, rw.recipes.lora(rank=6, alpha=6))
        site(plain).update.put(down=down, up=up)  # type: ignore[union-attr]
        expected = getattr(model, name)(model.norm(x))
        torch.testing.assert_close(plain(model.norm(x)), expected, rtol=1e-12, atol=1e-12)
    rw.merge(model)
    torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)


@pytest.mark.check("vera", 9)
def test_same_seed_gives_the_same_pool_whatever_the_global_state() -> None:
    """The pool is drawn on the CPU, whatever device the model is on."""
    torch.manual_seed(1)
    one = rw.adapt(llama(), rw.recipes.vera(rank=6))
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    two = rw.adapt(llama(), rw.recipes.vera(rank=6))
    other = rw.adapt(llama(), rw.recipes.vera(rank=6, pool_seed=1))
    name = "model.layers.0.self_attn.q_proj"
    pairs = [site(model, name).update.factors() for model in (one, two, other)]  # type: ignore[union-attr]
    assert torch.equal(pairs[0].down, pairs[1].down)
    assert torch.equal(pairs[0].up, pairs[1].up)
    assert not torch.equal(pairs[0].down, pairs[2].down)
    assert state.shape == torch.random.get_rng_state().shape


@pytest.mark.check("vera", 10)
def test_vectors_and_seed_are_all_that_is_needed() -> None:
    """The part of the Check that needs no file: a fresh model with the recipe and the trained vectors gives identical logits."""
    recipe = rw.recipes.vera(rank=6, pool_seed=4)
    model = perturb(rw.adapt(llama(), recipe), size=1.0)
    trained = {name: p.detach().clone() for name, p in vectors(model).items()}
    fresh = rw.adapt(llama(), rw.Recipe.from_dict(recipe.to_dict()))
    fresh.load_state_dict(trained, strict=False)
    assert torch.equal(logits(fresh, token_ids()), logits(model, token_ids()))


def test_rank_above_both_sides_is_allowed_and_trains() -> None:
    model = rw.adapt(llama(), rw.recipes.vera(rank=100))
    ids = token_ids()
    optimizer = rw.optimizer(model, lr=4e-2)
    losses = []
    for _ in range(5):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
