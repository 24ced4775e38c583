"""One training run from one configuration: data, model, adapters, evaluation, training, evaluation, adapter. Resumable at any moment."""

import json
import math
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rankwise.report import allocation_text
from rankwise.training.config import Config, load_config, make_config, resolve, resolved, task_configs
from rankwise.training.evaluate import causal_scores, class_scores, scores_table
from rankwise.training.folder import IMPORTANCE, RunFolder, begin, config_of, identity, look, write_json
from rankwise.training.models import Loaded, load_model, load_tokenizer, model_folder, pick_device, pick_precision
from rankwise.training.prepare import Prepared, calibration_batches, calibration_rows, prepare, source_names, strata_of, validation_batches
from rankwise.training.progress import say
from rankwise.training.quiet import quiet

Scores = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Result:
    """What a run left: its folder, the steps taken, and the scores of each set of rows before and after."""

    run: RunFolder
    steps: int
    before: Scores
    after: Scores
    sequence: dict[str, Any] | None = None  # of a run over tasks: `sequence.summary`

    @property
    def adapter(self) -> Path:
        """The folder of the trained adapter."""
        return self.run.adapter


class Interrupted(KeyboardInterrupt):
    """The run was stopped by the user; its message says how to go on."""


def train(
    config: Config | str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    fresh: bool = False,
    console: Any = None,
    closing: bool = True,
) -> Result:
    """Trains as a configuration says, or goes on with the same run if its output folder holds one.

    Args:
        config: a configuration, a mapping, or the path of a YAML file.
        overrides: dotted overrides such as 'train.lr=1e-3', for a mapping or a file.
        fresh: start over; what an earlier run wrote into the output folder is removed.
        console: a rich console to print to; None prints to standard output.
        closing: print where the adapter lies and what to type next.

    Raises:
        ConfigError, DataError, RecipeError, TargetError: before anything is trained.
        TrainingError: a loss that is no number, a site without gradients, a checkpoint that cannot be written.
        Interrupted: Ctrl-C; the step at hand was finished and saved.
    """
    from rich.console import Console

    quiet()
    console = console or Console()
    if not isinstance(config, Config):
        config = make_config(config, overrides) if isinstance(config, Mapping) else load_config(config, overrides)
    config = resolved(config)
    sources = [found[0] for part in task_configs(config).values() for found in source_names(part).values() if found is not None]
    mine = identity(config, sources)
    run, state = look(Path(config.output), mine, fresh)
    if state == "finished":
        return _finished(run, console)
    if config.data.tasks is not None:
        from rankwise.training.sequence import train_sequence

        return train_sequence(config, run, mine, state == "new", console, closing)
    tokenizer, notes = load_tokenizer(model_folder(config.model))
    data = prepare(config, tokenizer)
    say(console, data.text())
    _show_rows(console, data, tokenizer)
    loaded = adapted_model(config, data, run.checkpoint() if state == "resume" else None, console)
    for note in dict.fromkeys([*notes, *loaded.notes]):
        say(console, f"Note  {note}")
    made = loaded.model.rankwise.plan
    plan = str(made)
    say(console, plan)
    if allocated := allocation_text(made):
        say(console, allocated)
    if state == "new":
        begin(run, config, mine, plan, data.report())
        if made.importance is not None:
            write_json(run / IMPORTANCE, _importance(config, data, made))
    result = _trained(config, run, data, loaded, console)
    if closing:
        say(console, next_steps(run, config))
    return result


def _importance(config: Config, data: Prepared, made: Any) -> dict[str, Any]:
    """What the allocation was decided from, and what it is: the rows by their numbers, the report, the sites."""
    drawn = calibration_rows(config, data, made.recipe)
    owners = {site.name: site.owner for site in made.sites if site.owner}
    shared, left = set(owners.values()), [site.name for site in made.sites]
    strata = strata_of(data, made.recipe.schedule.sample.strata)
    return {
        "rows": drawn,
        "strata": dict(Counter(strata[index] for index in drawn)),
        "scores": made.importance.scores(),
        "kept": [name for name in left if name not in owners and name not in shared],
        "owners": owners,
        "removed": [site.site for site in made.importance.sites if site.site not in left],
        "report": made.importance.to_dict(),
    }


