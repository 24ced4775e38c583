"""Folders that PEFT wrote: adapter_config.json to a Recipe, by PEFT's own matching rules. What has no counterpart is refused by name."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rankwise.checkpoint.naming import base_names, exact_names, own_patterns, picks, shortest
from rankwise.checkpoint.peft_fields import (
    CONVERT,
    DEFAULTS,
    HARMLESS,
    MERGE,
    READ,
    REMEDIES,
    REMEDY,
    STARTS_KEEPING_THE_BASE,
    STARTS_MADE_AGAIN,
    UNUSED,
)
from rankwise.checkpoint.peft_layout import PREFIX
from rankwise.checkpoint.peft_tensors import (
    token_modules,
    with_shifts,
    with_starts,
    with_whole_embeddings,
    without_base_biases,
    without_base_copies,
)
from rankwise.errors import CheckpointError
from rankwise.gains import Dora, NoGain
from rankwise.inits import Kaiming, OLora, Own, Pissa
from rankwise.matching import find_sites
from rankwise.patterns import expression
from rankwise.recipe import Recipe, Targets, build_choice
from rankwise.schedules import AdaLoraBudget
from rankwise.updates import LowRank, Site, Svd, Vera
from rankwise.updates.svd import PEFT_EPSILON

_SITE_KEY = re.compile(
    r"(.*)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|lora_E|vera_lambda_b|vera_lambda_d)(\.weight)?"
)


@dataclass(frozen=True)
class Foreign:
    """A folder of PEFT, understood: what the loader needs to go on as with one of ours."""

    peft_type: str
    recipe: Recipe
    tensors: dict[str, Tensor]  # those that are no longer PEFT's own
    ranks: Mapping[str, int]  # of sites that were pruned
    biases: Mapping[str, Tensor]  # what training has added to the biases of sites
    start: str | None  # 'pissa' or 'olora', if the pairs are to be completed by the start that PEFT's loader makes again
    notes: tuple[str, ...]

    def complete(self, base: nn.Module, sites: Sequence[Site]) -> dict[str, Tensor]:
        """The tensors with what is known only beside the plan's sites.

        Raises:
            CheckpointError: a start that cannot be made again on this base.
        """
        tensors = with_shifts(self.tensors, sites, self.biases)
        return tensors if self.start is None else with_starts(tensors, base, sites, self.start)


def understand(config: Mapping[str, Any], base: nn.Module, tensors: Mapping[str, Tensor]) -> Foreign:
    """What computes what PEFT would with this configuration and these tensors on this base.

    Args:
        config: adapter_config.json of type LORA, ADALORA or VERA.
        base: the model that the adapter is for, not adapted.
        tensors: the weights file; its tensors must be of the very sites that the configuration names.

    Raises:
        CheckpointError: a field without counterpart, or sites that differ between configuration, base and file.
    """
    kind = config["peft_type"]
    fields = DEFAULTS[kind] | dict(config)
    _refuse_foreign_fields(fields, kind, base)
    names = base_names(base)
    tokens = token_modules(fields, base, tensors)
    heads = [*_heads(fields, names), *tokens]
    sites = _sites(fields, base, names, heads)
    _compare_sites(sites, {match[1].removeprefix(PREFIX) for key in tensors if (match := _SITE_KEY.fullmatch(key))})
    free = [name for name in names if not any(name == head or name.startswith(head + ".") for head in heads)]
    common: dict[str, Any] = {
        "targets": Targets(tuple(shortest(sites, free) or exact_names(sites))),
        "modules_to_save": tuple((shortest(heads, names) or exact_names(heads)) if heads else ()),
    }
    notes = [f"{name} trains in full here, of which {len(rows)} rows did in PEFT" for name, (_, rows) in tokens.items()]
    modules = dict(base.named_modules())
    embeddings = [name for name in sites if isinstance(modules[name], nn.Embedding)]
    dropout = fields["vera_dropout" if kind == "VERA" else "lora_dropout"]
    if dropout and embeddings:
        notes.append(f"dropout={dropout} of the adapter is 0 here: {embeddings[0]} is an embedding, whose token ids cannot be dropped")
        dropout = 0.0
    if embeddings and fields.get("use_dora"):
        raise CheckpointError(f"adapter_config.json has use_dora=True at {embeddings[0]}, an embedding, which takes no gain here; {MERGE}")
    there, here = fields["base_model_name_or_path"], getattr(getattr(base, "config", None), "_name_or_path", None)
    if there and here and there != here:
        notes.append(f"the adapter was made for {there}, and this base calls itself {here}")
    tensors = with_whole_embeddings(tensors, base, tokens)
    tensors, biases = without_base_biases(tensors, base, fields["bias"], heads, sites if kind == "LORA" else ())
    recipe, ranks = _RECIPES[kind](fields, sites, common | {"dropout": dropout})
    if biases:
        recipe = recipe.replace(update=LowRank(bias=True))
    start = recipe.init.name if recipe.init.moves_base else None
    tensors = without_base_copies(tensors, base, [*heads, *(sites if start else ())])
    if start:
        notes.append(f"init_lora_weights={start!r}: the start was made again from this base, as PEFT's loader does; what is saved holds it")
    return Foreign(kind, recipe, tensors, ranks, biases, start, tuple(notes))


def _lora(fields: Mapping[str, Any], sites: Collection[str], common: dict[str, Any]) -> tuple[Recipe, dict[str, int]]:
    ranks, alphas = (
        {name: _by_pattern(fields[patterns], name, fields[default]) for name in sites}
        for patterns, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
    )
    start = fields["init_lora_weights"]
    return Recipe(
        name=start if start in STARTS_MADE_AGAIN else "dora" if fields["use_dora"] else "rslora" if fields["use_rslora"] else "lora",
        update=LowRank(bool(fields["lora_bias"])),
        init=Pissa("exact") if start == "pissa" else OLora() if start == "olora" else Kaiming(),
        gain=Dora() if fields["use_dora"] else NoGain(),
        rank=fields["r"],
        alpha=fields["lora_alpha"],
        scaling="rslora" if fields["use_rslora"] else "lora",
        rank_pattern=own_patterns(ranks, fields["r"]),
        alpha_pattern=own_patterns(alphas, fields["lora_alpha"]),
        **common,
    ), {}


def _adalora(fields: Mapping[str, Any], sites: Collection[str], common: dict[str, Any]) -> tuple[Recipe, dict[str, int]]:
    """PEFT divides alpha by the initial rank plus 1e-5, before and after pruning; an alpha that is not above 0 stands for that rank."""
    rank = fields["init_r"]
    alpha = fields["lora_alpha"] if fields["lora_alpha"] > 0 else rank
    options = {
        "target_rank": min(fields["target_r"], rank),
        "tinit": fields["tinit"],
        "tfinal": fields["tfinal"],
        "interval": fields["deltaT"],
        "beta1": fields["beta1"],
        "beta2": fields["beta2"],
        "gamma": fields["orth_reg_weight"],
    }
    schedule = build_choice(AdaLoraBudget, options, "adapter_config.json")
    recipe = Recipe(
        name="adalora",
        update=Svd("gaussian"),
        init=Own(),
        schedule=schedule,
        rank=rank,
        alpha=alpha * rank / (rank + PEFT_EPSILON),
        lr=1e-3,
        lr_bracket=(2e-4, 5e-3),
        **common,
    )
    return recipe, _kept_ranks(fields["rank_pattern"] or {}, sites, rank)


def _kept_ranks(patterns: Mapping[str, Any], sites: Collection[str], rank: int) -> dict[str, int]:
    """Site -> how many triplets AdaLoRA's pruning has left there: PEFT writes a boolean for each, under the name of its tensor."""
    ranks: dict[str, int] = {}
    for key, kept in patterns.items():
        match = re.fullmatch(r"(.*)\.lora_E(\.[^.]+)?", key)
        site = match[1].removeprefix(PREFIX) if match else key
        if site not in sites:
            raise CheckpointError(f"adapter_config.json: rank_pattern names {key!r}, which is no adapted module; is it the right base?")
        if not isinstance(kept, list) or len(kept) != rank or not all(isinstance(each, bool) for each in kept):
            raise CheckpointError(f"adapter_config.json: rank_pattern[{key!r}] must be {rank} booleans, one for each initial rank")
        ranks[site] = sum(kept)
    return ranks


