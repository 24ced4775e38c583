"""Reading rows of data: JSON lines, a folder of splits, a saved dataset, or the Hub.

Every fault is a DataError that names the file and the line, because the reader of the message has to open the file at that place.
"""

import difflib
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rankwise.errors import DataError

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
HELD_OUT = ("test", "valid", "validation", "dev", "eval")  # names of a split that is not trained on
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w.-]+)?")


_WHOLE = re.compile(r"-?[0-9]{1,18}")  # isdigit() takes digits that int() does not
LARGEST_RATIO, ALWAYS_UNPACKED = 200, 256 << 20  # text is packed to a tenth or so; a bomb to a thousandth


@dataclass(frozen=True)
class Rows:
    """Rows as read.

    rows: one dict per row.
    source: where they come from (the file that was read, in a folder of splits), for messages.
    lines: line number of each row in its file, from 1; the row number where there is no file.
    unit: 'line' or 'row', what `lines` counts.
    """

    rows: list[dict[str, Any]]
    source: str
    lines: list[int]
    unit: str = "line"

    def __len__(self) -> int:
        return len(self.rows)

    def place(self, index: int) -> str:
        """'data.jsonl, line 7' for the row at `index`."""
        return f"{self.source}, {self.unit} {self.lines[index]}"


def types_of(rows: Rows, column: str) -> list[int]:
    """The kind of each row, a whole number from a column.

    Raises DataError: a row without the column, or with a value that is no whole number.
    """
    found: list[int] = []
    for index, row in enumerate(rows.rows):
        value = row.get(column)
        if isinstance(value, str) and _WHOLE.fullmatch(value.strip()):
            value = int(value)
        if not isinstance(value, int):
            held = f"holds {value!r}" if column in row else f"is missing; the row has {', '.join(map(repr, row))}"
            raise DataError(f"{rows.place(index)}: the column {column!r} (data.types) {held}; every row needs a whole number there")
        found.append(int(value))
    return found


def read_rows(source: str | Path, split: str | None = None) -> Rows:
    """The rows of `source`.

    source: a .jsonl or .json file (also .gz); a folder that holds train.jsonl and test.jsonl or valid.jsonl; a folder written by
        `datasets.save_to_disk`; or, when no such path exists, a Hub id 'owner/name', with ':config' behind it where it has several.
    split: which split of a folder or Hub dataset, 'train' by default. A held-out name ('test', 'valid', ...) is met by another held-out
        one where the folder has no file of exactly this name; `Rows.source` says which file was read.

    Raises DataError: no such file (near names are listed), a broken line, a row that is no object, an empty file, an unknown split.
    """
    path = Path(source)
    if path.is_dir():
        return _read_folder(path, split or "train")
    if path.exists():
        if split not in (None, "train"):
            raise DataError(f"{path} is one file and has no split {split!r}: name a file of its own for it, or a folder with {split}.jsonl")
        return _read_file(path)
    if isinstance(source, str) and HUB_ID.fullmatch(source) and not source.endswith(SUFFIXES):
        return _read_hub(source, split or "train")
    raise DataError(f"no such file or folder: {path}{_near(path)}")


def chosen(rows: Rows, wanted: Mapping[str, Any] | None) -> Rows:
    """The rows whose columns have one of the wanted values, under their own line numbers; all where nothing is wanted.

    Raises:
        DataError: a row without such a column, or no row with such values.
    """
    if wanted is None:
        return rows
    values = {column: value if isinstance(value, list | tuple) else [value] for column, value in wanted.items()}
    kept = []
    for index, row in enumerate(rows.rows):
        for column in values:
            if column not in row:
                raise DataError(f"{rows.place(index)}: filter names the column {column!r}, which the row lacks; it has {', '.join(row)}")
        if all(row[column] in allowed for column, allowed in values.items()):
            kept.append(index)
    if not kept:
        text = " and ".join(f"{column} in {list(allowed)}" for column, allowed in values.items())
        raise DataError(f"{rows.source}: no row has {text}, which filter asks for; look at the values in the file")
    return replace(rows, rows=[rows.rows[index] for index in kept], lines=[rows.lines[index] for index in kept])


def _near(path: Path) -> str:
    """The names beside a missing path that are close to it."""
    folder = path.parent
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    try:
        names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() or entry.name.endswith(SUFFIXES))
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)
    listed = close or names[:5]
    if not listed:
        return f" ({folder.resolve()} holds no data file)"
    return f"; {'near names' if close else 'there are'} in {folder.resolve()}: {', '.join(listed)}"


# --- files -----------------------------------------------------------------------------------------------------------


def _read_file(path: Path) -> Rows:
    if not path.name.endswith(SUFFIXES):
        raise DataError(f"{path}: unknown kind of data file; known are {', '.join(SUFFIXES)} (one JSON object per line, or a JSON array)")
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = _unpacked(data, path)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    data = data.removeprefix(b"\xef\xbb\xbf")
    array = ".json" in path.suffixes and data.lstrip()[:1] == b"["
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    for number, row in _array(data, path) if array else _lines(data, path):
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: a row must be a JSON object {{...}}, this one is {_kind(row)}")
        rows.append(row)
        lines.append(number)
    if not rows:
        raise DataError(f"{path}: the file holds no row")
    return Rows(rows, str(path), lines)


def _unpacked(data: bytes, path: Path) -> bytes:
    """The content of a .gz file, refused as soon as it grows past all that text can be packed to."""
    most = max(ALWAYS_UNPACKED, LARGEST_RATIO * len(data))
    with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
        made = file.read(most + 1)
    if len(made) > most:
        raise DataError(
            f"{path}: {len(data)} bytes unpack to more than {most}; if that is right, unpack the file yourself and name that one"
        )
    return made


