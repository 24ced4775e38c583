"""Folders that PEFT wrote: adapter_config.json to a Recipe, by PEFT's own matching rules. What has no counterpart is refused by name."""

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.checkpoint.naming import base_names, exact_names, own_patterns, picks, shortest
from rankwise.checkpoint.peft_fields import HARMLESS, LORA_DEFAULTS, READ, REMEDIES, REMEDY, STARTS_KEEPING_THE_BASE, VERA_DEFAULTS
from rankwise.checkpoint.peft_layout import PREFIX
from rankwise.errors import CheckpointError
from rankwise.gains import Dora, NoGain
from rankwise.inits import Kaiming, Own
from rankwise.recipe import Recipe, Targets
from rankwise.sites import find_sites
from rankwise.updates import LowRank, Vera

_SITE_KEY = re.compile(
    r"(.*)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|vera_lambda_b|vera_lambda_d)(\.weight)?"
)


def recipe_of(config: Mapping[str, Any], base: nn.Module, keys: Collection[str]) -> Recipe:
    """The recipe that computes what PEFT would with this configuration on this base.

    Args:
        config: adapter_config.json of type LORA or VERA.
        base: the model that the adapter is for, not adapted.
        keys: the keys of the weights file; they must be of the very sites that the configuration names.

    Raises:
        CheckpointError: a field without counterpart, or sites that differ between configuration, base and file.
    """
    kind = config["peft_type"]
    fields = (LORA_DEFAULTS if kind == "LORA" else VERA_DEFAULTS) | dict(config)
    _refuse_foreign_fields(fields, kind)
    names = base_names(base)
    try:
        heads = _heads(fields, names)
        sites = _sites(fields, base, names, heads)
    except re.error as error:
        raise CheckpointError(f"adapter_config.json: {error.pattern!r} is not a valid regular expression: {error}") from error
    _compare_sites(sites, {match[1].removeprefix(PREFIX) for key in keys if (match := _SITE_KEY.fullmatch(key))})
    free = [name for name in names if not any(name == head or name.startswith(head + ".") for head in heads)]
    common: dict[str, Any] = {
        "targets": Targets(tuple(shortest(sites, free) or exact_names(sites))),
        "modules_to_save": tuple((shortest(heads, names) or exact_names(heads)) if heads else ()),
        "rank": fields["r"],
    }
    if kind == "VERA":
        update = Vera(fields["d_initial"], fields["projection_prng_key"])
        return Recipe(name="vera", update=update, init=Own(), dropout=fields["vera_dropout"], lr=4e-3, lr_bracket=(1e-3, 5e-2), **common)
    ranks, alphas = (
        {name: _by_pattern(fields[patterns], name, fields[default]) for name in sites}
        for patterns, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
    )
    return Recipe(
        name="dora" if fields["use_dora"] else "rslora" if fields["use_rslora"] else "lora",
        update=LowRank(),
        init=Kaiming(),
        gain=Dora() if fields["use_dora"] else NoGain(),
        alpha=fields["lora_alpha"],
        scaling="rslora" if fields["use_rslora"] else "lora",
        dropout=fields["lora_dropout"],
        rank_pattern=own_patterns(ranks, fields["r"]),
        alpha_pattern=own_patterns(alphas, fields["lora_alpha"]),
        **common,
    )


