"""The two tasks of the table of methods: their rows, their models, and scores kept row by row, so that methods can be compared in pairs."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from rankwise.context import facts_of
from rankwise.demo import data_file
from rankwise.training.classification import encode_classification
from rankwise.training.collate import Collator
from rankwise.training.evaluate import batches, evaluating
from rankwise.training.models import load_model, load_tokenizer, model_folder
from rankwise.training.prepare import Prepared
from rankwise.training.rows import Rows, read_rows
from rankwise.training.shapes import recognise
from rankwise.training.tokenize import encode_rows


@dataclass(frozen=True)
class Task:
    """A task at one size. What is here is what a result was made with.

    model, kind, files: what is loaded; files are train, test and, for causal models, general text (None for classifiers).
    batch, max_length: of a step; rows that are longer are cut (classification) or left out (completions).
    per_class: training rows of a class, classification only. validation: rows kept from training, by which the rate is chosen.
    test, general: rows scored at the end. steps: of a final run, one pass; None until the rows are counted.
    exclude: layers that no method adapts: MiniLM's pooler lies in no block, and a gate on blocks could not switch it.
    """

    name: str
    model: str
    kind: str
    files: tuple[str, str, str | None]
    batch: int
    max_length: int
    validation: int
    test: int
    general: int = 0
    per_class: int | None = None
    steps: int | None = None
    exclude: tuple[str, ...] = ()


SECTIONS = Task(
    "sections",
    "minilm",
    "classification",
    ("sections-train.jsonl", "sections-test.jsonl", None),
    16,
    64,
    170,
    500,
    per_class=100,
    exclude=("bert.pooler.dense",),
)
COMPLETIONS = Task("completions", "demo", "completion", ("train.jsonl", "test.jsonl", "general.jsonl"), 8, 512, 64, 240, 150)
#: the same task in minutes instead of hours: the rows of at most 128 tokens
SHORT = replace(COMPLETIONS, name="completions-short", max_length=128, validation=32, test=64, general=48)
TASKS: dict[str, Task] = {task.name: task for task in (COMPLETIONS, SECTIONS, SHORT)}


class Part(list[dict[str, Any]]):
    """Encoded rows, as rankwise's own data code and its scores take them."""

    @property
    def input_ids(self) -> list[list[int]]:
        return [row["input_ids"] for row in self]

    @property
    def labels(self) -> list[Any]:
        return [row["labels"] for row in self]


@dataclass(frozen=True)
class Data:
    """The rows of a task: trained on, chosen by, scored at the end."""

    train: Part
    validation: Part
    test: Part
    general: Part
    collate: Callable[..., Any]
    classes: tuple[str, ...] | None
    digest: str  # of all rows as encoded, so that results of other rows are not taken for results of these

    def prepared(self) -> Prepared:
        """As rankwise's data code has it: calibration is drawn from the training rows, second levels learn from the validation rows."""
        classes = None if self.classes is None else list(self.classes)
        return Prepared(self.train, {"task": self.validation}, self.collate, "", classes)


def source(name: str, folder: Path | None) -> Path:
    """A file of the task: from a folder where that has it, else the bundled one."""
    return folder / name if folder is not None and (folder / name).is_file() else data_file(name)


@lru_cache(maxsize=4)
def rows_of(task: Task, folder: Path | None = None) -> Data:
    """The encoded rows of a task, in a fixed order."""
    tokenizer, _ = load_tokenizer(model_folder(task.model))
    read = [read_rows(source(name, folder)) if name else None for name in task.files]
    made = _sections(task, read, tokenizer) if task.kind == "classification" else _completions(task, read, tokenizer)
    parts, classes = made
    digest = hashlib.sha256(repr([list(part) for part in parts]).encode()).hexdigest()[:16]
    return Data(*parts, Collator(tokenizer.pad_token_id), classes, digest)


def _spread(count: int, wanted: int) -> list[int]:
    """`wanted` numbers below `count`, evenly."""
    return list(range(count)) if wanted >= count else [index * count // wanted for index in range(wanted)]


def _part(encoded: Any, indices: Sequence[int]) -> Part:
    return Part({"input_ids": encoded[index]["input_ids"], "labels": encoded[index]["labels"]} for index in indices)


def _sections(task: Task, read: Sequence[Rows | None], tokenizer: Any) -> tuple[list[Part], tuple[str, ...]]:
    assert read[0] is not None
    assert read[1] is not None
    train = encode_classification(read[0], tokenizer, task.max_length)
    test = encode_classification(read[1], tokenizer, task.max_length, train.names)
    each, kept, held = -(-task.validation // len(train.names)), [], []
    for label in range(len(train.names)):
        mine = [index for index in range(len(train)) if train.labels[index] == label]
        kept += mine[: task.per_class]
        held += mine[task.per_class :][:each]
    return [_part(train, kept), _part(train, held), _part(test, _spread(len(test), task.test)), Part()], tuple(train.names)


def _completions(task: Task, read: Sequence[Rows | None], tokenizer: Any) -> tuple[list[Part], None]:
    fitting = []
    for rows, loss_on in zip(read, ("completion", "completion", "all"), strict=True):
        assert rows is not None
        shape = recognise(rows, "completion" if loss_on == "completion" else "text")
        encoded = encode_rows(rows, shape, tokenizer, 512, loss_on)
        fitting.append((encoded, [index for index in range(len(encoded)) if len(encoded.input_ids[index]) <= task.max_length]))
    (train, mine), (test, tested), (general, texts) = fitting
    held = {mine[index] for index in _spread(len(mine), task.validation)}
    return [
        _part(train, [index for index in mine if index not in held]),
        _part(train, sorted(held)),
        _part(test, [tested[index] for index in _spread(len(tested), task.test)]),
        _part(general, [texts[index] for index in _spread(len(texts), task.general)]),
    ], None


def load(task: Task, data: Data, seed: int) -> Any:
    """The base of a task, in fp32, on the device that is there: `rankwise.training.models.Loaded`."""
    return load_model(task.model, task.kind, data.classes, torch.float32, seed)


def score(model: Any, part: Part, data: Data) -> list[list[float]]:
    """For each row [loss, weight, right]: the summed loss and the number of tokens with a label, or the loss, 1 and whether it is right."""
    device = next(model.parameters()).device
    found: list[list[float]] = [[] for _ in part]
    with evaluating(model):
        for rows in batches([len(ids) for ids in part.input_ids]):
            batch = {key: value.to(device) for key, value in data.collate([part[row] for row in rows]).items()}
            labels = batch.pop("labels")
            if labels.dim() == 1:
                logits = model(**batch).logits.float()  # (rows, classes)
                losses, weights = F.cross_entropy(logits, labels, reduction="none"), torch.ones(len(rows))
                right = logits.argmax(-1) == labels
            else:
                facts = facts_of(model, batch | {"labels": labels})
                logits = model(**batch, use_cache=False, **facts).logits[:, :-1].float()  # (rows, length - 1, vocabulary)
                targets = labels[:, 1:]
                each = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-100, reduction="none")
                losses, weights = each.sum(1), (targets != -100).sum(1)
                right = ((logits.argmax(-1) == targets) & (targets != -100)).sum(1)
            for row, *values in zip(rows, losses.tolist(), weights.tolist(), right.tolist(), strict=True):
                found[row] = [round(float(values[0]), 6), float(values[1]), float(values[2])]
    return found
