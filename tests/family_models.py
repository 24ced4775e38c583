"""One tiny model with random weights of each family in the table of docs/integrations.md, with a batch that gives a loss."""

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from tiny_models import VOCABULARY, _spread, gpt2, llama, token_ids
from torch import Tensor, nn

Batch = dict[str, Tensor]
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
# recipes take nothing from here but what a family cannot do without: the new head of a classifier trains in full
CLASSIFIER: dict[str, Any] = {"modules_to_save": ["classifier"]}


def build(name: str, **changes: Any) -> nn.Module:
    """A transformers model by the name of its class, of the configuration that belongs to it."""
    import transformers

    kind = getattr(transformers, name)
    return _spread(kind(kind.config_class(**changes)))


def words() -> Batch:
    ids = token_ids()
    return {"input_ids": ids, "labels": ids}


def sorted_words() -> Batch:
    return {"input_ids": token_ids(), "labels": torch.tensor([0, 2])}


def pictures() -> Batch:
    return {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3)), "labels": torch.tensor([0, 2])}


T5: dict[str, Any] = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
PADS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED: dict[str, Any] = SMALL | {"num_key_value_heads": 2}

# family -> how its model is made, how its batch is made, fields of the recipe
FAMILIES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Batch], dict[str, Any]]] = {
    "llama": (lambda: llama(num_hidden_layers=1), words, {}),
    "qwen2": (lambda: build("Qwen2ForCausalLM", **GROUPED), words, {}),
    "qwen3": (lambda: build("Qwen3ForCausalLM", **GROUPED, head_dim=8), words, {}),
    "mistral": (lambda: build("MistralForCausalLM", **GROUPED), words, {}),
    "gemma": (lambda: build("GemmaForCausalLM", **GROUPED, head_dim=8), words, {}),
    "gemma2": (lambda: build("Gemma2ForCausalLM", **GROUPED, head_dim=8), words, {}),
    "phi": (lambda: build("PhiForCausalLM", **SMALL), words, {}),
    "phi3": (lambda: build("Phi3ForCausalLM", **GROUPED, **PADS), words, {}),
    "gpt2": (gpt2, words, {}),
    "opt": (lambda: build("OPTForCausalLM", **SMALL, ffn_dim=48, word_embed_proj_dim=32), words, {}),
    "t5": (lambda: build("T5ForConditionalGeneration", **T5, decoder_start_token_id=0), words, {}),
    "bert": (lambda: build("BertForSequenceClassification", **SMALL, num_labels=3), sorted_words, CLASSIFIER),
    "roberta": (lambda: build("RobertaForMaskedLM", **SMALL, **PADS), words, {}),
    "vit": (lambda: build("ViTForImageClassification", **SMALL, image_size=8, patch_size=4, num_labels=3), pictures, CLASSIFIER),
    # experts that are linear layers of their own
    "switch": (
        lambda: build(
            "SwitchTransformersForConditionalGeneration",
            **T5,
            num_decoder_layers=1,
            num_sparse_encoder_layers=1,
            num_sparse_decoder_layers=1,
            num_experts=2,
            decoder_start_token_id=0,
        ),
        words,
        {"targets": {"include": "all-linear", "exclude": ["router.classifier"]}},  # narrower than the rank: refused by name
    ),
    # experts in one tensor, which stay as they are; the rest is adapted
    "mixtral": (lambda: build("MixtralForCausalLM", **GROUPED, num_local_experts=4), words, {}),
    "gpt-oss": (lambda: build("GptOssForCausalLM", **GROUPED, head_dim=8, num_local_experts=4), words, {}),
}


@cache
def _made(family: str) -> nn.Module:
    torch.manual_seed(0)
    return FAMILIES[family][0]().eval()


def family(name: str) -> tuple[nn.Module, Batch, dict[str, Any]]:
    """A fresh model of a family in evaluation mode, its batch, and the fields that its recipes need."""
    _, batch, fields = FAMILIES[name]
    return copy.deepcopy(_made(name)), batch(), fields
