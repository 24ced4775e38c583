"""The ways in from PEFT: AdaLoRA, starts, trained tokens, biases, 4-bit bases. Equal logits with PEFT itself, or refused by name."""

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from checkpoint_models import IDS, base, logits, relative, train
from peft import AdaLoraConfig, EvaConfig, LoraConfig, LoraGAConfig, PeftModel, VeraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.eva import initialize_lora_eva_weights
from peft.tuners.lora.loraga import preprocess_loraga
from safetensors.torch import load_file, save_file
from torch import nn

import rankwise as rw
from rankwise.checkpoint.portable import export_lora
from rankwise.errors import CheckpointError, TargetError
from rankwise.sites import adapted_sites

TOLERANCE = 1e-5


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


def quietly(call: Callable[[], Any]) -> Any:
    """What PEFT and transformers say about themselves is not the matter here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call()


def moved(model: Any, seed: int = 0, size: float = 0.1) -> Any:
    """All that trains, moved at random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * size)
    return model.eval()


def peft_model(config: Any, model: Any) -> Any:
    return moved(quietly(lambda: get_peft_model(model, config)))


def peft_load(model: Any, folder: Path) -> Any:
    return quietly(lambda: PeftModel.from_pretrained(model, folder)).eval()


def there_and_back(theirs: Any, name: str, folder: Path, tolerance: float = TOLERANCE) -> Any:
    """Saved by PEFT: loads here and in PEFT with equal logits; saved again here: loads in both. Returns our model."""
    wanted, plain = logits(theirs), logits(base(name))
    assert relative(wanted, plain) > 1e-3
    quietly(lambda: theirs.save_pretrained(folder / "theirs"))
    assert relative(logits(peft_load(base(name), folder / "theirs")), wanted) < tolerance
    ours: Any = rw.load(base(name), folder / "theirs")
    assert relative(logits(ours), wanted) < tolerance
    with rw.disabled(ours):
        assert torch.equal(logits(ours), plain)
    rw.save(ours, folder / "ours")
    assert torch.equal(logits(rw.load(base(name), folder / "ours")), logits(ours))
    assert relative(logits(peft_load(base(name), folder / "ours")), wanted) < tolerance
    assert relative(logits(rw.merge(ours)), wanted) < tolerance
    rw.unmerge(ours)
    return ours


# --- AdaLoRA as PEFT writes it ----------------------------------------------------------------------------------------------------------


def adalora(**fields: Any) -> AdaLoraConfig:
    return AdaLoraConfig(**{"init_r": 6, "target_r": 3, "total_step": 10, "lora_alpha": 9} | fields)


