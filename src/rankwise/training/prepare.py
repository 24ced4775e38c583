"""Rows of a configuration, read, recognised, encoded and checked: everything that happens to data before a step is taken."""

import dataclasses
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from rankwise.errors import ConfigError, DataError
from rankwise.recipe import Recipe
from rankwise.training.collate import Collator
from rankwise.training.config import Config, resolve
from rankwise.training.encoded import ALLOWED
from rankwise.training.rows import Rows, chosen, read_rows, types_of

DEMO_FILES = {
    "causal": {"train": "train.jsonl", "eval": "test.jsonl", "general": "general.jsonl"},
    "classification": {"train": "sections-train.jsonl", "eval": "sections-test.jsonl"},
}


@dataclass(frozen=True)
class Prepared:
    """The encoded rows of a run: what is trained on, and named sets to score."""

    train: Any
    scored: dict[str, Any]  # 'task', 'general' -> encoded rows
    collate: Callable[..., Any]
    shape: str
    labels: list[str] | None  # the classes of a classifier

    def report(self) -> dict[str, Any]:
        """What was counted in each set of rows, as plain values."""
        sets = {"train": self.train, **self.scored}
        return {name: {"source": encoded.source, **dataclasses.asdict(encoded.report)} for name, encoded in sets.items()}

    def text(self) -> str:
        """The same as lines to print."""
        about = "" if self.labels else f"; loss on {self.train.loss_on}"
        lines = [f"Rows are {self.shape}{about}"]
        for name, encoded in {"train": self.train, **self.scored}.items():
            lines += [f"{name}: {line}" for line in (_class_text(encoded) if self.labels else encoded.report.text()).splitlines()]
        if self.labels:
            lines.append(
                f"classes ({len(self.labels)}): " + ", ".join(f"{name} {count}" for name, count in self.train.counts.items() if count)
            )
        return "\n".join(lines)


def _class_text(encoded: Any) -> str:
    report = encoded.report
    cut = f"; {report.cut:,} are longer than {encoded.max_length} and are cut, as is usual for classification" if report.cut else ""
    return "\n".join([f"{report.rows:,} rows, {report.tokens:,} tokens, longest {report.longest:,}{cut}", *report.notes])


def source_path(name: str | None, part: str, task: str) -> str | None:
    """The path behind a data source's name: 'demo' and 'demo/FILE.jsonl' are the bundled files."""
    if name is None or not (name == "demo" or name.startswith("demo/")) or Path(name).exists():
        return name
    from rankwise.demo import data_file

    files = DEMO_FILES["classification" if task == "classification" else "causal"]
    file = files.get(part) if name == "demo" else name.removeprefix("demo/")
    if file is None:
        raise ConfigError(f"data.{part}='demo': the bundled sample has no such file for task={task!r}")
    try:
        return str(data_file(file))
    except FileNotFoundError as error:
        raise ConfigError(f"data.{part}={name!r}: {error}") from None


def source_names(config: Config) -> dict[str, tuple[str, str | None] | None]:
    """part -> (path or Hub name, split), for train, eval and general. A folder or Hub name given for training brings its held-out split;
    `data: demo` brings all parts of the sample."""
    data, task = config.data, config.task
    whole_demo = data.train == "demo"
    names: dict[str, tuple[str, str | None] | None] = {"train": (str(source_path(data.train, "train", task)), None)}
    for part in ("eval", "general"):
        given = getattr(data, part)
        if given is None and whole_demo and (part == "eval" or task != "classification"):
            given = "demo"
        path = source_path(given, part, task)
        names[part] = None if path is None else (path, "test" if part == "eval" and not Path(path).is_file() else None)
    return names


def read_parts(config: Config) -> dict[str, Rows | None]:
    """part -> rows, for train, eval and general; what `data.filter` leaves of them.

    Raises:
        DataError: as `read_rows`; a filter that names no column of a row, or leaves nothing.
    """
    rows = {part: None if found is None else read_rows(found[0], found[1]) for part, found in source_names(config).items()}
    return {part: found if found is None else chosen(found, config.data.filter) for part, found in rows.items()}


