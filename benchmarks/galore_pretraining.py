"""Pretraining the demo base's architecture from random weights: GaLore against AdamW on the same batches, step by step in turns.

    python -m benchmarks.galore_pretraining --steps 240 --batch 4 --held-out 48 --arms adamw:1e-3 adamw:3e-3 galore:1e-2

Both train everything: AdamW all parameters in full, GaLore the linear layers in a subspace of their gradients and the rest (embeddings,
norms) in full, as in the paper. Equal tokens, equal warmup and decay; each with its own learning rate, which for what
GaLore trains in full is --full-lr. Perplexity is that of held-out text;
bytes are those of the tensors that the optimizers hold at the end.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rankwise as rw
from rankwise.demo import base_folder
from rankwise.planning import rest_of
from rankwise.sites import adapted_sites
from rankwise.training.models import load_model

DATA = base_folder().parent / "data"
RESULT = Path(__file__).parent / "results" / "galore_pretraining.json"


def blocks(path: Path, tokenizer: Any, length: int, seed: int | None) -> Tensor:
    """All texts of a file, an end token behind each, cut into blocks (count, length); shuffled where a seed is given."""
    ids: list[int] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        ids += [*tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    made = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    return made if seed is None else made[torch.randperm(len(made), generator=torch.Generator().manual_seed(seed))]


def batches(rows: Tensor, size: int) -> Iterator[Tensor]:
    """Batches (size, length), pass after pass."""
    while True:
        yield from (rows[first : first + size] for first in range(0, len(rows) - size + 1, size))


@torch.no_grad()
def perplexity(model: nn.Module, rows: Tensor) -> float:
    model.eval()
    losses = [float(model(input_ids=part, labels=part).loss) * len(part) for part in rows.split(16)]
    model.train()
    return math.exp(sum(losses) / len(rows))


class Arm:
    """One contender: a model, its optimizer, and what it has cost so far."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        kind, _, rate = name.partition(":")
        lr = float(rate)
        self.name, self.lr, self.seconds, self.losses = name, lr, 0.0, []
        self.model: Any = load_model("demo", "text", seed=options.seed, from_scratch=True).model.train()
        if kind == "galore":
            recipe = rw.recipes.galore(rank=options.rank, update_interval=options.interval, original="drop", seed=options.seed)
            rw.adapt(self.model, recipe.replace(modules_to_save=tuple(rest_of(self.model, recipe))))
            self.optimizer = rw.optimizer(self.model, lr=lr, eps=1e-8)
            for group in self.optimizer.param_groups:
                group["lr"] = options.full_lr if group["role"] == "other" else lr
        else:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr, weight_decay=0.0, eps=1e-8, fused=True)

    def step(self, batch: Tensor) -> None:
        begun = time.perf_counter()
        loss = self.model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds += time.perf_counter() - begun
        self.losses.append(float(loss.detach()))

    def bytes(self) -> dict[str, int]:
        """What the optimizer holds (GaLore's frames included), what D takes, what gradients take between backward and step."""
        state = [value for each in self.optimizer.state.values() for value in each.values() if isinstance(value, Tensor)]
        updates = [module.update for module in adapted_sites(self.model).values()]
        frames: list[Any] = [update.frame for update in updates]  # type: ignore[union-attr]
        factors: list[Any] = [update.trained for update in updates]  # type: ignore[union-attr]
        trained = [p for p in self.model.parameters() if p.requires_grad]
        low = {id(factor) for factor in factors}
        weights = [p for p in self.model.parameters() if id(p) not in low]
        return {key: sum(t.numel() * t.element_size() for t in held) for key, held in (
            ("optimizer state", [*state, *frames]), ("gradients", trained), ("factor D", factors), ("weights", weights)
        )}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rank", type=int, default=48)
    parser.add_argument("--interval", type=int, default=50)
    parser.add_argument("--full-lr", type=float, default=3e-3)
    parser.add_argument("--held-out", type=int, default=96, help="blocks of held-out text")
    parser.add_argument("--arms", nargs="+", default=["adamw:1e-3", "adamw:3e-3", "galore:1e-2"], help="kind:learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_folder(), local_files_only=True)
    rows = blocks(DATA / "sections-train.jsonl", tokenizer, options.length, options.seed)
    held = blocks(DATA / "sections-test.jsonl", tokenizer, options.length, None)[: options.held_out]
    arms = [Arm(name, options) for name in options.arms]
    before = {arm.name: perplexity(arm.model, held) for arm in arms}
    warmup = max(1, options.steps // 10)

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, options.steps - warmup)))

    schedules = [torch.optim.lr_scheduler.LambdaLR(arm.optimizer, rate) for arm in arms]
    curves: dict[str, dict[int, float]] = {arm.name: {0: before[arm.name]} for arm in arms}
    for step, batch in zip(range(1, options.steps + 1), batches(rows, options.batch), strict=False):
        for arm, schedule in zip(arms, schedules, strict=True):
            arm.step(batch)
            schedule.step()
        if step % max(1, options.steps // 4) == 0 or step == options.steps:
            for arm in arms:
                curves[arm.name][step] = perplexity(arm.model, held)
            print(step, {name: round(list(curve.values())[-1], 2) for name, curve in curves.items()}, flush=True)
    done = {
        "what": "demo base's architecture from random weights, same batches, held-out perplexity",
        "options": {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items() if key != "output"},
        "tokens": options.steps * options.batch * options.length,
        "tokens in the file": rows.numel(),
        "torch": torch.__version__,
        "threads": 1,
        "arms": {
            arm.name: {
                "lr": arm.lr,
                "perplexity": {str(step): round(value, 3) for step, value in curves[arm.name].items()},
                "last training losses, mean of 20": round(sum(arm.losses[-20:]) / len(arm.losses[-20:]), 4),
                "seconds in steps": round(arm.seconds, 1),
                "bytes": arm.bytes(),
            }
            for arm in arms
        },
    }
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps(done, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(done["arms"], indent=2))


if __name__ == "__main__":
    main()