def _refuse_foreign_fields(fields: Mapping[str, Any], kind: str) -> None:
    defaults = LORA_DEFAULTS if kind == "LORA" else VERA_DEFAULTS
    for name, value in fields.items():
        if name in READ[kind] or name in HARMLESS or value == defaults.get(name):
            continue
        if name not in defaults and value in (None, False, [], {}):
            continue  # a field of another version of PEFT, switched off
        raise CheckpointError(f"adapter_config.json has {name}={value!r}, which has no counterpart here: {REMEDIES.get(name, REMEDY)}")
    start = fields.get("init_lora_weights", True)
    if start not in STARTS_KEEPING_THE_BASE:
        raise CheckpointError(
            f"adapter_config.json has init_lora_weights={start!r}: this adapter belongs to a base that its start has changed, not to the "
            "pretrained one; convert it with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )


def _by_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """PEFT's rule: the first expression that matches the end of the name, at a dot."""
    return next((value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", name)), default)


def _heads(fields: Mapping[str, Any], names: Collection[str]) -> list[str]:
    """PEFT takes every module whose name ends with an entry; entries that match nothing are only refused if all do."""
    entries = tuple(fields["modules_to_save"] or ())
    found = [name for name in names if entries and name.endswith(entries)]
    if entries and not found:
        raise CheckpointError(
            f"adapter_config.json: modules_to_save={list(entries)} matches no module of this base; is it the right model?"
        )
    return [name for name in found if not any(name.startswith(other + ".") for other in found)]


def _sites(fields: Mapping[str, Any], base: nn.Module, names: Collection[str], heads: Collection[str]) -> list[str]:
    wanted, excluded = fields["target_modules"], fields.get("exclude_modules") or ()
    if not wanted:
        raise CheckpointError("adapter_config.json names no target_modules; write the names of the adapted modules into it")
    entries = fields["modules_to_save"] or ()
    free = [name for name in names if not any(name == head or name.startswith(head + ".") for head in heads)]
    free = [name for name in free if not any(re.match(rf"(^|.*\.){entry}($|\..*)", name) for entry in entries)]
    if isinstance(excluded, str):
        free = [name for name in free if not re.fullmatch(excluded, name)]
    else:
        free = [name for name in free if not any(picks(suffix, name) for suffix in excluded)]
    if isinstance(wanted, str):
        if wanted.lower() == "all-linear":
            linear = find_sites(base, Targets(), tuple(heads))
            return [name for name in free if name in linear]
        return [name for name in free if re.fullmatch(wanted, name)]
    return [name for name in free if any(picks(suffix, name) for suffix in wanted) and _in_layers(fields, name, wanted)]


def _in_layers(fields: Mapping[str, Any], name: str, wanted: Collection[str]) -> bool:
    layers = fields["layers_to_transform"]
    if layers is None or layers == [] or name in wanted:
        return True
    patterns = fields["layers_pattern"] or ()
    expressions = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in ((patterns,) if isinstance(patterns, str) else patterns)] or [
        r".*?\.[^.]*\.(\d+)\."
    ]
    match = next((found for expression in expressions if (found := re.match(expression, name))), None)
    return match is not None and int(match[1]) in ([layers] if isinstance(layers, int) else layers)


def _compare_sites(expected: Collection[str], present: Collection[str]) -> None:
    missing, extra = [name for name in expected if name not in present], sorted(set(present) - set(expected))
    if missing:
        raise CheckpointError(
            f"the weights file has no tensors for {len(missing)} of {len(expected)} sites that adapter_config.json names, such as "
            f"{missing[0]}; the file is incomplete or the base is another model"
        )
    if extra:
        raise CheckpointError(
            f"the weights file has tensors for {len(extra)} modules that adapter_config.json does not name or this base does not have, "
            f"such as {extra[0]}; is it the right base?"
        )


def without_base_copies(tensors: Mapping[str, Tensor], base: nn.Module, heads: Collection[str]) -> dict[str, Tensor]:
    """Drops the copies of embedding weights that PEFT puts into a file when an embedding is adapted or was resized.

    Raises:
        CheckpointError: such a copy differs from the base.
    """
    kept: dict[str, Tensor] = {}
    modules = dict(base.named_modules())
    embeddings = [
        name for name, module in modules.items() if isinstance(module, nn.Embedding) or module is _called(base, "get_output_embeddings")
    ]
    own = {f"{PREFIX}{name}{inside}.weight": name for name in embeddings if name not in heads for inside in ("", ".base_layer")}
    for key, tensor in tensors.items():
        if key not in own:
            kept[key] = tensor
            continue
        weight = modules[own[key]].weight
        if not isinstance(weight, Tensor) or weight.shape != tensor.shape or not torch.equal(tensor.to(weight), weight):
            raise CheckpointError(
                f"the weights file holds a copy of the base weight {own[key]} that differs from this base: the vocabulary was resized or "
                "the embedding changed; load the base that the adapter was trained on"
            )
    return kept


def _called(model: nn.Module, name: str) -> Any:
    getter = getattr(model, name, None)
    return getter() if callable(getter) else None
