"""Saving and loading: bit for bit, and strict."""

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_models import CASES, FILES, IDS, adapted, base, logits, prompt_of, refused, relative, tensors_of, train, trained
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import rankwise as rw
from rankwise.checkpoint import load_trainable_state, trainable_state
from rankwise.errors import CheckpointError, RecipeError, TargetError
from rankwise.recipe import Recipe
from rankwise.recipes import RECIPES
from rankwise.sites import adapted_sites


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def no_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a decomposition was run")

    for name in ("svd", "qr", "eigh", "svdvals"):
        monkeypatch.setattr(torch.linalg, name, refuse)
    for name in ("svd", "svd_lowrank", "pca_lowrank", "qr"):
        monkeypatch.setattr(torch, name, refuse)


# --- round trips -----------------------------------------------------------------------------------------------------------------------


def test_every_recipe_has_a_case() -> None:
    assert set(RECIPES) <= {recipe().name for _, recipe, _ in CASES.values()}


@pytest.mark.check("pissa", 5)
@pytest.mark.check("vera", 10)
@pytest.mark.parametrize("case", CASES)
def test_loading_gives_back_the_model_bit_for_bit(case: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    model = trained(case)
    before = logits(model)
    assert relative(before, logits(base(CASES[case][0]))) > 1e-2  # the adapter does something
    assert rw.save(model, tmp_path / "adapter") == tmp_path / "adapter"
    assert {entry.name for entry in (tmp_path / "adapter").iterdir()} == FILES
    request.getfixturevalue("no_decomposition")
    loaded = rw.load(base(CASES[case][0]), tmp_path / "adapter")
    ours, theirs = tensors_of(model), tensors_of(loaded)
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(logits(loaded), before)
    assert loaded.rankwise.recipe == model.rankwise.recipe
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {n for n, p in model.named_parameters() if p.requires_grad}
    # and once more: nothing drifts
    rw.save(loaded, tmp_path / "again")
    assert (tmp_path / "again/adapter_model.safetensors").read_bytes() == (tmp_path / "adapter/adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", ["dora", "pissa", "dora on pissa fold", "vera", "moslora", "propulsion"])
def test_other_dtypes_round_trip(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    name, recipe, _ = CASES[case]
    model = train(adapted(name, recipe(), dtype))
    rw.save(model, tmp_path / "a")
    masters = torch.promote_types(dtype, torch.float32)
    assert {tensor.dtype for tensor in load_file(tmp_path / "a/adapter_model.safetensors").values()} == {masters}
    assert torch.equal(logits(rw.load(base(name, dtype), tmp_path / "a")), logits(model))


@pytest.mark.check("pissa", 5)
@pytest.mark.check("moslora", 10)
@pytest.mark.parametrize(
    "case", ["lora", "pissa", "pissa fold", "dora on pissa", "moslora", "moslora on pissa", "dvora", "propulsion", "bert classifier"]
)
def test_a_loaded_model_merges_unmerges_and_disables(case: str, tmp_path: Path) -> None:
    name, recipe, _ = CASES[case]
    plain, keeps = logits(base(name)), recipe().base == "keep"

    def is_base(values: torch.Tensor) -> bool:
        return torch.equal(values, plain) if keeps else relative(values, plain) < 1e-5

    before = trained(case)
    rw.save(before, tmp_path / "a")
    model: Any = rw.load(base(name), tmp_path / "a")
    wanted = logits(before)
    with rw.disabled(model):
        assert is_base(logits(model))
    rw.merge(model)
    assert relative(logits(model), wanted) < 1e-5
    with rw.disabled(model):
        assert is_base(logits(model))
    rw.unmerge(model)
    assert torch.equal(logits(model), wanted)
    rw.unadapt(model)
    assert is_base(logits(model))
    assert not adapted_sites(model)
    assert dict(model.named_parameters()).keys() == dict(base(name).named_parameters()).keys()  # no mixer, no vector left


@pytest.mark.check("moslora", 10)
def test_another_adapter_brings_its_own_mixer(tmp_path: Path) -> None:
    for seed in (0, 1):
        rw.save(train(rw.adapt(base(), rw.recipes.moslora(rank=4, seed=seed))), tmp_path / str(seed))
    model: Any = rw.load(base(), tmp_path / "0")
    first = logits(model)
    model = rw.load(rw.unadapt(model), tmp_path / "1")
    assert not torch.equal(logits(model), first)
    model = rw.load(rw.unadapt(model), tmp_path / "0")
    assert torch.equal(logits(model), first)


@pytest.mark.parametrize("case", ["lora", "dora on pissa", "vera", "propulsion over lora"])
def test_merged_and_disabled_models_save_the_same_files(case: str, tmp_path: Path) -> None:
    model = trained(case)
    rw.save(model, tmp_path / "plain")
    with rw.disabled(model):
        rw.save(model, tmp_path / "disabled")
    rw.merge(model)
    merged = logits(model)
    rw.save(model, tmp_path / "merged")
    assert torch.equal(logits(model), merged)
    for name in FILES:
        content = (tmp_path / "plain" / name).read_bytes()
        assert content == (tmp_path / "disabled" / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()


def test_a_merged_dora_is_measured_on_its_own_base(tmp_path: Path) -> None:
    """Whether PEFT can read DoRA depends on the norms of the base; those of the merged weights would tell something else."""
    model = rw.adapt(nn.Sequential(nn.Linear(4, 4)), rw.recipes.dora(rank=1, alpha=1, targets=["0"]))
    with torch.no_grad():
        model[0].base_layer.weight.copy_(2 * torch.eye(4))
        model[0].gain.begin(model[0].base_layer, model[0].storage, None, None)
        model[0].gain.magnitude.fill_(10)
        model[0].update.down.copy_(torch.tensor([[1.0, 0, 0, 0]]))
        model[0].update.up.copy_(torch.tensor([[-1.0], [0], [0], [0]]))
    rw.merge(model)
    rw.save(model, tmp_path / "a")
    assert json.loads((tmp_path / "a/adapter_config.json").read_text())["peft_type"] == "LORA"


def test_parameters_cast_to_16_bit_are_fp32_in_the_file(tmp_path: Path) -> None:
    model = rw.adapt(base(), rw.recipes.lora(rank=4, gain="propulsion", modules_to_save=["lm_head"])).bfloat16()
    rw.save(model, tmp_path / "a")
    assert {tensor.dtype for tensor in load_file(tmp_path / "a/adapter_model.safetensors").values()} == {torch.float32}


def test_a_model_without_adapters_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"no adapters; call rankwise\.adapt"):
        rw.save(base(), tmp_path / "a")
    model = train(rw.adapt(base(), rw.recipes.lora(rank=2)))
    rw.merge(model, keep_base=False)
    with pytest.raises(TargetError, match="no adapters"):
        rw.save(model, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_dora_far_from_its_start_comes_back_exactly(tmp_path: Path) -> None:
    model = rw.adapt(base(), rw.recipes.dora(rank=4))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in adapted_sites(model).values():
            delta = module.gain.magnitude  # pyright: ignore
            delta.copy_(torch.randn(delta.shape, generator=generator) * 100)
            module.update.up.copy_(torch.randn(module.update.up.shape, generator=generator))  # pyright: ignore
    rw.save(model, tmp_path / "a")
    assert torch.equal(logits(rw.load(base(), tmp_path / "a")), logits(model))


def test_propulsion_keeps_powers_next_to_one(tmp_path: Path) -> None:
    model = rw.adapt(base(), rw.recipes.propulsion())
    with torch.no_grad():
        for module in adapted_sites(model).values():
            module.gain.z.fill_(1e-9)  # pyright: ignore
    rw.save(model, tmp_path / "a")
    assert all((z == 1e-9).all() for z in tensors_of(rw.load(base(), tmp_path / "a")).values() if z.dim() == 1)


@pytest.mark.check("vera", 10)
def test_vera_loads_in_a_fresh_process(tmp_path: Path) -> None:
    model = trained("vera")
    for name, projection in (("seed", False), ("pair", True)):
        rw.save(model, tmp_path / name, save_projection=projection)
        held = [key for key in load_file(tmp_path / name / "adapter_model.safetensors") if "vera_A" in key or "vera_B" in key]
        assert sorted(held) == (["base_model.vera_A", "base_model.vera_B"] if projection else [])
    base().save_pretrained(tmp_path / "base")
    save_file({"logits": logits(model), "ids": IDS}, tmp_path / "wanted.safetensors")
    code = """if True:
        import sys, torch, rankwise
        torch.set_num_threads(1)
        from safetensors.torch import load_file
        from transformers import LlamaForCausalLM
        wanted = load_file(sys.argv[1] + "/wanted.safetensors")
        for name in ("seed", "pair"):
            model = rankwise.load(LlamaForCausalLM.from_pretrained(sys.argv[1] + "/base"), sys.argv[1] + "/" + name).eval()
            with torch.no_grad():
                assert torch.equal(model(input_ids=wanted["ids"]).logits, wanted["logits"])
        print("identical")
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(rw.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "identical", done.stderr


@pytest.mark.check("vera", 9)
@pytest.mark.parametrize("case", ["vera", "dvora", "vera two ranks"])
def test_a_pool_with_another_checksum_is_refused(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine whose torch draws other numbers from the seed; the part of the Check that needs no second device."""
    from rankwise.updates import vera

    model = trained(case)
    rw.save(model, tmp_path / "seed")
    rw.save(model, tmp_path / "pair", save_projection=True)
    draw = vera.draw_pair
    monkeypatch.setattr(vera, "draw_pair", lambda *args: tuple(t.roll(1) for t in draw(*args)))
    untouched = base()
    with pytest.raises(CheckpointError, match=r"another checksum.*save_projection=True"):
        rw.load(untouched, tmp_path / "seed")
    assert torch.equal(logits(untouched), logits(base()))
    # the projections themselves make it independent of what is drawn, and stay with it
    loaded = rw.load(untouched, tmp_path / "pair")
    assert torch.equal(logits(loaded), logits(model))
    rw.save(loaded, tmp_path / "again")
    assert torch.equal(logits(rw.load(base(), tmp_path / "again")), logits(model))


def test_save_projection_needs_projections(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"save_projection=True.*'lora' has no shared projection"):
        rw.save(trained("lora"), tmp_path / "a", save_projection=True)


# --- the exact state of a run ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*RECIPES, "dora on pissa fold", "dora on pissa", "dvora", "bert classifier", "propulsion over lora"])
@pytest.mark.parametrize("way", ["adapt", "load"])
def test_a_run_resumes_bit_for_bit(case: str, way: str, tmp_path: Path) -> None:
    name, recipe, _ = CASES[case]
    whole = adapted(name, recipe())
    optimizer: Any = rw.optimizer(whole, lr=1e-2, total_steps=4)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, k: int) -> None:
        model.train()
        torch.manual_seed(k)  # BERT's own dropout
        model(input_ids=IDS.roll(k, 1), **prompt_of(model)).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    for k in range(2):
        step(whole, optimizer, k)
    rw.save(whole, tmp_path / "a")
    state, moments = trainable_state(whole), copy.deepcopy(optimizer.state_dict())
    session, tensors = optimizer.rankwise_session.state(), {k: v.clone() for k, v in optimizer.rankwise_session.tensors().items()}
    for k in range(2, 4):
        step(whole, optimizer, k)

    resumed = adapted(name, recipe()) if way == "adapt" else rw.load(base(name), tmp_path / "a")
    again: Any = rw.optimizer(resumed, lr=1e-2, total_steps=4)
    again.rankwise_session.restore(session)  # first: shapes follow the ranks
    load_trainable_state(resumed, state)
    again.rankwise_session.restore_tensors(tensors)
    again.load_state_dict(moments)
    for k in range(2, 4):
        step(resumed, again, k)
    assert torch.equal(logits(resumed), logits(whole))
    wanted = trainable_state(whole)
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in trainable_state(resumed).items())


def test_the_trainable_state_is_strict() -> None:
    model = rw.adapt(base(), rw.recipes.dora(rank=4, targets=["q_proj"]))
    state = trainable_state(model)
    names = {name.rpartition("q_proj.")[2] for name in state}
    assert names == {"update.down", "update.up", "gain.magnitude", "gain.magnitude0"}
    first = next(iter(state))
    before = trainable_state(model)
    for wrong, message in (
        ({k: v for k, v in state.items() if k != first}, f"lacks {first}"),
        (state | {first + "x": state[first]}, f"holds {first}x.*did you mean"),
        (state | {first: state[first][:1]}, r"\(1, 32\)"),
        (state | {first: state[first].double()}, "float64"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_trainable_state(model, {k: v + 1 for k, v in wrong.items()})
        assert all(torch.equal(v, before[k]) for k, v in trainable_state(model).items())
    with pytest.raises(TargetError, match="no adapters"):
        trainable_state(base())
    state[first].add_(1)  # a copy: the model does not follow
    assert all(torch.equal(v, before[k]) for k, v in trainable_state(model).items())


# --- what is refused -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    for case in ("dora on pissa", "moslora", "bert classifier"):
        rw.save(trained(case), folder / case)
    return folder


def copied(saved: Path, case: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved / case, tmp_path / "copy"))


def change_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_path_that_is_no_adapter_folder(saved: Path, tmp_path: Path) -> None:
    refused(tmp_path / "none", "none does not exist; give the folder that holds adapter_config.json")
    refused(saved / "moslora/rankwise.json", "rankwise.json is a file")
    refused(tmp_path, "holds no adapter_config.json: the adapter is incomplete")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "rankwise.json"])
