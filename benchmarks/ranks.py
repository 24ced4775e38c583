"""Quality over ranks: two claims that a table with one rank a method cannot decide. Resumable, as `benchmarks.evidence` is.

    python -m benchmarks.ranks                     # half an hour on 2 cores; stop it and start it again at will
    python -m benchmarks.ranks --parts large
    python -m benchmarks.evidence --report         # the verdicts, among the papers' claims

'large': LoRA and rsLoRA at rank 64 on the rows of `completions-short`; the table has them at rank 16. 'few': LoRA and Deep LoRA at ranks 8
to 64 on 16 of those rows, another 16 for each seed, over and over until LoRA has long learned them by heart. Each cell chooses its rate as
the table's rows do. Raw results lie under benchmarks/results/ranks/rank-R/.
"""

import argparse
import random
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.common import listed, tune_allocator
from benchmarks.evidence_jobs import Run, final_steps, jobs, mean, write
from benchmarks.evidence_results import Row, gather
from benchmarks.evidence_run import execute
from benchmarks.evidence_tasks import SHORT, Data, Part, Task, rows_of

RESULTS = Path(__file__).parent / "results" / "ranks"
FEW_ROWS = 16
#: 40 passes over the few rows
FEW = replace(SHORT, name="completions-few", steps=80)


@dataclass(frozen=True)
class Grid:
    """Methods at ranks on one task."""

    task: Task
    methods: tuple[str, ...]
    ranks: tuple[int, ...]

    def folder(self, root: Path, rank: int) -> Path:
        """Where the results of a rank are."""
        return root / f"rank-{rank}"

    def data(self, seed: int) -> Data:
        """The rows of the task; of 'few' only the sixteen of this seed are trained on."""
        whole = rows_of(self.task)
        if self.task is not FEW:
            return whole
        return replace(whole, train=Part(random.Random(f"{seed}/few").sample(whole.train, FEW_ROWS)))

    def left(self, root: Path) -> Iterator[tuple[int, Run]]:
        """Rank and run of what is still to be done."""
        data = {self.task.name: self.data(0)}
        for rank in self.ranks:
            yield from ((rank, run) for run in jobs(self.folder(root, rank), [self.task], list(self.methods), data))

    def rows(self, root: Path) -> dict[tuple[str, int], Row]:
        """(method, rank) -> what is known of it."""
        steps = final_steps(self.task, self.data(0))
        found = {rank: gather(self.folder(root, rank), self.task, steps, self.methods).rows for rank in self.ranks}
        return {(method, rank): found[rank][method] for method in self.methods for rank in self.ranks}


GRIDS = {"large": Grid(SHORT, ("lora", "rslora"), (64,)), "few": Grid(FEW, ("lora", "deep-lora"), (8, 16, 32, 64))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(GRIDS), help=f"any of {', '.join(GRIDS)}")
    parser.add_argument("--ranks", default=None, help="only these of a part's ranks")
    parser.add_argument("--budget-minutes", type=float, default=None, help="begin no run after that; the next call goes on")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the raw results are")
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    parts = listed(parser, options.parts, GRIDS, "--parts")
    only = None if options.ranks is None else {int(rank) for rank in options.ranks.split(",")}
    warnings.simplefilter("ignore")
    tune_allocator()
    if options.threads:
        torch.set_num_threads(options.threads)
    begin = time.monotonic()
    for name in parts:
        grid = GRIDS[name]
        if only is not None:
            grid = replace(grid, ranks=tuple(rank for rank in grid.ranks if rank in only))
        for rank, run in grid.left(options.results):
            if options.budget_minutes is not None and time.monotonic() - begin > 60 * options.budget_minutes:
                print("the time is up; the same command goes on from here")
                return
            result = execute(run, grid.task, grid.data(run.seed), {"rank": rank})
            write(run.path(grid.folder(options.results, rank)), result)
            told = result.get("failed") or f"validation loss {mean(result['validation']):.4f}"
            what = f"{name}: {run.method} rank {rank} lr {run.lr:g} seed {run.seed}, {run.steps} steps"
            print(f"{what}: {told} ({result['seconds']:.1f} s)", flush=True)


if __name__ == "__main__":
    main()
