"""The mapping between an adapted model and the files that PEFT reads.

What is written gives equal logits when PEFT loads it, or PEFT refuses it. Three layouts, by `peft_type`:

    LORA       update 'lora' with gain none or dora. A start (up0, down0) makes it a plain LoRA of twice the rank on the untouched base:
               lora_A = [down; down0] (2 rank, in),  lora_B = [up, -up0] (out, 2 rank),  alpha doubled (times sqrt 2 for rsLoRA)
    VERA       update 'vera' without gain, one pool pair cut by PEFT's rule
    ADALORA    update 'adalora' without gain, one scaling for all sites; ranks may differ
    RANKWISE   everything else: the tensors of all slots under their own keys; an unknown type, which PEFT refuses
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankwise import ledger
from rankwise.checkpoint.naming import peft_patterns, shortest
from rankwise.checkpoint.peft_fields import ADALORA_DEFAULTS, LORA_DEFAULTS, VERA_DEFAULTS
from rankwise.equation import Start
from rankwise.planning import Plan, own_slots
from rankwise.preparing import needs_dense
from rankwise.recipe import Recipe
from rankwise.record import Adapted, Stored
from rankwise.sites import AdaptedLinear, adapted_sites
from rankwise.updates import Site, Slot

PREFIX = "base_model.model."
NATIVE = "RANKWISE"
BASE_WEIGHT = "base_weight"  # of a site whose schedule writes into its base


def is_stacked(recipe: Recipe, peft_type: str) -> bool:
    """Whether the start stands in the second half of the LoRA factors."""
    return peft_type == "LORA" and recipe.moves_base


# --- which layout ----------------------------------------------------------------------------------------------------------------------


def layout_of(model: nn.Module, record: Adapted, names: Collection[str]) -> tuple[str, str]:
    """(peft_type, why it is the project's own one, or an empty string).

    Args:
        model: the adapted model, its base layers holding their own weights.
        record: what adapt left on it.
        names: names of all modules of the base.
    """
    recipe, sites = record.recipe, record.plan.sites
    heads = [name for name, _ in record.plan.trained_modules]
    wanted = recipe.update.peft_type
    if recipe.schedule.rewrites_base:
        instead = "; export_lora writes it as a plain LoRA" if recipe.schedule.ledger else ""
        return NATIVE, f"schedule={recipe.schedule.name!r} trains the base weights themselves, and the file holds that{instead}"
    if wanted is None or recipe.routing.name != "none":
        return NATIVE, f"PEFT has no form of update={recipe.update.name!r} with routing={recipe.routing.name!r}"
    if heads and peft_heads(heads, names) is None:
        return NATIVE, f"PEFT's modules_to_save cannot name {', '.join(heads)} without other modules"
    if recipe.gain.name not in (("none", "dora") if wanted == "LORA" else ("none",)):
        return NATIVE, f"PEFT has no gain={recipe.gain.name!r} over update={recipe.update.name!r}"
    if recipe.gain.name != "none" and any("shift" in recipe.update.slots(site) for site in sites):
        return NATIVE, f"PEFT has no trained bias with gain={recipe.gain.name!r}"
    if recipe.moves_base and wanted != "LORA":
        return NATIVE, f"PEFT has no start of its own over update={recipe.update.name!r}"
    if reason := recipe.update.peft_reason(sites):
        return NATIVE, reason
    if any(site.owner for site in sites):
        return NATIVE, "several sites use one pair, and PEFT would load a copy for each (export_lora writes these copies)"
    if record.plan.held and needs_dense(recipe):
        return NATIVE, "the base's 4-bit form is made here, of a residual or with the lengths of the original rows, and PEFT cannot make it"
    for name, module in adapted_sites(model).items():
        if getattr(module.base_layer, "max_norm", None) is not None:
            return NATIVE, f"PEFT applies max_norm of the embedding {name} to the factors too"
        if recipe.gain.name == "dora" and _has_dead_rows(module):
            return NATIVE, f"{name} has rows of zeros, which PEFT's DoRA divides by"
    return wanted, ""


@torch.no_grad()
def _has_dead_rows(module: AdaptedLinear) -> bool:
    norm: Any = getattr(module.gain, "norm", None)
    factors = None if module.update is None else module.update.factors()
    return bool((norm(module.base_layer, module.storage, factors, module.subtracted()) == 0).any())


# --- tensors ---------------------------------------------------------------------------------------------------------------------------


def collect(module: AdaptedLinear, rewrites: bool = False) -> Stored:
    """The tensors of one adapted site, by slot; references, not copies; those of another site that it uses are left out.
    With `rewrites` the ledger too, or the base weight."""
    own = module.own_update
    update = {} if own is None else {name: getattr(own, name).detach() for name in own.slots}
    gain = {} if module.gain is None else module.gain.saved()
    start = None if module.offset is None or module.site.owner else module.offset.start()
    weight = module.base_weight() if rewrites and module.ledger is None else None
    return Stored(update, gain, start, weight, module.ledger if rewrites else None)


def encode(site: Site, recipe: Recipe, peft_type: str, stored: Stored) -> dict[str, Tensor]:
    """Key in the file -> tensor, of one site."""
    slots = own_slots(recipe, site)
    tensors = {slots[name].key: tensor for name, tensor in (*stored.update.items(), *stored.gain.items())}
    start = stored.start
    if start is not None and is_stacked(recipe, peft_type):
        tensors[slots["down"].key] = torch.cat([stored.update["down"], start.down])  # (2 rank, in)
        tensors[slots["up"].key] = torch.cat([stored.update["up"], -start.up], dim=1)  # (out, 2 rank)
    elif start is not None:
        tensors |= {"start_down": start.down, "start_up": start.up}
    if stored.weight is not None:
        tensors[BASE_WEIGHT] = stored.weight
    if stored.ledger is not None:
        tensors |= ledger.to_tensors(stored.ledger, site.in_features, site.out_features, site.rank)
    return {f"{PREFIX}{site.name}.{key}": tensor for key, tensor in tensors.items()}


def shapes(site: Site, recipe: Recipe, peft_type: str, rounds: int = 0) -> dict[str, tuple[int, ...]]:
    """Key in the file -> shape, of one site: what a complete file holds; `rounds` of them stand in its ledger, where it has one."""
    slots = own_slots(recipe, site)
    found = {slot.key: slot.shape for slot in slots.values()}
    if site.owner:
        pass  # the file holds what it shares once, at the owner
    elif is_stacked(recipe, peft_type):
        found[slots["down"].key] = (2 * site.rank, site.in_features)
        found[slots["up"].key] = (site.out_features, 2 * site.rank)
    elif recipe.moves_base:
        found |= {"start_down": (site.rank, site.in_features), "start_up": (site.out_features, site.rank)}
    if recipe.schedule.rewrites_base and recipe.schedule.ledger:
        found |= ledger.shapes(rounds, site.in_features, site.out_features, site.rank)
    elif recipe.schedule.rewrites_base:
        found[BASE_WEIGHT] = (site.out_features, site.in_features)
    return {f"{PREFIX}{site.name}.{key}": shape for key, shape in found.items()}


def decode(site: Site, recipe: Recipe, peft_type: str, tensors: Mapping[str, Tensor]) -> Stored:
    """The tensors of one site from a file whose keys and shapes are right."""

    def named(slots: Mapping[str, Any]) -> dict[str, Tensor]:
        return {name: tensors[f"{PREFIX}{site.name}.{slot.key}"] for name, slot in slots.items()}

    gain, start = named(recipe.gain.slots(site)), None
    if site.owner:
        return Stored({}, gain)
    update = named(recipe.update.slots(site))
    if is_stacked(recipe, peft_type):
        down, up = update["down"], update["up"]
        start = Start(down[site.rank :], -up[:, site.rank :])
        update |= {"down": down[: site.rank], "up": up[:, : site.rank]}
    elif recipe.moves_base:
        start = Start(tensors[f"{PREFIX}{site.name}.start_down"], tensors[f"{PREFIX}{site.name}.start_up"])
    if not recipe.schedule.rewrites_base:
        return Stored(update, gain, start)
    if recipe.schedule.ledger:
        folded = {key: tensors[f"{PREFIX}{site.name}.{key}"] for key in ledger.shapes(0, 0, 0, 0)}
        return Stored(update, gain, start, ledger=ledger.from_tensors(folded))
    return Stored(update, gain, start, tensors[f"{PREFIX}{site.name}.{BASE_WEIGHT}"])


def gate_keys(block: str, slots: Mapping[str, Slot]) -> dict[str, str]:
    """Slot name -> key in the file, of the gate of a block."""
    return {name: f"{PREFIX}{block}.{slot.key}" for name, slot in slots.items()}


def pool_keys(peft_type: str, buffers: Collection[str]) -> dict[str, str]:
    """Buffer name of the shared pool -> key in the file."""
    if peft_type == "VERA":
        return {name: "base_model.vera_A" if name.startswith("down") else "base_model.vera_B" for name in buffers}
    return {name: f"base_model.pool.{name}" for name in buffers}


# --- adapter_config.json ---------------------------------------------------------------------------------------------------------------


def config_of(model: nn.Module, plan: Plan, peft_type: str, names: Collection[str], save_projection: bool) -> dict[str, Any]:
    """adapter_config.json: all fields of PEFT's type and none besides; for the project's own type only what names it."""
    recipe = plan.recipe
    base = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    common = {"peft_type": peft_type, "base_model_name_or_path": base, "task_type": task_type(model), "inference_mode": True}
    if peft_type == NATIVE:
        return common
    heads = [name for name, _ in plan.trained_modules]
    common |= {
        "target_modules": peft_targets([site.name for site in plan.sites], heads, names),
        "modules_to_save": peft_heads(heads, names) if heads else None,
        "fan_in_fan_out": any(site.kind == "conv1d" for site in plan.sites),
    }
    if peft_type == "VERA":
        common |= {"save_projection": save_projection, "vera_dropout": recipe.dropout}
        return VERA_DEFAULTS | common | recipe.update.peft_fields(plan.sites, recipe.rank)
    if peft_type == "ADALORA":
        return ADALORA_DEFAULTS | common | {"lora_dropout": recipe.dropout} | recipe.update.peft_fields(plan.sites, recipe.rank)
    stacked = is_stacked(recipe, peft_type)
    longer = 1.0 if not stacked else 2.0 if recipe.scaling == "lora" else math.sqrt(2)
    ranks = {site.name: site.rank * (2 if stacked else 1) for site in plan.sites}
    alphas = {site.name: _number(site.alpha * longer) for site in plan.sites}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return LORA_DEFAULTS | common | {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": peft_patterns(ranks, int(rank)),
        "alpha_pattern": peft_patterns(alphas, alpha),
        "lora_dropout": recipe.dropout,
        "use_rslora": recipe.scaling == "rslora",
        "use_dora": recipe.gain.name == "dora",
    } | recipe.update.peft_fields(plan.sites, recipe.rank)  # fmt: skip


def _number(value: float) -> float:
    return int(value) if float(value).is_integer() else value


def task_type(model: nn.Module) -> str | None:
    """PEFT's task type where it only helps its Auto classes; the others would add modules of their own."""
    name = type(getattr(model, "_orig_mod", model)).__name__
    return "CAUSAL_LM" if name.endswith(("ForCausalLM", "LMHeadModel")) else None


def peft_heads(heads: Collection[str], names: Collection[str]) -> list[str] | None:
    """modules_to_save for PEFT, which takes every module whose name ends with an entry; None where that would take others too."""
    for entries in (sorted({head.rpartition(".")[2] for head in heads}), sorted(heads)):
        if {name for name in names if name.endswith(tuple(entries))} == set(heads):
            return entries
    return None


def peft_targets(sites: Collection[str], heads: Collection[str], names: Collection[str]) -> list[str] | str:
    """target_modules for PEFT: suffixes that pick exactly the sites, else an expression that matches their whole names."""
    free = [name for name in names if not any(name == head or name.startswith(head + ".") for head in heads)]
    suffixes = shortest(sites, free)
    return "|".join(re.escape(site) for site in sites) if suffixes is None else suffixes