def prepare(config: Config, tokenizer: Any, labels: list[str] | None = None) -> Prepared:
    """Reads, recognises, encodes and checks the rows that a configuration names. `labels` are the classes, where they are known already.

    Raises:
        DataError: as `read_rows`, `recognise`, `encode_rows`; rows without a supervised token, cut answers or missing end tokens that
            `allow` does not name; labels outside the training rows' classes.
    """
    rows = read_parts(config)
    train = cast(Rows, rows["train"])
    kinds = _kinds(config, train)
    if config.task == "classification":
        if rows["general"] is not None:
            raise ConfigError("data.general is for causal language models; a classifier has no loss on general text; take it out")
        return _classification(config, _without_types(train, config), _without_types(rows["eval"], config), tokenizer, labels, kinds)
    train, tested, general = (_without_types(rows[part], config) for part in ("train", "eval", "general"))
    return _causal(config, cast(Rows, train), tested, general, tokenizer, kinds)


def prepare_tasks(parts: Mapping[str, Config], tokenizer: Any) -> dict[str, Prepared]:
    """Task name -> its rows. Classifiers have one label space over all tasks, the union of the classes of their training rows.

    Raises:
        DataError: as `prepare`, with the task's name before it.
    """
    configs = list(parts.values())
    labels = None
    if len(configs) > 1 and configs[0].task == "classification":
        from rankwise.training.classification import class_names

        read = {task: _in_task(task, partial(_training_rows, config)) for task, config in parts.items()}
        labels = class_names(list(read.values()))
    return {task: _in_task(task, partial(prepare, config, tokenizer, labels)) for task, config in parts.items()}


def _training_rows(config: Config) -> Rows:
    return cast(Rows, _without_types(read_parts(config)["train"], config))


