"""Models of two layers and 32 columns with a byte vocabulary, and data to train them on: made in the test, in a moment."""

import io
import json
from pathlib import Path
from typing import Any

import torch


def make_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocab = {token: index for index, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def make_world(root: Path) -> Path:
    """root/llama, root/bert, and rows.jsonl, general.jsonl, classes.jsonl."""
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, logging

    logging.disable_progress_bar()
    tokenizer = make_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, bos_token_id=1, eos_token_id=2, **sizes))
    bert = BertModel(BertConfig(vocab_size=len(tokenizer), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes))
    for name, model in (("llama", llama), ("bert", bert)):
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    write_rows(root / "rows.jsonl", [{"prompt": f"say {i}", "completion": f"number {7 * i}"} for i in range(24)])
    write_rows(root / "general.jsonl", [{"text": f"some text {i}"} for i in range(6)])
    write_rows(
        root / "classes.jsonl", [{"text": f"{'aaa' if i % 2 else 'bbb'} {i}", "label": "odd" if i % 2 else "even"} for i in range(24)]
    )
    return root


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def plain_config(world: Path, task: str, output: Path, **changes: Any) -> dict[str, Any]:
    """A configuration as a YAML file would hold it: 5 steps of 2 x 4 rows, a checkpoint every second step."""
    classify = task == "classification"
    rows = str(world / ("classes.jsonl" if classify else "rows.jsonl"))
    train = {"steps": 5, "batch_size": 4, "accumulate": 2, "lr": 1e-2, "save_every": 2, "max_length": 64}
    return {
        "model": str(world / ("bert" if classify else "llama")),
        "task": task,
        "data": {"train": rows, "eval": rows},
        "rank": 4,
        "output": str(output),
        "train": train | changes.pop("train", {}),
    } | changes


def silent_console() -> Any:
    from rich.console import Console

    return Console(file=io.StringIO(), width=200)