def adapted_model(config: Config, data: Prepared, found: tuple[Path, int] | None = None, console: Any = None) -> Loaded:
    """The base of a configuration with its adapters; a classifier's head trains in full.

    Args:
        config: the run.
        data: its rows; some of the training rows are what an init or a schedule sees that asks for data.
        found: the checkpoint to go on from. What was made from weights or data is read from there instead of being made again.
        console: where to say that calibration runs.
    """
    import rankwise as rw

    dtype = pick_precision(config.train.precision, pick_device())
    loaded = load_model(config.model, config.task, data.labels, dtype, config.seed, config.train.from_scratch)
    recipe = with_full_modules(config, resolve(config), loaded.model, loaded.full_modules)
    if recipe.schedule.sample is not None and config.train.lr is not None:
        recipe = recipe.replace(lr=config.train.lr)  # what a schedule trains beforehand is trained as the run is
    asks = recipe.init.calibration is not None or recipe.schedule.sample is not None
    if found is not None and (asks or recipe.init.needs_weight):
        rw.load(loaded.model, found[0] / "adapter")
        return loaded
    drawn = calibration_rows(config, data, recipe)
    batches = calibration_batches(config, data, drawn) if asks else None
    if batches is not None and console is not None:
        what = "Calibrating" if recipe.schedule.sample is None else "Probing"
        say(console, f"{what} on {len(drawn):,} of {len(data.train):,} training rows, {len(batches)} batches")
    rw.adapt(loaded.model, recipe, calibration=batches)
    return loaded


def with_full_modules(config: Config, recipe: Any, model: Any, heads: Sequence[str]) -> Any:
    """The recipe with what must train in full beside its sites: a new head, and from scratch everything that is no site."""
    from rankwise.planning import rest_of

    rest = rest_of(model, recipe) if config.train.from_scratch else []
    return recipe.replace(modules_to_save=tuple(dict.fromkeys([*recipe.modules_to_save, *heads, *rest])))


def scorer(config: Config, data: Prepared, model: Any) -> Callable[[], Scores]:
    """A function that scores the model on every set of rows kept for that."""
    found = scorers(config, data, model)
    return lambda: {name: score() for name, score in found.items()}


def scorers(config: Config, data: Prepared, model: Any) -> dict[str, Callable[[], dict[str, float]]]:
    """Name of a set of rows -> a function that scores the model on it."""
    dtype = pick_precision(config.train.precision, next(model.parameters()).device)
    score = class_scores if config.task == "classification" else causal_scores
    return {name: partial(score, model, encoded, data.collate, dtype) for name, encoded in data.scored.items()}


def _trained(config: Config, run: RunFolder, data: Prepared, loaded: Loaded, console: Any) -> Result:
    import rankwise as rw
    from rankwise.training.metrics import Recorder
    from rankwise.training.progress import Progress

    model = loaded.model
    steps = total_steps(config, len(data.train))
    scores = scorer(config, data, model)
    held_out = validation_batches(config, data) if model.rankwise.recipe.routing.wants_validation else None
    # first: a schedule that does not fit the length of the run says so before anything is measured
    optimizer = rw.optimizer(model, lr=config.train.lr, weight_decay=config.train.weight_decay, total_steps=steps, validation=held_out)
    before = _before(run, model, scores)
    if before:
        console.print(scores_table(before))
    else:
        say(console, "No rows to evaluate on; give data.eval to see what training does")
    found = run.checkpoint()
    if found:
        say(console, f"Resuming {run.root} from its checkpoint at step {found[1]} of {steps}")
    with Progress(console, steps) as progress:
        recorder = Recorder(run, found[1] if found else 0, progress)
        trainer = _trainer(config, run, data, loaded, optimizer, steps)
        stop = trainer.follow(run, recorder, lambda: _flat(scores()))
        with _first_interrupt(stop, console):
            _loop(trainer, found, steps, config.seed)
    if stop.asked and trainer.state.global_step < steps:
        raise Interrupted(f"stopped at step {trainer.state.global_step} of {steps}, which is saved; give the same command again to go on")
    trainer.session.check_alive()
    after = scores()
    _save_adapter(run, config, data, model, before, after)
    write_json(run / "results.json", {"finished": True, "steps": steps, "before": before, "after": after})
    if after:
        console.print(scores_table(before, after))
    return Result(run, steps, before, after)


def _loop(trainer: Any, found: tuple[Path, int] | None, steps: int, seed: int) -> None:
    from transformers import set_seed

    from rankwise.training.trainers import plain_forward

    set_seed(seed)
    try:
        if found and found[1] >= steps:  # killed after the last step: only what comes after is left to do
            trainer._load_from_checkpoint(str(found[0]))
            trainer.state.global_step = found[1]
        else:
            trainer.train(resume_from_checkpoint=str(found[0]) if found else None)
    finally:
        plain_forward(trainer.model)


