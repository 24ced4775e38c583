"""The bundled base on its two unseen sections: rankwise and PEFT from the same start factors, on the same batches.

    python -m benchmarks.peft_parity --output benchmarks/results/peft_parity.json

For LoRA, DoRA and PiSSA prints the held-out completion loss before and after training in both libraries and their relative
difference. Both sides run under bf16 autocast with plain AdamW and a linearly falling learning rate; PEFT gets rankwise's starting factors
(for PiSSA also the residual weights).
"""

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rankwise as rw
from rankwise.demo import base_folder, data_file
from rankwise.sites import adapted_sites
from rankwise.training.collate import Collator
from rankwise.training.rows import read_rows
from rankwise.training.shapes import recognise
from rankwise.training.tokenize import encode_rows

Batches = list[dict[str, Tensor]]
AUTOCAST = torch.autocast("cpu", torch.bfloat16)  # fp32 weights and masters, bf16 products, on both sides


def batches(file: str, tokenizer: Any, size: int, epochs: int = 1, seed: int | None = None) -> Batches:
    rows = read_rows(data_file(file))
    encoded = encode_rows(rows, recognise(rows, "completion"), tokenizer, 512, "completion")
    collate = Collator(tokenizer.pad_token_id)
    made = []
    for epoch in range(epochs):
        order = (
            torch.arange(len(encoded))
            if seed is None
            else torch.randperm(len(encoded), generator=torch.Generator().manual_seed(seed + epoch))
        )
        made += [collate([encoded[int(i)] for i in part]) for part in order.split(size)]
    return made


@torch.no_grad()
def held_out(model: nn.Module, data: Batches) -> float:
    """Mean loss over all supervised tokens."""
    model.eval()
    total = count = 0.0
    for batch in data:
        tokens = int((batch["labels"][:, 1:] != -100).sum())
        with AUTOCAST:
            total += float(model(**batch).loss) * tokens
        count += tokens
    return total / count


def train(model: nn.Module, data: Batches, lr: float) -> None:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(data))
    for batch in data:
        with AUTOCAST:
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        falling.step()
        optimizer.zero_grad()


def peft_twin(base: nn.Module, ours: nn.Module, method: str, rank: int, alpha: float) -> nn.Module:
    """A PEFT model that starts at the same function with the same factors."""
    from peft import LoraConfig, get_peft_model

    names = sorted({name.rpartition(".")[2] for name in adapted_sites(ours)})
    twin = get_peft_model(base, LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, use_dora=method == "dora"))
    modules = dict(twin.named_modules())
    with torch.no_grad():
        for name, site in adapted_sites(ours).items():
            layer: Any = modules[f"base_model.model.{name}"]
            factors = site.update.factors()
            layer.lora_A["default"].weight.copy_(factors.down)
            layer.lora_B["default"].weight.copy_(factors.up)
            if site.offset is not None:
                layer.base_layer.weight.sub_(factors.delta())
    return twin


def main() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    base = AutoModelForCausalLM.from_pretrained(base_folder(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base_folder())
    data = batches("train.jsonl", tokenizer, options.batch, options.epochs, seed=0)
    test = batches("test.jsonl", tokenizer, 32)
    before = held_out(base, test)
    rows = {}
    print(
        f"held-out completion loss before: {before:.4f}; {len(data)} steps of {options.batch} rows, lr {options.lr:g}, rank {options.rank}"
    )
    print(f"{'method':8s}{'rankwise':>10s}{'PEFT':>10s}{'difference':>12s}{'lower by':>10s}")
    for method in ("lora", "dora", "pissa"):
        alpha = options.rank if method == "pissa" else 2 * options.rank
        lr = options.lr / 3 if method == "pissa" else options.lr
        ours = rw.adapt(copy.deepcopy(base), rw.recipes.RECIPES[method](rank=options.rank, alpha=alpha))
        twin = peft_twin(copy.deepcopy(base), ours, method, options.rank, alpha)
        losses = []
        for model in (ours, twin):
            train(model, data, lr)
            losses.append(held_out(model, test))
        difference = abs(losses[0] - losses[1]) / losses[1]
        rows[method] = {"rankwise": losses[0], "peft": losses[1], "difference": difference, "lower by": 1 - losses[0] / before}
        print(f"{method:8s}{losses[0]:10.4f}{losses[1]:10.4f}{difference:12.2%}{1 - losses[0] / before:10.1%}", flush=True)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        setting = {key: value for key, value in vars(options).items() if key != "output"}
        options.output.write_text(json.dumps({"setting": setting, "before": before, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
