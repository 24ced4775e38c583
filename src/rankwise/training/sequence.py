"""A sequence of tasks, one data set after another, with any recipe; after each task all tasks so far are evaluated.

    R[i][j] = score on task j after training on task i (j <= i)
    average = mean_j R[T][j]
    forgetting = mean_{j<T} (best of R[j][j] .. R[T-1][j], minus R[T][j])
    backward transfer = mean_{j<T} (R[T][j] - R[j][j])

The score is the accuracy of a classifier. Of a language model it is the loss, where less is better: both differences then change their
sign, so that forgetting above zero is worse and backward transfer above zero better for either. Chaudhry et al. 2018, arXiv 1801.10112
(forgetting); Lopez-Paz and Ranzato 2017, arXiv 1706.08840 (backward transfer).

One optimizer goes through the sequence; between two tasks `rankwise.next_task` tells the schedule. The rate's schedule begins anew with
each task. Each task is a run of its own in `tasks/`, so a run that was killed goes on inside its task, bit for bit.
"""

import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from rankwise.errors import ConfigError
from rankwise.training.config import Config, task_configs, task_folder
from rankwise.training.evaluate import scores_table
from rankwise.training.folder import RunFolder, begin, write_json
from rankwise.training.models import load_tokenizer, model_folder
from rankwise.training.prepare import Prepared, prepare_tasks
from rankwise.training.progress import say
from rankwise.training.run import (
    Interrupted,
    Result,
    Scores,
    _before,
    _first_interrupt,
    _loop,
    _save_adapter,
    _trainer,
    adapted_model,
    next_steps,
    scorers,
    total_steps,
)


def train_sequence(config: Config, run: RunFolder, mine: Mapping[str, Any], new: bool, console: Any, closing: bool) -> Result:
    """Trains the tasks of a resolved configuration in their order; called by `run.train`, which says what is raised.

    Args:
        config: the resolved configuration, with `data.tasks`.
        run: its folder. mine: its identity. new: nothing there is to be gone on from.
        console: where to print. closing: say where the adapter lies at the end.
    """
    import rankwise as rw

    tokenizer, notes = load_tokenizer(model_folder(config.model))
    configs = task_configs(config)
    data = prepare_tasks(configs, tokenizer)
    _check(data)
    for task, each in data.items():
        say(console, f"Task {task}\n{each.text()}")
    steps = {task: total_steps(config, len(each.train)) for task, each in data.items()}
    parts = [RunFolder(run.root / "tasks" / task_folder(index, task)) for index, task in enumerate(configs)]
    first = next(iter(configs))
    found = None if new else run.checkpoint()
    loaded = adapted_model(configs[first], data[first], found, console)
    model = loaded.model
    for note in dict.fromkeys([*notes, *loaded.notes]):
        say(console, f"Note  {note}")
    plan = str(model.rankwise.plan)
    say(console, plan)
    if new:
        begin(run, config, mine, plan, {task: each.report() for task, each in data.items()})
    score = {task: scorers(configs[task], each, model)["task"] for task, each in data.items()}
    before = _before(run, model, lambda: {task: each() for task, each in score.items()})
    console.print(scores_table(before))
    optimizer = rw.optimizer(model, lr=config.train.lr, weight_decay=config.train.weight_decay, total_steps=sum(steps.values()))
    at = next((index for index, part in enumerate(parts) if found and found[0].is_relative_to(part.root)), 0)
    rows = [_done(part) for part in parts[:at]]
    session: Any = None
    for index in range(at, len(parts)):
        task = list(configs)[index]
        say(console, f"Task {index + 1} of {len(parts)}: {task}")
        if index > at:
            rw.next_task(model, optimizer)
        session = _one_task(
            configs[task], parts[index], data[task], loaded, optimizer, steps[task], found if index == at else None, console
        )
        after = {name: score[name]() for name in list(configs)[: index + 1]}
        _save_adapter(parts[index], config, data[task], model)
        write_json(parts[index] / "results.json", {"finished": True, "steps": steps[task], "after": after})
        if index:
            shutil.rmtree(parts[index - 1].checkpoints, ignore_errors=True)
        rows.append(after)
    session.check_alive()
    _save_adapter(run, config, data[first], model)
    sequence = summary(rows)
    results = {"finished": True, "steps": sum(steps.values()), "before": before, "after": rows[-1], "sequence": sequence}
    write_json(run / "results.json", results)
    console.print(scores_table(before, rows[-1]))
    say_summary(console, sequence)
    if closing:
        say(console, next_steps(run, config))
    return Result(run, sum(steps.values()), before, rows[-1], sequence)


