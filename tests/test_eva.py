"""EVA: principal directions of the inputs, and ranks where they explain most, from the inputs themselves in fp64."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_models import relative
from method_checks import comes_back_from_its_file, resumes_bit_for_bit, trained_a_little
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from tiny_models import OneLinear, gpt2, llama, logits, token_ids
from torch import Tensor, nn
from training_models import make_world

import rankwise as rw
from rankwise import calibration as module_under_test
from rankwise.errors import CalibrationError, RecipeError
from rankwise.inits import Eva
from rankwise.sites import adapted_sites

RANK = 4
TARGETS = ["q_proj", "k_proj", "down_proj", "up_proj"]


def batch(rows: int = 6, length: int = 20, seed: int = 1) -> dict[str, Tensor]:
    ids = token_ids(rows, length, seed)
    return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}


def inputs(model: nn.Module, batches: list[dict[str, Tensor]], names: list[str]) -> dict[str, Tensor]:
    """Site name -> its inputs (tokens, in) in fp64, of tokens that are no padding and have a label."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    for b in batches:
        keep = b["attention_mask"].bool() & (b["labels"] != -100)
        handles = [
            model.get_submodule(name).register_forward_pre_hook(
                lambda module, args, name=name, keep=keep: seen[name].append(args[0][keep].double())
            )
            for name in names
        ]
        with torch.no_grad():
            model(**b)
        for handle in handles:
            handle.remove()
    return {name: torch.cat(rows) for name, rows in seen.items()}


def principal(x: Tensor) -> tuple[Tensor, Tensor]:
    """(directions (k, in), share of the variance (k,)) of rows, by a decomposition of the rows themselves."""
    _, s, vt = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    return vt, s.square() / s.square().sum()


