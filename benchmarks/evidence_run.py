"""One run of the table of methods: the model and its optimizer, the one loop that all methods share, and what is kept of it."""

import gc
import math
import random
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rankwise as rw
from benchmarks.common import machine
from benchmarks.evidence_jobs import BESIDE, OPTIONS, Run, final_steps
from benchmarks.evidence_tasks import Data, Part, Task, load, score
from rankwise.recipes import RECIPES
from rankwise.training.config import make_config
from rankwise.training.prepare import calibration_batches, calibration_rows, validation_batches


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
