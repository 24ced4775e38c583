"""LoRA-One: the first step of full fine-tuning, cut to the rank, from gradients in fp64."""

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_models import relative
from method_checks import comes_back_from_its_file, resumes_bit_for_bit, trained_a_little
from peft import PeftModel
from test_lora_ga import Louder, best, gradient, stored_gradients
from tiny_models import dense_weight, gpt2, llama, logits, token_ids
from torch import Tensor
from training_models import make_world

import rankwise as rw
from rankwise.errors import CalibrationError, RecipeError
from rankwise.inits import LoraOne, Statistics, site_generator
from rankwise.sites import adapted_sites
from rankwise.training.use import evaluate, open_adapter
from rankwise.updates import Site

RANK = 4
DOUBLE = torch.float64


def batch(rows: int = 4, length: int = 9, seed: int = 1) -> dict[str, Tensor]:
    ids = token_ids(rows, length, seed)
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def begin(g: Tensor, rank: int = RANK, basis: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    """(down, up) for a gradient; the scaling is 2."""
    out = g.shape[0] if basis is None else basis.shape[0]
    place = Site("proj", "linear", g.shape[1], out, rank, 2.0)
    begun = LoraOne(**options).begin(place, None, Statistics(1000, gradient=g, basis=basis), site_generator(0, "proj"))
    assert begun.down is not None
    assert begun.up is not None
    return begun.down, begun.up


def change(module: Any) -> Tensor:
    """scaling * up @ down in fp64."""
    return module.site.scaling * module.update.up.detach().double() @ module.update.down.detach().double()


@pytest.mark.check("lora-one", 1)
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
@pytest.mark.parametrize("gamma", [128.0, 3.0])
def test_the_relative_start_is_the_cut_gradient_over_its_largest_singular_value(shape: tuple[int, int], gamma: float) -> None:
    g = 7.0 * gradient(*shape)
    down, up = begin(g, gamma=gamma)
    torch.testing.assert_close(up @ down, -best(g, RANK) / torch.linalg.matrix_norm(g, 2) / gamma, rtol=0, atol=1e-14)
    # the root of each singular value stands in both factors
    torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1), rtol=1e-12, atol=0)
    torch.testing.assert_close(down @ down.T, torch.diag(down.square().sum(1)), rtol=0, atol=1e-14)


@pytest.mark.check("lora-one", 2)
@pytest.mark.parametrize("make", [llama, gpt2])
def test_the_gradients_own_size_makes_a_step_of_gradient_descent(make: Any) -> None:
    batches = [batch(4, 9, 1), batch(2, 7, 2)]
    model = make().double()
    gradients = stored_gradients(model, batches)
    rw.adapt(model, rw.recipes.lora_one(rank=RANK, size="gradient", gamma=20.0), calibration=batches)
    for name, module in adapted_sites(model).items():
        assert relative(change(module), -best(gradients[name], RANK) / 20.0) < 1e-4, name  # the model's norms round to fp32


@pytest.mark.check("lora-one", 2)
def test_the_loss_falls_by_what_the_cut_gradient_promises() -> None:
    """loss(W - G_r / gamma) = loss(W) - ||G_r||^2 / gamma to first order, summed over the sites."""
    b, gamma = batch(), 1e4
    model = llama(dtype=DOUBLE)
    gradients = stored_gradients(model, [b])
    rw.adapt(model, rw.recipes.lora_one(rank=RANK, size="gradient", gamma=gamma), calibration=[b])
    started = float(model(**b).loss.detach())
    with rw.disabled(model):
        base = float(model(**b).loss.detach())
    promised = sum(float(best(gradients[name], RANK).square().sum()) for name in adapted_sites(model)) / gamma
    assert base - started == pytest.approx(promised, rel=2e-2)


