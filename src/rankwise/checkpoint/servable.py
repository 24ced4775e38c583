"""The portable profile: the plain LoRA that every server loads.

    lora_A = [down; 0] (r, in),   lora_B = [scaling * diag(tail) @ up @ core, 0] (out, r),   lora_alpha = r

One rank r for all sites, from the list that servers accept, so that no pattern is needed; the scale stands in lora_B, so that no server can
lose it; linear layers only. Exact wherever the change of a weight has at most 512 ranks; else, and on request, its best approximation of a
rank or an energy. What it stands on is said in a file beside it, because readers of PEFT's configuration refuse keys they do not know.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rankwise.adapting import moved
from rankwise.checkpoint.lowrank import Cut, check_cut, cut_dense, cut_pair
from rankwise.checkpoint.naming import base_names
from rankwise.checkpoint.peft_fields import LORA_DEFAULTS
from rankwise.checkpoint.peft_layout import PREFIX, peft_targets, task_type
from rankwise.checkpoint.portable import exact_pair
from rankwise.checkpoint.saving import CONFIG, WEIGHTS, _write_json
from rankwise.errors import CheckpointError
from rankwise.record import adapted
from rankwise.routing.static import Mixture
from rankwise.sites import AdaptedLinear, adapted_sites
from rankwise.updates import Site

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's --max-lora-rank may be
SIDECAR = "rankwise_export.json"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CUT_BY = "give a rank (--rank N) or the part of its squared norm to keep (--energy 0.99), or export it merged (--format merged)"


@dataclass(frozen=True)
class Pairs:
    """A whole adapter as one pair a site, before it is padded and rounded."""

    cuts: dict[str, Cut]  # site name -> pair; sites that change nothing are left out
    sites: dict[str, Site]
    exact: bool  # whether nothing was cut
    notes: tuple[str, ...] = ()

    @property
    def largest(self) -> int:
        """The largest rank of a site."""
        return max(cut.rank for cut in self.cuts.values())

    def kept(self) -> tuple[float, float]:
        """(smallest, mean) kept part of the squared norm over the sites."""
        parts = [cut.kept for cut in self.cuts.values()]
        return min(parts), sum(parts) / len(parts)


@torch.no_grad()
def pairs_of(model: nn.Module, rank: int | None = None, energy: float | None = None, mixture: Mixture | None = None) -> Pairs:
    """Every site's change of its original base weight as a pair.

    Args:
        model: an adapted model.
        rank: at most so many ranks a site, whether or not more would be exact.
        energy: of each site's squared norm, keep this part.
        mixture: constant gates for updates that depend on the input; what they give is an approximation.

    Raises:
        CheckpointError: modules that train in full or an embedding, which the profile has no place for; an update that depends on the
            input; a change of full rank, or of more than 512 ranks, where neither rank nor energy is given; nothing to write.
    """
    check_cut(rank, energy)
    if rank is not None and rank > RANKS[-1]:
        raise CheckpointError(f"rank={rank} is more than servers accept; use at most {RANKS[-1]}")
    record, modules = adapted(model), adapted_sites(model)
    if record.plan.trained_modules:
        names = ", ".join(name for name, _ in record.plan.trained_modules)
        raise CheckpointError(f"{names} trained in full, which no server loads beside an adapter; export it merged (--format merged)")
    embeddings = [name for name, module in modules.items() if module.site.kind == "embedding"]
    if embeddings:
        raise CheckpointError(
            f"{embeddings[0]} is an embedding, and servers load adapters of linear layers; export it merged (--format merged)"
        )
    cuts: dict[str, Cut] = {}
    exact = True
    for name, module in modules.items():
        cut, whole = _cut(module, rank, energy, mixture)
        exact = exact and whole
        if cut.rank:
            cuts[name] = Cut(cut.down.cpu(), cut.up.cpu(), cut.kept)
    if not cuts:
        raise CheckpointError("every site has rank 0: there is nothing to export")
    return Pairs(cuts, {name: modules[name].site for name in cuts}, exact)


def _cut(module: AdaptedLinear, rank: int | None, energy: float | None, mixture: Mixture | None) -> tuple[Cut, bool]:
    """(the pair of one site, whether it is all there is)"""
    name, constant = module.site.name, not module.depends_on_input
    if not constant and mixture is None:
        raise CheckpointError(
            f"{name}: the update depends on the {'prompt' if module.place else 'token'}, which a plain LoRA cannot hold; hold its gates "
            "still at their mean over some rows (--static), which comes near it, or serve it with rankwise"
        )
    if module.update is not None and module.update.factors().shift is not None:
        raise CheckpointError(f"{name} adds a trained bias (bias=True), which servers drop or refuse; export it merged (--format merged)")
    if module.gain is None and not (module.written and module.ledger is None):
        down, up = exact_pair(module, False, mixture)
        if rank is None and energy is None:
            if len(down) > RANKS[-1]:
                down, up = exact_pair(module, True, mixture)
            if len(down) > RANKS[-1]:
                raise CheckpointError(f"the update of {name} has {len(down)} ranks, and servers accept {RANKS[-1]}; {CUT_BY}")
            return Cut(down, up, 1.0), constant
        if not len(down):
            return Cut(down, up, 1.0), constant
        cut = cut_pair(down, up, min(rank or RANKS[-1], RANKS[-1]), energy)
        return cut, constant and cut.kept > 1 - 1e-9
    if rank is None and energy is None:
        what = "its gain rescales whole rows" if module.gain is not None else "the weight itself was trained"
        raise CheckpointError(f"the change of {name} is not of low rank ({what}), so a plain LoRA only comes near it; {CUT_BY}")
    cut = cut_dense(dense_change(module), rank, energy)
    return cut, cut.kept > 1 - 1e-9


@torch.no_grad()
def dense_change(module: AdaptedLinear) -> Tensor:
    """What the adapter changes in the original base weight, dense (out, in), in fp32 or wider.

    Raises:
        CheckpointError: the original weight was not kept.
    """
    merged = module.merged_weight()
    if module.original is not None:
        original = module.original.to(merged.device)
    elif module.written:
        raise CheckpointError(
            f"the training has written into {module.site.name}, and the original weight was not kept; export it merged, and "
            "then take the difference of the two folders: rankwise extract BASE MERGED OUTPUT"
        )
    elif module.folded and module.offset is not None:
        original = moved(module.base_layer, module.offset, module.site.scaling, 1.0)
    else:
        original = module.base_weight()
    return merged - original.to(merged.dtype)


def padded_rank(largest: int) -> int:
    """The smallest rank of the list that holds so many.

    Raises:
        CheckpointError: none does.
    """
    for rank in RANKS:
        if rank >= largest:
            return rank
    raise CheckpointError(f"{largest} ranks are more than servers accept ({RANKS[-1]}); {CUT_BY}")


def padded(cut: Cut, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(lora_A (rank, in), lora_B (out, rank)) of a pair, zeros behind it, rounded to a dtype.

    Raises:
        CheckpointError: a value does not fit the dtype.
    """
    down = torch.zeros(rank, cut.down.shape[1], dtype=dtype)
    up = torch.zeros(cut.up.shape[0], rank, dtype=dtype)
    down[: cut.rank], up[:, : cut.rank] = cut.down.detach(), cut.up.detach()
    if not bool(torch.isfinite(down).all() and torch.isfinite(up).all()):
        raise CheckpointError(f"a factor has values that do not fit {dtype}; take bf16 or fp32, or look for a broken adapter")
    return down, up


