"""The exact trained parameters, for a run that is to be resumed bit for bit: what the optimizer steps, not what an adapter file holds."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rankwise.checkpoint.naming import plain_name
from rankwise.errors import CheckpointError, nearest
from rankwise.record import adapted
from rankwise.sites import AdaptedLinear, adapted_sites


def _live(model: nn.Module) -> dict[str, Tensor]:
    """Qualified name -> the model's own tensor: every parameter that trains, what it is measured from, what a schedule rewrites, what
    trained until a schedule froze it at its site (the LoRAs of earlier tasks), and the frozen factors whose ranks a schedule cuts."""
    recipe = adapted(model).recipe
    rewrites = recipe.schedule.rewrites_base
    roles = recipe.frozen_roles if recipe.schedule.changes_ranks else ()
    found: dict[str, Tensor] = {plain_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLinear) and module.gain is not None:
            found |= {f"{plain_name(name)}.gain.{anchor}": tensor for anchor, tensor in module.gain.anchors().items()}
        if isinstance(module, AdaptedLinear) and module.update is not None:
            held = [slot for slot, about in module.update.slots.items() if about.frozen or about.role in roles]
            found |= {f"{plain_name(name)}.update.{slot}": getattr(module.update, slot) for slot in held}
        if isinstance(module, AdaptedLinear) and rewrites:
            found[f"{plain_name(name)}.base_weight"] = module.storage.live(module.base_layer)
            if module.master is not None:
                found[f"{plain_name(name)}.base_master"] = module.master
            for part in ("update", "offset"):  # frozen frames and starts move with the base
                buffers = [] if getattr(module, part) is None else getattr(module, part).named_buffers()
                found |= {f"{plain_name(name)}.{part}.{key}": tensor for key, tensor in buffers}
    return found


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies, on the CPU, of every parameter that trains, by qualified name: factors, cores, DoRA's delta (with the length that it is
    measured from), heads, and the pairs of earlier tasks.

    Raises:
        TargetError: the model is not adapted.
    """
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in _live(model).items()}


@torch.no_grad()
def load_trainable_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Writes a `trainable_state` back into a model adapted with the same recipe; the optimizer's references stay valid.

    Raises:
        CheckpointError: a name is missing or unexpected, or a shape or dtype differs; the model is not touched then.
        TargetError: the model is not adapted.
    """
    live = _live(model)
    for name in live:
        if name not in state:
            raise CheckpointError(f"the state lacks {name}, which trains here; resume with the recipe and the base that the run had")
    for name, tensor in state.items():
        if name not in live:
            raise CheckpointError(
                f"the state holds {name}, which does not train here{nearest(name, live)}; resume with the run's own recipe"
            )
        mine = live[name]
        if tensor.shape != mine.shape or tensor.dtype != mine.dtype:
            raise CheckpointError(
                f"{name} is {tuple(tensor.shape)} {tensor.dtype} in the state and {tuple(mine.shape)} {mine.dtype} here; resume with the "
                "run's own rank and base"
            )
    for name, tensor in state.items():
        live[name].copy_(tensor)
    for module in adapted_sites(model).values():
        module.written = module.written or adapted(model).recipe.schedule.rewrites_base