def _check(data: Mapping[str, Prepared]) -> None:
    for index, (task, each) in enumerate(data.items()):
        if "task" not in each.scored:
            raise ConfigError(
                f"task {task!r} has no rows to evaluate on, so what is forgotten could not be told; give data.tasks.{index}.data.eval"
            )


def _done(part: RunFolder) -> dict[str, Any]:
    import json

    return json.loads((part / "results.json").read_text(encoding="utf-8"))["after"]


def _one_task(config: Config, part: RunFolder, data: Prepared, loaded: Any, optimizer: Any, steps: int, found: Any, console: Any) -> Any:
    """Trains one task, or goes on with it from a checkpoint; returns the session."""
    from rankwise.training.metrics import Recorder
    from rankwise.training.progress import Progress

    part.root.mkdir(parents=True, exist_ok=True)
    if found:
        say(console, f"Resuming {part.root} from its checkpoint at step {found[1]} of {steps}")
    with Progress(console, steps) as progress:
        recorder = Recorder(part, found[1] if found else 0, progress)
        trainer = _trainer(config, part, data, loaded, optimizer, steps)
        score = scorers(config, data, loaded.model)["task"]
        stop = trainer.follow(
            part, recorder, lambda: {f"task_{key}": value for key, value in score().items() if key not in ("tokens", "rows")}
        )
        with _first_interrupt(stop, console):
            _loop(trainer, found, steps, config.seed)
    if found and found[1] >= steps:  # killed between two tasks: the next one goes on with the optimizer as it was
        _take_optimizer(optimizer, found[0])
    if stop.asked and trainer.state.global_step < steps:
        raise Interrupted(
            f"stopped at step {trainer.state.global_step} of {steps} of this task, which is saved; give the same command again to go on"
        )
    return trainer.session


def _take_optimizer(optimizer: Any, folder: Any) -> None:
    import torch

    optimizer.load_state_dict(torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True))


# --- what is reported ------------------------------------------------------------------------------------------------------------------


def summary(rows: Sequence[Scores]) -> dict[str, Any]:
    """What `results.json` says of a sequence, from the scores of the tasks so far after each task.

    Returns:
        tasks, score ('accuracy' or 'loss'), matrix (row i: after task i, None where task j was still to come), average, forgetting and
        backward_transfer (None for a single task).
    """
    tasks = list(rows[-1])
    score = "accuracy" if "accuracy" in rows[-1][tasks[0]] else "loss"
    sign = 1.0 if score == "accuracy" else -1.0
    matrix = [[row[task][score] if task in row else None for task in tasks] for row in rows]
    last, older = rows[-1], tasks[:-1]
    best = {task: max(sign * row[task][score] for row in rows[:-1] if task in row) for task in older}
    learned = {task: rows[index][task][score] for index, task in enumerate(older)}

    def mean(values: list[float]) -> float | None:
        return sum(values) / len(values) if values else None

    return {
        "tasks": tasks,
        "score": score,
        "matrix": matrix,
        "average": mean([last[task][score] for task in tasks]),
        "forgetting": mean([best[task] - sign * last[task][score] for task in older]),
        "backward_transfer": mean([sign * (last[task][score] - learned[task]) for task in older]),
    }


def say_summary(console: Any, sequence: Mapping[str, Any]) -> None:
    """The matrix as a table, and the three numbers."""
    from rich.table import Table

    table = Table(title=f"{sequence['score'].capitalize()} on each task, after each task", title_justify="left", title_style="bold")
    table.add_column("after")
    for task in sequence["tasks"]:
        table.add_column(task, justify="right")
    for task, row in zip(sequence["tasks"], sequence["matrix"], strict=True):
        table.add_row(task, *("" if value is None else f"{value:.4f}" for value in row))
    console.print(table)
    if sequence["forgetting"] is None:
        say(console, f"Average {sequence['score']} {sequence['average']:.4f}; one task, so nothing could be forgotten")
        return
    say(
        console,
        f"Average {sequence['score']} {sequence['average']:.4f}, forgetting {sequence['forgetting']:.4f}, "
        f"backward transfer {sequence['backward_transfer']:+.4f}",
    )