@pytest.mark.check("lora-one", 3)
@pytest.mark.parametrize("factor", [100.0, 1e-12])
def test_the_size_of_the_loss_does_not_matter_and_its_sign_does(factor: float) -> None:
    starts = []
    for size in (1.0, factor, -1.0):
        model = rw.adapt(Louder(llama(dtype=DOUBLE), size), rw.recipes.lora_one(rank=RANK), calibration=[batch()])
        starts.append([change(module) for module in adapted_sites(model).values()])
    for one, other, minus in zip(*starts, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-7)
        torch.testing.assert_close(one, -minus, rtol=0, atol=1e-7)


def official(g: Tensor, rank: int, gamma: float) -> tuple[Tensor, Tensor]:
    """(A, B) as run_exp.py of YuanheZ/LoRA-One at 01bba05 makes them with direction LoRA-One and scale stable, but for its
    randomized decomposition."""
    u, s, v = torch.linalg.svd(-g, full_matrices=False)
    b = u[:, :rank] @ torch.diag(torch.sqrt(s[:rank])) / torch.sqrt(s[0])
    a = torch.diag(torch.sqrt(s[:rank])) @ v[:rank, :] / torch.sqrt(s[0])
    return a / gamma**0.5, b / gamma**0.5


@pytest.mark.check("lora-one", 4)
def test_the_product_is_that_of_the_official_code() -> None:
    g = gradient(24, 40, seed=3)
    a, b = official(g, RANK, 128.0)
    down, up = begin(g)
    torch.testing.assert_close(up @ down, b @ a, rtol=0, atol=1e-14)
    signs = (down * a).sum(1).sign()  # of each pair, free
    torch.testing.assert_close(down * signs[:, None], a, rtol=0, atol=1e-13)
    torch.testing.assert_close(up * signs, b, rtol=0, atol=1e-13)


@pytest.mark.check("lora-one", 5)
def test_a_sketch_and_a_randomized_decomposition_give_the_same_step() -> None:
    g = gradient(24, 40)
    basis = torch.linalg.svd(g, full_matrices=False).U[:, :12]
    down, up = begin(basis.T @ g, basis=basis)
    torch.testing.assert_close(up @ down, torch.mm(*begin(g)[::-1]), rtol=0, atol=1e-13)
    down, up = begin(g, svd="randomized")
    assert relative(up @ down, torch.mm(*begin(g)[::-1])) < 1e-3
    model = rw.adapt(llama(), rw.recipes.lora_one(rank=2, estimate="sketch"), calibration=[batch(6, 20)])
    whole = rw.adapt(llama(), rw.recipes.lora_one(rank=2), calibration=[batch(6, 20)])
    for one, other in zip(adapted_sites(model).values(), adapted_sites(whole).values(), strict=True):
        assert float(torch.cosine_similarity(change(one).flatten(), change(other).flatten(), dim=0)) > 0.9


@pytest.mark.check("lora-one", 6)
@pytest.mark.parametrize("storage", ["keep", "nf4"])
def test_training_begins_a_step_away_and_the_base_is_not_written(storage: str) -> None:
    model, ids = llama(), token_ids()
    if storage == "nf4":
        model = rw.unadapt(rw.adapt(model, rw.recipes.lora(rank=RANK, storage="nf4")))
    before = logits(model, ids)
    recipe = rw.recipes.lora_one(rank=RANK, gamma=4.0, storage=storage)
    assert "the start is not the base" in str(rw.plan(model, recipe)).replace("\n", " ")
    rw.adapt(model, recipe, calibration=[batch()])
    start = logits(model, ids)
    assert relative(start, before) > 1e-2
    with rw.disabled(model):
        assert torch.equal(logits(model, ids), before)
    assert all(module.offset is None and not module.folded for module in adapted_sites(model).values())
    if storage == "keep":
        dense = {name: dense_weight(module) for name, module in adapted_sites(model).items()}
        rw.merge(model)
        assert all(relative(module.weight, dense[name]) < 1e-6 for name, module in adapted_sites(model).items())
        assert relative(logits(model, ids), start) < 1e-5
        rw.unmerge(model)
    assert torch.equal(logits(rw.unadapt(model), ids), before)


