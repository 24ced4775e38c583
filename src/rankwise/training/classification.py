"""Texts and their classes as token ids and class numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rankwise.errors import DataError, nearest
from rankwise.training.encoded import SHOWN, Report
from rankwise.training.rows import Rows
from rankwise.training.shapes import normalise, recognise


@dataclass(frozen=True)
class EncodedClassification:
    """Token ids and class numbers; a map-style dataset of {'input_ids', 'labels'} with an integer label.

    input_ids: one list per row, special tokens included. labels: index into `names`. names: the classes, in the order of the model's
    outputs. lines: line number of each row. counts: rows per class. report: `supervised` counts rows here, one label each; `cut` rows are
    ordinary, since a classifier reads as much as fits.
    """

    input_ids: list[list[int]]
    labels: list[int]
    names: list[str]
    lines: list[int]
    source: str
    report: Report
    max_length: int | None = None
    types: list[int] | None = None

    @property
    def counts(self) -> dict[str, int]:
        """Rows of each class."""
        return {name: self.labels.count(index) for index, name in enumerate(self.names)}

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = {"input_ids": self.input_ids[index], "labels": self.labels[index]}
        return row if self.types is None else row | {"sample_types": self.types[index]}

    def as_dataset(self) -> Any:
        """The same as a `datasets.Dataset` with the columns input_ids and labels."""
        import datasets

        columns: dict[str, Any] = {"input_ids": self.input_ids, "labels": self.labels}
        return datasets.Dataset.from_dict(columns if self.types is None else columns | {"sample_types": self.types})


def class_names(sets: Sequence[Rows]) -> list[str]:
    """The classes of one or more sets of rows: all their labels, sorted; numbers in the order of numbers.

    Raises:
        DataError: a row of another shape, or fewer than two classes in all.
    """
    labels: list[Any] = []
    for rows in sets:
        shape = recognise(rows, "classification")
        labels.extend(normalise(row, shape)[1] for row in rows.rows)
    names = sorted(set(map(str, labels)), key=int if all(isinstance(label, int) for label in labels) else None)
    if len(names) < 2:
        where = ", ".join(dict.fromkeys(rows.source for rows in sets))
        raise DataError(f"{where}: every row has the label {names[0]!r}; a classifier needs at least two classes")
    return names


def encode_classification(rows: Rows, tokenizer: Any, max_length: int | None, labels: Sequence[str] | None = None) -> EncodedClassification:
    """Token ids (cut at max_length, special tokens kept) and class numbers.

    labels: the classes, from the training rows or the model's configuration; None takes the sorted labels of these rows (numbers in the
    order of numbers). A label that is a number counts by its name, '3'.
    Raises DataError for a row of another shape, fewer than two classes, or a label outside the classes (line, label, classes).
    """
    shape = recognise(rows, "classification")
    pairs = [normalise(row, shape) for row in rows.rows]
    texts = [str(pair[0]) for pair in pairs]
    given = [str(pair[1]) for pair in pairs]
    if labels is None:
        names = class_names([rows])
    else:
        names = [str(name) for name in labels]
    number = {name: index for index, name in enumerate(names)}
    for index, label in enumerate(given):
        if label not in number:
            shown = ", ".join(names[:20]) + (f", ... ({len(names)} in all)" if len(names) > 20 else "")
            raise DataError(f"{rows.place(index)}: the label {label!r} is none of the classes{nearest(label, names)}; classes: {shown}")
    options: dict[str, Any] = {"return_attention_mask": False, "verbose": False}
    whole = tokenizer(texts, truncation=False, **options)["input_ids"]
    ids = whole if max_length is None else tokenizer(texts, truncation=True, max_length=max_length, **options)["input_ids"]
    cut = [index for index, row in enumerate(whole) if max_length is not None and len(row) > max_length]
    blank = [index for index, text in enumerate(texts) if not text.strip()]
    notes = ()
    if blank:
        where = ", ".join(str(rows.lines[index]) for index in blank[:SHOWN])
        notes = (f"{len(blank)} rows have a blank text (lines {where}{', ...' if len(blank) > SHOWN else ''})",)
    report = Report(
        rows=len(ids),
        sequences=len(ids),
        tokens=sum(map(len, ids)),
        supervised=len(ids),
        longest=max(map(len, whole), default=0),
        cut=len(cut),
        lines={"cut": tuple(rows.lines[index] for index in cut[:SHOWN])},
        notes=notes,
    )
    return EncodedClassification(ids, [number[label] for label in given], names, rows.lines, rows.source, report, max_length)
