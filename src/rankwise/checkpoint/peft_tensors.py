"""What PEFT writes beside the adapters' own tensors, and starts that its loader makes again: into the layout that `peft_layout` decodes.

They are found by their keys, and nothing is dropped that is not compared with the base:
    copies of embeddings     dropped, if they equal the base
    biases (bias='all')      dropped, if they equal the base; of adapted layers else scaling * shift = trained - base, as with lora_bias
    trainable tokens         rows of an embedding: the whole embedding as a module that trains in full, and that of a head tied to it
    PiSSA, OLoRA as saved    lora_A = [A; A0], lora_B = [B, -B0]: PEFT's loader takes scaling * B0 A0 out of the base weight, and the pair
                             follows from that weight alone. V S U = svd(W): B0 = V_r (S_r / scaling)^(1/2), A0 = (S_r / scaling)^(1/2) U_r;
                             Q R = qr(W): B0 = Q_r, A0 = R_r (of the weight as it is held, so transposed at a Conv1D)
"""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.checkpoint.peft_fields import CONVERT, MERGE
from rankwise.checkpoint.peft_layout import PREFIX
from rankwise.equation import Start, shifted
from rankwise.errors import CheckpointError
from rankwise.matching import kind_of, tied_names
from rankwise.storage import NF4Linear, storage_of
from rankwise.storage.bnb_layout import is_bitsandbytes_4bit
from rankwise.updates import Site, lora_slots

TOKENS = ".token_adapter.trainable_tokens_delta"


def token_modules(fields: Mapping[str, Any], base: nn.Module, keys: Iterable[str]) -> dict[str, tuple[str, list[int]]]:
    """Name of each module whose rows trained -> (key of the rows in the file, their indices); what is tied to the embedding with it.

    Raises:
        CheckpointError: rows in the file that the configuration does not name.
    """
    wanted = fields.get("trainable_token_indices")
    found: dict[str, tuple[str, list[int]]] = {}
    modules = dict(base.named_modules())
    for key in keys:
        if not key.endswith(TOKENS):
            continue
        name = key.removeprefix(PREFIX).removesuffix(TOKENS)
        entries = wanted if isinstance(wanted, Mapping) else {name: wanted or []}
        rows = next((rows for entry, rows in entries.items() if name.endswith(entry)), None)
        if not rows or name not in modules:
            raise CheckpointError(
                f"the weights file has rows for {name}, which trainable_token_indices={wanted!r} does not name or this base does not "
                "have; is it the right base?"
            )
        if not isinstance(rows, list) or not all(type(row) is int for row in rows):
            raise CheckpointError(f"adapter_config.json: trainable_token_indices={wanted!r} must be whole numbers; write it as PEFT does")
        found[name] = (key, rows)
    if wanted and not found:
        raise CheckpointError(f"the weights file has no rows for trainable_token_indices={wanted!r}; copy or save the adapter again")
    # PEFT replaces the rows of a tied head too
    ties = tied_names(base) if getattr(getattr(base, "config", None), "tie_word_embeddings", False) else {}
    for name in list(found):
        others = next((names for names in ties.values() if name in names), [])
        found |= {other: found[name] for other in others if other not in found}
    return found


def with_whole_embeddings(tensors: Mapping[str, Tensor], base: nn.Module, tokens: Mapping[str, tuple[str, list[int]]]) -> dict[str, Tensor]:
    """The tensors with each module's rows replaced by its whole state, in which they stand.

    Raises:
        CheckpointError: rows of another number, width or place than the module has.
    """
    kept = {key: tensor for key, tensor in tensors.items() if not key.endswith(TOKENS)}
    for name, (key, rows) in tokens.items():
        state = base.get_submodule(name).state_dict()
        weight, given = state.get("weight"), tensors[key]
        if (
            weight is None
            or weight.dim() != 2
            or given.shape != (len(rows), weight.shape[1])
            or not all(0 <= row < len(weight) for row in rows)
        ):
            shape = None if weight is None else tuple(weight.shape)
            raise CheckpointError(
                f"{key} has shape {tuple(given.shape)} for rows {rows} of a weight of shape {shape}; load the base it was made for"
            )
        whole = weight.to(torch.promote_types(weight.dtype, given.dtype), copy=True)
        whole[torch.tensor(rows)] = given.to(whole)
        kept |= {f"{PREFIX}{name}.{inside}": tensor for inside, tensor in state.items()}
        kept[f"{PREFIX}{name}.weight"] = whole
    return kept


