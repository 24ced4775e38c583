"""Raw results of the table of methods as rows, and how two of them are compared: in pairs, over the same test rows, from the same seeds."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy

from benchmarks.evidence_jobs import METHODS, SEEDS, bracket, chosen, final_steps, finals, ranked, read, searches, trains
from benchmarks.evidence_tasks import Task, rows_of

RESAMPLES = 2000


@dataclass(frozen=True)
class Row:
    """What is known of a method on a task: the finished final runs, seed by seed, and why there are none."""

    task: str
    method: str
    lr: float | None
    edge: str  # 'low' or 'high' where the chosen rate is the last one tried there, 'beyond' where it lies above the bracket
    runs: dict[int, dict[str, Any]]
    missing: str  # why runs are missing: 'not run', or what was raised
    given_up: tuple[float, ...] = ()  # rates that were better at a quarter of the steps and did not hold at full length

    def rows(self, part: str, seeds: Sequence[int]) -> numpy.ndarray:
        """(rows, 3): [loss, weight, right] of each row, mean over seeds."""
        return numpy.mean([self.runs[seed][part] for seed in seeds], axis=0)

    def means(self, part: str, column: int = 0) -> list[float]:
        """For each seed the mean over all weights: of the loss (column 0) or of what is right (2)."""
        found = (numpy.asarray(run[part]) for run in self.runs.values())
        return [float(rows[:, column].sum() / rows[:, 1].sum()) for rows in found]

    def mean(self, part: str = "test", column: int = 0) -> float:
        """The mean over seeds."""
        return float(numpy.mean(self.means(part, column)))

    def size(self, what: str) -> int:
        """A size of the first run."""
        return next(iter(self.runs.values()))[what]


@dataclass(frozen=True)
class Difference:
    """One row less another over the test rows, and the 95% bootstrap interval over them; negative is a lower loss."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


def difference(mine: Row, other: Row, part: str = "test", column: int = 0) -> Difference:
    """Paired over the rows, on the seeds that both have (all of one against a base that does not train).

    Rows are drawn again with replacement, both sides alike.
    """
    still = any(run["steps"] == 0 for row in (mine, other) for run in row.runs.values())  # what does not train has no seeds
    seeds = None if still else [seed for seed in mine.runs if seed in other.runs]
    one = mine.rows(part, seeds or list(mine.runs))
    two = other.rows(part, seeds or list(other.runs))
    gaps, weights = one[:, column] - two[:, column], one[:, 1]
    drawn = numpy.random.default_rng(0).integers(0, len(gaps), (RESAMPLES, len(gaps)))
    resampled = gaps[drawn].sum(1) / weights[drawn].sum(1)
    low, high = numpy.percentile(resampled, [2.5, 97.5])
    return Difference(float(gaps.sum() / weights.sum()), float(low), float(high))


@dataclass(frozen=True)
class Evidence:
    """All rows of one task, and the folder with the results of other benchmarks."""

    task: Task
    rows: dict[str, Row]
    folder: Path = field(default=Path(__file__).parent / "results")

    def has(self, *methods: str) -> bool:
        """Whether each of these has a finished run."""
        return all(self.rows[method].runs for method in methods)

    def missing(self, *methods: str) -> str:
        """What these lack."""
        return "; ".join(f"{method}: {self.rows[method].missing}" for method in methods if not self.rows[method].runs)

    @cached_property
    def any(self) -> bool:
        """Whether anything was run."""
        return any(row.runs for row in self.rows.values())


def gather(root: Path, task: Task, steps: int | None = None, methods: Sequence[str] = METHODS) -> Evidence:
    """The rows of a task from the raw files under `root`. steps: of a final run, where the rows need not be read to know."""
    steps = final_steps(task, rows_of(task)) if steps is None else steps
    rows = {}
    for method in methods:
        lr = chosen(root, task, method, steps)
        wanted = finals(root, task, method, steps)
        found = {run.seed: result for run in wanted if (result := read(run.path(root))) is not None}
        tried = [result for run in searches(root, task, method, steps) if (result := read(run.path(root))) is not None]
        failed = [result["failed"] for result in (*found.values(), *tried) if "failed" in result]
        runs = {seed: result for seed, result in found.items() if "failed" not in result}
        low, _, high = bracket(method)
        last = max((run.lr for run in searches(root, task, method, steps)), default=None)
        edge = "" if lr is None or not trains(task, method) else "low" if lr == low else "high" if lr == last else ""
        edge = edge or ("beyond" if lr is not None and lr > high and trains(task, method) else "")
        count = 1 if not trains(task, method) else len(SEEDS)
        missing = failed[0] if failed and not runs else "" if len(runs) == count else "not run" if not runs else f"{len(runs)} of {count}"
        given_up = tuple(rate for rate in ranked(root, task, method, steps)[1] if rate != lr)
        rows[method] = Row(task.name, method, lr, edge, runs, missing, given_up)
    return Evidence(task, rows, root.parent)


def results_of(path: Path) -> dict[str, Any] | None:
    """Another benchmark's result, where it was measured."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
