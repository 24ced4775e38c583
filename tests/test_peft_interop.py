"""PEFT loads what is saved here with equal logits or refuses it; what PEFT saves loads here with equal logits or is refused by name."""

import dataclasses
import json
import os
import warnings
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from checkpoint_models import CASES, IDS, base, logits, relative, tensors_of, train, trained
from peft import AdaLoraConfig, IA3Config, LoHaConfig, LoraConfig, PeftConfig, PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import rankwise as rw
from rankwise.checkpoint import peft_fields
from rankwise.errors import CheckpointError
from rankwise.gains import Dora, NoGain
from rankwise.sites import adapted_sites

TOLERANCE = 1e-5
KINDS: dict[str, Any] = {"LORA": LoraConfig, "VERA": VeraConfig, "ADALORA": AdaLoraConfig}
# what PEFT and transformers say about themselves
EXPECTED_WARNINGS = (
    "is_gradient_checkpointing",
    "vera_A and vera_B",
    "kernels",
    "save_embedding_layers",
    "Model has `tie_word_embeddings=True`",
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


def peft_load(name: str, folder: Path) -> Any:
    """PEFT's model on a fresh base; any warning about the adapter is an error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base(name), folder)
    # PEFT warns of the patterns of every AdaLoRA file, its own included: their keys name tensors, and it looks for modules
    said = [str(w.message) for w in caught if "lora_E" not in str(w.message)]
    assert not [text for text in said if not any(known in text for known in EXPECTED_WARNINGS)]
    return model.eval()


# --- ours to PEFT ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.check("lora", 4)
@pytest.mark.check("pissa", 6)
@pytest.mark.check("milora-svd", 9)
@pytest.mark.check("vera", 3)
@pytest.mark.parametrize("case", CASES)
def test_peft_computes_the_same_or_refuses(case: str, tmp_path: Path) -> None:
    """Starts that move the base stand in the file as a plain LoRA of rank 2r on the pristine weights (pissa 6, milora-svd 9)."""
    name, recipe, peft_type = CASES[case]
    model = trained(case)
    rw.save(model, tmp_path / "a")
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert config["peft_type"] == peft_type
    notes = json.loads((tmp_path / "a/rankwise.json").read_text())["notes"]
    if peft_type == "RANKWISE":
        assert any(note.startswith("PEFT refuses this adapter: ") for note in notes)
        assert not {"r", "lora_alpha", "target_modules"} & set(config)  # other readers of PEFT's format stop here too
        for reader in (lambda: PeftModel.from_pretrained(base(name), tmp_path / "a"), lambda: PeftConfig.from_pretrained(tmp_path / "a")):
            with pytest.raises(KeyError, match="RANKWISE"):
                reader()
        return
    assert not any(note.startswith("PEFT refuses") for note in notes)
    kind = KINDS[peft_type]
    assert set(config) == {field.name for field in dataclasses.fields(kind)} - {"runtime_config"}
    theirs = peft_load(name, tmp_path / "a")
    assert relative(logits(theirs), logits(model)) < TOLERANCE
    # every trained tensor arrived: PEFT has as many adapter numbers as the file
    held = sum(t.numel() for t in load_file(tmp_path / "a/adapter_model.safetensors").values())
    assert held == sum(p.numel() for n, p in theirs.named_parameters() if "lora_" in n or "vera_lambda" in n or "modules_to_save" in n)
    if recipe().init.moves_base:
        assert config["r"] == 8  # rank 4, and its start beside it


@pytest.mark.parametrize("case", ["pissa", "dora on pissa", "vera", "rank and alpha patterns", "bert classifier", "embedding"])
def test_peft_saves_what_it_loaded_and_it_loads_here(case: str, tmp_path: Path) -> None:
    name = CASES[case][0]
    model = trained(case)
    rw.save(model, tmp_path / "ours")
    peft_load(name, tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    assert relative(logits(rw.load(base(name), tmp_path / "theirs")), logits(model)) < TOLERANCE


@pytest.mark.parametrize("save_projection", [False, True])
def test_vera_with_and_without_its_pair(save_projection: bool, tmp_path: Path) -> None:
    model = trained("vera")
    rw.save(model, tmp_path / "a", save_projection=save_projection)
    assert relative(logits(peft_load("llama", tmp_path / "a")), logits(model)) < TOLERANCE


def test_a_16_bit_base(tmp_path: Path) -> None:
    """The factors are fp32 in the file; PEFT's bf16 logits differ by bf16 rounding alone."""
    for case in ("dora", "pissa"):
        model = train(rw.adapt(base("llama", torch.bfloat16), CASES[case][1]()))
        rw.save(model, tmp_path / case)
        theirs = PeftModel.from_pretrained(base("llama", torch.bfloat16), tmp_path / case).eval()
        assert relative(logits(theirs).float(), logits(model).float()) < 0.03


class Nested(nn.Module):
    """Names that contain each other: `q` stands at the top and below; `head` ends other names."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.block = nn.ModuleDict({"q": nn.Linear(8, 8), "k": nn.Linear(8, 8)})
        self.head = nn.Linear(8, 8)
        self.overhead = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block["k"](self.block["q"](self.q(x)).tanh()).tanh()
        return self.overhead(self.head(x).tanh())


def _nested(recipe: rw.Recipe) -> tuple[nn.Module, nn.Module, Tensor]:
    torch.manual_seed(0)
    plain, x = Nested(), torch.randn(3, 8)
    model = Nested()
    model.load_state_dict(plain.state_dict())
    rw.adapt(model, recipe)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    return model, plain, x


@pytest.mark.parametrize(
    ("targets", "written"),
    [
        (["q", "k"], ["k", "q"]),
        ({"include": ["re:q", "k"]}, "q|block\\.k"),
        ({"include": ["block.q", "k"]}, ["block.q", "k"]),
    ],
)
def test_targets_in_peft_are_exactly_ours(targets: Any, written: Any, tmp_path: Path) -> None:
    pattern = {"re:q": 4} if "re:q" in str(targets) else {"block.q": 4}
    model, plain, x = _nested(rw.recipes.lora(rank=2, targets=targets, rank_pattern=pattern))
    rw.save(model, tmp_path / "a")
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert config["target_modules"] == written
    ours = model(x)
    assert torch.equal(rw.load(plain, tmp_path / "a")(x), ours)
    theirs = PeftModel.from_pretrained(rw.unadapt(plain), tmp_path / "a")
    assert relative(theirs(x), ours) < TOLERANCE


def test_a_head_that_peft_cannot_name_alone(tmp_path: Path) -> None:
    """PEFT takes all modules whose name ends with 'head', so `overhead` too: it must refuse the file."""
    model, plain, x = _nested(rw.recipes.lora(rank=2, targets=["q", "k"], modules_to_save=["head"]))
    rw.save(model, tmp_path / "a")
    with pytest.raises(KeyError, match="RANKWISE"):
        PeftModel.from_pretrained(Nested(), tmp_path / "a")
    assert torch.equal(rw.load(plain, tmp_path / "a")(x), model(x))


def test_rows_of_zeros_under_dora_are_refused_by_peft(tmp_path: Path) -> None:
    """PEFT divides by the norm of a pruned row and gives NaN; here its gain is 1."""
    pruned = base()
    with torch.no_grad():
        pruned.model.layers[0].self_attn.q_proj.weight[3] = 0
    model = rw.adapt(pruned, rw.recipes.dora(rank=4))
    rw.save(model, tmp_path / "a")
    assert json.loads((tmp_path / "a/adapter_config.json").read_text())["peft_type"] == "RANKWISE"
    train(model)  # B's row has moved: no row of zeros is left
    rw.save(model, tmp_path / "b")
    assert json.loads((tmp_path / "b/adapter_config.json").read_text())["peft_type"] == "LORA"


# --- PEFT to ours ----------------------------------------------------------------------------------------------------------------------


def peft_model(config: Any, name: str = "llama", seed: int = 0) -> Any:
    """A model of PEFT whose adapter has random numbers everywhere."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base(name), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return model.eval()


def peft_folder(model: Any, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


FOREIGN: dict[str, tuple[str, Any]] = {
    "lora": ("llama", lambda: LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)),
    "all-linear": ("llama", lambda: LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")),
    "rslora": ("llama", lambda: LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules=["q_proj", "up_proj"])),
    "patterns": (
        "llama",
        lambda: LoraConfig(
            r=4,
            target_modules="all-linear",
            rank_pattern={"q_proj": 2, "layers.1.*.up_proj": 6, "^model.layers.0.mlp.up_proj": 3},
            alpha_pattern={"v_proj": 32, "model.layers.0.self_attn.(q|k)_proj": 5},
        ),
    ),
    "expression": ("llama", lambda: LoraConfig(r=4, target_modules=r".*layers\.1\..*(q_proj|gate_proj)")),
    "layers": (
        "llama",
        lambda: LoraConfig(r=4, target_modules=["q_proj", "up_proj"], layers_to_transform=[1], layers_pattern="layers"),
    ),
    "layer, no pattern": ("llama", lambda: LoraConfig(r=4, target_modules=["q_proj", "model.layers.0.mlp.up_proj"], layers_to_transform=1)),
    "excluded": ("llama", lambda: LoraConfig(r=4, target_modules=["q_proj", "v_proj"], exclude_modules=["layers.0.self_attn.q_proj"])),
    "gaussian": ("llama", lambda: LoraConfig(r=4, init_lora_weights="gaussian", target_modules=["q_proj"])),
    "dora": ("llama", lambda: LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "down_proj"])),
    "dora rslora": (
        "llama",
        lambda: LoraConfig(r=4, use_dora=True, use_rslora=True, target_modules="all-linear", rank_pattern={"k_proj": 2}),
    ),
    "embedding": ("llama", lambda: LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"])),
    "head": ("llama", lambda: LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])),
    "gpt2": ("gpt2", lambda: LoraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "gpt2 dora": ("gpt2", lambda: LoraConfig(r=4, use_dora=True, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)),
    "gpt2 embedding": ("gpt2", lambda: LoraConfig(r=4, target_modules=["wte", "c_attn"], fan_in_fan_out=True)),
    "gpt2 vera": ("gpt2", lambda: VeraConfig(r=24, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)),
    "bert": ("bert", lambda: LoraConfig(r=4, task_type="SEQ_CLS", target_modules=["query", "value"])),
    "bert dora": ("bert", lambda: LoraConfig(r=4, use_dora=True, task_type="SEQ_CLS", target_modules="all-linear")),
    "bert vera": ("bert", lambda: VeraConfig(r=24, task_type="SEQ_CLS", target_modules=["query", "dense"])),
    "vera": ("llama", lambda: VeraConfig(r=24, target_modules=["q_proj", "down_proj"], vera_dropout=0.1, d_initial=0.3)),
    "vera by seed": ("llama", lambda: VeraConfig(r=24, target_modules="all-linear", save_projection=False, projection_prng_key=7)),
}


