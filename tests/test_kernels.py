"""Fast paths beside their references: dropout, remade inputs, norms, gated products, and the loss over a frozen head."""

import copy
import itertools
import math
import pickle
from typing import Any

import pytest
import torch
from family_models import FAMILIES
from helpers import gradients, moved
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import VOCABULARY, llama, token_ids
from torch import Tensor, nn

import rankwise as rw
from rankwise.errors import TargetError
from rankwise.kernels import head_loss as head_loss_module
from rankwise.kernels.dropout import Dropped, drop, fallen_positions
from rankwise.kernels.gain import gain_gradient, times_gain
from rankwise.kernels.gated import ACTIVATIONS, gated, reference_gated
from rankwise.kernels.head_loss import head_loss, reference_head_loss
from rankwise.kernels.norm import normed, reference_normed
from rankwise.kernels.remade import Memo, offer, source_of
from rankwise.lean import Lean
from rankwise.storage.dense import DENSE

DTYPES = (torch.float32, torch.bfloat16)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


# --- dropout ---------------------------------------------------------------------------------------------------------------------------


@given(numel=st.integers(0, 3000), p=st.floats(0.001, 0.24), seed=st.integers(0, 2**62))
@settings(max_examples=60, deadline=None)
def test_fallen_positions_are_ascending_and_inside(numel: int, p: float, seed: int) -> None:
    found = fallen_positions(numel, p, seed)
    assert bool((found[1:] > found[:-1]).all())
    assert not len(found) or (int(found[0]) >= 0 and int(found[-1]) < numel)
    assert torch.equal(found, fallen_positions(numel, p, seed))


@pytest.mark.parametrize("p", [0.05, 0.2, 0.5])
def test_elements_fall_out_independently_with_the_probability_that_was_asked_for(p: float) -> None:
    """Counts, neighbours and the two ends of a million elements, each within five standard deviations."""
    n = 1_000_000
    fell = (drop(torch.ones(n), p, 7) == 0).double()
    assert abs(float(fell.mean()) - p) < 5 * math.sqrt(p * (1 - p) / n)
    pairs = float((fell[1:] * fell[:-1]).mean())
    assert abs(pairs - p * p) < 5 * math.sqrt(p * p * (1 - p * p) * 3 / n)
    ends = torch.stack([torch.stack([drop(torch.ones(9), p, seed)[i] == 0 for i in (0, 8)]) for seed in range(4000)]).double().mean(0)
    assert bool(((ends - p).abs() < 5 * math.sqrt(p * (1 - p) / 4000)).all())


def test_positions_go_on_where_one_draw_was_too_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six standard deviations are never missed in a test: so the number of gaps in a draw is made too small."""
    import rankwise.kernels.dropout as module

    monkeypatch.setattr(module.math, "sqrt", lambda value: -value / 6)  # every draw then has 16 gaps
    found = fallen_positions(5000, 0.2, 3)
    assert 800 < len(found) < 1200
    assert bool((found[1:] > found[:-1]).all())


def test_what_stays_is_scaled_and_one_mask_serves_any_dtype_and_layout() -> None:
    x = random(6, 10)
    mask = Dropped(60, 0.2, 5, x.device)
    kept = mask.of(x)
    assert torch.equal(kept[kept != 0], (x * 1.25)[kept != 0])
    assert torch.equal(mask.of(x.double()) == 0, kept == 0)
    across = random(10, 6).T  # not contiguous: positions count rows of what is seen, not of memory
    assert torch.equal(mask.of(across) == 0, kept == 0)


class Siblings(nn.Module):
    """Three layers that read one input, and one that reads another."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        return self.o_proj(self.q_proj(x) + self.k_proj(x) + self.v_proj(x))


def siblings() -> nn.Module:
    torch.manual_seed(0)
    return moved(rw.adapt(Siblings(), rw.recipes.lora(rank=2, dropout=0.1, targets="all-linear"))).train()


def test_sites_that_read_one_input_share_a_draw_and_every_forward_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from rankwise.kernels import dropout

    seeds: list[int] = []
    draw = dropout.draw_seed
    monkeypatch.setattr(dropout, "draw_seed", lambda: seeds.append(draw()) or seeds[-1])
    model, x = siblings(), random(5, 64)
    first, second = model(x), model(x)
    assert len(set(seeds)) == len(seeds) == 4  # q, k and v one, o one, in each of two forwards over the very same tensor
    assert not torch.equal(first, second)
    seeds.clear()
    x.add_(1)
    model(x)
    assert len(seeds) == 2