def _vera(fields: Mapping[str, Any], sites: Collection[str], common: dict[str, Any]) -> tuple[Recipe, dict[str, int]]:
    options = {"d_initial": fields["d_initial"], "seed": fields["projection_prng_key"]}
    update = build_choice(Vera, options, "adapter_config.json")
    return Recipe(name="vera", update=update, init=Own(), rank=fields["r"], lr=4e-3, lr_bracket=(1e-3, 5e-2), **common), {}


_RECIPES = {"LORA": _lora, "ADALORA": _adalora, "VERA": _vera}


def _refuse_foreign_fields(fields: Mapping[str, Any], kind: str, base: nn.Module) -> None:
    defaults = DEFAULTS[kind]
    for name, value in fields.items():
        if name in READ[kind] or name in HARMLESS or name in UNUSED.get(kind, ()) or value == defaults.get(name):
            continue
        if name not in defaults and value in (None, False, [], {}):
            continue  # a field of another version of PEFT, switched off
        raise CheckpointError(f"adapter_config.json has {name}={value!r}, which has no counterpart here: {REMEDIES.get(name, REMEDY)}")
    tied = getattr(getattr(base, "config", None), "tie_word_embeddings", False)
    if fields.get("ensure_weight_tying") and tied and not fields.get("trainable_token_indices"):
        raise CheckpointError(
            "adapter_config.json has ensure_weight_tying=True, and this base ties its embeddings: adapters that two modules share have no "
            f"counterpart here; {MERGE}"
        )
    start = fields.get("init_lora_weights", True)
    if kind != "LORA" or start in STARTS_KEEPING_THE_BASE or start in STARTS_MADE_AGAIN:
        return
    belongs = f"adapter_config.json has init_lora_weights={start!r}: this adapter belongs to a base that its start has changed"
    if start == "loftq":
        raise CheckpointError(f"{belongs} and rounded, not to the pretrained one; {MERGE}")
    raise CheckpointError(f"{belongs}, which cannot be made again from the pretrained weights, by PEFT no more than here; {CONVERT}")


