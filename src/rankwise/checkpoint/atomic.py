"""Files and folders that are either wholly there or not at all, whenever the process is killed or the disk is full.

A folder `name` goes through these siblings, each step made durable before the next:

    .name.writing   being filled; worthless if found later
    .name.new       complete, waiting to be put in place
    .name.old       what stood under `name` before, for the moment between two renames

Killed before the swap: `name` is untouched. Killed inside it: `name` is missing and `.name.new` is complete, which `recover` puts in place.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rankwise.errors import CheckpointError


def _stages(folder: Path) -> tuple[Path, Path, Path]:
    parent, name = folder.parent, folder.name
    return parent / f".{name}.writing", parent / f".{name}.new", parent / f".{name}.old"


def _sync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            _sync(Path(root) / name)
        _sync(Path(root))


@contextmanager
def write_folder(folder: str | Path, keep_others: bool = False) -> Iterator[Path]:
    """A temporary sibling folder to write into; at the end of the block it takes the place of `folder` in one step.

    Args:
        folder: the folder to make or to replace. Its parents are made.
        keep_others: files of the old folder that the block did not write are carried over; without it they go with the old folder.

    Raises:
        CheckpointError: `folder` is a file; with keep_others, the old folder holds a folder (it is never removed here).
        OSError, or whatever the block raises: the old folder is untouched then.
    """
    folder = Path(folder).absolute()
    folder = folder.resolve() if folder.is_symlink() else folder
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file, and a folder is to be written there; choose another path")
    if folder.name in ("", "..") or folder == folder.parent:
        raise CheckpointError(f"{folder} cannot be replaced as a whole; name a folder inside it")
    if keep_others and folder.is_dir():
        inner = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        if inner:
            raise CheckpointError(
                f"{folder} holds other folders ({', '.join(inner[:5])}) and cannot be replaced; choose a folder of its own"
            )
    recover(folder)
    writing, new, old = _stages(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    for leftover in (writing, new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    writing.mkdir()
    try:
        yield writing
        if keep_others and folder.is_dir():
            for entry in folder.iterdir():
                if entry.is_file() and not (writing / entry.name).exists():
                    shutil.copy2(entry, writing / entry.name)
        _sync_tree(writing)
        writing.rename(new)
    except BaseException:
        shutil.rmtree(writing, ignore_errors=True)
        raise
    _sync(folder.parent)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover(folder: str | Path) -> bool:
    """Finishes a swap that was cut short between its two renames; says whether there was one.

    Raises:
        CheckpointError: it could not be finished, with the folder that holds the complete content.
    """
    folder = Path(folder).absolute()
    _, new, old = _stages(folder)
    if folder.exists() or folder.is_symlink():
        return False
    # `new` only ever exists complete; `old` alone would be somebody's removal of `new`
    for complete in (new, old):
        if complete.is_dir():
            try:
                complete.rename(folder)
            except OSError as error:
                raise CheckpointError(
                    f"saving to {folder} was cut short; its complete content is {complete}: rename it ({error})"
                ) from error
            return True
    return False


def unfinished(folder: str | Path) -> Path | None:
    """What a killed save left beside `folder`, or None."""
    return next((stage for stage in _stages(Path(folder).absolute()) if stage.exists()), None)


def write_file(path: str | Path, content: str | bytes) -> Path:
    """Writes a file so that a reader finds the old content or the new one, never a part.

    Raises:
        OSError: the old content is untouched then.
    """
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    writing = path.parent / f".{path.name}.writing"
    try:
        with open(writing, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        writing.replace(path)
    except BaseException:
        with suppress(OSError):
            writing.unlink()
        raise
    _sync(path.parent)
    return path