def _trainer(config: Config, run: RunFolder, data: Prepared, loaded: Loaded, optimizer: Any, steps: int) -> Any:
    from rankwise.training.trainers import arguments, classification_trainer

    dtype = pick_precision(config.train.precision, loaded.device)
    options = arguments(config, steps, run, loaded.device, dtype, bool(data.scored))
    if config.task == "classification":
        return classification_trainer(loaded.model, data.train, data.collate, optimizer, options)
    from rankwise.training.causal import causal_trainer

    return causal_trainer(loaded.model, loaded.tokenizer, data.train.as_dataset(), data.collate, optimizer, options)


def total_steps(config: Config, rows: int) -> int:
    """Optimizer steps of a run: train.steps, or those of train.epochs passes; the last batch of a pass may be smaller."""
    train = config.train
    batches = -(-rows // train.batch_size)
    per_epoch = -(-batches // train.accumulate)
    return train.steps or max(1, math.ceil(train.epochs * per_epoch - 1e-9))


def _before(run: RunFolder, model: Any, scores: Callable[[], Scores]) -> Scores:
    """The base's scores, taken once: a resumed run reads them back."""
    import rankwise as rw

    path = run / "before.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    with rw.disabled(model):
        before = scores()
    write_json(path, before)
    return before


def _flat(scores: Scores) -> dict[str, float]:
    return {f"{name}_{score}": value for name, each in scores.items() for score, value in each.items() if score not in ("tokens", "rows")}


def _save_adapter(
    run: RunFolder, config: Config, data: Prepared, model: Any, before: Scores | None = None, after: Scores | None = None
) -> None:
    """The adapter and, beside it, what it takes to use it: the base, the task, the classes; and its card with data and scores."""
    import rankwise as rw
    from rankwise.checkpoint.atomic import write_folder
    from rankwise.checkpoint.card import put_card, scores_lines
    from rankwise.checkpoint.saving import adapter_card, saved_type
    from rankwise.training.carding import data_lines

    about = {"model": config.model, "task": config.task, "labels": data.labels, "max_length": config.train.max_length}
    if config.train.from_scratch:
        about |= {"from_scratch": True, "seed": config.seed}
    with write_folder(run.adapter) as folder:
        rw.save(model, folder)
        write_json(folder / "training.json", about)
        more = {"data": data_lines(data.report()), "metrics": scores_lines(before or {}, after or {})}
        put_card(folder, adapter_card(model, saved_type(folder), **more))


def _show_rows(console: Any, data: Prepared, tokenizer: Any) -> None:
    from rankwise.training.preview import preview

    console.print(preview(data.train, tokenizer, 3))


def _finished(run: RunFolder, console: Any) -> Result:
    done = json.loads((run / "results.json").read_text(encoding="utf-8"))
    say(console, f"{run.root} is finished ({done['steps']} steps); nothing is left to do")
    if done["after"]:
        console.print(scores_table(done["before"], done["after"]))
    sequence = done.get("sequence")
    if sequence is not None:
        from rankwise.training.sequence import say_summary

        say_summary(console, sequence)
    say(console, next_steps(run, config_of(run)))
    return Result(run, done["steps"], done["before"], done["after"], sequence)


def next_steps(run: RunFolder, config: Config) -> str:
    """Where the adapter lies and what can be done with it."""
    lines = [f"The adapter lies in {run.adapter}", "Next:"]
    lines.append(f"  rankwise evaluate {run.root}")
    if config.task != "classification":
        lines.append(f'  rankwise generate {run.root} --compare --prompt "..."')
    if resolve(config).mergeable:
        lines.append(f"  rankwise merge {run.root} --output {run.root}-merged")
        lines.append(f"  rankwise export {run.root} {run.root}-lora")
    else:
        lines.append(f"  rankwise export {run.root} {run.root}-lora --static    (its gates held at their mean: it cannot be merged)")
    return "\n".join(lines)


@contextmanager
def _first_interrupt(stop: Any, console: Any) -> Iterator[None]:
    """The first Ctrl-C finishes the step and saves; the second one stops at once. Only the main thread gets signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: Any) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True
        say(console, "Stopping after this step; press Ctrl-C again to stop at once")

    earlier = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, earlier)


__all__ = ["Interrupted", "Result", "adapted_model", "scorer", "total_steps", "train"]