def _by_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """PEFT's rule: the first expression that matches the end of the name, at a dot."""
    return next((value for key, value in (patterns or {}).items() if expression(rf"(.*\.)?({key})$").match(name)), default)


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
    free = [name for name in free if not any(expression(rf"(^|.*\.){entry}($|\..*)").match(name) for entry in entries)]
    if isinstance(excluded, str):
        free = [name for name in free if not expression(excluded).fullmatch(name)]
    else:
        free = [name for name in free if not any(picks(suffix, name) for suffix in excluded)]
    if isinstance(wanted, str):
        if wanted.lower() == "all-linear":
            linear = find_sites(base, Targets(), tuple(heads))
            return [name for name in free if name in linear]
        return [name for name in free if expression(wanted).fullmatch(name)]
    return [name for name in free if any(picks(suffix, name) for suffix in wanted) and _in_layers(fields, name, wanted)]


def _in_layers(fields: Mapping[str, Any], name: str, wanted: Collection[str]) -> bool:
    layers = fields["layers_to_transform"]
    if layers is None or layers == [] or name in wanted:
        return True
    patterns = fields["layers_pattern"] or ()
    texts = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in ((patterns,) if isinstance(patterns, str) else patterns)] or [r".*?\.[^.]*\.(\d+)\."]
    match = next((found for text in texts if (found := expression(text).match(name))), None)
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