def test_a_missing_file_is_named(name: str, saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, "moslora", tmp_path)
    (folder / name).unlink()
    refused(folder, f"holds no {name}: the adapter is incomplete; copy or save the whole folder again")


def test_a_pickle_is_never_loaded(saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, "dora on pissa", tmp_path)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    refused(folder, "adapter_model.bin is a pickle, which is never loaded")


@pytest.mark.parametrize("size", [0, 5, 200, -1])
def test_truncated_weights(size: int, saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, "moslora", tmp_path)
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    refused(folder, "adapter_model.safetensors is truncated or no safetensors file")


@pytest.mark.parametrize("name", ["adapter_config.json", "rankwise.json"])
@pytest.mark.parametrize("text", ['{"peft', "[1]", ""])
def test_broken_json(name: str, text: str, saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, "moslora", tmp_path)
    (folder / name).write_text(text)
    refused(folder, f"{name} (is not readable JSON|must hold a JSON object)")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda about: about.update(format_version=2, rankwise_version="9.9"),
            r"format_version=2, and this version reads 1.*rankwise 9\.9",
        ),
        (lambda about: about.pop("format_version"), "format_version=None"),
        (lambda about: about.pop("sites"), "rankwise.json lacks sites"),
        (lambda about: about.update(peft_type="LOHA"), "peft_type='LOHA', which is unknown"),
        (lambda about: about.update(peft_type="VERA"), "says peft_type='RANKWISE' and rankwise.json says 'VERA'.*files of two adapters"),
        (lambda about: about.update(start="stacked"), "start='stacked', and its recipe needs None"),
        (lambda about: about["recipe"].update(gain={"name": "evil.module"}), "gain='evil.module' is unknown"),
        (lambda about: about["recipe"].update(update={"name": "moslora", "mixr": 1}), "no option 'mixr'"),
        (lambda about: about["recipe"].update(rnak=3), "unknown recipe field 'rnak'; did you mean 'rank'"),
        (lambda about: about.update(recipe=[1]), "rankwise.json: recipe must be a dict"),
        (lambda about: about["recipe"].update(rank=5), "rank=4 in the adapter, 5 by its recipe"),
        (lambda about: about["recipe"].update(alpha=5.0), "scaling=2.0 in the adapter, 1.25 by its recipe"),
        (lambda about: about["recipe"]["targets"].update(include=["q_proj"]), "down_proj among its 14 sites, which this base lacks"),
        (lambda about: about["recipe"]["targets"].update(include=["nothing"]), "does not fit this model: target 'nothing' matches nothing"),
        (lambda about: about.update(sites=["q_proj"]), "rankwise.json: sites must be a dict"),
        (lambda about: about.update(notes=None), "rankwise.json: notes must be a list"),
        (lambda about: about["sites"].update({"model.layers.0.mlp.up_proj": 4}), "rankwise.json: sites must be a dict of dicts"),
        (lambda about: about["recipe"].update(rank_pattern=3), "rankwise.json: .*newer version"),
        (lambda about: about["sites"].pop("model.layers.0.mlp.up_proj"), "this base has model.layers.0.mlp.up_proj, which is not among"),
    ],
)
def test_a_changed_rankwise_json(change: Callable[[Any], Any], message: str, saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, "moslora", tmp_path)
    change_json(folder / "rankwise.json", change)
    refused(folder, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, k: t.pop(k), r"lacks 1 tensors, such as .*layers\.1\.mlp\.up_proj\.lora_mixer\.weight"),
        (lambda t, k: t.update({k + ".more": torch.ones(1)}), r"holds 1 tensors that nothing here takes, such as .*mixer\.weight\.more"),
        (lambda t, k: t.update({k: torch.ones(4, 5)}), r"lora_mixer\.weight has shape \(4, 5\), and this base needs \(4, 4\)"),
        (lambda t, k: t[k].fill_(float("nan")), r"lora_mixer\.weight is not finite"),
        (lambda t, k: t[k].fill_(float("inf")), r"lora_mixer\.weight is not finite"),
    ],
)
def test_changed_tensors(change: Callable[[Any, str], Any], message: str, saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, "moslora", tmp_path)
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors, "base_model.model.model.layers.1.mlp.up_proj.lora_mixer.weight")
    save_file(tensors, folder / "adapter_model.safetensors")
    refused(folder, message)


