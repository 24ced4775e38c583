"""The table of methods: every recipe, full fine-tuning and the frozen base on the same rows with the same loop. Resumable.

    python -m benchmarks.evidence                                # everything, hours on 2 cores; stop it and start it again at will
    python -m benchmarks.evidence --tasks completions-short --budget-minutes 15
    python -m benchmarks.evidence --only lora,dora,full,frozen
    python -m benchmarks.evidence --status                       # what is there, what is left
    python -m benchmarks.evidence --report                       # docs/evidence.md and its plot from what is there

A method gets three learning rates of its own bracket (low, geometric middle, high) at a quarter of the steps, and up to three above it
while the highest is the best; the one with the lowest loss on rows kept for that is trained at full length with three seeds, or the next if
its first full run ends worse than its short one. Each run leaves one JSON under benchmarks/results/evidence/, in one rename, and is not run
again. Needs torch and transformers beside rankwise; takes a GPU where there is one.
"""

import argparse
import json
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import listed, table, tune_allocator
from benchmarks.evidence_jobs import METHODS, RESULTS, SEEDS, final_steps, finals, jobs, mean, read, searches, trains, write
from benchmarks.evidence_report import write_report
from benchmarks.evidence_run import execute
from benchmarks.evidence_tasks import TASKS, Data, Task, rows_of


def status(root: Path, tasks: list[Task], methods: list[str], data: Mapping[str, Data]) -> list[dict[str, Any]]:
    """A line for each task and method: runs done, failed, and to do."""
    lines = []
    for task in tasks:
        steps = final_steps(task, data[task.name])
        for method in methods:
            search = searches(root, task, method, steps)
            final = finals(root, task, method, steps)
            found = [read(run.path(root)) for run in (*search, *final)]
            done = sum(result is not None for result in found)
            wanted = len(search) + (len(SEEDS) if trains(task, method) else 1)
            failed = [result["failed"] for result in found if result and "failed" in result]
            lines.append({"task": task.name, "method": method, "done": done, "of": wanted, "failed": failed[0][:60] if failed else None})
    return lines


def check_same(root: Path, tasks: list[Task], data: Mapping[str, Data]) -> None:
    """Results made with other rows or numbers are refused: they would be compared with those to come."""
    for task in tasks:
        for path in (root / task.name).glob("*/*.json"):
            result = json.loads(path.read_text(encoding="utf-8"))
            if result["rows"] != data[task.name].digest or result["setting"] != json.loads(json.dumps(asdict(task))):
                raise SystemExit(f"{path} was made with other rows or settings; give another folder with --results")
            break


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="completions,sections", help=f"any of {', '.join(TASKS)}")
    parser.add_argument("--only", default=",".join(METHODS), help="recipes, and the rows 'full' and 'frozen'")
    parser.add_argument("--budget-minutes", type=float, default=None, help="begin no run after that; the next call goes on")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the raw results are")
    parser.add_argument("--data", type=Path, default=None, help="folder with rows of the same file names, in place of the bundled sample")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--retry", action="store_true", help="run failed ones again")
    parser.add_argument("--status", action="store_true", help="say what is there and what is left")
    parser.add_argument("--report", action="store_true", help="write docs/evidence.md and its plot")
    options = parser.parse_args()
    methods = [name for name in METHODS if name in listed(parser, options.only, METHODS, "--only")]
    tasks = [TASKS[name] for name in listed(parser, options.tasks, TASKS, "--tasks")]
    if options.report:
        write_report(options.results)
        return
    warnings.simplefilter("ignore")
    tune_allocator()
    if options.threads:
        torch.set_num_threads(options.threads)
    data = {task.name: rows_of(task, options.data) for task in tasks}
    check_same(options.results, tasks, data)
    if options.status:
        print(table(status(options.results, tasks, methods, data)))
        return
    if options.retry:
        for path in (path for task in tasks for path in (options.results / task.name).glob("*/*.json")):
            if path.parent.name in methods and "failed" in json.loads(path.read_text(encoding="utf-8")):
                path.unlink()
    begin = time.monotonic()
    for run in jobs(options.results, tasks, methods, data):
        if options.budget_minutes is not None and time.monotonic() - begin > 60 * options.budget_minutes:
            print("the time is up; the same command goes on from here")
            break
        result = execute(run, TASKS[run.task], data[run.task])
        write(run.path(options.results), result)
        told = result.get("failed") or f"validation loss {mean(result['validation']):.4f}"
        print(f"{run.task} {run.method} lr {run.lr:g} seed {run.seed}, {run.steps} steps: {told} ({result['seconds']:.1f} s)", flush=True)


if __name__ == "__main__":
    main()
