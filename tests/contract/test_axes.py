"""The contract of the axes: every legal combination of values works in every respect, every illegal one is refused with its reason."""

import itertools
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from tiny_models import dense_weight, llama, logits, perturb, site, token_ids
from torch import nn

import rankwise as rw
from rankwise.errors import RecipeError, TargetError
from rankwise.gains import GAINS
from rankwise.gradients import GRADIENTS
from rankwise.inits import INITS
from rankwise.recipe import LEGALITY, Recipe, refusal
from rankwise.schedules import Schedule
from rankwise.sites import adapted_sites
from rankwise.storage import STORAGES, NF4Linear
from rankwise.updates import UPDATES, Site, Slot, UpdateChoice, lora_slots

TARGETS = ["q_proj", "k_proj", "down_proj"]  # a group of two, and the wide input
# alpha / rank = 2.5 is no power of two, so that a start that cancels only by luck shows
FIELDS: dict[str, Any] = {"rank": 4, "alpha": 10.0, "targets": TARGETS, "lr": 5e-3}

# an update that makes no sense without its schedule is tried with it
SCHEDULE_OF = {"galore": "galore"}

COMBINATIONS = list(itertools.product(UPDATES, GAINS, INITS, GRADIENTS, ("keep", "fold"), ((), ("down",))))


def fields_of(update: str, gain: str, init: str, gradient: str, base: str, frozen: tuple[str, ...]) -> dict[str, Any]:
    fields = {"update": update, "gain": gain, "init": init, "gradient": gradient, "base": base, "frozen": frozenset(frozen)}
    return FIELDS | fields | {"schedule": SCHEDULE_OF.get(update, "none")}


# ten tokens, for inits that ask: other inits do not read them
CALIBRATION = [{"input_ids": token_ids(rows=2, length=5, seed=9), "labels": token_ids(rows=2, length=5, seed=9)}]
REFUSALS = {combination: refusal(**fields_of(*combination)) for combination in COMBINATIONS}
LEGAL = [combination for combination, error in REFUSALS.items() if error is None]
ILLEGAL = [combination for combination, error in REFUSALS.items() if error is not None]


def label(combination: tuple[Any, ...]) -> str:
    return "-".join("+".join(part) if isinstance(part, tuple) else part for part in combination).rstrip("-")


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name.replace(".base_layer", ""): p.detach().clone()
        for name, p in itertools.chain(model.named_parameters(), model.named_buffers())
        if "update" not in name and "gain" not in name and "offset.down" not in name and "offset.up" not in name
    }


def held_llama() -> Any:
    """The tiny model with its linear layers in 4 bits."""
    return rw.unadapt(rw.adapt(llama(num_hidden_layers=1), Recipe().replace(storage="nf4", targets=TARGETS)))


