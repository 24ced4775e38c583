"""A probe in one of two processes; nothing here imports more than it needs, because each process starts anew."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rankwise as rw


class ThreeInARow(nn.Module):
    """Three layers of one name that read the same x."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.ModuleDict({"proj": nn.Linear(6, 5)}) for _ in range(3))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        y = sum(block["proj"](x) for block in self.blocks)  # type: ignore[operator]
        return {"loss": (y if labels is None else y - labels).square().mean()}


def probe_as_one_of_two(rank: int, folder: str) -> None:
    """Probes on rows of this process alone, and writes the report to `folder`."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    generator = torch.Generator().manual_seed(rank)
    data = [{"x": torch.randn(3, 2, 6, generator=generator), "labels": torch.randn(3, 2, 5, generator=generator)} for _ in range(2 + rank)]
    found = rw.probe(ThreeInARow(), rw.recipes.lora(rank=2, lr=1e-2), data)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found.to_dict()))
    torch.distributed.destroy_process_group()
