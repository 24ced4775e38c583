"""Adapters that PEFT trained over bitsandbytes' 4-bit layers load over this project's and over theirs, and the other way round."""

import os
import warnings
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import bitsandbytes as bnb
import pytest
import torch
from checkpoint_models import IDS, logits, relative
from peft import AdaLoraConfig, LoraConfig, PeftModel, VeraConfig, get_peft_model
from torch import nn

import rankwise as rw
from rankwise.errors import CheckpointError
from rankwise.storage import NF4Linear

TOLERANCE = 2e-5


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


def dense() -> Any:
    """Rows of whole blocks: bitsandbytes' own dequantization on CPUs is wrong where a block crosses rows (test_qlora)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(11)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=32, initializer_range=0.1, **sizes)).eval()


def theirs_4bit() -> Any:
    """The same with bitsandbytes' layers, as transformers loads it."""
    model = dense()
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            layer = bnb.nn.Linear4bit(module.in_features, module.out_features, False, torch.float32, True, "nf4", device="cpu")
            layer.weight = bnb.nn.Params4bit(module.weight.data, False, quant_type="nf4", module=layer)
            layer.weight._quantize("cpu")
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, layer)
    model.is_loaded_in_4bit = True
    return model.train()  # in evaluation it may repack its codes for the CPU, and then they cannot be read


def ours_4bit(model: Any = None) -> Any:
    """A base whose layers are held in this project's 4-bit form, without adapters."""
    return rw.unadapt(rw.adapt(dense() if model is None else model, rw.recipes.qlora(rank=2)))


def peft_over(model: Any, config: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in made.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return made


def plainly(model: Any) -> torch.Tensor:
    """Logits in training mode, so that bitsandbytes leaves its codes as they are; there is no dropout."""
    with torch.no_grad():
        return model.train()(input_ids=IDS).logits


CONFIGS: dict[str, Any] = {
    "lora": lambda: LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    "rslora": lambda: LoraConfig(r=4, use_rslora=True, rank_pattern={"q_proj": 2}, target_modules=["q_proj", "up_proj"]),
    "dora": lambda: LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "down_proj"]),
    "embedding": lambda: LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[5, 9], modules_to_save=["lm_head"]),
    "adalora": lambda: AdaLoraConfig(init_r=4, target_r=2, total_step=5, target_modules=["q_proj", "up_proj"]),
    "vera": lambda: VeraConfig(r=16, target_modules=["q_proj", "down_proj"]),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_adapters_over_codes_of_bitsandbytes(case: str, tmp_path: Path) -> None:
    theirs = peft_over(theirs_4bit(), CONFIGS[case]())
    wanted = plainly(theirs)
    assert relative(wanted, plainly(theirs_4bit())) > 1e-3
    assert sum(type(module) is bnb.nn.Linear4bit for module in theirs.modules()) == 14
    theirs.save_pretrained(tmp_path)
    for held in (ours_4bit(), ours_4bit(theirs_4bit()), theirs_4bit()):
        loaded = rw.load(held, tmp_path)
        assert relative(plainly(loaded), wanted) < TOLERANCE
    over_dense = rw.load(dense(), tmp_path)
    assert relative(plainly(over_dense), wanted) > 1e-3  # 4 bits do round


@pytest.mark.parametrize("name", ["qlora", "dora", "pissa", "adalora", "vera"])
def test_adapters_of_ours_over_codes_of_bitsandbytes(name: str, tmp_path: Path) -> None:
    recipe = rw.recipes.qlora(rank=4) if name == "qlora" else getattr(rw.recipes, name)(rank=4, storage="nf4")
    model: Any = rw.adapt(dense(), recipe)
    assert any(isinstance(module, NF4Linear) for module in model.modules())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    wanted = logits(model)
    rw.save(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = PeftModel.from_pretrained(theirs_4bit(), tmp_path)
    theirs.peft_config["default"].inference_mode = True
    assert relative(plainly_without_dropout(theirs), wanted) < TOLERANCE


def plainly_without_dropout(model: Any) -> torch.Tensor:
    """As `plainly`, with every dropout off."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_cannot_be_made_again_over_codes(start: str, tmp_path: Path) -> None:
    peft_over(dense(), LoraConfig(r=4, init_lora_weights=start, target_modules=["q_proj"])).save_pretrained(tmp_path)
    for held in (ours_4bit(), theirs_4bit()):
        with pytest.raises(CheckpointError, match=r"changed the weights before they were held in 4 bits, .*path_initial_model_for_weight"):
            rw.load(held, tmp_path)
