"""`save_pretrained` of an adapted model: refused, because transformers would reload the folder with freshly drawn layers; and what a
trainer's checkpoint gets instead.

The adapted model's weights stand under names such as `q_proj.base_layer.weight`, which `from_pretrained` takes for missing and draws anew.
The guard is an attribute of the model, not of its class; `unadapt` and a final `merge` take it off.
"""

import copy
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from torch import nn

from rankwise.errors import CheckpointError

_NAME = "save_pretrained"


def guard(model: nn.Module) -> None:
    """Puts the refusal before the model's own `save_pretrained`, if it has one. Copies and pickles of the model keep it, for themselves."""
    if callable(getattr(type(model), _NAME, None)):
        model.__dict__[_NAME] = _Guard(model)


def unguard(model: nn.Module) -> None:
    """Gives the model its own `save_pretrained` back."""
    model.__dict__.pop(_NAME, None)


class _Guard:
    """`_save_pretrained` bound to one model, which does not keep it alive: the last reference to a model gives its memory back at once.

    A copy of the model gets a guard of its own, and so does one that was pickled.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = weakref.ref(model)

    def __call__(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        _save_pretrained(self.model(), save_directory, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Guard":
        return _Guard(cast(nn.Module, copy.deepcopy(self.model(), memo)))  # which is being copied just now, so it is in `memo`

    def __reduce__(self) -> tuple[Callable[..., "_Guard"], tuple[Any]]:
        return _Guard, (self.model(),)


def _save_pretrained(model: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
    """Stands in for `save_pretrained`.

    A call that hands over `state_dict`, as `Trainer` and scripts for accelerate do, writes a checkpoint: the whole state under the adapted
    names, which `Trainer` resumes from, and beside it the adapter as `save` writes it. There is no config.json, so that `from_pretrained`
    takes the folder for what it is, an adapter: it loads the base that is named there and puts the adapter on it with PEFT, or says that it
    cannot.

    Raises:
        CheckpointError: any other call.
    """
    if "state_dict" not in kwargs:
        raise CheckpointError(
            f"save_pretrained({str(save_directory)!r}): the model is adapted, and transformers would reload this folder with its adapted "
            "layers freshly drawn; keep the adapter with rankwise.save(model, folder), write a plain model after "
            "rankwise.merge(model, keep_base=False), or a folder for servers with rankwise.export(model, folder)"
        )
    from rankwise.checkpoint.saving import save

    folder, main = Path(save_directory), kwargs.get("is_main_process", True)
    if main:
        save(model, folder)
    there = {path.name for path in folder.iterdir()} if main else set()
    type(model).save_pretrained(model, save_directory, *args, **kwargs)
    for name in ("config.json", "generation_config.json") if main else ():
        if name not in there:
            (folder / name).unlink(missing_ok=True)
