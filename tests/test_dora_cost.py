"""The Checks of DoRA's specification on what is kept, made and called: 7 (its list of writes is in test_traps.py), 8 and 9 (its refusal is
in test_traps.py)."""

import copy
from typing import Any

import pytest
import torch
from dora_models import made, peft_twin
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from toys import Counted, Mlp, only_site, saved_storages, stir

import rankwise as rw
from rankwise.gains import dora as dora_module
from rankwise.recipes import dora
from rankwise.sites import adapted_sites

torch.set_num_threads(1)


@pytest.mark.check("dora", 7)
def test_the_base_norm_is_measured_once_and_checkpointing_recomputes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    count = []
    original = dora_module.row_norms_squared
    monkeypatch.setattr(dora_module, "row_norms_squared", lambda *args: (count.append(1), original(*args))[1])
    model = stir(rw.adapt(Mlp(), dora(rank=4, dropout=0.2)))
    optimizer, x = rw.optimizer(model, lr=0.01), torch.randn(5, 24)
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        y = checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
        y.square().sum().backward()
        found.append([y.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
        optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    for training in (True, False, True):
        model.train(training)
        model(x).square().sum().backward()
        optimizer.step()
        with torch.no_grad():
            model(x)
    rw.merge(model)
    rw.unmerge(model)
    model.load_state_dict(model.state_dict())
    assert len(count) == 2  # once per site, at the start


class Allocations(TorchDispatchMode):
    """Records operations that make a new tensor of a given number of elements."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel = numel
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        held = {t.untyped_storage().data_ptr() for t in (*args, *(kwargs or {}).values()) if isinstance(t, Tensor)}
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tensor.numel() == self.numel and tensor.untyped_storage().data_ptr() not in held:
                self.found.append(str(func))
        return out


@pytest.mark.check("dora", 8)
@pytest.mark.parametrize("norm_grad", ["detached", "full"])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_what_is_kept_and_that_no_dense_weight_is_made(p: float, norm_grad: str) -> None:
    tokens, width, out, rank = 61, 48, 40, 4
    model = made(torch.bfloat16, width, out, rank=rank, dropout=p, norm_grad=norm_grad)
    x = torch.randn(tokens, width).bfloat16().requires_grad_()
    with Allocations(out * width) as made_here:
        with saved_storages(model) as found:
            y = model(x)
        y.float().sum().backward()
    assert made_here.found == []
    # dropout keeps where elements fall out, four bytes for each of them
    positions = [key for key, (_, tensor) in found.items() if tensor.dtype is torch.int32]
    assert len(positions) == bool(p)
    for key in positions:
        assert found.pop(key)[1].numel() < 1.5 * p * tokens * width
    grows = sorted(size for size, tensor in found.values() if tensor.numel() % tokens == 0)
    assert grows == sorted([2 * tokens * width, 2 * tokens * rank, 2 * tokens * out])
    # the rest does not grow with the tokens: gain and norm, and for the full gradient what the norm was made of, (out, rank) and smaller
    rest = [tensor for _, tensor in found.values() if tensor.numel() % tokens]
    assert all(tensor.numel() <= out * max(rank, 2) or tensor.numel() <= rank * width for tensor in rest)
    with Allocations(out * width) as dense:
        only_site(model).merged_weight()
    assert dense.found  # the hook does see what it looks for


@pytest.mark.check("dora", 9)
def test_dropout_calls_the_base_product_once_and_evaluation_equals_pefts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The official code's training-time form is refused (test_traps.py); here dropout is the adapter's alone."""
    torch.manual_seed(0)
    plain = Mlp()
    model = stir(rw.adapt(copy.deepcopy(plain), dora(rank=4, dropout=0.3)))
    theirs = peft_twin(model, plain, dropout=0.3).eval()
    x = torch.randn(50, 24)
    model.eval()
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-5, atol=1e-5)
    model.train()
    calls = []
    storage = type(adapted_sites(model)["first"].storage)
    original = storage.product
    monkeypatch.setattr(storage, "product", lambda self, x, bias, *w: (calls.append(len(x)), original(self, x, bias, *w))[1])
    y = model(x)
    assert sorted(calls) == [4, 4, 50, 50]  # per layer: the tokens once, and the rank rows of `down` for the norm
    assert not torch.equal(y, model(x))
    # an opaque base is called once with the tokens as well
    counted = stir(rw.adapt(nn.Sequential(Counted(24, 16)), dora(rank=4, dropout=0.3)))
    seen: list[int] = []
    base = only_site(counted).base_layer
    base.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    counted(x)
    assert seen.count(50) == 1


@pytest.mark.check("dora", 9)
def test_adapter_dropout_drops_the_branch_under_the_gain_alone() -> None:
    """y - bias = gain * (W x + s up down drop(x)): with a branch of zero nothing is dropped; else the mean is the evaluation's."""
    model = made(dropout=0.4)
    site, x = only_site(model), torch.randn(4, 20, dtype=torch.float64)
    model.eval()
    evaluated = model(x).detach()
    model.train()
    with torch.no_grad():
        draws = torch.stack([model(x) for _ in range(2000)])
        deviation = draws.std(0) / 2000**0.5
        assert ((draws.mean(0) - evaluated).abs() < 5 * deviation).all()
        site.update.put(up=torch.zeros_like(site.update.up))
        assert torch.equal(model(x), model(x))
