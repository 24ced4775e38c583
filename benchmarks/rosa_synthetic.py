"""The synthetic experiment of ROSA's paper: one linear layer 512 -> 32 must learn a change of rank 24, with r = 1, 8, 16, 24.

    python -m benchmarks.rosa_synthetic --output benchmarks/results/rosa_synthetic.json

Y = X (W0 + D)^T with rank(D) = 24, X standard normal; AdamW at 1e-3, as the official configuration has it (512 inputs, 32 outputs, true
rank 24, lr 1e-3, one round every 24th of the run). LoRA of rank r ends where the best rank-r part of D ends, full training and ROSA do
not. One pair of rank 1 needs more rounds than 24 for a change of rank 24: the last run has four times as many, of the same length.
The numbers of samples and steps and the batch size are ours.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rankwise as rw

WIDTH_IN, WIDTH_OUT, TRUE_RANK = 512, 32, 24
RANKS = (1, 8, 16, 24)


def task(seed: int, samples: int) -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    """(layer at W0, X, Y, D)."""
    torch.manual_seed(seed)
    layer = nn.Linear(WIDTH_IN, WIDTH_OUT, bias=False)
    # entries of the size of W0's
    change = torch.randn(WIDTH_OUT, TRUE_RANK) @ torch.randn(TRUE_RANK, WIDTH_IN) / TRUE_RANK**0.5 * float(layer.weight.detach().std())
    x = torch.randn(samples, WIDTH_IN)
    return layer, x, x @ (layer.weight.detach() + change).T, change


def best(change: Tensor, x: Tensor, rank: int) -> float:
    """The smallest loss that a change of this rank can have on X: what is left of X D^T beside its leading components."""
    return float(torch.linalg.svdvals(x @ change.T)[rank:].square().sum()) / (len(x) * WIDTH_OUT)


def run(method: str, rank: int, seed: int, steps: int, samples: int, batch: int, lr: float, rounds: int = 24) -> dict[str, Any]:
    """Final loss over all of X, relative to the loss at the start."""
    layer, x, y, change = task(seed, samples)
    model: nn.Module = nn.Sequential(layer)
    start = float((model(x) - y).square().mean().detach())
    if method == "full":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)
    else:
        extra: dict[str, Any] = {"alpha": rank, "targets": ["0"]}
        if method == "lora":
            recipe = rw.recipes.lora(rank=rank, **extra)
        else:
            recipe = rw.recipes.rosa(rank=rank, rounds=rounds, covering=True, **extra)
        rw.adapt(model, recipe)
        optimizer = rw.optimizer(model, lr=lr, total_steps=steps)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    order = torch.Generator().manual_seed(seed)
    began = time.perf_counter()
    for _ in range(steps):
        rows = torch.randint(samples, (batch,), generator=order)
        optimizer.zero_grad(set_to_none=True)
        (model(x[rows]) - y[rows]).square().mean().backward()
        optimizer.step()
    seconds = time.perf_counter() - began
    with torch.no_grad():
        loss = float((model(x) - y).square().mean())
    floor = 0.0 if method == "full" else best(change, x, rank) / start
    return {
        "method": method, "rank": rank, "rounds": rounds if method == "rosa" else 1, "steps": steps, "trained": trained,
        "relative loss": loss / start, "best of this rank": floor, "seconds": round(seconds, 1),
    }  # fmt: skip


def main() -> None:
    """Runs all methods and prints one line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--steps", type=int, default=4800)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rest = (options.samples, options.batch, options.lr)
    found = []
    for method, rank, longer in [("full", 0, 1), *(("lora", r, 1) for r in RANKS), *(("rosa", r, 1) for r in RANKS), ("rosa", 1, 4)]:
        found.append(run(method, rank, options.seed, longer * options.steps, *rest, rounds=24 * longer))
        print(json.dumps(found[-1]), flush=True)
    if options.output:
        about = {"torch": torch.__version__, "device": "cpu, 1 thread, fp32"} | {k: v for k, v in vars(options).items() if k != "output"}
        options.output.write_text(json.dumps({"about": about, "runs": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