UNPRUNED: dict[str, tuple[str, Callable[[], AdaLoraConfig]]] = {
    "llama": ("llama", lambda: adalora(target_modules="all-linear", task_type="CAUSAL_LM")),
    "alpha that is not above 0": ("llama", lambda: adalora(lora_alpha=0, target_modules=["q_proj", "up_proj"])),
    "fields that AdaLoRA never looks at": (
        "llama",
        lambda: adalora(r=17, use_rslora=True, alpha_pattern={"q_proj": 99}, init_lora_weights="pissa", target_modules=["q_proj"]),
    ),
    "layers, head": ("llama", lambda: adalora(target_modules=["q_proj"], layers_to_transform=[1], modules_to_save=["lm_head"])),
    "tokens": ("llama", lambda: adalora(target_modules=["q_proj"], trainable_token_indices=[3, 8])),
    "gpt2": ("gpt2", lambda: adalora(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "bert classifier": ("bert", lambda: adalora(target_modules=["query", "dense"], task_type="SEQ_CLS")),
}


@pytest.mark.parametrize("case", UNPRUNED)
def test_adalora_unpruned(case: str, tmp_path: Path) -> None:
    name, config = UNPRUNED[case]
    ours = there_and_back(peft_model(config(), base(name)), name, tmp_path)
    recipe, sites = ours.rankwise.recipe, adapted_sites(ours)
    alpha = config().lora_alpha or 6
    assert recipe.schedule.target_rank == 3
    assert {module.site.rank for module in sites.values()} == {6}
    for module in sites.values():
        assert module.site.scaling == pytest.approx(alpha / (6 + 1e-5), rel=1e-12)
    train(ours)  # and it trains on


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_adalora_pruned(name: str, tmp_path: Path) -> None:
    """Pruned by PEFT's own allocator, some sites to rank 0: the file holds what is left, and the scaling stays that of the initial rank."""
    targets = {"llama": ["q_proj", "v_proj", "up_proj"], "gpt2": ["c_attn", "c_fc"], "bert": ["query", "value", "dense"]}[name]
    extra = {"fan_in_fan_out": True} if name == "gpt2" else {"task_type": "SEQ_CLS"} if name == "bert" else {}
    config = adalora(init_r=4, target_r=1, total_step=5, tfinal=1, deltaT=1, target_modules=targets, **extra)
    theirs = quietly(lambda: get_peft_model(base(name), config))
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=5e-2)
    for step in range(6):
        out = theirs(input_ids=IDS.roll(step, 1)).logits
        target = IDS if out.dim() == 3 else torch.tensor([0, 2])
        nn.functional.cross_entropy(out.flatten(0, -2), target.flatten()).backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    ours = there_and_back(theirs.eval(), name, tmp_path)
    config_file = json.loads((tmp_path / "theirs/adapter_config.json").read_text())
    kept = {key.removesuffix(".lora_E"): sum(each) for key, each in config_file["rank_pattern"].items()}
    sites = adapted_sites(ours)
    assert {site: module.site.rank for site, module in sites.items()} == kept
    assert sum(kept.values()) == len(sites)
    assert min(kept.values()) == 0
    assert {module.site.scaling for module in sites.values()} == {9 / 4 * (4 / (4 + 1e-5))}


def test_a_broken_rank_pattern_is_named(tmp_path: Path) -> None:
    quietly(lambda: peft_model(adalora(target_modules=["q_proj"]), base()).save_pretrained(tmp_path))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    key = "model.layers.0.self_attn.q_proj.lora_E"
    for pattern, message in (
        ({key: [True] * 5}, "must be 6 booleans"),
        ({key: 3}, "must be 6 booleans"),
        ({"model.layers.9.self_attn.q_proj.lora_E": [True] * 6}, "which is no adapted module"),
        ({key: [True] * 5 + [False]}, r"has shape \(6, 32\), and this base needs \(5, 32\)"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"rank_pattern": pattern}))
        with pytest.raises(CheckpointError, match=message):
            rw.load(base(), tmp_path)


# --- starts that PEFT's loader makes again ----------------------------------------------------------------------------------------------


def starts(name: str, start: str, targets: Any, **fields: Any) -> tuple[str, Callable[[], LoraConfig]]:
    return name, lambda: LoraConfig(**{"r": 4, "init_lora_weights": start, "target_modules": targets} | fields)


