"""save: an adapted model to a folder of four files, all there or none.

adapter_model.safetensors   the masters (fp32, fp64 over an fp64 base), under PEFT's keys
adapter_config.json         what PEFT reads
rankwise.json               what `load` reads besides: recipe, base, sites, where the start stands
README.md                   the card, for people; somebody else's README stays
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from rankwise.checkpoint.atomic import write_folder
from rankwise.checkpoint.card import card, facts, method_lines, put_card
from rankwise.checkpoint.naming import base_names
from rankwise.checkpoint.peft_layout import (
    BASE_WEIGHT,
    NATIVE,
    PREFIX,
    collect,
    config_of,
    encode,
    gate_keys,
    is_stacked,
    layout_of,
    pool_keys,
)
from rankwise.errors import CheckpointError
from rankwise.original import base_weights
from rankwise.record import Adapted, adapted
from rankwise.routing.gating import gates_of
from rankwise.sites import adapted_sites, trained_modules
from rankwise.updates import Site

FORMAT_VERSION = 1
CONFIG, WEIGHTS, NATIVE_FILE = "adapter_config.json", "adapter_model.safetensors", "rankwise.json"


def save(model: nn.Module, folder: str | Path, save_projection: bool = False) -> Path:
    """Writes the adapter of a model: what trained, the starts, and the recipe; never the base.

    PEFT loads the folder with equal logits where it knows the method, and refuses it otherwise. A merged or disabled model gives the same
    files. The folder is replaced as a whole at the end, so a killed process or a full disk leaves the old one; other files in it stay.

    Args:
        model: an adapted model.
        folder: where to; made if needed.
        save_projection: write VeRA's shared pair too, instead of its seed and checksum. A pair that did not come from its seed is
            always written.

    Returns:
        The folder.

    Raises:
        TargetError: the model is not adapted.
        CheckpointError: a tensor is not finite, the folder cannot be written, or save_projection without a shared pair.
    """
    record = adapted(model)
    names = base_names(model)
    with base_weights(model):
        peft_type, reason = layout_of(model, record, names)
    pool = _pool(model)
    if pool is None and save_projection:
        raise CheckpointError(f"save_projection=True, but recipe {record.recipe.name!r} has no shared projection; leave it out")
    tensors = _tensors(model, record, peft_type)
    projections: dict[str, Tensor] = {} if pool is None else pool.projections()
    with_projections = pool is not None and (save_projection or not pool.drawn)
    if with_projections:
        tensors |= {key: projections[name] for name, key in pool_keys(peft_type, projections).items()}
    broken = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())]
    if broken:
        raise CheckpointError(
            f"{broken[0]} is not finite, so nothing was saved and {folder} is as it was; go back to an earlier checkpoint"
        )
    config = config_of(model, record.plan, peft_type, names, with_projections)
    about = _about(model, record, peft_type, reason, config, checksum(projections) if projections else None)
    try:
        with write_folder(folder, keep_others=True) as writing:
            save_file(tensors, writing / WEIGHTS, metadata={"format": "pt"})
            _write_json(writing / CONFIG, config)
            _write_json(writing / NATIVE_FILE, about)
            put_card(writing, adapter_card(model, peft_type), Path(folder))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the adapter could not be written to {folder}, which is as it was before: {error}") from error
    return Path(folder)


def adapter_card(model: nn.Module, peft_type: str, **more: Any) -> str:
    """The card of a saved adapter; `more` are lines as `card` takes them, such as data and metrics."""
    record = adapted(model)
    layout = "native" if peft_type == NATIVE else "peft"
    lines = method_lines(record.recipe, record.plan.sites)
    return card(facts(model), layout, lines, record.fingerprint, record.recipe.name or "lora", **more)


def saved_type(folder: Path) -> str:
    """The peft_type of a folder that `save` has written."""
    return json.loads((folder / CONFIG).read_text(encoding="utf-8"))["peft_type"]


def _pool(model: nn.Module) -> Any:
    return next((module.pool for module in adapted_sites(model).values() if "pool" in module._modules), None)


def _tensors(model: nn.Module, record: Adapted, peft_type: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for module in adapted_sites(model).values():
        tensors |= encode(module.site, record.recipe, peft_type, collect(module, record.recipe.schedule.rewrites_base))
    for name, gate in gates_of(model).items():
        tensors |= {key: getattr(gate, slot).detach() for slot, key in gate_keys(name, gate.slots).items()}
    for name, module in trained_modules(model).items():
        tensors |= {f"{PREFIX}{name}.{key}": tensor for key, tensor in module.trained.state_dict().items()}
    # copies: a safetensors file takes no views and no shared memory
    return {key: tensor.detach().to("cpu", _file_dtype(key, tensor), copy=True).contiguous() for key, tensor in tensors.items()}


def _file_dtype(key: str, tensor: Tensor) -> torch.dtype:
    """At least fp32, also where the parameters were cast (FSDP's mixed precision, model.bfloat16()); a base weight in its own dtype."""
    if key.endswith(f".{BASE_WEIGHT}") or not tensor.dtype.is_floating_point:
        return tensor.dtype
    return torch.promote_types(tensor.dtype, torch.float32)


def checksum(projections: Mapping[str, Tensor]) -> str:
    """A SHA-256 over projections: names, shapes and values in fp32."""
    digest = hashlib.sha256()
    for name in sorted(projections):
        tensor = projections[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def _about(
    model: nn.Module, record: Adapted, peft_type: str, reason: str, config: Mapping[str, Any], pool_checksum: str | None
) -> dict[str, Any]:
    from rankwise import __version__

    recipe = record.recipe
    notes = list(record.notes)
    if reason:
        notes.append(f"PEFT refuses this adapter: {reason}")
    if recipe.base == "fold":
        notes.append("the factors and their start stand against the original base; loading folds the start into it again")
    rounds = {name: {"rounds": len(module.ledger)} for name, module in adapted_sites(model).items() if module.ledger is not None}
    start = None if not recipe.moves_base else "stacked" if is_stacked(recipe, peft_type) else "separate"
    return {
        "format_version": FORMAT_VERSION,
        "rankwise_version": __version__,
        "peft_type": peft_type,
        "recipe": recipe.to_dict(),
        "base": {"name_or_path": config["base_model_name_or_path"], "fingerprint": record.fingerprint, "held": record.held_fingerprint},
        "sites": {site.name: _site(site) | rounds.get(site.name, {}) for site in record.plan.sites},
        "modules_to_save": [name for name, _ in record.plan.trained_modules],
        # stacked: the second half of lora_A's rows, and minus the second half of lora_B's columns; separate: under keys of its own
        "start": start,
        "pool_checksum": pool_checksum,
        "notes": notes,
        **({} if record.plan.importance is None else {"importance": record.plan.importance.to_dict()}),
    }


def _site(site: Site) -> dict[str, Any]:
    """What a plan of the same recipe cannot know; "owner" where a site uses the tensors of another one, which the file holds once."""
    numbers: dict[str, Any] = {"rank": site.rank, "scaling": site.scaling}
    more = {"experts": site.experts if site.experts > 1 else None, "owner": site.owner or None}
    return numbers | {key: value for key, value in more.items() if value is not None}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n")