def fulfils_the_contract(recipe: Recipe, model: Any = None) -> Any:
    """Every promise that holds for every recipe, on one model; returns the base for further looks."""
    ids = token_ids(rows=2, length=5)
    model = llama(num_hidden_layers=1) if model is None else model
    before, parameters = logits(model, ids), weights(model)
    plan = rw.plan(model, recipe)
    kept = recipe.base == "keep"

    def same_as_base(values: torch.Tensor) -> bool:
        return torch.equal(values, before) if kept else torch.allclose(values, before, rtol=1e-5, atol=2e-5)

    assert rw.adapt(model, recipe, calibration=CALIBRATION) is model
    plan = model.rankwise.plan if recipe.init.distributes else plan
    assert len(adapted_sites(model)) == 3
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == plan.trained_parameters > 0
    assert sum(row.parameters for row in rw.summary(model)) == plan.trained_parameters

    # promise 2: the start is the base, exactly unless the update begins at a small size that nothing subtracts
    start = logits(model, ids)
    if recipe.init.steps:
        assert not torch.equal(start, before)  # training begins a step away, on purpose
    elif recipe.update.start_size:
        torch.testing.assert_close(start, before, rtol=0, atol=1e3 * recipe.update.start_size)
    else:
        assert same_as_base(start)
    # training moves it, and every site takes part
    optimizer = rw.optimizer(model)
    model.train()
    losses = []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert all(torch.isfinite(torch.tensor(losses)))
    assert losses[2] < losses[0]
    optimizer.rankwise_session.check_alive()  # type: ignore[attr-defined]
    model.eval()
    adapted = before
    for size in (0.2, 5.0, 50.0) if recipe.update.start_size else (0.2,):  # what began small is small still
        if (adapted - before).abs().max() <= 1e-3:
            adapted = logits(perturb(model, size=size), ids)
    assert (adapted - before).abs().max() > 1e-3
    # promise 1
    with rw.disabled(model):
        assert same_as_base(logits(model, ids))
    assert torch.equal(logits(model, ids), adapted)
    if not recipe.update.constant_core:  # no dense weight equals it: said, and nothing is touched
        with pytest.raises(TargetError, match="cannot be merged: its update depends on the token"):
            rw.merge(model)
        assert torch.equal(logits(model, ids), adapted)
        return taken_off(model, parameters, same_as_base, kept, ids)
    # merge and back
    dense = {name: dense_weight(module) for name, module in adapted_sites(model).items()}
    rw.merge(model)
    for name, module in adapted_sites(model).items():
        torch.testing.assert_close(module.weight.double(), dense[name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits(model, ids), adapted, rtol=1e-4, atol=1e-4)
    with rw.disabled(model):
        assert same_as_base(logits(model, ids))
    rw.unmerge(model)
    assert torch.equal(logits(model, ids), adapted)
    return taken_off(model, parameters, same_as_base, kept, ids)


def taken_off(model: Any, parameters: dict[str, torch.Tensor], same_as_base: Any, kept: bool, ids: torch.Tensor) -> Any:
    """The adapters taken off: every weight is as it was."""
    rw.unadapt(model)
    assert not adapted_sites(model)
    after = weights(model)
    assert after.keys() == parameters.keys()
    for name, value in parameters.items():
        if kept:
            assert torch.equal(after[name], value), name
        else:
            torch.testing.assert_close(after[name], value, rtol=1e-5, atol=1e-6)
    assert same_as_base(logits(model, ids))
    assert all(p.requires_grad for p in model.parameters())
    return model


@pytest.mark.parametrize("combination", LEGAL, ids=label)
def test_every_legal_combination_fulfils_the_contract(combination: tuple[Any, ...]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fulfils_the_contract(Recipe().replace(**fields_of(*combination)))


# every legal update, gain and init over a base in 4 bits; rules for steps and frozen roles do not see how the weight is held
QUANTIZED = [combination for combination in LEGAL if combination[3:] == ("plain", "keep", ()) and combination[0] not in SCHEDULE_OF]


@pytest.mark.parametrize("combination", QUANTIZED, ids=label)
def test_every_combination_fulfils_the_contract_on_a_4_bit_base(combination: tuple[Any, ...]) -> None:
    """The base is then the 4-bit one: the start, the way back and `disabled` are exactly that."""
    recipe = Recipe().replace(**fields_of(*combination), storage="nf4")
    model = fulfils_the_contract(recipe, held_llama())
    assert sum(isinstance(module, NF4Linear) for module in model.modules()) == 7


@pytest.mark.parametrize("combination", [combination for combination in LEGAL if combination[3:] == ("plain", "fold", ())], ids=label)
def test_every_folded_start_is_taken_out_before_quantization(combination: tuple[Any, ...]) -> None:
    """What is left of the start is what 4 bits must hold; the start itself stays exact, so the model is nearer to the dense one."""
    recipe = Recipe().replace(**fields_of(*combination), storage="nf4")
    ids, model = token_ids(rows=2, length=5), llama(num_hidden_layers=1)
    dense = {name: module.weight.detach().clone() for name, module in model.named_modules() if hasattr(module, "weight")}
    rw.adapt(model, recipe, calibration=CALIBRATION)
    for name, module in adapted_sites(model).items():
        assert isinstance(module.base_layer, NF4Linear)
        lost = dense_weight(module) - dense[name].double()
        assert lost.norm() < 0.12 * dense[name].norm()
    before = logits(model, ids)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    on = logits(perturb(model), ids)
    assert (on - before).abs().max() > 1e-3
    rw.merge(model)
    torch.testing.assert_close(logits(model, ids), on, rtol=1e-4, atol=1e-4)
    rw.unadapt(model)
    assert not adapted_sites(model)


@pytest.mark.parametrize("update", UPDATES)
def test_every_value_of_every_axis_is_in_a_legal_combination(update: str) -> None:
    """Or the test above would pass by leaving it out."""
    mine = [combination for combination in LEGAL if combination[0] == update]
    assert mine
    assert {combination[1] for combination in LEGAL} == set(GAINS)
    assert {combination[2] for combination in LEGAL} == set(INITS)
    assert {combination[3] for combination in LEGAL} == set(GRADIENTS)
    assert {combination[4] for combination in LEGAL} == {"keep", "fold"}
    assert {combination[5] for combination in LEGAL} == {(), ("down",)}
    assert set(STORAGES) == {"keep", "nf4"}
    # what rewrites its base cannot have one in 4 bits
    assert {combination[0] for combination in QUANTIZED} == set(UPDATES) - set(SCHEDULE_OF)
    assert {combination[1] for combination in QUANTIZED} == set(GAINS)
    assert {combination[2] for combination in QUANTIZED} == set(INITS)


def test_every_illegal_combination_is_refused_with_the_reason_of_a_row() -> None:
    reasons = [f"{row.first} cannot be combined with {row.second}: {row.reason}" for row in LEGALITY]
    assert ILLEGAL
    for combination in ILLEGAL:
        assert str(REFUSALS[combination]) in reasons, label(combination)


@dataclass(frozen=True)
class Routed(UpdateChoice):
    """Stands for the updates of later parts whose core depends on the token; no registered update has one yet."""

    name: ClassVar[str] = "routed"
    module: ClassVar[Any] = None
    roles: ClassVar[frozenset[str]] = frozenset({"down", "up"})
    constant_core: ClassVar[bool] = False

    def slots(self, site: Site) -> dict[str, Slot]:
        return lora_slots(site)


@dataclass(frozen=True)
class Writing(Schedule):
    """Stands for a schedule that rewrites the base and needs no folded start."""

    name: ClassVar[str] = "writing"
    rewrites_base: ClassVar[bool] = True

    def begin(self, model: nn.Module) -> None:
        return None


GALORE: dict[str, Any] = {"update": "galore", "schedule": "galore", "init": "own"}

# One recipe for each row of the table that breaks this row and no other.
ROWS: list[dict[str, Any]] = [
    {"update": "none", "gain": "none", "init": "own"},
    {"update": "vera", "init": "pissa"},
    {"update": "lora", "init": "own"},
    {"update": {"name": "moslora", "mixer": "kaiming"}, "init": "pissa"},
    {"update": "moslora", "gradient": "lora-fa", "frozen": {"down"}},
    {"gradient": "lora-fa"},
    {"gradient": "lora-fa", "frozen": {"down", "up"}, "gain": "dora", "init": "pissa"},
    {"update": "none", "gain": "dora", "init": "own", "gradient": "lora-plus"},
    {"schedule": "adalora"},
    {"update": "adalora", "schedule": "adalora", "init": "pissa"},
    {"update": "adalora", "init": "own", "frozen": {"core"}},
    {"init": "lora-ga", "gradient": "lora-plus"},
    {"base": "fold"},
    {"base": "fold", "init": "pissa", "dropout": 0.1},
    {"init": "random-up", "frozen": {"down"}},
    {"init": "kaiming", "frozen": {"up"}},
    {"update": Routed(), "gain": "dora"},
    {"update": Routed(), "init": "pissa"},
    {"init": "pissa", "frozen": {"down", "up"}},
    {"storage": {"name": "nf4", "iterations": 2}, "init": "pissa"},
    {"storage": {"name": "nf4", "iterations": 2}, "init": "corda", "base": "fold"},
    {"init": "deep-lora"},
    {"update": "moslora", "gradient": "lora-pro"},
    {"gradient": "lora-pro", "frozen": {"down", "up"}, "gain": "dora", "init": "pissa"},
    {"schedule": "rosa", "init": "rosa", "base": "fold", "gain": "dora"},
    {"schedule": "rosa", "init": "rosa", "base": "fold", "storage": "nf4"},
    {"schedule": "rosa", "init": "rosa", "base": "fold", "update": Routed()},
    {"schedule": "rosa", "init": "rosa"},
    {"schedule": "rosa", "init": "corda", "base": "fold"},
    {"schedule": "rosa", "init": "rosa", "base": "fold", "gradient": "lora-plus"},
    {"schedule": "lora-drop", "update": "vera", "init": "own"},
    {"schedule": "lora-drop", "update": Routed()},
    {"update": "am-lora", "init": "pissa", "base": "fold"},
    {"schedule": "task-growth"},
    {"update": "loramoe", "init": "pissa", "base": "fold"},
    {"routing": "milora-mixture", "gain": "dora"},
    {"routing": "milora-mixture", "init": "pissa", "base": "fold"},
    {"routing": "milora-mixture", "schedule": Writing()},
    GALORE | {"dropout": 0.1},
    {"schedule": "galore"},
    GALORE | {"schedule": "none"},
    GALORE | {"frozen": {"down"}},
    GALORE | {"gradient": "lora-plus"},
    {"schedule": "lora-drop", "init": "eva"},
    {"update": "am-lora", "init": {"name": "eva", "rho": 1.0}},
]


@pytest.mark.parametrize("index", range(len(LEGALITY)), ids=lambda index: f"{LEGALITY[index].first} + {LEGALITY[index].second}")
def test_each_row_of_the_legality_table_stands_for_itself(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(ROWS) == len(LEGALITY)
    row = LEGALITY[index]
    with pytest.raises(RecipeError) as caught:
        Recipe().replace(**ROWS[index])
    assert str(caught.value) == f"{row.first} cannot be combined with {row.second}: {row.reason}"
    # no other row refuses it: without this one the recipe is made
    monkeypatch.setattr("rankwise.recipe.LEGALITY", (*LEGALITY[:index], *LEGALITY[index + 1 :]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Recipe().replace(**ROWS[index])


def test_a_pair_that_is_legal_but_pointless_warns() -> None:
    with pytest.warns(UserWarning, match="only multiplies the learning rate"):
        Recipe().replace(gradient="lora-plus", frozen={"down"})


# --- notable compositions --------------------------------------------------------------------------------------------------------------

COMPOSITIONS: dict[str, Recipe] = {
    "DVoRA": rw.recipes.vera(rank=8, targets=TARGETS, lr=2e-2).replace(gain="dora"),
    "DoRA over MoSLoRA": rw.recipes.moslora(**FIELDS).replace(gain="dora"),
    "DoRA with frozen down": rw.recipes.dora(**FIELDS, frozen={"down"}),
    "PiSSA start with DoRA gain": rw.recipes.pissa(**FIELDS).replace(gain="dora"),
    "folded PiSSA start with DoRA gain": rw.recipes.pissa(**FIELDS, base="fold").replace(gain="dora"),
    "MoSLoRA on a PiSSA start": rw.recipes.pissa(**FIELDS).replace(update="moslora"),
    "LoRA+ on DoRA": rw.recipes.dora(**FIELDS).replace(gradient="lora-plus"),
    "LoRA+ on DVoRA": rw.recipes.vera(rank=8, targets=TARGETS, lr=4e-3).replace(gain="dora", gradient="lora-plus"),
    "DoRA with the full norm gradient on MiLoRA": rw.recipes.milora_svd(**FIELDS).replace(gain={"name": "dora", "norm_grad": "full"}),
    "Propulsion over OLoRA": rw.recipes.olora(**FIELDS).replace(gain="propulsion", lr=1e-3),
    "rsLoRA with dropout on a PiSSA start": rw.recipes.pissa(**FIELDS, dropout=0.1, scaling="rslora"),
    "magnitude alone": Recipe().replace(update="none", gain="dora", init="own", targets=TARGETS, lr=2e-2),
    "mixer alone": rw.recipes.moslora(**FIELDS, mixer="identity").replace(init="pissa", frozen={"down", "up"}, lr=5e-2),
    "rates and ranks by pattern": rw.recipes.dora(**FIELDS, rank_pattern={"q_proj": 3}, alpha_pattern={"k_proj": 1.0}),
}


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_notable_composition(name: str) -> None:
    fulfils_the_contract(COMPOSITIONS[name])


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_notable_composition_on_a_bf16_base(name: str) -> None:
    """What must be exact stays exact: the start, the way back, the merged weight being the forward's to a few roundings."""
    ids, recipe = token_ids(rows=2, length=5), COMPOSITIONS[name]
    model = llama(num_hidden_layers=1, dtype=torch.bfloat16)
    before, parameters = logits(model, ids), weights(model)
    rw.adapt(model, recipe)
    kept = recipe.base == "keep"
    close = {"rtol": 0.0, "atol": 0.0} if kept else {"rtol": 5e-2, "atol": 1e-1}
    torch.testing.assert_close(logits(model, ids), before, **close)
    model(input_ids=ids, labels=ids).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 and p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in trained)
    adapted = logits(perturb(model), ids)
    assert (adapted - before).abs().max() > 0.02
    rw.merge(model)
    assert (logits(model, ids) - adapted).norm() < 0.03 * adapted.norm()  # bf16 carries 2 to 3 digits
    with rw.disabled(model):
        torch.testing.assert_close(logits(model, ids), before, **close)
    rw.unadapt(model)
    if kept:
        assert all(torch.equal(value, parameters[key]) for key, value in weights(model).items())


def test_dora_over_an_update_normalises_the_whole_update() -> None:
    """The rows of the adapted weight have the trained lengths, whatever the update and its start."""
    for name in ("DVoRA", "DoRA over MoSLoRA", "PiSSA start with DoRA gain", "folded PiSSA start with DoRA gain"):
        model = perturb(rw.adapt(llama(num_hidden_layers=1), COMPOSITIONS[name]), size=0.5)
        module = site(model, "model.layers.0.self_attn.q_proj")
        gain: Any = module.gain
        lengths = module.merged_weight().norm(dim=1)
        torch.testing.assert_close(lengths, (gain.magnitude0 + gain.magnitude).detach().abs(), rtol=1e-5, atol=1e-6)
        assert (gain.magnitude.abs() > 1e-3).any()


def test_lora_plus_on_dora_leaves_the_magnitude_at_the_base_rate() -> None:
    model = rw.adapt(llama(num_hidden_layers=1), COMPOSITIONS["LoRA+ on DoRA"])
    optimizer = rw.optimizer(model, lr=1e-3)
    seen: dict[str, float] = {}
    optimizer.register_step_pre_hook(lambda made, *_: seen.update({group["role"]: group["lr"] for group in made.param_groups}))
    ids = token_ids()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert seen == {"down": 1e-3, "up": pytest.approx(16e-3), "gain": 1e-3}
    assert all(group["lr"] == 1e-3 for group in optimizer.param_groups)


def test_frozen_down_stays_where_it_was() -> None:
    model = rw.adapt(llama(num_hidden_layers=1), COMPOSITIONS["DoRA with frozen down"])
    module = site(model, "model.layers.0.self_attn.q_proj")
    down = module.update.down.clone()  # type: ignore[union-attr]
    assert "down" not in dict(module.update.named_parameters())  # type: ignore[union-attr]
    optimizer, ids = rw.optimizer(model, lr=1e-2), token_ids()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert torch.equal(module.update.down, down)  # type: ignore[union-attr]
    assert module.update.up.any()  # type: ignore[union-attr]
