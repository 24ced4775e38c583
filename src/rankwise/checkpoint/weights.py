"""The tensors of a model folder, read one by one: no model is built and no file is read as a whole."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from rankwise.checkpoint.fingerprint import base_fingerprint
from rankwise.errors import CheckpointError
from rankwise.storage.dense import is_conv1d
from rankwise.updates import Site

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


class Weights:
    """What the safetensors files of a folder hold, by key. The folder was checked by `check_weights`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / "model.safetensors.index.json"
        names = sorted(path.name for path in folder.glob("*.safetensors"))
        if index.is_file():
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        self.files: dict[str, Any] = {}
        for name in names:
            opened = safe_open(folder / name, "pt")
            self.files |= dict.fromkeys(opened.keys(), opened)

    def __contains__(self, key: str) -> bool:
        return key in self.files

    def tensor(self, key: str) -> Tensor:
        """One tensor, as the file holds it."""
        return self.files[key].get_tensor(key)

    def dtype(self, key: str) -> torch.dtype:
        """The dtype of one tensor, which is not read."""
        return _DTYPES.get(self.files[key].get_slice(key).get_dtype(), torch.float32)

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Every floating-point dtype in the files."""
        return {self.dtype(key) for key in self.files}

    def key_of(self, module: str, prefix: str) -> str:
        """The key of a module's weight: files of some families leave out the model's own prefix, others add one.

        Raises:
            CheckpointError: there is none.
        """
        for name in (module, module.removeprefix(f"{prefix}."), f"{prefix}.{module}"):
            if f"{name}.weight" in self.files:
                return f"{name}.weight"
        raise CheckpointError(f"{self.folder} holds no weight of {module} under a name that is known here")

    def weight(self, model: nn.Module, name: str) -> Tensor:
        """A linear layer's weight, (out, in), whatever way round its kind holds it."""
        found = self.tensor(self.key_of(name, getattr(model, "base_model_prefix", "")))
        return found.T if is_conv1d(model.get_submodule(name)) else found

    def fingerprint(self, model: nn.Module, sites: Sequence[Site]) -> str:
        """The base's fingerprint over sites, from the files alone; `model` may stand on the meta device."""
        modules = {site.name: _Held(self, self.key_of(site.name, getattr(model, "base_model_prefix", ""))) for site in sites}
        return base_fingerprint(modules, sites)


class _Held(nn.Module):
    """A layer whose weight is read when it is asked for."""

    def __init__(self, weights: Weights, key: str) -> None:
        super().__init__()
        self.make = lambda: weights.tensor(key)

    @property
    def weight(self) -> Tensor:
        """As the file holds it."""
        return self.make()