STARTED: dict[str, tuple[str, Callable[[], LoraConfig]]] = {
    "pissa": starts("llama", "pissa", "all-linear", lora_alpha=4, task_type="CAUSAL_LM"),
    "pissa, other scaling": starts("llama", "pissa", ["q_proj", "down_proj"], lora_alpha=10),
    "pissa rslora patterns": starts(
        "llama",
        "pissa",
        ["q_proj", "up_proj", "v_proj"],
        lora_alpha=6,
        use_rslora=True,
        rank_pattern={"q_proj": 2},
        alpha_pattern={"up_proj": 3},
    ),
    "dora on pissa": starts("llama", "pissa", ["q_proj", "down_proj"], use_dora=True),
    "pissa, head": starts("llama", "pissa", ["q_proj"], modules_to_save=["lm_head"]),
    "pissa of the head": starts("llama", "pissa", ["q_proj", "lm_head"]),
    "olora": starts("llama", "olora", "all-linear", lora_alpha=10, task_type="CAUSAL_LM"),
    "dora on olora": starts("llama", "olora", ["v_proj", "gate_proj"], use_dora=True),
    "gpt2 pissa": starts("gpt2", "pissa", ["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True),
    # PEFT decomposes a Conv1D as it is held, so transposed, which only fits square ones
    "gpt2 olora": starts("gpt2", "olora", ["attn.c_proj"], lora_alpha=6, fan_in_fan_out=True),
    "bert pissa": starts("bert", "pissa", ["query", "dense"], task_type="SEQ_CLS"),
    "bert olora": starts("bert", "olora", ["value"], task_type="SEQ_CLS"),
}


@pytest.mark.parametrize("case", STARTED)
def test_starts_are_made_again_as_peft_makes_them(case: str, tmp_path: Path) -> None:
    """PEFT's loader takes the start out of the base once more; here it stands beside the trained pair, and the base is kept bit for bit."""
    name, config = STARTED[case]
    ours = there_and_back(peft_model(config(), base(name)), name, tmp_path)
    assert ours.rankwise.recipe.init.name == config().init_lora_weights
    assert any("the start was made again from this base" in note for note in ours.rankwise.notes)
    # nothing trained: the base itself, to the rounding of the residual
    still = quietly(lambda: get_peft_model(base(name), config()))
    quietly(lambda: still.save_pretrained(tmp_path / "still"))
    if name != "bert" and case != "gpt2 olora":  # a new classifier; factors that PEFT has transposed
        assert relative(logits(rw.load(base(name), tmp_path / "still")), logits(base(name))) < TOLERANCE


def test_a_start_on_a_16_bit_base(tmp_path: Path) -> None:
    """PEFT rounds the residual to bf16, here nothing is; they differ by a few bf16 steps, what was trained by far more."""
    config = LoraConfig(r=4, init_lora_weights="pissa", target_modules=["q_proj", "down_proj"])
    theirs = peft_model(config, base("llama", torch.bfloat16))
    quietly(lambda: theirs.save_pretrained(tmp_path))
    ours, plain = rw.load(base("llama", torch.bfloat16), tmp_path), base("llama", torch.bfloat16)
    assert relative(logits(ours).float(), logits(theirs).float()) < 0.03
    assert relative(logits(plain).float(), logits(theirs).float()) > 0.3


def test_the_start_of_a_file_in_16_bits_is_not_rounded(tmp_path: Path) -> None:
    theirs = peft_model(LoraConfig(r=4, init_lora_weights="pissa", target_modules=["q_proj"]), base())
    quietly(lambda: theirs.save_pretrained(tmp_path))
    file = tmp_path / "adapter_model.safetensors"
    save_file({key: tensor.bfloat16() for key, tensor in load_file(file).items()}, file)
    assert relative(logits(rw.load(base(), tmp_path)), logits(peft_load(base(), tmp_path))) < TOLERANCE


def test_a_start_at_a_tied_weight_is_refused(tmp_path: Path) -> None:
    """PEFT's start changes the embedding with the head."""
    config = LoraConfig(r=4, init_lora_weights="pissa", target_modules=["lm_head"])
    quietly(lambda: peft_model(config, base("gpt2")).save_pretrained(tmp_path))
    with pytest.raises(CheckpointError, match=r"at lm_head has changed transformer\.wte too, .*merge it with PEFT"):
        rw.load(base("gpt2"), tmp_path)


# --- starts that only a conversion can carry --------------------------------------------------------------------------------------------


def corda(model: Any) -> Any:
    config = LoraConfig(r=4, init_lora_weights="corda", corda_config=CordaConfig(corda_method="kpm"), target_modules=["q_proj", "up_proj"])
    preprocess_corda(model, config, run_model=lambda: [model(input_ids=row[None]) for row in IDS])
    return get_peft_model(model, config)


def lora_ga(model: Any) -> Any:
    config = LoraConfig(r=4, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(), target_modules=["q_proj", "up_proj"])
    preprocess_loraga(model, config, lambda: model(input_ids=IDS, labels=IDS).loss.backward())
    return get_peft_model(model, config)


def started(start: str, **fields: Any) -> Callable[[Any], Any]:
    return lambda model: get_peft_model(model, LoraConfig(r=4, init_lora_weights=start, target_modules=["q_proj", "up_proj"], **fields))


CONVERTED: dict[str, Callable[[Any], Any]] = {
    "pissa": started("pissa", lora_alpha=6),
    "pissa rslora": started("pissa", use_rslora=True),
    "pissa patterns": started("pissa", rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 5}),
    "pissa_niter_4": started("pissa_niter_4"),
    "olora": started("olora"),
    "corda": corda,
    "lora_ga": lora_ga,
}


@pytest.mark.parametrize("case", CONVERTED)
def test_converted_starts_load(case: str, tmp_path: Path) -> None:
    """A plain LoRA of twice the rank on the pretrained weights; as saved, starts drawn or made from data are refused."""
    theirs = quietly(lambda: CONVERTED[case](base()))
    start = theirs.peft_config["default"].init_lora_weights
    theirs.peft_config["default"].init_lora_weights = True
    quietly(lambda: theirs.save_pretrained(tmp_path / "initial"))
    theirs.peft_config["default"].init_lora_weights = start
    wanted = logits(moved(theirs))
    quietly(lambda: theirs.save_pretrained(tmp_path / "raw"))
    if case in ("pissa_niter_4", "corda", "lora_ga"):
        with pytest.raises(CheckpointError, match=rf"init_lora_weights='{start}': .*path_initial_model_for_weight_conversion"):
            rw.load(base(), tmp_path / "raw")
    quietly(lambda: theirs.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial")))
    ours: Any = rw.load(base(), tmp_path / "converted")
    assert relative(logits(ours), wanted) < TOLERANCE
    assert relative(logits(peft_load(base(), tmp_path / "converted")), wanted) < TOLERANCE
    assert max(module.site.rank for module in adapted_sites(ours).values()) == 8


# --- starts that keep the base ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "mica"])
def test_starts_that_keep_the_base(start: Any, tmp_path: Path) -> None:
    there_and_back(peft_model(LoraConfig(r=4, init_lora_weights=start, target_modules=["q_proj", "down_proj"]), base()), "llama", tmp_path)


def test_eva(tmp_path: Path) -> None:
    """EVA spreads the ranks by the data, and leaves them in rank_pattern."""
    config = LoraConfig(r=2, init_lora_weights="eva", eva_config=EvaConfig(rho=2.0), target_modules=["q_proj", "up_proj", "down_proj"])
    theirs = quietly(lambda: get_peft_model(base(), config))
    rows = [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}] * 6
    quietly(lambda: initialize_lora_eva_weights(theirs, rows, show_progress_bar=False))
    ours = there_and_back(moved(theirs), "llama", tmp_path)
    assert len({module.site.rank for module in adapted_sites(ours).values()}) > 1


def test_lora_fa(tmp_path: Path) -> None:
    """Trained by PEFT's own optimizer of LoRA-FA: a plain LoRA whose lora_A never moved."""
    theirs = quietly(lambda: get_peft_model(base(), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])))
    optimizer = create_lorafa_optimizer(theirs, r=4, lora_alpha=8, lr=3e-2)
    first = {name: p.detach().clone() for name, p in theirs.named_parameters() if "lora_A" in name}
    for step in range(3):
        theirs(input_ids=IDS.roll(step, 1), labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(p, first[name]) for name, p in theirs.named_parameters() if name in first)
    there_and_back(theirs.eval(), "llama", tmp_path)


