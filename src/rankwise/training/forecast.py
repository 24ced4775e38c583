"""`rankwise plan`: what a run will do, from the configuration, the model's config.json and the data. No weight is read."""

from collections.abc import Sequence
from pathlib import Path

from rankwise.training.config import load_config, resolve, task_configs
from rankwise.training.models import head_names, load_config_only, load_tokenizer, model_folder
from rankwise.training.prepare import Prepared, calibration_rows, prepare_tasks, source_names
from rankwise.training.quiet import quiet

CHEAP = 64 * 2**20  # bytes of data that are tokenized in a few seconds


def forecast(path: str | Path, overrides: Sequence[str] = ()) -> str:
    """The plan of a run as text: data, recipe, coverage, parameters, memory, steps.

    Raises:
        ConfigError, DataError, RecipeError, TargetError: whatever would stop the run before its first step.
    """
    import rankwise as rw
    from rankwise.training.run import total_steps, with_full_modules

    quiet()
    config = load_config(path, overrides)
    folder = model_folder(config.model)
    lines: list[str] = []
    data: Prepared | None = None
    counts: list[int] = []
    parts = task_configs(config)
    files = [Path(found[0]) for part in parts.values() for found in source_names(part).values() if found]
    size = sum(file.stat().st_size for file in files if file.is_file())
    local = all(file.exists() for file in files)
    if config.task == "classification" or (local and size <= CHEAP):  # a classifier's head needs the classes in any case
        tokenizer, notes = load_tokenizer(folder)
        prepared = prepare_tasks(parts, tokenizer)
        data = next(iter(prepared.values()))
        counts = [total_steps(config, len(each.train)) for each in prepared.values()]
        lines += [f"Task {task}\n{each.text()}" if task else each.text() for task, each in prepared.items()]
        lines += [f"Note  {note}" for note in notes]
    else:
        lines.append(f"Data not read: {size / 2**20:.0f} MiB" if local else "Data not read: not on this machine")
    model = load_config_only(folder, config.task, data.labels if data else None)
    recipe = resolve(config)
    heads = head_names(model) if config.task == "classification" else []
    recipe = with_full_modules(config, recipe, model, heads)
    lines.append(str(rw.plan(model, recipe)))
    train = config.train
    if data and (rows := len(calibration_rows(config, data, recipe))):
        lines.append(f"Calibration  {rows:,} training rows in {-(-rows // train.batch_size):,} batches, once, before the first step")
    elif recipe.init.calibration is not None:
        lines.append(f"Calibration  {recipe.init.calibration.rows:,} training rows, once, before the first step")
    rate = recipe.lr if train.lr is None else train.lr
    batch = f"{train.batch_size} rows" + (f" x {train.accumulate}" if train.accumulate > 1 else "")
    steps = f"{sum(counts):,} steps" if data else f"{train.steps or f'{train.epochs:g} epochs'}"
    steps += f" ({' + '.join(map(str, counts))} over {len(counts)} tasks)" if len(counts) > 1 else ""
    lines.append(f"Training  {steps} of {batch}, lr {rate:g} {train.schedule}, output {config.output}")
    return "\n".join(lines)