@pytest.mark.check("lora", 4)
@pytest.mark.check("vera", 3)
@pytest.mark.parametrize("case", FOREIGN)
def test_what_peft_saves_loads_here(case: str, tmp_path: Path) -> None:
    name, config = FOREIGN[case]
    theirs = peft_model(config(), name)
    wanted = logits(theirs)
    assert relative(wanted, logits(base(name))) > 1e-3
    folder = peft_folder(theirs, tmp_path / "a")
    ours = rw.load(base(name), folder)
    assert relative(logits(ours), wanted) < TOLERANCE
    # the sites, ranks and scalings are PEFT's own
    layers = {n.removeprefix("base_model.model."): m for n, m in theirs.named_modules() if hasattr(m, "base_layer") and hasattr(m, "r")}
    found = adapted_sites(ours)
    assert set(found) == set(layers)
    for site, layer in layers.items():
        assert found[site].site.rank == layer.r["default"]
        if hasattr(layer, "scaling"):
            assert found[site].site.scaling == pytest.approx(layer.scaling["default"], rel=1e-12)
    # the base is kept, and what is saved again goes both ways
    with rw.disabled(ours):
        assert torch.equal(logits(ours), logits(base(name)))
    rw.save(ours, tmp_path / "b")
    assert torch.equal(logits(rw.load(base(name), tmp_path / "b")), logits(ours))
    assert relative(logits(peft_load(name, tmp_path / "b")), wanted) < TOLERANCE