@pytest.mark.parametrize("around", ["block", "second"])
def test_a_draw_does_not_cross_the_border_of_a_checkpointed_region(around: str) -> None:
    """What is run again draws what it drew, also where a sibling stands outside: gradients are those of the loss that was computed."""
    from torch.utils.checkpoint import checkpoint

    model, x, along = siblings().double(), random(5, 64).double(), random(5, 64, seed=1).double()

    def loss(x: Tensor) -> Tensor:
        torch.manual_seed(7)
        if around == "block":
            return checkpoint(model, x, use_reentrant=False).square().sum()
        first = model.q_proj(x)  # type: ignore[operator]
        inside = checkpoint(lambda x: model.k_proj(x) + model.v_proj(x), x, use_reentrant=False)  # type: ignore[operator]
        return model.o_proj(first + inside).square().sum()  # type: ignore[operator]

    leaf = x.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(loss(leaf), leaf)
    step = 1e-6
    # with gradients on, or checkpointing would do nothing and other draws would be shared
    up, down = (float(loss((x + sign * step * along).requires_grad_(True)).detach()) for sign in (1, -1))
    assert float((slope * along).sum()) == pytest.approx((up - down) / (2 * step), rel=1e-6)


# --- gains -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "far", "biased", "rows"), itertools.product(DTYPES, (0.0, 0.1, 3.0), (False, True), (1, 3, 700)))
def test_rows_times_a_gain_are_rounded_once(dtype: torch.dtype, far: float, biased: bool, rows: int) -> None:
    """Against fp64: half a step of the dtype, and an eighth of it for the rounding of gain - 1; nothing at all at gain 1."""
    y, bias = random(rows, 100, dtype=dtype), random(100, seed=1, dtype=dtype) if biased else None
    gain = 1 + far * (2 * torch.rand(100, generator=torch.Generator().manual_seed(2)) - 1)
    found = times_gain(y, gain, bias)
    shift = 0 if bias is None else bias.double()
    wanted = gain.double() * (y.double() - shift) + shift
    steps = 1.2 * torch.finfo(dtype).eps / 2 * wanted.abs() + 4 * torch.finfo(torch.float32).eps * (gain.double() * y.double()).abs().max()
    assert bool(((found.double() - wanted).abs() <= steps).all())
    assert far > 0 or torch.equal(found, y)
    g = random(rows, 100, seed=3, dtype=dtype)
    exact = ((y.double() - shift) * g.double()).sum(0)
    assert relative(gain_gradient(y, g, gain, bias), exact) < 1e-6


# --- norms, gated products, remade inputs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "one_plus", "rows", "width"), itertools.product(DTYPES, (False, True), (1, 7), (5, 96)))
def test_a_norm_equals_plain_autograd(dtype: torch.dtype, one_plus: bool, rows: int, width: int) -> None:
    x, weight, g = random(2, rows, width, dtype=dtype), random(width, seed=1, dtype=dtype), random(2, rows, width, seed=2, dtype=dtype)
    fast, plain = x.clone().requires_grad_(True), x.clone().requires_grad_(True)
    y = normed(fast, weight, 1e-5, one_plus)
    wanted = reference_normed(plain, weight, 1e-5, one_plus)
    assert torch.equal(y, wanted)
    y.backward(g)
    wanted.backward(g)
    wide = x.double().requires_grad_(True)
    scale = 1 + weight.double() if one_plus else weight.double()
    (scale * wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()).backward(g.double())
    assert fast.grad is not None
    assert plain.grad is not None
    assert wide.grad is not None
    tight = 1e-6 if dtype is torch.float32 else 4e-3
    assert relative(fast.grad, wide.grad) < tight
    # not farther from the truth than autograd over the rounded steps
    assert relative(fast.grad, wide.grad) <= 1.5 * relative(plain.grad, wide.grad) + 1e-7


