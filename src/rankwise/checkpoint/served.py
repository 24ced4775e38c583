"""A plain LoRA folder as a server reads it: two matrices a layer, one rank, one alpha, nothing else.

    y = W x + bias + lora_alpha / r * lora_B (lora_A x)

Written apart from `load` on purpose: it knows no pattern, no rank-stabilized scale and no recipe, so an export whose numbers need one of
them does not pass its proof.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from rankwise.checkpoint.peft_layout import PREFIX
from rankwise.checkpoint.saving import CONFIG, WEIGHTS
from rankwise.errors import CheckpointError


@dataclass(eq=False)
class Added:
    """A forward hook that adds a branch."""

    down: Tensor  # (r, in)
    up: Tensor  # (out, r)
    scale: float

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        x = args[0].to(self.down.dtype)
        return output + (self.scale * F.linear(F.linear(x, self.down), self.up)).to(output.dtype)


@contextmanager
def as_served(base: nn.Module, folder: Path) -> Iterator[nn.Module]:
    """Within the block the base computes what a server computes with the folder's adapter.

    Raises:
        CheckpointError: a key that is no lora_A or lora_B of a module of the base, half a pair, or another rank than the configuration's.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{folder} is no plain LoRA that can be read ({error!r}); export it again") from error
    modules = dict(base.named_modules())
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, side = key.removeprefix(PREFIX).rpartition(".lora_")
        if not key.startswith(PREFIX) or side not in ("A.weight", "B.weight") or name not in modules:
            raise CheckpointError(f"{folder / WEIGHTS}: {key} is no factor of a module of this base, so servers would drop it or refuse it")
        pairs.setdefault(name, {})[side[0]] = tensor
    handles = []
    try:
        for name, pair in pairs.items():
            shapes = [tuple(pair[side].shape) for side in "AB" if side in pair]
            if len(shapes) != 2 or shapes[0][:1] != (rank,) or shapes[1][1:] != (rank,) or rank < 1:
                raise CheckpointError(f"{folder / WEIGHTS}: {name} holds factors of shapes {shapes}, and no pair of rank {rank}")
            device = next(base.parameters()).device
            down, up = (pair[side].to(device).float() for side in "AB")
            handles.append(modules[name].register_forward_hook(Added(down, up, alpha / rank)))
        yield base
    finally:
        for handle in handles:
            handle.remove()