def _in_task(task: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except DataError as error:
        if not task:
            raise
        raise DataError(f"task {task!r}: {error}") from error


def _kinds(config: Config, train: Rows) -> list[int] | None:
    """The kind of each training row, where data.types names a column.

    Raises:
        ConfigError: the method must know it, and no column is named. DataError: as `types_of`. RecipeError: a kind that the method does
            not know.
    """
    if config.data.types is not None:
        found = types_of(train, config.data.types)
        resolve(config).update.check_types(found)
        return found
    if reason := resolve(config).update.missing_fact():
        raise ConfigError(f"data.types is missing: {reason}")
    return None


def _without_types(rows: Rows | None, config: Config) -> Rows | None:
    """Rows as they would be without the column of kinds, which is no part of their shape."""
    column = config.data.types
    if rows is None or column is None:
        return rows
    return dataclasses.replace(rows, rows=[{key: value for key, value in row.items() if key != column} for row in rows.rows])


def calibration_rows(config: Config, data: Prepared, recipe: Recipe) -> list[int]:
    """The training rows that inits and schedules see before training, drawn without replacement from the run's seed; none where nobody
    asks, all where there are fewer. A schedule's sample is stratified, and serves an init that asks too.

    Raises:
        ConfigError: strata that these rows do not have.
    """
    ask, sample, rows = recipe.init.calibration, recipe.schedule.sample, len(data.train)
    if sample is not None:
        least = 0 if ask is None else ask.rows
        return stratified(strata_of(data, sample.strata), max(sample.share, min(1.0, least / rows)), f"{config.seed}/sample")
    if ask is not None:
        return random.Random(f"{config.seed}/calibration").sample(range(rows), min(ask.rows, rows))
    return []


def calibration_batches(config: Config, data: Prepared, drawn: list[int]) -> list[dict[str, Any]]:
    """Batches of `train.batch_size` of the drawn rows."""
    size = config.train.batch_size
    read = [{key: value for key, value in data.train[index].items() if key != "sample_types"} for index in drawn]
    return [data.collate(read[start : start + size]) for start in range(0, len(read), size)]


LENGTHS = 5  # classes of length, equally many rows each


def strata_of(data: Prepared, kind: str) -> list[str]:
    """Row -> its stratum: the class of a classifier's row, else one of five classes of length; one stratum for 'none'."""
    if kind == "auto":
        kind = "length" if data.labels is None else "label"
    if kind == "label":
        if data.labels is None:
            raise ConfigError("strata='label' needs rows with classes, and this task has none; use strata='length' or 'auto'")
        return [data.labels[label] for label in data.train.labels]
    if kind == "none":
        return ["rows"] * len(data.train)
    order = sorted(range(len(data.train)), key=lambda index: len(data.train.input_ids[index]))
    made = [""] * len(order)
    for position, index in enumerate(order):
        made[index] = f"length {LENGTHS * position // len(order) + 1} of {LENGTHS}"
    return made


def stratified(strata: list[str], share: float, seed: str) -> list[int]:
    """Row numbers in a random order: of each stratum its share, rounded so that the total is right, but one row at least (so of many
    small strata more than the share)."""
    members: dict[str, list[int]] = {}
    for index, stratum in enumerate(strata):
        members.setdefault(stratum, []).append(index)
    wanted = {name: share * len(rows) for name, rows in members.items()}
    counts = {name: max(1, int(want)) for name, want in wanted.items()}
    # what rounding down has left over goes to those that lack most
    for name in sorted(wanted, key=lambda name: counts[name] - wanted[name]):
        if sum(counts.values()) >= round(share * len(strata)):
            break
        counts[name] = min(counts[name] + 1, len(members[name]))
    generator = random.Random(seed)
    drawn = [index for name in sorted(members) for index in generator.sample(members[name], counts[name])]
    generator.shuffle(drawn)
    return drawn


def validation_batches(config: Config, data: Prepared) -> list[dict[str, Any]]:
    """The rows of data.eval in batches of `train.batch_size`, in an order drawn from the run's seed: what a second level learns from.

    Raises:
        ConfigError: there are none.
    """
    rows = data.scored.get("task")
    if rows is None:
        raise ConfigError("data.eval is missing: the method takes every second step on rows that are not trained on; name some there")
    order = random.Random(f"{config.seed}/validation").sample(range(len(rows)), len(rows))
    size = config.train.batch_size
    return [data.collate([rows[index] for index in order[start : start + size]]) for start in range(0, len(order), size)]


def _causal(
    config: Config, train_rows: Rows, eval_rows: Rows | None, general_rows: Rows | None, tokenizer: Any, kinds: list[int] | None
) -> Prepared:
    from rankwise.training.encoded import check_encoded
    from rankwise.training.shapes import recognise
    from rankwise.training.tokenize import encode_rows

    length, loss_on = config.train.max_length, config.train.loss_on
    shape = recognise(train_rows, config.task)
    train = check_encoded(encode_rows(train_rows, shape, tokenizer, length, loss_on, types=kinds), config.allow)
    scored: dict[str, Any] = {}
    if eval_rows is not None:
        encoded = encode_rows(eval_rows, recognise(eval_rows, config.task), tokenizer, length, loss_on, train=train)
        scored["task"] = check_encoded(encoded, config.allow)
    if general_rows is not None:
        # only measured, never trained on: a text that is cut is still a text, so that needs no leave
        encoded = encode_rows(general_rows, recognise(general_rows, "text"), tokenizer, length, "all")
        scored["general"] = check_encoded(encoded, ALLOWED)
    return Prepared(train, scored, Collator(tokenizer.pad_token_id), shape.describe(), None)


def _classification(
    config: Config, train_rows: Any, eval_rows: Rows | None, tokenizer: Any, labels: list[str] | None, kinds: list[int] | None
) -> Prepared:
    from rankwise.training.classification import encode_classification

    length = config.train.max_length
    train = dataclasses.replace(encode_classification(train_rows, tokenizer, length, labels), types=kinds)
    scored = {} if eval_rows is None else {"task": encode_classification(eval_rows, tokenizer, length, train.names)}
    return Prepared(train, scored, Collator(tokenizer.pad_token_id), "text and label", list(train.names))