@pytest.mark.parametrize(("dtype", "activation", "width"), itertools.product(DTYPES, ACTIVATIONS, (1, 33)))
def test_a_gated_product_equals_plain_autograd_bit_for_bit(dtype: torch.dtype, activation: str, width: int) -> None:
    tensors = [random(3, 5, width, seed=seed, dtype=dtype) for seed in range(2)]
    g = random(3, 5, width, seed=2, dtype=dtype)
    fast, plain = ([t.clone().requires_grad_(True) for t in tensors] for _ in range(2))
    y, wanted = gated(fast[0], fast[1], activation), reference_gated(plain[0], plain[1], activation)
    assert torch.equal(y, wanted)
    y.backward(g)
    wanted.backward(g)
    for mine, theirs in zip(fast, plain, strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert torch.equal(mine.grad, theirs.grad)


def test_an_input_is_remade_once_for_all_that_take_it_and_again_for_a_second_backward() -> None:
    made = []

    def remake(memo: Memo, a: Tensor) -> Tensor:
        made.append(1)
        return a * 2

    a = torch.ones(3)
    x = offer(a * 2, Memo(remake), a)
    sources = [source_of(x) for _ in range(3)]
    for _ in range(2):
        for source in sources:
            assert source is not None
            assert torch.equal(source.memo.get(*source.tensors), x)
    assert len(made) == 2
    assert sources[0] is not None
    assert sources[0].memo.made is None  # and let go of after the last


def test_an_input_that_somebody_wrote_to_is_kept_instead() -> None:
    x = offer(torch.ones(3), Memo(lambda memo, a: a), torch.ones(3))
    x.mul_(3)
    assert source_of(x) is None


# --- the layers of a model -------------------------------------------------------------------------------------------------------------

LEAN = {"llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "phi3", "mixtral"}


def lean_forms(model: nn.Module) -> list[str]:
    return [module.__dict__["forward"].form for module in model.modules() if isinstance(module.__dict__.get("forward"), Lean)]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_lean_layers_change_no_value_and_no_gradient(family: str) -> None:
    """Every family, lean or not, against the same adapters over layers with their own forwards."""
    make, batch, fields = FAMILIES[family]
    base = make()
    targets = fields.get("targets", "all-linear")
    model = moved(rw.adapt(base, rw.recipes.lora(rank=2, **{**fields, "targets": targets})))
    assert bool(lean_forms(model)) == (family in LEAN), lean_forms(model)
    model.train()
    fast = gradients(model, batch())
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), Lean):
            del module.__dict__["forward"]
    plain = gradients(model, batch())
    assert fast[0] == plain[0]
    assert fast[1].keys() == plain[1].keys()
    assert all(relative(fast[1][name], plain[1][name]) < 1e-5 for name in plain[1] if float(plain[1][name].norm()) > 1e-12)


