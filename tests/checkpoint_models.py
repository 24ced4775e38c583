"""Tiny bases, a few real training steps, and the list of recipes and compositions that the checkpoint tests go through."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankwise as rw
from rankwise.context import takes_context
from rankwise.errors import CheckpointError
from rankwise.recipe import Recipe
from rankwise.recipes import RECIPES
from rankwise.sites import adapted_sites, trained_modules
from rankwise.storage.nf4_codes import dequantize, quantize

torch.set_num_threads(1)

FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "rankwise.json"}
IDS = torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(5))


@functools.cache
def _base(name: str) -> nn.Module:
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
    )

    torch.manual_seed(11)
    if name in ("llama", "deep llama"):
        layers = 2 if name == "llama" else 4
        sizes = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }
        return LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=32, initializer_range=0.2, **sizes)).eval()
    if name == "llama of nf4 levels":
        # weights that 4 bits hold exactly, so that a reader with a dense base computes the same
        model = copy.deepcopy(_base("llama"))
        for part_name, part in model.named_modules():
            if isinstance(part, nn.Linear) and part_name != "lm_head":
                held = quantize(part.weight.detach(), double_quant=False)
                part.weight.data = dequantize(held, tuple(part.weight.shape), torch.float32)
        return model
    if name == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2, initializer_range=0.2)).eval()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(vocab_size=64, max_position_embeddings=32, num_labels=3, initializer_range=0.2, **sizes)
    return BertForSequenceClassification(config).eval()


def base(name: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    """A fresh copy of a tiny base, always with the same weights."""
    return copy.deepcopy(_base(name)).to(dtype)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS).logits


def prompt_of(model: nn.Module) -> dict[str, Tensor]:
    """What a call without labels must say to a model that routes by prompt; nothing for the others."""
    return {"prompt_mask": torch.ones_like(IDS)} if takes_context(model) else {}


def train(model: nn.Module, steps: int = 3, lr: float = 2e-2) -> nn.Module:
    """A few AdamW steps, so that no factor is zero any more."""
    optimizer = rw.optimizer(model, lr=lr, total_steps=steps)
    model.train()
    for step in range(steps):
        out = model(input_ids=IDS.roll(step, 1), **prompt_of(model)).logits
        target = IDS if out.dim() == 3 else torch.tensor([0, 2])
        nn.functional.cross_entropy(out.flatten(0, -2), target.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """All that an adapter is made of, by name: slots, what gains save, starts, heads."""
    found: dict[str, Tensor] = {}
    for name, module in adapted_sites(model).items():
        if module.update is not None:
            found |= {f"{name}.{slot}": getattr(module.update, slot).detach() for slot in module.update.slots}
        if module.gain is not None:
            found |= {f"{name}.{slot}": tensor for slot, tensor in module.gain.saved().items()}
        if module.offset is not None:
            found |= {f"{name}.start_down": module.offset.down, f"{name}.start_up": module.offset.up}
    for name, module in trained_modules(model).items():
        found |= {f"{name}.{key}": tensor for key, tensor in module.trained.state_dict().items()}
    return found


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference over the largest value."""
    return float(((a - b).abs().max() / b.abs().max()).detach())


def _named(name: str) -> Callable[[], Recipe]:
    return lambda: RECIPES[name](rank=4)


