"""Any constant update as a plain LoRA of PEFT's layout: what stands left of `down` goes into lora_B, so that the scaling is 1.

    lora_A = down (k, in),  lora_B = scaling * diag(tail) @ up @ core (out, k);  with a start [A; A0], [B, -B0] and k = 2 rank

Ranks differ from site to site where the method's do (AdaLoRA); a site of rank 0 is left out. What a schedule has folded into the base comes
from its ledger: [A; A_1; ..; A_j], [B, B_1, .., B_j] with the pairs of twice the rank that the j finished rounds have left.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from rankwise.checkpoint.atomic import write_folder
from rankwise.checkpoint.naming import base_names, peft_patterns
from rankwise.checkpoint.peft_fields import LORA_DEFAULTS
from rankwise.checkpoint.peft_layout import PREFIX, peft_heads, peft_targets, task_type
from rankwise.checkpoint.saving import CONFIG, NATIVE_FILE, WEIGHTS, _write_json
from rankwise.equation import stacked
from rankwise.errors import CheckpointError
from rankwise.ledger import recompressed
from rankwise.record import adapted
from rankwise.routing.static import Mixture
from rankwise.sites import AdaptedLinear, adapted_sites, trained_modules
from rankwise.updates import lora_slots


@torch.no_grad()
def export_lora(model: nn.Module, folder: str | Path, recompress: bool = False, mixture: Mixture | None = None) -> Path:
    """Writes the adapter as a plain LoRA, which PEFT and other software load; it computes what the model computes.

    A mixture, whose updates depend on the input, has no such LoRA: held still, by `rankwise.routing.static.mean_mixture(model, batches)` or
    `uniform_mixture(model)`, it gives one that is near, as near as `Mixture.errors` says.

    Args:
        model: an adapted model. An update over a folded start is written against the original base.
        folder: where to; made if needed, replaced as a whole. Not a folder that `save` wrote.
        recompress: write each site with as few ranks as its update has, to rounding; always done where it has more than min(out, in).
        mixture: constant gates for updates that depend on the input.

    Raises:
        CheckpointError: a gain or a core that depends on the token, which a plain LoRA cannot hold; base weights that were trained
            without a ledger; nothing left to write; modules that PEFT cannot name; a folder that cannot be written.
    """
    record, names = adapted(model), base_names(model)
    if (Path(folder) / NATIVE_FILE).exists():
        raise CheckpointError(f"{folder} holds an adapter of rankwise; export into a folder of its own")
    pairs = {name: pair for name, module in adapted_sites(model).items() if len((pair := exact_pair(module, recompress, mixture))[0])}
    if not pairs:
        raise CheckpointError("every site has rank 0: there is nothing to export")
    heads = [name for name, _ in record.plan.trained_modules]
    entries = peft_heads(heads, names) if heads else None
    if heads and entries is None:
        raise CheckpointError(f"PEFT's modules_to_save cannot name {', '.join(heads)} without other modules; merge the adapter instead")
    tensors: dict[str, Tensor] = {}
    for name, pair in pairs.items():
        slots = lora_slots(adapted_sites(model)[name].site)
        tensors |= {f"{PREFIX}{name}.{slots[slot].key}": tensor for slot, tensor in zip(("down", "up"), pair, strict=True)}
    for name, module in trained_modules(model).items():
        tensors |= {f"{PREFIX}{name}.{key}": tensor for key, tensor in module.trained.state_dict().items()}
    ranks = {name: len(down) for name, (down, _) in pairs.items()}
    common = Counter(ranks.values()).most_common(1)[0][0]
    config: dict[str, Any] = LORA_DEFAULTS | {
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "task_type": task_type(model),
        "inference_mode": True,
        "target_modules": peft_targets(list(pairs), heads, names),
        "modules_to_save": entries,
        "fan_in_fan_out": any(site.kind == "conv1d" for site in record.plan.sites),
        "r": common,
        "lora_alpha": common,
        "rank_pattern": peft_patterns(ranks, common),
        "alpha_pattern": peft_patterns(ranks, common),
        "lora_dropout": record.recipe.dropout,
    }
    try:
        with write_folder(folder, keep_others=True) as writing:
            plain = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
            save_file(plain, writing / WEIGHTS, metadata={"format": "pt"})
            _write_json(writing / CONFIG, config)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the export could not be written to {folder}, which is as it was before: {error}") from error
    return Path(folder)


def exact_pair(module: AdaptedLinear, recompress: bool, mixture: Mixture | None = None) -> tuple[Tensor, Tensor]:
    """(down, up) of shapes (k, in), (out, k) whose product is all that one site changes in its original base weight.

    Raises:
        CheckpointError: there is no such pair.
    """
    name, site = module.site.name, module.site
    if module.gain is not None:
        raise CheckpointError(f"{name} has a gain over base and branch, which a plain LoRA cannot hold; merge the adapter instead")
    assert module.update is not None
    if module.update.factors().shift is not None:
        raise CheckpointError(f"{name} adds a trained bias (bias=True), which other readers of a plain LoRA do not take; merge the adapter")
    if module.written and module.ledger is None:
        raise CheckpointError(
            f"the base weight of {name} was trained too, and no ledger says what was folded into it; merge the adapter instead, or train "
            "with a ledger where the schedule offers one"
        )
    if module.depends_on_input:
        return _held_still(module, mixture)
    down, up = stacked(module.update.factors(), None if module.offset is None else module.offset.start())
    for finished in module.ledger or []:
        more_down, more_up = finished.pair(site.scaling)
        down, up = torch.cat([down, more_down.to(down.device)]), torch.cat([up, more_up.to(up.device)], dim=1)
    return recompressed(down, up) if (recompress and len(down)) or len(down) > min(site.in_features, site.out_features) else (down, up)


def _held_still(module: AdaptedLinear, mixture: Mixture | None) -> tuple[Tensor, Tensor]:
    """The pair of an update under constant gates."""
    assert module.update is not None
    name = module.site.name
    if mixture is None:
        raise CheckpointError(
            f"{name}: the update depends on the {'prompt' if module.place else 'token'}, which a plain LoRA cannot hold; give constant "
            "gates, mixture=rankwise.routing.static.mean_mixture(model, batches), for one that is near it"
        )
    gates = mixture.gates[name].to(module.update.factors().down.device)
    if module.place is None:
        return stacked(module.update.stand_in(gates), None)
    down, up = stacked(module.update.factors(), None if module.offset is None else module.offset.start())
    return down[: len(down) * bool(gates.any())], up * gates  # a closed gate leaves nothing to write
