"""JSON files that came from elsewhere: one object, no key twice, finite numbers, bounded size and depth; or a CheckpointError."""

import json
from pathlib import Path
from typing import Any

from rankwise.errors import CheckpointError

LARGEST = 64 << 20  # bytes; the largest that is written here has some megabytes
_AGAIN = "copy or save the adapter again"


def read_object(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        CheckpointError: no regular file, not readable, more than 64 MiB, not UTF-8, broken JSON, a key that stands twice, NaN or Infinity
            or a number beyond fp64, nested too deeply, no object.
    """
    try:
        if not path.is_file():  # a pipe would be waited for
            raise CheckpointError(f"{path} is no file; {_AGAIN}")
        if (size := path.stat().st_size) > LARGEST:
            raise CheckpointError(f"{path} has {size} bytes, and at most {LARGEST} are read; {_AGAIN}")
        content = json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_number, parse_float=_finite)
    except CheckpointError:
        raise
    except RecursionError:
        raise CheckpointError(f"{path} is not readable JSON (nested too deeply); {_AGAIN}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}); {_AGAIN}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, and holds a {type(content).__name__}; {_AGAIN}")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return found


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), -float("inf")):
        raise ValueError(f"{text[:40]} is too large for a number")
    return value