# --- tokens, biases, embeddings ---------------------------------------------------------------------------------------------------------

TOKENS: dict[str, tuple[str, Callable[[], LoraConfig]]] = {
    "list": ("llama", lambda: LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[5, 3, 9], lora_dropout=0.1)),
    "dict": ("llama", lambda: LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1, 5]})),
    "embedding and head": (
        "llama",
        lambda: LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1, 5], "lm_head": [2, 5]}),
    ),
    "dora": ("llama", lambda: LoraConfig(r=4, use_dora=True, target_modules=["q_proj"], trainable_token_indices=[5, 3])),
    "tied": ("gpt2", lambda: LoraConfig(r=4, target_modules=["c_attn"], trainable_token_indices={"wte": [5, 7]}, fan_in_fan_out=True)),
    "tied, said so": (
        "gpt2",
        lambda: LoraConfig(
            r=4, target_modules=["c_attn"], trainable_token_indices={"wte": [5]}, ensure_weight_tying=True, fan_in_fan_out=True
        ),
    ),
    "bert": (
        "bert",
        lambda: LoraConfig(r=4, target_modules=["query"], trainable_token_indices={"word_embeddings": [5, 7]}, task_type="SEQ_CLS"),
    ),
}


@pytest.mark.parametrize("case", TOKENS)
def test_trained_tokens(case: str, tmp_path: Path) -> None:
    """Every row that the prompts use is among the trained ones or not: both must be right, in the embedding and in a head tied to it."""
    name, config = TOKENS[case]
    theirs = peft_model(config(), base(name))
    ours = there_and_back(theirs, name, tmp_path)
    assert any("trains in full here, of which" in note for note in ours.rankwise.notes)