#: case -> (base, recipe, the peft_type that must be written)
CASES: dict[str, tuple[str, Callable[[], Recipe], str]] = {
    "lora": ("llama", _named("lora"), "LORA"),
    "rslora": ("llama", _named("rslora"), "LORA"),
    "qlora": ("llama of nf4 levels", lambda: RECIPES["qlora"](rank=4, alpha=8, double_quant=False), "LORA"),
    "lora-plus": ("llama", _named("lora-plus"), "LORA"),
    "lora-fa": ("llama", _named("lora-fa"), "LORA"),
    "dora": ("llama", _named("dora"), "LORA"),
    "pissa": ("llama", _named("pissa"), "LORA"),
    "milora-svd": ("llama", _named("milora-svd"), "LORA"),
    "olora": ("llama", _named("olora"), "LORA"),
    "lora-ga": ("llama", _named("lora-ga"), "LORA"),
    "corda": ("llama", _named("corda"), "LORA"),
    "eva": ("llama", _named("eva"), "LORA"),
    "lora-one": ("llama", _named("lora-one"), "LORA"),
    "dora on lora-one": ("llama", lambda: rw.recipes.lora_one(rank=4, gain="dora"), "LORA"),
    "randlora": ("llama", _named("randlora"), "RANKWISE"),
    "moslora": ("llama", _named("moslora"), "RANKWISE"),
    "vera": ("llama", lambda: RECIPES["vera"](rank=24), "VERA"),
    "propulsion": ("llama", _named("propulsion"), "RANKWISE"),
    "adalora": ("llama", lambda: rw.recipes.adalora(rank=4, start="orthonormal"), "ADALORA"),
    "deep-lora": ("llama", _named("deep-lora"), "RANKWISE"),
    "deep-lora compressed, exact start": (
        "llama",
        lambda: rw.recipes.deep_lora(rank=4, variant="compressed", gamma=1.0, exact_zero=True, alpha=3, epsilon=0.1),
        "RANKWISE",
    ),
    "deep-lora with frozen frames": ("gpt2", lambda: rw.recipes.deep_lora(rank=5, variant="compressed", gamma=0, epsilon=0.2), "RANKWISE"),
    "lora-pro": ("llama", _named("lora-pro"), "LORA"),
    "lora-pro in weight space": ("llama", lambda: rw.recipes.lora_pro(rank=4, adam_space="weight"), "LORA"),
    "rosa": ("llama", _named("rosa"), "RANKWISE"),
    "rosa without a ledger": ("llama", lambda: rw.recipes.rosa(rank=4, ledger=False), "RANKWISE"),
    "rosa with a master": ("llama", lambda: rw.recipes.rosa(rank=4, master="fp32"), "RANKWISE"),
    "gpt2 rosa": ("gpt2", _named("rosa"), "RANKWISE"),
    "lora-drop": ("deep llama", lambda: rw.recipes.lora_drop(rank=4, threshold=0.3), "RANKWISE"),
    "lora-drop that removes": ("deep llama", lambda: rw.recipes.lora_drop(rank=4, threshold=0.3, drop="remove"), "LORA"),
    "lora-drop dora on pissa": (
        "deep llama",
        lambda: rw.recipes.pissa(rank=4, gain="dora", schedule={"name": "lora-drop", "threshold": 0.3}),
        "RANKWISE",
    ),
    "lora-drop pissa fold": (
        "deep llama",
        lambda: rw.recipes.pissa(rank=4, base="fold", schedule={"name": "lora-drop", "threshold": 0.3}),
        "RANKWISE",
    ),
    "am-lora": ("llama", _named("am-lora"), "RANKWISE"),
    "loramoe": ("llama", lambda: rw.recipes.loramoe(rank=2, experts=3), "RANKWISE"),
    "milora-mixture": ("llama", lambda: rw.recipes.milora_mixture(rank=4, theta_mode="joint"), "RANKWISE"),
    "galore": ("llama", lambda: rw.recipes.galore(rank=4, update_interval=3), "RANKWISE"),
    # starts that move the base
    "pissa fold": ("llama", lambda: rw.recipes.pissa(rank=4, base="fold"), "LORA"),
    "milora-svd fold": ("llama", lambda: rw.recipes.milora_svd(rank=4, base="fold"), "LORA"),
    "olora fold alpha 8": ("llama", lambda: rw.recipes.olora(rank=4, alpha=8, base="fold"), "LORA"),
    "pissa rslora": ("llama", lambda: rw.recipes.pissa(rank=4, alpha=3, scaling="rslora"), "LORA"),
    "pissa rslora fold": ("llama", lambda: rw.recipes.pissa(rank=4, scaling="rslora", base="fold"), "LORA"),
    "dora on pissa": ("llama", lambda: rw.recipes.pissa(rank=4, gain="dora"), "LORA"),
    "dora on pissa fold": ("llama", lambda: rw.recipes.pissa(rank=4, gain="dora", base="fold"), "LORA"),
    "dora on rslora on milora": ("llama", lambda: rw.recipes.milora_svd(rank=4, gain="dora", scaling="rslora"), "LORA"),
    "pissa with down frozen": ("llama", lambda: rw.recipes.pissa(rank=4, frozen={"down"}), "LORA"),
    "moslora on pissa": ("llama", lambda: rw.recipes.moslora(rank=4, init="pissa"), "RANKWISE"),
    "moslora on pissa fold": ("llama", lambda: rw.recipes.moslora(rank=4, init="pissa", base="fold"), "RANKWISE"),
    "lora-ga plain scaling fold": ("llama", lambda: rw.recipes.lora_ga(rank=4, alpha=3, scaling="lora", base="fold"), "LORA"),
    "corda kpm official fold": (
        "llama",
        lambda: rw.recipes.corda(rank=4, mode="kpm", balance="official", damping=0.01, normalize="sample", base="fold"),
        "LORA",
    ),
    "dora on lora-ga": ("llama", lambda: rw.recipes.lora_ga(rank=4, gain="dora"), "LORA"),
    "pissa fold in nf4": ("llama", lambda: rw.recipes.pissa(rank=4, base="fold", storage="nf4"), "RANKWISE"),
    # gains over other updates
    "dora full gradient": ("llama", lambda: rw.recipes.dora(rank=4, norm_grad="full"), "LORA"),
    "dora with down frozen": ("llama", lambda: rw.recipes.lora_fa(rank=4, gain="dora"), "LORA"),
    "dora alone": ("llama", lambda: rw.recipes.propulsion(gain="dora"), "RANKWISE"),
    "dvora": ("llama", lambda: rw.recipes.vera(rank=24, gain="dora"), "RANKWISE"),
    "dora over adalora": ("llama", lambda: rw.recipes.adalora(rank=4, start="orthonormal", gain="dora"), "RANKWISE"),
    "triplets of pissa": ("llama", lambda: rw.recipes.pissa(rank=4, update="adalora"), "RANKWISE"),
    "triplets of pissa fold": ("llama", lambda: rw.recipes.pissa(rank=4, update="adalora", base="fold"), "RANKWISE"),
    "dora over moslora": ("llama", lambda: rw.recipes.moslora(rank=4, gain="dora"), "RANKWISE"),
    "propulsion over lora": ("llama", lambda: rw.recipes.lora(rank=4, gain="propulsion"), "RANKWISE"),
    "vera per shape": ("llama", lambda: rw.recipes.vera(rank=24, sharing="per-shape"), "RANKWISE"),
    "vera two ranks": ("llama", lambda: rw.recipes.vera(rank=24, rank_pattern={"q_proj": 8}), "RANKWISE"),
    "vera down_proj only": ("llama", lambda: rw.recipes.vera(rank=24, pool_seed=3, targets=["down_proj", "o_proj"]), "VERA"),
    # patterns
    "rank and alpha patterns": (
        "llama",
        lambda: rw.recipes.lora(
            rank=4,
            alpha=8,
            rank_pattern={"q_proj": 2, "re:.*layers.1.*up_proj": 6},
            alpha_pattern={"v_proj": 5.5, "layers.0.mlp.up_proj": 1},
        ),
        "LORA",
    ),
    "patterns on rslora pissa dora": (
        "llama",
        lambda: rw.recipes.pissa(
            rank=4, scaling="rslora", gain="dora", rank_pattern={"q_proj": 2}, alpha_pattern={"layers.1.mlp.up_proj": 3}
        ),
        "LORA",
    ),
    "one layer": ("llama", lambda: rw.recipes.lora(rank=4, targets={"include": ["q_proj", "mlp.up_proj"], "layers": "1"}), "LORA"),
    # other families
    "gpt2 lora": ("gpt2", _named("lora"), "LORA"),
    "gpt2 dora on pissa": ("gpt2", lambda: rw.recipes.pissa(rank=4, gain="dora"), "LORA"),
    "gpt2 pissa fold": ("gpt2", lambda: rw.recipes.pissa(rank=4, base="fold"), "LORA"),
    "gpt2 lora-ga": ("gpt2", _named("lora-ga"), "LORA"),
    "gpt2 corda": ("gpt2", _named("corda"), "LORA"),
    "gpt2 vera": ("gpt2", lambda: rw.recipes.vera(rank=24), "VERA"),
    "gpt2 adalora": ("gpt2", lambda: rw.recipes.adalora(rank=4, start="orthonormal"), "ADALORA"),
    "gpt2 moslora": ("gpt2", _named("moslora"), "RANKWISE"),
    "gpt2 tied embedding": ("gpt2", lambda: rw.recipes.lora(rank=4, targets=["wte", "c_attn"]), "LORA"),
    "embedding": ("llama", lambda: rw.recipes.lora(rank=4, targets=["embed_tokens", "q_proj", "lm_head"]), "LORA"),
    "embedding rslora gaussian": (
        "llama",
        lambda: rw.recipes.rslora(rank=4, init="gaussian", targets=["embed_tokens", "all-linear"], rank_pattern={"embed_tokens": 8}),
        "LORA",
    ),
    "embedding in full": ("llama", lambda: rw.recipes.lora(rank=4, modules_to_save=["embed_tokens", "norm"]), "LORA"),
    "bert classifier": ("bert", lambda: rw.recipes.lora(rank=4, modules_to_save=["classifier"]), "LORA"),
    "bert dora pissa classifier": (
        "bert",
        lambda: rw.recipes.pissa(rank=4, gain="dora", targets=["query", "value", "dense"], modules_to_save=["classifier"]),
        "LORA",
    ),
    "bert vera classifier": ("bert", lambda: rw.recipes.vera(rank=24, modules_to_save=["classifier"]), "VERA"),
    "bert adalora classifier": ("bert", lambda: rw.recipes.adalora(rank=4, start="orthonormal", modules_to_save=["classifier"]), "ADALORA"),
    "bert propulsion classifier": ("bert", lambda: rw.recipes.propulsion(modules_to_save=["classifier"]), "RANKWISE"),
}


def trained(case: str) -> Any:
    """A model of a case, adapted and trained for three steps."""
    name, recipe, _ = CASES[case]
    return train(adapted(name, recipe()))


def adapted(name: str, recipe: Recipe, dtype: torch.dtype = torch.float32) -> Any:
    """A base with adapters at their start; inits that ask for calibration read two rows, the others nothing."""
    labels = torch.tensor([0, 2]) if name == "bert" else IDS
    return rw.adapt(base(name, dtype), recipe, calibration=[{"input_ids": IDS, "labels": labels}])


def refused(folder: Path, message: str, model: Any = None, **options: Any) -> None:
    """Loading raises with the message, and the base is not touched."""
    model = base() if model is None else model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(CheckpointError, match=message):
        rw.load(model, folder, **options)
    assert not adapted_sites(model)
    assert flags == [p.requires_grad for p in model.parameters()]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