def _lines(data: bytes, path: Path) -> Iterator[tuple[int, Any]]:
    """(line number, value) of every line that is not blank. Only a newline ends a line: U+2028 may stand inside a string."""
    for number, raw in enumerate(data.split(b"\n"), 1):
        if raw.strip():
            yield number, _value(_text(raw, path, number), path, number)


def _array(data: bytes, path: Path) -> Iterator[tuple[int, Any]]:
    """(line number, value) of every element of one JSON array, read one by one so that each has its line number."""
    text = _text(data, path, 1)
    decoder, at, closed = json.JSONDecoder(object_pairs_hook=_unique), text.index("[") + 1, False
    number, counted, first = 1, 0, True
    while not closed:
        at = _skip_blank(text, at)
        number, counted = number + text.count("\n", counted, at), at
        if text[at : at + 1] == "]":
            closed = True
            at += 1
        elif not first and text[at : at + 1] != ",":
            raise DataError(f"{path}, line {number}: broken JSON: expected ',' or ']' after a row of the array")
        else:
            at = at if first else _skip_blank(text, at + 1)
            number, counted = number + text.count("\n", counted, at), at
            try:
                row, at = decoder.raw_decode(text, at)
            except (ValueError, RecursionError) as error:
                line = error.lineno if isinstance(error, json.JSONDecodeError) else number
                raise DataError(f"{path}, line {line}: broken JSON: {_reason(error)}") from error
            _refuse_lone_surrogates(row, path, number)
            yield number, row
            first = False
    if text[at:].strip():
        raise DataError(f"{path}: broken JSON: something follows the end of the array")


def _skip_blank(text: str, at: int) -> int:
    match = re.compile(r"[ \t\r\n]*").match(text, at)
    return match.end() if match else at


def _text(raw: bytes, path: Path, number: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = number + raw.count(b"\n", 0, error.start)
        raise DataError(
            f"{path}, line {line}: not UTF-8 ({error.reason}, byte 0x{raw[error.start]:02x}): save the file as UTF-8"
        ) from error


def _value(text: str, path: Path, number: int) -> Any:
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        hint = ""
        if text.strip() in ("{", "["):
            hint = " (is this one pretty-printed object? JSON lines holds a whole row on each line)"
        raise DataError(f"{path}, line {number}: broken JSON: {_reason(error)}{hint}") from error
    if "\\u" in text:
        _refuse_lone_surrogates(value, path, number)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands twice in one object; remove one")
    return found


def _refuse_lone_surrogates(value: Any, path: Path, number: int) -> None:
    """Half of an escaped pair is legal JSON but no text: a tokenizer would stop at it much later, without the line number."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{path}, line {number}: an escape {error.object[error.start]!r} is half of a surrogate pair, no character"
        ) from error
    except RecursionError as error:
        raise DataError(f"{path}, line {number}: broken JSON: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} (column {error.colno})"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _kind(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


# --- folders and datasets --------------------------------------------------------------------------------------------


def _read_folder(path: Path, split: str) -> Rows:
    if any((path / name).exists() for name in ("dataset_dict.json", "state.json")):
        return _read_saved(path, split)
    wanted = [split, *(name for name in HELD_OUT if name != split)] if split in HELD_OUT else [split]
    for name in wanted:
        for suffix in SUFFIXES:
            if (path / f"{name}{suffix}").is_file():
                return _read_file(path / f"{name}{suffix}")
    found = sorted(entry.name for entry in path.iterdir() if entry.name.endswith(SUFFIXES))
    holds = f"it holds {', '.join(found)}" if found else "it holds no data file"
    raise DataError(f"{path}: no {split}.jsonl in this folder; {holds}")


def _read_saved(path: Path, split: str) -> Rows:
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:  # the library raises whatever its readers raise
        raise DataError(f"{path}: a saved dataset that cannot be read (is it empty, or half-written?): {error}") from error
    if isinstance(saved, datasets.DatasetDict):
        wanted = [split, *(name for name in HELD_OUT if name != split)] if split in HELD_OUT else [split]
        name = next((name for name in wanted if name in saved), None)
        if name is None:
            raise DataError(f"{path}: no split {split!r}; this dataset has {', '.join(map(str, saved))}")
        return _from_dataset(saved[name], f"{path} ({name})")
    if split != "train":
        raise DataError(f"{path}: this saved dataset has no splits, so no {split!r}: name another folder for it")
    return _from_dataset(saved, str(path))


def _read_hub(source: str, split: str) -> Rows:
    import datasets

    name, _, config = source.partition(":")
    try:
        loaded = datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # connection, credentials, a missing config or split: all arrive as different classes
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{source!r} is no local path{_near(Path(source))}; as a Hub dataset (split {split!r}) it could not be loaded: {reason}. "
            "Name a local file, or check the id and the network (HF_HUB_OFFLINE=1 uses only what is cached)"
        ) from error
    return _from_dataset(loaded, f"{source} ({split})")


def _from_dataset(dataset: Any, source: str) -> Rows:
    """Rows of a `datasets.Dataset`; class labels stored as numbers are given back as their names."""
    import datasets

    features = getattr(dataset, "features", None) or {}
    classes = {key: feature for key, feature in features.items() if isinstance(feature, datasets.ClassLabel)}
    rows = [dict(row) for row in dataset]
    for row in rows:
        for key, feature in classes.items():
            if row[key] is not None and row[key] >= 0:  # -1 stands for "no label"
                row[key] = feature.int2str(row[key])
    if not rows:
        raise DataError(f"{source}: the dataset holds no row")
    return Rows(rows, source, list(range(1, len(rows) + 1)), unit="row")