def factors(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    return {name: (m.update.down.detach(), m.update.up.detach()) for name, m in adapted_sites(model).items()}  # type: ignore[union-attr]


def two_batches() -> list[dict[str, Tensor]]:
    """With padding on the left of one, and a prompt without labels in the other."""
    one, other = batch(5, 18, 1), batch(6, 20, 2)
    one["attention_mask"][:2, :4] = 0
    one["labels"][:2, :4] = -100
    other["labels"][:, :7] = -100
    return [one, other]


@pytest.mark.check("eva", 1)
@pytest.mark.parametrize("budget", [1, 2**30])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_the_start_is_the_principal_directions_of_the_labelled_inputs(make: Any, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_under_test, "BUDGET", budget)
    batches, model = two_batches(), make()
    rw.adapt(model, rw.recipes.eva(rank=RANK, rho=1.0), calibration=batches)
    for name, x in inputs(make(), batches, list(adapted_sites(model))).items():
        directions, _ = principal(x)
        down = factors(model)[name][0].double()
        assert down.shape[0] == RANK
        torch.testing.assert_close(down @ down.T, torch.eye(RANK, dtype=torch.float64), rtol=0, atol=1e-5)
        # one by one and in order: the eigenvalues of random inputs are apart
        assert (down * directions[:RANK]).sum(1).abs().min() > 1 - 1e-5, name


@pytest.mark.check("eva", 1)
def test_without_the_label_mask_and_without_centring_other_directions_come_out() -> None:
    batches = two_batches()
    for option, change in (("label_mask", {"labels": "kept"}), ("centre", {})):
        model = rw.adapt(llama(), rw.recipes.eva(rank=RANK, rho=1.0, **{option: False}), calibration=batches)
        seen = [dict(b, labels=torch.where(b["attention_mask"].bool(), 0, -100)) if change else b for b in batches]
        for name, x in inputs(llama(), seen, list(adapted_sites(model))).items():
            directions = principal(x)[0] if change else torch.linalg.svd(x, full_matrices=False).Vh
            assert (factors(model)[name][0].double() * directions[:RANK]).sum(1).abs().min() > 1 - 1e-5, (option, name)


@pytest.mark.check("eva", 2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_start_is_the_base_bit_for_bit(dtype: torch.dtype) -> None:
    model, ids = llama(dtype=dtype), token_ids()
    before = logits(model, ids)
    rw.adapt(model, rw.recipes.eva(rank=RANK), calibration=[batch()])
    assert torch.equal(logits(model, ids), before)
    assert all(not up.any() and down.dtype == torch.float32 for down, up in factors(model).values())
    assert all(module.offset is None for module in adapted_sites(model).values())


@pytest.mark.check("eva", 3)
@pytest.mark.parametrize("rho", [1.5, 2.0, 3.0])
def test_ranks_go_to_the_largest_shares_of_variance_within_the_budget(rho: float) -> None:
    batches, rank = two_batches(), 3
    recipe = rw.recipes.eva(rank=rank, rho=rho, targets=TARGETS)
    names = [site.name for site in rw.plan(llama(), recipe).sites]
    sides = {site.name: min(site.in_features, site.out_features) for site in rw.plan(llama(), recipe).sites}
    model = rw.adapt(llama(), recipe, calibration=batches)
    ranks = dict.fromkeys(names, 0) | {name: m.site.rank for name, m in adapted_sites(model).items()}
    assert sum(ranks.values()) == rank * len(names)
    shares = {name: principal(x)[1] for name, x in inputs(llama(), batches, names).items()}
    taken = [float(share) for name in names for share in shares[name][: ranks[name]]]
    left = [float(share) for name in names for share in shares[name][ranks[name] : min(round(rho * rank), sides[name])]]
    assert max(ranks.values()) <= round(rho * rank)
    assert min(taken) >= max(left) * (1 - 1e-6)
    assert len(set(ranks.values())) > 1, "or nothing was distributed"


def lopsided() -> Any:
    """Two layers; the first one's inputs vary along one direction only, the second one's along all."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flat, self.round = OneLinear(16, 16, dtype=torch.float32), OneLinear(16, 16, dtype=torch.float32, seed=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.flat(x[:, :1] * torch.ones(16)) + self.round(x)

    return Two()


@pytest.mark.check("eva", 3)
def test_a_site_without_a_rank_is_left_out_and_what_is_left_is_saved_and_loaded(tmp_path: Path) -> None:
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(2))
    model = rw.adapt(lopsided(), rw.recipes.eva(rank=1, rho=2.0), calibration=[{"x": x}])
    assert {name: m.site.rank for name, m in adapted_sites(model).items()} == {"flat.proj": 1, "round.proj": 1}
    wide = rw.adapt(lopsided(), rw.recipes.eva(rank=4, rho=1.75), calibration=[{"x": x}])
    # one direction explains everything of the first; the others explain nothing there and something at the second
    assert {name: m.site.rank for name, m in adapted_sites(wide).items()} == {"flat.proj": 1, "round.proj": 7}
    sites = rw.plan(lopsided(), rw.recipes.eva(rank=1)).sites
    begun = {sites[0].name: _begun([0.9, 0.8]), sites[1].name: _begun([0.1, 0.0])}
    assert Eva(rho=2.0).distribute(sites, begun) == {"flat.proj": 2, "round.proj": 0}
    from rankwise.adapting import build
    from rankwise.distributing import distributed

    fresh = lopsided()
    made, cut = distributed(fresh, rw.plan(fresh, rw.recipes.eva(rank=1, lr=1e-2)), begun)
    assert [(site.name, site.rank, site.scaling) for site in made.sites] == [("flat.proj", 2, 2.0)]
    build(fresh, made.recipe, made, begun=cut)
    with torch.no_grad():
        adapted_sites(fresh)["flat.proj"].update.up.normal_()  # type: ignore[union-attr]
    rw.save(fresh, tmp_path / "a")
    loaded = rw.load(lopsided(), tmp_path / "a")
    assert list(adapted_sites(loaded)) == ["flat.proj"]
    assert torch.equal(loaded(x), fresh(x))


def _begun(weights: list[float]) -> Any:
    from rankwise.inits import Beginning

    return Beginning(torch.eye(16)[: len(weights)], torch.zeros(16, len(weights)), (), torch.tensor(weights))


@pytest.mark.check("eva", 4)
@pytest.mark.parametrize("scaling", ["lora", "rslora"])
@pytest.mark.parametrize("adjust", [True, False])
def test_the_scaling_after_redistribution(adjust: bool, scaling: Any) -> None:
    recipe = rw.recipes.eva(rank=3, alpha=6.0, adjust_scaling=adjust, scaling=scaling, targets=TARGETS)
    model = rw.adapt(llama(), recipe, calibration=two_batches())
    changed = 0
    for module in adapted_sites(model).values():
        rank = module.site.rank
        alpha = 6.0 * rank / 3 if adjust else 6.0
        assert module.site.alpha == pytest.approx(alpha)
        assert module.site.scaling == pytest.approx(alpha / (rank if scaling == "lora" else rank**0.5))
        changed += rank != 3
    assert changed


@pytest.mark.check("eva", 5)
def test_ranks_and_directions_are_pefts() -> None:
    """PEFT's incremental decomposition of one batch, again and again until it stands still, against one decomposition here."""
    b, names = batch(16, 24, 3), ["q_proj", "o_proj", "up_proj", "down_proj"]  # each with an input of its own, so that no shares tie
    config = LoraConfig(
        r=RANK, lora_alpha=8, init_lora_weights="eva", target_modules=names, eva_config=EvaConfig(rho=2.0, tau=0.9999)
    )  # fmt: skip
    theirs = get_peft_model(llama(num_key_value_heads=4), config)
    initialize_lora_eva_weights(theirs, [b], show_progress_bar=False)
    ours = rw.adapt(llama(num_key_value_heads=4), rw.recipes.eva(rank=RANK, alpha=8, targets=names), calibration=[b])
    found = {name: m for name, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert set(found) == set(adapted_sites(ours))
    for name, module in adapted_sites(ours).items():
        a = found[name].lora_A["default"].weight.detach()
        down = factors(ours)[name][0]
        assert a.shape == down.shape, name
        assert found[name].scaling["default"] == pytest.approx(module.site.scaling)
        assert float(torch.linalg.svdvals(a @ down.T)[-1]) > 0.99, name
    assert len({module.site.rank for module in adapted_sites(ours).values()}) > 1


@pytest.mark.check("eva", 6)
def test_whitened_rows_see_unit_variance() -> None:
    batches = [batch()]
    model = rw.adapt(llama(), rw.recipes.eva(rank=RANK, rho=1.0, whiten=True), calibration=batches)
    for name, x in inputs(llama(), batches, list(adapted_sites(model))).items():
        h = (x - x.mean(0)) @ factors(model)[name][0].double().T
        torch.testing.assert_close(h.T @ h / len(h), torch.eye(RANK, dtype=torch.float64), rtol=0, atol=1e-4)


@pytest.mark.check("eva", 7)
def test_the_folder_is_a_plain_lora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained_a_little(rw.adapt(llama(), rw.recipes.eva(rank=RANK, targets=TARGETS), calibration=[batch()]), batch())
    monkeypatch.setattr(Eva, "begin", None)  # all is in the file
    about = comes_back_from_its_file(model, llama, tmp_path / "a")
    assert about["peft_type"] == "LORA"
    theirs = PeftModel.from_pretrained(llama(), tmp_path / "a").eval()
    assert relative(logits(theirs, token_ids()), logits(model, token_ids())) < 1e-5
    ranks = {name: module.site.rank for name, module in adapted_sites(model).items()}
    assert {name: site["rank"] for name, site in about["sites"].items()} == ranks


@pytest.mark.check("eva", 8)
def test_sites_of_one_input_share_directions_and_nothing_depends_on_the_global_seed() -> None:
    starts = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        base = llama()
        torch.manual_seed(seed)
        starts.append(factors(rw.adapt(base, rw.recipes.eva(rank=RANK, targets=["q_proj", "k_proj"]), calibration=[batch()])))
    for name, (down, _) in starts[0].items():
        assert torch.equal(down, starts[1][name][0])
    for q, k in itertools.pairwise(starts[0]):
        if q.rpartition(".")[0] == k.rpartition(".")[0]:
            shared = min(len(starts[0][q][0]), len(starts[0][k][0]))
            assert torch.equal(starts[0][q][0][:shared], starts[0][k][0][:shared])


@pytest.mark.check("eva", 9)
def test_adapting_with_the_settled_recipe_gives_the_same_adapter() -> None:
    first = rw.adapt(llama(), rw.recipes.eva(rank=RANK, targets=TARGETS), calibration=[batch()])
    settled: Any = first.rankwise.recipe  # type: ignore[union-attr]
    assert settled.init.rho == 1
    again = rw.adapt(llama(), settled, calibration=[batch()])
    assert [site.rank for site in again.rankwise.plan.sites] == [site.rank for site in first.rankwise.plan.sites]  # type: ignore[union-attr]
    for name, (down, _) in factors(again).items():
        torch.testing.assert_close(down, factors(first)[name][0], rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.check("eva", 10)
def test_a_run_from_yaml_resumes_bit_for_bit(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the tiny base is not trained, so all its inputs vary alike: what is given unevenly is made even
    method = {"name": "eva", "calibration_rows": 8, "rank_pattern": {"down_proj": 6}}
    whole = resumes_bit_for_bit(world, tmp_path, monkeypatch, method, rank=2)
    about = json.loads((whole.adapter / "rankwise.json").read_text())
    ranks = {name: site["rank"] for name, site in about["sites"].items()}
    assert sum(ranks.values()) == 4 * 2 + 2 * 6
    assert all(2 < rank < 5 for rank in ranks.values())
    assert {name.removeprefix("re:").replace("\\", "") for name in about["recipe"]["rank_pattern"]} == set(ranks)
    assert "the 20 ranks are distributed, 3 to 4 a site" in " ".join((whole.run / "plan.txt").read_text().split())


def test_bad_input_is_refused_with_the_remedy() -> None:
    recipe = rw.recipes.eva(rank=RANK)
    with pytest.raises(CalibrationError, match="calibration is missing"):
        rw.adapt(llama(), recipe)
    with pytest.raises(CalibrationError, match=r"saw 5 calibration tokens, and 8 directions.*calibration_rows.*rho"):
        rw.adapt(llama(), recipe, calibration=[batch(1, 5)])
    with pytest.raises(CalibrationError, match=r"inputs of proj do not vary"):
        rw.adapt(OneLinear(8, 8), rw.recipes.eva(rank=2), calibration=[{"x": torch.ones(20, 8, dtype=torch.float64)}])
    with pytest.raises(RecipeError, match=r"rho=0\.5 of the eva init must be at least 1"):
        rw.recipes.eva(rho=0.5)
    with pytest.raises(RecipeError, match="sites can share one update only where they have one rank"):
        rw.recipes.eva(schedule="lora-drop")
