"""verify: do two things compute the same? Each is a base, an adapter on its base, or a merged folder; logits on prompts are compared.

All is computed in fp32, whatever the files hold, so that what remains is the rounding of what was written: in 16 bits the rounding of the
products can be larger than all that an adapter does.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankwise.checkpoint.proof import Batch, Difference, difference, logits_on, prompt_batches, tolerance_of
from rankwise.checkpoint.servable import SIDECAR
from rankwise.checkpoint.served import as_served
from rankwise.checkpoint.weights import Weights
from rankwise.errors import CheckpointError, ConfigError, TargetError
from rankwise.training.exporting import proof_batches
from rankwise.training.models import load_model, model_folder
from rankwise.training.use import Opened, about_adapter, adapter_folder, open_adapter


@dataclass(frozen=True)
class Verified:
    """What two sides differ by, and what that means."""

    difference: Difference
    tolerance: float
    changes: tuple[Difference | None, Difference | None]  # of each side's base, where it is an adapter
    base_and_adapter: bool  # one side is the bare base of the other, so that they should differ

    @property
    def passed(self) -> bool:
        """Whether both compute the same, and no adapter among them does nothing; a base and its adapter pass where they differ."""
        if any(change is not None and change.largest == 0 for change in self.changes):
            return False
        if self.base_and_adapter:
            return self.difference.largest > 0
        return self.difference.largest <= self.tolerance and not self._lost

    @property
    def _lost(self) -> bool:
        """Whether the two are as far apart as an adapter among them moves its base: then rounding is no excuse."""
        return any(change is not None and self.difference.largest >= change.largest for change in self.changes)

    def text(self) -> str:
        """What the command prints."""
        lines = [f"they differ by {self.difference.text()}"]
        for side, change in zip("AB", self.changes, strict=True):
            if change is not None:
                nothing = ": the adapter changes NOTHING" if change.largest == 0 else ""
                lines.append(f"{side} moves its base by {change.text()}{nothing}")
        if self.base_and_adapter:
            lines.append("one is the other's base, and they differ, as they should" if self.passed else "FAILED: the adapter does nothing")
        else:
            allowed = f"{self.tolerance:g} is what rounding explains"
            if self.difference.largest <= self.tolerance and self._lost:
                allowed = "they are as far apart as the adapter moves its base"
            lines.append(f"the same, to rounding ({allowed})" if self.passed else f"FAILED: they are not the same ({allowed})")
        return "\n".join(lines)


@dataclass
class _Side:
    logits: Tensor
    base: Tensor | None
    dtypes: set[torch.dtype]  # in its files
    folder: Path  # of the base


def verify(a: str | Path, b: str | Path, base: str | None = None) -> Verified:
    """Compares two of: a base, an adapter (or run), an exported adapter, a merged folder.

    Args:
        a, b: their folders or names.
        base: of the adapters among them, where they do not say it.

    Raises:
        ConfigError, CheckpointError: one of them cannot be loaded, or they have another vocabulary.
    """
    adapters = [_is_adapter(side) for side in (a, b)]
    task, labels = "text", None
    for side, adapter in zip((a, b), adapters, strict=True):
        if adapter:
            about = about_adapter(adapter_folder(side))
            task, labels = about["task"], about["labels"]
            break
    batches: list[Batch] = []
    sides: list[_Side] = []
    for side, adapter in zip((a, b), adapters, strict=True):
        sides.append(_adapter(side, base, batches) if adapter else _model(str(side), task, labels, batches))
    one, other = sides
    found = difference(one.logits, other.logits)
    changes = tuple(None if side.base is None else difference(side.base, side.logits) for side in sides)
    bare = adapters[0] != adapters[1] and one.folder.resolve() == other.folder.resolve()
    return Verified(found, tolerance_of(*one.dtypes, *other.dtypes), (changes[0], changes[1]), bare)


def _is_adapter(path: str | Path) -> bool:
    try:
        adapter_folder(path)
    except CheckpointError:
        return False
    return True


def _model(name: str, task: str, labels: list[str] | None, batches: list[Batch]) -> _Side:
    if not Path(name).exists():
        model_folder(name)
    loaded = load_model(name, task, labels, torch.float32)
    batches.extend([] if batches else prompt_batches(loaded.tokenizer))
    return _Side(logits_on(loaded.model, batches), None, Weights(loaded.folder).dtypes, loaded.folder)


def _adapter(path: str | Path, base: str | None, batches: list[Batch]) -> _Side:
    folder = adapter_folder(path)
    if (folder / SIDECAR).is_file():
        about = about_adapter(folder)
        name = base or about["model"]
        if not name:
            raise ConfigError(f"the adapter in {folder} does not say which base it belongs to; give it with --model")
        loaded = load_model(name, about["task"], about["labels"], torch.float32)
        batches.extend([] if batches else prompt_batches(loaded.tokenizer))
        bare = logits_on(loaded.model, batches)
        with as_served(loaded.model, folder) as served:
            return _Side(logits_on(served, batches), bare, Weights(folder).dtypes, loaded.folder)
    opened = open_adapter(path, base, torch.float32)
    batches.extend([] if batches else proof_batches(opened))
    return _Side(logits_on(opened.model, batches), _bare(opened, batches), Weights(folder).dtypes, opened.loaded.folder)


def _bare(opened: Opened, batches: list[Any]) -> Tensor | None:
    import rankwise as rw

    try:
        with rw.disabled(opened.model):
            return logits_on(opened.model, batches)
    except TargetError:  # the training wrote over its base and kept no copy
        return None