def test_tokens_that_do_not_fit(tmp_path: Path) -> None:
    theirs = peft_model(LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[5, 3]), base())
    quietly(lambda: theirs.save_pretrained(tmp_path))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for indices, message in (
        ([5], r"has shape \(2, 32\) for rows \[5\] of a weight of shape \(64, 32\)"),
        ([5, 64], r"for rows \[5, 64\] of a weight of shape \(64, 32\)"),
        ({"lm_head": [5, 3]}, "has rows for model.embed_tokens, which trainable_token_indices="),
        ([5.5, 3], "must be whole numbers"),
        ({"embed_tokens": "53"}, "must be whole numbers"),
        (None, "has rows for model.embed_tokens, which trainable_token_indices=None does not name"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"trainable_token_indices": indices}))
        with pytest.raises(CheckpointError, match=message):
            rw.load(base(), tmp_path)
    tensors = {key: tensor for key, tensor in load_file(tmp_path / "adapter_model.safetensors").items() if "token_adapter" not in key}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"has no rows for trainable_token_indices=\[5, 3\]"):
        rw.load(base(), tmp_path)


def test_an_embedding_with_dropout(tmp_path: Path) -> None:
    """PEFT never drops token ids either; the other sites would be dropped there, and the note says that they are not here."""
    config = LoraConfig(r=4, lora_dropout=0.2, target_modules=["embed_tokens", "q_proj"])
    ours = there_and_back(peft_model(config, base()), "llama", tmp_path)
    assert ours.rankwise.recipe.dropout == 0
    assert any("dropout=0.2 of the adapter is 0 here" in note for note in ours.rankwise.notes)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_base_biases(bias: str, tmp_path: Path) -> None:
    """Nothing to say of a model without biases, nor where none was trained; at the adapted layers they are biases of the updates;
    elsewhere they are refused."""
    there_and_back(peft_model(LoraConfig(r=4, bias=bias, target_modules=["q_proj"]), base()), "llama", tmp_path / "llama")
    config = LoraConfig(r=4, lora_alpha=6, bias=bias, target_modules=["query", "value"], task_type="SEQ_CLS")

    def trained(*named: str) -> Any:
        model = quietly(lambda: get_peft_model(base("bert"), config))
        for name, p in model.named_parameters():
            p.requires_grad_(p.requires_grad and ("classifier" in name or not name.endswith("bias") or any(part in name for part in named)))
        return moved(model)

    assert not there_and_back(trained(), "bert", tmp_path / "still").rankwise.recipe.update.bias
    ours = there_and_back(trained("query"), "bert", tmp_path / "sites")
    shifts = {name: float(module.update.shift.detach().abs().max()) for name, module in adapted_sites(ours).items()}
    assert all((shift > 0) == ("query" in name) for name, shift in shifts.items())
    if bias == "all":
        quietly(lambda: trained("LayerNorm").save_pretrained(tmp_path / "norms"))
        with pytest.raises(CheckpointError, match=r"bias='all', and bert\..*LayerNorm\.bias was trained, .*train it again"):
            rw.load(base("bert"), tmp_path / "norms")


