"""RandLoRA: trained scales on frozen random bases of full rank, against sums written out in fp64 and against PEFT."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_models import relative
from method_checks import comes_back_from_its_file, resumes_bit_for_bit, trained_a_little
from peft import PeftModel, RandLoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_models import OneLinear, gpt2, llama, logits, site, token_ids
from torch import Tensor, nn
from training_models import make_world

import rankwise as rw
from rankwise.checkpoint.portable import export_lora
from rankwise.errors import CheckpointError, RecipeError
from rankwise.sites import adapted_sites
from rankwise.updates.randlora import draw_bases

SHAPES = [(12, 20), (20, 12), (16, 16), (13, 30)]  # (out, in); 13 is no multiple of the rank
RANK = 4
DOUBLE = torch.float64


def batch(rows: int = 4, length: int = 9, seed: int = 1) -> dict[str, Tensor]:
    ids = token_ids(rows, length, seed)
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def moved(out: int, width: int, rank: int = RANK, **fields: Any) -> Any:
    """One layer in fp64 whose scales stand somewhere."""
    model = rw.adapt(OneLinear(width, out), rw.recipes.randlora(rank=rank, **fields))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in site(model).update.parameters():  # type: ignore[union-attr]
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=DOUBLE))
    return model


def summed(out: int, width: int, scale: Tensor, gamma: Tensor, scaling: float, seed: int = 0) -> Tensor:
    """dW (out, in): the sum over bases, term by term, from nothing but the bases and the scales."""
    rank, count = scale.shape
    small, large = (t.double() for t in draw_bases(rank, min(out, width), max(out, width), seed))
    columns = large.reshape(large.shape[0], -1)  # (larger, n rank)
    total = torch.zeros(max(out, width), min(out, width), dtype=DOUBLE)
    for j in range(count):
        # which column meets which scale is PEFT's order: base j takes every n-th of the equally random columns
        pair = columns[:, [k * count + j for k in range(rank)]]
        total = total + pair @ torch.diag(scale[:, j]) @ small @ torch.diag(gamma[j])
    return scaling * (total if width <= out else total.T)


@pytest.mark.check("randlora", 1)
@pytest.mark.parametrize(("out", "width"), SHAPES)
def test_the_update_is_the_sum_over_the_bases(out: int, width: int) -> None:
    model = moved(out, width, alpha=6.0)
    module = site(model)
    update: Any = module.update
    wanted = summed(out, width, update.scale.detach(), update.gamma.detach(), 1.5)
    assert relative(module.update.factors().delta().detach(), wanted) < 1e-12  # type: ignore[union-attr]
    x = torch.randn(7, width, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
    assert relative(model(x).detach(), x @ (module.weight + wanted).T + module.base_layer.bias) < 1e-12  # type: ignore[operator]


@pytest.mark.check("randlora", 2)
@pytest.mark.parametrize(("out", "width"), SHAPES)
def test_gradients_are_those_of_the_sum(out: int, width: int) -> None:
    model = moved(out, width)
    update: Any = site(model).update
    x = torch.randn(7, width, dtype=DOUBLE, generator=torch.Generator().manual_seed(1), requires_grad=True)
    g = torch.randn(7, out, dtype=DOUBLE, generator=torch.Generator().manual_seed(2))
    model(x).backward(g)
    scale, gamma = (t.detach().clone().requires_grad_() for t in (update.scale, update.gamma))
    xx = x.detach().clone().requires_grad_()
    (xx @ (site(model).weight + summed(out, width, scale, gamma, site(model).site.scaling)).T).backward(g)
    for got, wanted in ((update.scale.grad, scale.grad), (update.gamma.grad, gamma.grad), (x.grad, xx.grad)):
        assert wanted is not None
        assert relative(got, wanted) < 1e-12


def peft_of(base: nn.Module, rank: int, targets: list[str], alpha: int, **fields: Any) -> Any:
    config = RandLoraConfig(r=rank, target_modules=targets, randlora_alpha=alpha, projection_prng_key=fields.pop("seed", 0), **fields)
    return get_peft_model(base, config)  # type: ignore[arg-type]


@pytest.mark.check("randlora", 3)
@pytest.mark.parametrize("make", [llama, gpt2])
def test_pool_values_and_gradients_are_pefts(make: Any) -> None:
    """Square, wide and tall sites cut out of one pool; equal scales give equal logits and gradients."""
    targets = ["c_attn", "c_fc"] if make is gpt2 else ["q_proj", "k_proj", "down_proj", "up_proj"]
    theirs = peft_of(make(), RANK, targets, 80, seed=5, **({"fan_in_fan_out": True} if make is gpt2 else {})).eval()
    ours = rw.adapt(make(), rw.recipes.randlora(rank=RANK, alpha=80, pool_seed=5, targets=targets))
    pool: Any = next(module for module in ours.modules() if type(module).__name__ == "Bases")
    assert torch.equal(pool.small_4, theirs.base_model.randlora_A["default"][:, 0])
    assert torch.equal(pool.large_4, theirs.base_model.randlora_B["default"])
    generator = torch.Generator().manual_seed(6)
    layers = {name: theirs.base_model.model.get_submodule(name) for name in adapted_sites(ours)}
    for name, module in adapted_sites(ours).items():
        update: Any = module.update
        assert torch.equal(layers[name].randlora_gamma["default"], update.gamma)  # the same start
        with torch.no_grad():
            update.scale.normal_(generator=generator, std=1e-2)
            layers[name].randlora_lambda["default"].copy_(update.scale)
    b = batch()
    assert relative(logits(ours, b["input_ids"]), logits(theirs, b["input_ids"])) < 1e-5
    for model in (ours, theirs):
        model(**b).loss.backward()
    for name, module in adapted_sites(ours).items():
        update = module.update
        assert relative(update.scale.grad, layers[name].randlora_lambda["default"].grad) < 1e-4, name
        assert relative(update.gamma.grad, layers[name].randlora_gamma["default"].grad) < 1e-4, name


@pytest.mark.check("randlora", 4)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_starts_at_the_base_and_only_lambda_moves_in_the_first_step(dtype: torch.dtype) -> None:
    model, ids = llama(dtype=dtype), token_ids()
    before = logits(model, ids)
    rw.adapt(model, rw.recipes.randlora(rank=RANK))
    assert torch.equal(logits(model, ids), before)
    model(**batch()).loss.backward()
    for module in adapted_sites(model).values():
        update: Any = module.update
        assert update.scale.grad.any()
        assert not update.gamma.grad.any()
        assert update.scale.dtype == torch.float32
    trained = trained_a_little(model, batch(), lr=1e-3)
    assert relative(logits(trained, ids), before) > 1e-3


@pytest.mark.check("randlora", 5)
@pytest.mark.parametrize(("out", "width"), SHAPES)
@pytest.mark.parametrize("rank", [2, 4, 8])
def test_the_update_has_full_rank_and_a_larger_rank_trains_fewer_numbers(out: int, width: int, rank: int) -> None:
    model = moved(out, width, rank)
    smaller = min(out, width)
    delta = site(model).update.factors().delta()  # type: ignore[union-attr]
    assert int(torch.linalg.matrix_rank(delta)) == smaller
    count = -(-smaller // rank)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == rank * count + count * smaller
    plan = rw.plan(OneLinear(width, out), rw.recipes.randlora(rank=rank))
    assert plan.trained_parameters == rank * count + count * smaller
    assert plan.frozen_adapter_numbers == rank * smaller + max(out, width) * count * rank
    pool: Any = next(module for module in model.modules() if type(module).__name__ == "Bases")
    assert plan.frozen_adapter_numbers == sum(buffer.numel() for buffer in pool.buffers())


@pytest.mark.check("randlora", 6)
def test_the_forecast_counts_what_is_kept_for_the_backward() -> None:
    """gamma stands in `down` of a tall site, which keeps x, and in `up` of a wide one, which does not."""
    for out, width in SHAPES:
        plan = rw.plan(OneLinear(width, out), rw.recipes.randlora(rank=RANK))
        width_h = -(-min(out, width) // RANK) * RANK
        assert plan.saved_bytes_per_token(1) == width_h + (width if width <= out else 0)
        assert plan.flops_per_token["branch"] == width_h * (
            (6 if width <= out else 4) * width + (4 if width <= out else 6) * out
        )  # the gradient of lambda alone is rank-sized work


@pytest.mark.check("randlora", 7)
def test_the_file_holds_scales_and_no_bases(tmp_path: Path) -> None:
    model = trained_a_little(rw.adapt(llama(), rw.recipes.randlora(rank=RANK, pool_seed=3)), batch(), lr=1e-3)
    about = comes_back_from_its_file(model, llama, tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert sum(t.numel() for t in tensors.values()) == model.rankwise.plan.trained_parameters  # type: ignore[union-attr]
    assert about["pool_checksum"]
    rw.save(model, tmp_path / "b", save_projection=True)
    assert torch.equal(logits(rw.load(llama(), tmp_path / "b"), token_ids()), logits(model, token_ids()))
    about["pool_checksum"] = "0" * 64
    (tmp_path / "a" / "rankwise.json").write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match="another checksum"):
        rw.load(llama(), tmp_path / "a")


@pytest.mark.check("randlora", 8)
@pytest.mark.parametrize("make", [llama, gpt2])
def test_merged_exported_and_on_a_4_bit_base(make: Any, tmp_path: Path) -> None:
    model = trained_a_little(rw.adapt(make(), rw.recipes.randlora(rank=RANK)), batch(), lr=1e-3)
    trained = logits(model, token_ids())
    export_lora(model, tmp_path / "lora")  # of full rank, as the update is
    theirs = PeftModel.from_pretrained(make(), tmp_path / "lora").eval()
    assert relative(logits(theirs, token_ids()), trained) < 1e-4
    rw.merge(model)
    assert relative(logits(model, token_ids()), trained) < 1e-4
    if make is llama:
        held = rw.unadapt(rw.adapt(make(), rw.recipes.lora(rank=RANK, storage="nf4")))
        before = logits(held, token_ids())
        rw.adapt(held, rw.recipes.randlora(rank=RANK))
        assert torch.equal(logits(held, token_ids()), before)
        assert relative(logits(trained_a_little(held, batch(), lr=1e-3), token_ids()), before) > 1e-3


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.check("randlora", 9)
def test_a_run_from_yaml_resumes_bit_for_bit(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resumes_bit_for_bit(world, tmp_path, monkeypatch, {"name": "randlora"}, rank=8, train={"lr": 1e-3})


def test_bad_input_is_refused_with_the_remedy() -> None:
    for fields, reason in (
        ({"init": "pissa"}, "no pair for an init to fill"),
        ({"frozen": {"core"}, "gain": "dora"}, "stay at zero"),
        ({"schedule": "lora-drop"}, "an update without a pair of its own"),
    ):
        with pytest.raises(RecipeError, match=reason):
            rw.recipes.randlora().replace(**fields)
    with pytest.raises(RecipeError, match=r"larger than its smaller side 16.*lower the rank"):
        rw.plan(llama(), rw.recipes.randlora(rank=20))
    with pytest.raises(RecipeError, match="at most 64 bits"):
        rw.recipes.randlora(pool_seed=2**64)
