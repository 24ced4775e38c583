"""What the table of methods is made of: its runs, each of which is one file, and which of them are left in what order.

What is known is read from the files; nothing else is remembered, so a stopped run of the command goes on by itself.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.evidence_tasks import Data, Task
from rankwise.recipes import RECIPES

RESULTS = Path(__file__).parent / "results" / "evidence"
#: rows of the table beside the recipes, and what is worth searching there
BESIDE: dict[str, tuple[float, float]] = {"frozen": (1e-4, 1e-2), "full": (5e-5, 5e-3)}
#: these come first, with all seeds; then one seed of everything
FIRST = ("frozen", "full", "lora", "dora", "pissa")
METHODS = (*FIRST, *(name for name in RECIPES if name not in FIRST))
#: what a recipe cannot do without here: neither task has kinds of rows, which the balance loss of LoRAMoE would compare
OPTIONS: dict[str, dict[str, Any]] = {"loramoe": {"delta": 0.0}}
SEEDS = (0, 1, 2)
BEYOND = 3  # rates tried above a bracket, each half as far again on a logarithmic scale as its middle from its end


@dataclass(frozen=True)
class Run:
    """One training run, which is one file."""

    task: str
    method: str
    lr: float
    seed: int
    steps: int

    def path(self, root: Path) -> Path:
        return root / self.task / self.method / f"lr{self.lr:.3g}-seed{self.seed}-steps{self.steps}.json"


def final_steps(task: Task, data: Data) -> int:
    """Steps of one pass."""
    return task.steps or -(-len(data.train) // task.batch)


def bracket(method: str) -> tuple[float, float, float]:
    """Low, geometric middle, high."""
    low, high = BESIDE[method] if method in BESIDE else RECIPES[method](**OPTIONS.get(method, {})).lr_bracket
    return low, float(f"{math.sqrt(low * high):.3g}"), high


def trains(task: Task, method: str) -> bool:
    """Whether anything trains: of a frozen classifier its new head does, of a frozen language model nothing."""
    return method != "frozen" or task.kind == "classification"


def searches(root: Path, task: Task, method: str, steps: int) -> list[Run]:
    """The runs that choose the rate, as far as they are known: those of the bracket, then above it while the highest is the best."""
    if not trains(task, method):
        return []
    low, middle, high = bracket(method)
    runs = [Run(task.name, method, lr, 0, max(1, steps // 4)) for lr in (low, middle, high)]
    for beyond in range(1, BEYOND + 1):
        losses = losses_of(root, runs)
        if losses is None or not losses or min(losses, key=losses.__getitem__) != runs[-1].lr:
            break
        runs.append(replace(runs[-1], lr=float(f"{high * (high / middle) ** (beyond / 2):.3g}")))
    return runs


def losses_of(root: Path, runs: list[Run]) -> dict[float, float] | None:
    """Rate -> validation loss of the runs that came through; None until all were run. A loss that is no number is none."""
    found = [(run.lr, read(run.path(root))) for run in runs]
    if any(result is None for _, result in found):
        return None
    losses = {lr: mean(result["validation"]) for lr, result in found if result and "validation" in result}
    return {lr: loss for lr, loss in losses.items() if math.isfinite(loss)}


def read(path: Path) -> dict[str, Any] | None:
    """The result of a run, if it was run."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def ranked(root: Path, task: Task, method: str, steps: int) -> tuple[list[float], list[float]]:
    """The rates that come into question, by validation loss at a quarter of the steps, and those that were given up: with them the first
    full run ended worse than the quarter had, or in no number. Both empty until all were tried.

    A short run stands rates that a long one does not, most of all where a schedule has just begun to lower them.
    """
    losses = losses_of(root, searches(root, task, method, steps)) or {}
    left, given_up = sorted(losses, key=losses.__getitem__), []
    while left and (full := read(Run(task.name, method, left[0], SEEDS[0], steps).path(root))) is not None:
        if "failed" not in full and mean(full["validation"]) <= losses[left[0]]:
            break
        given_up.append(left.pop(0))
    return left, given_up


def chosen(root: Path, task: Task, method: str, steps: int) -> float | None:
    """The best rate that holds at full length, or the best at a quarter if none does; None until all were tried, or all failed."""
    left, given_up = ranked(root, task, method, steps)
    return (left or given_up or [None])[0]


def finals(root: Path, task: Task, method: str, steps: int) -> list[Run]:
    """The runs that the table is made of, as far as they are known: the rate is chosen first."""
    if not trains(task, method):
        return [Run(task.name, method, 0.0, 0, 0)]
    lr = chosen(root, task, method, steps)
    return [] if lr is None else [Run(task.name, method, lr, seed, steps) for seed in SEEDS]


def jobs(root: Path, tasks: list[Task], methods: list[str], data: Mapping[str, Data]) -> Iterator[Run]:
    """Runs that are left, in order: a method's rates before its seeds, some methods first, then one seed of all before the others."""
    stages = [(name, slice(None)) for name in methods if name in FIRST]
    rest = [name for name in methods if name not in FIRST]
    stages += [(name, slice(0, 1)) for name in rest] + [(name, slice(1, None)) for name in rest]
    for task in tasks:
        steps = final_steps(task, data[task.name])
        for method, seeds in stages:
            while left := [run for run in searches(root, task, method, steps) if not run.path(root).is_file()]:
                yield from left
            while left := [run for run in finals(root, task, method, steps)[seeds] if not run.path(root).is_file()]:
                yield left[0]  # whose result may change the rate


def mean(rows: list[list[float]]) -> float:
    """Mean loss over all weights (tokens or rows)."""
    return sum(row[0] for row in rows) / sum(row[1] for row in rows)


def write(path: Path, result: Mapping[str, Any]) -> None:
    """In one rename, so that a file is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(result) + "\n", encoding="utf-8")
    part.replace(path)