def test_another_base_is_refused_by_fingerprint(saved: Path) -> None:
    other = base()
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight.add_(0.1)
    other.config._name_or_path = "the/other"
    refused(
        saved / "dora on pissa",
        "another base: .*fingerprint [0-9a-f]{16}, and this one is the/other with [0-9a-f]{16}.*any_base=True",
        other,
    )
    model = rw.load(other, saved / "dora on pissa", any_base=True)
    assert torch.isfinite(logits(model)).all()


def test_a_base_of_another_family_is_refused(saved: Path) -> None:
    refused(saved / "dora on pissa", "down_proj among its 14 sites, which this base lacks", base("gpt2"), any_base=True)
    refused(saved / "bert classifier", "modules_to_save: 'classifier' matches no module", base(), any_base=True)


def test_a_base_that_is_adapted_already_is_refused(saved: Path) -> None:
    model = rw.load(base(), saved / "moslora")
    before = logits(model)
    with pytest.raises(CheckpointError, match=r"adapted already; take the adapters off with rankwise\.unadapt"):
        rw.load(model, saved / "moslora")
    assert torch.equal(logits(model), before)


def test_a_broken_model_does_not_replace_a_good_file(tmp_path: Path) -> None:
    model = trained("lora")
    rw.save(model, tmp_path / "a")
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    next(p for p in model.parameters() if p.requires_grad).data[0] = float("nan")
    with pytest.raises(CheckpointError, match=r"lora_A\.weight is not finite, so nothing was saved"):
        rw.save(model, tmp_path / "a")
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before