@pytest.mark.parametrize("method", ["lora", "dora", "moslora", "adalora", "pissa", "vera", "loramoe", "propulsion", "lora_fa"])
def test_every_kind_of_update_trains_the_same_over_lean_layers_and_checkpointed_blocks(method: str) -> None:
    options: dict[str, Any] = {} if method in ("propulsion",) else {"rank": 2}
    model = moved(rw.adapt(llama(), getattr(rw.recipes, method)(targets="all-linear", **options))).train()
    batch = {"input_ids": token_ids(), "labels": token_ids()}
    fast = gradients(model, batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    again = gradients(model, batch)
    model.gradient_checkpointing_disable()  # type: ignore[operator]
    forwards = {module: module.__dict__.pop("forward") for module in model.modules() if isinstance(module.__dict__.get("forward"), Lean)}
    assert forwards
    plain = gradients(model, batch)
    for other in (again, plain):
        assert fast[0] == pytest.approx(other[0], rel=1e-6)
        assert all(relative(fast[1][name], other[1][name]) < 1e-4 for name in other[1] if float(other[1][name].norm()) > 1e-9)


def saved_bytes(model: nn.Module, batch: dict[str, Tensor]) -> int:
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    total = sum(seen.values())
    del loss
    return total


def test_a_layer_keeps_its_residual_gate_and_up_and_little_else() -> None:
    """Bytes by count: a bf16 Llama block keeps two residuals, q, k, v, the attention's output, gate, up, and rank-sized tensors."""
    hidden, inner, tokens, rank = 32, 48, 2 * 40, 2
    model = rw.adapt(
        llama(dtype=torch.bfloat16, num_key_value_heads=4, attention_bias=False), rw.recipes.lora(rank=rank, targets="all-linear")
    )
    rw.fuse_loss(model.train())
    ids = token_ids(2, 40)
    batch = {"input_ids": ids, "labels": ids}
    more = llama(dtype=torch.bfloat16, num_key_value_heads=4, attention_bias=False, num_hidden_layers=3)
    deeper = rw.fuse_loss(rw.adapt(more, rw.recipes.lora(rank=rank, targets="all-linear")).train())
    a_block = saved_bytes(deeper, batch) - saved_bytes(model, batch)
    counted = 2 * tokens * (2 * hidden + 4 * hidden + 2 * inner + 7 * rank)
    small = 4 * tokens * (2 + 4) + 2 * 2 * tokens * hidden // 4  # rstd of two norms, log-sum-exp of four heads
    assert counted <= a_block <= counted + small, (a_block, counted)


def test_copies_and_pickles_stay_lean_and_unadapt_gives_the_forwards_back() -> None:
    model = rw.adapt(llama(), rw.recipes.lora(rank=2))
    copied = copy.deepcopy(model)
    lean = [module for module in copied.modules() if isinstance(module.__dict__.get("forward"), Lean)]
    assert lean
    assert all(module.__dict__["forward"].module is module for module in lean)
    loaded = pickle.loads(pickle.dumps(model))
    assert torch.equal(loaded(token_ids()).logits, model(token_ids()).logits)
    assert lean_forms(loaded) == lean_forms(model)
    rw.unadapt(model)
    assert not lean_forms(model)


def test_a_norm_that_trains_gets_its_gradient() -> None:
    model = moved(rw.adapt(llama(), rw.recipes.lora(rank=2, modules_to_save=["norm"]))).train()
    _, found = gradients(model, {"input_ids": token_ids(), "labels": token_ids()})
    assert "model.norm.trained.weight" in found
    assert float(found["model.norm.trained.weight"].norm()) > 0


def test_a_layer_of_another_kind_is_left_alone() -> None:
    class ScaledRMSNorm(nn.Module):
        """Looks like Llama's, and is not."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(32))
            self.variance_epsilon = 1e-6

        def forward(self, x: Tensor) -> Tensor:
            wide = x.float()
            return 2 * self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)).to(x.dtype)

    base = llama()
    base.model.norm = ScaledRMSNorm()
    model = rw.adapt(base, rw.recipes.lora(rank=2))
    assert "forward" not in model.model.norm.__dict__  # type: ignore[union-attr]
    assert len(lean_forms(model)) == 6


# --- the loss --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "biased", "rows", "chunk"), itertools.product(DTYPES, (False, True), (1, 37), (1, 16, 1000)))
def test_the_loss_in_chunks_equals_all_logits_at_once(
    dtype: torch.dtype, biased: bool, rows: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_loss_module, "chunk_rows", lambda vocabulary, device: chunk)
    hidden, weight = random(rows, 12, dtype=dtype), random(29, 12, seed=1, dtype=dtype)
    bias = random(29, seed=2, dtype=dtype) if biased else None
    labels = torch.randint(0, 29, (rows,), generator=torch.Generator().manual_seed(3))
    fast, plain = hidden.clone().requires_grad_(True), hidden.clone().requires_grad_(True)
    mine, wanted = head_loss(fast, weight, bias, labels, DENSE), reference_head_loss(plain, weight, bias, labels)
    assert float(mine.detach()) == pytest.approx(float(wanted.detach()), rel=1e-6)
    (mine * 0.3).backward()
    (wanted * 0.3).backward()
    assert fast.grad is not None
    assert plain.grad is not None
    assert relative(fast.grad, plain.grad) < (1e-6 if dtype is torch.float32 else 1e-2)


def causal(**changes: Any) -> Any:
    return moved(rw.adapt(llama(**changes), rw.recipes.lora(rank=2))).train()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("items", [None, 5, torch.tensor(5)])
def test_a_fused_loss_is_the_models_own(masked: bool, items: Any) -> None:
    model, ids = causal(), token_ids()
    labels = ids.clone()
    if masked:
        labels[:, :4] = -100
    batch = {"input_ids": ids, "labels": labels} | ({} if items is None else {"num_items_in_batch": items})
    own = gradients(model, batch)
    rw.fuse_loss(model)
    fused = gradients(model, batch)
    assert fused[0] == pytest.approx(own[0], rel=1e-6)
    assert all(relative(fused[1][name], own[1][name]) < 1e-5 for name in own[1])
    assert model(**batch).logits.shape == (2, 0, VOCABULARY)
    assert model(**batch, return_dict=False)[0].dim() == 0
    rw.unfuse_loss(model)
    assert model(**batch).logits.shape == (2, 7, VOCABULARY)


def test_a_fused_loss_leaves_every_other_call_alone() -> None:
    model, ids = rw.fuse_loss(causal()), token_ids()
    assert model(input_ids=ids).logits.shape == (2, 7, VOCABULARY)
    assert model(input_ids=ids, labels=ids, logits_to_keep=7).logits.shape == (2, 7, VOCABULARY)
    with torch.no_grad():
        assert model(input_ids=ids, labels=ids).logits.shape == (2, 7, VOCABULARY)
    assert model.eval()(input_ids=ids, labels=ids).logits.shape == (2, 7, VOCABULARY)
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape == (2, 9)


def test_trl_asks_for_its_own_numbers_and_accelerate_wraps_the_forward() -> None:
    from trl.trainer.utils import add_fused_lm_head

    model, ids = causal(), token_ids()
    batch = {"input_ids": ids, "labels": ids}
    own = gradients(model, batch)
    add_fused_lm_head(rw.fuse_loss(model))
    answered = model(**batch, fused_lm_head=True)
    assert answered.log_probs is not None
    assert float(answered.loss.detach()) == pytest.approx(own[0], rel=1e-6)
    assert model(**batch).logits.shape == (2, 0, VOCABULARY)
    inner = model.forward
    model.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    assert gradients(model, batch)[0] == pytest.approx(own[0], rel=1e-6)


@pytest.mark.parametrize(("method", "options"), [("lora", {}), ("lora", {"bias": True}), ("dora", {}), ("vera", {})])
def test_blocks_compile_one_by_one_without_breaks_and_are_not_compiled_again(method: str, options: dict[str, Any]) -> None:
    """Whole graphs for forward and backward of every block; a second step with other numbers compiles nothing."""
    from torch._dynamo.utils import counters

    model = moved(rw.adapt(llama(), getattr(rw.recipes, method)(rank=2, targets="all-linear", **options))).train()
    rw.fuse_loss(model)
    batches = [{"input_ids": token_ids(seed=seed), "labels": token_ids(seed=seed)} for seed in (1, 2)]
    eager = [gradients(model, batch) for batch in batches]
    torch._dynamo.reset()
    counters.clear()
    for block in model.model.layers:  # type: ignore[union-attr]
        block.compile(fullgraph=True, backend="aot_eager", dynamic=False)
    found = [gradients(model, batches[0])]
    graphs = counters["stats"]["unique_graphs"]
    found.append(gradients(model, batches[1]))
    assert graphs
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    for mine, theirs in zip(found, eager, strict=True):
        assert mine[0] == pytest.approx(theirs[0], rel=1e-5)
        assert all(relative(mine[1][name], theirs[1][name]) < 1e-4 for name in theirs[1] if float(theirs[1][name].norm()) > 1e-9)
    torch._dynamo.reset()


def test_a_call_that_fails_leaves_nothing_behind() -> None:
    model, ids = rw.fuse_loss(causal()), token_ids()
    with pytest.raises(Exception, match=r".*"):
        model(input_ids=ids.float(), labels=ids)
    own = gradients(model, {"input_ids": ids, "labels": ids})
    assert math.isfinite(own[0])
    from rankwise.fused_loss import _CALL

    assert _CALL.get() is None


def test_losses_that_are_attached_follow_a_fused_loss() -> None:
    """A balance loss gets the gradient of the model's own loss, whoever computes that."""
    ids = token_ids()
    batch = {"input_ids": ids, "labels": ids, "sample_types": torch.tensor([0, 1])}
    model = moved(rw.adapt(llama(), rw.recipes.loramoe(rank=2, experts=2))).train()
    own = gradients(model, batch)
    fused = gradients(rw.fuse_loss(model), batch)
    assert fused[0] == pytest.approx(own[0], rel=1e-6)
    assert all(relative(fused[1][name], own[1][name]) < 1e-4 for name in own[1] if float(own[1][name].norm()) > 1e-9)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: rw.adapt(llama(), rw.recipes.lora(rank=2, targets=["lm_head", "q_proj"])), "output head"),
        (lambda: rw.adapt(llama(), rw.recipes.lora(rank=2, modules_to_save=["lm_head"])), "output head"),
        (lambda: rw.adapt(FAMILIES["gemma2"][0](), rw.recipes.lora(rank=2)), "cross-entropy"),
        (lambda: rw.adapt(FAMILIES["bert"][0](), rw.recipes.lora(rank=2, modules_to_save=["classifier"])), "causal language models"),
        (lambda: rw.adapt(FAMILIES["t5"][0](), rw.recipes.lora(rank=2)), "causal language models"),
    ],
)
def test_a_loss_that_is_not_that_of_the_head_is_refused(make: Any, reason: str) -> None:
    model = make()
    with pytest.raises(TargetError, match=reason):
        rw.fuse_loss(model)
    assert not any("labels" in hook.__name__ for hook in model._forward_pre_hooks.values() if hasattr(hook, "__name__"))