@pytest.mark.check("lora-one", 7)
def test_compositions_keep_the_step() -> None:
    """A mixer is absorbed, and DoRA's lengths are those of the moved weight, as in the official code."""
    plain = rw.adapt(llama(), rw.recipes.lora_one(rank=RANK, gamma=4.0), calibration=[batch()])
    start = logits(plain, token_ids())
    mixed = rw.adapt(llama(), rw.recipes.lora_one(rank=RANK, gamma=4.0).replace(update="moslora"), calibration=[batch()])
    assert relative(logits(mixed, token_ids()), start) < 1e-5
    scaled = rw.adapt(llama(), rw.recipes.lora_one(rank=RANK, gamma=4.0).replace(gain="dora"), calibration=[batch()])
    assert relative(logits(scaled, token_ids()), start) < 1e-5
    for name, module in adapted_sites(scaled).items():
        moved = dense_weight(adapted_sites(plain)[name]).norm(dim=1)
        torch.testing.assert_close(module.gain.magnitude0.double(), moved, rtol=1e-5, atol=0)  # type: ignore[union-attr]
    for fields, reason in (
        ({"update": "loramoe"}, "an update with experts cannot be combined with an init whose pair is not zero"),
        ({"update": {"name": "moslora", "mixer": "kaiming"}}, "absorbed by the pair"),
        ({"base": "fold"}, "nothing to fold"),
        ({"update": "vera"}, "no pair for an init to fill"),
    ):
        with pytest.raises(RecipeError, match=reason):
            rw.recipes.lora_one().replace(**fields)


@pytest.mark.check("lora-one", 8)
def test_the_folder_is_a_plain_lora_of_the_same_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained_a_little(rw.adapt(llama(), rw.recipes.lora_one(rank=RANK), calibration=[batch()]), batch())
    monkeypatch.setattr(LoraOne, "begin", None)  # all is in the file
    about = comes_back_from_its_file(model, llama, tmp_path / "a")
    assert (about["peft_type"], about["start"]) == ("LORA", None)
    theirs = PeftModel.from_pretrained(llama(), tmp_path / "a").eval()
    assert theirs.peft_config["default"].r == RANK  # type: ignore[union-attr]
    assert relative(logits(theirs, token_ids()), logits(model, token_ids())) < 1e-5


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.check("lora-one", 9)
def test_a_run_from_yaml_resumes_bit_for_bit(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What training has gained is measured from the base, which this method's start is not."""
    whole = resumes_bit_for_bit(world, tmp_path, monkeypatch, {"name": "lora-one", "calibration_rows": 8})
    before, _ = evaluate(open_adapter(whole.run.root))
    assert whole.before["task"] == before["task"]


def test_another_global_seed_gives_the_same_start() -> None:
    starts = []
    for seed in (1, 2):
        model = llama()
        torch.manual_seed(seed)
        rw.adapt(model, rw.recipes.lora_one(rank=RANK, svd="randomized"), calibration=[batch()])
        starts.append([p.detach() for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(one, other) for one, other in zip(*starts, strict=True))


def test_bad_input_is_refused_with_the_remedy() -> None:
    with pytest.raises(CalibrationError, match="calibration is missing"):
        rw.adapt(llama(), rw.recipes.lora_one(rank=RANK))
    with pytest.raises(CalibrationError, match=r"saw 3 calibration tokens, and 4 directions.*calibration_rows"):
        rw.adapt(llama(), rw.recipes.lora_one(rank=RANK), calibration=[batch(1, 3)])
    with pytest.raises(CalibrationError, match="the gradient at proj is zero"):
        begin(torch.zeros(8, 8))
    with pytest.raises(RecipeError, match="gamma=0 of the lora-one init must be above 0"):
        rw.recipes.lora_one(gamma=0)
