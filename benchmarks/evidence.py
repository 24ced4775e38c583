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
import gc
import json
import math
import os
import random
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rankwise as rw
from benchmarks.common import machine, table, tune_allocator
from benchmarks.evidence_tasks import TASKS, Data, Part, Task, load, rows_of, score
from rankwise.recipes import RECIPES
from rankwise.training.config import make_config
from rankwise.training.prepare import calibration_batches, calibration_rows, validation_batches

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


# --- what is to be run -----------------------------------------------------------------------------------------------------------------


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


# --- one run ---------------------------------------------------------------------------------------------------------------------------


def mean(rows: list[list[float]]) -> float:
    """Mean loss over all weights (tokens or rows)."""
    return sum(row[0] for row in rows) / sum(row[1] for row in rows)


def contender(run: Run, task: Task, data: Data, options: Mapping[str, Any] | None = None) -> tuple[nn.Module, Any]:
    """The model of a method, and its optimizer; None where nothing trains. `options`: the recipe's, over those of the table."""
    loaded = load(task, data, run.seed)
    model, heads = loaded.model, tuple(loaded.full_modules)
    if run.method in BESIDE:
        for name, parameter in model.named_parameters():
            parameter.requires_grad = run.method == "full" or name.startswith(tuple(f"{head}." for head in heads) or ("\0",))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return model, torch.optim.AdamW(trained, lr=run.lr, weight_decay=0.0, fused=True) if trained else None
    given = OPTIONS.get(run.method, {}) | dict(options or {})
    recipe = RECIPES[run.method](**given).replace(seed=run.seed, lr=run.lr, modules_to_save=heads)
    recipe = recipe.replace(targets=replace(recipe.targets, exclude=(*recipe.targets.exclude, *task.exclude)))
    config = make_config(
        {"model": task.model, "task": task.kind, "data": "demo", "method": "lora", "seed": run.seed, "output": "unused"},
        [f"train.batch_size={task.batch}"],
    )
    prepared = data.prepared()
    asks = recipe.init.calibration is not None or recipe.schedule.sample is not None
    batches = calibration_batches(config, prepared, calibration_rows(config, prepared, recipe)) if asks else None
    rw.adapt(model, recipe, calibration=batches)
    second = validation_batches(config, prepared) if recipe.routing.wants_validation else None
    if second is not None:
        second = [on_device(batch, model) for batch in second]
    return model, rw.optimizer(model, lr=run.lr, total_steps=run.steps, validation=second)


def order(data: Data, task: Task, run: Run) -> Iterator[Part]:
    """The rows of each step: every row once before any comes again, in an order of the seed."""
    generator, left = random.Random(f"{run.seed}/order"), []
    for _ in range(run.steps):
        if not left:
            left = generator.sample(range(len(data.train)), len(data.train))
        yield Part(data.train[index] for index in left[: task.batch])
        left = left[task.batch :]


def train(model: nn.Module, optimizer: Any, run: Run, task: Task, data: Data) -> list[float]:
    """The one loop: AdamW under a linear schedule with a short warm-up, gradients clipped at 1, as `rankwise train` has it. Stops at a loss
    that is no number."""
    warm = max(1, round(0.05 * run.steps))
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / warm, 1 - (step - warm) / max(1, run.steps)))
    losses: list[float] = []
    model.train()
    for rows in order(data, task, run):
        losses.append(round(step(model, optimizer, on_device(data.collate(rows), model)), 6))
        if not math.isfinite(losses[-1]):
            break
        falling.step()
    return losses


def on_device(batch: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The batch where the model is."""
    device = next(model.parameters()).device
    return {key: value.to(device) for key, value in batch.items()}


def step(model: nn.Module, optimizer: Any, batch: Mapping[str, Tensor]) -> float:
    """One step; the loss before it. Nothing is learned from a loss that is no number."""
    loss = model(**batch).loss
    told = float(loss.detach())
    if math.isfinite(told):
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return told


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in nested containers."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(map(tensor_bytes, value.values()))
    return sum(map(tensor_bytes, value)) if isinstance(value, list | tuple) else 0


def sizes(model: nn.Module, optimizer: Any) -> dict[str, int]:
    """What trains, what the optimizer and the method keep, and how large the files of the adapter are."""
    trained = [p for p in model.parameters() if p.requires_grad]
    made = {"trained_parameters": sum(p.numel() for p in trained)}
    made["optimizer_bytes"] = 0 if optimizer is None else tensor_bytes(dict(optimizer.state))
    session = getattr(optimizer, "rankwise_session", None)
    made["method_state_bytes"] = 0 if session is None else tensor_bytes(session.tensors())
    if session is None:
        made["adapter_bytes"] = tensor_bytes(trained)  # what trained is what must be kept
        return made
    with tempfile.TemporaryDirectory() as folder:
        rw.save(model, Path(folder) / "adapter")
        made["adapter_bytes"] = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    return made


def execute(run: Run, task: Task, data: Data, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Trains and scores. A run that cannot be is a result too: what was raised is kept, and shown in the table.

    options: the recipe's, as for `contender`.
    """
    begin = time.perf_counter()
    result: dict[str, Any] = {**asdict(run), "setting": asdict(task), "rows": data.digest}
    torch.manual_seed(run.seed)
    model = optimizer = None
    try:
        model, optimizer = contender(run, task, data, options)
        result["parameters_at_start"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        result["losses"] = [] if optimizer is None else train(model, optimizer, run, task, data)
        if result["losses"] and not math.isfinite(result["losses"][-1]):
            result["losses"][-1] = str(result["losses"][-1])  # JSON has no such numbers
            result["failed"] = f"the loss was {result['losses'][-1]} at step {len(result['losses'])}"
        else:
            scored = ("validation",) if 0 < run.steps < final_steps(task, data) else ("validation", "test", "general")
            result |= {part: score(model, getattr(data, part), data) for part in scored}
            result |= sizes(model, optimizer)
    except Exception as error:  # whatever stops a method must not stop the others
        result["failed"] = f"{type(error).__name__}: {error}"
    result["seconds"] = round(time.perf_counter() - begin, 2)
    result["machine"] = machine()
    model = optimizer = None
    gc.collect()  # schedules hold models in cycles, and hundreds of runs follow each other
    return result


def write(path: Path, result: Mapping[str, Any]) -> None:
    """In one rename, so that a file is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(result) + "\n", encoding="utf-8")
    part.replace(path)


# --- the command -----------------------------------------------------------------------------------------------------------------------


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


def listed(parser: argparse.ArgumentParser, given: str, known: Mapping[str, Any] | tuple[str, ...], what: str) -> list[str]:
    """The names in a list with commas."""
    names = [name.strip() for name in given.split(",") if name.strip()]
    if unknown := [name for name in names if name not in known]:
        parser.error(f"{what}: {', '.join(unknown)} is none of {', '.join(known)}")
    return names


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
        from benchmarks.evidence_report import write_report

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
