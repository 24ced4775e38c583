"""Schedules that write into the base weights: the way back, files, resume, merging and rounding, on a schedule that folds every step."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from tiny_models import dense_weight, llama, logits, one_linear, perturb, site, token_ids
from torch import Tensor, nn

import rankwise as rw
from rankwise.checkpoint import load_trainable_state, trainable_state
from rankwise.errors import RecipeError, TargetError
from rankwise.folding import fold
from rankwise.recipe import Recipe
from rankwise.schedules import SCHEDULES, Change, Event, Moment, Running, Schedule
from rankwise.sites import adapted_sites

TARGETS = ["q_proj", "k_proj", "down_proj"]


class Folder(Running):
    """Folds every site after every step and sets `up` to zero, so that training goes on from the new weights."""

    def __init__(self, model: nn.Module) -> None:
        self.sites = adapted_sites(model)

    @torch.no_grad()
    def on(self, event: Event, moment: Moment) -> Change | None:
        if event != "step":
            return None
        for module in self.sites.values():
            fold(module)
            module.update.up.zero_()  # type: ignore[union-attr, operator]
        return Change(reset=[module.update.up for module in self.sites.values()])  # type: ignore[union-attr, misc]


@dataclass(frozen=True)
class EveryStep(Schedule):
    """For tests: fold, and begin again."""

    name: ClassVar[str] = "every-step"
    rewrites_base: ClassVar[bool] = True
    original: Literal["keep", "drop"] = "keep"

    def begin(self, model: nn.Module) -> Running:
        return Folder(model)


@pytest.fixture(autouse=True)
def known() -> Iterator[None]:
    """The toy schedule, known by name as the others are."""
    SCHEDULES[EveryStep.name] = EveryStep
    yield
    del SCHEDULES[EveryStep.name]


def recipe(**fields: Any) -> Recipe:
    return Recipe(rank=4, alpha=10.0, lr=5e-3, schedule=EveryStep(), targets=rw.recipe.targets(TARGETS)).replace(**fields)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 3) -> list[float]:
    ids, losses = token_ids(), []
    model.train()
    for _ in range(count):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


def trained(**fields: Any) -> nn.Module:
    """Three folded steps, and then factors away from zero, so that both parts count."""
    model = rw.adapt(llama(), recipe(**fields))
    losses = steps(model, rw.optimizer(model))
    assert losses[-1] < losses[0]
    return perturb(model)


def test_training_goes_into_the_base_and_the_base_comes_back_bit_for_bit() -> None:
    ids, model = token_ids(), llama()
    before, weights = logits(model, ids), {name: p.detach().clone() for name, p in model.named_parameters()}
    rw.adapt(model, recipe())
    optimizer = rw.optimizer(model)
    losses = steps(model, optimizer)
    assert losses[-1] < losses[0]
    assert all(not module.update.up.any() for module in adapted_sites(model).values())  # type: ignore[union-attr, operator]
    after = logits(model, ids)
    assert (after - before).abs().max() > 1e-3  # the factors are zero, so all of it stands in the weights
    with rw.disabled(model):
        assert torch.equal(logits(model, ids), before)
        with rw.disabled(model):
            assert torch.equal(logits(model, ids), before)
    assert torch.equal(logits(model, ids), after)
    assert torch.equal(rw.reference(model)(input_ids=ids).logits, before)
    steps(model, optimizer, 1)
    rw.unadapt(model)
    assert torch.equal(logits(model, ids), before)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_a_fold_equals_training_the_weight_with_the_same_steps() -> None:
    weight = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = rw.adapt(one_linear(weight), Recipe(rank=2, schedule=EveryStep(), targets=rw.recipe.targets("proj")))
    module = site(perturb(model))
    wanted = dense_weight(module)
    fold(module)
    torch.testing.assert_close(module.weight, wanted, rtol=0, atol=1e-15)
    fold(module, scale=0.5, keep=0.25)
    torch.testing.assert_close(module.weight, 0.25 * wanted + 0.5 * (wanted - weight), rtol=0, atol=1e-15)


def test_merging_stands_on_the_weights_as_written() -> None:
    ids, model = token_ids(), trained()
    base, on = logits(llama(), ids), logits(model, ids)
    rw.merge(model)
    torch.testing.assert_close(logits(model, ids), on, rtol=1e-5, atol=1e-5)
    with rw.disabled(model):
        assert torch.equal(logits(model, ids), base)
    rw.unmerge(model)
    assert torch.equal(logits(model, ids), on)
    rw.merge(model, keep_base=False)
    assert not adapted_sites(model)
    torch.testing.assert_close(logits(model, ids), on, rtol=1e-5, atol=1e-5)


def test_a_file_holds_the_weights_and_loads_bit_for_bit(tmp_path: Path) -> None:
    ids, model = token_ids(), trained()
    on = logits(model, ids)
    rw.save(model, tmp_path / "plain")
    with rw.disabled(model):
        rw.save(model, tmp_path / "disabled")
    rw.merge(model)
    rw.save(model, tmp_path / "merged")
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("plain", "disabled", "merged")]
    assert files[0] == files[1] == files[2]
    again = rw.load(llama(), tmp_path / "plain")
    assert torch.equal(logits(again, ids), on)
    with rw.disabled(again):
        assert torch.equal(logits(again, ids), logits(llama(), ids))
    peft = pytest.importorskip("peft")
    with pytest.raises(Exception, match="RANKWISE"):
        peft.PeftModel.from_pretrained(llama(), str(tmp_path / "plain"))


def test_a_resumed_run_has_the_same_weights_bit_for_bit() -> None:
    through = rw.adapt(llama(), recipe())
    steps(through, rw.optimizer(through), 4)
    first = rw.adapt(llama(), recipe())
    one = rw.optimizer(first)
    steps(first, one, 2)
    second = rw.adapt(llama(), recipe())
    two = rw.optimizer(second)
    load_trainable_state(second, trainable_state(first))
    two.load_state_dict(one.state_dict())
    steps(second, two, 2)
    assert torch.equal(logits(second, token_ids()), logits(through, token_ids()))
    with rw.disabled(second):
        assert torch.equal(logits(second, token_ids()), logits(llama(), token_ids()))


def test_without_the_originals_there_is_no_way_back_and_it_says_so() -> None:
    model = rw.adapt(llama(), recipe(schedule=EveryStep("drop")))
    assert "original weights (on the CPU)" not in model.rankwise.plan.memory  # type: ignore[union-attr, operator]
    with rw.disabled(model):  # nothing was written yet
        assert torch.equal(logits(model, token_ids()), logits(llama(), token_ids()))
    steps(model, rw.optimizer(model), 1)
    after = logits(model, token_ids())
    with pytest.raises(TargetError, match="original='drop'"), rw.disabled(model):
        pass
    with pytest.raises(TargetError, match="original='drop'"):
        rw.unadapt(model)
    torch.testing.assert_close(logits(rw.merge(model, keep_base=False), token_ids()), after, rtol=1e-5, atol=1e-5)


def test_the_plan_says_that_the_base_is_rewritten() -> None:
    plan = rw.plan(llama(), recipe())
    assert any("writes into the base weights" in note and "bit for bit" in note for note in plan.notes)
    assert plan.memory["original weights (on the CPU)"] == 4 * sum(s.in_features * s.out_features for s in plan.sites)
    dropped = rw.plan(llama(), recipe(schedule=EveryStep("drop")))
    assert any("are refused" in note for note in dropped.notes)


def test_a_tied_weight_is_not_written() -> None:
    model = llama(tie_word_embeddings=True)
    with pytest.raises(TargetError, match="shares its weight with"):
        rw.adapt(model, recipe(targets=["lm_head"]))


def test_a_merged_or_disabled_site_is_not_folded() -> None:
    model = trained()
    rw.merge(model)
    with pytest.raises(RecipeError, match="merged or switched off"):
        fold(next(iter(adapted_sites(model).values())))
    rw.unmerge(model)
    with rw.disabled(model), pytest.raises(RecipeError, match="merged or switched off"):
        fold(next(iter(adapted_sites(model).values())))


def test_stochastic_rounding_keeps_what_nearest_rounding_loses() -> None:
    """An update of a tenth of a bf16 step: lost every time when rounded to nearest, right on average when rounded stochastically."""

    def moved(generator: torch.Generator | None) -> Tensor:
        weight = torch.ones(64, 64, dtype=torch.bfloat16)
        fields: dict[str, Any] = {"rank": 1, "alpha": 1.0, "schedule": EveryStep(), "targets": "proj"}
        model = rw.adapt(one_linear(weight), Recipe().replace(**fields))
        module = site(model)
        module.update.put(up=torch.full((64, 1), 1.0), down=torch.full((1, 64), 2.0**-7 / 10))  # type: ignore[union-attr]
        for _ in range(10):
            fold(module, generator=generator)
        return module.weight.float()

    assert torch.equal(moved(None), torch.ones(64, 64))
    drawn = moved(torch.Generator().manual_seed(0))
    assert set(((drawn - 1) * 2**7).unique().tolist()) <= set(range(8))  # always a number that bf16 has
    assert abs(float((drawn - 1).mean()) - 2.0**-7) < 2.0**-7 * 0.05  # 4,096 weights: the standard error is 1.5%


def test_stochastic_rounding_to_another_dtype_is_refused() -> None:
    from rankwise.storage.base import rounded_to

    with pytest.raises(RecipeError, match="use rounding='nearest'"):
        rounded_to(torch.ones(2), torch.float16, torch.Generator())
