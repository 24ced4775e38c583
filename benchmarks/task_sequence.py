"""A sequence of four tasks on MiniLM: AM-LoRA, with both ways to train its selectors, against one LoRA trained on all in turn.

    python -m benchmarks.task_sequence --output benchmarks/results/task_sequence.json

Each task is to tell four sections of Debian packages apart, by the bundled rows; there is one label space of sixteen classes, and no task
is named at evaluation. For each method and seed the accuracy of every task after every task, the average, forgetting and backward
transfer are printed. The classifier's head trains in full with every method, so what it forgets is in the figures of all of them.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from rankwise.demo import data_file
from rankwise.training.folder import versions
from rankwise.training.run import train

GROUPS = {
    "media": ("graphics", "sound", "video", "fonts"),
    "network": ("net", "web", "mail", "admin"),
    "writing": ("text", "editors", "database", "vcs"),
    "science": ("games", "science", "math", "x11"),
}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora"},
    "am-lora, all selectors": {"name": "am-lora", "selector_train": "all"},
    "am-lora, new selector": {"name": "am-lora", "selector_train": "new"},
}


def write_task(folder: Path, name: str, train_rows: int, eval_rows: int) -> dict[str, Any]:
    """One task of the configuration, its rows in files: the first rows of each of its sections."""
    paths = {}
    for part, file, most in (("train", "sections-train.jsonl", train_rows), ("eval", "sections-test.jsonl", eval_rows)):
        counts = dict.fromkeys(GROUPS[name], 0)
        kept = []
        for line in data_file(file).read_text(encoding="utf-8").splitlines():
            label = json.loads(line)["label"]
            if label in counts and counts[label] < most:
                counts[label] += 1
                kept.append(line)
        paths[part] = folder / f"{name}-{part}.jsonl"
        paths[part].write_text("\n".join(kept) + "\n", encoding="utf-8")
    return {"name": name, "data": {part: str(path) for part, path in paths.items()}}


def measure(method: dict[str, Any], tasks: list[dict[str, Any]], seed: int, options: argparse.Namespace, output: Path) -> dict[str, Any]:
    """The summary of one run, and what it took."""
    numbers = {"epochs": options.epochs, "lr": options.lr, "batch_size": 8, "max_length": options.max_length, "save_every": 10**6}
    config = {
        "model": "minilm",
        "task": "classification",
        "data": {"tasks": tasks},
        "method": method,
        "rank": options.rank,
        "train": numbers | {"precision": "fp32"},
        "seed": seed,
        "output": str(output),
    }
    start = time.perf_counter()
    result = train(config, closing=False)
    assert result.sequence is not None
    return {"seed": seed, "steps": result.steps, "seconds": round(time.perf_counter() - start, 1), **result.sequence}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="where the figures are written")
    parser.add_argument("--rows", type=int, default=60, help="training rows a section")
    parser.add_argument("--eval-rows", type=int, default=40, help="rows a section to evaluate on, at most")
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--lr", type=float, default=5e-4, help="one rate for all methods")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in options.methods}
    with tempfile.TemporaryDirectory() as folder:
        tasks = [write_task(Path(folder), name, options.rows, options.eval_rows) for name in GROUPS]
        for seed in options.seeds:
            for name in options.methods:
                run = Path(folder) / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
                found[name].append(measure(METHODS[name], tasks, seed, options, run))
                settings = {key: value for key, value in vars(options).items() if key not in ("output", "methods")}
                about = {"settings": settings, "versions": versions(), "groups": GROUPS, "results": found}
                options.output.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    print(f"{'method':24} {'average':>8} {'forgetting':>11} {'backward':>9}   (means over {len(options.seeds)} seeds)")
    for name, runs in found.items():
        means = [sum(run[key] for run in runs) / len(runs) for key in ("average", "forgetting", "backward_transfer")]
        print(f"{name:24} {means[0]:8.4f} {means[1]:11.4f} {means[2]:+9.4f}")


if __name__ == "__main__":
    main()
