"""rankwise: low-rank fine-tuning on one equation and seven composable axes.

The names below are the public surface; they are imported on first use, so that `rankwise --help` does not load torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Recipe": "rankwise.recipe",
    "Targets": "rankwise.recipe",
    "Plan": "rankwise.planning",
    "plan": "rankwise.planning",
    "summary": "rankwise.planning",
    "Importance": "rankwise.importance",
    "allocate": "rankwise.importance",
    "measure": "rankwise.importance",
    "probe": "rankwise.probing",
    "adapt": "rankwise.adapting",
    "disabled": "rankwise.original",
    "reference": "rankwise.original",
    "merge": "rankwise.merging",
    "unmerge": "rankwise.merging",
    "unadapt": "rankwise.adapting",
    "fuse_loss": "rankwise.fused_loss",
    "unfuse_loss": "rankwise.fused_loss",
    "fp32_products": "rankwise.storage",
    "fp32_products_pay": "rankwise.storage",
    "native_products": "rankwise.storage",
    "optimizer": "rankwise.optim",
    "attach": "rankwise.optim",
    "GaLore": "rankwise.galore",
    "galore_groups": "rankwise.galore",
    "next_task": "rankwise.optim",
    "save": "rankwise.checkpoint",
    "load": "rankwise.checkpoint",
    "export": "rankwise.training.exporting",
    "RankwiseError": "rankwise.errors",
}

__all__ = [
    "GaLore",
    "Importance",
    "Plan",
    "RankwiseError",
    "Recipe",
    "Targets",
    "__version__",
    "adapt",
    "allocate",
    "attach",
    "disabled",
    "export",
    "fp32_products",
    "fp32_products_pay",
    "fuse_loss",
    "galore_groups",
    "load",
    "measure",
    "merge",
    "native_products",
    "next_task",
    "optimizer",
    "plan",
    "probe",
    "recipes",
    "reference",
    "save",
    "summary",
    "unadapt",
    "unfuse_loss",
    "unmerge",
]

if TYPE_CHECKING:
    from rankwise import recipes
    from rankwise.adapting import adapt, unadapt
    from rankwise.checkpoint import load, save
    from rankwise.errors import RankwiseError
    from rankwise.fused_loss import fuse_loss, unfuse_loss
    from rankwise.galore import GaLore, galore_groups
    from rankwise.importance import Importance, allocate, measure
    from rankwise.merging import merge, unmerge
    from rankwise.optim import attach, next_task, optimizer
    from rankwise.original import disabled, reference
    from rankwise.planning import Plan, plan, summary
    from rankwise.probing import probe
    from rankwise.recipe import Recipe, Targets
    from rankwise.storage import fp32_products, fp32_products_pay, native_products
    from rankwise.training.exporting import export


def __getattr__(name: str) -> Any:
    if name == "recipes":
        return importlib.import_module("rankwise.recipes")
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'rankwise' has no attribute {name!r}")
