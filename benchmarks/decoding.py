"""What routing costs at decode: a gate that reads the prompt once against a router that reads every token, on the bundled base.

    python -m benchmarks.decoding --output benchmarks/results/decoding.json

Contenders generate the same number of tokens from the same prompts, greedily, unmerged, in turns: the frozen base, one LoRA, LoRAMoE at
every linear layer (4 experts of rank 8) and MiLoRA the mixture (rank 32, 3 of 7 layers of a block). All adapters hold factors of 32 in all,
moved away from zero, so that none has nothing to do.
"""

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import rankwise as rw
from benchmarks.common import interleave, machine, ratio, spread, table, tune_allocator, write_json
from benchmarks.evidence_tasks import SHORT, load, rows_of
from rankwise.recipe import Recipe

RECIPES: dict[str, Recipe | None] = {
    "frozen base": None,
    "lora": rw.recipes.lora(rank=32),
    "loramoe": rw.recipes.loramoe(experts=4, rank=8, delta=0.0, targets="all-linear"),
    "milora-mixture": rw.recipes.milora_mixture(),
}


def contender(base: Any, recipe: Recipe | None, prompts: dict[str, torch.Tensor], tokens: int) -> Callable[[], object]:
    """What generates once."""
    model = copy.deepcopy(base)
    if recipe is not None:
        rw.adapt(model, recipe)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator).to(parameter))
    model.eval()
    return lambda: model.generate(**prompts, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    tune_allocator()
    torch.set_num_threads(options.threads)
    data = rows_of(SHORT)
    loaded = load(SHORT, data, 0)
    ids = torch.tensor([row["input_ids"][:24] for row in data.test[: options.rows]], device=loaded.device)
    prompts = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    made = {name: contender(loaded.model, recipe, prompts, options.tokens) for name, recipe in RECIPES.items()}
    seconds = interleave(made, options.rounds)
    rows = [
        {
            "method": name,
            **spread(taken),
            "tokens/s": options.rows * options.tokens * 1000 / spread(taken)["ms"],
            "over the base": ratio(taken, seconds["frozen base"]),
            "over milora-mixture": ratio(taken, seconds["milora-mixture"]),
        }
        for name, taken in seconds.items()
    ]
    print(table(rows))
    if options.output:
        setting = {key: value for key, value in vars(options).items() if key != "output"}
        write_json(options.output, {"setting": setting, "machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