# --- recipes as JSON -------------------------------------------------------------------------------------------------------------------

_numbers = st.floats(1e-6, 1e6, allow_nan=False)
_recipes = st.fixed_dictionaries(
    {},
    optional={
        "rank": st.integers(1, 512),
        "alpha": st.none() | _numbers,
        "scaling": st.sampled_from(["lora", "rslora"]),
        "dropout": st.floats(0, 0.99),
        "base": st.sampled_from(["keep", "fold"]),
        "frozen": st.frozensets(st.sampled_from(["down", "up", "core", "tail"])),
        "update": st.sampled_from(["lora", "none", {"name": "vera", "d_initial": 0.3}, {"name": "moslora", "mixer": "identity"}]),
        "gain": st.sampled_from(["none", {"name": "dora", "norm_grad": "full"}, {"name": "propulsion", "degree": 3}]),
        "init": st.sampled_from(
            ["kaiming", "own", "random-up", {"name": "pissa", "oversample": 4}, {"name": "milora-svd", "selector": "mid"}]
        ),
        "gradient": st.sampled_from(["plain", {"name": "lora-plus", "ratio": 4.0}, "lora-fa"]),
        "targets": st.builds(
            lambda include, layers: {"include": include, "layers": layers},
            st.lists(st.text(min_size=1), min_size=1),
            st.none() | st.just("0-3,8"),
        ),
        "rank_pattern": st.dictionaries(st.text(), st.integers(1, 64)),
        "alpha_pattern": st.dictionaries(st.text(), _numbers),
        "modules_to_save": st.lists(st.text()),
        "seed": st.integers(0, 2**63),
        "lr": _numbers,
        "lr_bracket": st.tuples(_numbers, _numbers),
    },
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(st.sampled_from(sorted(RECIPES)), _recipes)
@pytest.mark.filterwarnings("ignore:lora-plus")
def test_recipes_go_through_json(name: str, changes: dict[str, Any]) -> None:
    try:
        recipe = RECIPES[name]().replace(**changes)
    except RecipeError:
        return  # an illegal combination; the legality table has tests of its own
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict(), allow_nan=False))) == recipe
