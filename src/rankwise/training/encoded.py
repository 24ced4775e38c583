"""Encoded rows, what was counted while encoding them, and the refusal of rows that would train something else than was meant."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rankwise.errors import DataError, nearest

IGNORED = -100  # the label that every trainer's loss leaves out
SHOWN = 5  # line numbers kept for each finding
ALLOWED = ("empty", "cut", "no-end")


@dataclass(frozen=True)
class Report:
    """What was counted.

    rows: rows read. sequences: what they became (more than rows if the chat template rewrites earlier turns).
    tokens: kept after cutting. supervised: kept tokens that have a loss. longest: tokens of the longest sequence, before cutting.
    empty: rows without a supervised token. cut: rows longer than max_length. cut_answers: those of them that lost supervised tokens.
    no_end: rows with an answer that is not cut and has no end token behind it.
    duplicates: evaluation rows that also stand in the training rows; None if not compared.
    lines: the first line numbers of each finding, by its field's name. notes: sentences for the user.
    """

    rows: int
    sequences: int
    tokens: int
    supervised: int
    longest: int = 0
    empty: int = 0
    cut: int = 0
    cut_answers: int = 0
    no_end: int = 0
    duplicates: int | None = None
    lines: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """The counts as lines for a terminal or a log; findings that are zero are left out."""
        share = 100 * self.supervised / max(1, self.tokens)
        split = f" ({self.sequences:,} sequences)" if self.sequences != self.rows else ""
        size = f"{self.rows:,} rows{split}, {self.tokens:,} tokens, longest {self.longest:,}"
        parts = [f"{size}; the loss is on {self.supervised:,} tokens ({share:.0f}%)"]
        for name, words in FINDINGS.items():
            if count := getattr(self, name):
                parts.append(f"{count:,} of {self.rows:,} rows {words} (lines {self.first(name)})")
        return "\n".join([*parts, *self.notes])

    def first(self, name: str) -> str:
        """'3, 8, 20, ...': where a finding was made first."""
        lines = self.lines.get(name, ())
        return ", ".join(map(str, lines)) + (", ..." if (getattr(self, name) or 0) > len(lines) else "")


FINDINGS = {
    "empty": "have no supervised token",
    "cut": "are longer than max_length and were cut",
    "cut_answers": "lost a part of their answer to the cut",
    "no_end": "have an answer without an end token, so the model would not learn to stop",
    "duplicates": "also stand in the training rows",
}


@dataclass(frozen=True)
class Encoded:
    """Token ids and labels, one list each per sequence; a map-style dataset of {'input_ids', 'labels'}.

    input_ids, labels: equally long lists; a label is the id itself or -100 where there is no loss (not shifted).
    lines: the line number of the row each sequence comes from. source: the file. loss_on: what the loss is on, in words.
    report: what was counted. max_length: where sequences were cut. types: the kind of each sequence's row, where a column says it.
    """

    input_ids: list[list[int]]
    labels: list[list[int]]
    lines: list[int]
    source: str
    loss_on: str
    report: Report
    max_length: int | None = None
    types: list[int] | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = {"input_ids": self.input_ids[index], "labels": self.labels[index]}
        return row if self.types is None else row | {"sample_types": self.types[index]}

    def as_dataset(self) -> Any:
        """The same as a `datasets.Dataset` with the columns input_ids and labels (and sample_types), for trainers that want one."""
        import datasets

        columns: dict[str, Any] = {"input_ids": self.input_ids, "labels": self.labels}
        return datasets.Dataset.from_dict(columns if self.types is None else columns | {"sample_types": self.types})


def report_of(
    ids: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    stops: Sequence[Sequence[int]],
    owners: Sequence[int],
    lines: Sequence[int],
    max_length: int | None,
    ends: frozenset[int],
    notes: tuple[str, ...] = (),
) -> Report:
    """Count over the uncut sequences.

    stops: where the answers of each sequence end (exclusive). owners: the row index of each sequence. lines: the line of each row.
    ends: ids that end an answer.
    """
    limit = max_length if max_length is not None else max(map(len, ids), default=0)
    found: dict[str, dict[int, None]] = {name: {} for name in ("cut", "cut_answers", "no_end")}
    trained: set[int] = set()  # rows with a supervised token left
    tokens = supervised = 0
    for row, label, due, owner in zip(ids, labels, stops, owners, strict=True):
        tokens += min(len(row), limit)
        # the first token has nothing before it to be predicted from, whatever its label
        kept = sum(1 for value in label[1:limit] if value != IGNORED)
        supervised += kept
        if kept:
            trained.add(owner)
        if len(row) > limit:
            found["cut"][owner] = None
            if any(value != IGNORED for value in label[limit:]):
                found["cut_answers"][owner] = None
        if any(stop <= limit and row[stop - 1] not in ends for stop in due):
            found["no_end"][owner] = None
    owned = dict.fromkeys(owners)
    empty = [owner for owner in owned if owner not in trained]
    first = {name: tuple(lines[owner] for owner in list(rows)[:SHOWN]) for name, rows in found.items()}
    first["empty"] = tuple(lines[owner] for owner in empty[:SHOWN])
    return Report(
        rows=len(owned),
        sequences=len(ids),
        tokens=tokens,
        supervised=supervised,
        longest=max(map(len, ids), default=0),
        empty=len(empty),
        cut=len(found["cut"]),
        cut_answers=len(found["cut_answers"]),
        no_end=len(found["no_end"]),
        lines=first,
        notes=notes,
    )


def check_encoded(encoded: Encoded, allow: Iterable[str] = ()) -> Encoded:
    """Refuse rows that would not train what was meant, unless the user allows them.

    allow: any of 'empty' (rows without a supervised token, which are then left out of what is returned, since a batch of them alone has no
    loss), 'cut' (answers cut at max_length), 'no-end' (answers without an end token). Returns the rows to train on.
    Raises DataError with the counts, the first line numbers and the word that allows each finding.
    """
    allowed = set(allow)
    for word in sorted(allowed - set(ALLOWED)):
        raise DataError(f"allow holds the unknown word {word!r}{nearest(word, ALLOWED)}; known are {', '.join(ALLOWED)}")
    report = encoded.report
    longer = f"raise max_length (the longest sequence has {report.longest:,} tokens, it is cut at {encoded.max_length}) or shorten the rows"
    template = "let the chat template write its end token behind an answer, or set the tokenizer's eos_token"
    nothing = "give these rows an answer" + (f", or {longer}" if report.cut else "")
    wrong = []
    for word, name, remedy in (("empty", "empty", nothing), ("cut", "cut_answers", longer), ("no-end", "no_end", template)):
        count = getattr(report, name)
        if count and word not in allowed:
            found = f"{count:,} of {report.rows:,} rows {FINDINGS[name]} (lines {report.first(name)})"
            wrong.append(f"{found}: {remedy}, or add {word!r} to allow")
    if wrong:
        raise DataError(f"{encoded.source}: " + "; ".join(wrong))
    kept = [index for index, label in enumerate(encoded.labels) if any(value != IGNORED for value in label[1:])]
    if not kept:
        raise DataError(f"{encoded.source}: no row has a supervised token, so there is nothing to train")
    if len(kept) == len(encoded):
        return encoded
    ids, labels, lines = ([values[index] for index in kept] for values in (encoded.input_ids, encoded.labels, encoded.lines))
    types = None if encoded.types is None else [encoded.types[index] for index in kept]
    return replace(encoded, input_ids=ids, labels=labels, lines=lines, types=types)
