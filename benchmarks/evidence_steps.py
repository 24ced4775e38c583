"""Time and memory of every row of the table of methods, on the model and the rows of `completions`, in turns in one process.

    python -m benchmarks.evidence_steps --output benchmarks/results/evidence_steps.json     # ten minutes on 2 cores
    python -m benchmarks.evidence_steps --only lora,dora --rounds 5

A step is what the table's runs do: forward, backward, clipping and the optimizer with all that the method does there. Ratios are of the
same round. 'kept' is what a forward keeps for the backward; 'peak' is what a fresh process needs above the loaded model and its optimizer
over the first two steps, in which the optimizer makes its averages. The base is small and the steps are short: calls weigh more here than
in `benchmarks.train_step`.
"""

import argparse
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import interleave, listed, machine, peak_bytes, ratio, spread, table, tune_allocator, write_json
from benchmarks.contenders import Contender
from benchmarks.evidence_jobs import METHODS, Run
from benchmarks.evidence_run import contender, on_device, step
from benchmarks.evidence_tasks import COMPLETIONS, Part, rows_of
from benchmarks.train_step import saved_bytes

STEPS = 200  # of the run that a schedule is told of: longer than what is timed


def made(method: str) -> tuple[Any, Any, dict[str, Tensor]]:
    """Model, optimizer (None for the frozen base) and the batch."""
    data = rows_of(COMPLETIONS)
    model, optimizer = contender(Run(COMPLETIONS.name, method, 1e-4, 0, STEPS), COMPLETIONS, data)
    if optimizer is None:  # what no method can avoid: the gradient passes through the base
        model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
    batch = on_device(data.collate(Part(data.train[: COMPLETIONS.batch])), model)
    return model.train(), optimizer, batch


def once(model: Any, optimizer: Any, batch: dict[str, Tensor]) -> Callable[[], object]:
    """One step; of the frozen base forward and backward."""
    return (lambda: model(**batch).loss.backward()) if optimizer is None else (lambda: step(model, optimizer, batch))


def peak(method: str, threads: int) -> float:
    """MiB, in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.evidence_steps", "--child", method, "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the memory of {method} could not be measured:\n{done.stderr[-2000:]}")
    return float(done.stdout.split()[-1])


def measured(methods: list[str], rounds: int, threads: int) -> dict[str, Any]:
    """Everything that is printed and written."""
    parts = {method: made(method) for method in methods}
    times = interleave({method: once(*part) for method, part in parts.items()}, rounds, warmup=2)
    rows = []
    for method, (model, _, batch) in parts.items():
        row: dict[str, Any] = {"method": method, **spread(times[method])}
        row |= {f"step / {other}": ratio(times[method], times[other]) for other in ("frozen", "lora") if other in times}
        row["kept MiB"] = saved_bytes(Contender(model, batch)) / 2**20
        row["peak MiB"] = peak(method, threads)
        rows.append(row)
    shape = list(next(iter(parts.values()))[2]["input_ids"].shape)
    return {"setting": {"batch": shape, "rounds": rounds, "threads": threads, "dtype": "fp32"}, "machine": machine(), "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(METHODS), help="recipes, and the rows 'full' and 'frozen'")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=None, help="write the result as JSON")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    tune_allocator()
    torch.set_num_threads(options.threads)
    if options.child:
        print(peak_bytes(once(*made(options.child))) / 2**20)
        return
    methods = [name for name in METHODS if name in listed(parser, options.only, METHODS, "--only")]
    result = measured(methods, options.rounds, options.threads)
    print(result["machine"]["text"], result["setting"])
    print(table(result["rows"]))
    if options.output:
        write_json(options.output, result)


if __name__ == "__main__":
    main()