def without_base_copies(tensors: Mapping[str, Tensor], base: nn.Module, apart: Collection[str]) -> dict[str, Tensor]:
    """Drops the copies of embedding weights that PEFT puts into a file when an embedding is adapted or was resized; not of the modules
    named in `apart`, whose weights are not those of the base.

    Raises:
        CheckpointError: such a copy differs from the base.
    """
    kept: dict[str, Tensor] = {}
    modules = dict(base.named_modules())
    embeddings = [
        name for name, module in modules.items() if isinstance(module, nn.Embedding) or module is _called(base, "get_output_embeddings")
    ]
    own = {f"{PREFIX}{name}{inside}.weight": name for name in embeddings if name not in apart for inside in ("", ".base_layer")}
    for key, tensor in tensors.items():
        if key not in own:
            kept[key] = tensor
        elif not _same(tensor, modules[own[key]].weight):
            raise CheckpointError(
                f"the weights file holds a copy of the base weight {own[key]} that differs from this base: the vocabulary was resized or "
                "the embedding changed; load the base that the adapter was trained on"
            )
    return kept


def without_base_biases(
    tensors: Mapping[str, Tensor], base: nn.Module, bias: str, heads: Collection[str], sites: Collection[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors without the biases of the base that PEFT puts into a file with bias='all' or 'lora_only', and what training has added
    to those of the sites, by site, where it has.

    Raises:
        CheckpointError: one was trained elsewhere.
    """
    moved: dict[str, Tensor] = {}
    if bias == "none":
        return dict(tensors), moved
    kept: dict[str, Tensor] = {}
    parameters = dict(base.named_parameters(remove_duplicate=False))
    for key, tensor in tensors.items():
        # PEFT's wrappers stand in the names: over a layer, over a module that trains in full and over its original
        plain = key.removeprefix(PREFIX)
        match = re.fullmatch(r"(.*)\.(base_layer|modules_to_save|original_module)\.((?:.*\.)?bias)", plain)
        name, wrapper = (f"{match[1]}.{match[3]}", match[2]) if match else (plain, None)
        trained = any(name.startswith(head + ".") for head in heads)
        if not name.endswith(".bias") or name not in parameters or (trained and wrapper is None):
            kept[key] = tensor
        elif _same(tensor, tensors.get(PREFIX + name) if wrapper == "modules_to_save" else parameters[name]):
            continue
        elif (site := name.removesuffix(".bias")) in sites and tensor.shape == parameters[name].shape:
            wide = torch.promote_types(tensor.dtype, torch.float32)
            moved[site] = tensor.to(wide) - parameters[name].detach().to("cpu", wide)
        else:
            raise CheckpointError(
                f"adapter_config.json has bias={bias!r}, and {name} was trained, which has no counterpart here: train it again with "
                f"bias='none', or {MERGE}"
            )
    return kept, moved


def with_shifts(tensors: Mapping[str, Tensor], sites: Collection[Site], moved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with what training has added to the sites' biases, under the keys of lora_bias; zero where it has added nothing."""
    made = dict(tensors)
    for site in sites if moved else ():
        key = f"{PREFIX}{site.name}.lora_B.bias"
        added = moved[site.name] / site.scaling if site.name in moved else torch.zeros(site.out_features)
        if key not in made:
            made[key] = added
        elif made[key].shape == added.shape:  # another shape is named when the file is checked
            made[key] = made[key] + added
    return made


def _same(saved: Tensor, own: Any) -> bool:
    return isinstance(own, Tensor) and own.shape == saved.shape and torch.equal(saved.to(own), own)


def _called(model: nn.Module, name: str) -> Any:
    getter = getattr(model, name, None)
    return getter() if callable(getter) else None


# --- starts that PEFT's loader makes again ----------------------------------------------------------------------------------------------


def with_starts(tensors: Mapping[str, Tensor], base: nn.Module, sites: Collection[Site], start: str) -> dict[str, Tensor]:
    """The tensors with PEFT's start beside each pair, as a plain LoRA of twice the rank.

    Args:
        tensors: of a file whose adapters were saved as they are.
        base: the pretrained model, not changed by any start.
        sites: of the plan.
        start: 'pissa' or 'olora'.

    Raises:
        CheckpointError: a weight in 4 bits, a weight that another module shares, factors of another shape.
    """
    made = dict(tensors)
    ties = tied_names(base)
    for site in sites:
        layer = base.get_submodule(site.name)
        copied = made.pop(f"{PREFIX}{site.name}.base_layer.weight", None)
        if isinstance(layer, NF4Linear) or is_bitsandbytes_4bit(layer):
            raise CheckpointError(
                f"init_lora_weights={start!r} has changed the weights before they were held in 4 bits, and {site.name} is held so already; "
                f"{CONVERT}"
            )
        others = [name for names in ties.values() if site.name in names for name in names if name != site.name]
        if others:
            raise CheckpointError(
                f"init_lora_weights={start!r} at {site.name} has changed {', '.join(others)} too, whose weight is the same; {MERGE}"
            )
        keys = {slot: f"{PREFIX}{site.name}.{each.key}" for slot, each in lora_slots(site).items()}
        shapes = {"down": (site.rank, site.in_features), "up": (site.out_features, site.rank)}
        for slot, key in keys.items():
            if key in made and tuple(made[key].shape) != shapes[slot]:
                raise CheckpointError(f"{key} has shape {tuple(made[key].shape)}, and this base needs {shapes[slot]}; load its own base")
        if not set(keys.values()) <= set(made):
            continue  # named when the file is checked
        down, up = start_pair(layer, site, start)
        if copied is not None and not _is_rest(copied, layer, site, Start(down, up)):
            raise CheckpointError(f"the weights file holds a copy of the weight of {site.name} that is not this base's; load its own base")
        # in fp32 at least: PEFT takes the start out of the weight before anything is rounded
        trained = {slot: made[key].to(torch.promote_types(made[key].dtype, torch.float32)) for slot, key in keys.items()}
        made[keys["down"]] = torch.cat([trained["down"], down.to(trained["down"])])
        made[keys["up"]] = torch.cat([trained["up"], -up.to(trained["up"])], dim=1)
    return made


def _is_rest(copied: Tensor, layer: nn.Module, site: Site, start: Start) -> bool:
    """Whether a copy is the weight that the start has left, to the rounding of its dtype."""
    rest = shifted(storage_of(layer).read(layer), start, site.scaling, -1.0)
    if copied.shape != rest.shape or not copied.is_floating_point():
        return False
    return torch.allclose(copied.to(rest), rest, rtol=0, atol=8 * torch.finfo(copied.dtype).eps * float(rest.abs().max()))


@torch.no_grad()
def start_pair(layer: nn.Module, site: Site, start: str) -> tuple[Tensor, Tensor]:
    """(A0 (rank, in), B0 (out, rank)) in fp32, as PEFT's `pissa_init` and `olora_init` make them."""
    weight = storage_of(layer).read(layer).float()  # (out, in)
    if start == "pissa":
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        root = (values[: site.rank] / site.scaling).sqrt()
        return root[:, None] * right[: site.rank], left[:, : site.rank] * root
    if kind_of(layer) != "conv1d":
        q, r = torch.linalg.qr(weight)
        return r[: site.rank], q[:, : site.rank]
    q, r = torch.linalg.qr(weight.T)
    return q[:, : site.rank].T, r[: site.rank].T