def about_base(model: nn.Module) -> dict[str, Any]:
    """Name and revision of a base, as its configuration knows them."""
    config = getattr(model, "config", None)
    return {"name_or_path": getattr(config, "_name_or_path", None) or None, "revision": getattr(config, "_commit_hash", None)}


def write_servable(folder: Path, base: nn.Module, pairs: Mapping[str, tuple[Tensor, Tensor]], about: Mapping[str, Any]) -> None:
    """Writes adapter_config.json, adapter_model.safetensors and the file that says what they stand on.

    Args:
        folder: there already.
        base: the base, for names of modules and its task; adapted or not.
        pairs: module name -> (lora_A, lora_B), all of one rank.
        about: what the sidecar holds.
    """
    names = base_names(base)
    rank = len(next(iter(pairs.values()))[0])
    tensors: dict[str, Tensor] = {}
    for name, (down, up) in pairs.items():
        tensors |= {f"{PREFIX}{name}.lora_A.weight": down.contiguous(), f"{PREFIX}{name}.lora_B.weight": up.contiguous()}
    modules = dict(base.named_modules())
    config: dict[str, Any] = LORA_DEFAULTS | {
        "base_model_name_or_path": about_base(base)["name_or_path"],
        "revision": about_base(base)["revision"],
        "task_type": task_type(base),
        "inference_mode": True,
        "target_modules": peft_targets(list(pairs), [], names),
        "fan_in_fan_out": any(type(modules[name]).__name__ == "Conv1D" for name in pairs),
        "r": rank,
        "lora_alpha": rank,
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    _write_json(folder / CONFIG, config)
    _write_json(folder / SIDECAR, about)