@pytest.mark.parametrize("kind", ["adalora", "vera"])
def test_biases_that_only_plain_lora_takes(kind: str, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"target_modules": ["query"], "task_type": "SEQ_CLS"}
    config = adalora(bias="lora_only", **fields) if kind == "adalora" else VeraConfig(r=8, bias="vera_only", **fields)
    quietly(lambda: peft_model(config, base("bert")).save_pretrained(tmp_path))
    with pytest.raises(CheckpointError, match=r"_only', and bert\..*query\.bias was trained, .*train it again with bias='none', or merge"):
        rw.load(base("bert"), tmp_path)


def test_tied_adapters_are_refused(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["c_attn"], modules_to_save=["wte"], ensure_weight_tying=True, fan_in_fan_out=True)
    quietly(lambda: peft_model(config, base("gpt2")).save_pretrained(tmp_path))
    with pytest.raises(CheckpointError, match=r"ensure_weight_tying=True, and this base ties its embeddings: .*merge it with PEFT"):
        rw.load(base("gpt2"), tmp_path)
    untied = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], ensure_weight_tying=True)
    there_and_back(peft_model(untied, base()), "llama", tmp_path / "untied")


BIASED: dict[str, tuple[str, Callable[[], LoraConfig]]] = {
    "gpt2": ("gpt2", lambda: LoraConfig(r=4, lora_alpha=6, lora_bias=True, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)),
    "bert": ("bert", lambda: LoraConfig(r=4, use_rslora=True, lora_bias=True, target_modules=["query", "dense"], task_type="SEQ_CLS")),
    "patterns": ("gpt2", lambda: LoraConfig(r=4, lora_bias=True, target_modules=["c_attn"], rank_pattern={"h.0.attn.c_attn": 2})),
    "both": ("bert", lambda: LoraConfig(r=4, lora_bias=True, bias="lora_only", target_modules=["query"], task_type="SEQ_CLS")),
}


@pytest.mark.parametrize("case", BIASED)
def test_lora_bias(case: str, tmp_path: Path) -> None:
    name, config = BIASED[case]
    ours = there_and_back(peft_model(config(), base(name)), name, tmp_path)
    assert ours.rankwise.recipe.update.bias
    assert json.loads((tmp_path / "ours/adapter_config.json").read_text())["lora_bias"]
    with pytest.raises(CheckpointError, match="adds a trained bias"):
        export_lora(ours, tmp_path / "plain")


def test_lora_bias_where_the_layer_has_none(tmp_path: Path) -> None:
    """PEFT cannot merge it either."""
    theirs = peft_model(LoraConfig(r=4, lora_bias=True, target_modules=["q_proj"]), base())
    quietly(lambda: theirs.save_pretrained(tmp_path))
    ours = rw.load(base(), tmp_path)
    before = logits(ours)
    assert relative(before, logits(theirs)) < TOLERANCE
    with pytest.raises(TargetError, match=r"q_proj cannot be merged: its update adds a trained bias"):
        rw.merge(ours)
    assert torch.equal(logits(ours), before)