@pytest.mark.check("lora", 4)
@pytest.mark.parametrize("case", ["lora", "rslora", "gpt2", "dora"])
def test_gradients_equal_those_of_peft(case: str, tmp_path: Path) -> None:
    """Same numbers in both: forward, the gradients of both factors, and that of the input."""
    name, config = FOREIGN[case]
    made = config()
    made.lora_dropout = 0.0
    theirs = peft_model(made, name)
    ours: Any = rw.load(base(name), peft_folder(theirs, tmp_path / "a"))
    gradients = []
    for model in (theirs, ours):
        embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
        out = model(inputs_embeds=embedded).logits
        nn.functional.cross_entropy(out.flatten(0, -2), IDS.flatten()).backward()
        gradients.append((model, out, embedded.grad))
    (_, their_out, their_dx), (_, our_out, our_dx) = gradients
    assert relative(our_out, their_out) < 1e-6
    assert relative(our_dx, their_dx) < 2e-6
    parameters = dict(theirs.named_parameters())
    for site, module in adapted_sites(ours).items():
        for slot, key in (("down", "lora_A"), ("up", "lora_B")):
            theirs_grad = parameters[f"base_model.model.{site}.{key}.default.weight"].grad
            assert relative(getattr(module.update, slot).grad, theirs_grad) < 1e-5