@pytest.mark.parametrize("gain", ["none", "dora"])
def test_a_trained_bias_of_ours(gain: str, tmp_path: Path) -> None:
    """Gradients, merge and the way back are those of the equation; over DoRA, which PEFT takes no bias with, PEFT refuses it."""
    model: Any = train(rw.adapt(base("gpt2"), rw.recipes.lora(bias=True, rank=4, alpha=12, gain=gain)))
    module = next(iter(adapted_sites(model).values()))
    wanted, bias = logits(model), module.base_layer.bias
    update: Any = module.update
    added = module.site.scaling * update.shift.detach()
    assert float(added.abs().max()) > 1e-3
    x = torch.randn(5, module.site.in_features, generator=torch.Generator().manual_seed(1))
    update.shift.grad = None
    y = module(x)
    y.backward(g := torch.randn(y.shape, generator=torch.Generator().manual_seed(2)))
    torch.testing.assert_close(update.shift.grad, module.site.scaling * g.sum(0), rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        kept = update.shift.clone()
        update.shift.zero_()
        torch.testing.assert_close(y.detach() - module(x), added.expand_as(y), rtol=1e-5, atol=1e-5)
        update.shift.copy_(kept)
    rw.merge(model)
    assert relative(logits(model), wanted) < TOLERANCE
    torch.testing.assert_close(module.base_layer.bias, bias + added)
    with rw.disabled(model):
        assert torch.equal(logits(model), logits(base("gpt2")))
    assert relative(logits(model), wanted) < TOLERANCE
    rw.unmerge(model)
    assert module.base_layer.bias is bias
    rw.save(model, tmp_path)
    assert torch.equal(logits(rw.load(base("gpt2"), tmp_path)), logits(model))
    if gain == "none":
        assert relative(logits(peft_load(base("gpt2"), tmp_path)), wanted) < TOLERANCE
    else:
        with pytest.raises(KeyError, match="RANKWISE"):
            peft_load(base("gpt2"), tmp_path)
    merged = rw.merge(rw.load(base("gpt2"), tmp_path), keep_base=False)
    assert relative(logits(merged), wanted) < TOLERANCE
    assert torch.equal(logits(rw.unadapt(model)), logits(base("gpt2")))


# --- names and folders ------------------------------------------------------------------------------------------------------------------


def test_an_adapter_of_another_name_and_another_base(tmp_path: Path) -> None:
    named = base()
    named.config._name_or_path = named.name_or_path = "someone/base"
    theirs = quietly(lambda: get_peft_model(named, LoraConfig(r=4, target_modules=["q_proj"]), adapter_name="poetry"))
    quietly(lambda: theirs.add_adapter("prose", LoraConfig(r=2, target_modules=["v_proj"])))
    for adapter in ("poetry", "prose"):
        theirs.set_adapter(adapter)
        moved(theirs, seed=len(adapter))
    quietly(lambda: theirs.save_pretrained(tmp_path))
    with pytest.raises(CheckpointError, match=r"its sub-directories poetry, prose do: .* such as .*poetry$"):
        rw.load(base(), tmp_path)
    for adapter in ("poetry", "prose"):
        theirs.set_adapter(adapter)
        assert relative(logits(rw.load(base(), tmp_path / adapter)), logits(theirs)) < TOLERANCE
    other = base()
    other.config._name_or_path = "elsewhere"
    notes = rw.load(other, tmp_path / "poetry").rankwise.notes  # pyright: ignore
    assert "the adapter was made for someone/base, and this base calls itself elsewhere" in notes


def test_fields_are_matched_as_peft_matches_them(tmp_path: Path) -> None:
    """exclude_modules as an expression, layers by a number, a pattern of layers, a head named by its end."""
    config = LoraConfig(
        r=4,
        target_modules=["q_proj", "up_proj", "down_proj"],
        exclude_modules=r".*layers\.1\.mlp\.up.*",
        layers_to_transform=[0, 1],
        layers_pattern=["layers"],
        modules_to_save=["model.norm", "head"],
        rank_pattern={r"layers\.0.*proj": 3, "q_proj": 2},
        alpha_pattern={"down_proj": 5},
    )
    ours = there_and_back(peft_model(config, base()), "llama", tmp_path)
    assert len(adapted_sites(ours)) == 5
    assert sorted(name for name, _ in ours.rankwise.plan.trained_modules) == ["lm_head", "model.norm"]