@pytest.mark.check("vera", 3)
def test_a_projection_of_unknown_origin_is_taken_and_kept(tmp_path: Path) -> None:
    theirs = peft_model(VeraConfig(r=24, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        theirs.base_model.vera_A["default"].mul_(1.5)
    wanted = logits(theirs)
    ours = rw.load(base(), peft_folder(theirs, tmp_path / "a"))
    assert relative(logits(ours), wanted) < TOLERANCE
    rw.save(ours, tmp_path / "b")  # no seed gives this pair: it is written without being asked for
    assert "base_model.vera_A" in load_file(tmp_path / "b/adapter_model.safetensors")
    assert torch.equal(logits(rw.load(base(), tmp_path / "b")), logits(ours))
    assert relative(logits(peft_load("llama", tmp_path / "b")), wanted) < TOLERANCE


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_starts_of_peft_as_saved_and_converted(start: str, tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=4, init_lora_weights=start, target_modules=["q_proj", "up_proj"])
    theirs: Any = get_peft_model(base(), config)
    theirs.peft_config["default"].init_lora_weights = True
    peft_folder(theirs, tmp_path / "initial")
    theirs.peft_config["default"].init_lora_weights = start
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
    wanted = logits(theirs.eval())
    peft_folder(theirs, tmp_path / "raw")
    assert relative(logits(rw.load(base(), tmp_path / "raw")), wanted) < TOLERANCE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    assert relative(logits(rw.load(base(), tmp_path / "converted")), wanted) < TOLERANCE


REFUSED: dict[str, tuple[Any, str]] = {
    "dora embedding": (
        lambda: LoraConfig(target_modules=["embed_tokens"], use_dora=True),
        "use_dora=True at model.embed_tokens, an embedding, .*merge it with PEFT",
    ),
    "ia3": (lambda: IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "peft_type='IA3', and of PEFT's types LORA, ADA"),
    "loha": (lambda: LoHaConfig(target_modules=["q_proj"]), "peft_type='LOHA'.*merge it with PEFT"),
    "target_parameters": (
        lambda: LoraConfig(target_modules=["q_proj"], target_parameters=["lm_head.weight"]),
        "target_parameters=.*has no counterpart",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_counterpart_is_refused_by_name(case: str, tmp_path: Path) -> None:
    config, message = REFUSED[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_folder(get_peft_model(base(), config()), tmp_path / "a")
    with pytest.raises(CheckpointError, match=message):
        rw.load(base(), tmp_path / "a")


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return peft_folder(peft_model(LoraConfig(r=4, target_modules=["q_proj", "v_proj"])), tmp_path_factory.mktemp("peft") / "a")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a_new_field": 3}, "a_new_field=3, which has no counterpart"),
        ({"kasa_config": {"beta": 1}}, "kasa_config="),
        ({"use_qalora": True}, "use_qalora=True"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens="),
        ({"arrow_config": {"top_k": 3}}, "arrow_config="),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora="),
        ({"monteclora_config": {"num_samples": 2}}, "monteclora_config="),
        ({"velora_config": {"num_groups": 2}}, "velora_config="),
        ({"target_parameters": ["x"]}, "target_parameters=.*no linear layer holds"),
        ({"lora_bias": True}, r"lacks 4 tensors, such as .*lora_B\.bias"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights='pissa_niter_16': .*path_initial_model_for_weight_conversion"),
        ({"layer_replication": [[0, 2]]}, "layer_replication="),
        ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq': this adapter belongs to a base"),
        ({"peft_type": "RANKWISE"}, "holds no rankwise.json"),
        ({"peft_type": None}, "peft_type=None"),
        ({"peft_type": ["LORA"]}, "peft_type=.'LORA'"),
        ({"target_modules": None}, "names no target_modules"),
        ({"target_modules": ["q_proj", "k_proj", "v_proj"]}, "no tensors for 2 of 6 sites .*k_proj"),
        ({"target_modules": ["q_proj"]}, "tensors for 2 modules that adapter_config.json does not name .*v_proj"),
        ({"target_modules": "(q_proj"}, "is not a valid regular expression"),
        ({"modules_to_save": ["score"]}, r"modules_to_save=\['score'\] matches no module of this base"),
        ({"modules_to_save": ["lm_head"]}, r"lacks 1 tensors, such as base_model\.model\.lm_head\.weight"),
        ({"r": 5}, r"lora_A\.weight has shape \(4, 32\), and this base needs \(5, 32\)"),
        ({"use_dora": True}, r"lacks 4 tensors, such as .*lora_magnitude_vector"),
        ({"r": 0}, "rank=0 must be a whole number"),
        ({"r": "4"}, "rank='4' must be a whole number"),
        ({"lora_alpha": "x"}, "alpha='x' must be a finite number"),
        ({"rank_pattern": [2]}, "adapter_config.json has a value of the wrong type"),
        ({"modules_to_save": 3}, "adapter_config.json has a value of the wrong type"),
    ],
)
def test_a_changed_configuration(changes: dict[str, Any], message: str, plain_folder: Path, tmp_path: Path) -> None:
    config = json.loads((plain_folder / "adapter_config.json").read_text()) | changes
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").write_bytes((plain_folder / "adapter_model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=message):
        rw.load(base(), tmp_path)


def test_fields_of_other_versions_that_are_off_do_not_matter(plain_folder: Path, tmp_path: Path) -> None:
    config = json.loads((plain_folder / "adapter_config.json").read_text())
    old = {key: config[key] for key in ("peft_type", "r", "lora_alpha", "target_modules")} | {"a_new_field": None, "use_more": False}
    (tmp_path / "adapter_config.json").write_text(json.dumps(old))
    (tmp_path / "adapter_model.safetensors").write_bytes((plain_folder / "adapter_model.safetensors").read_bytes())
    assert torch.equal(logits(rw.load(base(), tmp_path)), logits(rw.load(base(), plain_folder)))


def test_copies_of_embeddings_must_equal_the_base(tmp_path: Path) -> None:
    folder = peft_folder(peft_model(LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"])), tmp_path / "a")
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    tensors = load_file(folder / "adapter_model.safetensors")
    assert key in tensors
    tensors[key][0] += 1
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"copy of the base weight model\.embed_tokens that differs from this base"):
        rw.load(base(), folder)


def test_the_tables_of_fields_are_those_of_the_installed_peft() -> None:
    """Fails when a new version of PEFT has new fields: then decide what each one means here."""
    for kind, table in peft_fields.DEFAULTS.items():
        steps = {"total_step": 1} if kind == "ADALORA" else {}
        defaults = KINDS[kind](target_modules=["q"], **steps).to_dict()
        defaults.pop("runtime_config", None)
        defaults |= {"target_modules": None, "peft_version": None} | dict.fromkeys(steps)
        assert table == {key: getattr(value, "value", value) for key, value in defaults.items()}


def test_the_loaded_recipe_says_what_it_is(plain_folder: Path, tmp_path: Path) -> None:
    model: Any = rw.load(base(), plain_folder)
    recipe = model.rankwise.recipe
    assert (recipe.name, recipe.rank, recipe.alpha, recipe.scaling) == ("lora", 4, 8, "lora")
    assert recipe.targets.include == ("q_proj", "v_proj")
    assert isinstance(recipe.gain, NoGain)
    assert any("loaded from a folder of PEFT" in note for note in model.rankwise.notes)
    folder = peft_folder(peft_model(LoraConfig(r=4, use_dora=True, target_modules=["q_proj"])), tmp_path / "a")
    assert isinstance(rw.load(base(), folder).rankwise.recipe.gain, Dora)  # pyright: ignore
    train(model)  # and it trains on
    assert all(tensor.isfinite().all() for tensor in tensors_of(model).values())
